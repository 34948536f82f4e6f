//! The host that is acted on: the real one, or a stage (a rehearsal, a test).
//!
//! Everything that reads or writes the host's sysfs, procfs or device nodes takes their places from here, so that vetting, ledger and audit are the same over a
//! fixture tree as over a kernel. Nothing outside such a tree is reached through it: every path is opened below the tree's root (`openat2` with `BENEATH`),
//! wherever the links on the way point. (sysfs is made of links, and all of them stay within it.) On a stage, what can't be done by an ordinary user is said
//! instead of done, and goes into the audit.

use crate::vm::jail::Walls;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, Statx, StatxFlags};
use std::fs::File;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// What a stage's root has in it, so that no real directory is taken for one.
pub const STAGE_MARKER: &str = ".diarch-stage";
/// A file of sysfs has a page; a list of mounts may be long. More than this is nobody's host.
const MAX_BYTES: usize = 64 << 20;
/// What is read at one time: more than a file of sysfs has, and the names of a directory of some hundred.
const CHUNK: usize = 16 << 10;

/// What a link says is shorter (PATH_MAX, linux/limits.h).
const MAX_LINK: usize = 4096;

/// A way that was disturbed is tried again; on a host where things are mounted all the time it may be disturbed more than once.
const TRIES: u32 = 100;

/// Where the kernel shows itself, and who we are to it.
#[derive(Debug)]
pub struct Host {
    sysfs: Tree,
    procfs: Tree,
    dev: Tree,
    run: Tree,
    staged: bool,
    /// Root, or who rehearses.
    owner: u32,
    /// None: what needs root is done.
    said: Option<Mutex<Vec<String>>>,
}

impl Host {
    /// The machine that this runs on.
    pub fn real() -> Self {
        Self::at(Path::new("/"), false)
    }

    /// A tree with the same shape under `root`: `root/sys`, `root/proc`, `root/dev`, `root/run`.
    pub fn staged(root: &Path) -> Self {
        Self::at(root, true)
    }

    fn at(root: &Path, staged: bool) -> Self {
        let tree = |name: &str, maker: Maker| Tree::at(root.join(name), maker);
        let kernels = if staged { Maker::Anybody } else { Maker::Kernel };
        let (sysfs, procfs) = (tree("sys", kernels), tree("proc", kernels));
        Self { sysfs, procfs, dev: tree("dev", Maker::Anybody), run: tree("run", Maker::Anybody), staged, owner: 0, said: None }
    }

    /// As [`Host::staged`], for a root that root names: it must say of itself that it is a stage.
    pub fn marked_stage(root: &Path) -> io::Result<Self> {
        match std::fs::symlink_metadata(root.join(STAGE_MARKER)) {
            Ok(marker) if marker.is_file() => Ok(Self::staged(&root.canonicalize()?)),
            _ => Err(io::Error::other(format!("{} has no file {STAGE_MARKER}: it is not a stage, and nothing there is touched", root.display()))),
        }
    }

    /// As [`Host::staged`], for an ordinary user who rehearses.
    pub fn rehearsed(root: &Path) -> Self {
        Self { owner: rustix::process::geteuid().as_raw(), said: Some(Mutex::default()), ..Self::staged(root) }
    }

    /// Whether this is a stage and not a machine.
    pub fn is_staged(&self) -> bool {
        self.staged
    }

    pub fn sysfs(&self) -> &Tree {
        &self.sysfs
    }

    pub fn procfs(&self) -> &Tree {
        &self.procfs
    }

    pub fn dev(&self) -> &Tree {
        &self.dev
    }

    /// For udev's records, `run/udev`.
    pub fn run(&self) -> &Tree {
        &self.run
    }

    /// Who must own what is trusted because of its owner: grants, programs.
    pub fn owner(&self) -> u32 {
        self.owner
    }

    /// Nothing is done that needs root.
    pub fn is_rehearsed(&self) -> bool {
        self.said.is_some()
    }

    /// The user that a slot's processes really have: in a rehearsal all are ours.
    pub fn user_of(&self, slots_user: u32) -> u32 {
        if self.is_rehearsed() { self.owner } else { slots_user }
    }

    /// What stands around a VM's processes.
    pub fn walls(&self) -> Walls {
        if self.is_rehearsed() { Walls::Stage } else { Walls::Jail }
    }

    /// On a stage: says what would have been done, and that it was not. `true`: that was all.
    pub fn rehearses(&self, what: impl FnOnce() -> String) -> bool {
        match &self.said {
            None => false,
            Some(said) => {
                said.lock().unwrap_or_else(PoisonError::into_inner).push(what());
                true
            }
        }
    }

