// SPDX-License-Identifier: Apache-2.0

//! What of vhost-user is the same for every back end, and requests that are taken before the `vhost` crate sees them.
//!
//! QEMU 7.2 enables the rings before it says which features the guest has negotiated, and not again afterwards. The
//! crate insists on the order of the specification, so that request is taken from the socket until the features are known.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, recv};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::vhost_user::{BackendReqHandler, Error, Result, VhostUserBackendReqHandlerMut};

use crate::memory::Region;

/// Bytes of a message's header: request, flags and size of the rest, 32 bits each.
pub const HEADER: usize = 12;
/// The version, as flags have it.
pub const VERSION: u32 = 1;
const SET_VRING_ENABLE: u32 = 18;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A request that was understood and cannot be fulfilled.
pub fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

/// A request that makes no sense for the device.
///
/// # Errors
///
/// Always.
pub fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

/// A part of the guest's memory.
pub fn region(region: &VhostUserMemoryRegion) -> Region {
    Region {
        guest: region.guest_phys_addr,
        size: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

/// Make a file of events one that nobody has to wait for.
///
/// # Errors
///
/// It cannot be.
pub fn event_file(file: Option<File>) -> Result<Option<OwnedFd>> {
    let Some(file) = file else { return Ok(None) };
    let nonblocking = || {
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))
    };
    nonblocking().map_err(refused)?;
    Ok(Some(file.into()))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The header of a request.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Its number.
    pub request: u32,
    /// Bytes of the rest.
    pub size: u32,
    flags: u32,
}

impl Head {
    /// That of the next request, which is not taken. None: the socket has ended, or less has come.
    ///
    /// # Errors
    ///
    /// The socket fails.
    pub fn peek(stream: &UnixStream) -> io::Result<Option<Self>> {
        let mut head = [0; HEADER];
        let seen = recv(stream.as_raw_fd(), &mut head, MsgFlags::MSG_PEEK)?;
        let head = Head { request: word(&head, 0), flags: word(&head, 4), size: word(&head, 8) };
        Ok((seen == HEADER).then_some(head))
    }

    /// It is to enable a ring, or to disable it.
    pub fn is_enable(&self) -> bool {
        (self.request, self.size) == (SET_VRING_ENABLE, 8)
    }

    /// Take such a request, and do it.
    ///
    /// # Errors
    ///
    /// The socket fails.
    pub fn enable(
        &self,
        stream: &mut UnixStream,
        name: &str,
        enable: impl FnOnce(u32, bool) -> Result<()>,
    ) -> io::Result<()> {
        let mut message = [0; HEADER + 8];
        stream.read_exact(&mut message)?;
        let result = enable(word(&message, HEADER), word(&message, HEADER + 4) == 1);
        if let Err(error) = &result {
            tracing::warn!(device = name, %error, "request refused");
        }
        self.reply(stream, result.is_err())
    }

    /// Answer a request that has been taken, if it wants that.
    ///
    /// # Errors
    ///
    /// The socket fails.
    pub fn reply(&self, stream: &mut UnixStream, failed: bool) -> io::Result<()> {
        if self.flags & NEED_REPLY == 0 {
            return Ok(());
        }
        let words = [self.request, VERSION | REPLY, 8, u32::from(failed), 0];
        stream.write_all(&words.map(u32::to_ne_bytes).concat())
    }
}

/// Handle one request; false if no other can follow.
pub fn handle<S: VhostUserBackendReqHandlerMut>(handler: &mut BackendReqHandler<Mutex<S>>, name: &str) -> bool {
    match handler.handle_request() {
        Ok(()) => true,
        // The request was understood, and the VMM is told so if it has asked.
        Err(
            error @ (Error::ReqHandlerError(_)
            | Error::InvalidOperation(_)
            | Error::FeatureMismatch
            | Error::InactiveFeature(_)),
        ) => {
            tracing::warn!(device = name, %error, "request refused");
            true
        }
        Err(Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage) => false,
        Err(error) => {
            tracing::warn!(device = name, %error, "connection given up");
            false
        }
    }
}
