//! One VM, driven by one task.
//!
//! ```text
//!                         intent: run
//!              +------------------------------+
//!              |                              v      vm.claim, vm.spawn
//!            Rest <--------------------+    Start ----------------------> Watch --probe--> (Booting, Healthy, Unhealthy)
//!         (Stopped)                    |    ^ ^ |                          |  |
//!              ^                       |    | | | can't be started         |  | intent: stop, restart; health failure; mute
//!              |      by its own will  |    | | +--> Failed               |  v
//!              +-----------------------+----|-|------------------- ended --+ Down (power-off, quit, kill)
//!              |                            | |                      |            |
//!              |                            | +-- BackOff <-failure--+            |
//!              +----------------------------+-------------------------------------+
//!
//!   found running in the inventory: Adopt --vm.attach--> Watch
//! ```
//!
//! A restart begins only after a trial says that the next QEMU could start: see [`trial`].
//!
//! The intent is a level and not an order: the task looks at the newest one when it can. One VM's silence holds nobody else's task, and
//! everything that waits has a deadline or can be called off.

mod bring_down;
mod ending;
mod equipment;
pub mod launch;
mod pace;
mod qemu;
mod start;
mod trial;
mod watch_over;

use crate::control::protocol::Phase;
use crate::journal::{Journal, now_ms};
use crate::logs::Logs;
use crate::plan::{Activity, Driven, Observed};
use crate::state::Store;
use crate::supervisor::Link;
use crate::vmfile::{Desired, Health, Machine, RestartPolicy};
use diarch_ipc::name::{Label, Tenancy};
use diarch_ipc::operation::{ExitStatus, SlotState, TapOpened, VmRecord};
use diarch_ipc::spec::Accelerator;
use equipment::Equipment;
use pace::{Next, Pace};
use qemu::Qemu;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

/// Starts on their way at one time: the supervisor works on a bounded number of helper threads, and the rest would only wait there
/// with their deadlines running.
const STARTS_AT_ONCE: usize = 8;
/// A start that the supervisor refuses, or whose files are missing, is tried again so often: grants and files change without telling us.
const RETRY_REFUSED: Duration = Duration::from_secs(60);

/// What all VM tasks share.
pub struct Context {
    pub link: Arc<Link>,
    pub journal: Arc<Journal>,
    pub store: Store,
    pub logs: Logs,
    pub notes: mpsc::UnboundedSender<Note>,
    /// Told after each change of a status.
    pub changed: Notify,
    starts: Semaphore,
    tcg: launch::TcgWarning,
}

impl Context {
    pub fn new(link: Arc<Link>, journal: Arc<Journal>, store: Store, logs: Logs, notes: mpsc::UnboundedSender<Note>) -> Self {
        Self { link, journal, store, logs, notes, changed: Notify::new(), starts: Semaphore::new(STARTS_AT_ONCE), tcg: launch::TcgWarning::default() }
    }
}

/// What a VM task tells the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// It rests: no process, no slot.
    AtRest(Label),
    /// It ended by its own will, or may not be restarted, and is not to be started again by itself.
    Hold(Label, String),
    /// Its task panicked, and nobody drives it.
    Broken(Label),
}

/// Tells of a task that panics.
struct Alarm {
    name: Label,
    notes: mpsc::UnboundedSender<Note>,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.notes.send(Note::Broken(self.name.clone()));
        }
    }
}

/// What the worker wants of a VM.
#[derive(Debug, Clone)]
pub struct Intent {
    /// None: no file defines it.
    pub desired: Option<Arc<Desired>>,
    pub want: Want,
    /// Raised: start it now, whatever failed before.
    pub starts: u64,
    /// Raised: a QEMU that runs is stopped first.
    pub restarts: u64,
    /// Raised: its devices are reset before the next start.
    pub recovers: u64,
    /// One sentence for people.
    pub why: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    Run,
    /// By power button, then by QMP, then by force.
    Stop,
    /// By force at once.
    Kill,
}

