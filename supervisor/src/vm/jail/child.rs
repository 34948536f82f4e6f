//! The child: from the clone to the exec, in system calls alone. Nothing here allocates, takes a lock or returns to the Rust runtime; and no function of the C
//! library's does either: what other threads hold of its locks at the moment of the clone is held here for ever.

#![allow(unsafe_code)]

use super::mount::Attributes;
use nix::errno::Errno;
use nix::libc;
use std::ffi::{CStr, c_char, c_int, c_long};
use std::os::fd::RawFd;

/// What the child needs, as plain memory.
pub(super) struct Prepared {
    pub program: RawFd,
    pub argv: Vec<*const c_char>,
    pub fds: Vec<RawFd>,
    pub uid: u32,
    pub groups: Vec<libc::gid_t>,
    pub tasks: u64,
    pub open_files: u64,
    pub locked_bytes: u64,
    pub gate: RawFd,
    /// A network namespace to go into.
    pub network: Option<RawFd>,
    /// The tree. None: a rehearsal, without walls.
    pub root: Option<RawFd>,
    pub parts: Vec<Part>,
    pub filter: libc::sock_fprog,
}

/// One mount of the tree.
pub(super) struct Part {
    pub at: *const c_char,
    pub made: Made,
}

pub(super) enum Made {
    Mount(RawFd),
    Proc,
}

/// The steps that can fail, for the sentence.
pub(super) const STEPS: [&str; 13] = [
    "gate",
    "signals",
    "descriptors",
    "limits",
    "capabilities",
    "groups",
    "user",
    "execve",
    "network namespace",
    "mount namespace",
    "mount in the jail",
    "the jail's root",
    "system call filter",
];
const SIGNALS: u32 = 1;
const DESCRIPTORS: u32 = 2;
const LIMITS: u32 = 3;
const CAPABILITIES: u32 = 4;
const GROUPS: u32 = 5;
const USER: u32 = 6;
const EXECVE: u32 = 7;
const NETWORK: u32 = 8;
const MOUNTS: u32 = 9;
/// The part of the tree that it failed at is told with it.
pub(super) const PART: u32 = 10;
const ROOT: u32 = 11;
const FILTER: u32 = 12;

/// What is reported of a failure: the step, the part of the tree, the errno; each in the machine's own order.
pub(super) const REPORT: usize = 12;

/// Where the new root is mounted for a moment. The supervisor does not start without it, and nothing looks at it meanwhile.
const STEPPING_STONE: &CStr = c"/proc";

/// `_NSIG` and the bytes of its set, in the kernel's own numbers (asm/signal.h).
const SIGNALS_MOST: c_int = 64;
const SIGNAL_MASK_BYTES: c_long = 8;
/// linux/keyctl.h.
const KEYCTL_JOIN_SESSION_KEYRING: c_long = 1;
// linux/mount.h.
const MOVE_MOUNT_F_EMPTY_PATH: c_long = 4;
const FSCONFIG_SET_STRING: c_long = 1;
const FSCONFIG_CMD_CREATE: c_long = 6;
const CLOEXEC: c_long = 1;
const PROC_ATTRIBUTES: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_RDONLY;

/// The child's whole life.
pub(super) fn live(with: &mut Prepared) -> ! {
    let Failed { step, part, errno } = confine(with);
    let mut report = [0u8; REPORT];
    report[..4].copy_from_slice(&step.to_ne_bytes());
    report[4..8].copy_from_slice(&part.to_ne_bytes());
    report[8..].copy_from_slice(&errno.to_ne_bytes());
    // SAFETY: `report` is as long as is said; MSG_NOSIGNAL: a dead supervisor must not turn this into a signal.
    unsafe { libc::send(with.gate, report.as_ptr().cast(), REPORT, libc::MSG_NOSIGNAL) };
    // SAFETY: ends this process at once, without running anything of the parent's.
    unsafe { libc::_exit(127) }
}

struct Failed {
    step: u32,
    part: u32,
    errno: c_int,
}

type Step = fn(&mut Prepared) -> Result<(), Failed>;

macro_rules! check {
    ($step:expr, $call:expr) => {
        check!($step, 0, $call)
    };
    ($step:expr, $part:expr, $call:expr) => {{
        // SAFETY: a system call with arguments that live until it returns; its result is checked.
        let result = unsafe { $call };
        if result < 0 {
            return Err(Failed { step: $step, part: $part, errno: Errno::last_raw() });
        }
        result
    }};
}

