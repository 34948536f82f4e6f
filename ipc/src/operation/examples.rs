//! One well-formed value of every request and reply (see [`Example`]).

use super::*;
use crate::name::{CommandLine, QemuName, Tag};
use crate::spec::{Accelerator, Backend, Boot, Disk, DiskAccess, DiskFormat, Egress, Nic, Presence, Share, VmSpec};
use std::net::{IpAddr, Ipv4Addr};

// Constants that keep the rules of their types; the tests below would fail to build an example otherwise.
fn ok<T, E: std::fmt::Display>(value: Result<T, E>) -> T {
    value.unwrap_or_else(|error| unreachable!("an example breaks its own rule: {error}"))
}
fn slot() -> Slot {
    ok(Slot::new(0))
}
fn tenancy() -> Tenancy {
    Tenancy { slot: slot(), claim: RequestId { session: 1, serial: 1 } }
}
fn label() -> Label {
    ok(Label::new("example"))
}

fn mac() -> Mac {
    ok(Mac::new("52:54:00:12:34:56"))
}
fn function() -> Bdf {
    ok(Bdf::new("0000:65:00.0"))
}
fn share() -> ShareName {
    ok(ShareName::new("models"))
}
fn ip(last: u8) -> IpText {
    IpText(IpAddr::V4(Ipv4Addr::new(10, 77, 0, last)))
}
fn forward() -> Forward {
    Forward { protocol: Protocol::Tcp, host_address: IpText(IpAddr::V4(Ipv4Addr::LOCALHOST)), host_port: ok(Port::new(8080)), guest_port: ok(Port::new(80)) }
}
fn device() -> DeviceRecord {
    let function = FunctionRecord { function: function(), vendor: 0x10de, device: 0x2330, class: 0x03_0200, mmio_mib: 131_105, resettable: true };
    DeviceRecord { group: 7, state: DeviceState::Bound, functions: vec![function], slot: Some(slot()), label: Some(label()), passing: None, trouble: None }
}

