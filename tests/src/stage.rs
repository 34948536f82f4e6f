//! A stage: a tree with the shape of a host's `/sys`, `/dev` and `/proc`, as far as devices are concerned, and somebody who plays the kernel in it.
//!
//! ```text
//!   ROOT/.diarch-stage         says that this is one: the supervisor takes no other directory for a host (`--host-root`)
//!   ROOT/sys/devices/...       PCI functions with their attributes, disks, interfaces
//!   ROOT/sys/bus/pci/...       devices, drivers with `bind` and `unbind`, `drivers_probe`
//!   ROOT/sys/kernel/...        IOMMU groups
//!   ROOT/dev/vfio/N            appears a moment after the last function of group N is vfio-pci's
//!   ROOT/dev/vfio/devices/     and each function's own, where the kernel has iommufd ([`Stage::iommufd`])
//!   ROOT/proc/...              mounts, swap, routes, and who has which node open
//!   ROOT/natural/BDF           the driver that the function has when nobody says otherwise
//! ```
//!
//! The kernel's part is a thread that sees what is written (inotify) and does what a kernel would: moves the `driver` links, makes and removes nodes. Unlike a kernel it does so after the write, and not in it. It can be told to be a bad one: a driver
//! that does not let go, one that does not take, a device that goes away or dies. Needs no root.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Between a bind and its node: the supervisor must wait for it.
const NODE_DELAY: Duration = Duration::from_millis(20);
/// A file that goes when all is done that was asked for before it came.
const TOLD: &str = "told";
/// For those who wait at a pipe that is being taken away.
const PIPE_DELAY: Duration = Duration::from_millis(100);
const VFIO: &str = "vfio-pci";

/// What may stand on a stage; several can be combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// `0000:01:00.0` and its audio function `.1`, in group 12, behind a bridge in group 1.
    SingleGpu,
    /// Eight GPUs, each in a group of its own (20 to 27), and the four NVSwitches between them (30 to 33).
    EightGpus,
    /// A bridge, a GPU (`0000:65:00.0`) and a network card (`0000:66:00.0`) in group 40.
    SharedGroup,
    /// The disk that the host started from (`0000:71:00.0`), in group 50 with a GPU (`0000:72:00.0`).
    BootNvme,
    /// The host's network card (`0000:81:00.0`, group 60), and one that is not in use (`0000:82:00.0`, group 61).
    ManagementNic,
    /// A network card with two virtual functions switched on: `0000:91:00.0` in group 70, `0000:91:10.0` and `.2` in 71 and 72.
    Sriov,
}

impl Shape {
    pub const ALL: [Shape; 6] = [Shape::SingleGpu, Shape::EightGpus, Shape::SharedGroup, Shape::BootNvme, Shape::ManagementNic, Shape::Sriov];

    pub const fn as_str(self) -> &'static str {
        match self {
            Shape::SingleGpu => "single-gpu",
            Shape::EightGpus => "eight-gpus",
            Shape::SharedGroup => "shared-group",
            Shape::BootNvme => "boot-nvme",
            Shape::ManagementNic => "management-nic",
            Shape::Sriov => "sriov",
        }
    }

    /// What is on it, for people.
    pub const fn what(self) -> &'static str {
        match self {
            Shape::SingleGpu => "a GPU with its audio function: 0000:01:00.0 and .1, in one group",
            Shape::EightGpus => "eight GPUs (0000:17:00.0 and on) and four NVSwitches (0000:07:00.0 and on), each in a group of its own",
            Shape::SharedGroup => "a GPU (0000:65:00.0) and a network card (0000:66:00.0) in one group",
            Shape::BootNvme => "a GPU (0000:72:00.0) in one group with the disk that the host runs from",
            Shape::ManagementNic => "the host's own network card (0000:81:00.0), and one that is free (0000:82:00.0)",
            Shape::Sriov => "a network card with two virtual functions (0000:91:10.0 and .2)",
        }
    }
}

impl std::str::FromStr for Shape {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Shape::ALL.into_iter().find(|shape| shape.as_str() == text).ok_or_else(|| format!("there is no shape {text:?}"))
    }
}

/// The GPUs of [`Shape::EightGpus`], and its switches.
pub const EIGHT_GPUS: [&str; 8] =
    ["0000:17:00.0", "0000:2a:00.0", "0000:3d:00.0", "0000:5d:00.0", "0000:9a:00.0", "0000:ab:00.0", "0000:ba:00.0", "0000:db:00.0"];
