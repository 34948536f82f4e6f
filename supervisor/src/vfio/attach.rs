//! A group goes into a VM when `vm.spawn` names functions of it, and comes out when its QEMU ends.

use super::devices::Lock;
use super::record::Record;
use super::{held, node, sysfs};
use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::name::{Bdf, Slot, Tenancy};
use diarch_ipc::operation::{DeviceState, Operation, Passing};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

/// A function that a VM gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    pub function: Bdf,
    pub group: u32,
    /// Its directory in sysfs: what QEMU looks at, read-only, and all that it sees of sysfs.
    pub path: String,
    pub mmio_mib: u64,
}

/// The groups that a VM is about to get; nobody else changes them meanwhile.
#[derive(Debug, Default)]
pub struct Attachment {
    pub passed: Vec<Passed>,
    groups: Vec<u32>,
    _locks: Vec<Lock>,
}

/// Finds what the specification names. Each must be bound for this VM.
pub async fn reserve(supervisor: &Rc<Supervisor>, tenancy: Tenancy, functions: &[Bdf]) -> Result<Attachment, Error> {
    let mut attachment = Attachment::default();
    if functions.iter().collect::<BTreeSet<_>>().len() != functions.len() {
        return Err(Error::invalid("spec.devices", "a function is there twice"));
    }
    for function in functions {
        let unbound = || Error::NotFound { what: format!("{function}, bound for this VM (vfio.bind)") };
        let known = supervisor.devices.with(function).filter(|record| record.held_by(tenancy)).ok_or_else(unbound)?;
        if !attachment.groups.contains(&known.group) {
            attachment._locks.push(supervisor.devices.lock(known.group, supervisor.step_patience()).await?);
            attachment.groups.push(known.group);
        }
        let known = supervisor.devices.with(function).filter(|record| record.held_by(tenancy)).ok_or_else(unbound)?;
        if known.state != DeviceState::Bound {
            let trouble = known.trouble.map(|trouble| format!(": {trouble}")).unwrap_or_default();
            return Err(Error::WrongState { state: known.state.as_str().into(), reason: format!("{function} must be bound{trouble}") });
        }
        let taken = known.functions.iter().find(|taken| taken.function == *function).ok_or_else(unbound)?;
        attachment.passed.push(Passed { function: function.clone(), group: known.group, path: taken.path.clone(), mmio_mib: taken.mmio_mib });
    }
    Ok(attachment)
}

impl Attachment {
    fn records(&self, supervisor: &Supervisor) -> Vec<Record> {
        self.groups.iter().filter_map(|group| supervisor.devices.get(*group)).collect()
    }

    /// Writes down that the VM has them, and opens their nodes to its user, unless it gets them as descriptors. What fails leaves them bound.
    pub async fn attach(&self, supervisor: &Rc<Supervisor>, row: &Operation, slot: Slot, uid: u32, passing: Passing) -> Result<(), Error> {
        if self.groups.is_empty() {
            return Ok(());
        }
        let attached = |record| Record { state: DeviceState::Attached, passing: Some(passing), ..record };
        if passing == Passing::Iommufd {
            let done = self.records(supervisor).into_iter().try_for_each(|record| supervisor.devices.put(attached(record)));
            if done.is_err() {
                self.detach(supervisor, row, slot).await;
            }
            return done;
        }
        if supervisor.host.rehearses(|| format!("open /dev/vfio/{:?} to user {uid}", self.groups)) {
            return self.records(supervisor).into_iter().try_for_each(|record| supervisor.devices.put(attached(record)));
        }
        let done = self.open(supervisor, row, slot, uid).await;
        if done.is_err() {
            self.detach(supervisor, row, slot).await;
        }
        done
    }

