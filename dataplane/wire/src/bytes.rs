// SPDX-License-Identifier: Apache-2.0

//! Reading and writing the fields of a body.

use crate::MAX_NAME;

/// Why bytes are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The greeting is of something else.
    #[error("the peer does not speak this protocol")]
    Greeting,
    /// No version that both know.
    #[error("the peer knows versions {oldest} to {newest}, and none of ours")]
    Version {
        /// The oldest that the peer knows.
        oldest: u16,
        /// The newest that the peer knows.
        newest: u16,
    },
    /// A kind of frame that this version does not know, or not on this connection.
    #[error("a frame of kind {0}")]
    Kind(u8),
    /// Flags that this version does not know.
    #[error("a frame with flags {0:#x}")]
    Flags(u8),
    /// A frame, message, name or configuration that is too long.
    #[error("{what} of {length} bytes; {limit} is the most")]
    Length {
        /// What it is.
        what: &'static str,
        /// Its length.
        length: u64,
        /// The limit.
        limit: usize,
    },
    /// A body that ends too early.
    #[error("a body that ends within its {0}")]
    Short(&'static str),
    /// A body that goes on after its end.
    #[error("a body with {0} bytes too many")]
    Long(usize),
    /// A name that is no UTF-8, empty, or has control characters.
    #[error("a name that is none")]
    Name,
    /// A fragment that is of no message that has begun, or contradicts it.
    #[error("a fragment of request {0} that does not fit the others")]
    Fragment(u64),
    /// More at once than there may be.
    #[error("more than {0} requests at once")]
    InFlight(usize),
    /// A number that means nothing here.
    #[error("a {0} that there is not")]
    Value(&'static str),
}

/// Takes fields from the front of a body.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Self {
        Reader(body)
    }

    pub(crate) fn bytes(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let (front, rest) = self.0.split_at_checked(count).ok_or(Malformed::Short(what))?;
        self.0 = rest;
        Ok(front)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        let (front, rest) = self.0.split_first_chunk().ok_or(Malformed::Short(what))?;
        self.0 = rest;
        Ok(*front)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        Ok(self.array::<1>(what)?[0])
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, Malformed> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A name, with its length before it.
    pub(crate) fn name(&mut self, what: &'static str) -> Result<String, Malformed> {
        let length = self.u8(what)?;
        let name = std::str::from_utf8(self.bytes(length.into(), what)?).map_err(|_| Malformed::Name)?;
        if name.is_empty() || name.chars().any(char::is_control) { Err(Malformed::Name) } else { Ok(name.to_owned()) }
    }

    /// Bytes, with their number before them.
    pub(crate) fn block(&mut self, limit: usize, what: &'static str) -> Result<Vec<u8>, Malformed> {
        let length = self.u32(what)?;
        if length as usize > limit {
            return Err(Malformed::Length { what, length: length.into(), limit });
        }
        self.bytes(length as usize, what).map(<[u8]>::to_vec)
    }

    /// All that is left.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::Long(self.0.len())) }
    }
}

/// Adds a name, with its length before it.
///
/// # Panics
///
/// It is longer than [`MAX_NAME`]: whoever makes names checks them.
pub(crate) fn put_name(body: &mut Vec<u8>, name: &str) {
    assert!(name.len() <= MAX_NAME, "a name of {} bytes", name.len());
    body.push(name.len() as u8);
    body.extend_from_slice(name.as_bytes());
}

/// Adds bytes, with their number before them.
pub(crate) fn put_block(body: &mut Vec<u8>, bytes: &[u8]) {
    body.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    body.extend_from_slice(bytes);
}
