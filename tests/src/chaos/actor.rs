//! Does what a plan says, in the worker's place, and remembers what must be so afterwards.

use super::enclosure::Troupe;
use super::kernel::{self, Process, processes};
use super::ledger::{Companion, Ledger};
use super::plan::{Ask, Cast, Claim, FUNCTIONS, Fault, GROUPS, LASTING, Shares, Step, Succession, Then, Victim, WORDS, label};
use crate::host::{Asked, Host, Qemu, Session, WORKER};
use crate::stage::Stage;
use crate::stand_in::{self, Unit};
use crate::stepper::{self, kill_at_syscall};
use crate::wire::{Hostile, Raw, Received};
use diarch_ipc::Error;
use diarch_ipc::client::State;
use diarch_ipc::frame::{Outcome, ServerFrame};
use diarch_ipc::name::{
    BadName, Bdf, Forward, IpText, Label, Mac, MiB, NetworkName, NicIndex, Port, Protocol, QemuName, Queues, RequestId, ShareName, SocketName, Tag, Tenancy,
};
use diarch_ipc::operation::{self, HostInventory, Reply, Request, SlotState, VmRecord};
use diarch_ipc::spec::{Backend, Nic, Share, VmSpec};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// What a test's client gives a supervisor that is killed again and again.
const RESTARTS: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(9)];

/// For a supervisor that was killed, to serve again.
const PATIENCE: Duration = Duration::from_secs(10);

/// Half of what a step of a device may take.
const TRACED_SLOWLY: Duration = Duration::from_secs(super::enclosure::STEP_SECONDS as u64 / 2);
/// What is hunted is made by then.
const HUNT: Duration = Duration::from_millis(400);
/// A kernel that halts at its first instruction, in the host's directory.
pub const HALTING: &str = "files/halting";
/// Vendor and device of the functions, as the stage has them.
const IDS: [(u16, u16); 3] = [(0x10de, 0x2330), (0x10de, 0x2330), (0x10de, 0x22bb)];
/// The first host port of user-mode cards, and how many a name has.
const FORWARDED: u64 = 3000;
const FORWARDED_EACH: u64 = 10;

/// A question that nobody has waited for yet.
struct UnderWay {
    name: usize,
    request: Request,
    lasting: bool,
    asked: Asked,
    /// The supervisor's start in which it was asked.
    start: u64,
}

/// A tap as it was opened.
struct Opened {
    mac: Mac,
    queues: Queues,
    /// The start of the supervisor that holds it, if no VM was given it since: it goes with that.
    held_by: Option<u64>,
}

/// What the worker knows of a name.
#[derive(Debug, Clone, Default)]
struct Known {
    tenancy: Option<Tenancy>,
    former: Option<Tenancy>,
}

/// What must be so when all is settled.
#[derive(Debug, Default)]
struct Expected {
    /// Claimed, and no release of it was asked for.
    held: BTreeSet<Tenancy>,
    /// Released, by the supervisor's own word.
    gone: BTreeSet<Tenancy>,
    /// Running, and nobody's victim.
    alive: BTreeMap<Tenancy, u32>,
    /// VMs that were asked or made to end in this round: whether they run is anybody's guess.
    touched: BTreeSet<Tenancy>,
    /// Cards of which a tap may be made or taken yet, by what nobody hears the answer to.
    astray: BTreeSet<(Tenancy, u16)>,
}

pub struct Actor<'a> {
    host: &'a Host,
    session: Option<Session>,
    /// Replaced, and still there.
    rival: Option<Session>,
    names: BTreeMap<usize, Known>,
    under_way: Vec<UnderWay>,
    expected: Expected,
    /// Taps that were opened, by their slot and card.
    taps: BTreeMap<(Tenancy, u16), Opened>,
    /// Devices that are bound for a VM, as far as we were told.
    devices: BTreeMap<Tenancy, BTreeSet<Bdf>>,
    /// Mounts that a VM has, as far as we were told.
    mounts: BTreeMap<Tenancy, BTreeSet<ShareName>>,
    stage: &'a Stage,
    troupe: Troupe,
    /// Since when the supervisor goes in steps.
    traced: Option<Instant>,
    /// What the kernel does wrong now.
    faults: Vec<Fault>,
    /// Groups to which that was done since all was released: a quarantine of theirs is explained.
    pub troubled: BTreeSet<u64>,
    /// Processes that were killed: (number, start time).
    pub killed: BTreeSet<(i64, u64)>,
    hostile: Vec<Hostile>,
    /// What answers said that no supervisor should say.
    wrong: Vec<String>,
    /// The answers of this round, as they were taken note of.
    pub heard: Vec<String>,
    /// How often each operation was answered how.
    pub answers: BTreeMap<String, u64>,
    /// How many of whom were killed.
    pub kills: BTreeMap<&'static str, u64>,
    /// How often the kernel did what wrong.
    pub done_wrong: BTreeMap<&'static str, u64>,
}

