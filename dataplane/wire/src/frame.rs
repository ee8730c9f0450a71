// SPDX-License-Identifier: Apache-2.0

//! Frames: the header that each begins with.

use crate::bytes::Malformed;
use crate::control::Handles;
use crate::numbered::numbered;
use crate::{MAX_BODY, MAX_MESSAGE};

/// Flag: more of the message follows in another frame.
pub const MORE: u8 = 1;
/// The queue number of control connections.
pub const CONTROL_QUEUE: u16 = u16::MAX;

numbered! {
    /// What a frame is.
    Kind: u8, Malformed::Kind, {
        /// Control, to the server: [`Attach`](crate::Attach).
        Attach = 1,
        /// Control, to the client: [`Attached`](crate::Attached).
        Attached = 2,
        /// Either connection, to the client: [`Refused`](crate::Refused). The connection ends with it.
        Refused = 3,
        /// Control, to the client: the address to attach at instead.
        Redirect = 4,
        /// Control, to the server: the features that the driver has taken, 8 bytes.
        Features = 5,
        /// Control, to the client: the device's configuration has changed; the guest is interrupted. The body is all
        /// of it.
        Config = 6,
        /// Control, to the server: the driver writes its configuration: 4 bytes of offset, then what it writes.
        WriteConfig = 7,
        /// Control, to the server: the session ends.
        Detach = 8,
        /// Either side, either connection: is anybody there?
        Ping = 9,
        /// The answer to that.
        Pong = 10,
        /// Queue, to the server: [`Open`](crate::Open).
        Open = 16,
        /// Queue, to the client: it is open.
        Opened = 17,
        /// Queue, to the server: what the driver has put into one chain of descriptors.
        Request = 18,
        /// Queue, to the client: what the device puts into it.
        Answer = 19,
    }
}

numbered! {
    /// How a request went, and why something is refused.
    Code: u32, |_| Malformed::Value("code"), {
        /// It is done. What the device thinks of it is in the bytes that it has written.
        Done = 0,
        /// The module could not do it, and said nothing to the driver.
        Failed = 1,
        /// There is no module of that name, and no server that is known to have one.
        NoModule = 2,
        /// The guest may not use the module, or the client host is not who it says.
        NotAllowed = 3,
        /// The module is in use by others, and cannot be shared.
        Busy = 4,
        /// A server that relays got its own request back, or it went through too many.
        Loop = 5,
        /// A later connection of the session has been seen.
        Fenced = 6,
        /// There is no such session: attach again.
        NoSession = 7,
        /// The device is of another kind than the client thinks.
        OtherDevice = 8,
        /// The server has no room for more.
        Full = 9,
        /// The server that has the module does not answer.
        Unreachable = 10,
        /// The peer broke the protocol.
        Malformed = 11,
    }
}

/// What each frame begins with; see the crate's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the body.
    pub length: u32,
    /// What it is.
    pub kind: Kind,
    /// [`MORE`], or nothing.
    pub flags: u8,
    /// Number of the virtqueue.
    pub queue: u16,
    /// Number of the request.
    pub tag: u64,
    /// Who talks to whom.
    pub handles: Handles,
    /// Bytes of the whole message.
    pub total: u32,
    /// Bytes that the device may write; of an answer its [`Code`].
    pub room: u32,
    /// All tags below have been answered.
    pub settled: u64,
}

impl Header {
    /// Bytes of it.
    pub const SIZE: usize = 48;

    /// Of a control frame with a body of that length.
    pub fn control(kind: Kind, handles: Handles, length: usize) -> Self {
        let length = length as u32;
        Header { length, kind, flags: 0, queue: CONTROL_QUEUE, tag: 0, handles, total: length, room: 0, settled: 0 }
    }

