//! A stand-in for QEMU: takes the supervisor's argument vector, runs no guest, and speaks QMP.
//!
//! So small that two hundred run at once: one thread, one `poll`, no allocation while it waits. The supervisor
//! wipes the environment, so a test says what it wants in the guest's command line (`-append`), word by word:
//!
//! | word                      | what the stub does                                                        |
//! |---------------------------|---------------------------------------------------------------------------|
//! | `stub.say=TEXT`           | writes TEXT (`+` is a space) to stderr before anything else               |
//! | `stub.exit=N`             | exits with N at once                                                      |
//! | `stub.crash-after-ms=N`   | aborts N ms after its start; in a jail that is seen as SIGSEGV            |
//! | `stub.mute`               | accepts monitor clients and never says a word                             |
//! | `stub.ignore-powerdown`   | is a guest that does not listen to its power button                       |
//! | `stub.powerdown-ms=N`     | a guest that needs N ms to power off                                      |
//! | `stub.poweroff-after-ms=N`| a guest that powers itself off N ms after its start                       |
//! | `stub.reset-after-ms=N`   | a guest that reboots once, N ms after its start                           |
//! | `stub.panic-after-ms=N`   | a guest that panics N ms after its start (event GUEST_PANICKED, exit 0)   |
//! | `stub.name-bytes`         | gives itself a name that is not UTF-8                                     |
//! | `stub.leader-exits`       | ends its first thread, and lives on in another                            |

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::{Errno, read, write};
use rustix::net::{SocketFlags, accept_with};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A monitor command is at most this long; QEMU's own limit is larger, and no command of ours comes near it.
const MAX_LINE: usize = 16 * 1024;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // The supervisor asks what it can do.
    if args.windows(2).any(|pair| pair[0] == "-object" && pair[1] == "iommufd,help") {
        return ExitCode::SUCCESS;
    }
    let knobs = match Knobs::parse(&args) {
        Ok(knobs) => knobs,
        Err(sentence) => {
            eprintln!("diarch-stub-qemu: {sentence}");
            return ExitCode::from(1);
        }
    };
    if let Some(text) = &knobs.say {
        eprintln!("{text}");
    }
    if let Some(code) = knobs.exit {
        return ExitCode::from(code);
    }
    // What QEMU's monitor and serial port listen on; both came by inheritance.
    let (Some(qmp), Some(console)) = (chardev_fd(&args, "qmp"), chardev_fd(&args, "console")) else {
        eprintln!("diarch-stub-qemu: no -chardev socket,id=qmp,fd=N and id=console,fd=N among the arguments");
        return ExitCode::from(1);
    };
    let (Some(qmp), Some(console)) = (inherited(qmp), inherited(console)) else {
        eprintln!("diarch-stub-qemu: the fds of the qmp and console chardevs are not open");
        return ExitCode::from(1);
    };
    if knobs.name_bytes {
        // A name of 15 bytes at most can't be refused; if it were, the test that asked for it would find the old one.
        let _ = rustix::thread::set_name(c"q\xff\xfe");
    }
    let leader_exits = knobs.leader_exits;
    let work = move || match Stub::new(knobs, qmp, console).and_then(|mut stub| stub.run()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("diarch-stub-qemu: {error}");
            ExitCode::from(1)
        }
    };
    if !leader_exits {
        return work();
    }
    std::thread::spawn(move || {
        let failed = work() != ExitCode::SUCCESS;
        std::process::exit(failed.into());
    });
    // SAFETY: ends the calling thread and no other (exit(2), which is not exit(3)); what it leaves is the other thread's.
    unsafe { nix::libc::syscall(nix::libc::SYS_exit, 0) };
    ExitCode::FAILURE
}

/// Takes an inherited descriptor by its number; `None` when it is not open.
fn inherited(number: i32) -> Option<OwnedFd> {
    // fcntl(2) only looks the number up; a closed one gives EBADF.
    nix::fcntl::fcntl(borrow(number), nix::fcntl::FcntlArg::F_GETFD).ok()?;
    // SAFETY: the number is open (just seen), and nothing else in this process knows it.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

fn borrow(number: i32) -> BorrowedFd<'static> {
    // SAFETY: used for one fcntl(F_GETFD), which is defined for any non-negative number, open or not.
    unsafe { BorrowedFd::borrow_raw(number.max(0)) }
}