impl<'a> Actor<'a> {
    pub fn new(host: &'a Host, stage: &'a Stage, troupe: Troupe) -> Self {
        Self {
            host,
            stage,
            troupe,
            traced: None,
            faults: Vec::new(),
            troubled: BTreeSet::new(),
            killed: BTreeSet::new(),
            mounts: BTreeMap::new(),
            session: None,
            rival: None,
            names: BTreeMap::new(),
            under_way: Vec::new(),
            expected: Expected::default(),
            taps: BTreeMap::new(),
            devices: BTreeMap::new(),
            hostile: crate::wire::hostile_frames(),
            wrong: Vec::new(),
            heard: Vec::new(),
            answers: BTreeMap::new(),
            kills: BTreeMap::new(),
            done_wrong: BTreeMap::new(),
        }
    }

    fn session(&mut self) -> &Session {
        let host = self.host;
        self.session.get_or_insert_with(|| host.session_with(|settings| diarch_ipc::client::Settings { restarts: RESTARTS.to_vec(), ..settings }))
    }

    pub fn step(&mut self, step: &Step) {
        match *step {
            Step::Ask { name, ask, claim, then } => self.ask(name, ask, claim, then),
            Step::Cut { name, ask, at } => self.cut(name, ask, at),
            Step::Hunt { name, ask, nth, micros } => self.hunt(name, ask, nth, Duration::from_micros(micros)),
            Step::Twice { name, killed } => self.twice(name, killed),
            Step::Kill(victim) => self.kill(victim),
            Step::Fault(fault) => self.fault(fault),
            Step::Succeed(how) => self.succeed(how),
            Step::Frame { which } => {
                if let Ok(raw) = Raw::connect_as(&self.host.socket(), WORKER) {
                    let _ = raw.send(&self.hostile[which % self.hostile.len()].bytes, &[]);
                }
            }
            Step::Pause { micros } => std::thread::sleep(Duration::from_micros(micros)),
        }
    }

    // ---- questions ----

    fn ask(&mut self, name: usize, ask: Ask, claim: Claim, then: Then) {
        let under_way = self.begin(name, ask, claim);
        match then {
            Then::Wait => self.finish(under_way),
            Then::GoOn => self.under_way.push(under_way),
        }
    }

    /// The supervisor dies at one chosen system call of its own: in windows that no chance kill meets.
    fn cut(&mut self, name: usize, ask: Ask, at: u64) {
        let Some(pid) = self.host.manager().unit(Unit::Supervisor).pid else { return self.ask(name, ask, Claim::Own, Then::Wait) };
        let mut answered = false;
        self.traced = Some(Instant::now());
        let outcome = kill_at_syscall(pid, at, || {
            answered = true;
            self.ask(name, ask, Claim::Own, Then::Wait);
        });
        if self.is_slow() {
            // To the supervisor the device was.
            self.troubled.extend(GROUPS);
        }
        self.traced = None;
        match outcome {
            Ok((stepper::Outcome::Killed { .. }, ())) => self.count("supervisor, at a system call"),
            Ok(_) => {}
            // Dying since a moment before, it can't be traced; what was to be asked then is asked nevertheless.
            Err(_) if !answered => self.ask(name, ask, Claim::Own, Then::Wait),
            Err(_) => {}
        }
    }

    /// On a busy machine a process that is traced takes seconds over what takes it milliseconds.
    fn is_slow(&self) -> bool {
        self.traced.is_some_and(|since| since.elapsed() > TRACED_SLOWLY)
    }

