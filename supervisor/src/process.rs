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

/// How a process that has ended did so, reaping it when it is our child. An adopted one is the child of somebody else, who reaps it.
pub fn reap(pidfd: &OwnedFd) -> ExitStatus {
    reap_child(pidfd).unwrap_or_else(|| exit_of_another(pidfd))
}

/// Reaps our own child, at once; `None` for a process that is not ours.
pub fn reap_child(pidfd: &OwnedFd) -> Option<ExitStatus> {
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).ok()??;
    Some(match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitStatus::Code(code),
        (None, Some(signal)) => ExitStatus::Signal(signal),
        (None, None) => ExitStatus::Unknown,
    })
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

/// The start time (field 22 of `/proc/PID/stat`) and the effective user of a process. `None`: there is no process of this number; an error: it could not be
/// looked at, which is something else.
///
/// Read as bytes: a process chooses its name, which stands in both files, and may choose one that is not UTF-8. The state letter is not looked
/// at: a process whose first thread has ended shows as a zombie and lives. Only its pidfd tells.
pub fn identity(pid: u32) -> io::Result<Option<(u64, u32)>> {
    let read = |name: &str| match std::fs::read(format!("/proc/{pid}/{name}")) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    };
    let (Some(stat), Some(status)) = (read("stat")?, read("status")?) else { return Ok(None) };
    match (start_time(&stat), effective_uid(&status)) {
        (Some(start), Some(uid)) => Ok(Some((start, uid))),
        _ => Err(io::Error::other(format!("/proc/{pid} is not as proc(5) says"))),
    }
}

/// Behind the last `)`: the name before it may hold any byte. The next field is the third.
fn start_time(stat: &[u8]) -> Option<u64> {
    let behind = stat.iter().rposition(|byte| *byte == b')')?;
    let field = stat.get(behind + 1..)?.split(|byte| *byte == b' ').filter(|field| !field.is_empty()).nth(22 - 3)?;
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// `Uid:` real, effective, saved, file system. The name's line comes first, and the kernel escapes line breaks in it.
fn effective_uid(status: &[u8]) -> Option<u32> {
    let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Uid:"))?;
    let field = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty()).nth(1)?;
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// A pidfd of the process that the ledger speaks of, if that very process still lives. An error means that this could not be found out, and never that
/// it has ended.
pub fn find(recorded: Process, uid: u32) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(recorded.pid.cast_signed()) else { return Ok(None) };
    let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // The number is looked at through /proc after the handle was taken, and the handle after that: all three are one process.
    let found = identity(recorded.pid)?;
    let alive = diarch_ipc::peer::alive(&pidfd)?;
    Ok((found == Some((recorded.start_time, uid)) && alive).then_some(pidfd))
}

/// Whether the process runs under this name (`-name ...,process=...` is in its argument vector), and is not a half-made child of ours any more.
pub fn runs_as(pid: u32, name: &str) -> bool {
    let Ok(cmdline) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let marker = format!(",process={name},");
    cmdline.split(|b| *b == 0).any(|argument| argument.windows(marker.len()).any(|part| part == marker.as_bytes()))
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
        let (start_time, uid) = identity(child.id()).unwrap().unwrap();
        let recorded = Process { pid: child.id(), start_time };
        assert!(find(recorded, uid).unwrap().is_some());
        assert!(find(Process { start_time: start_time + 1, ..recorded }, uid).unwrap().is_none());
        assert!(find(recorded, uid + 1).unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(find(recorded, uid).unwrap().is_none());
    }

    #[test]
    fn a_process_is_found_whatever_it_calls_itself() {
        use std::os::unix::ffi::OsStrExt;
        let dir = tempfile::tempdir().unwrap();
        for name in [&b"\xff\xfe"[..], b"a) R 1 1", b"\nUid:\t0 0 0 0"] {
            let program = dir.path().join(std::ffi::OsStr::from_bytes(name));
            std::fs::copy("/bin/sleep", &program).unwrap();
            let mut child = std::process::Command::new(&program).arg("30").spawn().unwrap();
            let (start_time, uid) = identity(child.id()).unwrap().unwrap();
            assert_eq!(uid, rustix::process::geteuid().as_raw());
            assert!(find(Process { pid: child.id(), start_time }, uid).unwrap().is_some());
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
