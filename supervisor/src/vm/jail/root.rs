//! The root of a jail: a tree of its own that holds what was put there, and nothing else of the host.
//!
//! ```text
//!   /                        tmpfs, read-only once all is in place
//!     usr/lib ...            the host's, read-only: what the program is linked to, and reads
//!     lib -> usr/lib         as on the host
//!     etc/ld.so.cache        where the dynamic linker finds it
//!     dev/null ...           single nodes of the host's
//!     proc                   of its own process namespace: only its own processes, and nothing of the kernel's (subset=pid)
//!     run/vm                 tmpfs of its own user: the only place to write
//! ```
//!
//! Whoever starts a program says what is in it ([`Root`]); [`Root::build`] makes the mounts, detached; the child moves them into place.

use super::mount::{self, Bound};
use diarch_ipc::Error;
use rustix::fs::{FileType, Mode, OFlags, fchmod, fstat, mkdirat, openat, symlinkat};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// The tree itself holds directories, links and empty files to mount on.
const TREE_BYTES: u64 = 1024 * 1024;
const TREE_FILES: u32 = 1024;
/// Files in a program's own directory at most.
const OWN_FILES: u32 = 4096;

/// What the dynamic linker and its libraries are on: Debian and Fedora have the first two, and links to them from the root.
const LIBRARIES: [&str; 4] = ["/usr/lib", "/usr/lib64", "/lib", "/lib64"];
/// Nodes that any program may count on, and that lead nowhere.
const NODES: [&str; 5] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];

#[derive(Debug)]
enum What {
    /// A directory or file of the host's, read-only.
    Host(PathBuf),
    /// The same, opened and checked by somebody before.
    Opened(OwnedFd),
    /// A detached mount, as it is.
    Mount(OwnedFd),
    Node(PathBuf),
    Link(PathBuf),
    Empty,
    Own {
        uid: u32,
        bytes: u64,
    },
    Proc,
}

#[derive(Debug)]
struct Entry {
    at: PathBuf,
    what: What,
}

/// What is in the tree, in the order in which it is mounted.
#[derive(Debug, Default)]
pub struct Root {
    entries: Vec<Entry>,
}

impl Root {
    /// What a dynamically linked program needs to start: its libraries, the harmless devices, and its `/proc`.
    pub fn of_a_program() -> Self {
        let mut root = Root::default();
        for path in LIBRARIES.map(Path::new) {
            match std::fs::read_link(path) {
                Ok(target) => root.put(path, What::Link(target)),
                Err(_) if path.is_dir() => root.put(path, What::Host(path.into())),
                Err(_) => {}
            }
        }
        root = root.host_if_there("/etc/ld.so.cache");
        for node in NODES {
            root = root.node(node);
        }
        root.put("/proc", What::Proc);
        root
    }

    /// For a program that looks at a file of the kernel's own (`/proc/sys/...`), which its `/proc` has not: that is then elsewhere, with links to what programs use of
    /// it, and the file is where it is looked for.
    pub fn kernel_file(mut self, path: &str) -> Self {
        for entry in self.entries.iter_mut().filter(|entry| matches!(entry.what, What::Proc)) {
            entry.at = "/processes".into();
        }
        for own in ["self", "thread-self"] {
            self.put(format!("/proc/{own}"), What::Link(format!("/processes/{own}").into()));
        }
        self.host_if_there(path)
    }

    fn put(&mut self, at: impl Into<PathBuf>, what: What) {
        self.entries.push(Entry { at: at.into(), what });
    }

    /// A directory or file of the host's at its own path, read-only; nothing, where the host has none.
    pub fn host_if_there(self, path: &str) -> Self {
        self.host_as(path, path)
    }

    /// The same at another path; a link on the host's side is followed.
    pub fn host_as(mut self, at: &str, host: &str) -> Self {
        if Path::new(host).exists() {
            self.put(at, What::Host(host.into()));
        }
        self
    }

    /// What was opened before, read-only.
    pub fn opened(mut self, at: impl Into<PathBuf>, opened: OwnedFd) -> Self {
        self.put(at, What::Opened(opened));
        self
    }

    /// A detached mount. Its attributes are the caller's: `nosuid` and `nodev` must be among them.
    pub fn mount(mut self, at: impl Into<PathBuf>, mount: OwnedFd) -> Self {
        self.put(at, What::Mount(mount));
        self
    }

    /// A device node of the host's. Whether it can be opened is decided by its mode, the program's groups and its control group.
    pub fn node(mut self, path: &str) -> Self {
        self.put(path, What::Node(path.into()));
        self
    }

    /// A directory with nothing in it.
    pub fn empty(mut self, at: impl Into<PathBuf>) -> Self {
        self.put(at, What::Empty);
        self
    }

    /// A directory that the user may write: in memory, and gone with the program.
    pub fn own(mut self, at: &str, uid: u32, bytes: u64) -> Self {
        self.put(at, What::Own { uid, bytes });
        self
    }

