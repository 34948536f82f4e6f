//! Programs beside a VM's QEMU, in a network of the test's own: a real guest, real passt, and the kernel's packet filter.

use diarch_ipc::Error;
use diarch_ipc::name::{CommandLine, Forward, IpText, Mac, MiB, Port, Protocol, QemuName, Tenancy};
use diarch_ipc::operation::{Attach, Console, Event, Release, Reply, Request, SlotState, Spawn};
use diarch_ipc::spec::{Backend, Boot, Egress, Nic, Presence, VmSpec};
use diarch_tests::host::{Host, Session, assert_same, free_port};
use diarch_tests::need;
use diarch_tests::netns::{self, World, ip, run};
use diarch_tests::stand_in::Unit;
use diarch_tests::undying::{Undying, Until};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(5);
/// Under TCG on a busy machine with two processors.
const BOOT: Duration = Duration::from_secs(120);
const THERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const PASST: &str = "[passt]\npath = \"/usr/bin/passt\"\n";

/// Whether the route to the world is the default one, without which passt does not start.
#[derive(PartialEq, Eq)]
enum Route {
    Default,
    None,
}

/// A host in a network of its own, with a world to connect to.
fn host(grants: &str, route: Route) -> (Host, World) {
    netns::enter();
    let world = World::joined("wan");
    ip("address add 192.0.2.1/24 dev wan");
    world.inside(|| {
        ip("address add 192.0.2.2/24 dev far");
        ip("address add 169.254.169.254/32 dev far");
    });
    if route == Route::Default {
        ip("route add default via 192.0.2.2");
    }
    (Host::builder().without_worker().real_qemu().grants(grants).start(), world)
}

fn user(egress: Egress, port: u16) -> Nic {
    let forward = Forward {
        protocol: Protocol::Tcp,
        host_address: IpText::try_from("127.0.0.1".to_owned()).unwrap(),
        host_port: Port::new(port.into()).unwrap(),
        guest_port: Port::new(80).unwrap(),
    };
    Nic { mac: Mac::new("52:54:00:00:00:01").unwrap(), backend: Backend::User { egress, forwards: vec![forward] } }
}

/// The test guest, with these cards.
fn start(host: &Host, session: &Session, tenancy: Tenancy, nics: Vec<Nic>) {
    try_start(host, session, tenancy, nics).unwrap();
}

fn try_start(host: &Host, session: &Session, tenancy: Tenancy, nics: Vec<Nic>) -> Result<(), Error> {
    let (plain, mut fds) = host.spec("");
    fds.truncate(2);
    let files = need::guest().unwrap();
    for name in ["vmlinuz", "initrd.img"] {
        fds.push(fs::File::open(files.join(name)).unwrap().into());
    }
    let boot = Boot::Kernel { command_line: CommandLine::new("console=ttyS0 quiet panic=-1").unwrap(), initrd: Presence::Given, firmware: Presence::Absent };
    let spec = VmSpec { memory: MiB::new(256).unwrap(), boot, nics, ..plain };
    session.ask(Request::VmSpawn(Spawn { tenancy, spec }), fds).map(drop)
}

fn get(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_millis(500))?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn serves(port: u16) -> bool {
    get((Ipv4Addr::LOCALHOST, port).into()).is_ok_and(|answer| answer.contains("200"))
}

fn wait(what: &str, within: Duration, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + within;
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn wait_served(host: &Host, port: u16) {
    let log = |name| fs::read_to_string(host.path("log").join(name)).unwrap_or_default();
    let until = Instant::now() + BOOT;
    while !serves(port) {
        assert!(Instant::now() < until, "QEMU: {}\nconsole: {}\nsupervisor: {}", log("test-qemu.log"), log("test-console.log"), host.log("supervisor.log"));
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// QEMU's pid and those of its companions, as the ledger has them.
fn pids(host: &Host) -> (i32, Vec<i32>) {
    let ledger = host.ledger();
    let run = &ledger.values().next().unwrap()["run"];
    let pid = |process: &serde_json::Value| i32::try_from(process["pid"].as_i64().unwrap()).unwrap();
    (pid(&run["process"]), run["companions"].as_array().unwrap().iter().map(|one| pid(&one["process"])).collect())
}

fn lives(pid: i32) -> bool {
    let state = status(pid, "State");
    !state.is_empty() && !state.starts_with('Z')
}

fn status(pid: i32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix(&format!("{field}:"))).unwrap_or_default().trim().to_owned()
}

fn namespace(pid: i32, kind: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().to_string_lossy().into_owned()
}

fn kill(pid: i32) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL).unwrap();
}

