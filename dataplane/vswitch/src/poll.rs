// SPDX-License-Identifier: Apache-2.0

//! The data thread: what it waits for, and when it does.
//!
//! One thread owns the [`Switch`] and does nothing but turn it. Others give it *tasks*, functions that it runs between
//! two batches of frames: so each change is atomic, nothing of the switch is locked, and who sets up a port never
//! makes frames of other ports wait for more than that one function. (Several such threads would each own some of
//! the ports; only the receive queues would have to be shared.)
//!
//! # Waiting
//!
//! ```text
//!   Busy ──► look at the files every 20 µs at most, and go on        (queues with recent work: polled, no kicks)
//!   Wait ──► sleep until a file is ready, at most a millisecond      (a frame waits for its receiver)
//!   Idle ──► sleep until a file is ready                             (all queues are armed)
//! ```
//!
//! A queue is polled until nothing has come for the time of `--busy-poll-us`; then the guest is asked to kick. So a
//! quiet switch takes no processor time, and a quiet port does not slow down a busy one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::switch::Switch;

/// Nanoseconds between two looks at the files while there is work.
const LOOK: u64 = 20_000;
const EVENTS: usize = 64;

/// What has happened to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// There are tasks.
    Tasks,
    /// The tap of the port in this slot has a frame.
    Tap(u32),
    /// The guest of the port in this slot has new buffers in this queue.
    Kick(u32, u16),
}

impl Token {
    fn encode(self) -> u64 {
        match self {
            Token::Tasks => 0,
            Token::Tap(slot) => 1 << 48 | u64::from(slot),
            Token::Kick(slot, queue) => 2 << 48 | u64::from(queue) << 32 | u64::from(slot),
        }
    }

    fn decode(data: u64) -> Self {
        match data >> 48 {
            1 => Token::Tap(data as u32),
            2 => Token::Kick(data as u32, (data >> 32) as u16),
            _ => Token::Tasks,
        }
    }
}

/// How soon the switch has to be turned again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pace {
    /// When a file is ready.
    Idle,
    /// In a millisecond, or when a file is ready.
    Wait,
    /// At once.
    Busy,
}

/// The files that are waited for.
///
/// All are edge-triggered and eventfds are never read: each write to one raises an event, and that is all we want.
pub struct Events {
    epoll: Epoll,
}

impl Events {
    /// No files yet.
    ///
    /// # Errors
    ///
    /// There are too many open files.
    pub fn new() -> io::Result<Self> {
        Ok(Events { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Wait for `file` too.
    ///
    /// # Errors
    ///
    /// It cannot be waited for.
    pub fn add(&self, file: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token.encode());
        Ok(self.epoll.add(file, event)?)
    }

    /// Wait for `file` no more. (To close it is not enough: others have it open too.)
    pub fn remove(&self, file: BorrowedFd<'_>) {
        if let Err(error) = self.epoll.delete(file) {
            tracing::warn!(%error, "a file is still waited for");
        }
    }
}

/// Nanoseconds of CLOCK_MONOTONIC, which is what the kernel's switch counts in.
#[inline]
pub fn clock() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer leads to a timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

type Task = Box<dyn FnOnce(&mut Switch) + Send>;

struct Line {
    /// None only while this is dropped.
    tasks: Option<Sender<Task>>,
    wake: Arc<EventFd>,
}

impl Drop for Line {
    fn drop(&mut self) {
        // The thread ends when it sees that nobody can give it tasks any more.
        drop(self.tasks.take());
        let _ = self.wake.write(1);
    }
}

/// The data thread is gone.
#[derive(Debug, thiserror::Error)]
#[error("the data thread has ended")]
pub struct Gone;

/// Where to give tasks to the data thread.
#[derive(Clone)]
pub struct Handle {
    line: Arc<Line>,
}

impl Handle {
    /// Have `task` run by the data thread, and wait for what it gives.
    ///
    /// # Errors
    ///
    /// The thread is gone.
    pub fn run<R: Send + 'static>(&self, task: impl FnOnce(&mut Switch) -> R + Send + 'static) -> Result<R, Gone> {
        let (answer, result) = mpsc::sync_channel(1);
        let task: Task = Box::new(move |switch| {
            let _ = answer.send(task(switch));
        });
        self.line.tasks.as_ref().ok_or(Gone)?.send(task).map_err(|_| Gone)?;
        self.line.wake.write(1).map_err(|_| Gone)?;
        result.recv().map_err(|_| Gone)
    }
}

/// Start the data thread. It ends when the last handle is dropped.
///
/// # Errors
///
/// There are too many threads or open files.
pub fn start(busy_poll_us: u64) -> io::Result<(Handle, JoinHandle<()>)> {
    let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let events = Events::new()?;
    events.add(wake.as_fd(), Token::Tasks)?;
    let mut switch = Switch::new(events, busy_poll_us * 1000);
    let (sender, tasks) = mpsc::channel();
    let handle = Handle { line: Arc::new(Line { tasks: Some(sender), wake: Arc::clone(&wake) }) };
    let thread = std::thread::Builder::new().name("data".to_owned()).spawn(move || {
        turn(&mut switch, &tasks);
        // A file that is closed everywhere raises no events, so it has to be open until here.
        drop(wake);
    })?;
    Ok((handle, thread))
}

fn turn(switch: &mut Switch, tasks: &Receiver<Task>) {
    let mut events = [EpollEvent::empty(); EVENTS];
    let mut pace = Pace::Idle;
    let mut now = clock();
    let mut looked = 0;
    loop {
        let timeout = match pace {
            Pace::Busy if now - looked < LOOK => None,
            Pace::Busy => Some(EpollTimeout::ZERO),
            Pace::Wait => Some(EpollTimeout::from(1_u8)),
            Pace::Idle => Some(EpollTimeout::NONE),
        };
        if let Some(timeout) = timeout {
            // A signal, or nothing: look again.
            let count = switch.events().epoll.wait(&mut events, timeout).unwrap_or(0);
            now = clock();
            looked = now;
            for event in &events[..count] {
                match Token::decode(event.data()) {
                    Token::Tasks => {
                        if !run_all(switch, tasks) {
                            return;
                        }
                    }
                    Token::Tap(slot) => switch.tap_is_readable(slot),
                    Token::Kick(slot, queue) => switch.kicked(slot, queue, now),
                }
            }
        }
        pace = switch.round(now);
        if pace == Pace::Busy {
            std::hint::spin_loop();
        }
        now = clock();
    }
}

fn run_all(switch: &mut Switch, tasks: &Receiver<Task>) -> bool {
    loop {
        match tasks.try_recv() {
            Ok(task) => task(switch),
            Err(TryRecvError::Empty) => return true,
            Err(TryRecvError::Disconnected) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_token_survives_encoding() {
        for token in [Token::Tasks, Token::Tap(0), Token::Tap(u32::MAX), Token::Kick(7, 15), Token::Kick(u32::MAX, 0)] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }

    #[test]
    fn test_run_gives_what_the_task_gives() {
        let (handle, thread) = start(0).unwrap();
        assert_eq!(handle.run(|_| 7).unwrap(), 7);
        drop(handle);
        thread.join().unwrap();
    }
}
