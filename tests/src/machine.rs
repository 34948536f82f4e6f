//! A Debian 13 that was booted by a real systemd, with the package installed: a container, over a layer in memory that goes with it.
//!
//! ```text
//!   a test ---- Machine ---- guard (tests/debian/boot) ---- systemd-nspawn
//!                  |                                            |
//!                  |                                        PID 1: systemd 257, D-Bus, polkit; no network but its own loopback
//!                  |                                            +-- diarch-supervisor.service
//!                  +-- nsenter: run, sh, as_user                +-- diarch-worker.service
//!                  +-- systemd-run: in_unit                     +-- diarch-vm-N.scope: QEMU, or the stub
//!                  +-- /proc/LEADER/root: read, write
//! ```
//!
//! | what there is in it     | where                                                                                     |
//! |-------------------------|-------------------------------------------------------------------------------------------|
//! | Debian                  | the tree of `tests/debian/build` (`DIARCH_TREE`), never written to                        |
//! | the package             | a layer made by `dpkg -i` in a booted machine, once per package (`DIARCH_DEB`): `layer`   |
//! | what the test asks for  | grants, VM files, drop-ins, put there before PID 1 starts: `builder`                      |
//! | the test guest          | `/srv/guest` (`DIARCH_GUEST`), read-only                                                  |
//! | the stub QEMU           | `/usr/local/bin/diarch-stub-qemu`, `[qemu.stub]` of the grants                            |
//!
//! A machine ends with its value, with the test's process however that ends, and after its longest life. At most two run at one time on a host: a test
//! has one at a time, or two tests could wait for each other.
//!
//! What [`Machine::run`] starts is in the machine's namespaces, and in none of its units: the kernel shows it outside the machine's cgroups, with all of root's
//! capabilities and no system call filter. For what must be in a unit there is [`Machine::in_unit`].

pub mod builder;
mod guard;
mod inventory;
mod layer;
mod process;

pub use builder::{Builder, Until, vm_file_guest, vm_file_stub};
pub use guard::hierarchy;
pub use inventory::Inventory;
pub use process::Process;

use diarch_worker::control::protocol::{Phase, VmView};
pub(crate) use guard::Slot;
use guard::{Boot, Guard};
use process::{ancestors, name_of, ns_pids, processes, started};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub const SUPERVISOR: &str = "diarch-supervisor.service";
pub const SUPERVISOR_SOCKET: &str = "diarch-supervisor.socket";
pub const WORKER: &str = "diarch-worker.service";
pub const SLICE: &str = "diarch-vms.slice";

/// What a command may take unless it is given more.
const COMMAND: Duration = Duration::from_secs(30);
/// From `READY=1` of PID 1 to both halves being active; they are started with it.
const HALVES: Duration = Duration::from_secs(20);
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A booted machine.
#[derive(Debug)]
pub struct Machine {
    leader: i32,
    guard: Guard,
    slot: Slot,
    started: Instant,
    _tree: fs::File,
}

/// How a command in the machine ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// None: it was killed by a signal, or because its time was over.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }

    #[track_caller]
    pub fn expect_success(self, what: &str) -> Output {
        let end = self.code.map_or("a signal, or out of time".to_owned(), |code| format!("exit code {code}"));
        assert!(self.success(), "{what}: {end}\n---- stdout ----\n{}\n---- stderr ----\n{}", self.stdout, self.stderr);
        self
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("not JSON ({e}): {self:#?}"))
    }
}

// ---- its life ----

impl Machine {
    /// Debian without the package.
    pub fn bare() -> Builder {
        Builder::new(None)
    }

    /// Debian with the package of `DIARCH_DEB`, both halves started by its boot.
    pub fn installed() -> Builder {
        Builder::new(Some(crate::need::package().expect("need!(Package) comes first")))
    }

    /// As [`Machine::installed`], of another package.
    pub fn installed_from(deb: &Path) -> Builder {
        Builder::new(Some(deb.to_owned()))
    }