    /// Makes all of it, but for what only the child can make.
    pub(super) fn build(self) -> Result<Tree, Error> {
        let step = |name: &str, error: io::Error| Error::io(format!("the jail's {name}"), &error);
        let root = mount::tmpfs(TREE_BYTES, TREE_FILES, 0, 0o755).map_err(|e| step("root", e))?;
        let mut parts = Vec::with_capacity(self.entries.len());
        for Entry { at, what } in self.entries {
            let name = at.display().to_string();
            let failed = |error: io::Error| step(&name, error);
            let at = below(&at).map_err(failed)?;
            let made = match what {
                What::Host(path) => Made::Mount(mount::bind(&path, Bound::Read).map_err(failed)?),
                What::Opened(opened) => Made::Mount(mount::bind_opened(opened.as_fd(), Bound::Read).map_err(failed)?),
                What::Mount(mount) => Made::Mount(mount),
                What::Node(path) => Made::Mount(node(&path).map_err(failed)?),
                What::Own { uid, bytes } => Made::Mount(mount::tmpfs(bytes, OWN_FILES, uid, 0o700).map_err(failed)?),
                What::Proc => Made::Proc,
                What::Empty => {
                    directories(&root, Some(&at)).map_err(failed)?;
                    continue;
                }
                What::Link(target) => {
                    directories(&root, at.parent()).map_err(failed)?;
                    symlinkat(&target, &root, &at).map_err(|e| failed(e.into()))?;
                    continue;
                }
            };
            let directory = match &made {
                Made::Mount(mount) => FileType::from_raw_mode(fstat(mount).map_err(|e| failed(e.into()))?.st_mode) == FileType::Directory,
                Made::Proc => true,
            };
            stand(&root, &at, directory).map_err(failed)?;
            let at = CString::new(at.into_os_string().into_encoded_bytes()).map_err(|e| failed(e.into()))?;
            parts.push(Part { name, at, made });
        }
        Ok(Tree { root, parts })
    }
}

/// A tree whose mounts lie ready.
#[derive(Debug)]
pub(super) struct Tree {
    pub root: OwnedFd,
    pub parts: Vec<Part>,
}

/// One mount of it.
#[derive(Debug)]
pub(super) struct Part {
    /// For the sentence when it fails.
    pub name: String,
    /// Below the root, without the slash.
    pub at: CString,
    pub made: Made,
}

#[derive(Debug)]
pub(super) enum Made {
    Mount(OwnedFd),
    /// It shows the process namespace of whoever makes it, so the child does.
    Proc,
}

/// `/a/b` as `a/b`; what climbs or is relative is refused.
fn below(at: &Path) -> io::Result<PathBuf> {
    let mut parts = at.components();
    let rooted = parts.next() == Some(Component::RootDir);
    let below = parts.as_path();
    if rooted && !below.as_os_str().is_empty() && below.components().all(|part| matches!(part, Component::Normal(_))) {
        Ok(below.to_owned())
    } else {
        Err(io::Error::other("a path in a jail is absolute, plain and not the root"))
    }
}

/// The directories down to `path`; one that is there stays.
fn directories(root: &OwnedFd, path: Option<&Path>) -> io::Result<()> {
    let mut ancestors: Vec<&Path> = path.into_iter().flat_map(Path::ancestors).filter(|path| !path.as_os_str().is_empty()).collect();
    ancestors.reverse();
    for directory in ancestors {
        match mkdirat(root, directory, Mode::from_raw_mode(0o755)) {
            // The supervisor's mask would have taken the others' rights away.
            Ok(()) => rustix::fs::chmodat(root, directory, Mode::from_raw_mode(0o755), rustix::fs::AtFlags::empty())?,
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Something to mount on: a directory, or an empty file.
fn stand(root: &OwnedFd, at: &Path, directory: bool) -> io::Result<()> {
    if directory {
        return directories(root, Some(at));
    }
    directories(root, at.parent())?;
    let file = openat(root, at, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(fchmod(file, Mode::from_raw_mode(0o444))?)
}

/// A mount of this node alone. What is there and is no device (a file that somebody put where a driver is missing) is refused.
fn node(path: &Path) -> io::Result<OwnedFd> {
    let mount = mount::bind(path, Bound::Node)?;
    match FileType::from_raw_mode(fstat(&mount)?.st_mode) {
        FileType::CharacterDevice => Ok(mount),
        other => Err(io::Error::other(format!("it is no character device but {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_a_jail_is_absolute_and_plain() {
        assert_eq!(below(Path::new("/run/vm")).unwrap(), Path::new("run/vm"));
        for bad in ["/", "", "run", "/run/../etc", "../x", "/.."] {
            below(Path::new(bad)).unwrap_err();
        }
    }

    #[test]
    fn a_file_where_a_device_should_be_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return; // mounts are root's
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(node(file.path()).unwrap_err().to_string().contains("no character device"));
        node(Path::new("/dev/null")).unwrap();
    }
}
