// SPDX-License-Identifier: Apache-2.0

//! What is wished for and what is there: sockets, taps, connections of VMMs, and the ports of the data thread.
//!
//! A wish is always the whole of it. What is there already stays as it is, so to wish the same again changes nothing,
//! and a wish after a restart makes everything anew. What cannot be made is told, and does not keep the rest from being
//! made; the next wish tries it again.
//!
//! One VMM is served per port. Another that connects waits until the first has gone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signalfd::SignalFd;
use serde::Serialize;
use vring::socket::Socket;

use crate::control;
use crate::list::List;
use crate::poll::{Gone, Handle};
use crate::session;
use crate::tap::Tap;
use crate::wish::{self, Mac, Wish};

const SIGNAL: u64 = 0;
const CONTROL: u64 = 1;
const ENDED: u64 = 2;
const FIRST_PORT: u64 = 16;
/// A thread per VMM only reads its socket.
const STACK: usize = 256 * 1024;
/// After a failure that stays for a while, such as too many open files.
const BREATH: Duration = Duration::from_millis(100);

/// Why a wish is not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum WishError {
    /// It is impossible; nothing was done.
    #[error("{0}")]
    Impossible(String),
    /// Some ports could not be made, or not as they should be.
    #[error("{}", .0.join("; "))]
    Ports(Vec<String>),
    /// The data thread has ended.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// One port, for `stats`.
#[derive(Debug, Serialize)]
pub struct PortStats {
    connected: bool,
    failed: Option<String>,
    features: u64,
    queues: u16,
    tx_packets: u64,
    tx_bytes: u64,
    rx_packets: u64,
    rx_bytes: u64,
    slow_packets: u64,
    from_tap_packets: u64,
    dropped_full: u64,
    dropped_malformed: u64,
    last_seen_ns: u64,
}

/// Who has sent how much to whom, for `stats`.
#[derive(Debug, Serialize)]
pub struct PairStats {
    from: Mac,
    to: Mac,
    packets: u64,
    bytes: u64,
    last_seen_ns: u64,
}

/// The answer to `stats`.
#[derive(Debug, Serialize)]
pub struct Stats {
    ports: BTreeMap<String, PortStats>,
    pairs: Vec<PairStats>,
}

struct Session {
    stream: UnixStream,
    thread: JoinHandle<()>,
    ended: Arc<AtomicBool>,
}

impl Session {
    /// Disconnect the VMM and wait until nothing of it is left.
    fn end(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if self.thread.join().is_err() {
            tracing::error!("the thread of a connection has panicked");
        }
    }
}

struct Attached {
    name: String,
    /// A link of the same name may be another by now.
    index: u32,
}

struct Entry {
    wish: Wish,
    slot: u32,
    token: u64,
    socket: Socket,
    /// None also where the wanted one could not be attached.
    tap: Option<Attached>,
    session: Option<Session>,
}

#[derive(Default)]
struct State {
    ports: BTreeMap<String, Entry>,
    tokens: u64,
}

/// See the module's documentation.
pub struct Daemon {
    switch: Handle,
    epoll: Epoll,
    ended: EventFd,
    state: Mutex<State>,
}

fn link_index(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}

impl Daemon {
    /// A daemon without ports.
    ///
    /// # Errors
    ///
    /// There are too many open files.
    pub fn new(switch: Handle) -> io::Result<Self> {
        let daemon = Daemon {
            switch,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            ended: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            state: Mutex::default(),
        };
        daemon.watch(&daemon.ended, ENDED)?;
        Ok(daemon)
    }