    /// What was said since this was last asked.
    pub fn take_said(&self) -> Vec<String> {
        self.said.as_ref().map_or_else(Vec::new, |said| std::mem::take(&mut *said.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Who makes the names and links of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Maker {
    /// Its links lead to other places in it, but for those of `/proc/PID` that are a process's own. So what is looked at by its name, and not opened, takes one system
    /// call and no descriptor.
    Kernel,
    /// A stage, or where programs write.
    Anybody,
}

/// One of the kernel's trees.
#[derive(Debug)]
pub struct Tree {
    path: PathBuf,
    maker: Maker,
    root: OnceLock<OwnedFd>,
}

impl Deref for Tree {
    type Target = Path;
    fn deref(&self) -> &Path {
        &self.path
    }
}

impl Tree {
    /// Opened now, if it is there, so that the first look costs no descriptor that later ones don't.
    fn at(path: impl Into<PathBuf>, maker: Maker) -> Self {
        let tree = Self { path: path.into(), maker, root: OnceLock::new() };
        let _ = tree.root();
        tree
    }

    fn root(&self) -> io::Result<&OwnedFd> {
        if let Some(root) = self.root.get() {
            return Ok(root);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(CWD, &self.path, flags, Mode::empty())?;
        Ok(self.root.get_or_init(|| opened))
    }

    /// Opens what is below the root, whatever links lead there.
    pub fn open(&self, below: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        // With O_PATH, openat2 takes no flag that means nothing.
        let flags = if flags.contains(OFlags::PATH) { flags } else { flags | OFlags::NOCTTY };
        let below = if below.is_empty() { "." } else { below };
        for _ in 1..TRIES {
            match rustix::fs::openat2(self.root()?, below, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // Something was renamed or mounted, anywhere, while a `..` was followed.
                Err(rustix::io::Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
        Ok(rustix::fs::openat2(self.root()?, below, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    /// A file's content.
    pub fn read(&self, below: &str) -> io::Result<Vec<u8>> {
        let file = self.open(below, OFlags::RDONLY)?;
        let mut content = Vec::with_capacity(CHUNK);
        loop {
            content.reserve(CHUNK);
            match rustix::io::read(&file, rustix::buffer::spare_capacity(&mut content)) {
                Ok(0) => return Ok(content),
                Ok(_) if content.len() <= MAX_BYTES => {}
                Ok(_) => return Err(io::Error::other(format!("{below} is longer than {MAX_BYTES} bytes"))),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The first `count` bytes of a file: of a device's config space, each further one is a cycle on its bus.
    pub fn read_start(&self, below: &str, count: usize) -> io::Result<Vec<u8>> {
        let mut content = vec![0; count];
        let got = rustix::io::pread(&self.open(below, OFlags::RDONLY)?, &mut content, 0)?;
        content.truncate(got);
        Ok(content)
    }

    /// A file's text without the line break at its end.
    pub fn text(&self, below: &str) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&self.read(below)?).trim_end().to_owned())
    }

    /// Writes a file that is there, in one go, as the kernel wants it. Nothing is cut off before: on a stage, a death in between would leave what no kernel shows.
    pub fn write(&self, below: &str, text: &str) -> io::Result<()> {
        File::from(self.open(below, OFlags::WRONLY)?).write_all(text.as_bytes())
    }

    /// The names in a directory, in order, each with what it is. (Names that are not UTF-8 are none of the kernel's.)
    pub fn entries(&self, below: &str) -> io::Result<Vec<(String, FileType)>> {
        let directory = self.open(below, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut names = Vec::new();
        let mut buffer = Vec::with_capacity(CHUNK);
        let mut entries = RawDir::new(&directory, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            if let Ok(name) = entry.file_name().to_str()
                && name != "."
                && name != ".."
            {
                names.push((name.to_owned(), entry.file_type()));
            }
        }
        names.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(names)
    }

    /// The links in a directory whose text is wanted, each with its name.
    pub fn links_in(&self, directory: &OwnedFd, wanted: impl Fn(&str) -> bool) -> io::Result<Vec<(String, String)>> {
        let mut links = Vec::new();
        let (mut buffer, mut text) = (Vec::with_capacity(CHUNK), [MaybeUninit::<u8>::uninit(); MAX_LINK]);
        let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            // One name, and no way: whoever made the directory, it is this directory's.
            let text = match rustix::fs::readlinkat_raw(directory, entry.file_name(), &mut text) {
                // No link: `.` and `..`, say.
                Err(rustix::io::Errno::INVAL) => continue,
                read => there(read.map_err(io::Error::from))?,
            };
            let Some((text, _)) = text else { continue };
            let text = String::from_utf8_lossy(text);
            if let (true, Ok(name)) = (wanted(&text), entry.file_name().to_str()) {
                links.push((name.to_owned(), text.into_owned()));
            }
        }
        Ok(links)
    }

    /// How many directories are in a directory, whatever is shown of them: the kernel counts one link for each, and two for itself (kernfs; where a file system counts
    /// otherwise, 0).
    pub fn directories(&self, below: &str) -> io::Result<u64> {
        let links = rustix::fs::fstat(self.open(below, OFlags::RDONLY | OFlags::DIRECTORY)?)?.st_nlink;
        Ok(links.saturating_sub(2))
    }

    pub fn names(&self, below: &str) -> io::Result<Vec<String>> {
        Ok(self.entries(below)?.into_iter().map(|(name, _)| name).collect())
    }

    /// What a link says. It is not followed.
    pub fn link(&self, below: &str) -> io::Result<String> {
        let text = match self.maker {
            Maker::Kernel => rustix::fs::readlinkat(self.root()?, below, Vec::new()),
            Maker::Anybody => rustix::fs::readlinkat(self.open(below, OFlags::PATH | OFlags::NOFOLLOW)?, c"", Vec::new()),
        };
        match text {
            Ok(text) => Ok(text.to_string_lossy().into_owned()),
            // It is no link. For an empty path that is ENOENT (readlinkat(2)).
            Err(rustix::io::Errno::INVAL) => Err(io::Error::from_raw_os_error(nix::libc::ENOENT)),
            Err(error) => Err(error.into()),
        }
    }

    /// The last part of what a link says: in sysfs, the name of what it leads to.
    pub fn link_name(&self, below: &str) -> io::Result<String> {
        let link = self.link(below)?;
        Ok(link.rsplit('/').next().unwrap_or_default().to_owned())
    }

    /// Where a path leads to, below the root and free of links.
    pub fn resolve(&self, below: &str) -> io::Result<String> {
        let name = |fd: &OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let (found, root) = (name(&self.open(below, OFlags::PATH)?)?, name(self.root()?)?);
        match found.strip_prefix(&root).ok().and_then(Path::to_str) {
            Some(path) => Ok(path.to_owned()),
            None => Err(io::Error::other(format!("{below} leads out of {}", self.path.display()))),
        }
    }

    /// What is there, a link as a link; nothing is opened by it but the name.
    pub fn stat(&self, below: &str) -> io::Result<Statx> {
        let wanted = StatxFlags::TYPE | StatxFlags::UID | StatxFlags::SIZE;
        Ok(match self.maker {
            Maker::Kernel => rustix::fs::statx(self.root()?, below, AtFlags::SYMLINK_NOFOLLOW, wanted),
            Maker::Anybody => rustix::fs::statx(self.open(below, OFlags::PATH | OFlags::NOFOLLOW)?, c"", AtFlags::EMPTY_PATH, wanted),
        }?)
    }

    pub fn file_type(&self, below: &str) -> io::Result<FileType> {
        Ok(FileType::from_raw_mode(self.stat(below)?.stx_mode.into()))
    }

    pub fn exists(&self, below: &str) -> io::Result<bool> {
        Ok(there(self.stat(below))?.is_some())
    }
}

/// `None` for what is not there, or not any more. Every other error stays one: "can't look" is not "is not there".
pub fn there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    use nix::libc::{ENODEV, ENOENT, ENOTDIR, ESRCH};
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.raw_os_error(), Some(ENOENT | ENODEV | ENOTDIR | ESRCH)) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn nothing_outside_of_a_stage_is_reached_through_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("sys/devices/a")).unwrap();
        std::fs::write(dir.path().join("secret"), "x").unwrap();
        std::fs::write(dir.path().join("sys/devices/a/vendor"), "0x10de\n").unwrap();
        let sys = dir.path().join("sys");
        symlink("devices/a", sys.join("inside")).unwrap();
        symlink("../secret", sys.join("outside")).unwrap();
        symlink("/etc", sys.join("absolute")).unwrap();
        let host = Host::staged(dir.path());
        assert_eq!(host.sysfs().text("inside/vendor").unwrap(), "0x10de");
        assert_eq!(host.sysfs().resolve("inside").unwrap(), "devices/a");
        assert_eq!(host.sysfs().link("outside").unwrap(), "../secret", "a link can be looked at");
        for way in ["outside", "absolute/passwd", "../secret", "/etc/passwd", "inside/../../../secret"] {
            assert_eq!(host.sysfs().read(way).unwrap_err().raw_os_error(), Some(nix::libc::EXDEV), "{way}");
            host.sysfs().write(way, "y").unwrap_err();
        }
        assert_eq!(std::fs::read_to_string(dir.path().join("secret")).unwrap(), "x");
    }

    #[test]
    fn a_directory_that_is_not_marked_is_no_stage() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Host::marked_stage(dir.path()).unwrap_err().to_string().contains("not a stage"));
        assert!(Host::marked_stage(Path::new("/")).is_err());
        std::fs::write(dir.path().join(STAGE_MARKER), "").unwrap();
        assert!(Host::marked_stage(dir.path()).unwrap().is_staged());
    }

    #[test]
    fn what_is_not_there_is_told_from_what_can_not_be_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("sys/loop")).unwrap();
        symlink("loop", dir.path().join("sys/loop/loop")).unwrap();
        symlink("a", dir.path().join("sys/a")).unwrap();
        let host = Host::staged(dir.path());
        assert!(there(host.sysfs().read("nothing")).unwrap().is_none());
        there(host.sysfs().read("a")).unwrap_err();
    }
}
