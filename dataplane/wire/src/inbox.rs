// SPDX-License-Identifier: Apache-2.0

//! Frames out of the bytes that a socket gives.

use crate::MAX_BODY;
use crate::bytes::Malformed;
use crate::frame::Header;

/// Of several of the largest frames.
const SIZE: usize = 4 * MAX_BODY;

/// Keeps what has come until it is whole. A socket reads into [`space`](Self::space).
#[derive(Debug)]
pub struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for Inbox {
    fn default() -> Self {
        Inbox { bytes: vec![0; SIZE].into_boxed_slice(), start: 0, end: 0 }
    }
}

impl Inbox {
    /// Where the next bytes go. There is some, as long as all whole frames have been taken.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    /// So many bytes have been put there.
    ///
    /// # Panics
    ///
    /// There was no space for them.
    pub fn filled(&mut self, count: usize) {
        assert!(self.end + count <= self.bytes.len(), "{count} bytes more than there is space for");
        self.end += count;
    }

    /// The next whole frame.
    ///
    /// # Errors
    ///
    /// It is none: nothing after it can be understood.
    pub fn frame(&mut self) -> Result<Option<(Header, &[u8])>, Malformed> {
        let Some((head, rest)) = self.bytes[self.start..self.end].split_first_chunk() else { return Ok(None) };
        let header = Header::decode(head)?;
        let length = header.length as usize;
        if rest.len() < length {
            return Ok(None);
        }
        let from = self.start + Header::SIZE;
        self.start = from + length;
        Ok(Some((header, &self.bytes[from..from + length])))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Handles, Kind};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn frames_come_as_they_were_sent_however_the_bytes_are_cut(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..MAX_BODY), 1..20),
            sizes in prop::collection::vec(1..3 * MAX_BODY, 1..20),
        ) {
            let stream: Vec<u8> = bodies
                .iter()
                .flat_map(|body| {
                    let header = Header::control(Kind::Config, Handles::default(), body.len());
                    [&header.encode()[..], body].concat()
                })
                .collect();
            let (mut inbox, mut came, mut at) = (Inbox::default(), Vec::new(), 0);
            for size in sizes.iter().cycle() {
                let space = inbox.space();
                let count = space.len().min(*size).min(stream.len() - at);
                prop_assert!(!space.is_empty());
                space[..count].copy_from_slice(&stream[at..at + count]);
                inbox.filled(count);
                at += count;
                while let Some((header, body)) = inbox.frame().unwrap() {
                    prop_assert_eq!(header.length as usize, body.len());
                    came.push(body.to_vec());
                }
                if at == stream.len() {
                    break;
                }
            }
            prop_assert_eq!(came, bodies);
        }
    }
}
