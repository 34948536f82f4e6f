//! The manager itself: one thread, one `poll`.

use super::{Ask, Config, Death, Left, Listen, Service, Status, Told, Unit, UnitState, UnitStatus, now_ns};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};
use std::collections::VecDeque;
use std::ffi::CString;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// After SIGTERM. The supervisor ends in milliseconds, the worker may still be writing.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// Between `execve` and `READY=1`.
const START_PATIENCE: Duration = Duration::from_secs(15);
/// Orphans that are remembered after their end.
const MAX_ORPHANS: usize = 64;
/// A question is one line.
const MAX_QUESTION: usize = 4096;

/// Whether the end of standard input is the order to shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifeline {
    Stdin,
    None,
}

/// Keeps the units of `config` alive until it is told to shut down (a request, SIGTERM, SIGINT, or the lifeline's end).
/// Must be called from a process with one thread.
pub fn run(config: Config, lifeline: Lifeline) -> io::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    if !config.tmpfs.is_empty() {
        mount_tmpfs(&config)?;
    }
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let control = bind_control(&config.control)?;
    let listen = config.listen.as_ref().map(bind_listen).transpose()?;
    let mut units = vec![Slot::new(Unit::Supervisor, config.supervisor.clone(), &config.directory)?];
    if let Some(worker) = &config.worker {
        units.push(Slot::new(Unit::Worker, worker.clone(), &config.directory)?);
    }
    let mut manager = Manager { config, signals, control, listen, units, clients: Vec::new(), orphans: Vec::new(), ending: None };
    for at in 0..manager.units.len() {
        manager.start(at);
    }
    println!("ready");
    manager.serve(lifeline)?;
    manager.end()
}

struct Manager {
    config: Config,
    signals: SignalFd,
    control: UnixListener,
    listen: Option<OwnedFd>,
    units: Vec<Slot>,
    clients: Vec<Client>,
    orphans: Vec<(i32, String)>,
    /// Who asked for the shutdown, and is told when it is done.
    ending: Option<Option<UnixStream>>,
}

/// One unit.
struct Slot {
    unit: Unit,
    service: Service,
    notify: UnixDatagram,
    notify_path: PathBuf,
    /// What it gave us to keep (`FDSTORE=1`), by name; passed to each of its starts.
    stored: Vec<(String, OwnedFd)>,
    state: UnitState,
    running: Option<Running>,
    starts: u64,
    recent: VecDeque<Instant>,
    respawn: Respawn,
    /// What is to come after it stopped.
    then: Then,
    deadline: Option<Instant>,
    ready_ns: Option<u64>,
    started_ns: Option<u64>,
    last_death: Option<Death>,
}

struct Running {
    pid: Pid,
    pidfd: OwnedFd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Respawn {
    Yes,
    Hold,
    Refuse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Stay,
    Start,
}

struct Client {
    stream: UnixStream,
    uid: u32,
    line: Vec<u8>,
    /// Waits until the unit at this index is settled.
    waits: Option<usize>,
}

impl Slot {
    fn new(unit: Unit, service: Service, directory: &Path) -> io::Result<Self> {
        let notify_path = directory.join(match unit {
            Unit::Supervisor => "notify-supervisor",
            Unit::Worker => "notify-worker",
        });
        remove(&notify_path)?;
        let notify = UnixDatagram::bind(&notify_path)?;
        notify.set_nonblocking(true)?;
        // The worker's user writes to it; who reads nothing from it but READY=1 has nothing to lose.
        std::fs::set_permissions(&notify_path, std::fs::Permissions::from_mode(0o666))?;
        Ok(Slot {
            unit,
            service,
            notify,
            notify_path,
            stored: Vec::new(),
            state: UnitState::Stopped,
            running: None,
            starts: 0,
            recent: VecDeque::new(),
            respawn: Respawn::Yes,
            then: Then::Stay,
            deadline: None,
            ready_ns: None,
            started_ns: None,
            last_death: None,
        })
    }

