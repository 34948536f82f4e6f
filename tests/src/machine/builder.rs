//! A machine to be: what is put into it before its PID 1 starts.

use super::guard::{Boot, Slot};
use super::{HALVES, Machine, SUPERVISOR, WORKER, layer};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// When a machine counts as started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Both halves are active (with the package), or its systemd has done its start jobs (without).
    Active,
    /// Its systemd has done its start jobs, whatever came of them. A unit that never gets ready holds them up.
    Booted,
    /// Its systemd answers on its bus.
    Bus,
}

#[derive(Debug, Clone)]
pub struct Builder {
    deb: Option<PathBuf>,
    grants: Grants,
    vms: Vec<serde_json::Value>,
    files: Vec<(String, Content)>,
    until: Until,
    limit: Duration,
    nspawn: Vec<String>,
}

#[derive(Debug, Clone)]
enum Grants {
    /// The package's own: closed.
    Packaged,
    /// The tests', with these lines after them.
    Tests(String),
    Text(String),
}

#[derive(Debug, Clone)]
enum Content {
    Text(String, u32),
    Copy(PathBuf, u32),
    Link(PathBuf),
}

impl Builder {
    pub(super) fn new(deb: Option<PathBuf>) -> Builder {
        Builder {
            grants: if deb.is_some() { Grants::Tests(String::new()) } else { Grants::Packaged },
            deb,
            vms: Vec::new(),
            files: Vec::new(),
            until: Until::Active,
            limit: Duration::from_secs(600),
            nspawn: Vec::new(),
        }
    }

    /// More lines for the tests' grants: `[limits]`, another `[qemu.NAME]`.
    pub fn grants_more(mut self, lines: &str) -> Self {
        let more = match &self.grants {
            Grants::Tests(more) => format!("{more}{lines}\n"),
            _ => format!("{lines}\n"),
        };
        self.grants = Grants::Tests(more);
        self
    }
    /// These grants and nothing else.
    pub fn grants(mut self, text: &str) -> Self {
        self.grants = Grants::Text(text.to_owned());
        self
    }
    /// The package's own grants.
    pub fn packaged_grants(mut self) -> Self {
        self.grants = Grants::Packaged;
        self
    }
    /// A VM file that is there from the start: see [`vm_file_stub`], [`vm_file_guest`].
    pub fn vm(mut self, file: serde_json::Value) -> Self {
        self.vms.push(file);
        self
    }
    /// A file of root's, mode 0644.
    pub fn file(self, path: &str, text: &str) -> Self {
        self.file_mode(path, text, 0o644)
    }
    pub fn file_mode(mut self, path: &str, text: &str, mode: u32) -> Self {
        self.files.push((path.to_owned(), Content::Text(text.to_owned(), mode)));
        self
    }
    /// A copy of a file of this host, root's.
    pub fn copy(mut self, from: &Path, path: &str, mode: u32) -> Self {
        self.files.push((path.to_owned(), Content::Copy(from.to_owned(), mode)));
        self
    }
    /// A program of this workspace in `/usr/local/bin`.
    pub fn program(self, name: &str) -> Self {
        self.copy(&crate::host::binary(name), &format!("/usr/local/bin/{name}"), 0o755)
    }
    /// A drop-in of a unit: `dropin(WORKER, "slow", "[Service]\nRestartSec=5s\n")`.
    pub fn dropin(self, unit: &str, name: &str, text: &str) -> Self {
        self.file(&format!("/etc/systemd/system/{unit}.d/{name}.conf"), text)
    }
    /// The unit can't be started.
    pub fn mask(mut self, unit: &str) -> Self {
        self.files.push((format!("/etc/systemd/system/{unit}"), Content::Link("/dev/null".into())));
        self
    }
    /// `diarch-load` takes the worker's place in its unit, and is not started again when it has ended.
    pub fn load(self, arguments: &str) -> Self {
        // Its files are in the directory that the unit's sandbox leaves open.
        let text = format!("[Service]\nExecStart=\nExecStart=/usr/local/bin/diarch-load {arguments}\nRestart=no\n");
        self.program("diarch-load").dropin(WORKER, "load", &text)
    }
    pub fn until(mut self, until: Until) -> Self {
        self.until = until;
        self
    }
    /// Its longest life; 10 minutes, unless a test needs more.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }
    /// One more option of systemd-nspawn.
    pub fn nspawn(mut self, option: &str) -> Self {
        self.nspawn.push(option.to_owned());
        self
    }

