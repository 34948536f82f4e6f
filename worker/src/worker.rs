//! The worker: what should be, what is, and the tasks that bring them together.
//!
//! ```text
//!   VM files --inotify--> reload --+
//!   operators ------------ orders -+--> reconcile: plan(files, observed, holds) --steps--> intents of the VM tasks
//!   supervisor -- inventory, back -+                    ^                                        |
//!   VM tasks --------------- notes +                    +---------------- status ----------------+
//! ```
//!
//! `reconcile` is synchronous and quick; everything slow (files, fsync, the supervisor) is awaited outside of its lock. And what the main loop calls waits
//! for no disk: a file system that hangs must not look like a worker that does.

use crate::config::Config;
use crate::control::protocol::{Failure, FailureKind, FileProblem, Phase, Uses};
use crate::daemon::Census;
use crate::journal::{Journal, now_ms};
use crate::logs::Logs;
use crate::plan::{Action, Driven, NOT_STARTABLE, Observed, Step, plan};
use crate::state::{HoldWhy, Holds, Store};
use crate::supervisor::Link;
use crate::vm::{Context, Found, Handle, Intent, Note, Status, Want};
use crate::vmfile::{self, Desired, Files};
use diarch_ipc::name::{Bdf, Label};
use diarch_ipc::operation::VmRecord;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// The VM files are waited for so long; then the loop goes on, and comes back to the same reading.
pub const READ_WITHIN: Duration = Duration::from_secs(2);

pub struct Worker {
    pub config: Config,
    pub link: Arc<Link>,
    pub journal: Arc<Journal>,
    pub logs: Logs,
    pub started_ms: u64,
    store: Store,
    context: Arc<Context>,
    state: Mutex<State>,
    /// One writer of the holds at a time, so that the newest are the last.
    saving: tokio::sync::Mutex<()>,
    /// The holds differ from their file.
    unsaved: AtomicBool,
    /// A reading of the VM files that has not ended. Never a second one beside it: each would cost a thread.
    reading: tokio::sync::Mutex<Option<JoinHandle<Files>>>,
}

/// Whether the VM files have to be read once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Reread {
    No,
    Again,
}

#[derive(Default)]
struct State {
    files: Files,
    holds: Holds,
    vms: BTreeMap<Label, Handle>,
    /// Nothing is done before the supervisor's first inventory: it would be done twice.
    know_what_is: bool,
    /// The host goes down: nothing is started any more.
    closing: bool,
}

impl State {
    /// Of a VM in no usable file: what keeps its file from being used. None: it is gone.
    fn unusable(&self, handle: &Handle) -> Option<String> {
        if self.files.unreadable {
            return Some("the directory of the VM files can't be read".into());
        }
        let file = handle.status().borrow().file.clone().or_else(|| handle.intent().desired.map(|desired| desired.file.clone()));
        let file = match file {
            Some(file) => file,
            None if self.files.broken.is_empty() => return None,
            None => return Some(format!("it is in no usable file, and its own may be one of these: {}", self.files.broken.join(", "))),
        };
        if !self.files.broken.contains(&file) {
            return None;
        }
        let why = self.files.problems.iter().find(|problem| problem.file == file).map_or_else(String::new, |problem| {
            let at = problem.line.map_or_else(|| problem.path.clone(), |line| format!("line {line}"));
            format!(" ({at}: {})", problem.reason)
        });
        Some(format!("{file} can't be used{why}"))
    }

    /// Forgets what has neither a file nor a process. True: a hold went with it.
    fn forget_gone(&mut self, journal: &Journal) -> bool {
        let gone: Vec<Label> = self
            .vms
            .iter()
            .filter(|(name, _)| self.files.vms.iter().all(|vm| vm.name != **name))
            .filter(|(_, handle)| handle.status().borrow().at_rest && handle.intent().want != Want::Run && self.unusable(handle).is_none())
            .map(|(name, _)| name.clone())
            .collect();
        let mut held = false;
        for name in gone {
            journal.note(Some(&name), "vm.gone", "it is stopped, and no file defines it any more");
            self.vms.remove(&name);
            held |= self.holds.release(&name);
        }
        // Those of an earlier life of the worker, which has no task for them. What can't be read may be a held VM's file.
        if !self.files.unreadable && self.files.broken.is_empty() {
            for name in self.holds.names() {
                if !self.vms.contains_key(&name) && self.files.vms.iter().all(|vm| vm.name != name) {
                    held |= self.holds.release(&name);
                }
            }
        }
        held
    }
}

