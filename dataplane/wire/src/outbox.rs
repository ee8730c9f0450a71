// SPDX-License-Identifier: Apache-2.0

//! Messages that wait to be sent, as frames that take turns.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;

use crate::MAX_BODY;
use crate::frame::{Header, MORE};

/// Bytes of frames whose order is settled: what comes later goes behind them.
const IN_ORDER: usize = 4 * MAX_BODY;
/// Frames for one system call.
const BATCH: usize = 64;

/// The bytes of a message, wherever they are.
pub trait Body {
    /// How many.
    fn length(&self) -> usize;

    /// Add the parts that some of them lie in.
    fn parts<'a>(&'a self, from: usize, to: usize, parts: &mut Vec<IoSlice<'a>>);
}

impl Body for Vec<u8> {
    fn length(&self) -> usize {
        self.len()
    }

    fn parts<'a>(&'a self, from: usize, to: usize, parts: &mut Vec<IoSlice<'a>>) {
        if from < to {
            parts.push(IoSlice::new(&self[from..to]));
        }
    }
}

impl<B: Body> Body for Arc<B> {
    fn length(&self) -> usize {
        B::length(self)
    }

    fn parts<'a>(&'a self, from: usize, to: usize, parts: &mut Vec<IoSlice<'a>>) {
        B::parts(self, from, to, parts);
    }
}

struct Entry<B> {
    header: Header,
    body: B,
    /// Bytes that are in frames already.
    cut: usize,
    /// Frames of it that have not been sent.
    frames: usize,
}

struct Frame {
    head: [u8; Header::SIZE],
    entry: usize,
    from: usize,
    to: usize,
}

/// See the module's documentation. Messages of one frame go in the order in which they come; of longer ones a frame goes
/// at a time, and they take turns.
pub struct Outbox<B> {
    entries: Vec<Option<Entry<B>>>,
    free: Vec<usize>,
    frames: VecDeque<Frame>,
    /// Bytes of `frames`, less what has been sent of the first.
    ready: usize,
    /// Bytes of the first frame that have been sent.
    sent: usize,
    /// Those that have more than one frame, and are not cut to the end.
    long: VecDeque<usize>,
    waiting: usize,
}

impl<B> Default for Outbox<B> {
    fn default() -> Self {
        Outbox {
            entries: Vec::new(),
            free: Vec::new(),
            frames: VecDeque::new(),
            ready: 0,
            sent: 0,
            long: VecDeque::new(),
            waiting: 0,
        }
    }
}

impl<B: Body> Outbox<B> {
    /// Have a message sent. Its `total` is set here.
    pub fn push(&mut self, header: Header, body: B) {
        let length = body.length();
        let header = Header { total: length as u32, ..header };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        self.entries[slot] = Some(Entry { header, body, cut: 0, frames: 0 });
        self.waiting += length;
        if length <= MAX_BODY {
            self.cut(slot);
        } else {
            self.long.push_back(slot);
        }
    }

    /// Bytes that wait, of bodies and of the headers that are made.
    pub fn unsent(&self) -> usize {
        self.ready + self.waiting
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty() && self.long.is_empty()
    }

    /// Make the next frame of a message; whether it was the last.
    fn cut(&mut self, slot: usize) -> bool {
        let Some(entry) = &mut self.entries[slot] else { return true };
        let (from, length) = (entry.cut, entry.body.length());
        let to = length.min(from + MAX_BODY);
        let flags = if to < length { MORE } else { 0 };
        let head = Header { length: (to - from) as u32, flags, ..entry.header }.encode();
        entry.cut = to;
        entry.frames += 1;
        self.waiting -= to - from;
        self.ready += Header::SIZE + to - from;
        self.frames.push_back(Frame { head, entry: slot, from, to });
        to == length
    }

