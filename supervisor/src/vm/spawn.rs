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

mod admit;
mod start;

pub use admit::memory_used;
pub use start::firmware;

use super::argv::{Beside, Carrier};
use super::companion::{self, Order, passt, virtiofsd};
use super::lingering::{self, NotStarted};
use super::scope::Scope;
use super::{ability, argv, jail, sockets, stage, watch};
use crate::audit::now_ms;
use crate::grants::{Grants, Program};
use crate::ledger::{Record, Run};
use crate::state::{Supervisor, Vm};
use crate::vetted::Vetted;
use crate::vfio::iommufd::Descriptors;
use crate::vfio::{self, Passed};
use crate::{fd, mount, net, qemu};
use diarch_ipc::Error;
use diarch_ipc::frame::encode;
use diarch_ipc::name::{RequestId, ShareName, Slot, Tenancy};
use diarch_ipc::operation::{KvmVerdict, Operation, Passing, SlotState, Spawn, Spawned};
use diarch_ipc::received::Received;
use diarch_ipc::spec::{Accelerator, Backend, DiskFormat, Nic, Presence};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

/// QEMU's own threads beside the vCPUs: main, I/O workers (64 at most), RCU and some room.
const OWN_TASKS: u64 = 160;

/// What is known before anything is decided.
struct Facts {
    program: File,
    hashed: Option<qemu::Hashed>,
    /// The descriptors, interrogated.
    fds: Received,
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
    fds: Received,
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

pub async fn spawn(supervisor: &Rc<Supervisor>, row: &'static Operation, id: RequestId, ask: Spawn, fds: Received) -> Result<Started, Error> {
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
        Ok(lent) => start::launch(supervisor, row, slot, vetted, lent).await,
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
                        // What was withdrawn or detached meanwhile is not there again.
                        if let Ok(now) = supervisor.with(tenancy, |vm| vm.record.clone()) {
                            supervisor.record_or_believe(Record { state: before.state, run: before.run, ..now });
                        }
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

async fn gather(supervisor: &Rc<Supervisor>, row: &Operation, ask: &Spawn, fds: Received, devices: Vec<Passed>) -> Result<Facts, Box<NotStarted>> {
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
    let root = start::root(uid, Accelerator::Tcg, start::Reach::Nowhere, copies);
    let iommufd = ability::takes_iommufd(program.try_clone().map_err(failed)?.into(), path, uid, root)?;
    qemu::Ability::of(program, iommufd).map_err(|error| failed(error).into())
}

/// Everything that can be refused is refused here.
fn vet(grants: &Grants, slots: &BTreeMap<Slot, Vm>, kvm: &KvmVerdict, id: RequestId, ask: &Spawn, mut facts: Facts) -> Result<Vetted<Launch>, Error> {
    let vm = Supervisor::tenant(slots, ask.tenancy)?;
    let slot = ask.tenancy.slot;
    let spec = &ask.spec;
    admit::shape(spec)?;
    admit::resources(grants, slots, slot, spec)?;
    admit::network(grants, slots, slot, spec)?;
    admit::taps(&vm.record, spec)?;
    admit::accelerator(grants, kvm, spec)?;
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
    let memlock = admit::lock(spec, &facts)?;
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

#[cfg(test)]
mod tests;