/// What an operator asks of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Start,
    Stop,
    Restart,
    Kill,
    /// A restart with its devices reset in between.
    Recover,
}

/// An order that is being carried out.
pub struct Accepted {
    pub name: Label,
    pub status: watch::Receiver<Status>,
    pub goal: Goal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Healthy, by a start that knew these counters of the intent.
    Healthy {
        starts: u64,
        restarts: u64,
    },
    Stopped,
}

/// A VM for the command: its file, its task, its hold.
pub struct Shown {
    pub name: Label,
    pub desired: Option<Desired>,
    pub status: Option<Status>,
    pub held: Option<String>,
    /// Why its file, which is there, tells nothing; `desired` is what it told last.
    pub unusable: Option<String>,
    /// Without a status: false until the supervisor's first inventory, as it may run all the same.
    pub known: bool,
}

impl Worker {
    pub fn new(config: Config, link: Arc<Link>, journal: Arc<Journal>, store: Store, logs: Logs) -> (Arc<Self>, mpsc::UnboundedReceiver<Note>) {
        let (notes_in, notes) = mpsc::unbounded_channel();
        let context = Context::new(Arc::clone(&link), Arc::clone(&journal), store.clone(), logs.clone(), notes_in);
        // Until they are read, nothing is known of the VM files: which is not the same as that there are none.
        let files = Files { unreadable: true, ..Files::default() };
        let worker = Self {
            config,
            link,
            journal,
            logs,
            started_ms: now_ms(),
            context: Arc::new(context),
            state: Mutex::new(State { files, holds: store.holds(), ..State::default() }),
            store,
            saving: tokio::sync::Mutex::default(),
            unsaved: AtomicBool::new(false),
            reading: tokio::sync::Mutex::default(),
        };
        (Arc::new(worker), notes)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- what changes the world ----

    /// Reads the VM files, and does what follows from them.
    pub async fn reload(self: &Arc<Self>) -> Reread {
        let mut reading = self.reading.lock().await;
        // What was begun before the last change may have missed it.
        let (mut begun, old) = match reading.take() {
            Some(begun) => (begun, Reread::Again),
            None => {
                let directory = self.config.configs_dir.clone();
                (tokio::task::spawn_blocking(move || vmfile::read(&directory)), Reread::No)
            }
        };
        match timeout(READ_WITHIN, &mut begun).await {
            Ok(Ok(files)) => {
                self.take_files(files);
                old
            }
            Ok(Err(error)) => {
                self.journal.warn("files.not-read", format!("the VM files could not be read: {error}"));
                old
            }
            Err(_) => {
                if old == Reread::No {
                    let (directory, seconds) = (self.config.configs_dir.display(), READ_WITHIN.as_secs());
                    let message = format!("{directory} was not read within {seconds} s: does its file system hang? What is known of the VMs goes on");
                    self.journal.warn("files.late", message);
                }
                *reading = Some(begun);
                Reread::Again
            }
        }
    }

    fn take_files(self: &Arc<Self>, files: Files) {
        let pruned = {
            let mut state = self.state();
            if state.files == files {
                return;
            }
            for problem in files.problems.iter().filter(|problem| !state.files.problems.contains(problem)) {
                let at = problem.line.map_or_else(String::new, |line| format!(" (line {line})"));
                self.journal.warn("file.problem", format!("{} {}{at}: {}", problem.file, problem.path, problem.reason));
            }
            for vm in &files.vms {
                for warning in vm.warnings.iter().filter(|_| !state.files.vms.contains(vm)) {
                    self.journal.note(Some(&vm.name), "file.warning", format!("{}: {warning}", vm.file));
                }
            }
            state.files = files;
            let revisions: BTreeMap<String, String> = state.files.vms.iter().map(|vm| (vm.name.to_string(), vm.revision.clone())).collect();
            state.holds.prune(|name| revisions.get(name).cloned())
        };
        if pruned {
            self.save_holds_soon();
        }
        self.reconcile(Vec::new());
    }

    /// What the supervisor owns and no task drives is taken into account. `Err`: the supervisor can't say.
    pub async fn take_stock(self: &Arc<Self>) -> Result<(), diarch_ipc::Error> {
        let records = self.link.inventory().await?;
        let found = {
            let mut state = self.state();
            state.know_what_is = true;
            records.into_iter().filter(|record| !state.vms.contains_key(&record.label)).map(|record| self.found(record)).collect()
        };
        self.reconcile(found);
        Ok(())
    }

    /// With what it was started as, if the record speaks of this very start.
    fn found(&self, record: VmRecord) -> Found {
        let started = self.store.started(&record.label);
        let started = started.filter(|started| started.slot == record.slot && record.spawned_ms == Some(started.spawned_ms));
        let (machine, tap, file) = started.map_or((None, None, None), |started| (Some(started.machine), started.tap, Some(started.file)));
        Found { record, machine, tap, file }
    }

    /// Plans, and hands each step to its task.
    fn reconcile(self: &Arc<Self>, found: Vec<Found>) {
        let held = {
            let mut state = self.state();
            if !state.know_what_is || state.closing {
                return;
            }
            let observed: Vec<Observed> = state.vms.values().map(Handle::observed).chain(found.iter().map(Found::observed)).collect();
            let steps = plan(&state.files, &observed, &state.holds);
            let mut found: BTreeMap<Label, Found> = found.into_iter().map(|found| (found.record.label.clone(), found)).collect();
            let mut held = false;
            for step in steps {
                let found = found.remove(&step.name);
                held |= self.take_step(&mut state, step, found);
            }
            held | state.forget_gone(&self.journal)
        };
        if held {
            self.save_holds_soon();
        }
    }

    /// True: a hold was made.
    fn take_step(&self, state: &mut State, step: Step, found: Option<Found>) -> bool {
        let Step { name, action, reasons } = step;
        let why = reasons.join("; ");
        let desired = state.files.vms.iter().find(|vm| vm.name == name);
        if action != Action::Keep {
            tracing::info!(vm = %name, action = action.as_str(), %why, "step");
        }
        if let Some(handle) = state.vms.get(&name) {
            handle.intend(|intent| {
                match &desired {
                    Some(vm) if intent.desired.as_ref().is_none_or(|old| old.revision != vm.revision || old.file != vm.file) => {
                        intent.desired = Some(Arc::new((*vm).clone()));
                    }
                    // Gone for good, where its file is not just unusable for the moment.
                    None if action != Action::Keep => intent.desired = None,
                    _ => {}
                }
                match action {
                    Action::Start | Action::Adopt => (intent.want, intent.starts, intent.why) = (Want::Run, intent.starts + 1, why.clone()),
                    Action::Restart => (intent.want, intent.restarts, intent.why) = (Want::Run, intent.restarts + 1, why.clone()),
                    Action::Stop | Action::Release(_) if intent.want != Want::Kill => (intent.want, intent.why) = (Want::Stop, why.clone()),
                    Action::Stop | Action::Release(_) | Action::Keep => {}
                }
            });
        } else if action != Action::Keep || found.is_some() {
            let want = if matches!(action, Action::Stop | Action::Release(_)) { Want::Stop } else { Want::Run };
            let restarts = u64::from(action == Action::Restart);
            let intent = Intent { desired: desired.map(|vm| Arc::new(vm.clone())), want, starts: 1, restarts, recovers: 0, why: why.clone() };
            let handle = Handle::start(Arc::clone(&self.context), name.clone(), intent, found);
            state.vms.insert(name.clone(), handle);
        }
        let Action::Release(Some(hold)) = action else { return false };
        let revision = desired.map_or_else(String::new, |vm| vm.revision.clone());
        state.holds.hold(&name, hold, why, revision);
        true
    }

    /// What a VM task says.
    pub fn take_note(self: &Arc<Self>, note: Note) {
        match note {
            Note::Hold(name, reason) => {
                {
                    let mut state = self.state();
                    let revision = state.files.vms.iter().find(|vm| vm.name == name).map(|vm| vm.revision.clone());
                    if let Some(revision) = revision {
                        self.journal.note(
                            Some(&name),
                            "vm.held",
                            format!("it stays off until an operator's start, a change of its file or a reboot of the host: {reason}"),
                        );
                        state.holds.hold(&name, HoldWhy::PoweredOff, reason.clone(), revision);
                    }
                    if let Some(handle) = state.vms.get(&name) {
                        handle.intend(|intent| (intent.want, intent.why) = (Want::Stop, reason));
                    }
                }
                self.save_holds_soon();
            }
            Note::AtRest(name) => {
                {
                    let state = self.state();
                    if let Some(handle) = state.vms.get(&name) {
                        let status = handle.status().borrow().clone();
                        let intent = handle.intent();
                        let at_rest = status.phase == Phase::Stopped && (intent.want != Want::Run || intent.starts <= status.seen_starts);
                        if at_rest {
                            // It came to rest by itself: wanting it again takes a new start. (One without a file is forgotten below.)
                            handle.intend(|intent| intent.want = Want::Stop);
                        }
                    }
                }
                self.reconcile(Vec::new());
            }
            Note::Broken(name) => {
                self.journal.note(
                    Some(&name),
                    "vm.task-broken",
                    "the worker's own task for it failed, which is a bug; the VM is as it was, and is taken on anew",
                );
                self.state().vms.remove(&name);
            }
        }
    }

    /// Without waiting for the disk.
    fn save_holds_soon(self: &Arc<Self>) {
        self.unsaved.store(true, Ordering::Release);
        let worker = Arc::clone(self);
        tokio::spawn(async move { worker.save_holds().await });
    }

    /// Returns when the holds as they are now are on the disk, or can't be.
    pub async fn save_holds(&self) {
        let _one = self.saving.lock().await;
        // Before they are looked at: a change in between is somebody's who saves after us.
        if !self.unsaved.swap(false, Ordering::AcqRel) {
            return;
        }
        let holds = self.state().holds.clone();
        let store = self.store.clone();
        match tokio::task::spawn_blocking(move || store.save_holds(&holds)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                // The next change tries again, and so does the end.
                self.unsaved.store(true, Ordering::Release);
                self.journal.warn("state.not-saved", format!("which VMs are held can't be saved, and is forgotten when the worker restarts: {error}"));
            }
            Err(error) => tracing::warn!(%error, "saving the holds failed"),
        }
    }

