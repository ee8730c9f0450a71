// SPDX-License-Identifier: Apache-2.0

//! What the control plane can ask, in the form of [`control`](::control):
//!
//! ```text
//! → {"op": "apply", "devices": [WISH, …]}
//! ← {"ok": true}
//! → {"op": "stats"}
//! ← {"ok": true, "devices": {"NAME": {…}, …}}
//! ```
//!
//! `apply` says what all devices should be ([`Wish`]): those that are not named are closed.

use ::control::Answers;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::wish::Wish;

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    Stats {},
    Apply { devices: Vec<Wish> },
}

/// Answers for a daemon.
pub struct ForControl(pub Daemon);

impl Answers for ForControl {
    fn answer(&self, question: Value) -> Result<Value, String> {
        let request: Request = serde_json::from_value(question).map_err(|error| error.to_string())?;
        Ok(match request {
            Request::Stats {} => self.0.stats(),
            Request::Apply { devices } => {
                self.0.apply(devices)?;
                json!({})
            }
        })
    }
}
