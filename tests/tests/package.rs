//! The package, as dpkg and a real systemd handle it: installed, upgraded under running VMs, removed, purged.

use diarch_tests::machine::{Machine, Process, SUPERVISOR, SUPERVISOR_SOCKET, WORKER, vm_file_guest, vm_file_stub};
use diarch_tests::need;
use diarch_worker::control::protocol::Phase;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);

fn package() -> PathBuf {
    need::package().expect("need!(Package) came first")
}

/// The same package, repacked as the next version.
fn next_version(directory: &Path) -> PathBuf {
    let (tree, deb) = (directory.join("tree"), directory.join("next.deb"));
    let run = |command: &mut Command| assert!(command.output().expect("dpkg-deb").status.success());
    run(Command::new("dpkg-deb").arg("--raw-extract").arg(package()).arg(&tree));
    let control = tree.join("DEBIAN/control");
    let text = std::fs::read_to_string(&control).expect("a control file");
    let version = text.lines().find_map(|line| line.strip_prefix("Version: ")).expect("a version");
    std::fs::write(&control, text.replace(&format!("Version: {version}"), &format!("Version: {version}+next"))).expect("written");
    run(Command::new("dpkg-deb").args(["--root-owner-group", "-Znone", "--build"]).arg(&tree).arg(&deb));
    deb
}

#[track_caller]
fn dpkg(machine: &Machine, words: &[&str]) -> String {
    let argv: Vec<&str> = ["env", "DEBIAN_FRONTEND=noninteractive", "dpkg"].iter().chain(words).copied().collect();
    let output = machine.run_within(Duration::from_secs(120), &argv).expect_success(&argv.join(" "));
    output.stdout + &output.stderr
}

#[track_caller]
fn wait_stubs(machine: &Machine, names: &[&str]) {
    for name in names {
        machine.wait_vm(name, SOON, "running", |vm| vm.phase == Phase::Healthy);
    }
}

#[test]
fn a_fresh_installation_runs_and_opens_nothing() {
    need!(Machine, Package);
    let machine = Machine::bare().boot();
    machine.copy_in(&package(), "/root/diarch.deb", 0o644);
    // apt, and not dpkg: it looks at the dependencies.
    machine.run_within(Duration::from_secs(120), &["apt-get", "install", "--yes", "/root/diarch.deb"]).expect_success("apt-get install");
    for unit in [SUPERVISOR, SUPERVISOR_SOCKET, WORKER] {
        machine.wait_active(unit, SOON);
        assert_eq!(machine.systemctl(&["is-enabled", unit]), "enabled");
    }
    assert_eq!(machine.sh("systemctl --failed --no-legend --plain"), "");

    // Who owns what, and who may write it.
    let expected = "\
        /etc/diarch root:root 755\n/etc/diarch/config.json root:root 644\n/etc/diarch/grants.toml root:root 644\n/etc/diarch/vms root:root 755\n\
        /run/diarch root:root 755\n/run/diarch/supervisor.sock root:diarch 660\n/run/diarch/worker diarch:diarch-operators 2750\n\
        /run/diarch/worker/worker.sock diarch:diarch-operators 660\n/run/diarch/vm root:root 700\n/var/lib/diarch diarch:diarch 750\n\
        /var/log/diarch root:adm 2751\n/var/log/diarch/audit.jsonl root:adm 640\n/var/log/diarch/vms diarch:diarch-operators 2750\n\
        /usr/sbin/diarch-supervisor root:root 755\n/usr/share/polkit-1/rules.d/50-diarch.rules root:root 644";
    let paths: Vec<&str> = expected.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(machine.sh(&format!("stat --format='%n %U:%G %a' {}", paths.join(" "))), expected);
    assert_eq!(machine.sh("getent passwd diarch | cut -d: -f7"), "/usr/sbin/nologin");

    // Closed: no VM starts, and the sentence says which grant it is.
    machine.write_vm(&vm_file_guest("web", 8000));
    let vm = machine.wait_vm("web", SOON, "refused", |vm| matches!(vm.phase, Phase::Failed | Phase::BackOff));
    assert!(vm.reason.as_deref().is_some_and(|reason| reason.contains("grant")), "{vm:#?}");
    assert_eq!(machine.qemus().len(), 0);

    // Everybody's manual pages and completions.
    machine.sh("for page in diarch.1 diarch-vm.1 diarch-doctor.1 diarch-worker.8 diarch-supervisor.8; do zcat $(find /usr/share/man -name $page.gz) | grep -q '^.TH'; done");
    machine.sh("bash -n /usr/share/bash-completion/completions/diarch");
    // A user outside the group is kept out, one inside is let in, and neither needs root.
    machine.sh("useradd outsider; useradd --groups diarch-operators insider");
    let outside = machine.as_user("outsider", "diarch vm list");
    assert_eq!(outside.code, Some(4), "{outside:?}");
    assert!(outside.stderr.contains("diarch-operators"), "{outside:?}");
    machine.as_user("insider", "diarch vm list").expect_success("an operator");
}

