// SPDX-License-Identifier: Apache-2.0

//! A port as the data thread sees it: its rings, its tap, what it may do and what it has done.
//!
//! # A queue's life
//!
//! ```text
//!              kick, size and addresses are known            GET_VRING_BASE, reset, disconnect
//!   stopped ───────────────────────────────────► running ──────────────────────────────────► stopped
//!                                                   │
//!                                                   │ the guest breaks the rules
//!                                                   ▼
//!                                                 failed (all queues of the port, until the device is set up again)
//! ```
//!
//! A running queue is also *enabled* or not. What is sent in a disabled one is thrown away, and nothing is received in
//! it (vhost-user: "Ring states"). But as long as the VMM has not said either, what is sent waits: a VMM that connects
//! again starts a queue first and enables it then.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vring::memory::{DirtyLog, GuestMemory, Segment, Writer};
use vring::ring::{Addresses, Direction, Features, LINE, Ring, RingError, prefetch_to_write};

use crate::frame::{Identity, LEGACY_NET_HEADER, NET_HEADER};
use crate::head::Head;
use crate::list::{Policy, Table};
use crate::tap::Tap;

/// Queue pairs of a port, at most.
pub const MAX_PAIRS: u16 = 8;
/// `VHOST_USER_F_PROTOCOL_FEATURES`: rings begin disabled.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VHOST_F_LOG_ALL`: the guest migrates.
pub const LOG_ALL: u64 = 1 << 26;

/// Bytes of the frame by which a guest is announced.
const ANNOUNCEMENT: usize = 60;

/// How long a sender waits for a receiver without buffers, at most, in nanoseconds.
const PATIENCE: u64 = 1_000_000;
/// How much of that a receiver gets back for each frame that it takes.
const EARNED: u64 = 10_000;

/// What the control plane says of a port. All of it may change while the port works.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Network.
    pub net: u32,
    /// Addresses.
    pub identity: Identity,
    /// Whom it may talk to.
    pub policy: Policy,
    /// Nothing takes the short cut, neither from it nor to it.
    pub slow: bool,
}

/// What a port has done; bytes are those of frames without their `virtio_net_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames that the guest sent on the short cut.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames that the guest received on the short cut.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames that were left to the kernel's switch.
    pub slow_packets: u64,
    /// Frames that came from it.
    pub from_tap_packets: u64,
    /// Frames to this guest for which it had no room, or from it for which the kernel had none.
    pub dropped_full: u64,
    /// Frames from this guest that are none, and to it that it cannot take.
    pub dropped_malformed: u64,
    /// When the guest last sent something: nanoseconds of CLOCK_MONOTONIC; 0: never.
    pub last_seen_ns: u64,
}

/// What one port has sent to another on the short cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// MAC of the receiver.
    pub to: [u8; 6],
    /// Frames.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
    /// When that was last.
    pub last_seen_ns: u64,
}

/// What the VMM says of a queue.
#[derive(Debug, Default)]
pub struct Wiring {
    /// Entries.
    pub size: u32,
    /// Where to begin.
    pub base: u16,
    /// Where it is.
    pub addresses: Option<Addresses>,
    /// Whether the VMM has asked to begin: set together with `kick`, which may be absent.
    pub started: bool,
    /// By which the guest tells of new buffers.
    pub kick: Option<OwnedFd>,
    /// By which the guest is told of used ones.
    pub call: Option<OwnedFd>,
    /// By which the VMM is told that the device has failed.
    pub error: Option<OwnedFd>,
    /// See the module's documentation; None: not said yet.
    pub enabled: Option<bool>,
}

/// One queue: even ones receive, odd ones send.
#[derive(Default)]
pub struct Queue {
    /// What the VMM says of it.
    pub wiring: Wiring,
    /// There while the queue is running.
    pub ring: Option<Ring>,
    /// It is on the list of what is looked at in each round.
    pub polled: bool,
    /// It is on the list of what has to be shown to the guest.
    pub touched: bool,
    /// When there was last something to do.
    pub last_work: u64,
    /// Since when the next frame waits for its receiver.
    pub stalled: Option<u64>,
    /// How long senders wait for this queue, in nanoseconds.
    pub patience: u64,
}

impl Queue {
    /// Note that the receiver has taken `count` frames.
    #[inline]
    pub fn has_taken(&mut self, count: u64) {
        self.patience = (self.patience + EARNED * count).min(PATIENCE);
    }

