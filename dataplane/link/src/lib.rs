// SPDX-License-Identifier: Apache-2.0

//! Connections that speak the protocol of [`wire`]: of queues, whose sockets never block, and of control.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;

use wire::{Body, CONTROL_QUEUE, Control, Header, Inbox, Malformed, Outbox};

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

/// A queue connection: frames out of what comes, and messages into it.
pub struct Link<B> {
    stream: TcpStream,
    inbox: Inbox,
    outbox: Outbox<B>,
}

impl<B: Body> Link<B> {
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

    /// Have a message sent.
    pub fn send(&mut self, header: Header, body: B) {
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
            match self.outbox.send(|parts| (&self.stream).write_vectored(parts)) {
                Ok(_) => any = true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(any)
    }
}

/// Fill `into` from a socket that blocks.
///
/// # Errors
///
/// The connection has ended.
pub fn read_exact(stream: &mut TcpStream, into: &mut [u8]) -> Result<(), LinkError> {
    match stream.read_exact(into) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(LinkError::Closed),
        other => Ok(other?),
    }
}

/// A whole control frame of a socket that blocks.
///
/// # Errors
///
/// The connection has ended, or this is none.
pub fn read_control(stream: &mut TcpStream) -> Result<(Header, Control), LinkError> {
    let mut head = [0; Header::SIZE];
    read_exact(stream, &mut head)?;
    let header = Header::decode(&head)?;
    if header.flags != 0 || header.queue != CONTROL_QUEUE {
        return Err(Malformed::Kind(header.kind as u8).into());
    }
    let mut body = vec![0; header.length as usize];
    read_exact(stream, &mut body)?;
    Ok((header, Control::decode(header.kind, &body)?))
}
