//! The VM files: what should exist.
//!
//! ```text
//!   vms/web.json --parse--> Desired --+
//!   vms/db.json  --parse--> Desired --+--set--> the VMs that are good, in file-name order
//!   vms/oops.json -parse--> FileProblem         + every problem of every file
//! ```
//!
//! A bad file never stops the good ones, and never a VM that runs: see [`crate::plan`].

mod parse;
mod set;

pub use set::{Files, read, validate};

use diarch_ipc::name::{Bdf, CommandLine, Cpus, Forward, IpText, Label, Mac, MiB, NetworkName, Port, Protocol, QemuName, Queues, ShareName, Tag};
use diarch_ipc::spec::{DiskAccess, DiskFormat, Egress};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// One VM as its file wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    pub name: Label,
    /// The name of its file, without the directory.
    pub file: String,
    /// SHA-256 of the file, hex: an operator's stop holds until it changes.
    pub revision: String,
    pub enabled: bool,
    pub machine: Machine,
    pub health: Option<Health>,
    pub restart: RestartPolicy,
    /// What was read and not used.
    pub warnings: Vec<String>,
}

/// What a VM is made of: a change of any of it needs a new QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    pub qemu: QemuName,
    pub accel: Accel,
    pub cpus: Cpus,
    pub memory: MiB,
    pub mac: Mac,
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub command_line: CommandLine,
    pub firmware: Option<PathBuf>,
    pub disks: Vec<DiskFile>,
    /// Of QEMU's user-mode network, which is the VM's where it has no tap.
    pub egress: Egress,
    /// As above.
    pub forwards: Vec<Forward>,
    // The records of an older release have none of these: what it started is still to be compared.
    #[serde(default)]
    pub tap: Option<Tap>,
    #[serde(default)]
    pub devices: Vec<Bdf>,
    #[serde(default)]
    pub shares: Vec<SharedDirectory>,
}

/// A network of the host's, in the place of QEMU's user-mode network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tap {
    pub network: NetworkName,
    pub queues: Queues,
    /// The guest's own, where the network does not give it one.
    pub address: Option<IpText>,
    /// Ports of the host that root's packet filter leads into the guest.
    pub publish: Vec<Forward>,
}

/// Something granted that the guest can mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedDirectory {
    pub share: ShareName,
    pub tag: Tag,
    pub access: DiskAccess,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskFile {
    pub path: PathBuf,
    pub format: DiskFormat,
    pub access: DiskAccess,
}

/// What executes the guest: `Auto` is KVM where KVM was seen to work, and TCG elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    Auto,
    Kvm,
    Tcg,
}

/// When a VM that ended by itself is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Also after the guest powered itself off.
    Always,
    /// After a crash, a panic or a health failure. A guest's power-off stays off.
    OnFailure,
    Never,
}

/// How to tell that a VM does its work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    pub probe: Probe,
    pub interval: Duration,
    pub timeout: Duration,
    /// So many failures in a row make it unhealthy.
    pub failures: u32,
    /// From the start of QEMU on; failures in it don't count. Five times as long where TCG executes the guest.
    pub start_grace: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    Http { host_port: Port, path: String },
    Tcp { host_port: Port },
    Qmp,
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Probe::Http { host_port, path } => write!(f, "http :{host_port}{path}"),
            Probe::Tcp { host_port } => write!(f, "tcp :{host_port}"),
            Probe::Qmp => f.write_str("qmp"),
        }
    }
}

impl std::fmt::Display for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} queue{}", self.network, self.queues, if self.queues.get() == 1 { "" } else { "s" })?;
        self.address.map_or(Ok(()), |address| write!(f, ", {address}"))
    }
}

impl Machine {
    /// Each field by its name in the file, in words: what a person compares.
    fn fields(&self) -> Vec<(&'static str, String)> {
        let path = |path: &Option<PathBuf>| path.as_ref().map_or_else(|| "none".to_owned(), |p| p.display().to_string());
        let list = |items: Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
        let word = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        let forward = |f: &Forward| format!("{} {}:{} -> {}", f.protocol, f.host_address, f.host_port, f.guest_port);
        vec![
            ("qemu", self.qemu.to_string()),
            ("accel", word(&self.accel)),
            ("cores", self.cpus.to_string()),
            ("memory (MiB)", self.memory.to_string()),
            ("mac_address", self.mac.to_string()),
            ("kernel", path(&self.kernel)),
            ("initrd", path(&self.initrd)),
            ("cmdline", format!("\"{}\"", self.command_line)),
            ("firmware", path(&self.firmware)),
            ("disk", list(self.disks.iter().map(|d| format!("{} ({}, {})", d.path.display(), word(&d.format), word(&d.access))).collect())),
            ("egress", word(&self.egress)),
            ("forwards", list(self.forwards.iter().map(forward).collect())),
            ("tap", self.tap.as_ref().map_or_else(|| "none".to_owned(), Tap::to_string)),
            ("publish", list(self.tap.iter().flat_map(|tap| &tap.publish).map(forward).collect())),
            ("devices", list(self.devices.iter().map(Bdf::to_string).collect())),
            ("shares", list(self.shares.iter().map(|s| format!("{} as {} ({})", s.share, s.tag, word(&s.access))).collect())),
        ]
    }

