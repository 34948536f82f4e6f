//! VM tasks against a supervisor of a few lines, which writes down what it is asked, and refuses what a test tells it to.

use super::super::{Context, Found, Handle, Intent, Status, Want};
use super::*;
use crate::config::Config;
use crate::control::protocol::Phase;
use crate::journal::Journal;
use crate::logs::Logs;
use crate::state::Store;
use crate::supervisor::Link;
use crate::vmfile::tests::{desired, tap};
use crate::vmfile::{Desired, SharedDirectory};
use diarch_ipc::channel::{Channel, Receiver};
use diarch_ipc::frame::{Answer, ClientFrame, Hello, Outcome, ServerFrame};
use diarch_ipc::name::{RequestId, Tag};
use diarch_ipc::operation::{self, DeviceState, Example, ExitStatus, FunctionRecord, HostInventory, Reply, Request, VmRecord};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::mpsc;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(10);

/// The supervisor's side.
#[derive(Default)]
struct Desk {
    /// Each request by its operation and what it speaks of.
    asked: Vec<String>,
    refusals: HashMap<&'static str, VecDeque<Error>>,
    vm: Option<VmRecord>,
    qemu: Option<Qemu>,
    devices: Vec<DeviceRecord>,
    /// How long binding a device takes.
    pause: Option<Duration>,
}

/// In QEMU's place: `cat`, which ends in order when its input does.
struct Qemu {
    process: Child,
    power: Arc<Mutex<Option<ChildStdin>>>,
}

impl Qemu {
    fn start() -> Self {
        let mut process = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let power = Arc::new(Mutex::new(process.stdin.take()));
        Self { process, power }
    }