pub const FOUR_SWITCHES: [&str; 4] = ["0000:07:00.0", "0000:08:00.0", "0000:09:00.0", "0000:0a:00.0"];

/// A PCI function to be.
#[derive(Debug, Clone)]
pub struct Function {
    name: String,
    /// Below `devices`: a root bus, or a bridge's own path.
    parent: String,
    ids: (u16, u16),
    class: u32,
    group: u32,
    driver: Option<String>,
    /// Sizes of its memory BARs.
    bars: Vec<u64>,
    reset: bool,
}

impl Function {
    pub fn new(name: &str, ids: (u16, u16), class: u32, group: u32) -> Self {
        Function { name: name.into(), parent: "pci0000:00".into(), ids, class, group, driver: None, bars: vec![16 << 20], reset: true }
    }
    pub fn driver(mut self, driver: &str) -> Self {
        self.driver = Some(driver.into());
        self
    }
    pub fn behind(mut self, bridge: &str) -> Self {
        self.parent = format!("pci0000:00/{bridge}");
        self
    }
    pub fn bars(mut self, sizes: &[u64]) -> Self {
        self.bars = sizes.to_vec();
        self
    }
    pub fn without_reset(mut self) -> Self {
        self.reset = false;
        self
    }
}

/// A stage with its kernel.
#[derive(Debug)]
pub struct Stage {
    root: PathBuf,
    kernel: Arc<Kernel>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What the kernel was told to do wrong.
#[derive(Debug, Default)]
struct Kernel {
    root: PathBuf,
    stop: AtomicBool,
    /// Functions that a driver does not take: (driver, function).
    refuses: Mutex<BTreeSet<(String, String)>>,
    resets: Mutex<Vec<String>>,
    /// One thing at a time, as under the kernel's own locks.
    one: Mutex<()>,
}

fn put(path: &Path, text: &str) {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).expect("mkdir");
    }
    fs::write(path, text).expect("write");
}

/// A relative link from `at` (below `root`) to `to` (below `root`), as sysfs has them.
fn link(root: &Path, at: &str, to: &str) {
    let up = "../".repeat(at.matches('/').count());
    let path = root.join(at);
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).expect("mkdir");
    }
    let _ = fs::remove_file(&path);
    symlink(format!("{up}{to}"), path).expect("symlink");
}

impl Stage {
    /// Builds the shapes below `root`, an empty directory, and starts the kernel.
    pub fn build(root: &Path, shapes: &[Shape]) -> Stage {
        Stage::set(root, shapes).play()
    }

    /// Builds without starting the kernel: more can be put on it first.
    pub fn set(root: &Path, shapes: &[Shape]) -> Stage {
        put(&root.join(".diarch-stage"), "a fixture of Diarch's tests: no machine\n");
        for directory in
            ["sys/bus/pci/devices", "sys/bus/pci/drivers", "sys/class/block", "sys/class/net", "sys/kernel/iommu_groups", "dev/vfio", "proc", "natural"]
        {
            fs::create_dir_all(root.join(directory)).expect("mkdir");
        }
        put(&root.join("sys/bus/pci/drivers_probe"), "");
        put(&root.join("dev/vfio/vfio"), "");
        let kernel = Arc::new(Kernel { root: root.to_owned(), ..Kernel::default() });
        let stage = Stage { root: root.to_owned(), kernel, thread: None };
        stage.driver(VFIO);
        stage.process(1, "systemd", &[]);
        put(&root.join("proc/1/mountinfo"), "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n");
        put(&root.join("proc/1/net/route"), "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n");
        put(&root.join("proc/1/net/ipv6_route"), "");
        put(&root.join("proc/swaps"), "Filename\t\t\t\tType\t\tSize\tUsed\tPriority\n");
        for shape in shapes {
            stage.shape(*shape);
        }
        stage
    }

    /// Starts the kernel.
    pub fn play(mut self) -> Stage {
        let kernel = Arc::clone(&self.kernel);
        let (ready, started) = std::sync::mpsc::channel();
        self.thread = Some(std::thread::spawn(move || kernel.play(&ready)));
        started.recv().expect("the stage's kernel");
        self
    }

