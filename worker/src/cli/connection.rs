//! The command's end of the worker's socket.

use super::escape;
use super::screen::{Exit, Screen, Spinner, Stop};
use crate::control::protocol::{Reply, Request};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A reply line is at most this long: a list of a few thousand VMs, and not whatever a broken worker sends.
const MAX_REPLY: usize = 16 * 1024 * 1024;
/// After this silence a spinner appears, or a follower looks whether somebody still reads.
const TICK: Duration = Duration::from_secs(1);
/// A worker that holds its files in memory answers in milliseconds; one that is silent for so long is stuck.
#[cfg(not(test))]
const ANSWER: Duration = Duration::from_secs(10);
#[cfg(test)]
const ANSWER: Duration = Duration::from_millis(1500);

/// How long the next reply may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// The worker has the answer at hand.
    Answer,
    /// The reply comes when something happens.
    Event,
}

/// One connection, for one request.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<UnixStream>,
    socket: PathBuf,
    /// A reply came.
    heard: bool,
    /// The other end went away in the middle.
    lost: bool,
}

impl Connection {
    pub fn open(socket: &Path) -> Result<Self, Stop> {
        let stream = dial(socket).map_err(|error| unreachable(socket, &error))?;
        Ok(Self { reader: BufReader::new(stream), socket: socket.to_owned(), heard: false, lost: false })
    }

    /// Sends the request of this connection.
    pub fn send(&mut self, request: &Request) -> Result<(), Stop> {
        let mut line = serde_json::to_vec(request).map_err(|error| Stop::failed(format!("the request can't be written: {error}")))?;
        line.push(b'\n');
        self.reader.get_mut().write_all(&line).map_err(|error| self.broke(&error.to_string()))
    }

    /// The next reply; none when the worker said `Done`. The worker's `Error` is ours.
    pub fn next(&mut self, patience: Patience, screen: &Screen<'_>) -> Result<Option<Reply>, Stop> {
        let line = self.line(patience, screen)?;
        self.heard = true;
        match serde_json::from_slice(&line) {
            Ok(Reply::Done {}) => Ok(None),
            Ok(Reply::Error(failure)) => Err(failure.into()),
            Ok(reply) => Ok(Some(reply)),
            Err(error) => Err(Stop::failed(format!(
                "the worker's answer is not understood ({error}): are the command ({}) and the worker of different versions?",
                env!("CARGO_PKG_VERSION")
            ))),
        }
    }

    fn line(&mut self, patience: Patience, screen: &Screen<'_>) -> Result<Vec<u8>, Stop> {
        let (mut line, since, mut spinner) = (Vec::new(), Instant::now(), None);
        loop {
            match self.reader.fill_buf() {
                Ok([]) => return Err(self.broke("it was closed in the middle of the answer")),
                Ok(bytes) => {
                    let end = bytes.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
                    let taken = end.unwrap_or(bytes.len());
                    line.extend_from_slice(&bytes[..taken]);
                    self.reader.consume(taken);
                    if line.len() > MAX_REPLY {
                        return Err(Stop::failed(format!("the worker sent a line of more than {MAX_REPLY} bytes")));
                    }
                    if end.is_some() {
                        return Ok(line);
                    }
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => match patience {
                    Patience::Event => screen.reader_is_there()?,
                    Patience::Answer if screen.live && spinner.is_none() => spinner = Some(Spinner::start("waiting for the worker", since.elapsed())),
                    Patience::Answer => {}
                },
                Err(error) => return Err(self.broke(&error.to_string())),
            }
            // Also of a worker that sends a byte now and then.
            if matches!(patience, Patience::Answer) && since.elapsed() >= ANSWER {
                let message = format!(
                    "the worker took the connection and has given no whole answer for {} seconds: see 'journalctl -u diarch-worker -e'; 'systemctl restart diarch-worker' ends no VM",
                    ANSWER.as_secs()
                );
                return Err(Stop::new(Exit::Unreachable, message));
            }
        }
    }

    /// The raw stream, and the bytes of it that were already read.
    pub fn into_raw(self) -> (Vec<u8>, UnixStream) {
        (self.reader.buffer().to_vec(), self.reader.into_inner())
    }

    /// Whether any reply came by it.
    pub fn heard(&self) -> bool {
        self.heard
    }

    /// Whether it ended before the worker had said that it was done.
    pub fn lost(&self) -> bool {
        self.lost
    }

    fn broke(&mut self, why: &str) -> Stop {
        self.lost = true;
        let message = format!("the connection to the worker at {} broke ({why}): has it just been restarted? Try again.", self.socket.display());
        Stop::new(Exit::Unreachable, message)
    }
}

/// Asks for one thing, and gives the one reply to it.
pub fn ask(socket: &Path, request: &Request, screen: &Screen<'_>) -> Result<Reply, Stop> {
    let mut connection = Connection::open(socket)?;
    connection.send(request)?;
    let mut answer = None;
    while let Some(reply) = connection.next(Patience::Answer, screen)? {
        answer = Some(reply);
    }
    answer.ok_or_else(|| unexpected("nothing"))
}

/// The worker answered something that is no answer to what was asked.
pub fn unexpected(what: &str) -> Stop {
    Stop::failed(format!("the worker answered {what}, which is no answer to this request: are the command and the worker of different versions?"))
}

fn dial(socket: &Path) -> io::Result<UnixStream> {
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // A connect waits while the listener's queue is full; this bounds that wait too.
    sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, Some(ANSWER))?;
    connect(&fd, &SocketAddrUnix::new(socket)?)?;
    let stream = UnixStream::from(fd);
    stream.set_read_timeout(Some(TICK))?;
    Ok(stream)
}