    fn handles(&self) -> Vec<OwnedFd> {
        let pid = rustix::process::Pid::from_child(&self.process);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let (theirs, mut monitor) = UnixStream::pair().unwrap();
        let button = Arc::clone(&self.power);
        std::thread::spawn(move || {
            monitor.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").unwrap();
            for line in BufReader::new(monitor.try_clone().unwrap()).lines().map_while(Result::ok) {
                let command: serde_json::Value = serde_json::from_str(&line).unwrap();
                let answer = serde_json::json!({"id": command["id"], "return": {"running": true, "status": "running"}});
                let _ = writeln!(monitor, "{answer}\r");
                if command["execute"] == "system_powerdown" {
                    button.lock().unwrap().take();
                }
            }
        });
        vec![pidfd, theirs.into()]
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.power.lock().unwrap().take();
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn bdf(text: &str) -> Bdf {
    Bdf::new(text).unwrap()
}

impl Desk {
    /// As the kernel would have it: functions of one slot of the bus are one group.
    fn group(function: &Bdf) -> Vec<Bdf> {
        let (slot, _) = function.as_str().split_once('.').unwrap();
        (0..2).map(|n| bdf(&format!("{slot}.{n}"))).collect()
    }

    fn device(&mut self, function: &Bdf) -> DeviceRecord {
        let group = Self::group(function);
        if !self.devices.iter().any(|record| functions(record) == group) {
            let example = operation::Bound::example().device;
            let known = |function: Bdf| FunctionRecord { function, ..example.functions[0].clone() };
            let vm = self.vm.as_ref().unwrap();
            let (slot, label) = (Some(vm.slot), Some(vm.label.clone()));
            self.devices.push(DeviceRecord { state: DeviceState::Bound, functions: group.iter().cloned().map(known).collect(), slot, label, ..example });
        }
        self.devices.iter().find(|record| functions(record) == group).cloned().unwrap()
    }

    fn look_after_qemu(&mut self) {
        let (Some(vm), Some(qemu)) = (&mut self.vm, &mut self.qemu) else { return };
        if let Ok(Some(status)) = qemu.process.try_wait() {
            use std::os::unix::process::ExitStatusExt;
            vm.exit = Some(status.code().map_or_else(|| ExitStatus::Signal(status.signal().unwrap()), ExitStatus::Code));
            vm.state = SlotState::Exited;
            self.qemu = None;
        }
    }

    fn answer(&mut self, id: RequestId, request: &Request, fds: usize) -> (Outcome, Vec<OwnedFd>) {
        self.look_after_qemu();
        let mut out = Vec::new();
        let detail = match request {
            Request::VfioBind(ask) => format!(" {}", ask.function),
            Request::VfioRelease(ask) => format!(" {}", ask.function),
            Request::VfioRecover(ask) => format!(" {}", ask.function),
            Request::MountAttach(ask) => format!(" {} {:?}", ask.share, ask.access),
            Request::MountDetach(ask) => format!(" {}", ask.share),
            Request::NetPublish(ask) => format!(" {}", ask.forwards[0].host_port),
            _ => String::new(),
        };
        let name = request.operation().name;
        if name != "host.inventory" {
            self.asked.push(format!("{name}{detail}"));
        }
        if let Some(error) = self.refusals.get_mut(name).and_then(VecDeque::pop_front) {
            return (Outcome::Error(error), out);
        }
        let reply = match request {
            Request::HostInventory(_) => Reply::HostInventory(HostInventory {
                vms: self.vm.iter().cloned().collect(),
                limits: operation::Limits { vms: 8, memory_mib: 1024, memory_mib_used: 0, cpus_each: 8 },
                devices: self.devices.clone(),
                ..HostInventory::example()
            }),
            Request::VmClaim(ask) => {
                let example = HostInventory::example().vms[0].clone();
                let vm = VmRecord { claim: id, label: ask.label.clone(), state: SlotState::Claimed, pid: None, exit: None, ..example };
                let tenancy = vm.tenancy();
                self.vm = Some(vm);
                Reply::VmClaim(operation::Claimed { tenancy, uid: 7 })
            }
            Request::VmRelease(_) => {
                (self.vm, self.qemu) = (None, None);
                self.devices.clear();
                Reply::VmRelease(operation::Released { existed: true })
            }
            Request::VmSpawn(ask) => {
                assert_eq!(ask.spec.fds().len(), fds);
                let qemu = Qemu::start();
                out = qemu.handles();
                let vm = self.vm.as_mut().unwrap();
                assert!(matches!(vm.state, SlotState::Claimed | SlotState::Exited), "{vm:?}");
                (vm.state, vm.pid, vm.spawned_ms) = (SlotState::Running, Some(1), Some(crate::journal::now_ms()));
                self.qemu = Some(qemu);
                Reply::VmSpawn(operation::Spawned { pid: 1, spawned_ms: crate::journal::now_ms() })
            }
            Request::VmAttach(_) => {
                out = self.qemu.as_ref().unwrap().handles();
                Reply::VmAttach(operation::Attached { pid: 1 })
            }
            Request::VfioBind(ask) => Reply::VfioBind(operation::Bound { device: self.device(&ask.function) }),
            Request::VfioRecover(ask) => Reply::VfioRecover(operation::Recovered { device: self.device(&ask.function) }),
            Request::VfioRelease(ask) => {
                let group = Self::group(&ask.function);
                self.devices.retain(|record| functions(record) != group);
                Reply::VfioRelease(operation::Unbound { existed: true })
            }
            other => Reply::examples().into_iter().zip(Request::examples()).find(|(_, example)| example.operation().name == other.operation().name).unwrap().0,
        };
        (Outcome::Ok(reply), out)
    }
}

/// A supervisor, and a worker's context that is connected to it.
struct Bench {
    desk: Arc<Mutex<Desk>>,
    context: Arc<Context>,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("supervisor.sock");
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&socket, 8).unwrap();
        let listener = tokio::net::UnixListener::from_std(socket.into()).unwrap();
        let desk = Arc::<Mutex<Desk>>::default();
        tokio::spawn(serve(listener, Arc::clone(&desk)));
        let config = Config { supervisor_socket: path, supervisor_uid: rustix::process::geteuid().as_raw(), ..Config::default() };
        let journal = Arc::new(Journal::default());
        let (link, _) = Link::start(&config, Arc::clone(&journal));
        let (store, logs) = (Store::open(&dir.path().join("state")).unwrap(), Logs::open(&dir.path().join("logs")).unwrap());
        let context = Arc::new(Context::new(link, journal, store, logs, mpsc::unbounded_channel().0));
        Self { desk, context, _dir: dir }
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap()
    }

