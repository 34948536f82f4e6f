//! `vm.spawn`: QEMU in a claimed slot.
//!
//! ```text
//!   facts   what the descriptors are, the granted binary opened and hashed        (helper thread; changes nothing)
//!   vet     pure: request x grants x ledger x facts -> Vetted<Launch>
//!   record  state spawning, and who asked
//!   act     the packet filter, where a process beside QEMU carries its network       (see `companion`)
//!           its taps' queues, which the supervisor held until now                   (see `net::held`)
//!           sockets, the children in their jails, pids into the ledger              (helper thread; see `jail`)
//!           their scope, where systemd runs us                                      (see `scope`)
//!           gates open, QEMU's last; exec                                           (helper thread)
//!   record  state running
//! ```
//!
//! Killed anywhere in between, the supervisor leaves either nothing or a QEMU whose pid the ledger knows.

use super::argv::{Beside, Carrier};
use super::companion::{self, Order, passt, virtiofsd};
use super::lingering::{self, NotStarted};
use super::scope::{self, Scope};
use super::{ability, argv, jail, sockets, stage, watch};
use crate::audit::now_ms;
use crate::grants::{Grants, Program};
use crate::ledger::{Companion, CompanionKind, Ledger, Record, Run};
use crate::state::{Supervisor, Vm};
use crate::vetted::Vetted;
use crate::vfio::iommufd::Descriptors;
use crate::vfio::{self, Passed};
use crate::{fd, kvm, mount, net, qemu};
use diarch_ipc::Error;
use diarch_ipc::frame::encode;
use diarch_ipc::name::{RequestId, ShareName, Slot, Tenancy};
use diarch_ipc::operation::{KvmVerdict, Operation, Passing, SlotState, Spawn, Spawned};
use diarch_ipc::spec::{Accelerator, Backend, Boot, DiskFormat, Egress, MAX_DEVICES, MAX_DISKS, MAX_FORWARDS, MAX_NICS, Nic, Presence, VmSpec};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Between the opened gate and QEMU's exec lie a few dozen system calls.
const EXEC_PATIENCE: Duration = Duration::from_secs(5);
/// QEMU's own threads beside the vCPUs: main, I/O workers (64 at most), RCU and some room.
const OWN_TASKS: u64 = 160;
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
/// What is locked beside the guest's memory and the device's: QEMU's and the kernel's own, as much as libvirt leaves.
const LOCKED_BESIDE_MIB: u64 = 1024;

/// What is known before anything is decided.
struct Facts {
    program: File,
    hashed: Option<qemu::Hashed>,
    /// The descriptors, interrogated.
    fds: Vec<OwnedFd>,
    /// The binary's own directories, opened.
    libraries: Vec<(PathBuf, OwnedFd)>,
    walls: jail::Walls,
    /// `/dev/vhost-net`, for each queue of a tap.
    vhost: Vec<OwnedFd>,
    /// The devices that are bound for it.
    devices: Vec<Passed>,
    /// They, opened, where kernel and QEMU know iommufd; otherwise they go by their groups' nodes.
    descriptors: Option<Descriptors>,
    /// What QEMU was asked, and said.
    ability: Option<qemu::Ability>,
    /// What this process may let a child lock, in bytes; `None`: all.
    lockable: Option<u64>,
    /// The devices are a stage's, and nothing reads the guest's memory.
    staged: bool,
    passt: passt::Facts,
    /// For each share.
    virtiofsd: Vec<virtiofsd::Opened>,
}

/// A start that was vetted.
#[derive(Debug)]
struct Launch {
    record: Record,
    argv: Vec<String>,
    /// The same, with QEMU carrying its user-mode cards itself: should the packet filter not take what a process beside it must be held to.
    argv_alone: Vec<String>,
    passt: Vec<Order>,
    /// Why there is none, though it is granted.
    instead: Option<String>,
    /// What its guest is to see, with the program that serves each.
    shares: Vec<(ShareName, virtiofsd::Opened)>,
    virtiofsd: Option<Program>,
    program: OwnedFd,
    fds: Vec<OwnedFd>,
    vhost: Vec<OwnedFd>,
    libraries: Vec<(PathBuf, OwnedFd)>,
    accelerator: Accelerator,
    /// Whether it has a card of user-mode networking.
    user_mode: bool,
    max_tasks: u64,
    /// Bytes of memory that it may lock: with a device, all of the guest's.
    memlock: Option<u64>,
    /// Those that it finds by their groups' nodes.
    devices: Vec<Passed>,
    descriptors: Option<Descriptors>,
    scope: Scope,
    walls: jail::Walls,
}

