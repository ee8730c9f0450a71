// SPDX-License-Identifier: Apache-2.0

//! What the control plane can ask, in the form of [`control`](::control):
//!
//! ```text
//! → {"op": "apply", "wish": WISH}
//! ← {"ok": true, "address": "192.0.2.1:7700"}
//! → {"op": "resize", "module": "data", "size": 1073741824}
//! ← {"ok": true}
//! → {"op": "stats"}
//! ← {"ok": true, "name": …, "modules": […], "sessions": […], "connections": 5}
//! ```
//!
//! `apply` says all of what the server should have ([`Wish`]).

use std::sync::Arc;

use ::control::Answers;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::Wish;
use crate::server::Server;

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    Stats {},
    Apply { wish: Wish },
    Resize { module: String, size: u64 },
}

/// Answers for a server.
pub struct ForControl(pub Arc<Server>);

impl Answers for ForControl {
    fn answer(&self, question: Value) -> Result<Value, String> {
        let request: Request = serde_json::from_value(question).map_err(|error| error.to_string())?;
        Ok(match request {
            Request::Stats {} => self.0.stats(),
            Request::Apply { wish } => {
                self.0.apply(wish)?;
                json!({"address": self.0.address().map(|address| address.to_string())})
            }
            Request::Resize { module, size } => {
                self.0.resize(&module, size)?;
                json!({})
            }
        })
    }
}
