// SPDX-License-Identifier: Apache-2.0

//! One virtqueue: what the driver puts into it goes to the server, and answers come back into it, in any order.
//!
//! A worker has a thread of its own. It waits for the driver's notifications, for the server, and for what the VMM and
//! the [`Remote`] have to say, and sleeps when there is nothing. Bytes go straight from the guest's memory into the
//! socket; those of answers are copied once, from the socket's buffer into the guest's memory.
//!
//! # Nothing lost, nothing done twice
//!
//! A request's tag is made of a number that rises for the life of the session, and of the head of its chain, which no
//! other request has at the same time. As long as there is no answer the request stays in a table here and, where the
//! VMM has some, in memory that outlives this process ([`vring::inflight`]): from there it is sent again, with the same
//! tag, over the next connection, and the server does nothing twice.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use link::{Link, LinkError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::{read, write};
use serde::Serialize;
use vring::inflight::Inflight;
use vring::memory::{GuestMemory, Segment};
use vring::ring::{Addresses, Features, Ring, RingError};
use wire::{Attached, Body, Code, Handles, Header, Kind, MAX_IN_FLIGHT, MAX_MESSAGE, Malformed, SessionId};

use crate::remote::{Remote, RemoteError, State};

/// Of a tag: what is above the head. The VMM could have written anything else there.
const NUMBERS: u64 = u64::MAX >> 17;
/// Heads of chains that are taken at once.
const BATCH: u16 = 32;
/// For requests that are with the server to be answered, when the queue is stopped.
const DRAIN: Duration = Duration::from_secs(20);
/// Bytes for the server before no more are taken from the driver.
const MAX_UNSENT: usize = 2 * MAX_MESSAGE;

/// A queue that the VMM has set up.
pub struct Start {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Where the ring is.
    pub addresses: Addresses,
    /// Its entries.
    pub size: u32,
    /// Where it begins.
    pub base: u16,
    /// How it works.
    pub features: Features,
    /// The driver's notifications.
    pub kick: OwnedFd,
    /// Ours; None: the driver polls.
    pub call: Option<OwnedFd>,
    /// Where requests without an answer are kept; None: nowhere.
    pub inflight: Option<Arc<Inflight>>,
    /// The session that they belong to.
    pub session: SessionId,
}

/// What a worker is told.
pub enum Command {
    /// Begin.
    Start(Box<Start>),
    /// Go on in other memory.
    Memory(Arc<GuestMemory>),
    /// Notify the driver by this from now on.
    Call(Option<OwnedFd>),
    /// Finish what is under way, and stop: where it goes on is the answer.
    Stop(Sender<u16>),
    /// The VMM has gone: stop at once.
    Drop,
    /// End the thread.
    End,
}

/// A worker, as others see it.
#[derive(Clone)]
pub struct Handle {
    commands: Sender<Command>,
    waker: Arc<EventFd>,
    counters: Arc<Counters>,
}

#[derive(Debug, Default, Serialize)]
struct Counters {
    /// Requests that were answered.
    requests: AtomicU64,
    /// Of those, the ones that failed.
    failed: AtomicU64,
    /// Requests that were sent again.
    repeated: AtomicU64,
    /// Requests without an answer.
    in_flight: AtomicU64,
}

impl Handle {
    /// Tell it something.
    pub fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
        let _ = self.waker.write(1);
    }

    /// What the queue has done.
    pub fn stats(&self) -> &impl Serialize {
        &*self.counters
    }

    /// Stop the queue; where it goes on.
    pub fn stop(&self) -> u16 {
        let (answer, told) = channel();
        self.tell(Command::Stop(answer));
        told.recv().unwrap_or(0)
    }
}

/// Why a queue cannot go on as it is.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Link(#[from] RemoteError),
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Broken::Link(error.into())
    }
}

impl From<LinkError> for Broken {
    fn from(error: LinkError) -> Self {
        Broken::Link(error.into())
    }
}

impl From<Malformed> for Broken {
    fn from(error: Malformed) -> Self {
        Broken::Link(error.into())
    }
}

/// What the driver has given, where it lies.
struct Given {
    segments: Vec<Segment>,
    length: usize,
    /// Keeps the segments there, and those of the answer.
    _memory: Arc<GuestMemory>,
}

impl Body for Given {
    fn length(&self) -> usize {
        self.length
    }

