//! Between fork and exec: how a process of a VM's own user is made, which no death of ours can leave half made.
//!
//! ```text
//!   supervisor                                     child (still our program)
//!   ----------                                     -------------------------
//!   fork ------------------------------------------> keeps its own descriptors only
//!                                                    waits at the gate (reads one byte)
//!   writes pid and start time into the ledger             |   gate closed instead (we died): exits, nothing was started
//!   has it moved into its scope (see `scope`)             |
//!   opens the gate (writes one byte) ----------------->   v
//!                                                    limits, groups, user, no_new_privs
//!   reads: end of file = exec worked <-------------- execveat (the gate is close-on-exec)
//!          8 bytes = step and errno  <-------------- or what failed; exits
//! ```
//!
//! The child of a process with threads may only make system calls until it execs: no allocation, no lock, no Rust runtime. So everything it needs lies ready
//! before the fork, and this module talks to the kernel directly. It is the only one that does, beside the KVM probe.

#![allow(unsafe_code)]

use diarch_ipc::Error;
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::SigmaskHow;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::{CString, c_char, c_int, c_long};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A process to be made.
#[derive(Debug)]
pub struct Plan {
    /// The program, opened; executed from this descriptor.
    pub program: OwnedFd,
    pub argv: Vec<String>,
    /// What becomes descriptor 0, 1, 2, ... of the process.
    pub fds: Vec<OwnedFd>,
    /// Its user and group, both the same number.
    pub uid: u32,
    /// The group of `/dev/kvm`, for a VM that may use it.
    pub extra_group: Option<u32>,
    /// Threads and processes of this user at most.
    pub max_tasks: u64,
    pub max_open_files: u64,
}

/// A child that waits at the gate. Dropped, it is told to go, and is reaped.
#[derive(Debug)]
pub struct Gated {
    pub pid: u32,
    pub pidfd: OwnedFd,
    gate: Option<UnixStream>,
}

impl Drop for Gated {
    fn drop(&mut self) {
        // Open still: nothing was let through, and the child goes as soon as it sees the end.
        if self.gate.take().is_some() && crate::process::wait_ended(&self.pidfd, Duration::from_secs(1)).unwrap_or(false) {
            crate::process::reap(&self.pidfd);
        }
    }
}

/// The steps of the child that can fail, for the sentence.
const STEPS: [&str; 8] = ["gate", "signals", "descriptors", "limits", "capabilities", "groups", "user", "execve"];

/// linux/keyctl.h.
const KEYCTL_JOIN_SESSION_KEYRING: c_long = 1;

/// What the child needs, as plain memory.
struct Prepared {
    program: RawFd,
    argv: Vec<*const c_char>,
    fds: Vec<RawFd>,
    uid: u32,
    groups: Vec<libc::gid_t>,
    max_tasks: u64,
    max_open_files: u64,
    gate: RawFd,
}

/// One at a time: a child made in the middle of another's making could inherit a gate that nobody closes for it.
static ONE_FORK: Mutex<()> = Mutex::new(());

