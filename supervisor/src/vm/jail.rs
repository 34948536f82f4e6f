//! The jail: the one way in which a program is started here, and which no death of ours can leave half made.
//!
//! ```text
//!   supervisor                                     child (still our program)
//!   ----------                                     -------------------------
//!   makes the tree's mounts, detached (`root`)
//!   compiles the filter (`filter`)
//!   clone -----------------------------------------> in new namespaces: mounts, processes, IPC, network
//!                                                    moves the mounts into a tree, and has no other root (`child`)
//!                                                    keeps its own descriptors only
//!                                                    waits at the gate (reads one byte)
//!   writes pid and start time into the ledger             |   gate closed instead (we died): exits, nothing was started
//!   has it moved into its scope (see `scope`)             |
//!   opens the gate (writes one byte) ----------------->   v
//!                                                    limits, capabilities, groups, user, no_new_privs, filter
//!   reads: end of file = exec worked <-------------- execveat (the gate is close-on-exec)
//!          12 bytes = step, part, errno <----------- or what failed; exits
//! ```
//!
//! The child of a process with threads may only make system calls until it execs: no allocation, no lock, no Rust runtime. So everything it needs lies ready
//! before the clone. What takes its time (the namespaces, the tree) is done before the gate, beside the ledger and the scope.
//!
//! | file     |                                                                     |
//! |----------|---------------------------------------------------------------------|
//! | `root`   | what is in the tree                                                 |
//! | `mount`  | detached mounts                                                     |
//! | `filter` | system calls that are refused                                       |
//! | `child`  | the steps of the child, in system calls                             |
//!
//! The program is process 1 of its namespace (`pid_namespaces(7)`), with what follows from that:
//! * a signal that it has no handler for does not reach it, but for `SIGKILL`. QEMU handles `SIGTERM` from early on; before that, only `SIGKILL` ends it;
//! * `abort(3)` can't raise `SIGABRT`, and ends by the fault that it causes then: `SIGSEGV` is what is seen;
//! * when it ends, so does all that it started.

#![allow(unsafe_code)]

mod child;
pub mod filter;
pub mod mount;
pub mod root;

use super::lingering::{self, NotStarted};
use child::{Made, Part, Prepared, REPORT, STEPS};
use diarch_ipc::Error;
pub use filter::{Sandbox, Sockets};
use nix::libc;
use nix::sys::signal::SigmaskHow;
pub use root::Root;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::{CString, c_char, c_int, c_long};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A process to be made.
#[derive(Debug)]
pub struct Plan {
    /// The program, opened; executed from this descriptor. It need not be in the tree.
    pub program: OwnedFd,
    pub argv: Vec<String>,
    /// What becomes descriptor 0, 1, 2, ... of the process.
    pub fds: Vec<OwnedFd>,
    /// Its user and group, both the same number.
    pub uid: u32,
    /// Other groups: that of `/dev/kvm`, for a VM that may use it.
    pub groups: Vec<u32>,
    pub limits: Limits,
    pub root: Root,
    pub network: Network,
    pub sockets: Sockets,
    pub sandbox: Sandbox,
    pub walls: Walls,
}

/// Whether there is a jail at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walls {
    Jail,
    /// In a rehearsal an ordinary user can make none: the program runs as that user, in the host's own tree, with the limits and descriptors of the plan.
    Stage,
}

/// What the kernel counts for the process or its user, hard and soft.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Threads and processes of this user at most.
    pub tasks: u64,
    pub open_files: u64,
    /// Bytes of memory that can't be moved or swapped: none but [`LOCKED_BYTES`], unless a device reads and writes the guest's memory.
    pub locked_bytes: u64,
}

/// Enough for a cryptographic library's keys.
pub const LOCKED_BYTES: u64 = 64 * 1024;

/// Which network it is in.
#[derive(Debug)]
pub enum Network {
    /// One of its own, in which there is a loopback interface that is down.
    Own,
    /// The supervisor's, which is the host's.
    Host,
    /// This network namespace.
    Given(OwnedFd),
}

/// A child that is told to go has a few system calls before it.
const GOING: Duration = Duration::from_secs(1);

