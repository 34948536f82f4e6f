//! Devices, on stages: fixture trees with somebody who plays the kernel in them. The supervisor is the real one, and does what it would do to a machine.
//!
//! What a real kernel does with it is seen in the lab.

use diarch_ipc::Error;
use diarch_ipc::frame::Outcome;
use diarch_ipc::name::{Bdf, Label, RequestId, Tenancy};
use diarch_ipc::operation::{
    Bind, Claim, DeviceRecord, DeviceState, Event, HostInventory, Inventory, Passing, Recover, Release, Reply, Request, Signal, SignalKind, SlotState, Spawn,
    Unbind,
};
use diarch_tests::host::{Host, Session, assert_same};
use diarch_tests::need;
use diarch_tests::stage::{EIGHT_GPUS, FOUR_SWITCHES, Function, Shape, Stage, directory};
use diarch_tests::stand_in::Unit;
use diarch_tests::stepper::{Outcome as Stepped, kill_at_syscall};
use diarch_tests::wire::Raw;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// What is granted unless a test says otherwise: everything that stands on any stage, by its class.
const ALL: &str = "\"class:0302\", \"class:0403\", \"class:0680\", \"class:0200\", \"class:0108\"";
const NO_LIMITS: &str = "[limits]\nread_per_second = 100000\nread_burst = 100000\nensure_per_second = 100000\nensure_burst = 100000\n\
                         once_per_second = 100000\nonce_burst = 100000\n";
const GPU: &str = "0000:01:00.0";
const AUDIO: &str = "0000:01:00.1";

/// A stage, and a host on it.
struct Scene {
    host: Host,
    stage: Stage,
    _directory: tempfile::TempDir,
}

fn scene(shapes: &[Shape], allow: &str, prepare: impl FnOnce(&Stage)) -> Scene {
    let directory = directory();
    let stage = Stage::set(directory.path(), shapes);
    prepare(&stage);
    let stage = stage.play();
    let mut builder = Host::builder().without_worker().on_stage(&stage).grants(&format!("[devices]\nallow = [{allow}]\nstep_seconds = 2\n{NO_LIMITS}"));
    // When a process is dead, a kernel has done what the process had told it. A stage needs a moment.
    builder.prelude = Some("sleep 0.2".into());
    Scene { host: builder.start(), stage, _directory: directory }
}

fn bdf(name: &str) -> Bdf {
    Bdf::new(name).unwrap()
}

fn eventually(what: &str, within: Duration, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < within, "not within {within:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn ask(raw: &mut Raw, request: Request) -> Result<Reply, Error> {
    match raw.ask(request, &[]).unwrap().0 {
        Outcome::Ok(reply) => Ok(reply),
        Outcome::Error(error) => Err(error),
    }
}

fn claim(raw: &mut Raw, label: &str) -> Tenancy {
    match ask(raw, Request::VmClaim(Claim { label: Label::new(label).unwrap() })) {
        Ok(Reply::VmClaim(claimed)) => claimed.tenancy,
        other => panic!("vm.claim: {other:?}"),
    }
}

fn bind(raw: &mut Raw, tenancy: Tenancy, function: &str) -> Result<DeviceRecord, Error> {
    ask(raw, Request::VfioBind(Bind { tenancy, function: bdf(function) })).map(|reply| match reply {
        Reply::VfioBind(bound) => bound.device,
        other => panic!("{other:?}"),
    })
}

fn unbind(raw: &mut Raw, tenancy: Tenancy, function: &str) -> Result<bool, Error> {
    ask(raw, Request::VfioRelease(Unbind { tenancy, function: bdf(function) })).map(|reply| match reply {
        Reply::VfioRelease(unbound) => unbound.existed,
        other => panic!("{other:?}"),
    })
}

fn recover(raw: &mut Raw, tenancy: Tenancy, function: &str) -> Result<DeviceRecord, Error> {
    ask(raw, Request::VfioRecover(Recover { tenancy, function: bdf(function) })).map(|reply| match reply {
        Reply::VfioRecover(recovered) => recovered.device,
        other => panic!("{other:?}"),
    })
}

fn release(raw: &mut Raw, tenancy: Tenancy) {
    let released = ask(raw, Request::VmRelease(Release { tenancy }));
    assert!(matches!(released, Ok(Reply::VmRelease(_))), "{released:?}");
}

