// SPDX-License-Identifier: Apache-2.0

//! The ring against `virtio-queue`, which is the reference, and against hostile guests.

use std::fs::File;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vring::memory::{GuestMemory, Region, Segment};
use vring::ring::{Addresses, Direction, Features, Ring, RingError};

const SIZE: u16 = 16;
const USER: u64 = 1 << 40;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const BUFFERS: u64 = 0x8000;
const END: u64 = 0x20000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[derive(Clone, Copy, Debug)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// A guest whose memory both readers see.
struct Guest {
    theirs: GuestMemoryMmap,
    ours: Arc<GuestMemory>,
    base: *mut u8,
}

impl Guest {
    fn new() -> Self {
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(END).unwrap();
        // Two regions side by side, so that buffers can cross from one to the other.
        let middle = 0x10000;
        let part = |guest, size| Region { guest, size, user: USER + guest, offset: guest };
        let ours = GuestMemory::default().with(part(0, middle), &file).unwrap();
        let ours = Arc::new(ours.with(part(middle, END - middle), &file).unwrap());
        let offset = |start| Some(FileOffset::new(file.try_clone().unwrap(), start));
        let theirs = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(0), middle as usize, offset(0)),
            (GuestAddress(middle), (END - middle) as usize, offset(middle)),
        ])
        .unwrap();
        let base = ours.at(0, 1).unwrap().data;
        Guest { theirs, ours, base }
    }

    fn write<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.theirs.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn read<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.theirs.read_obj(GuestAddress(address)).unwrap()
    }

    fn put(&self, table: u64, index: u16, descriptor: Descriptor) {
        let at = table + u64::from(index) * 16;
        self.write(at, descriptor.address.to_le());
        self.write(at + 8, descriptor.length.to_le());
        self.write(at + 12, descriptor.flags.to_le());
        self.write(at + 14, descriptor.next.to_le());
    }

    fn make_available(&self, heads: &[u16], idx: u16) {
        for (entry, head) in heads.iter().enumerate() {
            self.write(AVAILABLE + 4 + entry as u64 * 2, head.to_le());
        }
        self.write(AVAILABLE + 2, idx.to_le());
    }

    fn ring(&self, features: Features) -> Ring {
        let addresses = Addresses {
            descriptors: USER + DESCRIPTORS,
            available: USER + AVAILABLE,
            used: USER + USED,
            used_log: None,
        };
        Ring::new(self.ours.clone(), addresses, u32::from(SIZE), 0, features).unwrap()
    }

    /// Guest addresses of segments: those of one chain lie in one of two mappings of the same file.
    fn locate(&self, segments: &[Segment]) -> Vec<(u64, u32)> {
        let second = self.ours.at(0x10000, 1).unwrap().data as usize;
        let first = self.base as usize;
        segments
            .iter()
            .map(|segment| {
                let at = segment.data as usize;
                let in_second = (second..second + (END - 0x10000) as usize).contains(&at);
                (if in_second { at - second + 0x10000 } else { at - first } as u64, segment.length)
            })
            .collect()
    }

    /// What the reference makes of the first available chain: (address, length, whether it is to be written).
    fn reference(&self) -> Option<Vec<(u64, u32, bool)>> {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        let chain = queue.iter(&self.theirs).ok()?.next()?;
        let buffers = chain.map(|part| (part.addr().0, part.len(), part.is_write_only()));
        Some(buffers.collect())
    }
}

fn join(parts: impl IntoIterator<Item = (u64, u32)>) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (address, length) in parts {
        match joined.last_mut() {
            Some(last) if last.0 + last.1 == address => last.1 += u64::from(length),
            _ => joined.push((address, u64::from(length))),
        }
    }
    joined
}