    /// Kills the so many-th process that the supervisor makes for this, whatever it is.
    fn hunt(&mut self, name: usize, ask: Ask, nth: usize, after: Duration) {
        let before = kernel::numbers();
        // What dies may be what was asked for.
        let under_way = self.begin(name, ask, Claim::Own);
        self.touch_what_is_under_way();
        if let Some(tenancy) = under_way.request.tenancy() {
            self.touch(tenancy);
        }
        // A jail is at its gate for a millisecond: only numbers are looked at.
        let (until, mut seen) = (Instant::now() + HUNT, Vec::new());
        while seen.len() <= nth && Instant::now() < until && !under_way.asked.is_answered() {
            for pid in kernel::numbers() {
                if !before.contains(&pid) && !seen.contains(&pid) {
                    seen.push(pid);
                }
            }
        }
        // It may be another supervisor, whom the manager started: no child, and killed often enough.
        if let Some(prey) = seen.get(nth).and_then(|pid| kernel::process(*pid)).filter(|prey| !self.own().contains(&prey.pid)) {
            std::thread::sleep(after);
            self.end(&prey);
        }
        self.finish(under_way);
    }

    /// What a VM has beside its QEMU, and which QEMU it is.
    fn cast(&mut self, name: usize, tenancy: Tenancy, cast: Cast, spec: &mut VmSpec, fds: &mut [OwnedFd]) {
        for card in 0..cast.cards {
            let number = spec.nics.len() as u64;
            let forward = Forward {
                protocol: Protocol::Tcp,
                host_address: IpText([127, 0, 0, 1].into()),
                host_port: of(Port::new(FORWARDED + name as u64 * FORWARDED_EACH + card)),
                guest_port: of(Port::new(80)),
            };
            let mac = of(Mac::new(format!("52:54:00:01:{name:02x}:{number:02x}")));
            spec.nics.push(Nic { mac, backend: Backend::User { egress: cast.egress, forwards: vec![forward] } });
        }
        let real = cast.qemu == Qemu::Real && self.troupe.qemu;
        // A QEMU waits for what a virtiofsd says, and the stub says nothing.
        if cast.shares == Shares::Attached && (!real || self.troupe.virtiofsd) {
            let shares = self.mounts.get(&tenancy).into_iter().flatten();
            spec.shares.extend(shares.map(|share| Share { share: share.clone(), tag: of(Tag::new(share.as_str())) }));
        }
        if real {
            spec.qemu = of(QemuName::new("real"));
            spec.memory = of(MiB::new(64));
            // There is no such device but on the stage.
            spec.devices.clear();
            // Behind the two logs.
            fds[2] = std::fs::File::open(self.host.path(HALTING)).expect("it was written at the start").into();
        }
    }

