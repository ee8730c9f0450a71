// SPDX-License-Identifier: Apache-2.0

//! Devices of guests, as the server knows them: who uses what, which connections count, and what has been answered.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use wire::{Code, Control, Handles, MAX_IN_FLIGHT, Malformed, Names, SessionId};

use crate::module::{Shared, Written};

/// A lock that is not poisoned by a thread that panicked: such a thread ends the process.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is remembered of a queue's requests from one of its connections to the next.
///
/// Its lock is the right to serve the queue: the worker of a later connection gets it when the one before has finished
/// what it had begun.
#[derive(Debug, Default)]
pub struct Replay {
    answers: BTreeMap<u64, Written>,
    settled: u64,
}

impl Replay {
    /// The answer that a request was given before.
    pub fn answer(&self, tag: u64) -> Option<&Written> {
        self.answers.get(&tag)
    }

    /// All tags below this are settled: their answers are forgotten.
    ///
    /// # Errors
    ///
    /// A tag that is settled comes again.
    pub fn settle(&mut self, settled: u64, tag: u64) -> Result<(), Malformed> {
        if settled > self.settled {
            self.settled = settled;
            self.answers = self.answers.split_off(&settled);
        }
        if tag < self.settled { Err(Malformed::Value("tag")) } else { Ok(()) }
    }

    /// Remember an answer until its tag is settled.
    ///
    /// # Errors
    ///
    /// There are too many.
    pub fn remember(&mut self, tag: u64, answer: &Written) -> Result<(), Malformed> {
        if self.answers.len() == MAX_IN_FLIGHT {
            return Err(Malformed::InFlight(MAX_IN_FLIGHT));
        }
        self.answers.insert(tag, answer.clone());
        Ok(())
    }
}

/// What a queue has done.
#[derive(Debug, Default, Serialize)]
pub struct Counters {
    /// Requests that were answered.
    pub requests: AtomicU64,
    /// Of those, the ones that a module could not do.
    pub failed: AtomicU64,
    /// Of those, the ones that had been answered before.
    pub repeated: AtomicU64,
    /// Bytes that drivers have given.
    pub given_bytes: AtomicU64,
    /// Bytes that devices have written.
    pub written_bytes: AtomicU64,
}

impl Counters {
    /// Add to one of them; they are read by others at any time.
    pub fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Connections {
    epoch: u32,
    control: Option<TcpStream>,
    queues: Vec<Option<TcpStream>>,
}

impl Connections {
    fn close(&mut self) {
        for stream in self.queues.iter_mut().chain([&mut self.control]).filter_map(Option::take) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// One device of one guest.
pub struct Session {
    /// Its number.
    pub id: SessionId,
    /// Who talks to whom.
    pub names: Names,
    /// What stands for the names.
    pub handles: Handles,
    /// What it talks to.
    pub module: Shared,
    /// Of each queue.
    pub queues: Vec<(Mutex<Replay>, Counters)>,
    connections: Mutex<Connections>,
}

impl Session {
    /// A session that has no connection yet.
    pub fn new(id: SessionId, names: Names, handles: Handles, module: Shared, queues: u16) -> Self {
        let queues: Vec<_> = (0..queues).map(|_| Default::default()).collect();
        let none = (0..queues.len()).map(|_| None).collect();
        let connections = Mutex::new(Connections { epoch: 0, control: None, queues: none });
        Session { id, names, handles, module, queues, connections }
    }

    /// A control connection of a new epoch: all earlier connections end.
    ///
    /// # Errors
    ///
    /// The epoch is none that is new, or the socket cannot be shared.
    pub fn attach(&self, epoch: u32, stream: &TcpStream) -> Result<(), Code> {
        let mut connections = lock(&self.connections);
        if epoch <= connections.epoch {
            return Err(Code::Fenced);
        }
        let stream = stream.try_clone().map_err(|_| Code::Full)?;
        connections.close();
        connections.epoch = epoch;
        connections.control = Some(stream);
        Ok(())
    }

    /// A connection of one of its queues, of the epoch that counts: the queue's earlier one ends.
    ///
    /// # Errors
    ///
    /// It is of another epoch, or the socket cannot be shared.
    pub fn open(&self, epoch: u32, queue: u16, stream: &TcpStream) -> Result<(), Code> {
        let mut connections = lock(&self.connections);
        if epoch != connections.epoch {
            return Err(Code::Fenced);
        }
        let stream = stream.try_clone().map_err(|_| Code::Full)?;
        let Some(place) = connections.queues.get_mut(usize::from(queue)) else { return Err(Code::Malformed) };
        if let Some(earlier) = place.replace(stream) {
            let _ = earlier.shutdown(Shutdown::Both);
        }
        Ok(())
    }

    /// End all of its connections.
    pub fn close(&self) {
        lock(&self.connections).close();
    }

    /// Tell the client something, if it is there; one that does not listen is cut off.
    pub fn tell(&self, control: &Control) {
        let mut connections = lock(&self.connections);
        let frame = control.encode(self.handles);
        if let Some(stream) = &mut connections.control
            && stream.write_all(&frame).is_err()
        {
            let _ = stream.shutdown(Shutdown::Both);
            connections.control = None;
        }
    }

    /// Whether a client is there.
    pub fn is_attached(&self) -> bool {
        lock(&self.connections).control.is_some()
    }

    /// Its client has gone; it may come back.
    pub fn left(&self, epoch: u32) {
        let mut connections = lock(&self.connections);
        if connections.epoch == epoch {
            connections.control = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_remembered_until_their_tags_are_settled() {
        let mut replay = Replay::default();
        for tag in [5, 3, 4] {
            replay.settle(0, tag).unwrap();
            replay.remember(tag, &Ok(vec![tag as u8])).unwrap();
        }

        assert_eq!(replay.answer(4), Some(&Ok(vec![4])));
        replay.settle(5, 6).unwrap();
        assert_eq!(replay.answer(4), None);
        assert_eq!(replay.answer(5), Some(&Ok(vec![5])));
        assert_eq!(replay.settle(5, 4), Err(Malformed::Value("tag")), "it was settled");
        replay.settle(2, 7).unwrap();
        assert_eq!(replay.answer(5), Some(&Ok(vec![5])), "an older frame says less, and changes nothing");
    }

    #[test]
    fn no_more_answers_are_remembered_than_requests_may_be_in_flight() {
        let mut replay = Replay::default();
        for tag in 0..MAX_IN_FLIGHT as u64 {
            replay.remember(tag, &Ok(Vec::new())).unwrap();
        }
        assert_eq!(replay.remember(u64::MAX, &Ok(Vec::new())), Err(Malformed::InFlight(MAX_IN_FLIGHT)));
    }
}
