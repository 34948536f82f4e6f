//! The unprivileged half's process; see [`diarch_worker::daemon`].

#![forbid(unsafe_code)]

use clap::Parser;
use diarch_worker::arguments::Arguments;
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let level = std::env::var("DIARCH_LOG").ok().and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::INFO);
    // What can't be written there is dropped: its own complaint about that would panic on the same stream.
    tracing_subscriber::fmt().log_internal_errors(false).with_max_level(level).with_writer(std::io::stderr).with_ansi(false).with_target(false).init();
    match diarch_worker::daemon::run(&arguments.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("diarch-worker: {reason}");
            ExitCode::FAILURE
        }
    }
}
