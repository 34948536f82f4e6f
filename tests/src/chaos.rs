//! The chaos run: random operations, random deaths, and after each round the kernel must have what the ledger says, and nothing else.
//!
//! ```text
//!   diarch-chaos ---- unshare: mounts, network, processes, IPC ----> diarch-chaos --inside        (whatever leaks, leaks into this box and ends with it)
//!                                                                      |
//!     seed, round --plan--> steps --actor--> client, raw frames, SIGKILL ---> supervisor --> QEMUs (stubs, and real ones), passt, virtiofsd
//!                                     `-- faults of the kernel's --> stage (devices)
//!                                                                      |
//!     after each round:  all answered, one worker connected            v
//!       kernel (its own tools) = kernel at the start + ledger (JSON)   and   ledger = host.inventory   and   what was promised is so
//!     every few rounds, and last:  all is released, and the kernel has what it had at the start
//! ```
//!
//! | module      | noun                                                                                   |
//! |-------------|----------------------------------------------------------------------------------------|
//! | `plan`      | the steps of a round, decided by the seed                                              |
//! | `actor`     | who does them, in the worker's place, and what it was promised                         |
//! | `kernel`    | the kernel's account: processes, interfaces, rules, mounts, files, sockets, descriptors |
//! | `ledger`    | the ledger's account                                                                   |
//! | `compare`   | the accounts side by side                                                              |
//! | `network`   | what of taps, routes and rules the ledger explains                                     |
//! | `companions`| what of programs beside a QEMU the ledger explains                                     |
//! | `devices`   | what of devices the ledger explains, and what the kernel did wrong with them           |
//! | `enclosure` | namespaces of the run's own                                                            |
//! | `plant`     | something left behind on purpose: the run must find it                                 |

pub mod actor;
pub mod companions;
pub mod compare;
pub mod devices;
pub mod enclosure;
pub mod kernel;
pub mod ledger;
pub mod network;
pub mod plan;
pub mod plant;

use crate::host::{Activation, Host};
use crate::stage::{self, Shape, Stage};
use crate::stand_in::Unit;
use actor::{Actor, until_settled};
use compare::Deeds;
use enclosure::Troupe;
use kernel::{Facts, View, look};
use ledger::Ledger;
use plant::Plant;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What passes by itself (an end that is being noticed, a half-made child that is waited for) has passed by then.
const SETTLED: Duration = Duration::from_secs(8);
/// What was planted does not pass.
const PLANTED: Duration = Duration::from_secs(1);
/// All is released after so many rounds.
const CLEARED: u64 = 10;
/// Grants so wide that no limit is met but that of slots. (The first line goes on with the section before.)
const LIMITS: &str = "egress = true\n[limits]\nread_per_second = 100000\nread_burst = 100000\nensure_per_second = 100000\nensure_burst = 100000\n\
                      once_per_second = 100000\nonce_burst = 100000\n";

#[derive(Debug, Clone)]
pub struct Settings {
    pub seed: u64,
    /// The first round; another seed's or an earlier round's things are not there.
    pub from: u64,
    pub rounds: u64,
    pub users: u32,
    pub plant: Option<Plant>,
    /// The tree of a Debian in which all of it takes place, with the programs that it has; without one, this machine's.
    pub tree: Option<PathBuf>,
}

/// What a clean run did.
#[derive(Debug)]
pub struct Summary {
    pub rounds: u64,
    pub steps: u64,
    /// How many of whom.
    pub kills: BTreeMap<&'static str, u64>,
    /// How often the kernel did what wrong.
    pub done_wrong: BTreeMap<&'static str, u64>,
    /// How many of whom were seen to run at the end of a round.
    pub seen: BTreeMap<String, usize>,
    /// The supervisor's starts.
    pub starts: u64,
    pub took: Duration,
    pub answers: BTreeMap<String, u64>,
}

/// A run that found something: what is needed to see it again.
#[derive(Debug)]
pub struct Found {
    pub round: u64,
    pub steps: Vec<String>,
    pub heard: Vec<String>,
    pub wrong: Vec<String>,
    /// The end of the supervisor's log.
    pub log: String,
}

