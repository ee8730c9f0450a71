// SPDX-License-Identifier: Apache-2.0

//! The device's side of a split virtqueue (VIRTIO 1.2, section 2.7).
//!
//! This is a reader of our own, because the switch wants a batch of chains at once, translated, in memory that is used
//! again, where `virtio-queue` makes an iterator for each chain and looks up the memory for each descriptor. What it
//! reads of a chain is held against `virtio-queue` by a property test (`tests/ring.rs`).
//!
//! # States
//!
//! ```text
//!             new                    fail
//!   (stopped) ───► running ──────────────────► (dropped by the port; nothing of it is used again)
//!       ▲             │ next_avail()
//!       └─────────────┘
//! ```
//!
//! # Order
//!
//! Buffers are taken in the order in which they come ([`Ring::available`], [`Ring::head`], [`Ring::advance`]) and used
//! in any order, at any time later ([`Ring::push_used`], [`Ring::publish`]). The ring keeps no list of what is in
//! flight. So a device that has some there checks itself that a head is not in flight already, for a guest can make
//! one available twice, and uses what it has taken once.
//!
//! A device that uses all that it has taken before it stops needs to know no more than `next_avail` to go on. One that
//! does not has the [`inflight`](crate::inflight) memory: each buffer was taken that is used or in flight, so it goes on
//! at the used ring's index and as many entries further ([`Ring::next_used`], [`Ring::go_on_at`]).
//!
//! # Notifications
//!
//! A ring is *polled* (the guest need not tell of new buffers) or *armed* ([`Ring::request_kicks`]). With
//! `VIRTIO_RING_F_EVENT_IDX` it is polled by leaving the event index behind, without by a flag.
//!
//! # What is refused
//!
//! Indices beyond their table, more buffers than the ring has room for, chains longer than the ring (in an indirect
//! table: than the larger of the ring and 1024), indirect tables that are nested, empty, too long or not negotiated,
//! buffers of the wrong direction, of no bytes or outside the guest's memory. `virtio-queue` follows a chain of an
//! indirect table of up to 65535 descriptors; no driver makes one.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use crate::memory::{DirtyLog, GuestMemory, Segment};

/// Entries of the largest ring.
pub const MAX_SIZE: u16 = 32768;
const MAX_INDIRECT: u32 = 1024;
const DESCRIPTOR: usize = 16;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// What a guest did wrong, or its VMM when it set up the ring.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Not a power of two, or too large.
    #[error("a ring of {0} entries")]
    Size(u32),
    /// A part of the ring is not within one memory region.
    #[error("the ring's {0} is outside the guest's memory")]
    Outside(&'static str),
    /// A part of the ring is not aligned as it must be.
    #[error("the ring's {0} is not aligned")]
    Alignment(&'static str),
    /// More buffers were made available than there is room for.
    #[error("available index {idx} is {ahead} ahead of {next} in a ring of {size}")]
    Index {
        /// As the guest says.
        idx: u16,
        /// The next one that we use.
        next: u16,
        /// How much more that is.
        ahead: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A descriptor's number is beyond its table.
    #[error("descriptor {index} of a table of {size}")]
    Descriptor {
        /// The number.
        index: u32,
        /// Descriptors of the table.
        size: u32,
    },
    /// A chain that never ends, or is too long.
    #[error("a chain of more than {0} descriptors")]
    Endless(u32),
    /// An indirect table that must not be there.
    #[error("an indirect table of {length} bytes that is {problem}")]
    Indirect {
        /// Its length.
        length: u32,
        /// What is wrong.
        problem: &'static str,
    },
    /// A buffer to read among those to write, or the other way round.
    #[error("a buffer of the wrong direction")]
    Direction,
    /// A buffer without bytes.
    #[error("a buffer of no bytes")]
    Empty,
    /// A buffer that is not in the guest's memory.
    #[error("a buffer of {length} bytes at {address:#x}, outside the guest's memory")]
    Buffer {
        /// Guest address.
        address: u64,
        /// Bytes.
        length: u32,
    },
}

/// What buffers of a queue are for, as seen from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest sends.
    Read,
    /// The guest receives.
    Write,
}

/// Where a ring's parts are, in addresses of the VMM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// What the driver makes available.
    pub available: u64,
    /// What the device has used.
    pub used: u64,
    /// Where the guest has that, if writing to it is to be logged.
    pub used_log: Option<u64>,
}

