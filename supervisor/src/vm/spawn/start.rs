//! From a start that was vetted to a QEMU that runs: what changes the host, in order. What fails leaves no process, or names those that do not end.

use super::{Carrier, Launch, Lent};
use crate::audit::now_ms;
use crate::kvm;
use crate::ledger::{Companion, CompanionKind, Ledger, Record};
use crate::state::Supervisor;
use crate::vetted::Vetted;
use crate::vfio::{self, Passed};
use crate::vm::companion::{self, virtiofsd};
use crate::vm::lingering::NotStarted;
use crate::vm::scope::{self, Scope};
use crate::vm::{jail, sockets};
use diarch_ipc::Error;
use diarch_ipc::name::Slot;
use diarch_ipc::operation::Operation;
use diarch_ipc::spec::Accelerator;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// Between the opened gate and QEMU's exec lie a few dozen system calls.
const EXEC_PATIENCE: Duration = Duration::from_secs(5);
/// Descriptors for disks and for the connections of user-mode networking.
const MAX_OPEN_FILES: u64 = 4096;
/// The only place that QEMU can write, and how much: sockets and small files. It counts as memory of its scope.
const OWN_DIRECTORY: &str = "/run/vm";
const OWN_BYTES: u64 = 16 * 1024 * 1024;
/// Where Debian, Fedora and their like keep QEMU's firmware, option ROMs and keymaps; some are links into others.
const FIRMWARE: [&str; 12] = [
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/share/seavgabios",
    "/usr/share/sgabios",
    "/usr/share/vgabios",
    "/usr/share/ipxe",
    "/usr/share/OVMF",
    "/usr/share/ovmf",
    "/usr/share/AAVMF",
    "/usr/share/edk2",
    "/usr/share/qemu-efi-aarch64",
    "/usr/share/qemu-kvm",
];

/// How far QEMU itself reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Nowhere,
    /// Its user-mode network opens the guest's connections, and listens for its forwards, as a process of the host.
    Host,
}

/// A QEMU that waits at its gate, with its companions at theirs; the ledger knows them.
struct Waiting {
    gated: jail::Gated,
    companions: Vec<companion::Waiting>,
    scope: Scope,
    qmp: OwnedFd,
    record: Record,
}

/// A QEMU that runs.
pub(super) struct Launched {
    pub(super) pidfd: OwnedFd,
    pub(super) companions: Vec<(CompanionKind, OwnedFd)>,
    pub(super) qmp: OwnedFd,
    pub(super) record: Record,
}

/// A tap needs nothing but its descriptors, and neither does a card that somebody else carries.
pub(super) fn reach(launch: &Launch, carrier: Carrier) -> Reach {
    if launch.user_mode && carrier == Carrier::Slirp { Reach::Host } else { Reach::Nowhere }
}

/// From here on the host changes. What fails leaves no process.
pub(super) async fn launch(
    supervisor: &Rc<Supervisor>,
    row: &'static Operation,
    slot: Slot,
    vetted: Vetted<Launch>,
    lent: Lent,
) -> Result<Launched, Box<NotStarted>> {
    let ledger = supervisor.ledger.clone();
    let waiting = supervisor.act(row, slot, "fork QEMU", move || fork(vetted, lent, &ledger)).await??;
    if supervisor.scopes
        && let Err(error) = scope::enclose(&waiting.scope, &waiting.children()).await
    {
        // A child that failed while its scope was made is what the scope failed for.
        let error = waiting.children().into_iter().find_map(jail::Gated::failure).unwrap_or(error);
        // Its gate is closed, and its end waited for, on a helper: never in the loop.
        let record = Some(waiting.record.clone());
        let left = supervisor.act(row, slot, "end the child", move || waiting.close()).await.unwrap_or_default();
        return Err(Box::new(NotStarted { error, left, record }));
    }
    supervisor.act(row, slot, "start QEMU", move || open(waiting)).await?
}

impl Waiting {
    fn children(&self) -> Vec<&jail::Gated> {
        self.companions.iter().map(|one| &one.gated).chain([&self.gated]).collect()
    }

    /// None of them goes on. Gives those that do not end.
    fn close(self) -> Vec<OwnedFd> {
        self.gated.close().into_iter().chain(companion::close(self.companions)).collect()
    }
}

fn fork(vetted: Vetted<Launch>, lent: Lent, ledger: &Ledger) -> Result<Waiting, Box<NotStarted>> {
    let (mut gated, mut companions) = (None, Vec::new());
    let made = fork_into(vetted.into_inner(), lent, ledger, &mut gated, &mut companions);
    match (made, gated) {
        (Ok((scope, qmp, record)), Some(gated)) => Ok(Waiting { gated, companions, scope, qmp, record }),
        (made, gated) => {
            let nobody = || Error::Failed { step: "clone".into(), errno: None, detail: "no child".into() };
            let left = gated.and_then(jail::Gated::close).into_iter().chain(companion::close(companions)).collect();
            Err(Box::new(NotStarted { error: made.err().unwrap_or_else(nobody), left, record: None }))
        }
    }
}

