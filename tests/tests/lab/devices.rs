//! What the supervisor does with real devices: a real kernel's drivers and groups, udev, and KVM guests. It runs by its own unit, so its sandbox counts too.
//!
//! Each request is a `diarch-puppet` of its own. What was claimed stays claimed, so tests go on where the last request left off.

use super::LONG;
use diarch_ipc::name::{Bdf, CommandLine, Cpus, MiB, QemuName, Tenancy};
use diarch_ipc::operation::{Bind, Recover, Request, Spawn, Unbind};
use diarch_ipc::spec::{Accelerator, Boot, Presence, VmSpec};
use diarch_tests::lab::{DIRECTORY, Lab, SUPERVISOR, Turn, device};
use diarch_tests::need;
use diarch_tests::puppet::{claim, inventory, kill, release, tenancy};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(60);
const UID_FIRST: u32 = 2_100_000_000;
const PUPPET: &str = "setpriv --reuid diarch --regid diarch --clear-groups diarch-puppet - /run/diarch-devices/logs /run/diarch-devices/files";
/// Everything is granted, the host's own too.
const GRANTS: &str = "[worker]\nuser = \"diarch\"\n\
    [vms]\nmax = 4\nuid_first = 2100000000\nmemory_mib = 2048\ncpus_each = 1\nkvm = true\n\
    [qemu.default]\npath = \"/usr/bin/qemu-system-x86_64\"\n\
    [devices]\nallow = [\"8086:10d3\", \"class:00ff\", \"class:0100\", \"class:0108\", \"class:0200\", \"class:0780\"]\n";

/// The lab with a supervisor, as its unit runs it. It takes all of that away again.
struct Scene {
    lab: Turn<'static>,
    /// What is done at the end: modules that are not Debian's own go, as other tests are about those.
    last: &'static str,
}

/// VFIO's modules, and iommufd's.
const UNLOAD: &str = "for module in vfio_pci vfio_pci_core vfio_iommu_type1 vfio iommufd; do [ ! -e /sys/module/$module ] || rmmod $module; done";

impl Scene {
    fn set() -> Self {
        Self::on(Lab::turn(), "")
    }

    /// The same with a kernel that has iommufd.
    fn with_iommufd() -> Self {
        let lab = Lab::turn();
        lab.sh(&format!("{UNLOAD}; mkdir -p /run/iommufd; modprobe irqbypass"));
        for module in diarch_tests::need::iommufd().expect("need!(Iommufd) comes first") {
            let at = format!("/run/iommufd/{}", module.file_name().expect("a file").to_string_lossy());
            lab.copy_in(&module, &at, 0o644);
            lab.sh(&format!("insmod {at}"));
        }
        Self::on(lab, UNLOAD)
    }

    fn on(lab: Turn<'static>, last: &'static str) -> Self {
        let scene = Self { lab, last };
        scene.lab.supervise(GRANTS);
        scene
    }

    // ---- requests ----

