//! Companions: programs that run beside a VM's QEMU, for it alone, each in a jail of its own and joined to it by one connection.
//!
//! ```text
//!   QEMU (no network, no directory)  --stream-- passt          sockets of the host, no file        a card of user-mode networking
//!                                    --vhost-user-- virtiofsd  one mount, no network               a shared directory
//! ```
//!
//! What a guest can reach by breaking its QEMU is thus a protocol that somebody else parses. A companion has the slot's user, and its scope.
//!
//! ```text
//!   fork companions (gates closed) -> fork QEMU -> all of them into the ledger -> all into the scope -> gates open, QEMU's last
//! ```
//!
//! They end with QEMU: by themselves, when the connection does, and killed by us before its end is told, so that the next start finds their ports free. One that
//! ends while QEMU lives is told by the event `vm.impaired`.

pub mod passt;
pub mod virtiofsd;

use super::jail::{self, Gated};
use super::lingering::{self, NotStarted};
use super::{release, sockets};
use crate::host::Host;
use crate::ledger::{Companion, CompanionKind, Record};
use crate::process;
use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::name::{RequestId, Slot, Tenancy};
use diarch_ipc::operation::{Event, ExitStatus, SlotState};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Where a companion finds its end of the connection; 0 is `/dev/null`, 1 and 2 are the VM's log.
pub const TALK_FD: i32 = 3;
/// Threads of one companion at most.
pub const TASKS: u64 = 16;
/// QEMU's connections end a moment before QEMU does, and its companions then end too.
const QEMU_MAY_END: Duration = Duration::from_secs(1);
/// Between two looks.
const AGAIN: Duration = Duration::from_millis(20);
/// A killed process ends at once; the end of QEMU is told no later than this.
const END_PATIENCE: Duration = Duration::from_secs(1);
/// A worker that was lost with an earlier supervisor is back by then.
const WORKER_PATIENCE: Duration = Duration::from_secs(60);

/// A companion to be.
#[derive(Debug)]
pub struct Order {
    pub kind: CompanionKind,
    pub program: OwnedFd,
    pub argv: Vec<String>,
    pub libraries: Vec<(PathBuf, OwnedFd)>,
    pub root: jail::Root,
    pub network: jail::Network,
    pub sockets: jail::Sockets,
    pub sandbox: jail::Sandbox,
    pub talk: Talk,
    pub open_files: u64,
}

/// What it has of the connection to QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Talk {
    /// Its end.
    Connected,
    /// A listening socket, from which it takes it; its name is gone before anybody runs.
    Listener,
}

/// One that waits at its gate.
#[derive(Debug)]
pub struct Waiting {
    pub kind: CompanionKind,
    pub gated: Gated,
}

impl Order {
    /// Forks it. Gives QEMU's end of the connection too, which nobody else has.
    pub fn fork(self, directory: &Path, uid: u32, limits: jail::Limits, log: &OwnedFd) -> Result<(Waiting, OwnedFd), Error> {
        let step = |name: &'static str| move |error: io::Error| Error::io(name, &error);
        let null: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/null").map_err(step("open /dev/null"))?.into();
        let (ours, theirs) = self.talk.pair(directory).map_err(step("a companion's connection"))?;
        let limits = jail::Limits { open_files: self.open_files, ..limits };
        let copy = || log.try_clone().map_err(step("dup"));
        let root = self.libraries.into_iter().fold(self.root, |root, (path, directory)| root.opened(path, directory));
        let gated = jail::fork(jail::Plan {
            program: self.program,
            argv: self.argv,
            fds: vec![null, copy()?, copy()?, theirs],
            uid,
            groups: Vec::new(),
            limits,
            root,
            network: self.network,
            sockets: self.sockets,
            sandbox: self.sandbox,
            walls: jail::Walls::Jail,
        })?;
        Ok((Waiting { kind: self.kind, gated }, ours))
    }
}

impl Talk {
    /// QEMU's end, and the companion's.
    fn pair(self, directory: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
        const NAME: &str = "companion.sock";
        match self {
            Talk::Connected => UnixStream::pair().map(|(ours, theirs)| (ours.into(), theirs.into())),
            Talk::Listener => {
                let listener = sockets::listener(directory, NAME)?;
                let connection = sockets::connection(directory, NAME)?;
                std::fs::remove_file(directory.join(NAME))?;
                Ok((connection, listener))
            }
        }
    }
}

/// How a process is found again.
pub fn identity(gated: &Gated) -> Result<crate::ledger::Process, Error> {
    let identity = process::identity(gated.pid).map_err(|error| Error::io("read /proc", &error))?;
    let (start_time, _) = identity.ok_or_else(|| Error::Failed { step: "read /proc".into(), errno: None, detail: "the child has no stat".into() })?;
    Ok(crate::ledger::Process { pid: gated.pid, start_time })
}

/// Lets all of them go on. When one can't, none is left.
pub fn open(waiting: Vec<Waiting>, within: Duration) -> Result<Vec<(CompanionKind, OwnedFd)>, Box<NotStarted>> {
    let mut running = Vec::new();
    let mut waiting = waiting.into_iter();
    while let Some(one) = waiting.next() {
        match one.gated.open(within) {
            Ok(pidfd) => running.push((one.kind, pidfd)),
            Err(mut failed) => {
                failed.left.extend(end(running));
                failed.left.extend(close(waiting));
                return Err(failed);
            }
        }
    }
    Ok(running)
}

/// Tells those at their gates to go. Gives those that do not end.
pub fn close(waiting: impl IntoIterator<Item = Waiting>) -> Vec<OwnedFd> {
    waiting.into_iter().filter_map(|one| one.gated.close()).collect()
}

