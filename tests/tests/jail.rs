//! The jail of a VM, from inside: a program that was granted as a QEMU (`diarch-inmate`) is started by the real supervisor, tries what an attacker in its place
//! would, and tells. Where something must fail, the same user can do it outside: so it is the jail that stops it.

use diarch_ipc::name::{QemuName, Tenancy};
use diarch_ipc::operation::{Reply, Request, Signal, SignalKind, Spawn};
use diarch_ipc::spec::{DiskAccess, DiskFormat};
use diarch_supervisor::vm::jail::{self, Limits, Network, Plan, Root, Sandbox, Sockets, mount};
use diarch_supervisor::vm::{ability, lingering, spawn};
use diarch_tests::host::{Host, Session, binary};
use diarch_tests::need;
use diarch_tests::undying::{Undying, Until};
use diarch_tests::wire::{User, as_user, connect};
use nix::libc;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(10);

/// What the inmate tells.
struct Inmate {
    report: BTreeMap<String, Vec<String>>,
    pid: u32,
    uid: u32,
    tenancy: Tenancy,
}

impl Inmate {
    fn told(&self, what: &str) -> Vec<&str> {
        self.report.get(what).unwrap_or_else(|| panic!("nothing of {what:?}: {:#?}", self.report.keys())).iter().map(String::as_str).collect()
    }
    /// `WHAT: CAME` lines as a table.
    fn asked(&self) -> BTreeMap<&str, &str> {
        self.told("asked").into_iter().filter_map(|line| line.split_once(": ")).collect()
    }
    fn field(&self, file: &str, name: &str) -> &str {
        self.told(file).into_iter().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {file}")).trim()
    }
}

fn host() -> Host {
    host_with(String::new())
}

fn host_with(more: String) -> Host {
    let mut builder = Host::builder().without_worker();
    builder.qemus.push(("inmate", "diarch-inmate", more));
    builder.start()
}

/// Starts one, and waits for its report.
fn inmate(host: &Host, session: &Session, label: &str, words: &str) -> Inmate {
    let claimed = session.claim(label);
    let (mut spec, mut fds) = host.spec(words);
    spec.qemu = QemuName::new("inmate").unwrap();
    let log = host.path("log").join(format!("{label}.log"));
    fds[0] = File::options().create(true).append(true).open(&log).unwrap().into();
    // Two disks, of which it may write one.
    let disk = host.path("files").join(format!("{label}.disk"));
    fs::write(&disk, "its disk").unwrap();
    for access in [DiskAccess::ReadOnly, DiskAccess::ReadWrite] {
        spec.disks.push(diarch_ipc::spec::Disk { access, format: DiskFormat::Raw });
        fds.push(File::options().read(true).write(access == DiskAccess::ReadWrite).open(&disk).unwrap().into());
    }
    let spawned = match session.ask(Request::VmSpawn(Spawn { tenancy: claimed.tenancy, spec }), fds) {
        Ok((Reply::VmSpawn(spawned), _)) => spawned,
        other => panic!("vm.spawn: {other:?}"),
    };
    Inmate { report: report(&log), pid: spawned.pid, uid: claimed.uid, tenancy: claimed.tenancy }
}

