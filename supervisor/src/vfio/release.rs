//! `vfio.release`: gives a group back to its drivers.

use super::devices::Lock;
use super::record::Record;
use super::{held, node, sysfs};
use crate::host::Host;
use crate::state::Supervisor;
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::name::Tenancy;
use diarch_ipc::operation::{DeviceState, Operation, Unbind, Unbound};
use std::rc::Rc;

pub async fn release(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &Unbind) -> Result<Unbound, Error> {
    let _slot = supervisor.lock(ask.tenancy).await?;
    supervisor.check_state(row, ask.tenancy)?;
    // By the record: the function itself may be gone.
    let Some(known) = supervisor.devices.with(&ask.function).filter(|record| may_give_back(record, ask.tenancy)) else { return Ok(Unbound { existed: false }) };
    let lock = supervisor.devices.lock(known.group, supervisor.step_patience()).await?;
    let Some(known) = supervisor.devices.get(known.group) else { return Ok(Unbound { existed: false }) };
    let vetted = match vet(known, ask.tenancy) {
        Err(Error::NotFound { .. }) => return Ok(Unbound { existed: false }),
        other => other?,
    };
    undo(supervisor, vetted.into_inner(), lock).await?;
    Ok(Unbound { existed: true })
}

/// One's own; and what is nobody's any more, so that somebody can try again.
fn may_give_back(record: &Record, tenancy: Tenancy) -> bool {
    record.held_by(tenancy) || record.holder.is_none()
}

fn vet(record: Record, tenancy: Tenancy) -> Result<Vetted<Record>, Error> {
    if !may_give_back(&record, tenancy) {
        return Err(Error::NotFound { what: format!("IOMMU group {}, bound for this VM", record.group) });
    }
    if record.state == DeviceState::Attached {
        return Err(Error::WrongState { state: record.state.as_str().into(), reason: "a VM that runs has it; end it first".into() });
    }
    Ok(Vetted::by_vet(Record { state: DeviceState::Reserved, ..record }))
}

/// Gives one group back. What can't be given back is quarantined.
pub(super) async fn undo(supervisor: &Rc<Supervisor>, record: Record, lock: Lock) -> Result<(), Error> {
    let group = record.group;
    // Undoing may be done twice, so it goes on when /run is full.
    supervisor.devices.put_or_believe(record.clone());
    let mut lock = Some(lock);
    let acted = supervisor.act_on(&record, &mut lock, back, |supervisor, record, done| settle(supervisor, record.group, &done)).await;
    match acted {
        Ok(done) => {
            settle(supervisor, group, &done);
            done.map_err(|detail| Error::Failed { step: format!("give IOMMU group {group} back"), errno: None, detail })
        }
        Err(no) => {
            let error = Error::from(no);
            if supervisor.devices.get(group).is_some_and(|record| record.state == DeviceState::Reserved) {
                supervisor.quarantine_device(group, format!("it could not be given back: {error}"));
            }
            Err(error)
        }
    }
}

fn back(host: &Host, record: &Record, progress: &super::thread::Progress) -> Result<(), String> {
    if let Some(mode) = record.node_mode {
        node::close(host, record.group, mode).map_err(|error| format!("/dev/vfio/{}: {error}", record.group))?;
    }
    // A driver that is to let go of what somebody has open waits for him, for ever.
    held::by_nobody(host, record, progress)?;
    sysfs::give_back(host, record, progress)
}

fn settle(supervisor: &Rc<Supervisor>, group: u32, done: &Result<(), String>) {
    match done {
        Ok(()) => {
            supervisor.devices.forget(group);
            supervisor.note(&format!("device group {group} is the host's again"));
        }
        Err(trouble) => supervisor.quarantine_device(group, format!("it could not be given back: {trouble}")),
    }
}

/// Gives back all that a VM has, last first, when its slot is released. What can't be given back stays quarantined, and is nobody's. (Its slot may be free before
/// the last is back, and another's: a record names its VM by the claim, which no other has.)
pub async fn all_of(supervisor: &Rc<Supervisor>, tenancy: Tenancy) {
    for known in supervisor.devices.of(tenancy).into_iter().rev() {
        let group = known.group;
        // A group that hangs is not waited for: whoever hangs has its lock.
        let lock = match known.state {
            DeviceState::Quarantined => supervisor.devices.try_lock(group),
            _ => supervisor.devices.lock(group, supervisor.step_patience()).await.ok(),
        };
        if let (Some(lock), Some(record)) = (lock, supervisor.devices.get(group).filter(|record| record.held_by(tenancy))) {
            let _ = undo(supervisor, Record { state: DeviceState::Reserved, ..record }, lock).await;
        }
        if let Some(record) = supervisor.devices.get(group).filter(|record| record.held_by(tenancy)) {
            supervisor.devices.put_or_believe(Record { holder: None, ..record });
        }
    }
}
