//! The harness itself: a machine that boots, runs VMs under both halves, and leaves nothing.

use diarch_tests::machine::{Machine, SUPERVISOR, WORKER, vm_file_stub};
use diarch_tests::need;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn a_booted_machine_leaves_nothing_behind() {
    need!(Machine);
    let mut machine = Machine::bare().boot();
    eprintln!("booted after {:?}", machine.age());
    assert_eq!(machine.sh("systemctl is-system-running"), "running");
    assert!(!machine.exists("/usr/bin/diarch"));
    assert_eq!(machine.try_sh("exit 3").code, Some(3));
    assert_eq!(machine.run_within(Duration::from_secs(1), &["sleep", "60"]).code, None);
    let seen = machine.in_unit("probe.service", &["User=nobody"], &["sh", "-c", "id -un; cat /proc/self/cgroup"]);
    assert!(seen.stdout.contains("nobody") && seen.stdout.contains("/system.slice/probe.service"), "{seen:?}");
    assert_eq!(machine.as_user("nobody", "id -un").stdout, "nobody\n");
    assert_eq!(machine.host_pid(1), Some(machine.leader()));
    machine.write("/var/run/note", "text");
    assert_eq!(machine.read("/run/note"), "text", "/var/run is an absolute link, and must not lead out of the machine");
    machine.write("/etc/note", "on its disk");
    machine.reboot();
    assert_eq!((machine.read("/etc/note"), machine.exists("/run/note")), ("on its disk".into(), false));
    assert_eq!(machine.power_off(), Vec::<String>::new());
}

#[test]
fn a_machine_with_the_package_runs_a_vm_under_both_halves() {
    need!(Machine, Package);
    let machine = Machine::installed().vm(vm_file_stub("one")).boot();
    eprintln!("both halves active after {:?}", machine.age());
    let vm = machine.wait_healthy("one", Duration::from_secs(20));
    eprintln!("a VM healthy after {:?}", machine.age());
    let qemus = machine.qemus();
    assert_eq!(qemus.values().map(|qemu| Some(qemu.pid)).collect::<Vec<_>>(), [vm.pid], "in a scope of its own: {qemus:?}");
    let before = machine.inventory();
    machine.systemctl(&["restart", SUPERVISOR]);
    machine.systemctl(&["restart", WORKER]);
    assert_eq!(machine.wait_healthy("one", Duration::from_secs(20)).pid, vm.pid);
    machine.assert_same(&before);
    assert_eq!(machine.power_off(), Vec::<String>::new());
}

/// Set in the process that is killed.
const VICTIM: &str = "DIARCH_MACHINE_VICTIM";

#[test]
fn a_machine_ends_with_a_test_that_is_killed() {
    need!(Machine);
    if std::env::var_os(VICTIM).is_some() {
        let machine = Machine::bare().boot();
        println!("\nvictim {} {}", machine.leader(), machine.cgroup().display());
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_machine_ends_with_a_test_that_is_killed", "--nocapture"])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok);
    let line = lines.find(|line| line.starts_with("victim ")).expect("it booted");
    let (leader, cgroup) = line.trim_start_matches("victim ").split_once(' ').unwrap();
    let leader = Path::new("/proc").join(leader);
    assert!(leader.exists() && Path::new(cgroup).exists());
    victim.kill().unwrap();
    victim.wait().unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while leader.exists() || Path::new(cgroup).parent().unwrap().exists() {
        assert!(Instant::now() < until, "{leader:?} or {cgroup} is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_load_in_the_workers_unit_is_answered_through_restarts_of_the_supervisor() {
    need!(Machine, Package);
    let machine = Machine::installed().load("--lanes 10").boot();
    for _ in 0..3 {
        machine.systemctl(&["restart", SUPERVISOR]);
        std::thread::sleep(Duration::from_millis(100));
    }
    let totals = machine.end_load();
    eprintln!("{totals}");
    assert_eq!((&totals["failed"], &totals["wrong"], &totals["answered"]), (&0.into(), &serde_json::json!([]), &totals["asked"]), "{totals}");
    assert!(totals["reconnections"].as_u64() >= Some(3) && totals["rounds"].as_u64() > Some(20), "{totals}");
    assert!(machine.qemus().is_empty());
}