    fn begin(&mut self, name: usize, ask: Ask, claim: Claim) -> UnderWay {
        let known = self.names.entry(name).or_default().clone();
        let forged = RequestId { session: 0xf0f0, serial: name as u64 };
        let first_slot = || diarch_ipc::name::Slot::new(0).expect("in range");
        let tenancy = match claim {
            Claim::Own => known.tenancy,
            Claim::Former => known.former,
            Claim::Forged => known.tenancy.map(|tenancy| Tenancy { claim: forged, ..tenancy }),
        };
        let tenancy = tenancy.unwrap_or(Tenancy { slot: first_slot(), claim: forged });
        let mut fds = Vec::new();
        let request = match ask {
            Ask::Inventory => Request::HostInventory(operation::Inventory { after: None }),
            Ask::Claim => Request::VmClaim(operation::Claim { label: Label::new(label(name)).expect("a label") }),
            Ask::Spawn { words, cast } => {
                let (mut spec, files) = self.host.spec(WORDS[words]);
                fds = files;
                // Whether it is held still or must be made anew is the supervisor's affair.
                if let Some(tap) = self.taps.get(&(tenancy, 0)) {
                    spec.nics.push(Nic { mac: tap.mac.clone(), backend: Backend::Tap { queues: tap.queues } });
                }
                // All that are held go to the VM with it, or away.
                self.taps.iter_mut().filter(|((of, _), _)| *of == tenancy).for_each(|(_, tap)| tap.held_by = None);
                let opening = self.under_way.iter().filter_map(|other| if let Request::TapOpen(open) = &other.request { Some(open) } else { None });
                let cards: Vec<_> = opening.filter(|open| open.tenancy == tenancy).map(|open| (tenancy, open.nic.get())).collect();
                self.expected.astray.extend(cards);
                spec.devices.extend(self.devices.get(&tenancy).into_iter().flatten().cloned());
                self.cast(name, tenancy, cast, &mut spec, &mut fds);
                Request::VmSpawn(operation::Spawn { tenancy, spec })
            }
            Ask::Attach => Request::VmAttach(operation::Attach { tenancy }),
            Ask::Console => Request::VmConsole(operation::Console { tenancy }),
            Ask::Signal(signal) => Request::VmSignal(operation::Signal { tenancy, signal }),
            Ask::Release => Request::VmRelease(operation::Release { tenancy }),
            Ask::OpenTap { nic, network, queues } => Request::TapOpen(operation::OpenTap {
                tenancy,
                nic: of(NicIndex::new(nic)),
                network: of(NetworkName::new(network)),
                mac: of(Mac::new(format!("52:54:00:00:{name:02x}:{nic:02x}"))),
                address: (network == "bridged").then(|| IpText([192, 0, 2, 10 + 2 * name as u8 + nic as u8].into())),
                queues: of(Queues::new(queues)),
            }),
            Ask::Publish { nic, first, count } => {
                let forward = |n: u64| Forward {
                    protocol: Protocol::Tcp,
                    host_address: IpText(super::enclosure::ADDRESS.into()),
                    host_port: of(Port::new(2000 + n)),
                    guest_port: of(Port::new(80)),
                };
                Request::NetPublish(operation::Publish { tenancy, nic: of(NicIndex::new(nic)), forwards: (first..first + count).map(forward).collect() })
            }
            Ask::Withdraw => Request::NetWithdraw(operation::Withdraw { tenancy }),
            Ask::Listen { port } => {
                Request::PortListen(operation::Listen { protocol: Protocol::Tcp, address: IpText(super::enclosure::ADDRESS.into()), port: of(Port::new(port)) })
            }
            Ask::AttachMount { share, access } => Request::MountAttach(operation::AttachMount { tenancy, share: of(ShareName::new(share)), access }),
            Ask::DetachMount { share } => Request::MountDetach(operation::DetachMount { tenancy, share: of(ShareName::new(share)) }),
            Ask::Connect => Request::SocketConnect(operation::ConnectSocket { socket: of(SocketName::new(super::plan::SOCKET)) }),
            Ask::Bind { function } => Request::VfioBind(operation::Bind { tenancy, function: of(Bdf::new(function)) }),
            Ask::Unbind { function } => Request::VfioRelease(operation::Unbind { tenancy, function: of(Bdf::new(function)) }),
            Ask::Recover { function } => Request::VfioRecover(operation::Recover { tenancy, function: of(Bdf::new(function)) }),
        };
        if matches!(ask, Ask::Signal(_) | Ask::Release) {
            self.touch(tenancy);
        }
        if ask == Ask::Release {
            self.expected.held.remove(&tenancy);
        }
        if let Request::VfioRelease(unbind) = &request {
            self.devices.remove(&unbind.tenancy);
        }
        if let Request::MountDetach(detach) = &request {
            self.mounts.entry(detach.tenancy).or_default().remove(&detach.share);
        }
        if let Request::TapOpen(open) = &request {
            // The one before it goes, whatever becomes of this.
            let card = (open.tenancy, open.nic.get());
            self.taps.remove(&card);
            // Two at once: asked again after a death, either may be the later one. And a start takes it.
            let same = |other: &UnderWay| match &other.request {
                Request::TapOpen(other) => (other.tenancy, other.nic.get()) == card,
                Request::VmSpawn(other) => other.tenancy == card.0,
                _ => false,
            };
            if self.under_way.iter().any(same) {
                self.expected.astray.insert(card);
            }
        }
        let lasting = matches!(ask, Ask::Spawn { words, .. } if words < LASTING);
        let start = self.host.manager().unit(Unit::Supervisor).starts;
        let asked = self.session().begin(request.clone(), fds);
        UnderWay { name, request, lasting, asked, start }
    }

