//! One well-formed value of every request and reply (see [`Example`]).

use super::*;
use crate::name::{CommandLine, Forward, IpText, Mac, Port, Protocol, QemuName};
use crate::spec::{Accelerator, Boot, Disk, DiskAccess, DiskFormat, Egress, Nic, Presence};
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
        let forward = Forward {
            protocol: Protocol::Tcp,
            host_address: IpText(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            host_port: ok(Port::new(8080)),
            guest_port: ok(Port::new(80)),
        };
        Spawn {
            tenancy: tenancy(),
            spec: VmSpec {
                qemu: ok(QemuName::new("default")),
                accelerator: Accelerator::Tcg,
                cpus: ok(Cpus::new(1)),
                memory: ok(MiB::new(256)),
                boot: Boot::Kernel { command_line: ok(CommandLine::new("console=ttyS0")), initrd: Presence::Given, firmware: Presence::Absent },
                disks: vec![Disk { format: DiskFormat::Raw, access: DiskAccess::ReadOnly }],
                nics: vec![Nic { mac: ok(Mac::new("52:54:00:12:34:56")), egress: Egress::Closed, forwards: vec![forward] }],
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
