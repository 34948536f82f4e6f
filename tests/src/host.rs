//! One whole Diarch in a directory: grants, both halves (or the supervisor alone), VM files, logs.
//!
//! ```text
//!   /tmp/diarch-NAME/          root's, 0755: the supervisor trusts a grants file only below directories that nobody else can write
//!     grants.toml  config.json
//!     bin/                     the stub QEMU, and the halves where the build directory is closed to the worker's user
//!     run/                     the supervisor's: supervisor.sock, vm/SLOT/ (a small tmpfs, where the test wants one; the socket is then beside it)
//!     audit/                   audit.jsonl (a small tmpfs, where the test wants one)
//!     vms/  files/             VM files; guest kernels and the like
//!     state/ log/ worker/      the worker's: its records, its VMs' logs, worker.sock
//!     *.log                    what both halves and the stand-in wrote
//! ```
//!
//! Everything ends with the value. [`Host::inventory`] tells what there is, [`assert_same`] what should not be.

use crate::stand_in::{Ask, Bond, Config, Left, Listen, Service, StandIn, StartLimit, Tmpfs, Unit};
use crate::wire::{Raw, User, become_user};
use diarch_ipc::client::{Answered, Client, Restarter, Settings, State};
use diarch_ipc::name::{CommandLine, Cpus, Label, MiB, QemuName, Tenancy};
use diarch_ipc::operation::{self, Event, HostInventory, Request, VmRecord};
use diarch_ipc::spec::{Accelerator, Boot, Presence, VmSpec};
use diarch_worker::control::protocol::{self, Phase, VmView};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

/// The worker's user in every test; it needs no entry in the user database.
pub const WORKER: User = User { uid: 64_000, gid: 64_000 };
/// Another unprivileged user.
pub const STRANGER: User = User { uid: 64_001, gid: 64_001 };

// ---- where the programs are ----

/// A program of this workspace, beside the test that runs. Built here, once, when somebody started a test without `make`.
pub fn binary(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    let mut directory = std::env::current_exe().expect("this test's own path");
    directory.pop();
    if directory.ends_with("deps") {
        directory.pop();
    }
    let path = directory.join(name);
    if !path.exists() {
        BUILT.get_or_init(|| {
            let mut build = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
            build.args(["build", "--workspace", "--bins"]).current_dir(env!("CARGO_MANIFEST_DIR"));
            if let Some(target) = directory.parent() {
                build.arg("--target-dir").arg(target);
            }
            if directory.ends_with("release") {
                build.arg("--release");
            }
            assert!(build.status().expect("cargo").success(), "cargo build --workspace --bins failed");
        });
    }
    assert!(path.exists(), "{} was not built", path.display());
    path
}

/// Whether every user may pass through every directory on the way.
fn open_to_all(path: &Path) -> bool {
    path.ancestors().skip(1).all(|dir| fs::metadata(dir).is_ok_and(|m| m.permissions().mode() & 0o001 != 0))
}

/// The same VM file with images that the worker's user can open: where they lie behind a closed directory (a clone in a home directory), they are
/// copied into `files`.
fn reachable(files: &Path, file: &serde_json::Value) -> serde_json::Value {
    let mut file = file.clone();
    let Some(image) = file.get_mut("image").and_then(serde_json::Value::as_object_mut) else { return file };
    for (what, value) in image {
        let path = PathBuf::from(value.as_str().unwrap_or_default());
        let readable = fs::metadata(&path).is_ok_and(|meta| meta.permissions().mode() & 0o004 != 0);
        if path.is_absolute() && path.is_file() && !(readable && open_to_all(&path)) {
            let copy = files.join(format!("{what}-{}", path.file_name().unwrap_or_default().to_string_lossy()));
            if !copy.exists() {
                fs::copy(&path, &copy).expect("copy");
                fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).expect("chmod");
            }
            *value = copy.to_string_lossy().into_owned().into();
        }
    }
    file
}

// ---- how a host is made ----