    /// An operator's word. `who` is for people.
    pub async fn order(&self, order: Order, name: &str, who: &str) -> Result<Accepted, Failure> {
        let accepted = {
            let mut state = self.state();
            let name = self.known(&state, name)?;
            if !state.know_what_is {
                return Err(failure(FailureKind::Unreachable, "the supervisor has not been reached yet, so that nothing can be started or stopped"));
            }
            if state.closing && matches!(order, Order::Start | Order::Restart | Order::Recover) {
                return Err(failure(FailureKind::Conflict, "the host goes down: nothing is started any more"));
            }
            let desired = state.files.vms.iter().find(|vm| vm.name == name).cloned();
            match order {
                Order::Start | Order::Restart | Order::Recover => {
                    let Some(desired) = desired else {
                        return Err(failure(FailureKind::Conflict, format!("{name} has no usable file that says what to start")));
                    };
                    if !desired.enabled {
                        return Err(failure(FailureKind::Conflict, format!("{name} is disabled in {}: set \"enabled\" there", desired.file)));
                    }
                    self.set_going(&mut state, order, desired, who)
                }
                Order::Stop | Order::Kill => self.set_down(&mut state, order, &name, desired, who)?,
            }
        };
        self.unsaved.store(true, Ordering::Release);
        self.save_holds().await;
        Ok(accepted)
    }