    fn parts<'a>(&'a self, from: usize, to: usize, parts: &mut Vec<IoSlice<'a>>) {
        let mut at = 0;
        for segment in &self.segments {
            let length = segment.length as usize;
            let (start, end) = (from.saturating_sub(at).min(length), to.saturating_sub(at).min(length));
            if start < end {
                // SAFETY: the segment lies in the memory that is kept here. The guest may write to it meanwhile: nobody
                // but the kernel looks at the bytes, which copies them.
                parts.push(IoSlice::new(unsafe { std::slice::from_raw_parts(segment.data.add(start), end - start) }));
            }
            at += length;
        }
    }
}

// SAFETY: the segments lead into memory that is kept here, and that any thread may use.
unsafe impl Send for Given {}
// SAFETY: as above; nothing of it changes.
unsafe impl Sync for Given {}

/// A request without an answer.
struct Pending {
    tag: u64,
    head: u16,
    given: Arc<Given>,
    writable: Vec<Segment>,
    room: usize,
    /// Bytes of its answer that have come.
    received: usize,
}

// SAFETY: as for `Given`.
unsafe impl Send for Pending {}

struct Running {
    ring: Ring,
    memory: Arc<GuestMemory>,
    kick: OwnedFd,
    call: Option<OwnedFd>,
    inflight: Option<Arc<Inflight>>,
    session: SessionId,
    /// By head.
    pending: Vec<Option<Pending>>,
    /// Of `pending`, those that are there, in the order of their tags; and some that are not there any more.
    order: VecDeque<u64>,
    count: usize,
    number: u64,
}

/// The connection of a queue.
struct Way {
    link: Link<Arc<Given>>,
    epoch: u32,
    handles: Handles,
}

struct Worker {
    queue: u16,
    remote: Arc<Remote>,
    commands: Receiver<Command>,
    waker: Arc<EventFd>,
    running: Option<Running>,
    way: Option<Way>,
    /// How often the remote had changed when that was last looked at.
    seen: u64,
    /// Until when no connection is tried.
    rest: Option<Instant>,
    busy_poll: Duration,
    name: String,
    counters: Arc<Counters>,
    /// The next number of the session that was served last.
    number: Option<(SessionId, u64)>,
}

/// Start the worker of a queue.
///
/// # Errors
///
/// No thread can be had.
pub fn start(name: &str, queue: u16, remote: &Arc<Remote>, busy_poll: Duration) -> std::io::Result<Handle> {
    let waker = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let (sender, commands) = channel();
    remote.wake(Arc::clone(&waker));
    let counters = Arc::new(Counters::default());
    let handle = Handle { commands: sender, waker: Arc::clone(&waker), counters: Arc::clone(&counters) };
    let mut worker = Worker {
        queue,
        remote: Arc::clone(remote),
        commands,
        waker,
        running: None,
        way: None,
        seen: 0,
        rest: None,
        busy_poll,
        name: name.to_owned(),
        counters,
        number: None,
    };
    std::thread::Builder::new().name(format!("queue {queue}")).spawn(move || worker.run())?;
    Ok(handle)
}

impl Running {
    fn new(start: Start) -> Result<Self, RingError> {
        let Start { memory, addresses, size, base, features, kick, call, inflight, session } = start;
        let ring = Ring::new(Arc::clone(&memory), addresses, size, base, features)?;
        let pending = (0..ring.size()).map(|_| None).collect();
        Ok(Running {
            ring,
            memory,
            kick,
            call,
            inflight,
            session,
            pending,
            order: VecDeque::new(),
            count: 0,
            number: 0,
        })
    }

