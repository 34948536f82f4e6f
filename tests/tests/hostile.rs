//! A peer that is no worker, or no honest one: every frame that is wrong in its shape, every descriptor that is not what it should be,
//! every user who should not be there. In each test an honest client is served afterwards, and the supervisor holds what it held before.

use diarch_ipc::Error;
use diarch_ipc::frame::{Call, ClientFrame, Hello, MAX_FDS, Outcome, ServerFrame};
use diarch_ipc::name::{Bdf, CommandLine, Label, Mac, QemuName, Queues, RequestId, ShareName, Slot, Tag, Tenancy};
use diarch_ipc::operation::{Claim, Effect, Inventory, Release, Reply, Request, Signal, SignalKind, SlotState, Spawn};
use diarch_ipc::spec::{Backend, Boot, Disk, DiskAccess, DiskFormat, FdAccess, FdRole, Nic, Presence, Share, VmSpec};
use diarch_tests::host::{Builder, Host, STRANGER, WORKER, assert_same, descriptors, rss_kib};
use diarch_tests::need;
use diarch_tests::stage::{self, Shape, Stage};
use diarch_tests::stand_in::{Ask, Unit, UnitState};
use diarch_tests::wire::{Raw, Received, User, as_user, connect, encoded, hostile_frames, hostile_texts};
use rustix::fs::{Mode, OFlags, open};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(3);

fn inventory() -> Request {
    Request::HostInventory(Inventory { after: None })
}

/// What an honest worker sees; and how long it took, handshake included.
fn honest(host: &Host) -> Duration {
    let started = Instant::now();
    let mut raw = host.raw();
    match raw.ask(inventory(), &[]) {
        Ok((Outcome::Ok(Reply::HostInventory(_)), _)) => started.elapsed(),
        other => panic!("an honest client got {other:?}"),
    }
}

fn borrowed(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

/// The connection ends; a refusal may come before, and nothing else.
fn closed(raw: &Raw, what: &str) {
    match raw.wait_closed(SOON) {
        Ok(frames) => {
            let only_refusals = frames.iter().all(|f| matches!(f, ServerFrame::Refused(_)));
            assert!(only_refusals, "{what}: before the end came {frames:?}");
        }
        Err(why) => panic!("{what}: {why}"),
    }
}

// ---- frames ----

#[test]
fn every_malformed_frame_ends_its_connection_and_nothing_else() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    honest(&host);
    let before = host.inventory();
    let pid = host.supervisor_pid();
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    for (at, hostile) in hostile_frames().into_iter().enumerate() {
        let raw = host.raw();
        // Every third one brings descriptors along, which must not stay either.
        let fds: Vec<BorrowedFd<'_>> = if at % 3 == 0 { vec![null.as_fd(); 1 + at % 4] } else { Vec::new() };
        // A frame over the socket's limit is refused by the kernel already.
        if raw.send(&hostile.bytes, &fds).is_ok() {
            closed(&raw, &hostile.what);
        }
    }
    assert_eq!(host.supervisor_pid(), pid, "it must not have died");
    honest(&host);
    assert_same(&before, &host);
}

#[test]
fn malformed_frames_before_the_hello_end_their_connection() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let before = host.inventory();
    for hostile in hostile_frames().into_iter().step_by(11) {
        let raw = Raw::connect_as(&host.socket(), WORKER).unwrap();
        if raw.send(&hostile.bytes, &[]).is_ok() {
            closed(&raw, &hostile.what);
        }
    }
    // A good call, but nobody said Hello.
    let raw = Raw::connect_as(&host.socket(), WORKER).unwrap();
    let call = Call { id: RequestId { session: 1, serial: 1 }, deadline_ms: 1000, request: inventory() };
    raw.send_frame(&ClientFrame::Call(call), &[]).unwrap();
    closed(&raw, "a call before the Hello");
    // Hello twice.
    let raw = host.raw();
    raw.send_frame(&ClientFrame::Hello(Hello::ours()), &[]).unwrap();
    closed(&raw, "a second Hello");
    honest(&host);
    assert_same(&before, &host);
}

#[test]
fn no_hostile_text_in_any_field_of_any_operation_reaches_more_than_the_decoder() {
    need!(Root, Kernel(6, 5));
    let host = apart(Host::builder()).start();
    honest(&host);
    let before = host.inventory();
    let pid = host.supervisor_pid();
    for hostile in hostile_texts() {
        let raw = host.raw();
        // Also where the field takes any printable text (`an_argument_can_not_open_a_second_option`): there the descriptors are missing.
        raw.send(&hostile.bytes, &[]).unwrap();
        closed(&raw, &hostile.what);
    }
    assert_eq!(host.supervisor_pid(), pid, "it must not have died");
    let loud = host.log("supervisor.log").bytes().find(|byte| *byte < 0x20 && *byte != b'\n');
    assert_eq!(loud, None, "a control byte of the peer's is in the log");
    honest(&host);
    assert_same(&before, &host);
}

#[test]
fn ten_thousand_hostile_frames_cost_no_descriptor_and_no_memory() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    honest(&host);
    let frames = hostile_frames();
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let send = |count: usize| {
        for hostile in frames.iter().cycle().step_by(7).take(count) {
            let raw = Raw::new(connect(&host.socket()).unwrap());
            if !matches!(raw.hello(), Received::Frame(..)) {
                panic!("no Hello");
            }
            let fds = [null.as_fd(), null.as_fd(), null.as_fd()];
            if raw.send(&hostile.bytes, &fds).is_ok() {
                closed(&raw, &hostile.what);
            }
        }
    };
    as_user(WORKER, || send(500));
    let before = host.inventory();
    let (pid, rss) = (host.supervisor_pid(), rss_kib(host.supervisor_pid()));
    as_user(WORKER, || send(10_000));
    assert_eq!(host.supervisor_pid(), pid);
    let grown = rss_kib(pid).saturating_sub(rss);
    assert!(grown < 1024, "it grew by {grown} KiB (from {rss} KiB)");
    honest(&host);
    assert_same(&before, &host);
}