    /// One sentence for each field in which `wanted` differs from this.
    pub fn differences(&self, wanted: &Machine) -> Vec<String> {
        self.fields()
            .into_iter()
            .zip(wanted.fields())
            .filter(|(old, new)| old != new)
            .map(|((field, old), (_, new))| format!("{field}: {old} -> {new}"))
            .collect()
    }

    /// The ports of the host that lead into the VM, by either kind of network.
    pub fn ports(&self) -> &[Forward] {
        self.tap.as_ref().map_or(&self.forwards, |tap| &tap.publish)
    }

    /// Where a port of the host that leads to this VM can be reached from here. `guest`: its own address on a tap, where it is known; there the packet filter,
    /// which takes what comes from outside, is not in between.
    pub fn probe_address(&self, host_port: Port, guest: Option<std::net::IpAddr>) -> std::net::SocketAddr {
        use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
        let forward = self.ports().iter().find(|f| f.host_port == host_port && f.protocol == Protocol::Tcp);
        if let Some(guest) = self.tap.as_ref().and_then(|tap| guest.or(tap.address.map(|address| address.0))) {
            return (guest, forward.map_or(host_port, |forward| forward.guest_port).get()).into();
        }
        let address = match forward.map(|f| f.host_address.0) {
            None => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(IpAddr::V4(any)) if any.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(IpAddr::V6(any)) if any.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
            Some(address) => address,
        };
        (address, host_port.get()).into()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A VM that runs from a kernel, for tests of other modules.
    pub(crate) fn desired(name: &str) -> Desired {
        let text = format!(r#"{{"name": "{name}", "qemu_configuration": {{"cores": 1, "mem_mb": 64, "accel": "tcg"}}, "image": {{"kernel": "/dev/null"}}}}"#);
        parse::parse(&format!("{name}.json"), text.as_bytes()).unwrap()
    }

    pub(crate) fn tap() -> Tap {
        let port = |n| Port::new(n).unwrap();
        let address = |text: &str| IpText(text.parse().unwrap());
        let forward = Forward { protocol: Protocol::Tcp, host_address: address("192.0.2.1"), host_port: port(443), guest_port: port(8443) };
        let network = NetworkName::new("lan").unwrap();
        Tap { network, queues: Queues::new(2).unwrap(), address: Some(address("10.0.0.5")), publish: vec![forward] }
    }

    #[test]
    fn a_difference_names_the_field_and_both_values() {
        let old = desired("a").machine;
        let mut new = old.clone();
        new.cpus = Cpus::new(2).unwrap();
        new.kernel = Some("/k".into());
        assert_eq!(old.differences(&new), ["cores: 1 -> 2", "kernel: /dev/null -> /k"]);
        assert!(old.differences(&old).is_empty());
    }

    #[test]
    fn devices_shares_and_the_network_are_compared_too() {
        let old = desired("a").machine;
        let mut new = old.clone();
        new.devices = vec![Bdf::new("0000:65:00.0").unwrap()];
        new.shares = vec![SharedDirectory { share: ShareName::new("models").unwrap(), tag: Tag::new("m").unwrap(), access: DiskAccess::ReadOnly }];
        new.tap = Some(tap());
        assert_eq!(
            old.differences(&new),
            [
                "tap: none -> lan, 2 queues, 10.0.0.5",
                "publish: none -> tcp 192.0.2.1:443 -> 8443",
                "devices: none -> 0000:65:00.0",
                "shares: none -> models as m (readonly)"
            ]
        );
    }

    /// An upgrade must not restart VMs: what a machine gains later needs a default, and this text stays as it is.
    #[test]
    fn a_machine_of_release_0_1_is_read() {
        let text = r#"{"qemu":"default","accel":"tcg","cpus":1,"memory":64,"mac":"52:54:00:ca:97:81","kernel":"/dev/null","initrd":null,"command_line":"",
            "firmware":null,"disks":[],"egress":"closed","forwards":[]}"#;
        assert_eq!(serde_json::from_str::<Machine>(text).unwrap(), desired("a").machine);
    }

    #[test]
    fn a_vm_on_a_tap_is_probed_at_its_own_address() {
        let port = |n| Port::new(n).unwrap();
        let mut machine = desired("a").machine;
        assert_eq!(machine.probe_address(port(80), None).to_string(), "127.0.0.1:80");
        machine.tap = Some(tap());
        let given: std::net::IpAddr = "10.0.0.9".parse().unwrap();
        assert_eq!(machine.probe_address(port(443), Some(given)).to_string(), "10.0.0.9:8443");
        assert_eq!(machine.probe_address(port(443), None).to_string(), "10.0.0.5:8443");
        assert_eq!(machine.probe_address(port(80), None).to_string(), "10.0.0.5:80");
        machine.tap = Some(Tap { address: None, ..tap() });
        assert_eq!(machine.probe_address(port(443), None).to_string(), "192.0.2.1:443");
    }
}