/// What the command line asks of the stub.
#[derive(Debug, Default, PartialEq, Eq)]
struct Knobs {
    say: Option<String>,
    exit: Option<u8>,
    crash_after: Option<Duration>,
    poweroff_after: Option<Duration>,
    reset_after: Option<Duration>,
    panic_after: Option<Duration>,
    powerdown: Duration,
    mute: bool,
    ignore_powerdown: bool,
    name_bytes: bool,
    leader_exits: bool,
}

impl Knobs {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut knobs = Knobs::default();
        let append = args.iter().position(|a| a == "-append").and_then(|at| args.get(at + 1)).map_or("", String::as_str);
        for word in append.split_whitespace().filter_map(|w| w.strip_prefix("stub.")) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let ms = || value.parse().map(Duration::from_millis).map_err(|_| format!("stub.{name} needs a number of milliseconds, and has {value:?}"));
            match name {
                "say" => knobs.say = Some(value.replace('+', " ")),
                "exit" => knobs.exit = Some(value.parse().map_err(|_| format!("stub.exit needs a number up to 255, and has {value:?}"))?),
                "crash-after-ms" => knobs.crash_after = Some(ms()?),
                "poweroff-after-ms" => knobs.poweroff_after = Some(ms()?),
                "reset-after-ms" => knobs.reset_after = Some(ms()?),
                "panic-after-ms" => knobs.panic_after = Some(ms()?),
                "powerdown-ms" => knobs.powerdown = ms()?,
                "mute" => knobs.mute = true,
                "ignore-powerdown" => knobs.ignore_powerdown = true,
                "name-bytes" => knobs.name_bytes = true,
                "leader-exits" => knobs.leader_exits = true,
                _ => return Err(format!("there is no stub.{name}")),
            }
        }
        Ok(knobs)
    }
}

/// The `fd=` of the socket chardev with this id, in QEMU's key=value form or in its JSON form.
fn chardev_fd(args: &[String], id: &str) -> Option<i32> {
    let values = args.windows(2).filter(|pair| pair[0] == "-chardev").map(|pair| pair[1].as_str());
    for value in values {
        let keys: Vec<(&str, &str)> = if value.starts_with('{') {
            value.trim_matches(['{', '}']).split(',').filter_map(|p| p.split_once(':')).map(|(k, v)| (bare(k), bare(v))).collect()
        } else {
            value.split(',').filter_map(|p| p.split_once('=')).collect()
        };
        let get = |key: &str| keys.iter().find(|(k, _)| *k == key).map(|(_, v)| *v);
        if get("id") == Some(id) {
            return get("fd").and_then(|fd| fd.parse().ok());
        }
    }
    None
}

fn bare(text: &str) -> &str {
    text.trim().trim_matches('"')
}

/// What happens by itself when its time has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Crash,
    PowerOff,
    Reset,
    Panic,
}

struct Stub {
    knobs: Knobs,
    signals: nix::sys::signalfd::SignalFd,
    qmp: OwnedFd,
    console: OwnedFd,
    monitor: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
    line: Vec<u8>,
    due: Vec<(Instant, Due)>,
}

impl Stub {
    fn new(mut knobs: Knobs, qmp: OwnedFd, console: OwnedFd) -> std::io::Result<Self> {
        use nix::sys::signal::{SigSet, Signal};
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.thread_block()?;
        let now = Instant::now();
        let due = [
            (knobs.crash_after.take(), Due::Crash),
            (knobs.poweroff_after.take(), Due::PowerOff),
            (knobs.reset_after.take(), Due::Reset),
            (knobs.panic_after.take(), Due::Panic),
        ];
        let due = due.into_iter().filter_map(|(after, what)| after.map(|after| (now + after, what))).collect();
        for listener in [&qmp, &console] {
            rustix::io::ioctl_fionbio(listener, true)?;
        }
        let signals = nix::sys::signalfd::SignalFd::new(&set)?;
        Ok(Stub { knobs, signals, qmp, console, monitor: None, terminal: None, line: Vec::new(), due })
    }

