//! Namespaces of the run's own: what it leaks ends with it, what it does reaches nothing of this machine's, and all that there is can be counted.
//!
//! The machine's own PCI devices are out of sight in there: a supervisor that is asked for one finds none.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::io;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

/// Where everything of the run is: a file system in memory that nobody else sees.
const SCRATCH: &str = "/run";
/// What serves a share: virtiofsd, or a stub in its place.
const VIRTIOFSD: &str = "/usr/libexec/virtiofsd";
const PASST: &str = "/usr/bin/passt";
/// How long a device may hang until it is quarantined: longer than the second that the supervisor gives a kernel to do what it was told, and no longer than
/// it must be.
pub const STEP_SECONDS: u32 = 2;
const STUB_VIRTIOFSD: &str = "/run/virtiofsd";
/// A bridge that root made, and its address.
pub const BRIDGE: &str = "br0";
pub const ADDRESS: [u8; 4] = [192, 0, 2, 1];

/// Runs this very program again, as the first process of its own namespaces, with `arguments`. Must be called while there is one thread.
pub fn enter(arguments: &[String]) -> io::Result<ExitStatus> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC)?;
    Command::new(std::env::current_exe()?).args(arguments).env("TMPDIR", SCRATCH).stdin(Stdio::null()).status()
}

/// Has another root from now on: the tree of a Debian, of which nothing is changed, with this machine's devices and our own programs in it.
fn move_into(tree: &Path) -> io::Result<()> {
    const OVER: &str = "/mnt";
    let none: Option<&str> = None;
    let programs = std::env::current_exe()?.parent().map(Path::to_owned).ok_or(io::ErrorKind::NotFound)?;
    let tree = std::fs::canonicalize(tree)?;
    mount(Some("tmpfs"), OVER, Some("tmpfs"), MsFlags::MS_NODEV, Some("mode=755"))?;
    let at = |name: &str| Path::new(OVER).join(name);
    for name in ["upper", "work", "root"] {
        std::fs::create_dir(at(name))?;
    }
    let layers = format!("lowerdir={},upperdir={OVER}/upper,workdir={OVER}/work", tree.display());
    let root = at("root");
    mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(layers.as_str()))?;
    for shown in [Path::new("/dev"), &programs] {
        let place = root.join(shown.strip_prefix("/").unwrap_or(shown));
        std::fs::create_dir_all(&place)?;
        mount(Some(shown), &place, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    }
    // The old root lies over the new one then, and is taken off.
    std::env::set_current_dir(&root)?;
    nix::unistd::pivot_root(".", ".")?;
    nix::mount::umount2(".", nix::mount::MntFlags::MNT_DETACH)?;
    std::env::set_current_dir("/")
}

