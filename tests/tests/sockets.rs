//! `socket.connect`: the connection is to what the grants name, or there is none.

use diarch_ipc::Error;
use diarch_ipc::frame::Outcome;
use diarch_ipc::name::SocketName;
use diarch_ipc::operation::{ConnectSocket, Reply, Request};
use diarch_tests::host::{Host, assert_same};
use diarch_tests::need;
use diarch_tests::wire::Raw;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

struct Granted {
    host: Host,
    at: tempfile::TempDir,
}

/// A host whose grants name each of these sockets, below a directory of root's.
fn granted(sockets: &[(&str, &str, &str)], prepare: impl FnOnce(&Path)) -> Granted {
    let at = tempfile::Builder::new().prefix("diarch-sockets-").tempdir().unwrap();
    fs::set_permissions(at.path(), fs::Permissions::from_mode(0o755)).unwrap();
    prepare(at.path());
    let mut lines = String::from("[limits]\nensure_per_second = 100000\nensure_burst = 100000\n");
    for (name, path, more) in sockets {
        lines += &format!("[sockets.{name}]\npath = {:?}\n{more}\n", at.path().join(path));
    }
    Granted { host: Host::builder().without_worker().grants(&lines).start(), at }
}

fn connect(raw: &mut Raw, socket: &str) -> Result<OwnedFd, Error> {
    match raw.ask(Request::SocketConnect(ConnectSocket { socket: SocketName::new(socket).unwrap() }), &[]) {
        Ok((Outcome::Ok(Reply::SocketConnect(_)), mut fds)) => {
            assert_eq!(fds.len(), 1);
            Ok(fds.remove(0))
        }
        Ok((Outcome::Error(error), fds)) => {
            assert!(fds.is_empty());
            Err(error)
        }
        other => panic!("socket.connect: {other:?}"),
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_granted_socket_that_is_open_to_root_alone_is_connected_to() {
    need!(Root, Kernel(6, 5));
    let granted = granted(&[("downloader", "private/service.sock", "")], |at| {
        fs::create_dir(at.join("private")).unwrap();
        mode(&at.join("private"), 0o700);
    });
    let path = granted.at.path().join("private/service.sock");
    let service = UnixListener::bind(&path).unwrap();
    mode(&path, 0o600);
    let before = granted.host.inventory();
    let mut raw = granted.host.raw();
    let connection = connect(&mut raw, "downloader").unwrap();
    let flags = rustix::io::fcntl_getfd(&connection).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    let (mut theirs, _) = service.accept().unwrap();
    assert_eq!(sockopt::socket_peercred(&theirs).unwrap().uid.as_raw(), 0, "the service sees root: that is what was granted");
    let mut ours = UnixStream::from(connection);
    ours.write_all(b"get").unwrap();
    let mut got = [0; 3];
    theirs.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"get");
    drop((ours, theirs, raw));
    assert_same(&before, &granted.host);
}

#[test]
fn a_socket_of_the_other_type_is_connected_to_when_the_grants_say_so() {
    need!(Root, Kernel(6, 5));
    let granted = granted(&[("right", "service.sock", "type = \"seqpacket\""), ("wrong", "service.sock", "")], |_| {});
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(granted.at.path().join("service.sock")).unwrap()).unwrap();
    listen(&socket, 8).unwrap();
    let mut raw = granted.host.raw();
    connect(&mut raw, "right").unwrap();
    let error = connect(&mut raw, "wrong").unwrap_err();
    assert!(error.to_string().contains("it is of another type than sockets.wrong says; set type"), "{error}");
}

#[test]
fn what_can_not_be_connected_to_gets_its_sentence_and_leaves_nothing() {
    need!(Root, Kernel(6, 5));
    let sockets = [
        ("missing", "missing.sock", ""),
        ("refused", "dead.sock", ""),
        ("file", "file", ""),
        ("linked", "link.sock", ""),
        ("theirs", "theirs.sock", ""),
        ("owned", "theirs.sock", "owner = 64001"),
        ("closed", "closed.sock", "owner = 64001"),
        ("below", "theirs/service.sock", ""),
        ("inside", "theirs/service.sock", "owner = 64001"),
        ("open", "open/service.sock", ""),
        ("way", "way/service.sock", ""),
    ];
    let granted = granted(&sockets, |at| {
        drop(UnixListener::bind(at.join("dead.sock")).unwrap());
        fs::write(at.join("file"), "").unwrap();
        for name in ["theirs", "open"] {
            fs::create_dir(at.join(name)).unwrap();
        }
        symlink("theirs.sock", at.join("link.sock")).unwrap();
        symlink("theirs", at.join("way")).unwrap();
    });
    let at = granted.at.path();
    let listeners = ["theirs.sock", "closed.sock", "theirs/service.sock", "open/service.sock"].map(|name| UnixListener::bind(at.join(name)).unwrap());
    for (name, bits) in [("theirs.sock", 0o666), ("closed.sock", 0o600), ("theirs", 0o755), ("theirs/service.sock", 0o666)] {
        mode(&at.join(name), bits);
        chown(at.join(name), Some(64_001), None).unwrap();
    }
    mode(&at.join("open"), 0o777);
    let mut raw = granted.host.raw();
    let before = granted.host.inventory();
    for (socket, kind, says) in [
        ("missing", "not-found", "there is no such file or directory (sockets.missing in the grants)"),
        ("refused", "failed", "nobody listens there; start the service"),
        ("file", "denied", "is not a socket"),
        ("linked", "denied", "is a symbolic link; name it by its real path"),
        ("theirs", "denied", "belongs to uid 64001; chown root, or grant it as owner"),
        ("closed", "failed", "its mode is closed to root, which has no power over modes here"),
        ("below", "denied", "belongs to uid 64001, who could put something else in its place"),
        ("open", "denied", "can be written by others (mode 0777)"),
        ("way", "denied", "is a symbolic link"),
        ("nowhere", "denied", "there is no such section; there are: below, closed,"),
    ] {
        let error = connect(&mut raw, socket).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(says), "{socket}: {error}");
    }
    for socket in ["owned", "inside"] {
        connect(&mut raw, socket).unwrap();
    }
    drop(listeners);
    assert_same(&before, &granted.host);
}

