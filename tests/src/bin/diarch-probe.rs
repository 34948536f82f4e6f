//! A curious program: put somewhere in a booted machine (a unit, another user's hands), it tries what the test says and tells what came of it.
//!
//! ```text
//!   diarch-probe hello SOCKET [VIA]      says Hello; with VIA on a connection that somebody else made and hands over there
//!   diarch-probe lend SOCKET VIA         makes a connection and hands it over to who comes to VIA
//!   diarch-probe leave SOCKET            says Hello and is gone before it could be answered
//!   diarch-probe bind SOCKET             makes a socket
//!   diarch-probe squat SOCKET UID        makes one and serves it as UID, without a word
//!   diarch-probe reach ADDRESS PORT      opens a TCP connection
//!   diarch-probe listen ADDRESS PORT     waits for some
//!   diarch-probe calls                   makes system calls that do nothing, one in each process
//!   diarch-probe keep PID NAME           takes a copy of a process's descriptor, and keeps it until it is killed
//!   diarch-probe jail DIRECTORY          what a VM's jail is made of: namespaces, a mount by descriptor, one by path
//! ```

use diarch_ipc::frame::ServerFrame;
use diarch_tests::wire::{Raw, Received, connect};
use nix::errno::Errno;
use nix::libc;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg};
use std::ffi::{c_int, c_long, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["hello", socket] => connect(Path::new(socket)).map(|socket| hello(Raw::new(socket))),
        ["hello", _, via] => borrow(Path::new(via)).map(|socket| hello(Raw::new(socket))),
        ["lend", socket, via] => lend(Path::new(socket), Path::new(via)).map(|()| "lent".into()),
        ["leave", socket] => leave(Path::new(socket)),
        ["bind", socket] => serve(Path::new(socket)).map(|_| "bound".into()),
        ["squat", socket, uid] => squat(Path::new(socket), uid.parse().expect("a user id")),
        ["reach", address, port] => reach(address, port.parse().expect("a port")),
        ["listen", address, port] => listen(address, port.parse().expect("a port")),
        ["keep", pid, name] => keep(pid.parse().expect("a number"), name),
        ["calls"] => Ok(calls()),
        ["jail", directory] => Ok(jail(directory)),
        _ => {
            eprintln!("diarch-probe: not {words:?}");
            return ExitCode::from(2);
        }
    };
    // What was refused is an answer too.
    println!("{}", done.unwrap_or_else(|error| error.raw_os_error().map_or(error.to_string(), |errno| format!("{:?}", Errno::from_raw(errno)))));
    ExitCode::SUCCESS
}

// ---- the supervisor's socket ----

fn hello(raw: Raw) -> String {
    match raw.hello() {
        Received::Frame(frame, _) => match *frame {
            ServerFrame::Hello(_) => "welcome".into(),
            ServerFrame::Refused(error) => format!("refused: {error}"),
            other => format!("{other:?}"),
        },
        Received::Closed => "closed".into(),
        Received::Silence => "silence".into(),
    }
}

fn serve(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket()?;
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 4)?;
    Ok(socket)
}

