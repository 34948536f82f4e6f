//! Detached mounts: a piece of a file tree that is at no path yet, held by a descriptor and by nothing else.
//!
//! They are made by the supervisor, where errors have names, and moved into a jail's tree by its child, which can do no more than that. A descriptor that is
//! closed takes its mount with it: nothing is to be undone, and the host's own table of mounts (`/proc/self/mountinfo`) never has a line of it.

#![allow(unsafe_code)]

use nix::libc;
use rustix::fs::CWD;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, open_tree};
use std::ffi::{CStr, c_int, c_long};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// What nothing in a jail needs of a mount, unless it is said: files that give another user's rights, and device nodes.
const PLAIN: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// What is bound: which of the rights of its mount stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// To read, and to run (a library is mapped for execution).
    Read,
    /// One device node. Read-only is about the node's own owner and mode; what is written to the device reaches it.
    Node,
}

/// `struct mount_attr`, linux/mount.h (Linux 5.12).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

impl Attributes {
    pub const READ_ONLY: Attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0, propagation: 0, userns: 0 };

    /// Flags to set and to take away, and out of its peer group: what the host mounts below it later must not show.
    pub const fn private(set: u64, clear: u64) -> Self {
        Attributes { set, clear, propagation: libc::MS_PRIVATE, userns: 0 }
    }

    /// mount_setattr(2), for which rustix has no function. Makes one system call and allocates nothing: the child calls it too.
    pub fn apply(&self, dirfd: c_int, path: &CStr, flags: c_int) -> io::Result<()> {
        let size = std::mem::size_of::<Attributes>();
        // SAFETY: a string and a structure that live until the call returns, with the structure's size.
        let result = unsafe { libc::syscall(libc::SYS_mount_setattr, c_long::from(dirfd), path.as_ptr(), c_long::from(flags), std::ptr::from_ref(self), size) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// A copy of the mount that `path` is on, with `path` as its root, read-only and without what is mounted below it.
pub fn bind(path: &Path, bound: Bound) -> io::Result<OwnedFd> {
    restrict(open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?, bound)
}

/// The same of what was opened before, and checked as opened.
pub fn bind_opened(opened: BorrowedFd<'_>, bound: Bound) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    restrict(open_tree(opened, c"", flags)?, bound)
}

fn restrict(mount: OwnedFd, bound: Bound) -> io::Result<OwnedFd> {
    let set = match bound {
        Bound::Read => PLAIN | libc::MOUNT_ATTR_RDONLY,
        Bound::Node => libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_RDONLY,
    };
    // Private: a copy is of its original's peer group, and would get whatever the host mounts there later.
    let attributes = Attributes { set, clear: 0, propagation: libc::MS_PRIVATE, userns: 0 };
    attributes.apply(mount.as_raw_fd(), c"", libc::AT_EMPTY_PATH)?;
    Ok(mount)
}

/// A new tmpfs of at most `bytes` in at most `files` files, whose root belongs to `uid` with that mode.
pub fn tmpfs(bytes: u64, files: u32, uid: u32, mode: u32) -> io::Result<OwnedFd> {
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let id = uid.to_string();
    for (key, value) in [("size", bytes.to_string()), ("nr_inodes", files.to_string()), ("mode", format!("{mode:o}")), ("uid", id.clone()), ("gid", id)] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)?)
}
