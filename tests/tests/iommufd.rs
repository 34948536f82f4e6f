//! A device as iommufd's descriptors, with a real kernel: a lab of its own, as its modules are not those that the other tests of the lab are about.

use diarch_tests::lab::scene::{Scene, WAIT, bind, kept_after_its_vm, spawn, unbind};
use diarch_tests::lab::{SUPERVISOR, device};
use diarch_tests::need;
use diarch_tests::puppet::{kill, release};
use serde_json::{Value, json};

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