/// What is left to do inside; on the tree of another Debian, if one is given.
pub fn furnish(tree: Option<&Path>) -> io::Result<()> {
    // With who started us, everything in here goes: we are its first process.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    if let Some(tree) = tree {
        move_into(tree)?;
    }
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), plain, none)?;
    mount(Some("tmpfs"), SCRATCH, Some("tmpfs"), MsFlags::MS_NODEV, Some("mode=755"))?;
    // This network namespace's interfaces, and no PCI bus.
    mount(Some("sysfs"), "/sys", Some("sysfs"), plain, none)?;
    mount(Some("tmpfs"), "/sys/bus", Some("tmpfs"), plain, Some("mode=755"))?;
    for entry in std::fs::read_dir("/sys/devices")?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("pci") {
            mount(Some("tmpfs"), &entry.path(), Some("tmpfs"), plain, Some("mode=755"))?;
        }
    }
    // Addresses that the kernel makes by itself, now and then, would be found.
    for (what, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/disable_ipv6", "1"), ("ipv6/conf/default/disable_ipv6", "1")] {
        let path = format!("/proc/sys/net/{what}");
        match std::fs::write(&path, value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io::Error::other(format!("{path}: {error}"))),
            _ => {}
        }
    }
    let address = std::net::Ipv4Addr::from(ADDRESS);
    for line in [
        "ip link set lo up".to_owned(),
        // With an address of its own: one that has none takes the lowest of its ports'.
        format!("ip link add {BRIDGE} address 02:00:00:00:00:01 type bridge"),
        format!("ip link set {BRIDGE} up"),
        format!("ip address add {address}/24 dev {BRIDGE}"),
        // passt needs a default route, and does not mind that it leads nowhere. Of an interface that has a carrier whatever becomes of VMs.
        "ip link add wan type veth peer name far".to_owned(),
        "ip link set far up".to_owned(),
        "ip link set wan up".to_owned(),
        "ip address add 198.51.100.1/24 dev wan".to_owned(),
        "ip route add default via 198.51.100.2 dev wan".to_owned(),
        "nft add table inet somebodys; add chain inet somebodys input { type filter hook input priority 0; }; add rule inet somebodys input tcp dport 1 drop"
            .to_owned(),
    ] {
        let words: Vec<&str> = if line.starts_with("nft") { line.splitn(2, ' ').collect() } else { line.split(' ').collect() };
        if !Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).status()?.success() {
            return Err(io::Error::other(line));
        }
    }
    for directory in ["shared", "read-only"] {
        std::fs::create_dir(Path::new(SCRATCH).join(directory))?;
    }
    std::fs::copy(crate::host::binary("diarch-stub-virtiofsd"), STUB_VIRTIOFSD)?;
    // Somebody's service that is root's alone.
    let listener = std::os::unix::net::UnixListener::bind(Path::new(SCRATCH).join("service.sock"))?;
    std::thread::spawn(move || listener.incoming().for_each(drop));
    Ok(())
}

/// Programs that a VM may have besides the stub QEMU, as far as this machine has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Troupe {
    pub qemu: bool,
    pub passt: bool,
    /// The real one; a stub is always there.
    pub virtiofsd: bool,
}

impl Troupe {
    pub fn of_this_machine() -> Self {
        // Of the older one, which is written in C, there is no file of this name.
        Self { qemu: crate::need::qemu().is_some(), passt: Path::new(PASST).exists(), virtiofsd: Path::new(VIRTIOFSD).exists() }
    }

    /// As its grants.
    fn grants(self) -> String {
        let mut grants = String::new();
        if let (true, Some(qemu)) = (self.qemu, crate::need::qemu()) {
            grants += &format!("[qemu.real]\npath = {qemu:?}\n");
        }
        if self.passt {
            grants += &format!("[passt]\npath = {PASST:?}\n");
        }
        grants + &format!("[virtiofsd]\npath = {:?}\n", if self.virtiofsd { VIRTIOFSD } else { STUB_VIRTIOFSD })
    }
}

impl std::fmt::Display for Troupe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = |there, is: &'static str, is_not: &'static str| if there { is } else { is_not };
        let (qemu, passt) = (word(self.qemu, "stubs and QEMU", "stubs, no QEMU"), word(self.passt, "passt", "no passt"));
        write!(f, "{qemu}, {passt}, {}", word(self.virtiofsd, "virtiofsd", "a stub for virtiofsd"))
    }
}

/// What the run's host has, as its grants.
pub fn grants(troupe: Troupe) -> String {
    let address = std::net::Ipv4Addr::from(ADDRESS);
    let programs = troupe.grants();
    format!(
        "{programs}[network.bridged]\nbridge = \"{BRIDGE}\"\n[network.routed]\nrouted = \"10.77.0.0/20\"\nmasquerade = true\n\
         [ports]\npublish = [\"{address}:2000-2999\"]\nlisten = [\"{address}:80-82\"]\n\
         [mounts.memory]\ntmpfs_mib = 1\nwrite = true\n[mounts.directory]\ndirectory = \"{SCRATCH}/shared\"\nwrite = true\n\
         [mounts.read-only]\ndirectory = \"{SCRATCH}/read-only\"\n[sockets.service]\npath = \"{SCRATCH}/service.sock\"\n\
         [devices]\nallow = [\"0000:17:00.0\", \"0000:01:00.0\", \"0000:01:00.1\"]\nstep_seconds = {STEP_SECONDS}\n"
    )
}