/// Runs in namespaces that are its own ([`enclosure`]).
pub fn run(settings: &Settings) -> Result<Summary, Box<Found>> {
    let directory = stage::directory();
    let stage = Stage::build(directory.path(), &[Shape::SingleGpu, Shape::EightGpus]);
    // What is no device of the stage's is the machine's.
    for (name, of) in [("net", "/dev/net"), ("null", "/dev/null")] {
        let _ = std::os::unix::fs::symlink(of, stage.root().join("dev").join(name));
    }
    let troupe = Troupe::of_this_machine();
    println!("with {troupe}");
    let mut builder = Host::builder().on_stage(&stage).without_worker().grants(LIMITS).grants(&enclosure::grants(troupe));
    builder.vms_max = plan::SLOTS;
    builder.uid_first = Some(settings.users);
    builder.activation = Activation::Socket;
    builder.prelude = Some(stage.catch_up());
    let host = builder.start();
    std::fs::write(host.path(actor::HALTING), halting_kernel()).unwrap_or_else(|error| panic!("a kernel for QEMU: {error}"));
    let mut chaos = Chaos {
        actor: Actor::new(&host, &stage, troupe),
        host: &host,
        stage: stage.root().to_owned(),
        start: Facts::default(),
        harness: 0,
        seen: BTreeSet::new(),
        rounds: 0,
        patience: if settings.plant.is_some() { PLANTED } else { SETTLED },
    };
    let started = Instant::now();
    let mut steps = 0;
    chaos.warm_up().map_err(|wrong| chaos.found(0, Vec::new(), wrong))?;
    for round in settings.from..settings.from + settings.rounds {
        let plan = plan::plan(settings.seed, round);
        chaos.actor.heard.clear();
        chaos.rounds += 1;
        for step in &plan {
            chaos.actor.step(step);
        }
        steps += plan.len() as u64;
        if round == settings.from + settings.rounds / 2
            && let Some(plant) = settings.plant
        {
            // It may be a worker for a moment.
            chaos.actor.step(&plan::Step::Succeed(plan::Succession::Death));
            plant.put(&host, &stage, settings.users).unwrap_or_else(|error| panic!("{plant:?} can't be planted: {error}"));
        }
        let told = |plan: &[plan::Step]| plan.iter().map(ToString::to_string).collect::<Vec<_>>();
        chaos.settle(false).map_err(|wrong| chaos.found(round, told(&plan), wrong))?;
        if (round + 1).is_multiple_of(CLEARED) || round + 1 == settings.from + settings.rounds {
            chaos.settle(true).map_err(|wrong| chaos.found(round, told(&plan).into_iter().chain(["release all".into()]).collect(), wrong))?;
        }
        let done = round - settings.from + 1;
        if done.is_multiple_of(100) {
            println!("{done} rounds, {:.1} a second", done as f64 / started.elapsed().as_secs_f64());
        }
    }
    chaos.last_words().map_err(|wrong| chaos.found(settings.from + settings.rounds, Vec::new(), wrong))?;
    let (answers, kills) = (std::mem::take(&mut chaos.actor.answers), std::mem::take(&mut chaos.actor.kills));
    let done_wrong = std::mem::take(&mut chaos.actor.done_wrong);
    let mut seen = BTreeMap::new();
    chaos.seen.iter().for_each(|(what, _, _)| *seen.entry(what.clone()).or_insert(0) += 1);
    Ok(Summary {
        rounds: settings.rounds,
        steps,
        kills,
        done_wrong,
        seen,
        starts: host.manager().unit(Unit::Supervisor).starts,
        took: started.elapsed(),
        answers,
    })
}

struct Chaos<'a> {
    actor: Actor<'a>,
    host: &'a Host,
    stage: PathBuf,
    start: Facts,
    /// Our own descriptors at the start.
    harness: usize,
    /// What, and which: number and start time, or group and round.
    seen: BTreeSet<(String, i64, u64)>,
    rounds: u64,
    patience: Duration,
}

