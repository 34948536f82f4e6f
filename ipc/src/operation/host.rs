//! Of the host: what the supervisor owns and knows.

use super::{DeviceRecord, ExitStatus, SlotState};
use crate::name::{Cpus, Label, MiB, RequestId, Slot, Tenancy};
use crate::spec::Accelerator;
use serde::{Deserialize, Serialize};

/// Asks for what the supervisor owns: the VMs in slots after `after`, at most [`HostInventory::PAGE`] of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inventory {
    pub after: Option<Slot>,
}

/// What the supervisor owns now, and what it knows of the host that needs root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostInventory {
    pub version: String,
    pub kernel: String,
    /// When this supervisor started, milliseconds since 1970.
    pub started_ms: u64,
    pub vms: Vec<VmRecord>,
    /// More VMs follow the last one: ask again with `after`.
    pub more: bool,
    /// How many VMs there are in all.
    pub vms_total: u32,
    pub kvm: KvmVerdict,
    pub qemu: Vec<QemuGrant>,
    pub limits: Limits,
    pub audit: AuditState,
    /// Each VM's QEMU is in a systemd unit of its own, `diarch-vm-SLOT.scope`, with limits of memory and tasks.
    pub scopes: bool,
    /// The devices that were taken from their drivers, at most [`HostInventory::DEVICES`] of them.
    pub devices: Vec<DeviceRecord>,
    pub devices_total: u32,
}

impl HostInventory {
    /// VMs in one reply: 96 records of at most 300 bytes, with the devices, stay below the 64 KiB of a frame.
    pub const PAGE: usize = 96;
    /// Devices in one reply; a record is some 250 bytes, and more for each further function.
    pub const DEVICES: usize = 32;
}

/// One slot as the ledger has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRecord {
    pub slot: Slot,
    /// The request that claimed the slot.
    pub claim: RequestId,
    pub label: Label,
    pub state: SlotState,
    pub uid: u32,
    /// QEMU's process, while there is one. For people: nothing is decided by a pid.
    pub pid: Option<u32>,
    pub spawned_ms: Option<u64>,
    pub exit: Option<ExitStatus>,
    /// It ran before this supervisor started, and was taken over.
    pub adopted: bool,
    pub cpus: Option<Cpus>,
    pub memory: Option<MiB>,
    pub accelerator: Option<Accelerator>,
}

impl VmRecord {
    pub fn tenancy(&self) -> Tenancy {
        Tenancy { slot: self.slot, claim: self.claim }
    }
}

/// Whether hardware virtualisation works here: found out by letting a tiny guest run (never by looking at the node).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum KvmVerdict {
    /// A guest executed an instruction and halted.
    Usable,
    /// There is no `/dev/kvm`, or the VMs' users can't open it.
    Absent { reason: String },
    /// `/dev/kvm` opens and makes a VM, and then can't run it.
    Lies { reason: String },
    /// The grants don't allow it (`vms.kvm`).
    NotGranted,
    /// Not known yet: the probe is running.
    Probing,
}

/// A QEMU binary that the grants allow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuGrant {
    pub name: crate::name::QemuName,
    /// For people; the worker never sends a path.
    pub path: String,
    /// Why it can't be used now, if so.
    pub trouble: Option<String>,
}

/// What the grants allow in all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    pub vms: u32,
    pub memory_mib: u64,
    pub memory_mib_used: u64,
    pub cpus_each: u16,
}

/// Where the audit stands; `diarch audit verify` compares the file's end with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditState {
    /// The last record's sequence number.
    pub sequence: u64,
    /// The last record's hash, hex.
    pub head: String,
    /// Why records can't be written now, if so.
    pub trouble: Option<String>,
    /// Records that could not be written since the supervisor started.
    pub lost: u64,
}