/// Kills them and waits until they have ended. Gives those that have not.
pub fn end(running: Vec<(CompanionKind, OwnedFd)>) -> Vec<OwnedFd> {
    lingering::kill(running.into_iter().map(|(_, pidfd)| pidfd).collect(), lingering::KILLED)
}

/// Those of a record that live. A child that was caught before its gate is root's still.
pub fn find(record: &Record, host: &Host) -> io::Result<Vec<(CompanionKind, OwnedFd)>> {
    let mut found = Vec::new();
    for Companion { kind, process } in record.run.iter().flat_map(|run| &run.companions) {
        // Looked at as the VM's user again, since it may become that in between.
        let user = host.user_of(record.uid);
        for uid in [user, host.owner(), user] {
            if let Some(pidfd) = process::find(*process, uid)? {
                found.push((*kind, pidfd));
                break;
            }
        }
    }
    Ok(found)
}

/// Ends those of a record that live: their QEMU does not.
pub fn end_left(record: &Record, host: &Host) -> Result<(), Error> {
    let left = find(record, host).map_err(|error| Error::io("look at the companions", &error))?;
    release::end_all(left.into_iter().map(|(_, pidfd)| pidfd).collect())
}

/// Watches one of the QEMU that the request `spawn` started in `slot`.
pub fn watch(supervisor: &Rc<Supervisor>, slot: Slot, spawn: RequestId, kind: CompanionKind, pidfd: Rc<OwnedFd>) {
    let supervisor = Rc::clone(supervisor);
    tokio::task::spawn_local(async move {
        while let Err(error) = ended(&pidfd).await {
            tracing::error!(%slot, companion = kind.as_str(), %error, "a companion can't be watched; trying again");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let status = match process::reap_child(&pidfd) {
            Some(status) => status,
            None => match pidfd.try_clone() {
                Ok(copy) => supervisor.helpers.run("reap", move || process::reap(&copy)).await.unwrap_or(ExitStatus::Unknown),
                Err(_) => ExitStatus::Unknown,
            },
        };
        impaired(&supervisor, slot, spawn, kind, &format!("ended with {status}")).await;
    });
}

async fn ended(pidfd: &Rc<OwnedFd>) -> io::Result<()> {
    // Deprecated for types whose descriptor may change or close under it; an `Rc<OwnedFd>`'s can't while we hold it.
    #[allow(deprecated)]
    let watched = AsyncFd::with_interest(Rc::clone(pidfd), Interest::READABLE)?;
    drop(watched.readable().await?);
    Ok(())
}

/// Says that a QEMU runs on without a part of it, unless it was just ending itself.
pub async fn impaired(supervisor: &Rc<Supervisor>, slot: Slot, spawn: RequestId, kind: CompanionKind, how: &str) {
    let alive = || {
        let slots = supervisor.slots.borrow();
        let vm = slots.get(&slot).filter(|vm| vm.record.state == SlotState::Running && vm.record.run.as_ref().is_some_and(|run| run.spawn == spawn))?;
        let lives = vm.pidfd.as_ref().is_some_and(|pidfd| diarch_ipc::peer::alive(pidfd).unwrap_or(true));
        lives.then(|| vm.record.label.clone())
    };
    for _ in 0..QEMU_MAY_END.as_millis() / AGAIN.as_millis() {
        if alive().is_none() {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
    let Some(label) = alive() else { return };
    let name = kind.as_str();
    let what = format!(
        "{name} {how}: {}",
        match kind {
            CompanionKind::Passt => "the guest's user-mode network is gone",
            CompanionKind::Virtiofsd => "a share of the guest's does not answer any more",
        }
    );
    tracing::error!(%slot, %label, "{what}");
    supervisor.note(&format!("vm.impaired slot={slot} label={label} {what}"));
    // For a worker that was away when it was told, and attaches.
    if let Some(vm) = supervisor.slots.borrow_mut().get_mut(&slot) {
        vm.impaired = Some(what.clone());
    }
    // After a restart of ours the worker may not be back yet.
    let until = tokio::time::Instant::now() + WORKER_PATIENCE;
    while !supervisor.sessions.is_there() && tokio::time::Instant::now() < until {
        tokio::time::sleep(QEMU_MAY_END).await;
    }
    if alive().is_some() {
        supervisor.sessions.tell(Event::VmImpaired { slot, label, what, spawn });
    }
}

/// QEMU has ended: so do they, before that is told.
pub async fn end_with(supervisor: &Rc<Supervisor>, slot: Slot, spawn: RequestId) {
    let left = {
        let mut slots = supervisor.slots.borrow_mut();
        let vm = slots.get_mut(&slot).filter(|vm| vm.record.run.as_ref().is_some_and(|run| run.spawn == spawn));
        vm.map(|vm| std::mem::take(&mut vm.companions)).unwrap_or_default()
    };
    for pidfd in &left {
        let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
    }
    let until = tokio::time::Instant::now() + END_PATIENCE;
    let mut lingering = Vec::new();
    for pidfd in left {
        // A descriptor of its own: the loop polls one only once, and its watch polls that.
        let Ok(pidfd) = pidfd.try_clone().map(Rc::new) else {
            tracing::error!(%slot, "the end of a killed companion can't be waited for: no descriptor is left");
            continue;
        };
        match tokio::time::timeout_at(until, ended(&pidfd)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%slot, %error, "the end of a killed companion can't be waited for"),
            Err(_) => lingering.extend(Rc::into_inner(pidfd)),
        }
    }
    let tenancy = supervisor.slots.borrow().get(&slot).map(|vm| Tenancy { slot, claim: vm.record.claim });
    if let Some(tenancy) = tenancy.filter(|_| !lingering.is_empty()) {
        lingering::keep(supervisor, tenancy, lingering, "a program beside its QEMU, which has ended,", |_| ());
    }
}