    pub fn root(&self) -> &Path {
        &self.root
    }
    fn sys(&self) -> PathBuf {
        self.root.join("sys")
    }

    fn shape(&self, shape: Shape) {
        let gpu = |name: &str, group| Function::new(name, (0x10de, 0x2330), 0x03_0200, group).driver("nvidia").bars(&[16 << 20, 128 << 30, 32 << 20]);
        let card = |name: &str, group| Function::new(name, (0x8086, 0x10d3), 0x02_0000, group).driver("e1000e").bars(&[128 << 10]);
        let bridge = |name: &str, group| Function::new(name, (0x8086, 0x352a), 0x06_0400, group).driver("pcieport").bars(&[]);
        match shape {
            Shape::SingleGpu => {
                self.function(&bridge("0000:00:01.0", 1));
                self.function(&gpu("0000:01:00.0", 12).behind("0000:00:01.0"));
                let audio = Function::new("0000:01:00.1", (0x10de, 0x22bb), 0x04_0300, 12).driver("snd_hda_intel").behind("0000:00:01.0");
                self.function(&audio.without_reset());
                self.nvidia_node("0000:01:00.0", 0);
            }
            Shape::EightGpus => {
                for (at, name) in (0..).zip(EIGHT_GPUS) {
                    self.function(&gpu(name, 20 + at));
                }
                for (at, name) in (0..).zip(FOUR_SWITCHES) {
                    self.function(&Function::new(name, (0x10de, 0x22a3), 0x06_8000, 30 + at).driver("nvidia").bars(&[32 << 20]));
                }
            }
            Shape::SharedGroup => {
                self.function(&bridge("0000:00:03.0", 40));
                self.function(&gpu("0000:65:00.0", 40).behind("0000:00:03.0"));
                self.function(&card("0000:66:00.0", 40).behind("0000:00:03.0"));
                self.interface("0000:66:00.0", "ens6", 0x1002);
            }
            Shape::BootNvme => {
                self.function(&Function::new("0000:71:00.0", (0x144d, 0xa80a), 0x01_0802, 50).driver("nvme"));
                self.function(&gpu("0000:72:00.0", 50));
                self.block("0000:71:00.0", "nvme/nvme0/nvme0n1", "259:0");
                self.block("0000:71:00.0", "nvme/nvme0/nvme0n1/nvme0n1p1", "259:1");
                self.block("0000:71:00.0", "nvme/nvme0/nvme0n1/nvme0n1p2", "259:2");
                self.mount("25 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw");
            }
            Shape::ManagementNic => {
                self.function(&card("0000:81:00.0", 60));
                self.interface("0000:81:00.0", "eno1", 0x1003);
                self.default_route("eno1");
                self.function(&card("0000:82:00.0", 61));
                self.interface("0000:82:00.0", "eno2", 0x1002);
            }
            Shape::Sriov => {
                self.function(&card("0000:91:00.0", 70));
                self.interface("0000:91:00.0", "ens9", 0x1002);
                self.attribute("0000:91:00.0", "sriov_numvfs", "2\n");
                for (at, name) in (0..).zip(["0000:91:10.0", "0000:91:10.2"]) {
                    self.function(&Function::new(name, (0x8086, 0x10ca), 0x02_0000, 71 + at));
                    let place = self.place(name);
                    link(&self.sys(), &format!("{place}/physfn"), &self.place("0000:91:00.0"));
                    // A virtual function's own config space has no ids.
                    let mut config = vec![0u8; 256];
                    config[..4].fill(0xff);
                    fs::write(self.sys().join(place).join("config"), config).expect("write");
                }
            }
        }
    }

    // ---- what stands on it ----

    /// A function's path below `sys`.
    pub fn place(&self, function: &str) -> String {
        let path = fs::canonicalize(self.sys().join("bus/pci/devices").join(function)).unwrap_or_else(|error| panic!("{function}: {error}"));
        let root = fs::canonicalize(self.sys()).expect("the stage");
        path.strip_prefix(root).expect("below the stage").to_str().expect("a UTF-8 path").to_owned()
    }