    fn finish(&mut self, under_way: UnderWay) {
        let UnderWay { name, request, lasting, asked, start } = under_way;
        // The session that asked may be gone by now, and its questions with it.
        let Some(answered) = asked.answer() else { return self.forget(&request) };
        let operation = request.operation().name;
        let kind = match &answered {
            Ok(_) => "ok".to_owned(),
            // Which step failed is worth a line of its own.
            Err(error @ Error::Failed { .. }) => error.to_string(),
            Err(error) => error.kind().to_owned(),
        };
        *self.answers.entry(format!("{operation}: {kind}")).or_insert(0) += 1;
        let told = match &answered {
            Ok((Reply::HostInventory(_), _)) => "an inventory".to_owned(),
            Ok((reply, _)) => format!("{reply:?}"),
            Err(error) => error.to_string(),
        };
        self.heard.push(format!("{operation} of {}: {told}", label(name)));
        match answered {
            Ok((reply, fds)) => self.believe(name, &request, &reply, &fds, lasting, start),
            Err(Error::Superseded) => self.forget(&request),
            // A device that hangs, or seems to.
            Err(Error::Timeout { .. }) if operation.starts_with("vfio.") && self.is_slow() => {}
            Err(Error::Timeout { .. }) if self.faults.iter().any(|fault| matches!(fault, Fault::Hang { .. })) => {}
            Err(error @ (Error::Timeout { .. } | Error::Exhausted { retry_after_ms: Some(_), .. })) => {
                self.wrong.push(format!("{operation} of {}: {error}", label(name)))
            }
            // A panic, a lost answer, a supervisor that could not be reached.
            Err(Error::Failed { step, detail, .. }) if ["dispatch", "connect", "answer"].contains(&&*step) => {
                self.wrong.push(format!("{operation} of {}: failed in {step}: {detail}", label(name)));
            }
            Err(_) => {}
        }
    }

    fn believe(&mut self, name: usize, request: &Request, reply: &Reply, fds: &[OwnedFd], lasting: bool, start: u64) {
        let row = request.operation();
        let expected = row.fds_out.iter().filter(|name| !name.ends_with('?')).count();
        let most = expected + row.fds_out.iter().filter(|name| name.ends_with('?')).count();
        if !(expected..=most).contains(&fds.len()) {
            self.wrong.push(format!("{} of {} came with {} descriptors in place of {expected}", row.name, label(name), fds.len()));
        }
        match (request, reply) {
            (_, Reply::VmClaim(claimed)) => self.claimed(name, claimed.tenancy),
            (Request::VmRelease(ask), Reply::VmRelease(_)) => {
                self.expected.gone.insert(ask.tenancy);
            }
            (Request::VmSpawn(ask), Reply::VmSpawn(spawned)) if lasting && !self.expected.touched.contains(&ask.tenancy) => {
                self.expected.alive.insert(ask.tenancy, spawned.pid);
            }
            (Request::VfioBind(ask), Reply::VfioBind(_)) => {
                self.devices.entry(ask.tenancy).or_default().insert(ask.function.clone());
            }
            (Request::MountAttach(ask), Reply::MountAttach(_)) => {
                self.mounts.entry(ask.tenancy).or_default().insert(ask.share.clone());
            }
            // Held: until a VM gets it, its slot is released, or this supervisor dies.
            (Request::TapOpen(ask), Reply::TapOpen(_)) => {
                let card = (ask.tenancy, ask.nic.get());
                let held_by = (!self.expected.astray.contains(&card)).then_some(start);
                self.taps.insert(card, Opened { mac: ask.mac.clone(), queues: ask.queues, held_by });
            }
            _ => {}
        }
    }

    fn claimed(&mut self, name: usize, tenancy: Tenancy) {
        let known = self.names.entry(name).or_default();
        if known.tenancy != Some(tenancy) {
            known.former = known.tenancy.replace(tenancy);
            self.expected.held.insert(tenancy);
        }
    }

    fn touch(&mut self, tenancy: Tenancy) {
        self.expected.touched.insert(tenancy);
        self.expected.alive.remove(&tenancy);
    }

    /// One id means one request: what it is answered is the same, whoever answers.
    fn twice(&mut self, name: usize, killed: bool) {
        self.succeed(Succession::Death);
        let request = Request::VmClaim(operation::Claim { label: Label::new(label(name)).expect("a label") });
        let mut session = [0u8; 8];
        let _ = rustix::rand::getrandom(&mut session, rustix::rand::GetRandomFlags::empty());
        let id = RequestId { session: u64::from_ne_bytes(session), serial: 1 };
        let Some(first) = self.by_hand(id, &request) else { return };
        if killed {
            self.kill(Victim::Supervisor);
        }
        let Some(second) = self.by_hand(id, &request) else { return };
        match (first, second) {
            (Outcome::Ok(one), second) if second != Outcome::Ok(one.clone()) => {
                self.wrong.push(format!("asked twice under one id, {} was answered {one:?} and {second:?}", label(name)));
            }
            // A refusal may have passed: the name's release was under way.
            (_, Outcome::Ok(Reply::VmClaim(claimed))) => self.claimed(name, claimed.tenancy),
            _ => {}
        }
    }