#[test]
fn an_upgrade_leaves_every_vm_and_every_waiting_call_alone() {
    need!(Machine, Package, Guest, Qemu);
    let next = tempfile::tempdir().expect("a directory");
    let deb = next_version(next.path());
    let machine = Machine::installed().vm(vm_file_stub("a")).vm(vm_file_stub("b")).vm(vm_file_guest("web", 8000)).boot();
    wait_stubs(&machine, &["a", "b"]);
    machine.wait_healthy("web", Duration::from_secs(60));
    machine.diarch(&["vm", "stop", "b"]).expect_success("stop");
    let before = machine.qemus();
    assert_eq!(before.len(), 2);
    let halves = |machine: &Machine| [SUPERVISOR, WORKER].map(|unit| machine.main_process(unit).expect("it runs"));
    let old = halves(&machine);

    // A restart of the guest is under way: it takes seconds, in which both halves are replaced.
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| machine.diarch(&["vm", "start", "b"]));
        machine.install(&deb).expect_success("the upgrade");
        asked.join().expect("no panic").expect_success("the call that was under way");
    });
    wait_stubs(&machine, &["a", "b"]);
    machine.wait_healthy("web", SOON);
    let after = machine.qemus();
    assert_eq!(after.len(), 3, "one QEMU for each, and no second one: {after:?}");
    for (scope, process) in &before {
        assert_eq!(after.get(scope), Some(process), "{scope} was not touched");
    }
    assert!(machine.get(8000).is_some(), "the guest serves");
    assert!(halves(&machine).iter().zip(&old).all(|(new, old)| new != old), "both halves are the new ones");
    assert!(machine.sh("dpkg-query --show --showformat='${Version}' diarch").ends_with("+next"));
    machine.diarch(&["audit", "verify"]).expect_success("the audit");
}

#[test]
fn a_call_under_way_at_an_upgrade_of_the_slow_kind_is_answered_too() {
    need!(Machine, Package, Guest, Qemu);
    let next = tempfile::tempdir().expect("a directory");
    let deb = next_version(next.path());
    let mut file = vm_file_guest("web", 8000);
    file["enabled"] = false.into();
    let machine = Machine::installed().vm(file.clone()).boot();
    file["enabled"] = true.into();
    machine.write_vm(&file);
    // QEMU runs, its guest boots, and the command waits for it to be healthy.
    let first: Process = machine.wait_for("QEMU", SOON, || machine.qemus().values().next().copied());
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| machine.diarch(&["vm", "start", "web"]));
        machine.install(&deb).expect_success("the upgrade");
        asked.join().expect("no panic").expect_success("the call that was under way");
    });
    machine.wait_healthy("web", Duration::from_secs(60));
    assert_eq!(machine.qemus().values().collect::<Vec<_>>(), [&first], "it boots on, in the same process");
}

