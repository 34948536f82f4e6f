//! What the supervisor does with real devices: a real kernel's drivers and groups, udev, and KVM guests. It runs by its own unit, so its sandbox counts too.
//!
//! Each request is a `diarch-puppet` of its own. What was claimed stays claimed, so tests go on where the last request left off.

use super::LONG;
use diarch_ipc::operation::{Recover, Request};
use diarch_tests::lab::scene::{PUPPET, Scene, UID_FIRST, WAIT, bdf, bind, kept_after_its_vm, lines, spawn, unbind};
use diarch_tests::lab::{DIRECTORY, SUPERVISOR, device};
use diarch_tests::need;
use diarch_tests::puppet::{inventory, kill, release};
use std::time::Instant;

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
