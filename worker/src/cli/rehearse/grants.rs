//! The grants that a set of VM files needs: as far as each of them goes, and no farther.

use crate::vmfile::Desired;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

/// A whole grants file.
pub fn needed(vms: &[Desired], stage: Option<&Path>, qemu: &Path, user: u32) -> String {
    let enabled: Vec<&Desired> = vms.iter().filter(|vm| vm.enabled).collect();
    let memory: u64 = enabled.iter().map(|vm| u64::from(vm.machine.memory.get())).sum();
    let cpus = enabled.iter().map(|vm| vm.machine.cpus.get()).max().unwrap_or(1);
    let names: BTreeSet<&str> = enabled.iter().map(|vm| vm.machine.qemu.as_str()).collect();
    let mut text = format!(
        "[worker]\nuser = {user}\n\n[vms]\nmax = {}\nuid_first = 2100000000\nmemory_mib = {}\ncpus_each = {cpus}\nkvm = false\n",
        enabled.len().max(1),
        memory.max(16)
    );
    // Writing to memory can't fail.
    for name in names {
        let _ = write!(text, "\n[qemu.{}]\npath = {}\n", key(name), quoted(&qemu.display().to_string()));
    }
    let forwards: BTreeSet<String> =
        enabled.iter().flat_map(|vm| &vm.machine.forwards).map(|forward| socket(&forward.host_address.to_string(), forward.host_port.get())).collect();
    let egress = enabled.iter().any(|vm| vm.machine.egress == diarch_ipc::spec::Egress::Host);
    let _ = write!(text, "\n[forwards]\nallow = {}\negress = {egress}\n", list(forwards.iter()));
    more(&mut text, &enabled, stage);
    text
}

/// What only some VMs have: devices, networks of the host's, published ports, shared directories. Where the host keeps them, no VM file says: a bridge or a
/// directory in here stands for one that root chooses.
fn more(text: &mut String, vms: &[&Desired], stage: Option<&Path>) {
    let named = vms.iter().flat_map(|vm| &vm.machine.devices).map(|function| function.as_str().to_owned());
    let devices: BTreeSet<String> = named.flat_map(|function| group(stage, function)).collect();
    if !devices.is_empty() {
        let _ = write!(text, "\n[devices]\nallow = {}\n", list(devices.iter()));
    }
    let taps = || vms.iter().filter_map(|vm| vm.machine.tap.as_ref());
    // A guest that says its own address is on a bridge; a routed network gives one.
    let networks: BTreeMap<&str, bool> = taps().map(|tap| (tap.network.as_str(), tap.address.is_some())).collect();
    for (number, (name, bridged)) in networks.into_iter().enumerate() {
        let place = if bridged { "bridge = \"br0\"".to_owned() } else { format!("routed = \"10.77.{}.0/18\"", 64 * (number % 4)) };
        let _ = write!(text, "\n[network.{}]\n{place}\n", key(name));
    }
    let published: BTreeSet<String> =
        taps().flat_map(|tap| &tap.publish).map(|forward| socket(&forward.host_address.to_string(), forward.host_port.get())).collect();
    if !published.is_empty() {
        let _ = write!(text, "\n[ports]\npublish = {}\n", list(published.iter()));
    }
    let mut shares: BTreeMap<&str, bool> = BTreeMap::new();
    for share in vms.iter().flat_map(|vm| &vm.machine.shares) {
        *shares.entry(share.share.as_str()).or_default() |= share.access == diarch_ipc::spec::DiskAccess::ReadWrite;
    }
    for (name, write) in shares {
        let _ = write!(text, "\n[mounts.{}]\ntmpfs_mib = 64\nwrite = {write}\n", key(name));
    }
}

/// A function comes with its whole IOMMU group, of which each must be granted (bridges need not be, and may).
fn group(stage: Option<&Path>, function: String) -> Vec<String> {
    let members = stage.map(|stage| stage.join("sys/bus/pci/devices").join(&function).join("iommu_group/devices"));
    let names = members.and_then(|members| std::fs::read_dir(members).ok()).into_iter().flatten().flatten();
    names.filter_map(|entry| entry.file_name().into_string().ok()).chain([function]).collect()
}

fn socket(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

fn list<'a>(items: impl Iterator<Item = &'a String>) -> String {
    format!("[{}]", items.map(|item| quoted(item)).collect::<Vec<_>>().join(", "))
}

/// A label may hold a dot, which parts keys in TOML.
fn key(name: &str) -> String {
    quoted(name)
}

/// A basic string of TOML: what JSON escapes, it reads.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmfile::tests::desired;

    #[test]
    fn what_is_granted_is_what_the_files_name() {
        let mut one = desired("one");
        one.machine.memory = diarch_ipc::name::MiB::new(100).unwrap();
        let mut off = desired("off");
        off.enabled = false;
        let text = needed(&[one, off], None, Path::new("/usr/bin/qemu"), 1000);
        assert!(text.contains("max = 1\n") && text.contains("memory_mib = 100\n") && text.contains("allow = []"), "{text}");
        assert!(text.contains("[qemu.\"default\"]\npath = \"/usr/bin/qemu\""), "{text}");
    }
}