    /// Asks on a connection of its own until it is answered, whoever is just dying or starting there.
    fn by_hand(&mut self, id: RequestId, request: &Request) -> Option<Outcome> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Ok(mut raw) = Raw::connect_as(&self.host.socket(), WORKER)
                && matches!(raw.hello(), Received::Frame(frame, _) if matches!(*frame, ServerFrame::Hello(_)))
                && let Ok((outcome, _)) = raw.ask_as(id, request.clone(), &[])
            {
                return Some(outcome);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.wrong.push(format!("{} was not answered within {PATIENCE:?}", request.operation().name));
        None
    }

    // ---- deaths ----

    fn succeed(&mut self, how: Succession) {
        if how == Succession::Rivalry {
            self.rival = self.session.take();
            return;
        }
        // What it had asked is asked no more. Whether it was done, the inventory will tell.
        self.session = None;
        self.rival = None;
        for forgotten in std::mem::take(&mut self.under_way) {
            self.forget(&forgotten.request);
        }
    }

    /// It was asked, and nobody will hear the answer.
    fn forget(&mut self, request: &Request) {
        if let Request::TapOpen(ask) = request {
            self.taps.remove(&(ask.tenancy, ask.nic.get()));
            self.expected.astray.insert((ask.tenancy, ask.nic.get()));
        }
    }

    fn kill(&mut self, victim: Victim) {
        let manager = self.host.manager();
        match victim {
            Victim::Supervisor => {
                self.count("supervisor");
                drop(manager.ask(&stand_in::Ask::Kill(Unit::Supervisor, nix::libc::SIGKILL)));
            }
            // SIGTERM, and the manager starts it anew as it does after any end.
            Victim::SupervisorInOrder => {
                self.count("supervisor, in order");
                drop(manager.ask(&stand_in::Ask::Kill(Unit::Supervisor, nix::libc::SIGTERM)));
            }
            Victim::Qemu { name } => {
                let Some(tenancy) = self.names.get(&name).and_then(|known| known.tenancy) else { return };
                let Some(pid) = self.expected.alive.get(&tenancy).copied() else { return };
                self.touch(tenancy);
                if let Some(process) = kernel::process(pid.cast_signed()) {
                    self.end(&process);
                }
            }
            Victim::Companion { name, which } => {
                let Some(tenancy) = self.names.get(&name).and_then(|known| known.tenancy) else { return };
                let ledger = Ledger::read(&self.host.inside("run"));
                let Some(record) = ledger.slots.get(&tenancy.slot.get().into()) else { return };
                let beside = Ledger::companions(record);
                let Some(one) = beside.get(which % beside.len().max(1)) else { return };
                let process = i32::try_from(one.pid).ok().and_then(kernel::process);
                if let Some(process) = process.filter(|process| process.start_time == one.start_time) {
                    self.end(&process);
                }
            }
            Victim::Child { which } => {
                let own = self.own();
                let alive: Vec<i32> = self.expected.alive.values().map(|pid| pid.cast_signed()).collect();
                let children: Vec<Process> =
                    processes().into_iter().filter(|process| process.state != 'Z' && !own.contains(&process.pid) && !alive.contains(&process.pid)).collect();
                if !children.is_empty() {
                    // Whose it is, nobody can tell: nothing that is being started now must live.
                    self.touch_what_is_under_way();
                    self.end(&children[which % children.len()]);
                }
            }
        }
    }

    fn touch_what_is_under_way(&mut self) {
        let tenancies: Vec<Tenancy> = self.under_way.iter().filter_map(|under_way| under_way.request.tenancy()).collect();
        self.expected.touched.extend(tenancies);
    }

    fn end(&mut self, process: &Process) {
        // It may have ended by itself by now.
        let lives = |now: &Process| (now.start_time, now.state != 'Z') == (process.start_time, true);
        if !kernel::process(process.pid).is_some_and(|now| lives(&now)) {
            return;
        }
        let what = kernel::role(process);
        self.count(what);
        // A QEMU that starts ends when it can't agree with a virtiofsd; a stub never asks it.
        if what == kernel::VIRTIOFSD
            && let Some(tenancy) = self.real_qemu_beside(process)
        {
            self.touch(tenancy);
        }
        self.killed.insert((process.pid.into(), process.start_time));
        kill(process.pid);
    }