/// A child that waits at the gate. Dropped, it is told to go, and is reaped.
#[derive(Debug)]
pub struct Gated {
    pub pid: u32,
    pub pidfd: OwnedFd,
    /// The same again, for whoever gets the program or what is left of it: there may be no descriptor to be had then.
    spare: Option<OwnedFd>,
    gate: Option<UnixStream>,
    /// The parts of its tree, for the sentence.
    parts: Vec<String>,
}

impl Drop for Gated {
    fn drop(&mut self) {
        // Open still: nothing was let through, and the child goes as soon as it sees the end.
        if self.gate.take().is_some() {
            lingering::ends(&self.pidfd, GOING);
        }
    }
}

/// One at a time: a child made in the middle of another's making could inherit a gate that nobody closes for it.
static ONE_FORK: Mutex<()> = Mutex::new(());

/// Makes the child. It becomes the program at [`Gated::open`], and not before.
pub fn fork(plan: Plan) -> Result<Gated, Error> {
    let step = |name: &str, error: io::Error| Error::io(name, &error);
    let argv: Vec<CString> =
        plan.argv.iter().map(|arg| CString::new(arg.as_str()).map_err(|_| Error::invalid("argv", "an argument holds a NUL byte"))).collect::<Result<_, _>>()?;
    let mut pointers: Vec<*const c_char> = argv.iter().map(|arg| arg.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let mut filter = filter::program(plan.sandbox, plan.sockets).map_err(|e| step("system call filter", io::Error::other(e)))?;
    // QEMU looks for its modules and firmware by a path from where it lies (`/usr/bin/../lib/...`), so that place must be there. The program is not in it.
    let place = std::fs::read_link(format!("/proc/self/fd/{}", plan.program.as_raw_fd())).ok();
    let place = place.as_deref().and_then(Path::parent).filter(|place| *place != Path::new("/"));
    let root = match place {
        Some(place) => plan.root.empty(place),
        None => plan.root,
    };
    let (tree, mut namespaces) = match plan.walls {
        Walls::Jail => (Some(root.build()?), libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC),
        Walls::Stage => (None, 0),
    };
    let network = match &plan.network {
        _ if plan.walls == Walls::Stage => None,
        Network::Own => {
            namespaces |= libc::CLONE_NEWNET;
            None
        }
        Network::Host => None,
        Network::Given(namespace) => Some(namespace.as_raw_fd()),
    };
    let parts = tree.iter().flat_map(|tree| &tree.parts).map(|part| Part {
        at: part.at.as_ptr(),
        made: match &part.made {
            root::Made::Mount(mount) => Made::Mount(mount.as_raw_fd()),
            root::Made::Proc => Made::Proc,
        },
    });

    let _one = ONE_FORK.lock().unwrap_or_else(PoisonError::into_inner);
    let (ours, theirs) = UnixStream::pair().map_err(|e| step("gate", e))?;
    let mut prepared = Prepared {
        program: plan.program.as_raw_fd(),
        argv: pointers,
        fds: plan.fds.iter().map(AsRawFd::as_raw_fd).collect(),
        uid: plan.uid,
        groups: plan.groups,
        tasks: plan.limits.tasks,
        open_files: plan.limits.open_files,
        locked_bytes: plan.limits.locked_bytes,
        gate: theirs.as_raw_fd(),
        network,
        root: tree.as_ref().map(|tree| tree.root.as_raw_fd()),
        parts: parts.collect(),
        filter: libc::sock_fprog {
            len: u16::try_from(filter.len()).map_err(|e| step("system call filter", io::Error::other(e)))?,
            filter: filter.as_mut_ptr().cast(),
        },
    };
    let before = nix::sys::signal::SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK).map_err(|e| step("signals", e.into()))?;
    let forked = clone_into(namespaces);
    let error = io::Error::last_os_error();
    if forked != 0 {
        before.thread_set_mask().map_err(|e| step("signals", e.into()))?;
    }
    match forked {
        -1 => Err(step("clone", error)),
        0 => child::live(&mut prepared),
        pid => {
            drop(theirs);
            let pid = u32::try_from(pid).map_err(|_| Error::Failed { step: "clone".into(), errno: None, detail: "no pid".into() })?;
            // Race-free: the child is ours and not reaped, so its number can't have been given to another.
            let raw = Pid::from_raw(pid.cast_signed()).ok_or_else(|| step("clone", io::Error::from(io::ErrorKind::InvalidData)))?;
            let pidfd = pidfd_open(raw, PidfdFlags::NONBLOCK).map_err(|e| step("pidfd_open", e.into()))?;
            let spare = Some(pidfd.try_clone().map_err(|e| step("dup", e))?);
            Ok(Gated { pid, pidfd, spare, gate: Some(ours), parts: tree.into_iter().flat_map(|tree| tree.parts).map(|part| part.name).collect() })
        }
    }
}

