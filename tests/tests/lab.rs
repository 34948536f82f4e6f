//! The lab itself: it has the devices that it says, KVM works in it, and a device can be passed on to a VM in it and taken back. All by hand, by what the
//! kernel offers, and by nothing of Diarch's: what fails here is not Diarch's fault.
//!
//! `devices` is what the supervisor does with real devices, `unit` what VMs have under the installed package's units. They are in here because all of these
//! tests share one lab.

#[path = "lab/devices.rs"]
mod devices;
#[path = "lab/unit.rs"]
mod unit;

use diarch_tests::lab::{Lab, WORD, device, in_lab};
use diarch_tests::need;
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
    assert!(lab.exists("/srv/lab/bin/diarch"));

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
