//! At start: what an earlier supervisor took is kept, or given back.
//!
//! | the record says   | and its VM              | then the group is                                                         |
//! |-------------------|-------------------------|---------------------------------------------------------------------------|
//! | reserved          |                         | given back: it was on its way, in one direction or the other              |
//! | any               | was released            | given back                                                                |
//! | attached          | runs                    | attached                                                                  |
//! | attached          | has ended, or never ran | bound, if it answers; its node is closed                                  |
//! | bound             |                         | bound, if it is vfio-pci's and answers                                    |
//! | resetting         |                         | bound, if it can be made vfio-pci's and answers                           |
//! | quarantined       |                         | quarantined: a step of it may hang, and nobody waits for that at start    |
//!
//! What can't be brought to that is quarantined. It happens beside everything else; whoever asks for such a group waits for it.

use super::devices::Lock;
use super::record::Record;
use super::{attach, release, sysfs};
use crate::state::Supervisor;
use diarch_ipc::operation::{DeviceState, SlotState};
use std::rc::Rc;

/// Begins, for all records at once. Called after VMs were adopted, and before anybody is heard.
pub fn begin(supervisor: &Rc<Supervisor>) {
    for (group, reason) in supervisor.devices.closed() {
        supervisor.note(&format!("device group {group}: its record can't be read ({reason}); it is left alone"));
    }
    for record in supervisor.devices.all() {
        let Some(lock) = supervisor.devices.try_lock(record.group) else { continue };
        let supervisor = Rc::clone(supervisor);
        tokio::task::spawn_local(async move { settle(&supervisor, record, lock).await });
    }
}

async fn settle(supervisor: &Rc<Supervisor>, record: Record, lock: Lock) {
    let group = record.group;
    let state = record.holder.as_ref().and_then(|holder| supervisor.with(holder.tenancy, |vm| vm.record.state).ok());
    let was = record.state;
    match (was, state) {
        (DeviceState::Quarantined, Some(_)) => {}
        (DeviceState::Quarantined, None) => supervisor.devices.put_or_believe(Record { holder: None, ..record }),
        // (Only a slot that was not yet released keeps what it has.)
        (_, None) | (DeviceState::Reserved, _) => {
            let _ = release::undo(supervisor, Record { state: DeviceState::Reserved, ..record }, lock).await;
            if let Some(left) = supervisor.devices.get(group).filter(|_| state.is_none()) {
                supervisor.devices.put_or_believe(Record { holder: None, ..left });
            }
        }
        (DeviceState::Attached, Some(SlotState::Running | SlotState::Spawning | SlotState::Releasing)) => {}
        (DeviceState::Attached | DeviceState::Bound, Some(_)) => attach::settle(supervisor, record, Some(lock)).await,
        (DeviceState::Resetting, Some(_)) => {
            let work = |host: &crate::host::Host, record: &Record, progress: &super::thread::Progress| {
                sysfs::hold(host, record, progress).map_err(|error| error.to_string()).and_then(|()| sysfs::answers(host, record))
            };
            let mut lock = Some(lock);
            let late = |supervisor: &Rc<Supervisor>, record: Record, _| supervisor.quarantine_device(record.group, "its reset ended too late".into());
            match supervisor.act_on(&record, &mut lock, work, late).await {
                Ok(Ok(())) => supervisor.devices.put_or_believe(Record { state: DeviceState::Bound, trouble: None, ..record }),
                Ok(Err(trouble)) => supervisor.quarantine_device(group, format!("after a reset that was cut off: {trouble}")),
                Err(no) => supervisor.quarantine_device(group, format!("after a reset that was cut off: {}", diarch_ipc::Error::from(no))),
            }
        }
    }
    let now = supervisor.devices.get(group).map_or("free", |record| record.state.as_str());
    if now != was.as_str() {
        supervisor.note(&format!("device group {group}: was {}, is {now}", was.as_str()));
    }
}
