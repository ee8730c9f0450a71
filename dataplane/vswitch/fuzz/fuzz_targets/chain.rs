// SPDX-License-Identifier: Apache-2.0

//! Any ring: what is read of it lies in the guest's memory, and it is never endless.

#![no_main]

use std::fs::File;
use std::sync::{Arc, LazyLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vring::memory::{GuestMemory, Region, Segment, Writer};
use vring::ring::{Addresses, Direction, Features, Ring};

const END: u64 = 0x10000;
const USER: u64 = 1 << 40;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const TABLE: u64 = 0x4000;

static MEMORY: LazyLock<Arc<GuestMemory>> = LazyLock::new(|| {
    let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.set_len(END).expect("its size");
    let part = |guest, size| Region { guest, size, user: USER + guest, offset: guest };
    let memory = GuestMemory::default().with(part(0, END / 2), &file).expect("the first half");
    Arc::new(memory.with(part(END / 2, END / 2), &file).expect("the second half"))
});

#[derive(Arbitrary, Debug)]
struct Descriptor {
    address: u16,
    far: bool,
    length: u16,
    long: bool,
    flags: u8,
    next: u8,
}

#[derive(Arbitrary, Debug)]
struct Input {
    table: [Descriptor; 16],
    indirect: [Descriptor; 16],
    heads: [u8; 16],
    idx: u16,
    base: u16,
    event_idx: bool,
    can_indirect: bool,
    write: bool,
}

fn put(address: u64, bytes: &[u8]) {
    let segment = MEMORY.at(address, bytes.len() as u32).expect("within the memory");
    // SAFETY: the memory is there for ever, and so are the bytes as long as this runs.
    unsafe { Writer::new(&[segment]).write(bytes.as_ptr(), bytes.len()) };
}

fn put_table(at: u64, table: &[Descriptor]) {
    for (index, descriptor) in table.iter().enumerate() {
        let address = u64::from(descriptor.address) << if descriptor.far { 48 } else { 0 };
        let length = u32::from(descriptor.length) << if descriptor.long { 16 } else { 0 };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&u16::from(descriptor.flags).to_le_bytes());
        bytes[14..].copy_from_slice(&u16::from(descriptor.next % 20).to_le_bytes());
        put(at + index as u64 * 16, &bytes);
    }
}

fuzz_target!(|input: Input| {
    put_table(DESCRIPTORS, &input.table);
    put_table(TABLE, &input.indirect);
    for (entry, head) in input.heads.iter().enumerate() {
        put(AVAILABLE + 4 + entry as u64 * 2, &u16::from(*head % 20).to_le_bytes());
    }
    put(AVAILABLE + 2, &input.idx.to_le_bytes());
    let addresses = Addresses { descriptors: USER + DESCRIPTORS, available: USER + AVAILABLE, used: USER + USED, used_log: None };
    let features = Features { event_idx: input.event_idx, indirect: input.can_indirect };
    let mut ring = Ring::new(MEMORY.clone(), addresses, 16, input.base, features).expect("a good ring");
    let direction = if input.write { Direction::Write } else { Direction::Read };
    let first = MEMORY.at(0, 1).expect("the first half").data as usize;
    let second = MEMORY.at(END / 2, 1).expect("the second half").data as usize;
    let half = (END / 2) as usize;
    let is_in_memory = |segment: &Segment| {
        let (start, end) = (segment.data as usize, segment.data as usize + segment.length as usize);
        let is_in = |base: usize| start >= base && end <= base + half;
        segment.length > 0 && (is_in(first) || is_in(second))
    };
    let Ok(count) = ring.available(16) else { return };
    assert!(count <= 16);
    for nth in 0..count {
        let (mut segments, mut writable) = (Vec::new(), Vec::new());
        if let Ok((given, room)) = ring.request(ring.head(nth), &mut segments, &mut writable) {
            let total = |segments: &[Segment]| segments.iter().map(|segment| u64::from(segment.length)).sum::<u64>();
            assert_eq!((given, room), (total(&segments), total(&writable)));
        }
        segments.append(&mut writable);
        assert!(segments.iter().all(is_in_memory));
        segments.clear();
        let Ok(total) = ring.chain(ring.head(nth), direction, &mut segments) else { return };
        assert_eq!(total, segments.iter().map(|segment| u64::from(segment.length)).sum::<u64>());
        assert!(segments.iter().all(is_in_memory));
        ring.push_used(ring.head(nth), 0);
    }
    ring.advance(count);
    ring.publish();
    let _ = ring.request_kicks();
});