/// What to do about a socket that doesn't let us in.
fn unreachable(socket: &Path, error: &io::Error) -> Stop {
    let shown = socket.display();
    match error.kind() {
        io::ErrorKind::PermissionDenied => Stop::new(
            Exit::Denied,
            format!(
                "permission denied on the worker's socket {shown}: {}, or choose another socket with --socket",
                match group_of_first_seen(socket) {
                    Some(group) => format!("join the group {group} (usermod -aG {group} YOU, and log in again)"),
                    None => "ask an administrator for the group that may use it".into(),
                }
            ),
        ),
        io::ErrorKind::NotFound => {
            Stop::new(Exit::Unreachable, format!("there is no worker's socket at {shown}: is diarch-worker running? See 'systemctl status diarch-worker'"))
        }
        io::ErrorKind::ConnectionRefused => Stop::new(
            Exit::Unreachable,
            format!("nobody listens at {shown}: is diarch-worker running? See 'systemctl status diarch-worker' and 'journalctl -u diarch-worker -e'"),
        ),
        io::ErrorKind::WouldBlock => {
            Stop::new(Exit::Unreachable, format!("the worker at {shown} takes no connections: it is stuck, see 'journalctl -u diarch-worker -e'"))
        }
        _ => Stop::new(Exit::Unreachable, format!("the worker's socket {shown} can't be connected to: {error}")),
    }
}

/// The group of `path`, or of the nearest directory above it that we may look at: who is in it gets in. None where that is root's, which nobody is to join.
pub fn group_of_first_seen(path: &Path) -> Option<String> {
    // What keeps us out lies where the link leads to.
    let path = match std::fs::read_link(path) {
        Ok(target) => path.parent().unwrap_or(Path::new("/")).join(target),
        Err(_) => path.to_owned(),
    };
    let gid = path.ancestors().find_map(|part| part.metadata().ok())?.gid();
    (gid != 0).then(|| group_name(gid))
}

/// A group's name, or its number.
pub fn group_name(gid: u32) -> String {
    match nix::unistd::Group::from_gid(gid.into()) {
        Ok(Some(group)) => escape::cell(&group.name).into_owned(),
        _ => gid.to_string(),
    }
}