/// A shell in the guest.
struct Shell(UnixStream);

impl Shell {
    fn of(session: &Session, tenancy: Tenancy) -> Shell {
        match session.ask(Request::VmConsole(Console { tenancy }), Vec::new()) {
            Ok((Reply::VmConsole(_), mut fds)) => {
                let stream = UnixStream::from(fds.remove(0));
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                Shell(stream)
            }
            other => panic!("vm.console: {other:?}"),
        }
    }

    /// The exit code of a command.
    fn run(&mut self, command: &str) -> u8 {
        // What is typed comes back too, and does not hold the word that the guest makes of it.
        writeln!(self.0, "{command}; echo code-$?-").unwrap();
        let (mut said, mut buffer) = (String::new(), [0; 512]);
        loop {
            let length = self.0.read(&mut buffer).unwrap_or_else(|error| panic!("{command}: {error}; {said}"));
            assert!(length > 0, "{command}: the console ended: {said}");
            said += &String::from_utf8_lossy(&buffer[..length]);
            let code = said.split("code-").skip(1).find_map(|rest| rest.split_once('-')?.0.parse().ok());
            if let Some(code) = code {
                return code;
            }
        }
    }
}

/// Listens there, on an address of the world's; says for each that connected that it did.
fn listener(world: &World, address: Ipv4Addr) -> TcpListener {
    let listener = world.inside(move || TcpListener::bind((address, 7000)).unwrap());
    listener.set_nonblocking(true).unwrap();
    listener
}

fn tables() -> String {
    run("nft", &["list", "tables"])
}

#[test]
fn a_guest_is_reached_through_a_jailed_passt_and_its_qemu_has_no_network_and_it_connects_nowhere() {
    need!(Root, Qemu, Guest, Network, Passt, Kernel(6, 5));
    let (host, world) = host(PASST, Route::Default);
    let before = host.inventory();
    let session = host.session();
    let tenancy = session.claim("web").tenancy;
    let port = free_port();
    start(&host, &session, tenancy, vec![user(Egress::Closed, port)]);
    wait_served(&host, port);
    let (qemu, companions) = pids(&host);
    let passt = companions[0];

    // QEMU: nothing but a loopback interface that is down.
    assert_ne!(namespace(qemu, "net"), namespace(host.supervisor_pid(), "net"));
    let devices = fs::read_to_string(format!("/proc/{qemu}/net/dev")).unwrap();
    let names: Vec<&str> = devices.lines().skip(2).map(|line| line.split(':').next().unwrap().trim()).collect();
    assert_eq!(names, ["lo"]);
    assert_eq!(fs::read_to_string(format!("/proc/{qemu}/net/tcp")).unwrap().lines().count(), 1, "no socket");

    // passt: the slot's user, without a capability, in a tree and a process namespace of its own.
    let uid = host.ledger().values().next().unwrap()["uid"].as_u64().unwrap().to_string();
    assert!(status(passt, "Uid").split_whitespace().all(|word| word == uid), "{}", status(passt, "Uid"));
    assert_eq!((status(passt, "CapEff"), status(passt, "NoNewPrivs"), status(passt, "Seccomp")), ("0000000000000000".into(), "1".into(), "2".into()));
    assert!(status(passt, "NSpid").ends_with("\t1"), "{}", status(passt, "NSpid"));
    for kind in ["mnt", "pid", "ipc"] {
        assert_ne!(namespace(passt, kind), namespace(host.supervisor_pid(), kind));
        assert_ne!(namespace(passt, kind), namespace(qemu, kind));
    }
    assert_eq!(namespace(passt, "net"), namespace(host.supervisor_pid(), "net"));

    // The guest opens no connection, wherever to; the kernel drops it.
    let there = listener(&world, THERE);
    let mut shell = Shell::of(&session, tenancy);
    assert_ne!(shell.run("timeout 3 nc 192.0.2.2 7000 </dev/null"), 0);
    there.accept().unwrap_err();

    // All of it goes on without a supervisor, and the next one has it again.
    host.manager().kill_and_wait(Unit::Supervisor);
    assert!(serves(port));
    assert_ne!(shell.run("timeout 3 nc 192.0.2.2 7000 </dev/null"), 0);
    there.accept().unwrap_err();
    assert_eq!(pids(&host), (qemu, vec![passt]));

    // Without it the VM is not what it was: its worker is told, and so is one that was not there then.
    kill(passt);
    let told = |session: &Session| {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match session.event(until.saturating_duration_since(Instant::now())) {
                Some(Event::VmImpaired { slot, what, .. }) => {
                    assert!(slot == tenancy.slot && what.contains("passt") && what.contains("signal 9"), "{what}");
                    break;
                }
                Some(_) => {}
                None => panic!("no event; {}", host.log("supervisor.log")),
            }
        }
    };
    told(&session);
    drop((shell, session));
    let session = host.session();
    session.ask(Request::VmAttach(Attach { tenancy }), Vec::new()).unwrap();
    told(&session);
    assert!(lives(qemu));
    drop(there);
    session.release(tenancy);
    assert!(!lives(qemu) && tables().is_empty(), "{}", tables());
    drop(session);
    assert_same(&before, &host);
}

