// SPDX-License-Identifier: Apache-2.0

//! `orchestrator-vswitch`: see the library's documentation.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use vring::{fault, sandbox};
use vswitch::daemon::Daemon;
use vswitch::poll;

const CAP_CHOWN: u32 = 0;
const CAP_NET_ADMIN: u32 = 12;
/// To give sockets their owners, and to attach taps.
const CAPABILITIES: u64 = 1 << CAP_CHOWN | 1 << CAP_NET_ADMIN;

/// What other back ends need not do.
const SYSCALLS: &[libc::c_long] = &[
    // taps
    libc::SYS_openat,
    libc::SYS_writev,
    // waiting for many files
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    // owners of sockets
    libc::SYS_fchownat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
];

/// Carries frames between guests from virtqueue to virtqueue (vhost-user-net).
#[derive(Debug, Parser)]
#[command(name = "orchestrator-vswitch", version)]
struct Options {
    /// Descriptor of the listening Unix socket for the control protocol
    #[arg(long, value_name = "N", env = "ORCHESTRATOR_VSWITCH_CONTROL_FD")]
    control_fd: RawFd,
    /// Poll a quiet queue that long before asking the guest to notify; 0: never
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50, env = "ORCHESTRATOR_VSWITCH_BUSY_POLL_US",
          value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    busy_poll_us: u64,
    /// error, warn, info, debug or trace; the log is written to stderr
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "ORCHESTRATOR_VSWITCH_LOG_LEVEL")]
    log_level: tracing::Level,
    /// Keep all capabilities and system calls
    #[arg(long, env = "ORCHESTRATOR_VSWITCH_NO_SANDBOX")]
    no_sandbox: bool,
}

/// The listening socket that the parent has passed.
fn control_socket(number: RawFd) -> io::Result<UnixListener> {
    // SAFETY: nothing is done with the number if it is no open descriptor.
    if number < 3 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(Errno::EBADF.into());
    }
    // SAFETY: it is open, and the parent has passed it for us alone to use.
    let file = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(&file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    if !getsockopt(&file, AcceptConn)? {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a listening socket"));
    }
    Ok(file.into())
}

fn run(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    let control =
        control_socket(options.control_fd).map_err(|error| format!("--control-fd {}: {error}", options.control_fd))?;
    // Blocked before there are threads, so that they come here alone.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    fault::install()?;
    if !options.no_sandbox {
        sandbox::enter(CAPABILITIES, SYSCALLS)?;
    }
    let (switch, _thread) = poll::start(options.busy_poll_us)?;
    let daemon = Arc::new(Daemon::new(switch)?);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "started");
    daemon.run(&control, &signals)?;
    tracing::info!("ended by a signal");
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    control::run(options.log_level, || run(&options))
}
