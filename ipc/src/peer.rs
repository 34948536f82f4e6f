//! Who is at the other end, in the kernel's word.
//!
//! ```text
//!   SO_PEERCRED   -> uid            fixed when the peer connected
//!   SO_PEERPIDFD  -> pidfd          a handle on that very process (Linux 6.5), where a pid is only a number
//!       pidfd -> fdinfo "Pid:" -> /proc/PID/cgroup -> unit;  then the pidfd again: still alive, so it was that process
//! ```
//!
//! Any error on the way is a refusal (polkit's CVE-2021-3560 read an error as root).

use crate::error::Error;
use nix::sys::socket::{getsockopt, sockopt};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// A process whose identity the kernel vouched for.
#[derive(Debug)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
    /// For people and the audit; nothing is decided by it.
    pub pid: i32,
    /// The systemd unit whose cgroup it is in, when the grants ask for one.
    pub unit: Option<String>,
}

/// Whom the grants allow to be the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    pub uid: u32,
    /// The systemd unit it must be in, such as `diarch-worker.service`.
    pub unit: Option<String>,
}

impl Peer {
    /// The process at the other end of `socket`. With `with_unit` its unit is looked up too.
    pub fn of(socket: &impl AsFd, with_unit: bool) -> Result<Self, Error> {
        let creds = getsockopt(socket, sockopt::PeerCredentials).map_err(|e| lookup("SO_PEERCRED", e.into()))?;
        let pidfd = getsockopt(socket, sockopt::PeerPidfd).map_err(|e| lookup("SO_PEERPIDFD", e.into()))?;
        let unit = if with_unit { Some(unit_of(&pidfd)?) } else { None };
        Ok(Peer { uid: creds.uid(), gid: creds.gid(), pid: creds.pid(), unit })
    }

    /// Whether the connection was made by this very process. (Its number can't be another's while it lives.)
    pub fn is_this_process(&self) -> bool {
        u32::try_from(self.pid).is_ok_and(|pid| pid == std::process::id())
    }

    /// Whether this is whom the grants expect.
    pub fn check(&self, expected: &Expected) -> Result<(), Error> {
        if self.uid != expected.uid {
            return Err(Error::denied("worker.user", format!("the peer's uid is {}, and the worker's is {}", self.uid, expected.uid)));
        }
        match (&expected.unit, &self.unit) {
            (None, _) => Ok(()),
            (Some(wanted), Some(unit)) if wanted == unit => Ok(()),
            (Some(wanted), Some(unit)) => {
                Err(Error::denied("worker.unit", format!("the peer is in {}, and the worker in {wanted}", crate::frame::printable(unit, 80))))
            }
            (Some(wanted), None) => Err(Error::denied("worker.unit", format!("the peer's unit is unknown, and the worker is in {wanted}"))),
        }
    }
}

fn lookup(step: &str, error: io::Error) -> Error {
    Error::denied("worker.user", format!("the peer's identity can't be looked up ({step}: {error})"))
}

/// The systemd unit of the process behind `pidfd`.
fn unit_of(pidfd: &OwnedFd) -> Result<String, Error> {
    let deny = |step: &str, error: io::Error| Error::denied("worker.unit", format!("the peer's unit can't be looked up ({step}: {error})"));
    let pid = pid_of(pidfd).map_err(|e| deny("pidfd", e))?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(|e| deny("cgroup", e))?;
    // Only now: if it still lives, then the file that was read was its own (THREATS 11).
    if !alive(pidfd).map_err(|e| deny("pidfd", e))? {
        return Err(deny("pidfd", io::Error::from(io::ErrorKind::NotFound)));
    }
    unit_in(&text).ok_or_else(|| deny("cgroup", io::Error::other("it is in no unit of the unified hierarchy")))
}

/// The unit that a `/proc/PID/cgroup` names in the unified hierarchy's line `0::`: the first part that is not a slice, as systemd has it. Not the
/// innermost: below a delegated unit (`user@1000.service`) whoever it was delegated to chooses the names.
pub fn unit_in(cgroup: &str) -> Option<String> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let first = path.split('/').find(|part| !part.is_empty() && !part.ends_with(".slice"))?;
    (first.ends_with(".service") || first.ends_with(".scope")).then(|| first.to_owned())
}

/// The pid behind a pidfd, in our pid namespace (`/proc/self/fdinfo`, see pidfd_open(2)).
pub fn pid_of(pidfd: &impl AsFd) -> io::Result<u32> {
    use std::os::fd::AsRawFd;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_fd().as_raw_fd()))?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")).map(str::trim);
    match pid.and_then(|p| p.parse::<u32>().ok()) {
        Some(pid) if pid > 0 => Ok(pid),
        _ => Err(io::Error::new(io::ErrorKind::NotFound, "the process has ended")),
    }
}

/// Whether the process behind a pidfd has not ended yet (a pidfd is readable from the end on).
pub fn alive(pidfd: &impl AsFd) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(poll(&mut fds, Some(&now))? == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (one, _two) = crate::channel::pair().unwrap();
        let peer = Peer::of(&one, false).unwrap();
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.pid, std::process::id() as i32);
        assert!(peer.is_this_process());
        peer.check(&Expected { uid: peer.uid, unit: None }).unwrap();
    }

    #[test]
    fn another_uid_or_another_unit_or_no_unit_is_refused() {
        let peer = |uid, unit: Option<&str>| Peer { uid, gid: 0, pid: 1, unit: unit.map(str::to_owned) };
        let want = Expected { uid: 7, unit: Some("diarch-worker.service".into()) };
        peer(7, Some("diarch-worker.service")).check(&want).unwrap();
        for wrong in [peer(0, Some("diarch-worker.service")), peer(7, Some("ssh.service")), peer(7, None)] {
            assert_eq!(wrong.check(&want).unwrap_err().kind(), "denied");
        }
    }

    #[test]
    fn the_unit_is_the_first_of_the_unified_hierarchy_below_the_slices() {
        let of = |text| unit_in(text);
        assert_eq!(of("0::/system.slice/diarch-worker.service\n").as_deref(), Some("diarch-worker.service"));
        assert_eq!(of("1:name=systemd:/x.service\n0::/system.slice/diarch-worker.service/sub\n").as_deref(), Some("diarch-worker.service"));
        assert_eq!(of("0::/user.slice/user-7.slice/user@7.service/app.slice/diarch-worker.service").as_deref(), Some("user@7.service"), "a delegated tree");
        assert_eq!(of("0::/some-directory/diarch-worker.service"), None);
        assert_eq!(of("0::/\n"), None);
        assert_eq!(of("1:cpu:/diarch-worker.service\n"), None);
    }

    #[test]
    fn a_dead_process_is_not_alive_and_has_no_pid() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        child.wait().unwrap();
        assert!(!alive(&pidfd).unwrap());
        pid_of(&pidfd).unwrap_err();
    }
}
