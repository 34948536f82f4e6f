//! The worker's end of the control socket.
//!
//! ```text
//!   bind NAME.new.PID (nobody but us can connect) -> chgrp operators, chmod 0660 -> rename over NAME
//!   accept -> one task each, at most 64 -> one request line -> reply lines -> Done or Error
//! ```
//!
//! A client that does not read or write holds only its own task, and not for ever.

use super::protocol::{Failure, FailureKind, MAX_LINE, PlanStep, PlanView, Reply, Request};
use super::{console, follow, orders, view};
use crate::worker::{Order, Worker, failure};
use nix::unistd::{Gid, Group};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// People and their scripts; a further one waits in the backlog.
const MAX_CONNECTIONS: usize = 64;
/// For the request line.
const ASK_WITHIN: Duration = Duration::from_secs(5);
/// For a client to take a reply line when its socket's buffer is full.
const TAKE_WITHIN: Duration = Duration::from_secs(30);

/// Listens in the place of whatever listened there before.
pub fn listen(socket: &Path, operators: Option<&str>) -> io::Result<UnixListener> {
    let mut beside = socket.as_os_str().to_owned();
    beside.push(format!(".new.{}", std::process::id()));
    let beside = Path::new(&beside);
    match std::fs::remove_file(beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // With the umask 0027 that the worker sets, only its own user can connect until the mode is set.
    let listener = UnixListener::bind(beside)?;
    let ready = || {
        if let Some(operators) = operators {
            let gid = group(operators)?;
            // In a set-group-id directory of that group it is theirs already: an installed worker belongs to no group but its own, and its unit forbids chown.
            if std::fs::metadata(beside)?.gid() != gid.as_raw() {
                nix::unistd::chown(beside, None, Some(gid)).map_err(|error| {
                    let directory = socket.parent().unwrap_or(Path::new("/")).display();
                    io::Error::other(format!(
                        "the socket can't be given to the group {operators} ({error}): give it the directory {directory}, set-group-id (mode 2750)"
                    ))
                })?;
            }
        }
        std::fs::set_permissions(beside, std::fs::Permissions::from_mode(0o660))?;
        std::fs::rename(beside, socket)
    };
    ready().inspect_err(|_| {
        let _ = std::fs::remove_file(beside);
    })?;
    Ok(listener)
}

fn group(name: &str) -> io::Result<Gid> {
    if let Ok(gid) = name.parse() {
        return Ok(Gid::from_raw(gid));
    }
    match Group::from_name(name)? {
        Some(group) => Ok(group.gid),
        None => Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no group {name}"))),
    }
}

/// Serves for ever.
pub async fn serve(listener: UnixListener, worker: Arc<Worker>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let consoles = Arc::new(console::Holders::default());
    loop {
        // Closed never.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (worker, consoles) = (Arc::clone(&worker), Arc::clone(&consoles));
                tokio::spawn(async move {
                    // What fails here is the client's connection: it knows.
                    let _ = answer(stream, &worker, &consoles).await;
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors, say: trying again at once would spin.
                tracing::warn!(%error, "a control connection can't be accepted");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// The client's two directions.
pub struct Client {
    pub read: OwnedReadHalf,
    pub write: OwnedWriteHalf,
    /// What came after the request line.
    pub rest: Vec<u8>,
    /// For people: `uid 1000`.
    pub who: String,
}

impl Client {
    pub async fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        match timeout(TAKE_WITHIN, self.write.write_all(&line)).await {
            Ok(written) => written,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    pub async fn refuse(&mut self, failure: Failure) -> io::Result<()> {
        self.reply(&Reply::Error(failure)).await
    }

    /// Until the client has gone. (It has nothing more to say after its request.)
    pub async fn gone(read: &mut OwnedReadHalf) {
        let mut byte = [0];
        while matches!(read.read(&mut byte).await, Ok(1..)) {}
    }
}

async fn answer(stream: UnixStream, worker: &Arc<Worker>, consoles: &console::Holders) -> io::Result<()> {
    let who = format!("uid {}", stream.peer_cred()?.uid());
    let (read, write) = stream.into_split();
    let mut client = Client { read, write, rest: Vec::new(), who };
    let line = match timeout(ASK_WITHIN, request_line(&mut client)).await {
        Ok(Ok(line)) => line,
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => return client.refuse(failure(FailureKind::Usage, error.to_string())).await,
        Ok(Err(error)) => return Err(error),
        Err(_) => return client.refuse(failure(FailureKind::Usage, format!("no request within {} s", ASK_WITHIN.as_secs()))).await,
    };
    let request: Request = match crate::json::parse(&line) {
        Ok(request) => request,
        Err(error) => {
            let message = format!("the worker does not understand this request ({}: {}); are both of the same release?", error.path, error.reason);
            return client.refuse(failure(FailureKind::Usage, message)).await;
        }
    };
    match dispatch(request, &mut client, worker, consoles).await? {
        Ok(()) => client.reply(&Reply::Done {}).await,
        Err(failure) => client.refuse(failure).await,
    }
}

/// A request is answered, or fails for a reason that is told; the outer error is a client that went away.
pub type Answered = io::Result<Result<(), Failure>>;

async fn dispatch(request: Request, client: &mut Client, worker: &Arc<Worker>, consoles: &console::Holders) -> Answered {
    match request {
        Request::VmList {} => {
            let vms = worker.shown().into_iter().map(view::vm).collect();
            let state = view::supervisor_state(worker);
            if state != "ready" {
                let message = format!("the supervisor can't be reached ({state}): what is shown is what was last known");
                client.reply(&Reply::Notice { message }).await?;
            }
            client.reply(&Reply::Vms(vms)).await.map(Ok)
        }
        Request::VmShow { name } => match worker.show(&name) {
            Ok(shown) => client.reply(&Reply::Vm(Box::new(view::vm(shown)))).await.map(Ok),
            Err(failure) => Ok(Err(failure)),
        },
        Request::VmStart { name, wait } => orders::carry_out(client, worker, Order::Start, &name, wait).await,
        Request::VmStop { name, wait } => orders::carry_out(client, worker, Order::Stop, &name, wait).await,
        Request::VmRestart { name, wait } => orders::carry_out(client, worker, Order::Restart, &name, wait).await,
        Request::VmKill { name, wait } => orders::carry_out(client, worker, Order::Kill, &name, wait).await,
        Request::DeviceList {} => {
            let (devices, notice) = view::devices(worker).await;
            if let Some(message) = notice {
                client.reply(&Reply::Notice { message }).await?;
            }
            client.reply(&Reply::Devices(devices)).await.map(Ok)
        }
        Request::DeviceRecover { function, wait } => match worker.vm_of_device(&function).await {
            Ok(name) => orders::carry_out(client, worker, Order::Recover, name.as_str(), wait).await,
            Err(failure) => Ok(Err(failure)),
        },
        Request::VmConsole { name } => console::proxy(client, worker, consoles, &name).await,
        Request::VmLogs { name, source, lines, follow } => follow::logs(client, worker, &name, source, lines, follow).await,
        Request::Plan {} => {
            let (steps, problems) = worker.plan().await;
            let steps = steps.into_iter().map(|step| PlanStep { name: step.name, action: step.action.as_str().into(), reasons: step.reasons }).collect();
            client.reply(&Reply::Plan(PlanView { steps, problems })).await.map(Ok)
        }
        Request::Events { last, follow } => follow::events(client, worker, last, follow).await,
        Request::Status {} => {
            let status = view::status(worker).await;
            client.reply(&Reply::Status(Box::new(status))).await.map(Ok)
        }
        Request::Rights {} => {
            let rights = view::rights(worker).await;
            client.reply(&Reply::Rights(rights)).await.map(Ok)
        }
    }
}

async fn request_line(client: &mut Client) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        let mut chunk = [0u8; 1024];
        let got = client.read.read(&mut chunk).await?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(end) = chunk[..got].iter().position(|b| *b == b'\n') {
            line.extend_from_slice(&chunk[..end]);
            client.rest = chunk[end + 1..got].to_vec();
            return Ok(line);
        }
        line.extend_from_slice(&chunk[..got]);
        if line.len() > MAX_LINE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a request line is at most {MAX_LINE} bytes")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::journal::Journal;
    use crate::logs::Logs;
    use crate::state::Store;
    use crate::supervisor::Link;
    use tokio::io::{AsyncBufReadExt, BufReader};

    /// A worker whose supervisor is not there, and its control socket.
    async fn worker(dir: &Path) -> std::path::PathBuf {
        let vms = dir.join("vms");
        std::fs::create_dir(&vms).unwrap();
        let file = r#"{"name": "a", "qemu_configuration": {"cores": 1, "mem_mb": 64}, "image": {"kernel": "/dev/null"}}"#;
        std::fs::write(vms.join("a.json"), file).unwrap();
        std::fs::write(vms.join("b.json"), "{").unwrap();
        let config = Config {
            configs_dir: vms,
            supervisor_socket: dir.join("none.sock"),
            patience: Duration::from_secs(60),
            control_socket: dir.join("worker.sock"),
            ..Config::default()
        };
        let socket = config.control_socket.clone();
        let journal = Arc::new(Journal::default());
        let (link, _) = Link::start(&config, Arc::clone(&journal));
        let (worker, _) = Worker::new(config, link, journal, Store::open(&dir.join("state")).unwrap(), Logs::open(&dir.join("logs")).unwrap());
        let _ = worker.reload().await;
        tokio::spawn(serve(listen(&socket, None).unwrap(), worker));
        socket
    }

    async fn ask(socket: &Path, line: &[u8]) -> Vec<Reply> {
        let mut stream = UnixStream::connect(socket).await.unwrap();
        let _ = stream.write_all(line).await;
        let mut replies = Vec::new();
        let mut lines = BufReader::new(stream).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            replies.push(serde_json::from_str(&line).unwrap());
        }
        replies
    }
    fn kind(replies: &[Reply]) -> Option<FailureKind> {
        match replies {
            [Reply::Error(failure)] => Some(failure.kind),
            _ => None,
        }
    }

    #[tokio::test]
    async fn only_the_owner_and_the_group_may_connect_and_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("worker.sock");
        drop(listen(&socket, None).unwrap());
        let _listener = listen(&socket, None).unwrap();
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
        UnixStream::connect(&socket).await.unwrap();
        assert!(listen(&socket, Some("no-such-group")).unwrap_err().to_string().contains("no-such-group"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn in_a_set_group_id_directory_the_socket_and_the_logs_are_the_groups() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        // Root can give the directory away, and still would not be a member; anybody else has the groups that he has.
        let ours = rustix::process::getegid().as_raw();
        let operators = if rustix::process::geteuid().is_root() { 54_321 } else { ours };
        nix::unistd::chown(dir.path(), None, Some(Gid::from_raw(operators))).unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o2750)).unwrap();
        let socket = dir.path().join("worker.sock");
        for named in [None, Some(operators.to_string())] {
            let _listener = listen(&socket, named.as_deref()).unwrap();
            let about = std::fs::metadata(&socket).unwrap();
            assert_eq!((about.gid(), about.mode() & 0o7777), (operators, 0o660), "{named:?}");
        }
        let opened = Logs::open(dir.path()).unwrap().append(&diarch_ipc::name::Label::new("a").unwrap()).unwrap();
        let about = rustix::fs::fstat(&opened.console).unwrap();
        assert_eq!((about.st_gid, about.st_mode & 0o040), (operators, 0o040));
    }

    #[tokio::test]
    async fn vms_are_shown_and_can_t_be_ordered_while_the_supervisor_is_away() {
        let dir = tempfile::tempdir().unwrap();
        let socket = worker(dir.path()).await;
        let replies = ask(&socket, b"{\"vm-list\": {}}\n").await;
        assert!(
            matches!(&replies[..], [Reply::Notice { .. }, Reply::Vms(vms), Reply::Done {}] if vms.len() == 1 && vms[0].name.as_str() == "a"),
            "{replies:?}"
        );
        let replies = ask(&socket, b"{\"vm-start\": {\"name\": \"a\", \"wait\": true}}\n").await;
        assert_eq!(kind(&replies), Some(FailureKind::Unreachable));
        let replies = ask(&socket, b"{\"vm-show\": {\"name\": \"x\\u001b[31m\"}}\n").await;
        assert!(matches!(&replies[..], [Reply::Error(f)] if f.kind == FailureKind::NotFound && f.message.contains("b.json") && !f.message.contains('\u{1b}')));
    }

    #[tokio::test]
    async fn what_is_no_request_gets_a_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let socket = worker(dir.path()).await;
        for line in ["\n", "hello\n", "{\"vm-list\": {\"more\": 1}}\n", "{\"vm-list\": {}} {}\n", "[[[[[[[\n"] {
            assert_eq!(kind(&ask(&socket, line.as_bytes()).await), Some(FailureKind::Usage), "{line}");
        }
    }

    #[tokio::test]
    async fn a_silent_client_and_an_endless_line_delay_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let socket = worker(dir.path()).await;
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS - 2 {
            silent.push(UnixStream::connect(&socket).await.unwrap());
        }
        let mut endless = UnixStream::connect(&socket).await.unwrap();
        tokio::spawn(async move { while endless.write_all(&[b'x'; 1024]).await.is_ok() {} });
        let replies = timeout(Duration::from_secs(2), ask(&socket, b"{\"vm-list\": {}}\n")).await.unwrap();
        assert_eq!(replies.len(), 3);
    }
}
