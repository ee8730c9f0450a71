// SPDX-License-Identifier: Apache-2.0

//! The switch itself: the ports of this host, the list, and the way of a frame between them.
//!
//! ```text
//!   sender's queue ──► first bytes copied ──► plainly fine? ──no──────────────────────────────► sender's tap
//!                                                 │ yes                                     (kernel's switch)
//!                                                 ▼
//!                             destination is a port of this list, that may be talked to,
//!                             that is not `slow`, and that can take the frame as it is ──no──► sender's tap
//!                                                 │ yes
//!                                                 ▼
//!                            the copy, with the receiver's MAC, and the rest of the frame
//!                            into the receiver's queue ──no room──► wait up to a millisecond ──► dropped
//!
//!   tap ──► receiver's queue
//! ```
//!
//! Frames are taken in batches; what was used is shown to the guests after each. All of this runs in one thread (see
//! [`crate::poll`]), and nothing here waits, except that a frame may stay in its sender's queue until the receiver has
//! room. A receiver earns that patience by taking frames, so one that takes none cannot hold up the sender's frames
//! to others for long.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vring::memory::{DirtyLog, GuestMemory, Segment, copy_from};
use vring::ring::{Addresses, Direction, LINE, Ring, RingError, prefetch};

use crate::frame::{self, Address, ETHERNET, MAX_FRAME, NET_HEADER, NetHeader};
use crate::head::{HEAD, Head};
use crate::list::List;
use crate::poll::{Events, Pace, Token};
use crate::port::{Buffers, Counters, MAX_PAIRS, Packet, Port, Received, Settings, Traffic};
use crate::tap::Tap;

/// Frames of one queue in one go.
pub const BATCH: u16 = 32;
/// Parts of one `writev`, by the kernel's `UIO_MAXIOV`.
const MAX_PARTS: usize = 1024;
/// How long a frame from a tap waits for the guest, in nanoseconds.
const HOLD: u64 = 1_000_000;

const _: () = assert!(HEAD - NET_HEADER >= frame::EXAMINED);

/// Why a request of a VMM is refused.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// There is no such port (any more).
    #[error("the port is gone")]
    NoPort,
    /// There is no such queue.
    #[error("there is no queue {0}")]
    NoQueue(u32),
    /// The ring cannot be changed while it is running.
    #[error("queue {0} is running")]
    Running(u16),
    /// The base is no index of a ring.
    #[error("queue {0} cannot begin at {1}")]
    Base(u16, u32),
    /// The ring is impossible.
    #[error("queue {queue}: {source}")]
    Ring {
        /// Queue.
        queue: u16,
        /// Why.
        source: RingError,
    },
    /// The file is no eventfd.
    #[error("queue {0}: the file given for events is none that can be waited for: {1}")]
    Event(u16, io::Error),
}

/// One port as the control plane sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Its slot.
    pub slot: u32,
    /// A VMM is connected.
    pub connected: bool,
    /// Why the device is not served any more.
    pub failed: Option<String>,
    /// Features that the guest has negotiated.
    pub features: u64,
    /// Queue pairs that are running.
    pub queues: u16,
    /// MAC.
    pub mac: [u8; 6],
    /// What it has done.
    pub counters: Counters,
    /// What it has sent, and to whom.
    pub traffic: Vec<Traffic>,
}

/// A frame in a sender's queue: its buffer, and where its bytes are in `Scratch::segments`.
#[derive(Clone, Copy)]
struct Chain {
    head: u16,
    start: u32,
    end: u32,
    total: u64,
}

/// Frames of a batch that go to one receiver one after the other: what is true of the first is true of all.
struct Run {
    to: Address,
    slot: u32,
    /// None: the receiver is not there.
    queue: Option<u16>,
    packets: u64,
    bytes: u64,
}

/// Memory that is used again for each frame.
struct Scratch {
    chains: Vec<Chain>,
    segments: Vec<Segment>,
    head: Head,
    receive: Buffers,
    parts: Vec<libc::iovec>,
    frame: Vec<u8>,
}

// SAFETY: the pointers among the segments and parts are void between two calls: they are only kept for their memory.
unsafe impl Send for Scratch {}

/// What became of a queue or a tap in one round.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Worked,
    Waits,
    Nothing,
    Stopped,
}

/// What became of a sender's frame.
enum Fate {
    /// Its buffer can be used again.
    Gone,
    /// It has to stay in the queue.
    Waits,
}

/// What ends the service of the sender.
enum Broken {
    Ring(RingError),
    ShortHeader(u64),
}

