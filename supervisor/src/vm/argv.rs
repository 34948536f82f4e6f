//! QEMU's argument vector, rendered from a typed specification (THREATS 12).
//!
//! Whatever the worker chose arrives as a number, an enum, a canonical address or a MAC, and goes into JSON where QEMU takes JSON. The kernel's command line
//! is one argument of its own, which QEMU does not parse. There are no paths but `/proc/self/fd/N` and `/dev/fdset/N`, whose numbers are
//! ours. A test reads a rendered vector back and compares.
//!
//! Checked against QEMU 7.2 (Debian 12) and 10.0 (Debian 13).

use crate::vfio::Passed;
use diarch_ipc::name::{Forward, Label, Slot};
use diarch_ipc::operation::Passing;
use diarch_ipc::spec::{Accelerator, Backend, Boot, DiskAccess, DiskFormat, Egress, FdRole, Nic, Presence, VmSpec};
use serde_json::json;

/// Where QEMU finds what it was given; 0 is `/dev/null`, 1 and 2 are the log.
pub const QMP_FD: i32 = 3;
pub const CONSOLE_FD: i32 = 4;
/// The console's log, and after it the files of the specification in the order of [`VmSpec::fds`].
pub const CONSOLE_LOG_FD: i32 = 5;
pub const FIRST_FILE_FD: i32 = 6;

/// The object that devices are handed to.
const IOMMUFD: &str = "iommufd0";

/// What a VM's process is called in `ps`, and by what a restarted supervisor tells QEMU from its own half-made child.
pub fn process_name(slot: Slot) -> String {
    format!("diarch-vm-{slot}")
}

/// Who carries the cards of user-mode networking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// QEMU's own code.
    Slirp,
    /// A process for each, at the other end of a descriptor; these follow behind all others.
    Passt,
}

/// What a VM is given besides its specification.
#[derive(Debug, Clone, Copy)]
pub struct Beside<'a> {
    /// A descriptor of `/dev/vhost-net` for each queue of a tap.
    pub vhost: Presence,
    pub devices: &'a [Passed],
    /// How it has them. As descriptors they follow behind all others: iommufd's own, and one for each function.
    pub passing: Passing,
    pub user_mode: Carrier,
}

impl Default for Beside<'_> {
    fn default() -> Self {
        Self { vhost: Presence::Absent, devices: &[], passing: Passing::Group, user_mode: Carrier::Slirp }
    }
}