/// Forks. The child does nothing until [`Gated::open`].
pub fn fork(plan: Plan) -> Result<Gated, Error> {
    let _one = ONE_FORK.lock().unwrap_or_else(PoisonError::into_inner);
    let step = |name: &str, error: io::Error| Error::io(name, &error);
    let (ours, theirs) = UnixStream::pair().map_err(|e| step("gate", e))?;
    let argv: Vec<CString> =
        plan.argv.iter().map(|arg| CString::new(arg.as_str()).map_err(|_| Error::invalid("argv", "an argument holds a NUL byte"))).collect::<Result<_, _>>()?;
    let mut pointers: Vec<*const c_char> = argv.iter().map(|arg| arg.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let mut prepared = Prepared {
        program: plan.program.as_raw_fd(),
        argv: pointers,
        fds: plan.fds.iter().map(AsRawFd::as_raw_fd).collect(),
        uid: plan.uid,
        groups: plan.extra_group.into_iter().collect(),
        max_tasks: plan.max_tasks,
        max_open_files: plan.max_open_files,
        gate: theirs.as_raw_fd(),
    };
    let before = nix::sys::signal::SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK).map_err(|e| step("signals", e.into()))?;
    // SAFETY: the child runs `child` only, which makes system calls on memory prepared above and never returns.
    let forked = unsafe { libc::fork() };
    let error = io::Error::last_os_error();
    if forked != 0 {
        before.thread_set_mask().map_err(|e| step("signals", e.into()))?;
    }
    match forked {
        -1 => Err(step("fork", error)),
        0 => child(&mut prepared),
        pid => {
            drop(theirs);
            let pid = u32::try_from(pid).map_err(|_| Error::Failed { step: "fork".into(), errno: None, detail: "no pid".into() })?;
            // Race-free: the child is ours and not reaped, so its number can't have been given to another.
            let raw = Pid::from_raw(pid.cast_signed()).ok_or_else(|| step("fork", io::Error::from(io::ErrorKind::InvalidData)))?;
            let pidfd = pidfd_open(raw, PidfdFlags::NONBLOCK).map_err(|e| step("pidfd_open", e.into()))?;
            Ok(Gated { pid, pidfd, gate: Some(ours) })
        }
    }
}

impl Gated {
    /// Lets the child go on, and waits until it is the new program.
    pub fn open(mut self, within: Duration) -> Result<OwnedFd, Error> {
        let step = |name: &str, error: &io::Error| Error::io(name, error);
        let pidfd = self.pidfd.try_clone().map_err(|e| step("dup", &e))?;
        let Some(mut gate) = self.gate.take() else { return Err(Error::Failed { step: "gate".into(), errno: None, detail: "it was opened before".into() }) };
        gate.set_read_timeout(Some(within)).map_err(|e| step("gate", &e))?;
        gate.write_all(&[1]).map_err(|e| step("gate", &e))?;
        let mut report = [0u8; 8];
        match gate.read_exact(&mut report) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(pidfd),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
                Err(Error::Timeout { step: "exec".into(), after_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX) })
            }
            Err(error) => Err(step("exec", &error)),
            Ok(()) => {
                let [a, b, c, d, e, f, g, h] = report;
                let number = usize::try_from(u32::from_ne_bytes([a, b, c, d])).unwrap_or(usize::MAX);
                let error = io::Error::from_raw_os_error(i32::from_ne_bytes([e, f, g, h]));
                Err(step(STEPS.get(number).unwrap_or(&"child"), &error))
            }
        }
    }
}

/// The child's whole life. Nothing here allocates or returns.
fn child(with: &mut Prepared) -> ! {
    let failed = confine(with);
    let (step, errno) = failed;
    let mut report = [0u8; 8];
    report[..4].copy_from_slice(&step.to_ne_bytes());
    report[4..].copy_from_slice(&errno.to_ne_bytes());
    // SAFETY: `report` is 8 bytes; MSG_NOSIGNAL: a dead supervisor must not turn this into a signal.
    unsafe { libc::send(with.gate, report.as_ptr().cast(), 8, libc::MSG_NOSIGNAL) };
    // SAFETY: ends this process at once, without running anything of the parent's.
    unsafe { libc::_exit(127) }
}