    /// A directory for one machine; its guard removes it.
    fn directory() -> PathBuf {
        tempfile::Builder::new().prefix("diarch-machine-").tempdir().expect("a directory for the machine").keep()
    }

    fn start(tree: &Path, dir: PathBuf, boot: &Boot, slot: Slot) -> Machine {
        // Who builds the tree anew waits until nobody runs on the old one.
        let stamp = fs::File::open(tree.join("stamp")).expect("need!(Machine) comes first");
        stamp.lock_shared().expect("flock");
        let started = Instant::now();
        let guard = Guard::start(tree, dir, boot);
        Machine { leader: guard.wait_leader(), guard, slot, started, _tree: stamp }
    }

    /// PID 1 of the machine, as a process of this host.
    pub fn leader(&self) -> i32 {
        self.leader
    }

    /// A number that no other machine has at this time, from 0.
    pub fn number(&self) -> u32 {
        self.slot.number
    }

    /// How long it has been there, without what it waited for other machines.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// The machine's root directory, for paths without symbolic links: an absolute one would lead out of it.
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.leader))
    }

    /// The machine's own cgroup on this host; `system.slice` and the others are in it.
    pub fn cgroup(&self) -> PathBuf {
        self.guard.cgroup.join("payload")
    }

    pub fn console(&self) -> String {
        self.guard.console()
    }

    /// Starts it anew, as `systemctl reboot` does: what is on its disk stays.
    pub fn reboot(&mut self) {
        let before = self.leader;
        self.guard.forget_messages();
        self.run(&["systemctl", "reboot", "--no-block"]).expect_success("systemctl reboot");
        self.leader = self.guard.wait_leader();
        assert_ne!(self.leader, before, "it did not reboot");
        self.guard.wait_booted();
    }

    /// Powers it off and waits for its end; gives what is left of it on this host, which should be nothing.
    pub fn power_off(mut self) -> Vec<String> {
        self.run(&["systemctl", "poweroff", "--no-block"]).expect_success("systemctl poweroff");
        self.wait_end()
    }

    /// As when the power fails.
    pub fn cut_power(mut self) -> Vec<String> {
        let leader = rustix::process::Pid::from_raw(self.leader).expect("a process id");
        let _ = rustix::process::kill_process(leader, rustix::process::Signal::KILL);
        self.wait_end()
    }

    fn wait_end(&mut self) -> Vec<String> {
        let (dir, cgroup) = (self.guard.dir.clone(), self.guard.cgroup.clone());
        let mut left = Vec::new();
        if let Err(reason) = self.guard.wait_end(Duration::from_secs(60)) {
            left.push(reason);
        }
        left.extend([&dir, &cgroup].iter().filter(|path| path.exists()).map(|path| path.display().to_string()));
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        left.extend(mounts.lines().filter(|line| line.contains(&*dir.to_string_lossy())).map(str::to_owned));
        let alive = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|of| of.contains(&*cgroup.file_name().unwrap_or_default().to_string_lossy()))
        };
        left.extend(processes().filter(alive).map(|pid| format!("process {pid} ({})", name_of(pid))));
        left
    }

    /// Everything that tells why a test failed.
    pub fn state(&self) -> String {
        let mut text = format!("---- console ----\n{}", tail(&self.guard.console(), 2000));
        if self.guard.ended() {
            text += "\n---- the machine has ended ----\n";
            return text;
        }
        let short = |argv: &[&str]| self.try_run(Duration::from_secs(5), argv).map_or_else(|e| e.to_string(), |out| out.stdout + &out.stderr);
        let _ = write!(text, "\n---- units ----\n{}", short(&["systemctl", "--no-pager", "--all", "--failed"]));
        let _ = write!(text, "{}", short(&["systemctl", "--no-pager", "--no-legend", "--all", "list-units", "diarch*"]));
        let _ =
            write!(text, "\n---- journal ----\n{}", tail(&short(&["journalctl", "--no-pager", "-o", "short-precise", "-u", "diarch*", "-n", "200"]), 16_000));
        text
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.state());
        }
    }
}