    /// Boots it.
    pub fn boot(self) -> Machine {
        let tree = crate::need::tree().expect("need!(Machine) comes first");
        let layer = self.deb.as_ref().map(|deb| layer::of(&tree, deb));
        let slot = Slot::of_a_machine();
        let dir = Machine::directory();
        let seed = Seed(dir.join("seed"));
        match &self.grants {
            Grants::Packaged => {}
            Grants::Tests(more) => seed.write("/etc/diarch/grants.toml", &Content::Text(default_grants(slot.number) + more, 0o644)),
            Grants::Text(text) => seed.write("/etc/diarch/grants.toml", &Content::Text(text.clone(), 0o644)),
        }
        seed.write("/usr/local/bin/diarch-stub-qemu", &Content::Copy(crate::host::binary("diarch-stub-qemu"), 0o755));
        seed.write("/srv/stub/kernel", &Content::Text("no kernel: the stub boots nothing\n".into(), 0o644));
        for file in &self.vms {
            let name = file["name"].as_str().expect("a VM file has a name");
            seed.write(&format!("/etc/diarch/vms/{name}.json"), &Content::Text(file.to_string(), 0o644));
        }
        for (path, content) in &self.files {
            seed.write(path, content);
        }
        let mut nspawn = self.nspawn;
        if let Some(guest) = crate::need::guest() {
            let guest = fs::canonicalize(guest).expect("the guest's directory");
            nspawn.push(format!("--bind-ro={}:/srv/guest", guest.to_string_lossy().replace('\\', "\\\\").replace(':', "\\:")));
        }
        let boot = Boot { layer, save: None, limit: self.limit, nspawn };
        let machine = Machine::start(&tree, dir, &boot, slot);
        match self.until {
            Until::Bus => machine.wait_for("systemd answers", HALVES, || machine.run(&["systemctl", "is-active", "dbus.socket"]).success().then_some(())),
            Until::Booted | Until::Active => machine.guard.wait_booted(),
        }
        if self.deb.is_some() && self.until == Until::Active {
            for unit in [SUPERVISOR, WORKER] {
                machine.wait_active(unit, HALVES);
            }
        }
        machine
    }
}

/// What is copied over the machine's root; it becomes root's there.
struct Seed(PathBuf);

impl Seed {
    fn write(&self, path: &str, content: &Content) {
        let at = self.0.join(path.trim_start_matches('/'));
        let directory = at.parent().expect("an absolute path of a file");
        let made = fs::create_dir_all(directory).and_then(|()| match content {
            Content::Text(text, mode) => fs::write(&at, text).and_then(|()| fs::set_permissions(&at, fs::Permissions::from_mode(*mode))),
            Content::Copy(from, mode) => fs::copy(from, &at).and_then(|_| fs::set_permissions(&at, fs::Permissions::from_mode(*mode))),
            Content::Link(to) => symlink(to, &at),
        });
        made.unwrap_or_else(|e| panic!("{path} for the machine: {e}"));
    }
}

/// Room for every test. Two machines at one time must not share user ids: the kernel counts some limits per id, across containers.
fn default_grants(number: u32) -> String {
    format!(
        "[worker]\nuser = \"diarch\"\nunit = \"diarch-worker.service\"\n\
         [vms]\nmax = 60\nuid_first = {}\nmemory_mib = 65536\ncpus_each = 8\nkvm = false\n\
         [qemu.default]\npath = \"/usr/bin/qemu-system-x86_64\"\n\
         [qemu.stub]\npath = \"/usr/local/bin/diarch-stub-qemu\"\n\
         [forwards]\nallow = [\"127.0.0.1:8000-8999\"]\n",
        2_000_000_000 + number * 1000
    )
}

/// A VM file for the stub.
pub fn vm_file_stub(name: &str) -> serde_json::Value {
    serde_json::json!({
        "name": name,
        "qemu_configuration": {"cores": 1, "mem_mb": 16, "accel": "tcg", "qemu": "stub"},
        "image": {"kernel": "/srv/stub/kernel", "cmdline": ""},
        "restart": {"policy": "on-failure"},
    })
}

/// A VM file for real QEMU and the test guest, which serves HTTP on `port` of the machine's loopback (8000 to 8999).
pub fn vm_file_guest(name: &str, port: u16) -> serde_json::Value {
    serde_json::json!({
        "name": name,
        "qemu_configuration": {"cores": 1, "mem_mb": 256, "accel": "tcg", "qemu": "default"},
        "image": {"kernel": "/srv/guest/vmlinuz", "initrd": "/srv/guest/initrd.img", "cmdline": "console=ttyS0 panic=-1 quiet"},
        "network": {"forwards": [{"protocol": "tcp", "host_address": "127.0.0.1", "host_port": port, "guest_port": 80}]},
        "health": {"http": {"host_port": port, "path": "/"}, "interval_s": 1},
        "restart": {"policy": "on-failure"},
    })
}
