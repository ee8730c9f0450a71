// SPDX-License-Identifier: Apache-2.0

//! Serves one queue connection: requests in, answers out in the order in which they are ready.
//!
//! The worker waits for its socket and for the kernel's work on files at once, and sleeps when neither has anything for
//! it. It takes no more requests while [`MAX_UNSENT`] bytes of answers wait for a client that does not read, nor while
//! [`MAX_IN_FLIGHT`] requests are under way: so a queue takes no more memory than `MEMORY` bytes.
//!
//! Writing to a file is done at once, as it goes to memory as a rule; reading, what may be on the medium only, and what
//! waits for the medium, by io_uring.

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, types};
use link::{Link, LinkError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::uio::pwrite;
use wire::{Assembler, Code, Header, Kind, MAX_IN_FLIGHT, MAX_MESSAGE, Malformed, Message};

use crate::module::{FileTask, FileWork, Finish, Next, Request, Written};
use crate::session::{Counters, Replay, Session};

/// Bytes of answers that wait for the client, before no more requests are taken.
pub const MAX_UNSENT: usize = 4 * MAX_MESSAGE;
/// Bytes of requests that have not come as a whole.
pub const MAX_HELD: usize = 2 * MAX_MESSAGE;
/// Bytes that requests under way hold, before no more are taken.
pub const MAX_UNDER_WAY: usize = 4 * MAX_MESSAGE;
/// Bytes that a queue's worker takes at most, beside answers that are remembered.
pub const MEMORY: usize = MAX_UNSENT + MAX_HELD + MAX_UNDER_WAY + 2 * MAX_MESSAGE + 512 * 1024;
const ENTRIES: u32 = 256;

/// A request that the kernel is working at.
struct UnderWay {
    header: Header,
    bytes: Vec<u8>,
    task: Task,
    /// Bytes of `bytes` that have been read.
    done: usize,
    finish: Finish,
    remember: bool,
}

enum Task {
    Read { file: i32, offset: u64 },
    Sync { file: i32 },
    Allocate { file: i32, mode: i32, offset: u64, length: u64 },
}

/// See the module's documentation.
pub struct Worker<'a> {
    session: &'a Session,
    queue: u16,
    replay: &'a mut Replay,
    link: Link<Vec<u8>>,
    assembler: Assembler,
    ring: IoUring,
    done: EventFd,
    under_way: Vec<Option<UnderWay>>,
    free: Vec<usize>,
    /// Bytes that the requests under way hold.
    held: usize,
    busy_poll: Duration,
}

