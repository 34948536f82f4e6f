//! From a bare process to a supervisor that serves: the order of the steps is the security argument.
//!
//! ```text
//!   kernel new enough? -> grants -> socket -> audit -> ledger -> shed capabilities -> runtime -> adopt -> serve
//!   `------------- one thread, all rights -------------------'  `--- threads, only what the table names ---'
//! ```

use crate::audit::{Audit, now_ms};
use crate::grants::Grants;
use crate::helper::Helpers;
use crate::host::Host;
use crate::ledger::Ledger;
use crate::limiter::Limiter;
use crate::listen::{Inherited, Stored};
use crate::server::Server;
use crate::state::Supervisor;
use crate::vm::adopt::Findings;
use crate::{listen, mount, net, privilege, vfio, vm};
use diarch_ipc::operation::KvmVerdict;
use diarch_ipc::peer::Expected;
use sd_notify::NotifyState;
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// Where things are.
#[derive(Debug, Clone)]
pub struct Settings {
    pub grants: PathBuf,
    pub run_dir: PathBuf,
    pub audit: PathBuf,
    /// Used when no socket is passed on.
    pub socket: PathBuf,
    /// The host's place is taken by this directory, and nothing is done that needs root.
    pub rehearse: Option<PathBuf>,
    /// A stage to act on in place of this machine.
    pub host_root: Option<PathBuf>,
}