/// Where a VM is, for the command and the plan.
#[derive(Debug, Clone)]
pub struct Status {
    pub phase: Phase,
    pub reason: Option<String>,
    pub tenancy: Option<Tenancy>,
    pub pid: Option<u32>,
    pub accelerator: Option<Accelerator>,
    pub started_ms: Option<u64>,
    pub healthy_ms: Option<u64>,
    pub restarts: u32,
    pub guest_reboots: u32,
    pub last_exit: Option<String>,
    pub retry_ms: Option<u64>,
    /// What it was started as.
    pub machine: Option<Arc<Machine>>,
    /// The tap of its network card.
    pub tap: Option<TapOpened>,
    pub revision: Option<String>,
    pub file: Option<String>,
    /// The intent's counters when it was last started: who waits for a start knows by them which start it sees.
    pub seen_starts: u64,
    pub seen_restarts: u64,
    /// A restart that can't be made: it runs on as it was started.
    pub refused: Option<Refused>,
    /// Its task has given everything back: there is no process and no slot.
    pub at_rest: bool,
}

/// Why a VM was not restarted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Of the file that can't be started.
    pub revision: String,
    pub sentence: String,
    /// The intent's counter, for who waits for this restart.
    pub restarts: u64,
}

impl Status {
    fn new() -> Self {
        Self {
            phase: Phase::Stopped,
            reason: None,
            tenancy: None,
            pid: None,
            accelerator: None,
            started_ms: None,
            healthy_ms: None,
            restarts: 0,
            guest_reboots: 0,
            last_exit: None,
            retry_ms: None,
            machine: None,
            tap: None,
            revision: None,
            file: None,
            seen_starts: 0,
            seen_restarts: 0,
            refused: None,
            at_rest: false,
        }
    }
}

/// What was found of a VM when the worker started.
#[derive(Debug, Clone)]
pub struct Found {
    pub record: VmRecord,
    /// What it was started as, where that is on record.
    pub machine: Option<Machine>,
    pub tap: Option<TapOpened>,
    pub file: Option<String>,
}

impl Found {
    pub fn observed(&self) -> Observed {
        let activity = match self.record.state {
            SlotState::Claimed => Activity::Claimed,
            SlotState::Spawning | SlotState::Running => Activity::Running,
            SlotState::Exited => Activity::Ended(self.record.exit.unwrap_or(ExitStatus::Unknown)),
            SlotState::Releasing => Activity::Stopping,
            SlotState::Quarantined => Activity::Quarantined,
        };
        let (machine, file) = (self.machine.clone(), self.file.clone());
        Observed { name: self.record.label.clone(), activity, driven: Driven::Unmanaged, machine, file, revision: None, refused: None }
    }
}

/// The worker's handle on a VM task. Dropped, the task ends (and its VM runs on).
#[derive(Debug)]
pub struct Handle {
    pub name: Label,
    intent: watch::Sender<Intent>,
    status: watch::Receiver<Status>,
    task: tokio::task::AbortHandle,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Handle {
    pub fn start(context: Arc<Context>, name: Label, intent: Intent, found: Option<Found>) -> Self {
        let (intent_in, intent_out) = watch::channel(intent);
        let (status_in, status) = watch::channel(Status::new());
        let vm = Vm::new(context, name.clone(), intent_out, status_in);
        // Boxed: the largest of its states would otherwise be paid for twice while the task is made.
        let task = tokio::spawn(Box::pin(vm.run(found))).abort_handle();
        Self { name, intent: intent_in, status, task }
    }

    pub fn intend(&self, change: impl FnOnce(&mut Intent)) {
        self.intent.send_modify(change);
    }

    pub fn intent(&self) -> Intent {
        self.intent.borrow().clone()
    }

    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    pub fn observed(&self) -> Observed {
        let intent = self.intent.borrow();
        let status = self.status.borrow();
        let activity = match status.phase {
            Phase::Unknown | Phase::Stopped => Activity::Stopped,
            Phase::Starting | Phase::Booting | Phase::Healthy | Phase::Unhealthy => Activity::Running,
            Phase::Stopping => Activity::Stopping,
            Phase::BackOff => Activity::BackOff,
            Phase::Failed => Activity::Failed,
        };
        Observed {
            name: self.name.clone(),
            activity,
            driven: if intent.want == Want::Run { Driven::ToRun } else { Driven::ToStop },
            machine: status.machine.as_deref().cloned(),
            file: status.file.clone(),
            revision: status.revision.clone(),
            refused: status.refused.as_ref().map(|refused| (refused.revision.clone(), refused.sentence.clone())),
        }
    }
}

/// The task's own side.
struct Vm {
    context: Arc<Context>,
    name: Label,
    intent: watch::Receiver<Intent>,
    status: watch::Sender<Status>,
    tenancy: Option<Tenancy>,
    equipment: Equipment,
    /// The intent's `recovers` when devices were last reset for it.
    recovered: u64,
    pace: Pace,
    /// Why it is failed, as it was told: a retry that fails the same way is no news.
    told_failed: Option<String>,
    /// What its QEMU runs on without, and can't get back.
    impaired: Option<String>,
    /// The probe of what runs, which is not that of a changed file that can't be started.
    health: Option<Health>,
}

/// What the task does next.
enum Stage {
    Rest,
    Adopt(Box<Found>),
    Start,
    Watch(Box<Qemu>),
    Down(Box<Qemu>, bring_down::Cause),
    BackOff(Duration),
    /// `retry`: it may pass by itself.
    Failed {
        retry: Option<Duration>,
    },
}

impl Vm {
    fn new(context: Arc<Context>, name: Label, intent: watch::Receiver<Intent>, status: watch::Sender<Status>) -> Self {
        let (tenancy, equipment, pace) = (None, Equipment::default(), Pace::default());
        Self { context, name, intent, status, tenancy, equipment, recovered: 0, pace, told_failed: None, impaired: None, health: None }
    }