fn report(log: &Path) -> BTreeMap<String, Vec<String>> {
    let until = Instant::now() + SOON;
    loop {
        let text = fs::read_to_string(log).unwrap_or_default();
        if let Some(line) = text.lines().find(|line| line.starts_with('{') && line.ends_with('}')) {
            return serde_json::from_str(line).unwrap();
        }
        assert!(Instant::now() < until, "no report: {text:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_jail_holds_no_file_of_the_hosts_but_libraries_and_firmware() {
    need!(Root, Kernel(6, 5));
    let host = host();
    let session = host.session();
    // Another VM's disk, open to everybody outside; and what no VM should see.
    let disk = host.path("files/another.disk");
    fs::write(&disk, "another's").unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    let mut paths = vec![disk.to_str().unwrap().to_owned(), host.path("grants.toml").to_str().unwrap().to_owned()];
    for path in ["/etc/passwd", "/etc/hostname", "/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/kvm", "/dev/vfio/vfio", "/dev/net/tun", "/dev/tty"] {
        paths.push(path.into());
    }
    for path in [
        "/proc/sys/kernel/hostname",
        "/proc/kallsyms",
        "/proc/cpuinfo",
        "/proc/2/status",
        "/sys/kernel",
        "/run/diarch",
        "/var/log",
        "/root",
        "/home",
        "/usr/bin",
    ] {
        paths.push(path.into());
    }
    let words: Vec<String> = paths.iter().map(|path| format!("open={path}")).collect();
    let place = format!("list={}", host.path("bin").display());
    let inmate = inmate(&host, &session, "sees", &format!("{} {place}", words.join(" ")));
    for word in &words {
        assert_eq!(inmate.told(word), ["ENOENT", "ENOENT"], "{word}");
    }
    as_user(User { uid: inmate.uid, gid: inmate.uid }, || {
        File::open(&disk).expect("outside the same user opens it");
        File::open("/etc/passwd").expect("and this");
    });
    let expected = |what: &str, names: &[&str]| {
        let mut names: Vec<&str> = names.to_vec();
        names.retain(|name| !["lib", "lib64", "share"].contains(name) || Path::new("/").join(what).join(name).exists());
        assert_eq!(inmate.told(&format!("in /{what}")), names);
    };
    // Where the program lies there is an empty directory: here, below the test's own.
    assert_eq!(inmate.told(&place), Vec::<&str>::new());
    let top = host.path("").components().nth(1).unwrap().as_os_str().to_str().unwrap().to_owned();
    expected("", &["dev", "etc", "lib", "lib64", "proc", "run", &top, "usr"]);
    expected("dev", &["full", "null", "random", "urandom", "zero"]);
    expected("etc", &["ld.so.cache"]);
    expected("run", &["vm"]);
    let usr: BTreeSet<&str> = inmate.told("in /usr").into_iter().collect();
    assert!(usr.is_subset(&BTreeSet::from(["lib", "lib64", "share"])), "{usr:?}");
    // Of /proc its own process, and nothing of the kernel's.
    assert_eq!(inmate.told("proc"), ["self", "thread-self"]);
}

#[test]
fn a_qemu_that_lies_elsewhere_has_its_granted_directories_to_read() {
    need!(Root, Kernel(6, 5));
    let opt = tempfile::tempdir().unwrap();
    let (lib, beside) = (opt.path().join("lib"), opt.path().join("beside"));
    for directory in [&lib, &beside] {
        fs::create_dir(directory).unwrap();
        fs::write(directory.join("libqemu.so"), "code").unwrap();
    }
    for directory in [opt.path(), &lib, &beside] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let host = host_with(format!("libraries = [{lib:?}]"));
    let session = host.session();
    let words = [&lib, &beside].map(|directory| format!("open={}", directory.join("libqemu.so").display()));
    let inmate = inmate(&host, &session, "elsewhere", &words.join(" "));
    assert_eq!(inmate.told(&words[0]), ["done", "EACCES"]);
    assert_eq!(inmate.told(&words[1]), ["ENOENT", "ENOENT"]);
    let writable = inmate.told("writable");
    assert_eq!(writable[..writable.len() - 1], ["/run/vm"]);
    // One that somebody else could fill is not bound, and nothing is started.
    session.ask(Request::VmRelease(diarch_ipc::operation::Release { tenancy: inmate.tenancy }), Vec::new()).unwrap();
    fs::set_permissions(&lib, fs::Permissions::from_mode(0o777)).unwrap();
    let claimed = session.claim("again");
    let (mut spec, fds) = host.spec("");
    spec.qemu = QemuName::new("inmate").unwrap();
    let refused = session.ask(Request::VmSpawn(Spawn { tenancy: claimed.tenancy, spec }), fds).unwrap_err().to_string();
    assert!(refused.contains("can be written by others"), "{refused}");
}

#[test]
fn an_inmate_reaches_no_socket_of_the_hosts() {
    need!(Root, Kernel(6, 5));
    let host = host();
    let session = host.session();
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
    // The worker's stands for any; both are open to everybody here.
    let worker = host.path("worker/worker.sock");
    let _worker = UnixListener::bind(&worker).unwrap();
    open(&worker);
    open(&host.socket());
    let name = format!("diarch-test-{}", std::process::id());
    let nameless = SocketAddr::from_abstract_name(&name).unwrap();
    let _abstract = UnixListener::bind_addr(&nameless).unwrap();
    let internet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = internet.local_addr().unwrap().port();
    let (connects, other) = (format!("connect={} connect={}", host.socket().display(), worker.display()), format!("abstract={name} reach={port}"));
    let inmate = inmate(&host, &session, "calls", &format!("{connects} {other}"));
    for word in connects.split(' ') {
        assert_eq!(inmate.told(word), ["ENOENT", "ENOENT"], "{word}");
    }
    assert_eq!(inmate.told(&format!("abstract={name}")), ["ECONNREFUSED"]);
    assert_eq!(inmate.told(&format!("reach={port}")), ["EPERM"], "it has no socket for that");
    assert_eq!((inmate.asked()["internet"], inmate.asked()["packets"]), ("EPERM", "EPERM"));
    as_user(User { uid: inmate.uid, gid: inmate.uid }, || {
        connect(&host.socket()).expect("outside the same user connects");
        UnixStream::connect(&worker).expect("here too");
        UnixStream::connect_addr(&nameless).expect("and here");
    });
}

#[test]
fn an_inmate_has_networks_processes_and_queues_of_its_own() {
    need!(Root, Kernel(6, 5));
    let host = host();
    let session = host.session();
    let (one, two) = (inmate(&host, &session, "one", ""), inmate(&host, &session, "two", ""));
    let interfaces: Vec<&str> = one.told("net/dev").into_iter().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim()).collect();
    assert_eq!((interfaces, one.told("lo")), (vec!["lo"], vec!["down"]));
    let namespace = |pid: u32, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let supervisor = host.supervisor_pid().unsigned_abs();
    for kind in ["mnt", "net", "pid", "ipc"] {
        let all = [namespace(one.pid, kind), namespace(two.pid, kind), namespace(supervisor, kind)];
        assert_eq!(BTreeSet::from(all.clone()).len(), 3, "{kind}: {all:?}");
    }
    assert_eq!(one.asked()["shared memory"], "EPERM");
}

#[test]
fn an_inmate_sees_signals_and_traces_nobody() {
    need!(Root, Kernel(6, 5));
    let host = host();
    let session = host.session();
    let one = inmate(&host, &session, "one", "");
    let words = format!("signal=-1 signal={} signal={} signal=2", one.pid, host.supervisor_pid());
    let two = inmate(&host, &session, "two", &words);
    assert_eq!((two.told("pid"), two.told("processes")), (vec!["1"], vec!["1"]));
    for word in words.split(' ') {
        assert_eq!(two.told(word), ["ESRCH"], "{word}");
    }
    let asked = two.asked();
    assert_eq!((asked["ptrace"], asked["traceme"]), ("EPERM", "EPERM"));
    // It is ended from outside, though it is process 1 where it is.
    session.ask(Request::VmSignal(Signal { tenancy: two.tenancy, signal: SignalKind::Kill }), Vec::new()).unwrap();
    let until = Instant::now() + SOON;
    while Path::new(&format!("/proc/{}/root", two.pid)).exists() {
        assert!(Instant::now() < until, "it lives");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_inmate_writes_its_own_directory_and_nothing_else() {
    need!(Root, Kernel(6, 5));
    let host = host();
    let session = host.session();
    let inmate = inmate(&host, &session, "writes", "open=/dev/null open=/proc/self/oom_score_adj open=/etc/ld.so.cache");
    let mut writable = inmate.told("writable");
    let looked: u32 = writable.pop().and_then(|line| line.strip_prefix("of ")?.parse().ok()).unwrap();
    assert!(looked > 100, "it looked at {looked} directories only");
    assert_eq!(writable, ["/run/vm"]);
    assert_eq!(inmate.asked()["run what it wrote"], "EACCES");
    assert_eq!(inmate.asked()["node"], "EPERM");
    assert_eq!(inmate.told("open=/dev/null"), ["done", "done"]);
    assert_eq!(inmate.told("open=/proc/self/oom_score_adj"), ["done", "EROFS"]);
    assert_eq!(inmate.told("open=/etc/ld.so.cache"), ["done", "EACCES"]);
    // Its directory is bounded, and its own.
    let own = inmate.told("mountinfo").into_iter().find(|line| line.contains(" /run/vm ")).unwrap();
    assert!(own.contains(&format!("uid={}", inmate.uid)) && own.contains("size=16384k") && own.contains("mode=700"), "{own}");
}

#[test]
fn an_inmate_can_not_regain_a_right() {
    need!(Root, Kernel(6, 5));
    let host = host();
    let session = host.session();
    let inmate = inmate(&host, &session, "rights", "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(inmate.field("status", set), "0000000000000000", "{set}");
    }
    assert_eq!((inmate.field("status", "NoNewPrivs:"), inmate.field("status", "Seccomp:")), ("1", "2"));
    for (what, came) in inmate.asked() {
        let expected = match what {
            "run what it wrote" => "EACCES",
            // CAP_SYS_ADMIN is read from an empty set: 0, and no error.
            "bounding set" => "done",
            _ => "EPERM",
        };
        assert_eq!(came, expected, "{what}");
    }
    for (name, value) in [("Max core file size", "0"), ("Max locked memory", "65536"), ("Max open files", "4096"), ("Max processes", "161")] {
        let words: Vec<&str> = inmate.field("limits", name).split_whitespace().collect();
        assert_eq!(words[..2], [value, value], "{name}");
    }
}

#[test]
fn the_mounts_of_a_jail_are_few_and_give_no_right() {
    need!(Root, Kernel(6, 5));
    let host = host();
    let session = host.session();
    let table = || fs::read_to_string(format!("/proc/{}/mountinfo", host.supervisor_pid())).unwrap();
    let before = table();
    let inmate = inmate(&host, &session, "mounts", "");
    assert_eq!(table(), before, "the host's table of mounts");
    let mounts = inmate.told("mountinfo");
    assert!(mounts.len() < 25, "{mounts:#?}");
    for line in mounts {
        let fields: Vec<&str> = line.split(' ').collect();
        let (at, flags) = (fields[4], fields[5].split(',').collect::<BTreeSet<_>>());
        assert!(flags.contains("nosuid"), "{line}");
        assert!(flags.contains("nodev") || at.starts_with("/dev/"), "{line}");
        assert!(flags.contains("noexec") || at.starts_with("/usr/") || at.starts_with("/lib") || at.starts_with("/etc/"), "{line}");
        assert!(flags.contains("ro") || at == "/run/vm", "{line}");
        // Neither shared nor a follower: what the host mounts later does not come in.
        assert_eq!(fields[6], "-", "{line}");
    }
}

#[test]
fn an_inmate_holds_exactly_the_descriptors_it_was_given() {
    need!(Root, Kernel(6, 5));
    let host = host();
    let session = host.session();
    let inmate = inmate(&host, &session, "holds", "");
    let held: Vec<(u32, &str)> = inmate.told("descriptors").into_iter().filter_map(|line| line.split_once(' ')).map(|(n, t)| (n.parse().unwrap(), t)).collect();
    let held: BTreeMap<u32, &str> = held.into_iter().collect();
    let files = ["/dev/null", "/holds.log", "/holds.log", "socket:", "socket:", "/test-console.log", "/kernel", "/holds.disk", "/holds.disk"];
    assert_eq!(held.len(), files.len(), "{held:?}");
    for (number, file) in (0..).zip(files) {
        assert!(held[&number].contains(file), "{number} is {} and not {file}", held[&number]);
    }
    assert_eq!(inmate.told("environment"), ["LC_ALL=C"]);
}

// ---- the stage for any program ----

const UID: u32 = 290_000;

/// The inmate in a jail that the test makes itself.
fn plan(directory: &Path, words: &str, root: Root) -> (Plan, std::path::PathBuf) {
    let log = directory.join("log");
    let open = |path: &Path| OwnedFd::from(File::options().read(true).append(true).create(true).open(path).unwrap());
    let plan = Plan {
        program: File::open(binary("diarch-inmate")).unwrap().into(),
        argv: ["inmate", "-append", words].map(str::to_owned).to_vec(),
        fds: vec![open(Path::new("/dev/null")), open(&log), open(&log)],
        uid: UID,
        groups: Vec::new(),
        limits: Limits { tasks: 64, open_files: 64, locked_bytes: 1024 * 1024 },
        root,
        network: Network::Own,
        sockets: Sockets::Unix,
        sandbox: Sandbox::Ours,
        walls: jail::Walls::Jail,
    };
    (plan, log)
}

/// Runs it until it has told all.
fn run((plan, log): (Plan, std::path::PathBuf)) -> BTreeMap<String, Vec<String>> {
    let pidfd = jail::fork(plan).unwrap().open(SOON).unwrap();
    let told = report(&log);
    end(&pidfd);
    told
}

fn end(pidfd: &OwnedFd) {
    rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL).unwrap();
    assert!(diarch_supervisor::process::wait_ended(pidfd, SOON).unwrap());
    diarch_supervisor::process::reap(pidfd);
}

#[test]
fn a_detached_mount_is_moved_into_a_jail_and_is_on_no_path_of_the_hosts() {
    need!(Root, Kernel(6, 5));
    let directory = tempfile::tempdir().unwrap();
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let shared = mount::tmpfs(1024 * 1024, 16, UID, 0o700).unwrap();
    let file = rustix::fs::openat(&shared, "file", rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY, rustix::fs::Mode::from_raw_mode(0o644)).unwrap();
    rustix::fs::fchmod(file, rustix::fs::Mode::from_raw_mode(0o644)).unwrap();
    let root = Root::of_a_program().mount("/srv/share", shared);
    let told = run(plan(directory.path(), "open=/srv/share/file", root));
    assert_eq!(told["open=/srv/share/file"][0], "done");
    let writable = &told["writable"];
    assert!(writable.contains(&"/srv/share".to_owned()) && writable.len() == 2, "{writable:?}");
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
}

#[test]
fn a_jail_can_have_a_network_that_was_made_for_it() {
    need!(Root, Kernel(6, 5));
    let directory = tempfile::tempdir().unwrap();
    let made = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        (File::open("/proc/thread-self/ns/net").unwrap(), fs::read_link("/proc/thread-self/ns/net").unwrap())
    });
    let (namespace, name) = made.join().unwrap();
    let (mut plan, log) = plan(directory.path(), "", Root::of_a_program());
    plan.network = Network::Given(namespace.into());
    plan.sockets = Sockets::Internet;
    let gated = jail::fork(plan).unwrap();
    let pid = gated.pid;
    let pidfd = gated.open(SOON).unwrap();
    let told = report(&log);
    assert_eq!(fs::read_link(format!("/proc/{pid}/ns/net")).unwrap(), name);
    assert!(told["asked"].contains(&"internet: done".to_owned()), "{:?}", told["asked"]);
    end(&pidfd);
}

