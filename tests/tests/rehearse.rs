//! `diarch rehearse`: both halves without root, and what root would have been asked.

use diarch_tests::host::binary;
use diarch_tests::need;
use diarch_tests::stage::{Shape, Stage};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

/// An ordinary user: this one, or, under root, one without a name.
fn rehearse(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary("diarch"));
    command.arg("rehearse").arg(directory).args(arguments).env_clear().env("TMPDIR", directory.parent().unwrap());
    if rustix::process::geteuid().is_root() {
        command.uid(61_000).gid(61_000);
    }
    command.output().unwrap()
}

/// A directory that the ordinary user can read, and write beside.
fn place() -> tempfile::TempDir {
    let place = tempfile::Builder::new().prefix("diarch-rehearse-").tempdir().unwrap();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::create_dir(place.path().join("vms")).unwrap();
    if rustix::process::geteuid().is_root() {
        for path in [place.path().to_owned(), place.path().join("vms")] {
            std::os::unix::fs::chown(path, Some(61_000), Some(61_000)).unwrap();
        }
    }
    place
}

fn vm(place: &Path, name: &str, more: &str) {
    let text = format!(
        r#"{{"name": "{name}", "qemu_configuration": {{"cores": 1, "mem_mb": 64, "accel": "tcg"}}, "image": {{"kernel": "{}/vmlinuz"}}{more}}}"#,
        need::guest().unwrap().display()
    );
    std::fs::write(place.join("vms").join(format!("{name}.json")), text).unwrap();
}

fn text(of: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&of.stdout), String::from_utf8_lossy(&of.stderr))
}

#[test]
fn what_root_would_have_been_asked_is_told_and_nothing_of_it_is_done() {
    need!(Kernel(6, 5), Qemu, Guest);
    let place = place();
    let stage = Stage::set(&place.path().join("host"), &[Shape::SingleGpu]);
    vm(
        place.path(),
        "gpu",
        r#", "devices": ["0000:01:00.0"], "network": {"tap": {"network": "p2p"}, "publish": [{"host_address": "192.0.2.1", "host_port": 8080, "guest_port": 80}]}"#,
    );
    vm(place.path(), "plain", "");
    let before = stage.snapshot();
    let ended = rehearse(&place.path().join("vms"), &["--host", stage.root().to_str().unwrap()]);
    let said = text(&ended);
    for part in [
        "[devices]\nallow = [\"0000:01:00.0\", \"0000:01:00.1\"]",
        "[network.\"p2p\"]\nrouted = ",
        "publish = [\"192.0.2.1:8080\"]",
        "rehearsed: take 0000:01:00.0, 0000:01:00.1 from their drivers, and give them to vfio-pci",
        "rehearsed: make the tap dvm",
        "rehearsed: set the published ports",
        "vm.spawn          ok",
        "rehearsed: give 0000:01:00.0, 0000:01:00.1 back to their drivers",
    ] {
        assert!(said.contains(part), "{part}\n{said}");
    }
    assert_eq!(said.matches("vm.spawn          ok").count(), 2, "{said}");
    assert_eq!(ended.status.code(), Some(0), "{said}");
    stage.assert_as(&before, "after the rehearsal");
    let left: Vec<_> =
        std::fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).filter(|name| name != "vms" && name != "host").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn another_hosts_grants_are_held_to_and_a_broken_file_is_named() {
    need!(Kernel(6, 5), Qemu, Guest);
    let place = place();
    vm(place.path(), "large", r#""#);
    std::fs::write(place.path().join("vms/bad.json"), "{").unwrap();
    let user = if rustix::process::geteuid().is_root() { 61_000 } else { rustix::process::geteuid().as_raw() };
    let grants = place.path().join("vms/grants.toml");
    let qemu = "[qemu.default]\npath = \"/usr/bin/qemu-system-x86_64\"\n";
    // Its worker is a user of that host, in a unit of that host.
    let worker = "user = \"diarch-worker-elsewhere\"\nunit = \"diarch-worker.service\"";
    std::fs::write(&grants, format!("[worker]\n{worker}\n[vms]\nmax = 1\nuid_first = 2100000000\nmemory_mib = 32\ncpus_each = 1\n{qemu}")).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&grants, Some(user), Some(user)).unwrap();
    }
    let ended = rehearse(&place.path().join("vms"), &["--grants", grants.to_str().unwrap()]);
    let said = text(&ended);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("vms.memory_mib") && said.contains("bad.json"), "{said}");
}

#[test]
fn a_host_with_devices_is_made_for_who_has_none_and_in_nobodys_way() {
    let place = place();
    let stage = |directory: &Path, shapes: &[&str]| Command::new(binary("diarch-stage")).arg(directory).args(shapes).output().unwrap();
    let host = place.path().join("host");
    let made = stage(&host, &["eight-gpus", "management-nic"]);
    assert!(made.status.success(), "{}", text(&made));
    assert!(host.join("sys/bus/pci/devices/0000:17:00.0/iommu_group").exists() && host.join(".diarch-stage").exists());
    for (directory, shapes, reason) in [
        (host.as_path(), &["sriov"][..], "there is something in it"),
        (&place.path().join("other"), &["one-gpu"], "there is no shape \"one-gpu\""),
        (&place.path().join("other"), &[], "usage: diarch-stage"),
    ] {
        let refused = stage(directory, shapes);
        assert!(!refused.status.success() && text(&refused).contains(reason), "{}", text(&refused));
    }
    assert!(!place.path().join("other").exists());
}

#[test]
fn root_does_not_rehearse() {
    need!(Root);
    let place = place();
    let ended = Command::new(binary("diarch")).arg("rehearse").arg(place.path().join("vms")).output().unwrap();
    assert!(!ended.status.success() && text(&ended).contains("for an ordinary user"), "{}", text(&ended));
    let supervisor = Command::new(binary("diarch-supervisor")).arg("--rehearse").arg(place.path()).output().unwrap();
    assert!(!supervisor.status.success() && text(&supervisor).contains("for an ordinary user"), "{}", text(&supervisor));
}
