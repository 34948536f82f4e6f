//! The life of the worker's process: what it refuses to be, what it sets up, how it ends.
//!
//! ```text
//!   no root, no capability -> umask, no_new_privs, descriptors -> settings -> control socket, VM files
//!       -> the supervisor's inventory -> READY=1 -> events, until SIGTERM (exit 0) or the supervisor is lost for good (exit 1)
//! ```
//!
//! However it ends, the VMs run on: the next worker adopts them.

use crate::config::Config;
use crate::control::server;
use crate::journal::Journal;
use crate::logs::Logs;
use crate::state::Store;
use crate::supervisor::Link;
use crate::watch;
use crate::worker::Worker;
use diarch_ipc::client::State;
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit};
use sd_notify::NotifyState;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Between two tries to get the first inventory while the supervisor is connected and does not give it.
const STOCK_AGAIN: Duration = Duration::from_secs(1);
/// Files are opened and read on these; a hung file system costs one each, and no more than all of them.
const BLOCKING_THREADS: usize = 8;

/// Runs until the end. `Err` is one line for people.
pub fn run(config: &Path) -> Result<(), String> {
    refuse_power()?;
    set_up()?;
    let config = Config::load(config).map_err(|error| error.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(Duration::from_secs(2))
        .build()
        .map_err(|error| format!("the runtime can't be made: {error}"))?;
    let ended = runtime.block_on(serve(config));
    // A thread in a hung file system must not keep the process.
    runtime.shutdown_background();
    ended
}

/// The worker holds all policy and no power: with power it would not be the unprivileged half.
fn refuse_power() -> Result<(), String> {
    if rustix::process::geteuid().is_root() || rustix::process::getuid().is_root() {
        return Err("it refuses to run as root: only diarch-supervisor does; run it as the user that the grants name in [worker]".into());
    }
    let status = procfs::process::Process::myself().and_then(|process| process.status()).map_err(|error| format!("/proc/self/status: {error}"))?;
    let held = status.capeff | status.capprm | status.capamb.unwrap_or(0);
    if held != 0 {
        return Err(format!("it refuses to run with capabilities (it has {held:#x}): take AmbientCapabilities and the like out of its unit"));
    }
    Ok(())
}

fn set_up() -> Result<(), String> {
    rustix::process::umask(Mode::from_raw_mode(0o027));
    rustix::thread::set_no_new_privs(true).map_err(|error| format!("no_new_privs: {error}"))?;
    // Two descriptors a VM: 1024 would end at some 400 VMs.
    let limit = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
        .map_err(|error| format!("the limit of open files can't be raised: {error}"))
}

async fn serve(config: Config) -> Result<(), String> {
    let at = |what: &str, path: &Path, error: std::io::Error| format!("{what} {}: {error}", path.display());
    let store = Store::open(&config.state_directory).map_err(|error| at("the state directory", &config.state_directory, error))?;
    let logs = Logs::open(&config.log_directory).map_err(|error| at("the log directory", &config.log_directory, error))?;
    let listener =
        server::listen(&config.control_socket, config.operators_group.as_deref()).map_err(|error| at("the control socket", &config.control_socket, error))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
    let mut hangup = signal(SignalKind::hangup()).map_err(|error| error.to_string())?;

    let journal = Arc::new(Journal::default());
    let (link, mut lost) = Link::start(&config, Arc::clone(&journal));
    let changed = watch::start(config.configs_dir.clone());
    let (worker, mut notes) = Worker::new(config, link, Arc::clone(&journal), store, logs);
    journal.note(None, "worker.started", format!("diarch-worker {} as process {}", diarch_ipc::VERSION, std::process::id()));
    worker.reload().await;
    tokio::spawn(server::serve(listener, Arc::clone(&worker)));
    tokio::spawn(keep_stock(Arc::clone(&worker)));
    if let Some(period) = sd_notify::watchdog_enabled() {
        tokio::spawn(watchdog(period / 2));
    }
    loop {
        tokio::select! {
            biased;
            reason = &mut lost => {
                let reason = reason.unwrap_or_else(|error| error.to_string());
                journal.warn("supervisor.gave-up", reason.clone());
                let _ = sd_notify::notify(&[NotifyState::Stopping]);
                return Err(format!("{reason}; the VMs run on"));
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            Some(note) = notes.recv() => worker.take_note(note).await,
            () = changed.notified() => worker.reload().await,
            Some(()) = hangup.recv() => worker.reload().await,
        }
    }
    journal.note(None, "worker.stopping", format!("it was asked to end; {} VMs run on", worker.driven()));
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    Ok(())
}

/// Takes stock whenever the supervisor is reached (anew): what it owns and nobody drives is adopted or given back.
async fn keep_stock(worker: Arc<Worker>) {
    let mut state = worker.link.state();
    let mut ready = false;
    loop {
        if state.wait_for(|state| matches!(state, State::Ready { .. })).await.is_err() {
            return;
        }
        match worker.take_stock().await {
            Ok(()) if !ready => {
                ready = true;
                let _ = sd_notify::notify(&[NotifyState::Ready]);
            }
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(%error, "the supervisor's inventory can't be had");
                tokio::time::sleep(STOCK_AGAIN).await;
                continue;
            }
        }
        // Until this connection has gone; the next one is taken stock of again.
        state.mark_unchanged();
        if state.changed().await.is_err() {
            return;
        }
    }
}

/// The loop above is what systemd's watchdog is to watch, and this runs on the same thread.
async fn watchdog(period: Duration) {
    let mut beat = tokio::time::interval(period.max(Duration::from_millis(100)));
    loop {
        beat.tick().await;
        let _ = sd_notify::notify(&[NotifyState::Watchdog]);
    }
}