fn borrowed(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

fn spawn(host: &Host, raw: &mut Raw, tenancy: Tenancy, functions: &[&str], words: &str) -> Result<u32, Error> {
    let (mut spec, fds) = host.spec(words);
    spec.devices = functions.iter().map(|name| bdf(name)).collect();
    match raw.ask(Request::VmSpawn(Spawn { tenancy, spec }), &borrowed(&fds)).unwrap().0 {
        Outcome::Ok(Reply::VmSpawn(spawned)) => Ok(spawned.pid),
        Outcome::Error(error) => Err(error),
        other => panic!("{other:?}"),
    }
}

fn inventory(raw: &mut Raw) -> HostInventory {
    match ask(raw, Request::HostInventory(Inventory { after: None })) {
        Ok(Reply::HostInventory(inventory)) => inventory,
        other => panic!("host.inventory: {other:?}"),
    }
}

/// A group, if it is not the host's.
fn device(raw: &mut Raw, group: u32) -> Option<DeviceRecord> {
    one_of(inventory(raw), group)
}

fn one_of(inventory: HostInventory, group: u32) -> Option<DeviceRecord> {
    inventory.devices.into_iter().find(|device| device.group == group)
}

fn quarantined(session: &Session, within: Duration) -> (Bdf, u32, String) {
    let until = Instant::now() + within;
    loop {
        match session.event(until.saturating_duration_since(Instant::now())) {
            Some(Event::DeviceQuarantined { function, group, reason }) => return (function, group, reason),
            Some(_) => {}
            None => panic!("no device.quarantined within {within:?}"),
        }
    }
}

// ---- there and back ----

#[test]
fn a_group_is_taken_whole_and_given_back_as_it_was() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[Shape::SingleGpu, Shape::EightGpus, Shape::SharedGroup], ALL, |_| ());
    let (before, empty) = (scene.stage.snapshot(), scene.host.inventory());
    let mut raw = scene.host.raw();
    let tenancy = claim(&mut raw, "gpus");
    let bound = bind(&mut raw, tenancy, GPU).unwrap();
    assert_eq!((bound.group, bound.state, bound.slot), (12, DeviceState::Bound, Some(tenancy.slot)));
    let functions: Vec<_> = bound.functions.iter().map(|f| (f.function.as_str(), f.vendor, f.device, f.class, f.resettable)).collect();
    assert_eq!(functions, [(GPU, 0x10de, 0x2330, 0x03_0200, true), (AUDIO, 0x10de, 0x22bb, 0x04_0300, false)]);
    assert_eq!(bound.functions[0].mmio_mib, 16 + 131_072 + 32);
    for function in [GPU, AUDIO] {
        assert_eq!(scene.stage.driver_of(function).as_deref(), Some("vfio-pci"));
    }
    assert!(scene.stage.has_node(12));
    assert_eq!(scene.stage.driver_of("0000:00:01.0").as_deref(), Some("pcieport"), "a bridge stays");
    assert_eq!(bind(&mut raw, tenancy, GPU).unwrap(), bound, "asked again: the same answer");
    assert_eq!(bind(&mut raw, tenancy, AUDIO).unwrap(), bound, "for each function of the group");
    for function in EIGHT_GPUS.iter().chain(&FOUR_SWITCHES) {
        bind(&mut raw, tenancy, function).unwrap();
    }
    let shared = bind(&mut raw, tenancy, "0000:66:00.0").unwrap();
    assert_eq!(shared.functions.len(), 2, "the bridge is not among them");
    assert_eq!(inventory(&mut raw).devices_total, 14);
    assert!(unbind(&mut raw, tenancy, GPU).unwrap());
    assert!(!unbind(&mut raw, tenancy, GPU).unwrap(), "given back already");
    assert_eq!(scene.stage.driver_of(GPU).as_deref(), Some("nvidia"));
    assert!(!scene.stage.has_node(12));
    release(&mut raw, tenancy);
    scene.stage.assert_as(&before, "after vm.release");
    drop(raw);
    assert_same(&empty, &scene.host);
}

#[test]
fn a_function_that_somebody_gave_to_vfio_before_us_is_given_back_to_it() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[], ALL, |stage| stage.function(&Function::new(GPU, (0x10de, 0x2330), 0x03_0200, 12).driver("vfio-pci")));
    std::fs::write(scene.stage.root().join("dev/vfio/12"), "").unwrap();
    scene.stage.attribute(GPU, "driver_override", "vfio-pci\n");
    let before = scene.stage.snapshot();
    let mut raw = scene.host.raw();
    let tenancy = claim(&mut raw, "gpu");
    bind(&mut raw, tenancy, GPU).unwrap();
    assert!(unbind(&mut raw, tenancy, GPU).unwrap());
    scene.stage.assert_as(&before, "given back to vfio-pci");
    scene.stage.process(77, "qemu", &["/dev/vfio/12"]);
    let Err(Error::Conflict { holder, reason }) = bind(&mut raw, tenancy, GPU) else { panic!() };
    assert!(holder.contains("77") && reason.contains("qemu"), "{holder}: {reason}");
}

// ---- what is refused ----

/// The shape, what is done to it, what is asked for, and what the refusal says.
type Case = (Shape, fn(&Stage), &'static str, &'static str);

const REFUSED: &[Case] = &[
    (Shape::BootNvme, |_| (), "0000:71:00.0", "nvme0n1p2, which is mounted on /"),
    (Shape::BootNvme, |_| (), "0000:72:00.0", "nvme0n1p2, which is mounted on /"),
    (Shape::ManagementNic, |_| (), "0000:81:00.0", "eno1, over which a default route goes"),
    (Shape::ManagementNic, |s| s.interface("0000:82:00.0", "eno2", 0x1003), "0000:82:00.0", "eno2, which is up"),
    (Shape::ManagementNic, |s| s.enslave("eno2", "br0"), "0000:82:00.0", "eno2, which is part of br0"),
    (
        Shape::ManagementNic,
        |s| std::fs::remove_dir_all(s.root().join("sys").join(s.place("0000:82:00.0")).join("net")).unwrap(),
        "0000:82:00.0",
        "network namespace",
    ),
    (Shape::Sriov, |_| (), "0000:91:00.0", "2 virtual functions in use"),
    (Shape::SingleGpu, |s| s.attribute(GPU, "boot_vga", "1\n"), GPU, "the display that the host started on"),
    (Shape::SingleGpu, |s| s.process(90, "nvidia-smi", &["/dev/nvidia0"]), GPU, "nvidia-smi (pid 90) has /dev/nvidia0 open"),
    (
        Shape::SingleGpu,
        |s| {
            s.node(AUDIO, "sound/card1/pcmC1D0p", "snd/pcmC1D0p", (116, 2));
            s.process(91, "pipewire", &["/dev/null", "/dev/snd/pcmC1D0p"]);
        },
        GPU,
        "pipewire (pid 91)",
    ),
    (
        Shape::SingleGpu,
        |s| {
            // The kernel knows the group as vfio's, whatever there is in /dev.
            std::fs::create_dir_all(s.root().join("sys/class/vfio/12")).unwrap();
            s.process(92, "qemu", &["/dev/vfio/12"]);
        },
        GPU,
        "qemu (pid 92) has /dev/vfio/12 open",
    ),
    (Shape::SingleGpu, disk_with_swap, GPU, "to which the host swaps"),
    (Shape::SingleGpu, disk_under_lvm, GPU, "sdx1, which is mounted through dm-3 on /srv"),
    (Shape::SingleGpu, disk_in_a_raid, GPU, "sdx, which is part of md7"),
    (Shape::SingleGpu, disk_in_btrfs, GPU, "sdx, which is part of btrfs 0d8a"),
    (Shape::SingleGpu, disk_with_a_journal, GPU, "sdx, which is part of a file system, with its journal"),
    (Shape::SingleGpu, disk_behind_a_loop, GPU, "sdx, which is part of loop3"),
    (Shape::SingleGpu, disk_with_a_log, GPU, "sdx, which is mounted on /srv"),
    (Shape::SingleGpu, disk_of_a_container, GPU, "sdx, which is mounted on /data"),
    (Shape::SingleGpu, disk_behind_several_ways, GPU, "nvme3n1, which is mounted on /far"),
    (Shape::SingleGpu, |s| std::fs::remove_file(s.root().join("sys").join(s.place(GPU)).join("iommu_group")).unwrap(), GPU, "intel_iommu=on"),
    (Shape::SingleGpu, |s| std::fs::write(s.root().join("sys/kernel/iommu_groups/12/name"), "vfio-noiommu\n").unwrap(), GPU, "vfio-noiommu"),
    (
        Shape::SingleGpu,
        |s| std::fs::create_dir_all(s.root().join("sys/kernel/iommu_groups/12/devices/arm-smmu.0")).unwrap(),
        GPU,
        "no PCI function: arm-smmu.0",
    ),
    (Shape::SingleGpu, |s| std::fs::remove_dir_all(s.root().join("sys/bus/pci/drivers/vfio-pci")).unwrap(), GPU, "modprobe vfio-pci"),
    (Shape::SharedGroup, |_| (), "0000:00:03.0", "is a bridge (class 0604)"),
    (Shape::SharedGroup, |s| s.interface("0000:66:00.0", "ens6", 0x1003), "0000:65:00.0", "ens6, which is up"),
    (Shape::SingleGpu, |_| (), "0000:02:00.0", "not found"),
    // What can't be looked at is not taken for nothing.
    (Shape::SingleGpu, |s| s.attribute(GPU, "class", "what\n"), GPU, "look at IOMMU group 12"),
    (Shape::SingleGpu, leads_out, GPU, "failed in look at"),
];

