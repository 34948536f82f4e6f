//! The process that is the lab: QEMU, without KVM and without a network to the outside.

use super::device;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

/// The longest life of a lab, in seconds, unless `DIARCH_LAB_SECONDS` says otherwise.
const LIFE: &str = "1800";

#[derive(Debug)]
pub struct Process {
    /// Open, since its directory goes before it.
    console: fs::File,
    process: OwnedFd,
    thread: Option<JoinHandle<io::Result<ExitStatus>>>,
}

impl Process {
    /// Starts it; `dir` holds its payload, and gets its console and the agent's socket.
    pub fn start(images: &Path, dir: &Path, words: &[&str]) -> Process {
        let console = fs::File::options().read(true).append(true).create(true).open(dir.join("console")).expect("a console log");
        let disk = fs::File::create(dir.join("nvme.img")).expect("an empty disk");
        disk.set_len(64 << 20).expect("an empty disk");
        let life = std::env::var("DIARCH_LAB_SECONDS").unwrap_or_else(|_| LIFE.into());
        let mut command = Command::new("setpriv");
        // When a test program ends, however that is, the first of them is killed, and thus the next.
        command.args(["--pdeathsig", "KILL", "timeout", "-s", "KILL", &life, "setpriv", "--pdeathsig", "KILL"]);
        command.arg(crate::need::qemu().expect("need!(Lab) comes first")).args(arguments(images, words));
        // Its paths are relative: those of a temporary directory may hold a comma.
        command.current_dir(dir);
        command.stdin(Stdio::null()).stdout(console.try_clone().expect("dup")).stderr(console.try_clone().expect("dup"));
        let mut last_words = console.try_clone().expect("dup");
        // The kernel sends the parent-death signal when the *thread* that forked ends: a test's own may end before the lab does.
        let (to, from) = mpsc::channel();
        let thread = std::thread::Builder::new().name("lab".into()).spawn(move || {
            let mut child = command.spawn()?;
            // Not waited for yet, so that the number is still its own.
            let _ = to.send(pidfd_open(rustix::process::Pid::from_child(&child), PidfdFlags::empty())?);
            let status = child.wait()?;
            // For whoever asks why there is no lab.
            let _ = writeln!(last_words, "QEMU ended: {status}");
            Ok(status)
        });
        let thread = thread.expect("a thread");
        let Ok(process) = from.recv() else { panic!("QEMU can't be started: {:?}", thread.join()) };
        Process { console, process, thread: Some(thread) }
    }

    /// What QEMU and the lab's kernel have said.
    pub fn console(&self) -> String {
        let mut bytes = vec![0; self.console.metadata().map_or(0, |meta| usize::try_from(meta.len()).unwrap_or(0))];
        let read = self.console.read_at(&mut bytes, 0).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..read]).into_owned()
    }

    pub fn ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// QEMU's arguments. The devices are described in [`device`].
fn arguments(images: &Path, words: &[&str]) -> Vec<String> {
    let image = |name: &str| images.join(name).to_str().expect("a path of UTF-8").replace(',', ",,");
    // Its address on the first bus: `0000:00:06.1` is `6.1`.
    let at = |bdf: &str| bdf[8..].to_owned();
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["-name", "diarch-lab,debug-threads=on", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "file:console"]);
    // One processor: an emulated kernel of two that patches its own code while it runs (static keys, with each first VM of KVM) now and then fell over its own breakpoint.
    // The interrupt controller is the kernel's part of it only under KVM; split is what remapping of interrupts wants.
    add(&["-machine", "q35,kernel-irqchip=split,hpet=off,vmport=off", "-accel", "tcg,thread=multi", "-smp", "1", "-m", "3072"]);
    // `max` has SVM, so that KVM works inside. Five levels of page tables are one more to walk by hand.
    add(&["-cpu", "max,la57=off"]);
    // Before all devices. Caching mode is what passing a device on to a nested VM needs.
    add(&["-device", "intel-iommu,intremap=on,caching-mode=on"]);
    add(&["-kernel", &image("vmlinuz").replace(",,", ","), "-initrd", &image("initrd.img").replace(",,", ",")]);
    // No mitigations: they cost much where each is emulated.
    let line = format!("console=ttyS0 {} intel_iommu=on iommu=pt panic=-1 quiet mitigations=off random.trust_cpu=on {}", super::WORD, words.join(" "));
    add(&["-append", line.trim_end()]);

    let disk = |id: &str, file: &str, more: &str| format!("if=none,id={id},file={file},format=raw,{more}");
    add(&[
        "-drive",
        &disk("root", &image("root.img"), "snapshot=on"),
        "-device",
        &format!("virtio-blk-pci,addr={},drive=root,serial=lab-root", at(device::ROOT)),
    ]);
    add(&["-drive", &disk("payload", "payload.img", "readonly=on")]);
    add(&["-device", &format!("virtio-blk-pci,addr={},drive=payload,serial=lab-payload", at(device::PAYLOAD))]);
    add(&["-device", &format!("edu,addr={}", at(device::EDU))]);
    for (id, device, place, mac) in [
        ("card", "e1000e", format!("addr={}", at(device::CARD)), device::CARD_MAC),
        ("live", "virtio-net-pci", format!("addr={},romfile=", at(device::LIVE)), device::LIVE_MAC),
        ("shared", "e1000", format!("addr={},multifunction=on", at(device::SHARED_CARD)), device::SHARED_CARD_MAC),
    ] {
        // restrict: nothing of it goes out, and nothing comes in.
        add(&["-netdev", &format!("user,id={id},restrict=on"), "-device", &format!("{device},{place},netdev={id},mac={mac}")]);
    }
    add(&["-device", &format!("edu,addr={}", at(device::SHARED_EDU))]);
    add(&["-drive", &disk("nvme", "nvme.img", "snapshot=on"), "-device", &format!("nvme,addr={},drive=nvme,serial=lab-nvme", at(device::NVME))]);
    add(&["-device", &format!("pcie-root-port,id=port1,addr={},chassis=1", at(device::PORT))]);
    add(&["-netdev", "user,id=behind,restrict=on", "-device", &format!("e1000e,bus=port1,netdev=behind,mac={}", device::PORT_CARD_MAC)]);
    add(&[
        "-device",
        &format!("pcie-pci-bridge,id=bridge,addr={}", at(device::BRIDGE)),
        "-device",
        "edu,bus=bridge,addr=1",
        "-device",
        "pci-testdev,bus=bridge,addr=2",
    ]);
    add(&["-device", "pcie-root-port,id=port2,addr=a,chassis=2", "-device", "nvme-subsys,id=subsystem"]);
    // Virtual functions take their queues and interrupts from those of the whole.
    let flexible = "max_ioqpairs=6,msix_qsize=7,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2";
    add(&["-device", &format!("nvme,bus=port2,subsys=subsystem,serial=lab-sriov,{flexible}")]);
    add(&["-device", &format!("virtio-serial-pci,addr={}", at(device::AGENT))]);
    add(&["-chardev", "socket,id=agent,path=agent,server=on,wait=off", "-device", "virtserialport,chardev=agent,name=diarch.agent"]);
    arguments
}
