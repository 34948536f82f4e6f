//! The PCI devices of the lab: one of each shape that a host may have. Their addresses are fixed; their groups are what the kernel makes of them.

use super::Lab;
use std::collections::BTreeSet;
use std::path::Path;

/// `edu`, alone in its group, without a driver and without any way to be reset.
pub const EDU: &str = "0000:00:03.0";
/// A network card (`e1000e`, 8086:10d3), alone in its group, not used.
pub const CARD: &str = "0000:00:04.0";
pub const CARD_MAC: &str = "52:54:00:d1:a0:04";
/// The card (`virtio-net`) that the lab lives on: up, with an address and the default route.
pub const LIVE: &str = "0000:00:05.0";
pub const LIVE_MAC: &str = "52:54:00:d1:a0:05";
/// The disk that the lab lives on (`virtio-blk`): the root file system.
pub const ROOT: &str = "0000:00:02.0";
/// The disk with the programs of this build (`virtio-blk`): mounted, and nothing else.
pub const PAYLOAD: &str = "0000:00:0b.0";
/// Two functions of one device, which share a group: a card, not used, ... (`e1000`, 8086:100e: of an `e1000e` the kernel knows that its functions are
/// isolated, and each would have a group of its own.)
pub const SHARED_CARD: &str = "0000:00:06.0";
pub const SHARED_CARD_MAC: &str = "52:54:00:d1:a0:06";
/// ... and an `edu`.
pub const SHARED_EDU: &str = "0000:00:06.1";
/// An NVMe disk (64 MiB, empty), not used. A test mounts it, swaps to it or maps it.
pub const NVME: &str = "0000:00:07.0";
/// The root port before [`PORT_CARD`].
pub const PORT: &str = "0000:00:08.0";
/// A network card (`e1000e`) behind a root port.
pub const PORT_CARD: &str = "0000:01:00.0";
pub const PORT_CARD_MAC: &str = "52:54:00:d1:a0:08";
/// A bridge to conventional PCI, in one group with what is behind it: [`BRIDGED_EDU`] and [`BRIDGED_TEST`].
pub const BRIDGE: &str = "0000:00:09.0";
pub const BRIDGED_EDU: &str = "0000:02:01.0";
/// `pci-testdev`.
pub const BRIDGED_TEST: &str = "0000:02:02.0";
/// An NVMe controller without a disk, behind a root port, that can have two virtual functions (SR-IOV); it has none until a test asks for them.
pub const PHYSICAL: &str = "0000:03:00.0";
/// What the lab's agent speaks through.
pub const AGENT: &str = "0000:00:0c.0";

impl Lab {
    /// The driver that has the device now.
    pub fn driver(&self, bdf: &str) -> Option<String> {
        let link = self.link(&format!("/sys/bus/pci/devices/{bdf}/driver"))?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// The number of its IOMMU group: `/dev/vfio/NUMBER`.
    #[track_caller]
    pub fn group(&self, bdf: &str) -> u32 {
        let link = self.link(&format!("/sys/bus/pci/devices/{bdf}/iommu_group"));
        let number = link.as_deref().and_then(Path::file_name).and_then(|name| name.to_str()?.parse().ok());
        number.unwrap_or_else(|| panic!("{bdf} is in no IOMMU group ({link:?})"))
    }

    /// All devices in its IOMMU group, itself too.
    #[track_caller]
    pub fn group_members(&self, bdf: &str) -> BTreeSet<String> {
        self.sh(&format!("ls /sys/kernel/iommu_groups/{}/devices", self.group(bdf))).lines().map(str::to_owned).collect()
    }

    /// The network interface that the device's driver made, once udev has named it.
    pub fn interface(&self, bdf: &str) -> Option<String> {
        let names = self.try_sh(&format!("udevadm settle -t 10; ls /sys/bus/pci/devices/{bdf}/net")).stdout;
        names.lines().next().map(str::to_owned)
    }
}