/// The whole vector, `argv[0]` included.
pub fn render(program: &str, slot: Slot, label: &Label, spec: &VmSpec, beside: &Beside<'_>) -> Vec<String> {
    let mut argv: Vec<String> = Vec::with_capacity(64);
    let mut push = |args: &[&str]| argv.extend(args.iter().map(|a| (*a).to_owned()));

    // Neither can hold a comma or an equals sign. The label is for people (`systemd-cgls`, `ps`); nothing is found by it.
    push(&[program, "-name", &format!("guest={label},process={},debug-threads=on", process_name(slot))]);
    push(&["-nodefaults", "-no-user-config", "-display", "none", "-msg", "timestamp=on"]);
    // spawn=deny: no fork and exec; elevateprivileges=deny: no set*id (system/qemu-options, "-sandbox").
    push(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    // The guest's kernel tells QEMU when it panics, and QEMU tells the worker; so a panic is not taken for a reboot or a power-off.
    push(&["-device", "pvpanic-pci"]);
    push(&["-machine", "q35,usb=off,vmport=off,dump-guest-core=off"]);
    match spec.accelerator {
        Accelerator::Kvm => push(&["-accel", "kvm", "-cpu", "host"]),
        Accelerator::Tcg => push(&["-accel", "tcg,thread=multi", "-cpu", "max"]),
    }
    push(&["-smp", &format!("cpus={}", spec.cpus), "-m", &format!("size={}M", spec.memory)]);
    if !spec.shares.is_empty() {
        // What serves a shared directory reads and writes the guest's memory, and gets it as a descriptor (vhost-user).
        let ram = json!({"qom-type": "memory-backend-memfd", "id": "ram", "size": u64::from(spec.memory.get()) << 20, "share": true});
        push(&["-object", &ram.to_string(), "-machine", "memory-backend=ram"]);
    }

    push(&["-chardev", &format!("socket,id=qmp,fd={QMP_FD},server=on,wait=off"), "-mon", "chardev=qmp,mode=control"]);
    push(&["-add-fd", &format!("fd={CONSOLE_LOG_FD},set={CONSOLE_LOG_FD}")]);
    push(&["-chardev", &format!("socket,id=console,fd={CONSOLE_FD},server=on,wait=off,logfile=/dev/fdset/{CONSOLE_LOG_FD},logappend=on")]);
    push(&["-serial", "chardev:console"]);

    for (role, fd) in files(spec) {
        // These three are opened by name with fopen(3), which knows nothing of fd sets.
        match role.name {
            "kernel" => push(&["-kernel", &format!("/proc/self/fd/{fd}")]),
            "initrd" => push(&["-initrd", &format!("/proc/self/fd/{fd}")]),
            "firmware" => push(&["-bios", &format!("/proc/self/fd/{fd}")]),
            _ => {}
        }
    }
    if let Boot::Kernel { command_line, .. } = &spec.boot {
        push(&["-append", command_line.as_str()]);
    }
    let disk_fds = files(spec).into_iter().filter(|(role, _)| role.name == "disk").map(|(_, fd)| fd);
    for (n, (disk, fd)) in spec.disks.iter().zip(disk_fds).enumerate() {
        let read_only = disk.access == DiskAccess::ReadOnly;
        push(&["-add-fd", &format!("fd={fd},set={fd}")]);
        let file =
            json!({"driver": "file", "node-name": format!("file{n}"), "filename": format!("/dev/fdset/{fd}"), "read-only": read_only, "auto-read-only": false});
        push(&["-blockdev", &file.to_string()]);
        let format = match disk.format {
            DiskFormat::Raw => json!({"driver": "raw", "node-name": format!("disk{n}"), "file": format!("file{n}"), "read-only": read_only}),
            // No backing file: the image's header could name any path (THREATS 15). An external data file is refused before (`fd`).
            DiskFormat::Qcow2 => {
                json!({"driver": "qcow2", "node-name": format!("disk{n}"), "file": format!("file{n}"), "read-only": read_only, "backing": null})
            }
        };
        push(&["-blockdev", &format.to_string()]);
        push(&["-device", &json!({"driver": "virtio-blk-pci", "drive": format!("disk{n}")}).to_string()]);
    }
    for (n, nic) in spec.nics.iter().enumerate() {
        // No option ROM: it is a file by path, and nothing boots from this network.
        let mut card = json!({"driver": "virtio-net-pci", "netdev": format!("net{n}"), "mac": nic.mac.as_str(), "romfile": ""});
        let backend = match &nic.backend {
            Backend::User { .. } => match beside.user_mode {
                Carrier::Slirp => netdev(n, nic),
                Carrier::Passt => stream(n, spec, beside.vhost),
            },
            Backend::Tap { queues } => {
                if queues.get() > 1 {
                    card["mq"] = true.into();
                    // One for each direction of each queue, one for the control queue, one for changes of the configuration.
                    card["vectors"] = (2 * queues.get() + 2).into();
                }
                tap(n, spec, beside.vhost)
            }
        };
        push(&["-netdev", &backend, "-device", &card.to_string()]);
    }
    for ((n, share), fd) in spec.shares.iter().enumerate().zip(first_share_fd(spec, beside)..) {
        push(&["-chardev", &format!("socket,id=share{n},fd={fd}")]);
        push(&["-device", &json!({"driver": "vhost-user-fs-pci", "chardev": format!("share{n}"), "tag": share.tag.as_str()}).to_string()]);
    }
    let mut descriptors = None;
    if beside.passing == Passing::Iommufd && !beside.devices.is_empty() {
        // QEMU 9.0. Both are texts, as a name of the monitor's may stand there instead.
        let iommu = first_device_fd(spec, beside);
        push(&["-object", &json!({"qom-type": "iommufd", "id": IOMMUFD, "fd": iommu.to_string()}).to_string()]);
        descriptors = Some(iommu.saturating_add(1));
    }
    for argument in passed(beside.devices, descriptors) {
        push(&["-device", &argument.to_string()]);
    }
    if let Some(window) = mmio_window_mib(beside.devices) {
        // OVMF reads this name, and no other; SeaBIOS sizes the window by itself.
        push(&["-fw_cfg", &format!("name=opt/ovmf/X-PciMmio64Mb,string={window}")]);
    }
    argv
}

/// The queues of card `n` are descriptors behind all files, and so are those of `/dev/vhost-net`, which follow them.
fn tap(n: usize, spec: &VmSpec, vhost: Presence) -> String {
    let (before, own) = (spec.nics.iter().take(n).map(|nic| i32::from(nic.queues())).sum::<i32>(), spec.nics.get(n).map_or(0, Nic::queues));
    let list = |first: i32| (first + before..).take(own.into()).map(|fd| fd.to_string()).collect::<Vec<_>>().join(":");
    let mut tap = json!({"type": "tap", "id": format!("net{n}"), "fds": list(first_tap_fd(spec))});
    if vhost == Presence::Given {
        tap["vhost"] = true.into();
        tap["vhostfds"] = list(first_vhost_fd(spec)).into();
    }
    tap.to_string()
}

/// Behind the worker's files.
fn first_tap_fd(spec: &VmSpec) -> i32 {
    files(spec).last().map_or(FIRST_FILE_FD, |(_, fd)| fd + 1)
}

/// The queues of all taps, card by card.
fn queues(spec: &VmSpec) -> i32 {
    spec.nics.iter().map(|nic| i32::from(nic.queues())).sum()
}

fn first_vhost_fd(spec: &VmSpec) -> i32 {
    first_tap_fd(spec) + queues(spec)
}

/// A root port for each device (what `lspci` shows as one BUS:DEVICE), and its functions behind it, each at its own number: a GPU's driver looks for its audio
/// function beside it. By its group, QEMU finds a function by its directory in sysfs, which is all of sysfs that it can see; by descriptors, from `first` on, it needs
/// nothing else.
fn passed(devices: &[Passed], first: Option<i32>) -> Vec<serde_json::Value> {
    type Given<'a> = (&'a Passed, Option<i32>);
    let mut slots: Vec<(&str, Vec<Given<'_>>)> = Vec::new();
    for (at, device) in (0..).zip(devices) {
        let device = (device, first.map(|first| first.saturating_add(at)));
        let (place, _) = device.0.function.as_str().split_once('.').unwrap_or_default();
        match slots.iter_mut().find(|(known, _)| *known == place) {
            Some((_, functions)) => functions.push(device),
            None => slots.push((place, vec![device])),
        }
    }
    let mut arguments = Vec::new();
    for (port, (_, mut functions)) in slots.into_iter().enumerate() {
        // Chassis and slot number the port for the guest's hotplug; each pair is there once.
        arguments.push(json!({"driver": "pcie-root-port", "id": format!("port{port}"), "bus": "pcie.0", "chassis": port + 1, "slot": port + 1}));
        functions.sort_by(|(a, _), (b, _)| a.function.cmp(&b.function));
        let several = functions.len() > 1;
        for (n, (device, fd)) in functions.into_iter().enumerate() {
            // Without its function 0 nobody looks for the others.
            let mut argument = json!({"driver": "vfio-pci", "id": format!("device{port}.{n}"), "bus": format!("port{port}"), "addr": format!("0.{n}")});
            match fd {
                Some(fd) => {
                    argument["iommufd"] = IOMMUFD.into();
                    argument["fd"] = fd.to_string().into();
                }
                None => argument["sysfsdev"] = format!("/sys/{}", device.path).into(),
            }
            if several && n == 0 {
                argument["multifunction"] = true.into();
            }
            arguments.push(argument);
        }
    }
    arguments
}

/// What the firmware must leave free above 4 GiB: twice what the BARs take, as each lies at a multiple of its size. Below 32 GiB OVMF does so unasked.
fn mmio_window_mib(devices: &[Passed]) -> Option<u64> {
    const UNASKED_MIB: u64 = 32 * 1024;
    let shown = devices.iter().fold(0u64, |sum, device| sum.saturating_add(device.mmio_mib));
    let window = shown.saturating_mul(2).checked_next_power_of_two()?;
    (window > UNASKED_MIB).then_some(window)
}

/// Frames to and from the process that carries card `n`.
fn stream(n: usize, spec: &VmSpec, vhost: Presence) -> String {
    let before = (first_companion_fd(spec, vhost)..).zip(spec.nics.iter().take(n).filter(|nic| matches!(nic.backend, Backend::User { .. })));
    let fd = before.last().map_or_else(|| first_companion_fd(spec, vhost), |(fd, _)| fd + 1);
    json!({"type": "stream", "id": format!("net{n}"), "server": false, "addr": {"type": "fd", "str": fd.to_string()}}).to_string()
}

/// Behind the files, the taps and the descriptors of vhost-net.
fn first_companion_fd(spec: &VmSpec, vhost: Presence) -> i32 {
    first_vhost_fd(spec) + if vhost == Presence::Given { queues(spec) } else { 0 }
}

/// Behind those: for each share the connection to what serves it.
fn first_share_fd(spec: &VmSpec, beside: &Beside<'_>) -> i32 {
    let carried = spec.nics.iter().filter(|nic| matches!(nic.backend, Backend::User { .. })).count();
    let carried = if beside.user_mode == Carrier::Passt { i32::try_from(carried).unwrap_or(i32::MAX) } else { 0 };
    first_companion_fd(spec, beside.vhost).saturating_add(carried)
}

/// And behind those: iommufd's descriptor.
fn first_device_fd(spec: &VmSpec, beside: &Beside<'_>) -> i32 {
    first_share_fd(spec, beside).saturating_add(i32::try_from(spec.shares.len()).unwrap_or(i32::MAX))
}

fn netdev(n: usize, nic: &Nic) -> String {
    let forwards: Vec<_> = nic.forwards().iter().map(|forward| json!({"str": hostfwd(forward)})).collect();
    let mut user = json!({"type": "user", "id": format!("net{n}"), "restrict": !matches!(nic.backend, Backend::User { egress: Egress::Host, .. })});
    if !forwards.is_empty() {
        user["hostfwd"] = forwards.into();
    }
    user.to_string()
}

/// Parts that are a protocol, a canonical address and two ports hold no `,` and no second `-`.
fn hostfwd(forward: &Forward) -> String {
    let address = match forward.host_address.0 {
        std::net::IpAddr::V4(v4) => v4.to_string(),
        std::net::IpAddr::V6(v6) => format!("[{v6}]"),
    };
    format!("{}:{address}:{}-:{}", forward.protocol, forward.host_port, forward.guest_port)
}

/// The files after log and console, with the descriptor that each becomes.
fn files(spec: &VmSpec) -> Vec<(FdRole, i32)> {
    spec.fds().into_iter().skip(2).zip(FIRST_FILE_FD..).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use diarch_ipc::Request;
    use diarch_ipc::name::CommandLine;
    use proptest::prelude::*;

    fn example() -> VmSpec {
        let spawn = Request::examples().into_iter().find_map(|request| match request {
            Request::VmSpawn(spawn) => Some(spawn),
            _ => None,
        });
        VmSpec { shares: Vec::new(), ..spawn.unwrap().spec }
    }
    fn device(function: &str, group: u32, mmio_mib: u64) -> Passed {
        Passed { function: diarch_ipc::name::Bdf::new(function).unwrap(), group, path: format!("devices/pci0000:00/{function}"), mmio_mib }
    }
    fn label() -> Label {
        Label::new("web").unwrap()
    }
    fn slot() -> Slot {
        Slot::new(3).unwrap()
    }
    fn after<'a>(argv: &'a [String], option: &str) -> Vec<&'a str> {
        argv.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn the_example_renders_as_it_should() {
        let argv = render("/usr/bin/qemu-system-x86_64", slot(), &label(), &example(), &Beside::default());
        assert_eq!(after(&argv, "-kernel"), ["/proc/self/fd/6"]);
        assert_eq!(after(&argv, "-initrd"), ["/proc/self/fd/7"]);
        assert_eq!(after(&argv, "-append"), ["console=ttyS0"]);
        let file: serde_json::Value = serde_json::from_str(after(&argv, "-blockdev")[0]).unwrap();
        assert_eq!(file["filename"], "/dev/fdset/8");
        assert_eq!(file["read-only"], true);
        let net: serde_json::Value = serde_json::from_str(after(&argv, "-netdev")[0]).unwrap();
        assert_eq!(net["hostfwd"][0]["str"], "tcp:127.0.0.1:8080-:80");
        assert_eq!(net["restrict"], true);
        assert!(argv.contains(&"-nodefaults".to_owned()) && argv.contains(&"-no-user-config".to_owned()));
        assert!(after(&argv, "-sandbox")[0].starts_with("on,"));
    }

    #[test]
    fn each_queue_of_a_tap_is_a_descriptor_of_its_own_card() {
        let mut spec = example();
        let card = |queues: u64| Nic { backend: Backend::Tap { queues: diarch_ipc::name::Queues::new(queues).unwrap() }, ..example().nics[0].clone() };
        spec.nics = vec![card(1), example().nics[0].clone(), card(2)];
        for vhost in [Presence::Absent, Presence::Given] {
            let argv = render("q", slot(), &label(), &spec, &Beside { vhost, ..Beside::default() });
            let nets: Vec<serde_json::Value> = after(&argv, "-netdev").iter().map(|text| serde_json::from_str(text).unwrap()).collect();
            let first: i32 = nets[0]["fds"].as_str().unwrap().parse().unwrap();
            assert_eq!((nets[0]["type"].as_str(), nets[1]["type"].as_str()), (Some("tap"), Some("user")));
            assert_eq!(nets[2]["fds"], format!("{}:{}", first + 1, first + 2));
            assert_eq!(spec.fds().len(), usize::try_from(first).unwrap() - 3 - 1, "the taps come behind all files");
            if vhost == Presence::Given {
                assert_eq!((&nets[0]["vhostfds"], &nets[2]["vhostfds"]), (&format!("{}", first + 3).into(), &format!("{}:{}", first + 4, first + 5).into()));
            } else {
                assert!(nets.iter().all(|net| net.get("vhostfds").is_none()));
            }
            let cards: Vec<serde_json::Value> = after(&argv, "-device").iter().filter_map(|text| serde_json::from_str(text).ok()).collect();
            let cards: Vec<&serde_json::Value> = cards.iter().filter(|card| card["driver"] == "virtio-net-pci").collect();
            assert_eq!((cards[0].get("mq"), &cards[2]["mq"], &cards[2]["vectors"]), (None, &true.into(), &6.into()));
        }
    }

    #[test]
    fn each_device_has_a_port_of_its_own_and_its_functions_behind_it() {
        let devices = [device("0000:65:00.0", 12, 131_088), device("0000:17:00.1", 9, 1), device("0000:65:00.1", 12, 1)];
        let argv = render("q", slot(), &label(), &example(), &Beside { devices: &devices, ..Beside::default() });
        let all: Vec<serde_json::Value> = after(&argv, "-device").iter().filter_map(|text| serde_json::from_str(text).ok()).collect();
        let of = |driver: &str| all.iter().filter(|device| device["driver"] == driver).cloned().collect::<Vec<_>>();
        assert_eq!(of("pcie-root-port").len(), 2);
        let seen: Vec<_> = of("vfio-pci").iter().map(|d| (d["bus"].clone(), d["addr"].clone(), d["multifunction"].clone(), d["sysfsdev"].clone())).collect();
        assert_eq!(seen[0], ("port0".into(), "0.0".into(), true.into(), "/sys/devices/pci0000:00/0000:65:00.0".into()));
        assert_eq!(seen[1], ("port0".into(), "0.1".into(), serde_json::Value::Null, "/sys/devices/pci0000:00/0000:65:00.1".into()));
        assert_eq!(seen[2], ("port1".into(), "0.0".into(), serde_json::Value::Null, "/sys/devices/pci0000:00/0000:17:00.1".into()), "one alone is function 0");
        assert_eq!(after(&argv, "-fw_cfg"), ["name=opt/ovmf/X-PciMmio64Mb,string=524288"]);
        assert!(after(&render("q", slot(), &label(), &example(), &Beside { devices: &devices[1..2], ..Beside::default() }), "-fw_cfg").is_empty());
    }

    #[test]
    fn devices_by_descriptor_come_behind_all_others_and_name_neither_a_node_nor_a_directory() {
        let devices = [device("0000:65:00.1", 12, 1), device("0000:17:00.0", 9, 1), device("0000:65:00.0", 12, 1)];
        let mut spec = example();
        let name = |text: &str| (diarch_ipc::name::ShareName::new(text).unwrap(), diarch_ipc::name::Tag::new(text).unwrap());
        spec.shares = ["models", "work"].map(name).map(|(share, tag)| diarch_ipc::spec::Share { share, tag }).to_vec();
        let beside = Beside { devices: &devices, passing: Passing::Iommufd, user_mode: Carrier::Passt, ..Beside::default() };
        let argv = render("q", slot(), &label(), &spec, &beside);
        // Three before the files, one passt, two shares.
        let first = i32::try_from(spec.fds().len()).unwrap() + 3 + 1 + 1 + 2;
        let object: serde_json::Value = serde_json::from_str(after(&argv, "-object")[1]).unwrap();
        assert_eq!(object, json!({"qom-type": "iommufd", "id": "iommufd0", "fd": first.to_string()}));
        let all: Vec<serde_json::Value> = after(&argv, "-device").iter().filter_map(|text| serde_json::from_str(text).ok()).collect();
        let passed: Vec<_> = all.iter().filter(|device| device["driver"] == "vfio-pci").collect();
        let seen: Vec<_> =
            passed.iter().map(|d| (d["bus"].as_str().unwrap(), d["addr"].as_str().unwrap(), d["fd"].as_str().unwrap().parse::<i32>().unwrap())).collect();
        assert_eq!(seen, [("port0", "0.0", first + 3), ("port0", "0.1", first + 1), ("port1", "0.0", first + 2)], "each function has its own descriptor");
        assert!(passed.iter().all(|device| device["iommufd"] == "iommufd0" && device.get("sysfsdev").is_none()));
        assert!(!argv.iter().any(|argument| argument.contains("/sys/")));
        assert!(after(&render("q", slot(), &label(), &example(), &Beside { passing: Passing::Iommufd, ..Beside::default() }), "-object").is_empty());
    }

    #[test]
    fn a_card_that_passt_carries_is_a_descriptor_behind_all_others_and_qemu_has_no_network_of_its_own() {
        let mut spec = example();
        let tap = Nic { backend: Backend::Tap { queues: diarch_ipc::name::Queues::new(2).unwrap() }, ..example().nics[0].clone() };
        spec.nics = vec![example().nics[0].clone(), tap, example().nics[0].clone()];
        let files = i32::try_from(spec.fds().len()).unwrap();
        for (vhost, first) in [(Presence::Absent, 6 + files), (Presence::Given, 8 + files)] {
            let argv = render("q", slot(), &label(), &spec, &Beside { vhost, user_mode: Carrier::Passt, ..Beside::default() });
            let nets: Vec<serde_json::Value> = after(&argv, "-netdev").iter().map(|text| serde_json::from_str(text).unwrap()).collect();
            assert_eq!((&nets[0]["type"], &nets[1]["type"], &nets[2]["type"]), (&"stream".into(), &"tap".into(), &"stream".into()));
            assert_eq!(nets[0]["addr"], json!({"type": "fd", "str": first.to_string()}));
            assert_eq!(nets[2]["addr"]["str"], (first + 1).to_string());
            assert!(nets.iter().all(|net| net["type"] != "user"));
        }
    }

    #[test]
    fn each_share_is_a_connection_behind_all_others_and_the_guests_memory_is_shared() {
        let mut spec = example();
        spec.nics.push(Nic { backend: Backend::Tap { queues: diarch_ipc::name::Queues::new(2).unwrap() }, ..spec.nics[0].clone() });
        let name = |text: &str| (diarch_ipc::name::ShareName::new(text).unwrap(), diarch_ipc::name::Tag::new(text).unwrap());
        spec.shares = ["models", "work"].map(name).map(|(share, tag)| diarch_ipc::spec::Share { share, tag }).to_vec();
        for (vhost, user_mode, more) in [(Presence::Absent, Carrier::Slirp, 0), (Presence::Given, Carrier::Slirp, 2), (Presence::Given, Carrier::Passt, 3)] {
            let argv = render("q", slot(), &label(), &spec, &Beside { vhost, user_mode, ..Beside::default() });
            let first = spec.fds().len() + 4 + 2 + more;
            let chardevs = after(&argv, "-chardev");
            assert_eq!(chardevs[2..], [format!("socket,id=share0,fd={first}"), format!("socket,id=share1,fd={}", first + 1)]);
            let devices: Vec<serde_json::Value> = after(&argv, "-device").iter().filter_map(|text| serde_json::from_str(text).ok()).collect();
            let tags: Vec<&serde_json::Value> = devices.iter().filter(|device| device["driver"] == "vhost-user-fs-pci").map(|device| &device["tag"]).collect();
            assert_eq!(tags, ["models", "work"]);
            assert!(after(&argv, "-object")[0].contains("\"share\":true") && after(&argv, "-machine").contains(&"memory-backend=ram"));
        }
        assert!(after(&render("q", slot(), &label(), &example(), &Beside::default()), "-object").is_empty());
    }

    #[test]
    fn a_qcow2_image_never_opens_a_backing_file() {
        let mut spec = example();
        spec.disks[0].format = DiskFormat::Qcow2;
        let argv = render("q", slot(), &label(), &spec, &Beside::default());
        let format: serde_json::Value = serde_json::from_str(after(&argv, "-blockdev")[1]).unwrap();
        assert!(format.as_object().unwrap().contains_key("backing") && format["backing"].is_null());
    }

    proptest! {
        /// Whatever the command line says, it is one argument and changes no other.
        #[test]
        fn a_command_line_never_adds_or_changes_an_argument(text in "[ -~]{0,200}") {
            let plain = render("q", slot(), &label(), &example(), &Beside::default());
            let mut spec = example();
            if let Boot::Kernel { command_line, .. } = &mut spec.boot {
                *command_line = CommandLine::new(text.clone()).unwrap();
            }
            let argv = render("q", slot(), &label(), &spec, &Beside::default());
            prop_assert_eq!(argv.len(), plain.len());
            for (one, other) in argv.iter().zip(&plain) {
                prop_assert!(one == other || *one == text);
            }
        }
    }
}
