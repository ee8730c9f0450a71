// SPDX-License-Identifier: Apache-2.0

//! Messages out of fragments.

use std::collections::HashMap;

use crate::bytes::Malformed;
use crate::frame::{Header, MORE};

/// A whole request or answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// That of its frames; `length` is that of the last one.
    pub header: Header,
    /// All of its bytes.
    pub body: Vec<u8>,
}

/// Puts the fragments of a connection's messages together.
///
/// It holds at most as many unfinished messages, and as many bytes of them, as it is told. Memory for a message is taken
/// as its bytes come, not by what its first frame announces.
#[derive(Debug)]
pub struct Assembler {
    parts: HashMap<u64, Message>,
    bytes: usize,
    most_messages: usize,
    most_bytes: usize,
}

impl Assembler {
    /// One that holds no more than that.
    pub fn new(most_messages: usize, most_bytes: usize) -> Self {
        Assembler { parts: HashMap::new(), bytes: 0, most_messages, most_bytes }
    }

    /// Bytes of unfinished messages.
    pub fn held(&self) -> usize {
        self.bytes
    }

    /// Add a frame; the message, if it is whole now.
    ///
    /// # Errors
    ///
    /// The frame contradicts those before it, or there are too many unfinished messages. The connection must end.
    pub fn add(&mut self, header: Header, body: &[u8]) -> Result<Option<Message>, Malformed> {
        let last = header.flags & MORE == 0;
        let Some(mut message) = self.parts.remove(&header.tag) else {
            return match last {
                true if body.len() == header.total as usize => Ok(Some(Message { header, body: body.to_vec() })),
                true => Err(Malformed::Fragment(header.tag)),
                false if body.is_empty() => Err(Malformed::Fragment(header.tag)),
                false => {
                    if self.parts.len() == self.most_messages {
                        return Err(Malformed::InFlight(self.most_messages));
                    }
                    self.hold(Message { header, body: Vec::new() }, body)?;
                    Ok(None)
                }
            };
        };
        let same = Header { length: 0, flags: 0, settled: 0, ..message.header };
        let length = message.body.len() + body.len();
        let fits = if last { length == header.total as usize } else { length < header.total as usize };
        if same != (Header { length: 0, flags: 0, settled: 0, ..header }) || !fits || body.is_empty() {
            return Err(Malformed::Fragment(header.tag));
        }
        self.bytes -= message.body.len();
        if last {
            message.body.extend_from_slice(body);
            return Ok(Some(Message { header, body: message.body }));
        }
        self.hold(message, body)?;
        Ok(None)
    }

    fn hold(&mut self, mut message: Message, body: &[u8]) -> Result<(), Malformed> {
        let length = message.body.len() + body.len();
        if self.bytes + length > self.most_bytes {
            let length = (self.bytes + length) as u64;
            return Err(Malformed::Length { what: "unfinished messages", length, limit: self.most_bytes });
        }
        message.body.extend_from_slice(body);
        self.bytes += length;
        self.parts.insert(message.header.tag, message);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::Kind;
    use crate::{Handles, MAX_BODY};

    fn header(tag: u64, total: usize, length: usize, more: bool) -> Header {
        Header {
            queue: 0,
            tag,
            total: total as u32,
            flags: u8::from(more),
            ..Header::control(Kind::Request, Handles::default(), length)
        }
    }

    #[test]
    fn messages_come_whole_and_large_ones_between_small_ones() {
        let mut assembler = Assembler::new(2, 1 << 20);

        assert_eq!(assembler.add(header(1, 5, 3, true), b"abc"), Ok(None));
        let small = assembler.add(header(2, 2, 2, false), b"xy").unwrap().unwrap();
        assert_eq!(assembler.held(), 3);
        let large = assembler.add(header(1, 5, 2, false), b"de").unwrap().unwrap();

        assert_eq!((small.header.tag, small.body.as_slice()), (2, b"xy".as_slice()));
        assert_eq!((large.header.tag, large.body.as_slice()), (1, b"abcde".as_slice()));
        assert_eq!(assembler.held(), 0);
    }

    #[test]
    fn fragments_that_do_not_fit_are_refused() {
        let cases = [
            vec![header(1, 5, 3, false)],
            vec![header(1, 5, 0, true)],
            vec![header(1, 5, 3, true), header(1, 5, 3, false)],
            vec![header(1, 5, 3, true), header(1, 5, 2, true)],
            vec![header(1, 5, 3, true), header(1, 6, 3, false)],
            vec![header(1, 5, 3, true), Header { room: 9, ..header(1, 5, 2, false) }],
            vec![header(1, 5, 3, true), Header { kind: Kind::Answer, ..header(1, 5, 2, false) }],
        ];
        for frames in cases {
            let mut assembler = Assembler::new(2, 1 << 20);
            let outcome: Vec<_> =
                frames.iter().map(|frame| assembler.add(*frame, &vec![0; frame.length as usize])).collect();
            assert_eq!(outcome.last().unwrap(), &Err(Malformed::Fragment(1)), "{frames:?}");
        }
    }

    #[test]
    fn no_more_is_held_than_allowed() {
        let body = vec![0; MAX_BODY];
        let total = 3 * MAX_BODY;
        let mut assembler = Assembler::new(2, 2 * MAX_BODY);

        assert_eq!(assembler.add(header(1, total, MAX_BODY, true), &body), Ok(None));
        assert_eq!(assembler.add(header(2, total, MAX_BODY, true), &body), Ok(None));
        assert_eq!(assembler.add(header(3, total, MAX_BODY, true), &body), Err(Malformed::InFlight(2)));
        assert!(matches!(assembler.add(header(2, total, MAX_BODY, true), &body), Err(Malformed::Length { .. })));
    }

    proptest! {
        #[test]
        fn bytes_come_as_they_were_sent_in_whatever_order_the_messages_take_turns(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 1..6),
            size in 1..64_usize,
            turns in prop::collection::vec(any::<prop::sample::Index>(), 400),
        ) {
            let mut assembler = Assembler::new(messages.len(), 1 << 20);
            let mut sent = vec![0; messages.len()];
            let mut arrived = vec![None; messages.len()];
            let mut turns = turns.into_iter().cycle();
            while arrived.iter().any(Option::is_none) {
                let open: Vec<_> = (0..messages.len()).filter(|nth| arrived[*nth].is_none()).collect();
                let nth = open[turns.next().unwrap().index(open.len())];
                let all = &messages[nth];
                let end = all.len().min(sent[nth] + size);
                let body = &all[sent[nth]..end];
                let frame = header(nth as u64, all.len(), body.len(), end < all.len());
                arrived[nth] = assembler.add(frame, body).unwrap().map(|message| message.body);
                sent[nth] = end;
            }
            prop_assert_eq!(arrived.into_iter().flatten().collect::<Vec<_>>(), messages);
            prop_assert_eq!(assembler.held(), 0);
        }
    }
}
