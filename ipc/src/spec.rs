//! What one virtual machine is made of, as the worker asks for it.
//!
//! There is no path and no QEMU option in here. Files travel as file descriptors beside the message, in the order
//! that [`VmSpec::fds`] gives; only the supervisor renders an argument vector.

use crate::name::{Bdf, CommandLine, Cpus, Forward, Mac, MiB, QemuName, Queues, ShareName, Tag};
use serde::{Deserialize, Serialize};

/// One virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Which of the granted QEMU binaries.
    pub qemu: QemuName,
    pub accelerator: Accelerator,
    pub cpus: Cpus,
    pub memory: MiB,
    pub boot: Boot,
    pub disks: Vec<Disk>,
    pub nics: Vec<Nic>,
    /// PCI functions that `vfio.bind` bound for this VM.
    pub devices: Vec<Bdf>,
    /// Directories that `mount.attach` attached for this VM, given to the guest through virtiofsd.
    pub shares: Vec<Share>,
}

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// The processor, through `/dev/kvm`.
    Kvm,
    /// QEMU's own translator: slow, and needs nothing.
    Tcg,
}

/// What the machine starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Boot {
    /// A kernel of its own choosing, and perhaps an initial RAM disk: fds `kernel` and `initrd`.
    Kernel { command_line: CommandLine, initrd: Presence, firmware: Presence },
    /// The first disk, through QEMU's built-in firmware or fd `firmware`.
    Disk { firmware: Presence },
}

/// Whether an optional file comes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Presence {
    Absent,
    Given,
}

/// One disk; its file is an fd `disk`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    pub format: DiskFormat,
    pub access: DiskAccess,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskAccess {
    ReadOnly,
    ReadWrite,
}

/// One network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    pub mac: Mac,
    pub backend: Backend,
}

/// What a network card is plugged into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Backend {
    /// A network of its own that ends in a process on the host (passt, or QEMU's user-mode network): no privilege needed.
    User { egress: Egress, forwards: Vec<Forward> },
    /// The tap that `tap.open` opened for the card of this number. The supervisor has its queues, and nobody else before QEMU.
    Tap { queues: Queues },
}

impl Nic {
    /// The ports of the host that lead to it without root's doing.
    pub fn forwards(&self) -> &[Forward] {
        match &self.backend {
            Backend::User { forwards, .. } => forwards,
            Backend::Tap { .. } => &[],
        }
    }

    /// The queues of its tap; 0 where it has none.
    pub fn queues(&self) -> u16 {
        match &self.backend {
            Backend::User { .. } => 0,
            Backend::Tap { queues } => queues.get(),
        }
    }
}

/// A directory that the guest can mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    pub share: ShareName,
    pub tag: Tag,
}

/// Where the guest may open connections to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Egress {
    /// Nowhere: it only answers what comes in through its forwards.
    Closed,
    /// Wherever the host can, *the host's own loopback services included* (QEMU's user-mode network maps
    /// 10.0.2.2 to it); needs the grant `forwards.egress`.
    Host,
}

/// What a file descriptor that comes with a request must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdRole {
    pub name: &'static str,
    pub kind: FdKind,
    pub access: FdAccess,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdKind {
    RegularFile,
    RegularFileOrBlockDevice,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdAccess {
    /// `O_WRONLY` and `O_APPEND`: QEMU and the worker write to the end, whoever truncates or rotates the file. No protection from a holder who means harm: it can
    /// clear the flag (fcntl(2)), and truncate.
    Append,
    ReadOnly,
    ReadWrite,
}

/// More than any real machine needs; bounds the file descriptors of one frame.
pub const MAX_DISKS: usize = 8;
/// As above.
pub const MAX_NICS: usize = 4;
/// As above: a host with 8 GPUs and 4 NVSwitches, and some cards.
pub const MAX_DEVICES: usize = 16;
/// As above.
pub const MAX_SHARES: usize = 8;
/// Forwards of one network card.
pub const MAX_FORWARDS: usize = 32;

const fn role(name: &'static str, kind: FdKind, access: FdAccess) -> FdRole {
    FdRole { name, kind, access }
}
/// QEMU's own messages.
pub const LOG: FdRole = role("log", FdKind::RegularFile, FdAccess::Append);
/// What the guest writes to its first serial port.
pub const CONSOLE: FdRole = role("console", FdKind::RegularFile, FdAccess::Append);
pub const KERNEL: FdRole = role("kernel", FdKind::RegularFile, FdAccess::ReadOnly);
pub const INITRD: FdRole = role("initrd", FdKind::RegularFile, FdAccess::ReadOnly);
pub const FIRMWARE: FdRole = role("firmware", FdKind::RegularFile, FdAccess::ReadOnly);
pub const DISK_READ_ONLY: FdRole = role("disk", FdKind::RegularFileOrBlockDevice, FdAccess::ReadOnly);
pub const DISK_READ_WRITE: FdRole = role("disk", FdKind::RegularFileOrBlockDevice, FdAccess::ReadWrite);

impl VmSpec {
    /// The file descriptors that must come with this specification, in this order:
    /// log, console, \[kernel\], \[initrd\], \[firmware\], disks.
    pub fn fds(&self) -> Vec<FdRole> {
        let mut roles = vec![LOG, CONSOLE];
        let firmware = match &self.boot {
            Boot::Kernel { initrd, firmware, .. } => {
                roles.push(KERNEL);
                roles.extend((*initrd == Presence::Given).then_some(INITRD));
                *firmware
            }
            Boot::Disk { firmware } => *firmware,
        };
        roles.extend((firmware == Presence::Given).then_some(FIRMWARE));
        roles.extend(self.disks.iter().map(|disk| match disk.access {
            DiskAccess::ReadOnly => DISK_READ_ONLY,
            DiskAccess::ReadWrite => DISK_READ_WRITE,
        }));
        roles
    }
}