/// clone(2) as fork(2) is, into new namespaces. The system call itself: the C library's function wants a stack and a function to run on it.
fn clone_into(namespaces: c_int) -> c_long {
    let flags = c_long::from(namespaces | libc::SIGCHLD);
    // SAFETY: without CLONE_VM the child has a copy of this memory and goes on here, on its own copy of this stack; all pointers are null. It runs `child::live`
    // only, which makes system calls on memory prepared before and never returns.
    unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) }
}

impl Gated {
    /// Lets the child go on, and waits until it is the new program. One that did not become it is ended and reaped, if the kernel lets it end.
    pub fn open(mut self, within: Duration) -> Result<OwnedFd, Box<NotStarted>> {
        self.become_program(within).map_err(|error| Box::new(NotStarted { error, left: self.end(), record: None }))
    }

    /// Tells the child to go, and gives it if it does not end, though it was killed.
    pub fn close(mut self) -> Option<OwnedFd> {
        self.end().pop()
    }

    fn end(&mut self) -> Vec<OwnedFd> {
        // It goes as soon as it sees this.
        drop(self.gate.take());
        let spare: Vec<OwnedFd> = self.spare.take().into_iter().collect();
        if lingering::ends(&self.pidfd, GOING) { Vec::new() } else { lingering::kill(spare, lingering::KILLED) }
    }

    fn become_program(&mut self, within: Duration) -> Result<OwnedFd, Error> {
        let step = |name: &str, error: &io::Error| Error::io(name, error);
        let opened = || Error::Failed { step: "gate".into(), errno: None, detail: "it was opened before".into() };
        let mut gate = self.gate.take().ok_or_else(opened)?;
        gate.set_read_timeout(Some(within)).map_err(|e| step("gate", &e))?;
        // A child that failed before it came to the gate has said why, and is gone.
        let pushed = gate.write_all(&[1]);
        let mut report = [0u8; REPORT];
        match (gate.read_exact(&mut report), pushed) {
            (Ok(()), _) => Err(self.reported(report)),
            (Err(_), Err(error)) => Err(step("gate", &error)),
            (Err(error), Ok(())) if error.kind() == io::ErrorKind::UnexpectedEof => self.spare.take().ok_or_else(opened),
            (Err(error), Ok(())) if error.kind() == io::ErrorKind::WouldBlock => {
                let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
                Err(Error::Timeout { step: "exec".into(), after_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX) })
            }
            (Err(error), Ok(())) => Err(step("exec", &error)),
        }
    }

    /// What the child has said of its failure, if it has: then what else fails is only what follows from that.
    pub fn failure(&self) -> Option<Error> {
        let mut gate = self.gate.as_ref()?;
        gate.set_nonblocking(true).ok()?;
        let mut report = [0u8; REPORT];
        let said = gate.read_exact(&mut report);
        gate.set_nonblocking(false).ok()?;
        said.ok().map(|()| self.reported(report))
    }

    fn reported(&self, report: [u8; REPORT]) -> Error {
        let word = |at: usize| report.iter().skip(at).take(4).copied().collect::<Vec<u8>>().try_into().map(u32::from_ne_bytes).unwrap_or(u32::MAX);
        let (number, part, errno) = (word(0), word(4), word(8).cast_signed());
        let name = STEPS.get(usize::try_from(number).unwrap_or(usize::MAX)).unwrap_or(&"child");
        let error = io::Error::from_raw_os_error(errno);
        match self.parts.get(usize::try_from(part).unwrap_or(usize::MAX)) {
            Some(path) if number == child::PART => Error::io(format!("{name}: {path}"), &error),
            _ => Error::io(*name, &error),
        }
    }
}