#[test]
fn a_wrong_number_of_descriptors_ends_the_connection() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let before = host.inventory();
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    for request in Request::examples() {
        let right = request.fds_in().len();
        for count in [0, 1, right.wrapping_sub(1), right + 1, MAX_FDS, MAX_FDS + 1, 60] {
            if count == right || count > 60 {
                continue;
            }
            let raw = host.raw();
            let call = Call { id: RequestId { session: 1, serial: 1 }, deadline_ms: 1000, request: request.clone() };
            raw.send_frame(&ClientFrame::Call(call), &vec![null.as_fd(); count]).unwrap();
            closed(&raw, &format!("{} with {count} descriptors in place of {right}", request.operation().name));
        }
    }
    honest(&host);
    assert_same(&before, &host);
}

/// A TCP socket with more to say than its peer reads: its last close waits for 8 s.
fn lingering() -> (std::net::TcpListener, OwnedFd) {
    use std::io::Write;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[0; 65536]).is_ok() {}
    stream.set_nonblocking(false).unwrap();
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::from_secs(8))).unwrap();
    (listener, stream.into())
}

#[test]
fn a_descriptor_whose_close_takes_its_time_holds_nobody_up() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let before = host.inventory();
    let mut listeners = Vec::new();
    let mut lingering = || {
        let (listener, socket) = lingering();
        listeners.push(listener);
        socket
    };
    // In a frame that is none, with too many, in a request that is refused, in the place of a disk, and unread in a connection of somebody who is refused.
    let raw = host.raw();
    raw.send(b"no frame", &[lingering().as_fd()]).unwrap();
    closed(&raw, "no frame");
    assert!(honest(&host) < SOON, "a frame that is none");
    let mut raw = host.raw();
    let id = raw.next_id();
    raw.send_frame(&ClientFrame::Call(Call { id, deadline_ms: 1000, request: inventory() }), &[lingering().as_fd()]).unwrap();
    closed(&raw, "an inventory with a descriptor");
    assert!(honest(&host) < SOON, "a request without descriptors");
    let mut raw = host.raw();
    let (spec, good) = host.spec("");
    let Ok((Outcome::Ok(Reply::VmClaim(claimed)), _)) = raw.ask(Request::VmClaim(Claim { label: Label::new("a").unwrap() }), &[]) else { panic!("claim") };
    for tenancy in [claimed.tenancy, Tenancy { slot: Slot::new(1).unwrap(), ..claimed.tenancy }] {
        let socket = lingering();
        let mut fds = borrowed(&good);
        fds[2] = socket.as_fd();
        let id = raw.next_id();
        let request = Request::VmSpawn(Spawn { tenancy, spec: spec.clone() });
        raw.send_frame(&ClientFrame::Call(Call { id, deadline_ms: 5000, request }), &fds).unwrap();
        // Ours goes before it is looked at: so the last one is the supervisor's.
        drop(socket);
        assert!(matches!(raw.answer(id, SOON), Ok((Outcome::Error(_), _))), "refused, and soon");
        assert!(honest(&host) < SOON, "the place of a kernel");
    }
    let stranger = Raw::connect_as(&host.socket(), User { uid: STRANGER.uid, gid: WORKER.gid }).unwrap();
    let _ = stranger.send(b"unread", &[lingering().as_fd()]);
    drop(stranger);
    assert!(honest(&host) < SOON, "a connection that is refused");
    // They end, whoever reads or does not.
    let session = host.session();
    session.release(claimed.tenancy);
    drop(session);
    assert_same(&before, &host);
}

#[test]
fn a_descriptor_of_the_wrong_kind_is_refused_and_starts_nothing() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let mut raw = host.raw();
    let Ok((Outcome::Ok(Reply::VmClaim(claimed)), _)) = raw.ask(Request::VmClaim(Claim { label: Label::new("a").unwrap() }), &[]) else { panic!("claim") };
    let before = host.inventory();
    let (spec, good) = host.spec("");
    let file = host.path("files/kernel");
    let at = |flags: OFlags| open(&file, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let (socket, _other) = diarch_ipc::channel::pair().unwrap();
    let directory = open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let bad: Vec<(&str, OwnedFd)> = vec![
        ("an O_PATH descriptor", at(OFlags::PATH)),
        ("a directory", directory),
        ("the reading end of a pipe", reader),
        ("the writing end of a pipe", writer),
        ("a socket", socket),
        ("a device node", null),
        ("a file that can't be read", at(OFlags::WRONLY)),
    ];
    // log, console, kernel: each of them replaced by each of these.
    for (what, wrong) in &bad {
        for place in 0..good.len() {
            let mut fds = borrowed(&good);
            fds[place] = wrong.as_fd();
            // Some may be right in some places: what is written to may not be readable.
            let request = Request::VmSpawn(Spawn { tenancy: claimed.tenancy, spec: spec.clone() });
            match raw.ask(request, &fds) {
                Ok((Outcome::Error(Error::Invalid { field, reason }), _)) => assert!(!field.is_empty() && !reason.is_empty()),
                Ok((Outcome::Error(other), _)) => panic!("{what} as fd {place}: {other:?}"),
                Ok((Outcome::Ok(_), _)) => panic!("{what} as fd {place} was accepted"),
                Err(_) => raw = host.raw(),
            }
        }
    }
    // A log that would overwrite itself, a kernel that could be written.
    for (what, place, wrong) in [("a log without O_APPEND", 0, at(OFlags::WRONLY)), ("a kernel open for writing", 2, at(OFlags::RDWR))] {
        let mut fds = borrowed(&good);
        fds[place] = wrong.as_fd();
        match raw.ask(Request::VmSpawn(Spawn { tenancy: claimed.tenancy, spec: spec.clone() }), &fds) {
            Ok((Outcome::Error(Error::Invalid { .. }), _)) => {}
            Ok(other) => panic!("{what}: {other:?}"),
            Err(_) => raw = host.raw(),
        }
    }
    assert!(host.qemus().is_empty());
    assert_same(&before, &host);
    let (good_again, _) = raw.ask(Request::VmSpawn(Spawn { tenancy: claimed.tenancy, spec }), &borrowed(&good)).unwrap();
    assert!(matches!(good_again, Outcome::Ok(_)), "{good_again:?}");
}

