//! `diarch rehearse DIRECTORY`: both halves on a directory of VM files, as the user who types it, and what root would have been asked.
//!
//! ```text
//!   place (temporary)          diarch-supervisor --rehearse STAGE     the same table, vetting, ledger and audit; a staged host
//!     grants.toml   <- given, or opened as far as the files need      |
//!     audit.jsonl   <-------------------------------------------------+
//!     run/ state/ logs/        diarch-worker                          the worker that a host runs
//! ```
//!
//! The code under test can't tell. QEMU is real where there is one; otherwise a stub that speaks its monitor's protocol.

mod grants;

use super::audit;
use super::connection::ask;
use super::screen::{Exit, Screen, Stop};
use crate::control::protocol::{Phase, Reply, Request, VmView};
use crate::vmfile;
use diarch_ipc::client::{Client, Settings};
use diarch_ipc::operation::{Inventory, Release, VmRecord};
use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Each half is up within milliseconds; a loaded machine needs longer.
const START: Duration = Duration::from_secs(10);
/// A guest that runs under QEMU's translator may need so long to answer its probe.
const SETTLED: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(50);
const STOP: Duration = Duration::from_secs(5);

/// What is rehearsed.
pub struct Rehearsal<'a> {
    /// The VM files.
    pub directory: &'a Path,
    /// A host to play on: a directory with `sys`, `proc` and `dev`. None: a host without devices.
    pub stage: Option<&'a Path>,
    /// The grants to hold it against. None: whatever the files need is granted, and shown.
    pub grants: Option<&'a Path>,
    /// Goes on until it is interrupted, so that files can be edited and the `diarch` command used.
    pub stay: bool,
}

pub fn rehearse(of: &Rehearsal<'_>, screen: &mut Screen<'_>) -> Result<Exit, Stop> {
    if rustix::process::geteuid().is_root() {
        return Err(Stop::failed("a rehearsal is for an ordinary user: what it starts must not be able to change this host; run it without root"));
    }
    let directory = std::fs::canonicalize(of.directory).map_err(|error| Stop::failed(format!("{}: {error}", of.directory.display())))?;
    let files = vmfile::read(&directory);
    let place = Place::make()?;
    let qemu = qemu()?;
    let granted = match of.grants {
        Some(file) => file.to_owned(),
        None => {
            let text = grants::needed(&files.vms, of.stage, &qemu, rustix::process::geteuid().as_raw());
            let file = place.root.join("grants.toml");
            std::fs::write(&file, &text).map_err(|error| Stop::failed(format!("{}: {error}", file.display())))?;
            if !screen.json {
                screen.say("# grants that these files need (its user and QEMU are this rehearsal's)")?;
                screen.say(text.trim_end())?;
                screen.say("")?;
            }
            file
        }
    };
    let stage = match of.stage {
        Some(stage) => std::fs::canonicalize(stage).map_err(|error| Stop::failed(format!("{}: {error}", stage.display())))?,
        None => place.root.join("host"),
    };
    let mut halves = Halves::start(&place, &directory, &stage, &granted)?;
    remark(screen, &format!("# the worker of this rehearsal: diarch --socket {} vm list", place.control().display()))?;
    let settled = follow(of, &place, &mut halves, screen);
    halves.end(&place);
    let vms = settled?;
    // Stopped or not, all of it is in the audit: what root was asked, and what a stage said it would have done.
    if !of.stay {
        remark(screen, "# what root was asked to do")?;
        audit::tail(&place.audit(), u32::MAX, false, screen)?;
    }
    let refused: Vec<&VmView> = vms.iter().filter(|vm| matches!(vm.phase, Phase::Failed | Phase::BackOff)).collect();
    for vm in &refused {
        remark(screen, &format!("# {}: {}", vm.name, vm.reason.as_deref().unwrap_or("failed")))?;
    }
    let unread = files.problems.len();
    for problem in &files.problems {
        remark(screen, &format!("# {}", super::validate::line(problem)))?;
    }
    Ok(if refused.is_empty() && unread == 0 { Exit::Ok } else { Exit::Failed })
}

/// What is no record: beside the records' stream where programs read that.
fn remark(screen: &mut Screen<'_>, text: &str) -> Result<(), Stop> {
    if screen.json {
        let _ = writeln!(screen.err, "{}", super::escape::cell(text));
        return Ok(());
    }
    screen.say(text)
}