/// Features that change how a ring works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `VIRTIO_RING_F_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_RING_F_INDIRECT_DESC`.
    pub indirect: bool,
}

/// A descriptor as it lies in memory, wherever that is: indirect tables need no alignment.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Raw {
    address: u64,
    rest: u64,
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

struct Parts {
    descriptors: *const Raw,
    available: *mut u16,
    used: *mut u16,
}

impl Parts {
    fn find(memory: &GuestMemory, addresses: &Addresses, size: u16) -> Result<Self, RingError> {
        let entries = usize::from(size);
        let find = |name, user, length, alignment| {
            let part: NonNull<u8> = memory.at_user(user, length).ok_or(RingError::Outside(name))?;
            if !(part.as_ptr() as usize).is_multiple_of(alignment) {
                return Err(RingError::Alignment(name));
            }
            Ok(part.as_ptr())
        };
        // Each ring has an event index behind it, whether it is used or not.
        let descriptors = find("descriptor table", addresses.descriptors, entries * DESCRIPTOR, 16)?;
        let available = find("available ring", addresses.available, 6 + entries * 2, 2)?;
        let used = find("used ring", addresses.used, 6 + entries * 8, 4)?;
        Ok(Parts { descriptors: descriptors.cast(), available: available.cast(), used: used.cast() })
    }
}

/// A running ring.
pub struct Ring {
    parts: Parts,
    memory: Arc<GuestMemory>,
    addresses: Addresses,
    features: Features,
    size: u16,
    /// The next entry of the available ring that we take.
    next_avail: u16,
    /// The guest's index when we last looked.
    seen_avail: u16,
    /// The next entry of the used ring that we write.
    next_used: u16,
    /// What the guest knows to be used.
    published: u16,
    /// `published` when we last thought of a notification; None: not yet.
    signalled: Option<u16>,
    armed: bool,
    log: Option<Arc<DirtyLog>>,
}

