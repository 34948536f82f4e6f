//! What a start may be: of the request, the grants and what runs already. Nothing is asked of the host here.

use super::Facts;
use crate::grants::Grants;
use crate::ledger::{Record, Run};
use crate::net;
use crate::state::Vm;
use diarch_ipc::Error;
use diarch_ipc::name::Slot;
use diarch_ipc::operation::{KvmVerdict, SlotState};
use diarch_ipc::spec::{Accelerator, Backend, Boot, Egress, MAX_DEVICES, MAX_DISKS, MAX_FORWARDS, MAX_NICS, VmSpec};
use std::collections::BTreeMap;

/// What is locked beside the guest's memory and the device's: QEMU's and the kernel's own, as much as libvirt leaves.
const LOCKED_BESIDE_MIB: u64 = 1024;

pub(super) fn shape(spec: &VmSpec) -> Result<(), Error> {
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
pub(super) fn lock(spec: &VmSpec, facts: &Facts) -> Result<Option<u64>, Error> {
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

pub(super) fn resources(grants: &Grants, slots: &BTreeMap<Slot, Vm>, slot: Slot, spec: &VmSpec) -> Result<(), Error> {
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

pub(super) fn runs(slots: &BTreeMap<Slot, Vm>, except: Option<Slot>) -> impl Iterator<Item = (&Vm, &Run)> {
    let live = |vm: &&Vm| matches!(vm.record.state, SlotState::Spawning | SlotState::Running | SlotState::Releasing);
    slots.values().filter(move |vm| Some(vm.record.slot) != except).filter(live).filter_map(|vm| Some((vm, vm.record.run.as_ref()?)))
}

pub(super) fn network(grants: &Grants, slots: &BTreeMap<Slot, Vm>, slot: Slot, spec: &VmSpec) -> Result<(), Error> {
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
pub(super) fn taps(record: &Record, spec: &VmSpec) -> Result<(), Error> {
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

pub(super) fn accelerator(grants: &Grants, kvm: &KvmVerdict, spec: &VmSpec) -> Result<(), Error> {
    match (spec.accelerator, kvm) {
        (Accelerator::Tcg, _) | (Accelerator::Kvm, KvmVerdict::Usable) => Ok(()),
        (Accelerator::Kvm, _) if !grants.vms.kvm => Err(Error::denied("vms.kvm", "VMs may not use /dev/kvm")),
        (Accelerator::Kvm, KvmVerdict::Absent { reason } | KvmVerdict::Lies { reason }) => Err(Error::Unsupported { missing: format!("KVM: {reason}") }),
        (Accelerator::Kvm, KvmVerdict::Probing | KvmVerdict::NotGranted) => Err(Error::Unsupported { missing: "KVM: the probe has not ended yet".into() }),
    }
}
