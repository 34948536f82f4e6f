//! The lab itself: it has the devices that it says, KVM works in it, and a device can be passed on to a VM in it and taken back. All by hand, by what the
//! kernel offers, and by nothing of Diarch's: what fails here is not Diarch's fault.
//!
//! `devices` is what the supervisor does with real devices. It is in here because all of these tests share one lab.

#[path = "lab/devices.rs"]
mod devices;

use diarch_tests::lab::{Lab, WORD, device, in_lab};
use diarch_tests::machine::vm_file_guest;
use diarch_tests::need;
use diarch_worker::control::protocol::{Phase, VmView};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// For what takes seconds on a real host.
const LONG: Duration = Duration::from_secs(240);

fn set(bdfs: &[&str]) -> BTreeSet<String> {
    bdfs.iter().map(|bdf| (*bdf).to_owned()).collect()
}

#[test]
fn this_machine_is_not_taken_for_the_lab() {
    assert!(!in_lab(), "a test program runs outside, and the lab has {WORD} on its kernel command line");
    let refused = diarch_tests::lab::serve().expect_err("the agent serves in the lab only");
    assert!(refused.to_string().contains(WORD), "{refused}");
}

#[test]
fn the_lab_boots_a_debian_with_every_shape_of_device() {
    need!(Lab);
    let lab = Lab::turn();
    eprintln!("booted after {:?}", lab.booted_after());
    assert!(lab.read("/proc/cmdline").split_whitespace().any(|word| word == WORD));
    assert_eq!(lab.try_sh("exit 3").code, Some(3));
    assert_eq!(lab.run_within(Duration::from_secs(1), &["sleep", "60"]).code, None, "a command ends with its time");
    assert_eq!(lab.run_with_input(&["cat"], b"input").stdout, "input");
    assert_eq!(lab.try_write("/sys/bus/pci/drivers_probe", b"nonsense").map_err(|e| e.raw_os_error()), Err(Some(19)), "ENODEV: the kernel's own error");
    assert!(!lab.exists("/usr/bin/diarch") && lab.exists("/srv/lab/bin/diarch"));

    let drivers = [
        (device::ROOT, Some("virtio-pci")),
        (device::PAYLOAD, Some("virtio-pci")),
        (device::EDU, None),
        (device::CARD, Some("e1000e")),
        (device::LIVE, Some("virtio-pci")),
        (device::SHARED_CARD, Some("e1000")),
        (device::SHARED_EDU, None),
        (device::NVME, Some("nvme")),
        (device::PORT, Some("pcieport")),
        (device::PORT_CARD, Some("e1000e")),
        (device::BRIDGE, None),
        (device::BRIDGED_EDU, None),
        (device::BRIDGED_TEST, None),
        (device::PHYSICAL, Some("nvme")),
    ];
    for (bdf, driver) in drivers {
        assert_eq!(lab.driver(bdf).as_deref(), driver, "{bdf}");
    }
    for alone in [device::ROOT, device::EDU, device::CARD, device::LIVE, device::NVME, device::PORT_CARD, device::PHYSICAL] {
        assert_eq!(lab.group_members(alone), set(&[alone]));
    }
    assert_eq!(lab.group_members(device::SHARED_CARD), set(&[device::SHARED_CARD, device::SHARED_EDU]));
    assert_eq!(lab.group_members(device::BRIDGED_EDU), set(&[device::BRIDGE, device::BRIDGED_EDU, device::BRIDGED_TEST]));
    for (bdf, mac, up) in [
        (device::CARD, device::CARD_MAC, false),
        (device::LIVE, device::LIVE_MAC, true),
        (device::SHARED_CARD, device::SHARED_CARD_MAC, false),
        (device::PORT_CARD, device::PORT_CARD_MAC, false),
    ] {
        // A virtio card has one more directory between.
        let at = lab.sh(&format!("echo /sys/bus/pci/devices/{bdf}/{{,virtio*/}}net/* | tr ' ' '\\n' | grep -v '*'"));
        assert_eq!(lab.read(&format!("{at}/address")).trim(), mac, "{bdf}");
        let flags = u32::from_str_radix(lab.read(&format!("{at}/flags")).trim().trim_start_matches("0x"), 16).expect("a number");
        assert_eq!(flags & 1 == 1, up, "{bdf} is up");
    }
    let reset = |bdf: &str| lab.exists(&format!("/sys/bus/pci/devices/{bdf}/reset"));
    assert_eq!((reset(device::EDU), reset(device::CARD)), (false, true), "the one can't be reset, the other can");

    let controllers = lab.read("/sys/fs/cgroup/cgroup.controllers");
    for controller in ["cpu", "cpuset", "io", "memory", "pids"] {
        assert!(controllers.split_whitespace().any(|c| c == controller), "{controller} is not among {controllers}");
    }
}