/// Until nothing moves any more, or whoever types has had enough.
fn follow(of: &Rehearsal<'_>, place: &Place, halves: &mut Halves, screen: &mut Screen<'_>) -> Result<Vec<VmView>, Stop> {
    let interrupted = interrupts()?;
    let until = Instant::now() + SETTLED;
    let mut shown = 0;
    loop {
        halves.check(place)?;
        let Reply::Vms(vms) = ask(&place.control(), &Request::VmList {}, screen)? else { return Err(Stop::failed("the worker answered something else")) };
        if interrupted.load(Ordering::Relaxed) {
            return Ok(vms);
        }
        if of.stay {
            shown = audit::tail_from(&place.audit(), shown, screen)?;
            screen.flush()?;
        } else if vms.iter().all(settled) || Instant::now() >= until {
            return Ok(vms);
        }
        std::thread::sleep(LOOK);
    }
}

fn settled(vm: &VmView) -> bool {
    !vm.enabled || matches!(vm.phase, Phase::Healthy | Phase::Unhealthy | Phase::BackOff | Phase::Failed)
}

/// SIGINT and SIGTERM end a rehearsal in good order.
fn interrupts() -> Result<std::sync::Arc<AtomicBool>, Stop> {
    let seen = std::sync::Arc::new(AtomicBool::new(false));
    let seen_too = std::sync::Arc::clone(&seen);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| Stop::failed(format!("signals: {error}")))?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else { return };
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            seen_too.store(true, Ordering::Relaxed);
        });
    });
    Ok(seen)
}

/// Where a rehearsal keeps its things; gone with it.
struct Place {
    root: PathBuf,
}