    fn real_qemu_beside(&self, process: &Process) -> Option<Tenancy> {
        let ledger = Ledger::read(&self.host.inside("run"));
        let beside = |one: &Companion| (one.pid, one.start_time) == (process.pid.into(), process.start_time);
        let (slot, record) = ledger.slots.iter().find(|(_, record)| Ledger::companions(record).iter().any(beside))?;
        let qemu = i32::try_from(Ledger::process(record)?.0).ok()?;
        let real = !std::fs::read_link(format!("/proc/{qemu}/exe")).is_ok_and(|program| program.ends_with("diarch-stub-qemu"));
        real.then(|| serde_json::from_value(serde_json::json!({"slot": slot, "claim": record["claim"]})).ok())?
    }

    fn count(&mut self, what: &'static str) {
        *self.kills.entry(what).or_insert(0) += 1;
    }

    // ---- a bad kernel ----

    fn fault(&mut self, fault: Fault) {
        if self.faults.contains(&fault) {
            return;
        }
        match fault {
            Fault::Hang { driver } => self.stage.hang_unbind(driver),
            Fault::Refusal { driver, which } => self.stage.refuse(driver, FUNCTIONS[which]),
            Fault::Death { which } => self.stage.die(FUNCTIONS[which]),
        }
        let what = match fault {
            Fault::Hang { .. } => "a driver that hangs",
            Fault::Refusal { .. } => "a driver that does not take its device",
            Fault::Death { .. } => "a device that reads all ones",
        };
        *self.done_wrong.entry(what).or_insert(0) += 1;
        self.troubled.extend(fault.groups());
        self.faults.push(fault);
    }

    /// The kernel does everything right again, and what hung goes on.
    fn mend(&mut self) {
        for fault in std::mem::take(&mut self.faults) {
            match fault {
                Fault::Hang { driver } => self.stage.let_all_go(driver),
                Fault::Refusal { driver, which } => self.stage.accept(driver, FUNCTIONS[which]),
                Fault::Death { which } => self.stage.revive(FUNCTIONS[which], IDS[which]),
            }
        }
    }

    /// The processes that are this run's own and no victims: ourselves, the manager, the supervisor.
    pub fn own(&self) -> Vec<i32> {
        let manager = self.host.manager();
        let supervisor = manager.unit(Unit::Supervisor).pid;
        [std::process::id().cast_signed(), manager.pid()].into_iter().chain(supervisor).collect()
    }

    // ---- the end of a round ----

    /// Waits for every answer, and for a supervisor that serves one worker. What is wrong by then.
    pub fn settle(&mut self) -> Vec<String> {
        for under_way in std::mem::take(&mut self.under_way) {
            self.finish(under_way);
        }
        self.mend();
        // Of two workers the one that connects last wins, also when the supervisor dies and both come again: the one that lost begins anew.
        let rivalry = self.rival.take().is_some();
        if self.told().is_err() {
            if let Some(State::GaveUp { reason }) = self.session.as_ref().map(Session::state)
                && !(rivalry && reason.contains("superseded"))
            {
                self.wrong.push(format!("the client gave up: {reason}"));
            }
            self.session = None;
        }
        std::mem::take(&mut self.wrong)
    }

    /// What `host.inventory` says.
    pub fn told(&mut self) -> Result<HostInventory, String> {
        let ask = Request::HostInventory(operation::Inventory { after: None });
        match self.session().ask(ask, Vec::new()) {
            Ok((Reply::HostInventory(inventory), _)) => Ok(inventory),
            other => Err(format!("host.inventory: {other:?}")),
        }
    }

    /// The taps that the supervisor must hold, of slots that were not released: (slot, card).
    pub fn held_taps(&self) -> Vec<(u64, u64)> {
        let start = self.host.manager().unit(Unit::Supervisor).starts;
        let held = self.taps.iter().filter(|((tenancy, _), tap)| tap.held_by == Some(start) && self.expected.held.contains(tenancy));
        held.map(|((tenancy, nic), _)| (tenancy.slot.get().into(), (*nic).into())).collect()
    }

