//! What a test and the lab's agent say to each other through a virtio port, and both ends of it.
//!
//! ```text
//!   frame = length of the head, length of the body (4 bytes each, little-endian), head (JSON), body (bytes)
//! ```
//!
//! Each question has a number, and so has its answer: several are asked at one time. The agent's first frame has the number 0.

use super::qemu;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// A program, with the body as its standard input; killed, with its process group, when its time is over.
    Run {
        argv: Vec<String>,
        within_ms: u64,
    },
    Read {
        path: String,
    },
    Write {
        path: String,
        mode: u32,
    },
    Link {
        path: String,
    },
    Exists {
        path: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The agent is there.
    Hello,
    /// The body is its standard output, of this length, and its standard error. No code: a signal ended it.
    Ended {
        code: Option<i32>,
        stdout: usize,
    },
    Done,
    Failed {
        errno: Option<i32>,
        text: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Head<T> {
    number: u64,
    what: T,
}

/// No output of a command and no file is longer.
const MOST: usize = 256 << 20;

fn send<T: Serialize>(to: &mut impl Write, number: u64, what: &T, body: &[u8]) -> io::Result<()> {
    let head = serde_json::to_vec(&Head { number, what })?;
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).map(u32::to_le_bytes).map_err(io::Error::other);
    // In one piece: two threads' frames must not mix, and a port is slow for small ones.
    let frame = [&length(&head)?[..], &length(body)?[..], &head, body].concat();
    to.write_all(&frame)?;
    to.flush()
}

fn receive<T: for<'de> Deserialize<'de>>(from: &mut impl Read) -> io::Result<(u64, T, Vec<u8>)> {
    let mut length = || -> io::Result<usize> {
        let mut bytes = [0; 4];
        from.read_exact(&mut bytes)?;
        let length = u32::from_le_bytes(bytes) as usize;
        if length > MOST { Err(io::Error::other("a frame that is too long")) } else { Ok(length) }
    };
    let (mut head, mut body) = (vec![0; length()?], vec![0; length()?]);
    from.read_exact(&mut head)?;
    from.read_exact(&mut body)?;
    let Head { number, what } = serde_json::from_slice(&head)?;
    Ok((number, what, body))
}

// ---- the test's end ----

type Reply = (Answer, Vec<u8>);
/// Who waits for which answer. None: the connection has ended, and nobody will be answered any more.
type Askers = Option<BTreeMap<u64, mpsc::Sender<Reply>>>;

/// The connection to a lab's agent.
#[derive(Debug)]
pub struct Agent {
    to: Mutex<UnixStream>,
    waiting: Arc<Mutex<Askers>>,
    last: AtomicU64,
}

impl Agent {
    /// Connects to QEMU's end of the port, and waits for the agent's first word.
    pub fn connect(socket: &Path, within: Duration, qemu: &qemu::Process) -> Agent {
        let until = Instant::now() + within;
        let give_up = |why: &str| -> ! { panic!("the lab did not boot: {why}\n{}", qemu.console()) };
        let to = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if qemu.ended() => give_up("QEMU has ended"),
                Err(e) if Instant::now() > until => give_up(&format!("no connection to QEMU: {e}")),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let mut from = to.try_clone().expect("dup");
        from.set_read_timeout(Some(within)).expect("a timeout");
        match receive::<Answer>(&mut from) {
            Ok((0, Answer::Hello, _)) => {}
            other => give_up(&format!("its agent did not speak within {within:?}: {other:?}")),
        }
        from.set_read_timeout(None).expect("a timeout");
        let waiting = Arc::new(Mutex::new(Askers::Some(BTreeMap::new())));
        let shared = waiting.clone();
        let reader = move || {
            while let Ok((number, answer, body)) = receive::<Answer>(&mut from) {
                if let Some(asker) = shared.lock().unwrap_or_else(PoisonError::into_inner).as_mut().and_then(|all| all.remove(&number)) {
                    // Who gave up waiting is not there any more.
                    let _ = asker.send((answer, body));
                }
            }
            *shared.lock().unwrap_or_else(PoisonError::into_inner) = None;
        };
        std::thread::Builder::new().name("lab agent".into()).spawn(reader).expect("a thread");
        Agent { to: Mutex::new(to), waiting, last: AtomicU64::new(0) }
    }

    pub fn ask(&self, what: &Ask, body: &[u8], within: Duration) -> io::Result<Reply> {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (asker, answer) = mpsc::channel();
        let ended = || io::Error::new(io::ErrorKind::BrokenPipe, "the lab has ended");
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut().ok_or_else(ended)?.insert(number, asker);
        send(&mut *self.to.lock().unwrap_or_else(PoisonError::into_inner), number, what, body)?;
        match answer.recv_timeout(within) {
            Ok((Answer::Failed { errno: Some(errno), .. }, _)) => Err(io::Error::from_raw_os_error(errno)),
            Ok((Answer::Failed { text, .. }, _)) => Err(io::Error::other(text)),
            Ok(reply) => Ok(reply),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(ended()),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("the lab's agent did not answer within {within:?}"))),
        }
    }
}

