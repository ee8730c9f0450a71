// SPDX-License-Identifier: Apache-2.0

//! The control protocol: one JSON object per line, each answered by one.
//!
//! A connection may be closed and another opened at any time, and several may be open at once. A request is at most
//! 16 MiB long. What is not understood is answered with `"ok": false`; after a line that is too long the connection is
//! closed as well.
//!
//! ```text
//! → {"op": "ping"}
//! ← {"ok": true, "version": "0.1.0", "pid": 4711}
//!
//! → {"op": "apply", "ports": [PORT, …], "socket_fds": ["NAME", …]}
//! ← {"ok": true}
//!
//! → {"op": "stats"}
//! ← {"ok": true, "ports": {"NAME": {…}, …}, "pairs": [{"from": MAC, "to": MAC, …}, …]}
//!
//! ← {"ok": false, "error": "what is wrong, and with what"}
//! ```
//!
//! `apply` says what all ports should be ([`Wish`]): ports that are not named are closed. `socket_fds`, which may be
//! left out, names the ports whose listening sockets come along as `SCM_RIGHTS`, in that order; they may be spread over
//! the messages that make up the line. Other sockets are bound here.
//!
//! `stats` counts what took the short cut (`tx_…`, `rx_…` and `pairs`), and what was left to the kernel's switch, which
//! counts that itself (`slow_packets`, `from_tap_packets`). Times are nanoseconds of CLOCK_MONOTONIC.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::wish::Wish;

/// Bytes of the longest request.
pub const MAX_LINE: usize = 16 << 20;
const CHUNK: usize = 64 * 1024;
/// The kernel's `SCM_MAX_FD`.
const MAX_FILES: usize = 253;

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    Ping {},
    Stats {},
    Apply {
        ports: Vec<Wish>,
        #[serde(default)]
        socket_fds: Vec<String>,
    },
}

/// Lines from a socket, and the files that came with them.
struct Lines<'a> {
    stream: &'a UnixStream,
    bytes: Vec<u8>,
    /// How much of `bytes` has been searched for the end of the line.
    searched: usize,
    files: VecDeque<OwnedFd>,
}

impl<'a> Lines<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Lines { stream, bytes: Vec::new(), searched: 0, files: VecDeque::new() }
    }

    /// The next line, without its end; None at the end of the connection.
    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.bytes.split_off(self.searched + end + 1);
                let mut line = std::mem::replace(&mut self.bytes, rest);
                self.searched = 0;
                line.pop();
                return Ok(Some(line));
            }
            self.searched = self.bytes.len();
            if self.bytes.len() > MAX_LINE {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the line is too long"));
            }
            if self.receive()? == 0 {
                return Ok(None);
            }
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        let mut chunk = vec![0; CHUNK];
        let mut space = nix::cmsg_space!([RawFd; MAX_FILES]);
        let mut parts = [IoSliceMut::new(&mut chunk)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = loop {
            match recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut space), flags) {
                Err(nix::Error::EINTR) => {}
                result => break result?,
            }
        };
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(files) = control {
                // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
                self.files.extend(files.into_iter().map(|file| unsafe { OwnedFd::from_raw_fd(file) }));
            }
        }
        let count = message.bytes;
        self.bytes.extend_from_slice(&chunk[..count]);
        Ok(count)
    }
}

fn refusal(error: impl std::fmt::Display) -> Value {
    json!({"ok": false, "error": error.to_string()})
}

fn success(more: impl Serialize) -> Value {
    match serde_json::to_value(more) {
        Ok(Value::Object(mut answer)) => {
            answer.insert("ok".to_owned(), Value::Bool(true));
            Value::Object(answer)
        }
        Ok(_) => json!({"ok": true}),
        Err(error) => refusal(error),
    }
}

fn answer(daemon: &Daemon, line: &[u8], files: &mut VecDeque<OwnedFd>) -> Value {
    let request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => return refusal(error),
    };
    match request {
        Request::Ping {} => success(json!({"version": env!("CARGO_PKG_VERSION"), "pid": std::process::id()})),
        Request::Stats {} => match daemon.stats() {
            Ok(stats) => success(stats),
            Err(error) => refusal(error),
        },
        Request::Apply { ports, socket_fds } => {
            if socket_fds.len() > files.len() {
                return refusal(format!("{} sockets are named, but {} came along", socket_fds.len(), files.len()));
            }
            let count = socket_fds.len();
            let sockets: HashMap<String, OwnedFd> = socket_fds.into_iter().zip(files.drain(..count)).collect();
            if sockets.len() < count {
                return refusal("two sockets for one port");
            }
            match daemon.apply(ports, sockets) {
                Ok(()) => success(Value::Null),
                Err(error) => refusal(error),
            }
        }
    }
}

/// Serve one control connection until it ends.
pub fn serve(stream: &UnixStream, daemon: &Daemon) {
    let mut lines = Lines::new(stream);
    loop {
        let (answer, last) = match lines.next() {
            Ok(Some(line)) => (answer(daemon, &line, &mut lines.files), false),
            Ok(None) => return,
            Err(error) => (refusal(error), true),
        };
        // Files that came along unasked are closed, so that the next request does not get them.
        lines.files.clear();
        let mut text = answer.to_string();
        text.push('\n');
        let mut writer = stream;
        if let Err(error) = writer.write_all(text.as_bytes()) {
            tracing::debug!(%error, "a control connection has ended before its answer");
            return;
        }
        if last {
            return;
        }
    }
}