    /// What was promised and is not so.
    pub fn broken_promises(&self, told: &[VmRecord]) -> Vec<String> {
        let find = |tenancy: &Tenancy| told.iter().find(|vm| vm.tenancy() == *tenancy);
        let mut wrong = Vec::new();
        for tenancy in &self.expected.held {
            if find(tenancy).is_none() {
                wrong.push(format!("slot {} was claimed as {}, was never released, and is gone", tenancy.slot, tenancy.claim));
            }
        }
        for tenancy in &self.expected.gone {
            if find(tenancy).is_some() {
                wrong.push(format!("slot {} was released under the claim {}, and is there", tenancy.slot, tenancy.claim));
            }
        }
        for (tenancy, pid) in &self.expected.alive {
            match find(tenancy) {
                Some(vm) if vm.state == SlotState::Running && vm.pid == Some(*pid) => {}
                found => wrong.push(format!("the VM in slot {} ran as process {pid}, nobody ended it, and now it is {found:?}", tenancy.slot)),
            }
        }
        wrong
    }

    /// Begins the next round with what the supervisor says, as a respawned worker does.
    pub fn learn(&mut self, told: &[VmRecord]) {
        let mut expected = Expected::default();
        for name in 0..super::plan::NAMES {
            let label = label(name);
            let found = told.iter().find(|vm| vm.label.as_str() == label).map(VmRecord::tenancy);
            let known = self.names.entry(name).or_default();
            if found != known.tenancy {
                known.former = known.tenancy;
                known.tenancy = found;
            }
        }
        for vm in told {
            expected.held.insert(vm.tenancy());
            // One that is about to end by itself is told apart by its end only.
            if let (Some(pid), true) = (vm.pid, self.expected.alive.contains_key(&vm.tenancy())) {
                expected.alive.insert(vm.tenancy(), pid);
            }
        }
        self.taps.retain(|(tenancy, _), _| expected.held.contains(tenancy));
        self.devices.retain(|tenancy, _| expected.held.contains(tenancy));
        self.mounts.retain(|tenancy, _| expected.held.contains(tenancy));
        self.expected = expected;
    }

    pub fn release_all(&mut self) -> Result<(), String> {
        for vm in self.told()?.vms {
            self.touch(vm.tenancy());
            self.expected.held.remove(&vm.tenancy());
            let ask = Request::VmRelease(operation::Release { tenancy: vm.tenancy() });
            self.session().ask(ask, Vec::new()).map_err(|error| format!("the release of {}: {error}", vm.label))?;
        }
        self.taps.clear();
        self.free_the_quarantined()
    }

    /// A device that outlived its VM in quarantine is nobody's: any VM may have it given back.
    fn free_the_quarantined(&mut self) -> Result<(), String> {
        let left = self.told()?.devices;
        let functions: Vec<Bdf> =
            left.into_iter().filter(|device| device.slot.is_none()).filter_map(|device| Some(device.functions.first()?.function.clone())).collect();
        if functions.is_empty() {
            return Ok(());
        }
        let claim = Request::VmClaim(operation::Claim { label: of(Label::new("chaos-again")) });
        let tenancy = match self.session().ask(claim, Vec::new()) {
            Ok((Reply::VmClaim(claimed), _)) => claimed.tenancy,
            other => return Err(format!("a slot in which to give devices back: {other:?}")),
        };
        for function in functions {
            let ask = Request::VfioRelease(operation::Unbind { tenancy, function: function.clone() });
            self.session().ask(ask, Vec::new()).map_err(|error| format!("the second release of {function}: {error}"))?;
        }
        let release = Request::VmRelease(operation::Release { tenancy });
        self.session().ask(release, Vec::new()).map(drop).map_err(|error| format!("the release of chaos-again: {error}"))
    }
}

/// What a plan says keeps the rules of its type.
fn of<T>(value: Result<T, BadName>) -> T {
    value.unwrap_or_else(|error| panic!("the plan: {error}"))
}

fn kill(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Waits until `settled` finds nothing wrong, or says what it found last.
pub fn until_settled(within: Duration, mut settled: impl FnMut() -> Vec<String>) -> Vec<String> {
    let until = Instant::now() + within;
    let mut pause = Duration::from_millis(1);
    loop {
        let wrong = settled();
        if wrong.is_empty() || Instant::now() > until {
            return wrong;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}