/// Which QEMU `default` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qemu {
    Stub,
    Real,
}

/// Who listens for the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// The service manager, as with a systemd socket unit: a connection made while the supervisor is dead waits for the next.
    Socket,
    /// The supervisor itself: a connection made while it is dead is refused.
    Own,
}

/// A host to be.
#[derive(Debug, Clone)]
pub struct Builder {
    pub qemu: Qemu,
    pub worker: bool,
    pub activation: Activation,
    pub unit: Option<String>,
    pub vms_max: u16,
    pub memory_mib: u64,
    pub cpus_each: u16,
    pub kvm: bool,
    /// Other programs of this workspace as `[qemu.NAME]`: the name, the program, and more lines.
    pub qemus: Vec<(&'static str, &'static str, String)>,
    /// More lines for the grants: `[limits]`, another `[qemu.NAME]`.
    pub grants_more: String,
    pub grants_mode: u32,
    pub audit_tmpfs_kib: Option<u32>,
    /// Needs `Activation::Socket`: what is on this tmpfs can be seen through [`Host::inside`] only, and so could not be connected to.
    pub run_tmpfs_kib: Option<u32>,
    /// Shell text that runs in the supervisor's process before it becomes the supervisor; `$host` is the host's directory.
    pub prelude: Option<String>,
    /// A stage (`stage`) whose devices the supervisor takes for the machine's.
    pub host_root: Option<PathBuf>,
    pub restart_pauses_ms: Vec<u64>,
    pub patience_ms: u64,
    pub start_limit: StartLimit,
    /// Whether [`Host::leave_running`] may be called at the end.
    pub lives_on: bool,
    /// The first of the VMs' users; otherwise they are chosen so that no two hosts of this PID namespace share one.
    pub uid_first: Option<u32>,
    vms: Vec<(String, serde_json::Value)>,
}

impl Host {
    pub fn builder() -> Builder {
        Builder {
            qemu: Qemu::Stub,
            worker: true,
            activation: Activation::Socket,
            unit: None,
            vms_max: 16,
            memory_mib: 8192,
            cpus_each: 4,
            kvm: false,
            qemus: Vec::new(),
            grants_more: String::new(),
            grants_mode: 0o644,
            audit_tmpfs_kib: None,
            run_tmpfs_kib: None,
            prelude: None,
            host_root: None,
            restart_pauses_ms: vec![300, 600, 1200],
            patience_ms: 300,
            // Tests kill more often than any operator; the limit has a test of its own.
            start_limit: StartLimit { count: 1000, within_ms: 1000 },
            lives_on: false,
            uid_first: None,
            vms: Vec::new(),
        }
    }

    /// The supervisor and the stub QEMU, and no worker: for tests that speak the contract themselves.
    pub fn supervisor_only() -> Host {
        Host::builder().without_worker().start()
    }
}

impl Builder {
    pub fn without_worker(mut self) -> Self {
        self.worker = false;
        self
    }
    pub fn real_qemu(mut self) -> Self {
        self.qemu = Qemu::Real;
        self
    }
    pub fn own_socket(mut self) -> Self {
        self.activation = Activation::Own;
        self
    }
    pub fn grants(mut self, lines: &str) -> Self {
        self.grants_more.push_str(lines);
        self
    }
    /// The devices are those of a stage.
    pub fn on_stage(mut self, stage: &crate::stage::Stage) -> Self {
        self.host_root = Some(stage.root().to_owned());
        self
    }
    /// A VM file `NAME.json` that is there from the start.
    pub fn vm(mut self, name: &str, file: serde_json::Value) -> Self {
        self.vms.push((name.to_owned(), file));
        self
    }

    /// The host, with everything in it ready.
    pub fn start(self) -> Host {
        let host = self.prepare();
        host.wait_ready();
        host
    }

