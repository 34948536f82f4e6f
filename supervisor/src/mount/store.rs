//! The service manager's file descriptor store (sd_notify(3), `FDSTORE=1`): it holds on to a mount while no supervisor lives, and passes it to the next.
//!
//! A name says whose mount it is: the slot alone would do for another VM's too. Where there is no service manager nothing is stored, and a mount ends with
//! the supervisor.

use diarch_ipc::name::{ShareName, Tenancy};
use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendmsg_addr, socket_with};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// What every name of ours begins with; the socket that is passed on has another.
pub const PREFIX: &str = "mount.";

/// The mount's name in the store: at most 255 bytes without a colon are allowed, and this has 136. A copy that takes a mount's place is the next generation: for a
/// moment both are kept.
pub fn name(tenancy: Tenancy, share: &ShareName, generation: u64) -> String {
    format!("{PREFIX}{}.{:x}.{:x}.{generation}.{share}", tenancy.slot, tenancy.claim.session, tenancy.claim.serial)
}

/// Which generation of this very mount a name is of, if it is.
pub fn generation(name: &str, tenancy: Tenancy, share: &ShareName) -> Option<u64> {
    let generation = name.split('.').nth(4)?.parse().ok()?;
    (self::name(tenancy, share, generation) == name).then_some(generation)
}

/// The way to the manager, open from the start on: each mount goes this way twice.
#[derive(Debug)]
pub struct Store(Option<(OwnedFd, SocketAddrUnix)>);

impl Store {
    /// The manager that started us, if one did.
    pub fn open() -> io::Result<Self> {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(Self(None)) };
        let address = match path.as_bytes().split_first() {
            Some((b'@', name)) => SocketAddrUnix::new_abstract_name(name)?,
            _ => SocketAddrUnix::new(path.as_bytes())?,
        };
        // Never waited for: a manager that does not read must not hold the loop. Not connected: a manager that started anew has another socket at this address.
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        Ok(Self(Some((socket, address))))
    }

    /// Has the manager keep a copy. It does not poll it (`FDPOLL=0`): that is for connections, and what epoll makes of a mount is an error.
    pub fn keep(&self, name: &str, mount: &OwnedFd) -> io::Result<()> {
        self.send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}\n"), &[mount.as_fd()])
    }

    /// Has the manager let go of its copy, if it has one.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), &[])
    }

    fn send(&self, text: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Some((socket, address)) = &self.0 else { return Ok(()) };
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("one descriptor at a time"));
        }
        sendmsg_addr(socket, address, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::name::{RequestId, Slot};

    #[test]
    fn the_longest_name_fits_and_no_two_mounts_share_one() {
        let share = ShareName::new("a".repeat(63)).unwrap();
        let tenancy = |slot, serial| Tenancy { slot: Slot::new(slot).unwrap(), claim: RequestId { session: u64::MAX, serial } };
        let longest = name(tenancy(4095, u64::MAX), &share, u64::MAX);
        assert!(longest.len() <= 255 && !longest.contains(':') && longest.is_ascii(), "{longest}");
        assert_ne!(name(tenancy(1, 1), &share, 0), name(tenancy(1, 2), &share, 0), "the slot's next VM");
        assert_ne!(name(tenancy(1, 1), &share, 0), name(tenancy(2, 1), &share, 0));
        assert_eq!(generation(&name(tenancy(1, 1), &share, 7), tenancy(1, 1), &share), Some(7));
        let dotted = ShareName::new("1.2.3").unwrap();
        assert_eq!(generation(&name(tenancy(1, 1), &dotted, 7), tenancy(1, 1), &dotted), Some(7));
        for other in [name(tenancy(1, 2), &share, 7), name(tenancy(1, 1), &dotted, 7), "mount.1".into()] {
            assert_eq!(generation(&other, tenancy(1, 1), &share), None);
        }
    }
}