fn disk(stage: &Stage) {
    stage.block(GPU, "ata1/host0/target0:0:0/0:0:0:0/block/sdx", "8:112");
    stage.block(GPU, "ata1/host0/target0:0:0/0:0:0:0/block/sdx/sdx1", "8:113");
}
fn disk_with_swap(stage: &Stage) {
    disk(stage);
    stage.swap("/dev/sdx1");
}
fn disk_under_lvm(stage: &Stage) {
    disk(stage);
    stage.holder("sdx1", "dm-3", "254:3");
    stage.mount("31 25 254:3 / /srv rw - xfs /dev/mapper/vg-srv rw");
}
fn disk_in_a_raid(stage: &Stage) {
    disk(stage);
    stage.holder("sdx", "md7", "9:7");
}
fn disk_in_btrfs(stage: &Stage) {
    disk(stage);
    std::fs::create_dir_all(stage.root().join("sys/fs/btrfs/0d8a/devices/sdx")).unwrap();
}
/// Only the journal of a file system that lies elsewhere.
fn disk_with_a_journal(stage: &Stage) {
    disk(stage);
    std::fs::create_dir_all(stage.root().join("proc/fs/jbd2/sdx")).unwrap();
}
/// Behind a loop device that nobody mounted: the kernel names no holder.
fn disk_behind_a_loop(stage: &Stage) {
    disk(stage);
    let sys = stage.root().join("sys");
    std::fs::create_dir_all(sys.join("devices/virtual/block/loop3/loop")).unwrap();
    std::fs::create_dir_all(sys.join("devices/virtual/block/loop3/holders")).unwrap();
    std::fs::write(sys.join("devices/virtual/block/loop3/dev"), "7:3\n").unwrap();
    std::fs::write(sys.join("devices/virtual/block/loop3/loop/backing_file"), "/dev/sdx\n").unwrap();
    std::os::unix::fs::symlink("../../devices/virtual/block/loop3", sys.join("class/block/loop3")).unwrap();
}
/// The log of an XFS that lies elsewhere.
fn disk_with_a_log(stage: &Stage) {
    disk(stage);
    stage.mount("41 25 259:5 / /srv rw - xfs /dev/nvme9n1 rw,attr2,logdev=/dev/sdx,noquota");
}
/// Mounted where the host itself does not see it.
fn disk_of_a_container(stage: &Stage) {
    disk(stage);
    stage.process(501, "postgres", &[]);
    std::fs::write(stage.root().join("proc/501/mountinfo"), "900 800 8:112 / /data rw - ext4 /dev/sdx rw\n").unwrap();
}
/// A disk of an NVMe subsystem hangs below the subsystem, and not below the controller that leads to it.
fn disk_behind_several_ways(stage: &Stage) {
    let sys = stage.root().join("sys");
    std::fs::create_dir_all(sys.join(stage.place(GPU)).join("nvme/nvme3")).unwrap();
    let subsystem = sys.join("devices/virtual/nvme-subsystem/nvme-subsys3");
    std::fs::create_dir_all(subsystem.join("nvme3n1/holders")).unwrap();
    std::fs::write(subsystem.join("nvme3n1/dev"), "259:9\n").unwrap();
    let link = |to: String, at: std::path::PathBuf| std::os::unix::fs::symlink(to, at).unwrap();
    link("../../../../../class/block".into(), subsystem.join("nvme3n1/subsystem"));
    link(format!("../../../../{}/nvme/nvme3", stage.place(GPU)), subsystem.join("nvme3"));
    link("../../devices/virtual/nvme-subsystem/nvme-subsys3/nvme3n1".into(), sys.join("class/block/nvme3n1"));
    std::fs::create_dir_all(sys.join("class/nvme-subsystem")).unwrap();
    link("../../devices/virtual/nvme-subsystem/nvme-subsys3".into(), sys.join("class/nvme-subsystem/nvme-subsys3"));
    stage.mount("44 25 259:9 / /far rw - ext4 /dev/nvme3n1 rw");
}
/// A device of the stage that is a link to the machine's own tree.
fn leads_out(stage: &Stage) {
    let at = stage.root().join("sys/bus/pci/devices").join(GPU);
    std::fs::remove_file(&at).unwrap();
    std::os::unix::fs::symlink("/sys/bus/pci", at).unwrap();
}

