//! The mount itself: made by descriptor, with flags that no request and no grant can take away.

use super::image;
use crate::grants::{ImageType, Source};
use crate::host::Host;
use crate::ledger::MountKind;
use crate::path::{self, Found};
use crate::vetted::Vetted;
use crate::vm::jail::mount::Attributes;
use diarch_ipc::Error;
use diarch_ipc::name::{ShareName, Slot};
use diarch_ipc::spec::DiskAccess;
use rustix::fs::{CWD, FileType, Mode, OFlags, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, mount_change, move_mount, open_tree,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// No set-id bit counts, no device node opens, nothing is executed, and no link is followed: a guest resolves its own.
const ALWAYS: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC)
    .union(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW);
/// Inodes of a tmpfs for each MiB: one costs the kernel about 1 KiB, which its size does not count.
const INODES_PER_MIB: u64 = 64;
/// A small one may still hold some files.
const LEAST_INODES: u64 = 1024;

/// What is to be mounted, vetted.
#[derive(Debug)]
pub struct Order {
    pub slot: Slot,
    pub share: ShareName,
    pub source: Source,
    pub access: DiskAccess,
    /// Who fills a tmpfs.
    pub worker: u32,
    /// The VM's user, and its group by the same number.
    pub uid: u32,
    /// Where a rehearsal keeps what would have been a tmpfs.
    pub directory: PathBuf,
}

impl Order {
    /// The section of the grants, as refusals name it.
    pub fn grant(&self) -> String {
        format!("mounts.{}", self.share)
    }
    pub fn kind(&self) -> MountKind {
        kind(&self.source)
    }
}

pub const fn kind(source: &Source) -> MountKind {
    match source {
        Source::Directory(_) => MountKind::Directory,
        Source::Tmpfs { .. } => MountKind::Tmpfs,
        Source::Image { .. } => MountKind::Image,
    }
}

/// Makes the mount. It is gone when the last descriptor of it is closed.
pub fn make(order: Vetted<Order>, host: &Host) -> Result<OwnedFd, Error> {
    let order = order.into_inner();
    let grant = order.grant();
    let found = |path: &Path| path::walk(path, &[host.owner()]).map_err(|stray| stray.under(&grant));
    let rehearsed = || host.rehearses(|| format!("mount {grant} for slot {} ({:?})", order.slot, order.access));
    match &order.source {
        Source::Directory(path) => {
            let found = found(path)?;
            if found.kind != FileType::Directory {
                return Err(Error::denied(&grant, format!("{} is not a directory", path.display())));
            }
            if rehearsed() { Ok(found.fd) } else { directory(found, order.access).map_err(|error| Error::io(format!("mount {grant}"), &error)) }
        }
        Source::Image { path, kind } => {
            let image = image::open(path, found(path)?, *kind, &grant, host.owner())?;
            if rehearsed() { Ok(image) } else { of_image(&image, *kind, host, &grant) }
        }
        Source::Tmpfs { .. } if rehearsed() => stand_in(&order).map_err(|error| Error::io(format!("make {grant}"), &error)),
        Source::Tmpfs { mib } => tmpfs(*mib, order.worker, order.uid, order.access).map_err(|error| Error::io(format!("mount {grant}"), &error)),
    }
}

/// This directory and what is in it; not what else is mounted below it.
fn directory(found: Found, access: DiskAccess) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(&found.fd, c"", flags)?;
    let (set, clear) = match access {
        DiskAccess::ReadOnly => (ALWAYS | MountAttrFlags::MOUNT_ATTR_RDONLY, MountAttrFlags::empty()),
        // The supervisor's unit sees the whole host read-only (ProtectSystem=strict), and a copy of such a mount is read-only as well.
        DiskAccess::ReadWrite => (ALWAYS, MountAttrFlags::MOUNT_ATTR_RDONLY),
    };
    Attributes::private(set.bits().into(), clear.bits().into()).apply(mount.as_raw_fd(), c"", nix::libc::AT_EMPTY_PATH)?;
    Ok(mount)
}