/// Turns this process into what the plan says; returns only to report the step and errno that failed.
fn confine(with: &mut Prepared) -> (u32, c_int) {
    macro_rules! check {
        ($step:expr, $call:expr) => {
            // SAFETY: a system call with arguments that live until it returns; its result is checked.
            if unsafe { $call } < 0 {
                return ($step, Errno::last_raw());
            }
        };
    }
    // Signals: dispositions and mask as a new program expects them. First: until here all are blocked, as the supervisor's own handlers write to descriptors by number,
    // and these numbers are about to be a disk's.
    for signal in 1..=64 {
        if signal != libc::SIGKILL && signal != libc::SIGSTOP && signal != 32 && signal != 33 {
            // SAFETY: SIG_DFL is a valid disposition; 32 and 33 are glibc's own.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
    // SAFETY: an all-zero sigset_t is an empty set on Linux.
    let empty: libc::sigset_t = unsafe { std::mem::zeroed() };
    check!(1, libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut()));
    check!(1, libc::setsid());

    // Descriptors: first out of the way of the numbers they are to have, then to those numbers, the program and the gate behind them. All others go now, and not
    // at exec: while the parent's end of our gate is open here, or in a sister that waits at hers, the parent's death would not show.
    let own = c_int::try_from(with.fds.len()).unwrap_or(c_int::MAX - 2);
    for fd in with.fds.iter_mut().chain([&mut with.program, &mut with.gate]) {
        // SAFETY: duplicates a descriptor we hold; the result is checked.
        let moved = unsafe { libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, (own + 2).max(64)) };
        if moved < 0 {
            return (2, Errno::last_raw());
        }
        *fd = moved;
    }
    for (target, fd) in (0..).zip(&with.fds) {
        check!(2, libc::dup2(*fd, target));
    }
    check!(2, libc::dup3(with.program, own, libc::O_CLOEXEC));
    with.program = own;
    check!(2, libc::dup3(with.gate, own + 1, libc::O_CLOEXEC));
    with.gate = own + 1;
    check!(2, libc::syscall(libc::SYS_close_range, (own + 2) as c_long, c_long::from(u32::MAX), 0));

    let mut byte = 0u8;
    // SAFETY: one byte into `byte`.
    let got = unsafe { libc::read(with.gate, (&raw mut byte).cast(), 1) };
    if got != 1 {
        // The supervisor is gone, and the ledger says that nothing was started.
        // SAFETY: as in `child`.
        unsafe { libc::_exit(125) }
    }

    let limit = |value: u64| libc::rlimit { rlim_cur: value, rlim_max: value };
    // No core: it would hold the guest's memory (THREATS 21).
    let (core, files, tasks) = (limit(0), limit(with.max_open_files), limit(with.max_tasks));
    check!(3, libc::setrlimit(libc::RLIMIT_CORE, &raw const core));
    check!(3, libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files));
    check!(3, libc::setrlimit(libc::RLIMIT_NPROC, &raw const tasks));
    check!(3, libc::chdir(c"/".as_ptr()));
    // SAFETY: umask can't fail.
    unsafe { libc::umask(0o077) };

    // The supervisor's own score would keep QEMU alive longer than the host's daemons. Raising it needs no right, and only root's process may write here. A
    // host that hides the file keeps its own ways.
    // SAFETY: a path that lives, and flags.
    let score = unsafe { libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    if score >= 0 {
        check!(3, libc::write(score, c"0".as_ptr().cast(), 1));
    }

    // The bounding set goes first, while there is CAP_SETPCAP; EINVAL is the first number that is no capability.
    for capability in 0..64 {
        // SAFETY: a system call with integer arguments.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            let errno = Errno::last_raw();
            if errno == libc::EINVAL {
                break;
            }
            return (4, errno);
        }
    }
    check!(4, libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    // The system calls themselves: glibc's wrappers would want to tell threads that do not exist here.
    check!(5, libc::syscall(libc::SYS_setgroups, with.groups.len(), with.groups.as_ptr()));
    check!(5, libc::syscall(libc::SYS_setresgid, with.uid, with.uid, with.uid));
    // Leaving uid 0 clears every capability set (capabilities(7)).
    check!(6, libc::syscall(libc::SYS_setresuid, with.uid, with.uid, with.uid));
    // A session keyring of its own: the one inherited is root's, and whoever possesses it reads what is in it (keyrings(7)). ENOSYS: a kernel
    // without keys.
    // SAFETY: a system call with an integer and a null pointer.
    if unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<c_char>()) } < 0 && Errno::last_raw() != libc::ENOSYS {
        return (6, Errno::last_raw());
    }

    let environment = [c"LC_ALL=C".as_ptr(), std::ptr::null()];
    check!(7, libc::syscall(libc::SYS_execveat, with.program, c"".as_ptr(), with.argv.as_ptr(), environment.as_ptr(), libc::AT_EMPTY_PATH));
    (7, 0)
}
