//! `diarch-demo`: the pair keeps a real VM, shown. Builds nothing and installs nothing: `make demo` has done that.
//!
//! ```text
//!   start both halves -> boot the guest -> healthy over HTTP -> kill QEMU, the supervisor, the worker -> verify the audit -> stop
//! ```
//!
//! The supervisor runs as root, the worker and QEMU as users of their own; all of it in one directory, which is gone at the end.

use diarch_tests::host::{Host, binary, free_port};
use diarch_tests::need;
use diarch_tests::stand_in::Unit;
use diarch_worker::control::protocol::{EventView, Phase, Reply, Request, VmView};
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

const VM: &str = "web";
/// A guest under QEMU's translator on a loaded machine of two processors.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);
const STEP_PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (mut guest, mut keep) = (None, Keep::Stop);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--guest" => guest = args.next().map(PathBuf::from),
            "--keep" => keep = Keep::Running,
            _ => {
                eprintln!("usage: diarch-demo --guest DIR [--keep]");
                return ExitCode::from(2);
            }
        }
    }
    let guest = guest.and_then(|dir| std::fs::canonicalize(dir).ok()).filter(|dir| dir.join("vmlinuz").exists());
    let Some(guest) = guest else {
        eprintln!("diarch-demo: --guest DIR must hold vmlinuz and initrd.img (tests/guest/build makes them)");
        return ExitCode::from(2);
    };
    if !rustix::process::geteuid().is_root() {
        eprintln!("diarch-demo: the supervisor is root: run this with sudo");
        return ExitCode::FAILURE;
    }
    if need::qemu().is_none() {
        eprintln!("diarch-demo: qemu-system-x86_64 is missing (apt install qemu-system-x86)");
        return ExitCode::FAILURE;
    }
    match show(&guest, keep) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("\ndiarch-demo: {sentence}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Stop,
    Running,
}

fn title(text: &str) {
    if std::io::stdout().is_terminal() { println!("\n\x1b[1m{text}\x1b[0m") } else { println!("\n{text}") }
}

fn show(guest: &Path, keep: Keep) -> Result<(), String> {
    let port = free_port();
    let file = serde_json::json!({
        "name": VM,
        "qemu_configuration": {"cores": 1, "mem_mb": 256, "accel": "auto"},
        "image": {"kernel": guest.join("vmlinuz"), "initrd": guest.join("initrd.img"), "cmdline": "console=ttyS0 quiet panic=-1"},
        "network": {"forwards": [{"protocol": "tcp", "host_address": "127.0.0.1", "host_port": port, "guest_port": 80}]},
        "health": {"http": {"host_port": port, "path": "/"}, "interval_s": 1, "timeout_s": 2},
    });
    title("1. The pair");
    let mut builder = Host::builder().real_qemu().vm(VM, file);
    builder.kvm = true;
    builder.lives_on = keep == Keep::Running;
    let host = builder.start();
    println!("diarch-supervisor   process {:<7} root, with CAP_KILL, CAP_SETUID, CAP_SETGID, CAP_SETPCAP and nothing else", host.supervisor_pid());
    println!("diarch-worker       process {:<7} uid {}, no capability", host.worker_pid(), diarch_tests::host::WORKER.uid);
    println!("a service-manager stand-in respawns each of them, as systemd does on a host");

    title("2. A VM file appears; its guest boots until its web server answers");
    let mut events = Events::follow(&host, 100)?;
    let started = Instant::now();
    events.until(BOOT_PATIENCE, |event| {
        println!("{:>7} ms  {:<14} {}", started.elapsed().as_millis(), event.kind, event.message);
        event.kind == "vm.healthy"
    })?;
    println!("http://127.0.0.1:{port}/ says: {}", page(port)?);
    println!();
    print!("{}", host.diarch(&["vm", "list"]).stdout);

    title("3. kill -9, everybody in turn");
    kill_qemu(&host, &mut events, port)?;
    kill_supervisor(&host, &mut events, port)?;
    kill_worker(&host, port)?;

    title("4. The audit");
    let audit = host.path("audit/audit.jsonl");
    let verified = host.diarch(&["audit", "verify", "--file", &audit.to_string_lossy()]);
    print!("{}{}", verified.stdout, verified.stderr);
    if verified.code != Some(0) {
        return Err("the audit does not verify".into());
    }

    if keep == Keep::Running {
        return leave(host, port);
    }
    title("5. Stopped, and nothing left behind");
    let stopping = Instant::now();
    let stopped = host.diarch(&["vm", "stop", VM]);
    print!("{}", stopped.stdout);
    if stopped.code != Some(0) {
        return Err(format!("the VM was not stopped: {}", stopped.stderr.trim()));
    }
    let directory = host.path("");
    let left = host.shutdown();
    if !left.is_empty() || directory.exists() {
        return Err(format!("something was left behind: {left:?} {}", directory.display()));
    }
    println!("the guest powered off, both halves ended, no process and no file is left ({} ms)", stopping.elapsed().as_millis());
    Ok(())
}

fn kill_qemu(host: &Host, events: &mut Events, port: u16) -> Result<(), String> {
    let before = pid(host)?;
    let killed = Instant::now();
    kill(before.cast_signed())?;
    let mut respawned = None;
    events.until(BOOT_PATIENCE, |event| {
        if event.kind == "vm.spawned" {
            respawned = Some(killed.elapsed());
        }
        event.kind == "vm.healthy"
    })?;
    let respawned = respawned.ok_or("QEMU was not respawned")?;
    println!(
        "QEMU:        process {before} -> {}; a new QEMU after {} ms, its guest healthy after {} ms",
        pid(host)?,
        respawned.as_millis(),
        killed.elapsed().as_millis()
    );
    page(port).map(drop)
}

