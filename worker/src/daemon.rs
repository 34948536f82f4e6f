//! The life of the worker's process: what it refuses to be, what it sets up, how it ends.
//!
//! ```text
//!   no root, no capability -> umask, no_new_privs, descriptors -> settings -> control socket, VM files
//!       -> the supervisor's inventory -> READY=1 -> events, until SIGTERM (exit 0), or
//!          the supervisor is lost for good, or a task that the loop depends on ends (exit 1)
//! ```
//!
//! The loop itself waits for nothing that can hang, and answers the [`watchdog`].
//!
//! However it ends, the VMs run on: the next worker adopts them.

use crate::config::Config;
use crate::control::server;
use crate::journal::Journal;
use crate::logs::Logs;
use crate::state::Store;
use crate::supervisor::Link;
use crate::vm::Note;
use crate::watch;
use crate::worker::{Reread, Worker};
use diarch_ipc::client::State;
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit};
use sd_notify::NotifyState;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

mod closing;
mod status;
mod watchdog;

pub use status::Census;

/// Between two tries to get the first inventory while the supervisor is connected and does not give it.
const STOCK_AGAIN: Duration = Duration::from_secs(1);
/// At the end, for what is being written to the disk.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// A VM whose task failed is taken on again after this: a task that fails each time must not be a busy loop.
const TAKE_ON_AGAIN: Duration = Duration::from_secs(10);
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
    let (changed, watching) = watch::start(config.configs_dir.clone());
    let (worker, mut notes) = Worker::new(config, link, Arc::clone(&journal), store, logs);
    let mut tasks = Tasks::default();
    let (pings_in, mut pings) = mpsc::channel::<watchdog::Ping>(1);
    if let Some(period) = sd_notify::watchdog_enabled() {
        tasks.spawn("the watchdog's", watchdog::feed(period, pings_in, watchdog::beat));
    }
    journal.note(None, "worker.started", format!("diarch-worker {} as process {}", diarch_ipc::VERSION, std::process::id()));
    // The watcher tells of the first reading itself; a directory that hangs is read when it can be.
    let _ = worker.reload().await;
    tasks.spawn("the control socket's", server::serve(listener, Arc::clone(&worker)));
    tasks.spawn("the inventory's", keep_stock(Arc::clone(&worker)));
    tasks.spawn("the VM files' watcher's", watching);
    tasks.spawn("the status line's", status::keep(Arc::clone(&worker)));
    let mut closing: Option<JoinHandle<()>> = None;
    let ended = loop {
        let reread = tokio::select! {
            biased;
            reason = &mut lost => break Err(("supervisor.gave-up", supervisor_lost(&reason.unwrap_or_else(|error| error.to_string())))),
            ended = tasks.ended() => break Err(("worker.broken", ended)),
            _ = terminate.recv() => {
                closing.get_or_insert_with(|| tokio::spawn(closing::close(Arc::clone(&worker))));
                continue;
            }
            _ = async { closing.as_mut().expect("looked at before").await }, if closing.is_some() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            Some(ping) = pings.recv() => {
                let _ = ping.send(());
                continue;
            }
            Some(note) = notes.recv() => {
                take_note(&worker, note);
                continue;
            }
            () = changed.notified() => worker.reload().await,
            Some(()) = hangup.recv() => worker.reload().await,
        };
        if reread == Reread::Again {
            changed.notify_one();
        }
    };
    match &ended {
        Ok(()) => journal.note(None, "worker.stopping", format!("it was asked to end; {} VMs run on", worker.driven())),
        Err((kind, reason)) => {
            journal.warn(kind, reason.clone());
            status::tell(reason);
        }
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    let _ = tokio::time::timeout(LAST_WORDS, worker.save_holds()).await;
    ended.map_err(|(_, reason)| format!("{reason}; the VMs run on"))
}

/// What an operator does about it; a refusal of the supervisor's says that itself, and more exactly.
fn supervisor_lost(reason: &str) -> String {
    format!("{reason}; 'systemctl status diarch-supervisor' and 'journalctl -u diarch-supervisor -e' say more, and systemd starts this worker again")
}

fn take_note(worker: &Arc<Worker>, note: Note) {
    if let Note::Broken(_) = &note {
        // What became of the VM is in the inventory, and it is adopted from there.
        let worker = Arc::clone(worker);
        tokio::spawn(async move {
            tokio::time::sleep(TAKE_ON_AGAIN).await;
            if let Err(error) = worker.take_stock().await {
                tracing::warn!(%error, "the supervisor's inventory can't be had");
            }
        });
    }
    worker.take_note(note);
}

/// The tasks without which the loop would only seem to work.
#[derive(Default)]
struct Tasks {
    set: JoinSet<()>,
    names: HashMap<tokio::task::Id, &'static str>,
}

impl Tasks {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.set.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Waits until one of them has ended, which none should, and says which and how.
    async fn ended(&mut self) -> String {
        let (id, how) = match self.set.join_next_with_id().await {
            // None was started.
            None => return std::future::pending().await,
            Some(Ok((id, ()))) => (id, "it ended".to_owned()),
            Some(Err(error)) => (error.id(), error.to_string()),
        };
        format!("{} task is gone ({how}), and without it the worker is of no use", self.names.get(&id).copied().unwrap_or("a"))
    }
}

/// Takes stock whenever the supervisor is reached (anew): what it owns and nobody drives is adopted or given back.
async fn keep_stock(worker: Arc<Worker>) {
    let mut state = worker.link.state();
    let mut ready = false;
    loop {
        if state.wait_for(|state| matches!(state, State::Ready { .. })).await.is_err() {
            return link_ended().await;
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
            return link_ended().await;
        }
    }
}

/// The main loop hears of it too, and says why.
async fn link_ended() {
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_or_panics_is_named() {
        let mut tasks = Tasks::default();
        tasks.spawn("the endless", std::future::pending());
        tasks.spawn("the short", async {});
        let said = tasks.ended().await;
        assert!(said.starts_with("the short task is gone (it ended)"), "{said}");
        tasks.spawn("the broken", async { panic!("a bug") });
        let said = tasks.ended().await;
        assert!(said.starts_with("the broken task is gone") && said.contains("a bug"), "{said}");
        assert!(tokio::time::timeout(Duration::from_millis(50), tasks.ended()).await.is_err(), "the endless one lives");
    }
}