#[test]
fn a_guest_that_may_connect_outwards_reaches_the_world_and_neither_the_hosts_loopback_nor_the_clouds_metadata() {
    need!(Root, Qemu, Guest, Network, Passt, Kernel(6, 5));
    let (host, world) = host(&format!("egress = true\n{PASST}"), Route::Default);
    let session = host.session();
    let tenancy = session.claim("web").tenancy;
    let port = free_port();
    start(&host, &session, tenancy, vec![user(Egress::Host, port)]);
    wait_served(&host, port);
    let mut shell = Shell::of(&session, tenancy);
    let (there, metadata) = (listener(&world, THERE), listener(&world, METADATA));
    let loopback = TcpListener::bind((Ipv4Addr::LOCALHOST, 7000)).unwrap();
    loopback.set_nonblocking(true).unwrap();
    shell.run("timeout 3 nc 192.0.2.2 7000 </dev/null");
    there.accept().expect("the world was reached");
    shell.run("timeout 3 nc 169.254.169.254 7000 </dev/null");
    metadata.accept().unwrap_err();
    for address in ["10.0.2.2", "127.0.0.1"] {
        shell.run(&format!("timeout 3 nc {address} 7000 </dev/null"));
        loopback.accept().unwrap_err();
    }
    session.release(tenancy);
}

#[test]
fn companions_end_with_their_qemu_before_that_is_told_so_that_the_next_one_finds_the_port_free() {
    need!(Root, Qemu, Guest, Network, Passt, Kernel(6, 5));
    let (host, _world) = host(PASST, Route::Default);
    let before = host.inventory();
    let session = host.session();
    let tenancy = session.claim("web").tenancy;
    let port = free_port();
    for _ in 0..5 {
        start(
            &host,
            &session,
            tenancy,
            vec![user(Egress::Closed, port), Nic { backend: Backend::User { egress: Egress::Closed, forwards: vec![] }, ..user(Egress::Closed, 1) }],
        );
        let (qemu, companions) = pids(&host);
        assert_eq!(companions.len(), 2);
        wait("passt listens", SOON, || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        kill(qemu);
        match session.event(SOON) {
            Some(Event::VmExited { .. }) => {}
            other => panic!("{other:?}"),
        }
        assert!(companions.iter().all(|pid| !lives(*pid)));
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap_err();
    }
    // One that was lost with QEMU while no supervisor ran.
    start(&host, &session, tenancy, vec![user(Egress::Closed, port)]);
    let (qemu, companions) = pids(&host);
    rustix::process::kill_process(rustix::process::Pid::from_raw(companions[0]).unwrap(), rustix::process::Signal::STOP).unwrap();
    kill(host.supervisor_pid());
    kill(qemu);
    wait("its companion was ended", Duration::from_secs(20), || !lives(companions[0]));
    host.wait_ready();
    session.release(tenancy);
    assert!(tables().is_empty(), "{}", tables());
    drop(session);
    assert_same(&before, &host);
}

/// The next of these events, and what was told before it.
fn quarantined(session: &Session) -> String {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match session.event(until.saturating_duration_since(Instant::now())) {
            Some(Event::VmQuarantined { reason, .. }) => return reason,
            Some(_) => {}
            None => panic!("no vm.quarantined"),
        }
    }
}