    pub fn function(&self, function: &Function) {
        let Function { name, parent, ids, class, group, driver, bars, reset } = function;
        let sys = self.sys();
        let place = format!("devices/{parent}/{name}");
        let at = |file: &str| sys.join(&place).join(file);
        put(&at("vendor"), &format!("{:#06x}\n", ids.0));
        put(&at("device"), &format!("{:#06x}\n", ids.1));
        put(&at("class"), &format!("{class:#08x}\n"));
        put(&at("driver_override"), "(null)\n");
        put(&at("uevent"), &format!("PCI_SLOT_NAME={name}\n"));
        let mut config = vec![0u8; 256];
        config[..2].copy_from_slice(&ids.0.to_le_bytes());
        config[2..4].copy_from_slice(&ids.1.to_le_bytes());
        fs::write(at("config"), config).expect("write");
        let mut resource = String::new();
        for bar in 0..6 {
            let line = bars.get(bar).map_or_else(
                || format!("{0:#018x} {0:#018x} {0:#018x}\n", 0),
                |size| format!("{:#018x} {:#018x} {:#018x}\n", (bar as u64 + 1) << 40, ((bar as u64 + 1) << 40) + size - 1, 0x14_220c),
            );
            resource.push_str(&line);
        }
        put(&at("resource"), &resource);
        if *reset {
            put(&at("reset"), "");
        }
        fs::create_dir_all(at("power")).expect("mkdir");
        link(&sys, &format!("{place}/subsystem"), "bus/pci");
        link(&sys, &format!("bus/pci/devices/{name}"), &place);
        link(&sys, &format!("{place}/iommu_group"), &format!("kernel/iommu_groups/{group}"));
        link(&sys, &format!("kernel/iommu_groups/{group}/devices/{name}"), &place);
        put(&sys.join(format!("kernel/iommu_groups/{group}/type")), "DMA-FQ\n");
        if let Some(driver) = driver {
            self.driver(driver);
            put(&self.root.join("natural").join(name), driver);
            link(&sys, &format!("{place}/driver"), &format!("bus/pci/drivers/{driver}"));
            link(&sys, &format!("bus/pci/drivers/{driver}/{name}"), &place);
        }
    }

    pub fn driver(&self, driver: &str) {
        for file in ["bind", "unbind"] {
            let path = self.sys().join(format!("bus/pci/drivers/{driver}/{file}"));
            if !path.exists() {
                put(&path, "");
            }
        }
    }

    pub fn attribute(&self, function: &str, name: &str, text: &str) {
        put(&self.sys().join(self.place(function)).join(name), text);
    }

    /// A disk or partition at `below` the function.
    pub fn block(&self, function: &str, below: &str, number: &str) {
        let place = format!("{}/{below}", self.place(function));
        let name = below.rsplit('/').next().unwrap_or_default();
        let (major, minor) = number.split_once(':').expect("MAJOR:MINOR");
        put(&self.sys().join(&place).join("dev"), &format!("{number}\n"));
        put(&self.sys().join(&place).join("uevent"), &format!("MAJOR={major}\nMINOR={minor}\nDEVNAME={name}\n"));
        fs::create_dir_all(self.sys().join(&place).join("holders")).expect("mkdir");
        link(&self.sys(), &format!("{place}/subsystem"), "class/block");
        link(&self.sys(), &format!("class/block/{name}"), &place);
    }

    /// What is made of disks: `dm-0` on `sda2`, say.
    pub fn holder(&self, disk: &str, name: &str, number: &str) {
        let place = format!("devices/virtual/block/{name}");
        put(&self.sys().join(&place).join("dev"), &format!("{number}\n"));
        fs::create_dir_all(self.sys().join(&place).join("holders")).expect("mkdir");
        link(&self.sys(), &format!("class/block/{name}"), &place);
        let disk = fs::canonicalize(self.sys().join("class/block").join(disk)).expect("the disk");
        symlink(format!("/{place}"), disk.join("holders").join(name)).expect("symlink");
    }

    /// An interface of the function; bit 0 of `flags` is "up".
    pub fn interface(&self, function: &str, name: &str, flags: u32) {
        let place = format!("{}/net/{name}", self.place(function));
        put(&self.sys().join(&place).join("flags"), &format!("{flags:#x}\n"));
        put(&self.sys().join(&place).join("operstate"), if flags & 1 == 1 { "up\n" } else { "down\n" });
        link(&self.sys(), &format!("{place}/subsystem"), "class/net");
        link(&self.sys(), &format!("class/net/{name}"), &place);
    }

