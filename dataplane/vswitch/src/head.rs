// SPDX-License-Identifier: Apache-2.0

//! Our copy of a frame's first bytes, with its `virtio_net_hdr`.
//!
//! The copy is what is judged and what is sent on, so the guest cannot change it in between. It is made for the
//! processor, too: a load from memory that was written a moment ago is fast only if a single store wrote all of it, and
//! otherwise waits for the stores before it, among them those into memory of the other guest that is in another
//! processor's cache. So the copy is written and read in the same 16-byte steps, it is never changed, and what the
//! receiver gets instead of it (header and MAC) is put together in registers.

use vring::memory::{Segment, copy_from};

use crate::frame::NET_HEADER;

/// Bytes of the copy.
pub const HEAD: usize = 128;
const STEP: usize = 16;
/// Header, Ethernet addresses, and what follows them up to the next step.
const CHANGED: usize = 32;

/// See the module's documentation.
#[repr(C, align(16))]
pub struct Head {
    bytes: [u8; HEAD],
    length: usize,
}

/// Copy a multiple of [`STEP`] bytes, up to [`HEAD`], step by step. (Of a loop the compiler would make a call, and the
/// callee chooses its own steps.)
///
/// # Safety
///
/// There are `length` bytes at both, and they do not overlap.
#[inline(always)]
unsafe fn copy_steps(from: *const u8, to: *mut u8, length: usize) {
    let mut at = 0;
    // SAFETY: the parts add up to `length`.
    unsafe {
        if length & 128 != 0 {
            std::ptr::copy_nonoverlapping(from, to, 128);
            at += 128;
        }
        if length & 64 != 0 {
            std::ptr::copy_nonoverlapping(from.add(at), to.add(at), 64);
            at += 64;
        }
        if length & 32 != 0 {
            std::ptr::copy_nonoverlapping(from.add(at), to.add(at), 32);
            at += 32;
        }
        if length & 16 != 0 {
            std::ptr::copy_nonoverlapping(from.add(at), to.add(at), 16);
        }
    }
}

/// Write the first `length` bytes of a step, less than all of it.
///
/// # Safety
///
/// There are as many bytes at `to`.
#[inline(always)]
unsafe fn store_last([mut word, next]: [u64; 2], length: usize, mut to: *mut u8) {
    // SAFETY: the parts add up to `length`.
    unsafe {
        if length & 8 != 0 {
            to.cast::<u64>().write_unaligned(word.to_le());
            to = to.add(8);
            word = next;
        }
        if length & 4 != 0 {
            to.cast::<u32>().write_unaligned((word as u32).to_le());
            to = to.add(4);
            word >>= 32;
        }
        if length & 2 != 0 {
            to.cast::<u16>().write_unaligned((word as u16).to_le());
            to = to.add(2);
            word >>= 16;
        }
        if length & 1 != 0 {
            to.write(word as u8);
        }
    }
}

impl Default for Head {
    fn default() -> Self {
        Head { bytes: [0; HEAD], length: 0 }
    }
}

impl Head {
    /// Copy the first bytes of a frame of `length` bytes, after a header of `header` bytes.
    ///
    /// # Safety
    ///
    /// The memory that the segments are of is there, and together they are `header + length` bytes long or longer.
    #[inline]
    pub unsafe fn load(&mut self, segments: &[Segment], header: usize, length: usize) {
        let total = HEAD.min(NET_HEADER + length);
        self.length = total;
        // SAFETY: the first segment is long enough where it is read alone; the rest is the caller's word.
        unsafe {
            match segments.first() {
                Some(first) if header == NET_HEADER && first.length as usize >= total && total >= STEP => {
                    self.load_steps(first.data);
                }
                _ if header == NET_HEADER => {
                    copy_from(segments, 0, &mut self.bytes[..total]);
                }
                _ => {
                    copy_from(segments, 0, &mut self.bytes[..header]);
                    self.bytes[header..NET_HEADER].fill(0);
                    copy_from(segments, header, &mut self.bytes[NET_HEADER..total]);
                }
            }
        }
    }

    /// # Safety
    ///
    /// There are `self.length` bytes at `from`, and that are [`STEP`] at least.
    #[inline]
    unsafe fn load_steps(&mut self, from: *const u8) {
        let to = self.bytes.as_mut_ptr();
        let whole = self.length / STEP * STEP;
        let left = self.length - whole;
        // SAFETY: all of it lies within the first `self.length` bytes of both. The last step is read from where it ends,
        // and what was read already is shifted out.
        unsafe {
            copy_steps(from, to, whole);
            if left > 0 {
                let last = u128::from_le(from.add(self.length - STEP).cast::<u128>().read_unaligned());
                let last = last >> (8 * (STEP - left));
                to.add(whole).cast::<[u64; 2]>().write([(last as u64).to_le(), ((last >> 64) as u64).to_le()]);
            }
        }
    }