    async fn run(mut self, found: Option<Found>) {
        let _alarm = Alarm { name: self.name.clone(), notes: self.context.notes.clone() };
        let mut stage = self.first_stage(found);
        loop {
            stage = match stage {
                Stage::Rest => self.rest().await,
                Stage::Adopt(found) => self.adopt(*found).await,
                Stage::Start => self.start().await,
                Stage::Watch(qemu) => self.watch_over(qemu).await,
                Stage::Down(qemu, cause) => self.bring_down(qemu, cause).await,
                Stage::BackOff(pause) => self.back_off(pause).await,
                Stage::Failed { retry } => self.failed(retry).await,
            };
        }
    }

    fn first_stage(&mut self, found: Option<Found>) -> Stage {
        let Some(found) = found else { return self.wanted() };
        self.tenancy = Some(found.record.tenancy());
        self.equipment = {
            let facts = self.context.link.facts();
            let facts = facts.borrow();
            Equipment::found(found.record.slot, found.machine.as_ref(), facts.as_ref().map_or(&[], |facts| &facts.devices))
        };
        self.set(|status| status.tenancy = Some(found.record.tenancy()));
        match found.record.state {
            SlotState::Spawning | SlotState::Running | SlotState::Quarantined => Stage::Adopt(Box::new(found)),
            SlotState::Exited => {
                let exit = found.record.exit.unwrap_or(ExitStatus::Unknown);
                self.take_note_of_exit(exit);
                self.set(|status| status.last_exit = Some(format!("{exit}, while no worker watched")));
                self.wanted()
            }
            SlotState::Claimed | SlotState::Releasing => self.wanted(),
        }
    }

    /// Start or rest, as the intent says now.
    fn wanted(&self) -> Stage {
        let intent = self.intent.borrow();
        if intent.want == Want::Run && intent.desired.is_some() { Stage::Start } else { Stage::Rest }
    }

    /// Gives the slot back, and waits to be wanted.
    async fn rest(&mut self) -> Stage {
        self.give_back().await;
        let why = self.intent.borrow_and_update().why.clone();
        self.pace.forget();
        self.set(|status| {
            let reason = if status.phase == Phase::Stopped { None } else { status.reason.take() };
            *status = Status {
                phase: Phase::Stopped,
                reason: Some(reason.unwrap_or(why)),
                last_exit: status.last_exit.take(),
                restarts: status.restarts,
                at_rest: true,
                ..Status::new()
            };
        });
        let _ = self.context.notes.send(Note::AtRest(self.name.clone()));
        loop {
            if self.called_for() {
                return Stage::Start;
            }
            self.changed().await;
            let why = self.intent.borrow().why.clone();
            self.set(|status| status.reason = Some(why));
        }
    }

    /// An intent to run that is newer than the last start.
    fn called_for(&self) -> bool {
        let intent = self.intent.borrow();
        intent.want == Want::Run && intent.desired.is_some() && intent.starts > self.status.borrow().seen_starts
    }

    async fn back_off(&mut self, pause: Duration) -> Stage {
        if pause.is_zero() {
            return self.wanted();
        }
        let retry = Instant::now() + pause;
        self.set(|status| {
            status.phase = Phase::BackOff;
            status.retry_ms = Some(now_ms().saturating_add(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX)));
        });
        self.note("vm.back-off", format!("failure {} in a row: it is started again in {} s", self.pace.failures(), pause.as_secs()));
        self.until(Some(retry)).await
    }

