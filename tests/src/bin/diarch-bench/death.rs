//! `qemu_death_to_respawn`: from `kill -9` of a QEMU to the exec of the next one. `supervisor_death_to_next_call`: from `kill -9` of the supervisor to
//! the answer to a call made at that moment. The baselines are the limits, in milliseconds.

use crate::{Events, line, median, milliseconds, start};
use diarch_tests::host::Host;
use diarch_tests::need;
use diarch_tests::stand_in::{Ask, Unit};
use diarch_worker::control::protocol::Request;
use std::time::{Duration, Instant};

const QEMU_RUNS: usize = 15;
const SUPERVISOR_RUNS: usize = 25;

pub fn run() {
    qemu();
    supervisor();
}

/// A VM of its own for each run: what has failed once is not started again without a pause.
fn qemu() {
    let guest = need::guest().expect("--guest DIR with vmlinuz and initrd.img");
    let host = Host::builder().real_qemu().start();
    let mut events = Events::follow(&host);
    let mut times = Vec::new();
    for run in 0..=QEMU_RUNS {
        let name = format!("vm{run}");
        host.write_vm(&name, &start::vm_file(&name, &guest));
        events.wait("vm.running", &name);
        let pid = host.vm(&name).and_then(|vm| vm.pid).expect("its pid");
        let started = Instant::now();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid"), rustix::process::Signal::KILL).expect("kill");
        // The worker says so after the supervisor answered, which is after QEMU's execve: a little later than the truth.
        let took = milliseconds(events.wait("vm.spawned", &name) - started);
        if run > 0 {
            times.push(took);
        }
        host.ask_worker(&Request::VmKill { name, wait: true });
    }
    line("qemu_death_to_respawn", median(times), "ms", 50.0);
}

fn supervisor() {
    let host = Host::supervisor_only();
    let session = host.session();
    session.inventory();
    let mut times = Vec::new();
    for run in 0..=SUPERVISOR_RUNS {
        let started = Instant::now();
        host.manager().ask(&Ask::Kill(Unit::Supervisor, nix::libc::SIGKILL)).expect("kill");
        session.inventory();
        let took = milliseconds(started.elapsed());
        if run > 0 {
            times.push(took);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    line("supervisor_death_to_next_call", median(times), "ms", 100.0);
}