#[test]
fn a_program_that_walls_itself_in_gets_no_user_namespace_and_goes_on() {
    need!(Root, Kernel(6, 5));
    let directory = tempfile::tempdir().unwrap();
    let (mut plan, log) = plan(directory.path(), "list=/", Root::of_a_program());
    plan.sandbox = Sandbox::Pretended;
    let gated = jail::fork(plan).unwrap();
    let pid = gated.pid;
    let pidfd = gated.open(SOON).unwrap();
    let told = report(&log);
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_eq!(namespace(pid), namespace(std::process::id()));
    for line in
        ["unshare user: done", "mount: done", "umount: done", "clone user: EPERM", "fsopen: EPERM", "chroot: EPERM", "bpf: EPERM", "every capability: EPERM"]
    {
        assert!(told["asked"].contains(&line.to_owned()), "{line}: {:?}", told["asked"]);
    }
    // What it asked for last, with what it thinks are its new rights: its tree is as it was.
    assert!(told["list=/"].contains(&"usr".to_owned()), "{:?}", told["list=/"]);
    end(&pidfd);
}

/// A child has the C library's locks as they were when it was made. From glibc 2.41 on, whoever starts a program has one until the program runs.
#[test]
fn a_jail_is_made_while_another_thread_is_starting_a_program() {
    need!(Root, Kernel(6, 5));
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let opened_there = pipe.clone();
    let starting = std::thread::spawn(move || {
        tell.send(nix::unistd::gettid()).unwrap();
        start_after_opening(&opened_there)
    });
    let stat = format!("/proc/self/task/{}/stat", told.recv().unwrap());
    let until = Instant::now() + SOON;
    // vfork(2)'s wait: it can be killed, and nothing else.
    while !fs::read_to_string(&stat).unwrap().contains(") D ") {
        assert!(Instant::now() < until, "it does not wait: {}", fs::read_to_string(&stat).unwrap());
        std::thread::sleep(Duration::from_millis(1));
    }
    let (plan, log) = plan(directory.path(), "", Root::of_a_program());
    let made = jail::fork(plan).and_then(|gated| gated.open(SOON).map_err(|failed| failed.error));
    File::options().write(true).open(&pipe).unwrap();
    nix::sys::wait::waitpid(starting.join().unwrap(), None).unwrap();
    let pidfd = made.unwrap();
    report(&log);
    end(&pidfd);
}