fn likely_descriptor(tables: u16) -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![8 => BUFFERS..END - 0x400, 1 => any::<u64>(), 1 => Just(TABLE)];
    let length = prop_oneof![8 => 1_u32..0x400, 2 => (1_u32..20).prop_map(|n| n * 16), 1 => any::<u32>(), 1 => Just(0)];
    let flags = prop_oneof![6 => Just(NEXT), 6 => Just(0), 2 => Just(INDIRECT), 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..tables, 1 => any::<u16>()];
    (address, length, flags, next).prop_map(|(address, length, flags, next)| Descriptor {
        address,
        length,
        flags,
        next,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn test_chain_is_what_the_reference_says(
        table in proptest::collection::vec(likely_descriptor(SIZE), usize::from(SIZE)),
        indirect in proptest::collection::vec(likely_descriptor(20), 20),
        head in 0..SIZE,
        write in any::<bool>(),
    ) {
        let guest = Guest::new();
        let direction = if write { Direction::Write } else { Direction::Read };
        let turned = |mut descriptor: Descriptor| {
            if write && descriptor.flags & INDIRECT == 0 && descriptor.flags < 8 {
                descriptor.flags |= WRITE;
            }
            descriptor
        };
        for (index, descriptor) in table.iter().enumerate() {
            guest.put(DESCRIPTORS, index as u16, turned(*descriptor));
        }
        for (index, descriptor) in indirect.iter().enumerate() {
            guest.put(TABLE, index as u16, turned(*descriptor));
        }
        guest.make_available(&[head], 1);
        let mut ring = guest.ring(Features { event_idx: false, indirect: true });
        prop_assert_eq!(ring.available(1), Ok(1));
        prop_assert_eq!(ring.head(0), head);
        let mut segments = Vec::new();
        // What is malformed the reference just ends early, so only what is well-formed can be compared.
        if let Ok(total) = ring.chain(head, direction, &mut segments) {
            let reference = guest.reference().expect("a chain that we can read");
            prop_assert!(reference.iter().all(|(_, _, is_write)| *is_write == write));
            prop_assert_eq!(total, reference.iter().map(|(_, length, _)| u64::from(*length)).sum::<u64>());
            prop_assert_eq!(
                join(guest.locate(&segments)),
                join(reference.iter().map(|(address, length, _)| (*address, *length)))
            );
        }
    }

    #[test]
    fn test_request_is_what_the_reference_says(
        table in proptest::collection::vec((likely_descriptor(SIZE), any::<bool>()), usize::from(SIZE)),
        indirect in proptest::collection::vec((likely_descriptor(20), any::<bool>()), 20),
        head in 0..SIZE,
    ) {
        let guest = Guest::new();
        let turned = |(mut descriptor, write): (Descriptor, bool)| {
            if write && descriptor.flags & INDIRECT == 0 {
                descriptor.flags |= WRITE;
            }
            descriptor
        };
        for (index, descriptor) in table.into_iter().enumerate() {
            guest.put(DESCRIPTORS, index as u16, turned(descriptor));
        }
        for (index, descriptor) in indirect.into_iter().enumerate() {
            guest.put(TABLE, index as u16, turned(descriptor));
        }
        guest.make_available(&[head], 1);
        let mut ring = guest.ring(Features { event_idx: false, indirect: true });
        prop_assert_eq!(ring.available(1), Ok(1));
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let result = ring.request(head, &mut readable, &mut writable);
        if matches!(result, Ok(_) | Err(RingError::Direction)) {
            let reference = guest.reference().expect("a chain that we can read");
            prop_assert_eq!(result.is_ok(), reference.is_sorted_by_key(|(_, _, is_write)| *is_write));
            if let Ok(totals) = result {
                let of = |write| reference.iter().filter(move |part| part.2 == write).map(|part| (part.0, part.1));
                let total = |write| of(write).map(|(_, length)| u64::from(length)).sum::<u64>();
                prop_assert_eq!(totals, (total(false), total(true)));
                prop_assert_eq!(join(guest.locate(&readable)), join(of(false)));
                prop_assert_eq!(join(guest.locate(&writable)), join(of(true)));
            }
        }
        // Of one direction it is a chain as well, and both say the same.
        for direction in [Direction::Read, Direction::Write] {
            let mut segments = Vec::new();
            if let Ok(total) = ring.chain(head, direction, &mut segments) {
                let totals = if direction == Direction::Read { (total, 0) } else { (0, total) };
                let buffers = if direction == Direction::Read { &readable } else { &writable };
                prop_assert_eq!(ring.request(head, &mut Vec::new(), &mut Vec::new()), Ok(totals));
                prop_assert_eq!(guest.locate(&segments), guest.locate(buffers));
            }
        }
    }

    #[test]
    fn test_chain_any_bytes_never_leave_the_guests_memory(
        bytes in proptest::collection::vec(any::<u8>(), 16 * usize::from(SIZE)),
        more in proptest::collection::vec(any::<u8>(), 0x400),
        head in any::<u16>(),
        idx in any::<u16>(),
        indirect in any::<bool>(),
    ) {
        let guest = Guest::new();
        guest.theirs.write_slice(&bytes, GuestAddress(DESCRIPTORS)).unwrap();
        guest.theirs.write_slice(&more, GuestAddress(TABLE)).unwrap();
        guest.make_available(&[head], idx);
        let mut ring = guest.ring(Features { event_idx: true, indirect });
        prop_assert_eq!(ring.available(1).is_ok(), idx <= SIZE);
        let (mut segments, mut more) = (Vec::new(), Vec::new());
        for direction in [Direction::Read, Direction::Write] {
            let _ = ring.chain(head, direction, &mut segments);
        }
        let _ = ring.request(head, &mut segments, &mut more);
        segments.append(&mut more);
        for (address, length) in guest.locate(&segments) {
            prop_assert!(length > 0 && address + u64::from(length) <= END);
        }
    }

    #[test]
    fn test_publish_asks_for_what_the_specification_says(
        event in any::<u16>(),
        counts in proptest::collection::vec(1_u16..5, 1..20),
    ) {
        let guest = Guest::new();
        guest.write(USED + 2, event.wrapping_sub(20).to_le());
        let mut ring = guest.ring(Features { event_idx: true, indirect: false });
        guest.write(AVAILABLE + 4 + u64::from(SIZE) * 2, event.to_le());
        let mut used = event.wrapping_sub(20);
        let mut first = true;
        for count in counts {
            for _ in 0..count {
                ring.push_used(3, 7);
            }
            let before = used;
            used = used.wrapping_add(count);
            let wanted = first || (0..count).any(|n| before.wrapping_add(n) == event);
            prop_assert_eq!(ring.publish(), wanted);
            prop_assert_eq!(guest.read::<u16>(USED + 2), used);
            first = false;
        }
    }
}

fn plain(address: u64, length: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, length, flags, next }
}

