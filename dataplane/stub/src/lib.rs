// SPDX-License-Identifier: Apache-2.0

//! The client of remote devices: to a VMM a vhost-user back end, to a server one that asks. The protocol between the
//! two is that of [`wire`].
//!
//! ```text
//!     guest            this process                          server
//!   ┌────────┐  vhost-user   ┌───────────┐  control        ┌────────┐
//!   │ driver │◄──── VMM ────►│ session   │  ┌────────────► │        │
//!   │        │               │ remote ───┼──┘              │ module │
//!   │ rings ◄┼───────────────┼► queue 0 ─┼───────────────► │        │
//!   │       ◄┼───────────────┼► queue 1 ─┼───────────────► │        │
//!   └────────┘               └───────────┘  one each       └────────┘
//! ```
//!
//! | module | says |
//! |---|---|
//! | [`wish`], [`control`] | what the control plane wants, and how it says so |
//! | [`daemon`] | how a wish becomes devices |
//! | [`session`] | vhost-user |
//! | [`queue`] | the way of a request |
//! | [`remote`] | the way to the server |
//!
//! # What is lost when something dies
//!
//! Nothing. The server: requests without an answer are sent again. This process: the VMM connects again and has kept
//! which requests are in flight. The VMM: its guest is gone, and with it who would have asked.

pub mod control;
pub mod daemon;
pub mod queue;
pub mod remote;
pub mod session;
pub mod wish;
