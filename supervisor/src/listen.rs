//! The listening socket: systemd's, or our own where nothing activates us.

use crate::grants::GrantsError;
use crate::mount::store;
use interprocess::local_socket::tokio::{Listener, prelude::*};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The connections that wait while the supervisor is respawned.
const BACKLOG: i32 = 64;

/// What systemd passed on.
#[derive(Debug, Default)]
pub struct Inherited {
    pub socket: Option<OwnedFd>,
    /// What an earlier supervisor gave it to keep.
    pub stored: Vec<Stored>,
}

/// A descriptor out of the store, with the name that it was kept under.
#[derive(Debug)]
pub struct Stored {
    pub name: String,
    pub fd: OwnedFd,
}

/// Takes what systemd (`LISTEN_FDS`, `LISTEN_FDNAMES`, sd_listen_fds(3)) passed on. Must be called before any thread exists.
#[allow(unsafe_code)]
pub fn inherited() -> io::Result<Inherited> {
    let mut inherited = Inherited::default();
    for (fd, name) in sd_notify::listen_fds_with_names()? {
        // SAFETY: LISTEN_PID names this process, so this descriptor is ours by protocol, and nothing else here has taken it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if name.starts_with(store::PREFIX) {
            inherited.stored.push(Stored { name, fd });
        } else if inherited.socket.is_none() {
            check(&fd)?;
            inherited.socket = Some(fd);
        } else {
            return Err(io::Error::other("more than one socket was passed on; one is needed (ListenSequentialPacket=)"));
        }
    }
    Ok(inherited)
}

fn check(socket: &OwnedFd) -> io::Result<()> {
    let wrong = |what: &str| io::Error::other(format!("the socket that was passed on is not {what} (ListenSequentialPacket=)"));
    if sockopt::socket_domain(socket)? != AddressFamily::UNIX {
        return Err(wrong("a UNIX socket"));
    }
    if sockopt::socket_type(socket)? != SocketType::SEQPACKET {
        return Err(wrong("a SEQPACKET socket"));
    }
    if !sockopt::socket_acceptconn(socket)? {
        return Err(wrong("listening"));
    }
    rustix::io::ioctl_fionbio(socket, true)?;
    rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::CLOEXEC)?;
    Ok(())
}

/// Makes the socket: root's, with the worker's group, mode 0660 from its first moment on. A stale one is replaced.
pub fn own(path: &Path, group: u32) -> io::Result<OwnedFd> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::other(format!("{} is there and is not a socket", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    // bind(2) makes the file with 0777 less the umask; no thread exists yet that could see this umask.
    let before = rustix::process::umask(Mode::from_raw_mode(0o117));
    let bound = bind(&socket, &SocketAddrUnix::new(path)?);
    rustix::process::umask(before);
    bound?;
    rustix::fs::chown(path, None, Some(rustix::fs::Gid::from_raw(group)))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Makes the run directory where it is missing, and refuses one that others can write.
pub fn run_directory(path: &Path) -> Result<(), GrantsError> {
    let io = |error| GrantsError::Io { path: path.to_owned(), error };
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(io)?;
    let meta = std::fs::symlink_metadata(path).map_err(io)?;
    let untrusted = |reason: &str| Err(GrantsError::Untrusted { path: path.to_owned(), reason: reason.into(), mend: "remove it, and it is made anew".into() });
    if !meta.is_dir() {
        return untrusted("is not a directory");
    }
    if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o022 != 0 {
        return untrusted("belongs to somebody else or can be written by others");
    }
    Ok(())
}

/// Where a listening socket can be reached.
pub fn path(socket: &OwnedFd) -> io::Result<PathBuf> {
    let name = SocketAddrUnix::try_from(rustix::net::getsockname(socket)?)?;
    let path = name.path().ok_or_else(|| io::Error::other("the socket that was passed on has no path"))?;
    Ok(PathBuf::from(OsStr::from_bytes(path.to_bytes())))
}

/// Hands the socket to the runtime. `interprocess` takes a SEQPACKET listener as it is; see docs/DEPENDENCIES.md.
pub fn listener(socket: OwnedFd) -> io::Result<Listener> {
    rustix::io::ioctl_fionbio(socket.as_fd(), true)?;
    let listener = interprocess::os::unix::uds_local_socket::tokio::Listener::try_from(socket)?;
    let mut listener = Listener::UdSocket(listener);
    // The name is systemd's, or is replaced by the next start: a supervisor that ends leaves it.
    listener.do_not_reclaim_name_on_drop();
    Ok(listener)
}