    async fn open(&self, supervisor: &Rc<Supervisor>, row: &Operation, slot: Slot, uid: u32) -> Result<(), Error> {
        let failed = |group: u32, error: &std::io::Error| Error::io(format!("open /dev/vfio/{group} to the VM's user"), error);
        let (host, groups) = (Arc::clone(&supervisor.host), self.groups.clone());
        let modes = supervisor
            .act(row, slot, "look at the device nodes", move || {
                groups.iter().map(|group| node::mode(&host, *group).map_err(|error| failed(*group, &error))).collect::<Result<Vec<u32>, Error>>()
            })
            .await??;
        for (record, mode) in self.records(supervisor).into_iter().zip(&modes) {
            supervisor.devices.put(Record { state: DeviceState::Attached, passing: Some(Passing::Group), node_mode: Some(*mode), ..record })?;
        }
        let (host, groups) = (Arc::clone(&supervisor.host), self.groups.clone());
        let open = move || {
            let mut nodes = groups.iter().zip(&modes);
            nodes.try_for_each(|(group, mode)| node::open_to(&host, *group, *mode, uid).map_err(|error| failed(*group, &error)))
        };
        supervisor.act(row, slot, "open the device nodes", open).await?
    }

    /// No QEMU was started: they are bound, as before.
    pub async fn detach(&self, supervisor: &Rc<Supervisor>, row: &Operation, slot: Slot) {
        for record in self.records(supervisor).into_iter().filter(|record| record.state == DeviceState::Attached) {
            let (host, closing) = (Arc::clone(&supervisor.host), record.clone());
            let closed = supervisor
                .act(row, slot, "close the device nodes", move || closing.node_mode.map_or(Ok(()), |mode| node::close(&host, closing.group, mode)))
                .await;
            match closed {
                Ok(Ok(())) => supervisor.devices.put_or_believe(Record { state: DeviceState::Bound, passing: None, node_mode: None, ..record }),
                Ok(Err(error)) => supervisor.quarantine_device(record.group, format!("its node could not be closed to the VM's user: {error}")),
                Err(error) => supervisor.quarantine_device(record.group, format!("its node could not be closed to the VM's user: {error}")),
            }
        }
    }
}

/// QEMU has ended: its nodes are closed, and what does not answer any more is quarantined.
pub fn ended(supervisor: &Rc<Supervisor>, tenancy: Tenancy) {
    for record in supervisor.devices.of(tenancy).into_iter().filter(|record| record.state == DeviceState::Attached) {
        // At once, so that a next start waits for it.
        let lock = supervisor.devices.try_lock(record.group);
        let supervisor = Rc::clone(supervisor);
        tokio::task::spawn_local(async move {
            let lock = match lock {
                Some(lock) => Some(lock),
                None => supervisor.devices.lock(record.group, supervisor.step_patience()).await.ok(),
            };
            if supervisor.devices.get(record.group).is_some_and(|now| now.state == DeviceState::Attached) {
                settle(&supervisor, record, lock).await;
            }
        });
    }
}

/// Out of a VM, with its lock.
pub(super) async fn settle(supervisor: &Rc<Supervisor>, record: Record, mut lock: Option<Lock>) {
    let work = |host: &crate::host::Host, record: &Record, progress: &super::thread::Progress| {
        progress.undoing("look whether it answers".into());
        let closed = record.node_mode.map_or(Ok(()), |mode| node::close(host, record.group, mode));
        closed.map_err(|error| format!("its node could not be closed to the VM's user: {error}"))?;
        held::by_nobody(host, record, progress)?;
        progress.undoing("look whether it answers".into());
        sysfs::verify(host, record).map_err(|error| error.to_string())?;
        sysfs::answers(host, record)
    };
    let after = |supervisor: &Rc<Supervisor>, group: u32, done: Result<(), String>| {
        let Some(record) = supervisor.devices.get(group) else { return };
        match done {
            Ok(()) => supervisor.devices.put_or_believe(Record { state: DeviceState::Bound, passing: None, node_mode: None, trouble: None, ..record }),
            Err(trouble) => supervisor.quarantine_device(group, format!("after its VM: {trouble}")),
        }
    };
    match supervisor.act_on(&record, &mut lock, work, move |supervisor, record, done| after(supervisor, record.group, done)).await {
        Ok(done) => after(supervisor, record.group, done),
        Err(super::devices::NoResult::NotBegun(error)) => supervisor.quarantine_device(record.group, format!("after its VM: {error}")),
        Err(super::devices::NoResult::Hangs(_)) => {}
    }
}
