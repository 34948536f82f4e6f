//! Of PCI functions, and the groups that they are in.

use crate::name::{Bdf, Label, Slot, Tenancy};
use serde::{Deserialize, Serialize};

/// Asks for a PCI function, with whatever shares its IOMMU group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    pub tenancy: Tenancy,
    pub function: Bdf,
}

/// The group is vfio-pci's, and this VM's until it is released.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bound {
    pub device: DeviceRecord,
}

/// Gives the function's whole group back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unbind {
    pub tenancy: Tenancy,
    pub function: Bdf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unbound {
    /// False: it was not bound for this VM.
    pub existed: bool,
}

/// Resets the function's group after a dirty exit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recover {
    pub tenancy: Tenancy,
    pub function: Bdf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recovered {
    pub device: DeviceRecord,
}

/// An IOMMU group of which the supervisor has taken the functions, or is about to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRecord {
    /// The kernel's number of the group, of this boot.
    pub group: u32,
    pub state: DeviceState,
    pub functions: Vec<FunctionRecord>,
    /// Whose it is: a VM's slot and label.
    pub slot: Option<Slot>,
    pub label: Option<Label>,
    /// How a QEMU has it, while one does.
    pub passing: Option<Passing>,
    /// Why it is quarantined, if it is.
    pub trouble: Option<String>,
}

/// How a QEMU has a group's functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Passing {
    /// By the group's node `/dev/vfio/GROUP`, which its user may open.
    Group,
    /// As descriptors: one of `/dev/iommu`, and one of each function's own node. It has no node, and no other function of the group.
    Iommufd,
}

impl Passing {
    pub const fn as_str(self) -> &'static str {
        match self {
            Passing::Group => "group",
            Passing::Iommufd => "iommufd",
        }
    }
}

/// One PCI function of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionRecord {
    pub function: Bdf,
    pub vendor: u16,
    pub device: u16,
    /// Class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// What its memory BARs take in the guest's address space, in MiB, rounded up.
    pub mmio_mib: u64,
    /// The kernel has a way to reset it.
    pub resettable: bool,
}

/// The states of a device (an IOMMU group of functions).
///
/// ```text
///            vfio.bind          bound, node there       vm.spawn
///   free ------------> reserved ----------------> bound --------> attached
///    ^                    |                       |  ^               |
///    |  <-- rolled back --+        vfio.recover   v  |  config space |
///    |                                       resetting  reads alive  |  QEMU ends
///    +------ vfio.release, vm.release ------------+  +---------------+
///                                                                    |  it does not, or a step hangs
///                                                 quarantined <------+
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// Written down, and on its way to vfio-pci, or back.
    Reserved,
    Bound,
    /// In a VM that runs.
    Attached,
    Resetting,
    /// It does not answer, or a step of the kernel's did not end. Given to nobody; `vfio.recover` and `vfio.release` try again.
    Quarantined,
}

impl DeviceState {
    pub const fn as_str(self) -> &'static str {
        match self {
            DeviceState::Reserved => "reserved",
            DeviceState::Bound => "bound",
            DeviceState::Attached => "attached",
            DeviceState::Resetting => "resetting",
            DeviceState::Quarantined => "quarantined",
        }
    }
}