/// What was killed in the slot has not ended: nothing is started there, no release succeeds, and a restarted supervisor knows it too. Then it ends.
fn kept_until_it_ends(host: &Host, session: &Session, tenancy: Tenancy, undying: Undying, then: SlotState) {
    let state = || session.record(tenancy).unwrap().state;
    let card = || vec![user(Egress::Closed, free_port())];
    assert!(lives(undying.pid), "it is held, so that it can't end");
    assert_eq!(state(), SlotState::Quarantined);
    assert_eq!(try_start(host, session, tenancy, card()).unwrap_err().kind(), "wrong-state");
    host.manager().kill_and_wait(Unit::Supervisor);
    assert_eq!((state(), lives(undying.pid)), (SlotState::Quarantined, true), "a new supervisor finds it");
    assert_eq!(try_start(host, session, tenancy, card()).unwrap_err().kind(), "wrong-state");
    undying.let_go();
    wait("it has ended", SOON, || state() == then);
    start(host, session, tenancy, card());
}

#[test]
fn a_companion_that_does_not_end_keeps_its_slot_from_everybody_until_it_has() {
    need!(Root, Qemu, Guest, Network, Passt, Kernel(6, 5));
    let (host, _world) = host(PASST, Route::Default);
    let before = host.inventory();
    let session = host.session();
    let tenancy = session.claim("web").tenancy;
    start(&host, &session, tenancy, vec![user(Egress::Closed, free_port())]);
    let (qemu, companions) = pids(&host);
    let undying = Undying::of(companions[0], Until::Runs).unwrap();
    kill(qemu);
    let reason = quarantined(&session);
    assert!(reason.contains("was killed and has not ended"), "{reason}");
    kept_until_it_ends(&host, &session, tenancy, undying, SlotState::Exited);

    // Also of a VM that is released: its slot and its user go to nobody.
    let undying = Undying::of(pids(&host).1[0], Until::Runs).unwrap();
    let error = session.ask(Request::VmRelease(Release { tenancy }), Vec::new()).unwrap_err();
    assert!(error.kind() == "timeout" && error.to_string().contains("hangs in the kernel"), "{error}");
    assert_eq!(host.ledger().values().next().unwrap()["state"], "releasing");
    let next = session.claim("next").tenancy;
    assert_ne!(next.slot, tenancy.slot);
    undying.let_go();
    session.release(tenancy);
    session.release(next);
    drop(session);
    assert_same(&before, &host);
}