#[test]
fn what_the_host_lives_on_is_refused_though_it_is_granted_and_nothing_is_touched() {
    need!(Root, Kernel(6, 5));
    // Each has a supervisor of its own: some see at their start what they refuse.
    std::thread::scope(|scope| {
        for part in REFUSED.chunks(REFUSED.len().div_ceil(4)) {
            scope.spawn(|| part.iter().for_each(refused));
        }
    });
}

fn refused((shape, prepare, function, said): &Case) {
    let scene = scene(&[*shape], ALL, prepare);
    let (before, empty) = (scene.stage.snapshot(), scene.host.inventory());
    let mut raw = scene.host.raw();
    let tenancy = claim(&mut raw, "vm");
    let error = bind(&mut raw, tenancy, function).expect_err(said).to_string();
    assert!(error.contains(said), "{said}: {error}");
    assert!(inventory(&mut raw).devices.is_empty(), "{said}");
    scene.stage.assert_as(&before, said);
    release(&mut raw, tenancy);
    drop(raw);
    assert_same(&empty, &scene.host);
}

#[test]
fn a_card_of_which_a_port_is_in_another_network_namespace_is_refused_also_behind_usb() {
    need!(Root, Network, Kernel(6, 5));
    // The kernel's own directory of a class stands on the stage: it shows the interfaces of the machine's network, and counts this one's too.
    diarch_tests::netns::enter();
    for (shape, function, below) in [(Shape::ManagementNic, "0000:82:00.0", "port2/net"), (Shape::SingleGpu, GPU, "usb1/1-1/1-1:1.0/net")] {
        let directory = directory();
        let stage = Stage::set(directory.path(), &[shape]);
        let place = stage.root().join("sys").join(stage.place(function)).join(below);
        std::fs::create_dir_all(&place).unwrap();
        let stage = stage.play();
        let grants = format!("[devices]\nallow = [{ALL}]\nstep_seconds = 2\n{NO_LIMITS}");
        for there in [true, false] {
            let mut builder = Host::builder().without_worker().on_stage(&stage).grants(&grants);
            let mount = if there { format!("mount --bind /sys/devices/virtual/net {}", place.display()) } else { "sleep 0.2".into() };
            let script = format!("{mount} && exec \"$0\" \"$@\"");
            builder.prelude = Some(format!("exec unshare --mount --propagation private /bin/sh -c '{script}' \"$0\" \"$@\""));
            let host = builder.start();
            let mut raw = host.raw();
            let tenancy = claim(&mut raw, "vm");
            let before = stage.snapshot();
            match bind(&mut raw, tenancy, function) {
                Err(error) if there => {
                    let sentence = error.to_string();
                    assert!(sentence.contains(&format!("{function} has ")) && sentence.contains("in another network namespace, where"), "{sentence}");
                    stage.assert_as(&before, below);
                }
                Ok(_) if !there => {}
                other => panic!("{below}, {there}: {other:?}"),
            }
            release(&mut raw, tenancy);
        }
    }
}

#[test]
fn a_group_with_a_member_that_is_not_granted_is_refused_with_its_name() {
    need!(Root, Kernel(6, 5));
    for (shape, allow, function, said) in [
        (Shape::SingleGpu, "", GPU, "nothing is in it, and so not 0000:01:00.0"),
        (Shape::SingleGpu, "\"class:0200\"", GPU, "0000:01:00.0 (10de:2330, class 0302) is covered by no entry"),
        (Shape::SingleGpu, "\"10de:2330\"", GPU, "0000:01:00.1 (10de:22bb, class 0403) is in IOMMU group 12 with 0000:01:00.0"),
        (Shape::SharedGroup, "\"class:0302\"", "0000:65:00.0", "0000:66:00.0 (8086:10d3, class 0200) is in IOMMU group 40"),
    ] {
        let scene = scene(&[shape], allow, |_| ());
        let before = scene.stage.snapshot();
        let mut raw = scene.host.raw();
        let tenancy = claim(&mut raw, "vm");
        let error = bind(&mut raw, tenancy, function).unwrap_err();
        assert!(matches!(&error, Error::Denied { grant, .. } if grant == "devices.allow"), "{error}");
        assert!(error.to_string().contains(said), "{error}");
        scene.stage.assert_as(&before, said);
    }
}

#[test]
fn two_vms_that_ask_for_one_device_get_it_once_and_the_other_hears_whose_it_is() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[Shape::SingleGpu], ALL, |_| ());
    let mut raw = scene.host.raw();
    let (web, db) = (claim(&mut raw, "web"), claim(&mut raw, "db"));
    bind(&mut raw, web, GPU).unwrap();
    for function in [GPU, AUDIO] {
        let Err(Error::Conflict { holder, reason }) = bind(&mut raw, db, function) else { panic!() };
        assert_eq!(holder, "VM web");
        assert!(reason.contains("IOMMU group 12"), "{reason}");
    }
    assert!(!unbind(&mut raw, db, GPU).unwrap(), "what is another's is not given back");
    assert_eq!(recover(&mut raw, db, GPU).unwrap_err().kind(), "conflict");
    assert_eq!(spawn(&scene.host, &mut raw, db, &[GPU], "").unwrap_err().kind(), "not-found");
    assert_eq!(scene.stage.driver_of(GPU).as_deref(), Some("vfio-pci"));
    release(&mut raw, web);
    bind(&mut raw, db, GPU).unwrap();
}

