//! The unprivileged half's process; see [`diarch_worker::daemon`].

#![forbid(unsafe_code)]

use clap::Parser;
use diarch_worker::arguments::Arguments;
use sd_notify::NotifyState;
use std::process::ExitCode;
use std::time::Duration;
use tracing_subscriber::filter::LevelFilter;

/// Between a failure and our end, under a service manager.
const FAILED_PAUSE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let level = std::env::var("DIARCH_LOG").ok().and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::INFO);
    diarch_ipc::log::to_standard_error(level);
    match diarch_worker::daemon::run(&arguments.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("diarch-worker: {reason}");
            // A service manager starts us anew at once and for ever: that must not become a storm.
            if std::env::var_os("NOTIFY_SOCKET").is_some() {
                let _ = sd_notify::notify(&[NotifyState::Status(&reason)]);
                std::thread::sleep(FAILED_PAUSE);
            }
            ExitCode::FAILURE
        }
    }
}