/// What was made until something failed is in the last two.
fn fork_into(
    mut launch: Launch,
    lent: Lent,
    ledger: &Ledger,
    made: &mut Option<jail::Gated>,
    companions: &mut Vec<companion::Waiting>,
) -> Result<(Scope, OwnedFd, Record), Error> {
    let Lent { copies, queues, carrier } = lent;
    let network = reach(&launch, carrier);
    if carrier == Carrier::Slirp {
        launch.passt.clear();
        launch.argv = launch.argv_alone;
        if let Some(run) = &mut launch.record.run {
            run.egress = None;
        }
    }
    let directory = ledger.directory(launch.record.slot);
    let step = |name: &'static str| move |error: io::Error| Error::io(name, &error);
    let null: OwnedFd = File::options().read(true).write(true).open("/dev/null").map_err(step("open /dev/null"))?.into();
    let qmp_listener = sockets::listener(&directory, sockets::QMP).map_err(step("QMP socket"))?;
    let console_listener = sockets::listener(&directory, sockets::CONSOLE).map_err(step("console socket"))?;
    let qmp = sockets::connection(&directory, sockets::QMP).map_err(step("connect to QMP"))?;

    let mut given = launch.fds.into_inner().into_iter();
    let (Some(log), Some(console_log)) = (given.next(), given.next()) else {
        return Err(Error::invalid("fds", "log and console are needed"));
    };
    let log_again = log.try_clone().map_err(step("dup"))?;
    let limits = jail::Limits { tasks: launch.max_tasks, open_files: MAX_OPEN_FILES, locked_bytes: jail::LOCKED_BYTES };
    let mut connections = Vec::new();
    let (granted, uid) = (launch.virtiofsd.as_ref(), launch.record.uid);
    let serving = launch.shares.into_iter().zip(copies).map(|((_, opened), copy)| virtiofsd::order(opened, granted, uid, copy));
    for order in launch.passt.into_iter().chain(serving) {
        let (one, connection) = order.fork(&directory, uid, limits, &log)?;
        companions.push(one);
        connections.push(connection);
    }
    let mut fds = vec![null, log, log_again, qmp_listener, console_listener, console_log];
    let descriptors = launch.descriptors.into_iter().flat_map(|given| std::iter::once(given.iommu).chain(given.devices));
    // In the order that `argv` counts on.
    fds.extend(given.chain(queues).chain(launch.vhost).chain(connections).chain(descriptors));
    let plan = jail::Plan {
        program: launch.program,
        argv: launch.argv,
        fds,
        uid: launch.record.uid,
        groups: if launch.accelerator == Accelerator::Kvm { kvm::device_group().into_iter().collect() } else { Vec::new() },
        limits: jail::Limits { locked_bytes: launch.memlock.unwrap_or(jail::LOCKED_BYTES), ..limits },
        root: with_devices(root(launch.record.uid, launch.accelerator, network, launch.libraries), &launch.devices),
        network: if network == Reach::Host { jail::Network::Host } else { jail::Network::Own },
        sockets: if network == Reach::Host { jail::Sockets::Internet } else { jail::Sockets::Unix },
        sandbox: jail::Sandbox::Ours,
        walls: launch.walls,
    };
    let gated = made.insert(jail::fork(plan)?);
    // Nothing runs yet: if the ledger can't take the pid, the gate closes and the child goes.
    if let Some(run) = &mut launch.record.run {
        run.process = Some(companion::identity(gated)?);
        for one in companions.iter() {
            run.companions.push(Companion { kind: one.kind, process: companion::identity(&one.gated)? });
        }
        run.spawned_ms = now_ms();
    }
    ledger.write(&launch.record).map_err(step("ledger"))?;
    Ok((launch.scope, qmp, launch.record))
}

/// With the host's firmware for QEMU.
pub fn firmware(root: jail::Root) -> jail::Root {
    FIRMWARE.into_iter().fold(root, jail::Root::host_if_there)
}

/// What QEMU finds: its libraries and firmware, its devices, a directory of its own.
pub(super) fn root(uid: u32, accelerator: Accelerator, network: Reach, libraries: Vec<(PathBuf, OwnedFd)>) -> jail::Root {
    let mut root = firmware(jail::Root::of_a_program());
    for (path, directory) in libraries {
        root = root.opened(path, directory);
    }
    if accelerator == Accelerator::Kvm {
        root = root.node(kvm::DEVICE);
    }
    if network == Reach::Host {
        // Its user-mode network asks the host's name servers for the guest.
        root = root.host_if_there("/etc/resolv.conf");
    }
    root.own(OWN_DIRECTORY, uid, OWN_BYTES)
}

/// And what it needs of its devices: their nodes, and what sysfs shows of them, to read.
pub(super) fn with_devices(root: jail::Root, devices: &[Passed]) -> jail::Root {
    let groups: std::collections::BTreeSet<u32> = devices.iter().map(|passed| passed.group).collect();
    let root = vfio::node::names(groups).iter().fold(root, |root, node| root.node(node));
    devices.iter().fold(root, |root, passed| root.host_if_there(&format!("/sys/{}", passed.path)))
}

fn open(waiting: Waiting) -> Result<Launched, Box<NotStarted>> {
    let Waiting { gated, companions, qmp, record, .. } = waiting;
    let (slot, pid) = (record.slot, gated.pid);
    let companions = match companion::open(companions, EXEC_PATIENCE) {
        Ok(companions) => companions,
        Err(mut failed) => {
            failed.left.extend(gated.close());
            failed.record = Some(record);
            return Err(failed);
        }
    };
    match gated.open(EXEC_PATIENCE) {
        Ok(pidfd) => Ok(Launched { pidfd, companions, qmp, record }),
        Err(mut failed) => {
            failed.left.extend(companion::end(companions));
            tracing::warn!(%slot, pid, error = %failed.error, "QEMU was not started");
            failed.record = Some(record);
            Err(failed)
        }
    }
}