#[test]
fn a_request_out_of_order_or_under_another_claim_changes_nothing() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[Shape::SingleGpu], ALL, |_| ());
    let mut raw = scene.host.raw();
    let tenancy = claim(&mut raw, "vm");
    let other = Tenancy { claim: RequestId { session: 9, serial: 9 }, ..tenancy };
    for wrong in [other, Tenancy { slot: diarch_ipc::name::Slot::new(7).unwrap(), ..tenancy }] {
        assert_eq!(bind(&mut raw, wrong, GPU).unwrap_err().kind(), "not-found");
        assert_eq!(unbind(&mut raw, wrong, GPU).unwrap_err().kind(), "not-found");
        assert_eq!(recover(&mut raw, wrong, GPU).unwrap_err().kind(), "not-found");
    }
    assert!(!unbind(&mut raw, tenancy, GPU).unwrap(), "never bound");
    assert_eq!(recover(&mut raw, tenancy, GPU).unwrap_err().kind(), "not-found");
    assert_eq!(spawn(&scene.host, &mut raw, tenancy, &[GPU], "").unwrap_err().kind(), "not-found");
    bind(&mut raw, tenancy, GPU).unwrap();
    assert_eq!(spawn(&scene.host, &mut raw, tenancy, &[GPU, GPU], "").unwrap_err().kind(), "invalid");
    assert_eq!(spawn(&scene.host, &mut raw, tenancy, &["0000:00:01.0"], "").unwrap_err().kind(), "not-found");
    spawn(&scene.host, &mut raw, tenancy, &[GPU], "").unwrap();
    for result in [bind(&mut raw, tenancy, GPU).map(drop), unbind(&mut raw, tenancy, GPU).map(drop), recover(&mut raw, tenancy, GPU).map(drop)] {
        assert_eq!(result.unwrap_err().kind(), "wrong-state", "a VM runs with it");
    }
    assert_eq!(device(&mut raw, 12).unwrap().state, DeviceState::Attached);
    release(&mut raw, tenancy);
    assert_eq!(scene.stage.driver_of(GPU).as_deref(), Some("nvidia"));
}

// ---- what goes wrong ----

#[test]
fn when_one_function_is_not_taken_the_whole_group_goes_back() {
    need!(Root, Kernel(6, 5));
    for function in [GPU, AUDIO] {
        let scene = scene(&[Shape::SingleGpu], ALL, |_| ());
        scene.stage.refuse("vfio-pci", function);
        let (before, empty) = (scene.stage.snapshot(), scene.host.inventory());
        let mut raw = scene.host.raw();
        let tenancy = claim(&mut raw, "vm");
        let error = bind(&mut raw, tenancy, GPU).unwrap_err().to_string();
        assert!(error.contains(&format!("give {function} to vfio-pci")) || error.contains(&format!("bind to vfio-pci of {function}")), "{error}");
        scene.stage.assert_as(&before, function);
        assert!(inventory(&mut raw).devices.is_empty());
        scene.stage.accept("vfio-pci", function);
        bind(&mut raw, tenancy, GPU).unwrap();
        release(&mut raw, tenancy);
        scene.stage.assert_as(&before, function);
        drop(raw);
        assert_same(&empty, &scene.host);
    }
}

#[test]
fn a_driver_that_does_not_let_go_costs_its_device_and_nobody_else_anything() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[Shape::SingleGpu, Shape::ManagementNic], ALL, |_| ());
    let before = scene.stage.snapshot();
    scene.stage.hang_unbind("nvidia");
    let session = scene.host.session();
    let (one, other) = (session.claim("one").tenancy, session.claim("other").tenancy);
    let asking = std::thread::scope(|scope| {
        let asked = scope.spawn(|| session.ask(Request::VfioBind(Bind { tenancy: one, function: bdf(GPU) }), Vec::new()));
        // Came after the look, and before the deadline.
        std::thread::sleep(Duration::from_millis(300));
        scene.stage.process(4711, "train.py", &["/dev/nvidia0"]);
        // Meanwhile others are served.
        session.spawn(&scene.host, other, "");
        asked.join().unwrap()
    });
    let Err(Error::Timeout { step, after_ms }) = asking else { panic!("{asking:?}") };
    assert!(step.contains("take 0000:01:00.0 from nvidia") && step.contains("train.py (pid 4711) has /dev/nvidia0 open") && after_ms == 2000, "{step}");
    let (function, group, reason) = quarantined(&session, Duration::from_secs(2));
    assert_eq!((function.as_str(), group), (GPU, 12));
    assert!(reason.contains("train.py"), "{reason}");
    assert_eq!(one_of(session.inventory(), 12).unwrap().state, DeviceState::Quarantined);
    let again = session.ask(Request::VfioBind(Bind { tenancy: one, function: bdf(GPU) }), Vec::new()).unwrap_err();
    assert!(matches!(&again, Error::WrongState { state, reason } if state == "quarantined" && reason.contains("train.py")), "{again}");
    // Its slot is not held up by it, and can be another's; the device is nobody's.
    assert!(session.release(one).existed);
    let left = one_of(session.inventory(), 12).unwrap();
    assert_eq!((left.state, left.slot), (DeviceState::Quarantined, None));
    let next = session.claim("next").tenancy;
    assert_eq!(session.ask(Request::VfioBind(Bind { tenancy: next, function: bdf(GPU) }), Vec::new()).unwrap_err().kind(), "wrong-state");
    session.ask(Request::VfioBind(Bind { tenancy: next, function: bdf("0000:82:00.0") }), Vec::new()).unwrap();
    // The process ends, the driver lets go: all of it goes back by itself.
    scene.stage.end_process(4711);
    scene.stage.let_go("nvidia");
    eventually("the group is free again", Duration::from_secs(3), || one_of(session.inventory(), 12).is_none());
    session.release(next);
    session.release(other);
    scene.stage.assert_as(&before, "after the driver let go");
    let mut raw = scene.host.raw();
    let tenancy = claim(&mut raw, "later");
    bind(&mut raw, tenancy, GPU).unwrap();
}

#[test]
fn a_device_that_its_driver_does_not_take_back_is_kept_and_can_be_given_back_later() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[Shape::SingleGpu], ALL, |_| ());
    let before = scene.stage.snapshot();
    let session = scene.host.session();
    let tenancy = session.claim("vm").tenancy;
    session.ask(Request::VfioBind(Bind { tenancy, function: bdf(GPU) }), Vec::new()).unwrap();
    scene.stage.refuse("nvidia", GPU);
    assert!(session.release(tenancy).existed, "a slot does not wait for its device");
    let (_, _, reason) = quarantined(&session, Duration::from_secs(2));
    assert!(reason.contains("nvidia does not take it back"), "{reason}");
    assert_eq!(scene.stage.driver_of(AUDIO).as_deref(), Some("snd_hda_intel"), "what can go back does");
    drop(session);
    // The record outlives the slot and the supervisor.
    scene.host.manager().kill_and_wait(Unit::Supervisor);
    let mut raw = scene.host.raw();
    let left = device(&mut raw, 12).unwrap();
    assert_eq!((left.state, left.slot), (DeviceState::Quarantined, None));
    scene.stage.accept("nvidia", GPU);
    let next = claim(&mut raw, "next");
    assert!(unbind(&mut raw, next, GPU).unwrap(), "whoever comes next may try again");
    scene.stage.assert_as(&before, "in the end");
}