    /// Makes the interface part of another (`master`).
    pub fn enslave(&self, name: &str, master: &str) {
        let place = format!("devices/virtual/net/{master}");
        put(&self.sys().join(&place).join("flags"), "0x1003\n");
        link(&self.sys(), &format!("class/net/{master}"), &place);
        let interface = fs::canonicalize(self.sys().join("class/net").join(name)).expect("the interface");
        let at = interface.strip_prefix(fs::canonicalize(self.sys()).expect("the stage")).expect("below").to_str().expect("UTF-8").to_owned();
        link(&self.sys(), &format!("{at}/master"), &place);
    }

    /// A character device of the function's, such as `drm/card0` with the node `dri/card0`.
    pub fn node(&self, function: &str, below: &str, node: &str, number: (u32, u32)) {
        let place = format!("{}/{below}", self.place(function));
        let class = below.split('/').next().unwrap_or_default();
        put(&self.sys().join(&place).join("dev"), &format!("{}:{}\n", number.0, number.1));
        put(&self.sys().join(&place).join("uevent"), &format!("MAJOR={}\nMINOR={}\nDEVNAME={node}\n", number.0, number.1));
        link(&self.sys(), &format!("{place}/subsystem"), &format!("class/{class}"));
    }

    /// The node that NVIDIA's driver makes, and of which sysfs knows nothing.
    pub fn nvidia_node(&self, function: &str, minor: u32) {
        put(&self.root.join(format!("proc/driver/nvidia/gpus/{function}/information")), &format!("Model: \t\t H100\nDevice Minor: \t {minor}\n"));
    }

    /// The kernel has iommufd: from now on each function that is vfio-pci's has a node of its own.
    pub fn iommufd(&self) {
        put(&self.sys().join("class/misc/iommu/dev"), "10:259\n");
        put(&self.root.join("dev/iommu"), "");
        fs::create_dir_all(self.root.join("dev/vfio/devices")).expect("mkdir");
    }

    /// The function's own node, below `dev`.
    pub fn own_node(&self, function: &str) -> Option<String> {
        let mut names = fs::read_dir(self.sys().join(self.place(function)).join("vfio-dev")).ok()?.flatten();
        Some(format!("vfio/devices/{}", names.next()?.file_name().to_string_lossy()))
    }

    // ---- what the host does with it ----

    pub fn mount(&self, mountinfo: &str) {
        let path = self.root.join("proc/1/mountinfo");
        put(&path, &format!("{}{mountinfo}\n", fs::read_to_string(&path).unwrap_or_default()));
    }

    pub fn swap(&self, node: &str) {
        let path = self.root.join("proc/swaps");
        put(&path, &format!("{}{node}\tpartition\t1048572\t0\t-2\n", fs::read_to_string(&path).expect("swaps")));
    }

    pub fn default_route(&self, interface: &str) {
        let path = self.root.join("proc/1/net/route");
        let line = format!("{interface}\t00000000\t0102000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n");
        put(&path, &format!("{}{line}", fs::read_to_string(&path).expect("route")));
    }

    /// A process that has these nodes open.
    pub fn process(&self, pid: u32, name: &str, open: &[&str]) {
        let at = self.root.join(format!("proc/{pid}"));
        put(&at.join("comm"), &format!("{name}\n"));
        fs::create_dir_all(at.join("fd")).expect("mkdir");
        fs::create_dir_all(at.join("ns")).expect("mkdir");
        let _ = fs::remove_file(at.join("ns/mnt"));
        symlink(if pid == 1 { "mnt:[1]".to_owned() } else { format!("mnt:[{}]", 1 + pid % 2) }, at.join("ns/mnt")).expect("symlink");
        for (number, node) in open.iter().enumerate() {
            symlink(node, at.join(format!("fd/{}", number + 3))).expect("symlink");
        }
    }

    pub fn end_process(&self, pid: u32) {
        fs::remove_dir_all(self.root.join(format!("proc/{pid}"))).expect("rmdir");
    }

    // ---- a bad kernel ----

    /// Whoever asks the driver to let go of anything waits until [`Stage::let_go`].
    pub fn hang_unbind(&self, driver: &str) {
        let path = self.sys().join(format!("bus/pci/drivers/{driver}/unbind"));
        let new = path.with_extension("new");
        nix::unistd::mkfifo(&new, nix::sys::stat::Mode::from_bits_truncate(0o644)).expect("mkfifo");
        fs::rename(&new, &path).expect("rename");
    }

