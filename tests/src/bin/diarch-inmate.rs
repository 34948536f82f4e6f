//! A QEMU that was taken over: from inside its jail it tries what an attacker would, and writes what came of it to its standard output, as one line of JSON.
//!
//! It takes QEMU's arguments; what it is to try stands in the guest's command line (`-append`), word by word. Then it waits to be killed.
//!
//! | word             | what it tries                                                       |
//! |------------------|---------------------------------------------------------------------|
//! | `open=PATH`      | to open a file or node for reading, and for writing                 |
//! | `list=PATH`      | to list a directory                                                 |
//! | `connect=PATH`   | to connect to a UNIX socket, as a stream and in packets             |
//! | `abstract=NAME`  | to connect to a UNIX socket that has no path                        |
//! | `reach=PORT`     | to connect to this port of 127.0.0.1                                |
//! | `signal=PID`     | whether it could signal this process (or `-1`: any)                 |
//!
//! Whatever it is told, it also tells: its status and limits, processes, mounts, descriptors, interfaces, the tree, where it can write, and what it gets by
//! asking the kernel for more.

use nix::errno::Errno;
use nix::libc;
use std::collections::BTreeMap;
use std::ffi::{CString, c_long};
use std::fmt::Display;
use std::fs::{self, File};
use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::{Path, PathBuf};

type Report = BTreeMap<String, Vec<String>>;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let words = args.iter().position(|arg| arg == "-append").and_then(|at| args.get(at + 1)).map_or("", String::as_str);
    let mut report = Report::new();
    let mut tell = |what: &str, lines: Vec<String>| report.entry(what.to_owned()).or_default().extend(lines);
    // First: what it opens below is not to be among them.
    tell("descriptors", descriptors());
    for file in ["status", "limits", "mountinfo", "net/dev", "cgroup"] {
        tell(file, fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_else(|error| word(&error)).lines().map(str::to_owned).collect());
    }
    tell("pid", vec![std::process::id().to_string()]);
    tell("environment", std::env::vars().map(|(name, value)| format!("{name}={value}")).collect());
    tell("processes", names("/proc").into_iter().filter(|name| name.parse::<u32>().is_ok()).collect());
    tell("proc", names("/proc").into_iter().filter(|name| name.parse::<u32>().is_err()).collect());
    for directory in ["/", "/dev", "/etc", "/run", "/usr", "/run/vm"] {
        tell(&format!("in {directory}"), names(directory));
    }
    tell("writable", writable());
    tell("lo", vec![loopback()]);
    tell("asked", asked());
    for order in words.split_whitespace() {
        let (what, with) = order.split_once('=').unwrap_or((order, ""));
        let came = match what {
            "open" => vec![outcome(File::open(with)), outcome(File::options().write(true).open(with))],
            "list" => names(with),
            "connect" => vec![outcome(UnixStream::connect(with)), outcome(diarch_tests::wire::connect(Path::new(with)))],
            "abstract" => vec![outcome(SocketAddr::from_abstract_name(with).and_then(|name| UnixStream::connect_addr(&name)))],
            "reach" => vec![outcome(std::net::TcpStream::connect(("127.0.0.1", with.parse().unwrap_or(0))))],
            "signal" => vec![call(libc::SYS_kill, [with.parse().unwrap_or(0), 0, 0])],
            _ => vec!["what?".to_owned()],
        };
        tell(order, came);
    }
    let line = serde_json::to_string(&report).unwrap_or_default();
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
    loop {
        std::thread::park();
    }
}

fn word(error: &std::io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |errno| format!("{:?}", Errno::from_raw(errno)))
}

fn outcome<T>(result: std::io::Result<T>) -> String {
    result.map_or_else(|error| word(&error), |_| "done".into())
}

fn names(directory: &str) -> Vec<String> {
    let mut names: Vec<String> = match fs::read_dir(directory) {
        Ok(entries) => entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect(),
        Err(error) => vec![word(&error)],
    };
    names.sort();
    names
}

/// `NUMBER TARGET`, less the one that reads them.
fn descriptors() -> Vec<String> {
    let seen: Vec<(String, PathBuf)> = fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_string_lossy().into_owned(), fs::read_link(entry.path()).ok()?)))
        .collect();
    seen.into_iter().filter(|(_, target)| !target.starts_with("/proc")).map(|(number, target)| format!("{number} {}", target.display())).collect()
}

/// Every directory of the whole tree in which it can make a file, change a mode, or make a node.
fn writable() -> Vec<String> {
    let mut found = Vec::new();
    let mut looked = 0;
    let mut queue = vec![PathBuf::from("/")];
    while let Some(directory) = queue.pop() {
        looked += 1;
        let new = directory.join("inmate");
        if File::create(&new).is_ok() || fs::create_dir(&new).is_ok() || std::os::unix::fs::symlink("x", &new).is_ok() {
            found.push(directory.display().to_string());
        }
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        queue.extend(entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()));
    }
    found.push(format!("of {looked}"));
    found
}

