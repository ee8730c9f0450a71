// SPDX-License-Identifier: Apache-2.0

//! The server of remote devices: devices of this host, for guests of others. The protocol is that of [`wire`].
//!
//! | module | says |
//! |---|---|
//! | [`config`] | what the control plane wants |
//! | [`control`] | how it says so |
//! | [`server`] | connections, and what they are for |
//! | [`session`] | a device of a guest, through all its connections |
//! | [`worker`], [`link`](::link) | a virtqueue's requests and answers |
//! | [`module`] | what is behind a device |
//! | [`block`], [`entropy`] | modules |
//!
//! # Memory
//!
//! A queue takes at most [`worker::MEMORY`] bytes, and remembers the answers of up to [`wire::MAX_IN_FLIGHT`] requests
//! that change something, a byte each for a disk. There are at most [`server::MAX_CONNECTIONS`] of them.
//!
//! # What is trusted
//!
//! The control plane. A client is believed only what its module allows it; what breaks the protocol ends its connection.

pub mod block;
pub mod config;
pub mod control;
pub mod entropy;
pub mod module;
pub mod server;
pub mod session;
pub mod worker;
