//! Processes by pidfd: waiting, reaping, how they ended, and finding one of ours again after a restart.

use crate::ledger::Process;
use diarch_ipc::operation::ExitStatus;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

/// Waits until the process has ended, at most `within`; whether it has.
pub fn wait_ended(pidfd: &OwnedFd, within: Duration) -> io::Result<bool> {
    let until = std::time::Instant::now() + within;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// How a process that has ended did so, reaping it when it is our child.
pub fn reap(pidfd: &OwnedFd) -> ExitStatus {
    match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => ExitStatus::Code(code),
            (None, Some(signal)) => ExitStatus::Signal(signal),
            (None, None) => ExitStatus::Unknown,
        },
        // An adopted process is the child of somebody else, who reaps it.
        _ => exit_of_another(pidfd),
    }
}

nix::ioctl_readwrite!(
    /// `PIDFD_GET_INFO`, linux/pidfd.h; tells the exit status of a process that is not our child from Linux 6.15 on.
    pidfd_get_info,
    0xFF,
    11,
    PidfdInfo
);

/// `struct pidfd_info`, its first published size (64 bytes).
#[repr(C)]
#[derive(Default)]
pub struct PidfdInfo {
    mask: u64,
    cgroupid: u64,
    ids: [u32; 11],
    exit_code: i32,
}
const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// The kernel keeps the status for pidfds once the parent has reaped the process, which is a matter of moments.
#[allow(unsafe_code)]
fn exit_of_another(pidfd: &OwnedFd) -> ExitStatus {
    for _ in 0..20 {
        let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
        // SAFETY: `info` is the structure that this request reads and writes, of the size encoded in its number.
        match unsafe { pidfd_get_info(pidfd.as_raw_fd(), &raw mut info) } {
            Ok(_) if info.mask & PIDFD_INFO_EXIT != 0 => return wait_status(info.exit_code),
            Ok(_) | Err(nix::errno::Errno::ESRCH) => std::thread::sleep(Duration::from_millis(5)),
            Err(_) => break,
        }
    }
    ExitStatus::Unknown
}

/// The encoding of wait(2).
fn wait_status(status: i32) -> ExitStatus {
    match status & 0x7f {
        0 => ExitStatus::Code((status >> 8) & 0xff),
        signal => ExitStatus::Signal(signal),
    }
}

/// The start time and user of a process, from its `/proc/PID/stat` and `status`.
pub fn identity(pid: u32) -> Option<(u64, u32)> {
    let process = procfs::process::Process::new(pid.cast_signed()).ok()?;
    let stat = process.stat().ok()?;
    // A zombie has ended, whatever its number still says.
    if matches!(stat.state, 'Z' | 'X') {
        return None;
    }
    Some((stat.starttime, process.status().ok()?.euid))
}

/// A pidfd of the process that the ledger speaks of, if that very process still lives.
pub fn find(recorded: Process, uid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(recorded.pid.cast_signed())?;
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK).ok()?;
    // The number is looked at through /proc after the handle was taken, and the handle after that: all three are one process.
    let (start_time, euid) = identity(recorded.pid)?;
    let alive = diarch_ipc::peer::alive(&pidfd).ok()?;
    (start_time == recorded.start_time && euid == uid && alive).then_some(pidfd)
}

/// Whether the process runs under this name (`-name guest=...` is in its argument vector), and is not a half-made child of ours any more.
pub fn runs_as(pid: u32, name: &str) -> bool {
    let Ok(cmdline) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let marker = format!("guest={name},");
    cmdline.split(|b| *b == 0).any(|argument| argument.starts_with(marker.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(script: &str) -> (std::process::Child, OwnedFd) {
        let child = std::process::Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_raw(child.id() as i32).unwrap(), PidfdFlags::NONBLOCK).unwrap();
        (child, pidfd)
    }

    #[test]
    fn a_child_tells_its_exit_code_and_its_signal() {
        let (_child, pidfd) = started("exit 3");
        assert!(wait_ended(&pidfd, Duration::from_secs(5)).unwrap());
        assert_eq!(reap(&pidfd), ExitStatus::Code(3));
        let (_child, pidfd) = started("kill -9 $$");
        assert!(wait_ended(&pidfd, Duration::from_secs(5)).unwrap());
        assert_eq!(reap(&pidfd), ExitStatus::Signal(9));
    }

    #[test]
    fn a_process_is_found_by_number_start_and_user_and_not_by_two_of_them() {
        let (mut child, _pidfd) = started("sleep 30");
        let (start_time, uid) = identity(child.id()).unwrap();
        let recorded = Process { pid: child.id(), start_time };
        assert!(find(recorded, uid).is_some());
        assert!(find(Process { start_time: start_time + 1, ..recorded }, uid).is_none());
        assert!(find(recorded, uid + 1).is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(find(recorded, uid).is_none());
    }
}
