//! The monitor of one QEMU: a small client of its machine protocol (QMP).
//!
//! ```text
//!   QEMU --{"QMP": ...}-----------> greeting
//!   we   --qmp_capabilities, id 1-->                  (and query-status behind it: QEMU works in order, which saves a turn)
//!   QEMU --{"return":..,"id":1}---> the waiter of id 1
//!   QEMU --{"event":"SHUTDOWN"}---> Seen               the few that matter, as a state that can't grow
//! ```
//!
//! A QEMU is what a guest breaks into, so it is hostile: lines are bounded, what it sends is read at a bounded pace, an unknown id or event
//! is dropped, and a deadline drops only who waits. A mute monitor costs its own VM its answers, and nobody else anything.

use diarch_ipc::frame::printable;
use serde_json::Value;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout};

/// Answers to the commands below have some hundred bytes.
const MAX_LINE: usize = 64 * 1024;
/// Above this pace (bytes a second) the socket is left alone until the second is over; QEMU then waits, and burns its own time.
const MAX_PACE: usize = 256 * 1024;
/// A buffer that a long line made larger is given back.
const KEEP_BUFFER: usize = 2 * 1024;
/// Commands without an answer at one time.
const MAX_WAITING: usize = 16;

/// What a QEMU said of its guest, so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    pub greeted: bool,
    pub shutdown: Option<Shutdown>,
    pub panicked: bool,
    /// Reboots that the guest made by itself.
    pub guest_resets: u32,
    /// Why the monitor can't be used any more.
    pub closed: Option<String>,
}

/// QMP's `SHUTDOWN`: `guest` when the guest asked for it, and QEMU's word for the cause (`guest-shutdown`, `host-qmp-quit`, ...).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shutdown {
    pub guest: bool,
    pub reason: String,
}

/// Why a command has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    #[error("QEMU's monitor did not answer {command} within {after_ms} ms")]
    Late { command: &'static str, after_ms: u128 },
    #[error("QEMU's monitor is closed: {0}")]
    Closed(String),
    #[error("QEMU refused {command}: {reason}")]
    Refused { command: &'static str, reason: String },
}

/// A connection to one monitor. Dropped, it closes.
#[derive(Debug)]
pub struct Monitor {
    shared: Arc<Shared>,
    reader: tokio::task::AbortHandle,
}

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    waiting: Mutex<Waiting>,
    seen: watch::Sender<Seen>,
}

type Answer = Result<Value, String>;

#[derive(Debug, Default)]
struct Waiting {
    last: u64,
    by_id: HashMap<u64, oneshot::Sender<Answer>>,
}

impl Monitor {
    /// Takes the connected socket. Nothing has been said yet.
    pub fn open(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let stream = UnixStream::from_std(std::os::unix::net::UnixStream::from(socket))?;
        let shared = Arc::new(Shared { stream, waiting: Mutex::default(), seen: watch::Sender::new(Seen::default()) });
        let reader = tokio::spawn(read(Arc::clone(&shared))).abort_handle();
        Ok(Self { shared, reader })
    }

    /// Waits for the greeting, negotiates, and says whether the guest's processors run.
    pub async fn greet(&self, within: Duration) -> Result<bool, NoAnswer> {
        let mut seen = self.seen();
        let greeting = seen.wait_for(|seen| seen.greeted || seen.closed.is_some());
        match timeout(within, greeting).await {
            Err(_) => return Err(NoAnswer::Late { command: "the greeting", after_ms: within.as_millis() }),
            Ok(Ok(seen)) if seen.closed.is_none() => {}
            Ok(_) => return Err(self.closed()),
        }
        let (capabilities, status) = tokio::join!(self.execute("qmp_capabilities", within), self.execute("query-status", within));
        // "Capabilities negotiation is already complete": the monitor was ours before.
        if let Err(error) = capabilities
            && !matches!(error, NoAnswer::Refused { .. })
        {
            return Err(error);
        }
        Ok(status?.get("running").and_then(Value::as_bool).unwrap_or(false))
    }

    /// Whether the guest's processors run.
    pub async fn running(&self, within: Duration) -> Result<bool, NoAnswer> {
        Ok(self.execute("query-status", within).await?.get("running").and_then(Value::as_bool).unwrap_or(false))
    }

