//! A real QEMU and a guest that booted, kept alive through the death of anything.
//!
//! The guest (`tests/guest/build`) serves HTTP on its port 80 and takes `diarch.test=poweroff:N`, `reboot:N` and `panic:N` on its command line:
//! what it does N seconds after it is up.

use diarch_tests::host::{Host, assert_same, free_port};
use diarch_tests::need;
use diarch_tests::stand_in::Unit;
use diarch_worker::control::protocol::Phase;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Under TCG on a busy machine with two processors.
const BOOT: Duration = Duration::from_secs(90);

fn host() -> Host {
    Host::builder().real_qemu().start()
}

fn guest_vm(name: &str, port: u16, words: &str) -> serde_json::Value {
    let dir = diarch_tests::need::guest().expect("need!(Guest) comes first");
    serde_json::json!({
        "name": name,
        "qemu_configuration": {"cores": 1, "mem_mb": 256, "accel": "auto", "qemu": "default"},
        "image": {"kernel": dir.join("vmlinuz"), "initrd": dir.join("initrd.img"), "cmdline": format!("console=ttyS0 panic=-1 quiet {words}").trim()},
        "network": {"forwards": [{"protocol": "tcp", "host_address": "127.0.0.1", "host_port": port, "guest_port": 80}]},
        "health": {"http": {"host_port": port, "path": "/"}, "interval_s": 1},
        "restart": {"policy": "on-failure"},
    })
}

fn get(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: guest\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn end(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_guest_serves_http_through_the_death_of_everything_around_it() {
    need!(Root, Qemu, Guest, Kernel(6, 5));
    let host = host();
    let empty = host.inventory();
    let port = free_port();
    host.write_vm("web", &guest_vm("web", port, ""));
    let started = Instant::now();
    let first = host.wait_healthy("web", BOOT);
    eprintln!("healthy after {:?} ({:?})", started.elapsed(), first.accelerator);
    assert!(get(port).unwrap().contains("200"), "{:?}", get(port));
    let running = host.inventory();

    let took = host.manager().kill_and_wait(Unit::Supervisor);
    assert!(get(port).unwrap().contains("200"));
    eprintln!("the supervisor was killed and ready again after {took:?}");
    let took = host.manager().kill_and_wait(Unit::Worker);
    assert!(get(port).unwrap().contains("200"));
    eprintln!("the worker was killed and ready again after {took:?}");
    assert_eq!(host.wait_healthy("web", BOOT).pid, first.pid, "the VM must not have been restarted");

    let killed = Instant::now();
    end(first.pid.unwrap());
    let second = host.wait_vm("web", BOOT, "healthy in another process", |vm| vm.phase == Phase::Healthy && vm.pid != first.pid);
    eprintln!("QEMU was killed and the guest healthy again after {:?}", killed.elapsed());
    assert_eq!(second.restarts, 1);
    assert!(get(port).unwrap().contains("200"));
    assert_same(&running, &host);

    // The console is the guest's.
    let console = host.diarch(&["vm", "logs", "web"]);
    assert_eq!(console.code, Some(0), "{console:?}");

    // ACPI: the guest gets its power button, and ends by itself.
    let stopped = host.diarch(&["vm", "stop", "web"]);
    assert_eq!(stopped.code, Some(0), "{stopped:?}");
    let vm = host.vm("web").unwrap();
    assert_eq!((vm.phase, vm.pid), (Phase::Stopped, None), "{vm:?}");
    assert!(host.qemus().is_empty());
    get(port).unwrap_err();
    assert!(host.diarch(&["vm", "start", "web"]).code == Some(0));
    host.wait_healthy("web", BOOT);

    std::fs::remove_file(host.path("vms/web.json")).unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while !(host.qemus().is_empty() && host.ledger().is_empty()) {
        assert!(Instant::now() < until, "its file is gone, and it is not stopped: {:?}", host.vms());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_same(&empty, &host);
}

#[test]
fn power_off_and_reboot_and_panic_of_a_guest_are_told_apart() {
    need!(Root, Qemu, Guest, Kernel(6, 5));
    let host = host();
    let [off, boot, panic] = [free_port(), free_port(), free_port()];
    host.write_vm("off", &guest_vm("off", off, "diarch.test=poweroff:3"));
    let vm = host.wait_vm("off", BOOT, "stopped by its guest", |vm| vm.phase == Phase::Stopped && vm.reason.is_some());
    assert_eq!(vm.restarts, 0, "{vm:?}");
    assert!(vm.reason.as_deref().unwrap_or_default().contains("power"), "{vm:?}");

    host.write_vm("boot", &guest_vm("boot", boot, "diarch.test=reboot:3"));
    let vm = host.wait_vm("boot", BOOT, "rebooted within its QEMU", |vm| vm.guest_reboots >= 1);
    assert_eq!(vm.restarts, 0, "{vm:?}");
    // QEMU may report one reboot by more than one RESET, within moments.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(host.vm("boot").unwrap().guest_reboots, 1, "one reboot is one reboot");
    std::fs::remove_file(host.path("vms/boot.json")).unwrap();

    host.write_vm("panic", &guest_vm("panic", panic, "diarch.test=panic:3"));
    let vm = host.wait_vm("panic", BOOT, "seen to have panicked", |vm| format!("{:?} {:?}", vm.reason, vm.last_exit).contains("panic"));
    eprintln!("panic: {:?} {:?}", vm.reason, vm.last_exit);
}

#[test]
fn a_port_that_somebody_else_listens_on_is_told_with_qemus_own_words() {
    need!(Root, Qemu, Guest, Kernel(6, 5));
    let host = host();
    let empty = host.inventory();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    host.write_vm("web", &guest_vm("web", port, ""));
    let vm = host.wait_vm("web", BOOT, "failing", |vm| matches!(vm.phase, Phase::BackOff | Phase::Failed) && vm.reason.is_some());
    let said = format!("{} {}", vm.reason.unwrap_or_default(), vm.last_exit.unwrap_or_default());
    assert!(said.contains(&port.to_string()) || said.contains("in use") || said.contains("forwarding"), "{said}");
    // As soon as the port is free, it runs.
    drop(taken);
    host.wait_healthy("web", BOOT);
    std::fs::remove_file(host.path("vms/web.json")).unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while !host.ledger().is_empty() {
        assert!(Instant::now() < until, "{:?}", host.ledger());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_same(&empty, &host);
}

#[test]
fn a_qemu_that_exits_at_once_is_quoted_and_a_bad_file_stops_no_other() {
    need!(Root, Qemu, Guest, Kernel(6, 5));
    let host = host();
    let port = free_port();
    let mut broken = guest_vm("broken", free_port(), "");
    // A kernel that is none: QEMU says so and exits.
    broken["image"]["kernel"] = serde_json::json!(host.path("files/kernel"));
    host.write_vm("broken", &broken);
    host.write_vm_text("garbage.json", "{\"name\": ");
    host.write_vm("web", &guest_vm("web", port, ""));
    host.wait_healthy("web", BOOT);
    let vm = host.wait_vm("broken", BOOT, "failing", |vm| matches!(vm.phase, Phase::BackOff | Phase::Failed) && vm.reason.is_some());
    let said = format!("{:?} {:?}", vm.reason, vm.last_exit);
    assert!(said.contains("kernel") || said.contains("PVH") || said.contains("exit"), "{said}");
    let plan = host.diarch(&["plan", "--json"]);
    assert!(plan.stdout.contains("garbage.json"), "{plan:?}");
}