    /// Starts both halves and waits for nothing.
    pub fn prepare(self) -> Host {
        let dir = tempfile::Builder::new().prefix("diarch-").tempdir().expect("a directory for the host");
        let at = |name: &str| dir.path().join(name);
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
        mode(dir.path(), 0o755);
        for name in ["bin", "run", "audit", "vms", "files", "state", "log", "worker"] {
            fs::create_dir(at(name)).expect("mkdir");
            mode(&at(name), 0o755);
        }
        for name in ["state", "log", "worker"] {
            chown(at(name), Some(WORKER.uid), Some(WORKER.gid)).expect("chown");
        }
        let usable = |name: &str| {
            let built = binary(name);
            if open_to_all(&built) {
                return built;
            }
            let copy = at("bin").join(name);
            fs::copy(&built, &copy).expect("copy");
            copy
        };
        // Always a copy: the supervisor starts only binaries that root alone can have written, wherever this was built.
        let copied = |name: &str| {
            let copy = at("bin").join(name);
            fs::copy(binary(name), &copy).expect("copy");
            mode(&copy, 0o755);
            copy
        };
        let qemu = match self.qemu {
            Qemu::Stub => copied("diarch-stub-qemu"),
            Qemu::Real => crate::need::qemu().expect("need!(Qemu) comes first"),
        };
        fs::write(at("files/kernel"), "no kernel: the stub boots nothing\n").expect("write");
        fs::write(at("files/initrd"), "no initrd\n").expect("write");

        // Limits of the kernel's count per user id: two hosts at one time must not share theirs.
        let uid_first = self.uid_first.unwrap_or_else(users);
        let unit = self.unit.as_ref().map(|u| format!("unit = {u:?}\n")).unwrap_or_default();
        let others: String = self.qemus.iter().map(|(name, program, more)| format!("[qemu.{name}]\npath = {:?}\n{more}\n", copied(program))).collect();
        let grants = format!(
            "[worker]\nuser = {}\n{unit}[vms]\nmax = {}\nuid_first = {uid_first}\nmemory_mib = {}\ncpus_each = {}\nkvm = {}\n\
             [qemu.default]\npath = {:?}\n{others}[forwards]\nallow = [\"127.0.0.1:1024-65535\"]\n{}\n",
            WORKER.uid, self.vms_max, self.memory_mib, self.cpus_each, self.kvm, qemu, self.grants_more
        );
        fs::write(at("grants.toml"), grants).expect("write");
        mode(&at("grants.toml"), self.grants_mode);

        let socket = if self.run_tmpfs_kib.is_some() { at("supervisor.sock") } else { at("run/supervisor.sock") };
        let control = at("manager.sock");
        let stand_in = usable("diarch-stand-in");
        let text = |path: &Path| path.to_str().expect("a UTF-8 path").to_owned();
        let config = serde_json::json!({
            "vm_config": {"configs_dir": at("vms")},
            "diarch": {
                "supervisor_socket": socket,
                "control_socket": at("worker/worker.sock"),
                "state_directory": at("state"),
                "log_directory": at("log"),
                "restart_supervisor": {"command": [text(&stand_in), "restart", "supervisor", "--control", text(&control)]},
                "restart_pauses_ms": self.restart_pauses_ms,
                "patience_ms": self.patience_ms,
            }
        });
        fs::write(at("config.json"), config.to_string()).expect("write");
        for (name, file) in &self.vms {
            fs::write(at("vms").join(format!("{name}.json")), reachable(&at("files"), file).to_string()).expect("write");
        }

        let argv = |words: &[&str]| -> Vec<String> { words.iter().map(|w| (*w).to_owned()).collect() };
        let (grants, run, audit) = (text(&at("grants.toml")), text(&at("run")), text(&at("audit/audit.jsonl")));
        let mut supervisor: Vec<String> = argv(&[&text(&usable("diarch-supervisor")), "run", "--grants", &grants, "--run-dir", &run, "--audit", &audit]);
        if let Some(root) = &self.host_root {
            supervisor.extend(["--host-root".to_owned(), text(root)]);
        }
        if let Some(prelude) = &self.prelude {
            let script = format!("host='{}'\n{prelude}\nexec \"$0\" \"$@\"", dir.path().display());
            supervisor.splice(0..0, argv(&["/bin/sh", "-c", &script]));
        }
        let environment = vec![("RUST_BACKTRACE".to_owned(), "1".to_owned())];
        let manager = Config {
            control: control.clone(),
            directory: dir.path().to_owned(),
            listen: (self.activation == Activation::Socket).then(|| Listen { path: socket.clone(), gid: WORKER.gid }),
            tmpfs: [("audit", self.audit_tmpfs_kib), ("run", self.run_tmpfs_kib)]
                .into_iter()
                .filter_map(|(name, size_kib)| size_kib.map(|size_kib| Tmpfs { path: at(name), size_kib }))
                .collect(),
            supervisor: Service { argv: supervisor, log: at("supervisor.log"), uid: 0, gid: 0, environment: environment.clone() },
            worker: self.worker.then(|| Service {
                argv: argv(&[&text(&usable("diarch-worker")), "--config", &text(&at("config.json"))]),
                log: at("worker.log"),
                uid: WORKER.uid,
                gid: WORKER.gid,
                environment,
            }),
            start_limit: self.start_limit,
            // Also when we are interrupted: then nobody else is there to do it.
            remove: Some(dir.path().to_owned()),
        };
        let bond = if self.lives_on { Bond::LivesOn } else { Bond::EndsWithUs };
        let manager = StandIn::start(&stand_in, &manager, &at("manager.json"), &at("manager.log"), bond).expect("the stand-in");
        Host { manager: Some(manager), uid_first, has_worker: self.worker, socket, dir }
    }
}

