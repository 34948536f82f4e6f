//! `diarch vm console NAME`: the guest's serial console, byte for byte.
//!
//! ```text
//!   keyboard thread --chunks--> keyboard() --> socket --> screen() --chunks--> printer thread
//!   (blocks on stdin)           Ctrl-] ends it            (a closed socket ends it)   (blocks on stdout)
//! ```
//!
//! Blocking reads and writes have threads of their own, so that a signal is heard even while the terminal hangs. The terminal is
//! put back by `RawTerminal`'s drop: at the end, on a signal, and when a panic unwinds.

use super::connection::{Connection, Patience, ask, unexpected};
use super::escape;
use super::screen::{Exit, Screen, Stop};
use super::vm::started;
use crate::control::protocol::{Reply, Request};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use std::cell::Cell;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

/// Ctrl-], as in telnet and virsh: guests have no use for it.
const LEAVE: u8 = 0x1d;
/// When the input is not a terminal and has ended, the console is left after this much silence: the answer to what
/// was piped in is still wanted, and the guest never says that it was all.
const QUIET: Duration = Duration::from_secs(2);
/// How long the last output may take to be printed after the console was left.
const LAST_OUTPUT: Duration = Duration::from_secs(1);
/// A worker takes a moment to notice that a QEMU has ended.
const SETTLE: Duration = Duration::from_millis(300);
/// Attributes off and cursor on: a guest may have left them otherwise.
const PUT_BACK: &[u8] = b"\x1b[0m\x1b[?25h";

/// Why a console was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    /// By Ctrl-].
    Key,
    /// The input ended, and the guest said no more.
    Quiet,
    /// The worker closed it: QEMU ended, or somebody else took it.
    Closed,
    /// Nobody reads the output any more.
    ReaderGone,
    Signal(u8),
}

/// The console on this process's input and output.
pub fn console(socket: &Path, name: &str, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let before = started(socket, name, screen)?;
    let connection = open(socket, name, screen)?;
    let shown = escape::cell(name).into_owned();
    let stdin = io::stdin();
    let raw = match stdin.is_terminal() {
        false => None,
        true => {
            let _ = writeln!(screen.err, "console of {shown}: Ctrl-] leaves it");
            Some(RawTerminal::enter(stdin.as_fd()).map_err(|error| Stop::failed(format!("the terminal can't be made raw: {error}")))?)
        }
    };
    let on_terminal = raw.is_some();
    let left = run(connection, Box::new(stdin), Box::new(io::stdout()), on_terminal);
    if on_terminal && io::stdout().is_terminal() {
        let _ = io::stdout().write_all(PUT_BACK).and_then(|()| io::stdout().flush());
    }
    drop(raw);
    let left = left.map_err(|error| Stop::failed(format!("the console of {shown} broke: {error}")))?;
    if on_terminal {
        let why = match left {
            Left::Closed => "the console was closed by the other side",
            Left::Key | Left::Quiet | Left::ReaderGone | Left::Signal(_) => "left the console",
        };
        let _ = writeln!(screen.err, "\n{shown}: {why}");
    }
    match left {
        Left::Key | Left::Quiet => Ok(()),
        Left::Closed => closed(socket, name, before, screen),
        Left::ReaderGone => Err(Stop::ReaderGone),
        Left::Signal(number) => Err(Stop::Signal(number)),
    }
}

/// Whether the VM ended, which is no failure, or only the worker between it and us.
fn closed(socket: &Path, name: &str, before: Option<u64>, screen: &Screen<'_>) -> Result<(), Stop> {
    std::thread::sleep(SETTLE);
    match ask(socket, &Request::VmShow { name: name.to_owned() }, screen) {
        Err(Stop::Failure { exit: Exit::Unreachable, .. }) => {
            Err(Stop::new(Exit::Unreachable, format!("the worker went away, and the console with it; {name} runs on: open it again in a moment")))
        }
        Ok(Reply::Vm(vm)) if vm.pid.is_some() && vm.started_ms == before => {
            Err(Stop::new(Exit::Unreachable, format!("the console of {name} was closed, and {name} runs on: was the worker restarted? Open it again")))
        }
        _ => Ok(()),
    }
}

/// Asks for the console, and returns when the raw bytes begin.
fn open(socket: &Path, name: &str, screen: &Screen<'_>) -> Result<Connection, Stop> {
    let mut connection = Connection::open(socket)?;
    connection.send(&Request::VmConsole { name: name.to_owned() })?;
    match connection.next(Patience::Answer, screen)? {
        Some(Reply::Console {}) => Ok(connection),
        _ => Err(unexpected("something else than a console")),
    }
}

/// A terminal in raw mode, and the mode that it had before.
#[derive(Debug)]
struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    fn enter(terminal: impl AsFd) -> io::Result<Self> {
        let terminal = terminal.as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Now, and not after the output has drained: a terminal that hangs must not keep us.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

type Input = Box<dyn Read + Send>;
type Output = Box<dyn Write + Send>;

fn run(connection: Connection, input: Input, output: Output, on_terminal: bool) -> io::Result<Left> {
    let (begun, stream) = connection.into_raw();
    stream.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (from, to) = UnixStream::from_std(stream)?.into_split();
        let keys = read_keys(input);
        let (paper, printed) = print_chunks(output);
        let active = Cell::new(Instant::now());
        let left = {
            let mut signals = Signals::listen()?;
            tokio::select! {
                number = signals.any() => Left::Signal(number),
                left = keyboard(keys, to, on_terminal, &active) => left,
                left = screen(from, begun, &paper, &active) => left,
            }
        };
        drop(paper);
        let _ = tokio::time::timeout(LAST_OUTPUT, printed).await;
        Ok(left)
    })
}