// ---- who is there ----

#[test]
fn a_peer_with_another_uid_is_refused_also_with_the_workers_group() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let before = host.inventory();
    let others = [
        User { uid: STRANGER.uid, gid: WORKER.gid },
        // Root is not the worker either.
        User { uid: 0, gid: 0 },
        // A VM's own user, that of an escaped QEMU.
        User { uid: host.uid_first, gid: WORKER.gid },
        User { uid: 65_534, gid: WORKER.gid },
    ];
    for user in others {
        let raw = Raw::connect_as(&host.socket(), user).unwrap();
        match raw.hello() {
            Received::Frame(frame, _) => {
                let ServerFrame::Refused(error) = *frame else { panic!("uid {}: {frame:?}", user.uid) };
                assert!(matches!(&error, Error::Denied { grant, .. } if grant == "worker.user"), "{error:?}");
                closed(&raw, "a refused peer");
            }
            Received::Closed => {}
            Received::Silence => panic!("uid {}: neither refused nor closed", user.uid),
        }
        // What it sends nevertheless is not served.
        let call = Call { id: RequestId { session: 1, serial: 1 }, deadline_ms: 1000, request: Request::VmClaim(Claim { label: Label::new("x").unwrap() }) };
        let _ = raw.send_frame(&ClientFrame::Call(call), &[]);
    }
    assert!(host.ledger().is_empty());
    honest(&host);
    assert_same(&before, &host);
}

#[test]
fn a_client_that_is_refused_hears_why_and_does_not_restart_the_supervisor() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let starts = host.manager().unit(Unit::Supervisor).starts;
    for _ in 0..30 {
        let mut settings = diarch_ipc::client::Settings::new(host.socket());
        settings.restarts = [100, 200, 400].map(Duration::from_millis).to_vec();
        let stranger = host.session_as(User { uid: STRANGER.uid, gid: WORKER.gid }, settings);
        let error = stranger.ask(inventory(), Vec::new()).unwrap_err();
        assert!(error.to_string().contains("worker.user"), "{error}");
    }
    assert_eq!(host.manager().unit(Unit::Supervisor).starts, starts);
}

#[test]
fn the_right_user_outside_the_granted_unit_is_refused() {
    need!(Root, Kernel(6, 5));
    let mut builder = Host::builder().without_worker();
    builder.unit = Some("diarch-worker.service".into());
    let host = builder.start();
    let raw = Raw::connect_as(&host.socket(), WORKER).unwrap();
    match raw.hello() {
        Received::Frame(frame, _) => {
            let ServerFrame::Refused(Error::Denied { grant, reason }) = *frame else { panic!("{frame:?}") };
            assert_eq!(grant, "worker.unit", "{reason}");
        }
        other => panic!("{other:?}"),
    }
    closed(&raw, "a peer in another unit");
}

#[test]
fn a_peer_that_is_dead_when_it_is_accepted_leaves_nothing() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    honest(&host);
    let before = host.inventory();
    host.manager().ask(&Ask::Kill(Unit::Supervisor, nix::libc::SIGSTOP)).unwrap();
    // A process connects, says Hello, asks, and has ended before anybody looks.
    let socket = host.socket();
    for _ in 0..20 {
        let hello = encoded(&ClientFrame::Hello(Hello::ours()));
        let request = Request::HostInventory(Inventory { after: None });
        let call = encoded(&ClientFrame::Call(Call { id: RequestId { session: 1, serial: 1 }, deadline_ms: 1000, request }));
        let address = rustix::net::SocketAddrUnix::new(&socket).unwrap();
        // SAFETY: the child makes system calls on memory that was prepared before the fork, and ends.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socket_with};
                let _ = rustix::thread::set_thread_res_gid(None, rustix::process::Gid::from_raw(WORKER.gid), None);
                let _ = rustix::thread::set_thread_res_uid(None, rustix::process::Uid::from_raw(WORKER.uid), None);
                if let Ok(socket) = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None) {
                    let _ = rustix::net::connect(&socket, &address);
                    let _ = send(&socket, &hello, SendFlags::NOSIGNAL);
                    let _ = send(&socket, &call, SendFlags::NOSIGNAL);
                }
                // SAFETY: ends the child without the test harness's exit handlers.
                unsafe { nix::libc::_exit(0) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                nix::sys::wait::waitpid(child, None).unwrap();
            }
        }
    }
    host.manager().ask(&Ask::Kill(Unit::Supervisor, nix::libc::SIGCONT)).unwrap();
    honest(&host);
    assert_same(&before, &host);
}

#[test]
fn a_hundred_silent_connections_do_not_delay_an_honest_one() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let calm = honest(&host);
    let before = host.inventory();
    let silent: Vec<OwnedFd> = as_user(WORKER, || (0..100).filter_map(|_| connect(&host.socket()).ok()).collect());
    assert!(silent.len() > 50, "only {} connected", silent.len());
    let started = Instant::now();
    // It may be told to come again while every place is taken; it must get through nevertheless, and soon.
    let served = loop {
        let raw = Raw::connect_as(&host.socket(), WORKER).unwrap();
        match raw.hello() {
            Received::Frame(frame, _) if matches!(*frame, ServerFrame::Hello(_)) => break started.elapsed(),
            _ => assert!(started.elapsed() < Duration::from_secs(5), "not served within 5 s"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    eprintln!("an honest client was served in {calm:?} alone and in {served:?} beside 100 silent ones");
    assert!(served < Duration::from_secs(1), "{served:?}");
    drop(silent);
    honest(&host);
    assert_same(&before, &host);
}

#[test]
fn when_descriptors_run_out_the_silent_make_room_for_the_honest() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    honest(&host);
    let before = host.inventory();
    let pid = rustix::process::Pid::from_raw(host.supervisor_pid()).unwrap();
    let all = rustix::process::prlimit(Some(pid), rustix::process::Resource::Nofile, rustix::process::Rlimit { current: Some(32), maximum: Some(32) });
    all.unwrap();
    // Fewer than the limit on connections, and more than there are descriptors.
    let silent: Vec<OwnedFd> = as_user(WORKER, || (0..60).filter_map(|_| connect(&host.socket()).ok()).collect());
    assert!(silent.len() >= 32, "only {} connected", silent.len());
    let served = honest(&host);
    eprintln!("an honest client was served in {served:?} with every descriptor taken");
    assert!(served < Duration::from_secs(2), "{served:?}");
    assert!(host.log("supervisor.log").contains("accept failed"), "the table was never full: the test shows nothing");
    drop(silent);
    honest(&host);
    assert_same(&before, &host);
}

#[test]
fn a_peer_that_never_reads_is_dropped_and_holds_nobody_up() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    honest(&host);
    let before = host.inventory();
    let raw = host.raw();
    rustix::io::ioctl_fionbio(&raw, true).unwrap();
    // Far more questions than its socket's buffer holds answers.
    let mut sent = 0;
    for serial in 0..20_000 {
        let call = Call { id: RequestId { session: 1, serial }, deadline_ms: 1000, request: inventory() };
        match raw.send_frame(&ClientFrame::Call(call), &[]) {
            Ok(()) => sent += 1,
            Err(_) => break,
        }
    }
    assert!(sent > 10);
    let served = honest(&host);
    assert!(served < Duration::from_secs(1), "{served:?}");
    drop(raw);
    honest(&host);
    assert_same(&before, &host);
}

