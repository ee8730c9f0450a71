// SPDX-License-Identifier: Apache-2.0

//! What the control plane wants a device to be.

use std::collections::HashSet;
use std::path::PathBuf;

use serde::Deserialize;
use wire::{Device, is_name};

/// Virtqueues of a device, at most.
pub const MAX_QUEUES: u16 = 64;

/// What a guest takes it for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A disk.
    Block,
    /// A source of entropy.
    Entropy,
}

impl From<Kind> for Device {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Block => Device::Block,
            Kind::Entropy => Device::Entropy,
        }
    }
}

/// A device of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    /// Its name, by which it is known from one wish to the next.
    pub name: String,
    /// Where the VMM connects.
    pub socket: PathBuf,
    /// Mode of the socket.
    #[serde(default = "Wish::default_mode")]
    pub socket_mode: u32,
    /// User and group of the socket.
    #[serde(default)]
    pub socket_owner: Option<(u32, u32)>,
    /// What it is.
    pub kind: Kind,
    /// The host that we are on.
    pub client: String,
    /// Whose device it is.
    pub guest: String,
    /// Where the server that has it listens: address and port.
    pub address: String,
    /// The server's name.
    pub server: String,
    /// The module's name.
    pub module: String,
    /// Virtqueues that the guest may use.
    #[serde(default = "Wish::default_queues")]
    pub queues: u16,
}

impl Wish {
    fn default_mode() -> u32 {
        0o660
    }

    fn default_queues() -> u16 {
        1
    }

    /// Find what makes no sense.
    ///
    /// # Errors
    ///
    /// What it is.
    pub fn check(all: &[Wish]) -> Result<(), String> {
        let mut seen = HashSet::new();
        for wish in all {
            for name in [&wish.name, &wish.client, &wish.guest, &wish.server, &wish.module] {
                if !is_name(name) {
                    return Err(format!("no name: {name:?}"));
                }
            }
            if !(1..=MAX_QUEUES).contains(&wish.queues) {
                return Err(format!("device {}: {} queues", wish.name, wish.queues));
            }
            if !seen.insert(&wish.name) {
                return Err(format!("device {} is there twice", wish.name));
            }
        }
        Ok(())
    }
}
