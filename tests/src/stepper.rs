//! Kills a process at one chosen system call.
//!
//! ```text
//!   tracing thread                       the process                    the action's thread
//!   PTRACE_SEIZE every thread   ----->   goes on, now in steps
//!   the count starts            ----------------------------------->    what is to be interrupted
//!     entry, entry, ... entry   <-----   its system calls, all threads
//!     the n-th entry: SIGKILL   ----->   (the call is not executed)
//!   reaps the threads                    dead, seen by its own parent   the action goes on, against the next process
//! ```
//!
//! Processes that it forks are not traced: what is killed is this process, and nothing else. The kernel ties a tracee to the thread that
//! seized it, so one thread does all of it, and waits with `__WNOTHREAD`, so that it takes no other child's end away.

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What became of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was killed on entering its n-th system call.
    Killed { syscall: Syscall },
    /// The action ended before the process had entered n system calls; it lives on, untraced.
    Survived { syscalls: u64 },
    /// It ended by itself while it was traced.
    Ended { syscalls: u64 },
}

/// A system call's number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Syscall(pub u64);

impl Syscall {
    /// The names that a supervisor's path is likely to show; the others stay numbers.
    pub fn name(self) -> Option<&'static str> {
        use nix::libc;
        const NAMES: &[(libc::c_long, &str)] = &[
            (libc::SYS_read, "read"),
            (libc::SYS_write, "write"),
            (libc::SYS_close, "close"),
            (libc::SYS_openat, "openat"),
            (libc::SYS_fsync, "fsync"),
            (libc::SYS_fdatasync, "fdatasync"),
            (libc::SYS_renameat, "renameat"),
            (libc::SYS_renameat2, "renameat2"),
            (libc::SYS_unlinkat, "unlinkat"),
            (libc::SYS_mkdirat, "mkdirat"),
            (libc::SYS_fchownat, "fchownat"),
            (libc::SYS_fchmod, "fchmod"),
            (libc::SYS_fcntl, "fcntl"),
            (libc::SYS_socket, "socket"),
            (libc::SYS_bind, "bind"),
            (libc::SYS_listen, "listen"),
            (libc::SYS_connect, "connect"),
            (libc::SYS_accept4, "accept4"),
            (libc::SYS_sendmsg, "sendmsg"),
            (libc::SYS_recvmsg, "recvmsg"),
            (libc::SYS_sendto, "sendto"),
            (libc::SYS_recvfrom, "recvfrom"),
            (libc::SYS_clone, "clone"),
            (libc::SYS_clone3, "clone3"),
            (libc::SYS_execve, "execve"),
            (libc::SYS_wait4, "wait4"),
            (libc::SYS_waitid, "waitid"),
            (libc::SYS_pidfd_open, "pidfd_open"),
            (libc::SYS_pidfd_send_signal, "pidfd_send_signal"),
            (libc::SYS_epoll_ctl, "epoll_ctl"),
            (libc::SYS_futex, "futex"),
            (libc::SYS_mmap, "mmap"),
            (libc::SYS_munmap, "munmap"),
            (libc::SYS_mprotect, "mprotect"),
            (libc::SYS_madvise, "madvise"),
            (libc::SYS_statx, "statx"),
            (libc::SYS_lseek, "lseek"),
            (libc::SYS_pipe2, "pipe2"),
            (libc::SYS_rt_sigprocmask, "rt_sigprocmask"),
            (libc::SYS_rt_sigaction, "rt_sigaction"),
            (libc::SYS_getrandom, "getrandom"),
            (libc::SYS_prctl, "prctl"),
            (libc::SYS_exit, "exit"),
        ];
        NAMES.iter().find(|(number, _)| u64::try_from(*number) == Ok(self.0)).map(|(_, name)| *name)
    }
}

impl std::fmt::Debug for Syscall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "system call {}", self.0),
        }
    }
}