    fn set_going(&self, state: &mut State, order: Order, desired: Desired, who: &str) -> Accepted {
        let name = desired.name.clone();
        state.holds.release(&name);
        let why = match order {
            Order::Start => format!("started by {who}"),
            Order::Recover => format!("restarted, with its devices reset, by {who}"),
            Order::Restart | Order::Stop | Order::Kill => format!("restarted by {who}"),
        };
        self.journal.note(Some(&name), "vm.ordered", why.clone());
        let desired = Arc::new(desired);
        let handle = state.vms.entry(name.clone()).or_insert_with(|| {
            let intent = Intent { desired: Some(Arc::clone(&desired)), want: Want::Stop, starts: 0, restarts: 0, recovers: 0, why: why.clone() };
            Handle::start(Arc::clone(&self.context), name.clone(), intent, None)
        });
        handle.intend(|intent| {
            intent.desired = Some(desired);
            intent.want = Want::Run;
            intent.starts += 1;
            intent.restarts += u64::from(order != Order::Start);
            intent.recovers += u64::from(order == Order::Recover);
            intent.why = why;
        });
        let intent = handle.intent();
        Accepted { name, status: handle.status(), goal: Goal::Healthy { starts: intent.starts, restarts: intent.restarts } }
    }

    fn set_down(&self, state: &mut State, order: Order, name: &Label, desired: Option<Desired>, who: &str) -> Result<Accepted, Failure> {
        let (want, word) = if order == Order::Stop { (Want::Stop, "stopped") } else { (Want::Kill, "killed") };
        let why = format!("{word} by {who}");
        self.journal.note(Some(name), "vm.ordered", why.clone());
        if let Some(desired) = &desired {
            state.holds.hold(name, HoldWhy::Operator, why.clone(), desired.revision.clone());
        }
        let handle = match (state.vms.get(name), desired) {
            (Some(handle), _) => handle,
            (None, Some(desired)) => {
                let intent = Intent { desired: Some(Arc::new(desired)), want, starts: 0, restarts: 0, recovers: 0, why: why.clone() };
                let handle = Handle::start(Arc::clone(&self.context), name.clone(), intent, None);
                state.vms.entry(name.clone()).or_insert(handle)
            }
            (None, None) => return Err(failure(FailureKind::NotFound, format!("there is no VM {name}"))),
        };
        handle.intend(|intent| (intent.want, intent.why) = (want, why));
        Ok(Accepted { name: name.clone(), status: handle.status(), goal: Goal::Stopped })
    }