    /// One command without arguments.
    pub async fn execute(&self, command: &'static str, within: Duration) -> Result<Value, NoAnswer> {
        let (id, answer) = self.send(command)?;
        let got = timeout(within, answer).await;
        match got {
            Err(_) => {
                self.waiting().by_id.remove(&id);
                Err(NoAnswer::Late { command, after_ms: within.as_millis() })
            }
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(reason))) => Err(NoAnswer::Refused { command, reason }),
            Ok(Err(_)) => Err(self.closed()),
        }
    }

    /// What QEMU said of its guest; changes are waited for on the receiver.
    pub fn seen(&self) -> watch::Receiver<Seen> {
        self.shared.seen.subscribe()
    }

    fn send(&self, command: &'static str) -> Result<(u64, oneshot::Receiver<Answer>), NoAnswer> {
        let mut waiting = self.waiting();
        if self.shared.seen.borrow().closed.is_some() {
            return Err(self.closed());
        }
        if waiting.by_id.len() >= MAX_WAITING {
            return Err(NoAnswer::Refused { command, reason: "too many commands are without an answer".into() });
        }
        waiting.last += 1;
        let id = waiting.last;
        let line = format!("{{\"execute\":\"{command}\",\"id\":{id}}}\r\n");
        // Past tokio, whose readiness is not known before the first wait: a command fits, or the monitor has not read for hours.
        let sent = rustix::net::send(&self.shared.stream, line.as_bytes(), rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL);
        match sent.map_err(io::Error::from) {
            Ok(written) if written == line.len() => {
                let (to, answer) = oneshot::channel();
                waiting.by_id.insert(id, to);
                Ok((id, answer))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(NoAnswer::Late { command, after_ms: 0 }),
            other => {
                drop(waiting);
                let reason = other.map_or_else(|error| error.to_string(), |_| "it took half a command".into());
                self.shared.close(reason.clone());
                Err(NoAnswer::Closed(reason))
            }
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn closed(&self) -> NoAnswer {
        NoAnswer::Closed(self.shared.seen.borrow().closed.clone().unwrap_or_else(|| "it has ended".into()))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Shared {
    fn close(&self, reason: String) {
        self.seen.send_if_modified(|seen| {
            let first = seen.closed.is_none();
            if first {
                seen.closed = Some(reason);
            }
            first
        });
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).by_id.clear();
    }
}

/// Reads until the end, or until QEMU breaks a rule.
async fn read(shared: Arc<Shared>) {
    let reason = match read_lines(&shared).await {
        Ok(reason) => reason,
        Err(error) => error.to_string(),
    };
    shared.close(reason);
}

async fn read_lines(shared: &Shared) -> io::Result<String> {
    let mut line: Vec<u8> = Vec::new();
    let mut second = Instant::now();
    let mut in_second = 0;
    loop {
        shared.stream.readable().await?;
        // On the stack of this step only: 200 quiet VMs keep no buffers.
        let mut chunk = [0u8; 4096];
        let got = match shared.stream.try_read(&mut chunk) {
            Ok(0) => return Ok("QEMU closed it".into()),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        for piece in chunk[..got].split_inclusive(|b| *b == b'\n') {
            if line.len() + piece.len() > MAX_LINE {
                return Ok(format!("QEMU sent a line longer than {MAX_LINE} bytes"));
            }
            line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                take(shared, &line);
                line.clear();
                line.shrink_to(KEEP_BUFFER);
            }
        }
        if line.is_empty() {
            line = Vec::new();
        }
        in_second += got;
        if second.elapsed() >= Duration::from_secs(1) {
            (second, in_second) = (Instant::now(), got);
        } else if in_second > MAX_PACE {
            tokio::time::sleep_until(second + Duration::from_secs(1)).await;
        }
    }
}

fn take(shared: &Shared, line: &[u8]) {
    // What is not JSON is dropped: QEMU's next line may be.
    let Ok(Value::Object(mut message)) = serde_json::from_slice::<Value>(line) else { return };
    if message.contains_key("QMP") {
        shared.seen.send_if_modified(|seen| !std::mem::replace(&mut seen.greeted, true));
    } else if let Some(Value::String(event)) = message.get("event") {
        let data = message.get("data");
        let guest = data.and_then(|data| data.get("guest")).and_then(Value::as_bool).unwrap_or(false);
        match event.as_str() {
            "SHUTDOWN" => {
                let reason = data.and_then(|data| data.get("reason")).and_then(Value::as_str).unwrap_or("");
                let reason = printable(reason, 64);
                shared.seen.send_modify(|seen| seen.shutdown = Some(Shutdown { guest, reason }));
            }
            "RESET" if guest => shared.seen.send_modify(|seen| seen.guest_resets = seen.guest_resets.saturating_add(1)),
            "GUEST_PANICKED" => shared.seen.send_modify(|seen| seen.panicked = true),
            _ => {}
        }
    } else if let Some(id) = message.get("id").and_then(Value::as_u64) {
        let waiter = shared.waiting.lock().unwrap_or_else(PoisonError::into_inner).by_id.remove(&id);
        if let Some(waiter) = waiter {
            let answer = match (message.remove("return"), message.get("error")) {
                (Some(value), _) => Ok(value),
                (None, Some(error)) => Err(printable(error.get("desc").and_then(Value::as_str).unwrap_or("without a reason"), 200)),
                (None, None) => Err("it answered neither with a result nor with an error".into()),
            };
            let _ = waiter.send(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    const SOON: Duration = Duration::from_secs(5);
    const GREETING: &[u8] = b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

    fn pair() -> (Monitor, UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Monitor::open(ours.into()).unwrap(), UnixStream::from_std(theirs).unwrap())
    }

    /// Answers each command with what `reply` gives for (name, id).
    fn serve(stream: UnixStream, reply: impl Fn(&str, u64) -> String + Send + 'static) {
        tokio::spawn(async move {
            let (read, mut write) = stream.into_split();
            write.write_all(GREETING).await.unwrap();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let command: Value = serde_json::from_str(&line).unwrap();
                let text = reply(command["execute"].as_str().unwrap(), command["id"].as_u64().unwrap());
                write.write_all(text.as_bytes()).await.unwrap();
            }
        });
    }
    fn well(command: &str, id: u64) -> String {
        let value = if command == "query-status" { "{\"running\": true, \"status\": \"running\"}" } else { "{}" };
        format!("{{\"return\": {value}, \"id\": {id}}}\r\n")
    }

    #[tokio::test]
    async fn a_greeted_monitor_says_that_the_guest_runs() {
        let (monitor, theirs) = pair();
        serve(theirs, well);
        assert!(monitor.greet(SOON).await.unwrap());
    }

    #[tokio::test]
    async fn garbage_wrong_ids_and_unknown_events_are_dropped() {
        let (monitor, theirs) = pair();
        serve(theirs, |command, id| {
            format!(
                "\u{7f}garbage\n[1]\n{{\"event\": \"NEWS\"}}\n{{\"event\": 7}}\n{{\"return\": {{}}, \"id\": {}}}\n{{\"return\": {{}}}}\n\n{}",
                id + 7,
                well(command, id)
            )
        });
        assert!(monitor.greet(SOON).await.unwrap());
    }

    #[tokio::test]
    async fn an_endless_line_closes_the_monitor() {
        let (monitor, mut theirs) = pair();
        tokio::spawn(async move { while theirs.write_all(&[b'x'; 1000]).await.is_ok() {} });
        let error = monitor.greet(SOON).await.unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
    }

    #[tokio::test]
    async fn a_flood_of_events_is_read_at_a_bounded_pace_and_keeps_nothing() {
        let (monitor, theirs) = pair();
        let (_read, mut write) = theirs.into_split();
        tokio::spawn(async move { while write.write_all(b"{\"event\": \"RESET\", \"data\": {\"guest\": true}}\n").await.is_ok() {} });
        tokio::time::sleep(Duration::from_millis(500)).await;
        let resets = monitor.seen().borrow().guest_resets as usize;
        assert!(resets > 0 && resets * 40 < MAX_PACE + 64 * 1024, "{resets}");
    }

    #[tokio::test]
    async fn a_mute_monitor_drops_only_who_waits() {
        let (monitor, mut theirs) = pair();
        theirs.write_all(GREETING).await.unwrap();
        let short = Duration::from_millis(30);
        let error = monitor.greet(short).await.unwrap_err();
        assert!(matches!(error, NoAnswer::Late { .. }), "{error}");
        // It wakes up: the late answers are nobody's, and the next command gets its own.
        serve(theirs, well);
        assert!(monitor.running(SOON).await.unwrap());
    }

    #[tokio::test]
    async fn a_refused_command_quotes_the_reason_escaped() {
        let (monitor, theirs) = pair();
        serve(theirs, |_, id| format!("{{\"error\": {{\"class\": \"X\", \"desc\": \"no\\u001b[31m\"}}, \"id\": {id}}}\n"));
        let error = monitor.execute("quit", SOON).await.unwrap_err().to_string();
        assert!(error.contains("QEMU refused quit: no") && !error.contains('\u{1b}'), "{error}");
    }

    #[tokio::test]
    async fn the_end_of_the_guest_is_seen_before_the_end_of_the_monitor() {
        let (monitor, mut theirs) = pair();
        theirs.write_all(b"{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-shutdown\"}}\n").await.unwrap();
        drop(theirs);
        let mut seen = monitor.seen();
        let seen = seen.wait_for(|seen| seen.closed.is_some()).await.unwrap();
        assert_eq!(seen.shutdown, Some(Shutdown { guest: true, reason: "guest-shutdown".into() }));
        drop(seen);
        assert!(matches!(monitor.execute("quit", SOON).await, Err(NoAnswer::Closed(_))));
    }

    #[tokio::test]
    async fn a_real_qemu_greets_answers_and_quits() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let spawned = tokio::process::Command::new("qemu-system-x86_64")
            .args(["-M", "none", "-nodefaults", "-display", "none", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn();
        let Ok(mut qemu) = spawned else {
            assert!(std::env::var_os("CI").is_none(), "qemu-system-x86_64 is missing");
            eprintln!("skipped: qemu-system-x86_64 is missing");
            return;
        };
        let stream = loop {
            match std::os::unix::net::UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        let monitor = Monitor::open(stream.into()).unwrap();
        monitor.greet(SOON).await.unwrap();
        assert!(monitor.execute("query-version", SOON).await.unwrap().get("qemu").is_some());
        monitor.execute("quit", SOON).await.unwrap();
        assert!(timeout(SOON, qemu.wait()).await.unwrap().unwrap().success());
        let mut seen = monitor.seen();
        assert_eq!(seen.wait_for(|seen| seen.closed.is_some()).await.unwrap().shutdown.as_ref().unwrap().reason, "host-qmp-quit");
    }
}