fn kill_supervisor(host: &Host, events: &mut Events, port: u16) -> Result<(), String> {
    let (vm, before) = (pid(host)?, host.supervisor_pid());
    let killed = Instant::now();
    kill(before)?;
    events.until(STEP_PATIENCE, |event| event.kind == "supervisor.ready")?;
    let took = killed.elapsed();
    host.manager().wait_ready(Unit::Supervisor, 1, STEP_PATIENCE);
    println!("supervisor:  process {before} -> {}; the worker is connected again after {} ms", host.supervisor_pid(), took.as_millis());
    same_vm(host, vm, port)
}

fn kill_worker(host: &Host, port: u16) -> Result<(), String> {
    let (vm, before) = (pid(host)?, host.worker_pid());
    let killed = Instant::now();
    kill(before)?;
    let until = killed + STEP_PATIENCE;
    let took = loop {
        let adopted = host.manager().unit(Unit::Worker).pid != Some(before) && host.vm(VM).is_some_and(|view: VmView| view.phase == Phase::Healthy);
        if adopted {
            break killed.elapsed();
        }
        if Instant::now() > until {
            return Err("the respawned worker did not take the VM over".into());
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    println!("worker:      process {before} -> {}; it has taken the VM over after {} ms", host.worker_pid(), took.as_millis());
    same_vm(host, vm, port)
}

fn same_vm(host: &Host, before: u32, port: u16) -> Result<(), String> {
    let now = pid(host)?;
    if now != before {
        return Err(format!("the VM was restarted: process {before} is now {now}"));
    }
    page(port)?;
    println!("             the VM is still process {now}, and its web server answers");
    Ok(())
}

fn leave(host: Host, port: u16) -> Result<(), String> {
    let socket = host.path("worker/worker.sock");
    let audit = host.path("audit/audit.jsonl");
    let (stand_in, diarch) = (binary("diarch-stand-in"), binary("diarch"));
    let control = host.leave_running();
    title("5. Left running");
    println!("export DIARCH_SOCKET={}", socket.display());
    for words in ["vm list", "vm show web", "vm console web", "vm logs web -f", "vm restart web", "events -f", "doctor"] {
        println!("{} {words}", diarch.display());
    }
    println!("{} audit verify --file {}", diarch.display(), audit.display());
    println!("and the guest's page: http://127.0.0.1:{port}/");
    println!(
        "\nkill what you like but the stand-in (it is the service manager here); to end it all:\n{} shutdown --control {}",
        stand_in.display(),
        control.display()
    );
    Ok(())
}

fn pid(host: &Host) -> Result<u32, String> {
    host.vm(VM).and_then(|view| view.pid).ok_or_else(|| "the worker knows no process of the VM".into())
}

fn kill(pid: i32) -> Result<(), String> {
    let process = rustix::process::Pid::from_raw(pid).ok_or("no process")?;
    rustix::process::kill_process(process, rustix::process::Signal::KILL).map_err(|error| format!("kill {pid}: {error}"))
}

/// The first line of the guest's page.
fn page(port: u16) -> Result<String, String> {
    let io = |error: std::io::Error| format!("http://127.0.0.1:{port}/: {error}");
    let mut stream = TcpStream::connect(("127.0.0.1", port)).map_err(io)?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(io)?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: guest\r\n\r\n").map_err(io)?;
    let mut text = String::new();
    stream.take(64 * 1024).read_to_string(&mut text).map_err(io)?;
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    match body.lines().next() {
        Some(line) if text.starts_with("HTTP/1") && !line.is_empty() => Ok(line.to_owned()),
        _ => Err(format!("http://127.0.0.1:{port}/ gave no page")),
    }
}

/// The worker's events, read on a thread of their own so that waiting has an end.
struct Events {
    incoming: mpsc::Receiver<EventView>,
}

impl Events {
    fn follow(host: &Host, last: u32) -> Result<Self, String> {
        let io = |error: std::io::Error| format!("the worker's socket: {error}");
        let mut stream = UnixStream::connect(host.path("worker/worker.sock")).map_err(io)?;
        let request = serde_json::to_string(&Request::Events { last, follow: true }).map_err(|error| error.to_string())?;
        stream.write_all(format!("{request}\n").as_bytes()).map_err(io)?;
        let (sender, incoming) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                if let Ok(Reply::Event(event)) = serde_json::from_str(&line)
                    && sender.send(event).is_err()
                {
                    return;
                }
            }
        });
        Ok(Self { incoming })
    }

    /// Looks at each event until one is what was waited for; a VM that failed for good ends the waiting.
    fn until(&mut self, patience: Duration, mut wanted: impl FnMut(&EventView) -> bool) -> Result<(), String> {
        let until = Instant::now() + patience;
        loop {
            let event = self.incoming.recv_timeout(until.saturating_duration_since(Instant::now()));
            let event = event.map_err(|_| format!("what was waited for did not come within {} s", patience.as_secs()))?;
            if wanted(&event) {
                return Ok(());
            }
            if event.kind == "vm.failed" {
                return Err(event.message);
            }
        }
    }
}