impl Example for Inventory {
    fn example() -> Self {
        Inventory { after: None }
    }
}
impl Example for HostInventory {
    fn example() -> Self {
        HostInventory {
            version: crate::VERSION.into(),
            kernel: "6.5.0".into(),
            started_ms: 1,
            vms: vec![VmRecord {
                slot: slot(),
                claim: tenancy().claim,
                label: label(),
                state: SlotState::Exited,
                uid: 200_000,
                pid: Some(1),
                spawned_ms: Some(1),
                exit: Some(ExitStatus::Code(0)),
                adopted: false,
                cpus: Cpus::new(1).ok(),
                memory: MiB::new(16).ok(),
                accelerator: Some(Accelerator::Kvm),
            }],
            more: false,
            vms_total: 1,
            kvm: KvmVerdict::Lies { reason: "example".into() },
            qemu: vec![QemuGrant { name: ok(QemuName::new("default")), path: "/usr/bin/qemu-system-x86_64".into(), trouble: None }],
            limits: Limits { vms: 1, memory_mib: 1, memory_mib_used: 0, cpus_each: 1 },
            audit: AuditState { sequence: 1, head: "00".into(), trouble: None, lost: 0 },
            scopes: true,
            devices: vec![device()],
            devices_total: 1,
        }
    }
}
impl Example for Claim {
    fn example() -> Self {
        Claim { label: label() }
    }
}
impl Example for Claimed {
    fn example() -> Self {
        Claimed { tenancy: tenancy(), uid: 200_000 }
    }
}
impl Example for Release {
    fn example() -> Self {
        Release { tenancy: tenancy() }
    }
}
impl Example for Released {
    fn example() -> Self {
        Released { existed: true }
    }
}
impl Example for Spawn {
    fn example() -> Self {
        Spawn {
            tenancy: tenancy(),
            spec: VmSpec {
                qemu: ok(QemuName::new("default")),
                accelerator: Accelerator::Tcg,
                cpus: ok(Cpus::new(1)),
                memory: ok(MiB::new(256)),
                boot: Boot::Kernel { command_line: ok(CommandLine::new("console=ttyS0")), initrd: Presence::Given, firmware: Presence::Absent },
                disks: vec![Disk { format: DiskFormat::Raw, access: DiskAccess::ReadOnly }],
                nics: vec![Nic { mac: mac(), backend: Backend::User { egress: Egress::Closed, forwards: vec![forward()] } }],
                devices: Vec::new(),
                shares: vec![Share { share: share(), tag: ok(Tag::new("models")) }],
            },
        }
    }
}
impl Example for Spawned {
    fn example() -> Self {
        Spawned { pid: 1, spawned_ms: 1 }
    }
}
impl Example for Attach {
    fn example() -> Self {
        Attach { tenancy: tenancy() }
    }
}
impl Example for Attached {
    fn example() -> Self {
        Attached { pid: 1 }
    }
}
impl Example for Console {
    fn example() -> Self {
        Console { tenancy: tenancy() }
    }
}
impl Example for ConsoleOpened {
    fn example() -> Self {
        ConsoleOpened {}
    }
}
impl Example for Signal {
    fn example() -> Self {
        Signal { tenancy: tenancy(), signal: SignalKind::Kill }
    }
}
impl Example for Signalled {
    fn example() -> Self {
        Signalled { delivered: true }
    }
}
impl Example for Bind {
    fn example() -> Self {
        Bind { tenancy: tenancy(), function: function() }
    }
}
impl Example for Bound {
    fn example() -> Self {
        Bound { device: device() }
    }
}
impl Example for Unbind {
    fn example() -> Self {
        Unbind { tenancy: tenancy(), function: function() }
    }
}
impl Example for Unbound {
    fn example() -> Self {
        Unbound { existed: true }
    }
}
impl Example for Recover {
    fn example() -> Self {
        Recover { tenancy: tenancy(), function: function() }
    }
}
impl Example for Recovered {
    fn example() -> Self {
        Recovered { device: device() }
    }
}
impl Example for OpenTap {
    fn example() -> Self {
        OpenTap {
            tenancy: tenancy(),
            nic: ok(NicIndex::new(0)),
            network: ok(NetworkName::new("lan")),
            mac: mac(),
            address: Some(ip(2)),
            queues: ok(Queues::new(2)),
        }
    }
}
impl Example for TapOpened {
    fn example() -> Self {
        TapOpened { name: "dvm0n0".into(), mtu: 1500, address: Some(ip(2)), gateway: Some(ip(1)) }
    }
}
impl Example for Publish {
    fn example() -> Self {
        let host_address = IpText(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)));
        Publish { tenancy: tenancy(), nic: ok(NicIndex::new(0)), forwards: vec![Forward { host_address, ..forward() }] }
    }
}
impl Example for Published {
    fn example() -> Self {
        Published {}
    }
}
impl Example for Withdraw {
    fn example() -> Self {
        Withdraw { tenancy: tenancy() }
    }
}
impl Example for Withdrawn {
    fn example() -> Self {
        Withdrawn { existed: true }
    }
}
impl Example for Listen {
    fn example() -> Self {
        Listen { protocol: Protocol::Tcp, address: ip(1), port: ok(Port::new(443)) }
    }
}
impl Example for Listening {
    fn example() -> Self {
        Listening {}
    }
}
impl Example for AttachMount {
    fn example() -> Self {
        AttachMount { tenancy: tenancy(), share: share(), access: DiskAccess::ReadOnly }
    }
}
impl Example for MountAttached {
    fn example() -> Self {
        MountAttached {}
    }
}
impl Example for DetachMount {
    fn example() -> Self {
        DetachMount { tenancy: tenancy(), share: share() }
    }
}
impl Example for MountDetached {
    fn example() -> Self {
        MountDetached { existed: true }
    }
}
impl Example for ConnectSocket {
    fn example() -> Self {
        ConnectSocket { socket: ok(SocketName::new("downloader")) }
    }
}
impl Example for SocketConnected {
    fn example() -> Self {
        SocketConnected {}
    }
}