/// posix_spawn(3), whose child opens this file, a pipe, before it becomes the program: it waits until somebody opens the other end.
fn start_after_opening(path: &Path) -> nix::unistd::Pid {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    let (argv, mut pid) = ([c"true".as_ptr().cast_mut(), std::ptr::null_mut()], 0);
    // SAFETY: an all-zero structure is what posix_spawn_file_actions_init fills.
    let mut actions: libc::posix_spawn_file_actions_t = unsafe { std::mem::zeroed() };
    // SAFETY: it is ours, and destroyed below.
    unsafe { libc::posix_spawn_file_actions_init(&raw mut actions) };
    // SAFETY: initialised just now; the path lives until the end.
    unsafe { libc::posix_spawn_file_actions_addopen(&raw mut actions, 0, path.as_ptr(), libc::O_RDONLY, 0) };
    let (program, none) = (c"/bin/true".as_ptr(), std::ptr::null());
    // SAFETY: all of it lives until this returns; the environment is empty.
    let result = unsafe { libc::posix_spawn(&raw mut pid, program, &raw const actions, none, argv.as_ptr(), [std::ptr::null_mut()].as_ptr()) };
    // SAFETY: initialised above, and used no more.
    unsafe { libc::posix_spawn_file_actions_destroy(&raw mut actions) };
    assert_eq!(result, 0, "{}", std::io::Error::from_raw_os_error(result));
    nix::unistd::Pid::from_raw(pid)
}