/// Runs `action` while the process is traced, and kills the process when it enters its `n`-th system call from now
/// (n = 1 is the next one). Returns when the action has ended. Must be allowed to trace the process: its owner, or root.
///
/// The process must not be a child of this one: the kernel shows the end of a tracee to its tracer first and then to its parent, but
/// only once to a process that is both.
pub fn kill_at_syscall<T>(pid: i32, n: u64, action: impl FnOnce() -> T) -> io::Result<(Outcome, T)> {
    trace(pid, |mut tracer, done| tracer.until(n, done), action)
}

/// Runs `action` while the process is traced, and kills the process when `threads` of its threads have each made a socket pair, forked, and are about to
/// open their next file. A thread that has its pair is held until so many have theirs, at most a moment: forks that can meet do. (Not held in the fork
/// itself: there glibc has the allocator's locks, and all other threads would wait with it.)
pub fn kill_when_forked<T>(pid: i32, threads: usize, action: impl FnOnce() -> T) -> io::Result<(Outcome, T)> {
    trace(pid, |mut tracer, done| tracer.until_forked(threads, done), action)
}

fn trace<T>(pid: i32, until: impl FnOnce(Tracer, &dyn Fn() -> bool) -> io::Result<Outcome> + Send, action: impl FnOnce() -> T) -> io::Result<(Outcome, T)> {
    let done = AtomicBool::new(false);
    let (armed_in, armed) = mpsc::channel();
    std::thread::scope(|scope| {
        // A thread of its own has no children but its tracees, and lets them go when it ends, however it ends.
        let tracer = scope.spawn(|| {
            let seized = Tracer::seize(Pid::from_raw(pid));
            let _ = armed_in.send(());
            until(seized?, &|| done.load(Ordering::Acquire))
        });
        let _ = armed.recv();
        let value = action();
        done.store(true, Ordering::Release);
        let outcome = tracer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((outcome?, value))
    })
}

/// Where a traced thread is between two system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    User,
    Kernel,
}

struct Tracer {
    process: Pid,
    pidfd: std::os::fd::OwnedFd,
    threads: BTreeMap<Pid, At>,
    entries: u64,
}