    /// Take the chain that begins with `head`; what it was given as number.
    fn adopt(&mut self, head: u16, number: u64) -> Result<(), RingError> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let (given, room) = self.ring.request(head, &mut readable, &mut writable)?;
        if given > MAX_MESSAGE as u64 || room > MAX_MESSAGE as u64 {
            return Err(RingError::Endless(MAX_MESSAGE as u32));
        }
        let tag = number << 16 | u64::from(head);
        let memory = Arc::clone(&self.memory);
        let given = Arc::new(Given { segments: readable, length: given as usize, _memory: memory });
        let pending = Pending { tag, head, given, writable, room: room as usize, received: 0 };
        if self.pending[usize::from(head)].replace(pending).is_some() {
            return Err(RingError::Descriptor { index: head.into(), size: self.ring.size().into() });
        }
        self.order.push_back(tag);
        self.count += 1;
        Ok(())
    }

    /// The lowest tag that has no answer, or the next one that there will be.
    fn settled(&mut self) -> u64 {
        while let Some(tag) = self.order.front() {
            match &self.pending[usize::from(*tag as u16)] {
                Some(pending) if pending.tag == *tag => return *tag,
                _ => self.order.pop_front(),
            };
        }
        self.number << 16
    }

    /// Give up what has no answer: the driver is told that it failed.
    fn fail_all(&mut self) {
        for slot in &mut self.pending {
            if let Some(pending) = slot.take() {
                let written = put_failure(&pending);
                self.ring.push_used(pending.head, written);
            }
        }
        self.count = 0;
        self.notify();
    }

    fn notify(&mut self) {
        if self.ring.publish()
            && let Some(call) = &self.call
        {
            let _ = write(call, &1_u64.to_ne_bytes());
        }
    }
}

impl Way {
    fn send(&mut self, running: &mut Running, queue: u16, head: u16) {
        let settled = running.settled();
        let Some(pending) = &running.pending[usize::from(head)] else { return };
        let header = Header {
            queue,
            tag: pending.tag,
            room: pending.room as u32,
            settled,
            ..Header::control(Kind::Request, self.handles, 0)
        };
        self.link.send(header, Arc::clone(&pending.given));
    }
}

/// Copy bytes into segments, from `at` on.
fn put(segments: &[Segment], mut at: usize, mut bytes: &[u8]) {
    for segment in segments {
        let length = segment.length as usize;
        if at >= length {
            at -= length;
            continue;
        }
        let count = bytes.len().min(length - at);
        // SAFETY: the segment is of memory that its request keeps. The guest may look meanwhile; nobody here does.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), segment.data.add(at), count) };
        bytes = &bytes[count..];
        if bytes.is_empty() {
            return;
        }
        at = 0;
    }
}

/// Say that a request failed, where the driver looks for it: in the last byte; how many bytes that makes.
fn put_failure(pending: &Pending) -> u32 {
    if pending.room > 0 {
        put(&pending.writable, pending.room - 1, &[FAILED]);
    }
    pending.room as u32
}

impl Worker {
    fn run(&mut self) {
        let mut last = Instant::now();
        loop {
            while let Ok(command) = self.commands.try_recv() {
                if !self.obey(command) {
                    return;
                }
            }
            match self.turn() {
                Ok(true) => last = Instant::now(),
                Ok(false) if last.elapsed() > self.busy_poll => {
                    if self.may_sleep() {
                        self.sleep();
                    }
                    last = Instant::now();
                }
                Ok(false) => std::hint::spin_loop(),
                Err(error) => self.fail(&error),
            }
        }
    }

