//! `host.inventory`: what the supervisor owns now, and what it knows of the host.

use super::spawn::memory_used;
use crate::state::{Supervisor, Vm};
use crate::{qemu, vfio};
use diarch_ipc::VERSION;
use diarch_ipc::name::QemuName;
use diarch_ipc::operation::{HostInventory, Inventory, Limits, QemuGrant, VmRecord};
use std::ops::Bound;

pub fn inventory(supervisor: &Supervisor, ask: &Inventory) -> HostInventory {
    let slots = supervisor.slots.borrow();
    let from = ask.after.map_or(Bound::Unbounded, Bound::Excluded);
    let mut after = slots.range((from, Bound::Unbounded)).map(|(_, vm)| record(vm));
    let vms: Vec<VmRecord> = after.by_ref().take(HostInventory::PAGE).collect();
    let grants = &supervisor.grants;
    let devices = supervisor.devices.all();
    HostInventory {
        version: VERSION.into(),
        kernel: supervisor.kernel.clone(),
        started_ms: supervisor.started_ms,
        vms,
        more: after.next().is_some(),
        vms_total: u32::try_from(slots.len()).unwrap_or(u32::MAX),
        kvm: supervisor.kvm.borrow().clone(),
        qemu: supervisor.qemu_grants.clone(),
        limits: Limits {
            vms: grants.vms.max.into(),
            memory_mib: grants.vms.memory_mib,
            memory_mib_used: memory_used(&slots, None),
            cpus_each: grants.vms.cpus_each,
        },
        audit: supervisor.audit.borrow().state(),
        scopes: supervisor.scopes,
        devices: devices.iter().take(HostInventory::DEVICES).map(vfio::record::Record::shown).collect(),
        devices_total: u32::try_from(devices.len()).unwrap_or(u32::MAX),
    }
}

fn record(vm: &Vm) -> VmRecord {
    let record = &vm.record;
    let run = record.run.as_ref();
    VmRecord {
        slot: record.slot,
        claim: record.claim,
        label: record.label.clone(),
        state: vm.state(),
        uid: record.uid,
        pid: run.filter(|run| run.exit.is_none()).and_then(|run| run.process).map(|process| process.pid),
        spawned_ms: run.map(|run| run.spawned_ms),
        exit: run.and_then(|run| run.exit),
        adopted: vm.adopted,
        cpus: run.map(|run| run.cpus),
        memory: run.map(|run| run.memory),
        accelerator: run.map(|run| run.accelerator),
    }
}

/// The granted binaries with what is wrong with each; looked at once, at start.
pub fn qemu_grants(grants: &crate::grants::Grants, owner: u32) -> Vec<QemuGrant> {
    let look = |(name, granted): (&String, &crate::grants::Program)| {
        // The hash is left for the first spawn: it takes tens of milliseconds.
        let unhashed = crate::grants::Program { sha256: None, ..granted.clone() };
        let trouble = qemu::open(name, &unhashed, owner, None).map(drop).and_then(|()| qemu::libraries(name, granted).map(drop)).err();
        let trouble = trouble.map(|error| error.to_string());
        Some(QemuGrant { name: QemuName::new(name.as_str()).ok()?, path: granted.path.to_string_lossy().into_owned(), trouble })
    };
    grants.qemu.iter().filter_map(look).collect()
}