#[test]
fn a_device_that_is_pulled_out_needs_nothing_to_be_released() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[Shape::SharedGroup], ALL, |_| ());
    let mut raw = scene.host.raw();
    let tenancy = claim(&mut raw, "vm");
    bind(&mut raw, tenancy, "0000:65:00.0").unwrap();
    scene.stage.vanish("0000:65:00.0");
    assert!(unbind(&mut raw, tenancy, "0000:65:00.0").unwrap());
    assert_eq!(scene.stage.driver_of("0000:66:00.0").as_deref(), Some("e1000e"), "its neighbour is given back");
    assert!(inventory(&mut raw).devices.is_empty());
    assert_eq!(bind(&mut raw, tenancy, "0000:65:00.0").unwrap_err().kind(), "not-found");
}

// ---- in a VM ----

fn access_list(stage: &Stage, group: u32) -> Option<usize> {
    let mut list = [0u8; 256];
    rustix::fs::getxattr(stage.root().join(format!("dev/vfio/{group}")), "system.posix_acl_access", &mut list).ok()
}

#[test]
fn a_device_is_opened_to_its_vms_user_while_the_vm_runs_and_must_answer_when_it_has_ended() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[Shape::SingleGpu], ALL, |_| ());
    let before = scene.stage.snapshot();
    let mut raw = scene.host.raw();
    let tenancy = claim(&mut raw, "vm");
    bind(&mut raw, tenancy, GPU).unwrap();
    let bound = scene.stage.snapshot();
    let pid = spawn(&scene.host, &mut raw, tenancy, &[GPU, AUDIO], "").unwrap();
    assert_eq!(device(&mut raw, 12).unwrap().state, DeviceState::Attached);
    assert!(access_list(&scene.stage, 12).is_some());
    let argv = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(argv.contains("pcie-root-port") && argv.contains("\"sysfsdev\":\"/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.1\""), "{argv}");
    // A restarted supervisor leaves it where it is.
    drop(raw);
    scene.host.manager().kill_and_wait(Unit::Supervisor);
    let mut raw = scene.host.raw();
    assert_eq!(device(&mut raw, 12).unwrap().state, DeviceState::Attached);
    assert!(access_list(&scene.stage, 12).is_some());
    ask(&mut raw, Request::VmSignal(Signal { tenancy, signal: SignalKind::Kill })).unwrap();
    eventually("bound again", Duration::from_secs(3), || device(&mut raw, 12).unwrap().state == DeviceState::Bound);
    scene.stage.assert_as(&bound, "bound, and its node closed");

    // Without its functions in the specification a VM has none of it.
    spawn(&scene.host, &mut raw, tenancy, &[], "stub.exit=0").unwrap();
    assert_eq!(device(&mut raw, 12).unwrap().state, DeviceState::Bound);

    // And one that does not answer after its VM is given to nobody, until a reset helps.
    eventually("ended", Duration::from_secs(3), || inventory(&mut raw).vms[0].state == SlotState::Exited);
    spawn(&scene.host, &mut raw, tenancy, &[GPU], "").unwrap();
    drop(raw);
    let session = scene.host.session();
    session.inventory();
    scene.stage.die(GPU);
    session.ask(Request::VmSignal(Signal { tenancy, signal: SignalKind::Kill }), Vec::new()).unwrap();
    let (_, _, reason) = quarantined(&session, Duration::from_secs(3));
    assert!(reason.contains("0000:01:00.0 does not answer"), "{reason}");
    let mut raw = scene.host.raw();
    assert_eq!(access_list(&scene.stage, 12), None, "also then its node is closed");
    assert_eq!(spawn(&scene.host, &mut raw, tenancy, &[GPU], "").unwrap_err().kind(), "wrong-state");
    let error = recover(&mut raw, tenancy, GPU).unwrap_err();
    assert!(error.to_string().contains("does not answer"), "{error}");
    assert_eq!(device(&mut raw, 12).unwrap().state, DeviceState::Quarantined);
    // The host's driver is not given a dead device.
    assert!(unbind(&mut raw, tenancy, GPU).unwrap_err().to_string().contains("it stays with vfio-pci"));
    scene.stage.resets();
    scene.stage.revive(GPU, (0x10de, 0x2330));
    let recovered = recover(&mut raw, tenancy, GPU).unwrap();
    assert_eq!((recovered.state, recovered.trouble), (DeviceState::Bound, None));
    let mut resets = Vec::new();
    eventually("reset before and after the rebind, but for the audio function, which has no reset", Duration::from_secs(2), || {
        resets.extend(scene.stage.resets());
        resets == [GPU, GPU]
    });
    spawn(&scene.host, &mut raw, tenancy, &[GPU], "").unwrap();
    release(&mut raw, tenancy);
    scene.stage.assert_as(&before, "in the end");
}

/// What the process has as this descriptor.
fn descriptor(pid: u32, number: &serde_json::Value) -> std::path::PathBuf {
    std::fs::read_link(format!("/proc/{pid}/fd/{}", number.as_str().unwrap())).unwrap()
}

/// What of the stage's `/dev` a process has open.
fn nodes_of(stage: &Stage, pid: impl std::fmt::Display) -> Vec<std::path::PathBuf> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    files.filter_map(|file| std::fs::read_link(file.path()).ok()).filter(|path| path.starts_with(stage.root().join("dev")) && path.is_file()).collect()
}