#[test]
fn a_killed_child_that_does_not_end_is_handed_over_with_the_error() {
    need!(Root, Kernel(6, 5));
    let directory = tempfile::tempdir().unwrap();
    for open in [true, false] {
        let gated = jail::fork(plan(directory.path(), "", Root::of_a_program()).0).unwrap();
        let undying = Undying::of(gated.pid.cast_signed(), Until::Stops).unwrap();
        let left = if open {
            let failed = gated.open(Duration::from_millis(200)).unwrap_err();
            assert_eq!(failed.error.kind(), "timeout");
            failed.left
        } else {
            gated.close().into_iter().collect()
        };
        assert_eq!(left.len(), 1, "killed, and alive");
        undying.let_go();
        assert!(lingering::kill(left, SOON).is_empty());
    }
    let gated = jail::fork(plan(directory.path(), "", Root::of_a_program()).0).unwrap();
    assert!(gated.close().is_none(), "one that can goes at once");
}

#[test]
fn a_qemu_is_asked_in_a_jail_whether_it_takes_devices_as_descriptors() {
    need!(Root, Qemu, Kernel(6, 5));
    let ask = |path: &Path, root: Root| ability::takes_iommufd(File::open(path).unwrap().into(), path.to_str().unwrap(), UID, root).unwrap();
    assert!(ask(Path::new("/bin/true"), Root::of_a_program()) && !ask(Path::new("/bin/false"), Root::of_a_program()));
    let qemu = fs::canonicalize(need::qemu().unwrap()).unwrap();
    let said = std::process::Command::new(&qemu).arg("--version").output().unwrap().stdout;
    let said = String::from_utf8_lossy(&said).into_owned();
    let major: u32 = said.trim_start_matches("QEMU emulator version ").split('.').next().unwrap().parse().unwrap();
    assert_eq!(ask(&qemu, spawn::firmware(Root::of_a_program())), major >= 9, "{said}");
}