/// A user's name, or its number.
pub fn user_name(uid: u32) -> String {
    match nix::unistd::User::from_uid(uid.into()) {
        Ok(Some(user)) => escape::cell(&user.name).into_owned(),
        _ => uid.to_string(),
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::screen::tests::Printed;
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    /// A worker that takes one connection, notes its request and answers these lines.
    pub struct FakeWorker {
        pub socket: PathBuf,
        thread: Option<JoinHandle<Request>>,
        _directory: tempfile::TempDir,
    }

    impl FakeWorker {
        /// `then` gets the connection after the lines are sent.
        pub fn start(lines: Vec<String>, then: impl FnOnce(UnixStream) + Send + 'static) -> Self {
            let directory = tempfile::tempdir().expect("a directory");
            let socket = directory.path().join("worker.sock");
            let listener = UnixListener::bind(&socket).expect("a socket");
            let thread = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().expect("a connection");
                let mut request = String::new();
                BufReader::new(&stream).read_line(&mut request).expect("a request");
                for line in lines {
                    let _ = stream.write_all(line.as_bytes());
                }
                then(stream);
                serde_json::from_str(&request).expect("a request of the protocol")
            });
            Self { socket, thread: Some(thread), _directory: directory }
        }
        pub fn answering(replies: &[Reply]) -> Self {
            Self::start(replies.iter().map(|r| serde_json::to_string(r).expect("JSON") + "\n").collect(), |_| ())
        }
        /// Dies after each connection; the last one should be done.
        pub fn again_and_again(connections: Vec<Vec<Reply>>) -> FakeWorkers {
            let directory = tempfile::tempdir().expect("a directory");
            let socket = directory.path().join("worker.sock");
            let listener = UnixListener::bind(&socket).expect("a socket");
            let thread = std::thread::spawn(move || {
                let mut requests = Vec::new();
                for replies in connections {
                    let (mut stream, _) = listener.accept().expect("a connection");
                    let mut request = String::new();
                    BufReader::new(&stream).read_line(&mut request).expect("a request");
                    requests.push(serde_json::from_str(&request).expect("a request of the protocol"));
                    for reply in replies {
                        let _ = stream.write_all((serde_json::to_string(&reply).expect("JSON") + "\n").as_bytes());
                    }
                }
                requests
            });
            FakeWorkers { socket, thread, _directory: directory }
        }
        /// What it was asked.
        pub fn request(mut self) -> Request {
            self.thread.take().expect("started").join().expect("the fake worker ended well")
        }
    }

    /// Workers that come and go at one socket.
    pub struct FakeWorkers {
        pub socket: PathBuf,
        thread: JoinHandle<Vec<Request>>,
        _directory: tempfile::TempDir,
    }

    impl FakeWorkers {
        /// What they were asked, once all have gone.
        pub fn requests(self) -> Vec<Request> {
            self.thread.join().expect("the fake workers ended well")
        }
    }

    fn exit_of(result: Result<Reply, Stop>) -> (Exit, String) {
        match result {
            Err(Stop::Failure { exit, message }) => (exit, message),
            other => panic!("not a failure: {other:?}"),
        }
    }

    #[test]
    fn a_missing_and_a_deserted_socket_say_how_to_look_for_the_worker() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("worker.sock");
        let mut printed = Printed::default();
        for _ in 0..2 {
            let (exit, message) = exit_of(ask(&socket, &Request::VmList {}, &printed.screen()));
            assert_eq!(exit, Exit::Unreachable);
            assert!(message.contains("systemctl status diarch-worker"), "{message}");
            drop(UnixListener::bind(&socket));
        }
    }

    #[test]
    fn a_socket_that_may_not_be_opened_names_its_group() {
        let directory = tempfile::tempdir().expect("a directory");
        // As an installation has it: a link into the directory that keeps others out, beside root's.
        let (link, inner) = (directory.path().join("worker.sock"), directory.path().join("worker"));
        std::fs::create_dir(&inner).expect("made");
        std::os::unix::fs::symlink("worker/worker.sock", &link).expect("linked");
        let told = || match unreachable(&link, &io::ErrorKind::PermissionDenied.into()) {
            Stop::Failure { exit, message } => (exit, message),
            other => panic!("no failure: {other:?}"),
        };
        if rustix::process::geteuid().is_root() {
            let (exit, message) = told();
            assert_eq!(exit, Exit::Denied);
            assert!(!message.contains("group root") && message.contains("ask an administrator"), "{message}");
            std::os::unix::fs::chown(&inner, None, Some(54_321)).expect("given away");
        }
        let group = group_name(inner.metadata().expect("there").gid());
        let (exit, message) = told();
        assert_eq!(exit, Exit::Denied);
        assert!(message.contains(&format!("join the group {group}")), "{message}");
    }

    #[test]
    fn a_worker_that_dies_in_its_answer_is_unreachable() {
        let worker = FakeWorker::start(vec!["{\"vms\":[".into()], |_| ());
        let (exit, message) = exit_of(ask(&worker.socket, &Request::VmList {}, &Printed::default().screen()));
        assert_eq!(exit, Exit::Unreachable);
        assert!(message.contains("in the middle of the answer"), "{message}");
        assert_eq!(worker.request(), Request::VmList {});
    }

    #[test]
    fn an_answer_of_another_version_is_a_failure_that_says_so() {
        let worker = FakeWorker::start(vec!["{\"surprise\":{}}\n".into()], |_| ());
        let (exit, message) = exit_of(ask(&worker.socket, &Request::Status {}, &Printed::default().screen()));
        assert_eq!(exit, Exit::Failed);
        assert!(message.contains("different versions"), "{message}");
    }
}

#[cfg(test)]
mod drip {
    use super::tests::FakeWorker;
    use super::*;
    use crate::cli::screen::tests::Printed;

    #[test]
    fn a_worker_that_sends_a_byte_now_and_then_is_not_waited_for_for_ever() {
        let worker = FakeWorker::start(Vec::new(), |mut stream| {
            while stream.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let begun = Instant::now();
        let stopped = ask(&worker.socket, &Request::Status {}, &Printed::default().screen());
        assert!(matches!(&stopped, Err(Stop::Failure { exit: Exit::Unreachable, message }) if message.contains("no whole answer")), "{stopped:?}");
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