    /// One notification's lines, if there is one; what it gives to keep or takes back is done.
    fn hear(&mut self) -> Option<Vec<String>> {
        let mut buffer = [0u8; 4096];
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(&self.notify, &mut [IoSliceMut::new(&mut buffer)], &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        let lines: Vec<String> = String::from_utf8_lossy(&buffer[..got.bytes]).lines().map(str::to_owned).collect();
        let says = |wanted: &str| lines.iter().any(|line| line == wanted);
        let name = lines.iter().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        if says("FDSTORE=1") {
            self.stored.extend(fds.into_iter().map(|fd| (name.to_owned(), fd)));
        }
        if says("FDSTOREREMOVE=1") {
            self.stored.retain(|(kept, _)| kept != name);
        }
        Some(lines)
    }

    fn status(&self) -> UnitStatus {
        UnitStatus {
            state: self.state,
            pid: self.running.as_ref().map(|r| r.pid.as_raw()),
            starts: self.starts,
            started_ns: self.started_ns,
            ready_ns: self.ready_ns,
            last_death: self.last_death.clone(),
            stored: self.stored.iter().map(|(name, _)| name.clone()).collect(),
        }
    }

    fn signal(&self, signal: i32) -> Result<(), String> {
        let Some(running) = &self.running else { return Err(format!("{:?} is not running", self.unit)) };
        let Some(signal) = rustix::process::Signal::from_named_raw(signal) else { return Err(format!("there is no signal {signal}")) };
        pidfd_send_signal(&running.pidfd, signal).map_err(|e| e.to_string())
    }

    fn stop(&mut self, then: Then) {
        self.then = then;
        if self.running.is_some() {
            self.state = UnitState::Stopping;
            self.deadline = Some(Instant::now() + STOP_PATIENCE);
            let _ = self.signal(nix::libc::SIGTERM);
            // A stopped process (SIGSTOP) would not see its SIGTERM.
            let _ = self.signal(nix::libc::SIGCONT);
        }
    }
}

impl Manager {
    fn serve(&mut self, lifeline: Lifeline) -> io::Result<()> {
        let stdin = io::stdin();
        loop {
            if self.ending.is_some() {
                return Ok(());
            }
            let timeout = self.units.iter().filter_map(|u| u.deadline).min().map(|at| at.saturating_duration_since(Instant::now()));
            let timeout = timeout.map(|left| Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() });
            let ready: Vec<bool> = {
                let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.control, PollFlags::IN)];
                fds.extend(self.units.iter().map(|u| PollFd::new(&u.notify, PollFlags::IN)));
                fds.extend(self.clients.iter().map(|c| PollFd::new(&c.stream, PollFlags::IN)));
                if lifeline == Lifeline::Stdin {
                    fds.push(PollFd::new(&stdin, PollFlags::empty()));
                }
                match poll(&mut fds, timeout.as_ref()) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                fds.iter().map(|fd| !fd.revents().is_empty()).collect()
            };
            let units = self.units.len();
            if lifeline == Lifeline::Stdin && ready.last() == Some(&true) {
                self.ending = Some(None);
            }
            // READY=1 of a process that died right after it must be seen before its death.
            for at in 0..units {
                if ready[2 + at] {
                    self.notified(at);
                }
            }
            if ready[0] {
                self.signalled();
            }
            let asked: Vec<usize> = (0..self.clients.len()).filter(|at| ready[2 + units + at]).collect();
            for at in asked.into_iter().rev() {
                self.read_client(at);
            }
            if ready[1] {
                self.accept();
            }
            self.deadlines();
        }
    }

    fn signalled(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo != nix::libc::SIGCHLD.cast_unsigned() {
                self.ending.get_or_insert(None);
            }
        }
        self.reap();
    }

    fn reap(&mut self) {
        loop {
            let (pid, how) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exit {code}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("signal {}", signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            match self.units.iter().position(|u| u.running.as_ref().is_some_and(|r| r.pid == pid)) {
                Some(at) => self.died(at, pid, how),
                None => {
                    // The latest: a long run has thousands, and every answer would carry them.
                    if self.orphans.len() == MAX_ORPHANS {
                        self.orphans.remove(0);
                    }
                    self.orphans.push((pid.as_raw(), how));
                }
            }
        }
    }

    fn died(&mut self, at: usize, pid: Pid, how: String) {
        let limit = self.config.start_limit;
        let slot = &mut self.units[at];
        eprintln!("stand-in: {:?} (pid {pid}) ended: {how}", slot.unit);
        slot.running = None;
        slot.ready_ns = None;
        slot.last_death = Some(Death { at_ns: now_ns(), pid: pid.as_raw(), how: how.clone() });
        let asked = slot.state == UnitState::Stopping;
        slot.state = UnitState::Stopped;
        slot.deadline = None;
        if asked {
            match slot.then {
                Then::Stay => self.settled(at, Ok(())),
                Then::Start => self.start(at),
            }
            return;
        }
        match slot.respawn {
            Respawn::Hold => self.settled(at, Err(format!("it ended ({how}) and is held"))),
            Respawn::Refuse => {
                slot.state = UnitState::Failed;
                self.settled(at, Err("its start is refused".into()));
            }
            Respawn::Yes => {
                let window = Duration::from_millis(limit.within_ms.into());
                while slot.recent.front().is_some_and(|at| at.elapsed() > window) {
                    slot.recent.pop_front();
                }
                if slot.recent.len() >= limit.count as usize {
                    slot.state = UnitState::Failed;
                    self.settled(at, Err(format!("it started {} times within {} ms; the last end was {how}", limit.count, limit.within_ms)));
                } else {
                    self.start(at);
                }
            }
        }
    }

    fn start(&mut self, at: usize) {
        let slot = &mut self.units[at];
        if slot.respawn == Respawn::Refuse {
            slot.state = UnitState::Failed;
            return self.settled(at, Err("its start is refused".into()));
        }
        // The last words of the one before: not its READY=1, but what it gave us to keep.
        while slot.hear().is_some() {}
        slot.recent.push_back(Instant::now());
        slot.starts += 1;
        slot.started_ns = Some(now_ns());
        let listen = if slot.unit == Unit::Supervisor { self.listen.as_ref() } else { None };
        match spawn(&slot.service, &slot.notify_path, listen, &slot.stored) {
            Ok(running) => {
                slot.state = UnitState::Starting;
                slot.deadline = Some(Instant::now() + START_PATIENCE);
                slot.running = Some(running);
            }
            Err(error) => {
                slot.state = UnitState::Failed;
                self.settled(at, Err(error.to_string()));
            }
        }
    }

    fn notified(&mut self, at: usize) {
        let slot = &mut self.units[at];
        while let Some(lines) = slot.hear() {
            let ready = lines.iter().any(|line| line == "READY=1");
            if ready && slot.state == UnitState::Starting {
                slot.ready_ns = Some(now_ns());
                slot.state = UnitState::Ready;
                slot.deadline = None;
            }
        }
        if slot.state == UnitState::Ready {
            self.settled(at, Ok(()));
        }
    }

    fn deadlines(&mut self) {
        let now = Instant::now();
        for at in 0..self.units.len() {
            let slot = &mut self.units[at];
            if slot.deadline.is_none_or(|deadline| deadline > now) {
                continue;
            }
            slot.deadline = None;
            match slot.state {
                UnitState::Stopping => {
                    eprintln!("stand-in: {:?} did not end by SIGTERM", slot.unit);
                    let _ = slot.signal(nix::libc::SIGKILL);
                }
                UnitState::Starting => {
                    let message = format!("it did not say READY=1 within {} s", START_PATIENCE.as_secs());
                    self.settled(at, Err(message));
                }
                _ => {}
            }
        }
    }

    /// Answers whoever waits for this unit.
    fn settled(&mut self, at: usize, outcome: Result<(), String>) {
        let told = match outcome {
            Ok(()) => Told::Ok,
            Err(why) => Told::Error(format!("{:?}: {why}", self.units[at].unit)),
        };
        for client in self.clients.iter_mut().filter(|c| c.waits == Some(at)) {
            client.waits = None;
            tell(&mut client.stream, &told);
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.control.accept() {
            let uid = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials).map(|c| c.uid());
            if let (Ok(uid), Ok(())) = (uid, stream.set_nonblocking(true)) {
                self.clients.push(Client { stream, uid, line: Vec::new(), waits: None });
            }
        }
    }

    fn read_client(&mut self, at: usize) {
        let client = &mut self.clients[at];
        let mut buffer = [0u8; 1024];
        match client.stream.read(&mut buffer) {
            Ok(length @ 1..) if client.line.len() + length <= MAX_QUESTION => client.line.extend(&buffer[..length]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return,
            _ => {
                self.clients.remove(at);
                return;
            }
        }
        let Some(end) = client.line.iter().position(|b| *b == b'\n') else { return };
        let line: Vec<u8> = client.line.drain(..=end).collect();
        let told = match serde_json::from_slice::<Ask>(&line) {
            Err(error) => Some(Told::Error(error.to_string())),
            Ok(ask) if !self.allowed(self.clients[at].uid, &ask) => Some(Told::Error("denied: the worker may restart the supervisor, and nothing else".into())),
            Ok(ask) => self.answer(at, &ask),
        };
        if let (Some(told), Some(client)) = (told, self.clients.get_mut(at)) {
            tell(&mut client.stream, &told);
        }
    }

    fn allowed(&self, uid: u32, ask: &Ask) -> bool {
        uid == 0 || (matches!(ask, Ask::Restart(Unit::Supervisor)) && self.config.worker.as_ref().is_none_or(|w| w.uid == uid))
    }

    /// The answer, or `None` when the client waits for it.
    fn answer(&mut self, client: usize, ask: &Ask) -> Option<Told> {
        let index = |unit: Unit| self.units.iter().position(|u| u.unit == unit);
        let unit = match ask {
            Ask::Status => {
                return Some(Told::Status(Box::new(Status {
                    supervisor: self.units[0].status(),
                    worker: self.units.get(1).map(Slot::status),
                    orphans: self.orphans.clone(),
                })));
            }
            Ask::Shutdown => {
                self.ending = Some(Some(self.clients.remove(client).stream));
                return None;
            }
            Ask::Start(unit) | Ask::Restart(unit) | Ask::Stop(unit) | Ask::Hold(unit) | Ask::Refuse(unit) | Ask::Permit(unit) | Ask::Kill(unit, _) => *unit,
        };
        let Some(at) = index(unit) else { return Some(Told::Error(format!("there is no {unit:?} here"))) };
        let slot = &mut self.units[at];
        match ask {
            Ask::Hold(_) => slot.respawn = Respawn::Hold,
            Ask::Refuse(_) => slot.respawn = Respawn::Refuse,
            Ask::Permit(_) => slot.respawn = Respawn::Yes,
            Ask::Kill(_, signal) => return Some(slot.signal(*signal).map_or_else(Told::Error, |()| Told::Ok)),
            Ask::Stop(_) => {
                if slot.running.is_none() {
                    slot.state = UnitState::Stopped;
                    return Some(Told::Ok);
                }
                slot.stop(Then::Stay);
                self.clients[client].waits = Some(at);
                return None;
            }
            Ask::Start(_) | Ask::Restart(_) => {
                let restart = matches!(ask, Ask::Restart(_));
                if slot.respawn == Respawn::Hold {
                    slot.respawn = Respawn::Yes;
                }
                slot.recent.clear();
                self.clients[client].waits = Some(at);
                match (slot.running.is_some(), restart) {
                    (true, true) => slot.stop(Then::Start),
                    (true, false) if slot.state == UnitState::Ready => self.settled(at, Ok(())),
                    (true, false) => {}
                    (false, _) => self.start(at),
                }
                return None;
            }
            Ask::Status | Ask::Shutdown => {}
        }
        Some(Told::Ok)
    }

    /// Both halves first, the worker before the supervisor it would otherwise restart; then whatever is left.
    fn end(mut self) -> io::Result<()> {
        for at in (0..self.units.len()).rev() {
            self.units[at].respawn = Respawn::Hold;
            self.units[at].stop(Then::Stay);
            let until = Instant::now() + STOP_PATIENCE;
            while self.units[at].running.is_some() {
                if Instant::now() > until {
                    let _ = self.units[at].signal(nix::libc::SIGKILL);
                }
                let mut fds = [PollFd::new(&self.signals, PollFlags::IN)];
                let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 }));
                self.signalled();
            }
        }
        let left = descendants(rustix::process::getpid().as_raw_nonzero().get());
        for process in &left {
            eprintln!("stand-in: ending what is left: {} (pid {})", process.name, process.pid);
        }
        let me = Pid::this().as_raw();
        loop {
            // Grandchildren become children when their parent goes, so that this ends. Children are not reaped
            // meanwhile: a pid that is listed here can't belong to anybody else.
            for pid in children(me) {
                let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            if waitpid(None, None).is_err() {
                break;
            }
        }
        for slot in &self.units {
            let _ = remove(&slot.notify_path);
        }
        let _ = remove(&self.config.control);
        if let Some(listen) = &self.config.listen {
            let _ = remove(&listen.path);
        }
        if let Some(directory) = &self.config.remove {
            // A file system of ours that is mounted in it ends with our mount namespace; whoever made the directory removes the rest.
            let _ = std::fs::remove_dir_all(directory);
        }
        if let Some(Some(mut stream)) = self.ending.take() {
            stream.set_nonblocking(false)?;
            tell(&mut stream, &Told::Ended { left });
        }
        Ok(())
    }
}