#[test]
fn a_service_that_does_not_accept_is_waited_for_a_moment_and_holds_nobody_up() {
    need!(Root, Kernel(6, 5));
    let granted = granted(&[("slow", "slow.sock", "")], |_| {});
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(granted.at.path().join("slow.sock")).unwrap()).unwrap();
    listen(&socket, 0).unwrap();
    let mut raw = granted.host.raw();
    // Linux takes one more than the backlog says.
    let first = connect(&mut raw, "slow").unwrap();
    let started = Instant::now();
    let id = raw.next_id();
    let call = diarch_ipc::frame::Call { id, deadline_ms: 5000, request: Request::SocketConnect(ConnectSocket { socket: SocketName::new("slow").unwrap() }) };
    raw.send_frame(&diarch_ipc::frame::ClientFrame::Call(call), &[]).unwrap();
    // Meanwhile others are served, on the same session.
    let asked = Instant::now();
    assert!(matches!(raw.ask(Request::HostInventory(diarch_ipc::operation::Inventory { after: None }), &[]), Ok((Outcome::Ok(_), _))));
    assert!(asked.elapsed() < Duration::from_millis(500));
    let Ok((Outcome::Error(error), _)) = raw.answer(id, Duration::from_secs(5)) else { panic!("it was connected") };
    assert!(error.to_string().contains("its queue is full; look after the service"), "{error}");
    assert!((1.0..2.0).contains(&started.elapsed().as_secs_f64()), "{:?}", started.elapsed());
    // With room again, it goes on; also for one who waits already.
    let waits = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            rustix::net::accept(&socket).unwrap()
        });
        connect(&mut raw, "slow")
    });
    waits.unwrap();
    drop(first);
}

/// Ends the swapper, also when the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The directory on the way, and then the socket itself, are somebody else's half of the time: each connection is to the right service, or there is none.
#[test]
fn a_swapper_never_leads_a_connection_astray() {
    need!(Root, Kernel(6, 5));
    for (swapped, with) in [("way", "turn"), ("way/service.sock", "way/other.sock")] {
        let granted = granted(&[("service", "way/service.sock", "")], |at| {
            fs::create_dir(at.join("way")).unwrap();
            fs::create_dir(at.join("decoy")).unwrap();
            symlink("decoy", at.join("turn")).unwrap();
            symlink("../decoy/service.sock", at.join("way/other.sock")).unwrap();
        });
        let at = granted.at.path();
        let right = UnixListener::bind(at.join("way/service.sock")).unwrap();
        let decoy = UnixListener::bind(at.join("decoy/service.sock")).unwrap();
        for listener in [&right, &decoy] {
            listener.set_nonblocking(true).unwrap();
        }
        let mut raw = granted.host.raw();
        let before = granted.host.inventory();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let (one, other) = (at.join(swapped), at.join(with));
                    rustix::fs::renameat_with(rustix::fs::CWD, &one, rustix::fs::CWD, &other, rustix::fs::RenameFlags::EXCHANGE).unwrap();
                }
            });
            let _ends = Ends(&stop);
            let (mut connected, mut refused) = (0, 0);
            for _ in 0..2000 {
                match connect(&mut raw, "service") {
                    Ok(connection) => {
                        right.accept().unwrap_or_else(|error| panic!("led astray ({error}), fd {}", connection.as_raw_fd()));
                        connected += 1;
                    }
                    Err(error) => {
                        assert!(error.to_string().contains("is a symbolic link"), "{error}");
                        refused += 1;
                    }
                }
            }
            assert!(connected > 100 && refused > 100, "the swapper did not swap: {connected} connected, {refused} refused");
            assert!(decoy.accept().is_err(), "somebody came to the decoy");
        });
        assert_same(&before, &granted.host);
    }
}