    fn refuse(&self, operation: &'static str, error: Error) {
        self.desk().refusals.entry(operation).or_default().push_back(error);
    }

    /// What was asked since the last look.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.desk().asked)
    }

    fn start(&self, vm: Desired, found: Option<Found>) -> Handle {
        let intent = Intent { desired: Some(Arc::new(vm.clone())), want: Want::Run, starts: 1, restarts: 0, recovers: 0, why: "a test".into() };
        Handle::start(Arc::clone(&self.context), vm.name, intent, found)
    }
}

async fn serve(listener: tokio::net::UnixListener, desk: Arc<Mutex<Desk>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let desk = Arc::clone(&desk);
        tokio::spawn(async move {
            let channel = Channel::from_fd(stream.into_std().unwrap().into()).unwrap();
            let mut receiver = Receiver::default();
            while let Ok((frame, fds)) = channel.receive::<ClientFrame>(&mut receiver).await {
                let (frame, out) = match frame {
                    ClientFrame::Hello(_) => (ServerFrame::Hello(Hello::ours()), Vec::new()),
                    ClientFrame::Call(call) => {
                        let (outcome, out) = desk.lock().unwrap().answer(call.id, &call.request, fds.len());
                        let pause = desk.lock().unwrap().pause.filter(|_| matches!(call.request, Request::VfioBind(_)));
                        sleep(pause.unwrap_or_default()).await;
                        (ServerFrame::Answer(Answer { id: call.id, outcome }), out)
                    }
                };
                let out: Vec<_> = out.iter().map(std::os::fd::AsFd::as_fd).collect();
                if channel.send(&frame, &out).await.is_err() {
                    return;
                }
            }
        });
    }
}

async fn wait(handle: &Handle, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
    let mut status = handle.status();
    let found = timeout(SOON, status.wait_for(|status| wanted(status))).await.map(|status| status.unwrap().clone());
    found.unwrap_or_else(|_| panic!("not {what}: {:?}", handle.status().borrow()))
}

async fn healthy(handle: &Handle) -> Status {
    wait(handle, "healthy", |status| status.phase == Phase::Healthy).await
}