    /// False: it was the last one.
    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Start(start) => self.begin(*start),
            Command::Memory(memory) => {
                if let Some(running) = &mut self.running {
                    let addresses = running.ring.addresses();
                    if let Err(error) = running.ring.relocate(Arc::clone(&memory), addresses) {
                        self.fail(&error.into());
                    } else {
                        running.memory = memory;
                    }
                }
            }
            Command::Call(call) => {
                if let Some(running) = &mut self.running {
                    running.call = call;
                }
            }
            Command::Stop(answer) => {
                let _ = answer.send(self.stop());
            }
            Command::Drop => {
                self.forget();
            }
            Command::End => return false,
        }
        true
    }

    /// Stop serving; what has no answer is not waited for.
    fn forget(&mut self) -> Option<Running> {
        self.way = None;
        let running = self.running.take()?;
        self.number = Some((running.session, running.number));
        self.counters.in_flight.store(0, Ordering::Relaxed);
        Some(running)
    }

    fn begin(&mut self, start: Start) {
        self.forget();
        match Running::new(start).and_then(|running| self.resume(running)) {
            Ok(running) => self.running = Some(running),
            Err(error) => self.fail(&error.into()),
        }
    }

    /// Take over what an earlier process, or an earlier life of the queue, has left without an answer.
    fn resume(&self, mut running: Running) -> Result<Running, RingError> {
        if let Some((session, number)) = self.number
            && session == running.session
        {
            running.number = number;
        }
        let Some(inflight) = running.inflight.clone() else { return Ok(running) };
        let left = inflight.left(self.queue, running.ring.next_used());
        for (head, number) in &left {
            running.adopt(*head, *number & NUMBERS)?;
        }
        running.number = running.number.max(inflight.next_number(self.queue) & NUMBERS);
        if !left.is_empty() {
            tracing::info!(device = self.name, queue = self.queue, requests = left.len(), "sent again");
            let next = running.ring.next_used().wrapping_add(left.len() as u16);
            running.ring.go_on_at(next);
        }
        Ok(running)
    }

    /// Wait for the answers of what is with the server, and forget the queue; where it goes on.
    fn stop(&mut self) -> u16 {
        let until = Instant::now() + DRAIN;
        loop {
            let Some(running) = &self.running else { return 0 };
            if running.count == 0 || Instant::now() > until {
                break;
            }
            match self.exchange() {
                Ok(true) => {}
                Ok(false) => std::thread::sleep(Duration::from_micros(200)),
                Err(error) => self.fail(&error),
            }
        }
        let Some(mut running) = self.forget() else { return 0 };
        if running.count > 0 {
            tracing::warn!(device = self.name, queue = self.queue, requests = running.count, "not answered in time");
            if running.inflight.is_none() {
                running.fail_all();
            }
        }
        running.ring.next_avail().wrapping_sub(running.count as u16)
    }

    fn fail(&mut self, error: &Broken) {
        match error {
            Broken::Ring(error) => {
                tracing::warn!(device = self.name, queue = self.queue, %error, "the queue is not served any more");
                self.forget();
            }
            Broken::Link(error) => {
                tracing::info!(device = self.name, queue = self.queue, %error, "connection lost");
                if let Some(way) = self.way.take() {
                    self.remote.lost(way.epoch);
                } else {
                    self.rest = Some(Instant::now() + crate::remote::RETRY);
                }
            }
        }
    }

    // -- work --------------------------------------------------------------------------------------------------------

    /// Do what there is to do; whether there was something.
    fn turn(&mut self) -> Result<bool, Broken> {
        if self.running.is_none() {
            return Ok(false);
        }
        let taken = self.way.is_some() && self.take()?;
        Ok(self.exchange()? || taken)
    }

    /// See that there is a connection of the epoch that counts.
    fn connect(&mut self) -> Result<(), Broken> {
        let Some(running) = &mut self.running else { return Ok(()) };
        let changes = self.remote.changes();
        if self.way.is_some() && changes == self.seen {
            return Ok(());
        }
        let state = self.remote.state();
        self.seen = changes;
        let usable = state.up && state.session == running.session;
        if let Some(way) = &self.way {
            if usable && way.epoch == state.epoch {
                return Ok(());
            }
            self.way = None;
        }
        if !usable || self.rest.is_some_and(|until| Instant::now() < until) {
            return Ok(());
        }
        self.rest = None;
        let State { epoch, known: Some(Attached { handles, .. }), .. } = state else { return Ok(()) };
        let stream = self.remote.open(&state, self.queue)?;
        stream.set_nonblocking(true)?;
        let mut way = Way { link: Link::new(stream), epoch, handles };
        let tags: Vec<u64> = running.order.iter().copied().collect();
        for tag in tags {
            let head = tag as u16;
            if let Some(pending) = &mut running.pending[usize::from(head)]
                && pending.tag == tag
            {
                pending.received = 0;
                self.counters.repeated.fetch_add(1, Ordering::Relaxed);
                way.send(running, self.queue, head);
            }
        }
        self.way = Some(way);
        Ok(())
    }

    /// Take what the driver has made available, as long as there is room for it.
    fn take(&mut self) -> Result<bool, Broken> {
        let (Some(running), Some(way)) = (&mut self.running, &mut self.way) else { return Ok(false) };
        let mut any = false;
        let most = MAX_IN_FLIGHT.min(running.ring.size().into());
        while running.count < most && way.link.unsent() < MAX_UNSENT {
            running.ring.poll();
            let room = (most - running.count).min(BATCH.into()) as u16;
            let count = running.ring.available(room)?.min(room);
            if count == 0 {
                break;
            }
            any = true;
            for nth in 0..count {
                let head = running.ring.head(nth);
                let number = running.number;
                running.number += 1;
                running.adopt(head, number)?;
                if let Some(inflight) = &running.inflight {
                    inflight.taken(self.queue, head, number);
                }
                way.send(running, self.queue, head);
            }
            running.ring.advance(count);
        }
        Ok(any)
    }

    /// Send and receive; whether there was something.
    fn exchange(&mut self) -> Result<bool, Broken> {
        self.connect()?;
        let (Some(running), Some(way)) = (&mut self.running, &mut self.way) else { return Ok(false) };
        let mut any = way.link.flush()?;
        any |= way.link.receive()?;
        let mut done = 0;
        while let Some((header, body)) = way.link.frame()? {
            match header.kind {
                Kind::Answer => {
                    done += u64::from(answer(running, self.queue, way.handles, &header, body)?);
                    self.counters.failed.fetch_add(u64::from(header.code()? != Code::Done), Ordering::Relaxed);
                }
                Kind::Pong => {}
                Kind::Refused => {
                    let text = match wire::Control::decode(header.kind, body)? {
                        wire::Control::Refused(refused) => refused.text,
                        _ => String::new(),
                    };
                    return Err(RemoteError::Refused(text).into());
                }
                kind => return Err(Malformed::Kind(kind as u8).into()),
            }
        }
        if done > 0 {
            self.counters.requests.fetch_add(done, Ordering::Relaxed);
        }
        self.counters.in_flight.store(running.count as u64, Ordering::Relaxed);
        Ok(any)
    }

    // -- sleep -------------------------------------------------------------------------------------------------------

    /// Ask the driver to notify; false if it has made something available meanwhile.
    fn may_sleep(&mut self) -> bool {
        let Some(running) = &mut self.running else { return true };
        if self.way.is_none() {
            return true;
        }
        match running.ring.request_kicks() {
            Ok(there) => !there,
            Err(error) => {
                self.fail(&error.into());
                true
            }
        }
    }

    fn sleep(&mut self) {
        let mut files = vec![PollFd::new(self.waker.as_fd(), PollFlags::POLLIN)];
        let mut most = PollTimeout::NONE;
        if let (Some(running), Some(way)) = (&self.running, &self.way) {
            let full = running.count >= MAX_IN_FLIGHT || way.link.unsent() >= MAX_UNSENT;
            if !full {
                files.push(PollFd::new(running.kick.as_fd(), PollFlags::POLLIN));
            }
            let out = if way.link.unsent() == 0 { PollFlags::empty() } else { PollFlags::POLLOUT };
            files.push(PollFd::new(way.link.stream().as_fd(), PollFlags::POLLIN | out));
        } else if self.running.is_some() {
            most = PollTimeout::from(500_u16);
        }
        match poll(&mut files, most) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => tracing::error!(device = self.name, queue = self.queue, %error, "poll"),
        }
        let _ = self.waker.read();
        if let Some(running) = &self.running {
            let _ = read(&running.kick, &mut [0; 8]);
        }
    }
}