    /// Note that a sender has waited for `time`, and that it was worth it.
    pub fn has_waited(&mut self, time: u64) {
        self.patience = self.patience.saturating_sub(time);
        if let Some(ring) = &mut self.ring {
            ring.poll();
        }
    }

    /// Whether to wait on for this queue, which has no room since `since`. A receiver that does not take its frames
    /// loses the right, so that it cannot hold up who sends to others as well.
    pub fn is_worth_waiting(&mut self, since: u64, now: u64) -> bool {
        let worth = now.saturating_sub(since) < self.patience;
        if !worth {
            self.patience = 0;
        }
        worth
    }

    /// Show the guest what was used, and tell it if it wants to be told.
    #[inline]
    pub fn publish(&mut self) {
        if let Some(ring) = &mut self.ring
            && ring.is_unpublished()
            && ring.publish()
            && let Some(call) = &self.wiring.call
        {
            notify(call);
        }
    }
}

/// Raise an eventfd. It is nonblocking, and a guest that has not yet looked at it will.
fn notify(event: &OwnedFd) {
    let _ = nix::unistd::write(event, &1_u64.to_ne_bytes());
}

/// A port's tap.
pub struct Slow {
    /// The tap.
    pub tap: Tap,
    /// There is, or may be, something to read.
    pub readable: bool,
    /// It is on the list of what is looked at in each round.
    pub listed: bool,
    /// A frame that was read and has no room yet, and since when.
    pub held: Option<(Vec<u8>, u64)>,
}

/// One port.
pub struct Port {
    /// Its name, for the log.
    pub name: String,
    /// What the control plane says.
    pub settings: Settings,
    /// Its tap; None in tests.
    pub slow: Option<Slow>,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Features that the guest has negotiated.
    pub features: u64,
    /// What is written into the guest's memory is logged here while it migrates.
    pub log: Option<Arc<DirtyLog>>,
    /// A VMM is connected.
    pub connected: bool,
    /// Why the device is not served any more.
    pub failed: Option<String>,
    /// Receive and send queues by turns.
    pub queues: Vec<Queue>,
    /// Bytes of the `virtio_net_hdr` in the guest's buffers.
    pub header: usize,
    /// Pairs that the guest receives with.
    pub receiving: u16,
    /// What it has done.
    pub counters: Counters,
    /// What it has sent, by the receiver's slot.
    pub traffic: Table<u32, Traffic>,
}

/// What became of a frame for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// It is in the guest's buffers.
    Done,
    /// There are not enough buffers now.
    Full,
    /// It is larger than what the guest ever gives.
    TooLarge,
}

/// A frame on its way to a guest: its beginning, that we have a copy of, and the rest.
pub struct Packet<'a> {
    /// What the receiver is told about it: [`NetHeader::words`](crate::frame::NetHeader::words).
    pub header: (u64, u16),
    /// Whom it is for; None: as it says.
    pub mac: Option<[u8; 6]>,
    /// Its first bytes.
    pub head: &'a [u8],
    /// The copy that `head` is of.
    pub copy: Option<&'a Head>,
    /// Buffers of the sender.
    pub rest: &'a [Segment],
    /// Bytes of `rest` that are in `head`, or before it.
    pub skip: usize,
    /// Bytes of the frame.
    pub length: usize,
}

impl Packet<'_> {
    /// Write what is not in `head`.
    ///
    /// # Safety
    ///
    /// The memory that `rest` is of is there.
    #[inline]
    unsafe fn write_rest(&self, writer: &mut Writer<'_>) {
        let mut skip = self.skip;
        for segment in self.rest {
            let length = segment.length as usize;
            if skip < length {
                // SAFETY: the segment has `length` bytes.
                unsafe { writer.write(segment.data.add(skip), length - skip) };
            }
            skip = skip.saturating_sub(length);
        }
    }
}

/// Memory for [`Port::receive`] that is used again.
#[derive(Default)]
pub struct Buffers {
    segments: Vec<Segment>,
    chains: Vec<(u16, u64)>,
    /// The next buffers of the queue, as far as they have been looked at.
    ready: Vec<(u16, Segment)>,
    /// How many of them are used.
    used: usize,
}

impl Buffers {
    /// Forget which buffers come next: it is another queue's turn, or the guest's.
    #[inline]
    pub fn forget(&mut self) {
        self.ready.clear();
        self.used = 0;
    }
}

