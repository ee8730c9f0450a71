// SPDX-License-Identifier: Apache-2.0

//! A guest's memory and the device's side of its virtqueues, for vhost-user back ends.
//!
//! | module | says |
//! |---|---|
//! | [`memory`] | what of a guest's memory is where here |
//! | [`ring`] | a split virtqueue |
//! | [`inflight`] | what a device has taken from its queues and not used yet, through its death |
//! | [`socket`], [`vmm`] | where VMMs connect, and what they say to every back end |
//! | [`fault`] | memory that is taken away while we look at it |
//! | [`sandbox`] | what a back end gives up once it has started |

pub mod fault;
pub mod inflight;
pub mod memory;
pub mod ring;
pub mod sandbox;
pub mod socket;
pub mod vmm;
