// SPDX-License-Identifier: Apache-2.0

//! What a back end gives up once it has started.
//!
//! It reads what guests write, so it keeps only what it needs later: the capabilities that it names, and the system
//! calls of its own code. Those that every back end makes are listed here; it names the others. Threads inherit both,
//! so this is done before there are any. A system call that is on neither list fails with EPERM.
//!
//! Two things of this crate have to be named by those that want them: to make memory for what is in flight
//! (`memfd_create`, `ftruncate`), and to give a socket an owner (`CAP_CHOWN`, `fchownat`, on x86-64 `chown`).

use std::collections::BTreeMap;
use std::io;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

const SYSCALLS: &[libc::c_long] = &[
    // memory and threads
    libc::SYS_brk,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_prctl,
    // signals
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // waiting and time
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    // files and sockets
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_ioctl,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_read,
    libc::SYS_statx,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_fchmodat,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socket,
    libc::SYS_getrandom,
    // what the C library calls instead on older machines
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
];

/// Why the process cannot be shut in.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The capabilities cannot be given up.
    #[error("capabilities: {0}")]
    Capabilities(io::Error),
    /// The filter of system calls cannot be made or installed.
    #[error("system calls: {0}")]
    Filter(#[from] seccompiler::Error),
    /// The filter does not fit the machine.
    #[error("system calls: {0}")]
    Backend(#[from] seccompiler::BackendError),
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn checked(result: libc::c_long) -> Result<(), SandboxError> {
    if result < 0 { Err(SandboxError::Capabilities(io::Error::last_os_error())) } else { Ok(()) }
}

fn drop_capabilities(but: u64) -> Result<(), SandboxError> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut data = [CapabilityData::default(); 2];
    // SAFETY: version 3 of the header goes with two structs of data.
    checked(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    for (half, data) in data.iter_mut().enumerate() {
        let kept = (but >> (32 * half)) as u32;
        data.permitted &= kept;
        data.effective = data.permitted;
        data.inheritable = 0;
    }
    // SAFETY: as above; the call only reads.
    checked(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) })?;
    // SAFETY: takes numbers only.
    checked(libc::c_long::from(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }))
}

fn filter(extra: &[libc::c_long]) -> Result<BpfProgram, SandboxError> {
    let rules: BTreeMap<_, _> = SYSCALLS.iter().chain(extra).map(|syscall| (*syscall, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into()?;
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    Ok(SeccompFilter::new(rules, denied, SeccompAction::Allow, arch)?.try_into()?)
}

/// Give up all capabilities but `capabilities`, of which each is the bit of its number, and all system calls but those
/// of every back end and `extra`.
///
/// # Errors
///
/// See [`SandboxError`].
pub fn enter(capabilities: u64, extra: &[libc::c_long]) -> Result<(), SandboxError> {
    drop_capabilities(capabilities)?;
    Ok(seccompiler::apply_filter(&filter(extra)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_filter_fits_this_machine() {
        assert!(!filter(&[]).unwrap().is_empty());
        // A system call that is named twice changes nothing.
        assert_eq!(filter(&[libc::SYS_read]).unwrap(), filter(&[]).unwrap());
        assert_ne!(filter(&[libc::SYS_openat]).unwrap(), filter(&[]).unwrap());
    }
}
