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

use diarch_ipc::name::{CommandLine, Cpus, Forward, Label, Mac, MiB, Port, QemuName};
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
    pub egress: Egress,
    pub forwards: Vec<Forward>,
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

impl Machine {
    /// Each field by its name in the file, in words: what a person compares.
    fn fields(&self) -> Vec<(&'static str, String)> {
        let path = |path: &Option<PathBuf>| path.as_ref().map_or_else(|| "none".to_owned(), |p| p.display().to_string());
        let list = |items: Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
        let word = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
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
            ("forwards", list(self.forwards.iter().map(|f| format!("{} {}:{} -> {}", f.protocol, f.host_address, f.host_port, f.guest_port)).collect())),
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

    /// Where a port of the host that is forwarded to this VM can be reached from here.
    pub fn probe_address(&self, host_port: Port) -> std::net::SocketAddr {
        use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
        let forward = self.forwards.iter().find(|f| f.host_port == host_port && f.protocol == diarch_ipc::name::Protocol::Tcp);
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

    #[test]
    fn a_difference_names_the_field_and_both_values() {
        let old = desired("a").machine;
        let mut new = old.clone();
        new.cpus = Cpus::new(2).unwrap();
        new.kernel = Some("/k".into());
        assert_eq!(old.differences(&new), ["cores: 1 -> 2", "kernel: /dev/null -> /k"]);
        assert!(old.differences(&old).is_empty());
    }
}