impl From<RingError> for Broken {
    fn from(error: RingError) -> Self {
        Broken::Ring(error)
    }
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Broken::Ring(error) => error.fmt(f),
            Broken::ShortHeader(total) => write!(f, "a frame of {total} bytes, which is less than its virtio_net_hdr"),
        }
    }
}

/// The ports of a host.
pub struct Switch {
    events: Events,
    busy_poll: u64,
    ports: Vec<Option<Box<Port>>>,
    list: List,
    /// Send queues that are polled.
    active: Vec<(u32, u16)>,
    /// Taps that have something to read.
    ready: Vec<u32>,
    /// Receive queues with something to show.
    touched: Vec<(u32, u16)>,
    /// There only within a batch.
    run: Option<Run>,
    scratch: Scratch,
}

impl Switch {
    /// A switch without ports, that polls a quiet queue for `busy_poll` nanoseconds.
    pub fn new(events: Events, busy_poll: u64) -> Self {
        Switch {
            events,
            busy_poll,
            ports: Vec::new(),
            list: List::default(),
            active: Vec::new(),
            ready: Vec::new(),
            touched: Vec::new(),
            run: None,
            scratch: Scratch {
                chains: Vec::with_capacity(usize::from(BATCH)),
                segments: Vec::with_capacity(1024),
                head: Head::default(),
                receive: Buffers::default(),
                parts: Vec::with_capacity(MAX_PARTS),
                frame: vec![0; NET_HEADER + MAX_FRAME],
            },
        }
    }

    /// The files that are waited for.
    pub fn events(&self) -> &Events {
        &self.events
    }

    // ---- what the control plane asks for