/// A VM whose kernel is a file, which nobody boots.
fn plain() -> Desired {
    let mut vm = desired("web");
    vm.machine.kernel = Some(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml").into());
    vm
}

/// A VM with all that there is to ask for.
fn whole() -> Desired {
    let mut vm = plain();
    vm.machine.devices = vec![bdf("0000:65:00.0"), bdf("0000:66:00.0")];
    let share = |name: &str, access| SharedDirectory { share: ShareName::new(name).unwrap(), tag: Tag::new(name).unwrap(), access };
    vm.machine.shares = vec![share("models", DiskAccess::ReadOnly), share("scratch", DiskAccess::ReadWrite)];
    vm.machine.tap = Some(tap());
    vm
}

const EQUIPPED: [&str; 7] = [
    "vfio.bind 0000:65:00.0",
    "vfio.bind 0000:66:00.0",
    "mount.attach models ReadOnly",
    "mount.attach scratch ReadWrite",
    "tap.open",
    "net.publish 443",
    "vm.spawn",
];

fn conflict() -> Error {
    Error::Conflict { holder: "db".into(), reason: "the group is bound for it".into() }
}

#[tokio::test]
async fn a_vm_is_equipped_between_its_claim_and_its_spawn() {
    let bench = Bench::new();
    let handle = bench.start(whole(), None);
    let status = healthy(&handle).await;
    assert_eq!(bench.asked(), [&["vm.claim"], &EQUIPPED[..]].concat());
    assert_eq!(status.tap.unwrap().name, operation::TapOpened::example().name);
    handle.intend(|intent| intent.want = Want::Stop);
    wait(&handle, "at rest", |status| status.at_rest).await;
    assert_eq!(bench.asked(), ["vm.release"]);
}

#[tokio::test]
async fn a_vm_without_equipment_asks_for_none() {
    let bench = Bench::new();
    healthy(&bench.start(plain(), None)).await;
    assert_eq!(bench.asked(), ["vm.claim", "vm.spawn"]);
}

#[tokio::test]
async fn a_device_that_another_vm_holds_is_told_with_its_holder_and_all_is_given_back() {
    for (operation, what) in [("vfio.bind", "device 0000:65:00.0"), ("mount.attach", "share models"), ("net.publish", "its published ports"), ("vm.spawn", "")]
    {
        let bench = Bench::new();
        let refusal = if operation == "vm.spawn" { Error::denied("vms.memory_mib", "too much") } else { conflict() };
        if operation == "mount.attach" {
            bench.refuse(operation, conflict());
        }
        bench.refuse(operation, refusal.clone());
        let handle = bench.start(whole(), None);
        let status = wait(&handle, "refused", |status| status.phase == Phase::Failed && status.retry_ms.is_some()).await;
        let separator = if what.is_empty() { "" } else { ": " };
        assert_eq!(status.reason.unwrap(), format!("{what}{separator}{refusal}"));
        let asked = bench.asked();
        assert_eq!((asked.last().unwrap().as_str(), status.tenancy), ("vm.release", None), "{asked:?}");
        assert!(asked[asked.len() - 2].starts_with(operation) && (operation == "vm.spawn" || !asked.contains(&"vm.spawn".to_owned())), "{asked:?}");
        // An operator's start tries again, from the claim on.
        handle.intend(|intent| intent.starts += 1);
        healthy(&handle).await;
        assert_eq!(bench.asked(), [&["vm.claim"], &EQUIPPED[..]].concat());
    }
}

#[tokio::test]
async fn after_a_crash_the_devices_are_reset_and_a_tap_that_lingers_is_waited_for() {
    let bench = Bench::new();
    let handle = bench.start(whole(), None);
    let first = healthy(&handle).await;
    bench.asked();
    bench.refuse("tap.open", Error::Conflict { holder: "web".into(), reason: "its last QEMU is not gone yet".into() });
    bench.refuse("tap.open", Error::Failed { step: "TUNSETIFF".into(), errno: Some(EBUSY), detail: "busy".into() });
    bench.desk().qemu.as_mut().unwrap().process.kill().unwrap();
    wait(&handle, "restarted", |status| status.restarts == 1 && status.phase == Phase::Healthy).await;
    let mut expected = vec!["vfio.recover 0000:65:00.0", "vfio.recover 0000:66:00.0"];
    expected.extend(EQUIPPED.iter().take(4));
    expected.extend(["tap.open"; 3]);
    expected.extend(EQUIPPED.iter().skip(5));
    assert_eq!(bench.asked(), expected);
    // The slot is the same one. An end in order leaves nothing to be reset.
    assert_eq!(handle.status().borrow().tenancy, first.tenancy);
    handle.intend(|intent| intent.restarts += 1);
    wait(&handle, "restarted", |status| status.seen_restarts == 1 && status.phase == Phase::Healthy).await;
    assert_eq!(bench.asked(), EQUIPPED);
}

#[tokio::test]
async fn what_a_changed_file_names_no_more_is_given_back_and_a_group_goes_as_a_whole() {
    let bench = Bench::new();
    let mut vm = whole();
    vm.machine.devices.push(bdf("0000:65:00.1"));
    let handle = bench.start(vm.clone(), None);
    healthy(&handle).await;
    bench.asked();
    // 65:00.1 stays, and so its group with 65:00.0 does.
    vm.revision = "new".into();
    vm.machine.devices = vec![bdf("0000:65:00.1")];
    vm.machine.shares[0].access = DiskAccess::ReadWrite;
    vm.machine.shares.truncate(1);
    vm.machine.tap = None;
    handle.intend(|intent| (intent.desired, intent.restarts) = (Some(Arc::new(vm)), 1));
    let status = wait(&handle, "restarted", |status| status.seen_restarts == 1 && status.phase == Phase::Healthy).await;
    let expected = [
        "vfio.release 0000:66:00.0",
        "mount.detach models",
        "mount.detach scratch",
        "net.withdraw",
        "vfio.bind 0000:65:00.1",
        "mount.attach models ReadWrite",
        "vm.spawn",
    ];
    assert_eq!(bench.asked(), expected);
    assert_eq!(status.tap, None);
}

#[tokio::test]
async fn the_next_worker_asks_for_the_same_and_finds_what_was_taken() {
    let bench = Bench::new();
    let claim = bench.context.link.claim(&desired("web").name).await.unwrap();
    bench.context.link.bind(claim, &bdf("0000:67:00.0")).await.unwrap();
    let record = bench.context.link.inventory().await.unwrap().remove(0);
    bench.asked();
    // It died before anything was spawned, and so left no record; the file has changed since.
    let handle = bench.start(whole(), Some(Found { record, machine: None, tap: None, file: None }));
    let status = healthy(&handle).await;
    assert_eq!(bench.asked(), [&["vfio.release 0000:67:00.0"], &EQUIPPED[..]].concat());
    assert_eq!(status.tenancy, Some(claim));
}

#[tokio::test]
async fn a_worker_that_takes_over_a_vm_that_runs_knows_what_it_has() {
    let bench = Bench::new();
    let first = bench.start(whole(), None);
    let before = healthy(&first).await;
    drop(first);
    bench.asked();
    let record = bench.context.link.inventory().await.unwrap().remove(0);
    let started = bench.context.store.started(&whole().name).unwrap();
    assert_eq!(started.tap, before.tap);
    let next = bench.start(whole(), Some(Found { record, machine: Some(started.machine), tap: started.tap, file: Some(started.file) }));
    assert_eq!(healthy(&next).await.tap, before.tap);
    assert_eq!(bench.asked(), ["vm.attach"]);
    let bare = Desired { revision: "new".into(), ..plain() };
    next.intend(|intent| (intent.desired, intent.restarts) = (Some(Arc::new(bare)), 1));
    wait(&next, "restarted", |status| status.seen_restarts == 1 && status.phase == Phase::Healthy).await;
    let expected = ["vfio.release 0000:65:00.0", "vfio.release 0000:66:00.0", "mount.detach models", "mount.detach scratch", "net.withdraw", "vm.spawn"];
    assert_eq!(bench.asked(), expected);
}

#[tokio::test]
async fn a_share_that_the_worker_before_attached_otherwise_is_attached_anew() {
    let bench = Bench::new();
    bench.refuse("mount.attach", Error::Conflict { holder: "web".into(), reason: "it has models attached read-write; detach it first".into() });
    healthy(&bench.start(whole(), None)).await;
    let mut expected = vec!["vm.claim"];
    expected.extend(&EQUIPPED[..3]);
    expected.push("mount.detach models");
    expected.extend(&EQUIPPED[2..]);
    assert_eq!(bench.asked(), expected);
}

#[tokio::test]
async fn a_slot_or_a_device_that_is_busy_for_a_moment_is_asked_again_at_once() {
    for state in ["running", "attached"] {
        let bench = Bench::new();
        bench.refuse("vfio.bind", Error::WrongState { state: state.into(), reason: "not yet".into() });
        let status = healthy(&bench.start(whole(), None)).await;
        assert_eq!(status.restarts, 1);
        assert_eq!(bench.asked(), [&["vm.claim", "vfio.bind 0000:65:00.0"], &EQUIPPED[..]].concat(), "{state}");
    }
}

#[tokio::test]
async fn a_stop_does_not_wait_for_all_devices() {
    let bench = Bench::new();
    bench.desk().pause = Some(Duration::from_millis(300));
    let handle = bench.start(whole(), None);
    wait(&handle, "binding", |status| status.reason.as_ref().is_some_and(|reason| reason.contains("0000:65:00.0"))).await;
    handle.intend(|intent| (intent.want, intent.why) = (Want::Stop, "stopped by a test".into()));
    let status = wait(&handle, "at rest", |status| status.at_rest).await;
    assert_eq!(status.reason.as_deref(), Some("stopped by a test"));
    assert_eq!(bench.asked(), ["vm.claim", "vfio.bind 0000:65:00.0", "vm.release"]);
}

#[tokio::test]
async fn a_device_is_reset_when_an_operator_says_so_and_only_once() {
    let bench = Bench::new();
    let handle = bench.start(whole(), None);
    healthy(&handle).await;
    bench.asked();
    handle.intend(|intent| (intent.restarts, intent.recovers) = (1, 1));
    wait(&handle, "restarted", |status| status.seen_restarts == 1 && status.phase == Phase::Healthy).await;
    assert_eq!(bench.asked(), [&["vfio.recover 0000:65:00.0", "vfio.recover 0000:66:00.0"], &EQUIPPED[..]].concat());
    handle.intend(|intent| intent.restarts = 2);
    wait(&handle, "restarted", |status| status.seen_restarts == 2 && status.phase == Phase::Healthy).await;
    assert_eq!(bench.asked(), EQUIPPED);
    // Of a VM that is down: what is not ours yet can't be reset, and binding it says why.
    handle.intend(|intent| intent.want = Want::Stop);
    wait(&handle, "at rest", |status| status.at_rest).await;
    bench.asked();
    let wrong = Error::WrongState { state: "quarantined".into(), reason: "it does not answer".into() };
    bench.refuse("vfio.recover", Error::NotFound { what: "the device".into() });
    bench.refuse("vfio.bind", wrong.clone());
    handle.intend(|intent| (intent.want, intent.starts, intent.recovers) = (Want::Run, 2, 2));
    let status = wait(&handle, "refused", |status| status.phase == Phase::Failed && status.retry_ms.is_some()).await;
    assert_eq!(status.reason.unwrap(), format!("device 0000:65:00.0: {wrong}; 'diarch device recover 0000:65:00.0' tries to reset it"));
}

#[tokio::test]
async fn a_slot_that_is_gone_is_claimed_anew() {
    let bench = Bench::new();
    let claim = bench.context.link.claim(&desired("web").name).await.unwrap();
    let record = bench.context.link.inventory().await.unwrap().remove(0);
    bench.desk().vm = None;
    bench.asked();
    bench.refuse("vfio.bind", Error::NotFound { what: format!("slot {}", claim.slot) });
    let handle = bench.start(whole(), Some(Found { record, machine: None, tap: None, file: None }));
    healthy(&handle).await;
    assert_eq!(bench.asked(), [&["vfio.bind 0000:65:00.0", "vm.claim"], &EQUIPPED[..]].concat());
}

#[tokio::test]
async fn a_listening_port_and_a_granted_socket_come_as_descriptors() {
    let bench = Bench::new();
    let (protocol, port) = (diarch_ipc::name::Protocol::Tcp, diarch_ipc::name::Port::new(80).unwrap());
    let address = diarch_ipc::name::IpText(std::net::Ipv4Addr::LOCALHOST.into());
    // This supervisor forgets the descriptor, which is no panic.
    let error = bench.context.link.listen(protocol, address, port).await.unwrap_err();
    assert!(error.to_string().contains("without its file descriptors"), "{error}");
    bench.refuse("socket.connect", Error::denied("sockets", "no socket of this name"));
    let error = bench.context.link.connect_socket(&diarch_ipc::name::SocketName::new("downloader").unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), "denied");
}

#[test]
fn what_is_found_is_what_the_record_and_the_supervisor_know() {
    let machine = whole().machine;
    let mut record = operation::Bound::example().device;
    let slot = record.slot.unwrap();
    record.functions.push(FunctionRecord { function: bdf("0000:65:00.1"), ..record.functions[0].clone() });
    let stray = DeviceRecord { functions: vec![FunctionRecord { function: bdf("0000:01:00.0"), ..record.functions[0].clone() }], ..record.clone() };
    let others = DeviceRecord { slot: None, label: None, ..stray.clone() };
    let found = Equipment::found(slot, Some(&machine), &[record.clone(), stray]);
    assert_eq!(found.devices.keys().map(Bdf::as_str).collect::<Vec<_>>(), ["0000:01:00.0", "0000:65:00.0", "0000:66:00.0"]);
    assert_eq!(found.devices[&bdf("0000:65:00.0")], functions(&record));
    assert!(found.published && found.shares.len() == 2 && !found.dirty);
    assert_eq!(found.unwanted_devices(&machine), [bdf("0000:01:00.0")]);
    assert_eq!(Equipment::found(slot, None, &[others]), Equipment::default());
}
