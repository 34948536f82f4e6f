//! The two halves as two services of a real systemd, from the installed package: restarts, kills, a half that can't start, a half that hangs. VMs run on
//! through all of it.

use diarch_ipc::operation::Request;
use diarch_tests::machine::{Machine, Process, SUPERVISOR, WORKER, vm_file_guest, vm_file_stub};
use diarch_tests::need;
use diarch_tests::puppet::{self, Puppet};
use diarch_worker::control::protocol::Phase;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(30);

/// A machine in which these stubs run.
fn with_vms(names: &[&str]) -> Machine {
    let machine = names.iter().fold(Machine::installed(), |builder, name| builder.vm(vm_file_stub(name))).boot();
    wait_running(&machine, names.len());
    machine
}

/// The VMs' processes by name, once the worker says that so many run.
fn wait_running(machine: &Machine, count: usize) -> BTreeMap<String, u32> {
    machine.wait_for(&format!("{count} VMs run"), SOON, || {
        let vms = machine.vms().into_iter().filter(|vm| vm.phase == Phase::Healthy);
        let running: BTreeMap<String, u32> = vms.filter_map(|vm| Some((vm.name.to_string(), vm.pid?))).collect();
        (running.len() == count).then_some(running)
    })
}

/// The worker has all of them again, and they are the processes that they were.
#[track_caller]
fn assert_untouched(machine: &Machine, vms: &BTreeMap<String, Process>, after: &str) {
    wait_running(machine, vms.len());
    assert_eq!(&machine.qemus(), vms, "{after}");
}

/// Waits for another main process than the one that had this number.
fn wait_another(machine: &Machine, unit: &str, than: u32) {
    machine.wait_for(&format!("{unit} has another process"), Duration::from_secs(60), || machine.pid_of_unit(unit).filter(|pid| *pid != than));
}

fn main_pid(machine: &Machine, unit: &str) -> u32 {
    machine.wait_for(&format!("{unit} has a process"), SOON, || machine.pid_of_unit(unit))
}

// ---- 1: first launch ----

#[test]
fn the_halves_come_up_in_either_order_and_the_socket_alone_is_enough() {
    need!(Machine, Package);
    let machine = with_vms(&["a"]);
    let vms = machine.qemus();
    let stop = "systemctl stop diarch-worker.service diarch-supervisor.socket diarch-supervisor.service";
    for start in [
        "systemctl start diarch-supervisor.service; systemctl start diarch-worker.service",
        "systemctl start diarch-worker.service; systemctl start diarch-supervisor.service",
        "systemctl start diarch-supervisor.socket; systemctl start diarch-worker.service",
        "systemctl start diarch-worker.service",
    ] {
        machine.sh(stop);
        assert!(!machine.is_active(SUPERVISOR) && !machine.is_active(WORKER), "stopped");
        assert_eq!(machine.qemus(), vms, "the VM runs on while both are stopped");
        machine.sh(start);
        assert_untouched(&machine, &vms, &format!("after {start}"));
        assert!(machine.is_active(SUPERVISOR) && machine.is_active(WORKER), "after {start}");
    }
}

// ---- 2: the supervisor restarts under load ----