    /// Add a port; gives its slot.
    ///
    /// # Errors
    ///
    /// Its tap cannot be waited for.
    pub fn add(&mut self, name: String, settings: Settings, tap: Option<Tap>) -> io::Result<u32> {
        let slot = match self.ports.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                self.ports.push(None);
                self.ports.len() - 1
            }
        };
        if let Some(tap) = &tap {
            self.events.add(tap.as_fd(), Token::Tap(slot as u32))?;
        }
        self.ports[slot] = Some(Box::new(Port::new(name, settings, tap)));
        Ok(slot as u32)
    }

    /// Remove a port.
    pub fn remove(&mut self, slot: u32) {
        let Some(mut port) = self.ports.get_mut(slot as usize).and_then(Option::take) else { return };
        for queue in 0..2 * MAX_PAIRS {
            port.stop(queue);
            self.unwatch(&mut port, queue);
        }
        if let Some(slow) = &port.slow {
            self.events.remove(slow.tap.as_fd());
        }
        self.forget_traffic_to(slot);
        self.active.retain(|(other, _)| *other != slot);
        self.ready.retain(|other| *other != slot);
        self.touched.retain(|(other, _)| *other != slot);
    }

    /// Change what is said of some ports, and the list of all addresses, at once.
    pub fn change(&mut self, settings: Vec<(u32, Settings)>, list: List) {
        for (slot, settings) in settings {
            let Some(port) = self.port(slot) else { continue };
            let moved = port.settings.identity.mac != settings.identity.mac;
            if moved {
                port.traffic.clear();
            }
            port.settings = settings;
            if moved {
                self.forget_traffic_to(slot);
            }
        }
        self.list = list;
    }

    /// Give a port another tap, or none.
    ///
    /// # Errors
    ///
    /// It cannot be waited for; the port has none then.
    pub fn change_tap(&mut self, slot: u32, tap: Option<Tap>) -> io::Result<()> {
        let Some(mut port) = self.take(slot) else { return Ok(()) };
        if let Some(slow) = port.slow.take() {
            self.events.remove(slow.tap.as_fd());
        }
        self.ready.retain(|other| *other != slot);
        let result = tap.map_or(Ok(()), |tap| {
            self.events.add(tap.as_fd(), Token::Tap(slot))?;
            tap.set_features(port.features)?;
            port.slow = Some(crate::port::Slow { tap, readable: true, listed: false, held: None });
            Ok(())
        });
        self.put(slot, port);
        self.tap_is_readable(slot);
        result
    }

    /// What all ports have done.
    pub fn reports(&self) -> Vec<Report> {
        let ports = self.ports.iter().enumerate();
        ports
            .filter_map(|(slot, port)| {
                port.as_ref().map(|port| Report {
                    slot: slot as u32,
                    connected: port.connected,
                    failed: port.failed.clone(),
                    features: port.features,
                    queues: port.running(),
                    mac: port.settings.identity.mac,
                    counters: port.counters,
                    traffic: port.traffic.values().copied().collect(),
                })
            })
            .collect()
    }

    fn forget_traffic_to(&mut self, slot: u32) {
        for port in self.ports.iter_mut().flatten() {
            port.traffic.remove(&slot);
        }
    }

    // ---- what a VMM asks for

    fn port(&mut self, slot: u32) -> Option<&mut Port> {
        self.ports.get_mut(slot as usize)?.as_deref_mut()
    }

    fn take(&mut self, slot: u32) -> Option<Box<Port>> {
        self.ports.get_mut(slot as usize)?.take()
    }

    fn put(&mut self, slot: u32, port: Box<Port>) {
        self.ports[slot as usize] = Some(port);
    }

    /// Do something with a port that needs the switch too.
    fn with<R>(
        &mut self,
        slot: u32,
        action: impl FnOnce(&mut Self, &mut Port) -> Result<R, SetupError>,
    ) -> Result<R, SetupError> {
        let mut port = self.take(slot).ok_or(SetupError::NoPort)?;
        let result = action(self, &mut port);
        self.put(slot, port);
        result
    }

    fn with_queue<R>(
        &mut self,
        slot: u32,
        queue: u32,
        action: impl FnOnce(&mut Self, &mut Port, u16) -> Result<R, SetupError>,
    ) -> Result<R, SetupError> {
        match u16::try_from(queue) {
            Ok(index) if index < 2 * MAX_PAIRS => self.with(slot, |switch, port| action(switch, port, index)),
            _ => Err(SetupError::NoQueue(queue)),
        }
    }

    /// A VMM has come or gone. Nothing of what the last one said is kept; gives the memory that nobody needs now.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn connect(&mut self, slot: u32, connected: bool) -> Result<Arc<GuestMemory>, SetupError> {
        self.with(slot, |switch, port| {
            for queue in 0..2 * MAX_PAIRS {
                port.stop(queue);
                switch.unwatch(port, queue);
                port.queues[usize::from(queue)].wiring = Default::default();
            }
            port.connected = connected;
            port.features = 0;
            port.log = None;
            if connected {
                port.failed = None;
            }
            if let Some(slow) = &mut port.slow {
                slow.held = None;
                let _ = slow.tap.set_features(0);
            }
            port.refresh();
            Ok(std::mem::take(&mut port.memory))
        })
    }

    /// The features that the guest has negotiated; the device works again if it had failed.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn set_features(&mut self, slot: u32, features: u64) -> Result<(), SetupError> {
        self.with(slot, |_, port| {
            port.features = features;
            port.failed = None;
            let ring_features = port.ring_features();
            for queue in &mut port.queues {
                if let Some(ring) = &mut queue.ring {
                    ring.set_features(ring_features);
                }
            }
            if let Some(slow) = &port.slow
                && let Err(error) = slow.tap.set_features(features)
            {
                tracing::warn!(port = port.name, %error, "the tap does not take the guest's features");
            }
            port.refresh();
            Ok(())
        })
    }

    /// The guest's memory from now on; gives the memory until now.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn set_memory(&mut self, slot: u32, memory: Arc<GuestMemory>) -> Result<Arc<GuestMemory>, SetupError> {
        self.with(slot, |_, port| {
            for index in 0..port.queues.len() as u16 {
                if let Some(ring) = &mut port.queues[usize::from(index)].ring {
                    let addresses = ring.addresses();
                    if ring.relocate(memory.clone(), addresses).is_err() {
                        // Its old place is still mapped, so what it used can be shown there.
                        port.stop(index);
                    }
                }
            }
            Ok(std::mem::replace(&mut port.memory, memory))
        })
    }

    /// Where to log what is written into the guest's memory, as long as the features say so; gives what was used
    /// until now.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn set_log(&mut self, slot: u32, log: Arc<DirtyLog>) -> Result<Option<Arc<DirtyLog>>, SetupError> {
        self.with(slot, |_, port| {
            let before = port.log.replace(log);
            port.refresh();
            Ok(before)
        })
    }

    /// Entries of a ring.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn set_size(&mut self, slot: u32, queue: u32, size: u32) -> Result<(), SetupError> {
        self.with_queue(slot, queue, |_, port, queue| {
            let queue_ = &mut port.queues[usize::from(queue)];
            if queue_.ring.is_some() {
                return Err(SetupError::Running(queue));
            }
            queue_.wiring.size = size;
            Ok(())
        })
    }

    /// Where a ring begins.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn set_base(&mut self, slot: u32, queue: u32, base: u32) -> Result<(), SetupError> {
        self.with_queue(slot, queue, |_, port, queue| {
            let index = u16::try_from(base).map_err(|_| SetupError::Base(queue, base))?;
            let queue_ = &mut port.queues[usize::from(queue)];
            if queue_.ring.is_some() {
                return Err(SetupError::Running(queue));
            }
            queue_.wiring.base = index;
            Ok(())
        })
    }

    /// Where a ring is, in addresses of the VMM.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn set_addresses(&mut self, slot: u32, queue: u32, addresses: Addresses) -> Result<(), SetupError> {
        self.with_queue(slot, queue, |switch, port, queue| {
            let memory = port.memory.clone();
            let queue_ = &mut port.queues[usize::from(queue)];
            queue_.wiring.addresses = Some(addresses);
            if let Some(ring) = &mut queue_.ring {
                let moved = ring.relocate(memory, addresses);
                return moved.map_err(|source| {
                    port.stop(queue);
                    SetupError::Ring { queue, source }
                });
            }
            switch.start(slot, port, queue)
        })
    }

    /// By what the guest tells of new buffers, if by anything; the ring is started.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn set_kick(&mut self, slot: u32, queue: u32, kick: Option<OwnedFd>) -> Result<(), SetupError> {
        self.with_queue(slot, queue, |switch, port, queue| {
            switch.unwatch(port, queue);
            if let Some(kick) = &kick {
                let added = switch.events.add(kick.as_fd(), Token::Kick(slot, queue));
                added.map_err(|error| SetupError::Event(queue, error))?;
            }
            let wiring = &mut port.queues[usize::from(queue)].wiring;
            wiring.kick = kick;
            wiring.started = true;
            switch.start(slot, port, queue)
        })
    }

    /// By what the guest is told of used buffers, if by anything.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn set_call(&mut self, slot: u32, queue: u32, call: Option<OwnedFd>) -> Result<(), SetupError> {
        self.with_queue(slot, queue, |_, port, queue| {
            port.queues[usize::from(queue)].wiring.call = call;
            Ok(())
        })
    }

    /// By what the VMM is told that the device has failed, if by anything.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn set_error(&mut self, slot: u32, queue: u32, error: Option<OwnedFd>) -> Result<(), SetupError> {
        self.with_queue(slot, queue, |_, port, queue| {
            port.queues[usize::from(queue)].wiring.error = error;
            Ok(())
        })
    }

    /// Whether a ring carries frames.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn enable(&mut self, slot: u32, queue: u32, enabled: bool) -> Result<(), SetupError> {
        self.with_queue(slot, queue, |switch, port, queue| {
            port.queues[usize::from(queue)].wiring.enabled = Some(enabled);
            port.refresh();
            switch.look_at(slot, port, queue);
            Ok(())
        })
    }

    /// Stop a ring; gives where to go on.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn stop(&mut self, slot: u32, queue: u32) -> Result<u16, SetupError> {
        self.with_queue(slot, queue, |switch, port, queue| {
            port.stop(queue);
            switch.unwatch(port, queue);
            let wiring = &mut port.queues[usize::from(queue)].wiring;
            wiring.started = false;
            // What is sent between the next start and the next word on it must not get lost.
            wiring.enabled = wiring.enabled.filter(|enabled| *enabled);
            Ok(wiring.base)
        })
    }

    /// Stop all rings.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn reset(&mut self, slot: u32) -> Result<(), SetupError> {
        for queue in 0..u32::from(2 * MAX_PAIRS) {
            self.stop(slot, queue)?;
            self.enable(slot, queue, false)?;
        }
        Ok(())
    }

    fn unwatch(&self, port: &mut Port, queue: u16) {
        if let Some(kick) = port.queues[usize::from(queue)].wiring.kick.take() {
            self.events.remove(kick.as_fd());
        }
    }

    /// Start a ring if all that is needed is known.
    fn start(&mut self, slot: u32, port: &mut Port, queue: u16) -> Result<(), SetupError> {
        let features = port.ring_features();
        let memory = port.memory.clone();
        let queue_ = &mut port.queues[usize::from(queue)];
        let wiring = &queue_.wiring;
        let Some(addresses) = wiring.addresses else { return Ok(()) };
        if !wiring.started || wiring.size == 0 || queue_.ring.is_some() || port.failed.is_some() {
            return Ok(());
        }
        let ring = Ring::new(memory, addresses, wiring.size, wiring.base, features);
        queue_.ring = Some(ring.map_err(|source| SetupError::Ring { queue, source })?);
        port.refresh();
        self.look_at(slot, port, queue);
        Ok(())
    }

    /// Look at a queue in the next round: the guest may have done something before it could tell.
    fn look_at(&mut self, slot: u32, port: &mut Port, queue: u16) {
        let queue_ = &mut port.queues[usize::from(queue)];
        let Some(ring) = &mut queue_.ring else { return };
        if queue % 2 == 1 {
            if !queue_.polled {
                queue_.polled = true;
                ring.poll();
                self.active.push((slot, queue));
            }
        } else if let Some(slow) = &mut port.slow
            && slow.readable
            && !slow.listed
        {
            slow.listed = true;
            self.ready.push(slot);
        }
    }

    // ---- what happens

    /// The guest has new buffers.
    pub fn kicked(&mut self, slot: u32, queue: u16, now: u64) {
        let Some(mut port) = self.take(slot) else { return };
        if queue < 2 * MAX_PAIRS {
            port.queues[usize::from(queue)].last_work = now;
            self.look_at(slot, &mut port, queue);
        }
        self.put(slot, port);
    }

    /// The tap of a port has frames.
    pub fn tap_is_readable(&mut self, slot: u32) {
        let Some(port) = self.port(slot) else { return };
        if let Some(slow) = &mut port.slow {
            slow.readable = true;
            if !slow.listed {
                slow.listed = true;
                self.ready.push(slot);
            }
        }
    }

    /// Look once at everything that may have something to do.
    #[inline]
    pub fn round(&mut self, now: u64) -> Pace {
        let mut pace = Pace::Idle;
        let mut index = 0;
        while let Some(&(slot, queue)) = self.active.get(index) {
            let Some(mut port) = self.take(slot) else {
                self.active.swap_remove(index);
                continue;
            };
            let turn = self.drain(&mut port, queue, now);
            let (kept, wanted) = self.settle(&mut port, queue, turn, now);
            self.put(slot, port);
            pace = pace.max(wanted);
            if kept {
                index += 1;
            } else {
                self.active.swap_remove(index);
            }
        }
        index = 0;
        while let Some(&slot) = self.ready.get(index) {
            let Some(mut port) = self.take(slot) else {
                self.ready.swap_remove(index);
                continue;
            };
            let turn = self.read_tap(slot, &mut port, now);
            let kept = matches!(turn, Turn::Worked | Turn::Waits);
            if let Some(slow) = &mut port.slow {
                slow.listed = kept;
            }
            self.put(slot, port);
            match turn {
                Turn::Worked => pace = Pace::Busy,
                Turn::Waits => pace = pace.max(Pace::Wait),
                Turn::Nothing | Turn::Stopped => {}
            }
            if kept {
                index += 1;
            } else {
                self.ready.swap_remove(index);
            }
            self.publish();
        }
        pace
    }

    /// Whether a send queue stays on the list of those that are polled, and how soon it wants to be.
    #[inline]
    fn settle(&self, port: &mut Port, queue: u16, turn: Turn, now: u64) -> (bool, Pace) {
        let queue = &mut port.queues[usize::from(queue)];
        if turn == Turn::Worked {
            queue.last_work = now;
            return (true, Pace::Busy);
        }
        let Some(ring) = &mut queue.ring else {
            queue.polled = false;
            return (false, Pace::Idle);
        };
        if now.saturating_sub(queue.last_work) < self.busy_poll {
            return (true, Pace::Busy);
        }
        if turn == Turn::Waits || queue.wiring.kick.is_none() {
            return (true, Pace::Wait);
        }
        match ring.request_kicks() {
            Ok(false) => {
                queue.polled = false;
                (false, Pace::Idle)
            }
            // What is wrong shows when it is looked at again.
            Ok(true) | Err(_) => {
                ring.poll();
                (true, Pace::Busy)
            }
        }
    }

    /// Take a batch of frames from a send queue.
    #[inline]
    fn drain(&mut self, port: &mut Port, queue: u16, now: u64) -> Turn {
        let enabled = port.is_enabled(queue);
        let result = match enabled || port.is_disabled(queue) {
            true => self.look_through(port, queue),
            false => return Turn::Nothing,
        };
        let count = self.scratch.chains.len();
        let mut done = 0;
        let mut turn = if count > 0 { Turn::Worked } else { Turn::Nothing };
        let mut broken = None;
        while done < count && enabled {
            match self.forward(port, queue, done, now) {
                Ok(Fate::Gone) => done += 1,
                Ok(Fate::Waits) => {
                    if done == 0 {
                        turn = Turn::Waits;
                    }
                    break;
                }
                Err(error) => {
                    broken = Some(error);
                    break;
                }
            }
        }
        if enabled {
            self.finish(port, now);
        } else {
            done = count;
        }
        let queue_ = &mut port.queues[usize::from(queue)];
        let Some(ring) = &mut queue_.ring else { return Turn::Stopped };
        if done > 0 {
            for chain in &self.scratch.chains[..done] {
                ring.push_used(chain.head, 0);
            }
            ring.advance(done as u16);
            queue_.publish();
            port.counters.last_seen_ns = now;
            self.publish();
        }
        match broken.or(result.err().map(Broken::Ring)) {
            // The frames before the broken one are gone by now, unless the first of them waits.
            Some(error) if done == count || turn != Turn::Waits => {
                port.fail(&error.to_string());
                Turn::Stopped
            }
            _ => turn,
        }
    }

    /// Find the next frames of a send queue, as far as they are well-formed.
    #[inline]
    fn look_through(&mut self, port: &mut Port, queue: u16) -> Result<(), RingError> {
        let Scratch { chains, segments, .. } = &mut self.scratch;
        chains.clear();
        segments.clear();
        let Some(ring) = &mut port.queues[usize::from(queue)].ring else { return Ok(()) };
        let count = ring.available(BATCH)?.min(BATCH);
        for nth in 0..count {
            ring.prefetch(ring.head(nth));
        }
        ring.prefetch_used(count);
        for nth in 0..count {
            let head = ring.head(nth);
            let start = segments.len();
            let total = ring.chain(head, Direction::Read, segments)?;
            let data = segments[start].data;
            prefetch(data);
            prefetch(data.wrapping_add(LINE));
            chains.push(Chain { head, start: start as u32, end: segments.len() as u32, total });
        }
        Ok(())
    }

    /// Send a frame on.
    #[inline]
    fn forward(&mut self, sender: &mut Port, queue: u16, nth: usize, now: u64) -> Result<Fate, Broken> {
        let Scratch { chains, segments, head, .. } = &mut self.scratch;
        let Chain { start, end, total, .. } = chains[nth];
        let left = (chains.len() - nth) as u16;
        let segments = &segments[start as usize..end as usize];
        if total < sender.header as u64 {
            return Err(Broken::ShortHeader(total));
        }
        let length = (total - sender.header as u64) as usize;
        if !(ETHERNET..=MAX_FRAME).contains(&length) {
            sender.counters.dropped_malformed += 1;
            return Ok(Fate::Gone);
        }
        // SAFETY: the segments are of the sender's ring, which is there as long as the sender is not changed.
        unsafe { head.load(segments, sender.header, length) };
        let (header_bytes, frame_bytes) = head.split();
        let header = NetHeader::parse(header_bytes.first_chunk().expect("12 bytes have 10"));
        let settings = &sender.settings;
        let datagram = match settings.slow {
            true => None,
            false => frame::examine(&header, frame_bytes, length, &settings.identity),
        };
        let Some(datagram) = datagram else {
            self.leave_to_kernel(sender, nth, length);
            return Ok(Fate::Gone);
        };
        if self.run.as_ref().is_none_or(|run| run.to != datagram.to) {
            self.finish(sender, now);
            self.begin(sender, queue / 2, datagram.to, left);
        }
        let receiver = self.run.as_mut().and_then(|run| {
            let port = self.ports.get_mut(run.slot as usize)?.as_mut()?;
            Some((run, port)).filter(|(run, port)| datagram.needs & !port.features == 0 || run.queue.is_none())
        });
        let Some((run, receiver)) = receiver else {
            self.leave_to_kernel(sender, nth, length);
            return Ok(Fate::Gone);
        };
        let Some(receive_queue) = run.queue else {
            // A guest that is not there, or has no driver: as if the cable were pulled.
            receiver.counters.dropped_full += 1;
            return Ok(Fate::Gone);
        };
        let Scratch { segments, head, receive, .. } = &mut self.scratch;
        let packet = Packet {
            header: header.forwarded(),
            mac: Some(receiver.settings.identity.mac),
            head: head.split().1,
            copy: Some(head),
            rest: &segments[start as usize..end as usize],
            skip: sender.header + head.length() - NET_HEADER,
            length,
        };
        let received = receiver.receive(receive_queue, &packet, receive);
        if matches!(received, Ok(Received::Done)) {
            run.packets += 1;
            run.bytes += length as u64;
            if let Some(since) = sender.queues[usize::from(queue)].stalled.take() {
                receiver.queues[usize::from(receive_queue)].has_waited(now - since);
            }
            return Ok(Fate::Gone);
        }
        // What was received earns the receiver the patience that it may need now.
        self.finish(sender, now);
        Ok(self.not_received(sender, queue, (datagram.to, receive_queue), received, now))
    }

    /// What becomes of a frame that its receiver has not taken.
    #[cold]
    fn not_received(
        &mut self,
        sender: &mut Port,
        queue: u16,
        (to, receive_queue): (Address, u16),
        received: Result<Received, RingError>,
        now: u64,
    ) -> Fate {
        let from = &mut sender.queues[usize::from(queue)];
        let slot = self.list.find(sender.settings.net, to);
        let Some(receiver) = slot.and_then(|slot| self.port(slot)) else { return Fate::Gone };
        let into = &mut receiver.queues[usize::from(receive_queue)];
        if matches!(received, Ok(Received::Full)) {
            let since = *from.stalled.get_or_insert(now);
            if into.is_worth_waiting(since, now)
                && let Some(ring) = &mut into.ring
                && ring.request_kicks().is_ok()
            {
                return Fate::Waits;
            }
        }
        from.stalled = None;
        receiver.counters.dropped_full += 1;
        if let Err(error) = received {
            receiver.fail(&error.to_string());
        }
        Fate::Gone
    }

    /// Find out where frames to `to` go, if they may take the short cut: to `run`. Up to `count` of them are expected.
    #[inline]
    fn begin(&mut self, sender: &Port, pair: u16, to: Address, count: u16) {
        let settings = &sender.settings;
        // The sender itself is not among the ports now, so that what it sends to itself goes to its tap.
        let Some(slot) = self.list.find(settings.net, to) else { return };
        let Some(Some(port)) = self.ports.get_mut(slot as usize) else { return };
        let other = &port.settings;
        if other.slow || other.net != settings.net || !settings.policy.may_talk(&other.policy) {
            return;
        }
        let queue = port.receive_queue(pair);
        if let Some(queue) = queue {
            port.prepare(queue, count, &mut self.scratch.receive);
        }
        self.run = Some(Run { to, slot, queue, packets: 0, bytes: 0 });
    }

    /// Count the frames that went to one receiver one after the other.
    #[inline]
    fn finish(&mut self, sender: &mut Port, now: u64) {
        let Some(Run { slot, queue, packets, bytes, .. }) = self.run.take() else { return };
        self.scratch.receive.forget();
        let Some(Some(receiver)) = self.ports.get_mut(slot as usize) else { return };
        let (Some(queue), 1..) = (queue, packets) else { return };
        sender.counters.tx_packets += packets;
        sender.counters.tx_bytes += bytes;
        receiver.counters.rx_packets += packets;
        receiver.counters.rx_bytes += bytes;
        let traffic = sender.traffic.entry(slot).or_default();
        traffic.to = receiver.settings.identity.mac;
        traffic.packets += packets;
        traffic.bytes += bytes;
        traffic.last_seen_ns = now;
        let into = &mut receiver.queues[usize::from(queue)];
        into.has_taken(packets);
        if !into.touched {
            into.touched = true;
            self.touched.push((slot, queue));
        }
    }

    /// Write a frame to the sender's tap, unchanged.
    #[cold]
    #[inline(never)]
    fn leave_to_kernel(&mut self, sender: &mut Port, nth: usize, length: usize) {
        sender.queues.iter_mut().for_each(|queue| queue.stalled = None);
        sender.counters.slow_packets += 1;
        let Some(slow) = &sender.slow else {
            sender.counters.dropped_full += 1;
            return;
        };
        let Scratch { chains, segments, head, parts, frame, .. } = &mut self.scratch;
        let Chain { start, end, .. } = chains[nth];
        let segments = &segments[start as usize..end as usize];
        parts.clear();
        // What is read only is written as well, says the type.
        let header = head.split().0.as_ptr().cast_mut();
        parts.push(libc::iovec { iov_base: header.cast(), iov_len: NET_HEADER });
        if segments.len() < MAX_PARTS {
            let mut skip = sender.header;
            for segment in segments {
                let bytes = segment.length as usize;
                if skip < bytes {
                    let data = segment.data.wrapping_add(skip);
                    parts.push(libc::iovec { iov_base: data.cast(), iov_len: bytes - skip });
                }
                skip = skip.saturating_sub(bytes);
            }
        } else {
            // SAFETY: the segments are of the sender's ring, which is there as long as the sender is not changed.
            unsafe { copy_from(segments, sender.header, &mut frame[..length]) };
            parts.push(libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: length });
        }
        // SAFETY: the first part is our own, and the others are of the sender's memory, as above.
        match unsafe { slow.tap.write(parts) } {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => sender.counters.dropped_malformed += 1,
            Err(error) => {
                tracing::debug!(port = sender.name, %error, "the tap does not take a frame");
                sender.counters.dropped_full += 1;
            }
        }
    }

    /// Bring frames from a port's tap to its guest.
    fn read_tap(&mut self, slot: u32, port: &mut Port, now: u64) -> Turn {
        for count in 0..BATCH {
            let turn = self.read_one(slot, port, now);
            if turn != Turn::Worked {
                // What was read is shown first; the rest is for the next round.
                return if count > 0 && turn == Turn::Waits { Turn::Worked } else { turn };
            }
        }
        Turn::Worked
    }

    fn read_one(&mut self, slot: u32, port: &mut Port, now: u64) -> Turn {
        let Some(queue) = port.receive_queue(0) else { return Turn::Stopped };
        let Some(slow) = &mut port.slow else { return Turn::Stopped };
        let Some(ring) = &mut port.queues[usize::from(queue)].ring else { return Turn::Stopped };
        let Scratch { frame, receive, .. } = &mut self.scratch;
        receive.forget();
        let (total, since) = match slow.held.take() {
            Some((held, since)) => {
                frame[..held.len()].copy_from_slice(&held);
                (held.len(), since)
            }
            None => {
                let available = ring.available(1).and_then(|some| Ok(some > 0 || ring.request_kicks()?));
                match available {
                    Ok(true) => {}
                    // The frames stay in the tap's queue until the guest says that it has room.
                    Ok(false) => return Turn::Nothing,
                    Err(error) => {
                        port.fail(&error.to_string());
                        return Turn::Stopped;
                    }
                }
                match slow.tap.read(frame) {
                    Ok(Some(total)) => (total, now),
                    Ok(None) => {
                        slow.readable = false;
                        return Turn::Nothing;
                    }
                    Err(error) => {
                        tracing::warn!(port = port.name, %error, "the tap cannot be read");
                        slow.readable = false;
                        return Turn::Nothing;
                    }
                }
            }
        };
        ring.poll();
        if total < NET_HEADER + ETHERNET {
            return Turn::Worked;
        }
        let mut header = NetHeader::parse(frame.first_chunk().expect("larger than that"));
        let needs = header.needs();
        if needs.is_none_or(|needs| needs & !port.features != 0) {
            // It was in the tap's queue before the guest said what it takes.
            port.counters.dropped_malformed += 1;
            return Turn::Worked;
        }
        if port.features >> virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM & 1 == 0 {
            header.hide_valid();
        }
        let head = &frame[NET_HEADER..total];
        let packet =
            Packet { header: header.words(), mac: None, head, copy: None, rest: &[], skip: 0, length: head.len() };
        match port.receive(queue, &packet, receive) {
            Ok(Received::Done) => {
                port.counters.from_tap_packets += 1;
                let queue_ = &mut port.queues[usize::from(queue)];
                if !queue_.touched {
                    queue_.touched = true;
                    self.touched.push((slot, queue));
                }
                Turn::Worked
            }
            Ok(Received::Full) if now.saturating_sub(since) < HOLD => {
                let held = frame[..total].to_vec();
                if let Some(slow) = &mut port.slow {
                    slow.held = Some((held, since));
                }
                Turn::Waits
            }
            Ok(Received::Full | Received::TooLarge) => {
                port.counters.dropped_full += 1;
                Turn::Worked
            }
            Err(error) => {
                port.fail(&error.to_string());
                Turn::Stopped
            }
        }
    }

    /// Show the guests what was put into their receive queues.
    #[inline]
    fn publish(&mut self) {
        while let Some((slot, queue)) = self.touched.pop() {
            if let Some(port) = self.port(slot) {
                let queue = &mut port.queues[usize::from(queue)];
                queue.touched = false;
                queue.publish();
            }
        }
    }
}
