//! What a VM has of the host besides its slot: devices, shared directories, a tap, published ports.
//!
//! ```text
//!   vm.claim --> what the file names no more: vfio.release, mount.detach
//!            --> vfio.recover (after a dirty exit) --> vfio.bind --> mount.attach --> tap.open --> net.publish --> vm.spawn
//! ```
//!
//! All of it hangs on the slot: `vm.release` takes it back, and nothing else has to be undone. Each of these operations finds the state that it made, so that
//! before each start simply all are asked: devices, shares and published ports outlive a QEMU in its slot, and a tap, which goes with its QEMU, is
//! opened anew. A worker that took over in the middle asks the same, and gets the same.
//!
//! The ports come before the QEMU: a guest whose ports can't be had is never booted.

use super::start::NotStarted;
use super::{Vm, Want};
use crate::vmfile::{Machine, Tap};
use diarch_ipc::Error;
use diarch_ipc::name::{Bdf, NicIndex, ShareName, Slot, Tenancy};
use diarch_ipc::operation::{DeviceRecord, DeviceState, OpenTap, SlotState, TapOpened};
use diarch_ipc::spec::DiskAccess;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// A tap ends when the kernel has taken its QEMU apart, a moment after that has ended.
const TAP_LINGERS: Duration = Duration::from_secs(3);
const TAP_AGAIN: Duration = Duration::from_millis(50);
/// linux/errno-base.h; the name of the tap before is still taken.
const EBUSY: i32 = 16;

/// We saw the QEMU's end before the supervisor did, or something else is not as we thought.
const SLOT_BUSY: [&str; 3] = [SlotState::Spawning.as_str(), SlotState::Running.as_str(), SlotState::Releasing.as_str()];
/// On its way to another state: asking again soon is right.
const DEVICE_BUSY: [&str; 3] = [DeviceState::Reserved.as_str(), DeviceState::Attached.as_str(), DeviceState::Resetting.as_str()];

/// What was asked for under the present tenancy.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Equipment {
    /// Each with all functions of its IOMMU group, where they are known: a group goes as a whole.
    devices: BTreeMap<Bdf, Vec<Bdf>>,
    shares: BTreeMap<ShareName, DiskAccess>,
    published: bool,
    /// The last QEMU was killed or crashed, and nobody has reset its devices since.
    dirty: bool,
}

impl Equipment {
    /// What a worker finds that did not take it itself. A share of which the record knows nothing stays until the slot goes: no guest is given it.
    pub fn found(slot: Slot, machine: Option<&Machine>, devices: &[DeviceRecord]) -> Self {
        let named = machine.iter().flat_map(|machine| &machine.devices).map(|function| (function.clone(), Vec::new()));
        let mut found = Self {
            devices: named.collect(),
            shares: machine.iter().flat_map(|machine| &machine.shares).map(|share| (share.share.clone(), share.access)).collect(),
            published: machine.and_then(|machine| machine.tap.as_ref()).is_some_and(|tap| !tap.publish.is_empty()),
            dirty: false,
        };
        for record in devices.iter().filter(|record| record.slot == Some(slot)) {
            let group = functions(record);
            // One of the group stands for it, unless the machine names others.
            if !group.iter().any(|function| found.devices.contains_key(function)) {
                found.devices.extend(group.first().map(|function| (function.clone(), Vec::new())));
            }
            for (_, known) in found.devices.iter_mut().filter(|(function, _)| group.contains(function)) {
                known.clone_from(&group);
            }
        }
        found
    }

    /// A QEMU ended otherwise than in order.
    pub fn soil(&mut self) {
        self.dirty = true;
    }

    /// One function of each group of which the machine names none.
    fn unwanted_devices(&self, machine: &Machine) -> Vec<Bdf> {
        let wanted = |function: &Bdf| machine.devices.contains(function);
        let unwanted = self.devices.iter().filter(|(function, group)| !wanted(function) && !group.iter().any(wanted));
        unwanted.map(|(function, _)| function.clone()).collect()
    }