#[test]
fn where_kernel_and_qemu_have_it_a_vm_gets_its_functions_as_descriptors_and_no_node_is_opened_to_it() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[Shape::SingleGpu], ALL, Stage::iommufd);
    let before = scene.stage.snapshot();
    let mut raw = scene.host.raw();
    let tenancy = claim(&mut raw, "vm");
    assert_eq!(bind(&mut raw, tenancy, GPU).unwrap().passing, None);
    let bound = scene.stage.snapshot();
    let pid = spawn(&scene.host, &mut raw, tenancy, &[AUDIO, GPU], "").unwrap();
    let attached = device(&mut raw, 12).unwrap();
    assert_eq!((attached.state, attached.passing), (DeviceState::Attached, Some(Passing::Iommufd)));
    scene.stage.assert_as(&bound, "nothing of it is opened to anybody by its name");
    let argv = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let json: Vec<serde_json::Value> = argv.split(|byte| *byte == 0).filter_map(|argument| serde_json::from_slice(argument).ok()).collect();
    let iommu = json.iter().find(|argument| argument["qom-type"] == "iommufd").unwrap();
    assert_eq!(descriptor(pid, &iommu["fd"]), scene.stage.root().join("dev/iommu"));
    for (function, place) in [(GPU, "0.0"), (AUDIO, "0.1")] {
        let argument = json.iter().find(|argument| argument["driver"] == "vfio-pci" && argument["addr"] == place).unwrap();
        assert_eq!(argument.get("sysfsdev"), None);
        assert_eq!(descriptor(pid, &argument["fd"]), scene.stage.root().join("dev").join(scene.stage.own_node(function).unwrap()), "{function}");
    }
    assert_eq!(nodes_of(&scene.stage, pid).len(), 3, "and nothing besides");
    assert!(nodes_of(&scene.stage, scene.host.supervisor_pid()).is_empty(), "the supervisor keeps none: a driver could not be taken from what is open");
    // A restarted supervisor leaves it where it is.
    drop(raw);
    scene.host.manager().kill_and_wait(Unit::Supervisor);
    let mut raw = scene.host.raw();
    assert_eq!(device(&mut raw, 12).unwrap().passing, Some(Passing::Iommufd));
    ask(&mut raw, Request::VmSignal(Signal { tenancy, signal: SignalKind::Kill })).unwrap();
    eventually("bound again", Duration::from_secs(3), || device(&mut raw, 12).is_some_and(|d| (d.state, d.passing) == (DeviceState::Bound, None)));

    // What stands in a node's place is not opened, and nothing is left of the try.
    let own = scene.stage.root().join("dev").join(scene.stage.own_node(GPU).unwrap());
    std::fs::remove_file(&own).unwrap();
    std::os::unix::fs::symlink("/dev/null", &own).unwrap();
    let error = spawn(&scene.host, &mut raw, tenancy, &[GPU], "").unwrap_err();
    assert!(error.to_string().contains("open /dev/vfio/devices/vfio"), "{error}");
    assert_eq!(device(&mut raw, 12).unwrap().state, DeviceState::Bound);
    std::fs::remove_file(&own).unwrap();
    // Without it, the group's way is left.
    spawn(&scene.host, &mut raw, tenancy, &[GPU], "").unwrap();
    assert_eq!(device(&mut raw, 12).unwrap().passing, Some(Passing::Group));
    assert!(access_list(&scene.stage, 12).is_some());
    release(&mut raw, tenancy);
    scene.stage.assert_as(&before, "in the end");
}

#[test]
fn root_can_keep_devices_to_their_groups_nodes() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[Shape::SingleGpu], &format!("{ALL}]\niommufd = false # ["), Stage::iommufd);
    let mut raw = scene.host.raw();
    let tenancy = claim(&mut raw, "vm");
    bind(&mut raw, tenancy, GPU).unwrap();
    let pid = spawn(&scene.host, &mut raw, tenancy, &[GPU], "").unwrap();
    assert_eq!(device(&mut raw, 12).unwrap().passing, Some(Passing::Group));
    assert!(access_list(&scene.stage, 12).is_some() && nodes_of(&scene.stage, pid).is_empty());
}

#[test]
fn a_device_that_somebody_kept_is_given_to_nobody_until_he_has_let_go_and_it_was_reset() {
    need!(Root, Kernel(6, 5));
    for iommufd in [false, true] {
        let scene = scene(&[Shape::SingleGpu], ALL, |stage| {
            if iommufd {
                stage.iommufd()
            }
        });
        let before = scene.stage.snapshot();
        let session = scene.host.session();
        let tenancy = session.claim("vm").tenancy;
        let ask = |request| session.ask(request, Vec::new());
        ask(Request::VfioBind(Bind { tenancy, function: bdf(GPU) })).unwrap();
        let spawn = || {
            let (mut spec, fds) = scene.host.spec("");
            spec.devices = vec![bdf(GPU)];
            session.ask(Request::VmSpawn(Spawn { tenancy, spec }), fds)
        };
        spawn().unwrap();
        // A QEMU that was taken over has handed it on.
        let node = if iommufd { format!("/dev/{}", scene.stage.own_node(GPU).unwrap()) } else { "/dev/vfio/12".into() };
        scene.stage.process(4711, "diarch-worker", &[&node]);
        ask(Request::VmSignal(Signal { tenancy, signal: SignalKind::Kill })).unwrap();
        let (_, group, reason) = quarantined(&session, Duration::from_secs(6));
        assert!(group == 12 && reason.contains(&format!("diarch-worker (pid 4711) has {node} open")), "{reason}");
        assert_eq!(spawn().unwrap_err().kind(), "wrong-state");
        for request in [Request::VfioRecover(Recover { tenancy, function: bdf(GPU) }), Request::VfioRelease(Unbind { tenancy, function: bdf(GPU) })] {
            let error = ask(request).unwrap_err();
            assert!(error.to_string().contains("pid 4711"), "{error}");
            assert_eq!(scene.stage.driver_of(GPU).as_deref(), Some("vfio-pci"), "no driver was asked to let go of what is open");
        }
        scene.stage.end_process(4711);
        ask(Request::VfioRecover(Recover { tenancy, function: bdf(GPU) })).unwrap();
        assert_eq!(one_of(session.inventory(), 12).unwrap().state, DeviceState::Bound);
        // A release of the whole VM does not hand it to the host's driver either.
        spawn().unwrap();
        scene.stage.process(4711, "diarch-worker", &[&node]);
        assert!(session.release(tenancy).existed);
        let left = one_of(session.inventory(), 12).unwrap();
        assert_eq!((left.state, left.slot), (DeviceState::Quarantined, None));
        assert!(left.trouble.unwrap().contains("pid 4711"));
        scene.stage.end_process(4711);
        let next = session.claim("next").tenancy;
        ask(Request::VfioRelease(Unbind { tenancy: next, function: bdf(GPU) })).unwrap();
        session.release(next);
        scene.stage.assert_as(&before, "in the end");
    }
}

