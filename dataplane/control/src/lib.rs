// SPDX-License-Identifier: Apache-2.0

//! What daemons have in common: how they begin, and the socket by which the control plane talks to them. That takes one
//! JSON object per line, and answers each by one.
//!
//! ```text
//! → {"op": "ping"}
//! ← {"ok": true, "version": "0.1.0", "pid": 4711}
//! → {"op": …, …}
//! ← {"ok": true, …}
//! ← {"ok": false, "error": "what is wrong, and with what"}
//! ```
//!
//! What is not understood is answered with `"ok": false`. After a line of more than [`MAX_LINE`] bytes the connection is
//! closed as well. A connection may ask as often as it likes, and several may be open at once.

use std::error::Error;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::{Value, json};

/// Bytes of the longest question.
pub const MAX_LINE: u64 = 1 << 20;

/// Do what a daemon does, with its log on stderr; what its process ends with.
pub fn run(level: tracing::Level, daemon: impl FnOnce() -> Result<(), Box<dyn Error>>) -> ExitCode {
    tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr).with_ansi(false).with_target(false).init();
    match daemon() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "cannot go on");
            ExitCode::FAILURE
        }
    }
}

/// Gives the answer to a question other than `ping`: an object, or what is wrong.
pub trait Answers: Send + Sync {
    /// See the trait.
    ///
    /// # Errors
    ///
    /// What is wrong.
    fn answer(&self, question: Value) -> Result<Value, String>;
}

fn answer(answers: &dyn Answers, line: &[u8]) -> Result<Value, String> {
    let question: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if question == json!({"op": "ping"}) {
        return Ok(json!({"version": env!("CARGO_PKG_VERSION"), "pid": std::process::id()}));
    }
    answers.answer(question)
}

fn converse(answers: &dyn Answers, stream: &UnixStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        reader.by_ref().take(MAX_LINE + 1).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let whole = line.ends_with(b"\n");
        let said = if whole { answer(answers, &line) } else { Err("a line that does not end".to_owned()) };
        let mut told = said.unwrap_or_else(|error| json!({"ok": false, "error": error}));
        if told.get("ok").is_none() {
            told["ok"] = true.into();
        }
        (&mut &*stream).write_all(format!("{told}\n").as_bytes())?;
        if !whole {
            return Ok(());
        }
    }
}

/// Answer until the socket fails.
///
/// # Errors
///
/// The socket fails.
pub fn serve(answers: &Arc<dyn Answers>, listener: &UnixListener) -> io::Result<()> {
    for stream in listener.incoming() {
        let (stream, answers) = (stream?, Arc::clone(answers));
        std::thread::Builder::new().name("control".to_owned()).spawn(move || {
            if let Err(error) = converse(&*answers, &stream) {
                tracing::debug!(%error, "a control connection has ended");
            }
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Answers for Echo {
        fn answer(&self, question: Value) -> Result<Value, String> {
            Ok(question)
        }
    }

    fn asked(questions: &[u8]) -> String {
        let (mut client, server) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || converse(&Echo, &server));
        client.write_all(questions).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        thread.join().unwrap().unwrap();
        said
    }

    #[test]
    fn each_line_is_answered_by_one() {
        assert_eq!(asked(b"{\"a\": 1}\n{\"b\": 2}\n"), "{\"a\":1,\"ok\":true}\n{\"b\":2,\"ok\":true}\n");
    }

    #[test]
    fn ping_is_answered_by_who_it_is() {
        let said: Value = serde_json::from_str(&asked(b"{\"op\": \"ping\"}\n")).unwrap();
        assert_eq!(said, json!({"ok": true, "version": env!("CARGO_PKG_VERSION"), "pid": std::process::id()}));
    }

    #[test]
    fn nonsense_is_answered_and_the_connection_goes_on() {
        let said = asked(b"nonsense\n{\"a\": 1}\n");
        let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&lines[0]["ok"], &lines[1]["ok"]), (&false.into(), &true.into()));
    }

    #[test]
    fn line_without_an_end_ends_the_connection() {
        assert!(asked(b"{\"a\": 1}").contains("does not end"));
    }
}
