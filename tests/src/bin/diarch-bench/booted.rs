//! Under a real systemd, from the installed package (`make deb`):
//!
//! * `systemd_supervisor_restart_to_next_call`: from asking for `systemctl restart diarch-supervisor` to the next one's answer to a call, of which there is
//!   always one under way. `..._kill_...`: the same from `kill -9`, with the unit's `RestartSec=100ms` in it.
//! * `systemd_worker_restart_to_readopted_N`: from asking for `systemctl restart diarch-worker` until the next one says of all N VMs that they are healthy.
//!   (Stubs in QEMU's place; the VMs are not what is measured.)
//! * `systemd_qemu_death_to_respawn`: from `kill -9` of a QEMU (the stub) to the next one in its scope.
//!
//! What the times hold beside Diarch's own work: systemctl's start, through nsenter, and systemd's way to stop and start a hardened unit. The baselines are the
//! limits, in milliseconds.

use crate::{line, median, milliseconds};
use diarch_tests::machine::{Machine, SUPERVISOR, WORKER, vm_file_stub};
use diarch_tests::need::Need;
use diarch_tests::puppet::{self, Puppet};
use diarch_worker::control::protocol::{Phase, Reply, Request};
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const RUNS: usize = 15;
const LIMIT: Duration = Duration::from_secs(30);

pub fn run() {
    let missing: Vec<String> = [Need::Machine, Need::Package].into_iter().filter_map(Need::missing).collect();
    if !missing.is_empty() {
        eprintln!("bench: booted: SKIPPED: it needs {}", missing.join(" and "));
        return;
    }
    supervisor();
    for vms in [1, 50] {
        worker(vms);
    }
    qemu();
}

fn supervisor() {
    let machine = Machine::installed().vm(vm_file_stub("a")).boot();
    let puppet = Puppet::instead_of_the_worker(&machine);
    let started = || puppet.ask(&puppet::inventory())["started_ms"].as_u64();
    let times = |deed: &(dyn Fn() + Sync)| {
        let mut times = Vec::new();
        for run in 0..=RUNS {
            let before = started();
            let at = Instant::now();
            std::thread::scope(|scope| {
                scope.spawn(deed);
                while started() == before {}
                if run > 0 {
                    times.push(milliseconds(at.elapsed()));
                }
            });
            std::thread::sleep(Duration::from_millis(100));
        }
        median(times)
    };
    let restart = times(&|| drop(machine.run(&["systemctl", "restart", SUPERVISOR])));
    line("systemd_supervisor_restart_to_next_call", restart, "ms", 150.0);
    let kill = times(&|| machine.kill(SUPERVISOR, Signal::KILL));
    line("systemd_supervisor_kill_to_next_call", kill, "ms", 0.0);
}

fn worker(vms: usize) {
    let builder = (0..vms).fold(Machine::installed(), |builder, n| builder.vm(vm_file_stub(&format!("vm{n}"))));
    let machine = builder.boot();
    wait_healthy(&machine, vms, None);
    let mut times = Vec::new();
    for run in 0..=RUNS {
        let before = machine.pid_of_unit(WORKER);
        let at = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| machine.run(&["systemctl", "restart", WORKER]));
            wait_healthy(&machine, vms, before);
            if run > 0 {
                times.push(milliseconds(at.elapsed()));
            }
        });
    }
    line(&format!("systemd_worker_restart_to_readopted_{vms}"), median(times), "ms", 500.0);
}

/// Until another worker than `before` says so of all.
fn wait_healthy(machine: &Machine, vms: usize, before: Option<u32>) {
    let until = Instant::now() + LIMIT;
    loop {
        let another = match ask(machine, &Request::Status {}) {
            Some(Reply::Status(status)) => Some(status.worker_pid) != before,
            _ => false,
        };
        if another
            && let Some(Reply::Vms(list)) = ask(machine, &Request::VmList {})
            && list.iter().filter(|vm| vm.phase == Phase::Healthy).count() == vms
        {
            return;
        }
        assert!(Instant::now() < until, "not all of {vms} VMs are healthy after {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Without the command, whose start would be measured. `None`: the worker is away.
fn ask(machine: &Machine, request: &Request) -> Option<Reply> {
    let mut stream = UnixStream::connect(machine.root().join("run/diarch/worker/worker.sock")).ok()?;
    stream.set_read_timeout(Some(LIMIT)).ok()?;
    stream.write_all(format!("{}\n", serde_json::to_string(request).ok()?).as_bytes()).ok()?;
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    lines.find_map(|line| serde_json::from_str(&line).ok().filter(|reply| !matches!(reply, Reply::Notice { .. })))
}

fn qemu() {
    let names: Vec<String> = (0..=RUNS).map(|n| format!("vm{n}")).collect();
    let machine = names.iter().fold(Machine::installed(), |builder, name| builder.vm(vm_file_stub(name))).boot();
    wait_healthy(&machine, names.len(), None);
    let mut times = Vec::new();
    // One death for each VM: what has failed once is not started again without a pause.
    for (run, (scope, before)) in machine.qemus().into_iter().enumerate() {
        let events = machine.cgroup().join("diarch.slice/diarch-vms.slice").join(&scope).join("cgroup.procs");
        let at = Instant::now();
        rustix::process::kill_process(rustix::process::Pid::from_raw(before.host_pid).expect("a pid"), Signal::KILL).expect("it lives");
        loop {
            let now = std::fs::read_to_string(&events).unwrap_or_default();
            if now.lines().any(|pid| pid != before.host_pid.to_string()) {
                break;
            }
            assert!(at.elapsed() < LIMIT, "{scope} has no new QEMU");
            std::thread::sleep(Duration::from_micros(200));
        }
        if run > 0 {
            times.push(milliseconds(at.elapsed()));
        }
    }
    line("systemd_qemu_death_to_respawn", median(times), "ms", 50.0);
}