#[test]
fn a_vm_that_ends_while_no_supervisor_runs_leaves_its_device_bound_and_closed() {
    need!(Root, Kernel(6, 5));
    let scene = scene(&[Shape::SingleGpu], ALL, |_| ());
    let mut raw = scene.host.raw();
    let tenancy = claim(&mut raw, "vm");
    bind(&mut raw, tenancy, GPU).unwrap();
    let bound = scene.stage.snapshot();
    spawn(&scene.host, &mut raw, tenancy, &[GPU], "stub.crash-after-ms=150").unwrap();
    drop(raw);
    let supervisor = scene.host.supervisor_pid();
    let process = rustix::process::Pid::from_raw(supervisor).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
    eventually("the VM ended", Duration::from_secs(3), || scene.host.qemus().is_empty());
    scene.host.manager().kill_and_wait(Unit::Supervisor);
    let mut raw = scene.host.raw();
    eventually("bound", Duration::from_secs(3), || device(&mut raw, 12).unwrap().state == DeviceState::Bound);
    scene.stage.assert_as(&bound, "closed");
}

// ---- killed at each step ----

/// Asks again and again, and kills the supervisor at the first, second, ... of its system calls (each `every`-th) until it answers before that. `setup` brings about
/// what the request needs; `check` sees what came of it.
fn killed_at_each(
    name: &str,
    first: u64,
    every: u64,
    scene: &Scene,
    setup: impl Fn(&Session) -> Tenancy,
    request: impl Fn(Tenancy) -> Request,
    check: impl Fn(&Session, Tenancy, Reply),
) -> u64 {
    let before = scene.stage.snapshot();
    let started = Instant::now();
    let mut n = first;
    loop {
        let session = scene.host.session();
        let tenancy = setup(&session);
        let (outcome, answer) = kill_at_syscall(scene.host.supervisor_pid(), n, || session.ask(request(tenancy), Vec::new())).unwrap();
        let reply = answer.unwrap_or_else(|error| panic!("{name}, killed at step {n} ({outcome:?}): {error}"));
        check(&session, tenancy, reply.0);
        assert!(session.release(tenancy).existed);
        scene.stage.assert_as(&before, &format!("{name}, killed at step {n} ({outcome:?})"));
        assert!(session.inventory().devices.is_empty(), "{name}, step {n}");
        match outcome {
            Stepped::Killed { .. } => n += every,
            Stepped::Survived { syscalls } => {
                eprintln!("{name}: {syscalls} system calls, killed at each {every}th from {first} on, {:?} in all", started.elapsed());
                return syscalls;
            }
            Stepped::Ended { .. } => panic!("{name}, step {n}: the supervisor ended by itself"),
        }
    }
}

/// Several stages at one time, each with its share of the steps: one alone would mostly wait.
fn everywhere(one: impl Fn(u64, u64) -> u64 + Sync) {
    const STAGES: u64 = 6;
    let one = &one;
    let counts = std::thread::scope(|scope| {
        let all: Vec<_> = (1..=STAGES).map(|first| scope.spawn(move || one(first, STAGES))).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(counts.iter().all(|count| *count > 60), "{counts:?}: too few for what is done");
}

#[test]
fn a_supervisor_killed_at_every_step_of_a_bind_leaves_the_group_wholly_ours_or_wholly_back() {
    need!(Root, Kernel(6, 5));
    everywhere(|first, every| {
        let scene = scene(&[Shape::SingleGpu], ALL, |_| ());
        let setup = |session: &Session| session.claim("step").tenancy;
        killed_at_each(
            "vfio.bind",
            first,
            every,
            &scene,
            setup,
            |tenancy| Request::VfioBind(Bind { tenancy, function: bdf(GPU) }),
            |session, _, reply| {
                let Reply::VfioBind(bound) = reply else { panic!("{reply:?}") };
                assert_eq!(bound.device.state, DeviceState::Bound);
                assert_eq!(session.inventory().devices, [bound.device]);
                for function in [GPU, AUDIO] {
                    assert_eq!(scene.stage.driver_of(function).as_deref(), Some("vfio-pci"));
                }
            },
        )
    });
}

fn bound(session: &Session) -> Tenancy {
    let tenancy = session.claim("step").tenancy;
    session.ask(Request::VfioBind(Bind { tenancy, function: bdf(GPU) }), Vec::new()).unwrap();
    tenancy
}

#[test]
fn a_supervisor_killed_at_every_step_of_a_release_gives_the_group_back() {
    need!(Root, Kernel(6, 5));
    everywhere(|first, every| {
        let scene = scene(&[Shape::SingleGpu], ALL, |_| ());
        killed_at_each(
            "vfio.release",
            first,
            every,
            &scene,
            bound,
            |tenancy| Request::VfioRelease(Unbind { tenancy, function: bdf(GPU) }),
            |session, _, _| {
                assert!(session.inventory().devices.is_empty());
                assert_eq!([GPU, AUDIO].map(|function| scene.stage.driver_of(function)), [Some("nvidia".into()), Some("snd_hda_intel".into())]);
            },
        )
    });
}

#[test]
fn a_supervisor_killed_at_every_step_of_a_reset_loses_no_device() {
    need!(Root, Kernel(6, 5));
    everywhere(|first, every| {
        let scene = scene(&[Shape::SingleGpu], ALL, |_| ());
        killed_at_each(
            "vfio.recover",
            first,
            every,
            &scene,
            bound,
            |tenancy| Request::VfioRecover(Recover { tenancy, function: bdf(GPU) }),
            |_, _, reply| {
                let Reply::VfioRecover(recovered) = reply else { panic!("{reply:?}") };
                assert_eq!(recovered.device.state, DeviceState::Bound);
            },
        )
    });
}
