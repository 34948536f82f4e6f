//! The lab with a supervisor, and what tests ask of it about real devices.
//!
//! Each request is a `diarch-puppet` of its own. What was claimed stays claimed, so tests go on where the last request left off.

use super::{DIRECTORY, Lab, Turn, device};
use crate::need;
use crate::puppet::{claim, kill, tenancy};
use diarch_ipc::name::{Bdf, CommandLine, Cpus, MiB, QemuName, Tenancy};
use diarch_ipc::operation::{Bind, Recover, Request, Spawn, Unbind};
use diarch_ipc::spec::{Accelerator, Boot, Presence, VmSpec};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::Duration;

/// For what takes seconds on a real host.
pub const LONG: Duration = Duration::from_secs(240);
pub const WAIT: Duration = Duration::from_secs(60);
pub const UID_FIRST: u32 = 2_100_000_000;
pub const PUPPET: &str = "setpriv --reuid diarch --regid diarch --clear-groups diarch-puppet - /run/diarch-devices/logs /run/diarch-devices/files";
/// Everything is granted, the host's own too.
const GRANTS: &str = "[worker]\nuser = \"diarch\"\n\
    [vms]\nmax = 4\nuid_first = 2100000000\nmemory_mib = 2048\ncpus_each = 1\nkvm = true\n\
    [qemu.default]\npath = \"/usr/bin/qemu-system-x86_64\"\n\
    [devices]\nallow = [\"8086:10d3\", \"class:00ff\", \"class:0100\", \"class:0108\", \"class:0200\", \"class:0780\"]\n";

/// The lab with a supervisor, as its unit runs it. It takes all of that away again.
pub struct Scene {
    pub lab: Turn<'static>,
}

impl Scene {
    pub fn set() -> Self {
        Self::on(Lab::turn())
    }

    /// The same with a kernel that has iommufd, in a lab of one's own: to put these modules in the place of Debian's, which other tests are about, once brought an emulated
    /// kernel down.
    pub fn with_iommufd() -> Self {
        let lab = Lab::turn();
        assert!(!lab.exists("/sys/module/vfio"), "another test had Debian's modules loaded");
        lab.sh("mkdir -p /run/iommufd; modprobe irqbypass");
        for module in need::iommufd().expect("need!(Iommufd) comes first") {
            let at = format!("/run/iommufd/{}", module.file_name().expect("a file").to_string_lossy());
            lab.copy_in(&module, &at, 0o644);
            lab.sh(&format!("insmod {at}"));
        }
        Self::on(lab)
    }

    fn on(lab: Turn<'static>) -> Self {
        let scene = Self { lab };
        scene.lab.supervise(GRANTS);
        scene
    }

    // ---- requests ----

    /// Asks all of it at one time; the answers are in the order of the requests.
    pub fn ask_all(&self, requests: &[Request]) -> Vec<Result<Value, Value>> {
        let out = self.lab.run_with_input(&["/bin/sh", "-c", PUPPET], lines(requests).as_bytes()).expect_success("the puppet");
        let mut answers: Vec<Value> = out.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        answers.sort_by_key(|answer| answer["n"].as_u64());
        assert_eq!(answers.len(), requests.len(), "each request has one answer: {out:?}");
        let answer = |mut answer: Value| match answer.get_mut("ok").map(Value::take) {
            Some(Value::Object(reply)) => Ok(reply.into_iter().next().map_or(Value::Null, |(_, fields)| fields)),
            _ => Err(answer["error"].take()),
        };
        answers.into_iter().map(answer).collect()
    }

    pub fn try_ask(&self, request: Request) -> Result<Value, Value> {
        self.ask_all(&[request]).remove(0)
    }

    pub fn ask(&self, request: Request) -> Value {
        let said = format!("{request:?}");
        self.try_ask(request).unwrap_or_else(|error| panic!("{said}: {error}"))
    }

    pub fn claim(&self, label: &str) -> Tenancy {
        tenancy(self.ask(claim(label)))
    }

    // ---- what there is ----

    /// The state of the group's record.
    pub fn state(&self, bdf: &str) -> Option<String> {
        let at = format!("/run/diarch/device/{}.json", self.lab.group(bdf));
        let written: Value = serde_json::from_slice(&self.lab.try_read(&at).ok()?).expect("a whole record");
        Some(written["record"]["state"].as_str().expect("a state").to_owned())
    }

    pub fn overridden(&self, bdf: &str) -> String {
        self.lab.read(&format!("/sys/bus/pci/devices/{bdf}/driver_override")).trim().to_owned()
    }

    /// Its node, unless there is none: type and rights, owner and group, and a `+` if it has an access list.
    pub fn node(&self, bdf: &str) -> Option<String> {
        let shown = self.lab.sh(&format!("ls -ln /dev/vfio/{} 2>/dev/null || true", self.lab.group(bdf)));
        let words: Vec<&str> = shown.split_whitespace().collect();
        (!words.is_empty()).then(|| format!("{} {} {}", words[0], words[2], words[3]))
    }

    /// How a VM has it, as it is written down.
    pub fn passing(&self, bdf: &str) -> Value {
        let written: Value = serde_json::from_str(&self.lab.read(&format!("/run/diarch/device/{}.json", self.lab.group(bdf)))).expect("a whole record");
        written["record"]["passing"].clone()
    }

    /// What a process has open below /dev/vfio, and of iommufd.
    pub fn open_devices(&self, pid: u64) -> Vec<String> {
        let shown = self.lab.sh(&format!("find /proc/{pid}/fd -type l -printf '%l\\n' | grep -E '^/dev/(vfio|iommu)' | sort || true"));
        shown.lines().map(str::to_owned).collect()
    }

