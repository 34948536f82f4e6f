//! The service manager that respawns the halves where there is no systemd.
//!
//! ```text
//!   stopped --start--> starting --READY=1--> ready
//!      ^                  |  ^                 |
//!      |                  |  +---- respawn ----+ died unasked          died `count` times within `within_ms`: failed
//!      +---- stop --------+--------------------+                       told to hold: stopped;  told to refuse: failed
//! ```
//!
//! It is a process of its own ([`manager`], `diarch-stand-in run`), because it must be a subreaper whose children are the halves and nothing
//! else: a QEMU whose supervisor died becomes its child, and so what is left behind can be counted. It has one thread, so that what happens
//! between its `fork` and its `execve` may be ordinary code.
//!
//! This file is what both ends share, and the end of whoever asks: a test ([`StandIn`]), the demo, or the worker's restart command.

pub mod manager;

use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

/// What is kept alive: `diarch-stand-in run --config FILE`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where this manager is asked (a UNIX socket, one JSON line each way).
    pub control: PathBuf,
    /// A directory of root's for the `NOTIFY_SOCKET`s; the worker's user must be able to pass through it.
    pub directory: PathBuf,
    /// The supervisor's listening socket, if it is activated by one; otherwise it binds its own.
    #[serde(default)]
    pub listen: Option<Listen>,
    /// File systems that only this manager's processes see, mounted before anything starts.
    #[serde(default)]
    pub tmpfs: Vec<Tmpfs>,
    pub supervisor: Service,
    #[serde(default)]
    pub worker: Option<Service>,
    #[serde(default)]
    pub start_limit: StartLimit,
    /// A directory that is removed when everything has ended: whoever made it may be long gone by then.
    #[serde(default)]
    pub remove: Option<PathBuf>,
}

/// What becomes of a manager when whoever started it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bond {
    /// It ends too, with all that runs under it.
    EndsWithUs,
    /// It lives on until it is asked to shut down.
    LivesOn,
}

/// A SEQPACKET listening socket, passed on as `LISTEN_FDS`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    pub path: PathBuf,
    /// The group that may connect; the mode is 0660.
    pub gid: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tmpfs {
    pub path: PathBuf,
    pub size_kib: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// The program (an absolute path) and its arguments.
    pub argv: Vec<String>,
    /// Where its standard output and error are appended.
    pub log: PathBuf,
    #[serde(default)]
    pub uid: u32,
    #[serde(default)]
    pub gid: u32,
    /// Its whole environment besides `NOTIFY_SOCKET` and `LISTEN_*`.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
}

/// How often a unit may start by itself before it counts as failed; a request to start it counts anew.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartLimit {
    pub count: u32,
    pub within_ms: u32,
}

impl Default for StartLimit {
    /// systemd's five starts, in a fifth of its ten seconds: tests kill faster than operators.
    fn default() -> Self {
        StartLimit { count: 5, within_ms: 2_000 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    Supervisor,
    Worker,
}

impl std::str::FromStr for Unit {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "supervisor" => Ok(Unit::Supervisor),
            "worker" => Ok(Unit::Worker),
            other => Err(format!("there is no unit {other:?}: it is supervisor or worker")),
        }
    }
}

