//! The tap device itself (linux/if_tun.h).
//!
//! A tap without an owner may be attached to by whoever can open `/dev/net/tun`, which is everybody: its second queue would be a stranger's for the asking.
//! So each tap is root's (`TUNSETOWNER`), and what was attached before it was is counted (see `tap`). It is not persistent: it goes with its last descriptor.

#![allow(unsafe_code)]

use crate::grants::MAX_INTERFACE_NAME;
use nix::libc::{self, c_int, c_short, c_ulong};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// The kernel's own, with the fields that are used here; 40 bytes on 64-bit machines (linux/if.h, `struct ifreq`).
#[repr(C)]
struct Request {
    name: [u8; MAX_INTERFACE_NAME + 1],
    flags: c_short,
    rest: [u8; 22],
}
const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

/// `IFF_TUN_EXCL`: an interface that is there already is an error and not attached to. Its bit is the sign of the 16-bit field.
const EXCLUSIVE: c_int = 0x8000;
/// `TUNSETOWNER`, `_IOW('T', 204, int)`.
const TUNSETOWNER: c_ulong = 0x4004_54cc;

/// What every tap of ours is: Ethernet frames without a header of the driver's, and with virtio's (for offloads).
const KIND: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

fn request(name: &str, flags: c_int) -> io::Result<Request> {
    let mut request = Request { name: [0; MAX_INTERFACE_NAME + 1], flags: flags as c_short, rest: [0; 22] };
    // '%' is a format to the kernel: "dvm%d" would become any number (THREATS 16).
    if name.is_empty() || name.len() > MAX_INTERFACE_NAME || !name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    Ok(request)
}

/// Makes a tap that does not exist yet, with so many queues. It is down, and root's.
pub fn create(node: &std::path::Path, name: &str, queues: u16) -> io::Result<Vec<OwnedFd>> {
    let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut fds = Vec::with_capacity(queues.into());
    for queue in 0..queues {
        let fd = rustix::fs::open(node, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
        let exclusive = if queue == 0 { EXCLUSIVE } else { 0 };
        let mut request = request(name, KIND | multi | exclusive)?;
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
        if queue == 0 {
            // SAFETY: TUNSETOWNER takes a number.
            check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOWNER as _, 0 as c_ulong) })?;
        }
        fds.push(fd);
    }
    Ok(fds)
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_that_the_kernel_would_change_is_asked_for() {
        for bad in ["", "dvm%d", "dvm/0", "a b", "abcdefghijklmnop", "dvm0n0\n", ".", "dvm:0"] {
            assert!(request(bad, KIND).is_err(), "{bad:?}");
        }
        assert_eq!(request("dvm4095n3", KIND | EXCLUSIVE).unwrap().flags as u16, 0xd002);
    }
}