impl Port {
    /// A port with no VMM yet.
    pub fn new(name: String, settings: Settings, tap: Option<Tap>) -> Self {
        let queues = (0..2 * MAX_PAIRS).map(|_| Queue { patience: PATIENCE, ..Queue::default() }).collect();
        Port {
            name,
            settings,
            slow: tap.map(|tap| Slow { tap, readable: true, listed: false, held: None }),
            memory: Arc::default(),
            features: 0,
            log: None,
            connected: false,
            failed: None,
            queues,
            header: NET_HEADER,
            receiving: 0,
            counters: Counters::default(),
            traffic: Table::default(),
        }
    }

    /// How the features change the rings.
    pub fn ring_features(&self) -> Features {
        Features {
            event_idx: self.features >> VIRTIO_RING_F_EVENT_IDX & 1 != 0,
            indirect: self.features >> VIRTIO_RING_F_INDIRECT_DESC & 1 != 0,
        }
    }

    /// Whether the queue is running and enabled.
    #[inline]
    pub fn is_enabled(&self, queue: u16) -> bool {
        let queue = &self.queues[usize::from(queue)];
        queue.ring.is_some() && self.enabled(queue) == Some(true)
    }

    #[inline]
    fn enabled(&self, queue: &Queue) -> Option<bool> {
        if self.features & PROTOCOL_FEATURES == 0 { Some(true) } else { queue.wiring.enabled }
    }

    /// Whether what is sent in the queue is thrown away.
    #[inline]
    pub fn is_disabled(&self, queue: u16) -> bool {
        self.enabled(&self.queues[usize::from(queue)]) == Some(false)
    }

    /// Work out what follows from the features and from which queues are running.
    pub fn refresh(&mut self) {
        let log = self.log.as_ref().filter(|_| self.features & LOG_ALL != 0);
        for ring in self.queues.iter_mut().filter_map(|queue| queue.ring.as_mut()) {
            ring.set_log(log.cloned());
        }
        let modern = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;
        self.header = if self.features & modern != 0 { NET_HEADER } else { LEGACY_NET_HEADER };
        let before = self.receiving;
        self.receiving = (0..MAX_PAIRS).take_while(|pair| self.is_enabled(pair * 2)).count() as u16;
        if before == 0 && self.receiving > 0 {
            self.announce();
        }
    }

    /// Tell the kernel's switch that the guest is here now, as QEMU does on a tap after a migration: by a reverse ARP
    /// request (RFC 903) of the guest's.
    fn announce(&self) {
        let Some(slow) = &self.slow else { return };
        let mac = self.settings.identity.mac;
        let mut frame = [0_u8; NET_HEADER + ANNOUNCEMENT];
        let request = [0, 1, 8, 0, 6, 4, 0, 3];
        for (at, bytes) in [(0, &[0xff; 6][..]), (6, &mac), (12, &[0x80, 0x35]), (14, &request), (22, &mac), (32, &mac)]
        {
            frame[NET_HEADER + at..][..bytes.len()].copy_from_slice(bytes);
        }
        let part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        // SAFETY: the part is of `frame`.
        if let Err(error) = unsafe { slow.tap.write(&[part]) } {
            tracing::warn!(port = self.name, %error, "the guest's arrival is not announced");
        }
    }

    /// The queue that frames are received in which were sent in the sender's queue pair `pair`: one flow stays in one.
    #[inline]
    pub fn receive_queue(&self, pair: u16) -> Option<u16> {
        match self.receiving {
            0 => None,
            1 => Some(0),
            pairs => Some(pair % pairs * 2),
        }
    }

    /// Stop a queue; what it has used is shown to the guest.
    pub fn stop(&mut self, queue: u16) {
        let queue = &mut self.queues[usize::from(queue)];
        queue.publish();
        if let Some(ring) = queue.ring.take() {
            queue.wiring.base = ring.next_avail();
        }
        queue.stalled = None;
        queue.patience = PATIENCE;
        self.refresh();
    }

    /// The guest, or its VMM, has broken the rules: serve it no more.
    pub fn fail(&mut self, why: &str) {
        for queue in 0..self.queues.len() as u16 {
            self.stop(queue);
            if let Some(error) = &self.queues[usize::from(queue)].wiring.error {
                notify(error);
            }
        }
        if self.failed.is_none() {
            tracing::error!(port = self.name, why, "the device has failed");
            self.failed = Some(why.to_owned());
        }
    }

