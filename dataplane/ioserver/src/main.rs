// SPDX-License-Identifier: Apache-2.0

//! `orchestrator-ioserver`: see the library's documentation.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use control::Answers;
use ioserver::control::ForControl;
use ioserver::server::Server;

/// Serves devices of this host to guests of others.
#[derive(Debug, Parser)]
#[command(name = "orchestrator-ioserver", version)]
struct Options {
    /// Unix socket for the control protocol; it is made
    #[arg(long, value_name = "PATH", env = "ORCHESTRATOR_IOSERVER_CONTROL")]
    control: PathBuf,
    /// Poll a quiet queue that long before sleeping; 0: never
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50, env = "ORCHESTRATOR_IOSERVER_BUSY_POLL_US",
          value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    busy_poll_us: u64,
    /// error, warn, info, debug or trace; the log is written to stderr
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "ORCHESTRATOR_IOSERVER_LOG_LEVEL")]
    log_level: tracing::Level,
}

fn run(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    let listener = UnixListener::bind(&options.control)?;
    let server = Server::new(Duration::from_micros(options.busy_poll_us));
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "started");
    let answers: Arc<dyn Answers> = Arc::new(ForControl(server));
    Ok(control::serve(&answers, &listener)?)
}

fn main() -> ExitCode {
    let options = Options::parse();
    control::run(options.log_level, || run(&options))
}