    /// Ends [`Stage::hang_unbind`]: what was asked for is done.
    pub fn let_go(&self, driver: &str) {
        let path = self.sys().join(format!("bus/pci/drivers/{driver}/unbind"));
        let mut asked = String::new();
        fs::File::open(&path).and_then(|mut pipe| pipe.read_to_string(&mut asked)).expect("what was asked for");
        let new = path.with_extension("new");
        put(&new, "");
        fs::rename(&new, &path).expect("rename");
        self.kernel.unbind(driver, asked.trim());
    }

    /// Ends [`Stage::hang_unbind`] whether anybody waits or not: what was asked for by then is done.
    pub fn let_all_go(&self, driver: &str) {
        let path = self.sys().join(format!("bus/pci/drivers/{driver}/unbind"));
        // Nobody's end of a pipe: it is opened at once, and wakes up whoever waits at the other.
        let nobody = fs::File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&path);
        let new = path.with_extension("new");
        put(&new, "");
        fs::rename(&new, &path).expect("rename");
        let Ok(mut pipe) = nobody else { return };
        // Each wrote a name of this length, and nothing between them. What is asked for is done at once: whoever asked may end, and another look.
        let mut name = [0; "0000:00:00.0".len()];
        let until = std::time::Instant::now() + PIPE_DELAY;
        while std::time::Instant::now() < until {
            match pipe.read(&mut name) {
                Ok(length @ 1..) => self.kernel.unbind(driver, String::from_utf8_lossy(&name[..length]).trim()),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// For a supervisor's start (`Builder::prelude`): shell text that waits until all is done that the one before it was told. When a process is dead, a kernel has
    /// done what it had been asked for; this one may be behind.
    pub fn catch_up(&self) -> String {
        format!("told='{}'\n: >\"$told\"\nwhile [ -e \"$told\" ]; do sleep 0.002; done", self.sys().join("bus/pci").join(TOLD).display())
    }

    /// The driver does not take this function any more.
    pub fn refuse(&self, driver: &str, function: &str) {
        self.kernel.refuses.lock().unwrap().insert((driver.into(), function.into()));
    }

    pub fn accept(&self, driver: &str, function: &str) {
        self.kernel.refuses.lock().unwrap().remove(&(driver.to_owned(), function.to_owned()));
    }

    /// The function reads all ones.
    pub fn die(&self, function: &str) {
        fs::write(self.sys().join(self.place(function)).join("config"), vec![0xff; 256]).expect("write");
    }

    /// And answers again.
    pub fn revive(&self, function: &str, ids: (u16, u16)) {
        let mut config = vec![0u8; 256];
        config[..2].copy_from_slice(&ids.0.to_le_bytes());
        config[2..4].copy_from_slice(&ids.1.to_le_bytes());
        fs::write(self.sys().join(self.place(function)).join("config"), config).expect("write");
    }

    /// The function is pulled out.
    pub fn vanish(&self, function: &str) {
        self.kernel.vanish(function);
    }

    // ---- what there is ----

    pub fn driver_of(&self, function: &str) -> Option<String> {
        let link = fs::read_link(self.sys().join("bus/pci/devices").join(function).join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    pub fn has_node(&self, group: u32) -> bool {
        self.root.join(format!("dev/vfio/{group}")).exists()
    }

    /// The functions that were reset since this was asked last.
    pub fn resets(&self) -> Vec<String> {
        std::mem::take(&mut *self.kernel.resets.lock().unwrap())
    }

    /// Everything in `sys` and `dev`: names, contents, links, modes.
    pub fn snapshot(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        let mut open = vec![self.sys(), self.root.join("dev")];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(&directory).expect("a directory").flatten() {
                let path = entry.path();
                let meta = fs::symlink_metadata(&path).expect("an entry");
                let mode = meta.permissions().mode() & 0o7777;
                let what = if meta.is_symlink() {
                    format!("link {}", fs::read_link(&path).expect("a link").display())
                } else if meta.is_dir() {
                    open.push(path.clone());
                    format!("directory {mode:o}")
                } else {
                    format!("file {mode:o} {:?}", shown(&path))
                };
                all.insert(path.strip_prefix(&self.root).expect("below").to_string_lossy().into_owned(), what);
            }
        }
        all
    }

    /// Fails with the difference when the stage is not, within a moment, as it was.
    pub fn assert_as(&self, before: &BTreeMap<String, String>, what: &str) {
        let until = std::time::Instant::now() + Duration::from_secs(2);
        loop {
            let now = self.snapshot();
            if now == *before {
                return;
            }
            if std::time::Instant::now() > until {
                let names: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
                let differs: Vec<String> = names
                    .into_iter()
                    .filter(|name| before.get(*name) != now.get(*name))
                    .map(|name| format!("{name}: {:?} before, {:?} now", before.get(name), now.get(name)))
                    .collect();
                panic!("{what}: the stage is not as it was:\n{}", differs.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.kernel.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Kernel {
    fn play(&self, ready: &std::sync::mpsc::Sender<()>) {
        let notify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).expect("inotify");
        let mut places = BTreeMap::new();
        let mut watch = |path: PathBuf| {
            let number = inotify::add_watch(&notify, &path, WatchFlags::CLOSE_WRITE).expect("a watch");
            places.insert(number, path);
        };
        let pci = self.root.join("sys/bus/pci");
        watch(pci.clone());
        for entry in fs::read_dir(pci.join("drivers")).expect("drivers").chain(fs::read_dir(pci.join("devices")).expect("devices")).flatten() {
            watch(fs::canonicalize(entry.path()).expect("a place"));
        }
        let _ = ready.send(());
        let mut buffer = [std::mem::MaybeUninit::<u8>::uninit(); 8192];
        // One reader: it keeps what it read and has not told yet.
        let mut reader = inotify::Reader::new(&notify, &mut buffer);
        while !self.stop.load(Ordering::Acquire) {
            match reader.next() {
                Ok(event) => {
                    let file = event.file_name().map(|name| name.to_string_lossy().into_owned());
                    if let (Some(place), Some(file)) = (places.get(&event.wd()), file) {
                        self.written(place, &file);
                    }
                    debug_assert!(!event.events().contains(ReadFlags::QUEUE_OVERFLOW), "more was written than could be seen");
                }
                Err(_) => {
                    let _ = poll(&mut [PollFd::new(&notify, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 50_000_000 }));
                }
            }
        }
    }

    fn written(&self, place: &Path, file: &str) {
        let path = place.join(file);
        // Where something hangs there is a pipe, whose reader is another (`let_go`).
        if !fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file()) {
            return;
        }
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let take = || {
            let text = fs::read_to_string(&path).unwrap_or_default();
            if !text.is_empty() {
                put(&path, "");
            }
            text.trim().to_owned()
        };
        match file {
            "drivers_probe" => match take() {
                text if !text.is_empty() => self.probe(&text),
                _ => {}
            },
            "unbind" => match take() {
                text if !text.is_empty() => self.unbind(&name(place), &text),
                _ => {}
            },
            "bind" => match take() {
                text if !text.is_empty() => {
                    let driver = name(place);
                    if self.preferred(&text).as_deref() == Some(driver.as_str()) {
                        self.bind(&driver, &text);
                    }
                }
                _ => {}
            },
            TOLD => drop(fs::remove_file(&path)),
            "reset" if take() == "1" => self.resets.lock().unwrap().push(name(place)),
            _ => {}
        }
    }

    fn place(&self, function: &str) -> Option<PathBuf> {
        fs::canonicalize(self.root.join("sys/bus/pci/devices").join(function)).ok()
    }

    fn below_sys(&self, path: &Path) -> String {
        let sys = fs::canonicalize(self.root.join("sys")).expect("the stage");
        path.strip_prefix(sys).expect("below").to_str().expect("UTF-8").to_owned()
    }

    fn group(&self, function: &str) -> Option<String> {
        let link = fs::read_link(self.place(function)?.join("iommu_group")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    fn driver(&self, function: &str) -> Option<String> {
        let link = fs::read_link(self.place(function)?.join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// The override, or else what matches.
    fn preferred(&self, function: &str) -> Option<String> {
        let text = fs::read_to_string(self.place(function)?.join("driver_override")).ok()?;
        match text.lines().next().unwrap_or_default() {
            "" | "(null)" => fs::read_to_string(self.root.join("natural").join(function)).ok(),
            name => Some(name.to_owned()),
        }
    }

    fn probe(&self, function: &str) {
        if let Some(driver) = self.preferred(function)
            && self.root.join("sys/bus/pci/drivers").join(&driver).is_dir()
        {
            self.bind(&driver, function);
        }
    }

    fn bind(&self, driver: &str, function: &str) {
        let _one = self.one.lock().unwrap();
        if self.driver(function).is_some() || self.refuses.lock().unwrap().contains(&(driver.to_owned(), function.to_owned())) {
            return;
        }
        let Some(path) = self.place(function) else { return };
        let (sys, place) = (self.root.join("sys"), self.below_sys(&path));
        // Before the driver shows: a kernel makes it while the driver binds.
        if driver == VFIO && self.root.join("dev/iommu").exists() {
            let nodes = self.root.join("dev/vfio/devices");
            let number = (0..).find(|number| !nodes.join(format!("vfio{number}")).exists()).expect("a number");
            let own = path.join(format!("vfio-dev/vfio{number}"));
            put(&own.join("dev"), &format!("511:{number}\n"));
            put(&own.join("uevent"), &format!("MAJOR=511\nMINOR={number}\nDEVNAME=vfio/devices/vfio{number}\n"));
            link(&sys, &format!("{place}/vfio-dev/vfio{number}/subsystem"), "class/vfio-dev");
            let node = nodes.join(format!("vfio{number}"));
            let _ = fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(node);
        }
        link(&sys, &format!("bus/pci/drivers/{driver}/{function}"), &place);
        link(&sys, &format!("{place}/driver"), &format!("bus/pci/drivers/{driver}"));
        if let (VFIO, Some(group)) = (driver, self.group(function)) {
            std::thread::sleep(NODE_DELAY);
            let node = self.root.join("dev/vfio").join(group);
            let _ = fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(node).and_then(|mut file| file.write_all(b""));
        }
    }

    fn unbind(&self, driver: &str, function: &str) {
        let _one = self.one.lock().unwrap();
        if self.driver(function).as_deref() != Some(driver) {
            return;
        }
        let Some(path) = self.place(function) else { return };
        let group = self.group(function);
        let _ = fs::remove_file(self.root.join("sys/bus/pci/drivers").join(driver).join(function));
        for own in fs::read_dir(path.join("vfio-dev")).into_iter().flatten().flatten() {
            let _ = fs::remove_file(self.root.join("dev/vfio/devices").join(own.file_name()));
        }
        let _ = fs::remove_dir_all(path.join("vfio-dev"));
        self.settle_node(group.as_deref(), function);
        let _ = fs::remove_file(path.join("driver"));
    }

    /// The node goes with the group's last function.
    fn settle_node(&self, group: Option<&str>, without: &str) {
        let Some(group) = group else { return };
        let members = fs::read_dir(self.root.join(format!("sys/kernel/iommu_groups/{group}/devices"))).expect("the group").flatten();
        let others = members.map(|member| member.file_name().to_string_lossy().into_owned()).filter(|member| member != without);
        if !others.into_iter().any(|member| self.driver(&member).as_deref() == Some(VFIO)) {
            let _ = fs::remove_file(self.root.join("dev/vfio").join(group));
        }
    }

    fn vanish(&self, function: &str) {
        let _one = self.one.lock().unwrap();
        let path = self.place(function).expect("the function is there");
        let (group, driver) = (self.group(function), self.driver(function));
        if let Some(driver) = driver {
            let _ = fs::remove_file(self.root.join("sys/bus/pci/drivers").join(driver).join(function));
        }
        self.settle_node(group.as_deref(), function);
        if let Some(group) = group {
            let _ = fs::remove_file(self.root.join(format!("sys/kernel/iommu_groups/{group}/devices/{function}")));
        }
        let _ = fs::remove_file(self.root.join("sys/bus/pci/devices").join(function));
        let _ = fs::remove_dir_all(path);
    }
}

/// What a kernel would show in a file of the stage. An override is emptied by a line break, and shows as `(null)` then; what follows the first line is what was
/// there before.
pub fn shown(path: &Path) -> String {
    let content = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    match content.split('\n').next() {
        _ if !path.ends_with("driver_override") => content,
        None | Some("") => "(null)".into(),
        Some(line) => line.into(),
    }
}

/// An empty directory for a stage, which everybody may look at and only its owner can fill.
pub fn directory() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("diarch-stage-").tempdir().expect("a directory for the stage");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    dir
}