/// How far QEMU itself reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Nowhere,
    /// Its user-mode network opens the guest's connections, and listens for its forwards, as a process of the host.
    Host,
}

/// What is held for the VM, for this start of it.
struct Lent {
    /// Of its mounts.
    copies: Vec<OwnedFd>,
    /// Of its taps, card by card.
    queues: Vec<OwnedFd>,
    carrier: Carrier,
}

/// The answer, with the pidfd and a connection to the monitor.
type Started = (Spawned, Vec<Rc<OwnedFd>>);

/// A QEMU that waits at its gate, with its companions at theirs; the ledger knows them.
struct Waiting {
    gated: jail::Gated,
    companions: Vec<companion::Waiting>,
    scope: Scope,
    qmp: OwnedFd,
    record: Record,
}

/// A QEMU that runs.
struct Launched {
    pidfd: OwnedFd,
    companions: Vec<(CompanionKind, OwnedFd)>,
    qmp: OwnedFd,
    record: Record,
}

pub async fn spawn(supervisor: &Rc<Supervisor>, row: &'static Operation, id: RequestId, ask: Spawn, fds: Vec<OwnedFd>) -> Result<Started, Error> {
    let (tenancy, slot) = (ask.tenancy, ask.tenancy.slot);
    // Not waited for: whoever asks for two VMs in one slot at one time has lost count, and a queue here would hold descriptors.
    let _lock = supervisor.try_lock(tenancy)?;
    if let Some(answer) = asked_before(supervisor, id, &ask)? {
        return Ok(answer);
    }
    supervisor.check_state(row, tenancy)?;
    let devices = vfio::attach::reserve(supervisor, tenancy, &ask.spec.devices).await?;
    let facts = match gather(supervisor, row, &ask, fds, devices.passed.clone()).await {
        Ok(facts) => facts,
        Err(failed) => {
            let NotStarted { error, left, .. } = *failed;
            if !left.is_empty() {
                lingering::keep(supervisor, tenancy, left, "a QEMU that was asked what it can do", |_| ());
            }
            return Err(error);
        }
    };
    let (hashed, ability) = (facts.hashed.clone(), facts.ability);
    let passing = if facts.descriptors.is_some() { Passing::Iommufd } else { Passing::Group };
    let granted = supervisor.grants.qemu.get(ask.spec.qemu.as_str());
    if let (Some(ability), Some(granted)) = (ability, granted) {
        supervisor.abilities.put(&granted.path, ability);
    }

    let vetted = vet(&supervisor.grants, &supervisor.slots.borrow(), &supervisor.kvm.borrow(), id, &ask, facts)?;

    let before = supervisor.with(tenancy, |vm| vm.record.clone())?;
    let intended = vetted.record.clone();
    supervisor.record(intended.clone())?;

    if let Err(error) = devices.attach(supervisor, row, slot, before.uid, passing).await {
        supervisor.record_or_believe(before);
        return Err(error);
    }
    let launched = match lend(supervisor, row, &vetted, &ask, &before).await {
        Ok(lent) => launch(supervisor, row, slot, vetted, lent).await,
        Err(error) => Err(error.into()),
    };
    let launched = match launched {
        Ok(launched) => launched,
        Err(failed) => {
            let NotStarted { error, left, record } = *failed;
            if left.is_empty() {
                devices.detach(supervisor, row, slot).await;
                supervisor.record_or_believe(before);
                // It has no process, and no record speaks of its rules any more.
                net::forget_user(supervisor, row, &intended).await;
            } else {
                // Spawning still, with all that it was given, until the last of it has ended.
                record.into_iter().for_each(|record| supervisor.record_or_believe(record));
                lingering::keep(supervisor, tenancy, left, "the child of a start that failed", move |supervisor| {
                    if supervisor.with(tenancy, |vm| vm.record.state) == Ok(SlotState::Spawning) {
                        supervisor.record_or_believe(before);
                        vfio::attach::ended(supervisor, tenancy);
                        let supervisor = Rc::clone(supervisor);
                        tokio::task::spawn_local(async move { net::forget_user(&supervisor, row, &intended).await });
                    }
                });
            }
            return Err(error);
        }
    };
    if let (Some(hashed), Some(granted)) = (hashed, granted) {
        supervisor.hashes.put(&granted.path, hashed);
    }

    let mut record = launched.record;
    record.state = SlotState::Running;
    let answer = spawned(&record)?;
    // The ledger has the pid already; without this write a restarted supervisor looks at the process and finds the same.
    supervisor.record_or_believe(record);
    let pidfd = Rc::new(launched.pidfd);
    let companions: Vec<_> = launched.companions.into_iter().map(|(kind, pidfd)| (kind, Rc::new(pidfd))).collect();
    if let Some(vm) = supervisor.slots.borrow_mut().get_mut(&slot) {
        vm.pidfd = Some(Rc::clone(&pidfd));
        vm.companions = companions.iter().map(|(_, pidfd)| Rc::clone(pidfd)).collect();
        vm.impaired = None;
        vm.adopted = false;
    }
    for (kind, pidfd) in companions {
        companion::watch(supervisor, slot, id, kind, pidfd);
    }
    watch::begin(supervisor, slot, id, Rc::clone(&pidfd));
    Ok((answer, vec![pidfd, Rc::new(launched.qmp)]))
}

