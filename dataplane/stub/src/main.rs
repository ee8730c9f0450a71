// SPDX-License-Identifier: Apache-2.0

//! `orchestrator-iostub`: see the library's documentation.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use control::Answers;
use stub::control::ForControl;
use stub::daemon::Daemon;
use vring::{fault, sandbox};

/// To give sockets their owners.
const CAP_CHOWN: u32 = 0;

/// What other back ends need not do.
const SYSCALLS: &[libc::c_long] = &[
    // servers, and how their names are found
    libc::SYS_connect,
    libc::SYS_openat,
    libc::SYS_uname,
    libc::SYS_writev,
    // what is in flight
    libc::SYS_ftruncate,
    libc::SYS_memfd_create,
    // owners of sockets
    libc::SYS_fchownat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
];

/// Has devices of other hosts appear in guests of this one.
#[derive(Debug, Parser)]
#[command(name = "orchestrator-iostub", version)]
struct Options {
    /// Unix socket for the control protocol; it is made
    #[arg(long, value_name = "PATH", env = "ORCHESTRATOR_IOSTUB_CONTROL")]
    control: PathBuf,
    /// Poll a quiet queue that long before sleeping; 0: never
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50, env = "ORCHESTRATOR_IOSTUB_BUSY_POLL_US",
          value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    busy_poll_us: u64,
    /// error, warn, info, debug or trace; the log is written to stderr
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "ORCHESTRATOR_IOSTUB_LOG_LEVEL")]
    log_level: tracing::Level,
    /// Keep all capabilities and system calls
    #[arg(long, env = "ORCHESTRATOR_IOSTUB_NO_SANDBOX")]
    no_sandbox: bool,
}

fn run(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    let listener = UnixListener::bind(&options.control)?;
    fault::install()?;
    if !options.no_sandbox {
        sandbox::enter(1 << CAP_CHOWN, SYSCALLS)?;
    }
    let daemon = Daemon::new(Duration::from_micros(options.busy_poll_us));
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "started");
    let answers: Arc<dyn Answers> = Arc::new(ForControl(daemon));
    Ok(control::serve(&answers, &listener)?)
}

fn main() -> ExitCode {
    let options = Options::parse();
    control::run(options.log_level, || run(&options))
}