    /// Look at the next `count` buffers of a queue, and ask the processor for them.
    #[inline]
    pub fn prepare(&mut self, queue: u16, count: u16, into: &mut Buffers) {
        into.forget();
        let Some(ring) = &mut self.queues[usize::from(queue)].ring else { return };
        let count = ring.available(count).map_or(0, |available| available.min(count));
        for nth in 0..count {
            ring.prefetch(ring.head(nth));
        }
        ring.prefetch_used(count);
        for nth in 0..count {
            let head = ring.head(nth);
            let Some(segment) = ring.simple_buffer(head) else { return };
            prefetch_to_write(segment.data);
            prefetch_to_write(segment.data.wrapping_add(LINE));
            into.ready.push((head, segment));
        }
    }

    /// Put a frame into the guest's buffers. Either all of it is put there, or nothing.
    ///
    /// # Errors
    ///
    /// The guest's ring is malformed.
    #[inline]
    pub fn receive(&mut self, queue: u16, packet: &Packet<'_>, into: &mut Buffers) -> Result<Received, RingError> {
        let needed = self.header + packet.length;
        if let Some(&(head, segment)) = into.ready.get(into.used)
            && segment.length as usize >= needed
            && self.header == NET_HEADER
            && let (Some(copy), Some(mac)) = (packet.copy, packet.mac)
            && let Some(ring) = &mut self.queues[usize::from(queue)].ring
        {
            let done = copy.length();
            // SAFETY: the segment is of the ring's own memory, and long enough for all of the frame. `rest` is of the
            // sender's ring, which stays as long as the sender is being looked at.
            unsafe {
                copy.store(packet.header, mac, segment.data);
                if done < needed {
                    let target = Segment { data: segment.data.add(done), length: segment.length - done as u32 };
                    packet.write_rest(&mut Writer::new(&[target]));
                }
            }
            ring.written(&[segment], needed as u64);
            ring.push_used(head, needed as u32);
            ring.advance(1);
            into.used += 1;
            return Ok(Received::Done);
        }
        into.forget();
        self.receive_in_many(queue, packet, into)
    }

    fn receive_in_many(&mut self, queue: u16, packet: &Packet<'_>, into: &mut Buffers) -> Result<Received, RingError> {
        let mergeable = self.features >> VIRTIO_NET_F_MRG_RXBUF & 1 != 0;
        let header = self.header;
        let needed = (header + packet.length) as u64;
        let Some(ring) = &mut self.queues[usize::from(queue)].ring else { return Ok(Received::Full) };
        let Buffers { segments, chains, .. } = into;
        segments.clear();
        chains.clear();
        let mut available = ring.available(1)?;
        let mut room = 0;
        while room < needed {
            let count = chains.len() as u16;
            if count == ring.size() || (count == 1 && !mergeable) {
                return Ok(Received::TooLarge);
            }
            if count == available {
                available = ring.available(count + 1)?;
                if count == available {
                    return Ok(Received::Full);
                }
            }
            let head = ring.head(count);
            let length = ring.chain(head, Direction::Write, segments)?;
            chains.push((head, length));
            room += length;
        }
        let mut header_bytes = [0; NET_HEADER];
        header_bytes[..8].copy_from_slice(&packet.header.0.to_le_bytes());
        header_bytes[8..LEGACY_NET_HEADER].copy_from_slice(&packet.header.1.to_le_bytes());
        header_bytes[LEGACY_NET_HEADER..].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let mac = packet.mac.as_ref().map_or(&packet.head[..6], |mac| &mac[..]);
        // SAFETY: the segments are of the ring's own memory, which is there as long as the ring. `rest` is of the
        // sender's ring, which stays as long as the sender is being looked at.
        unsafe {
            let mut writer = Writer::new(segments);
            for part in [&header_bytes[..header], mac, &packet.head[6..]] {
                writer.write(part.as_ptr(), part.len());
            }
            packet.write_rest(&mut writer);
        }
        ring.written(segments, needed);
        let mut left = needed;
        for &(head, length) in chains.iter() {
            let written = length.min(left);
            ring.push_used(head, written as u32);
            left -= written;
        }
        ring.advance(chains.len() as u16);
        Ok(Received::Done)
    }

    /// Queue pairs that are running.
    pub fn running(&self) -> u16 {
        (0..MAX_PAIRS).filter(|pair| self.is_enabled(pair * 2) && self.is_enabled(pair * 2 + 1)).count() as u16
    }

    /// Files whose events are waited for.
    pub fn kick(&self, queue: u16) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.queues[usize::from(queue)].wiring.kick.as_ref().map(AsFd::as_fd)
    }
}