fn spawned(record: &Record) -> Result<Spawned, Error> {
    let run = record.run.as_ref().and_then(|run| Some((run, run.process?)));
    let (run, process) = run.ok_or_else(|| Error::Failed { step: "ledger".into(), errno: None, detail: "the record holds no process".into() })?;
    Ok(Spawned { pid: process.pid, spawned_ms: run.spawned_ms })
}

/// The same request, repeated by a worker that lost the connection: the same answer, with fresh connections.
fn asked_before(supervisor: &Supervisor, id: RequestId, ask: &Spawn) -> Result<Option<Started>, Error> {
    let slot = ask.tenancy.slot;
    let (record, pidfd) = supervisor.with(ask.tenancy, |vm| (vm.record.clone(), vm.pidfd.clone()))?;
    match &record.run {
        Some(run) if run.spawn == id && run.asked == digest(ask)? => {}
        Some(run) if run.spawn == id => return Err(Error::invalid("id", format!("under this id, another VM was started in slot {slot}"))),
        _ => return Ok(None),
    }
    match (record.state, pidfd) {
        (SlotState::Running, Some(pidfd)) => {
            let qmp = sockets::connection(&supervisor.ledger.directory(slot), sockets::QMP).map_err(|error| Error::io("connect to QMP", &error))?;
            Ok(Some((spawned(&record)?, vec![pidfd, Rc::new(qmp)])))
        }
        (state, _) => {
            let how = record.run.and_then(|run| run.exit).map_or_else(|| "has ended".to_owned(), |exit| format!("has ended with {exit}"));
            Err(Error::WrongState { state: state.as_str().into(), reason: format!("this very request started QEMU in slot {slot}, which {how} since") })
        }
    }
}

