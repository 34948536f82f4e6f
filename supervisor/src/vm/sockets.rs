//! QEMU's two listening sockets. They lie in the slot's directory, which is root's alone: QEMU gets them as descriptors and the worker gets connections, and neither can
//! replace or reach them by name.

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The machine protocol's socket.
pub const QMP: &str = "qmp.sock";
/// The first serial port's socket.
pub const CONSOLE: &str = "console.sock";
/// A dead connection that QEMU has not noticed, and a fresh one behind it, with some room.
const BACKLOG: i32 = 8;

/// Makes a listening socket in the slot's directory; one that an earlier QEMU left is replaced.
pub fn listener(directory: &Path, name: &str) -> io::Result<OwnedFd> {
    let path = directory.join(name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(&path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A connection to one of them. It never waits: QEMU accepts later, and a full backlog is an error.
pub fn connection(directory: &Path, name: &str) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    connect(&socket, &SocketAddrUnix::new(directory.join(name))?)?;
    Ok(socket)
}