// ---- commands ----

impl Machine {
    /// A command in the machine, killed after `within`; arguments, input and output are the caller's.
    pub fn command(&self, within: Duration, program: &str) -> Command {
        let seconds = within.as_secs().max(1);
        let mut command = Command::new("timeout");
        // The inner limit ends the command, the outer one only an nsenter that hangs: the command is in another PID namespace, and would outlive it.
        command.args(["-s", "KILL", &(seconds + 10).to_string(), "nsenter", "--target", &self.leader.to_string(), "--all", "--"]);
        command.args(["/usr/bin/env", "-i", "-C", "/", &format!("PATH={PATH}"), "HOME=/root", "LANG=C.UTF-8", "TERM=dumb"]);
        command.args(["timeout", "-s", "KILL", &seconds.to_string(), program]);
        command.stdin(Stdio::null());
        command
    }

    fn try_run(&self, within: Duration, argv: &[&str]) -> std::io::Result<Output> {
        let Some((program, arguments)) = argv.split_first() else { return Err(std::io::ErrorKind::InvalidInput.into()) };
        let output = self.command(within, program).args(arguments).output()?;
        Ok(Output {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs a program as root, outside every unit, at most 30 s.
    pub fn run(&self, argv: &[&str]) -> Output {
        self.run_within(COMMAND, argv)
    }

    pub fn run_within(&self, within: Duration, argv: &[&str]) -> Output {
        self.try_run(within, argv).unwrap_or_else(|e| panic!("{argv:?}: {e}"))
    }

    /// Runs a script of bash's that must succeed; gives what it printed, without the last newline.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.try_sh(script).expect_success(script).stdout.trim_end().to_owned()
    }

    pub fn try_sh(&self, script: &str) -> Output {
        self.run(&["/bin/bash", "-euo", "pipefail", "-c", script])
    }

    /// As [`Machine::try_sh`], as a user of the machine's, with its groups. In no unit.
    pub fn as_user(&self, user: &str, script: &str) -> Output {
        self.run(&["runuser", "-u", user, "--", "/bin/bash", "-euo", "pipefail", "-c", script])
    }

    /// Runs a program in a transient service of its own, and waits for it: `in_unit("probe.service", &["User=diarch"], &["id"])`.
    pub fn in_unit(&self, unit: &str, properties: &[&str], argv: &[&str]) -> Output {
        let mut words = vec!["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--unit", unit];
        for property in properties {
            words.extend(["-p", property]);
        }
        words.push("--");
        words.extend(argv);
        self.run(&words)
    }
}

// ---- files ----

impl Machine {
    /// Opens a path of the machine's; symbolic links stay in it.
    fn open(&self, path: &str, flags: OFlags, mode: u32) -> std::io::Result<fs::File> {
        let root = fs::File::open(self.root())?;
        Ok(openat2(root, path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(mode), ResolveFlags::IN_ROOT)?.into())
    }

    pub fn exists(&self, path: &str) -> bool {
        self.open(path, OFlags::PATH, 0).is_ok()
    }

    #[track_caller]
    pub fn read(&self, path: &str) -> String {
        let mut bytes = Vec::new();
        let read = self.open(path, OFlags::RDONLY, 0).and_then(|mut file| file.read_to_end(&mut bytes));
        read.unwrap_or_else(|e| panic!("{path} in the machine: {e}"));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Writes a file of root's, mode 0644, in place: its name never shows another file.
    #[track_caller]
    pub fn write(&self, path: &str, text: &str) {
        self.put(path, text.as_bytes(), 0o644);
    }

    /// Puts a file there as an editor does, whole, under its name at once.
    #[track_caller]
    pub fn replace(&self, path: &str, text: &str) {
        let new = format!("{path}.new~");
        self.write(&new, text);
        self.run(&["mv", "-T", &new, path]).expect_success("mv");
    }

    #[track_caller]
    pub fn copy_in(&self, from: &Path, path: &str, mode: u32) {
        let bytes = fs::read(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
        self.put(path, &bytes, mode);
    }

    #[track_caller]
    fn put(&self, path: &str, bytes: &[u8], mode: u32) {
        let written = self.open(path, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC, mode).and_then(|mut file| {
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.write_all(bytes)
        });
        written.unwrap_or_else(|e| panic!("{path} in the machine: {e}"));
    }

    /// Copies a program of this workspace to `/usr/local/bin`.
    pub fn copy_program(&self, name: &str) {
        self.copy_in(&crate::host::binary(name), &format!("/usr/local/bin/{name}"), 0o755);
    }

    /// `dpkg -i`, as an operator installs or upgrades.
    pub fn install(&self, deb: &Path) -> Output {
        layer::install(self, deb)
    }
}

// ---- units and processes ----

impl Machine {
    /// Tries `ready` again and again until it gives something.
    #[track_caller]
    pub fn wait_for<T>(&self, what: &str, within: Duration, mut ready: impl FnMut() -> Option<T>) -> T {
        let until = Instant::now() + within;
        loop {
            if let Some(value) = ready() {
                return value;
            }
            assert!(Instant::now() < until, "not within {within:?}: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[track_caller]
    pub fn systemctl(&self, words: &[&str]) -> String {
        let argv: Vec<&str> = ["systemctl", "--no-pager"].iter().chain(words).copied().collect();
        self.run_within(Duration::from_secs(120), &argv).expect_success(&argv.join(" ")).stdout.trim_end().to_owned()
    }

    /// A unit's property, as `systemctl show` words it.
    #[track_caller]
    pub fn show(&self, unit: &str, property: &str) -> String {
        self.systemctl(&["show", "--property", property, "--value", unit])
    }

    pub fn is_active(&self, unit: &str) -> bool {
        self.show(unit, "ActiveState") == "active"
    }

    #[track_caller]
    pub fn wait_active(&self, unit: &str, within: Duration) {
        self.wait_for(&format!("{unit} is active"), within, || self.is_active(unit).then_some(()));
    }

    /// A service's main process, as the machine numbers it.
    pub fn pid_of_unit(&self, unit: &str) -> Option<u32> {
        self.show(unit, "MainPID").parse().ok().filter(|pid| *pid != 0)
    }

    /// A service's main process.
    pub fn main_process(&self, unit: &str) -> Option<Process> {
        let pid = self.pid_of_unit(unit)?;
        self.process(self.host_pid(pid)?)
    }

    /// Sends a signal to a service's main process, without systemd's help.
    #[track_caller]
    pub fn kill(&self, unit: &str, signal: rustix::process::Signal) {
        let process = self.main_process(unit).unwrap_or_else(|| panic!("{unit} has no process"));
        let pid = rustix::process::Pid::from_raw(process.host_pid).expect("a process id");
        rustix::process::kill_process(pid, signal).unwrap_or_else(|e| panic!("{unit}, process {}: {e}", process.pid));
    }

    /// What this host calls the process that the machine calls `pid`.
    pub fn host_pid(&self, pid: u32) -> Option<i32> {
        let level = ns_pids(self.leader).len().checked_sub(1)?;
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let ours = namespace(self.leader);
        let mut candidates = processes().filter(|found| ns_pids(*found).get(level) == Some(&pid));
        // A process deeper down (in a PID namespace that a unit has for itself) is told by its ancestors.
        candidates.find(|found| namespace(*found) == ours || ancestors(*found).any(|ancestor| ancestor == self.leader))
    }

    /// By the number that this host knows it by.
    pub fn process(&self, host_pid: i32) -> Option<Process> {
        let level = ns_pids(self.leader).len().checked_sub(1)?;
        Some(Process { pid: *ns_pids(host_pid).get(level)?, host_pid, started: started(host_pid)? })
    }

    /// The processes of a unit, by its cgroup.
    pub fn processes_of(&self, unit: &str) -> Vec<Process> {
        let cgroup = self.show(unit, "ControlGroup");
        if cgroup.is_empty() { Vec::new() } else { self.processes_in(&self.cgroup().join(cgroup.trim_start_matches('/'))) }
    }

    fn processes_in(&self, cgroup: &Path) -> Vec<Process> {
        let pids = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        pids.lines().filter_map(|pid| self.process(pid.parse().ok()?)).collect()
    }

    /// The first process of each VM's scope, by the scope's name (`diarch-vm-0.scope`).
    pub fn qemus(&self) -> BTreeMap<String, Process> {
        let mut found = BTreeMap::new();
        let mut queue = vec![self.cgroup()];
        while let Some(dir) = queue.pop() {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.starts_with("diarch-vm-") && name.ends_with(".scope") {
                    if let Some(first) = self.processes_in(&entry.path()).first() {
                        found.insert(name, *first);
                    }
                } else {
                    queue.push(entry.path());
                }
            }
        }
        found
    }

    /// A unit's messages since boot, one a line.
    pub fn journal(&self, unit: &str) -> String {
        self.run(&["journalctl", "--no-pager", "--quiet", "-o", "cat", "-u", unit]).stdout
    }
}

// ---- VMs ----

impl Machine {
    /// The `diarch` command, as root.
    pub fn diarch(&self, args: &[&str]) -> Output {
        let argv: Vec<&str> = ["diarch"].iter().chain(args).copied().collect();
        self.run_within(Duration::from_secs(120), &argv)
    }

    /// All VMs as the worker sees them; none while it can't be asked.
    pub fn vms(&self) -> Vec<VmView> {
        serde_json::from_str(&self.diarch(&["vm", "list", "--json"]).stdout).unwrap_or_default()
    }

    pub fn vm(&self, name: &str) -> Option<VmView> {
        self.vms().into_iter().find(|vm| vm.name.as_str() == name)
    }

    #[track_caller]
    pub fn wait_vm(&self, name: &str, within: Duration, what: &str, wanted: impl Fn(&VmView) -> bool) -> VmView {
        let until = Instant::now() + within;
        loop {
            let vm = self.vm(name);
            if let Some(vm) = vm.as_ref().filter(|vm| wanted(vm)) {
                return vm.clone();
            }
            assert!(Instant::now() < until, "{name} was not {what} within {within:?}: {vm:#?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    pub fn wait_healthy(&self, name: &str, within: Duration) -> VmView {
        self.wait_vm(name, within, "healthy", |vm| vm.phase == Phase::Healthy)
    }

    /// Writes a VM file.
    #[track_caller]
    pub fn write_vm(&self, file: &serde_json::Value) {
        let name = file["name"].as_str().expect("a VM file has a name");
        self.replace(&format!("/etc/diarch/vms/{name}.json"), &file.to_string());
    }

    /// Ends `diarch-load` ([`Builder::load`]), and gives its totals.
    #[track_caller]
    pub fn end_load(&self) -> serde_json::Value {
        // Not by `systemctl stop`: a scope that is being made is ordered before the worker, and so waits for its stop job; and the load for its answer.
        self.kill(WORKER, rustix::process::Signal::TERM);
        let ended = || matches!(self.show(WORKER, "ActiveState").as_str(), "inactive" | "failed").then_some(());
        self.wait_for("diarch-load ends", Duration::from_secs(60), ended);
        let journal = self.journal(WORKER);
        let totals = journal.lines().rev().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("diarch-load said no totals:\n{journal}"));
        serde_json::from_str(totals).expect("JSON")
    }

    /// The page that a guest of [`vm_file_guest`] serves, if it does.
    pub fn get(&self, port: u16) -> Option<String> {
        let output = self.run(&["busybox", "wget", "-q", "-T", "5", "-O", "-", &format!("http://127.0.0.1:{port}/")]);
        output.success().then_some(output.stdout)
    }
}

fn tail(text: &str, bytes: usize) -> &str {
    let from = text.len().saturating_sub(bytes);
    let from = (from..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    &text[from..]
}
