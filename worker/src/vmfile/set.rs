//! All VM files together: reading a directory, and what no file can know alone.

use super::{Desired, parse};
use crate::control::protocol::FileProblem;
use rustix::fs::{Mode, OFlags};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A VM file holds a few hundred bytes; this bounds what a wrong one can cost.
const MAX_BYTES: u64 = 1024 * 1024;

/// What a directory of VM files says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Files {
    /// The good ones, in file-name order.
    pub vms: Vec<Desired>,
    /// What is wrong, in file-name order.
    pub problems: Vec<FileProblem>,
    /// Files that are there and can't be used: a VM that was started from one goes on as it is.
    pub broken: Vec<String>,
    /// The directory itself could not be read, so that nothing is known about any file.
    pub unreadable: bool,
}

/// Reads a file, or all of a directory: the VMs that are good, and every problem of every file. Needs no running worker.
pub fn validate(path: &Path) -> (Vec<Desired>, Vec<FileProblem>) {
    let files = read(path);
    (files.vms, files.problems)
}

/// As [`validate`], with what a running worker must know besides.
pub fn read(path: &Path) -> Files {
    let mut files = Files::default();
    let whole = |reason: String| FileProblem { file: path.display().to_string(), path: "$".into(), line: None, reason };
    let names = match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => match names(path) {
            Ok(names) => names,
            Err(error) => {
                files.unreadable = true;
                files.problems.push(whole(format!("the directory can't be read: {error}")));
                return files;
            }
        },
        Ok(_) => {
            let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            add(&mut files, &name, path);
            together(&mut files);
            return files;
        }
        Err(error) => {
            files.unreadable = true;
            files.problems.push(whole(error.to_string()));
            return files;
        }
    };
    for name in names {
        add(&mut files, &name, &path.join(&name));
    }
    together(&mut files);
    files
}

/// The names that count: `*.json`, and nothing hidden (an editor's temporary file, say), in order.
fn names(directory: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".json") && !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn add(files: &mut Files, name: &str, path: &Path) {
    let parsed = match contents(path) {
        Ok(bytes) => parse::parse(name, &bytes),
        Err(reason) => Err(vec![FileProblem { file: name.to_owned(), path: "$".into(), line: None, reason }]),
    };
    match parsed {
        Ok(desired) => files.vms.push(desired),
        Err(problems) => {
            files.problems.extend(problems);
            files.broken.push(name.to_owned());
        }
    }
}

fn contents(path: &Path) -> Result<Vec<u8>, String> {
    // O_NONBLOCK: opening a FIFO would otherwise wait for a writer, for ever.
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()).map_err(|e| format!("can't be opened: {e}"))?;
    let file = File::from(fd);
    match file.metadata() {
        Ok(found) if found.is_file() => {}
        Ok(_) => return Err("is not a regular file".into()),
        Err(error) => return Err(format!("can't be read: {error}")),
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| format!("can't be read: {e}"))?;
    if bytes.len() as u64 > MAX_BYTES { Err(format!("is larger than {MAX_BYTES} bytes")) } else { Ok(bytes) }
}