/// Carries the input to the guest, until it ends or holds Ctrl-] typed at a terminal.
async fn keyboard(mut keys: mpsc::Receiver<Vec<u8>>, mut to: OwnedWriteHalf, on_terminal: bool, active: &Cell<Instant>) -> Left {
    while let Some(chunk) = keys.recv().await {
        // A pipe may carry that byte to the guest; a hand can't mean it so.
        let leave = chunk.iter().position(|byte| on_terminal && *byte == LEAVE);
        let chunk = &chunk[..leave.unwrap_or(chunk.len())];
        if to.write_all(chunk).await.is_err() {
            return Left::Closed;
        }
        if leave.is_some() {
            return Left::Key;
        }
        active.set(Instant::now());
    }
    if on_terminal {
        return Left::Key;
    }
    // The write half stays open: closing it would be closing the console.
    loop {
        let silent = active.get().elapsed();
        if silent >= QUIET {
            return Left::Quiet;
        }
        tokio::time::sleep(QUIET - silent).await;
    }
}

/// Carries what the guest writes to the printer.
async fn screen(mut from: OwnedReadHalf, begun: Vec<u8>, paper: &mpsc::Sender<Vec<u8>>, active: &Cell<Instant>) -> Left {
    let mut chunk = begun;
    loop {
        if !chunk.is_empty() && paper.send(std::mem::take(&mut chunk)).await.is_err() {
            return Left::ReaderGone;
        }
        let mut buffer = vec![0; 16 * 1024];
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return Left::Closed,
            Ok(count) => buffer.truncate(count),
        }
        active.set(Instant::now());
        chunk = buffer;
    }
}

fn read_keys(mut input: Input) -> mpsc::Receiver<Vec<u8>> {
    let (sender, keys) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) if sender.blocking_send(buffer[..count].to_vec()).is_err() => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    keys
}

/// Prints what it is sent, at once; the second part ends when all is printed.
fn print_chunks(mut output: Output) -> (mpsc::Sender<Vec<u8>>, oneshot::Receiver<()>) {
    let (paper, mut chunks) = mpsc::channel::<Vec<u8>>(16);
    let (done, printed) = oneshot::channel();
    std::thread::spawn(move || {
        while let Some(chunk) = chunks.blocking_recv() {
            if output.write_all(&chunk).and_then(|()| output.flush()).is_err() {
                break;
            }
        }
        drop(chunks);
        let _ = done.send(());
    });
    (paper, printed)
}

/// The signals that would end us with the terminal still raw.
struct Signals {
    hang_up: Signal,
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            hang_up: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }
    async fn any(&mut self) -> u8 {
        tokio::select! {
            _ = self.hang_up.recv() => 1,
            _ = self.interrupt.recv() => 2,
            _ = self.quit.recv() => 3,
            _ = self.terminate.recv() => 15,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::connection::tests::FakeWorker;
    use super::super::screen::tests::Printed;
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("unpoisoned").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Paper {
        fn text(&self) -> String {
            String::from_utf8_lossy(&self.0.lock().expect("unpoisoned")).into_owned()
        }
    }

    /// A guest that greets in the same packet as the reply, and echoes.
    fn echo() -> FakeWorker {
        FakeWorker::start(vec!["{\"console\":{}}\nhello \u{1b}[1m".into()], |mut stream| {
            let mut buffer = [0; 64];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                let _ = stream.write_all(&buffer[..count]);
            }
        })
    }

    fn opened(worker: &FakeWorker) -> Connection {
        open(&worker.socket, "web", &Printed::default().screen()).expect("a console")
    }

    #[test]
    fn piped_input_reaches_the_guest_and_its_answer_is_printed_raw() {
        let (worker, paper) = (echo(), Paper::default());
        let left = run(opened(&worker), Box::new(&b"uname\n\x1d"[..]), Box::new(paper.clone()), false);
        assert_eq!(left.expect("ran"), Left::Quiet);
        assert_eq!(paper.text(), "hello \u{1b}[1muname\n\u{1d}");
        assert_eq!(worker.request(), Request::VmConsole { name: "web".into() });
    }

    #[test]
    fn the_key_leaves_and_what_follows_it_is_not_sent() {
        let (worker, paper) = (echo(), Paper::default());
        let left = run(opened(&worker), Box::new(&b"ab\x1drm -rf"[..]), Box::new(paper.clone()), true);
        assert_eq!(left.expect("ran"), Left::Key);
        assert!(!paper.text().contains("rm"), "{}", paper.text());
    }

    #[test]
    fn a_console_that_is_closed_ends_after_its_last_output() {
        let worker = FakeWorker::start(vec!["{\"console\":{}}\n".into(), "last words".into()], |_| ());
        let (paper, (never, _writer)) = (Paper::default(), io::pipe().expect("a pipe"));
        let left = run(opened(&worker), Box::new(never), Box::new(paper.clone()), false);
        assert_eq!(left.expect("ran"), Left::Closed);
        assert_eq!(paper.text(), "last words");
    }

    #[test]
    fn a_vm_without_a_console_gives_the_workers_reason() {
        let worker = FakeWorker::start(vec!["{\"error\":{\"kind\":\"not-found\",\"message\":\"no VM is called web\"}}\n".into()], |_| ());
        let refused = open(&worker.socket, "web", &Printed::default().screen()).map(|_| ());
        assert_eq!(refused, Err(Stop::new(Exit::NotFound, "no VM is called web")));
    }
}