#[test]
fn a_worker_that_loops_is_told_to_slow_down_and_can_still_release() {
    need!(Root, Kernel(6, 5));
    let limits = "[limits]\nread_per_second = 5\nread_burst = 10\nonce_per_second = 1\nonce_burst = 3\nensure_per_second = 5\nensure_burst = 10\n";
    let host = Host::builder().without_worker().grants(limits).start();
    let mut raw = host.raw();
    let mut exhausted = 0;
    for _ in 0..50 {
        match raw.ask(inventory(), &[]).unwrap().0 {
            Outcome::Error(Error::Exhausted { retry_after_ms, .. }) => {
                assert!(retry_after_ms.is_some_and(|ms| ms > 0 && ms <= 1000), "{retry_after_ms:?}");
                exhausted += 1;
            }
            Outcome::Ok(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!((30..=45).contains(&exhausted), "{exhausted} of 50");
    // Another class has its own bucket.
    let release = Request::VmRelease(Release { tenancy: Tenancy { slot: Slot::new(0).unwrap(), claim: RequestId { session: 1, serial: 1 } } });
    assert!(matches!(raw.ask(release, &[]).unwrap().0, Outcome::Ok(_)));
}

#[test]
fn a_table_of_another_release_gets_a_sentence() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    for other in [
        Hello { table: "00".repeat(32), version: "9.9.9".into(), ..Hello::ours() },
        Hello { protocol: 99, ..Hello::ours() },
        Hello { version: "x".repeat(10_000), table: "\n\u{1b}[2J".into(), ..Hello::ours() },
    ] {
        let raw = Raw::connect_as(&host.socket(), WORKER).unwrap();
        raw.send_frame(&ClientFrame::Hello(other), &[]).unwrap();
        let frames = raw.wait_closed(SOON).unwrap();
        let Some(ServerFrame::Refused(error)) = frames.last() else { panic!("{frames:?}") };
        assert!(error.to_string().contains("restart both from the same release"), "{error}");
    }
    let log = host.log("supervisor.log");
    assert!(!log.contains('\u{1b}'), "an escape byte of the peer's is in the log");
    honest(&host);
}

// ---- requests made from the table: a new operation gets them from its example ----

/// In a network and a mount namespace of its own, without this machine's PCI bus: what is asked for here must be refused, and a supervisor that does not
/// refuse it shall do no harm.
fn apart(mut builder: Builder) -> Builder {
    let script = "mount -t tmpfs none /sys/bus && exec \"$0\" \"$@\"";
    builder.prelude = Some(format!("exec unshare --net --mount --propagation private /bin/sh -c '{script}' \"$0\" \"$@\""));
    builder.without_worker()
}

/// Everything that the examples ask for by name is there, as far as root's word goes.
const EXAMPLES: &str = "[devices]\nallow = [\"0000:65:00.0\"]\n[network.lan]\nrouted = \"10.77.0.0/20\"\n\
    [ports]\npublish = [\"192.0.2.1:1024-65535\"]\nlisten = [\"10.77.0.1:443\"]\n\
    [mounts.models]\ntmpfs_mib = 1\n[sockets.downloader]\npath = \"/run/downloader.sock\"\n";

/// The same request of another VM.
fn of(request: &Request, tenancy: Tenancy) -> Option<Request> {
    request.tenancy()?;
    let mut value = serde_json::to_value(request).unwrap();
    value[request.operation().name]["tenancy"] = serde_json::to_value(tenancy).unwrap();
    Some(serde_json::from_value(value).unwrap())
}

/// A right descriptor for each place that the request has.
fn descriptors_for(host: &Host, request: &Request) -> Vec<OwnedFd> {
    let right = |role: &FdRole| -> OwnedFd {
        let path = host.path("files").join(format!("right-{}", role.name));
        let mut options = std::fs::File::options();
        match role.access {
            FdAccess::Append => options.append(true).create(true),
            FdAccess::ReadOnly => return std::fs::File::open(host.path("files/kernel")).unwrap().into(),
            FdAccess::ReadWrite => options.read(true).write(true).create(true),
        };
        options.open(path).unwrap().into()
    };
    request.fds_in().iter().map(right).collect()
}

fn ask(host: &Host, raw: &mut Raw, request: &Request) -> Outcome {
    let fds = descriptors_for(host, request);
    match raw.ask(request.clone(), &borrowed(&fds)) {
        Ok((outcome, _)) => outcome,
        Err(why) => panic!("{}: {why}", request.operation().name),
    }
}

fn claimed(raw: &mut Raw, label: &str) -> Tenancy {
    match raw.ask(Request::VmClaim(Claim { label: Label::new(label).unwrap() }), &[]) {
        Ok((Outcome::Ok(Reply::VmClaim(claimed)), _)) => claimed.tenancy,
        other => panic!("{other:?}"),
    }
}

/// Brings a claimed slot into this state.
fn bring(host: &Host, raw: &mut Raw, tenancy: Tenancy, state: SlotState) {
    if matches!(state, SlotState::Running | SlotState::Exited) && state_of(raw, tenancy) != Some(SlotState::Running) {
        let (spec, fds) = host.spec("");
        let (spawned, _) = raw.ask(Request::VmSpawn(Spawn { tenancy, spec }), &borrowed(&fds)).unwrap();
        assert!(matches!(spawned, Outcome::Ok(_)), "{spawned:?}");
    }
    if state == SlotState::Exited {
        raw.ask(Request::VmSignal(Signal { tenancy, signal: SignalKind::Kill }), &[]).unwrap();
    }
    let until = Instant::now() + SOON;
    while state_of(raw, tenancy) != Some(state) {
        assert!(Instant::now() < until, "{state:?} never came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn state_of(raw: &mut Raw, tenancy: Tenancy) -> Option<SlotState> {
    match raw.ask(inventory(), &[]).unwrap().0 {
        Outcome::Ok(Reply::HostInventory(all)) => all.vms.iter().find(|vm| vm.tenancy() == tenancy).map(|vm| vm.state),
        other => panic!("{other:?}"),
    }
}

#[test]
fn no_operation_acts_on_a_slot_under_a_claim_that_is_not_its_own() {
    need!(Root, Kernel(6, 5));
    let host = apart(Host::builder().grants(EXAMPLES)).start();
    let mut raw = host.raw();
    let victim = claimed(&mut raw, "victim");
    for state in [SlotState::Claimed, SlotState::Running, SlotState::Exited] {
        if state != SlotState::Claimed {
            bring(&host, &mut raw, victim, state);
        }
        let before = (host.inventory(), host.ledger());
        let RequestId { session, serial } = victim.claim;
        let others = [
            ("a claim of another worker's", Tenancy { claim: RequestId { session: session ^ 1, serial }, ..victim }),
            ("another claim of the same worker's", Tenancy { claim: RequestId { session, serial: serial + 1 }, ..victim }),
            ("no claim", Tenancy { claim: RequestId { session: 0, serial: 0 }, ..victim }),
            ("a slot that nobody has", Tenancy { slot: Slot::new(1).unwrap(), ..victim }),
            ("a slot outside the grants", Tenancy { slot: Slot::new(4095).unwrap(), ..victim }),
        ];
        for example in Request::examples() {
            for (what, tenancy) in &others {
                let Some(request) = of(&example, *tenancy) else { continue };
                let row = request.operation();
                let outcome = ask(&host, &mut raw, &request);
                // What takes back finds nothing to take, and that is what was wanted.
                let nothing = match &outcome {
                    Outcome::Error(Error::NotFound { .. }) => true,
                    Outcome::Ok(reply) if row.effect == Effect::Revoke => serde_json::to_value(reply).unwrap()[row.name]["existed"] == false,
                    _ => false,
                };
                assert!(nothing, "{} with {what} on a {state:?} slot: {outcome:?}", row.name);
            }
        }
        assert_eq!(host.ledger(), before.1);
        assert_same(&before.0, &host);
    }
}

#[test]
fn no_operation_is_done_in_a_state_that_its_row_does_not_name() {
    need!(Root, Kernel(6, 5));
    let host = apart(Host::builder().grants(EXAMPLES)).start();
    let mut raw = host.raw();
    let mut refused = 0;
    for state in [SlotState::Claimed, SlotState::Running, SlotState::Exited] {
        let tenancy = claimed(&mut raw, &format!("a-{}", state.as_str()));
        bring(&host, &mut raw, tenancy, state);
        let before = (host.inventory(), host.ledger());
        for example in Request::examples() {
            let row = example.operation();
            let Some(request) = of(&example, tenancy).filter(|_| !row.states.contains(&state)) else { continue };
            let outcome = ask(&host, &mut raw, &request);
            match &outcome {
                Outcome::Error(Error::WrongState { state: named, reason }) => {
                    assert_eq!(named, state.as_str(), "{}", row.name);
                    assert!(reason.contains(row.name) && row.states.iter().all(|legal| reason.contains(legal.as_str())), "{}: {reason}", row.name);
                    refused += 1;
                }
                _ => panic!("{} on a {state:?} slot: {outcome:?}", row.name),
            }
        }
        assert_eq!(host.ledger(), before.1);
        assert_same(&before.0, &host);
    }
    assert!(refused >= 4, "only {refused} were refused");
}

#[test]
fn what_was_not_made_can_not_be_taken_back_or_used() {
    need!(Root, Kernel(6, 5));
    let host = apart(Host::builder().grants(EXAMPLES)).start();
    let mut raw = host.raw();
    let tenancy = claimed(&mut raw, "empty");
    let before = (host.inventory(), host.ledger());
    // Before the operation that makes it; twice, since the first must not have made anything either.
    for example in Request::examples().into_iter().chain(Request::examples()) {
        let row = example.operation();
        let takes_back = row.effect == Effect::Revoke && row.name != "vm.release" && row.states.contains(&SlotState::Claimed);
        let Some(request) = of(&example, tenancy).filter(|_| takes_back || row.name == "vfio.recover") else { continue };
        let outcome = ask(&host, &mut raw, &request);
        let refused = match &outcome {
            Outcome::Ok(reply) => takes_back && serde_json::to_value(reply).unwrap()[row.name]["existed"] == false,
            Outcome::Error(_) => true,
        };
        assert!(refused, "{}: {outcome:?}", row.name);
    }
    // A VM of parts that nobody made.
    let (plain, _) = host.spec("");
    let device = Bdf::new("0000:65:00.0").unwrap();
    let share = Share { share: ShareName::new("models").unwrap(), tag: Tag::new("models").unwrap() };
    let nic = |queues| Nic { mac: Mac::new("52:54:00:00:00:01").unwrap(), backend: Backend::Tap { queues: Queues::new(queues).unwrap() } };
    for (what, spec) in [
        ("a device that is not bound", VmSpec { devices: vec![device.clone()], ..plain.clone() }),
        ("one device twice", VmSpec { devices: vec![device.clone(), device], ..plain.clone() }),
        ("a share that is not attached", VmSpec { shares: vec![share.clone()], ..plain.clone() }),
        ("one share twice", VmSpec { shares: vec![share.clone(), share], ..plain.clone() }),
        ("a tap that was not opened", VmSpec { nics: vec![nic(1)], ..plain.clone() }),
        ("eight queues that were not opened", VmSpec { nics: vec![nic(8)], ..plain.clone() }),
    ] {
        let outcome = match raw
            .ask(Request::VmSpawn(Spawn { tenancy, spec: spec.clone() }), &borrowed(&descriptors_for(&host, &Request::VmSpawn(Spawn { tenancy, spec }))))
        {
            Ok((outcome, _)) => outcome,
            Err(why) => panic!("{what}: {why}"),
        };
        assert!(matches!(outcome, Outcome::Error(_)), "{what}: {outcome:?}");
    }
    assert!(host.qemus().is_empty());
    assert_eq!(host.ledger(), before.1);
    assert_same(&before.0, &host);
}

#[test]
fn what_no_grant_opens_is_denied_by_the_grant_that_its_row_names() {
    need!(Root, Kernel(6, 5));
    // Where the device of the examples is, so that only the grant is missing.
    let directory = stage::directory();
    let stage = Stage::build(directory.path(), &[Shape::SharedGroup]);
    let mut builder = apart(Host::builder().on_stage(&stage));
    builder.vms_max = 1;
    let host = builder.start();
    let mut raw = host.raw();
    let tenancy = claimed(&mut raw, "poor");
    let before = (host.inventory(), host.ledger());
    for example in Request::examples() {
        let row = example.operation();
        if row.grant.is_empty() {
            continue;
        }
        let mut request = of(&example, tenancy).unwrap_or(example);
        if let Request::VmSpawn(spawn) = &mut request {
            spawn.spec.qemu = QemuName::new("ungranted").unwrap();
        }
        let outcome = ask(&host, &mut raw, &request);
        let named = match &outcome {
            Outcome::Error(Error::Denied { grant, .. }) => grant.clone(),
            // A limit of the grants' that is reached.
            Outcome::Error(Error::Exhausted { what, .. }) => what.clone(),
            // Where no network and no device is granted, there is no tap to publish anything for, and nothing bound to be reset.
            Outcome::Error(Error::NotFound { what }) if row.name == "net.publish" && what.contains("tap.open comes first") => continue,
            Outcome::Error(Error::NotFound { .. }) if row.name == "vfio.recover" => continue,
            _ => panic!("{}: {outcome:?}", row.name),
        };
        assert!(row.grant.iter().any(|grant| named.contains(grant)), "{} was refused by {named:?}, and its row names {:?}", row.name, row.grant);
    }
    assert_eq!(host.ledger(), before.1);
    assert_same(&before.0, &host);
}

#[test]
fn every_place_for_a_descriptor_refuses_every_other_kind() {
    need!(Root, Kernel(6, 5));
    let host = apart(Host::builder()).start();
    let mut raw = host.raw();
    let tenancy = claimed(&mut raw, "all-places");
    let before = host.inventory();
    let (plain, _) = host.spec("");
    let disk = |access| Disk { format: DiskFormat::Raw, access };
    let boot = Boot::Kernel { command_line: CommandLine::new("").unwrap(), initrd: Presence::Given, firmware: Presence::Given };
    let spec = VmSpec { boot, disks: vec![disk(DiskAccess::ReadOnly), disk(DiskAccess::ReadWrite)], ..plain };
    let request = Request::VmSpawn(Spawn { tenancy, spec });
    let roles = request.fds_in();
    let named: std::collections::BTreeSet<&str> = roles.iter().map(|role| role.name).collect();
    let all: std::collections::BTreeSet<&str> = request.operation().fds_in.iter().map(|name| name.trim_end_matches(['?', '*'])).collect();
    assert_eq!(named, all, "a place that this test does not try");
    let file = host.path("files/kernel");
    let opened = |path: &std::path::Path, flags: OFlags| open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let (socket, _other) = diarch_ipc::channel::pair().unwrap();
    let wrong: Vec<(&str, OwnedFd)> = vec![
        ("an O_PATH descriptor", opened(&file, OFlags::PATH)),
        ("a directory", opened(std::path::Path::new("/"), OFlags::RDONLY | OFlags::DIRECTORY)),
        ("the reading end of a pipe", reader),
        ("the writing end of a pipe", writer),
        ("a socket", socket),
        ("a device node", opened(std::path::Path::new("/dev/null"), OFlags::RDWR)),
        ("an eventfd", rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()),
        ("a file of /proc", opened(std::path::Path::new("/proc/self/status"), OFlags::RDONLY)),
        ("a tap's device node", opened(std::path::Path::new("/dev/net/tun"), OFlags::RDWR)),
    ];
    for place in 0..roles.len() {
        for (what, fd) in &wrong {
            // A file of /proc is a file that can be read: what reads it is QEMU, as its own user.
            if *what == "a file of /proc" && roles[place].access == FdAccess::ReadOnly {
                continue;
            }
            let right = descriptors_for(&host, &request);
            let mut fds = borrowed(&right);
            fds[place] = fd.as_fd();
            let what = format!("{what} as {}", roles[place].name);
            match raw.ask(request.clone(), &fds) {
                Ok((Outcome::Error(Error::Invalid { field, .. }), _)) => assert_eq!(field, format!("fds[{place}] ({})", roles[place].name), "{what}"),
                Ok((outcome, _)) => panic!("{what}: {outcome:?}"),
                Err(why) => panic!("{what}: {why}"),
            }
        }
    }
    assert!(host.qemus().is_empty());
    assert_same(&before, &host);
}

// ---- another's slot, ids that are no paths ----

#[test]
fn a_slot_that_nobody_claimed_answers_not_found_for_every_operation() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let before = host.inventory();
    let mut raw = host.raw();
    for number in [0u64, 15, 16, 4095] {
        let slot = Tenancy { slot: Slot::new(number).unwrap(), claim: RequestId { session: 1, serial: 1 } };
        let (spec, fds) = host.spec("");
        for (request, fds) in [
            (Request::VmSpawn(Spawn { tenancy: slot, spec }), fds),
            (Request::VmSignal(Signal { tenancy: slot, signal: SignalKind::Kill }), Vec::new()),
            (Request::VmAttach(diarch_ipc::operation::Attach { tenancy: slot }), Vec::new()),
            (Request::VmConsole(diarch_ipc::operation::Console { tenancy: slot }), Vec::new()),
        ] {
            let name = request.operation().name;
            match raw.ask(request, &borrowed(&fds)).unwrap().0 {
                Outcome::Error(Error::NotFound { .. }) => {}
                other => panic!("{name} on slot {number}: {other:?}"),
            }
        }
    }
    drop(raw);
    assert_same(&before, &host);
}

#[test]
fn no_more_slots_than_granted_are_given() {
    need!(Root, Kernel(6, 5));
    let mut builder = Host::builder().without_worker();
    builder.vms_max = 3;
    let host = builder.start();
    let session = host.session();
    let slots: Vec<_> = ["a", "b", "c"].map(|label| session.claim(label).tenancy).to_vec();
    let uids: std::collections::BTreeSet<u32> = session.inventory().vms.iter().map(|vm| vm.uid).collect();
    assert_eq!(uids.len(), 3, "every slot has a user of its own");
    let label = Label::new("one-too-many").unwrap();
    match session.ask(Request::VmClaim(Claim { label }), Vec::new()) {
        Err(Error::Exhausted { limit: 3, .. }) => {}
        other => panic!("{other:?}"),
    }
    session.release(slots[1]);
    assert_eq!(session.claim("again").tenancy.slot, slots[1].slot);
}

// ---- a QEMU that is hostile, or useless ----

#[test]
fn a_qemu_runs_as_its_own_user_without_any_privilege_and_without_our_descriptors() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let session = host.session();
    let claimed = session.claim("jail");
    let (spawned, _) = session.spawn(&host, claimed.tenancy, "");
    let status = std::fs::read_to_string(format!("/proc/{}/status", spawned.pid)).unwrap();
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim().to_owned();
    let all_four = |id: u32| format!("{id}\t{id}\t{id}\t{id}");
    assert_eq!((field("Uid:"), field("Gid:")), (all_four(claimed.uid), all_four(claimed.uid)));
    assert_eq!(field("Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16), Ok(0), "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    let foreign = || -> Vec<String> {
        let own = |fd: &String| {
            let wanted = ["/dev/null", "socket", "anon_inode"].iter().any(|w| fd.starts_with(w)) || fd.starts_with(host.path("").to_str().unwrap());
            wanted && !fd.contains("grants") && !fd.contains("audit") && !fd.contains("record")
        };
        descriptors(spawned.pid.cast_signed()).into_keys().filter(|fd| !own(fd)).collect()
    };
    // Just after its exec the dynamic linker has a library open for a moment; what was inherited stays.
    let until = Instant::now() + SOON;
    while !foreign().is_empty() {
        assert!(Instant::now() < until, "it holds {:?}", foreign());
        std::thread::sleep(Duration::from_millis(10));
    }
    let environment = std::fs::read(format!("/proc/{}/environ", spawned.pid)).unwrap();
    assert!(environment.len() < 64, "{}", String::from_utf8_lossy(&environment));
    // It can't be asked for anything by the worker's user, and the worker can't signal it.
    let refused =
        as_user(WORKER, || rustix::process::kill_process(rustix::process::Pid::from_raw(spawned.pid.cast_signed()).unwrap(), rustix::process::Signal::KILL));
    assert_eq!(refused, Err(rustix::io::Errno::PERM));
}

#[test]
fn an_escaped_qemu_reaches_neither_the_supervisor_nor_another_vms_files() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let session = host.session();
    let (one, two) = (session.claim("one"), session.claim("two"));
    session.spawn(&host, one.tenancy, "");
    session.spawn(&host, two.tenancy, "");
    let escaped = User { uid: two.uid, gid: two.uid };
    let refused = as_user(escaped, || connect(&host.socket()).map(drop)).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
    let own = host.path("run/vm").join(one.tenancy.slot.to_string());
    as_user(escaped, || {
        for entry in std::fs::read_dir(&own).into_iter().flatten().flatten() {
            let path = entry.path();
            assert!(std::fs::File::open(&path).is_err(), "{} can be read", path.display());
            assert!(std::os::unix::net::UnixStream::connect(&path).is_err(), "{} can be connected to", path.display());
        }
        assert!(std::fs::write(own.join("x"), "").is_err());
        assert!(std::fs::write(host.path("run/x"), "").is_err());
        assert!(std::fs::read(host.path("audit/audit.jsonl")).is_err(), "the audit can be read by a VM");
    });
    // The worker is not root either: records and monitors are reached through the contract only.
    as_user(WORKER, || {
        assert!(std::fs::write(own.join("record.json"), "{}").is_err());
        for entry in std::fs::read_dir(&own).into_iter().flatten().flatten() {
            assert!(std::os::unix::net::UnixStream::connect(entry.path()).is_err(), "{}", entry.path().display());
        }
    });
}

#[test]
fn a_squatter_on_the_socket_is_not_talked_to() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let squat = host.path("worker/squat.sock");
    let listener = as_user(WORKER, || {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(&squat).unwrap()).unwrap();
        listen(&socket, 8).unwrap();
        socket
    });
    let session = host.session_as(WORKER, diarch_ipc::client::Settings::new(&squat));
    let error = session.ask(inventory(), Vec::new()).unwrap_err();
    assert!(error.to_string().contains(&format!("served by uid {}", WORKER.uid)), "{error}");
    // Not one byte was said to it.
    let accepted = rustix::net::accept(&listener).unwrap();
    drop(session);
    let mut buffer = [0u8; 64];
    assert_eq!(rustix::io::read(&accepted, &mut buffer).unwrap_or(0), 0);
}

#[test]
fn an_argument_can_not_open_a_second_option() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let session = host.session();
    let claimed = session.claim("inject");
    let words = r#"quiet,readonly=off -monitor tcp:0.0.0.0:1 "},{"x": ' $(id) ;%s"#;
    let (spawned, _) = session.spawn(&host, claimed.tenancy, words);
    let raw = std::fs::read(format!("/proc/{}/cmdline", spawned.pid)).unwrap();
    let argv: Vec<&str> = raw.split(|b| *b == 0).map(|a| std::str::from_utf8(a).unwrap()).collect();
    let append = argv.iter().position(|a| *a == "-append").expect("-append");
    assert_eq!(argv[append + 1], words);
    for must in ["-nodefaults", "-no-user-config", "-sandbox"] {
        assert!(argv.contains(&must), "{must} is missing: {argv:?}");
    }
    assert!(!argv.contains(&"-monitor"));
}