/// Why the supervisor does not start, in one sentence.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the supervisor must be started as root (or with --rehearse)")]
    NotRoot,
    #[error("a rehearsal is for an ordinary user: it must not be able to change this host")]
    RootRehearses,
    #[error("{0}")]
    Kernel(String),
    #[error("the grants are refused: {0}")]
    Grants(#[from] crate::grants::GrantsError),
    #[error("--host-root: {0}")]
    NoStage(std::io::Error),
    #[error("/proc hides other users' processes from the supervisor (mount options hidepid= and gid=): remount it with gid=0")]
    HiddenProc,
    #[error("{step}: {error}")]
    Io { step: &'static str, error: std::io::Error },
}

fn at(step: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
    move |error| StartError::Io { step, error }
}

/// Runs until SIGTERM or SIGINT.
pub fn run(settings: &Settings, inherited: Inherited) -> Result<(), StartError> {
    let host = match (&settings.rehearse, rustix::process::geteuid().is_root()) {
        (None, true) => match &settings.host_root {
            Some(root) => Host::marked_stage(root).map_err(StartError::NoStage)?,
            None => Host::real(),
        },
        (Some(stage), false) => Host::rehearsed(stage),
        (None, false) => return Err(StartError::NotRoot),
        (Some(_), true) => return Err(StartError::RootRehearses),
    };
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    privilege::check_kernel(&kernel).map_err(StartError::Kernel)?;
    let load = if host.is_rehearsed() { Grants::rehearsed } else { Grants::load };
    let grants = load(&settings.grants, host.owner())?;
    let (uid, gid) = grants.worker.user.resolve()?;
    listen::run_directory(&settings.run_dir)?;
    let socket = match inherited.socket {
        Some(socket) => socket,
        None => listen::own(&settings.socket, gid).map_err(at("the socket"))?,
    };
    let audit = Audit::open(&settings.audit).map_err(at("the audit"))?;
    let ledger = Ledger::open(&settings.run_dir).map_err(at("the ledger"))?;
    let devices = vfio::Devices::open(&settings.run_dir).map_err(at("the devices' records"))?;
    if host.is_rehearsed() {
        privilege::confine().map_err(at("giving up privileges"))?;
    } else {
        privilege::shed().map_err(at("giving up capabilities"))?;
    }

    let expected = Expected { uid, unit: grants.worker.unit.clone() };
    // With /proc mounted hidepid and a gid= that is not root's, running VMs would look like ended ones.
    if std::fs::read("/proc/1/stat").is_err() {
        return Err(StartError::HiddenProc);
    }
    let qemu_grants = vm::inventory::qemu_grants(&grants, host.owner());
    let findings = vm::adopt::find(&ledger, &host).map_err(at("the ledger"))?;
    let supervisor = Rc::new(Supervisor {
        limiter: Limiter::new(&grants.limits, Instant::now()).into(),
        kvm: if grants.vms.kvm { KvmVerdict::Probing } else { KvmVerdict::NotGranted }.into(),
        grants,
        worker_uid: uid,
        ledger,
        store: mount::store::Store::open().map_err(at("the service manager's socket"))?,
        helpers: Helpers::default(),
        host: Arc::new(host),
        devices,
        sessions: crate::session::Sessions::default(),
        hashes: crate::qemu::HashCache::default(),
        abilities: crate::qemu::Abilities::default(),
        qemu_grants,
        started_ms: now_ms(),
        kernel,
        scopes: vm::scope::wanted(),
        audit: audit.into(),
        slots: std::cell::RefCell::default(),
        closed: findings.unreadable.iter().map(|lost| lost.slot).collect(),
        in_flight: std::cell::RefCell::default(),
        sync_scheduled: std::cell::Cell::default(),
        sync_wanted: tokio::sync::Notify::new(),
        filter: net::Turn::default(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(at("the runtime"))?;
    let ended = tokio::task::LocalSet::new().block_on(&runtime, serve(supervisor, findings, inherited.stored, expected, socket));
    // A helper that hangs in the kernel must not keep us from ending.
    runtime.shutdown_background();
    ended
}

async fn serve(supervisor: Rc<Supervisor>, findings: Findings, stored: Vec<Stored>, expected: Expected, socket: OwnedFd) -> Result<(), StartError> {
    let adopted = findings.found.iter().filter(|found| found.pidfd.is_some()).count();
    let _ = supervisor
        .audit
        .borrow_mut()
        .append("start", &format!(",\"version\":\"{}\",\"pid\":{},\"adopted\":{adopted}", diarch_ipc::VERSION, std::process::id()));
    for note in &findings.notes {
        tracing::info!("{note}");
        supervisor.note(note);
    }
    supervisor.sync_soon();
    vm::adopt::adopt(&supervisor, findings.found);
    mount::adopt::adopt(&supervisor, stored);
    net::adopt(&supervisor).await;
    vfio::adopt::begin(&supervisor);

    let door = listen::path(&socket).map_err(at("the socket"))?;
    let listener = listen::listener(socket).map_err(at("the socket"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(at("signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(at("signals"))?;
    if supervisor.grants.vms.kvm {
        let supervisor = Rc::clone(&supervisor);
        tokio::task::spawn_local(async move { supervisor.probe_kvm().await });
    }
    let server = Server::new(Rc::clone(&supervisor), expected);
    tell_manager(&[NotifyState::Ready, NotifyState::Status("serving")]);
    tracing::info!(version = diarch_ipc::VERSION, adopted, "serving");
    // Each on a task of its own: what is awaited here is looked at on every turn of the loop.
    let syncing = Rc::clone(&supervisor);
    tokio::task::spawn_local(async move { syncing.keep_synced().await });
    tokio::task::spawn_local(net::turn::keep_settled(Rc::clone(&supervisor)));
    tokio::task::spawn_local(feed_watchdog(door, server.heard()));
    let serving = tokio::task::spawn_local(async move { server.serve(&listener).await });
    let ended = tokio::task::spawn_local(async move {
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            // It has no end but a panic. A supervisor that hears nobody is worse than none: the next one takes over.
            deaf = serving => Err(deaf),
        }
    });
    if let Ok(Err(deaf)) = ended.await {
        return Err(StartError::Io { step: "accepting connections", error: std::io::Error::other(format!("{deaf:?}")) });
    }
    tell_manager(&[NotifyState::Stopping]);
    // VMs live on, and the next supervisor finds them in the ledger.
    let vms = supervisor.slots.borrow().len();
    supervisor.note(&if vms == 0 { "stopped by a signal".to_owned() } else { format!("stopped by a signal; {vms} VMs stay as they are") });
    tracing::info!("stopping; VMs run on");
    Ok(())
}

fn tell_manager(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager can't be told");
    }
}

/// Feeds the service manager's watchdog as long as somebody who knocks at our own door is heard: the loop turns, connections are accepted,
/// and their peers are looked up. When the door is so crowded that we don't come through ourselves, those who did say the same.
async fn feed_watchdog(door: PathBuf, heard: Rc<Cell<u64>>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    loop {
        let before = heard.get();
        tokio::time::sleep((limit / 3).max(Duration::from_millis(100))).await;
        match tokio::time::timeout(limit / 3, crate::server::knock(&door)).await {
            Ok(Ok(())) => tell_manager(&[NotifyState::Watchdog]),
            _ if heard.get() > before => tell_manager(&[NotifyState::Watchdog]),
            Ok(Err(error)) => tracing::error!(%error, "our own door is shut: the watchdog is not fed"),
            Err(_) => tracing::error!("nobody answers our own door: the watchdog is not fed"),
        }
    }
}