    /// As it is sent.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0..4].copy_from_slice(&self.length.to_le_bytes());
        bytes[4] = self.kind as u8;
        bytes[5] = self.flags;
        bytes[6..8].copy_from_slice(&self.queue.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.tag.to_le_bytes());
        for (nth, handle) in self.handles.to_array().into_iter().enumerate() {
            bytes[16 + 4 * nth..20 + 4 * nth].copy_from_slice(&handle.to_le_bytes());
        }
        bytes[32..36].copy_from_slice(&self.total.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.room.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.settled.to_le_bytes());
        bytes
    }

    /// As it has come.
    ///
    /// # Errors
    ///
    /// Kinds and flags that are not known, and lengths above the limits.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let header = Header {
            length: word(0),
            kind: bytes[4].try_into()?,
            flags: bytes[5],
            queue: u16::from_le_bytes([bytes[6], bytes[7]]),
            tag: long(8),
            handles: Handles { client: word(16), guest: word(20), server: word(24), module: word(28) },
            total: word(32),
            room: word(36),
            settled: long(40),
        };
        if header.flags & !MORE != 0 {
            return Err(Malformed::Flags(header.flags));
        }
        let request = header.kind == Kind::Request;
        for (what, length, limit) in [
            ("a frame", header.length, MAX_BODY),
            ("a message", header.total, MAX_MESSAGE),
            ("room for an answer", if request { header.room } else { 0 }, MAX_MESSAGE),
        ] {
            if length as usize > limit {
                return Err(Malformed::Length { what, length: length.into(), limit });
            }
        }
        if header.length > header.total {
            return Err(Malformed::Fragment(header.tag));
        }
        Ok(header)
    }

    /// Of an answer: how it went.
    ///
    /// # Errors
    ///
    /// There is no such code.
    pub fn code(&self) -> Result<Code, Malformed> {
        self.room.try_into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_comes_is_refused_or_is_what_was_sent(bytes in prop::array::uniform(any::<u8>())) {
            let bytes: [u8; Header::SIZE] = bytes;
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
                prop_assert!(header.length as usize <= MAX_BODY);
            }
        }

        #[test]
        fn what_is_sent_is_what_comes(
            kind in prop::sample::select(vec![1_u8, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 17, 18, 19]),
            length in 0..=MAX_BODY as u32,
            more in any::<bool>(),
            (queue, tag, settled) in any::<(u16, u64, u64)>(),
            (client, guest, server, module) in any::<(u32, u32, u32, u32)>(),
        ) {
            let header = Header {
                length,
                kind: kind.try_into().unwrap(),
                flags: u8::from(more),
                queue,
                tag,
                handles: Handles { client, guest, server, module },
                total: length,
                room: 4096,
                settled,
            };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    fn request() -> Header {
        Header { kind: Kind::Request, queue: 0, ..Header::control(Kind::Request, Handles::default(), 16) }
    }

    #[test]
    fn lengths_above_the_limits_are_refused() {
        let long = [
            Header { length: MAX_BODY as u32 + 1, total: MAX_BODY as u32 + 1, ..request() },
            Header { total: MAX_MESSAGE as u32 + 1, ..request() },
            Header { room: u32::MAX, ..request() },
        ];
        for header in long {
            assert!(matches!(Header::decode(&header.encode()), Err(Malformed::Length { .. })), "{header:?}");
        }
        let short = Header { total: 15, ..request() };
        assert_eq!(Header::decode(&short.encode()), Err(Malformed::Fragment(0)));
    }

    #[test]
    fn unknown_kinds_and_flags_are_refused() {
        let mut bytes = request().encode();
        bytes[5] = 2;
        assert_eq!(Header::decode(&bytes), Err(Malformed::Flags(2)));
        bytes[4] = 99;
        assert_eq!(Header::decode(&bytes), Err(Malformed::Kind(99)));
    }

    #[test]
    fn codes_have_their_numbers() {
        for number in 0..12 {
            assert_eq!(Code::try_from(number).map(|code| code as u32), Ok(number));
        }
        assert_eq!(Code::try_from(12), Err(Malformed::Value("code")));
    }
}
