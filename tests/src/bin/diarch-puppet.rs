//! A worker without a will: runs in the worker's place, inside the worker's unit, and asks the supervisor what a test tells it to ask.
//!
//! ```text
//!   test --{"n": 7, "ask": {"vm.claim": {"label": "a"}}}--> puppet --(the worker's own client)--> supervisor
//!   test <--{"n": 7, "ok": {...}, "fds": 0, "ms": 3} or {"n": 7, "error": {...}}-- puppet
//! ```
//!
//! For a TCP port the answer says whether it was `heard` when the puppet connected to it. Requests are asked as they come, any number at one time; `{"n": .., "state": true}` answers the connection's state.
//! `diarch-puppet SOCKET DIRECTORY [FILES]`: SOCKET is the test's, DIRECTORY is where the puppet may write the logs of the VMs it starts, FILES has what they read
//! (`kernel`, `initrd`). Where SOCKET is `-`, the lines are those of standard input, all at once; the puppet prints the answers and ends.

use diarch_ipc::client::{Client, Restarter, Settings};
use diarch_ipc::name::Protocol;
use diarch_ipc::operation::{Listen, Request};
use diarch_ipc::spec::{FdAccess, FdRole};
use serde::Deserialize;
use serde_json::json;
use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

/// Long enough for a supervisor that needs all its restarts.
const CALL: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
struct Line {
    n: u64,
    ask: Option<Request>,
}

/// Whoever kills the supervisor in these tests does it under a systemd that respawns it.
struct LeftToSystemd;

impl Restarter for LeftToSystemd {
    fn restart(&mut self) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(socket), Some(directory)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: diarch-puppet SOCKET DIRECTORY [FILES]");
        std::process::exit(2);
    };
    let files = arguments.next();
    let (read, mut write): (Box<dyn AsyncBufRead + Unpin>, Box<dyn AsyncWrite + Send + Unpin>) = if socket.as_os_str() == "-" {
        let lines = std::io::read_to_string(std::io::stdin()).expect("standard input");
        let stdout = std::io::stdout().as_fd().try_clone_to_owned().expect("dup");
        (Box::new(std::io::Cursor::new(lines)), Box::new(tokio::fs::File::from_std(stdout.into())))
    } else {
        let (read, write) = UnixStream::connect(&socket).await.expect("the test listens").into_split();
        (Box::new(BufReader::new(read)), Box::new(write))
    };
    let (client, mut events) = Client::start(Settings::new(diarch_ipc::SUPERVISOR_SOCKET), Box::new(LeftToSystemd));
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let client = std::sync::Arc::new(client);
    let (answers, mut to_write) = tokio::sync::mpsc::unbounded_channel::<serde_json::Value>();
    let written = tokio::spawn(async move {
        while let Some(answer) = to_write.recv().await {
            write.write_all(format!("{answer}\n").as_bytes()).await.expect("the test reads");
            write.flush().await.expect("the test reads");
        }
    });
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    if let Some(limit) = sd_notify::watchdog_enabled() {
        tokio::spawn(async move {
            loop {
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
                tokio::time::sleep(limit / 3).await;
            }
        });
    }
    let mut lines = read.lines();
    let mut asked = JoinSet::new();
    while let Some(line) = lines.next_line().await.expect("the test writes") {
        let line: Line = serde_json::from_str(&line).expect("a line as above");
        let Some(request) = line.ask else {
            let _ = answers.send(json!({"n": line.n, "state": format!("{:?}", *client.state().borrow())}));
            continue;
        };
        let (client, answers, directory, files) = (client.clone(), answers.clone(), directory.clone(), files.clone());
        asked.spawn(async move {
            let fds = match &request {
                Request::VmSpawn(spawn) => spawn.spec.fds().iter().map(|role| open(*role, &directory, files.as_deref())).collect(),
                _ => Vec::new(),
            };
            let port = if let Request::PortListen(ask) = &request { Some(ask.clone()) } else { None };
            let asked = Instant::now();
            let answered = client.request(request, fds, CALL).await;
            let ms = u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX);
            let _ = answers.send(match answered {
                Ok((reply, fds)) => {
                    let count = fds.len();
                    let heard = port.filter(|ask| ask.protocol == Protocol::Tcp).map(|ask| fds.into_iter().any(|fd| hears(fd, &ask)));
                    json!({"n": line.n, "ok": reply, "fds": count, "ms": ms, "heard": heard})
                }
                Err(error) => json!({"n": line.n, "error": {"kind": error.kind(), "text": error.to_string()}, "ms": ms}),
            });
        });
    }
    drop(answers);
    asked.join_all().await;
    written.await.expect("what is asked is answered");
}

/// Whether who connects to the port is heard by this socket.
fn hears(socket: OwnedFd, ask: &Listen) -> bool {
    let connected = TcpStream::connect_timeout(&SocketAddr::new(ask.address.0, ask.port.get()), Duration::from_secs(5));
    connected.is_ok() && TcpListener::from(socket).accept().is_ok()
}

/// What the role asks for; the stub QEMU reads none of it. (What the worker's umask makes could not be read by QEMU's user.)
fn open(role: FdRole, directory: &Path, files: Option<&Path>) -> OwnedFd {
    if role.access == FdAccess::ReadOnly {
        let file = files.map_or_else(|| "/srv/stub/kernel".into(), |files| files.join(role.name));
        return File::open(file).expect("every test machine has it").into();
    }
    let path = directory.join(format!("puppet-{}", role.name));
    let mut options = File::options();
    match role.access {
        FdAccess::Append => options.append(true).create(true),
        FdAccess::ReadOnly | FdAccess::ReadWrite => options.read(true).write(true).create(true),
    };
    options.open(path).expect("a file").into()
}
