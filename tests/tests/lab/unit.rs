//! The installed package on a real host: what VMs have of it under the sandbox of the packaged units, with grants of root's and VM files. The kernel is Debian's
//! own (Linux 6.12), loads modules as they are asked for, has AppArmor, and has not the newest way to copy a mount.
//!
//! The package is installed for the first of these tests, and stays; each has the halves for itself, and leaves no VM.

use super::LONG;
use diarch_ipc::name::{IpText, Port, Protocol};
use diarch_ipc::operation::{Listen, Request};
use diarch_tests::lab::{Lab, Turn};
use diarch_tests::machine::vm_file_guest;
use diarch_tests::need;
use diarch_worker::control::protocol::{Phase, VmView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(60);
const SUPERVISOR: &str = "diarch-supervisor.service";
const WORKER: &str = "diarch-worker.service";
/// systemd's drop-ins that root makes, and that go with the next boot.
const DROP_INS: &str = "/etc/systemd/system/diarch-*.service.d";
/// Every grant is in a section of its own but these.
const GRANTS: &str = "[worker]\nuser = \"diarch\"\nunit = \"diarch-worker.service\"\n\
    [vms]\nmax = 4\nuid_first = 2100000000\nmemory_mib = 1024\ncpus_each = 1\nkvm = true\n\
    [qemu.default]\npath = \"/usr/bin/qemu-system-x86_64\"\n\
    [forwards]\nallow = [\"127.0.0.1:8000\"]\n";

/// The lab with the package, and with both halves running.
struct Installed {
    lab: Turn<'static>,
}

impl Installed {
    /// `before` is what root does on this host before Diarch starts.
    fn set(grants: &str, before: &str) -> Self {
        let installed = Self { lab: Lab::turn() };
        let lab = &installed.lab;
        let started = Instant::now();
        if !lab.exists("/usr/sbin/diarch-supervisor") {
            lab.run_within(LONG, &["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--force-unsafe-io", "-i", "/srv/lab/diarch.deb"])
                .expect_success("dpkg -i");
            eprintln!("installed after {:?}", started.elapsed());
        }
        installed.stop();
        lab.sh(&format!("modprobe kvm_amd; systemd-tmpfiles --create diarch.conf; {before}"));
        lab.write("/etc/diarch/grants.toml", grants);
        lab.run_within(LONG, &["systemctl", "start", "diarch-supervisor.socket", SUPERVISOR, WORKER]).expect_success("systemctl start");
        installed
    }

    fn stop(&self) {
        self.lab.run_within(LONG, &["systemctl", "stop", WORKER, "diarch-supervisor.socket", SUPERVISOR]).expect_success("systemctl stop");
    }

    // ---- VMs ----

    fn file(&self, vm: &Value) {
        self.lab.write(&format!("/etc/diarch/vms/{}.json", vm["name"].as_str().expect("a name")), &vm.to_string());
    }

    fn vms(&self) -> Option<BTreeMap<String, VmView>> {
        let vms: Vec<VmView> = serde_json::from_str(&self.lab.run(&["diarch", "vm", "list", "--json"]).stdout).ok()?;
        Some(vms.into_iter().map(|vm| (vm.name.as_str().to_owned(), vm)).collect())
    }

    #[track_caller]
    fn wait_vm(&self, name: &str, what: &str, is: impl Fn(&VmView) -> bool) -> VmView {
        self.lab.wait_for(&format!("{name} is {what}"), LONG, || {
            let vm = self.vms()?.remove(name)?;
            // What took too long is tried again by itself.
            assert!(vm.phase != Phase::Failed || vm.reason.as_ref().is_some_and(|reason| reason.contains("timeout")), "{vm:#?}\n{}", self.events());
            is(&vm).then_some(vm)
        })
    }

    #[track_caller]
    fn wait_healthy(&self, name: &str) -> VmView {
        self.wait_vm(name, "healthy", |vm| vm.phase == Phase::Healthy)
    }

    fn events(&self) -> String {
        self.lab.run(&["diarch", "events"]).stdout
    }

    /// Takes their files away, and waits for their end.
    fn wait_none(&self) {
        self.lab.sh("rm -f /etc/diarch/vms/*.json");
        self.lab.wait_for("no VM is left", LONG, || self.vms().filter(BTreeMap::is_empty));
    }

    /// What runs in a VM's scope: names and numbers.
    fn processes(&self, vm: &VmView) -> BTreeMap<u32, String> {
        let scope = format!("/sys/fs/cgroup/diarch.slice/diarch-vms.slice/diarch-vm-{}.scope", vm.slot.expect("a VM that runs has a slot"));
        let said = self.lab.sh(&format!("for pid in $(cat {scope}/cgroup.procs); do echo $pid $(cat /proc/$pid/comm); done"));
        said.lines().filter_map(|line| line.split_once(' ')).map(|(pid, name)| (pid.parse().expect("a number"), name.to_owned())).collect()
    }

    fn one(&self, vm: &VmView, name: &str) -> u32 {
        let there = self.processes(vm);
        *there.iter().find(|(_, comm)| comm.as_str() == name).unwrap_or_else(|| panic!("no {name} among {there:?}")).0
    }

    // ---- the supervisor ----

    fn property(&self, name: &str) -> String {
        self.lab.systemctl(&["show", "--value", "-p", name, SUPERVISOR])
    }

    /// By what they lead to; taken again and again until they stand still.
    fn descriptors(&self) -> String {
        let glance = || self.lab.sh(&format!("ls -l /proc/{}/fd | sed -n 's/.* -> //p' | sed 's/[0-9][0-9]*/N/g' | sort | uniq -c", self.property("MainPID")));
        let mut last = String::new();
        self.lab.wait_for("its descriptors stand still", WAIT, || {
            let now = glance();
            (std::mem::replace(&mut last, now.clone()) == now).then_some(now)
        })
    }

    /// Has it replaced, and waits until the next one serves the worker.
    fn replaced_by(&self, how: &[&str]) {
        let pid = self.property("MainPID");
        self.lab.run_within(LONG, how).expect_success("systemctl");
        self.lab.wait_for("the next supervisor", LONG, || {
            let serves = self.property("MainPID") != pid && self.property("ActiveState") == "active";
            let said = self.lab.systemctl(&["show", "--value", "-p", "StatusText", WORKER]);
            (serves && said.contains("supervisor connected")).then_some(())
        });
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let lab = &self.lab;
        if std::thread::panicking() {
            eprintln!("{}", lab.try_sh("diarch vm list; diarch events; tail -n 20 /var/log/diarch/vms/* | cat -v").stdout);
            // While they run: rules and taps are the supervisor's to take away.
            lab.try_sh("rm -f /etc/diarch/vms/*; for at in {1..30}; do [ \"$(diarch vm list --json)\" != '[]' ] || break; sleep 1; done");
        }
        let gone = lab.try_sh(&format!("systemctl stop {WORKER} diarch-supervisor.socket {SUPERVISOR}; rm -rf {DROP_INS}; systemctl daemon-reload"));
        if !gone.success() {
            eprintln!("the halves could not be stopped: {gone:?}");
        }
    }
}

fn guest(name: &str, network: Value, host_port: u16, words: &str) -> Value {
    let mut file = vm_file_guest(name, host_port);
    file["qemu_configuration"]["accel"] = "kvm".into();
    file["image"]["cmdline"] = format!("console=ttyS0 panic=-1 quiet {words}").trim_end().into();
    if !network.is_null() {
        file["network"] = network;
    }
    // Its host's processor is emulated, and kept busy here.
    file["health"] = json!({"http": {"host_port": host_port, "path": "/"}, "interval_s": 1, "timeout_s": 30, "failures": 10, "start_grace_s": 600});
    file
}

// ---- limits ----

/// One file of the cgroup that the process is in.
fn cgroup_file(lab: &Lab, pid: u32, name: &str) -> String {
    let at = lab.read(&format!("/proc/{pid}/cgroup"));
    let path = at.trim().strip_prefix("0::").expect("cgroup v2, and nothing else");
    lab.read(&format!("/sys/fs/cgroup{path}/{name}")).trim().to_owned()
}

/// A counter of a `*.events` file.
fn counter(lab: &Lab, pid: u32, file: &str, name: &str) -> u64 {
    let text = cgroup_file(lab, pid, file);
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {file}:\n{text}"))
}

#[test]
fn a_kvm_vm_of_the_installed_package_has_limits_that_the_kernel_enforces() {
    need!(Lab, Package);
    let installed = Installed::set(GRANTS, "true");
    let lab = &installed.lab;
    let started = Instant::now();
    installed.file(&guest("one", Value::Null, 8000, ""));
    let vm = installed.wait_healthy("one");
    let pid = vm.pid.expect("a healthy VM has a process");
    eprintln!("a KVM VM of the installed package was healthy after {:?}", started.elapsed());
    // Its own process, so that this is KVM for sure: the translator has no such thread.
    assert!(lab.sh(&format!("cat /proc/{pid}/task/*/comm")).lines().any(|name| name == "CPU 0/KVM"), "{}", lab.sh(&format!("cat /proc/{pid}/task/*/comm")));

    // What systemd was told, what it says, and what the kernel has.
    let scope = "diarch-vm-0.scope";
    assert!(lab.read(&format!("/proc/{pid}/cgroup")).trim().ends_with(&format!("/{scope}")));
    for (property, file) in [("MemoryMax", "memory.max"), ("TasksMax", "pids.max"), ("MemorySwapMax", "memory.swap.max")] {
        let said = lab.systemctl(&["show", "--value", "-p", property, scope]);
        assert_eq!(cgroup_file(lab, pid, file), said, "{property}");
        assert!(said.parse::<u64>().is_ok(), "{property} is a number: {said}");
    }
    let bytes: u64 = cgroup_file(lab, pid, "memory.max").parse().expect("a number");
    assert!((256 << 20..1 << 30).contains(&bytes), "room for a guest of 256 MiB and its QEMU: {bytes}");

    // A process in the scope that wants more tasks is refused them (dash gives up at once), ...
    let enter = format!("echo $$ >/sys/fs/cgroup$(cut -d: -f3 /proc/{pid}/cgroup)/cgroup.procs");
    let refused = counter(lab, pid, "pids.events", "max");
    let fork = lab.run(&["/bin/dash", "-c", &format!("{enter}; n=0; while [ $n -lt 500 ]; do sleep 300 & n=$((n + 1)); done")]);
    assert!(fork.stderr.contains("Cannot fork"), "{fork:?}");
    assert!(counter(lab, pid, "pids.events", "max") > refused);
    lab.sh(&format!("for pid in $(cat /sys/fs/cgroup$(cut -d: -f3 /proc/{pid}/cgroup)/cgroup.procs); do [ $pid = {pid} ] || kill $pid; done"));
    assert!(lab.sh("busybox wget -q -O - http://127.0.0.1:8000/").contains("diarch guest is up"), "its guest answers");

    // ... and one that wants more memory is killed; nobody outside the scope is. systemd then ends the scope (OOMPolicy=stop).
    let halves = |lab: &Lab| lab.systemctl(&["show", "--value", "-p", "MainPID", "diarch-supervisor.service", "diarch-worker.service"]);
    let before = halves(lab);
    let grow = lab.run_within(LONG, &["/bin/bash", "-c", &format!("{enter}; echo 1000 >/proc/self/oom_score_adj; exec tail /dev/zero")]);
    assert_eq!(grow.code, None, "killed: {grow:?}");
    let killed = lab.sh("dmesg | grep oom-kill:");
    assert!(killed.lines().all(|line| line.contains(&format!("oom_memcg=/diarch.slice/diarch-vms.slice/{scope},"))), "{killed}");
    assert_eq!(halves(lab), before);
    lab.wait_for("the VM's end", LONG, || (!lab.exists(&format!("/proc/{pid}"))).then_some(()));

    installed.wait_none();
}

// ---- networks and mounts ----

/// Taps of both kinds, each kind of mount, and passt.
const EQUIPPED: &str = "[passt]\npath = \"/usr/bin/passt\"\n[virtiofsd]\npath = \"/usr/libexec/virtiofsd\"\n\
    [network.lan]\nbridge = \"br0\"\n[network.p2p]\nrouted = \"10.77.0.0/24\"\nmasquerade = true\n[ports]\npublish = [\"10.0.2.15:8443-8444\"]\n\
    [mounts.models]\ndirectory = \"/srv/models\"\n[mounts.work]\ndirectory = \"/srv/work\"\nwrite = true\n\
    [mounts.scratch]\ntmpfs_mib = 8\nwrite = true\n\
    [mounts.application]\nimage = \"/srv/application.erofs\"\nimage_type = \"erofs\"\n\
    [mounts.manual]\nimage = \"/srv/manual.squashfs\"\nimage_type = \"squashfs\"\n";
const SHARES: [&str; 5] = ["models", "work", "scratch", "application", "manual"];

/// What root does for it. The larger modules of nftables are loaded beforehand, since the first `nft` of all has five seconds for what takes longer on an emulated
/// processor; `nft_masq`, `tun`, `vhost_net`, `loop`, `erofs` and `squashfs` the kernel loads when the supervisor asks for what is in them.
const HOST: &str = r"
modprobe -a bridge nf_tables nf_conntrack nf_nat nft_ct nft_nat nft_chain_nat nft_fib_inet
modprobe -q -r loop erofs squashfs || true
apparmor_parser --replace /etc/apparmor.d/usr.bin.passt
sysctl -q -w net.ipv4.ip_forward=1
ip link add br0 type bridge; ip address add 10.88.0.1/24 dev br0; ip link set br0 up
mkdir -p /srv/models /srv/work /srv/image; chmod 777 /srv/work
for of in models work image; do echo of-$of >/srv/$of/file; done
mkfs.erofs /srv/application.erofs /srv/image >/dev/null; mksquashfs /srv/image /srv/manual.squashfs -quiet -no-progress
# The worker's probes go to the guests themselves (OPERATING.md).
mkdir -p /etc/systemd/system/diarch-worker.service.d
printf '[Service]\nIPAddressAllow=10.77.0.0/24 10.88.0.0/24\n' >/etc/systemd/system/diarch-worker.service.d/probes.conf
systemctl daemon-reload
";
const HOST_UNDONE: &str = "ip link del br0; sysctl -q -w net.ipv4.ip_forward=0; apparmor_parser --remove /etc/apparmor.d/usr.bin.passt
    rm -rf /srv/models /srv/work /srv/image /srv/application.erofs /srv/manual.squashfs";

fn published(address: &str, host_port: u16) -> Value {
    json!([{"protocol": "tcp", "host_address": address, "host_port": host_port, "guest_port": 80}])
}

/// What the VMs have of the kernel, as it says itself: the same as long as they run.
fn kernels(lab: &Lab) -> String {
    lab.sh(
        "nft list table netdev diarch; nft list table inet diarch; ip -br link | grep -o '^dvm[^ ]*'; ip -4 route show 10.77.0.2; bridge -o link; losetup -a",
    )
}

/// Each guest, through its own way. Waited for: a guest of an emulated processor's KVM may reboot itself at any time (seen once), in the same QEMU.
fn answers(lab: &Lab) {
    for url in ["http://10.0.2.15:8443/", "http://10.0.2.15:8444/", "http://127.0.0.1:8000/"] {
        lab.wait_for(url, LONG, || lab.try_sh(&format!("busybox wget -T 10 -q -O - {url}")).stdout.contains("diarch guest is up").then_some(()));
    }
}

#[test]
fn networks_and_mounts_are_had_under_the_packaged_unit_and_outlive_each_supervisor_and_leave_nothing() {
    need!(Lab, Package);
    let installed = Installed::set(&format!("{GRANTS}{EQUIPPED}"), HOST);
    let lab = &installed.lab;
    let started = Instant::now();
    let module = |name: &str| lab.exists(&format!("/sys/module/{name}"));
    assert!(!module("nft_masq") && !module("erofs") && !module("squashfs"), "loaded before they are asked for");
    let (fresh, stored) = (installed.descriptors(), installed.property("NFileDescriptorStore"));
    assert_eq!(stored, "0");

    // Its address is that of the first slot.
    let words: String = SHARES.iter().map(|share| format!(" diarch.share={share}")).collect();
    let network = json!({"tap": {"network": "p2p"}, "publish": published("10.0.2.15", 8443)});
    let mut routed = guest("routed", network, 8443, &format!("diarch.net=10.77.0.2/24,10.77.0.1{words}"));
    let access = |share: &str| if matches!(share, "work" | "scratch") { "read-write" } else { "read-only" };
    routed["shares"] = SHARES.iter().map(|share| json!({"share": share, "tag": share, "access": access(share)})).collect();
    installed.file(&routed);
    assert_eq!(installed.wait_vm("routed", "started", |vm| vm.pid.is_some()).slot, Some(0));
    let network = json!({"tap": {"network": "lan", "address": "10.88.0.2"}, "publish": published("10.0.2.15", 8444)});
    installed.file(&guest("bridged", network, 8444, "diarch.net=10.88.0.2/24,10.88.0.1"));
    installed.wait_vm("bridged", "started", |vm| vm.pid.is_some());
    let mut user_file = guest("user", Value::Null, 8000, "");
    installed.file(&user_file);
    let vms = ["routed", "bridged", "user"].map(|name| installed.wait_healthy(name));
    let [routed, bridged, user] = &vms;
    eprintln!("three VMs were healthy after {:?}", started.elapsed());

    // Networks: the kernel has the rules and the guests answer, each through its own way.
    answers(lab);
    let (rules, slot) = (kernels(lab), bridged.slot.expect("it runs"));
    for part in ["6 . 10.0.2.15 . 8443 : 10.77.0.2 . 80", "6 . 10.0.2.15 . 8444 : 10.88.0.2 . 80", "\"dvm0n0\" . ", &format!("\"dvm{slot}n0\" . ")] {
        assert!(rules.contains(part), "{part}: {rules}");
    }
    assert!(lab.link(&format!("/sys/class/net/dvm{slot}n0/master")).is_some_and(|to| to.ends_with("br0")), "on the bridge");
    assert!(module("nft_masq") && module("vhost_net"), "loaded by being asked for");

    // passt: in its jail. Debian's profile for it is for the program by its path in the host's tree; the jail is another tree, and has its own walls.
    let passt = installed.one(user, "passt");
    let by_path =
        "/usr/bin/passt -f -s /tmp/passt.sock >/dev/null 2>&1 & pid=$!; sleep 1; cat /proc/$pid/attr/apparmor/current; kill -KILL $pid; rm -f /tmp/passt.sock";
    assert_eq!(lab.sh(by_path), "passt (enforce)", "the profile is loaded");
    assert_eq!(lab.read(&format!("/proc/{passt}/attr/apparmor/current")).trim(), "unconfined");

    // Mounts: as the guest has seen them.
    let told = |share: &str| match share {
        "models" | "work" => vec![format!("share {share} holds of-{share}")],
        "scratch" => vec![],
        _ => vec![format!("share {share} holds of-image")],
    };
    let wrote = |share: &str| format!("share {share} was {} to", if access(share) == "read-write" { "written" } else { "refused" });
    let said = lab.run(&["diarch", "vm", "logs", "routed"]).stdout;
    for part in SHARES.iter().flat_map(|share| told(share).into_iter().chain([wrote(share)])) {
        assert!(said.contains(&part), "{part}: {said}");
    }
    assert_eq!(lab.read("/srv/work/from-guest"), "from the guest\n");
    let loops = lab.sh("losetup -a");
    assert!(loops.contains("/srv/manual.squashfs") && !loops.contains("erofs"), "this kernel reads an erofs from its file: {loops}");
    let kept: usize = installed.property("NFileDescriptorStore").parse().expect("a number");
    assert!(kept >= SHARES.len(), "systemd keeps each mount: {kept}");

    // For later: a policy counts as soon as it is read, and nothing restarts for it.
    user_file["restart"] = json!({"policy": "never"});
    installed.file(&user_file);

    // Two other supervisors: the VMs keep all of it.
    let processes = || vms.each_ref().map(|vm| installed.processes(vm));
    let before = processes();
    for how in [["systemctl", "restart", SUPERVISOR].as_slice(), &["systemctl", "kill", "--kill-whom=main", "--signal=KILL", SUPERVISOR]] {
        installed.replaced_by(how);
        assert_eq!(processes(), before, "after {how:?}");
        assert_eq!(kernels(lab), rules, "after {how:?}");
        assert_eq!(installed.property("NFileDescriptorStore"), kept.to_string(), "after {how:?}");
        answers(lab);
    }
    eprintln!("two other supervisors, and all was as before, after {:?}", started.elapsed());

    // What serves a share dies: the VM is started again, of the same mounts, which this kernel copies in a tree only.
    let virtiofsd = installed.one(routed, "virtiofsd");
    lab.sh(&format!("kill -KILL {virtiofsd} {passt}"));
    let alone = installed.wait_vm("user", "told to be impaired", |vm| vm.phase == Phase::Unhealthy);
    let why = alone.reason.expect("a reason");
    assert!(why.contains("passt ended with ") && why.contains("the guest's user-mode network is gone"), "{why}");
    let again = installed.wait_vm("routed", "started again", |vm| vm.pid.is_some_and(|pid| Some(pid) != routed.pid));
    assert_eq!((again.slot, again.restarts), (routed.slot, 1));
    assert_eq!(installed.processes(&again).values().filter(|name| name.as_str() == "virtiofsd").count(), SHARES.len());
    let events = installed.events();
    for vm in ["user", "routed"] {
        assert!(events.lines().any(|line| line.contains(vm) && line.contains("vm.impaired")), "{vm}: {events}");
    }
    let now = installed.vms().expect("a list").remove("user").expect("it runs");
    assert_eq!((now.phase, now.pid), (Phase::Unhealthy, user.pid), "with the policy never it is only shown");
    eprintln!("mended after {:?}", started.elapsed());

    // It boots, and hears no power button yet.
    lab.run_within(LONG, &["diarch", "vm", "kill", "routed"]).expect_success("vm kill");
    installed.wait_none();
    assert_eq!(lab.sh("nft list tables; ip -br link | grep ^dvm || true; losetup -a"), "");
    assert_eq!(installed.property("NFileDescriptorStore"), stored);
    assert_eq!(installed.descriptors(), fresh);
    lab.sh(HOST_UNDONE);
    eprintln!("all gone after {:?}", started.elapsed());
}

// ---- ports ----

#[test]
fn a_port_is_bound_for_the_worker_and_heard_once_root_did_what_the_page_of_grants_says() {
    need!(Lab, Package);
    // Whoever is the worker's user is the worker here.
    let grants = format!("{}[ports]\nlisten = [\"10.0.2.15:53\", \"127.0.0.1:443\"]\n", GRANTS.replace("unit = \"diarch-worker.service\"\n", ""));
    let installed = Installed::set(&grants, "true");
    let lab = &installed.lab;
    lab.systemctl(&["stop", WORKER]);
    let listen = |protocol, address: &str, port| {
        let address = IpText::try_from(address.to_owned()).expect("an address");
        let request = Request::PortListen(Listen { protocol, address, port: Port::new(port).expect("a port") });
        let puppet = "setpriv --reuid diarch --regid diarch --clear-groups diarch-puppet - /tmp";
        let out = lab.run_with_input(&["/bin/sh", "-c", puppet], format!("{}\n", json!({"n": 1, "ask": request})).as_bytes()).expect_success("the puppet");
        serde_json::from_str::<Value>(&out.stdout).expect("JSON")
    };
    let asked = [(Protocol::Tcp, "127.0.0.1", 443), (Protocol::Tcp, "10.0.2.15", 53), (Protocol::Udp, "10.0.2.15", 53)];
    for (protocol, address, port) in asked {
        let refused = listen(protocol, address, port);
        let why = refused["error"]["text"].as_str().unwrap_or_default();
        assert!(refused["error"]["kind"] == "unsupported" && why.contains("IPAddressAllow=any"), "{refused}");
    }
    // The commands as they stand there.
    let page = include_str!("../../../docs/GRANTS.md");
    let (_, after) = page.split_once("`port.listen` is `unsupported` until root opens the unit too").expect("the page says so");
    let commands = after.split("```").nth(1).expect("a block");
    assert!(commands.contains("IPAddressAllow=any"), "{commands}");
    lab.sh(commands);
    for (protocol, address, port) in asked {
        let answer = listen(protocol, address, port);
        assert_eq!((&answer["fds"], &answer["heard"]), (&json!(1), &json!(if protocol == Protocol::Tcp { Some(true) } else { None })), "{answer}");
    }
}
