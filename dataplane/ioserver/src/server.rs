// SPDX-License-Identifier: Apache-2.0

//! What a server has, and who uses it: connections are accepted, told apart, and given to whoever serves them.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use link::{Link, LinkError, read_control, read_exact};
use serde_json::{Value, json};
use wire::{
    Attach, Attached, Code, Control, Greeting, Handles, Malformed, NEWEST, OLDEST, Open, Refused, SessionId, choose,
};

use crate::config::{ModuleWish, Wish};
use crate::module::Shared;
use crate::session::{Session, lock};
use crate::worker::Worker;

/// Sessions, at most.
pub const MAX_SESSIONS: usize = 1024;
/// Connections, at most: each has a thread.
pub const MAX_CONNECTIONS: usize = 4096;
/// Descriptors of a virtqueue.
pub const QUEUE_SIZE: u16 = 256;
/// For whoever connects to say what he wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// For a client to take what it is told.
const TELL: Duration = Duration::from_secs(5);
const STACK: usize = 512 * 1024;

struct Entry {
    wish: ModuleWish,
    module: Shared,
    handle: u32,
}

#[derive(Default)]
struct State {
    name: String,
    modules: HashMap<String, Entry>,
    sessions: HashMap<SessionId, Arc<Session>>,
    /// Names of hosts and guests that have a handle, which is their place here.
    known: HashMap<String, u32>,
    next_handle: u32,
    listening: Option<(SocketAddr, TcpListener)>,
}

impl State {
    fn handle_of(&mut self, name: &str) -> u32 {
        if let Some(handle) = self.known.get(name) {
            return *handle;
        }
        self.next_handle += 1;
        self.known.insert(name.to_owned(), self.next_handle);
        self.next_handle
    }
}

/// See the module's documentation.
pub struct Server {
    state: Mutex<State>,
    connections: AtomicUsize,
    busy_poll: Duration,
}

fn refused(code: Code, text: impl Into<String>) -> Refused {
    Refused { code, text: text.into() }
}

/// Tell a peer why its connection ends.
fn tell(stream: &mut TcpStream, handles: Handles, refused: Refused) -> Result<(), LinkError> {
    Ok(stream.write_all(&Control::Refused(refused).encode(handles))?)
}

impl Server {
    /// One that has nothing yet.
    pub fn new(busy_poll: Duration) -> Arc<Self> {
        Arc::new(Server { state: Mutex::default(), connections: AtomicUsize::new(0), busy_poll })
    }

    /// Have it be as wished; what is right already is not touched, and goes on.
    ///
    /// # Errors
    ///
    /// What cannot be had; the rest is there.
    pub fn apply(self: &Arc<Self>, wish: Wish) -> Result<(), String> {
        wish.check()?;
        let mut failures = Vec::new();
        let mut gone = Vec::new();
        {
            let mut state = lock(&self.state);
            state.name.clone_from(&wish.name);
            let mut before = std::mem::take(&mut state.modules);
            for module in wish.modules {
                let same = before.remove(&module.name);
                let opened = match same {
                    Some(entry) if entry.wish.what == module.what => Ok(entry.module),
                    _ => module.what.open(),
                };
                match opened {
                    Ok(opened) => {
                        let handle = state.handle_of(&format!("module {}", module.name));
                        let name = module.name.clone();
                        state.modules.insert(name, Entry { wish: module, module: opened, handle });
                    }
                    Err(error) => failures.push(format!("module {}: {error}", module.name)),
                }
            }
            let State { modules, sessions, .. } = &mut *state;
            sessions.retain(|_, session| {
                let stays = modules.get(&session.names.module).is_some_and(|entry| {
                    Arc::ptr_eq(&entry.module, &session.module) && may_use(&entry.wish, &session.names)
                });
                if !stays {
                    gone.push(Arc::clone(session));
                }
                stays
            });
        }
        for session in gone {
            session.close();
        }
        if let Err(error) = self.listen(wish.listen) {
            failures.push(format!("{}: {error}", wish.listen));
        }
        if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
    }