#[test]
fn a_disabled_half_stays_disabled_and_a_changed_setting_stays_changed_over_an_upgrade() {
    need!(Machine, Package);
    let next = tempfile::tempdir().expect("a directory");
    let deb = next_version(next.path());
    let machine = Machine::installed().boot();
    let grants = machine.read("/etc/diarch/grants.toml");
    machine.sh("systemctl disable --now diarch-worker.service");
    machine.install(&deb).expect_success("the upgrade");
    assert_eq!(machine.try_sh("systemctl is-enabled diarch-worker.service").stdout.trim(), "disabled");
    assert!(!machine.is_active(WORKER) && machine.is_active(SUPERVISOR));
    assert_eq!(machine.read("/etc/diarch/grants.toml"), grants, "root's");
}

#[test]
fn a_removal_ends_no_vm_and_an_installation_takes_them_over_again() {
    need!(Machine, Package);
    let machine = Machine::installed().vm(vm_file_stub("a")).boot();
    wait_stubs(&machine, &["a"]);
    let vms = machine.qemus();
    let said = dpkg(&machine, &["--remove", "diarch"]);
    assert!(said.contains("1 virtual machine(s) run on"), "{said}");
    assert_eq!(machine.qemus(), vms);
    assert!(!machine.exists("/usr/sbin/diarch-supervisor") && machine.exists("/etc/diarch/grants.toml"));
    machine.install(&package()).expect_success("the installation");
    wait_stubs(&machine, &["a"]);
    assert_eq!(machine.qemus(), vms, "the same process, taken over");
}

#[test]
fn a_purge_takes_what_the_package_made_and_leaves_what_people_made() {
    need!(Machine, Package);
    let machine = Machine::installed().vm(vm_file_stub("a")).boot();
    wait_stubs(&machine, &["a"]);
    machine.sh("install -D --owner=diarch --mode=600 /dev/null /var/lib/diarch/disks/precious.qcow2; diarch vm stop a");
    dpkg(&machine, &["--purge", "diarch"]);
    for gone in ["/usr/bin/diarch", "/etc/diarch/grants.toml", "/etc/diarch/config.json", "/var/log/diarch", "/run/diarch", "/var/lib/diarch/holds.json"] {
        assert!(!machine.exists(gone), "{gone} is left");
    }
    for kept in ["/var/lib/diarch/disks/precious.qcow2", "/etc/diarch/vms/a.json"] {
        assert!(machine.exists(kept), "{kept} is somebody's");
    }
    assert_eq!(machine.sh("systemctl list-unit-files --no-legend 'diarch*' || true"), "");
    assert_eq!(
        machine.sh(
            "find / -xdev -name '*diarch*' -not -path '/proc/*' -not -path '/usr/local/*' -not -path '/var/lib/dpkg/*' -not -path '/var/log/journal/*' | sort"
        ),
        "/etc/diarch\n/var/lib/diarch"
    );
    machine.sh("getent passwd diarch; getent group diarch-operators");
    // And again, onto what is left.
    machine.install(&package()).expect_success("the installation");
    machine.wait_active(WORKER, SOON);
}

#[test]
fn a_purge_while_a_vm_runs_leaves_what_a_new_installation_needs_to_take_it_over() {
    need!(Machine, Package);
    let machine = Machine::installed().vm(vm_file_stub("a")).boot();
    wait_stubs(&machine, &["a"]);
    let (vms, grants) = (machine.qemus(), machine.read("/etc/diarch/grants.toml"));
    let said = dpkg(&machine, &["--purge", "diarch"]);
    assert!(said.contains("/run/diarch stays"), "{said}");
    assert_eq!(machine.qemus(), vms);
    machine.sh("mkdir -p /etc/diarch");
    machine.write("/etc/diarch/grants.toml", &grants);
    dpkg(
        &machine,
        &["--force-confold", "--force-confmiss", "-i", &{
            machine.copy_in(&package(), "/root/diarch.deb", 0o644);
            "/root/diarch.deb".to_owned()
        }],
    );
    wait_stubs(&machine, &["a"]);
    assert_eq!(machine.qemus(), vms);
}
