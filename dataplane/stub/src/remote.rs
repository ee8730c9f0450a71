// SPDX-License-Identifier: Apache-2.0

//! The way to a device's server: the control connection, and which session and epoch count.
//!
//! ```text
//!            connected, attached                    any connection lost, no Pong
//!   down ───────────────────────────► up (epoch n) ──────────────────────────────► down
//!     ▲                                                                              │
//!     └────────────────────────── retry after [`RETRY`] ─────────────────────────────┘
//! ```
//!
//! A thread keeps it. The workers of the queues look at [`Remote::state`], are woken when it changes, and say so when
//! one of their connections is lost.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use link::{LinkError, read_control};
use nix::sys::eventfd::EventFd;
use wire::{
    Attach, Attached, Control, Device, Greeting, Handles, Malformed, NEWEST, Names, OLDEST, Open, Refused, SessionId,
    choose,
};

use crate::wish::Wish;

/// Until the next attempt.
pub const RETRY: Duration = Duration::from_millis(500);
/// For the server to answer when a connection is made.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two questions whether it is still there.
const PING: Duration = Duration::from_secs(2);
/// Without a word of it until it is taken for lost.
const SILENCE: Duration = Duration::from_secs(7);

/// Why there is no way to the server.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The server refuses.
    #[error("refused: {0}")]
    Refused(String),
    /// It wants to be asked elsewhere.
    #[error("the server says to ask {0}")]
    Redirect(String),
    /// It does not speak the protocol.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The network, or the server's host.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It says nothing any more.
    #[error("the server is silent")]
    Silent,
}

impl From<LinkError> for RemoteError {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Closed => io::Error::from(ErrorKind::UnexpectedEof).into(),
            LinkError::Io(error) => error.into(),
            LinkError::Malformed(error) => error.into(),
        }
    }
}

/// What is true now.
#[derive(Clone, Debug)]
pub struct State {
    /// The session that is wanted.
    pub session: SessionId,
    /// Counts connections of the session.
    pub epoch: u32,
    /// There is a way to the server.
    pub up: bool,
    /// What the server has said last.
    pub known: Option<Attached>,
    /// Why there is no way.
    pub trouble: Option<String>,
    /// Since when it is so.
    pub since: Instant,
    closed: bool,
}

/// See the module's documentation.
pub struct Remote {
    names: Names,
    device: Device,
    queues: u16,
    address: Mutex<String>,
    state: Mutex<State>,
    /// How often `state` has changed.
    changes: AtomicU64,
    changed: Condvar,
    control: Mutex<Option<TcpStream>>,
    wakers: Mutex<Vec<Arc<EventFd>>>,
    on_config: Mutex<Option<Box<dyn Fn() + Send>>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A session's number that nobody has.
pub fn fresh_session() -> SessionId {
    let mut bytes = [0; 16];
    // Without the kernel's random numbers nothing here can be kept apart.
    getrandom::fill(&mut bytes).expect("random numbers");
    SessionId(bytes)
}

/// The epoch of the first connection that this process makes: later than those of all before it.
fn first_epoch() -> u32 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs() as u32)
}

