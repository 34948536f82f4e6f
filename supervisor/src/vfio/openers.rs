//! Which processes have a device's nodes open. A driver does not let go of a device while somebody has: the one who asked it to would wait for ever.

use crate::host::{Host, there};
use diarch_ipc::frame::printable;
use nix::unistd::{Uid, setfsuid};
use rustix::fs::OFlags;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    /// Major and minor number.
    pub number: Option<(u32, u32)>,
}

/// A process that has one open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opener {
    pub node: String,
    pub pid: u32,
    /// What the process calls itself: for people.
    pub name: String,
}

impl fmt::Display for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {}) has {} open", printable(&self.name, 32), self.pid, self.node)
    }
}

/// The numbers of all processes. (A list of the kernel's whole `/proc` is the dearest of what is read here: it is made once for a look.)
pub fn processes(host: &Host) -> io::Result<Vec<u32>> {
    Ok(host.procfs().names("")?.iter().filter_map(|name| name.parse().ok()).collect())
}

/// Everybody of these who has one of these nodes open, each once for a node.
pub fn of(host: &Host, processes: &[u32], nodes: &[Node]) -> io::Result<Vec<Opener>> {
    all(host, processes, |text| text.starts_with('/'), |directory, file, text| found(host, nodes, directory, file, text).map(|node| node.name.clone()))
}

/// Everybody who has a function that came by its group open. Which one, the link does not say.
pub fn of_vfio_devices(host: &Host) -> io::Result<Vec<Opener>> {
    all(host, &processes(host)?, |text| text == "anon_inode:[vfio-device]", |_, _, _| Some("a device of VFIO's".to_owned()))
}

/// A process that goes away meanwhile has nothing open.
fn all(host: &Host, processes: &[u32], wanted: impl Fn(&str) -> bool, found: impl Fn(&OwnedFd, &str, &str) -> Option<String>) -> io::Result<Vec<Opener>> {
    let mut openers: Vec<Opener> = Vec::new();
    for pid in processes {
        let at = format!("{pid}/fd");
        let Some(directory) = there(host.procfs().stat(&at))? else { continue };
        // From Linux 6.2 on the size of this directory is the number of open descriptors: a thread of the kernel's has none.
        if directory.stx_size == 0 && !host.is_staged() {
            continue;
        }
        let _as_its_user = AsUser::of(directory.stx_uid);
        let Some(directory) = there(host.procfs().open(&at, OFlags::RDONLY | OFlags::DIRECTORY))? else { continue };
        for (file, text) in host.procfs().links_in(&directory, &wanted)? {
            let Some(node) = found(&directory, &file, &text) else { continue };
            if openers.iter().any(|opener| (opener.pid, &opener.node) == (*pid, &node)) {
                continue;
            }
            let name = there(host.procfs().text(&format!("{pid}/comm")))?.unwrap_or_default();
            openers.push(Opener { node, pid: *pid, name });
        }
    }
    Ok(openers)
}

/// This thread, as the file system takes it for another user's. `/proc/PID/fd` is open to the process's own user alone (mode 0500), and CAP_SYS_PTRACE does not
/// change that: it is asked for besides, to follow what is in it. With CAP_SETUID, which is there for QEMU's sake, the look needs no right to all files.
struct AsUser {
    before: Option<Uid>,
}

impl AsUser {
    fn of(owner: u32) -> Self {
        let own = owner == rustix::process::geteuid().as_raw();
        Self { before: (!own).then(|| setfsuid(Uid::from_raw(owner))) }
    }
}

impl Drop for AsUser {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            setfsuid(before);
        }
    }
}

/// By its name, or by its numbers under whatever name a container gave it.
fn found<'a>(host: &Host, nodes: &'a [Node], directory: &OwnedFd, file: &str, text: &str) -> Option<&'a Node> {
    if let Some(node) = nodes.iter().find(|node| node.name == text) {
        return Some(node);
    }
    if host.is_staged() || nodes.iter().all(|node| node.number.is_none()) {
        return None;
    }
    // Without asking the file system anew: a file on a mute one must not hold this up. One that was closed meanwhile is nobody's.
    let stat = rustix::fs::statx(directory, file, rustix::fs::AtFlags::STATX_DONT_SYNC, rustix::fs::StatxFlags::TYPE).ok()?;
    let number = (stat.stx_rdev_major, stat.stx_rdev_minor);
    nodes.iter().find(|node| node.number == Some(number))
}