#[test]
fn a_start_whose_child_does_not_end_is_no_free_slot_until_it_has() {
    need!(Root, Qemu, Guest, Network, Passt, Kernel(6, 5));
    let (host, _world) = host(PASST, Route::Default);
    let before = host.inventory();
    let session = host.session();
    let tenancy = session.claim("web").tenancy;
    // The first child of the start is stopped at its gate. That is a race, which is tried until it is won.
    let undying = (0..50).find_map(|_| {
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stopped = scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Acquire) {
                    let tasks = fs::read_dir(format!("/proc/{}/task", host.supervisor_pid())).unwrap().flatten();
                    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
                    let children: Vec<i32> = children.flat_map(|text| text.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
                    // In a jail (not the packet filter's program), and with its own descriptors only: before that it has the supervisor's connections too, and they
                    // would not end with the supervisor.
                    let own = fs::read_link(format!("/proc/{}/ns/pid", host.supervisor_pid())).unwrap();
                    let jailed = |child: i32| fs::read_link(format!("/proc/{child}/ns/pid")).is_ok_and(|namespace| namespace != own);
                    let waits = |child: i32| fs::read_dir(format!("/proc/{child}/fd")).is_ok_and(|files| files.count() <= 6);
                    if let Some(child) = children.iter().find(|child| jailed(**child) && waits(**child)) {
                        return Undying::of(*child, Until::Stops);
                    }
                }
                None
            });
            let started = try_start(&host, &session, tenancy, vec![user(Egress::Closed, free_port())]);
            done.store(true, std::sync::atomic::Ordering::Release);
            let undying = stopped.join().unwrap();
            match started {
                Err(error) if error.to_string().contains("exec") && undying.is_some() => undying,
                _ => {
                    drop(undying);
                    kill(pids(&host).0);
                    wait("QEMU has ended", SOON, || session.record(tenancy).unwrap().state == SlotState::Exited);
                    None
                }
            }
        })
    });
    let reason = quarantined(&session);
    assert!(reason.contains("the child of a start that failed was killed and has not ended"), "{reason}");
    assert_eq!(host.ledger().values().next().unwrap()["state"], "spawning", "a restarted supervisor is to find it");
    kept_until_it_ends(&host, &session, tenancy, undying.expect("stopped in time"), SlotState::Claimed);
    session.release(tenancy);
    drop(session);
    assert_same(&before, &host);
}

#[test]
fn a_start_that_fails_leaves_no_rule_of_its_user() {
    need!(Root, Network, Passt, Kernel(6, 5));
    netns::enter();
    let _world = World::joined("wan");
    ip("address add 192.0.2.1/24 dev wan");
    ip("route add default via 192.0.2.2");
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken");
    fs::write(&broken, "no program\n").unwrap();
    fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let host = Host::builder().without_worker().grants(&format!("{PASST}[qemu.broken]\npath = {broken:?}\n")).start();
    let before = host.inventory();
    let session = host.session();
    let tenancy = session.claim("web").tenancy;
    let (mut spec, fds) = host.spec("");
    spec.qemu = QemuName::new("broken").unwrap();
    spec.nics.push(user(Egress::Closed, free_port()));
    let error = session.ask(Request::VmSpawn(Spawn { tenancy, spec: spec.clone() }), fds).unwrap_err();
    assert!(error.to_string().contains("exec"), "{error}");
    assert!(tables().is_empty(), "{}", tables());
    // A running one's stay when the next start in another slot fails.
    let (mut runs, fds) = host.spec("");
    runs.nics = spec.nics.clone();
    session.ask(Request::VmSpawn(Spawn { tenancy, spec: runs }), fds).unwrap();
    let held = run("nft", &["list", "set", "inet", "diarch", "closed_users"]);
    let other = session.claim("other").tenancy;
    spec.nics = vec![user(Egress::Closed, free_port())];
    let (_, fds) = host.spec("");
    session.ask(Request::VmSpawn(Spawn { tenancy: other, spec }), fds).unwrap_err();
    assert_eq!(run("nft", &["list", "set", "inet", "diarch", "closed_users"]), held);
    session.release(other);
    session.release(tenancy);
    drop(session);
    assert_same(&before, &host);
}

#[test]
fn where_passt_can_not_be_used_qemu_carries_the_network_and_the_reason_is_told() {
    need!(Root, Qemu, Guest, Network, Passt, Kernel(6, 5));
    let (host, _world) = host(PASST, Route::None);
    let session = host.session();
    let tenancy = session.claim("web").tenancy;
    let port = free_port();
    start(&host, &session, tenancy, vec![user(Egress::Closed, port)]);
    let (qemu, companions) = pids(&host);
    assert!(companions.is_empty());
    assert_eq!(namespace(qemu, "net"), namespace(host.supervisor_pid(), "net"));
    wait("QEMU listens", SOON, || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
    assert!(host.log("supervisor.log").contains("default route"), "{}", host.log("supervisor.log"));
    session.release(tenancy);
}