impl Remote {
    /// Begin to look for the server.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub fn start(wish: &Wish) -> io::Result<Arc<Self>> {
        let state = State {
            session: fresh_session(),
            epoch: first_epoch(),
            up: false,
            known: None,
            trouble: None,
            since: Instant::now(),
            closed: false,
        };
        let names = Names {
            client: wish.client.clone(),
            guest: wish.guest.clone(),
            server: wish.server.clone(),
            module: wish.module.clone(),
        };
        let remote = Arc::new(Remote {
            names,
            device: wish.kind.into(),
            queues: wish.queues,
            address: Mutex::new(wish.address.clone()),
            state: Mutex::new(state),
            changes: AtomicU64::new(0),
            changed: Condvar::new(),
            control: Mutex::default(),
            wakers: Mutex::default(),
            on_config: Mutex::default(),
        });
        let theirs = Arc::clone(&remote);
        std::thread::Builder::new().name("remote".to_owned()).spawn(move || theirs.keep())?;
        Ok(remote)
    }

    /// What is true now.
    pub fn state(&self) -> State {
        lock(&self.state).clone()
    }

    /// How often that has changed: to know that nothing has, it need not be copied.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Wait until the server has told what the device is, at most that long.
    pub fn wait_until_known(&self, most: Duration) -> Option<Attached> {
        let state = lock(&self.state);
        let waited = self.changed.wait_timeout_while(state, most, |state| state.known.is_none() && !state.closed);
        waited.unwrap_or_else(PoisonError::into_inner).0.known.clone()
    }

    /// Have a queue's worker woken whenever something changes.
    pub fn wake(&self, waker: Arc<EventFd>) {
        lock(&self.wakers).push(waker);
    }

    /// Call this when the device's configuration has changed; None: nobody is there to hear it.
    pub fn on_config(&self, hear: Option<Box<dyn Fn() + Send>>) {
        *lock(&self.on_config) = hear;
    }

    /// Go on with another session; the one before is given up. Nothing happens where it is the same.
    pub fn use_session(&self, session: SessionId) {
        let before = self.state();
        if before.session == session {
            return;
        }
        self.detach(&before);
        self.change(|state| state.session = session);
        self.cut();
    }

    /// A connection of that epoch is lost: all of them are made anew.
    pub fn lost(&self, epoch: u32) {
        if lock(&self.state).epoch == epoch {
            self.cut();
        }
    }

    /// Give it up for good.
    pub fn close(&self) {
        self.detach(&self.state());
        self.change(|state| state.closed = true);
        self.cut();
    }

    /// Give up the session, if the server can be told.
    fn detach(&self, state: &State) {
        if let (Some(stream), true, Some(known)) = (&mut *lock(&self.control), state.up, &state.known) {
            let _ = stream.write_all(&Control::Detach.encode(known.handles));
        }
    }

    fn cut(&self) {
        if let Some(stream) = lock(&self.control).take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn change(&self, how: impl FnOnce(&mut State)) {
        how(&mut lock(&self.state));
        self.changes.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
        for waker in lock(&self.wakers).iter() {
            let _ = waker.write(1);
        }
    }

    // -- the thread --------------------------------------------------------------------------------------------------

    fn keep(&self) {
        loop {
            let error = match self.hold() {
                Ok(()) => return,
                Err(error) => error,
            };
            self.cut();
            let state = self.state();
            if state.closed {
                return;
            }
            if let RemoteError::Redirect(address) = &error {
                lock(&self.address).clone_from(address);
            }
            let told = error.to_string();
            if state.trouble.as_ref() != Some(&told) {
                tracing::warn!(names = ?self.names, "no way to the server: {told}");
            }
            self.change(|state| {
                if std::mem::take(&mut state.up) || state.trouble.is_none() {
                    state.since = Instant::now();
                }
                state.trouble = Some(told);
                state.epoch = state.epoch.wrapping_add(1);
            });
            let state = lock(&self.state);
            let session = state.session;
            let stays = |state: &mut State| !state.closed && state.session == session;
            let _ = self.changed.wait_timeout_while(state, RETRY, stays);
        }
    }

    /// Attach, and stay attached; Ok when it is given up for good.
    fn hold(&self) -> Result<(), RemoteError> {
        let mut stream = self.connect()?;
        let State { session, epoch, closed, .. } = self.state();
        if closed {
            return Ok(());
        }
        let attach = Attach {
            names: self.names.clone(),
            session,
            epoch,
            device: self.device,
            queues: self.queues,
            hops: 0,
            settled: Vec::new(),
        };
        stream.write_all(&Control::Attach(attach).encode(Handles::default()))?;
        let attached = match read_control(&mut stream)?.1 {
            Control::Attached(attached) => attached,
            Control::Refused(Refused { text, .. }) => return Err(RemoteError::Refused(text)),
            Control::Redirect(address) => return Err(RemoteError::Redirect(address)),
            other => return Err(Malformed::Kind(other.kind() as u8).into()),
        };
        let handles = attached.handles;
        tracing::info!(names = ?self.names, ?session, epoch, resumed = attached.resumed, "attached");
        *lock(&self.control) = Some(stream.try_clone()?);
        let before = self.state().known.map(|known| known.config);
        let other = before.is_some_and(|before| before != attached.config);
        self.change(|state| {
            state.up = true;
            state.known = Some(attached);
            state.trouble = None;
            state.since = Instant::now();
        });
        if other {
            self.tell_config();
        }
        self.listen(&mut stream, handles)
    }

    fn listen(&self, stream: &mut TcpStream, handles: Handles) -> Result<(), RemoteError> {
        let (mut heard, mut asked) = (Instant::now(), Instant::now());
        loop {
            stream.set_read_timeout(Some(PING))?;
            match stream.peek(&mut [0]) {
                Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
                Ok(_) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    heard = Instant::now();
                    match read_control(stream)?.1 {
                        Control::Config(config) => {
                            tracing::info!(names = ?self.names, "the configuration has changed");
                            self.change(|state| {
                                if let Some(known) = &mut state.known {
                                    known.config = config;
                                }
                            });
                            self.tell_config();
                        }
                        Control::Pong => {}
                        Control::Redirect(address) => return Err(RemoteError::Redirect(address)),
                        Control::Refused(Refused { text, .. }) => return Err(RemoteError::Refused(text)),
                        other => return Err(Malformed::Kind(other.kind() as u8).into()),
                    }
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
            if heard.elapsed() > SILENCE {
                return Err(RemoteError::Silent);
            }
            if asked.elapsed() >= PING {
                stream.write_all(&Control::Ping.encode(handles))?;
                asked = Instant::now();
            }
        }
    }

    /// Tell whoever is there that the device's configuration has changed.
    pub fn tell_config(&self) {
        if let Some(hear) = &*lock(&self.on_config) {
            hear();
        }
    }

    // -- connections -------------------------------------------------------------------------------------------------

    fn connect(&self) -> Result<TcpStream, RemoteError> {
        let address = lock(&self.address).clone();
        let mut last = io::Error::from(ErrorKind::AddrNotAvailable);
        for each in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&each, PATIENCE) {
                Ok(mut stream) => {
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(PATIENCE))?;
                    stream.set_write_timeout(Some(PATIENCE))?;
                    greet(&mut stream)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last.into())
    }

    /// A connection for a queue, of the session and epoch that count now.
    ///
    /// # Errors
    ///
    /// There is none to be had.
    pub fn open(&self, state: &State, queue: u16) -> Result<TcpStream, RemoteError> {
        let mut stream = self.connect()?;
        let open = Open { session: state.session, epoch: state.epoch, queue };
        stream.write_all(&Control::Open(open).encode(Handles::default()))?;
        match read_control(&mut stream)?.1 {
            Control::Opened => Ok(stream),
            Control::Refused(Refused { text, .. }) => Err(RemoteError::Refused(text)),
            other => Err(Malformed::Kind(other.kind() as u8).into()),
        }
    }
}

fn greet(stream: &mut TcpStream) -> Result<(), RemoteError> {
    stream.write_all(&Greeting::OURS.encode())?;
    let mut greeting = [0; Greeting::SIZE];
    stream.read_exact(&mut greeting)?;
    let theirs = Greeting::decode(&greeting)?;
    choose(&(OLDEST..=NEWEST), theirs)?;
    Ok(())
}
