// SPDX-License-Identifier: Apache-2.0

//! What the control plane wants a server to have.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;
use wire::is_name;

use crate::block::{self, Block};
use crate::entropy::Entropy;
use crate::module::Shared;

/// A guest of a client host that may use a module.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// The client host.
    pub client: String,
    /// The guest.
    pub guest: String,
}

/// A module and who may use it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleWish {
    /// By which guests ask for it.
    pub name: String,
    /// Who may use it.
    pub guests: Vec<Guest>,
    /// What it is.
    pub what: What,
}

/// What a module is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum What {
    /// See [`crate::block`].
    Block {
        /// The file or block device.
        path: PathBuf,
        /// Guests may only read.
        #[serde(default)]
        read_only: bool,
        /// What guests see as its serial number.
        #[serde(default)]
        serial: String,
    },
    /// See [`crate::entropy`].
    Entropy {},
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    /// The server's own name.
    pub name: String,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// What it has.
    #[serde(default)]
    pub modules: Vec<ModuleWish>,
}

impl What {
    /// Make the module.
    ///
    /// # Errors
    ///
    /// Why it cannot be had.
    pub fn open(&self) -> Result<Shared, String> {
        Ok(match self {
            What::Block { path, read_only, serial } => {
                let settings = block::Settings { path: path.clone(), read_only: *read_only, serial: serial.clone() };
                let opened = Block::open(&settings);
                std::sync::Arc::new(opened.map_err(|error| format!("{}: {error}", path.display()))?)
            }
            What::Entropy {} => std::sync::Arc::new(Entropy),
        })
    }
}

impl Wish {
    /// Find what makes no sense.
    ///
    /// # Errors
    ///
    /// What it is.
    pub fn check(&self) -> Result<(), String> {
        let mut seen = HashSet::new();
        let guests = self.modules.iter().flat_map(|module| &module.guests);
        let names = guests.flat_map(|guest| [&guest.client, &guest.guest]);
        for name in names.chain(self.modules.iter().map(|module| &module.name)).chain([&self.name]) {
            if !is_name(name) {
                return Err(format!("no name: {name:?}"));
            }
        }
        match self.modules.iter().find(|module| !seen.insert(&module.name)) {
            Some(twice) => Err(format!("module {} is there twice", twice.name)),
            None => Ok(()),
        }
    }
}
