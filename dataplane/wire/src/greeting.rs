// SPDX-License-Identifier: Apache-2.0

//! The first 16 bytes of each side.

use std::ops::RangeInclusive;

use crate::bytes::Malformed;

const MAGIC: [u8; 8] = *b"ORCWIRE\n";
/// The oldest version that this program knows.
pub const OLDEST: u16 = 1;
/// The newest version that this program knows.
pub const NEWEST: u16 = 1;

/// The versions that one side knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The oldest.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
}

impl Greeting {
    /// Bytes of it.
    pub const SIZE: usize = 16;
    /// Ours.
    pub const OURS: Greeting = Greeting { oldest: OLDEST, newest: NEWEST };

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.oldest.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.newest.to_le_bytes());
        bytes
    }

    /// As it has come.
    ///
    /// # Errors
    ///
    /// It is none.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let [oldest, newest] = [8, 10].map(|at| u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        if bytes[..8] != MAGIC || oldest > newest || oldest == 0 {
            return Err(Malformed::Greeting);
        }
        Ok(Greeting { oldest, newest })
    }
}

/// The version to speak with a peer.
///
/// # Errors
///
/// None that both know.
pub fn choose(ours: &RangeInclusive<u16>, peer: Greeting) -> Result<u16, Malformed> {
    let newest = peer.newest.min(*ours.end());
    if newest >= peer.oldest.max(*ours.start()) {
        Ok(newest)
    } else {
        Err(Malformed::Version { oldest: peer.oldest, newest: peer.newest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn highest_version_that_both_know_is_chosen() {
        let peer = |oldest, newest| Greeting { oldest, newest };

        assert_eq!(choose(&(1..=2), peer(2, 3)), Ok(2));
        assert_eq!(choose(&(1..=2), peer(1, 1)), Ok(1));
        assert_eq!(choose(&(2..=3), peer(1, 9)), Ok(3));
        assert_eq!(choose(&(2..=3), peer(4, 5)), Err(Malformed::Version { oldest: 4, newest: 5 }));
        assert_eq!(choose(&(2..=3), peer(1, 1)), Err(Malformed::Version { oldest: 1, newest: 1 }));
    }

    #[test]
    fn what_is_sent_is_what_comes() {
        assert_eq!(Greeting::decode(&Greeting::OURS.encode()), Ok(Greeting::OURS));
    }

    #[test]
    fn something_else_is_no_greeting() {
        assert_eq!(Greeting::decode(b"GET / HTTP/1.1\r\n"), Err(Malformed::Greeting));
        assert_eq!(Greeting::decode(&Greeting { oldest: 3, newest: 2 }.encode()), Err(Malformed::Greeting));
        assert_eq!(Greeting::decode(&Greeting { oldest: 0, newest: 2 }.encode()), Err(Malformed::Greeting));
    }
}