/// The first of a range of users that no other host on this machine has at this time.
pub fn users() -> u32 {
    300_000 + unique() * 5_000
}

/// A number that no other host on this machine uses at this time, from 0 to 799.
fn unique() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    (std::process::id() * 7 + NEXT.fetch_add(1, Ordering::Relaxed)) % 800
}

// ---- the host ----

/// A running host.
#[derive(Debug)]
pub struct Host {
    // Before the directory: what runs in it ends first.
    manager: Option<StandIn>,
    pub uid_first: u32,
    has_worker: bool,
    socket: PathBuf,
    dir: tempfile::TempDir,
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in ["manager.log", "supervisor.log", "worker.log"] {
                let text = self.log(log);
                let from = text.len().saturating_sub(6000);
                let from = (from..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
                eprintln!("---- {log} ----\n{}", &text[from..]);
            }
        }
        drop(self.manager.take());
    }
}

impl Host {
    pub fn manager(&self) -> &StandIn {
        self.manager.as_ref().expect("the host is up")
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    pub fn socket(&self) -> PathBuf {
        self.socket.clone()
    }
    /// A file of the host's as its processes see it, inside their own mount namespace.
    pub fn inside(&self, name: &str) -> PathBuf {
        let below = self.path(name);
        PathBuf::from(format!("/proc/{}/root", self.manager().pid())).join(below.strip_prefix("/").unwrap_or(&below))
    }
    /// The text of `supervisor.log`, `worker.log` or `manager.log`.
    pub fn log(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.path(name)).unwrap_or_default()).into_owned()
    }

    pub fn wait_ready(&self) {
        self.manager().wait_ready(Unit::Supervisor, 0, Duration::from_secs(15));
        if self.has_worker {
            self.manager().wait_ready(Unit::Worker, 0, Duration::from_secs(15));
        }
    }

    pub fn supervisor_pid(&self) -> i32 {
        self.manager().unit(Unit::Supervisor).pid.expect("the supervisor runs")
    }
    pub fn worker_pid(&self) -> i32 {
        self.manager().unit(Unit::Worker).pid.expect("the worker runs")
    }

    /// Ends both halves and the VMs, and checks that this was all.
    pub fn shutdown(mut self) -> Vec<Left> {
        self.manager.take().expect("the host is up").shutdown()
    }

    /// Lets a host that was built with `lives_on` go on without us: gives the stand-in's control socket, where
    /// `diarch-stand-in shutdown` ends it all and removes its directory.
    pub fn leave_running(mut self) -> PathBuf {
        let control = self.manager.take().expect("the host is up").leave();
        self.dir.disable_cleanup(true);
        control
    }

    // ---- the contract, spoken by the test ----

    /// A connection as the worker's user, after its Hello.
    pub fn raw(&self) -> Raw {
        Raw::ready(&self.socket(), WORKER)
    }

    /// The real client, as the worker's user.
    pub fn session(&self) -> Session {
        self.session_with(|settings| settings)
    }

    pub fn session_with(&self, change: impl FnOnce(Settings) -> Settings) -> Session {
        let mut settings = Settings::new(self.socket());
        settings.restarts = [300, 600, 1200].map(Duration::from_millis).to_vec();
        self.session_as(WORKER, change(settings))
    }

    /// The real client, as any user.
    pub fn session_as(&self, user: User, settings: Settings) -> Session {
        Session::start(user, settings, self.manager().control().to_owned())
    }

    /// Everything the supervisor owns.
    pub fn owned(&self) -> HostInventory {
        match self.raw().ask(Request::HostInventory(operation::Inventory { after: None }), &[]) {
            Ok((diarch_ipc::frame::Outcome::Ok(operation::Reply::HostInventory(inventory)), _)) => inventory,
            other => panic!("host.inventory: {other:?}"),
        }
    }

    /// The smallest VM, and the descriptors that go with it; `words` are the stub's (see `diarch-stub-qemu`).
    pub fn spec(&self, words: &str) -> (VmSpec, Vec<OwnedFd>) {
        let spec = VmSpec {
            qemu: QemuName::new("default").expect("a name"),
            accelerator: Accelerator::Tcg,
            cpus: Cpus::new(1).expect("in range"),
            memory: MiB::new(16).expect("in range"),
            boot: Boot::Kernel { command_line: CommandLine::new(words).expect("ASCII"), initrd: Presence::Absent, firmware: Presence::Absent },
            disks: Vec::new(),
            nics: Vec::new(),
            devices: Vec::new(),
            shares: Vec::new(),
        };
        let append = |name: &str| OwnedFd::from(fs::File::options().create(true).append(true).open(self.path("log").join(name)).expect("a log"));
        let kernel = fs::File::open(self.path("files/kernel")).expect("a kernel");
        (spec, vec![append("test-qemu.log"), append("test-console.log"), kernel.into()])
    }

    // ---- the worker, as people use it ----

    /// The `diarch` command against this host's worker.
    pub fn diarch(&self, args: &[&str]) -> Diarch {
        let output = Command::new(binary("diarch"))
            .arg("--socket")
            .arg(self.path("worker/worker.sock"))
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("the diarch command");
        Diarch {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Asks the worker on its control socket; all replies up to `Done` or `Error`.
    pub fn ask_worker(&self, request: &protocol::Request) -> Vec<protocol::Reply> {
        self.try_worker(request).unwrap_or_else(|e| panic!("the worker's control socket: {e}"))
    }

    fn try_worker(&self, request: &protocol::Request) -> std::io::Result<Vec<protocol::Reply>> {
        let mut stream = UnixStream::connect(self.path("worker/worker.sock"))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.write_all(format!("{}\n", serde_json::to_string(request)?).as_bytes())?;
        let mut replies = Vec::new();
        for line in BufReader::new(stream).lines() {
            let reply: protocol::Reply = serde_json::from_str(&line?)?;
            let last = matches!(reply, protocol::Reply::Done {} | protocol::Reply::Error(_));
            replies.push(reply);
            if last {
                break;
            }
        }
        Ok(replies)
    }

    /// All VMs as the worker sees them; none while it can't be asked.
    pub fn vms(&self) -> Vec<VmView> {
        let replies = self.try_worker(&protocol::Request::VmList {}).unwrap_or_default();
        replies.into_iter().find_map(|reply| if let protocol::Reply::Vms(vms) = reply { Some(vms) } else { None }).unwrap_or_default()
    }

    pub fn vm(&self, name: &str) -> Option<VmView> {
        self.vms().into_iter().find(|vm| vm.name.as_str() == name)
    }

    /// Waits until the worker sees the VM as `wanted` says.
    pub fn wait_vm(&self, name: &str, within: Duration, what: &str, wanted: impl Fn(&VmView) -> bool) -> VmView {
        let until = Instant::now() + within;
        loop {
            let vm = self.vm(name);
            if let Some(vm) = vm.as_ref().filter(|vm| wanted(vm)) {
                return vm.clone();
            }
            assert!(Instant::now() < until, "{name} was not {what} within {within:?}: {vm:#?}\nevents: {:#?}", self.events());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn wait_healthy(&self, name: &str, within: Duration) -> VmView {
        self.wait_vm(name, within, "healthy", |vm| vm.phase == Phase::Healthy)
    }

    /// The worker's events so far: (kind, VM, message).
    pub fn events(&self) -> Vec<(String, Option<String>, String)> {
        let replies = self.try_worker(&protocol::Request::Events { last: 1000, follow: false }).unwrap_or_default();
        let events = replies.into_iter().filter_map(|reply| if let protocol::Reply::Event(event) = reply { Some(event) } else { None });
        events.map(|event| (event.kind, event.vm.map(|vm: Label| vm.to_string()), event.message)).collect()
    }

    pub fn write_vm(&self, name: &str, file: &serde_json::Value) {
        self.write_vm_text(&format!("{name}.json"), &reachable(&self.path("files"), file).to_string());
    }

    /// Writes a VM file as an editor does: whole, under its name at once.
    pub fn write_vm_text(&self, file: &str, text: &str) {
        let new = self.path("files").join(file);
        fs::write(&new, text).expect("write");
        fs::rename(&new, self.path("vms").join(file)).expect("rename");
    }

    // ---- what there is ----

    /// The QEMUs (or stubs) that run under this host.
    pub fn qemus(&self) -> Vec<i32> {
        let is_qemu = |process: &Left| process.name.contains("qemu") || process.name.contains("stub");
        self.manager().processes().into_iter().filter(is_qemu).map(|p| p.pid).collect()
    }

    /// What must be the same before and after whatever leaves nothing behind; taken when it has settled (a half that has just said
    /// READY=1 may still hold the socket that it said it on).
    pub fn inventory(&self) -> Inventory {
        let (mut last, mut same) = (self.glance(), 0);
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(20));
            let now = self.glance();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            // Once is not enough on a machine that is busy.
            if same == 5 {
                break;
            }
        }
        last
    }

    fn glance(&self) -> Inventory {
        let mut processes = BTreeMap::new();
        for process in self.manager().processes() {
            *processes.entry(process.name).or_insert(0) += 1;
        }
        let status = self.manager().status();
        let worker = status.worker.and_then(|w| w.pid);
        Inventory {
            processes,
            supervisor_fds: status.supervisor.pid.map(descriptors).unwrap_or_default(),
            worker_fds: worker.map(descriptors).unwrap_or_default(),
            run_directory: tree(&self.inside("run")),
        }
    }

    /// The records of the ledger, by slot.
    pub fn ledger(&self) -> BTreeMap<String, serde_json::Value> {
        let mut records = BTreeMap::new();
        let entries = fs::read_dir(self.inside("run/vm")).into_iter().flatten().flatten();
        // Slots are numbers; what else is there is the ledger's own.
        for slot in entries.filter(|e| e.file_name().to_str().is_some_and(|name| name.parse::<u16>().is_ok())) {
            let text = fs::read_to_string(slot.path().join("record.json")).unwrap_or_default();
            records.insert(slot.file_name().to_string_lossy().into_owned(), serde_json::from_str(&text).unwrap_or(serde_json::Value::Null));
        }
        records
    }
}

/// What the `diarch` command said.
#[derive(Debug)]
pub struct Diarch {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Diarch {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("not JSON ({e}): {self:#?}"))
    }
}