    fn watch(&self, file: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(file, EpollEvent::new(EpollFlags::EPOLLIN, token))?)
    }

    fn unwatch(&self, file: impl AsFd) {
        // It is not waited for while a VMM is connected.
        let _ = self.epoll.delete(file);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- wishes

    /// Make the ports what they should be. `sockets` are listening sockets by the names of their ports.
    ///
    /// # Errors
    ///
    /// See [`WishError`].
    pub fn apply(&self, ports: Vec<Wish>, mut sockets: HashMap<String, OwnedFd>) -> Result<(), WishError> {
        wish::check(&ports).map_err(WishError::Impossible)?;
        let names: HashSet<&String> = ports.iter().map(|port| &port.name).collect();
        if let Some(stranger) = sockets.keys().find(|name| !names.contains(name)) {
            return Err(WishError::Impossible(format!("a socket for {stranger}, which is no port")));
        }
        let mut state = self.state();
        let gone: Vec<String> = state.ports.keys().filter(|name| !names.contains(name)).cloned().collect();
        for name in gone {
            self.close(&mut state, &name)?;
        }
        // What one port gives up another may want.
        for port in &ports {
            if let Some(entry) = state.ports.get_mut(&port.name) {
                self.give_up_tap(entry, port.tap.as_deref())?;
            }
        }
        let mut problems = Vec::new();
        for port in ports {
            let name = port.name.clone();
            let socket = sockets.remove(&name);
            if let Err(error) = self.ensure(&mut state, port, socket)? {
                problems.push(format!("port {name}: {error}"));
            }
        }
        let settings = state.ports.values().map(|entry| (entry.slot, entry.wish.settings())).collect();
        let mut list = List::default();
        for entry in state.ports.values() {
            for address in entry.wish.addresses() {
                list.insert(entry.wish.net, address, entry.slot);
            }
        }
        self.switch.run(move |switch| switch.change(settings, list))?;
        if problems.is_empty() { Ok(()) } else { Err(WishError::Ports(problems)) }
    }

    fn close(&self, state: &mut State, name: &str) -> Result<(), Gone> {
        let Some(entry) = state.ports.remove(name) else { return Ok(()) };
        tracing::info!(port = name, "closed");
        self.unwatch(&entry.socket);
        drop(entry.socket);
        if let Some(session) = entry.session {
            session.end();
        }
        self.switch.run(move |switch| switch.remove(entry.slot))
    }

    fn give_up_tap(&self, entry: &mut Entry, wanted: Option<&str>) -> Result<(), Gone> {
        let Some(tap) = &entry.tap else { return Ok(()) };
        if wanted == Some(&tap.name) && link_index(&tap.name) == Some(tap.index) {
            return Ok(());
        }
        entry.tap = None;
        let slot = entry.slot;
        let _ = self.switch.run(move |switch| switch.change_tap(slot, None))?;
        Ok(())
    }

    fn ensure(&self, state: &mut State, port: Wish, socket: Option<OwnedFd>) -> Result<io::Result<()>, Gone> {
        if !state.ports.contains_key(&port.name) {
            return self.open(state, port, socket);
        }
        let Some(entry) = state.ports.get_mut(&port.name) else { return Ok(Ok(())) };
        let mut result = self.ensure_socket(entry, &port, socket);
        if entry.wish.queues != port.queues
            && let Some(session) = entry.session.take()
        {
            // The VMM connects again, and is told the new number.
            session.end();
            result = result.and(self.watch(&entry.socket, entry.token));
        }
        if entry.tap.is_none()
            && let Some(name) = &port.tap
        {
            match attach(name) {
                Ok((tap, attached)) => {
                    let slot = entry.slot;
                    result = result.and(self.switch.run(move |switch| switch.change_tap(slot, Some(tap)))?);
                    entry.tap = Some(attached);
                }
                Err(error) => result = result.and(Err(error)),
            }
        }
        // A socket that could not be bound is tried again because the old wish is kept.
        let Wish { socket, socket_mode, socket_owner, .. } = entry.wish.clone();
        entry.wish = port;
        if result.is_err() {
            (entry.wish.socket, entry.wish.socket_mode, entry.wish.socket_owner) = (socket, socket_mode, socket_owner);
        }
        Ok(result)
    }

    fn ensure_socket(&self, entry: &mut Entry, port: &Wish, socket: Option<OwnedFd>) -> io::Result<()> {
        let wanted = |wish: &Wish| (wish.socket.clone(), wish.socket_mode, wish.socket_owner);
        let socket = match socket {
            Some(socket) => Socket::take(socket, &port.socket)?,
            None if wanted(&entry.wish) == wanted(port) => return Ok(()),
            None => Socket::bind(&port.socket, port.socket_mode, port.socket_owner)?,
        };
        self.unwatch(&entry.socket);
        entry.socket = socket;
        if entry.session.is_none() {
            self.watch(&entry.socket, entry.token)?;
        }
        Ok(())
    }

    fn open(&self, state: &mut State, port: Wish, socket: Option<OwnedFd>) -> Result<io::Result<()>, Gone> {
        let prepared = port.tap.as_deref().map(attach).transpose().and_then(|tap| {
            let socket = match socket {
                Some(socket) => Socket::take(socket, &port.socket)?,
                None => Socket::bind(&port.socket, port.socket_mode, port.socket_owner)?,
            };
            Ok((tap, socket))
        });
        let (tap, socket) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Ok(Err(error)),
        };
        let (tap, attached) = tap.unzip();
        let (name, settings) = (port.name.clone(), port.settings());
        let slot = match self.switch.run(move |switch| switch.add(name, settings, tap))? {
            Ok(slot) => slot,
            Err(error) => return Ok(Err(error)),
        };
        let token = FIRST_PORT + state.tokens;
        state.tokens += 1;
        if let Err(error) = self.watch(&socket, token) {
            self.switch.run(move |switch| switch.remove(slot))?;
            return Ok(Err(error));
        }
        tracing::info!(port = port.name, socket = %port.socket.display(), "open");
        let entry = Entry { wish: port, slot, token, socket, tap: attached, session: None };
        state.ports.insert(entry.wish.name.clone(), entry);
        Ok(Ok(()))
    }

    // ---- statistics

    /// What all ports have done.
    ///
    /// # Errors
    ///
    /// The data thread has ended.
    pub fn stats(&self) -> Result<Stats, Gone> {
        let state = self.state();
        let names: HashMap<u32, &String> = state.ports.iter().map(|(name, entry)| (entry.slot, name)).collect();
        let mut stats = Stats { ports: BTreeMap::new(), pairs: Vec::new() };
        for report in self.switch.run(|switch| switch.reports())? {
            let Some(name) = names.get(&report.slot) else { continue };
            for traffic in &report.traffic {
                stats.pairs.push(PairStats {
                    from: Mac(report.mac),
                    to: Mac(traffic.to),
                    packets: traffic.packets,
                    bytes: traffic.bytes,
                    last_seen_ns: traffic.last_seen_ns,
                });
            }
            let counters = report.counters;
            let port = PortStats {
                connected: report.connected,
                failed: report.failed,
                features: report.features,
                queues: report.queues,
                tx_packets: counters.tx_packets,
                tx_bytes: counters.tx_bytes,
                rx_packets: counters.rx_packets,
                rx_bytes: counters.rx_bytes,
                slow_packets: counters.slow_packets,
                from_tap_packets: counters.from_tap_packets,
                dropped_full: counters.dropped_full,
                dropped_malformed: counters.dropped_malformed,
                last_seen_ns: counters.last_seen_ns,
            };
            stats.ports.insert((*name).clone(), port);
        }
        Ok(stats)
    }

    // ---- what happens

    /// Serve the control plane, and the VMMs, until a signal comes; the sockets' files are gone then.
    ///
    /// # Errors
    ///
    /// The kernel refuses to wait.
    pub fn run(self: &Arc<Self>, control: &UnixListener, signals: &SignalFd) -> io::Result<()> {
        control.set_nonblocking(true)?;
        self.watch(control, CONTROL)?;
        self.watch(signals, SIGNAL)?;
        let mut events = [EpollEvent::empty(); 16];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            for event in &events[..count] {
                match event.data() {
                    SIGNAL => {
                        self.state().ports.clear();
                        return Ok(());
                    }
                    CONTROL => self.accept_control(control),
                    ENDED => self.clean_up(),
                    token => self.accept(token),
                }
            }
        }
    }

    fn accept_control(self: &Arc<Self>, control: &UnixListener) {
        let stream = match control.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::warn!(%error, "a control connection cannot be accepted");
                std::thread::sleep(BREATH);
                return;
            }
        };
        let daemon = Arc::clone(self);
        let thread = std::thread::Builder::new().name("control".to_owned());
        if let Err(error) = thread.spawn(move || control::serve(&stream, &daemon)) {
            tracing::warn!(%error, "a control connection cannot be served");
        }
    }

    fn accept(self: &Arc<Self>, token: u64) {
        let mut state = self.state();
        let Some(entry) = state.ports.values_mut().find(|entry| entry.token == token) else { return };
        if entry.session.is_some() {
            return;
        }
        match self.begin(entry) {
            Ok(Some(session)) => {
                self.unwatch(&entry.socket);
                entry.session = Some(session);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(port = entry.wish.name, %error, "a VMM cannot be served");
                // It is tried again, but not as fast as that is possible.
                std::thread::sleep(BREATH);
            }
        }
    }

    fn begin(self: &Arc<Self>, entry: &Entry) -> io::Result<Option<Session>> {
        let Some(stream) = entry.socket.accept()? else { return Ok(None) };
        let ended = Arc::new(AtomicBool::new(false));
        let theirs = stream.try_clone()?;
        let (daemon, done) = (Arc::clone(self), Arc::clone(&ended));
        let (slot, name, pairs) = (entry.slot, entry.wish.name.clone(), entry.wish.queues);
        let thread = std::thread::Builder::new().name("vmm".to_owned()).stack_size(STACK).spawn(move || {
            session::serve(theirs, &daemon.switch, slot, &name, pairs);
            done.store(true, Ordering::Release);
            let _ = daemon.ended.write(1);
        })?;
        Ok(Some(Session { stream, thread, ended }))
    }

    /// Wait again for VMMs of ports whose VMM has gone.
    fn clean_up(&self) {
        let _ = self.ended.read();
        let mut state = self.state();
        for entry in state.ports.values_mut() {
            let has_ended = |session: &mut Session| session.ended.load(Ordering::Acquire);
            if let Some(session) = entry.session.take_if(has_ended) {
                session.end();
                if let Err(error) = self.watch(&entry.socket, entry.token) {
                    tracing::warn!(port = entry.wish.name, %error, "no VMM can connect any more");
                }
            }
        }
    }
}

fn attach(name: &str) -> io::Result<(Tap, Attached)> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("tap {name}: {error}"));
    let tap = Tap::attach(name).map_err(named)?;
    let index = link_index(name).ok_or_else(|| named(io::ErrorKind::NotFound.into()))?;
    Ok((tap, Attached { name: name.to_owned(), index }))
}
