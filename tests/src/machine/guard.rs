//! The process that keeps a machine: `tests/debian/boot`, which ends with us and cleans up after it.

use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// From the start of a machine to the end of its systemd's start jobs: half a second, and much more on a busy host.
const BOOT_PATIENCE: Duration = Duration::from_secs(60);
/// How long a test waits for other machines to end; longer than any of them may live.
const SLOT_PATIENCE: Duration = Duration::from_secs(20 * 60);
/// Machines at one time. More than the processors would make each other's deadlines pass.
const SLOTS: u32 = 2;

/// The mount point of the cgroup v2 hierarchy.
pub fn hierarchy() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].iter().map(PathBuf::from).find(|dir| dir.join("cgroup.controllers").exists())
}

/// The right to run one of a few such machines on this host, until it is dropped.
#[derive(Debug)]
pub struct Slot {
    pub number: u32,
    _lock: fs::File,
}

impl Slot {
    pub fn of_a_machine() -> Slot {
        Slot::wait("diarch-machine", SLOTS, SLOT_PATIENCE)
    }

    /// One of `count` that share a name.
    pub fn wait(name: &str, count: u32, patience: Duration) -> Slot {
        let until = Instant::now() + patience;
        loop {
            for number in 0..count {
                let path = format!("/run/lock/{name}.{number}");
                let mut options = fs::File::options();
                // Anybody may make files in that directory: a link is not followed. (/run/lock is in every Debian, also without systemd.)
                options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
                let lock = options.open(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
                if lock.try_lock().is_ok() {
                    return Slot { number, _lock: lock };
                }
            }
            assert!(Instant::now() < until, "{count} others ({name}) have been running for {patience:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// How a machine is booted.
#[derive(Debug, Default)]
pub struct Boot {
    pub layer: Option<PathBuf>,
    pub save: Option<PathBuf>,
    /// The longest life.
    pub limit: Duration,
    /// More options of systemd-nspawn.
    pub nspawn: Vec<String>,
}

#[derive(Debug)]
pub struct Guard {
    pub dir: PathBuf,
    pub cgroup: PathBuf,
    /// Open, since the guard removes it at its end, which may be what it tells about.
    console: fs::File,
    process: OwnedFd,
    notify: UnixDatagram,
    messages: Mutex<mpsc::Receiver<String>>,
    thread: Option<JoinHandle<io::Result<std::process::ExitStatus>>>,
}

impl Guard {
    /// Starts it. `dir` is the machine's own directory, and the guard's to remove.
    pub fn start(tree: &Path, dir: PathBuf, boot: &Boot) -> Guard {
        let notify = UnixDatagram::bind(dir.join("notify")).expect("a notify socket");
        let console = fs::File::options().read(true).append(true).create(true).open(dir.join("console")).expect("a console log");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "/bin/bash", concat!(env!("CARGO_MANIFEST_DIR"), "/debian/boot")]);
        command.arg(tree.join("tree")).arg(&dir);
        for (option, path) in [("--layer", &boot.layer), ("--save", &boot.save)] {
            if let Some(path) = path {
                command.arg(option).arg(path);
            }
        }
        command.args(["--seconds", &boot.limit.as_secs().to_string(), "--"]).args(&boot.nspawn);
        command.env_clear().env("NOTIFY_SOCKET", dir.join("notify")).current_dir("/");
        command.stdin(Stdio::null()).stdout(console.try_clone().expect("dup")).stderr(console.try_clone().expect("dup"));
        let mut last_words = console.try_clone().expect("dup");
        // The kernel sends the parent-death signal when the *thread* that forked ends: a test's own may end before the machine does.
        let (to, from) = mpsc::channel();
        let thread = std::thread::Builder::new().name("machine".into()).spawn(move || {
            let mut child = command.spawn()?;
            // Not waited for yet, so that the number is still its own.
            let pid = rustix::process::Pid::from_child(&child);
            let _ = to.send((pid, pidfd_open(pid, PidfdFlags::empty())?));
            let status = child.wait()?;
            // For whoever asks why there is no machine.
            let _ = writeln!(last_words, "tests/debian/boot ended: {status}");
            Ok(status)
        });
        let thread = thread.expect("a thread");
        let Ok((pid, process)) = from.recv() else {
            panic!("tests/debian/boot can't be started: {:?}", thread.join());
        };
        let cgroup = hierarchy().expect("need!(Machine) comes first").join(format!("diarch-machine-{pid}"));
        let messages = Mutex::new(listen(&notify));
        Guard { dir, cgroup, console, process, notify, messages, thread: Some(thread) }
    }

    pub fn console(&self) -> String {
        let mut bytes = vec![0; self.console.metadata().map_or(0, |meta| usize::try_from(meta.len()).unwrap_or(0))];
        let read = self.console.read_at(&mut bytes, 0).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..read]).into_owned()
    }

    /// Waits for the machine's PID 1: its process id here.
    pub fn wait_leader(&self) -> i32 {
        self.wait_message("started", |text| text.contains("X_NSPAWN_LEADER_PID="));
        // The number in the message is the room's; this one is ours.
        self.leader().unwrap_or_else(|| panic!("the machine has no PID 1 among the processes of {}:\n{}", self.cgroup.display(), self.console()))
    }

    /// Waits until the machine's systemd has done all jobs of its start.
    pub fn wait_booted(&self) {
        self.wait_message("booted", |text| text.lines().any(|line| line == "READY=1"));
    }

    /// What was said so far is not waited for.
    pub fn forget_messages(&self) {
        while self.messages.lock().unwrap_or_else(PoisonError::into_inner).try_recv().is_ok() {}
    }

    fn wait_message(&self, what: &str, wanted: impl Fn(&str) -> bool) {
        let until = Instant::now() + BOOT_PATIENCE;
        let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if messages.recv_timeout(Duration::from_millis(100)).is_ok_and(|text| wanted(&text)) {
                return;
            }
            assert!(!self.ended(), "the machine ended before it had {what}; its console:\n{}", self.console());
            assert!(Instant::now() < until, "the machine had not {what} within {BOOT_PATIENCE:?}; its console:\n{}", self.console());
        }
    }