impl Tracer {
    fn seize(process: Pid) -> io::Result<Self> {
        let raw = rustix::process::Pid::from_raw(process.as_raw()).ok_or_else(|| io::Error::other("pid 0"))?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty())?;
        let mut tracer = Tracer { process, pidfd, threads: BTreeMap::new(), entries: 0 };
        // A thread may be born while the list is read: read it again until nothing new is in it.
        loop {
            let mut found = false;
            for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
                let Some(tid) = task?.file_name().to_str().and_then(|t| t.parse().ok()).map(Pid::from_raw) else { continue };
                if tracer.threads.contains_key(&tid) {
                    continue;
                }
                match ptrace::seize(tid, Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE) {
                    Ok(()) => {}
                    // Gone already, or a child of a thread that is traced since a moment ago, and so traced too.
                    Err(Errno::ESRCH | Errno::EPERM) if !tracer.threads.is_empty() => continue,
                    Err(error) => return Err(error.into()),
                }
                tracer.threads.insert(tid, At::User);
                found = true;
                // It stops, and its first stop sets it going in steps.
                match ptrace::interrupt(tid) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if !found {
                break;
            }
        }
        // Every thread goes in steps before the action starts, or its first calls would not be counted.
        let mut unseen: Vec<Pid> = tracer.threads.keys().copied().collect();
        let until = Instant::now() + Duration::from_secs(5);
        while !unseen.is_empty() {
            if Instant::now() > until {
                return Err(io::Error::other("the process did not stop to be traced"));
            }
            if let Some(status) = tracer.next()? {
                if let Some(tid) = status.pid() {
                    unseen.retain(|t| *t != tid);
                }
                tracer.resume(status)?;
            }
        }
        tracer.entries = 0;
        Ok(tracer)
    }

    /// The next stop, if there is one now.
    fn next(&self) -> io::Result<Option<WaitStatus>> {
        match waitpid(None, Some(FLAGS)) {
            Ok(WaitStatus::StillAlive) => Ok(None),
            Ok(status) => Ok(Some(status)),
            Err(Errno::EINTR) => Ok(None),
            // No tracee is left.
            Err(Errno::ECHILD) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn until(&mut self, n: u64, done: &dyn Fn() -> bool) -> io::Result<Outcome> {
        let mut idle = 0u32;
        loop {
            match self.next()? {
                Some(status) => {
                    idle = 0;
                    if let Some(syscall) = self.resume_unless(status, n)? {
                        pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL)?;
                        self.reap()?;
                        return Ok(Outcome::Killed { syscall });
                    }
                    if self.threads.is_empty() {
                        // Its parent sees its end when the last of its threads is gone.
                        self.reap()?;
                        return Ok(Outcome::Ended { syscalls: self.entries });
                    }
                }
                None if done() => {
                    let syscalls = self.entries;
                    self.release()?;
                    return Ok(Outcome::Survived { syscalls });
                }
                None => {
                    // Steps come in bursts: a sleep in between would cost more than the step.
                    idle += 1;
                    if idle < 200 { std::thread::yield_now() } else { std::thread::sleep(Duration::from_micros(100)) }
                }
            }
        }
    }

    fn until_forked(&mut self, wanted: usize, done: &dyn Fn() -> bool) -> io::Result<Outcome> {
        let (mut pairing, mut before, mut behind, mut ready) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut patience: Option<Instant> = None;
        loop {
            if before.len() == wanted || patience.is_some_and(|until| Instant::now() > until) {
                for tid in before.drain(..) {
                    behind.push(tid);
                    ptrace::syscall(tid, None)?;
                }
            }
            if done() {
                let syscalls = self.entries;
                for tid in before.into_iter().chain(ready) {
                    ptrace::syscall(tid, None)?;
                }
                self.release()?;
                return Ok(Outcome::Survived { syscalls });
            }
            let Some(status) = self.next()? else {
                std::thread::sleep(Duration::from_micros(100));
                continue;
            };
            let at = match status {
                WaitStatus::PtraceSyscall(tid) => Some((tid, ptrace_entry(tid)?)),
                _ => None,
            };
            match at {
                Some((tid, Some(number))) if is(number, nix::libc::SYS_socketpair) => {
                    pairing.push(tid);
                    self.resume(status)?;
                }
                // Back from it.
                Some((tid, None)) if pairing.contains(&tid) => {
                    pairing.retain(|paired| *paired != tid);
                    patience.get_or_insert_with(|| Instant::now() + Duration::from_millis(300));
                    before.push(tid);
                }
                Some((tid, Some(number))) if is(number, nix::libc::SYS_openat) && behind.contains(&tid) => {
                    behind.retain(|forked| *forked != tid);
                    ready.push(tid);
                    if ready.len() == wanted {
                        pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL)?;
                        self.reap()?;
                        return Ok(Outcome::Killed { syscall: Syscall(number) });
                    }
                }
                _ => self.resume(status)?,
            }
            if self.threads.is_empty() {
                self.reap()?;
                return Ok(Outcome::Ended { syscalls: self.entries });
            }
        }
    }

    fn resume(&mut self, status: WaitStatus) -> io::Result<()> {
        self.resume_unless(status, u64::MAX).map(drop)
    }

    /// Counts a stop and lets the thread go on to the next; gives the call instead when it is the n-th.
    fn resume_unless(&mut self, status: WaitStatus, n: u64) -> io::Result<Option<Syscall>> {
        let (tid, signal) = match status {
            WaitStatus::PtraceSyscall(tid) => {
                let entering = match self.threads.get(&tid) {
                    // The thread that was inside a call when it was seized shows its end first: the kernel knows.
                    _ if ptrace_entry(tid)?.is_some() => At::Kernel,
                    _ => At::User,
                };
                self.threads.insert(tid, entering);
                if entering == At::Kernel {
                    self.entries += 1;
                    if self.entries >= n {
                        return Ok(Some(Syscall(ptrace_entry(tid)?.unwrap_or(u64::MAX))));
                    }
                }
                (tid, None)
            }
            WaitStatus::PtraceEvent(tid, signal, event) => {
                self.threads.entry(tid).or_insert(At::User);
                // A stop of the whole process by a signal stays a stop; our own PTRACE_INTERRUPT reports SIGTRAP.
                if event == PTRACE_EVENT_STOP && signal != Signal::SIGTRAP {
                    listen(tid)?;
                    return Ok(None);
                }
                (tid, None)
            }
            WaitStatus::Stopped(tid, signal) => (tid, Some(signal)),
            WaitStatus::Exited(tid, _) | WaitStatus::Signaled(tid, _, _) => {
                self.threads.remove(&tid);
                return Ok(None);
            }
            _ => return Ok(None),
        };
        match ptrace::syscall(tid, signal) {
            // It was killed meanwhile; its end is reported next.
            Ok(()) | Err(Errno::ESRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes every thread's end, without which the process's own parent would never see it die.
    fn reap(&mut self) -> io::Result<()> {
        self.until_none_is_left("end by SIGKILL", |_| Ok(()))
    }

    /// Stops every thread once more and lets it go.
    fn release(&mut self) -> io::Result<()> {
        for tid in self.threads.keys() {
            match ptrace::interrupt(*tid) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.until_none_is_left("stop to be let go", |status| {
            let (tid, signal) = match status {
                WaitStatus::Stopped(tid, signal) => (tid, Some(signal)),
                WaitStatus::PtraceEvent(tid, ..) | WaitStatus::PtraceSyscall(tid) => (tid, None),
                _ => return Ok(()),
            };
            match ptrace::detach(tid, signal) {
                Ok(()) | Err(Errno::ESRCH) => Ok(()),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Hands on each stop until the kernel knows of no tracee of this thread: also of none that was born a moment ago.
    fn until_none_is_left(&mut self, what: &str, each: impl Fn(WaitStatus) -> io::Result<()>) -> io::Result<()> {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            match waitpid(None, Some(FLAGS)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => std::thread::yield_now(),
                Ok(status) => each(status)?,
                Err(Errno::ECHILD) => {
                    self.threads.clear();
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
            if Instant::now() > until {
                return Err(io::Error::other(format!("process {} did not {what}", self.process)));
            }
        }
    }
}

/// Whatever happens to this thread's tracees, and to no child of another thread.
const FLAGS: WaitPidFlag = WaitPidFlag::__WALL.union(WaitPidFlag::__WNOTHREAD).union(WaitPidFlag::WNOHANG);

/// `PTRACE_EVENT_STOP` (linux/ptrace.h).
const PTRACE_EVENT_STOP: i32 = 128;

fn is(number: u64, syscall: nix::libc::c_long) -> bool {
    u64::try_from(syscall) == Ok(number)
}

/// The number of the system call that the thread is entering; `None` when it is leaving one.
fn ptrace_entry(tid: Pid) -> io::Result<Option<u64>> {
    match ptrace::syscall_info(tid) {
        Ok(info) if info.op == nix::libc::PTRACE_SYSCALL_INFO_ENTRY => {
            // SAFETY: `op` says that the union's `entry` is the one that was written.
            Ok(Some(unsafe { info.u.entry }.nr))
        }
        Ok(_) => Ok(None),
        Err(Errno::ESRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// `PTRACE_LISTEN`: the thread stays stopped, and its next event is reported.
fn listen(tid: Pid) -> io::Result<()> {
    let none = std::ptr::null_mut::<nix::libc::c_void>();
    // SAFETY: PTRACE_LISTEN takes no address and no data.
    let result = unsafe { nix::libc::ptrace(nix::libc::PTRACE_LISTEN, tid.as_raw(), none, none) };
    match Errno::result(result) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
