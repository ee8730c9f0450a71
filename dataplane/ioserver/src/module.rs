// SPDX-License-Identifier: Apache-2.0

//! What is behind a remote device: the one trait that the server knows.

use std::os::fd::RawFd;
use std::sync::Arc;

use wire::{Code, Device};

/// What a guest asks of a module: one chain of descriptors.
#[derive(Debug)]
pub struct Request {
    /// Number of the virtqueue.
    pub queue: u16,
    /// What the driver has given.
    pub given: Vec<u8>,
    /// Bytes that the device may write.
    pub room: usize,
}

/// What the device puts into the chain: [`Code::Done`] with bytes, which fill its writable part from the front.
pub type Written = Result<Vec<u8>, Code>;

/// How a request goes on.
pub enum Next {
    /// It is done.
    Done(Written),
    /// The kernel has to do something with a file, and then it is done. The worker does not wait for it.
    File(FileTask),
}

/// Something that the kernel does with a file, while other requests are served.
pub struct FileTask {
    /// The file; it stays open as long as the module is there.
    pub file: RawFd,
    /// What is done with it.
    pub what: FileWork,
    /// Makes the answer of it.
    pub finish: Finish,
}

/// What is done with a file.
pub enum FileWork {
    /// Read at an offset, as much as `bytes` has.
    Read {
        /// Where to put it.
        bytes: Vec<u8>,
        /// Where in the file.
        offset: u64,
    },
    /// Write all of `bytes` behind `start`.
    Write {
        /// What to write.
        bytes: Vec<u8>,
        /// Where in `bytes` it begins.
        start: usize,
        /// Where in the file.
        offset: u64,
    },
    /// Have all that was written reach the medium.
    Sync,
    /// Change how a part of the file is kept, as `fallocate` does.
    Allocate {
        /// Its flags.
        mode: i32,
        /// Where in the file.
        offset: u64,
        /// How much.
        length: u64,
    },
}

/// What makes an answer: it gets the bytes of [`FileWork`], if there were some, and whether all of it was done.
pub type Finish = Box<dyn FnOnce(Vec<u8>, bool) -> Written + Send>;

/// Something that acts as a virtio device: the guests' drivers talk to it, and it to a driver of its host.
///
/// It is called by many threads at once, a worker for each virtqueue of each guest.
pub trait Module: Send + Sync {
    /// What it acts as.
    fn device(&self) -> Device;

    /// Features that it offers, beside those of the transport.
    fn features(&self) -> u64;

    /// Virtqueues that it can serve, at most.
    fn queues(&self) -> u16;

    /// The device's configuration as it is now.
    fn config(&self) -> Vec<u8>;

    /// Begin with a request.
    fn begin(&self, request: Request) -> Next;

    /// Whether a request can be done again with the same result, so that its answer need not be remembered.
    fn repeatable(&self, request: &Request) -> bool;

    /// Its size has changed, by whoever has the control socket; bytes. Guests are interrupted afterwards.
    ///
    /// # Errors
    ///
    /// It has no size, or cannot have that one.
    fn resize(&self, _size: u64) -> Result<(), String> {
        Err("it has no size that could change".to_owned())
    }
}

/// A module that many use.
pub type Shared = Arc<dyn Module>;
