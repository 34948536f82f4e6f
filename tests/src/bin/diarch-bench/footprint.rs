//! `rss_*`: resident memory of each half with 1 VM and with 200 (the stub QEMU; both halves are the real ones), and what each VM adds. `idle_cpu`: what both use
//! while 200 VMs are quiet. The baselines are the limits.

use crate::line;
use diarch_tests::host::{Host, rss_kib, stub_vm};
use diarch_worker::control::protocol::Phase;
use std::time::{Duration, Instant};

const MANY: usize = 200;
const QUIET: Duration = Duration::from_secs(20);

pub fn run() {
    let host = host();
    let kernel = host.path("files/kernel");
    host.write_vm("vm0", &stub_vm("vm0", &kernel, "quiet"));
    settle(&host, 1);
    let one = sizes(&host);
    for n in 1..MANY {
        let name = format!("vm{n}");
        host.write_vm(&name, &stub_vm(&name, &kernel, "quiet"));
    }
    settle(&host, MANY);
    let many = sizes(&host);
    let mib = |kib: u64| kib as f64 / 1024.0;
    let each = |one: u64, many: u64| (many as f64 - one as f64) / (MANY as f64 - 1.0);
    line("rss_supervisor", mib(one.0), "MiB", 8.0);
    line("rss_worker", mib(one.1), "MiB", 16.0);
    line("rss_supervisor_200", mib(many.0), "MiB", 8.0 + 199.0 * 64.0 / 1024.0);
    line("rss_worker_200", mib(many.1), "MiB", 16.0 + 199.0 * 64.0 / 1024.0);
    line("rss_supervisor_per_vm", each(one.0, many.0), "KiB", 64.0);
    line("rss_worker_per_vm", each(one.1, many.1), "KiB", 64.0);

    let before = processor_time(&host);
    let started = Instant::now();
    std::thread::sleep(QUIET);
    let used = processor_time(&host) - before;
    line("idle_cpu", used.as_secs_f64() / started.elapsed().as_secs_f64() * 100.0, "% of a core", 0.2);
}

fn host() -> Host {
    let mut builder = Host::builder();
    builder.vms_max = 256;
    builder.start()
}

/// Waits until that many VMs are healthy and everything around their start is over.
fn settle(host: &Host, count: usize) {
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        let healthy = host.vms().iter().filter(|vm| vm.phase == Phase::Healthy).count();
        if healthy == count {
            break;
        }
        assert!(Instant::now() < until, "{healthy} of {count} VMs are healthy after two minutes");
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(Duration::from_secs(12));
}

/// Resident memory of supervisor and worker, in KiB.
fn sizes(host: &Host) -> (u64, u64) {
    (rss_kib(host.supervisor_pid()), rss_kib(host.worker_pid()))
}

/// What both halves have used of the processors, all threads (`/proc/PID/task/TID/schedstat`, nanoseconds).
fn processor_time(host: &Host) -> Duration {
    let of = |pid: i32| -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        tasks
            .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
            .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
            .sum()
    };
    Duration::from_nanos(of(host.supervisor_pid()) + of(host.worker_pid()))
}