impl<'a> Worker<'a> {
    /// For one queue of a session.
    ///
    /// # Errors
    ///
    /// The kernel has no room for it.
    pub fn new(
        session: &'a Session,
        queue: u16,
        replay: &'a mut Replay,
        link: Link<Vec<u8>>,
        busy_poll: Duration,
    ) -> std::io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        let done = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(done.as_fd().as_raw_fd())?;
        Ok(Worker {
            session,
            queue,
            replay,
            link,
            assembler: Assembler::new(MAX_IN_FLIGHT, MAX_HELD),
            ring,
            done,
            under_way: Vec::new(),
            free: Vec::new(),
            held: 0,
            busy_poll,
        })
    }

    /// Serve it until the connection ends. Then what is under way is finished, and remembered.
    pub fn run(&mut self) -> LinkError {
        let error = match self.serve() {
            Ok(never) => match never {},
            Err(error) => error,
        };
        while self.in_flight() > 0 {
            if self.ring.submit_and_wait(1).is_ok() {
                let _ = self.complete();
            }
        }
        error
    }

    fn in_flight(&self) -> usize {
        self.under_way.len() - self.free.len()
    }

    fn has_room(&self) -> bool {
        self.in_flight() < MAX_IN_FLIGHT && self.held < MAX_UNDER_WAY && self.link.unsent() < MAX_UNSENT
    }

    fn serve(&mut self) -> Result<Infallible, LinkError> {
        let mut last = Instant::now();
        loop {
            let mut busy = self.take()?;
            if !self.ring.submission().is_empty() {
                self.ring.submit()?;
            }
            busy |= self.complete()?;
            busy |= self.link.flush()?;
            if busy {
                last = Instant::now();
            } else if last.elapsed() > self.busy_poll {
                self.sleep()?;
                last = Instant::now();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// Wait until there is something to do.
    fn sleep(&mut self) -> Result<(), LinkError> {
        let mut wanted = PollFlags::empty();
        if self.has_room() {
            wanted |= PollFlags::POLLIN;
        }
        if self.link.unsent() > 0 {
            wanted |= PollFlags::POLLOUT;
        }
        let mut files =
            [PollFd::new(self.link.stream().as_fd(), wanted), PollFd::new(self.done.as_fd(), PollFlags::POLLIN)];
        match poll(&mut files, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(LinkError::Io(error.into())),
        }
        let _ = self.done.read();
        Ok(())
    }

    /// Take requests, as long as there is room; whether there were some.
    fn take(&mut self) -> Result<bool, LinkError> {
        if !self.has_room() {
            return Ok(false);
        }
        let mut any = self.link.receive()?;
        while self.has_room() {
            let Some((header, body)) = self.link.frame()? else { break };
            any = true;
            check(&header, self.session, self.queue)?;
            match header.kind {
                Kind::Request => {
                    if let Some(message) = self.assembler.add(header, body)? {
                        self.begin(message)?;
                    }
                }
                Kind::Ping => self.link.send(Header { kind: Kind::Pong, ..header }, Vec::new()),
                kind => return Err(Malformed::Kind(kind as u8).into()),
            }
        }
        Ok(any)
    }

    fn begin(&mut self, message: Message) -> Result<(), LinkError> {
        let Message { header, body } = message;
        let counters = self.counters();
        Counters::add(&counters.given_bytes, body.len() as u64);
        self.replay.settle(header.settled, header.tag)?;
        if let Some(answer) = self.replay.answer(header.tag) {
            let answer = answer.clone();
            Counters::add(&counters.repeated, 1);
            self.answer(header, answer);
            return Ok(());
        }
        let request = Request { queue: self.queue, given: body, room: header.room as usize };
        let remember = !self.session.module.repeatable(&request);
        match self.session.module.begin(request) {
            Next::Done(answer) => self.finish(header, answer, remember)?,
            Next::File(task) => self.start(header, task, remember)?,
        }
        Ok(())
    }

    fn counters(&self) -> &'a Counters {
        &self.session.queues[usize::from(self.queue)].1
    }

    fn finish(&mut self, header: Header, answer: Written, remember: bool) -> Result<(), Malformed> {
        if remember {
            self.replay.remember(header.tag, &answer)?;
        }
        self.answer(header, answer);
        Ok(())
    }

    fn answer(&mut self, header: Header, answer: Written) {
        let counters = self.counters();
        let (code, mut bytes) = match answer {
            Ok(bytes) => (Code::Done, bytes),
            Err(code) => (code, Vec::new()),
        };
        bytes.truncate(header.room as usize);
        Counters::add(&counters.requests, 1);
        Counters::add(&counters.failed, u64::from(code != Code::Done));
        Counters::add(&counters.written_bytes, bytes.len() as u64);
        self.link.send(Header { kind: Kind::Answer, room: code as u32, settled: 0, ..header }, bytes);
    }

    // -- files -------------------------------------------------------------------------------------------------------

    fn start(&mut self, header: Header, task: FileTask, remember: bool) -> Result<(), LinkError> {
        let FileTask { file, what, finish } = task;
        let (bytes, task) = match what {
            FileWork::Write { bytes, start, offset } => {
                // SAFETY: the module, which the session holds, keeps the file open.
                let file = unsafe { BorrowedFd::borrow_raw(file) };
                let whole = write_all(file, &bytes[start..], offset);
                let answer = finish(Vec::new(), whole);
                return Ok(self.finish(header, answer, remember)?);
            }
            FileWork::Read { bytes, offset } => (bytes, Task::Read { file, offset }),
            FileWork::Sync => (Vec::new(), Task::Sync { file }),
            FileWork::Allocate { mode, offset, length } => (Vec::new(), Task::Allocate { file, mode, offset, length }),
        };
        self.held += bytes.len();
        let slot = self.free.pop().unwrap_or_else(|| {
            self.under_way.push(None);
            self.under_way.len() - 1
        });
        self.under_way[slot] = Some(UnderWay { header, bytes, task, done: 0, finish, remember });
        self.submit(slot)
    }

    fn submit(&mut self, slot: usize) -> Result<(), LinkError> {
        let Some(one) = &mut self.under_way[slot] else { return Ok(()) };
        let entry = match one.task {
            Task::Read { file, offset } => {
                let rest = &mut one.bytes[one.done..];
                opcode::Read::new(types::Fd(file), rest.as_mut_ptr(), rest.len() as u32)
                    .offset(offset + one.done as u64)
                    .build()
            }
            Task::Sync { file } => opcode::Fsync::new(types::Fd(file)).flags(types::FsyncFlags::DATASYNC).build(),
            Task::Allocate { file, mode, offset, length } => {
                opcode::Fallocate::new(types::Fd(file), length).offset(offset).mode(mode).build()
            }
        }
        .user_data(slot as u64);
        loop {
            // SAFETY: the buffer is kept in `under_way`, untouched, until the kernel has answered: `run` waits for it.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    /// Answer what the kernel has done; whether there was something.
    fn complete(&mut self) -> Result<bool, LinkError> {
        let mut any = false;
        while let Some(entry) = self.next_completion() {
            any = true;
            let slot = entry.user_data() as usize;
            let Some(mut one) = self.under_way[slot].take() else { continue };
            let result = entry.result();
            let again = result == -libc::EINTR || result == -libc::EAGAIN;
            if matches!(one.task, Task::Read { .. }) && result > 0 {
                one.done += result as usize;
            }
            if again || (result > 0 && one.done < one.bytes.len()) {
                self.under_way[slot] = Some(one);
                self.submit(slot)?;
                continue;
            }
            self.free.push(slot);
            self.held -= one.bytes.len();
            let whole = result >= 0 && one.done == one.bytes.len();
            let answer = (one.finish)(one.bytes, whole);
            self.finish(one.header, answer, one.remember)?;
        }
        Ok(any)
    }
}

fn check(header: &Header, session: &Session, queue: u16) -> Result<(), Malformed> {
    if header.handles != session.handles {
        return Err(Malformed::Value("handle"));
    }
    if header.queue == queue { Ok(()) } else { Err(Malformed::Value("queue")) }
}

fn write_all(file: BorrowedFd<'_>, mut bytes: &[u8], offset: u64) -> bool {
    let end = offset + bytes.len() as u64;
    while !bytes.is_empty() {
        match pwrite(file, bytes, (end - bytes.len() as u64) as i64) {
            Ok(0) => return false,
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
    true
}