/// See [`Host::inventory`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// By name, with their number.
    pub processes: BTreeMap<String, usize>,
    /// By kind, with their number.
    pub supervisor_fds: BTreeMap<String, usize>,
    pub worker_fds: BTreeMap<String, usize>,
    pub run_directory: Vec<String>,
}

/// A process's descriptors by kind: files by their path, sockets and the like by their word.
pub fn descriptors(pid: i32) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let Ok(target) = fs::read_link(fd.path()) else { continue };
        let target = target.to_string_lossy();
        let kind = target.split_once(":[").map_or(target.as_ref(), |(kind, _)| kind).to_owned();
        *kinds.entry(kind).or_insert(0) += 1;
    }
    kinds
}

fn tree(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut queue = vec![dir.to_owned()];
    while let Some(next) = queue.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            found.push(path.strip_prefix(dir).unwrap_or(&path).to_string_lossy().into_owned());
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                queue.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Waits a little for `host` to be as it was, and fails with the difference when it is not.
pub fn assert_same(before: &Inventory, host: &Host) {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let now = host.glance();
        if &now == before {
            return;
        }
        if Instant::now() > until {
            panic!("something was left behind:{}", difference(before, &now));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn difference(before: &Inventory, now: &Inventory) -> String {
    let mut out = String::new();
    let counts = |out: &mut String, what: &str, before: &BTreeMap<String, usize>, now: &BTreeMap<String, usize>| {
        let mut names: Vec<&String> = before.keys().chain(now.keys()).collect();
        names.sort();
        names.dedup();
        for name in names {
            let (was, is) = (before.get(name).unwrap_or(&0), now.get(name).unwrap_or(&0));
            if was != is {
                let _ = write!(out, "\n  {what} {name}: {was} before, {is} now");
            }
        }
    };
    counts(&mut out, "process", &before.processes, &now.processes);
    counts(&mut out, "supervisor's fd", &before.supervisor_fds, &now.supervisor_fds);
    counts(&mut out, "worker's fd", &before.worker_fds, &now.worker_fds);
    if before.run_directory != now.run_directory {
        let _ = write!(out, "\n  run directory: {:?} before, {:?} now", before.run_directory, now.run_directory);
    }
    out
}

/// A TCP port of 127.0.0.1 that nobody listens on at this moment.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its number").port()
}

/// What a process holds in memory, in KiB (`VmRSS`).
pub fn rss_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// A VM file for the stub; `words` as in [`Host::spec`].
pub fn stub_vm(name: &str, kernel: &Path, words: &str) -> serde_json::Value {
    serde_json::json!({
        "name": name,
        "qemu_configuration": {"cores": 1, "mem_mb": 16, "accel": "tcg", "qemu": "default"},
        "image": {"kernel": kernel, "cmdline": words},
        "restart": {"policy": "on-failure"},
    })
}

// ---- the real client, for tests that are not async ----

/// The contract's client on a thread of its own that has the user's id; calls block.
pub struct Session {
    client: Client,
    runtime: tokio::runtime::Handle,
    events: Mutex<mpsc::Receiver<Event>>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// A question that is under way. It ends with its session.
pub struct Asked {
    runtime: tokio::runtime::Handle,
    task: tokio::task::JoinHandle<Answered>,
}

impl Asked {
    /// Waits for the answer; `None`: the session ended before it came.
    pub fn answer(self) -> Option<Answered> {
        self.runtime.block_on(self.task).ok()
    }

    pub fn is_answered(&self) -> bool {
        self.task.is_finished()
    }
}

struct AskManager {
    control: PathBuf,
}

impl Restarter for AskManager {
    fn restart(&mut self) -> std::pin::Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>> {
        let control = self.control.clone();
        Box::pin(async move {
            let asked = tokio::task::spawn_blocking(move || crate::stand_in::ask(&control, &Ask::Restart(Unit::Supervisor)));
            match asked.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())? {
                crate::stand_in::Told::Ok => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
    }
}

impl Session {
    fn start(user: User, settings: Settings, control: PathBuf) -> Session {
        let (ready, started) = mpsc::channel();
        let (events_in, events) = mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            become_user(user);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let (client, mut stream) = Client::start(settings, Box::new(AskManager { control }));
                let _ = ready.send((client, tokio::runtime::Handle::current()));
                tokio::spawn(async move {
                    while let Some(event) = stream.recv().await {
                        let _ = events_in.send(event);
                    }
                });
                let _ = stopped.await;
            });
        });
        let (client, runtime) = started.recv().expect("the client's thread");
        Session { client, runtime, events: Mutex::new(events), stop: Some(stop), thread: Some(thread) }
    }

    /// Asks, and waits up to 20 s: long enough for every restart of the supervisor in a test.
    pub fn ask(&self, request: Request, fds: Vec<OwnedFd>) -> Answered {
        self.runtime.block_on(self.client.request(request, fds, Duration::from_secs(20)))
    }

    /// Asks, and does not wait.
    pub fn begin(&self, request: Request, fds: Vec<OwnedFd>) -> Asked {
        let client = self.client.clone();
        let task = self.runtime.spawn(async move { client.request(request, fds, Duration::from_secs(20)).await });
        Asked { runtime: self.runtime.clone(), task }
    }

    pub fn claim(&self, label: &str) -> operation::Claimed {
        let label = Label::new(label).expect("a label");
        match self.ask(Request::VmClaim(operation::Claim { label }), Vec::new()) {
            Ok((operation::Reply::VmClaim(claimed), _)) => claimed,
            other => panic!("vm.claim: {other:?}"),
        }
    }

    /// Starts a stub in the slot; gives the answer and its two descriptors (pidfd, monitor).
    pub fn spawn(&self, host: &Host, tenancy: Tenancy, words: &str) -> (operation::Spawned, Vec<OwnedFd>) {
        let (spec, fds) = host.spec(words);
        match self.ask(Request::VmSpawn(operation::Spawn { tenancy, spec }), fds) {
            Ok((operation::Reply::VmSpawn(spawned), fds)) => (spawned, fds),
            other => panic!("vm.spawn: {other:?}"),
        }
    }

    pub fn release(&self, tenancy: Tenancy) -> operation::Released {
        match self.ask(Request::VmRelease(operation::Release { tenancy }), Vec::new()) {
            Ok((operation::Reply::VmRelease(released), _)) => released,
            other => panic!("vm.release: {other:?}"),
        }
    }

    pub fn inventory(&self) -> HostInventory {
        match self.ask(Request::HostInventory(operation::Inventory { after: None }), Vec::new()) {
            Ok((operation::Reply::HostInventory(inventory), _)) => inventory,
            other => panic!("host.inventory: {other:?}"),
        }
    }

    pub fn record(&self, tenancy: Tenancy) -> Option<VmRecord> {
        self.inventory().vms.into_iter().find(|vm| vm.tenancy() == tenancy)
    }

    pub fn state(&self) -> State {
        self.client.state().borrow().clone()
    }

    pub fn event(&self, within: Duration) -> Option<Event> {
        self.events.lock().ok()?.recv_timeout(within).ok()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_behind_a_closed_directory_is_copied_to_where_the_worker_can_open_it() {
        let (home, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let kernel = home.path().join("vmlinuz");
        fs::write(&kernel, "kernel").unwrap();
        let given = reachable(files.path(), &serde_json::json!({"name": "a", "image": {"kernel": kernel, "cmdline": "quiet"}}));
        assert_eq!(given["image"]["kernel"], files.path().join("kernel-vmlinuz").to_str().unwrap());
        assert_eq!(given["image"]["cmdline"], "quiet");
        assert_eq!(fs::read_to_string(files.path().join("kernel-vmlinuz")).unwrap(), "kernel");
    }
}