fn tell(stream: &mut UnixStream, told: &Told) {
    if let Ok(mut line) = serde_json::to_string(told) {
        line.push('\n');
        // Whoever asked and left does not hear it.
        let _ = stream.write_all(line.as_bytes());
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn bind_control(path: &Path) -> io::Result<UnixListener> {
    remove(path)?;
    let control = UnixListener::bind(path)?;
    control.set_nonblocking(true)?;
    // Anybody may connect: who it is decides what it may ask.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    Ok(control)
}

fn bind_listen(listen: &Listen) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen as start, socket_with};
    remove(&listen.path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(&listen.path)?)?;
    // bind(2) applies the umask; before listen(2) nobody can connect, so that the mode is right from the first moment.
    std::fs::set_permissions(&listen.path, std::fs::Permissions::from_mode(0o660))?;
    std::os::unix::fs::chown(&listen.path, Some(0), Some(listen.gid))?;
    start(&socket, 128)?;
    Ok(socket)
}

fn mount_tmpfs(config: &Config) -> io::Result<()> {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    // Where this fails, what is mounted next could show outside: then nothing is mounted.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).map_err(|error| {
        io::Error::other(format!("/ can't be made a private mount ({error}); in a plain chroot it is no mount point: bind it onto itself first"))
    })?;
    for tmpfs in &config.tmpfs {
        let options = format!("size={}k,mode=0755", tmpfs.size_kib);
        mount(Some("tmpfs"), &tmpfs.path, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options.as_str()))?;
    }
    Ok(())
}