    fn leader(&self) -> Option<i32> {
        let mut queue = vec![self.cgroup.join("payload")];
        while let Some(dir) = queue.pop() {
            let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            // First in the machine, which is in the room, which is in ours.
            let found = pids.lines().filter_map(|pid| pid.parse().ok()).find(|pid| super::process::ns_pids(*pid).as_slice().get(2..) == Some(&[1]));
            if found.is_some() {
                return found;
            }
            queue.extend(fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir()));
        }
        None
    }

    pub fn ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the guard's own end, when the machine is going down by itself.
    pub fn wait_end(&mut self, within: Duration) -> Result<std::process::ExitStatus, String> {
        let until = Instant::now() + within;
        while !self.ended() {
            if Instant::now() > until {
                return Err(format!("the machine had not ended within {within:?}; its console:\n{}", self.console()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Ok(status))) => Ok(status),
            other => Err(format!("the guard can't be waited for: {other:?}")),
        }
    }
}

/// Reads what nspawn says for as long as the socket lives. A machine's systemd tells its state all its life: with nobody who reads, the queue would be
/// full, nspawn would wait, and then PID 1 for nspawn.
fn listen(notify: &UnixDatagram) -> mpsc::Receiver<String> {
    let (to, messages) = mpsc::channel();
    let notify = notify.try_clone().expect("dup");
    let hear = move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = notify.recv(&mut buffer) {
            let _ = to.send(String::from_utf8_lossy(&buffer[..count]).into_owned());
        }
    };
    std::thread::Builder::new().name("notify".into()).spawn(hear).expect("a thread");
    messages
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.notify.shutdown(Shutdown::Both);
        let _ = pidfd_send_signal(&self.process, Signal::TERM);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