    /// The host goes down: all VMs are brought down, and none is started any more. How many that are.
    pub fn close(&self) -> usize {
        let mut state = self.state();
        state.closing = true;
        for handle in state.vms.values() {
            handle.intend(|intent| {
                if intent.want == Want::Run {
                    (intent.want, intent.why) = (Want::Stop, "the host goes down".into());
                }
            });
        }
        state.vms.values().filter(|handle| !handle.status().borrow().at_rest).count()
    }

    /// VMs that are not at rest yet.
    pub fn not_down(&self) -> Vec<String> {
        self.state().vms.iter().filter(|(_, handle)| !handle.status().borrow().at_rest).map(|(name, _)| name.to_string()).collect()
    }

    // ---- what shows it ----

    fn known(&self, state: &State, name: &str) -> Result<Label, Failure> {
        let known = Label::new(name).ok().filter(|name| state.vms.contains_key(name) || state.files.vms.iter().any(|vm| vm.name == *name));
        known.ok_or_else(|| {
            let bad = match state.files.broken.as_slice() {
                [] => String::new(),
                broken => format!("; it may be in a file that can't be used ({}): diarch validate says why", broken.join(", ")),
            };
            failure(FailureKind::NotFound, format!("there is no VM {}{bad}", diarch_ipc::frame::printable(name, 80)))
        })
    }

