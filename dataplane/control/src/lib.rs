// SPDX-License-Identifier: Apache-2.0

//! The socket by which the control plane talks to a daemon: one JSON object per line, each answered by one.
//!
//! ```text
//! → {"op": …, …}
//! ← {"ok": true, …}
//! ← {"ok": false, "error": "what is wrong, and with what"}
//! ```
//!
//! What is not understood is answered with `"ok": false`. After a line of more than [`MAX_LINE`] bytes the connection is
//! closed as well. A connection may ask as often as it likes, and several may be open at once.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use serde_json::{Value, json};

/// Bytes of the longest question.
pub const MAX_LINE: u64 = 1 << 20;

/// Gives the answer to a question: an object, or what is wrong.
pub trait Answers: Send + Sync {
    /// See the trait.
    ///
    /// # Errors
    ///
    /// What is wrong.
    fn answer(&self, question: &[u8]) -> Result<Value, String>;
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
        let answer = if whole { answers.answer(&line) } else { Err("a line that does not end".to_owned()) };
        let mut told = answer.unwrap_or_else(|error| json!({"ok": false, "error": error}));
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
        fn answer(&self, question: &[u8]) -> Result<Value, String> {
            serde_json::from_slice(question).map_err(|error| error.to_string())
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