#[test]
fn a_qemu_that_exits_at_once_is_told_with_its_status() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let session = host.session();
    let claimed = session.claim("short");
    let before = host.inventory();
    let (spec, fds) = host.spec("stub.say=there+is+no+such+machine stub.exit=3");
    // Either its exec is reported and its end comes as an event, or its end is already the answer.
    match session.ask(Request::VmSpawn(Spawn { tenancy: claimed.tenancy, spec }), fds) {
        Ok(_) => {
            let event = session.event(Duration::from_secs(2)).expect("an event");
            assert!(format!("{event:?}").contains("Code(3)"), "{event:?}");
            let record = session.record(claimed.tenancy).unwrap();
            assert_eq!(record.state, SlotState::Exited);
        }
        Err(error) => panic!("{error}"),
    }
    assert!(std::fs::read_to_string(host.path("log/test-qemu.log")).unwrap().contains("there is no such machine"));
    session.release(claimed.tenancy);
    session.claim("short");
    let _ = before;
}

// ---- root's own files ----

#[test]
fn a_grants_file_that_others_can_write_stops_the_supervisor_with_a_sentence() {
    need!(Root, Kernel(6, 5));
    let mut builder = Host::builder().without_worker();
    builder.grants_mode = 0o666;
    builder.start_limit = diarch_tests::stand_in::StartLimit { count: 2, within_ms: 10_000 };
    let host = builder.prepare();
    let until = Instant::now() + Duration::from_secs(10);
    while host.manager().unit(Unit::Supervisor).state != UnitState::Failed {
        assert!(Instant::now() < until, "{:?}", host.manager().unit(Unit::Supervisor));
        std::thread::sleep(Duration::from_millis(10));
    }
    let log = host.log("supervisor.log");
    assert!(log.contains("written by others") && log.contains("chmod go-w"), "{log}");

    // And one that belongs to somebody else.
    std::fs::set_permissions(host.path("grants.toml"), std::fs::Permissions::from_mode(0o644)).unwrap();
    chown(host.path("grants.toml"), Some(STRANGER.uid), None).unwrap();
    host.manager().ask(&Ask::Start(Unit::Supervisor)).unwrap_err();
    assert!(host.log("supervisor.log").contains(&format!("belongs to uid {}", STRANGER.uid)), "{}", host.log("supervisor.log"));

    // Put right, it starts.
    chown(host.path("grants.toml"), Some(0), None).unwrap();
    host.manager().ask(&Ask::Start(Unit::Supervisor)).unwrap();
    honest(&host);
}