// ---- the lab's end ----

/// The port, as udev names it.
const PORT: &str = "/dev/virtio-ports/diarch.agent";

/// The agent: answers until the port fails. It serves nowhere but in the lab.
pub fn serve() -> io::Result<()> {
    if !super::in_lab() {
        return Err(io::Error::other(format!("this is not the lab: there is no {} on the kernel command line. Refused.", super::WORD)));
    }
    let until = Instant::now() + Duration::from_secs(60);
    let port = loop {
        match fs::File::options().read(true).write(true).open(PORT) {
            Ok(port) => break port,
            Err(e) if Instant::now() > until => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let to = Arc::new(Mutex::new(port.try_clone()?));
    send(&mut *to.lock().unwrap_or_else(PoisonError::into_inner), 0, &Answer::Hello, &[])?;
    let mut from = port;
    loop {
        let (number, ask, body) = receive::<Ask>(&mut from)?;
        let to = to.clone();
        std::thread::spawn(move || {
            let (answer, body) = act(ask, &body).unwrap_or_else(|e| (Answer::Failed { errno: e.raw_os_error(), text: e.to_string() }, Vec::new()));
            // Nobody is left to be told.
            let _ = send(&mut *to.lock().unwrap_or_else(PoisonError::into_inner), number, &answer, &body);
        });
    }
}

fn act(ask: Ask, body: &[u8]) -> io::Result<Reply> {
    match ask {
        Ask::Run { argv, within_ms } => run(&argv, body, Duration::from_millis(within_ms)),
        Ask::Read { path } => fs::read(path).map(|bytes| (Answer::Done, bytes)),
        Ask::Write { path, mode } => {
            let mut options = fs::File::options();
            let mut file = options.write(true).truncate(true).create(!path.starts_with("/sys/") && !path.starts_with("/proc/")).mode(mode).open(&path)?;
            if file.metadata()?.is_file() && !path.starts_with("/sys/") && !path.starts_with("/proc/") {
                file.set_permissions(fs::Permissions::from_mode(mode))?;
            }
            file.write_all(body).map(|()| (Answer::Done, Vec::new()))
        }
        Ask::Link { path } => fs::read_link(path).map(|to| (Answer::Done, to.into_os_string().into_encoded_bytes())),
        Ask::Exists { path } => fs::metadata(path).map(|_| (Answer::Done, Vec::new())),
    }
}

fn run(argv: &[String], input: &[u8], within: Duration) -> io::Result<Reply> {
    let (program, arguments) = argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    // Files and no pipes: what a command leaves running holds them open, and nobody waits for that.
    let file = || tempfile::tempfile_in("/run");
    let (mut stdin, mut stdout, mut stderr) = (file()?, file()?, file()?);
    stdin.write_all(input)?;
    stdin.rewind()?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").env_clear().process_group(0);
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/srv/lab/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.envs([("HOME", "/root"), ("LANG", "C.UTF-8"), ("TERM", "dumb"), ("RUST_BACKTRACE", "1")]);
    command.stdin(stdin).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let mut child = command.spawn()?;
    let status = wait(&mut child, within)?;
    let mut output = Vec::new();
    for file in [&mut stdout, &mut stderr] {
        file.rewind()?;
    }
    let length = stdout.read_to_end(&mut output)?;
    stderr.read_to_end(&mut output)?;
    if let Some(signal) = status.signal() {
        output.extend_from_slice(format!("\nended by signal {signal}\n").as_bytes());
    }
    Ok((Answer::Ended { code: status.code(), stdout: length }, output))
}

/// Waits for its end, and brings that about when its time is over.
fn wait(child: &mut std::process::Child, within: Duration) -> io::Result<ExitStatus> {
    let pid = Pid::from_child(child);
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec { tv_sec: i64::try_from(within.as_secs()).unwrap_or(i64::MAX), tv_nsec: within.subsec_nanos().into() };
    if poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit))? == 0 {
        let _ = kill_process_group(pid, Signal::KILL);
    }
    child.wait()
}