impl Chaos<'_> {
    /// One VM's whole life, so that what is made once is there; and then the account that every later one is compared with.
    fn warm_up(&mut self) -> Result<(), Vec<String>> {
        use plan::{Ask, Claim, Step, Then};
        for ask in [Ask::Claim, Ask::Spawn { words: 0, cast: plan::ALONE }, Ask::Release] {
            self.actor.step(&Step::Ask { name: 0, ask, claim: Claim::Own, then: Then::Wait });
        }
        let wrong = self.actor.settle();
        if !wrong.is_empty() {
            return Err(wrong);
        }
        let told = self.actor.told().map_err(|e| vec![e])?;
        self.actor.learn(&told.vms);
        // Its helper threads and their likes go by and by.
        let mut last = Facts::default();
        for _ in 0..200 {
            std::thread::sleep(Duration::from_millis(10));
            let now = self.look().map_err(|e| vec![e])?;
            if now == last {
                self.start = now;
                self.harness = own_descriptors();
                return Ok(());
            }
            last = now;
        }
        Err(vec!["the host did not come to rest".into()])
    }

    fn look(&self) -> Result<Facts, String> {
        let status = self.host.manager().unit(Unit::Supervisor);
        let supervisor = status.pid.ok_or("there is no supervisor")?;
        let view = View {
            supervisor,
            manager: self.host.manager().pid(),
            own: self.actor.own(),
            run_directory: self.host.inside("run"),
            stage: self.stage.clone(),
            directory: self.host.path(""),
        };
        look(&view).map_err(|error| error.to_string())
    }

    /// Everything is answered, and the accounts agree; with `clear`, after everything was released.
    fn settle(&mut self, clear: bool) -> Result<(), Vec<String>> {
        let wrong = self.actor.settle();
        if !wrong.is_empty() {
            return Err(wrong);
        }
        if clear {
            self.actor.release_all().map_err(|wrong| vec![wrong])?;
        }
        // An nft that was killed leaves other rules than the ledger's for a moment: the supervisor makes them right by itself.
        let wrong = until_settled(self.patience, || self.compare(clear).unwrap_or_else(|wrong| vec![wrong]));
        if !wrong.is_empty() {
            return Err(wrong);
        }
        if clear {
            self.actor.troubled.clear();
        }
        let told = self.actor.told().map_err(|e| vec![e])?;
        self.actor.learn(&told.vms);
        Ok(())
    }

    fn compare(&mut self, clear: bool) -> Result<Vec<String>, String> {
        let told = self.actor.told()?;
        let ledger = Ledger::read(&self.host.inside("run"));
        let now = self.look()?;
        let deeds = Deeds { held: self.actor.held_taps(), killed: self.actor.killed.clone(), troubled: self.actor.troubled.clone() };
        self.note(&ledger);
        let mut wrong = compare::differences(&self.start, &now, &ledger, &deeds, &told);
        wrong.extend(self.actor.broken_promises(&told.vms));
        if let Some(trouble) = told.audit.trouble.filter(|_| told.audit.lost > 0) {
            wrong.push(format!("the audit: {trouble}"));
        }
        if clear {
            if wrong.is_empty() {
                // Nothing explains anything any more.
                wrong.extend(compare::kernel(&self.start, &now, &compare::Explained::default()));
            }
            let own = own_descriptors();
            if own > self.harness {
                wrong.push(format!("the worker's side holds {own} descriptors, and held {} at the start", self.harness));
            }
        }
        Ok(wrong)
    }

    /// What the run met, for its summary.
    fn note(&mut self, ledger: &Ledger) {
        for record in ledger.slots.values() {
            for one in Ledger::companions(record) {
                self.seen.insert((one.kind, one.pid, one.start_time));
            }
            let process = Ledger::process(record).and_then(|(pid, start_time)| Some((kernel::process(i32::try_from(pid).ok()?)?, start_time)));
            if let Some((process, start_time)) = process {
                let program = std::fs::read_link(format!("/proc/{}/exe", process.pid)).unwrap_or_default();
                let what = if program.ends_with("diarch-stub-qemu") { "stub QEMU" } else { "QEMU" };
                self.seen.insert((what.into(), process.pid.into(), start_time));
            }
        }
        for group in ledger.devices.iter().filter(|(_, record)| record["state"] == devices::QUARANTINED).map(|(group, _)| *group) {
            self.seen.insert(("quarantined group of devices".into(), group.cast_signed(), self.rounds));
        }
    }

    /// What only the whole run shows.
    fn last_words(&mut self) -> Result<(), Vec<String>> {
        let mut wrong = Vec::new();
        for line in self.host.log("supervisor.log").lines().filter(|line| line.contains("panicked")) {
            wrong.push(format!("the supervisor's log: {line}"));
        }
        let audit = self.host.path("audit/audit.jsonl");
        let verified = self.host.diarch(&["audit", "verify", "--no-compare", "--file", &audit.to_string_lossy()]);
        if verified.code != Some(0) {
            wrong.push(format!("the audit does not verify: {}{}", verified.stdout, verified.stderr));
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }

    fn found(&self, round: u64, steps: Vec<String>, wrong: Vec<String>) -> Box<Found> {
        let log = self.host.log("supervisor.log");
        let lines: Vec<&str> = log.lines().collect();
        Box::new(Found { round, steps, heard: self.actor.heard.clone(), wrong, log: lines[lines.len().saturating_sub(40)..].join("\n") })
    }
}

/// The smallest file that QEMU takes for a Linux kernel (Documentation/arch/x86/boot.rst): no sector of set-up but the first, whose code halts the processor.
fn halting_kernel() -> Vec<u8> {
    let mut file = vec![0u8; 4096];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    // Sectors of set-up behind the boot sector; the sector's signature.
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa]);
    // Entered here: over the header; then `cli; hlt`, and again when an interrupt that can't be masked wakes it.
    put(0x200, &[0xeb, 0x3e]);
    put(0x202, b"HdrS");
    // Version 2.2 of the protocol, loaded high.
    put(0x206, &[0x02, 0x02]);
    put(0x211, &[0x01]);
    put(0x240, &[0xfa, 0xf4, 0xeb, 0xfc]);
    file
}

fn own_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}
