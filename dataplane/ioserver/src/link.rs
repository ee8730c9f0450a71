// SPDX-License-Identifier: Apache-2.0

//! A queue connection: frames out of the bytes of a socket that never blocks, and answers into it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;

use wire::{Header, Inbox, Malformed, Outbox};

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer has closed it.
    #[error("closed by the peer")]
    Closed,
    /// The kernel says so.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer broke the protocol.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// See the module's documentation.
pub struct Link {
    stream: TcpStream,
    inbox: Inbox,
    outbox: Outbox<Vec<u8>>,
}

impl Link {
    /// Of a socket that does not block.
    pub fn new(stream: TcpStream) -> Self {
        Link { stream, inbox: Inbox::default(), outbox: Outbox::default() }
    }

    /// The socket.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Take what has come; false if nothing has, or there is no space for it before frames are taken.
    ///
    /// # Errors
    ///
    /// The connection has ended.
    pub fn receive(&mut self) -> Result<bool, LinkError> {
        let space = self.inbox.space();
        if space.is_empty() {
            return Ok(false);
        }
        match (&self.stream).read(space) {
            Ok(0) => Err(LinkError::Closed),
            Ok(count) => {
                self.inbox.filled(count);
                Ok(true)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The next whole frame of what has come.
    ///
    /// # Errors
    ///
    /// It is none.
    pub fn frame(&mut self) -> Result<Option<(Header, &[u8])>, LinkError> {
        Ok(self.inbox.frame()?)
    }

    /// Have an answer sent.
    pub fn send(&mut self, header: Header, body: Vec<u8>) {
        self.outbox.push(header, body);
    }

    /// Bytes that wait to be sent.
    pub fn unsent(&self) -> usize {
        self.outbox.unsent()
    }

    /// Send as much as the socket takes; true if it took something.
    ///
    /// # Errors
    ///
    /// The connection has ended.
    pub fn flush(&mut self) -> Result<bool, LinkError> {
        let mut any = false;
        while !self.outbox.is_empty() {
            match (&self.stream).write_vectored(&self.outbox.parts()) {
                Ok(count) => {
                    any = true;
                    self.outbox.sent(count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(any)
    }
}