/// Starts a service: clean environment, `/dev/null` and its log as standard streams, the listening socket as fd 3, its own session, its own user.
fn spawn(service: &Service, notify: &Path, listen: Option<&OwnedFd>, stored: &[(String, OwnedFd)]) -> io::Result<Running> {
    let text = |s: String| CString::new(s).map_err(io::Error::other);
    let argv = service.argv.iter().map(|a| text(a.clone())).collect::<io::Result<Vec<_>>>()?;
    let program = argv.first().cloned().ok_or_else(|| io::Error::other("the service has no program"))?;
    let null = std::fs::File::open("/dev/null")?;
    let log = std::fs::File::options().create(true).append(true).mode(0o644).open(&service.log)?;
    // SAFETY: this process has one thread (see `run`), so that the child may run ordinary code.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => {
            let raw = rustix::process::Pid::from_raw(child.as_raw()).ok_or_else(|| io::Error::other("fork gave pid 0"))?;
            // Nobody reaps but this thread: the pid is still the child's, dead or alive.
            Ok(Running { pid: child, pidfd: pidfd_open(raw, PidfdFlags::empty())? })
        }
        ForkResult::Child => {
            let mut environment = vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
            environment.push(format!("NOTIFY_SOCKET={}", notify.display()));
            environment.extend(service.environment.iter().map(|(k, v)| format!("{k}={v}")));
            let passed: Vec<BorrowedFd<'_>> = listen.into_iter().chain(stored.iter().map(|(_, fd)| fd)).map(AsFd::as_fd).collect();
            if !passed.is_empty() {
                let names: Vec<&str> = listen.map(|_| "supervisor").into_iter().chain(stored.iter().map(|(name, _)| name.as_str())).collect();
                let (count, names) = (passed.len(), names.join(":"));
                environment.extend([format!("LISTEN_PID={}", std::process::id()), format!("LISTEN_FDS={count}"), format!("LISTEN_FDNAMES={names}")]);
            }
            let error = become_service(service, &program, &argv, &environment, [null.as_fd(), log.as_fd()], &passed);
            let _ = writeln!(&log, "diarch-stand-in: {} can't be started: {error}", service.argv[0]);
            // SAFETY: ends the child at once, without the parent's exit handlers.
            unsafe { nix::libc::_exit(127) }
        }
    }
}