#[test]
fn a_full_disk_under_the_audit_closes_grants_and_leaves_release_and_kill_open() {
    need!(Root, Kernel(6, 5));
    let mut builder = Host::builder().without_worker();
    builder.audit_tmpfs_kib = Some(64);
    builder.grants_more = "[limits]\nread_per_second = 100000\nread_burst = 100000\n".into();
    let host = builder.start();
    let session = host.session();
    let (running, claimed) = (session.claim("running"), session.claim("claimed"));
    let (spawned, _) = session.spawn(&host, running.tenancy, "");
    // Requests are audited: their own records fill the disk.
    let mut trouble = None;
    for _ in 0..5_000 {
        trouble = session.inventory().audit.trouble;
        if trouble.is_some() {
            break;
        }
    }
    let trouble = trouble.expect("64 KiB were not full after 5,000 requests");
    assert!(trouble.to_lowercase().contains("space") || trouble.contains("ENOSPC"), "{trouble}");
    let lost = session.inventory().audit.lost;

    // What did not fit was an inventory's two records; a claim's one may, into the rest of the page.
    let refused = (0..50).find_map(|n| match session.ask(Request::VmClaim(Claim { label: Label::new(format!("more-{n}")).unwrap() }), Vec::new()) {
        Ok((Reply::VmClaim(claimed), _)) => {
            session.release(claimed.tenancy);
            None
        }
        refused => Some(refused.unwrap_err()),
    });
    let refused = refused.expect("refused when nothing more fits");
    assert!(refused.to_string().contains("audit"), "{refused}");
    let (spec, fds) = host.spec("");
    let refused = session.ask(Request::VmSpawn(Spawn { tenancy: claimed.tenancy, spec }), fds).unwrap_err();
    assert!(refused.to_string().contains("audit"), "{refused}");
    assert_eq!(host.qemus(), [spawned.pid.cast_signed()]);

    // What takes back goes on, and is counted.
    session.ask(Request::VmSignal(Signal { tenancy: running.tenancy, signal: SignalKind::Kill }), Vec::new()).unwrap();
    assert!(session.release(running.tenancy).existed);
    assert!(session.release(claimed.tenancy).existed);
    assert!(host.qemus().is_empty() && host.ledger().is_empty());
    assert!(session.inventory().audit.lost > lost, "{:?}", session.inventory().audit);

    // With room again, grants open again, and the file tells of the gap.
    let audit = host.inside("audit/audit.jsonl");
    let text = std::fs::read_to_string(&audit).unwrap();
    assert!(text.lines().count() > 10);
    let grown = std::process::Command::new("nsenter")
        .args(["-t", &host.manager().pid().to_string(), "-m", "mount", "-o", "remount,size=1m"])
        .arg(host.path("audit"))
        .status()
        .unwrap();
    assert!(grown.success());
    session.claim("again");
    assert_eq!(session.inventory().audit.trouble, None);
    let text = std::fs::read_to_string(&audit).unwrap();
    assert!(text.contains("lost"), "the gap is not told: {}", text.lines().rev().take(5).collect::<Vec<_>>().join("\n"));
}