    /// The header and the first bytes of the frame.
    #[inline]
    pub fn split(&self) -> (&[u8; NET_HEADER], &[u8]) {
        let (header, frame) = self.bytes[..self.length].split_at(NET_HEADER);
        (header.first_chunk().expect("split there"), frame)
    }

    /// Bytes of the copy.
    #[inline]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Write it to one buffer, with another header ([`words`](crate::frame::NetHeader::words)) and another destination.
    ///
    /// # Safety
    ///
    /// There are [`length`](Self::length) bytes at `to`, which are no part of `self`.
    #[inline]
    pub unsafe fn store(&self, (first, second): (u64, u16), mac: [u8; 6], to: *mut u8) {
        let from = self.bytes.as_ptr();
        let [a, b, c, d, e, f] = mac;
        let second = u64::from(second) | 1 << 16 | u64::from(u32::from_le_bytes([a, b, c, d])) << 32;
        let whole = self.length / STEP * STEP;
        // SAFETY: the parts add up to `self.length`, except that the last step of `self`, which is there up to HEAD, is
        // read as a whole.
        unsafe {
            if whole < CHANGED {
                self.store_exactly(first, second, mac, to);
                return;
            }
            let third = u64::from_le(from.add(16).cast::<u64>().read());
            let third = third & !0xffff | u64::from(u16::from_le_bytes([e, f]));
            to.cast::<u64>().write_unaligned(first.to_le());
            to.add(8).cast::<u64>().write_unaligned(second.to_le());
            to.add(16).cast::<u64>().write_unaligned(third.to_le());
            to.add(24).cast::<u64>().write_unaligned(from.add(24).cast::<u64>().read());
            copy_steps(from.add(CHANGED), to.add(CHANGED), whole - CHANGED);
            if whole < self.length {
                let last = from.add(whole).cast::<[u64; 2]>().read();
                store_last(last.map(u64::from_le), self.length - whole, to.add(whole));
            }
        }
    }

    /// # Safety
    ///
    /// As for [`store`](Self::store).
    #[cold]
    unsafe fn store_exactly(&self, first: u64, second: u64, mac: [u8; 6], to: *mut u8) {
        let mut bytes = self.bytes;
        bytes[..8].copy_from_slice(&first.to_le_bytes());
        bytes[8..16].copy_from_slice(&second.to_le_bytes());
        bytes[NET_HEADER..NET_HEADER + 6].copy_from_slice(&mac);
        // SAFETY: the caller says that there is as much room.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::NetHeader;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [2, 3, 4, 5, 6, 7];

    fn segments(bytes: &mut [u8], cuts: &[usize]) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut start = 0;
        for end in cuts.iter().copied().chain([bytes.len()]) {
            if end > start && end <= bytes.len() {
                segments.push(Segment { data: bytes[start..].as_mut_ptr(), length: (end - start) as u32 });
                start = end;
            }
        }
        segments
    }

    proptest! {
        #[test]
        fn test_head_stores_what_it_has_loaded(
            length in 14_usize..300,
            more in 0_usize..40,
            cut in 0_usize..400,
            legacy in any::<bool>(),
            flags in 0_u8..2,
        ) {
            let header = if legacy { 10 } else { NET_HEADER };
            let mut sent: Vec<u8> = (0..header + length).map(|at| at as u8 ^ 0xa5).collect();
            let expected_frame = [&MAC, &sent[header + 6..]].concat();
            let segments = segments(&mut sent, &[cut]);
            let mut head = Head::default();
            // SAFETY: the segments are of `sent`, which is as long as is said.
            unsafe { head.load(&segments, header, length) };
            let total = HEAD.min(NET_HEADER + length);
            prop_assert_eq!(head.length(), total);
            prop_assert_eq!(head.split().1, &sent[header..header + total - NET_HEADER]);
            let other = NetHeader { flags, checksum_start: 34, checksum_offset: 16, ..NetHeader::default() };
            let mut received = vec![0xee; total + more];
            // SAFETY: `received` is as long as is said.
            unsafe { head.store(other.words(), MAC, received.as_mut_ptr()) };
            let expected_header = [flags, 0, 0, 0, 0, 0, 34, 0, 16, 0, 1, 0];
            prop_assert_eq!(&received[..NET_HEADER], &expected_header);
            prop_assert_eq!(&received[NET_HEADER..total], &expected_frame[..total - NET_HEADER]);
            prop_assert!(received[total..].iter().all(|byte| *byte == 0xee));
        }
    }
}