#[test]
fn what_can_not_be_put_into_a_jail_is_named_and_nothing_runs() {
    need!(Root, Kernel(6, 5));
    let directory = tempfile::tempdir().unwrap();
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let refused =
        |root: Root| jail::fork(plan(directory.path(), "", root).0).and_then(|gated| gated.open(SOON).map_err(|failed| failed.error)).unwrap_err().to_string();
    let missing = refused(Root::of_a_program().node("/dev/no-such-node"));
    assert!(missing.contains("/dev/no-such-node") && missing.contains("No such file"), "{missing}");
    // What only the child can find out comes over the gate: this directory is hidden by the mount above it.
    let hidden = Root::of_a_program().mount("/usr/lib/diarch-no-such-directory/x", mount::tmpfs(4096, 4, UID, 0o700).unwrap());
    let child = refused(hidden);
    assert!(child.contains("mount in the jail: /usr/lib/diarch-no-such-directory/x") && child.contains("No such file"), "{child}");
    let climbing = refused(Root::default().own("/run/../etc", UID, 4096));
    assert!(climbing.contains("absolute, plain"), "{climbing}");
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
    // The child that failed is gone, and reaped.
    let children = fs::read_to_string("/proc/thread-self/children").unwrap();
    assert_eq!(children.trim(), "", "children of this thread");
}