fn seqpacket() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn lend(socket: &Path, via: &Path) -> io::Result<()> {
    let connection = connect(socket)?;
    let door = serve(via)?;
    // Who comes is another user, perhaps.
    std::fs::set_permissions(via, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let taker = Raw::new(rustix::net::accept(&door)?);
    taker.send(b"take it", &[connection.as_fd()])?;
    // Stays while it is used: a connection whose maker has ended is another case.
    let mut end = [0u8; 1];
    rustix::net::recv(taker.as_fd(), &mut end, RecvFlags::empty())?;
    Ok(())
}

/// Leaks the connection to the lender, which so ends with this process.
fn borrow(via: &Path) -> io::Result<OwnedFd> {
    let lender = connect(via)?;
    let mut bytes = [0u8; 16];
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&lender, &mut [io::IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    std::mem::forget(lender);
    let lent = control.drain().find_map(|message| if let RecvAncillaryMessage::ScmRights(mut fds) = message { fds.next() } else { None });
    lent.ok_or_else(|| io::Error::other("nothing was lent"))
}

/// What a process can send over a socket it could have sent to us; root takes it without asking.
fn keep(pid: i32, name: &str) -> io::Result<String> {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    for file in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let file = file?;
        if std::fs::read_link(file.path()).is_ok_and(|link| link.to_string_lossy() == name) {
            let number = file.file_name().to_string_lossy().parse().map_err(io::Error::other)?;
            let process = pidfd_open(Pid::from_raw(pid).ok_or_else(|| io::Error::other("no process"))?, PidfdFlags::empty())?;
            let _kept = pidfd_getfd(process, number, PidfdGetfdFlags::empty())?;
            println!("kept");
            loop {
                std::thread::park();
            }
        }
    }
    Err(io::Error::other(format!("process {pid} has no {name}")))
}

fn leave(socket: &Path) -> io::Result<String> {
    let raw = Raw::new(connect(socket)?);
    raw.send_frame(&diarch_ipc::frame::ClientFrame::Hello(diarch_ipc::frame::Hello::ours()), &[])?;
    Ok(format!("process {} was here", std::process::id()))
}

/// Whose a listening socket is, the kernel notes in listen(2).
fn squat(path: &Path, uid: u32) -> io::Result<String> {
    use rustix::process::Uid;
    let socket = seqpacket()?;
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    rustix::thread::set_thread_res_uid(Uid::from_raw(uid), Uid::from_raw(uid), Uid::from_raw(uid))?;
    rustix::net::listen(&socket, 4)?;
    loop {
        let guest = rustix::net::accept(&socket)?;
        // Takes what is said, so that only who serves here can put a guest off.
        let _ = rustix::net::recv(&guest, &mut [0u8; 1024], RecvFlags::empty());
        let _ = rustix::net::send(&guest, b"", SendFlags::NOSIGNAL);
    }
}

fn reach(address: &str, port: u16) -> io::Result<String> {
    let to = std::net::SocketAddr::new(address.parse().expect("an address"), port);
    let short = Duration::from_millis(500);
    match std::net::TcpStream::connect_timeout(&to, short) {
        Ok(_) => Ok("reached".into()),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok("no answer".into()),
        Err(error) => Err(error),
    }
}

fn listen(address: &str, port: u16) -> io::Result<String> {
    std::net::TcpListener::bind((address, port)).map(|_| "bound".into())
}

// ---- system calls ----

/// No address of this process.
const NOWHERE: c_long = 1;
/// Every flag, and no number that is one.
const ALL: c_long = -1;
const NONE: c_long = -1;

/// A system call that root may make and that does nothing: its arguments are wrong, or ask for what is so already. What it changes is its own process, which
/// ends with it.
struct Harmless {
    name: &'static str,
    number: c_long,
    arguments: [c_long; 6],
}

const fn call(name: &'static str, number: c_long, given: &[c_long]) -> Harmless {
    let mut arguments = [0; 6];
    let mut at = 0;
    while at < given.len() {
        arguments[at] = given[at];
        at += 1;
    }
    Harmless { name, number, arguments }
}

const fn namespace(name: &'static str, flag: c_int) -> Harmless {
    call(name, libc::SYS_unshare, &[flag as c_long])
}

const fn family(name: &'static str, family: c_int) -> Harmless {
    call(name, libc::SYS_socket, &[family as c_long, libc::SOCK_RAW as c_long])
}

const CLONE_NEWTIME: c_int = 0x80;
/// linux/personality.h: one that is not this process's.
const READ_IMPLIES_EXEC: c_long = 0x0040_0000;
const PTRACE_PEEKDATA: c_long = 2;
/// linux/fs.h: a mode that gives the owner's rights to who executes the file.
const SET_UID: c_long = 0o4755;
const RWX: c_long = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as c_long;
const PRIVATE: c_long = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as c_long;

#[rustfmt::skip]
const CALLS: &[Harmless] = &[
    // the host's end, and another kernel
    call("reboot", libc::SYS_reboot, &[]),
    call("kexec_load", libc::SYS_kexec_load, &[0, 0, 0, ALL]),
    call("kexec_file_load", libc::SYS_kexec_file_load, &[NONE, NONE, 0, 0, ALL]),
    // modules
    call("init_module", libc::SYS_init_module, &[]),
    call("finit_module", libc::SYS_finit_module, &[NONE, 0, ALL]),
    call("delete_module", libc::SYS_delete_module, &[]),
    // swap
    call("swapon", libc::SYS_swapon, &[]),
    call("swapoff", libc::SYS_swapoff, &[]),
    // the clock
    call("settimeofday", libc::SYS_settimeofday, &[NOWHERE]),
    call("clock_settime", libc::SYS_clock_settime, &[0, NOWHERE]),
    call("adjtimex", libc::SYS_adjtimex, &[NOWHERE]),
    call("clock_adjtime", libc::SYS_clock_adjtime, &[0, NOWHERE]),
    // hardware
    call("iopl", libc::SYS_iopl, &[4]),
    call("ioperm", libc::SYS_ioperm, &[65536, 1, 1]),
    // other processes, and the kernel watched
    call("ptrace", libc::SYS_ptrace, &[PTRACE_PEEKDATA]),
    call("process_vm_readv", libc::SYS_process_vm_readv, &[0, 0, 0, 0, 0, ALL]),
    call("process_vm_writev", libc::SYS_process_vm_writev, &[0, 0, 0, 0, 0, ALL]),
    call("pidfd_getfd", libc::SYS_pidfd_getfd, &[NONE, NONE, 0]),
    call("userfaultfd", libc::SYS_userfaultfd, &[ALL]),
    call("bpf", libc::SYS_bpf, &[ALL]),
    call("perf_event_open", libc::SYS_perf_event_open, &[NOWHERE, 0, NONE, NONE, ALL]),
    call("syslog", libc::SYS_syslog, &[ALL]),
    call("fanotify_init", libc::SYS_fanotify_init, &[ALL]),
    call("acct", libc::SYS_acct, &[NOWHERE]),
    call("quotactl", libc::SYS_quotactl, &[ALL]),
    call("open_by_handle_at", libc::SYS_open_by_handle_at, &[NONE, NOWHERE]),
    call("sethostname", libc::SYS_sethostname, &[0, NONE]),
    call("setdomainname", libc::SYS_setdomainname, &[0, NONE]),
    // what a filter does not see
    call("io_uring_setup", libc::SYS_io_uring_setup, &[0, NOWHERE]),
    call("io_uring_enter", libc::SYS_io_uring_enter, &[NONE]),
    call("io_uring_register", libc::SYS_io_uring_register, &[NONE]),
    call("io_setup", libc::SYS_io_setup, &[0, NOWHERE]),
    // keys
    call("add_key", libc::SYS_add_key, &[NOWHERE]),
    call("request_key", libc::SYS_request_key, &[NOWHERE]),
    call("keyctl", libc::SYS_keyctl, &[ALL]),
    // memory and queues found by number, or by name
    call("shmget", libc::SYS_shmget, &[]),
    call("shmat", libc::SYS_shmat, &[NONE]),
    call("shmctl", libc::SYS_shmctl, &[NONE]),
    call("shmdt", libc::SYS_shmdt, &[NOWHERE]),
    call("semget", libc::SYS_semget, &[]),
    call("semop", libc::SYS_semop, &[NONE]),
    call("semtimedop", libc::SYS_semtimedop, &[NONE]),
    call("semctl", libc::SYS_semctl, &[NONE]),
    call("msgget", libc::SYS_msgget, &[0x7e57]),
    call("msgsnd", libc::SYS_msgsnd, &[NONE]),
    call("msgrcv", libc::SYS_msgrcv, &[NONE]),
    call("msgctl", libc::SYS_msgctl, &[NONE]),
    call("mq_open", libc::SYS_mq_open, &[NOWHERE]),
    call("mq_unlink", libc::SYS_mq_unlink, &[NOWHERE]),
    call("mq_notify", libc::SYS_mq_notify, &[NONE]),
    call("mq_getsetattr", libc::SYS_mq_getsetattr, &[NONE]),
    call("mq_timedsend", libc::SYS_mq_timedsend, &[NONE]),
    call("mq_timedreceive", libc::SYS_mq_timedreceive, &[NONE]),
    // shares of the host
    call("setpriority", libc::SYS_setpriority, &[ALL]),
    call("ioprio_set", libc::SYS_ioprio_set, &[ALL]),
    call("sched_setscheduler", libc::SYS_sched_setscheduler, &[NONE]),
    call("sched_setparam", libc::SYS_sched_setparam, &[NONE]),
    call("sched_setattr", libc::SYS_sched_setattr, &[NONE]),
    call("sched_setaffinity", libc::SYS_sched_setaffinity, &[0, 8, NOWHERE]),
    call("set_mempolicy", libc::SYS_set_mempolicy, &[ALL]),
    call("mbind", libc::SYS_mbind, &[NOWHERE]),
    call("migrate_pages", libc::SYS_migrate_pages, &[NONE]),
    call("move_pages", libc::SYS_move_pages, &[0, 0, 0, 0, 0, ALL]),
    call("setrlimit", libc::SYS_setrlimit, &[ALL, NOWHERE]),
    call("mlockall", libc::SYS_mlockall, &[]),
    // users
    call("setuid", libc::SYS_setuid, &[NONE]),
    call("setresuid", libc::SYS_setresuid, &[NONE, NONE, NONE]),
    call("setresgid", libc::SYS_setresgid, &[NONE, NONE, NONE]),
    call("setgroups", libc::SYS_setgroups, &[NONE]),
    call("capset", libc::SYS_capset, &[NOWHERE]),
    call("chown", libc::SYS_chown, &[NOWHERE]),
    call("fchmodat set-uid", libc::SYS_fchmodat, &[NONE, NOWHERE, SET_UID]),
    // mounts
    call("chroot", libc::SYS_chroot, &[NOWHERE]),
    call("pivot_root", libc::SYS_pivot_root, &[NOWHERE, NOWHERE]),
    call("mount", libc::SYS_mount, &[NOWHERE, NOWHERE, NOWHERE]),
    call("umount2", libc::SYS_umount2, &[NOWHERE, ALL]),
    call("fsopen", libc::SYS_fsopen, &[NOWHERE, ALL]),
    call("fsmount", libc::SYS_fsmount, &[NONE, ALL]),
    call("open_tree", libc::SYS_open_tree, &[NONE, NOWHERE, ALL]),
    call("move_mount", libc::SYS_move_mount, &[NONE, NOWHERE, NONE, NOWHERE, ALL]),
    call("mount_setattr", libc::SYS_mount_setattr, &[NONE, NOWHERE, ALL]),
    call("openat2", libc::SYS_openat2, &[NONE, NOWHERE, NOWHERE, 4096]),
    // namespaces
    namespace("unshare mount", libc::CLONE_NEWNS),
    namespace("unshare network", libc::CLONE_NEWNET),
    namespace("unshare user", libc::CLONE_NEWUSER),
    namespace("unshare pid", libc::CLONE_NEWPID),
    namespace("unshare ipc", libc::CLONE_NEWIPC),
    namespace("unshare uts", libc::CLONE_NEWUTS),
    namespace("unshare cgroup", libc::CLONE_NEWCGROUP),
    namespace("unshare time", CLONE_NEWTIME),
    call("clone user", libc::SYS_clone, &[libc::CLONE_NEWUSER as c_long | libc::SIGCHLD as c_long]),
    call("clone3", libc::SYS_clone3, &[NOWHERE, 4096]),
    call("setns mount", libc::SYS_setns, &[NONE, libc::CLONE_NEWNS as c_long]),
    call("setns network", libc::SYS_setns, &[NONE, libc::CLONE_NEWNET as c_long]),
    call("setns user", libc::SYS_setns, &[NONE, libc::CLONE_NEWUSER as c_long]),
    call("setns any", libc::SYS_setns, &[NONE, 0]),
    // programs
    call("personality", libc::SYS_personality, &[READ_IMPLIES_EXEC]),
    call("seccomp", libc::SYS_seccomp, &[ALL]),
    call("mmap writable and executable", libc::SYS_mmap, &[0, 4096, RWX, PRIVATE, NONE]),
    // sockets
    family("socket netlink", libc::AF_NETLINK),
    family("socket packet", libc::AF_PACKET),
];

/// A line for each: its name, and `ok` or the error.
fn calls() -> String {
    let mut lines: Vec<String> = CALLS.iter().map(|call| format!("{}: {}", call.name, apart(|| make(call)))).collect();
    lines.push(format!("mprotect executable: {}", apart(make_executable)));
    lines.push(format!("getpid of another ABI: {}", apart(other_abi)));
    lines.join("\n")
}

/// Runs it in a process of its own: what it changes goes with it, and so does the process when the kernel kills it.
fn apart(action: impl FnOnce() -> c_int) -> String {
    use nix::sys::wait::{WaitStatus, waitpid};
    // SAFETY: this process has one thread; the child makes system calls and ends.
    match unsafe { nix::unistd::fork() }.expect("fork") {
        nix::unistd::ForkResult::Child => {
            let errno = action();
            // SAFETY: ends this process and nothing of its parent's.
            unsafe { libc::_exit(errno) }
        }
        nix::unistd::ForkResult::Parent { child } => match waitpid(child, None).expect("it is ours") {
            WaitStatus::Exited(_, 0) => "ok".into(),
            WaitStatus::Exited(_, errno) => format!("{:?}", Errno::from_raw(errno)),
            WaitStatus::Signaled(_, signal, _) => signal.to_string(),
            other => format!("{other:?}"),
        },
    }
}

/// 0, or the error.
fn make(call: &Harmless) -> c_int {
    let [a, b, c, d, e, f] = call.arguments;
    // SAFETY: none of these calls reads or writes memory of this process: their pointers are null or `NOWHERE`, which the kernel refuses.
    let result = unsafe { libc::syscall(call.number, a, b, c, d, e, f) };
    if call.number == libc::SYS_clone && result == 0 {
        // The new process.
        // SAFETY: ends it.
        unsafe { libc::_exit(0) };
    }
    if result < 0 { Errno::last_raw() } else { 0 }
}

/// What was written is to be run.
fn make_executable() -> c_int {
    let nowhere_in_particular = std::ptr::null_mut::<c_void>();
    // SAFETY: a new page of memory, which nobody else knows.
    let page = unsafe { libc::mmap(nowhere_in_particular, 4096, libc::PROT_READ | libc::PROT_WRITE, PRIVATE as c_int, -1, 0) };
    // SAFETY: that page, or a refused address.
    if unsafe { libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC) } < 0 { Errno::last_raw() } else { 0 }
}