    fn unwanted_shares(&self, machine: &Machine) -> Vec<ShareName> {
        let wanted = |name: &ShareName, access: DiskAccess| machine.shares.iter().any(|share| share.share == *name && share.access == access);
        self.shares.iter().filter(|(name, access)| !wanted(name, **access)).map(|(name, _)| name.clone()).collect()
    }
}

fn functions(record: &DeviceRecord) -> Vec<Bdf> {
    record.functions.iter().map(|known| known.function.clone()).collect()
}

impl Vm {
    /// All that the machine needs of the host, and nothing that it had before and needs no more.
    pub(super) async fn equip(&mut self, tenancy: Tenancy, machine: &Machine) -> Result<(), NotStarted> {
        self.drop_unwanted(tenancy, machine).await?;
        self.take_devices(tenancy, machine).await?;
        for share in &machine.shares {
            self.equipment.shares.insert(share.share.clone(), share.access);
            if let Err(error) = self.attach_share(tenancy, &share.share, share.access).await {
                return Err(self.not_had(tenancy, &format!("share {}", share.share), &error).await);
            }
        }
        let Some(tap) = &machine.tap else { return Ok(()) };
        let opened = match self.open_tap(tenancy, machine, tap).await {
            Ok(opened) => opened,
            Err(error) => return Err(self.not_had(tenancy, &format!("network {}", tap.network), &error).await),
        };
        self.set(|status| status.tap = Some(opened));
        if !tap.publish.is_empty() {
            self.equipment.published = true;
            let published = match NicIndex::new(0) {
                Ok(nic) => self.context.link.publish(tenancy, nic, tap.publish.clone()).await,
                Err(error) => Err(Error::invalid("nic", error.to_string())),
            };
            if let Err(error) = published {
                return Err(self.not_had(tenancy, "its published ports", &error).await);
            }
        }
        Ok(())
    }

    /// Whether there is anything to ask or to give back.
    pub(super) fn needs_equipment(&self, machine: &Machine) -> bool {
        let Equipment { devices, shares, published, dirty: _ } = &self.equipment;
        let holds = !devices.is_empty() || !shares.is_empty() || *published;
        holds || machine.tap.is_some() || !machine.devices.is_empty() || !machine.shares.is_empty()
    }

    async fn drop_unwanted(&mut self, tenancy: Tenancy, machine: &Machine) -> Result<(), NotStarted> {
        let link = std::sync::Arc::clone(&self.context.link);
        for function in self.equipment.unwanted_devices(machine) {
            // With another of its group it may be gone already.
            let Some(group) = self.equipment.devices.get(&function).cloned() else { continue };
            if let Err(error) = link.unbind(tenancy, &function).await {
                return Err(self.not_had(tenancy, &format!("device {function}, which its file names no more"), &error).await);
            }
            self.note("device.released", format!("{function} is given back to its driver: the file names it no more"));
            self.equipment.devices.retain(|other, _| *other != function && !group.contains(other));
        }
        for share in self.equipment.unwanted_shares(machine) {
            if let Err(error) = link.detach_share(tenancy, &share).await {
                return Err(self.not_had(tenancy, &format!("share {share}, which its file names no more"), &error).await);
            }
            self.equipment.shares.remove(&share);
        }
        if self.equipment.published && machine.tap.as_ref().is_none_or(|tap| tap.publish.is_empty()) {
            if let Err(error) = link.withdraw(tenancy).await {
                return Err(self.not_had(tenancy, "its published ports, which its file names no more", &error).await);
            }
            self.equipment.published = false;
        }
        Ok(())
    }

