//! Namespaces of the run's own: what it leaks ends with it, what it does reaches nothing of this machine's, and all that there is can be counted.
//!
//! The machine's own PCI devices are out of sight in there: a supervisor that is asked for one finds none.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::io;
use std::process::{Command, ExitStatus, Stdio};

/// Where everything of the run is: a file system in memory that nobody else sees.
const SCRATCH: &str = "/run";

/// Runs this very program again, as the first process of its own namespaces, with `arguments`. Must be called while there is one thread.
pub fn enter(arguments: &[String]) -> io::Result<ExitStatus> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC)?;
    Command::new(std::env::current_exe()?).args(arguments).env("TMPDIR", SCRATCH).stdin(Stdio::null()).status()
}

/// What is left to do inside.
pub fn furnish() -> io::Result<()> {
    // With who started us, everything in here goes: we are its first process.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
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
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).stdin(Stdio::null()).status()?;
    if up.success() { Ok(()) } else { Err(io::Error::other("ip link set lo up")) }
}
