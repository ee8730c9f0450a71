// SPDX-License-Identifier: Apache-2.0

//! What a device has taken from its queues and not used yet, in memory that outlives it: the VMM keeps the memory, and
//! gives it to the next process that acts as the device (vhost-user, "Inflight I/O tracking", split virtqueues).
//!
//! # Layout
//!
//! For each queue, one after the other, each aligned to 64 bytes:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | features: none |
//! | 8 | 2 | version: 1 |
//! | 10 | 2 | number of descriptors |
//! | 12 | 2 | the last batch's head |
//! | 14 | 2 | index of the used ring when that batch was done |
//! | 16 + 16 n | 1 | whether descriptor n is the head of what is in flight |
//! | 22 + 16 n | 2 | the next head of the batch |
//! | 24 + 16 n | 8 | counter: the order in which they were taken |
//!
//! Behind the queues is a label of 16 bytes, which is ours alone.
//!
//! # One use at a time
//!
//! A batch here is one buffer, so its list has one entry:
//!
//! ```text
//!   taken(head)       counter, then the flag
//!   completing(head)  the last batch's head
//!                     (the used ring's entry, and its index, are written)
//!   completed(index)  the flag is cleared, then the index is noted
//! ```
//!
//! A process that finds an index other than the used ring's died after writing that, so it clears the last batch's flag
//! itself. Whatever is flagged then has not been used.
//!
//! # Hostile memory
//!
//! The VMM can write here at any time. What is read is only ever taken for a descriptor's number within the table.
//! Counters are whatever the VMM likes, and two of them may be the same.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::memory::{Mapping, Region};
use crate::ring;

const HEAD: usize = 16;
const DESCRIPTOR: usize = 16;
const ALIGNMENT: usize = 64;
const VERSION: u16 = 1;
/// Bytes of the label.
pub const LABEL: usize = 16;
/// Queues, at most.
const MAX_QUEUES: u16 = 1024;

/// See the module's documentation.
pub struct Inflight {
    start: *mut u8,
    length: usize,
    queues: u16,
    size: u16,
    /// Kept for `start`.
    _mapping: Mapping,
}

// SAFETY: all access is by atomics, within the mapping that is kept.
unsafe impl Send for Inflight {}
// SAFETY: as above.
unsafe impl Sync for Inflight {}

impl std::fmt::Debug for Inflight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Inflight({} queues of {})", self.queues, self.size)
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// Bytes of a queue's part.
fn stride(size: u16) -> usize {
    (HEAD + DESCRIPTOR * usize::from(size)).next_multiple_of(ALIGNMENT)
}

/// Bytes of all queues' parts, and of the label.
fn needed(queues: u16, size: u16) -> usize {
    usize::from(queues) * stride(size) + LABEL
}