#[test]
fn kvm_works_in_the_lab_once_its_module_is_there() {
    need!(Lab);
    let lab = Lab::turn();
    lab.sh("modprobe kvm_amd");
    lab.wait_for("/dev/kvm", Duration::from_secs(20), || lab.exists("/dev/kvm").then_some(()));
    assert_eq!(lab.sh("diarch-supervisor probe-kvm"), "usable");
}

#[test]
fn virtual_functions_come_and_go() {
    need!(Lab);
    let lab = Lab::turn();
    let count = format!("/sys/bus/pci/devices/{}/sriov_numvfs", device::PHYSICAL);
    assert_eq!(lab.read(&format!("/sys/bus/pci/devices/{}/sriov_totalvfs", device::PHYSICAL)).trim(), "2");
    lab.write(&count, "1");
    let function = lab.link(&format!("/sys/bus/pci/devices/{}/virtfn0", device::PHYSICAL)).expect("it has one");
    assert!(function.to_string_lossy().starts_with("../0000:03:"), "{function:?}");
    lab.write(&count, "0");
    assert_eq!(lab.link(&format!("/sys/bus/pci/devices/{}/virtfn0", device::PHYSICAL)), None);
}

#[test]
fn a_card_is_passed_on_to_a_kvm_guest_and_taken_back() {
    need!(Lab);
    let lab = Lab::turn();
    let bdf = device::CARD;
    let (at, group) = (format!("/sys/bus/pci/devices/{bdf}"), lab.group(bdf));
    let interface = lab.interface(bdf).expect("the host drives it");
    lab.sh("modprobe kvm_amd; modprobe vfio-pci");

    let started = Instant::now();
    lab.write(&format!("{at}/driver_override"), "vfio-pci");
    lab.write(&format!("{at}/driver/unbind"), bdf);
    lab.write("/sys/bus/pci/drivers_probe", bdf);
    assert_eq!(lab.driver(bdf).as_deref(), Some("vfio-pci"));
    // The node appears a moment later.
    lab.wait_for("the group's node", Duration::from_secs(20), || lab.exists(&format!("/dev/vfio/{group}")).then_some(()));
    eprintln!("bound by hand after {:?}", started.elapsed());

    let started = Instant::now();
    let command = format!(
        "qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none -serial stdio -machine q35,accel=kvm -cpu host -m 512 \
         -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.img -append 'console=ttyS0 quiet diarch.test=poweroff:0' \
         -device pcie-root-port,id=port1,chassis=1 -device vfio-pci,host={bdf},bus=port1 </dev/null 2>&1"
    );
    let guest = lab.run_within(LONG, &["/bin/bash", "-c", &command]).expect_success("the guest");
    eprintln!("a guest that drove the card and powered off, after {:?}", started.elapsed());
    let line = format!("diarch-guest: card eth0 {} e1000e", device::CARD_MAC);
    assert!(guest.stdout.lines().any(|l| l.trim_end() == line), "not there: {line}\n{}", guest.stdout);

    lab.write(&format!("{at}/driver_override"), "\n");
    lab.write(&format!("{at}/driver/unbind"), bdf);
    lab.write("/sys/bus/pci/drivers_probe", bdf);
    assert_eq!(lab.driver(bdf).as_deref(), Some("e1000e"));
    lab.wait_for("its interface", Duration::from_secs(20), || lab.interface(bdf).filter(|name| *name == interface));
}