    async fn failed(&mut self, retry: Option<Duration>) -> Stage {
        self.give_back().await;
        self.set(|status| {
            status.phase = Phase::Failed;
            status.retry_ms = retry.map(|retry| now_ms().saturating_add(u64::try_from(retry.as_millis()).unwrap_or(u64::MAX)));
        });
        let reason = self.status.borrow().reason.clone().unwrap_or_default();
        if self.told_failed.as_ref() != Some(&reason) {
            self.note("vm.failed", reason.clone());
            self.told_failed = Some(reason);
        }
        self.until(retry.map(|retry| Instant::now() + retry)).await
    }

    /// Waits for the time, or for a newer intent.
    async fn until(&mut self, time: Option<Instant>) -> Stage {
        loop {
            let over = async {
                match time {
                    Some(time) => sleep_until(time).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = over => return self.wanted(),
                () = self.changed() => {}
            }
            if self.intent.borrow().want != Want::Run {
                return Stage::Rest;
            }
            if self.called_for() {
                self.pace.forget();
                return Stage::Start;
            }
        }
    }

    /// What follows a failure: `reason` is already told.
    fn after_failure(&mut self, reason: String) -> Stage {
        self.set(|status| status.reason = Some(reason));
        if self.intent.borrow().want != Want::Run {
            return Stage::Rest;
        }
        if self.intent.borrow().desired.as_ref().is_some_and(|desired| desired.restart == RestartPolicy::Never) {
            let reason = self.status.borrow().reason.clone().unwrap_or_default();
            let _ = self.context.notes.send(Note::Hold(self.name.clone(), reason));
            return Stage::Rest;
        }
        let next = self.pace.failed();
        self.set(|status| status.restarts = status.restarts.saturating_add(1));
        match next {
            Next::Now => Stage::Start,
            Next::After(pause) => Stage::BackOff(pause),
            Next::GiveUp => {
                let failures = self.pace.failures();
                self.set(|status| {
                    let last = status.reason.take().unwrap_or_default();
                    status.reason = Some(format!("it failed {failures} times in a row and never was healthy; the last time: {last}"));
                });
                Stage::Failed { retry: None }
            }
        }
    }

    /// The slot, back to the supervisor. Tried until it is gone: what is not given back is held for ever.
    async fn give_back(&mut self) {
        let mut pause = Duration::from_millis(100);
        while let Some(tenancy) = self.tenancy {
            match self.context.link.release(tenancy).await {
                Ok(()) | Err(diarch_ipc::Error::NotFound { .. }) => {
                    self.context.link.unsubscribe(tenancy.slot);
                    self.context.store.forget_started(&self.name);
                    self.without_slot();
                }
                Err(error) => {
                    tracing::warn!(vm = %self.name, slot = %tenancy.slot, %error, "a slot can't be released yet");
                    sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(30));
                }
            }
        }
    }

    /// What hung on the slot went with it.
    fn without_slot(&mut self) {
        self.tenancy = None;
        self.equipment = Equipment::default();
        self.set(|status| {
            status.tenancy = None;
            status.tap = None;
        });
    }

    /// A QEMU that did not close its devices in order leaves them in the middle of what they did.
    fn take_note_of_exit(&mut self, status: ExitStatus) {
        if status != ExitStatus::Code(0) {
            self.equipment.soil();
        }
    }

    /// Until the worker says something new. Its handle outlives the task.
    async fn changed(&mut self) {
        if self.intent.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    fn set(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
        self.context.changed.notify_one();
    }

    fn note(&self, kind: &'static str, message: impl Into<String>) {
        self.context.journal.note(Some(&self.name), kind, message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_told_of_and_one_that_ends_is_not() {
        let (notes, mut told) = mpsc::unbounded_channel();
        let alarm = |name: &str| Alarm { name: Label::new(name).unwrap(), notes: notes.clone() };
        let ends = alarm("ends");
        tokio::spawn(async move { drop(ends) }).await.unwrap();
        let breaks = alarm("breaks");
        let broken = tokio::spawn(async move {
            let _alarm = breaks;
            tokio::task::yield_now().await;
            panic!("a bug");
        });
        broken.await.unwrap_err();
        assert_eq!(told.recv().await, Some(Note::Broken(Label::new("breaks").unwrap())));
        told.try_recv().unwrap_err();
    }
}