/// A new and empty file system in memory. The worker fills it, and the VM's user reads it by its group, which files in it inherit (the set-group-id bit).
fn tmpfs(mib: u32, worker: u32, vm: u32, access: DiskAccess) -> io::Result<OwnedFd> {
    let new = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let inodes = (u64::from(mib) * INODES_PER_MIB).max(LEAST_INODES);
    // Open to others, of whom none has a way to it: root is one, without the capabilities that would make it more (CAP_DAC_OVERRIDE).
    let mode = match access {
        DiskAccess::ReadOnly => "2755",
        DiskAccess::ReadWrite => "2775",
    };
    for (key, value) in [("size", format!("{mib}m")), ("nr_inodes", inodes.to_string()), ("uid", worker.to_string()), ("gid", vm.to_string())] {
        fsconfig_set_string(&new, key, value)?;
    }
    fsconfig_set_string(&new, "mode", mode)?;
    // As a guest's memory, it is not written to a disk of the host: it is where secrets go.
    fsconfig_set_flag(&new, "noswap")?;
    fsconfig_create(&new)?;
    Ok(fsmount(&new, FsMountFlags::FSMOUNT_CLOEXEC, ALWAYS)?)
}

fn of_image(image: &OwnedFd, kind: ImageType, host: &Host, grant: &str) -> Result<OwnedFd, Error> {
    // From Linux 6.12 on erofs reads the file itself; others, and older ones, want a block device.
    let mounted = match kind {
        ImageType::Erofs => read_only(kind, &path::of(image)),
        ImageType::Squashfs => Err(Unmounted::NeedsDevice),
    };
    match mounted {
        Err(Unmounted::NeedsDevice) => {
            let device = image::loop_device(image, host).map_err(|error| no_device(grant, &error))?;
            read_only(kind, &device.path).map_err(|unmounted| unmounted.under(kind, grant))
        }
        other => other.map_err(|unmounted| unmounted.under(kind, grant)),
    }
}

fn no_device(grant: &str, error: &io::Error) -> Error {
    let detail = match error.raw_os_error() {
        // The control group's list of devices.
        Some(nix::libc::EPERM) => format!("{error}; the driver was not there when the supervisor's unit started: modprobe loop, and restart diarch-supervisor"),
        Some(nix::libc::ENOENT | nix::libc::ENODEV) => {
            return Error::Unsupported { missing: format!("loop devices, for {grant} in the grants (modprobe loop)") };
        }
        _ => error.to_string(),
    };
    Error::Failed { step: format!("a loop device for {grant}"), errno: error.raw_os_error(), detail }
}

enum Unmounted {
    NeedsDevice,
    Refused { error: io::Error, said: String },
}

impl Unmounted {
    fn under(self, kind: ImageType, grant: &str) -> Error {
        let (errno, detail) = match self {
            Unmounted::NeedsDevice => (Some(nix::libc::ENOTBLK), "the kernel takes no loop device for it".to_owned()),
            Unmounted::Refused { error, said } if error.raw_os_error() == Some(nix::libc::ENODEV) => {
                return Error::Unsupported { missing: format!("the file system {} in this kernel ({grant} in the grants){said}", kind.as_str()) };
            }
            Unmounted::Refused { error, said } => {
                (error.raw_os_error(), format!("the kernel finds no sound {} in the image: {error}{said}; make it anew", kind.as_str()))
            }
        };
        Error::Failed { step: format!("mount {grant}"), errno, detail }
    }
}

fn read_only(kind: ImageType, source: &str) -> Result<OwnedFd, Unmounted> {
    let plain = |error: rustix::io::Errno| Unmounted::Refused { error: error.into(), said: String::new() };
    let new = fsopen(kind.as_str(), FsOpenFlags::FSOPEN_CLOEXEC).map_err(plain)?;
    fsconfig_set_string(&new, "source", source).map_err(plain)?;
    fsconfig_set_flag(&new, "ro").map_err(plain)?;
    fsconfig_create(&new).map_err(|error| match error {
        rustix::io::Errno::NOTBLK => Unmounted::NeedsDevice,
        error => Unmounted::Refused { error: error.into(), said: said(&new) },
    })?;
    fsmount(&new, FsMountFlags::FSMOUNT_CLOEXEC, ALWAYS | MountAttrFlags::MOUNT_ATTR_RDONLY).map_err(plain)
}

/// What the kernel had to say about a mount that failed; each read gives one line, until there is none.
fn said(new: &OwnedFd) -> String {
    let mut text = String::new();
    let mut line = [0u8; 512];
    while text.len() < 1024 {
        let Ok(length) = rustix::io::read(new, &mut line) else { break };
        let told = String::from_utf8_lossy(&line[..length]);
        text += &format!(" ({})", told.trim_end().trim_start_matches(['e', 'w', 'i']).trim_start());
    }
    text
}

