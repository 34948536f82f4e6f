//! `socket.connect`: a connection to a granted socket.
//!
//! The path is walked to the socket itself, which is held by a descriptor; the connection is made to what is held (`/proc/self/fd/N`), so that
//! nothing can be swapped between the look and the use. The service sees root connect: that is what the grant gives.

use crate::grants::{self, SocketKind};
use crate::path;
use crate::state::Supervisor;
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::operation::{ConnectSocket, Operation, SocketConnected};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect as connect_to, socket_with};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A service that is behind with accepting is asked again so often.
const AGAIN: Duration = Duration::from_millis(10);
/// Of the operation's time, what is left for the answer.
const MARGIN: Duration = Duration::from_millis(500);

/// A socket, as the grants have it.
#[derive(Debug, Clone)]
struct Target {
    grant: String,
    socket: grants::Socket,
    owners: Vec<u32>,
}

pub async fn connect(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &ConnectSocket) -> Result<(SocketConnected, Vec<Rc<OwnedFd>>), Error> {
    let target = Arc::new(vet(&supervisor.grants.sockets, supervisor.host.owner(), ask)?);
    // Nothing to record: a connection leaves nothing behind.
    let patience = Duration::from_millis(row.deadline_ms.into());
    let until = Instant::now() + patience.saturating_sub(MARGIN);
    loop {
        let place = supervisor.helpers.place(row.effect, patience).await?;
        let target = Arc::clone(&target);
        let work = supervisor.helpers.run_in(place, "connect", move || reach(&target));
        let timeout = |_| Error::Timeout { step: row.name.into(), after_ms: row.deadline_ms.into() };
        match tokio::time::timeout(patience, work).await.map_err(timeout)?? {
            // Nobody's thread is held meanwhile.
            Err(Error::Failed { errno: Some(nix::libc::EAGAIN), .. }) if Instant::now() + AGAIN < until => tokio::time::sleep(AGAIN).await,
            connected => return Ok((SocketConnected {}, vec![Rc::new(connected?)])),
        }
    }
}

fn vet(sockets: &BTreeMap<String, grants::Socket>, owner: u32, ask: &ConnectSocket) -> Result<Vetted<Target>, Error> {
    let grant = format!("sockets.{}", ask.socket);
    let Some(socket) = sockets.get(ask.socket.as_str()).cloned() else {
        let known: Vec<&str> = sockets.keys().map(String::as_str).collect();
        let there = if known.is_empty() { "none".into() } else { known.join(", ") };
        return Err(Error::denied(grant, format!("there is no such section; there are: {there}")));
    };
    let owners = socket.owner.into_iter().chain([owner]).collect();
    Ok(Vetted::by_vet(Target { grant, socket, owners }))
}

fn reach(target: &Vetted<Target>) -> Result<OwnedFd, Error> {
    let Target { grant, socket, owners } = &**target;
    let path = socket.path.display();
    let found = path::walk(&socket.path, owners).map_err(|stray| stray.under(grant))?;
    if found.kind != FileType::Socket {
        return Err(Error::denied(grant, format!("{path} is not a socket")));
    }
    if found.uid != 0 && !owners.contains(&found.uid) {
        return Err(Error::denied(grant, format!("{path} belongs to uid {}; chown root, or grant it as owner", found.uid)));
    }
    let kind = match socket.kind {
        SocketKind::Stream => SocketType::STREAM,
        SocketKind::Seqpacket => SocketType::SEQPACKET,
    };
    let failed = |errno: Errno, detail: String| Error::Failed { step: format!("connect to {grant}"), errno: Some(errno.raw_os_error()), detail };
    let address = SocketAddrUnix::new(path::of(&found.fd)).map_err(|errno| failed(errno, errno.to_string()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let connection = socket_with(AddressFamily::UNIX, kind, flags, None).map_err(|errno| failed(errno, errno.to_string()))?;
    loop {
        match connect_to(&connection, &address) {
            Ok(()) => return Ok(connection),
            Err(Errno::INTR) => {}
            // Its queue is full. A connection to a UNIX socket is never under way: it is made, or it is not.
            Err(Errno::AGAIN) => {
                return Err(failed(Errno::AGAIN, format!("{path}: the service does not accept connections, and its queue is full; look after the service")));
            }
            Err(Errno::CONNREFUSED) => return Err(failed(Errno::CONNREFUSED, format!("{path}: nobody listens there; start the service"))),
            Err(Errno::PROTOTYPE) => return Err(failed(Errno::PROTOTYPE, format!("{path}: it is of another type than {grant} says; set type"))),
            Err(Errno::ACCESS) => {
                return Err(failed(
                    Errno::ACCESS,
                    format!("{path}: its mode is closed to root, which has no power over modes here; open it to its group or owner root"),
                ));
            }
            Err(errno) => return Err(failed(errno, format!("{path}: {}", std::io::Error::from(errno)))),
        }
    }
}