    async fn take_devices(&mut self, tenancy: Tenancy, machine: &Machine) -> Result<(), NotStarted> {
        let ordered = self.intent.borrow().recovers;
        let recover = std::mem::replace(&mut self.recovered, ordered) < ordered || self.equipment.dirty;
        let mut reset: Vec<Bdf> = Vec::new();
        for function in machine.devices.iter().filter(|_| recover) {
            if reset.contains(function) {
                continue;
            }
            self.set(|status| status.reason = Some(format!("resetting the device {function}")));
            match self.context.link.recover(tenancy, function).await {
                Ok(record) => {
                    self.note("device.recovered", format!("{function} (IOMMU group {}) was reset", record.group));
                    reset.extend(functions(&record));
                }
                // It is not ours yet. Whether it can be, binding it says.
                Err(Error::NotFound { .. } | Error::WrongState { .. }) if !self.equipment.devices.contains_key(function) => {}
                Err(error) => return Err(self.not_had(tenancy, &format!("device {function}"), &error).await),
            }
        }
        self.equipment.dirty = false;
        for function in &machine.devices {
            self.still_wanted()?;
            if !self.equipment.devices.contains_key(function) {
                self.equipment.devices.insert(function.clone(), Vec::new());
                self.set(|status| status.reason = Some(format!("taking the device {function} from its driver")));
            }
            match self.context.link.bind(tenancy, function).await {
                Ok(record) => {
                    self.equipment.devices.insert(function.clone(), functions(&record));
                }
                Err(error) => {
                    let refusal = self.not_had(tenancy, &format!("device {function}"), &error).await;
                    return Err(match (refusal, error) {
                        (NotStarted::Refused(reason), Error::WrongState { .. }) => {
                            NotStarted::Refused(format!("{reason}; 'diarch device recover {function}' tries to reset it"))
                        }
                        (refusal, _) => refusal,
                    });
                }
            }
        }
        Ok(())
    }

    async fn attach_share(&self, tenancy: Tenancy, share: &ShareName, access: DiskAccess) -> Result<(), Error> {
        let link = &self.context.link;
        match link.attach_share(tenancy, share, access).await {
            // A worker before this one attached it otherwise, and had no time to write that down.
            Err(Error::Conflict { .. }) => {
                link.detach_share(tenancy, share).await?;
                link.attach_share(tenancy, share, access).await
            }
            answer => answer,
        }
    }

    /// Each device can take a minute: whoever wants the VM stopped meanwhile does not wait for all of them.
    fn still_wanted(&self) -> Result<(), NotStarted> {
        let intent = self.intent.borrow();
        if intent.want == Want::Run { Ok(()) } else { Err(NotStarted::Refused(intent.why.clone())) }
    }

    async fn open_tap(&self, tenancy: Tenancy, machine: &Machine, tap: &Tap) -> Result<TapOpened, Error> {
        let nic = NicIndex::new(0).map_err(|error| Error::invalid("nic", error.to_string()))?;
        let ask = OpenTap { tenancy, nic, network: tap.network.clone(), mac: machine.mac.clone(), address: tap.address, queues: tap.queues };
        let until = Instant::now() + TAP_LINGERS;
        loop {
            match self.context.link.open_tap(ask.clone()).await {
                Err(error) if Instant::now() < until && (matches!(error, Error::Conflict { .. }) || error.errno() == Some(EBUSY)) => sleep(TAP_AGAIN).await,
                answer => return answer,
            }
        }
    }

    /// What a refusal means for the next try. A device that another VM holds, a grant that is missing and a host that fails a step are all nothing that the
    /// VM could be blamed for: it is tried again, as long as it takes.
    async fn not_had(&self, tenancy: Tenancy, what: &str, error: &Error) -> NotStarted {
        let reason = format!("{what}: {error}");
        match error {
            Error::Superseded => NotStarted::Failed(reason),
            Error::WrongState { state, .. } if SLOT_BUSY.contains(&state.as_str()) => NotStarted::OutOfStep(reason),
            Error::WrongState { state, .. } if DEVICE_BUSY.contains(&state.as_str()) => NotStarted::Failed(reason),
            // Of the slot, or of what was asked for?
            Error::NotFound { .. } | Error::WrongState { .. } => match self.context.link.find(&self.name).await {
                Ok(Some(record)) if record.tenancy() == tenancy && matches!(record.state, SlotState::Claimed | SlotState::Exited) => {
                    NotStarted::Refused(reason)
                }
                _ => NotStarted::OutOfStep(reason),
            },
            Error::Denied { .. }
            | Error::Invalid { .. }
            | Error::Unsupported { .. }
            | Error::Exhausted { .. }
            | Error::Conflict { .. }
            | Error::Timeout { .. }
            | Error::Failed { .. } => NotStarted::Refused(reason),
        }
    }
}

#[cfg(test)]
mod tests;