/// Turns this process into what the plan says; returns only to report what failed.
fn confine(with: &mut Prepared) -> Failed {
    let steps: [Step; 8] = [start_anew, score, enter, place, wait, limit, drop_rights, become_program];
    for step in steps {
        if let Err(failed) = step(with) {
            return failed;
        }
    }
    Failed { step: EXECVE, part: 0, errno: 0 }
}

/// Signals: dispositions and mask as a new program expects them. First: until here all are blocked, as the supervisor's own handlers write to descriptors by number,
/// and these numbers are about to be a disk's.
fn start_anew(_: &mut Prepared) -> Result<(), Failed> {
    // rt_sigaction(2) itself, with a structure of handler, flags, restorer and mask: all zero, it is SIG_DFL. glibc's own function takes a lock for SIGABRT (2.41),
    // and a thread of the parent's that was starting a program at the moment of the clone holds it here for ever.
    let default = [0u64; 4];
    let nothing = std::ptr::null::<u64>();
    for signal in (1..=SIGNALS_MOST).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal)) {
        check!(SIGNALS, libc::syscall(libc::SYS_rt_sigaction, c_long::from(signal), default.as_ptr(), nothing, SIGNAL_MASK_BYTES));
    }
    // SAFETY: an all-zero sigset_t is an empty set on Linux.
    let empty: libc::sigset_t = unsafe { std::mem::zeroed() };
    check!(SIGNALS, libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut()));
    check!(SIGNALS, libc::setsid());
    Ok(())
}

/// The supervisor's own score would keep QEMU alive longer than the host's daemons. Raising it needs no right, and only root's process may write here. A
/// host that hides the file keeps its own ways.
fn score(_: &mut Prepared) -> Result<(), Failed> {
    // SAFETY: a path that lives, and flags.
    let score = unsafe { libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    if score >= 0 {
        check!(LIMITS, libc::write(score, c"0".as_ptr().cast(), 1));
    }
    Ok(())
}

/// Into the network and the tree. The mount namespace is a copy of the supervisor's, and nothing of that is left at the end.
fn enter(with: &mut Prepared) -> Result<(), Failed> {
    let Some(tree) = with.root else { return Ok(()) };
    if let Some(network) = with.network {
        check!(NETWORK, libc::setns(network, libc::CLONE_NEWNET));
    }
    // What is mounted and unmounted from here on is nobody else's, and what the host mounts does not come in.
    check!(MOUNTS, libc::mount(std::ptr::null(), c"/".as_ptr(), std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE, std::ptr::null()));
    let here = c_long::from(libc::AT_FDCWD);
    let root = c_long::from(tree);
    check!(MOUNTS, libc::syscall(libc::SYS_move_mount, root, c"".as_ptr(), here, STEPPING_STONE.as_ptr(), MOVE_MOUNT_F_EMPTY_PATH));
    for (number, part) in (0..).zip(&with.parts) {
        let mount = match part.made {
            Made::Mount(mount) => c_long::from(mount),
            Made::Proc => process_files(number)?,
        };
        check!(PART, number, libc::syscall(libc::SYS_move_mount, mount, c"".as_ptr(), root, part.at, MOVE_MOUNT_F_EMPTY_PATH));
    }
    // pivot_root(2), "pivot_root(".", ".")": the old root then lies over the new one, and is taken off.
    check!(ROOT, libc::fchdir(tree));
    check!(ROOT, libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()));
    check!(ROOT, libc::umount2(c".".as_ptr(), libc::MNT_DETACH));
    check!(ROOT, libc::chdir(c"/".as_ptr()));
    if let Err(error) = Attributes::READ_ONLY.apply(libc::AT_FDCWD, c"/", 0) {
        return Err(Failed { step: ROOT, part: 0, errno: error.raw_os_error().unwrap_or(0) });
    }
    Ok(())
}

/// A `/proc` of this process namespace, which only a process in it can make: processes, and none of the kernel's own files. Read-only: its files change how the
/// kernel treats a process.
fn process_files(number: u32) -> Result<c_long, Failed> {
    let nothing = std::ptr::null::<c_char>();
    let context = check!(PART, number, libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), CLOEXEC));
    check!(PART, number, libc::syscall(libc::SYS_fsconfig, context, FSCONFIG_SET_STRING, c"subset".as_ptr(), c"pid".as_ptr(), 0));
    check!(PART, number, libc::syscall(libc::SYS_fsconfig, context, FSCONFIG_CMD_CREATE, nothing, nothing, 0));
    Ok(check!(PART, number, libc::syscall(libc::SYS_fsmount, context, CLOEXEC, PROC_ATTRIBUTES)))
}

