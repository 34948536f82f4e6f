//! A process that is killed and does not end, as one that the kernel holds (a device that does not answer, a file system that is gone): it is traced, and stays in the
//! last stop before its end until it is let go.

use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// Lets it go when it is dropped.
#[derive(Debug)]
pub struct Undying {
    pub pid: i32,
    release: Option<mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What it does until it is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    Runs,
    Stops,
}

impl Undying {
    /// `None`: there is no such process any more.
    pub fn of(pid: i32, until: Until) -> Option<Self> {
        let (release, released) = mpsc::channel();
        let (ready, seized) = mpsc::channel();
        let pid = Pid::from_raw(pid);
        // The kernel ties a tracee to the thread that seized it, and lets it go when that thread ends.
        let thread = std::thread::spawn(move || {
            let held = ptrace::seize(pid, Options::PTRACE_O_TRACEEXIT).and_then(|()| if until == Until::Stops { ptrace::interrupt(pid) } else { Ok(()) });
            let _ = ready.send(held.is_ok());
            while held.is_ok() && released.recv_timeout(Duration::from_millis(2)) == Err(RecvTimeoutError::Timeout) {
                // Not its last stop, nor the one that it was asked for: a signal on its way to it.
                if let Ok(WaitStatus::Stopped(pid, signal)) = waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD | WaitPidFlag::WNOHANG)) {
                    let _ = ptrace::cont(pid, signal);
                }
            }
        });
        seized.recv().unwrap_or(false).then_some(Self { pid: pid.as_raw(), release: Some(release), thread: Some(thread) })
    }

    pub fn let_go(self) {}
}

impl Drop for Undying {
    fn drop(&mut self) {
        drop(self.release.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
