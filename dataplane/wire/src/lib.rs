// SPDX-License-Identifier: Apache-2.0

//! The protocol of remote devices: what a *client*, on the host of a guest, and a *server*, on the host of a device, say
//! to each other. Nothing here touches a socket: these are the bytes, and what of them is refused.
//!
//! # Words
//!
//! | word | is |
//! |---|---|
//! | client host, guest | who has the virtqueues; both have names |
//! | server, module | who has the device: a host, and one of many things on it that act as a virtio device |
//! | session | one device of one guest, as long as the client keeps it: through reconnections, and restarts of either |
//! | epoch | counts the session's connections; the server obeys the highest that it has seen, and fences the others |
//! | tag | number of a request, unique in its queue for the life of the session, rising |
//!
//! # Connections
//!
//! A session has one *control connection*, and one *queue connection* per virtqueue, so that no queue waits for another.
//! All go from client to server, over TCP, with TLS 1.3 where the lab says so. All numbers are little-endian.
//!
//! Each begins with a [`Greeting`] of both sides (16 bytes), the client first:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `ORCWIRE\n` |
//! | 8 | 2 | oldest version that the sender knows |
//! | 10 | 2 | newest version that it knows; in the server's answer both are the one that is chosen |
//! | 12 | 4 | zero |
//!
//! The server chooses the highest version that both know, and ends the connection, after its own range as the answer,
//! if there is none. A program knows its own version and the one before: hosts of a lab may be raised one by one.
//!
//! Then both send *frames*: a [`Header`] of 48 bytes, and a body of at most [`MAX_BODY`] bytes.
//!
//! | offset | bytes | field | meaning |
//! |---|---|---|---|
//! | 0 | 4 | `length` | bytes of the body |
//! | 4 | 1 | `kind` | [`Kind`] |
//! | 5 | 1 | `flags` | bit 0: more of this message follows, in a frame with the same tag |
//! | 6 | 2 | `queue` | number of the virtqueue; 65535 on control connections |
//! | 8 | 8 | `tag` | of the request; on control connections 0 |
//! | 16 | 4 | `client` | handle of the client host |
//! | 20 | 4 | `guest` | handle of the guest |
//! | 24 | 4 | `server` | handle of the server |
//! | 28 | 4 | `module` | handle of the module |
//! | 32 | 4 | `total` | request: bytes that the driver has given; answer: bytes that the device has written |
//! | 36 | 4 | `room` | request: bytes that the device may write; answer: a [`Code`] |
//! | 40 | 8 | `settled` | request: all tags below this have been answered, and the answers have arrived |
//!
//! Handles stand for names. The server gives them when it accepts the session ([`Attached`]), and each frame after that
//! has all four, so that whoever relays or dispatches a frame needs nothing but the frame. A frame with other handles than
//! its session's ends the connection.
//!
//! # Life of a session
//!
//! ```text
//!  client                                                          server
//!    │ control:  Attach(names, session, epoch, device) ──────────────► │  knows the module? may the guest use it?
//!    │ ◄───────── Attached(handles, features, config) or Refused, ──── │
//!    │                                            or Redirect(address) │
//!    │ control:  Features(what the driver took) ─────────────────────► │
//!    │ queue n:  Open(session, epoch, n) ────────────────────────────► │  epoch not below the highest?
//!    │ ◄──────── Opened ────────────────────────────────────────────── │
//!    │ queue n:  Request(tag, bytes of the driver) ──────────────────► │
//!    │ ◄──────── Answer(tag, code, bytes of the device) ────────────── │  in any order
//!    │ ◄──────── control: Config(new configuration) ────────────────── │  at any time: an interrupt
//!    │ control:  Ping ─────────────────────────────────────────────► │
//!    │ ◄──────── Pong ────────────────────────────────────────────── │
//!    │ control:  Detach ─────────────────────────────────────────────► │  the session is forgotten
//! ```
//!
//! ```text
//!            Attach                     a connection is lost
//!   (none) ─────────► attached ──────────────────────────────► waiting
//!     ▲                  │  ▲                                     │ Attach, same session, epoch + 1
//!     └── Detach ────────┘  └─────────────────────────────────────┘
//! ```
//!
//! When any of its connections is lost the client closes the others, raises the epoch, attaches again, opens its queues
//! again and sends every request again that has no answer, with its old tag. The server remembers the answers of
//! requests that change something until they are `settled`, and gives them again instead of doing a thing twice.
//!
//! # Fragments
//!
//! A message longer than [`MAX_BODY`] is sent in several frames, all with the same header but for `length` and `flags`.
//! Frames of other messages may come between them: a request of a megabyte holds up a small one no longer than one frame
//! takes. An [`Assembler`] puts them together, and never holds more than it was told to.
//!
//! # Limits
//!
//! | what | at most |
//! |---|---|
//! | body of a frame | [`MAX_BODY`] bytes |
//! | request or answer | [`MAX_MESSAGE`] bytes |
//! | requests in flight on a queue | [`MAX_IN_FLIGHT`] |
//! | name | [`MAX_NAME`] bytes of UTF-8 |
//! | device configuration | [`MAX_CONFIG`] bytes |
//!
//! Whoever breaks one of them has his connection ended. Lengths are checked before memory is taken.

mod assembler;
mod bytes;
mod control;
mod frame;
mod greeting;
mod inbox;
mod numbered;
mod outbox;

pub use assembler::{Assembler, Message};
pub use bytes::Malformed;
pub use control::{Attach, Attached, Control, Device, Handles, Names, Open, Refused, SessionId, is_name};
pub use frame::{CONTROL_QUEUE, Code, Header, Kind, MORE};
pub use greeting::{Greeting, NEWEST, OLDEST, choose};
pub use inbox::Inbox;
pub use outbox::{Body, Outbox};

/// Bytes of a frame's body, at most.
pub const MAX_BODY: usize = 64 * 1024;
/// Bytes of a request or an answer, at most: what a queue of 1024 descriptors of 4 KiB can give.
pub const MAX_MESSAGE: usize = 4 * 1024 * 1024 + MAX_BODY;
/// Requests without an answer on one queue, at most.
pub const MAX_IN_FLIGHT: usize = 1024;
/// Bytes of a name, at most.
pub const MAX_NAME: usize = 255;
/// Bytes of a device's configuration, at most.
pub const MAX_CONFIG: usize = 4096;