impl Place {
    fn make() -> Result<Self, Stop> {
        let base = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir()).unwrap_or_else(std::env::temp_dir);
        let root = base.join(format!("diarch-rehearsal-{}", std::process::id()));
        let failed = |error: io::Error| Stop::failed(format!("{}: {error}", root.display()));
        // Not `recursive`: one that is there already is somebody else's.
        std::fs::DirBuilder::new().mode(0o700).create(&root).map_err(failed)?;
        let place = Self { root: root.clone() };
        for part in ["run", "state", "logs", "host", "host/sys", "host/proc", "host/dev"] {
            std::fs::DirBuilder::new().mode(0o755).create(root.join(part)).map_err(failed)?;
        }
        Ok(place)
    }
    fn audit(&self) -> PathBuf {
        self.root.join("audit.jsonl")
    }
    fn control(&self) -> PathBuf {
        self.root.join("worker.sock")
    }
    fn supervisor(&self) -> PathBuf {
        self.root.join("run/supervisor.sock")
    }
    /// The last lines that a half wrote.
    fn last_words(&self, log: &str) -> String {
        let text = std::fs::read_to_string(self.root.join(log)).unwrap_or_default();
        text.lines().rev().take(3).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("; ")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

/// Both halves. Dropped, they are killed; VMs are ended before (`end`).
struct Halves {
    supervisor: Child,
    worker: Option<Child>,
}

impl Halves {
    fn start(place: &Place, directory: &Path, stage: &Path, granted: &Path) -> Result<Self, Stop> {
        let run = place.root.join("run");
        let mut supervisor = Command::new(program("diarch-supervisor")?);
        supervisor.arg("--rehearse").arg(stage).arg("--grants").arg(granted).arg("--run-dir").arg(run).arg("--audit").arg(place.audit());
        let mut halves = Self { supervisor: spawned(supervisor, place, "supervisor.log")?, worker: None };
        halves.wait_for(&place.supervisor(), place)?;
        let settings = serde_json::json!({
            "vm_config": {"configs_dir": directory},
            "diarch": {
                "supervisor_socket": place.supervisor(),
                "supervisor_uid": rustix::process::geteuid().as_raw(),
                "control_socket": place.control(),
                "state_directory": place.root.join("state"),
                "log_directory": place.root.join("logs"),
                // Nobody restarts it here: a supervisor that dies ends the rehearsal, with its last words.
                "restart_supervisor": {"command": ["/bin/true"]},
            },
        });
        let file = place.root.join("config.json");
        std::fs::write(&file, settings.to_string()).map_err(|error| Stop::failed(format!("{}: {error}", file.display())))?;
        let mut worker = Command::new(program("diarch-worker")?);
        worker.arg("--config").arg(file);
        halves.worker = Some(spawned(worker, place, "worker.log")?);
        halves.wait_for(&place.control(), place)?;
        Ok(halves)
    }

    fn wait_for(&mut self, socket: &Path, place: &Place) -> Result<(), Stop> {
        let until = Instant::now() + START;
        while std::os::unix::net::UnixStream::connect(socket).is_err_and(|error| error.raw_os_error() != Some(nix::libc::EPROTOTYPE)) {
            self.check(place)?;
            if Instant::now() >= until {
                return Err(Stop::failed(format!("nobody listens on {} after {} s", socket.display(), START.as_secs())));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// That both still run.
    fn check(&mut self, place: &Place) -> Result<(), Stop> {
        let ended = |child: &mut Child| child.try_wait().ok().flatten();
        if let Some(status) = ended(&mut self.supervisor) {
            return Err(Stop::failed(format!("the supervisor ended ({status}): {}", place.last_words("supervisor.log"))));
        }
        match self.worker.as_mut().and_then(ended) {
            Some(status) => Err(Stop::failed(format!("the worker ended ({status}): {}", place.last_words("worker.log")))),
            None => Ok(()),
        }
    }

    /// The worker first, so that nobody starts VMs again; then every VM; then the supervisor.
    fn end(&mut self, place: &Place) {
        if let Some(worker) = &mut self.worker {
            terminate(worker);
        }
        if let Err(error) = release_all(&place.supervisor()) {
            tracing::warn!(error, "VMs may be left");
        }
        terminate(&mut self.supervisor);
    }
}

impl Drop for Halves {
    fn drop(&mut self) {
        for child in self.worker.iter_mut().chain([&mut self.supervisor]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn terminate(child: &mut Child) {
    let Some(pid) = rustix::process::Pid::from_raw(child.id().cast_signed()) else { return };
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    let until = Instant::now() + STOP;
    while child.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < until {
        std::thread::sleep(LOOK);
    }
}

fn release_all(socket: &Path) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let settings = Settings { server_uid: rustix::process::geteuid().as_raw(), restarts: Vec::new(), ..Settings::new(socket) };
        let (client, _events) = Client::start(settings, Box::new(crate::supervisor::Nobody));
        loop {
            let (inventory, _) = client.call(Inventory { after: None }, Vec::new(), STOP).await.map_err(|error| error.to_string())?;
            if inventory.vms.is_empty() {
                return Ok(());
            }
            for tenancy in inventory.vms.iter().map(VmRecord::tenancy) {
                client.call(Release { tenancy }, Vec::new(), STOP).await.map_err(|error| error.to_string())?;
            }
        }
    })
}

fn spawned(mut command: Command, place: &Place, log: &str) -> Result<Child, Stop> {
    let failed = |error: io::Error| Stop::failed(format!("{}: {error}", command.get_program().to_string_lossy()));
    let file = File::create(place.root.join(log)).map_err(failed)?;
    let again = file.try_clone().map_err(failed)?;
    command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(again)
        .spawn()
        .map_err(|error| Stop::failed(format!("{}: {error}", command.get_program().to_string_lossy())))
}

/// A program of ours: beside this one, or where the package has it.
fn program(name: &str) -> Result<PathBuf, Stop> {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(name)));
    let places = beside.into_iter().chain([Path::new("/usr/sbin").join(name), Path::new("/usr/lib/diarch").join(name)]);
    let tried: Vec<PathBuf> = places.collect();
    tried.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        let tried: Vec<String> = tried.iter().map(|path| path.display().to_string()).collect();
        Stop::failed(format!("{name} is missing; looked for {}", tried.join(", ")))
    })
}

/// QEMU, where there is one; otherwise the stub that speaks its monitor's protocol.
fn qemu() -> Result<PathBuf, Stop> {
    let real = ["/usr/bin", "/usr/local/bin"].iter().map(|dir| Path::new(dir).join("qemu-system-x86_64")).find(|path| path.exists());
    // The stub is a part of the tests, and beside this program where those were built.
    real.map_or_else(|| program("diarch-stub-qemu"), Ok)
}