impl Inflight {
    /// New memory in which nothing is in flight, and the file that it is.
    ///
    /// # Errors
    ///
    /// There can be none of that size.
    pub fn create(queues: u16, size: u16, label: &[u8; LABEL]) -> io::Result<(Self, File)> {
        check(queues, size)?;
        let bytes = needed(queues, size);
        let file = File::from(memfd_create("inflight", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(bytes as u64)?;
        let made = Self::map(&file, 0, bytes as u64, queues, size)?;
        for queue in 0..queues {
            made.word(queue, 8).store(VERSION.to_le(), Ordering::Relaxed);
            made.word(queue, 10).store(size.to_le(), Ordering::Relaxed);
        }
        for (nth, byte) in label.iter().enumerate() {
            made.byte(usize::from(queues) * stride(size) + nth).store(*byte, Ordering::Relaxed);
        }
        Ok((made, file))
    }

    /// Memory that an earlier process has made.
    ///
    /// # Errors
    ///
    /// It cannot be mapped, is too small, or begins where no queue can.
    pub fn map(file: &File, offset: u64, bytes: u64, queues: u16, size: u16) -> io::Result<Self> {
        check(queues, size)?;
        let length = needed(queues, size);
        let end = offset.checked_add(bytes);
        if bytes < length as u64 || end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(invalid("the memory for what is in flight is too small"));
        }
        if !offset.is_multiple_of(ALIGNMENT as u64) {
            return Err(invalid("the memory for what is in flight is not aligned"));
        }
        let mapping =
            Mapping::new(&Region { guest: 0, size: bytes, user: 0, offset }, file).map_err(io::Error::other)?;
        Ok(Inflight { start: mapping.at(offset), length, queues, size, _mapping: mapping })
    }

    /// Bytes of it.
    pub fn bytes(&self) -> u64 {
        self.length as u64
    }

    /// What was written behind the queues when it was made.
    pub fn label(&self) -> [u8; LABEL] {
        let start = usize::from(self.queues) * stride(self.size);
        std::array::from_fn(|nth| self.byte(start + nth).load(Ordering::Relaxed))
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        debug_assert!(at < self.length);
        // SAFETY: within the mapping, which lives as long as we do; whoever else writes there, it is by other processes.
        unsafe { AtomicU8::from_ptr(self.start.add(at)) }
    }

    fn place(&self, queue: u16, at: usize) -> *mut u8 {
        assert!(queue < self.queues && at + 8 <= stride(self.size), "queue {queue}, offset {at}");
        // SAFETY: within the mapping, by the assertion.
        unsafe { self.start.add(usize::from(queue) * stride(self.size) + at) }
    }

    fn word(&self, queue: u16, at: usize) -> &AtomicU16 {
        // SAFETY: as for `byte`; the offsets are even, and queues are aligned.
        unsafe { AtomicU16::from_ptr(self.place(queue, at).cast()) }
    }

    fn flag(&self, queue: u16, head: u16) -> &AtomicU8 {
        // SAFETY: as for `byte`.
        unsafe { AtomicU8::from_ptr(self.place(queue, HEAD + DESCRIPTOR * usize::from(head))) }
    }

    fn counter(&self, queue: u16, head: u16) -> &AtomicU64 {
        // SAFETY: as for `byte`; counters are aligned to 8 bytes.
        unsafe { AtomicU64::from_ptr(self.place(queue, HEAD + DESCRIPTOR * usize::from(head) + 8).cast()) }
    }

    fn is_ours(&self, queue: u16, head: u16) -> bool {
        queue < self.queues && head < self.size
    }

    /// The buffer `head` has been taken from the available ring; `number` says after which others.
    pub fn taken(&self, queue: u16, head: u16, number: u64) {
        if self.is_ours(queue, head) {
            self.counter(queue, head).store(number.to_le(), Ordering::Relaxed);
            self.flag(queue, head).store(1, Ordering::Release);
        }
    }

    /// The buffer `head` is going to be written to the used ring.
    pub fn completing(&self, queue: u16, head: u16) {
        if self.is_ours(queue, head) {
            self.word(queue, 12).store(head.to_le(), Ordering::Release);
        }
    }

    /// The buffer `head` is in the used ring, whose index is now `used`.
    pub fn completed(&self, queue: u16, head: u16, used: u16) {
        if self.is_ours(queue, head) {
            self.flag(queue, head).store(0, Ordering::Release);
            self.word(queue, 14).store(used.to_le(), Ordering::Release);
        }
    }

    /// What was taken and not used, with its numbers, in their order.
    ///
    /// `used` is the index of the used ring as it is in the guest's memory.
    pub fn left(&self, queue: u16, used: u16) -> Vec<(u16, u64)> {
        if queue >= self.queues {
            return Vec::new();
        }
        if u16::from_le(self.word(queue, 14).load(Ordering::Acquire)) != used {
            let head = u16::from_le(self.word(queue, 12).load(Ordering::Acquire));
            if head < self.size {
                self.flag(queue, head).store(0, Ordering::Release);
            }
            self.word(queue, 14).store(used.to_le(), Ordering::Release);
        }
        let flagged = |head: &u16| self.flag(queue, *head).load(Ordering::Acquire) != 0;
        let numbered = |head| (head, u64::from_le(self.counter(queue, head).load(Ordering::Relaxed)));
        let mut left: Vec<_> = (0..self.size).filter(flagged).map(numbered).collect();
        left.sort_by_key(|(_, number)| *number);
        left
    }

    /// A number higher than those of all that was ever taken.
    pub fn next_number(&self, queue: u16) -> u64 {
        let heads = if queue < self.queues { self.size } else { 0 };
        let numbers = (0..heads).map(|head| u64::from_le(self.counter(queue, head).load(Ordering::Relaxed)));
        numbers.max().map_or(0, |highest| highest.saturating_add(1))
    }
}

fn check(queues: u16, size: u16) -> io::Result<()> {
    if !(1..=MAX_QUEUES).contains(&queues) {
        return Err(invalid("the number of queues is impossible"));
    }
    if size == 0 || size > ring::MAX_SIZE { Err(invalid("the size of the queues is impossible")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;
    use crate::fault;

    fn heads(left: &[(u16, u64)]) -> Vec<u16> {
        left.iter().map(|(head, _)| *head).collect()
    }

    #[test]
    fn layout_is_that_of_vhost_user() {
        let (inflight, file) = Inflight::create(2, 8, &[7; LABEL]).unwrap();
        inflight.taken(1, 3, 0x0102);
        inflight.completing(1, 5);
        inflight.completed(1, 5, 9);

        let mut bytes = vec![0; inflight.bytes() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let queue = &bytes[192..];

        assert_eq!(bytes.len(), 2 * 192 + LABEL);
        assert_eq!(queue[8..16], [1, 0, 8, 0, 5, 0, 9, 0]);
        assert_eq!((queue[16 + 3 * 16], &queue[24 + 3 * 16..][..2]), (1, &[2, 1][..]));
        assert_eq!(bytes[2 * 192..], [7; LABEL]);
    }

    #[test]
    fn what_was_taken_and_not_used_is_left_in_the_order_in_which_it_was_taken() {
        let (inflight, file) = Inflight::create(2, 8, &[1; LABEL]).unwrap();
        for (number, head) in [(10, 5), (11, 2), (12, 7), (13, 0)] {
            inflight.taken(0, head, number);
        }
        inflight.completing(0, 2);
        inflight.completed(0, 2, 1);
        let next = Inflight::map(&file, 0, inflight.bytes(), 2, 8).unwrap();

        assert_eq!(next.label(), [1; LABEL]);
        assert_eq!(next.left(0, 1), [(5, 10), (7, 12), (0, 13)]);
        assert_eq!(next.left(1, 0), []);
        assert_eq!((next.next_number(0), next.next_number(1)), (14, 1));
    }

    /// The steps of a use, of which a process may do any number before it dies.
    #[test]
    fn death_between_any_two_steps_leaves_what_the_guest_has_not_got() {
        for steps in 0..=3 {
            let (inflight, file) = Inflight::create(1, 8, &[0; LABEL]).unwrap();
            inflight.taken(0, 4, 1);
            inflight.taken(0, 6, 2);
            let used = u16::from(steps >= 2);
            if steps >= 1 {
                inflight.completing(0, 4);
            }
            if steps >= 3 {
                inflight.completed(0, 4, used);
            }
            let next = Inflight::map(&file, 0, inflight.bytes(), 1, 8).unwrap();
            let wanted: &[u16] = if steps >= 2 { &[6] } else { &[4, 6] };
            assert_eq!(heads(&next.left(0, used)), wanted, "{steps} steps");
            assert_eq!(heads(&next.left(0, used)), wanted, "{steps} steps, seen twice");
        }
    }

    #[test]
    fn memory_that_is_too_small_is_refused() {
        let (inflight, file) = Inflight::create(2, 8, &[0; LABEL]).unwrap();
        let bytes = inflight.bytes();

        assert!(Inflight::map(&file, 0, bytes - 1, 2, 8).is_err());
        assert!(Inflight::map(&file, 4096, bytes, 2, 8).is_err());
        assert!(Inflight::map(&file, u64::MAX - 63, bytes, 2, 8).is_err());
        assert!(Inflight::map(&file, 1 << 63, bytes, 2, 8).is_err());
        assert!(Inflight::map(&file, 0, u64::MAX, 2, 8).is_err());
        assert!(Inflight::map(&file, 0, bytes, 3, 8).is_err());
        assert!(Inflight::create(0, 8, &[0; LABEL]).is_err());
        assert!(Inflight::create(1, 0, &[0; LABEL]).is_err());
    }

    #[test]
    fn memory_may_begin_within_the_file_where_a_queue_can() {
        let (made, file) = Inflight::create(2, 8, &[0; LABEL]).unwrap();
        made.taken(1, 3, 5);
        // The second queue as the only one of a region: 192 bytes on, which is no page.
        file.set_len(3 * 192 + 64).unwrap();

        let bytes = 192 + LABEL as u64;
        assert_eq!(Inflight::map(&file, 192, bytes, 1, 8).unwrap().left(0, 0), [(3, 5)]);
        assert!(Inflight::map(&file, 200, bytes, 1, 8).is_err());
    }

    #[test]
    fn memory_that_is_taken_away_has_nothing_in_flight() {
        fault::install().unwrap();
        let (inflight, file) = Inflight::create(2, 8, &[7; LABEL]).unwrap();
        inflight.taken(1, 3, 5);
        file.set_len(0).unwrap();

        assert_eq!((inflight.left(1, 0), inflight.label()), (vec![], [0; LABEL]));
        inflight.taken(1, 3, 6);
        assert_eq!(inflight.left(1, 0), [(3, 6)]);
    }

    #[test]
    fn queues_and_heads_that_there_are_not_change_nothing() {
        let (inflight, _file) = Inflight::create(1, 8, &[0; LABEL]).unwrap();
        inflight.taken(0, 8, 1);
        inflight.taken(1, 0, 1);
        inflight.completing(1, 0);
        inflight.completed(0, 8, 1);
        assert_eq!((inflight.left(0, 0), inflight.left(1, 0)), (vec![], vec![]));
    }

    /// A device, of which only `inflight`'s file and the guest's part outlive a process.
    struct Device {
        inflight: Inflight,
        /// What the guest has not got yet, in the order in which it was taken.
        taken: Vec<u16>,
        /// The used ring's index.
        used: u16,
        number: u64,
    }

    impl Device {
        /// Take a buffer that is not in flight, as far as `steps` of 2.
        fn take(&mut self, choice: u16, steps: usize) {
            let free: Vec<u16> = (0..SIZE).filter(|head| !self.taken.contains(head)).collect();
            let Some(head) = free.get(usize::from(choice) % free.len().max(1)).copied() else { return };
            match steps {
                0 => {}
                1 => self.inflight.counter(0, head).store(self.number.to_le(), Ordering::Relaxed),
                _ => {
                    self.inflight.taken(0, head, self.number);
                    self.taken.push(head);
                }
            }
            self.number += 1;
        }

        /// Use any buffer that is in flight, as far as `steps` of 4.
        fn complete(&mut self, choice: u16, steps: usize) {
            if self.taken.is_empty() {
                return;
            }
            let nth = usize::from(choice) % self.taken.len();
            let head = self.taken[nth];
            if steps >= 1 {
                self.inflight.completing(0, head);
            }
            if steps >= 2 {
                self.used = self.used.wrapping_add(1);
                self.taken.remove(nth);
            }
            match steps {
                0..=2 => {}
                3 => self.inflight.flag(0, head).store(0, Ordering::Relaxed),
                _ => self.inflight.completed(0, head, self.used),
            }
        }
    }

    const SIZE: u16 = 8;

    proptest! {
        /// Each life does some whole uses and then dies within one, after any of its writes.
        #[test]
        fn whoever_dies_whenever_the_next_one_finds_what_the_guest_has_not_got(
            lives in prop::collection::vec(
                (prop::collection::vec((any::<bool>(), any::<u16>()), 0..20), any::<bool>(), any::<u16>(), 0_usize..=4),
                1..6,
            ),
            used in any::<u16>(),
        ) {
            let (inflight, file) = Inflight::create(1, SIZE, &[0; LABEL]).unwrap();
            let mut device = Device { inflight, taken: Vec::new(), used, number: 0 };
            prop_assert_eq!(device.inflight.left(0, used), []);
            for (whole, takes, choice, steps) in lives {
                for (takes, choice) in whole {
                    if takes { device.take(choice, 2) } else { device.complete(choice, 4) }
                }
                if takes { device.take(choice, steps) } else { device.complete(choice, steps) }
                device.inflight = Inflight::map(&file, 0, device.inflight.bytes(), 1, SIZE).unwrap();
                let left = device.inflight.left(0, device.used);
                prop_assert_eq!(heads(&left), device.taken.clone());
                let next = device.inflight.next_number(0);
                prop_assert!(left.iter().all(|(_, number)| *number < next));
                device.number = next;
            }
        }

        #[test]
        fn whatever_is_written_there_heads_are_in_the_table_and_there_once(
            bytes in prop::collection::vec(any::<u8>(), 144 + 48),
            used in any::<u16>(),
        ) {
            let (inflight, file) = Inflight::create(1, 8, &[0; LABEL]).unwrap();
            file.write_all_at(&bytes[..inflight.bytes() as usize - LABEL], 0).unwrap();
            let left = inflight.left(0, used);
            prop_assert!(left.is_sorted_by_key(|(_, number)| *number));
            prop_assert!(left.iter().all(|(_, number)| *number <= inflight.next_number(0)));
            let mut left = heads(&left);
            prop_assert!(left.iter().all(|head| *head < 8));
            let found = left.len();
            left.sort_unstable();
            left.dedup();
            prop_assert_eq!(left.len(), found);
        }
    }
}