/// In the child; comes back only with an error.
fn become_service(
    service: &Service,
    program: &CString,
    argv: &[CString],
    environment: &[String],
    [null, log]: [BorrowedFd<'_>; 2],
    passed: &[BorrowedFd<'_>],
) -> io::Error {
    let enter = || -> io::Result<std::convert::Infallible> {
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        nix::unistd::setsid()?;
        // First out of the way of the targets, so that none is another's source.
        let targets = RawFd::try_from(3 + passed.len()).map_err(io::Error::other)?;
        let high = |fd: &BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, targets);
        let sources = [&null, &log, &log].into_iter().chain(passed).map(high).collect::<Result<Vec<_>, _>>()?;
        for (source, target) in sources.iter().zip(0..targets) {
            // SAFETY: the lowest numbers of the forked child; whatever they were belongs to nobody from here on.
            let mut target = unsafe { OwnedFd::from_raw_fd(target) };
            rustix::io::dup2(source, &mut target)?;
            // It stays open for the program (dup2 leaves CLOEXEC off).
            let _ = target.into_raw_fd();
        }
        if service.uid != 0 {
            rustix::process::chdir("/")?;
            nix::unistd::setgroups(&[])?;
            let (uid, gid) = (nix::unistd::Uid::from_raw(service.uid), nix::unistd::Gid::from_raw(service.gid));
            nix::unistd::setresgid(gid, gid, gid)?;
            // From 0 to another in all three: the kernel takes every capability away (capabilities(7)).
            nix::unistd::setresuid(uid, uid, uid)?;
            nix::sys::prctl::set_no_new_privs()?;
        }
        let environment = environment.iter().map(|e| CString::new(e.as_str()).map_err(io::Error::other)).collect::<io::Result<Vec<_>>>()?;
        Ok(nix::unistd::execve(program, argv, &environment)?)
    };
    match enter() {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

/// The children of a process: all its threads' (`/proc/PID/task/TID/children`).
pub fn children(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>()).collect()
}

/// Every process below `pid`, zombies excluded, in no particular order.
pub fn descendants(pid: i32) -> Vec<Left> {
    let mut found = Vec::new();
    let mut queue = children(pid);
    while let Some(pid) = queue.pop() {
        queue.extend(children(pid));
        // A process may choose a name that is not UTF-8.
        let Ok(stat) = std::fs::read(format!("/proc/{pid}/stat")) else { continue };
        let stat = String::from_utf8_lossy(&stat);
        // "PID (NAME) STATE ...": the name may hold anything, so from the last bracket.
        let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else { continue };
        if !stat[close + 1..].trim_start().starts_with(['Z', 'X']) {
            found.push(Left { pid, name: stat[open + 1..close].to_owned() });
        }
    }
    found
}