/// getpid(2), as a program of 32 bits asks for it.
fn other_abi() -> c_int {
    const GETPID: u32 = 20;
    let result: u32;
    // SAFETY: the call takes no argument and returns a number in eax; the kernel may change r8 to r11 for it.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("eax") GETPID => result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    let result = result.cast_signed();
    if result < 0 { -result } else { 0 }
}

// ---- what a VM's jail is made of ----

/// What came of each step, a line for each: the first that fails is the last.
fn jail(directory: &str) -> String {
    let mut lines = Vec::new();
    for (name, step) in JAIL {
        let result = step(directory);
        let line = format!("{name}: {}", result.as_ref().map_or_else(|errno| format!("{errno:?}"), |()| "ok".into()));
        lines.push(line);
        if result.is_err() {
            break;
        }
    }
    lines.join("\n")
}

type Step = fn(&str) -> Result<(), Errno>;

const JAIL: &[(&str, Step)] = &[
    ("own namespaces", |_| nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS | nix::sched::CloneFlags::CLONE_NEWNET)),
    ("a mount by descriptor", |directory| {
        let (file_system, to) = (c"tmpfs", std::ffi::CString::new(directory).map_err(|_| Errno::EINVAL)?);
        let nothing = std::ptr::null::<c_void>();
        // SAFETY: a system call with a string that lives until it returns.
        let context = Errno::result(unsafe { libc::syscall(libc::SYS_fsopen, file_system.as_ptr(), libc::c_long::from(0)) })?;
        // FSCONFIG_CMD_CREATE, linux/mount.h.
        // SAFETY: a system call with integers and null pointers.
        Errno::result(unsafe { libc::syscall(libc::SYS_fsconfig, context, 6_i64, nothing, nothing, 0_i64) })?;
        // SAFETY: a system call with integers.
        let mount = Errno::result(unsafe { libc::syscall(libc::SYS_fsmount, context, 0_i64, 0_i64) })?;
        // MOVE_MOUNT_F_EMPTY_PATH, linux/mount.h.
        // SAFETY: a system call with strings that live until it returns.
        Errno::result(unsafe { libc::syscall(libc::SYS_move_mount, mount, c"".as_ptr(), i64::from(libc::AT_FDCWD), to.as_ptr(), 4_i64) })?;
        Ok(())
    }),
    ("a copy of a mount", |directory| {
        // OPEN_TREE_CLONE, linux/mount.h.
        let path = std::ffi::CString::new(directory).map_err(|_| Errno::EINVAL)?;
        // SAFETY: a system call with a string that lives until it returns.
        Errno::result(unsafe { libc::syscall(libc::SYS_open_tree, i64::from(libc::AT_FDCWD), path.as_ptr(), 1_i64) }).map(drop)
    }),
    ("a mount by path", |directory| {
        use nix::mount::{MsFlags, mount};
        mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, None::<&str>)
    }),
    ("another root", |directory| nix::unistd::chroot(directory)),
];