#[test]
fn fifty_restarts_of_the_supervisor_under_ten_requests_in_flight_lose_and_double_nothing() {
    need!(Machine, Package);
    let machine = with_vms(&["a", "b"]);
    machine.sh("systemctl restart diarch-supervisor.service");
    wait_running(&machine, 2);
    let (vms, before) = (machine.qemus(), machine.inventory());
    let puppet = Puppet::instead_of_the_worker(&machine);
    let (go_on, rounds) = (AtomicBool::new(true), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for lane in 0..10 {
            let (puppet, go_on, rounds) = (&puppet, &go_on, &rounds);
            scope.spawn(move || {
                for round in 0.. {
                    if !go_on.load(Ordering::Relaxed) {
                        return;
                    }
                    // Each answer is asserted to be a success: refused would be asked twice.
                    let label = format!("load-{lane}-{round}");
                    let vm = puppet.claim(&label);
                    let pid = puppet.ask(&puppet::spawn(vm))["pid"].clone();
                    let found = puppet.vms().remove(&label).expect("what was claimed is there");
                    assert_eq!((&found["slot"], &found["pid"]), (&Value::from(vm.slot.get()), &pid), "one claim, one QEMU");
                    puppet.ask(&puppet::attach(vm));
                    puppet.ask(&puppet::console(vm));
                    puppet.ask(&puppet::kill(vm));
                    puppet.ask(&puppet::release(vm));
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..50 {
            machine.sh("systemctl restart diarch-supervisor.service");
        }
        go_on.store(false, Ordering::Relaxed);
    });

    let (sent, answered, answers) = puppet.counts();
    assert_eq!((answered, answers), (sent, sent), "each request was answered, and once");
    assert!(rounds.load(Ordering::Relaxed) >= 50, "there was load: {rounds:?} rounds");
    let left: BTreeSet<String> = puppet.vms().into_keys().collect();
    assert_eq!(left, BTreeSet::from(["a".into(), "b".into()]));
    puppet.give_back();
    assert_untouched(&machine, &vms, "fifty restarts");
    machine.assert_same(&before);
    machine.diarch(&["audit", "verify"]).expect_success("the audit");
}

// ---- 3: the worker restarts ----

#[test]
fn fifty_restarts_and_fifty_kills_of_the_worker_touch_no_vm() {
    need!(Machine, Package);
    let machine = with_vms(&["a", "b", "c"]);
    let vms = machine.qemus();
    let before = machine.inventory();
    for n in 0..50 {
        machine.sh("systemctl restart diarch-worker.service");
        assert_untouched(&machine, &vms, &format!("after restart {n}"));
    }
    for n in 0..50 {
        let pid = main_pid(&machine, WORKER);
        machine.kill(WORKER, Signal::KILL);
        wait_another(&machine, WORKER, pid);
        assert_untouched(&machine, &vms, &format!("after kill {n}"));
    }
    machine.assert_same(&before);
    assert_eq!(machine.show(SUPERVISOR, "NRestarts"), "0", "the supervisor was left alone");
}

// ---- 4: the supervisor is killed before, in the middle of and after each operation ----

#[test]
fn a_supervisor_killed_before_during_and_after_each_operation_answers_it_once() {
    need!(Machine, Package);
    let machine = with_vms(&["a"]);
    let vms = machine.qemus();
    let before = machine.inventory();
    let puppet = Puppet::instead_of_the_worker(&machine);
    // Microseconds between asking and the kill; an operation takes 0.1 to 30 ms, most of it vm.spawn's. `None`: the kill comes first.
    let moments = [None, Some(0), Some(100), Some(300), Some(1_000), Some(2_000), Some(4_000), Some(8_000), Some(12_000), Some(20_000), Some(60_000)];
    for (n, moment) in moments.into_iter().enumerate() {
        let label = format!("flow-{n}");
        let ask = |request: &Request| killed_around(&machine, &puppet, moment, request);
        ask(&puppet::inventory());
        let vm = puppet::tenancy(ask(&puppet::claim(&label)));
        assert_eq!(puppet.vms()[&label]["slot"], vm.slot.get(), "claimed once");
        let spawned = ask(&puppet::spawn(vm));
        assert_eq!(puppet.vms()[&label]["pid"], spawned["pid"], "what was answered is what runs");
        let members: Vec<u32> = machine.processes_of(&format!("diarch-vm-{}.scope", vm.slot)).iter().map(|process| process.pid).collect();
        assert_eq!(Value::from(members), serde_json::json!([spawned["pid"]]), "one QEMU, in its scope");
        ask(&puppet::attach(vm));
        ask(&puppet::console(vm));
        ask(&puppet::kill(vm));
        machine.wait_for("QEMU's end to be known", Duration::from_secs(10), || (puppet.vms()[&label]["state"] == "exited").then_some(()));
        ask(&puppet::release(vm));
        assert!(!puppet.vms().contains_key(&label), "released");
    }
    let (sent, answered, answers) = puppet.counts();
    assert_eq!((answered, answers), (sent, sent));
    puppet.give_back();
    assert_untouched(&machine, &vms, "all this");
    machine.assert_same(&before);
}

/// Asks, and kills the supervisor so many microseconds later (or before).
fn killed_around(machine: &Machine, puppet: &Puppet<'_>, moment: Option<u64>, request: &Request) -> Value {
    let victim = machine.wait_for("a supervisor", SOON, || machine.main_process(SUPERVISOR));
    let kill = || {
        let pid = rustix::process::Pid::from_raw(victim.host_pid).expect("a process id");
        rustix::process::kill_process(pid, Signal::KILL).expect("it lived until now");
    };
    if moment.is_none() {
        kill();
    }
    let n = puppet.send(request);
    if let Some(after) = moment {
        std::thread::sleep(Duration::from_micros(after));
        kill();
    }
    let mut answer = puppet.answer(n);
    assert!(answer.get("ok").is_some(), "{request:?}, killed at {moment:?}: {answer}");
    // The next one is there before anything else is asked.
    wait_another(machine, SUPERVISOR, victim.pid);
    answer["ok"].as_object_mut().and_then(|reply| reply.values_mut().next()).map(Value::take).unwrap_or_default()
}

// ---- 5: the supervisor can't start ----

#[test]
fn broken_grants_end_the_worker_after_three_restarts_and_all_heals_when_they_are_mended() {
    need!(Machine, Package);
    let machine = with_vms(&["a", "b"]);
    let vms = machine.qemus();
    machine.sh("cp /etc/diarch/grants.toml /root/grants.good; echo 'nonsense = true' >>/etc/diarch/grants.toml; systemctl kill --signal=KILL diarch-supervisor.service");
    let said = |what: &str| machine.journal(WORKER).matches(what).count();
    machine.wait_for("the worker to give up", Duration::from_secs(40), || (said("supervisor.gave-up") > 0).then_some(()));
    let journal = machine.journal(WORKER);
    let up_to = journal.split("supervisor.gave-up").next().expect("it is there");
    assert_eq!(up_to.matches("supervisor.restarting").count(), 3, "three tries, and then it gives up:\n{journal}");
    assert!(machine.journal(SUPERVISOR).contains("nonsense"), "the supervisor says which word it minds");
    assert!(machine.show(SUPERVISOR, "StatusText").contains("nonsense"), "and systemctl status shows it: {}", machine.show(SUPERVISOR, "StatusText"));
    machine.wait_for("systemd to start the worker again", Duration::from_secs(20), || (said("worker.started") >= 2).then_some(()));
    assert_eq!(machine.qemus(), vms, "while nobody rules");
    // A worker that has never reached the supervisor says that it does not know, and not that they are stopped.
    machine.wait_for("VMs of which nothing is known", SOON, || {
        let shown = machine.vms();
        (shown.len() == 2 && shown.iter().all(|vm| vm.phase == Phase::Unknown)).then_some(())
    });
    let warnings = machine.sh("journalctl --no-pager -o cat -p warning -u diarch-worker.service");
    assert!(warnings.contains("supervisor.gave-up"), "the journal knows its severity:\n{warnings}");

    machine.sh("cp /root/grants.good /etc/diarch/grants.toml");
    let healed = Instant::now();
    assert_untouched(&machine, &vms, "nothing else was done than to mend the file");
    assert!(healed.elapsed() < Duration::from_secs(20), "it took {:?}", healed.elapsed());
}

// ---- 6: the supervisor hangs ----

#[test]
fn a_supervisor_that_hangs_is_restarted_and_no_vm_minds() {
    need!(Machine, Package);
    let machine = with_vms(&["a"]);
    let vms = machine.qemus();
    let pid = main_pid(&machine, SUPERVISOR);
    machine.kill(SUPERVISOR, Signal::STOP);
    wait_another(&machine, SUPERVISOR, pid);
    assert_untouched(&machine, &vms, "all this");
    assert!(machine.journal(SUPERVISOR).to_lowercase().contains("watchdog"), "systemd's watchdog saw it");
}

#[test]
fn a_hung_supervisor_is_restarted_by_a_worker_that_meets_it() {
    need!(Machine, Package);
    let machine = with_vms(&["a"]);
    let vms = machine.qemus();
    // The worker that comes up finds a door that takes its knock and never opens; it does not wait for the watchdog (made long here).
    machine.sh("mkdir -p /run/systemd/system/diarch-supervisor.service.d");
    machine.write("/run/systemd/system/diarch-supervisor.service.d/slow.conf", "[Service]\nWatchdogSec=10min\nTimeoutStopSec=1s\n");
    machine.sh("systemctl daemon-reload; systemctl restart diarch-supervisor.service");
    assert_untouched(&machine, &vms, "a plain restart");
    let pid = main_pid(&machine, SUPERVISOR);
    machine.kill(SUPERVISOR, Signal::STOP);
    machine.sh("systemctl restart --no-block diarch-worker.service");
    wait_another(&machine, SUPERVISOR, pid);
    assert_untouched(&machine, &vms, "all this");
    assert!(machine.journal(WORKER).contains("supervisor.restarting"), "the worker restarted it:\n{}", machine.journal(WORKER));
}

// ---- besides ----

#[test]
fn what_systemd_does_to_itself_and_to_both_halves_leaves_the_vms_alone() {
    need!(Machine, Package);
    let machine = with_vms(&["a"]);
    let vms = machine.qemus();
    for deed in ["systemctl daemon-reexec", "systemctl daemon-reload", "systemctl restart dbus.service || true", "systemctl restart systemd-journald.service"] {
        machine.sh(deed);
        machine.sh("systemctl restart diarch-supervisor.service diarch-worker.service");
        assert_untouched(&machine, &vms, &format!("after {deed}"));
    }
    let status = machine.sh("systemctl --no-pager status diarch-vm-0.scope");
    assert!(status.contains("Diarch VM \"a\" (slot 0)") && status.contains("guest=a,"), "{status}");
    assert!(machine.sh("systemd-cgls --no-pager --full /diarch.slice").contains("guest=a,"));
    // Its limits are the specification's: 16 MiB, 1 CPU, the translator.
    assert_eq!(machine.show("diarch-vm-0.scope", "TasksMax"), "161");
    assert_eq!(machine.show("diarch-vm-0.scope", "MemoryMax"), ((16 << 20) + (16 << 20) / 64 + (256 << 20) + (16 << 20) + (1_u64 << 30)).to_string());
    assert_eq!(machine.show("diarch-vm-0.scope", "MemorySwapMax"), "0");
    assert_eq!(machine.show("diarch-vm-0.scope", "DevicePolicy"), "closed");
}

#[test]
fn a_host_that_goes_down_powers_its_guests_off_and_has_them_back_at_the_next_boot() {
    need!(Machine, Package, Guest, Qemu);
    let mut machine = Machine::installed().vm(vm_file_guest("web", 8000)).boot();
    machine.wait_healthy("web", Duration::from_secs(60));
    machine.sh("mkdir -p /var/log/journal; journalctl --flush");
    // A host has other services to stop: PID 1 is busy with them when it is asked.
    machine.write("/run/systemd/system/busy@.service", "[Service]\nExecStart=/bin/sleep infinity\nExecStop=/bin/sh -c 'for i in 1 2 3; do /bin/true; done'\n");
    machine.sh("systemctl daemon-reload; systemctl start $(seq --format=busy@%g.service 1 150)");
    machine.reboot();
    machine.wait_healthy("web", Duration::from_secs(60));
    let before = machine.sh("journalctl --no-pager -o cat -b -1 -u diarch-worker.service -u 'diarch-vm-0.scope'");
    assert!(before.contains("the host goes down: 1 VMs are brought down"), "{before}");
    let console = machine.sh("cat /var/log/diarch/vms/web.* 2>/dev/null || true");
    assert!(console.contains("Power down"), "the guest heard the power button:\n{console}");
    assert!(!console.contains("terminating on signal"), "nobody ended its QEMU:\n{console}");
}

#[test]
fn a_flood_of_connections_does_not_have_a_healthy_supervisor_killed_and_fills_no_journal() {
    need!(Machine, Package);
    let machine = with_vms(&["a"]);
    let (vms, pid) = (machine.qemus(), main_pid(&machine, SUPERVISOR));
    // As the worker's user, who may connect: 60 processes, longer than the watchdog waits.
    let flood = "use Socket; for (1..60) { last if !fork } $a = pack_sockaddr_un('/run/diarch/supervisor.sock'); \
                 while (1) { socket($s, AF_UNIX, 5, 0); if (connect($s, $a)) { push @k, $s; shift @k if @k > 200 } }";
    machine.in_unit("flood.service", &["User=diarch", "RuntimeMaxSec=16", "TasksMax=64"], &["perl", "-e", flood]);
    assert_eq!(machine.pid_of_unit(SUPERVISOR), Some(pid), "{}", machine.journal(SUPERVISOR));
    assert!(machine.journal(SUPERVISOR).lines().count() < 1_000, "{} lines", machine.journal(SUPERVISOR).lines().count());
    assert_untouched(&machine, &vms, "the flood");
}

#[test]
fn a_vm_that_can_not_get_its_scope_is_not_started() {
    need!(Machine, Package);
    let machine = with_vms(&[]);
    // Somebody has taken the name of slot 0's scope.
    machine.sh("systemd-run --quiet --scope --unit=diarch-vm-0.scope --slice=diarch-vms.slice sleep 60 >/dev/null 2>&1 &");
    machine.sh("until systemctl is-active diarch-vm-0.scope; do sleep 0.1; done");
    let puppet = Puppet::instead_of_the_worker(&machine);
    let vm = puppet.claim("a");
    let error = puppet.try_ask(&puppet::spawn(vm)).expect_err("the scope is taken");
    assert_eq!(error["kind"], "failed", "{error}");
    assert!(error["text"].as_str().is_some_and(|text| text.contains("diarch-vm-0.scope")), "{error}");
    assert_eq!(puppet.vms()["a"]["state"], "claimed");
    assert_eq!(machine.sh("pgrep --count stub || true").trim(), "0", "no child is left");
    machine.sh("systemctl stop diarch-vm-0.scope");
    puppet.ask(&puppet::spawn(vm));
    puppet.give_back();
}
