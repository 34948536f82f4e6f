//! The grants that a set of VM files needs: as far as each of them goes, and no farther.

use crate::vmfile::Desired;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

/// A whole grants file.
pub fn needed(vms: &[Desired], qemu: &Path, user: u32) -> String {
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
    text
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
        let text = needed(&[one, off], Path::new("/usr/bin/qemu"), 1000);
        assert!(text.contains("max = 1\n") && text.contains("memory_mib = 100\n") && text.contains("allow = []"), "{text}");
        assert!(text.contains("[qemu.\"default\"]\npath = \"/usr/bin/qemu\""), "{text}");
    }
}
