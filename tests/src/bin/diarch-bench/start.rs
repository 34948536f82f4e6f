//! `vm_start`: from the worker's decision until it hears `running` from QMP, against the same QEMU with the same arguments and files, started by this
//! program alone to the same point.

use crate::{Events, line, median, milliseconds};
use diarch_tests::host::Host;
use diarch_tests::need;
use diarch_worker::control::protocol::Request;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

const RUNS: usize = 25;

pub fn vm_file(name: &str, guest: &Path) -> serde_json::Value {
    serde_json::json!({
        "name": name,
        "qemu_configuration": {"cores": 1, "mem_mb": 256, "accel": "tcg"},
        "image": {"kernel": guest.join("vmlinuz"), "initrd": guest.join("initrd.img"), "cmdline": "console=ttyS0 quiet panic=-1"},
        "health": {"qmp": {}, "interval_s": 60},
    })
}

pub fn run() {
    let guest = need::guest().expect("--guest DIR with vmlinuz and initrd.img");
    let host = Host::builder().real_qemu().vm("one", vm_file("one", &guest)).start();
    host.wait_healthy("one", std::time::Duration::from_secs(30));
    let view = host.vm("one").expect("the VM");
    let argv: Vec<String> = std::fs::read(format!("/proc/{}/cmdline", view.pid.expect("its pid")))
        .expect("its arguments")
        .split(|b| *b == 0)
        .filter(|part| !part.is_empty())
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect();
    let mut events = Events::follow(&host);
    let name = || "one".to_owned();
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for run in 0..=RUNS {
        host.ask_worker(&Request::VmKill { name: name(), wait: true });
        host.ask_worker(&Request::VmStart { name: name(), wait: false });
        // The worker says `vm.starting` when it has decided, before it does anything about it.
        let decided = events.wait("vm.starting", "one");
        let a = milliseconds(events.wait("vm.running", "one") - decided);
        host.ask_worker(&Request::VmKill { name: name(), wait: true });
        let b = bare_start(&argv, &guest, &host);
        if run > 0 {
            ours.push(a);
            bare.push(b);
        }
    }
    line("vm_start", median(ours), "ms", median(bare));
}

/// Starts QEMU with these arguments, and waits until its monitor says `running`.
fn bare_start(argv: &[String], guest: &Path, host: &Host) -> f64 {
    let open = |name: &str| OwnedFd::from(File::open(guest.join(name)).expect("the guest's file"));
    let append = |name: &str| OwnedFd::from(File::options().append(true).create(true).open(host.path("files").join(name)).expect("a log"));
    let listen = |name: &str| {
        let path = host.path("files").join(name);
        let _ = std::fs::remove_file(&path);
        OwnedFd::from(UnixListener::bind(path).expect("bind"))
    };
    let started = Instant::now();
    // 3: QMP, 4: console, 5: the console's log, 6: kernel, 7: initrd; as the supervisor numbers them.
    let fds = [listen("bare-qmp"), listen("bare-console"), append("bare-console.log"), open("vmlinuz"), open("initrd.img")];
    let raw: Vec<i32> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let mut command = Command::new(&argv[0]);
    command.args(&argv[1..]).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(append("bare.log")));
    let place = move || {
        // Out of the way of the numbers they are to have, and then there.
        let mut high = [0; 5];
        for (slot, fd) in high.iter_mut().zip(&raw) {
            *slot = nix::fcntl::fcntl(borrowed(*fd), nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(64))?;
        }
        for (target, fd) in (3..).zip(high) {
            // SAFETY: two descriptor numbers; the result is checked.
            if unsafe { nix::libc::dup2(fd, target) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls on numbers it owns, and allocates nothing.
    unsafe { command.pre_exec(place) };
    let mut child = command.spawn().expect("QEMU");
    let mut monitor = UnixStream::connect(host.path("files/bare-qmp")).expect("the monitor");
    let mut lines = BufReader::new(monitor.try_clone().expect("dup")).lines();
    let mut next = || lines.next().expect("QEMU speaks").expect("a line");
    next();
    monitor.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").expect("write");
    next();
    loop {
        monitor.write_all(b"{\"execute\":\"query-status\"}\n").expect("write");
        if next().contains("\"running\": true") {
            break;
        }
    }
    let took = milliseconds(started.elapsed());
    child.kill().expect("kill");
    child.wait().expect("wait");
    took
}

fn borrowed<'a>(fd: i32) -> std::os::fd::BorrowedFd<'a> {
    // SAFETY: the descriptor belongs to the caller's `fds`, which outlive the fork.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}