/// Descriptors: first out of the way of the numbers they are to have, then to those numbers, the program and the gate behind them. All others go now, and not
/// at exec: while the parent's end of our gate is open here, or in a sister that waits at hers, the parent's death would not show.
fn place(with: &mut Prepared) -> Result<(), Failed> {
    let own = c_int::try_from(with.fds.len()).unwrap_or(c_int::MAX - 2);
    for fd in with.fds.iter_mut().chain([&mut with.program, &mut with.gate]) {
        *fd = check!(DESCRIPTORS, libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, (own + 2).max(64)));
    }
    for (target, fd) in (0..).zip(&with.fds) {
        check!(DESCRIPTORS, libc::dup2(*fd, target));
    }
    check!(DESCRIPTORS, libc::dup3(with.program, own, libc::O_CLOEXEC));
    with.program = own;
    check!(DESCRIPTORS, libc::dup3(with.gate, own + 1, libc::O_CLOEXEC));
    with.gate = own + 1;
    check!(DESCRIPTORS, libc::syscall(libc::SYS_close_range, c_long::from(own + 2), c_long::from(u32::MAX), 0));
    Ok(())
}

fn wait(with: &mut Prepared) -> Result<(), Failed> {
    let mut byte = 0u8;
    // SAFETY: one byte into `byte`.
    let got = unsafe { libc::read(with.gate, (&raw mut byte).cast(), 1) };
    if got != 1 {
        // The supervisor is gone, and the ledger says that nothing was started.
        // SAFETY: as in `live`.
        unsafe { libc::_exit(125) }
    }
    Ok(())
}

fn limit(with: &mut Prepared) -> Result<(), Failed> {
    let limit = |value: u64| libc::rlimit { rlim_cur: value, rlim_max: value };
    // No core: it would hold the guest's memory (THREATS 21).
    let all = [(libc::RLIMIT_CORE, 0), (libc::RLIMIT_NOFILE, with.open_files), (libc::RLIMIT_NPROC, with.tasks), (libc::RLIMIT_MEMLOCK, with.locked_bytes)];
    // Without walls the user is whoever rehearses, with processes of their own; and may not raise a limit.
    for (which, value) in all.into_iter().take(if with.root.is_some() { all.len() } else { 1 }) {
        let value = limit(value);
        check!(LIMITS, libc::setrlimit(which, &raw const value));
    }
    // SAFETY: umask can't fail.
    unsafe { libc::umask(0o077) };
    Ok(())
}

fn drop_rights(with: &mut Prepared) -> Result<(), Failed> {
    check!(CAPABILITIES, libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    if with.root.is_none() {
        return Ok(());
    }
    // The bounding set goes first, while there is CAP_SETPCAP; EINVAL is the first number that is no capability.
    for capability in 0..64 {
        // SAFETY: a system call with integer arguments.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            let errno = Errno::last_raw();
            if errno == libc::EINVAL {
                break;
            }
            return Err(Failed { step: CAPABILITIES, part: 0, errno });
        }
    }
    // The system calls themselves: glibc's wrappers would want to tell threads that do not exist here.
    check!(GROUPS, libc::syscall(libc::SYS_setgroups, with.groups.len(), with.groups.as_ptr()));
    check!(GROUPS, libc::syscall(libc::SYS_setresgid, with.uid, with.uid, with.uid));
    // Leaving uid 0 clears every capability set (capabilities(7)).
    check!(USER, libc::syscall(libc::SYS_setresuid, with.uid, with.uid, with.uid));
    // A session keyring of its own: the one inherited is root's, and whoever possesses it reads what is in it (keyrings(7)). ENOSYS: a kernel
    // without keys.
    // SAFETY: a system call with an integer and a null pointer.
    if unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<c_char>()) } < 0 && Errno::last_raw() != libc::ENOSYS {
        return Err(Failed { step: USER, part: 0, errno: Errno::last_raw() });
    }
    Ok(())
}

/// The filter last: it refuses what was done above.
fn become_program(with: &mut Prepared) -> Result<(), Failed> {
    if with.root.is_some() {
        let mode = c_long::from(libc::SECCOMP_SET_MODE_FILTER);
        check!(FILTER, libc::syscall(libc::SYS_seccomp, mode, 0, &raw const with.filter));
    }
    let environment = [c"LC_ALL=C".as_ptr(), std::ptr::null()];
    check!(EXECVE, libc::syscall(libc::SYS_execveat, with.program, c"".as_ptr(), with.argv.as_ptr(), environment.as_ptr(), libc::AT_EMPTY_PATH));
    Ok(())
}