/// Whether the loopback interface is up; asked over a UNIX socket, as it can make no other.
fn loopback() -> String {
    let Ok((socket, _)) = UnixStream::pair() else { return "no socket".into() };
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    // SAFETY: a request that this call reads and writes.
    if unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCGIFFLAGS, &raw mut request) } < 0 {
        return format!("{:?}", Errno::last());
    }
    // SAFETY: SIOCGIFFLAGS has written the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if i32::from(flags) & libc::IFF_UP == 0 { "down".into() } else { "up".into() }
}

fn call(number: c_long, arguments: [c_long; 3]) -> String {
    let [a, b, c] = arguments;
    // SAFETY: the callers' arguments are numbers, or addresses of strings and structures that live until the call returns.
    let result = unsafe { libc::syscall(number, a, b, c, 0, 0, 0) };
    if result < 0 { format!("{:?}", Errno::last()) } else { "done".into() }
}

/// What it asks the kernel for, a line for each.
fn asked() -> Vec<String> {
    let text = |text: &str| CString::new(text).unwrap_or_default();
    let (proc, here, tmpfs, own) = (text("proc"), text("/run/vm"), text("tmpfs"), text("/run/vm/node"));
    let at = |text: &CString| text.as_ptr().addr() as c_long;
    let mut asked = Vec::new();
    let mut ask = |what: &dyn Display, came: String| asked.push(format!("{what}: {came}"));
    for (name, flag) in [
        ("user", libc::CLONE_NEWUSER),
        ("mount", libc::CLONE_NEWNS),
        ("network", libc::CLONE_NEWNET),
        ("pid", libc::CLONE_NEWPID),
        ("user and mount", libc::CLONE_NEWUSER | libc::CLONE_NEWNS),
    ] {
        ask(&format!("unshare {name}"), call(libc::SYS_unshare, [flag.into(), 0, 0]));
    }
    ask(&"clone user", call(libc::SYS_clone, [(libc::CLONE_NEWUSER | libc::SIGCHLD).into(), 0, 0]));
    ask(&"mount", call(libc::SYS_mount, [at(&tmpfs), at(&here), at(&tmpfs)]));
    ask(&"fsopen", call(libc::SYS_fsopen, [at(&proc), 0, 0]));
    ask(&"umount", call(libc::SYS_umount2, [at(&here), libc::MNT_DETACH.into(), 0]));
    ask(&"chroot", call(libc::SYS_chroot, [at(&here), 0, 0]));
    ask(&"setuid", call(libc::SYS_setuid, [0, 0, 0]));
    ask(&"setgid", call(libc::SYS_setgid, [0, 0, 0]));
    ask(&"setgroups", call(libc::SYS_setgroups, [0, 0, 0]));
    ask(&"bounding set", call(libc::SYS_prctl, [libc::PR_CAPBSET_READ.into(), 21, 0]));
    ask(&"ambient", call(libc::SYS_prctl, [libc::PR_CAP_AMBIENT.into(), libc::PR_CAP_AMBIENT_RAISE.into(), 21]));
    ask(&"every capability", raise_all());
    ask(&"ptrace", call(libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH), 1, 0]));
    ask(&"traceme", call(libc::SYS_ptrace, [i64::from(libc::PTRACE_TRACEME), 0, 0]));
    ask(&"bpf", call(libc::SYS_bpf, [0, 0, 0]));
    ask(&"io_uring", call(libc::SYS_io_uring_setup, [1, 0, 0]));
    ask(&"keys", call(libc::SYS_keyctl, [0, -3, 0]));
    ask(&"shared memory", call(libc::SYS_shmget, [0x7e57, 4096, 0o1600]));
    ask(&"internet", call(libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0]));
    ask(&"packets", call(libc::SYS_socket, [libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0]));
    ask(&"node", call(libc::SYS_mknod, [at(&own), (libc::S_IFCHR | 0o666).into(), libc::makedev(1, 1).cast_signed()]));
    ask(&"more descriptors", more(libc::RLIMIT_NOFILE));
    ask(&"more locked memory", more(libc::RLIMIT_MEMLOCK));
    ask(&"a core", more(libc::RLIMIT_CORE));
    ask(&"run what it wrote", run_own());
    asked
}

/// All capabilities, by the numbers of linux/capability.h.
fn raise_all() -> String {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    let sets = [u32::MAX; 6];
    call(libc::SYS_capset, [(&raw const header).addr() as c_long, sets.as_ptr().addr() as c_long, 0])
}

fn more(which: libc::__rlimit_resource_t) -> String {
    let limit = libc::rlimit { rlim_cur: 1 << 40, rlim_max: 1 << 40 };
    // SAFETY: a structure that the call reads.
    if unsafe { libc::setrlimit(which, &raw const limit) } < 0 { format!("{:?}", Errno::last()) } else { "done".into() }
}

/// A program of its own, in its own directory. It is a poor one: where it may be run, the error is `ENOEXEC`.
fn run_own() -> String {
    use std::os::unix::fs::PermissionsExt;
    let path = Path::new("/run/vm/program");
    let written = fs::write(path, "\x7fELF").and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)));
    match written.and_then(|()| std::process::Command::new(path).spawn().map(drop)) {
        Ok(()) => "done".into(),
        Err(error) => word(&error),
    }
}