#[test]
fn a_turn_that_leaves_a_device_changed_fails_and_the_device_is_put_back() {
    need!(Lab);
    let name = format!("/sys/bus/pci/devices/{}/driver_override", device::EDU);
    let careless = std::panic::catch_unwind(|| Lab::turn().write(&name, "vfio-pci"));
    let why = careless.expect_err("it was noticed");
    let why = why.downcast_ref::<String>().expect("a sentence");
    assert!(why.contains(&format!("device {} driver none override vfio-pci", device::EDU)), "{why}");
    assert_eq!(Lab::turn().read(&name).trim(), "(null)");
}

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
    let lab = Lab::turn();
    lab.sh("modprobe kvm_amd");
    lab.run_within(LONG, &["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--force-unsafe-io", "-i", "/srv/lab/diarch.deb"]).expect_success("dpkg -i");
    lab.write(
        "/etc/diarch/grants.toml",
        "[worker]\nuser = \"diarch\"\nunit = \"diarch-worker.service\"\n\
         [vms]\nmax = 2\nuid_first = 2100000000\nmemory_mib = 1024\ncpus_each = 1\nkvm = true\n\
         [qemu.default]\npath = \"/usr/bin/qemu-system-x86_64\"\n\
         [forwards]\nallow = [\"127.0.0.1:8000\"]\n",
    );
    lab.systemctl(&["restart", "diarch-supervisor.service", "diarch-worker.service"]);
    eprintln!("installed at {:?}", lab.age());
    let started = Instant::now();
    let mut file = vm_file_guest("one", 8000);
    file["qemu_configuration"]["accel"] = "kvm".into();
    // Its host's processor is emulated, and kept busy here.
    file["health"] = serde_json::json!({"http": {"host_port": 8000, "path": "/"}, "interval_s": 1, "timeout_s": 30, "failures": 10, "start_grace_s": 600});
    lab.write("/etc/diarch/vms/one.json", &file.to_string());

    let vm = lab.wait_for("the VM is healthy", LONG, || {
        let vms: Vec<VmView> = serde_json::from_str(&lab.run(&["diarch", "vm", "list", "--json"]).stdout).ok()?;
        assert!(!vms.iter().any(|vm| vm.phase == Phase::Failed), "{vms:#?}");
        vms.into_iter().find(|vm| vm.phase == Phase::Healthy)
    });
    let pid = vm.pid.expect("a healthy VM has a process");
    eprintln!("a KVM VM of the installed package was healthy after {:?}", started.elapsed());
    // Its own process, so that this is KVM for sure: the translator has no such thread.
    assert!(lab.sh(&format!("cat /proc/{pid}/task/*/comm")).lines().any(|name| name == "CPU 0/KVM"), "{}", lab.sh(&format!("cat /proc/{pid}/task/*/comm")));

    // What systemd was told, what it says, and what the kernel has.
    let scope = "diarch-vm-0.scope";
    assert!(lab.read(&format!("/proc/{pid}/cgroup")).trim().ends_with(&format!("/{scope}")));
    for (property, file) in [("MemoryMax", "memory.max"), ("TasksMax", "pids.max"), ("MemorySwapMax", "memory.swap.max")] {
        let said = lab.systemctl(&["show", "--value", "-p", property, scope]);
        assert_eq!(cgroup_file(&lab, pid, file), said, "{property}");
        assert!(said.parse::<u64>().is_ok(), "{property} is a number: {said}");
    }
    let bytes: u64 = cgroup_file(&lab, pid, "memory.max").parse().expect("a number");
    assert!((256 << 20..1 << 30).contains(&bytes), "room for a guest of 256 MiB and its QEMU: {bytes}");

    // A process in the scope that wants more tasks is refused them (dash gives up at once), ...
    let enter = format!("echo $$ >/sys/fs/cgroup$(cut -d: -f3 /proc/{pid}/cgroup)/cgroup.procs");
    let refused = counter(&lab, pid, "pids.events", "max");
    let fork = lab.run(&["/bin/dash", "-c", &format!("{enter}; n=0; while [ $n -lt 500 ]; do sleep 300 & n=$((n + 1)); done")]);
    assert!(fork.stderr.contains("Cannot fork"), "{fork:?}");
    assert!(counter(&lab, pid, "pids.events", "max") > refused);
    lab.sh(&format!("for pid in $(cat /sys/fs/cgroup$(cut -d: -f3 /proc/{pid}/cgroup)/cgroup.procs); do [ $pid = {pid} ] || kill $pid; done"));
    assert!(lab.sh("busybox wget -q -O - http://127.0.0.1:8000/").contains("diarch guest is up"), "its guest answers");

    // ... and one that wants more memory is killed; nobody outside the scope is. systemd then ends the scope (OOMPolicy=stop).
    let halves = |lab: &Lab| lab.systemctl(&["show", "--value", "-p", "MainPID", "diarch-supervisor.service", "diarch-worker.service"]);
    let before = halves(&lab);
    let grow = lab.run_within(LONG, &["/bin/bash", "-c", &format!("{enter}; echo 1000 >/proc/self/oom_score_adj; exec tail /dev/zero")]);
    assert_eq!(grow.code, None, "killed: {grow:?}");
    let killed = lab.sh("dmesg | grep oom-kill:");
    assert!(killed.lines().all(|line| line.contains(&format!("oom_memcg=/diarch.slice/diarch-vms.slice/{scope},"))), "{killed}");
    assert_eq!(halves(&lab), before);
    lab.wait_for("the VM's end", LONG, || (!lab.exists(&format!("/proc/{pid}"))).then_some(()));

    // The worker starts it again, which a stop in the middle would have to wait for.
    lab.sh("rm /etc/diarch/vms/one.json");
    lab.wait_for("the VM is gone", LONG, || lab.run(&["diarch", "vm", "list", "--json"]).stdout.trim().strip_prefix("[]").map(drop));
    lab.run_within(LONG, &["systemctl", "stop", "diarch-worker.service", "diarch-supervisor.socket", "diarch-supervisor.service"])
        .expect_success("systemctl stop");
    lab.run_within(LONG, &["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--purge", "diarch"]).expect_success("dpkg --purge");
}