    /// Asks all of it at one time; the answers are in the order of the requests.
    fn ask_all(&self, requests: &[Request]) -> Vec<Result<Value, Value>> {
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

    fn try_ask(&self, request: Request) -> Result<Value, Value> {
        self.ask_all(&[request]).remove(0)
    }

    fn ask(&self, request: Request) -> Value {
        let said = format!("{request:?}");
        self.try_ask(request).unwrap_or_else(|error| panic!("{said}: {error}"))
    }

    fn claim(&self, label: &str) -> Tenancy {
        tenancy(self.ask(claim(label)))
    }

    // ---- what there is ----

    /// The state of the group's record.
    fn state(&self, bdf: &str) -> Option<String> {
        let at = format!("/run/diarch/device/{}.json", self.lab.group(bdf));
        let written: Value = serde_json::from_slice(&self.lab.try_read(&at).ok()?).expect("a whole record");
        Some(written["record"]["state"].as_str().expect("a state").to_owned())
    }

    fn overridden(&self, bdf: &str) -> String {
        self.lab.read(&format!("/sys/bus/pci/devices/{bdf}/driver_override")).trim().to_owned()
    }

    /// Its node, unless there is none: type and rights, owner and group, and a `+` if it has an access list.
    fn node(&self, bdf: &str) -> Option<String> {
        let shown = self.lab.sh(&format!("ls -ln /dev/vfio/{} 2>/dev/null || true", self.lab.group(bdf)));
        let words: Vec<&str> = shown.split_whitespace().collect();
        (!words.is_empty()).then(|| format!("{} {} {}", words[0], words[2], words[3]))
    }

    /// How a VM has it, as it is written down.
    fn passing(&self, bdf: &str) -> Value {
        let written: Value = serde_json::from_str(&self.lab.read(&format!("/run/diarch/device/{}.json", self.lab.group(bdf)))).expect("a whole record");
        written["record"]["passing"].clone()
    }

    /// What a process has open below /dev/vfio, and of iommufd.
    fn open_devices(&self, pid: u64) -> Vec<String> {
        let shown = self.lab.sh(&format!("find /proc/{pid}/fd -type l -printf '%l\\n' | grep -E '^/dev/(vfio|iommu)' | sort || true"));
        shown.lines().map(str::to_owned).collect()
    }

    fn assert_guest_drives_the_card(&self, pid: u64) {
        let lab = &self.lab;
        let line = format!("diarch-guest: card eth0 {} e1000e", device::CARD_MAC);
        let console = format!("{DIRECTORY}/logs/puppet-console");
        lab.wait_for("the guest drives the card", LONG, || {
            assert!(lab.exists(&format!("/proc/{pid}")), "QEMU has ended: {}", lab.sh(&format!("cat {DIRECTORY}/logs/*")));
            lab.read(&console).lines().any(|l| l.trim_end() == line).then_some(())
        });
        assert!(lab.sh(&format!("cat /proc/{pid}/task/*/comm")).lines().any(|name| name == "CPU 0/KVM"));
    }

    fn assert_bound(&self, bdf: &str) {
        let found = (self.state(bdf), self.lab.driver(bdf), self.overridden(bdf), self.node(bdf));
        let text = |text: &str| text.to_owned();
        assert_eq!(found, (Some(text("bound")), Some(text("vfio-pci")), text("vfio-pci"), Some(text("crw------- 0 0"))), "{bdf}");
    }

    fn assert_the_hosts(&self, bdf: &str, driver: Option<&str>) {
        let found = (self.state(bdf), self.lab.driver(bdf), self.overridden(bdf), self.node(bdf));
        assert_eq!(found, (None, driver.map(str::to_owned), "(null)".to_owned(), None), "{bdf}");
    }

    /// The users, of these, who may open its node.
    fn who_may_open(&self, bdf: &str, users: &[u32]) -> Vec<u32> {
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
        if !self.last.is_empty() {
            let gone = self.lab.try_sh(self.last);
            if !gone.success() {
                eprintln!("what the scene was made of is not all gone: {gone:?}");
            }
        }
    }
}

fn lines(requests: &[Request]) -> String {
    requests.iter().enumerate().fold(String::new(), |mut text, (n, request)| {
        writeln!(text, "{}", json!({"n": n, "ask": request})).expect("a string");
        text
    })
}

fn bdf(name: &str) -> Bdf {
    Bdf::new(name).expect("an address")
}
fn bind(tenancy: Tenancy, function: &str) -> Request {
    Request::VfioBind(Bind { tenancy, function: bdf(function) })
}
fn unbind(tenancy: Tenancy, function: &str) -> Request {
    Request::VfioRelease(Unbind { tenancy, function: bdf(function) })
}

/// A KVM guest with this device, and nothing else.
fn spawn(tenancy: Tenancy, function: &str) -> Request {
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

// ---- there and back ----

#[test]
fn a_real_card_goes_to_a_jailed_kvm_guest_by_its_slots_user_alone_and_comes_back() {
    need!(Lab);
    let scene = Scene::set();
    let lab = &scene.lab;
    let interface = lab.interface(device::CARD).expect("the host drives it");
    let tenancy = scene.claim("card");
    let started = Instant::now();
    let bound = scene.ask(bind(tenancy, device::CARD));
    eprintln!("bound after {:?}", started.elapsed());
    assert_eq!(bound["device"]["state"], "bound");
    scene.assert_bound(device::CARD);
    let uid = UID_FIRST + u32::from(tenancy.slot.get());
    let (diarch, users) = (lab.sh("id -u diarch").parse().expect("a number"), [uid, uid + 1, uid - 1, 65_534]);
    let users: Vec<u32> = users.into_iter().chain([diarch]).collect();
    assert!(scene.who_may_open(device::CARD, &users).is_empty(), "bound is not attached");

    let started = Instant::now();
    let pid = scene.ask(spawn(tenancy, device::CARD))["pid"].as_u64().expect("a process");
    assert_eq!(scene.state(device::CARD).as_deref(), Some("attached"));
    assert_eq!(scene.who_may_open(device::CARD, &users), [uid], "while its VM runs, by its user alone");
    scene.assert_guest_drives_the_card(pid);
    eprintln!("a guest drove the card after {:?}", started.elapsed());
    assert!(
        lab.sh(&format!("ls /proc/{pid}/root/dev/vfio")).lines().eq([lab.group(device::CARD).to_string().as_str(), "vfio"]),
        "its jail has its own group only"
    );
    let refused = scene.try_ask(unbind(tenancy, device::CARD)).expect_err("a VM runs with it");
    assert_eq!(refused["kind"], "wrong-state", "{refused}");

    scene.ask(kill(tenancy));
    lab.wait_for("its end is seen to", WAIT, || (scene.state(device::CARD).as_deref() == Some("bound")).then_some(()));
    scene.assert_bound(device::CARD);
    assert!(scene.who_may_open(device::CARD, &users).is_empty(), "the VM has ended");
    assert_eq!(scene.ask(unbind(tenancy, device::CARD))["existed"], true);
    scene.assert_the_hosts(device::CARD, Some("e1000e"));
    lab.wait_for("its interface", WAIT, || lab.interface(device::CARD).filter(|name| *name == interface));
    scene.ask(release(tenancy));
}

/// A real card, a jailed KVM guest, and iommufd. Debian's kernel lacks it: its modules are built from that kernel's own source (`tests/lab/iommufd`).
#[test]
fn a_real_card_goes_to_a_jailed_kvm_guest_as_iommufds_descriptors_alone_and_comes_back() {
    need!(Lab, Iommufd);
    let scene = Scene::with_iommufd();
    let lab = &scene.lab;
    let interface = lab.interface(device::CARD).expect("the host drives it");
    let tenancy = scene.claim("card");
    scene.ask(bind(tenancy, device::CARD));
    scene.assert_bound(device::CARD);
    let own = format!("/dev/vfio/devices/{}", lab.sh(&format!("ls /sys/bus/pci/devices/{}/vfio-dev", device::CARD)));
    let nodes = || lab.sh(&format!("ls -ln /dev/iommu {own} /dev/vfio/{}", lab.group(device::CARD)));
    let before = nodes();

    let pid = scene.ask(spawn(tenancy, device::CARD))["pid"].as_u64().expect("a process");
    assert_eq!((scene.state(device::CARD).as_deref(), scene.passing(device::CARD)), (Some("attached"), json!("iommufd")));
    scene.assert_guest_drives_the_card(pid);
    assert_eq!(scene.open_devices(pid), ["/dev/iommu", &own]);
    assert_eq!(nodes(), before, "no node is opened to anybody");
    assert_eq!(lab.sh(&format!("ls -d /proc/{pid}/root/dev/vfio /proc/{pid}/root/dev/iommu /proc/{pid}/root/sys 2>/dev/null || true")), "", "nor in its jail");
    let allowed = lab.systemctl(&["show", "--value", "-p", "DeviceAllow", &format!("diarch-vm-{}.scope", tenancy.slot)]);
    assert!(allowed.contains("/dev/kvm") && !allowed.contains("vfio") && !allowed.contains("iommu"), "nor on its scope's list: {allowed}");
    let supervisor = lab.systemctl(&["show", "--value", "-p", "MainPID", SUPERVISOR]).parse().expect("a number");
    assert!(scene.open_devices(supervisor).is_empty(), "the supervisor keeps none of it");
    // What pins the guest's memory is counted for the slot's user, within its limit.
    let limit = lab.sh(&format!("awk '/Max locked memory/ {{ print $4 }}' /proc/{pid}/limits"));
    assert!(limit.parse::<u64>().is_ok_and(|bytes| bytes > 512 << 20), "{limit}");

    scene.ask(kill(tenancy));
    lab.wait_for("its end is seen to", WAIT, || (scene.state(device::CARD).as_deref() == Some("bound")).then_some(()));
    scene.assert_bound(device::CARD);
    assert_eq!((nodes(), scene.passing(device::CARD)), (before, Value::Null));

    kept_after_its_vm(&scene, tenancy, &own);
    assert_eq!(scene.ask(unbind(tenancy, device::CARD))["existed"], true);
    scene.assert_the_hosts(device::CARD, Some("e1000e"));
    lab.wait_for("its interface", WAIT, || lab.interface(device::CARD).filter(|name| *name == interface));
    scene.ask(release(tenancy));
}

#[test]
fn a_real_device_that_somebody_kept_after_its_vm_is_given_to_nobody_until_he_has_let_go() {
    need!(Lab);
    let scene = Scene::set();
    let tenancy = scene.claim("card");
    scene.ask(bind(tenancy, device::CARD));
    kept_after_its_vm(&scene, tenancy, "anon_inode:[vfio-device]");
    scene.ask(release(tenancy));
    scene.assert_the_hosts(device::CARD, Some("e1000e"));
}

/// Somebody takes QEMU's descriptor of this name, and has it when QEMU has ended.
fn kept_after_its_vm(scene: &Scene, tenancy: Tenancy, name: &str) {
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

// ---- refused ----

#[test]
fn what_the_lab_lives_on_is_refused_with_its_reason_and_nothing_is_touched() {
    need!(Lab);
    let scene = Scene::set();
    let lab = &scene.lab;
    let tenancy = scene.claim("greedy");
    let live = lab.sh(&format!("ls /sys/bus/pci/devices/{}/virtio*/net", device::LIVE));
    let payload = lab.sh("findmnt -n -o TARGET LABEL=diarch-payload | head -n 1");
    let refused = |function: &str, says: &[&str]| {
        let before = lab.inventory();
        let error = scene.try_ask(bind(tenancy, function)).expect_err("the host needs it");
        assert_eq!(error["kind"], "conflict", "{function}: {error}");
        let text = error["text"].as_str().expect("a sentence");
        assert!(says.iter().all(|part| text.contains(part)), "{function}, {says:?}: {text}");
        assert_eq!(lab.inventory(), before, "{function} was refused, and something was touched");
        assert_eq!(scene.state(function), None, "{function} was refused, and there is a record");
        eprintln!("{text}");
    };
    refused(device::ROOT, &["has the disk vda", "which is mounted on /"]);
    refused(device::PAYLOAD, &["has the disk vd", "which is mounted on ", &payload]);
    refused(device::LIVE, &[&format!("the interface {live}"), "a default route"]);

    let disk = lab.sh(&format!("ls /sys/bus/pci/devices/{}/nvme/nvme*/ | grep -o '^nvme[0-9]*n[0-9]*$'", device::NVME));
    lab.sh(&format!("mkfs.ext4 -q -F /dev/{disk}; mkdir -p /run/mounted; mount /dev/{disk} /run/mounted"));
    refused(device::NVME, &[&format!("has the disk {disk}"), "which is mounted on /run/mounted"]);
    lab.sh("umount /run/mounted");
    lab.sh(&format!("mkswap -q -f /dev/{disk}; swapon /dev/{disk}"));
    refused(device::NVME, &[&format!("has the disk {disk}"), "to which the host swaps"]);
    lab.sh(&format!("swapoff /dev/{disk}; wipefs -q -a /dev/{disk}; udevadm settle"));
    // Somebody who is not root: a process's descriptors are shown to its own user alone.
    lab.sh(&format!("chmod 666 /dev/{disk}; systemd-run -q --unit=holder -p User=nobody -p StandardInput=file:/dev/{disk} sleep 600"));
    let pid = lab.systemctl(&["show", "--value", "-p", "MainPID", "holder.service"]);
    lab.wait_for("the holder", WAIT, || (lab.read(&format!("/proc/{pid}/comm")).trim() == "sleep").then_some(()));
    refused(device::NVME, &[&format!("sleep (pid {pid}) has /dev/{disk} open")]);
    lab.sh(&format!("systemctl stop holder.service; chmod 660 /dev/{disk}"));

    // With nobody on it, it is given: so the refusals were for what they said.
    scene.ask(bind(tenancy, device::NVME));
    scene.assert_bound(device::NVME);
    scene.ask(release(tenancy));
    scene.assert_the_hosts(device::NVME, Some("nvme"));
    lab.wait_for("its disk", WAIT, || lab.exists(&format!("/dev/{disk}")).then_some(()));
}

#[test]
fn two_vms_that_ask_for_one_real_device_at_once_get_it_once_and_the_other_hears_whose_it_is() {
    need!(Lab);
    let scene = Scene::set();
    let vms = [("one", scene.claim("one")), ("two", scene.claim("two"))];
    let answers = scene.ask_all(&[bind(vms[0].1, device::CARD), bind(vms[1].1, device::CARD)]);
    let winner = answers.iter().position(Result::is_ok).expect("one gets it");
    let refused = answers[1 - winner].as_ref().expect_err("and the other does not");
    assert_eq!(refused["kind"], "conflict", "{refused}");
    assert!(refused["text"].as_str().is_some_and(|text| text.contains(&format!("VM {}", vms[winner].0))), "{refused}");
    scene.assert_bound(device::CARD);
    assert_eq!(scene.try_ask(unbind(vms[1 - winner].1, device::CARD)).map(|reply| reply["existed"].clone()).unwrap_or(false.into()), false);
    scene.assert_bound(device::CARD);
    for (_, tenancy) in vms {
        scene.ask(release(tenancy));
    }
    scene.assert_the_hosts(device::CARD, Some("e1000e"));
}

#[test]
fn a_real_device_without_a_reset_is_recovered_by_another_bind() {
    need!(Lab);
    let scene = Scene::set();
    let tenancy = scene.claim("edu");
    let bound = scene.ask(bind(tenancy, device::EDU));
    assert_eq!(bound["device"]["functions"][0]["resettable"], false, "{bound}");
    let recovered = scene.ask(Request::VfioRecover(Recover { tenancy, function: bdf(device::EDU) }));
    assert_eq!(recovered["device"], bound["device"]);
    scene.assert_bound(device::EDU);
    scene.ask(release(tenancy));
    scene.assert_the_hosts(device::EDU, None);
}

// ---- killed on the way ----

/// After the step that is waited for; a bind takes some 800 ms here, most of it until the node is there.
const LATER_MS: [u32; 3] = [0, 60, 300];

/// Asks, and kills the supervisor and who asked, so that nobody asks again, this long after the group's record says `reserved`. Then waits until the next
/// supervisor is ready, which is after it has adopted what there was.
fn killed_on_the_way(scene: &Scene, request: Request, later_ms: u32) -> bool {
    let record = format!("/run/diarch/device/{}.json", scene.lab.group(device::CARD));
    scene.lab.write(&format!("{DIRECTORY}/request"), &lines(&[request]));
    let script = format!(
        r#"pid=$(systemctl show --value -p MainPID {SUPERVISOR})
           {PUPPET} <{DIRECTORY}/request >{DIRECTORY}/answer & puppet=$!
           seen=
           while kill -0 $puppet 2>/dev/null; do
               {{ text=$(<{record}); }} 2>/dev/null || continue
               case $text in *'"reserved"'*) seen=1; break ;; esac
           done
           sleep $(printf 0.%03d {later_ms})
           kill -KILL $pid
           kill -KILL $puppet 2>/dev/null || true
           wait $puppet 2>/dev/null || true
           until now=$(systemctl show --value -p MainPID {SUPERVISOR}) && [ "$now" != $pid ] && [ "$now" != 0 ] && systemctl -q is-active {SUPERVISOR}; do sleep 0.05; done
           echo "seen=$seen"; cat {DIRECTORY}/answer"#
    );
    let said = scene.lab.run_within(LONG, &["/bin/bash", "-c", &script]).expect_success("the killing").stdout;
    scene.lab.wait_for("the next supervisor is done with what it found", WAIT, || {
        (!matches!(scene.state(device::CARD).as_deref(), Some("reserved" | "resetting"))).then_some(())
    });
    scene.lab.sh("udevadm settle -t 10");
    said.contains("seen=1")
}

#[test]
fn a_supervisor_killed_in_a_real_bind_or_release_leaves_the_card_wholly_ours_or_wholly_back() {
    need!(Lab);
    let scene = Scene::set();
    let interface = scene.lab.interface(device::CARD).expect("the host drives it");
    let tenancy = scene.claim("card");
    let (mut seen, mut ours) = (0, 0);
    for later_ms in LATER_MS {
        seen += u32::from(killed_on_the_way(&scene, bind(tenancy, device::CARD), later_ms));
        if scene.state(device::CARD).is_some() {
            ours += 1;
            scene.assert_bound(device::CARD);
        } else {
            scene.assert_the_hosts(device::CARD, Some("e1000e"));
        }
        let record = scene.ask(inventory())["devices"].as_array().map_or(0, Vec::len);
        assert_eq!(record == 1, scene.state(device::CARD).is_some(), "what it says is what is written");

        scene.ask(bind(tenancy, device::CARD));
        scene.assert_bound(device::CARD);
        seen += u32::from(killed_on_the_way(&scene, unbind(tenancy, device::CARD), later_ms));
        if scene.state(device::CARD).is_some() {
            scene.assert_bound(device::CARD);
            ours += 1;
        } else {
            scene.assert_the_hosts(device::CARD, Some("e1000e"));
        }
        scene.ask(unbind(tenancy, device::CARD));
        scene.assert_the_hosts(device::CARD, Some("e1000e"));
        scene.lab.wait_for("its interface", WAIT, || scene.lab.interface(device::CARD).filter(|name| *name == interface));
    }
    eprintln!("killed {} times, {seen} of them while the card was on its way, after which it was ours {ours} times", 2 * LATER_MS.len());
    assert!(seen >= 3, "only {seen} were killed on the way");
    scene.ask(release(tenancy));
}
