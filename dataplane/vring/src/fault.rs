// SPDX-License-Identifier: Apache-2.0

//! A guest's memory that is taken away while we look at it.
//!
//! The file behind a guest's memory belongs to its VMM. If that shortens the file, touching the lost part raises
//! SIGBUS, which would end the process for all guests. So the mappings are registered here, and the handler puts
//! memory full of zeros in the place of one that fails. Its rings are then nonsense, which fails that device alone.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

const MAPPINGS: usize = 4096;

struct Range {
    start: AtomicUsize,
    end: AtomicUsize,
}

static RANGES: [Range; MAPPINGS] = [const { Range { start: AtomicUsize::new(0), end: AtomicUsize::new(0) } }; MAPPINGS];

/// A registered mapping; dropping it ends the registration.
#[derive(Debug)]
pub struct Guard(usize);

impl Guard {
    /// Register the mapping of `length` bytes at `start`.
    ///
    /// # Errors
    ///
    /// There are too many.
    pub fn new(start: usize, length: usize) -> io::Result<Self> {
        for (index, range) in RANGES.iter().enumerate() {
            // `end` is 0 until both are known, so that the handler never sees one half.
            if range.start.compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                range.end.store(start + length, Ordering::Release);
                return Ok(Guard(index));
            }
        }
        Err(io::Error::other("too many memory regions"))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        RANGES[self.0].end.store(0, Ordering::Release);
        RANGES[self.0].start.store(0, Ordering::Release);
    }
}

/// Replace the mapping that `address` is in; false if it is in none of ours.
fn replace(address: usize) -> bool {
    for range in &RANGES {
        let end = range.end.load(Ordering::Acquire);
        let start = range.start.load(Ordering::Acquire);
        if start == 0 || address < start || address >= end {
            continue;
        }
        // SAFETY: the range is a mapping of a guest's memory that we own, and stays one: what is replaced is only
        // what is behind it. Nothing but raw pointers leads there.
        let mapped = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                end - start,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        return mapped != libc::MAP_FAILED;
    }
    false
}

extern "C" fn on_bus_error(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to a handler with SA_SIGINFO, and SIGBUS fills in the address.
    let address = unsafe { (*info).si_addr() } as usize;
    if !replace(address) {
        // SAFETY: signal() is async-signal-safe. The instruction is repeated and ends the process as it should.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}

/// Install the handler, for all threads.
///
/// # Errors
///
/// The kernel refuses it.
pub fn install() -> io::Result<()> {
    // SAFETY: all-zero is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus_error as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: the handler calls only what is async-signal-safe (mmap and signal), and touches only atomics.
    if unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