/// What two files can't both have. The first in file-name order has it.
fn together(files: &mut Files) {
    let mut names: HashMap<String, String> = HashMap::new();
    let mut macs: HashMap<String, String> = HashMap::new();
    let mut ports: Vec<(diarch_ipc::name::Forward, String)> = Vec::new();
    let mut devices: HashMap<String, String> = HashMap::new();
    let mut addresses: HashMap<String, String> = HashMap::new();
    let mut good = Vec::new();
    for vm in std::mem::take(&mut files.vms) {
        let mut found: Vec<(String, String)> = Vec::new();
        if let Some(first) = names.get(vm.name.as_str()) {
            found.push(("$.name".into(), format!("the name {} is already that of the VM in {first}", vm.name)));
        }
        if vm.enabled {
            if let Some(first) = macs.get(vm.machine.mac.as_str()) {
                found.push(("$.qemu_configuration.mac_address".into(), format!("the MAC address {} is already used in {first}", vm.machine.mac)));
            }
            for (index, function) in vm.machine.devices.iter().enumerate() {
                if let Some(first) = devices.get(function.as_str()) {
                    found.push((format!("$.devices[{index}]"), format!("the device {function} is already that of the VM in {first}")));
                }
            }
            let address = vm.machine.tap.as_ref().and_then(|tap| Some(format!("{} of network {}", tap.address?, tap.network)));
            if let Some((address, first)) = address.as_ref().and_then(|address| Some((address, addresses.get(address)?))) {
                found.push(("$.network.tap.address".into(), format!("the address {address} is already used in {first}")));
            }
            let mine = ports.len();
            let list = if vm.machine.tap.is_some() { "publish" } else { "forwards" };
            for (index, forward) in vm.machine.ports().iter().enumerate() {
                if let Some((other, first)) = ports.iter().find(|(other, _)| clash(other, forward)) {
                    let reason = format!(
                        "{} port {} of {} is already forwarded in {first} (as {}:{})",
                        forward.protocol, forward.host_port, forward.host_address, other.host_address, other.host_port
                    );
                    found.push((format!("$.network.{list}[{index}].host_port"), reason));
                } else {
                    ports.push((*forward, vm.file.clone()));
                }
            }
            if found.is_empty() {
                macs.insert(vm.machine.mac.to_string(), vm.file.clone());
                devices.extend(vm.machine.devices.iter().map(|function| (function.to_string(), vm.file.clone())));
                addresses.extend(address.map(|address| (address, vm.file.clone())));
            } else {
                ports.truncate(mine);
            }
        }
        if found.is_empty() {
            names.insert(vm.name.to_string(), vm.file.clone());
            missing(&vm, &mut files.problems);
            good.push(vm);
        } else {
            files.broken.push(vm.file.clone());
            files.problems.extend(found.into_iter().map(|(path, reason)| FileProblem { file: vm.file.clone(), path, line: None, reason }));
        }
    }
    files.vms = good;
    files.problems.sort_by(|a, b| a.file.cmp(&b.file));
}

/// Whether both can't listen at the same time: a wildcard address takes the port on every address of its family, and
/// `::` takes it on IPv4 too (Linux, `net.ipv6.bindv6only` = 0).
fn clash(a: &diarch_ipc::name::Forward, b: &diarch_ipc::name::Forward) -> bool {
    let (x, y) = (a.host_address.0, b.host_address.0);
    let covers = |any: std::net::IpAddr, other: std::net::IpAddr| any.is_unspecified() && (any.is_ipv6() || other.is_ipv4());
    a.protocol == b.protocol && a.host_port == b.host_port && (x == y || covers(x, y) || covers(y, x))
}