    fn run(&mut self) -> std::io::Result<ExitCode> {
        loop {
            let timeout = self.due.iter().map(|(at, _)| at.saturating_duration_since(Instant::now())).min();
            let timeout = timeout.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
            let ready = {
                // One client at a time, as QEMU has it: the next waits in the backlog.
                let monitor = self.monitor.as_ref().unwrap_or(&self.qmp);
                let terminal = self.terminal.as_ref().unwrap_or(&self.console);
                let mut fds = [PollFd::new(&self.signals, PollFlags::IN), PollFd::new(monitor, PollFlags::IN), PollFd::new(terminal, PollFlags::IN)];
                match poll(&mut fds, timeout.as_ref()) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                fds.map(|fd| !fd.revents().is_empty())
            };
            if ready[0] {
                self.say(SHUTDOWN_HOST_SIGNAL);
                return Ok(ExitCode::SUCCESS);
            }
            if ready[1]
                && let Some(code) = self.serve_monitor()
            {
                return Ok(code);
            }
            if ready[2] {
                self.serve_terminal();
            }
            if let Some(code) = self.serve_due() {
                return Ok(code);
            }
        }
    }

    fn serve_due(&mut self) -> Option<ExitCode> {
        let at = self.due.iter().position(|(at, _)| *at <= Instant::now())?;
        match self.due.swap_remove(at).1 {
            // QEMU's own crashes are aborts (a failed assertion) more often than anything else.
            Due::Crash => std::process::abort(),
            Due::PowerOff => {
                self.say(SHUTDOWN_GUEST);
                Some(ExitCode::SUCCESS)
            }
            Due::Reset => {
                self.say(r#"{"event": "RESET", "data": {"guest": true, "reason": "guest-reset"}, "timestamp": {"seconds": 1, "microseconds": 0}}"#);
                None
            }
            Due::Panic => {
                self.say(r#"{"event": "GUEST_PANICKED", "data": {"action": "pause"}, "timestamp": {"seconds": 1, "microseconds": 0}}"#);
                self.say(r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-panic"}, "timestamp": {"seconds": 1, "microseconds": 0}}"#);
                Some(ExitCode::SUCCESS)
            }
        }
    }

    fn serve_monitor(&mut self) -> Option<ExitCode> {
        if self.monitor.is_none() {
            self.monitor = accept(&self.qmp);
            self.line.clear();
            self.say(concat!(r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 9}, "package": "stub"}, "#, r#""capabilities": ["oob"]}}"#));
            return None;
        }
        let mut buffer = [0u8; 1024];
        match self.monitor.as_ref().map(|fd| read(fd, &mut buffer)) {
            Some(Ok(length @ 1..)) => self.line.extend(&buffer[..length]),
            Some(Err(Errno::AGAIN | Errno::INTR)) => return None,
            _ => self.monitor = None,
        }
        if self.line.len() > MAX_LINE {
            self.monitor = None;
        }
        while let Some(end) = self.line.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            if let Some(code) = self.command(&String::from_utf8_lossy(&line)) {
                return Some(code);
            }
        }
        None
    }