    #[track_caller]
    pub fn assert_guest_drives_the_card(&self, pid: u64) {
        let lab = &self.lab;
        let line = format!("diarch-guest: card eth0 {} e1000e", device::CARD_MAC);
        let console = format!("{DIRECTORY}/logs/puppet-console");
        lab.wait_for("the guest drives the card", LONG, || {
            assert!(lab.exists(&format!("/proc/{pid}")), "QEMU has ended: {}", lab.sh(&format!("cat {DIRECTORY}/logs/*")));
            lab.read(&console).lines().any(|l| l.trim_end() == line).then_some(())
        });
        assert!(lab.sh(&format!("cat /proc/{pid}/task/*/comm")).lines().any(|name| name == "CPU 0/KVM"));
    }

    #[track_caller]
    pub fn assert_bound(&self, bdf: &str) {
        let found = (self.state(bdf), self.lab.driver(bdf), self.overridden(bdf), self.node(bdf));
        let text = |text: &str| text.to_owned();
        assert_eq!(found, (Some(text("bound")), Some(text("vfio-pci")), text("vfio-pci"), Some(text("crw------- 0 0"))), "{bdf}");
    }

    #[track_caller]
    pub fn assert_the_hosts(&self, bdf: &str, driver: Option<&str>) {
        let found = (self.state(bdf), self.lab.driver(bdf), self.overridden(bdf), self.node(bdf));
        assert_eq!(found, (None, driver.map(str::to_owned), "(null)".to_owned(), None), "{bdf}");
    }

    /// The users, of these, who may open its node.
    pub fn who_may_open(&self, bdf: &str, users: &[u32]) -> Vec<u32> {
        let node = format!("/dev/vfio/{}", self.lab.group(bdf));
        let may = |user: &u32| self.lab.try_sh(&format!("setpriv --reuid {user} --regid {user} --clear-groups test -r {node} -o -w {node}")).success();
        users.iter().copied().filter(may).collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // For the test of the installed package the units must go; the turn mends the devices.
            eprintln!("{}", self.lab.try_sh("tail -n 5 /run/diarch-devices/logs/* || true").stdout);
        }
        self.lab.end_supervision();
    }
}

pub fn lines(requests: &[Request]) -> String {
    requests.iter().enumerate().fold(String::new(), |mut text, (n, request)| {
        writeln!(text, "{}", json!({"n": n, "ask": request})).expect("a string");
        text
    })
}

pub fn bdf(name: &str) -> Bdf {
    Bdf::new(name).expect("an address")
}
pub fn bind(tenancy: Tenancy, function: &str) -> Request {
    Request::VfioBind(Bind { tenancy, function: bdf(function) })
}
pub fn unbind(tenancy: Tenancy, function: &str) -> Request {
    Request::VfioRelease(Unbind { tenancy, function: bdf(function) })
}

/// A KVM guest with this device, and nothing else.
pub fn spawn(tenancy: Tenancy, function: &str) -> Request {
    let spec = VmSpec {
        qemu: QemuName::new("default").expect("a name"),
        accelerator: Accelerator::Kvm,
        cpus: Cpus::new(1).expect("in range"),
        memory: MiB::new(512).expect("in range"),
        boot: Boot::Kernel { command_line: CommandLine::new("console=ttyS0 quiet").expect("ASCII"), initrd: Presence::Given, firmware: Presence::Absent },
        disks: Vec::new(),
        nics: Vec::new(),
        devices: vec![bdf(function)],
        shares: Vec::new(),
    };
    Request::VmSpawn(Spawn { tenancy, spec })
}

/// Somebody takes QEMU's descriptor of this name, and has it when QEMU has ended.
pub fn kept_after_its_vm(scene: &Scene, tenancy: Tenancy, name: &str) {
    let lab = &scene.lab;
    let pid = scene.ask(spawn(tenancy, device::CARD))["pid"].as_u64().expect("a process");
    lab.wait_for("QEMU has the device", LONG, || {
        assert!(lab.exists(&format!("/proc/{pid}")), "QEMU has ended: {}", lab.sh(&format!("cat {DIRECTORY}/logs/*")));
        // What it opens and closes meanwhile is no matter.
        lab.sh(&format!("find /proc/{pid}/fd -type l -printf '%l\\n' 2>/dev/null || true")).lines().any(|link| link == name).then_some(())
    });
    lab.sh(&format!("systemd-run -q --unit=keeper -p StandardOutput=file:/run/kept /srv/lab/bin/diarch-probe keep {pid} '{name}'"));
    lab.wait_for("it is kept", WAIT, || lab.try_read("/run/kept").is_ok_and(|said| said == b"kept\n").then_some(()));
    let keeper = lab.systemctl(&["show", "--value", "-p", "MainPID", "keeper.service"]);
    scene.ask(kill(tenancy));
    lab.wait_for("its end is seen to", WAIT, || (scene.state(device::CARD).as_deref() == Some("quarantined")).then_some(()));
    for refused in [Request::VfioRecover(Recover { tenancy, function: bdf(device::CARD) }), unbind(tenancy, device::CARD)] {
        let error = scene.try_ask(refused).expect_err("somebody has it");
        let text = error["text"].as_str().expect("a sentence");
        assert!(text.contains(&format!("(pid {keeper})")) && text.contains("diarch-probe"), "{text}");
        eprintln!("{text}");
    }
    assert_eq!(scene.try_ask(spawn(tenancy, device::CARD)).expect_err("it is quarantined")["kind"], "wrong-state");
    assert_eq!(lab.driver(device::CARD).as_deref(), Some("vfio-pci"), "and no driver was asked to let go");
    lab.sh("systemctl stop keeper.service; rm /run/kept");
    scene.ask(Request::VfioRecover(Recover { tenancy, function: bdf(device::CARD) }));
    scene.assert_bound(device::CARD);
}