fn chain_of(descriptors: &[Descriptor], indirect: &[Descriptor], features: Features) -> Result<u64, RingError> {
    let guest = Guest::new();
    for (index, descriptor) in descriptors.iter().enumerate() {
        guest.put(DESCRIPTORS, index as u16, *descriptor);
    }
    for (index, descriptor) in indirect.iter().enumerate() {
        guest.put(TABLE, index as u16, *descriptor);
    }
    guest.ring(features).chain(0, Direction::Read, &mut Vec::new())
}

const BOTH: Features = Features { event_idx: false, indirect: true };

#[test]
fn test_chain_loop_returns_error() {
    let chain = [plain(BUFFERS, 1, NEXT, 1), plain(BUFFERS, 1, NEXT, 0)];
    assert_eq!(chain_of(&chain, &[], BOTH), Err(RingError::Endless(u32::from(SIZE))));
    let table = [plain(TABLE, 16, INDIRECT, 0)];
    assert_eq!(chain_of(&table, &[plain(BUFFERS, 1, NEXT, 0)], BOTH), Err(RingError::Endless(1)));
}

#[test]
fn test_chain_as_long_as_the_ring_is_read() {
    let chain: Vec<_> = (0..SIZE).map(|n| plain(BUFFERS, 3, if n + 1 < SIZE { NEXT } else { 0 }, n + 1)).collect();
    assert_eq!(chain_of(&chain, &[], BOTH), Ok(48));
}

#[test]
fn test_chain_invalid_buffer_returns_error() {
    assert_eq!(chain_of(&[plain(BUFFERS, 0, 0, 0)], &[], BOTH), Err(RingError::Empty));
    assert_eq!(chain_of(&[plain(BUFFERS, 4, WRITE, 0)], &[], BOTH), Err(RingError::Direction));
    assert_eq!(chain_of(&[plain(END - 2, 4, 0, 0)], &[], BOTH), Err(RingError::Buffer { address: END, length: 2 }));
    assert_eq!(
        chain_of(&[plain(u64::MAX, 4, 0, 0)], &[], BOTH),
        Err(RingError::Buffer { address: u64::MAX, length: 4 })
    );
    let outside = RingError::Descriptor { index: u32::from(SIZE), size: u32::from(SIZE) };
    assert_eq!(chain_of(&[plain(BUFFERS, 4, NEXT, SIZE)], &[], BOTH), Err(outside));
}