    fn command(&mut self, line: &str) -> Option<ExitCode> {
        let name = json_string(line, "execute").or_else(|| json_string(line, "exec-oob")).unwrap_or_default();
        let id = json_raw(line, "id").map(|id| format!(r#", "id": {id}"#)).unwrap_or_default();
        let answer = match name {
            "qmp_capabilities" | "system_powerdown" | "quit" | "system_reset" | "cont" | "stop" => "{}".to_owned(),
            "query-status" => r#"{"status": "running", "running": true}"#.to_owned(),
            "query-version" => r#"{"qemu": {"micro": 0, "minor": 0, "major": 9}, "package": "stub"}"#.to_owned(),
            "query-name" => "{}".to_owned(),
            _ => {
                let shown: String = name.chars().filter(|c| c.is_ascii_graphic() && !matches!(c, '"' | '\\')).take(64).collect();
                self.say(&format!(r#"{{"error": {{"class": "CommandNotFound", "desc": "The command {shown} has not been found"}}{id}}}"#));
                return None;
            }
        };
        self.say(&format!(r#"{{"return": {answer}{id}}}"#));
        match name {
            "system_powerdown" => {
                self.say(r#"{"event": "POWERDOWN", "timestamp": {"seconds": 1, "microseconds": 0}}"#);
                if !self.knobs.ignore_powerdown {
                    self.due.push((Instant::now() + self.knobs.powerdown, Due::PowerOff));
                }
                None
            }
            "system_reset" => {
                self.say(r#"{"event": "RESET", "data": {"guest": false, "reason": "host-qmp-system-reset"}, "timestamp": {"seconds": 1, "microseconds": 0}}"#);
                None
            }
            "quit" => {
                self.say(r#"{"event": "SHUTDOWN", "data": {"guest": false, "reason": "host-qmp-quit"}, "timestamp": {"seconds": 1, "microseconds": 0}}"#);
                Some(ExitCode::SUCCESS)
            }
            _ => None,
        }
    }

    /// The serial port of no guest: what is typed comes back.
    fn serve_terminal(&mut self) {
        let Some(terminal) = &self.terminal else {
            self.terminal = accept(&self.console);
            return;
        };
        let mut buffer = [0u8; 512];
        match read(terminal, &mut buffer) {
            Ok(length @ 1..) => {
                let _ = write(terminal, &buffer[..length]);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            _ => self.terminal = None,
        }
    }

    fn say(&mut self, line: &str) {
        if self.knobs.mute {
            return;
        }
        if let Some(monitor) = &self.monitor {
            let bytes = format!("{line}\r\n");
            // A client that does not read loses its connection: the stub must not block for it.
            if !matches!(write(monitor, bytes.as_bytes()), Ok(n) if n == bytes.len()) {
                self.monitor = None;
            }
        }
    }
}

const SHUTDOWN_GUEST: &str = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}, "timestamp": {"seconds": 1, "microseconds": 0}}"#;
const SHUTDOWN_HOST_SIGNAL: &str =
    r#"{"event": "SHUTDOWN", "data": {"guest": false, "reason": "host-signal"}, "timestamp": {"seconds": 1, "microseconds": 0}}"#;

fn accept(listener: &impl AsFd) -> Option<OwnedFd> {
    accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).ok()
}

/// The string value of a top-level key. The commands it reads are our own client's: flat, and without escapes in names.
fn json_string<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    json_raw(line, key)?.strip_prefix('"')?.strip_suffix('"')
}

/// The text of a scalar value, as it was written.
fn json_raw<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let quoted = format!("\"{key}\"");
    let after = &line[line.find(&quoted)? + quoted.len()..];
    let value = after.trim_start().strip_prefix(':')?.trim_start();
    let end = match value.strip_prefix('"') {
        Some(inside) => inside.find('"')? + 2,
        None => value.find([',', '}', ' ', '\r', '\n']).unwrap_or(value.len()),
    };
    value.get(..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn the_chardevs_are_found_in_both_of_qemus_spellings() {
        let plain = args(&["-chardev", "socket,id=qmp,fd=5,server=on,wait=off", "-chardev", "socket,id=console,fd=6,server=on"]);
        assert_eq!((chardev_fd(&plain, "qmp"), chardev_fd(&plain, "console")), (Some(5), Some(6)));
        let json = args(&["-chardev", r#"{"backend":"socket", "id": "qmp", "fd": "7", "server": true}"#]);
        assert_eq!((chardev_fd(&json, "qmp"), chardev_fd(&json, "console")), (Some(7), None));
    }

    #[test]
    fn the_knobs_come_from_the_guests_command_line() {
        let knobs = Knobs::parse(&args(&["-m", "64", "-append", "console=ttyS0 stub.exit=3 stub.say=no+such+machine"])).unwrap();
        assert_eq!(knobs, Knobs { exit: Some(3), say: Some("no such machine".into()), ..Knobs::default() });
        Knobs::parse(&args(&["-append", "stub.unknown"])).unwrap_err();
        Knobs::parse(&args(&["-append", "stub.crash-after-ms=soon"])).unwrap_err();
    }

    #[test]
    fn a_command_and_its_id_are_read() {
        let line = r#"{"execute":"query-status","id":17}"#;
        assert_eq!((json_string(line, "execute"), json_raw(line, "id")), (Some("query-status"), Some("17")));
        let line = r#"{ "id" : "a-1", "execute" : "quit" }"#;
        assert_eq!((json_string(line, "execute"), json_raw(line, "id")), (Some("quit"), Some("\"a-1\"")));
    }
}