    /// Every VM that has a usable file or a task, in name order.
    pub fn shown(&self) -> Vec<Shown> {
        let state = self.state();
        let mut shown: BTreeMap<Label, Shown> = BTreeMap::new();
        for vm in &state.files.vms {
            let held = state.holds.of(&vm.name, &vm.revision).map(|hold| hold.reason.clone());
            shown.insert(
                vm.name.clone(),
                Shown { name: vm.name.clone(), desired: Some(vm.clone()), status: None, held, unusable: None, known: state.know_what_is },
            );
        }
        for (name, handle) in &state.vms {
            let entry = shown.entry(name.clone()).or_insert_with(|| {
                let unusable = state.unusable(handle);
                // A file that is gone told its last.
                let desired = unusable.as_ref().and_then(|_| handle.intent().desired.as_deref().cloned());
                Shown { name: name.clone(), desired, status: None, held: None, unusable, known: true }
            });
            entry.status = Some(handle.status().borrow().clone());
        }
        shown.into_values().collect()
    }

    pub fn show(&self, name: &str) -> Result<Shown, Failure> {
        let name = self.known(&self.state(), name)?;
        self.shown().into_iter().find(|vm| vm.name == name).ok_or_else(|| failure(FailureKind::NotFound, format!("there is no VM {name}")))
    }

    /// What would be done now, with the files as they are this moment.
    pub async fn plan(&self) -> (Vec<Step>, Vec<FileProblem>) {
        let directory = self.config.configs_dir.clone();
        let files = tokio::task::spawn_blocking(move || vmfile::read(&directory)).await.unwrap_or_default();
        let state = self.state();
        let observed: Vec<Observed> = state.vms.values().map(Handle::observed).collect();
        let mut steps = plan(&files, &observed, &state.holds);
        for step in steps.iter_mut().filter(|step| step.action == Action::Restart) {
            let Some(vm) = files.vms.iter().find(|vm| vm.name == step.name) else { continue };
            // What its task is going to find, too.
            if let Some(problem) = files.problems.iter().find(|problem| problem.file == vm.file) {
                step.action = Action::Keep;
                step.reasons = vec![format!("{NOT_STARTABLE}: {}; runs on as before", problem.reason)];
            }
        }
        (steps, files.problems)
    }

    /// How many VMs are in which state.
    /// `None`: the supervisor has not been reached since the worker started.
    pub fn census(&self) -> Option<Census> {
        let state = self.state();
        state.know_what_is.then(|| Census::of(state.vms.values().map(|handle| handle.status().borrow().phase)))
    }

    /// Until a VM's status has changed since the last call. For one caller.
    pub async fn vm_changed(&self) {
        self.context.changed.notified().await;
    }

    /// The devices that files of enabled VMs name, each with the VM.
    pub fn named_devices(&self) -> Vec<(Bdf, Label)> {
        let state = self.state();
        let enabled = state.files.vms.iter().filter(|vm| vm.enabled);
        enabled.flat_map(|vm| vm.machine.devices.iter().map(|function| (function.clone(), vm.name.clone()))).collect()
    }

    /// The VM that has this device, or else the one whose file names it.
    pub async fn vm_of_device(&self, function: &str) -> Result<Label, Failure> {
        let function = Bdf::new(function).map_err(|error| failure(FailureKind::Usage, error.to_string()))?;
        self.link.inventory().await.map_err(|error| failure(FailureKind::Unreachable, format!("the supervisor can't say whose it is: {error}")))?;
        let holder = {
            let facts = self.link.facts();
            let facts = facts.borrow();
            let records = facts.iter().flat_map(|facts| &facts.devices);
            records.filter(|record| record.functions.iter().any(|known| known.function == function)).find_map(|record| record.label.clone())
        };
        let named = || self.named_devices().into_iter().find(|(named, _)| *named == function).map(|(_, name)| name);
        holder.or_else(named).ok_or_else(|| {
            let message = format!("no VM has the device {function}, and no enabled VM's file names it: 'diarch device list' shows what there is");
            failure(FailureKind::NotFound, message)
        })
    }

    /// What the enabled VMs need of the host.
    pub fn uses(&self) -> Uses {
        let state = self.state();
        let mut uses = Uses::default();
        for vm in state.files.vms.iter().filter(|vm| vm.enabled) {
            let routed = state.vms.get(&vm.name).is_some_and(|handle| handle.status().borrow().tap.as_ref().is_some_and(|tap| tap.gateway.is_some()));
            let machine = &vm.machine;
            uses.user_networks += u32::from(machine.tap.is_none());
            uses.taps += u32::from(machine.tap.is_some());
            uses.routed += u32::from(machine.tap.is_some() && routed);
            uses.devices += u32::from(!machine.devices.is_empty());
            uses.shares += u32::from(!machine.shares.is_empty());
        }
        uses
    }

