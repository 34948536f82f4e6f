//! `vfio.recover`: resets a group that a dirty exit left behind.
//!
//! Each function is reset in the way that the kernel has for it (`reset`, which tries what `reset_method` lists), taken from vfio-pci and given to it again, and
//! reset once more. A function without any way of its own goes the middle part only: vfio-pci takes the device out of service when it lets go, and puts it
//! into it when it binds, by its power states where it has them. What does not read alive after that stays quarantined. Nothing is removed from the bus and searched for again.

use super::devices::NoResult;
use super::record::{Holder, Record};
use super::thread::Progress;
use super::{held, sysfs};
use crate::grants::Devices as Granted;
use crate::host::Host;
use crate::state::Supervisor;
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::operation::{DeviceState, Operation, Recover, Recovered};
use std::rc::Rc;

pub async fn recover(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &Recover) -> Result<Recovered, Error> {
    let _slot = supervisor.lock(ask.tenancy).await?;
    supervisor.check_state(row, ask.tenancy)?;
    let holder = Holder { tenancy: ask.tenancy, label: supervisor.with(ask.tenancy, |vm| vm.record.label.clone())? };
    let unknown = || Error::NotFound { what: format!("{}, bound for this VM", ask.function) };
    let known = supervisor.devices.with(&ask.function).ok_or_else(unknown)?;
    let mut lock = Some(supervisor.devices.lock(known.group, supervisor.step_patience()).await?);
    let known = supervisor.devices.get(known.group).ok_or_else(unknown)?;

    let vetted = vet(&supervisor.grants.devices, known.clone(), holder)?;

    let record = vetted.into_inner();
    let group = record.group;
    supervisor.devices.put(record.clone())?;
    let late = |supervisor: &Rc<Supervisor>, record: Record, _| supervisor.quarantine_device(record.group, "its reset ended too late; try again".into());
    match supervisor.act_on(&record, &mut lock, reset, late).await {
        Ok(Ok(())) => {}
        Ok(Err(trouble)) => {
            supervisor.quarantine_device(group, trouble.clone());
            return Err(Error::Failed { step: format!("reset IOMMU group {group}"), errno: None, detail: trouble });
        }
        Err(NoResult::NotBegun(error)) => {
            supervisor.devices.put_or_believe(known);
            return Err(error);
        }
        Err(NoResult::Hangs(error)) => return Err(error),
    }
    let record = Record { state: DeviceState::Bound, trouble: None, ..record };
    supervisor.devices.put_or_believe(record.clone());
    Ok(Recovered { device: record.shown() })
}

fn reset(host: &Host, record: &Record, progress: &Progress) -> Result<(), String> {
    held::by_nobody(host, record, progress)?;
    sysfs::reset(host, record, progress)
}

/// One's own, or what a released VM left behind, which becomes one's own.
fn vet(granted: &Granted, record: Record, holder: Holder) -> Result<Vetted<Record>, Error> {
    if let Some(other) = record.holder.as_ref().filter(|other| other.tenancy != holder.tenancy) {
        return Err(Error::Conflict { holder: format!("VM {}", other.label), reason: format!("it has IOMMU group {}", record.group) });
    }
    if !matches!(record.state, DeviceState::Bound | DeviceState::Quarantined) {
        let reason = format!("a reset needs IOMMU group {} to be bound or quarantined", record.group);
        return Err(Error::WrongState { state: record.state.as_str().into(), reason });
    }
    for taken in &record.functions {
        if !granted.allow.iter().any(|grant| grant.covers(&taken.function, taken.vendor, taken.device, taken.class)) {
            return Err(Error::denied("devices.allow", format!("{} is covered by no entry", taken.function)));
        }
    }
    Ok(Vetted::by_vet(Record { state: DeviceState::Resetting, holder: Some(holder), ..record }))
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::{holder, record};
    use super::*;

    #[test]
    fn a_reset_is_for_the_holder_of_a_group_that_no_vm_runs_with() {
        let granted: Granted = toml::from_str("allow = [\"10de:2330\"]").unwrap();
        let judged = |record: Record, slot: u64| vet(&granted, record, holder(slot, "web")).map(Vetted::into_inner);
        assert_eq!(judged(record(1, DeviceState::Bound), 3).unwrap().state, DeviceState::Resetting);
        assert_eq!(judged(record(1, DeviceState::Quarantined), 3).unwrap().state, DeviceState::Resetting);
        assert_eq!(judged(record(1, DeviceState::Bound), 4).unwrap_err().kind(), "conflict");
        for state in [DeviceState::Attached, DeviceState::Reserved, DeviceState::Resetting] {
            assert_eq!(judged(record(1, state), 3).unwrap_err().kind(), "wrong-state");
        }
        let orphan = Record { holder: None, ..record(1, DeviceState::Quarantined) };
        assert_eq!(judged(orphan, 4).unwrap().holder, Some(holder(4, "web")));
        let none: Granted = toml::from_str("allow = []").unwrap();
        assert_eq!(vet(&none, record(1, DeviceState::Bound), holder(3, "web")).unwrap_err().kind(), "denied");
    }
}