/// What the manager can be asked. The worker's user may ask for one thing only: the restart of the supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ask {
    Status,
    /// Answered when the unit is ready, or can't be.
    Start(Unit),
    /// As `Start`, after it was stopped.
    Restart(Unit),
    /// SIGTERM, and SIGKILL when that does not help; answered when it is gone. It stays stopped.
    Stop(Unit),
    /// When it dies it stays dead, until it is started or restarted.
    Hold(Unit),
    /// From now on every start of it fails, asked for or not; until `Permit`.
    Refuse(Unit),
    /// Undoes `Refuse`; starts nothing.
    Permit(Unit),
    /// Sends a signal by pidfd.
    Kill(Unit, i32),
    /// Stops both halves, then ends every process that is left (the VMs), and says which.
    Shutdown,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    Ok,
    Status(Box<Status>),
    /// What was still there after both halves had gone.
    Ended {
        left: Vec<Left>,
    },
    Error(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    pub pid: i32,
    pub name: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub supervisor: UnitStatus,
    pub worker: Option<UnitStatus>,
    /// Processes that were reparented to the manager and have ended since, the latest ones: (pid, how).
    pub orphans: Vec<(i32, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnitState {
    Stopped,
    Starting,
    Ready,
    Stopping,
    Failed,
}

/// Times are nanoseconds of `CLOCK_MONOTONIC`, comparable with [`now_ns`] in any process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UnitStatus {
    pub state: UnitState,
    pub pid: Option<i32>,
    pub starts: u64,
    pub started_ns: Option<u64>,
    /// When the present process said `READY=1`.
    pub ready_ns: Option<u64>,
    pub last_death: Option<Death>,
    /// The names of what it gave to keep, over its own death (systemd's `FDSTORE=1`).
    pub stored: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Death {
    pub at_ns: u64,
    pub pid: i32,
    /// `exit 0`, `signal 9`.
    pub how: String,
}

/// The monotonic clock, in nanoseconds.
pub fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// Asks the manager at `control` one thing, and waits for the answer.
pub fn ask(control: &Path, ask: &Ask) -> io::Result<Told> {
    let mut stream = UnixStream::connect(control)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut line = serde_json::to_string(ask)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

/// A running manager, and all that runs under it; both end with this value, also when the test that has it panics or is killed.
#[derive(Debug)]
pub struct StandIn {
    child: Child,
    /// Its end is the manager's order to shut down: the kernel closes it whatever becomes of this process.
    lifeline: Option<ChildStdin>,
    control: PathBuf,
}

impl StandIn {
    /// Starts `program` (the binary `diarch-stand-in`) with this configuration; its own messages go to `log`.
    pub fn start(program: &Path, config: &Config, config_file: &Path, log: &Path, bond: Bond) -> io::Result<Self> {
        std::fs::write(config_file, serde_json::to_vec_pretty(config)?)?;
        let mut command = Command::new(program);
        command.arg("run").arg("--config").arg(config_file);
        match bond {
            Bond::EndsWithUs => command.arg("--lifeline").stdin(Stdio::piped()),
            Bond::LivesOn => command.stdin(Stdio::null()),
        };
        // A group of its own: ^C on the terminal is for whoever runs there.
        let mut child = command.process_group(0).stdout(Stdio::piped()).stderr(std::fs::File::options().create(true).append(true).open(log)?).spawn()?;
        let lifeline = child.stdin.take();
        let mut ready = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut ready)?;
        }
        if ready.trim() != "ready" {
            let _ = child.wait();
            return Err(io::Error::other(format!("the stand-in did not start: {}", std::fs::read_to_string(log).unwrap_or_default())));
        }
        Ok(StandIn { child, lifeline, control: config.control.clone() })
    }

    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Asks; an error of the manager's is an error here.
    pub fn ask(&self, what: &Ask) -> io::Result<Told> {
        match ask(&self.control, what)? {
            Told::Error(sentence) => Err(io::Error::other(sentence)),
            told => Ok(told),
        }
    }

    pub fn status(&self) -> Status {
        match self.ask(&Ask::Status) {
            Ok(Told::Status(status)) => *status,
            other => panic!("the stand-in gave no status: {other:?}"),
        }
    }

    pub fn unit(&self, unit: Unit) -> UnitStatus {
        let status = self.status();
        match unit {
            Unit::Supervisor => status.supervisor,
            Unit::Worker => status.worker.expect("this host has no worker"),
        }
    }

    /// Waits until the unit is ready, in a start later than `after` (its `starts` then).
    pub fn wait_ready(&self, unit: Unit, after: u64, within: Duration) -> UnitStatus {
        let until = Instant::now() + within;
        loop {
            let status = self.unit(unit);
            if status.state == UnitState::Ready && status.starts > after {
                return status;
            }
            assert!(Instant::now() < until, "{unit:?} was not ready after {within:?}: {status:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends SIGKILL to the unit and waits until its next process is ready. Gives the time from the signal to that readiness.
    pub fn kill_and_wait(&self, unit: Unit) -> Duration {
        let before = self.unit(unit);
        let start = now_ns();
        self.ask(&Ask::Kill(unit, nix::libc::SIGKILL)).expect("kill");
        let after = self.wait_ready(unit, before.starts, Duration::from_secs(10));
        Duration::from_nanos(after.ready_ns.unwrap_or(start).saturating_sub(start))
    }

    /// Every process under the manager, the halves included.
    pub fn processes(&self) -> Vec<Left> {
        manager::descendants(self.pid())
    }

    /// Ends everything; gives what was left after both halves had gone.
    pub fn shutdown(mut self) -> Vec<Left> {
        let left = match self.ask(&Ask::Shutdown) {
            Ok(Told::Ended { left }) => left,
            other => panic!("the stand-in did not shut down: {other:?}"),
        };
        self.end();
        left
    }

    /// Lets a manager that was started with [`Bond::LivesOn`] go; gives the socket where it can be asked to shut down.
    pub fn leave(self) -> PathBuf {
        let manager = std::mem::ManuallyDrop::new(self);
        manager.control.clone()
    }

    fn end(&mut self) {
        if self.lifeline.take().is_none() {
            // It has no lifeline, or was told already.
            let _ = self.ask(&Ask::Shutdown);
        }
        let until = Instant::now() + Duration::from_secs(20);
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > until {
                // Our own child, not reaped yet: the pid is its own.
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.end();
    }
}