#[test]
fn test_chain_invalid_indirect_table_returns_error() {
    let good = [plain(BUFFERS, 4, NEXT, 1), plain(BUFFERS, 4, 0, 0)];
    assert_eq!(chain_of(&[plain(TABLE, 32, INDIRECT, 0)], &good, BOTH), Ok(8));
    assert_eq!(chain_of(&[plain(BUFFERS, 2, NEXT, 1), plain(TABLE, 32, INDIRECT, 0)], &good, BOTH), Ok(10));
    for wrong in [
        plain(TABLE, 0, INDIRECT, 0),
        plain(TABLE, 24, INDIRECT, 0),
        plain(TABLE, 16 * 1025, INDIRECT, 0),
        plain(END - 16, 32, INDIRECT, 0),
        plain(TABLE, 32, INDIRECT | NEXT, 0),
    ] {
        assert!(matches!(chain_of(&[wrong], &good, BOTH), Err(RingError::Indirect { .. })), "{wrong:?}");
    }
    let nested = [plain(TABLE, 32, INDIRECT, 0)];
    assert!(matches!(chain_of(&[plain(TABLE, 32, INDIRECT, 0)], &nested, BOTH), Err(RingError::Indirect { .. })));
    let features = Features { event_idx: false, indirect: false };
    let refused = chain_of(&[plain(TABLE, 32, INDIRECT, 0)], &good, features);
    assert!(matches!(refused, Err(RingError::Indirect { .. })));
}

#[test]
fn test_request_gives_what_is_to_be_read_and_then_written() {
    let request = |descriptors: &[Descriptor]| {
        let guest = Guest::new();
        for (index, descriptor) in descriptors.iter().enumerate() {
            guest.put(DESCRIPTORS, index as u16, *descriptor);
            guest.put(TABLE, index as u16, *descriptor);
        }
        let ring = guest.ring(BOTH);
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let totals = ring.request(0, &mut readable, &mut writable);
        // The same in a table of its own.
        guest.put(DESCRIPTORS, 0, plain(TABLE, descriptors.len() as u32 * 16, INDIRECT, 0));
        assert_eq!(ring.request(0, &mut Vec::new(), &mut Vec::new()), totals);
        totals.map(|totals| (totals, guest.locate(&readable), guest.locate(&writable)))
    };
    let disk =
        [plain(BUFFERS, 16, NEXT, 1), plain(BUFFERS + 64, 512, NEXT | WRITE, 2), plain(BUFFERS + 32, 1, WRITE, 0)];
    let wanted = ((16, 513), vec![(BUFFERS, 16)], vec![(BUFFERS + 64, 512), (BUFFERS + 32, 1)]);
    assert_eq!(request(&disk), Ok(wanted));
    assert_eq!(request(&[plain(BUFFERS, 4, 0, 0)]), Ok(((4, 0), vec![(BUFFERS, 4)], vec![])));
    assert_eq!(request(&[plain(BUFFERS, 4, WRITE, 0)]), Ok(((0, 4), vec![], vec![(BUFFERS, 4)])));
    let turned = [plain(BUFFERS, 4, NEXT | WRITE, 1), plain(BUFFERS, 4, 0, 0)];
    assert_eq!(request(&turned), Err(RingError::Direction));
    assert_eq!(request(&[plain(BUFFERS, 4, NEXT, 1), plain(BUFFERS, 0, WRITE, 0)]), Err(RingError::Empty));
}

#[test]
fn test_available_more_than_the_ring_returns_error() {
    let guest = Guest::new();
    let mut ring = guest.ring(BOTH);
    guest.make_available(&[], SIZE);
    assert_eq!(ring.available(1), Ok(SIZE));
    ring.advance(3);
    guest.make_available(&[], SIZE + 4);
    assert!(matches!(ring.available(SIZE), Err(RingError::Index { ahead: 17, .. })));
    guest.make_available(&[], 2);
    assert!(ring.available(SIZE).is_err());
}