    /// Send what is next by `write`, which gets its parts, and says how many bytes it has taken; as it says.
    ///
    /// # Errors
    ///
    /// Those of `write`: nothing is sent then.
    ///
    /// # Panics
    ///
    /// It takes more bytes than there are.
    pub fn send(&mut self, write: impl FnOnce(&[IoSlice<'_>]) -> io::Result<usize>) -> io::Result<usize> {
        while self.ready < IN_ORDER
            && let Some(slot) = self.long.pop_front()
        {
            if !self.cut(slot) {
                self.long.push_back(slot);
            }
        }
        let mut parts = Vec::with_capacity(2 * BATCH.min(self.frames.len()));
        for frame in self.frames.iter().take(BATCH) {
            parts.push(IoSlice::new(&frame.head));
            if let Some(entry) = &self.entries[frame.entry] {
                entry.body.parts(frame.from, frame.to, &mut parts);
            }
        }
        let mut rest = parts.as_mut_slice();
        IoSlice::advance_slices(&mut rest, self.sent);
        let count = write(rest)?;
        self.forget(count);
        Ok(count)
    }

    /// So many bytes have been sent.
    fn forget(&mut self, count: usize) {
        self.ready -= count;
        self.sent += count;
        while let Some(frame) = self.frames.front() {
            let size = Header::SIZE + frame.to - frame.from;
            if self.sent < size {
                return;
            }
            self.sent -= size;
            let slot = frame.entry;
            self.frames.pop_front();
            if let Some(entry) = &mut self.entries[slot] {
                entry.frames -= 1;
                if entry.frames == 0 && entry.cut == entry.body.length() {
                    self.entries[slot] = None;
                    self.free.push(slot);
                }
            }
        }
        assert_eq!(self.sent, 0, "more bytes than there were");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Assembler, Handles, Inbox, Kind};

    fn header(tag: u64) -> Header {
        Header { queue: 0, tag, ..Header::control(Kind::Answer, Handles::default(), 0) }
    }

    /// All that is sent, a few bytes at a time; the tags in the order of the frames, and the messages.
    fn through(outbox: &mut Outbox<Vec<u8>>, sizes: &[usize]) -> (Vec<u64>, Vec<(u64, Vec<u8>)>) {
        let (mut inbox, mut assembler) = (Inbox::default(), Assembler::new(1024, 1 << 30));
        let (mut order, mut messages) = (Vec::new(), Vec::new());
        for size in sizes.iter().cycle() {
            if outbox.is_empty() {
                break;
            }
            let mut bytes = Vec::new();
            let taken = outbox.send(|parts| {
                bytes.extend(parts.iter().flat_map(|part| part.iter().copied()).take(*size));
                Ok(bytes.len())
            });
            assert_eq!(taken.unwrap(), bytes.len());
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let space = inbox.space();
                let count = space.len().min(rest.len());
                space[..count].copy_from_slice(&rest[..count]);
                inbox.filled(count);
                rest = &rest[count..];
                while let Some((header, body)) = inbox.frame().unwrap() {
                    order.push(header.tag);
                    if let Some(message) = assembler.add(header, body).unwrap() {
                        messages.push((message.header.tag, message.body));
                    }
                }
            }
        }
        assert!(outbox.is_empty());
        assert_eq!(outbox.unsent(), 0);
        (order, messages)
    }

    #[test]
    fn large_messages_take_turns_and_a_small_one_waits_for_few_frames() {
        let mut outbox = Outbox::default();
        outbox.push(header(1), vec![1; 20 * MAX_BODY]);
        outbox.push(header(2), vec![2; 20 * MAX_BODY]);
        assert_eq!(outbox.send(|parts| Ok(usize::from(parts.is_empty()))).unwrap(), 0, "nothing is taken");
        outbox.push(header(3), vec![3; 10]);

        let (order, messages) = through(&mut outbox, &[100_000]);

        assert_eq!(order[..6], [1, 2, 1, 2, 3, 1]);
        assert_eq!(
            messages.iter().map(|(tag, body)| (*tag, body.len())).collect::<Vec<_>>(),
            [(3, 10), (1, 20 * MAX_BODY), (2, 20 * MAX_BODY)]
        );
    }

    #[test]
    fn message_of_no_bytes_is_a_frame() {
        let mut outbox = Outbox::default();
        outbox.push(header(1), Vec::new());
        assert_eq!(outbox.unsent(), Header::SIZE);
        assert_eq!(through(&mut outbox, &[7]), (vec![1], vec![(1, Vec::new())]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn messages_come_as_they_were_sent_however_the_bytes_are_cut(
            lengths in prop::collection::vec(prop_oneof![0..200_usize, MAX_BODY - 1..3 * MAX_BODY], 1..12),
            sizes in prop::collection::vec(1..2 * MAX_BODY, 1..8),
        ) {
            let mut outbox = Outbox::default();
            let mut sent = Vec::new();
            for (tag, length) in lengths.iter().enumerate() {
                let body: Vec<u8> = (0..*length).map(|at| (at * 7 + tag) as u8).collect();
                outbox.push(header(tag as u64), body.clone());
                sent.push((tag as u64, body));
            }
            let (_, mut messages) = through(&mut outbox, &sizes);
            messages.sort();
            prop_assert_eq!(messages, sent);
        }
    }
}
