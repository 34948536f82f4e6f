//! `diarch-load`: takes the worker's place in its unit, and asks the supervisor as fast as it answers.
//!
//! ```text
//!   lane 0      host.inventory, again and again                                          \
//!   lane 1..N   vm.claim -> listed once? -> vm.spawn (the stub) -> vm.signal -> vm.release -> gone?   one call in flight per lane
//! ```
//!
//! The client gives each call one answer by its construction, so what is checked is the effect: what was claimed is in the inventory
//! once, what was released is not, and at the end nothing is there that nobody was told of. The last line on standard output is a JSON object with the
//! totals; a line before it for each call that was answered by another supervisor process than the one it was asked of. Exit code 0: all was answered, and no
//! effect was missing or double.

use diarch_ipc::client::{Client, Restarter, Settings, State};
use diarch_ipc::name::{CommandLine, Cpus, Label, MiB, QemuName, Slot, Tenancy};
use diarch_ipc::operation::{Ask, Claim, Inventory, Release, Signal, SignalKind, Spawn, VmRecord};
use diarch_ipc::spec::{Accelerator, Boot, Presence, VmSpec};
use diarch_worker::config::Config;
use sd_notify::NotifyState;
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind as UnixSignal, signal};

const USAGE: &str = "usage: diarch-load [--lanes N] [--rounds N] [--config FILE] [--directory DIR] [--restarter none|systemctl]

Keeps N calls in flight (10) with the worker's own settings, until SIGTERM or until each lane has made its rounds. DIR (/var/lib/diarch) holds the VMs'
logs. With --restarter none (the default) a supervisor that can't be reached is waited for as long as the worker would wait, and not restarted.";

/// As the worker's own.
const CALL: Duration = Duration::from_secs(30);

struct Options {
    lanes: u32,
    rounds: u64,
    config: PathBuf,
    directory: PathBuf,
    restarter: Restart,
}

#[derive(Clone, Copy)]
enum Restart {
    None,
    Systemctl,
}

impl Restarter for Restart {
    fn restart(&mut self) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>> {
        let how = *self;
        Box::pin(async move {
            let Restart::Systemctl = how else { return Ok(()) };
            let mut command = tokio::process::Command::new("/usr/bin/systemctl");
            command.args(["--no-ask-password", "restart", "diarch-supervisor.service"]).kill_on_drop(true);
            let status = command.status().await.map_err(|e| e.to_string())?;
            if status.success() { Ok(()) } else { Err(status.to_string()) }
        })
    }
}

fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Options, String> {
    let mut options =
        Options { lanes: 10, rounds: u64::MAX, config: diarch_worker::config::CONFIG.into(), directory: "/var/lib/diarch".into(), restarter: Restart::None };
    let mut rest = arguments.into_iter();
    while let Some(option) = rest.next() {
        let value = rest.next().ok_or_else(|| format!("{option} needs a value"))?;
        let number = || value.parse::<u32>().map_err(|_| format!("{option}: {value:?} is not a number"));
        match option.as_str() {
            "--lanes" => options.lanes = number()?,
            "--rounds" => options.rounds = number()?.into(),
            "--config" => options.config = value.into(),
            "--directory" => options.directory = value.into(),
            "--restarter" => {
                options.restarter = match value.as_str() {
                    "none" => Restart::None,
                    "systemctl" => Restart::Systemctl,
                    other => return Err(format!("there is no restarter {other:?}")),
                }
            }
            other => return Err(format!("there is no option {other:?}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(reason) => {
            eprintln!("diarch-load: {reason}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let ended = runtime.block_on(tokio::task::LocalSet::new().run_until(load(options)));
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("diarch-load: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// `Ok(true)`: everything was as it must be.
async fn load(options: Options) -> Result<bool, String> {
    let config = Config::load(&options.config).map_err(|e| e.to_string())?;
    let settings = Settings {
        server_uid: config.supervisor_uid,
        patience: config.patience,
        restarts: config.restart_pauses.clone(),
        ..Settings::new(&config.supervisor_socket)
    };
    let (client, mut events) = Client::start(settings, Box::new(options.restarter));
    let kernel = options.directory.join("load-kernel");
    // Readable for every user, or the supervisor refuses it: the unit's umask would not have it so.
    let written =
        std::fs::write(&kernel, "no kernel: the stub boots nothing\n").and_then(|()| std::fs::set_permissions(&kernel, Permissions::from_mode(0o644)));
    written.map_err(|e| format!("{}: {e}", kernel.display()))?;
    let lanes = options.lanes;
    let load = Rc::new(Load {
        client,
        // Another process's VMs, of a load that was killed, are not ours to count.
        tag: format!("load-{:x}", std::process::id()),
        options,
        kernel,
        reconnections: Cell::new(0),
        stopping: Cell::new(false),
        totals: RefCell::default(),
    });
    tokio::task::spawn_local(async move { while events.recv().await.is_some() {} });
    tokio::task::spawn_local(count_connections(Rc::clone(&load)));
    if let Some(period) = sd_notify::watchdog_enabled() {
        tokio::task::spawn_local(async move {
            let mut beat = tokio::time::interval((period / 2).max(Duration::from_millis(100)));
            loop {
                beat.tick().await;
                let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            }
        });
    }
    load.inventory().await.map_err(|e| format!("the first inventory: {e}"))?;
    let _ = sd_notify::notify(&[NotifyState::Ready]);

    let started = Instant::now();
    let running: Vec<_> = (0..lanes).map(|lane| tokio::task::spawn_local(run_lane(Rc::clone(&load), lane))).collect();
    let terminated = Rc::clone(&load);
    let mut terminate = signal(UnixSignal::terminate()).map_err(|e| e.to_string())?;
    tokio::task::spawn_local(async move {
        terminate.recv().await;
        terminated.stopping.set(true);
    });
    for lane in running {
        lane.await.map_err(|e| e.to_string())?;
    }
    match load.inventory().await {
        Ok(vms) => {
            for vm in vms.iter().filter(|vm| vm.label.as_str().starts_with(&load.tag)) {
                load.wrong(format!("{} is still there, in slot {}, and every claim that was told of was released", vm.label, vm.slot));
            }
        }
        Err(error) => load.wrong(format!("the last inventory: {error}")),
    }
    let _ = std::fs::remove_file(&load.kernel);
    let totals = load.totals.borrow();
    println!("{}", totals.json(started.elapsed(), load.reconnections.get()));
    Ok(totals.wrong.is_empty() && totals.failed == 0)
}

#[derive(Default)]
struct Totals {
    asked: u64,
    answered: u64,
    failed: u64,
    /// Answered by another supervisor process than the one that was asked first.
    late: u64,
    rounds: u64,
    errors: BTreeMap<String, u64>,
    wrong: Vec<String>,
    /// By operation.
    took: BTreeMap<&'static str, Vec<Duration>>,
}

impl Totals {
    fn json(&self, ran: Duration, reconnections: u64) -> serde_json::Value {
        let ms = |of: Duration| (of.as_secs_f64() * 1e5).round() / 100.0;
        let latencies: BTreeMap<&str, serde_json::Value> = self
            .took
            .iter()
            .map(|(operation, all)| {
                let mut sorted = all.clone();
                sorted.sort();
                let at = |part: usize| sorted.get(sorted.len() * part / 100).or(sorted.last()).copied().map(ms);
                (*operation, json!({"count": sorted.len(), "p50_ms": at(50), "p99_ms": at(99), "max_ms": sorted.last().copied().map(ms)}))
            })
            .collect();
        json!({
            "asked": self.asked, "answered": self.answered, "failed": self.failed, "late": self.late, "rounds": self.rounds,
            "reconnections": reconnections, "max_ms": self.took.values().flatten().max().copied().map(ms),
            "latencies": latencies, "errors": self.errors, "wrong": self.wrong, "seconds": ran.as_secs_f64(),
        })
    }
}

struct Load {
    client: Client,
    tag: String,
    options: Options,
    kernel: PathBuf,
    reconnections: Cell<u64>,
    stopping: Cell<bool>,
    totals: RefCell<Totals>,
}

/// Counts connections after the first, and stops the load when there will be no more.
async fn count_connections(load: Rc<Load>) {
    let mut state = load.client.state();
    let mut first = true;
    loop {
        let now = state.borrow_and_update().clone();
        match now {
            State::Ready { .. } => {
                if !std::mem::take(&mut first) {
                    load.reconnections.set(load.reconnections.get() + 1);
                }
            }
            State::GaveUp { reason } => {
                load.wrong(format!("the client gave up: {reason}"));
                load.stopping.set(true);
                return;
            }
            State::Connecting | State::Lost { .. } | State::Restarting { .. } => {}
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}

async fn run_lane(load: Rc<Load>, lane: u32) {
    for round in 0..load.options.rounds {
        if load.stopping.get() {
            return;
        }
        let done = if lane == 0 { load.inventory().await.map(drop) } else { load.round(lane, round).await };
        if done.is_ok() {
            load.totals.borrow_mut().rounds += 1;
        }
    }
}

/// A call failed; counted already.
struct Unanswered;

impl std::fmt::Display for Unanswered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("it was not answered")
    }
}

impl Load {
    fn not_asked(&self, sentence: String) -> Unanswered {
        self.wrong(sentence);
        Unanswered
    }

    fn wrong(&self, sentence: String) {
        println!("wrong: {sentence}");
        self.totals.borrow_mut().wrong.push(sentence);
    }

    /// One call.
    async fn ask<A: Ask>(&self, ask: A, fds: Vec<OwnedFd>) -> Result<(A::Reply, Vec<OwnedFd>), Unanswered> {
        let request = ask.into_request();
        let operation = request.operation().name;
        let (before, asked) = (self.reconnections.get(), Instant::now());
        self.totals.borrow_mut().asked += 1;
        let answered = self.client.request(request, fds, CALL).await;
        let took = asked.elapsed();
        let reconnected = self.reconnections.get() - before;
        let mut totals = self.totals.borrow_mut();
        totals.took.entry(operation).or_default().push(took);
        if reconnected > 0 && answered.is_ok() {
            totals.late += 1;
            println!("answered after {reconnected} reconnections: {operation}, {:.1} ms", took.as_secs_f64() * 1e3);
        }
        let error = match answered {
            Ok((reply, fds)) => match A::from_reply(reply) {
                Some(reply) => {
                    totals.answered += 1;
                    return Ok((reply, fds));
                }
                None => "the answer to another operation".to_owned(),
            },
            Err(error) => error.to_string(),
        };
        totals.failed += 1;
        *totals.errors.entry(format!("{operation}: {error}")).or_default() += 1;
        Err(Unanswered)
    }

    async fn inventory(&self) -> Result<Vec<VmRecord>, Unanswered> {
        let (mut all, mut after): (Vec<VmRecord>, Option<Slot>) = (Vec::new(), None);
        loop {
            let (page, _) = self.ask(Inventory { after }, Vec::new()).await?;
            let last = page.vms.last().map(|vm| vm.slot);
            all.extend(page.vms);
            if !page.more || last.is_none() || last <= after {
                return Ok(all);
            }
            after = last;
        }
    }

    /// A VM's whole life, with a look at what came of each step. What was claimed is released whatever happened in between.
    async fn round(&self, lane: u32, round: u64) -> Result<(), Unanswered> {
        let label = Label::new(format!("{}-{lane}-{round}", self.tag)).map_err(|e| self.not_asked(e.to_string()))?;
        let (claimed, _) = self.ask(Claim { label: label.clone() }, Vec::new()).await?;
        let lived = self.live(lane, &label, claimed.tenancy, round).await;
        self.ask(Release { tenancy: claimed.tenancy }, Vec::new()).await?;
        lived?;
        // Another lane may have the slot by now; the name is nobody else's.
        if self.listed(&label).await? != Vec::<Tenancy>::new() {
            self.wrong(format!("{label} was released, and is listed"));
        }
        Ok(())
    }

    async fn live(&self, lane: u32, label: &Label, tenancy: Tenancy, round: u64) -> Result<(), Unanswered> {
        let listed = self.listed(label).await?;
        if listed != [tenancy] {
            self.wrong(format!("{label} was claimed once, as {tenancy:?}, and is listed in {listed:?}"));
        }
        if self.stopping.get() {
            return Ok(());
        }
        let (spec, fds) = self.spec(lane).map_err(|e| self.not_asked(e))?;
        let (spawned, handles) = self.ask(Spawn { tenancy, spec }, fds).await?;
        if handles.len() != 2 {
            self.wrong(format!("{label}: vm.spawn answered with {} descriptors", handles.len()));
        }
        let pids: Vec<Option<u32>> = self.inventory().await?.into_iter().filter(|vm| vm.label == *label).map(|vm| vm.pid).collect();
        if pids != [Some(spawned.pid)] {
            self.wrong(format!("{label} was spawned once, as process {}, and is listed with {pids:?}", spawned.pid));
        }
        let signal = if round.is_multiple_of(2) { SignalKind::Kill } else { SignalKind::Terminate };
        self.ask(Signal { tenancy, signal }, Vec::new()).await.map(drop)
    }

    /// The slots that have this name.
    async fn listed(&self, label: &Label) -> Result<Vec<Tenancy>, Unanswered> {
        Ok(self.inventory().await?.into_iter().filter(|vm| vm.label == *label).map(|vm| vm.tenancy()).collect())
    }

    /// The smallest VM, run by the stub, and the descriptors that go with it.
    fn spec(&self, lane: u32) -> Result<(VmSpec, Vec<OwnedFd>), String> {
        let words = || {
            Some(VmSpec {
                qemu: QemuName::new("stub").ok()?,
                accelerator: Accelerator::Tcg,
                cpus: Cpus::new(1).ok()?,
                memory: MiB::new(16).ok()?,
                boot: Boot::Kernel { command_line: CommandLine::new("").ok()?, initrd: Presence::Absent, firmware: Presence::Absent },
                disks: Vec::new(),
                nics: Vec::new(),
                devices: Vec::new(),
                shares: Vec::new(),
            })
        };
        let append = |what: &str| {
            let path = self.options.directory.join(format!("load-{lane}-{what}.log"));
            File::options().create(true).append(true).open(&path).map(OwnedFd::from).map_err(|e| format!("{}: {e}", path.display()))
        };
        let kernel = File::open(&self.kernel).map_err(|e| format!("{}: {e}", self.kernel.display()))?;
        Ok((words().ok_or("the smallest VM can't be written down")?, vec![append("qemu")?, append("console")?, kernel.into()]))
    }
}