    fn listen(self: &Arc<Self>, address: SocketAddr) -> io::Result<()> {
        let mut state = lock(&self.state);
        if state.listening.as_ref().is_some_and(|(there, _)| *there == address) {
            return Ok(());
        }
        let listener = TcpListener::bind(address)?;
        if let Some((_, before)) = state.listening.take() {
            // Whoever waits in accept() there gets an error, and ends.
            let _ =
                nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&before), nix::sys::socket::Shutdown::Both);
        }
        state.listening = Some((address, listener.try_clone()?));
        let server = Arc::clone(self);
        std::thread::Builder::new().name("listener".to_owned()).spawn(move || server.accept(&listener))?;
        Ok(())
    }

    /// Where it listens; the port is the true one where any was asked for.
    pub fn address(&self) -> Option<SocketAddr> {
        lock(&self.state).listening.as_ref().and_then(|(_, listener)| listener.local_addr().ok())
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if self.connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
                self.connections.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let server = Arc::clone(self);
            let serve = move || {
                server.serve(stream);
                server.connections.fetch_sub(1, Ordering::Relaxed);
            };
            if std::thread::Builder::new().name("connection".to_owned()).stack_size(STACK).spawn(serve).is_err() {
                self.connections.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    fn serve(self: &Arc<Self>, mut stream: TcpStream) {
        let peer = stream.peer_addr().map_or_else(|_| "?".to_owned(), |address| address.to_string());
        match self.greet_and_dispatch(&mut stream) {
            Ok(()) | Err(LinkError::Closed) => {}
            Err(LinkError::Malformed(error)) => {
                tracing::warn!(peer, %error, "a connection is ended");
                let _ = tell(&mut stream, Handles::default(), refused(Code::Malformed, error.to_string()));
            }
            Err(error) => tracing::info!(peer, %error, "a connection has ended"),
        }
        // Its session may have it, too.
        let _ = stream.shutdown(Shutdown::Both);
    }

    fn greet_and_dispatch(self: &Arc<Self>, stream: &mut TcpStream) -> Result<(), LinkError> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(TELL))?;
        let mut greeting = [0; Greeting::SIZE];
        read_exact(stream, &mut greeting)?;
        let chosen = choose(&(OLDEST..=NEWEST), Greeting::decode(&greeting)?);
        let answer = chosen.as_ref().map_or(Greeting::OURS, |version| Greeting { oldest: *version, newest: *version });
        stream.write_all(&answer.encode())?;
        chosen?;
        let (header, control) = read_control(stream)?;
        match control {
            Control::Attach(attach) => self.attach(stream, &attach),
            Control::Open(open) => self.open(stream, open),
            _ => Err(Malformed::Kind(header.kind as u8).into()),
        }
    }

    // -- control connections -----------------------------------------------------------------------------------------

    fn attach(self: &Arc<Self>, stream: &mut TcpStream, attach: &Attach) -> Result<(), LinkError> {
        let (session, resumed) = match self.find_or_make(attach) {
            Ok(found) => found,
            Err(refused) => {
                tracing::warn!(names = ?attach.names, code = ?refused.code, "a client is refused: {}", refused.text);
                return tell(stream, Handles::default(), refused);
            }
        };
        if let Err(code) = session.attach(attach.epoch, stream) {
            return tell(stream, session.handles, refused(code, "a later connection has been seen"));
        }
        for ((replay, _), settled) in session.queues.iter().zip(&attach.settled) {
            // One that is still being served learns it by the next request.
            if let Ok(mut replay) = replay.try_lock() {
                let _ = replay.settle(*settled, u64::MAX);
            }
        }
        let attached = Attached {
            handles: session.handles,
            features: session.module.features(),
            queues: session.queues.len() as u16,
            queue_size: QUEUE_SIZE,
            resumed,
            config: session.module.config(),
        };
        session.tell(&Control::Attached(attached));
        tracing::info!(names = ?session.names, session = ?session.id, epoch = attach.epoch, resumed, "attached");
        let outcome = self.converse(stream, &session);
        session.left(attach.epoch);
        outcome
    }

    fn find_or_make(&self, attach: &Attach) -> Result<(Arc<Session>, bool), Refused> {
        let mut state = lock(&self.state);
        let names = &attach.names;
        let Some(entry) = state.modules.get(&names.module).filter(|_| names.server == state.name) else {
            return Err(refused(Code::NoModule, format!("server {} has no such module", state.name)));
        };
        if !may_use(&entry.wish, names) {
            return Err(refused(Code::NotAllowed, "the guest may not use it"));
        }
        if entry.module.device() != attach.device {
            return Err(refused(Code::OtherDevice, format!("it is a device of type {}", entry.module.device() as u16)));
        }
        if let Some(session) = state.sessions.get(&attach.session) {
            if session.names != *names {
                return Err(refused(Code::NotAllowed, "the session is another guest's"));
            }
            return Ok((Arc::clone(session), true));
        }
        if state.sessions.len() >= MAX_SESSIONS {
            return Err(refused(Code::Full, "there are too many sessions"));
        }
        let (module, handle) = (Arc::clone(&entry.module), entry.handle);
        let queues = attach.queues.clamp(1, module.queues());
        let handles = Handles {
            client: state.handle_of(&format!("host {}", names.client)),
            guest: state.handle_of(&format!("guest {}", names.guest)),
            server: state.handle_of(&format!("host {}", names.server)),
            module: handle,
        };
        let session = Arc::new(Session::new(attach.session, names.clone(), handles, module, queues));
        state.sessions.insert(attach.session, Arc::clone(&session));
        Ok((session, false))
    }

    fn converse(&self, stream: &mut TcpStream, session: &Arc<Session>) -> Result<(), LinkError> {
        stream.set_read_timeout(None)?;
        loop {
            let (header, control) = read_control(stream)?;
            if header.handles != session.handles {
                return Err(Malformed::Value("handle").into());
            }
            match control {
                Control::Ping => session.tell(&Control::Pong),
                Control::Features(features) => tracing::debug!(session = ?session.id, features, "the driver is ready"),
                Control::Detach => {
                    lock(&self.state).sessions.remove(&session.id);
                    session.close();
                    tracing::info!(names = ?session.names, session = ?session.id, "detached");
                    return Ok(());
                }
                _ => return Err(Malformed::Kind(header.kind as u8).into()),
            }
        }
    }

    // -- queue connections -------------------------------------------------------------------------------------------

    fn open(&self, stream: &mut TcpStream, open: Open) -> Result<(), LinkError> {
        let session = lock(&self.state).sessions.get(&open.session).cloned();
        let Some(session) = session else {
            return tell(stream, Handles::default(), refused(Code::NoSession, "attach first"));
        };
        let Some((replay, _)) = session.queues.get(usize::from(open.queue)) else {
            return Err(Malformed::Value("queue").into());
        };
        if let Err(code) = session.open(open.epoch, open.queue, stream) {
            return tell(stream, Handles::default(), refused(code, "a later connection has been seen"));
        }
        let mut replay = lock(replay);
        stream.write_all(&Control::Opened.encode(session.handles))?;
        stream.set_nonblocking(true)?;
        let link = Link::new(stream.try_clone()?);
        let mut worker = Worker::new(&session, open.queue, &mut replay, link, self.busy_poll)?;
        let error = worker.run();
        stream.set_nonblocking(false)?;
        Err(error)
    }

    // -- for the control plane ---------------------------------------------------------------------------------------

    /// Change the size of a module, and interrupt all guests that use it.
    ///
    /// # Errors
    ///
    /// There is no such module, or it cannot have that size.
    pub fn resize(&self, module: &str, size: u64) -> Result<(), String> {
        let (found, sessions) = {
            let state = lock(&self.state);
            let entry = state.modules.get(module).ok_or_else(|| format!("there is no module {module}"))?;
            let uses = |session: &&Arc<Session>| Arc::ptr_eq(&session.module, &entry.module);
            let sessions: Vec<_> = state.sessions.values().filter(uses).cloned().collect();
            (Arc::clone(&entry.module), sessions)
        };
        found.resize(size)?;
        let control = Control::Config(found.config());
        for session in sessions {
            session.tell(&control);
        }
        Ok(())
    }

    /// What there is, and what it has done.
    pub fn stats(&self) -> Value {
        let state = lock(&self.state);
        let sessions: Vec<_> = state
            .sessions
            .values()
            .map(|session| {
                let queues: Vec<_> = session.queues.iter().map(|(_, counters)| counters).collect();
                json!({
                    "client": session.names.client,
                    "guest": session.names.guest,
                    "module": session.names.module,
                    "attached": session.is_attached(),
                    "queues": queues,
                })
            })
            .collect();
        let modules: Vec<_> = state.modules.keys().collect();
        let connections = self.connections.load(Ordering::Relaxed);
        json!({"name": state.name, "modules": modules, "sessions": sessions, "connections": connections})
    }
}

fn may_use(wish: &ModuleWish, names: &wire::Names) -> bool {
    wish.guests.iter().any(|guest| guest.client == names.client && guest.guest == names.guest)
}