/// Put a part of an answer where it belongs; whether a request is done by it.
fn answer(
    running: &mut Running,
    queue: u16,
    handles: Handles,
    header: &Header,
    body: &[u8],
) -> Result<bool, Malformed> {
    if header.handles != handles {
        return Err(Malformed::Value("handle"));
    }
    if header.queue != queue {
        return Err(Malformed::Value("queue"));
    }
    let place = running.pending.get_mut(usize::from(header.tag as u16));
    let Some(slot) = place.filter(|slot| slot.as_ref().is_some_and(|pending| pending.tag == header.tag)) else {
        return Err(Malformed::Value("tag"));
    };
    let Some(pending) = slot else { return Ok(false) };
    let (total, end) = (header.total as usize, pending.received + body.len());
    let last = header.flags & wire::MORE == 0;
    if total > pending.room || end > total || (last && end != total) || (!last && body.is_empty()) {
        return Err(Malformed::Fragment(header.tag));
    }
    put(&pending.writable, pending.received, body);
    pending.received = end;
    if !last {
        return Ok(false);
    }
    let written = if header.code()? == Code::Done { total } else { put_failure(pending) as usize };
    let head = pending.head;
    running.ring.written(&pending.writable, written as u64);
    *slot = None;
    running.count -= 1;
    if let Some(inflight) = &running.inflight {
        inflight.completing(queue, head);
    }
    running.ring.push_used(head, written as u32);
    running.notify();
    if let Some(inflight) = &running.inflight {
        inflight.completed(queue, head, running.ring.next_used());
    }
    Ok(true)
}

/// Of a request to a disk that failed (`VIRTIO_BLK_S_IOERR`).
const FAILED: u8 = 1;