/// SHA-256 of the request's one encoding, hex.
fn digest(ask: &Spawn) -> Result<String, Error> {
    let mut bytes = Vec::new();
    encode(ask, &mut bytes)?;
    Ok(Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}

async fn gather(supervisor: &Rc<Supervisor>, row: &Operation, ask: &Spawn, fds: Vec<OwnedFd>, devices: Vec<Passed>) -> Result<Facts, Box<NotStarted>> {
    let name = ask.spec.qemu.as_str().to_owned();
    let Some(granted) = supervisor.grants.qemu.get(&name).cloned() else {
        let known: Vec<&str> = supervisor.grants.qemu.keys().map(String::as_str).collect();
        return Err(Error::denied(
            format!("qemu.{name}"),
            format!("there is no such section; there are: {}", if known.is_empty() { "none".into() } else { known.join(", ") }),
        )
        .into());
    };
    let known = supervisor.hashes.get(&granted.path);
    let said = supervisor.abilities.get(&granted.path);
    let roles = ask.spec.fds();
    let (owner, walls) = (supervisor.host.owner(), supervisor.host.walls());
    let (uid, by_descriptor) = (supervisor.with(ask.tenancy, |vm| vm.record.uid)?, supervisor.grants.devices.iommufd && walls == jail::Walls::Jail);
    let (queues, vhost) = (ask.spec.nics.iter().map(Nic::queues).sum(), net::tap::vhost_node(&supervisor.host));
    let staged = supervisor.host.is_staged();
    let (grants, host, spec) = (supervisor.grants.clone(), Arc::clone(&supervisor.host), ask.spec.clone());
    let formats: Vec<DiskFormat> = ask.spec.disks.iter().map(|disk| disk.format).collect();
    supervisor
        .act(row, ask.tenancy.slot, "look at the files", move || {
            for (index, (fd, role)) in fds.iter().zip(&roles).enumerate() {
                fd::interrogate(fd, *role, index)?;
            }
            let disks = fds.iter().enumerate().zip(&roles).filter(|(_, role)| role.name == "disk").map(|(fd, _)| fd);
            for ((index, fd), format) in disks.zip(&formats) {
                if *format == DiskFormat::Qcow2 {
                    fd::no_external_data(fd, index)?;
                }
            }
            let vhost = if walls == jail::Walls::Stage { Vec::new() } else { net::tap::vhost(&vhost, queues) };
            let (program, hashed) = qemu::open(&name, &granted, owner, known)?;
            let libraries = qemu::libraries(&name, &granted)?;
            let lockable = rustix::process::getrlimit(rustix::process::Resource::Memlock).maximum;
            let passt = passt::look(&grants, &host, &spec);
            let virtiofsd = virtiofsd::look(&grants, &host, &spec)?;
            let (mut descriptors, mut ability) = (None, None);
            if by_descriptor && !devices.is_empty() && vfio::iommufd::offered(&host, &devices)? {
                let known = match said.filter(|said| said.is_of(&program)) {
                    Some(known) => known,
                    None => ask_ability(&program, &granted.path.to_string_lossy(), uid, &libraries)?,
                };
                ability = Some(known);
                if known.iommufd {
                    descriptors = vfio::iommufd::open(&host, &devices)?;
                }
            }
            Ok(Facts { program, hashed, fds, libraries, walls, vhost, devices, descriptors, ability, lockable, staged, passt, virtiofsd })
        })
        .await?
}

fn ask_ability(program: &File, path: &str, uid: u32, libraries: &[(PathBuf, OwnedFd)]) -> Result<qemu::Ability, Box<NotStarted>> {
    let failed = |error: io::Error| Error::io("ask QEMU what it can do", &error);
    let copies = libraries.iter().map(|(path, opened)| Ok((path.clone(), opened.try_clone()?))).collect::<io::Result<_>>().map_err(failed)?;
    let root = root(uid, Accelerator::Tcg, Reach::Nowhere, copies);
    let iommufd = ability::takes_iommufd(program.try_clone().map_err(failed)?.into(), path, uid, root)?;
    qemu::Ability::of(program, iommufd).map_err(|error| failed(error).into())
}

/// Everything that can be refused is refused here.
fn vet(grants: &Grants, slots: &BTreeMap<Slot, Vm>, kvm: &KvmVerdict, id: RequestId, ask: &Spawn, mut facts: Facts) -> Result<Vetted<Launch>, Error> {
    let vm = Supervisor::tenant(slots, ask.tenancy)?;
    let slot = ask.tenancy.slot;
    let spec = &ask.spec;
    admit_shape(spec)?;
    admit_resources(grants, slots, slot, spec)?;
    admit_network(grants, slots, slot, spec)?;
    admit_taps(&vm.record, spec)?;
    admit_accelerator(grants, kvm, spec)?;
    let granted = grants.qemu.get(spec.qemu.as_str()).ok_or_else(|| Error::denied(format!("qemu.{}", spec.qemu), "there is no such section"))?;
    let (passt, egress, instead) = match passt::orders(std::mem::replace(&mut facts.passt, passt::Facts::Unasked), grants.passt.as_ref(), spec) {
        Ok((orders, egress)) => (orders, Some(egress), None),
        Err(reason) => (Vec::new(), None, reason),
    };
    let run = Run {
        spawn: id,
        asked: digest(ask)?,
        process: None,
        spawned_ms: now_ms(),
        cpus: spec.cpus,
        memory: spec.memory,
        accelerator: spec.accelerator,
        forwards: spec.nics.iter().flat_map(|nic| nic.forwards().iter().copied()).collect(),
        exit: None,
        egress,
        companions: Vec::new(),
    };
    let shares: Vec<_> = virtiofsd::admit(vm, spec)?.into_iter().zip(std::mem::take(&mut facts.virtiofsd)).collect();
    let beside_it = passt.len() + shares.len();
    let max_tasks = u64::from(spec.cpus.get()) + OWN_TASKS + companion::TASKS * beside_it as u64;
    let memlock = admit_lock(spec, &facts)?;
    // A stage's nodes are nobody's to open.
    let by_node = if facts.staged || facts.descriptors.is_some() { Vec::new() } else { facts.devices.clone() };
    let nodes = vfio::node::names(by_node.iter().map(|passed| passed.group).collect::<std::collections::BTreeSet<_>>());
    let staged = facts.walls == jail::Walls::Stage;
    let shown = if staged { stage::playable(spec) } else { spec.clone() };
    let vhost = if facts.vhost.is_empty() { Presence::Absent } else { Presence::Given };
    let passing = if facts.descriptors.is_some() { Passing::Iommufd } else { Passing::Group };
    let beside = |user_mode| Beside { vhost, devices: if staged { &[][..] } else { &facts.devices }, passing, user_mode };
    let argv = |user_mode| argv::render(&granted.path.to_string_lossy(), slot, &vm.record.label, &shown, &beside(user_mode));
    Ok(Vetted::by_vet(Launch {
        record: Record { state: SlotState::Spawning, run: Some(run), ..vm.record.clone() },
        argv: argv(if passt.is_empty() { Carrier::Slirp } else { Carrier::Passt }),
        argv_alone: argv(Carrier::Slirp),
        scope: Scope::of(slot, &vm.record.label, spec, max_tasks, beside_it).with_nodes(nodes),
        passt,
        instead,
        shares,
        virtiofsd: grants.virtiofsd.clone(),
        program: facts.program.into(),
        fds: facts.fds,
        vhost: facts.vhost,
        libraries: facts.libraries,
        accelerator: spec.accelerator,
        user_mode: spec.nics.iter().any(|nic| matches!(nic.backend, Backend::User { .. })),
        max_tasks,
        memlock,
        devices: by_node,
        descriptors: facts.descriptors,
        walls: facts.walls,
    }))
}

/// A tap needs nothing but its descriptors, and neither does a card that somebody else carries.
fn reach(launch: &Launch, carrier: Carrier) -> Reach {
    if launch.user_mode && carrier == Carrier::Slirp { Reach::Host } else { Reach::Nowhere }
}

/// Has the packet filter hold the slot's user to what its guest may reach, before it has a process in the host's network. Where that can't be, QEMU
/// carries its cards itself, which knows a closed network without help.
async fn hold_user(supervisor: &Rc<Supervisor>, row: &'static Operation, launch: &Launch, before: &Record) -> Result<Carrier, Error> {
    let held = |record: &Record| record.run.as_ref().is_some_and(|run| run.egress.is_some());
    let wanted = held(&launch.record);
    // Also where only an earlier run was held, whose rules are there still.
    let settled = if wanted || held(before) { net::settle(supervisor, row, before, None).await } else { Ok(()) };
    if let Some(reason) = &launch.instead {
        told(supervisor, before, reason);
    }
    match settled {
        Ok(()) if wanted => return Ok(Carrier::Passt),
        Ok(()) => {}
        // What passes by itself is no reason for the weaker way: a worker could bring it about.
        Err(error @ (Error::Exhausted { .. } | Error::Timeout { .. })) => return Err(error),
        Err(error) => {
            told(supervisor, before, &error.to_string());
            let mut record = launch.record.clone();
            if let Some(run) = &mut record.run {
                run.egress = None;
            }
            supervisor.record_or_believe(record);
        }
    }
    Ok(Carrier::Slirp)
}

fn admit_shape(spec: &VmSpec) -> Result<(), Error> {
    let at_most = |field: &str, limit: usize, got: usize| {
        if got > limit { Err(Error::invalid(field, format!("at most {limit}, and there are {got}"))) } else { Ok(()) }
    };
    at_most("spec.disks", MAX_DISKS, spec.disks.len())?;
    at_most("spec.nics", MAX_NICS, spec.nics.len())?;
    at_most("spec.devices", MAX_DEVICES, spec.devices.len())?;
    for nic in &spec.nics {
        at_most("spec.nics.forwards", MAX_FORWARDS, nic.forwards().len())?;
    }
    if matches!(spec.boot, Boot::Disk { .. }) && spec.disks.is_empty() {
        return Err(Error::invalid("spec.boot", "to boot from a disk there must be one"));
    }
    Ok(())
}

/// A device reads and writes the guest's memory where it lies, so none of it may move: all of it is locked, and what the device shows of itself, and some room
/// for QEMU's own. `None`: it has no device.
fn admit_lock(spec: &VmSpec, facts: &Facts) -> Result<Option<u64>, Error> {
    if facts.devices.is_empty() || facts.staged {
        return Ok(None);
    }
    let shown = facts.devices.iter().fold(0u64, |sum, passed| sum.saturating_add(passed.mmio_mib));
    let needed = u64::from(spec.memory.get()).saturating_add(shown).saturating_add(LOCKED_BESIDE_MIB).saturating_mul(1 << 20);
    match facts.lockable {
        Some(lockable) if lockable < needed => Err(Error::Unsupported {
            missing: format!("room to lock {needed} bytes of memory: the supervisor's own limit is {lockable} (LimitMEMLOCK=infinity)"),
        }),
        _ => Ok(Some(needed)),
    }
}

fn admit_resources(grants: &Grants, slots: &BTreeMap<Slot, Vm>, slot: Slot, spec: &VmSpec) -> Result<(), Error> {
    if spec.cpus.get() > grants.vms.cpus_each {
        return Err(Error::denied("vms.cpus_each", format!("{} CPUs asked for, {} granted", spec.cpus, grants.vms.cpus_each)));
    }
    let wanted = u64::from(spec.memory.get());
    if wanted > grants.vms.memory_mib {
        return Err(Error::denied("vms.memory_mib", format!("{wanted} MiB asked for, {} granted to all VMs together", grants.vms.memory_mib)));
    }
    let used = memory_used(slots, Some(slot));
    if used.saturating_add(wanted) > grants.vms.memory_mib {
        let what = format!("guest memory in MiB (vms.memory_mib in the grants): {used} in use, {wanted} asked for");
        return Err(Error::Exhausted { what, limit: grants.vms.memory_mib, retry_after_ms: None });
    }
    Ok(())
}

/// The guest memory of all VMs that run, in MiB, without the one in `except`.
pub fn memory_used(slots: &BTreeMap<Slot, Vm>, except: Option<Slot>) -> u64 {
    runs(slots, except).map(|(_, run)| u64::from(run.memory.get())).sum()
}

fn runs(slots: &BTreeMap<Slot, Vm>, except: Option<Slot>) -> impl Iterator<Item = (&Vm, &Run)> {
    let live = |vm: &&Vm| matches!(vm.record.state, SlotState::Spawning | SlotState::Running | SlotState::Releasing);
    slots.values().filter(move |vm| Some(vm.record.slot) != except).filter(live).filter_map(|vm| Some((vm, vm.record.run.as_ref()?)))
}

fn admit_network(grants: &Grants, slots: &BTreeMap<Slot, Vm>, slot: Slot, spec: &VmSpec) -> Result<(), Error> {
    let mut seen = Vec::new();
    for nic in &spec.nics {
        if matches!(nic.backend, Backend::User { egress: Egress::Host, .. }) && !grants.forwards.egress {
            return Err(Error::denied("forwards.egress", "guests may not open connections outwards"));
        }
        for forward in nic.forwards() {
            let text = format!("{}:{}/{}", forward.host_address, forward.host_port, forward.protocol);
            if !grants.forwards.allow.iter().any(|range| range.covers(forward)) {
                return Err(Error::denied("forwards.allow", format!("no entry covers {text}")));
            }
            let same = |other: &diarch_ipc::name::Forward| {
                (other.protocol, other.host_address, other.host_port) == (forward.protocol, forward.host_address, forward.host_port)
            };
            if seen.iter().any(same) {
                return Err(Error::invalid("spec.nics.forwards", format!("{text} is there twice")));
            }
            if let Some((holder, _)) = runs(slots, Some(slot)).find(|(_, run)| run.forwards.iter().any(same)) {
                return Err(Error::Conflict { holder: format!("VM {}", holder.record.label), reason: format!("it has {text}") });
            }
            let published = |record: &Record| record.resources.published.iter().flat_map(|p| &p.forwards).any(|other| net::publish::clash(other, forward));
            if let Some(vm) = slots.values().find(|vm| published(&vm.record)) {
                return Err(Error::Conflict { holder: format!("VM {}", vm.record.label), reason: format!("it has {text} published") });
            }
            seen.push(*forward);
        }
    }
    Ok(())
}

/// A card is what its tap's rules were made for.
fn admit_taps(record: &Record, spec: &VmSpec) -> Result<(), Error> {
    for (number, nic) in spec.nics.iter().enumerate() {
        let Backend::Tap { queues } = &nic.backend else { continue };
        let Some(tap) = record.resources.taps.iter().find(|tap| usize::from(tap.nic.get()) == number) else {
            return Err(Error::NotFound { what: format!("a tap for card {number} of slot {}: tap.open comes first", record.slot) });
        };
        if tap.mac != nic.mac {
            return Err(Error::invalid("spec.nics.mac", format!("card {number} has {}, and its tap was opened for {}", nic.mac, tap.mac)));
        }
        if tap.queues != *queues {
            return Err(Error::invalid("spec.nics.queues", format!("card {number} has {queues}, and its tap was opened with {}", tap.queues)));
        }
    }
    Ok(())
}

fn admit_accelerator(grants: &Grants, kvm: &KvmVerdict, spec: &VmSpec) -> Result<(), Error> {
    match (spec.accelerator, kvm) {
        (Accelerator::Tcg, _) | (Accelerator::Kvm, KvmVerdict::Usable) => Ok(()),
        (Accelerator::Kvm, _) if !grants.vms.kvm => Err(Error::denied("vms.kvm", "VMs may not use /dev/kvm")),
        (Accelerator::Kvm, KvmVerdict::Absent { reason } | KvmVerdict::Lies { reason }) => Err(Error::Unsupported { missing: format!("KVM: {reason}") }),
        (Accelerator::Kvm, KvmVerdict::Probing | KvmVerdict::NotGranted) => Err(Error::Unsupported { missing: "KVM: the probe has not ended yet".into() }),
    }
}

fn told(supervisor: &Supervisor, record: &Record, reason: &str) {
    let note = format!("slot {} ({}): not passt, but QEMU itself carries the user-mode network: {reason}", record.slot, record.label);
    tracing::warn!("{note}");
    supervisor.note(&note);
}

/// What this start gets of what is held for its VM.
async fn lend(supervisor: &Rc<Supervisor>, row: &'static Operation, vetted: &Vetted<Launch>, ask: &Spawn, before: &Record) -> Result<Lent, Error> {
    let copies = copies(supervisor, row, ask.tenancy, vetted).await?;
    let carrier = hold_user(supervisor, row, vetted, before).await?;
    let queues = net::held::take(supervisor, row, ask.tenancy, &ask.spec.nics).await?;
    Ok(Lent { copies, queues, carrier })
}

/// A copy of each mount that the guest is to see.
async fn copies(supervisor: &Rc<Supervisor>, row: &'static Operation, tenancy: Tenancy, vetted: &Vetted<Launch>) -> Result<Vec<OwnedFd>, Error> {
    let mut copies = Vec::new();
    for (share, _) in &vetted.shares {
        copies.push(mount::copy(supervisor, row, tenancy, share).await?);
    }
    Ok(copies)
}

/// From here on the host changes. What fails leaves no process.
async fn launch(supervisor: &Rc<Supervisor>, row: &'static Operation, slot: Slot, vetted: Vetted<Launch>, lent: Lent) -> Result<Launched, Box<NotStarted>> {
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

    let mut given = launch.fds.into_iter();
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
fn root(uid: u32, accelerator: Accelerator, network: Reach, libraries: Vec<(PathBuf, OwnedFd)>) -> jail::Root {
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
fn with_devices(root: jail::Root, devices: &[Passed]) -> jail::Root {
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

#[cfg(test)]
mod tests;