    pub fn problems(&self) -> Vec<FileProblem> {
        self.state().files.problems.clone()
    }

    /// How many VM tasks there are that are to run.
    pub fn driven(&self) -> usize {
        self.state().vms.values().filter(|handle| handle.observed().driven == Driven::ToRun).count()
    }
}

pub fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure { kind, message: message.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const FILE: &str = r#"{"name": "web", "qemu_configuration": {"cores": 1, "mem_mb": 64}, "image": {"kernel": "/dev/null"}, "health": {"qmp": {}}}"#;

    #[tokio::test]
    async fn a_stopped_vm_outlives_a_broken_file_and_goes_with_a_removed_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vms/web.json");
        std::fs::create_dir(dir.path().join("vms")).unwrap();
        std::fs::write(&file, FILE).unwrap();
        let config = Config {
            configs_dir: dir.path().join("vms"),
            supervisor_socket: dir.path().join("none.sock"),
            patience: Duration::from_secs(60),
            ..Config::default()
        };
        let journal = Arc::new(Journal::default());
        let (link, _) = Link::start(&config, Arc::clone(&journal));
        let store = Store::open(&dir.path().join("state")).unwrap();
        let (worker, _notes) = Worker::new(config, link, journal, store.clone(), Logs::open(&dir.path().join("logs")).unwrap());
        let _ = worker.reload().await;
        worker.state().know_what_is = true;
        let mut stopped = worker.order(Order::Stop, "web", "uid 7").await.unwrap().status;
        stopped.wait_for(|status| status.at_rest).await.unwrap();

        std::fs::write(&file, "{\n").unwrap();
        let _ = worker.reload().await;
        let shown = crate::control::view::vm(worker.show("web").unwrap());
        assert_eq!((shown.file.as_deref(), shown.enabled, shown.health.as_deref()), (Some("web.json"), true, Some("qmp")));
        assert!(shown.reason.as_deref().unwrap().contains("web.json can't be used (line 2: not JSON"), "{shown:?}");

        std::fs::remove_file(&file).unwrap();
        let _ = worker.reload().await;
        assert!(worker.shown().is_empty());
        worker.save_holds().await;
        assert_eq!(store.holds(), Holds::default());
    }

    #[tokio::test]
    async fn a_directory_that_hangs_stops_no_vm_and_is_read_when_it_answers() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            configs_dir: dir.path().join("vms"),
            supervisor_socket: dir.path().join("none.sock"),
            patience: Duration::from_secs(60),
            ..Config::default()
        };
        std::fs::create_dir(dir.path().join("vms")).unwrap();
        std::fs::write(dir.path().join("vms/web.json"), FILE).unwrap();
        let journal = Arc::new(Journal::default());
        let (link, _) = Link::start(&config, Arc::clone(&journal));
        let store = Store::open(&dir.path().join("state")).unwrap();
        let (worker, _notes) = Worker::new(config, link, Arc::clone(&journal), store, Logs::open(&dir.path().join("logs")).unwrap());
        // Nothing is known of the files, which is not that there are none.
        assert!(worker.state().files.unreadable);
        let (answer, hangs) = tokio::sync::oneshot::channel();
        *worker.reading.lock().await = Some(tokio::spawn(async move { hangs.await.unwrap_or_default() }));
        let begun = std::time::Instant::now();
        assert_eq!(worker.reload().await, Reread::Again);
        assert!(begun.elapsed() < READ_WITHIN * 2);
        assert!(worker.state().files.unreadable);
        // The late answer is used, and the files are read anew: it may have missed the last change.
        answer.send(Files::default()).unwrap();
        assert_eq!(worker.reload().await, Reread::Again);
        assert_eq!(worker.reload().await, Reread::No);
        assert_eq!(worker.state().files.vms.len(), 1);
    }
}