#[test]
fn test_request_kicks_sees_what_came_before() {
    for event_idx in [false, true] {
        let guest = Guest::new();
        let mut ring = guest.ring(Features { event_idx, indirect: false });
        assert_eq!(guest.read::<u16>(USED), if event_idx { 0 } else { 1 });
        assert_eq!(ring.request_kicks(), Ok(false));
        assert_eq!(guest.read::<u16>(USED), 0);
        ring.poll();
        guest.make_available(&[0, 1], 2);
        assert_eq!(ring.request_kicks(), Ok(true));
        assert_eq!(ring.available(1), Ok(2));
        assert_eq!(ring.request_kicks(), Ok(false));
        if event_idx {
            assert_eq!(guest.read::<u16>(USED + 4 + u64::from(SIZE) * 8), 2);
        }
    }
}

#[test]
fn test_new_impossible_ring_returns_error() {
    let guest = Guest::new();
    let good =
        Addresses { descriptors: USER + DESCRIPTORS, available: USER + AVAILABLE, used: USER + USED, used_log: None };
    let make = |addresses, size| Ring::new(guest.ours.clone(), addresses, size, 0, BOTH).err();
    assert_eq!(make(good, 16), None);
    for size in [0, 3, 65536, u32::MAX] {
        assert_eq!(make(good, size), Some(RingError::Size(size)));
    }
    let moved = Addresses { descriptors: USER + END - 16, ..good };
    assert_eq!(make(moved, 16), Some(RingError::Outside("descriptor table")));
    let crossing = Addresses { used: USER + 0x10000 - 8, ..good };
    assert_eq!(make(crossing, 16), Some(RingError::Outside("used ring")));
    let odd = Addresses { available: USER + AVAILABLE + 1, ..good };
    assert_eq!(make(odd, 16), Some(RingError::Alignment("available ring")));
}

#[test]
fn test_buffers_are_used_in_another_order_than_taken() {
    let guest = Guest::new();
    let mut ring = guest.ring(BOTH);
    let take = |ring: &mut Ring| {
        let count = ring.available(SIZE).unwrap();
        let heads: Vec<u16> = (0..count).map(|nth| ring.head(nth)).collect();
        ring.advance(count);
        heads
    };
    let used = |entry: u64| (guest.read::<u32>(USED + 4 + entry * 8), guest.read::<u32>(USED + 8 + entry * 8));

    guest.make_available(&[4, 9, 2], 3);
    assert_eq!(take(&mut ring), [4, 9, 2]);
    ring.push_used(2, 20);
    assert!(ring.publish());
    assert_eq!((guest.read::<u16>(USED + 2), used(0)), (1, (2, 20)));
    // What is free again is made available again, while what came before it is still in flight.
    guest.make_available(&[4, 9, 2, 2, 7], 5);
    assert_eq!(take(&mut ring), [2, 7]);
    for head in [7_u16, 9] {
        ring.push_used(head, u32::from(head) * 10);
    }
    assert!(ring.publish());
    assert_eq!((guest.read::<u16>(USED + 2), used(1), used(2)), (3, (7, 70), (9, 90)));
    assert_eq!((ring.next_avail(), ring.next_used()), (5, 3));
    // The next process goes on behind what is used (three) and in flight (4 and 2).
    let mut next = guest.ring(BOTH);
    next.go_on_at(next.next_used().wrapping_add(2));
    assert_eq!(next.available(1), Ok(0));
    next.push_used(2, 21);
    next.push_used(4, 40);
    assert!(next.publish());
    assert_eq!((guest.read::<u16>(USED + 2), used(3), used(4)), (5, (2, 21), (4, 40)));
    guest.make_available(&[4, 9, 2, 2, 7, 11], 6);
    assert_eq!(take(&mut next), [11]);
}

#[test]
fn test_push_used_wraps_and_is_seen_after_publish() {
    let guest = Guest::new();
    guest.write(USED + 2, 0xfffe_u16);
    let mut ring = guest.ring(BOTH);
    for head in [5_u16, 6, 7] {
        ring.push_used(head, u32::from(head) * 10);
    }
    assert_eq!(guest.read::<u16>(USED + 2), 0xfffe);
    assert!(ring.publish());
    assert_eq!(guest.read::<u16>(USED + 2), 1);
    for (entry, head) in [(14, 5_u32), (15, 6), (0, 7)] {
        assert_eq!(guest.read::<u32>(USED + 4 + entry * 8), head);
        assert_eq!(guest.read::<u32>(USED + 8 + entry * 8), head * 10);
    }
    guest.write(AVAILABLE, 1_u16);
    ring.push_used(1, 0);
    assert!(!ring.publish());
}