/// In a rehearsal: a directory in the slot's own, which goes with it.
fn stand_in(order: &Order) -> io::Result<OwnedFd> {
    let path = order.directory.join(format!("tmpfs-{}", order.share));
    match std::fs::create_dir(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    Ok(rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// A mount for one use: what is moved into a jail's tree ends with that jail.
pub struct Copy {
    pub mount: OwnedFd,
    /// To be held from now on; none: what was held is as it was.
    pub instead: Option<OwnedFd>,
}

/// Copies a held mount, with its flags.
///
/// From Linux 6.15 on a mount that is in no tree can be copied where it was made. Before, and for a supervisor that was restarted, it has to be in a tree of the caller's:
/// that is one for this moment, of which nothing is left. What was held is used up by it, and a second copy takes its place.
pub fn copy(held: &OwnedFd) -> io::Result<Copy> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    match open_tree(held, c"", flags) {
        Ok(mount) => Ok(Copy { mount, instead: None }),
        Err(rustix::io::Errno::INVAL) => copy_in_a_tree(held),
        Err(error) => Err(error.into()),
    }
}

/// Where a mount is put for a moment. Nothing else looks at it in that tree.
const STEPPING_STONE: &std::ffi::CStr = c"/proc";

fn copy_in_a_tree(held: &OwnedFd) -> io::Result<Copy> {
    let copied = std::thread::scope(|scope| {
        // A mount namespace is for the calling thread: this one ends with it.
        let work = || -> io::Result<Copy> {
            own_tree()?;
            move_mount(held, c"", CWD, STEPPING_STONE, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            let copy = || open_tree(CWD, STEPPING_STONE, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC);
            Ok(Copy { mount: copy()?, instead: Some(copy()?) })
        };
        scope.spawn(work).join()
    });
    copied.unwrap_or_else(|_| Err(io::Error::other("the thread panicked; its message is in the journal")))
}

/// A mount namespace of this thread's own, from which nothing gets back to where it was copied from.
#[allow(unsafe_code)]
fn own_tree() -> io::Result<()> {
    // SAFETY: without CLONE_FILES no descriptor changes its owner; the thread's directory and root become its own, and it uses neither afterwards.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
    mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    Ok(())
}

/// The root of a held tmpfs, opened for whoever fills it.
pub fn root(mount: &OwnedFd) -> io::Result<OwnedFd> {
    Ok(openat(mount, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// As root only: anybody else mounts nothing.
    fn made() -> Option<OwnedFd> {
        rustix::process::geteuid().is_root().then(|| tmpfs(1, 0, 0, DiskAccess::ReadWrite).unwrap())
    }
    fn write(mount: &OwnedFd, name: &str) {
        let file = openat(mount, name, OFlags::WRONLY | OFlags::CREATE, Mode::from_raw_mode(0o600)).unwrap();
        std::fs::File::from(file).write_all(name.as_bytes()).unwrap();
    }
    fn text(mount: &OwnedFd, name: &str) -> String {
        let mut text = String::new();
        std::fs::File::from(openat(mount, name, OFlags::RDONLY, Mode::empty()).unwrap()).read_to_string(&mut text).unwrap();
        text
    }
    /// Into the tree of a thread that ends: as a jail does.
    fn used_up(mount: &OwnedFd) -> io::Result<()> {
        std::thread::scope(|scope| {
            let work = || -> io::Result<()> {
                own_tree()?;
                Ok(move_mount(mount, c"", CWD, STEPPING_STONE, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
            };
            scope.spawn(work).join().unwrap()
        })
    }

    #[test]
    fn a_mount_serves_one_jail_after_another_with_the_same_content_and_flags() {
        let Some(mut held) = made() else { return };
        let before = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        write(&held, "key");
        for _ in 0..3 {
            for copy in [copy, copy_in_a_tree] {
                let Copy { mount, instead } = copy(&held).unwrap();
                held = instead.unwrap_or(held);
                assert_eq!((text(&mount, "key"), text(&held, "key")), ("key".into(), "key".into()));
                let flags = rustix::fs::fstatvfs(&mount).unwrap().f_flag;
                assert!(flags.contains(rustix::fs::StatVfsMountFlags::NOSUID | rustix::fs::StatVfsMountFlags::NODEV | rustix::fs::StatVfsMountFlags::NOEXEC));
                used_up(&mount).unwrap();
                used_up(&mount).unwrap_err();
            }
        }
        assert_eq!(std::fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
    }
}