// SAFETY: the pointers lead into `memory`, which the ring keeps alive and which any thread may use.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring of `size` entries that begins at entry `base`. It is polled at first.
    ///
    /// # Errors
    ///
    /// What the VMM says of it is impossible.
    pub fn new(
        memory: Arc<GuestMemory>,
        addresses: Addresses,
        size: u32,
        base: u16,
        features: Features,
    ) -> Result<Self, RingError> {
        let size = match u16::try_from(size) {
            Ok(fits) if fits.is_power_of_two() && fits <= MAX_SIZE => fits,
            _ => return Err(RingError::Size(size)),
        };
        let parts = Parts::find(&memory, &addresses, size)?;
        let mut ring = Ring {
            parts,
            memory,
            addresses,
            features,
            size,
            next_avail: base,
            seen_avail: base,
            next_used: 0,
            published: 0,
            signalled: None,
            armed: true,
            log: None,
        };
        ring.next_used = ring.used_index().load(Ordering::Acquire);
        ring.published = ring.next_used;
        ring.poll();
        Ok(ring)
    }

    /// Go on in other memory, or at other addresses of it.
    ///
    /// # Errors
    ///
    /// The ring is not there; it must not be used any more.
    pub fn relocate(&mut self, memory: Arc<GuestMemory>, addresses: Addresses) -> Result<(), RingError> {
        self.parts = Parts::find(&memory, &addresses, self.size)?;
        self.memory = memory;
        self.addresses = addresses;
        Ok(())
    }

    /// Go on with other features.
    pub fn set_features(&mut self, features: Features) {
        self.features = features;
    }

    /// Log what is written from now on, or do not.
    pub fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.log = log;
    }

    /// Log that `length` bytes have been written to `segments`.
    #[cold]
    fn log_segments(&self, log: &DirtyLog, segments: &[Segment], mut length: u64) {
        for segment in segments {
            let count = u64::from(segment.length).min(length);
            if let Some(guest) = self.memory.guest_address(segment) {
                log.mark(guest, count);
            }
            length -= count;
        }
    }

    /// Note that `length` bytes have been written to buffers of this ring.
    #[inline]
    pub fn written(&self, segments: &[Segment], length: u64) {
        if let Some(log) = &self.log {
            self.log_segments(log, segments, length);
        }
    }

    /// Note that the used ring has been written. It is small, so all of it is marked.
    #[inline]
    fn written_used(&self) {
        if let (Some(log), Some(guest)) = (&self.log, self.addresses.used_log) {
            log.mark(guest, 6 + u64::from(self.size) * 8);
        }
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the ring's parts are.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Where to go on when the ring is started again.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// A half-word of the available ring: flags, index, entries, the driver's event index.
    #[inline]
    fn available_word(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 3 + usize::from(self.size));
        // SAFETY: `Parts::find` has seen that 3 + size half-words are in the memory, and that they are aligned. The
        // memory is kept alive by `self`. The guest's processors count as other threads, hence an atomic.
        unsafe { AtomicU16::from_ptr(self.parts.available.add(index)) }
    }

    #[inline]
    fn used_index(&self) -> &AtomicU16 {
        // SAFETY: as for `available_word`; the index is the second half-word.
        unsafe { AtomicU16::from_ptr(self.parts.used.add(1)) }
    }

    fn used_flags(&self) -> &AtomicU16 {
        // SAFETY: as for `available_word`; the flags are the first half-word.
        unsafe { AtomicU16::from_ptr(self.parts.used) }
    }

    fn available_event(&self) -> &AtomicU16 {
        // SAFETY: as for `available_word`; the event index is behind the entries of 8 bytes each.
        unsafe { AtomicU16::from_ptr(self.parts.used.add(2 + usize::from(self.size) * 4)) }
    }

    /// How many buffers there are to take, of which at least `wanted` are asked for: if as many are known already, the
    /// guest's index is not read again.
    ///
    /// # Errors
    ///
    /// The guest says that there are more than the ring has room for.
    #[inline]
    pub fn available(&mut self, wanted: u16) -> Result<u16, RingError> {
        let known = self.seen_avail.wrapping_sub(self.next_avail);
        if known >= wanted {
            return Ok(known);
        }
        let idx = self.available_word(1).load(Ordering::Acquire);
        let ahead = idx.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(RingError::Index { idx, next: self.next_avail, ahead, size: self.size });
        }
        self.seen_avail = idx;
        Ok(ahead)
    }

    /// The first descriptor of the available buffer `nth`.
    #[inline]
    pub fn head(&self, nth: u16) -> u16 {
        let entry = self.next_avail.wrapping_add(nth) & (self.size - 1);
        self.available_word(2 + usize::from(entry)).load(Ordering::Relaxed)
    }

    /// Ask the processor for a descriptor that is wanted soon.
    #[inline]
    pub fn prefetch(&self, head: u16) {
        prefetch(self.parts.descriptors.wrapping_add(usize::from(head)).cast());
    }

    /// Ask the processor for where the next `count` used buffers are going to be written.
    #[inline]
    pub fn prefetch_used(&self, count: u16) {
        let entry = usize::from(self.next_used & (self.size - 1));
        let start = self.parts.used.wrapping_add(2 + entry * 4).cast_const().cast::<u8>();
        for line in 0..usize::from(count).div_ceil(LINE / 8) {
            prefetch_to_write(start.wrapping_add(line * LINE));
        }
    }

    #[inline]
    fn descriptor(table: *const Raw, index: u32) -> Descriptor {
        // SAFETY: the caller has seen that the table has more than `index` descriptors. They are read once.
        let raw = unsafe { table.add(index as usize).read_volatile() };
        let rest = u64::from_le(raw.rest);
        Descriptor {
            address: u64::from_le(raw.address),
            length: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    /// Give each buffer of the chain that begins with `head` to `each`, which adds it to `sum`. (What it adds up to is
    /// handed on rather than kept by `each`, for then it stays in registers.)
    #[inline(always)]
    fn walk<T>(
        &self,
        head: u16,
        mut sum: T,
        mut each: impl FnMut(T, &Descriptor) -> Result<T, RingError>,
    ) -> Result<T, RingError> {
        let mut table = self.parts.descriptors;
        let mut size = u32::from(self.size);
        let mut limit = size;
        let mut index = u32::from(head);
        let mut count = 0;
        let mut indirect = false;
        loop {
            if index >= size {
                return Err(RingError::Descriptor { index, size });
            }
            let descriptor = Self::descriptor(table, index);
            if descriptor.flags & INDIRECT != 0 {
                (table, size) = self.indirect(&descriptor, indirect)?;
                limit = size;
                index = 0;
                count = 0;
                indirect = true;
                continue;
            }
            sum = each(sum, &descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(sum);
            }
            count += 1;
            if count >= limit {
                return Err(RingError::Endless(limit));
            }
            index = u32::from(descriptor.next);
        }
    }

    /// Append the bytes of the chain that begins with `head` to `segments`; gives how many bytes.
    ///
    /// The segments are good as long as the ring is.
    ///
    /// # Errors
    ///
    /// The chain is malformed. `segments` may have grown.
    #[inline]
    pub fn chain(&self, head: u16, direction: Direction, segments: &mut Vec<Segment>) -> Result<u64, RingError> {
        self.walk(head, 0, |total, descriptor| {
            if (descriptor.flags & WRITE != 0) != (direction == Direction::Write) {
                return Err(RingError::Direction);
            }
            self.append(descriptor, segments)?;
            Ok(total + u64::from(descriptor.length))
        })
    }

    /// The same for a chain that has buffers to read and then some to write (VIRTIO 1.2, section 2.7.4.2); gives how
    /// many bytes either are.
    ///
    /// # Errors
    ///
    /// As for [`chain`](Self::chain).
    pub fn request(
        &self,
        head: u16,
        readable: &mut Vec<Segment>,
        writable: &mut Vec<Segment>,
    ) -> Result<(u64, u64), RingError> {
        self.walk(head, (0, 0), |(given, room), descriptor| {
            let length = u64::from(descriptor.length);
            if descriptor.flags & WRITE != 0 {
                self.append(descriptor, writable)?;
                return Ok((given, room + length));
            }
            if room > 0 {
                return Err(RingError::Direction);
            }
            self.append(descriptor, readable)?;
            Ok((given + length, room))
        })
    }

    /// The bytes of the chain that begins with `head`, if it is a single buffer to be written that lies together. What
    /// is malformed is none, and is told by [`chain`](Self::chain).
    #[inline]
    pub fn simple_buffer(&self, head: u16) -> Option<Segment> {
        if head >= self.size {
            return None;
        }
        let descriptor = Self::descriptor(self.parts.descriptors, u32::from(head));
        if descriptor.flags & (NEXT | WRITE | INDIRECT) != WRITE || descriptor.length == 0 {
            return None;
        }
        self.memory.at(descriptor.address, descriptor.length).filter(|segment| segment.length == descriptor.length)
    }

    #[inline]
    fn append(&self, descriptor: &Descriptor, segments: &mut Vec<Segment>) -> Result<(), RingError> {
        let Descriptor { mut address, mut length, .. } = *descriptor;
        if length == 0 {
            return Err(RingError::Empty);
        }
        loop {
            // A buffer may go on in the next region.
            let Some(segment) = self.memory.at(address, length) else {
                return Err(RingError::Buffer { address, length });
            };
            segments.push(segment);
            length -= segment.length;
            if length == 0 {
                return Ok(());
            }
            address = match address.checked_add(u64::from(segment.length)) {
                Some(next) => next,
                None => return Err(RingError::Buffer { address, length }),
            };
        }
    }

    /// The table that an indirect descriptor leads to.
    #[inline]
    fn indirect(&self, descriptor: &Descriptor, nested: bool) -> Result<(*const Raw, u32), RingError> {
        let length = descriptor.length;
        let size = length / DESCRIPTOR as u32;
        let refused = |problem| Err(RingError::Indirect { length, problem });
        if !self.features.indirect {
            return refused("not negotiated");
        }
        if nested || descriptor.flags & NEXT != 0 {
            return refused("within a chain");
        }
        if length == 0 || !(length as usize).is_multiple_of(DESCRIPTOR) {
            return refused("no whole number of descriptors");
        }
        if size > MAX_INDIRECT.max(u32::from(self.size)) {
            return refused("too long");
        }
        match self.memory.at(descriptor.address, length) {
            Some(segment) if segment.length == length => Ok((segment.data.cast_const().cast(), size)),
            _ => refused("outside the guest's memory"),
        }
    }

    /// The entry of the used ring that is written next: how many buffers have been used so far.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Take buffers from the available ring's entry `next` on.
    pub fn go_on_at(&mut self, next: u16) {
        (self.next_avail, self.seen_avail) = (next, next);
    }

    /// Say that the buffer `head` is used, and that `written` bytes of it were written. The guest sees it with
    /// [`publish`](Self::publish).
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        let entry = usize::from(self.next_used & (self.size - 1));
        let element = u64::from(head) | u64::from(written) << 32;
        // SAFETY: `Parts::find` has seen that 6 + size * 8 bytes are in the memory. The entries begin after 4 bytes and
        // are of 8 each, aligned to 4, as is written here.
        unsafe { self.parts.used.add(2 + entry * 4).cast::<[u32; 2]>().write_volatile(halves(element)) };
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Go on with the available ring after `count` buffers.
    #[inline]
    pub fn advance(&mut self, count: u16) {
        self.next_avail = self.next_avail.wrapping_add(count);
    }

    /// Show the guest what was used; gives whether it wants to be notified.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let before = self.signalled;
        let now = self.next_used;
        self.used_index().store(now, Ordering::Release);
        self.written_used();
        self.published = now;
        self.signalled = Some(now);
        // What the guest wants is read after it can see the index, or both would wait for each other.
        fence(Ordering::SeqCst);
        if !self.features.event_idx {
            let flags = self.available_word(0).load(Ordering::Relaxed);
            return before != Some(now) && u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let Some(before) = before else { return true };
        let event = self.available_word(2 + usize::from(self.size)).load(Ordering::Relaxed);
        // `vring_need_event` of the specification: the event lies in what was used since.
        now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
    }

    /// Whether there is something that [`publish`](Self::publish) would show.
    #[inline]
    pub fn is_unpublished(&self) -> bool {
        self.published != self.next_used
    }

    /// Want to be told of the next buffer; gives whether there is one already.
    ///
    /// # Errors
    ///
    /// As for [`available`](Self::available).
    pub fn request_kicks(&mut self) -> Result<bool, RingError> {
        self.armed = true;
        // The entry up to which there are buffers, which is not that from which on we take them.
        let known = self.seen_avail;
        if self.features.event_idx {
            self.available_event().store(known, Ordering::Relaxed);
        } else {
            self.used_flags().store(0, Ordering::Relaxed);
        }
        // The guest may have added one before it could see this.
        fence(Ordering::SeqCst);
        let before = self.seen_avail;
        let ahead = self.seen_avail.wrapping_sub(self.next_avail).wrapping_add(1);
        self.available(ahead)?;
        Ok(self.seen_avail != before)
    }

    /// Want to be told nothing.
    #[inline]
    pub fn poll(&mut self) {
        if self.armed {
            self.armed = false;
            let flag = if self.features.event_idx { 0 } else { VRING_USED_F_NO_NOTIFY as u16 };
            self.used_flags().store(flag, Ordering::Relaxed);
        }
    }
}

#[inline]
fn halves(element: u64) -> [u32; 2] {
    [(element as u32).to_le(), ((element >> 32) as u32).to_le()]
}

/// Bytes that processors get from each other at once.
pub const LINE: usize = 64;

/// Ask the processor for what lies at `address`, which may be any: it is going to be read.
#[inline]
pub fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// The same for what is going to be written. Writing to what another processor has is what takes longest here.
#[inline]
pub fn prefetch_to_write(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_ET0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