/// Files that an enabled VM names and that can't be opened. The VM stays in the list: the file may come, and its start is tried again.
fn missing(vm: &Desired, problems: &mut Vec<FileProblem>) {
    if !vm.enabled {
        return;
    }
    let machine = &vm.machine;
    let single = [("$.image.kernel", &machine.kernel), ("$.image.initrd", &machine.initrd), ("$.image.firmware", &machine.firmware)];
    let named = single.iter().filter_map(|(path, value)| Some((*path, value.as_ref()?)));
    for (path, file) in named.chain(machine.disks.iter().map(|disk| ("$.image.disk", &disk.path))) {
        if let Err(error) = std::fs::metadata(file) {
            problems.push(FileProblem { file: vm.file.clone(), path: path.into(), line: None, reason: format!("{}: {error}", file.display()) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(name: &str, more: &str) -> String {
        format!(r#"{{"name": "{name}", "qemu_configuration": {{"cores": 1, "mem_mb": 64}}, "image": {{"kernel": "/dev/null"}}{more}}}"#)
    }
    fn forward(address: &str) -> String {
        format!(r#", "network": {{"forwards": [{{"host_address": "{address}", "host_port": 80, "guest_port": 80}}]}}"#)
    }
    fn directory(files: &[(&str, String)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }
    fn good(files: &Files) -> Vec<&str> {
        files.vms.iter().map(|vm| vm.name.as_str()).collect()
    }

    #[test]
    fn a_bad_file_does_not_stop_the_good_ones() {
        let dir = directory(&[
            ("a.json", vm("a", "")),
            ("b.json", "{".into()),
            ("c.json", String::new()),
            ("d.json", vm("d", "")),
            (".e.json", vm("e", "")),
            ("f.txt", vm("f", "")),
        ]);
        let files = read(dir.path());
        assert_eq!(good(&files), ["a", "d"]);
        assert_eq!(files.problems.iter().map(|p| p.file.as_str()).collect::<Vec<_>>(), ["b.json", "c.json"]);
        assert_eq!(files.broken, ["b.json", "c.json"]);
    }

    #[test]
    fn of_two_files_with_one_name_the_first_wins_and_both_are_named() {
        let files = read(directory(&[("1.json", vm("a", "")), ("2.json", vm("a", ""))]).path());
        assert_eq!(files.vms.len(), 1);
        assert_eq!((files.vms[0].file.as_str(), files.problems[0].file.as_str()), ("1.json", "2.json"));
        assert!(files.problems[0].reason.contains("1.json"));
    }

    #[test]
    fn a_wildcard_address_clashes_with_a_specific_one() {
        for (first, second, clashes) in [
            ("0.0.0.0", "127.0.0.1", true),
            ("127.0.0.1", "0.0.0.0", true),
            ("::", "127.0.0.1", true),
            ("127.0.0.1", "127.0.0.2", false),
            ("0.0.0.0", "::1", false),
        ] {
            let files = read(directory(&[("a.json", vm("a", &forward(first))), ("b.json", vm("b", &forward(second)))]).path());
            assert_eq!(files.problems.len(), usize::from(clashes), "{first} {second}: {:?}", files.problems);
        }
    }

    #[test]
    fn a_disabled_vm_takes_no_port() {
        let files = read(directory(&[("a.json", vm("a", &(forward("0.0.0.0") + r#", "enabled": false"#))), ("b.json", vm("b", &forward("0.0.0.0")))]).path());
        assert!(files.problems.is_empty(), "{:?}", files.problems);
    }

    #[test]
    fn a_device_is_the_first_files_and_a_disabled_vm_takes_none() {
        let device = r#", "devices": ["0000:65:00.0"]"#;
        let files = read(directory(&[("a.json", vm("a", device)), ("b.json", vm("b", device))]).path());
        assert_eq!((good(&files), files.broken.as_slice()), (vec!["a"], ["b.json".to_owned()].as_slice()));
        assert_eq!(files.problems[0].path, "$.devices[0]");
        assert!(files.problems[0].reason.contains("a.json"), "{:?}", files.problems);
        let off = device.to_owned() + r#", "enabled": false"#;
        let files = read(directory(&[("a.json", vm("a", &off)), ("b.json", vm("b", device)), ("c.json", vm("c", device))]).path());
        assert_eq!(good(&files), ["a", "b"]);
    }

    #[test]
    fn a_published_port_clashes_with_a_forward_and_an_address_is_one_vms() {
        let publish = |address: &str, guest: &str| {
            format!(
                r#", "network": {{"tap": {{"network": "lan", "address": "{guest}"}},
                    "publish": [{{"host_address": "{address}", "host_port": 80, "guest_port": 80}}]}}"#
            )
        };
        let files = read(directory(&[("a.json", vm("a", &forward("0.0.0.0"))), ("b.json", vm("b", &publish("192.0.2.1", "10.0.0.5")))]).path());
        assert_eq!(files.problems.iter().map(|p| p.path.as_str()).collect::<Vec<_>>(), ["$.network.publish[0].host_port"]);
        assert!(files.problems[0].reason.contains("a.json"), "{:?}", files.problems);
        let two = |second: &str| {
            read(directory(&[("a.json", vm("a", &publish("192.0.2.1", "10.0.0.5"))), ("b.json", vm("b", &publish("192.0.2.2", second)))]).path()).problems
        };
        assert_eq!(two("10.0.0.5").iter().map(|p| p.path.as_str()).collect::<Vec<_>>(), ["$.network.tap.address"]);
        assert!(two("10.0.0.6").is_empty());
    }

    #[test]
    fn a_missing_kernel_is_a_problem_and_the_vm_stays() {
        let files = read(directory(&[("a.json", vm("a", "").replace("/dev/null", "/nonexistent/kernel"))]).path());
        assert_eq!(good(&files), ["a"]);
        assert_eq!(files.problems[0].path, "$.image.kernel");
        assert!(files.broken.is_empty());
    }

    #[test]
    fn a_missing_directory_says_that_nothing_is_known() {
        let files = read(Path::new("/nonexistent/vms"));
        assert!(files.unreadable && files.problems.len() == 1);
    }

    #[test]
    fn a_fifo_and_a_huge_file_are_refused_without_waiting() {
        let dir = directory(&[("b.json", " ".repeat(MAX_BYTES as usize + 1))]);
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("a.json"), Mode::RUSR).unwrap();
        let files = read(dir.path());
        assert!(files.problems[0].reason.contains("regular file") && files.problems[1].reason.contains("larger"), "{:?}", files.problems);
    }

    #[test]
    fn a_single_file_can_be_validated() {
        let dir = directory(&[("a.json", vm("a", ""))]);
        assert_eq!(validate(&dir.path().join("a.json")).0.len(), 1);
    }
}
