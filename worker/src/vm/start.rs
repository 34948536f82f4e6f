//! From nothing, or from a QEMU that another worker started, to one that is watched over.

use super::launch::{self, Opened};
use super::qemu::{Origin, Qemu};
use super::{Found, RETRY_REFUSED, Stage, Status, Vm, Want};
use crate::control::protocol::Phase;
use crate::journal::now_ms;
use crate::state::Started;
use crate::vmfile::{Desired, Machine};
use diarch_ipc::Error;
use diarch_ipc::name::{Slot, Tenancy};
use diarch_ipc::operation::{ExitStatus, SlotState};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// A file that does not open within this lies on a file system that hangs.
pub(super) const OPEN_FILES: Duration = Duration::from_secs(10);
/// An adoption that failed is tried again: the VM runs, and only our view of it is missing.
const ADOPT_AGAIN: Duration = Duration::from_secs(5);

/// Why a start came to nothing.
pub(super) enum NotStarted {
    /// It is not going to work as it is written, or as the grants are.
    Refused(String),
    /// It may work the next time.
    Failed(String),
    /// The slot is not as we thought.
    OutOfStep(String),
}

impl Vm {
    pub(super) async fn start(&mut self) -> Stage {
        let intent = self.intent.borrow_and_update().clone();
        let Some(desired) = intent.desired.filter(|_| intent.want == Want::Run) else { return Stage::Rest };
        if intent.starts > self.status.borrow().seen_starts {
            self.told_failed = None;
        }
        self.set(|status| {
            status.phase = Phase::Starting;
            status.retry_ms = None;
            status.machine = Some(Arc::new(desired.machine.clone()));
            status.tap = None;
            status.revision = Some(desired.revision.clone());
            status.file = Some(desired.file.clone());
            status.seen_starts = intent.starts;
            status.seen_restarts = intent.restarts;
            status.pid = None;
            status.started_ms = None;
            status.healthy_ms = None;
            status.guest_reboots = 0;
            status.refused = None;
            status.at_rest = false;
        });
        self.health = desired.health.clone();
        let failure = self.status.borrow().reason.clone().filter(|_| self.pace.failures() > 0);
        if self.told_failed.is_none() {
            self.note("vm.starting", failure.map_or(intent.why, |failure| format!("again, after failure {} in a row: {failure}", self.pace.failures())));
        }
        let stage = match self.spawn(&desired).await {
            Ok(qemu) => return Stage::Watch(Box::new(qemu)),
            Err(NotStarted::Refused(reason)) => {
                self.set(|status| status.reason = Some(reason));
                Stage::Failed { retry: Some(RETRY_REFUSED) }
            }
            Err(NotStarted::Failed(reason)) => {
                self.note("vm.not-started", reason.clone());
                self.after_failure(reason)
            }
            Err(NotStarted::OutOfStep(reason)) => {
                self.note("vm.not-started", reason.clone());
                match self.resync().await {
                    Some(found) => return Stage::Adopt(Box::new(found)),
                    None => self.after_failure(reason),
                }
            }
        };
        if self.intent.borrow().want == Want::Run { stage } else { Stage::Rest }
    }

    async fn spawn(&mut self, desired: &Arc<Desired>) -> Result<Qemu, NotStarted> {
        let context = Arc::clone(&self.context);
        // Closed never: the semaphore lives as long as the tasks.
        let permit = context.starts.acquire().await.ok();
        let accelerator = launch::accelerator(desired.machine.accel, &context.link, &context.journal, &context.tcg).await.map_err(NotStarted::Refused)?;
        let (logs, name, vm) = (context.logs.clone(), self.name.clone(), Arc::clone(desired));
        let files = timeout(OPEN_FILES, tokio::task::spawn_blocking(move || launch::open(&logs, &name, &vm.machine)));
        // Side by side: neither needs the other.
        let (files, tenancy) = tokio::join!(files, self.tenancy());
        let Opened { fds, log_mark } = match files {
            Ok(Ok(opened)) => opened.map_err(NotStarted::Refused)?,
            Ok(Err(error)) => return Err(NotStarted::Failed(format!("opening its files failed: {error}"))),
            Err(_) => return Err(NotStarted::Failed(format!("its files did not open within {} s", OPEN_FILES.as_secs()))),
        };
        let tenancy = tenancy.map_err(|error| judge(&error))?;
        let slot = tenancy.slot;
        let _permit = if self.needs_equipment(&desired.machine) {
            // A driver can take a minute to let go of its device: nobody waits for it in here.
            drop(permit);
            self.equip(tenancy, &desired.machine).await?;
            context.starts.acquire().await.ok()
        } else {
            permit
        };
        let events = context.link.subscribe(slot);
        let spec = launch::spec(&desired.machine, accelerator);
        let (spawned, handles) = context.link.spawn(tenancy, spec, fds).await.map_err(|error| judge(&error))?;
        self.note("vm.spawned", format!("QEMU started as process {} in slot {slot} ({})", spawned.pid, word(accelerator)));
        self.set(|status| {
            status.phase = Phase::Booting;
            status.reason = None;
            status.pid = Some(spawned.pid);
            status.accelerator = Some(accelerator);
            status.started_ms = Some(spawned.spawned_ms);
        });
        self.told_failed = None;
        self.record(slot, spawned.spawned_ms, &desired.file, &desired.machine);
        Qemu::new(tenancy, Origin::Spawned, spawned.spawned_ms, Some(log_mark), handles, events)
            .map_err(|error| NotStarted::OutOfStep(format!("QEMU's descriptors can't be used: {error}")))
    }

    /// The slot that is ours already, or a new one.
    async fn tenancy(&mut self) -> Result<Tenancy, Error> {
        if let Some(tenancy) = self.tenancy {
            return Ok(tenancy);
        }
        let tenancy = self.context.link.claim(&self.name).await?;
        self.tenancy = Some(tenancy);
        self.set(|status| status.tenancy = Some(tenancy));
        Ok(tenancy)
    }

    fn record(&self, slot: Slot, spawned_ms: u64, file: &str, machine: &Machine) {
        let tap = self.status.borrow().tap.clone();
        let started = Started { slot, spawned_ms, file: file.to_owned(), machine: machine.clone(), tap };
        if let Err(error) = self.context.store.save_started(&self.name, &started) {
            // Costs the next worker its comparison, and the VM nothing.
            tracing::warn!(vm = %self.name, %error, "what this VM was started as can't be recorded");
        }
    }

    /// Asks the supervisor what there is under our name. A QEMU that runs is given back to be adopted.
    async fn resync(&mut self) -> Option<Found> {
        match self.context.link.find(&self.name).await {
            Ok(Some(record)) => {
                self.tenancy = Some(record.tenancy());
                self.set(|status| status.tenancy = Some(record.tenancy()));
                if record.state == SlotState::Quarantined {
                    self.give_back().await;
                    return None;
                }
                let Status { machine, tap, file, .. } = self.status.borrow().clone();
                let machine = machine.as_deref().cloned();
                matches!(record.state, SlotState::Running | SlotState::Spawning).then_some(Found { record, machine, tap, file })
            }
            Ok(None) => {
                self.without_slot();
                None
            }
            Err(error) => {
                tracing::warn!(vm = %self.name, %error, "the supervisor's inventory is out of reach");
                None
            }
        }
    }

    /// Takes over a QEMU that runs, without touching it.
    pub(super) async fn adopt(&mut self, found: Found) -> Stage {
        let intent = self.intent.borrow().clone();
        let Found { record, machine, tap, file } = found;
        // What was forgotten is taken to be what the file says now: a later change of it counts from here.
        let assumed = machine.or_else(|| intent.desired.as_ref().map(|desired| desired.machine.clone()));
        let file = file.or_else(|| intent.desired.as_ref().map(|desired| desired.file.clone()));
        let spawned_ms = record.spawned_ms.unwrap_or_else(now_ms);
        self.set(|status| {
            status.phase = Phase::Booting;
            status.pid = record.pid;
            status.accelerator = record.accelerator;
            status.started_ms = Some(spawned_ms);
            status.machine = assumed.clone().map(Arc::new);
            status.tap = tap.clone();
            status.revision = intent.desired.as_ref().map(|desired| desired.revision.clone());
            status.file = file.clone();
            status.seen_starts = intent.starts;
        });
        let events = self.context.link.subscribe(record.slot);
        let attached =
            self.context.link.attach(record.tenancy()).await.and_then(|handles| {
                Qemu::new(record.tenancy(), Origin::Adopted, spawned_ms, None, handles, events).map_err(|error| Error::io("adopt", &error))
            });
        match attached {
            Ok(qemu) => {
                self.set(|status| status.reason = None);
                if let (Some(machine), Some(file)) = (&assumed, &file) {
                    self.record(record.slot, spawned_ms, file, machine);
                }
                self.note("vm.adopted", format!("QEMU runs as process {} in slot {}", record.pid.unwrap_or(0), record.slot));
                Stage::Watch(Box::new(qemu))
            }
            Err(error) => self.not_adopted(Found { record, machine: assumed, tap, file }, &error).await,
        }
    }

    async fn not_adopted(&mut self, found: Found, error: &Error) -> Stage {
        let reason = format!("it runs, and can't be attached to: {error}");
        let news = self.status.borrow().reason.as_ref() != Some(&reason);
        self.set(|status| {
            status.phase = Phase::Unhealthy;
            status.reason = Some(reason.clone());
        });
        if news {
            self.note("vm.not-adopted", reason);
        }
        tokio::select! {
            () = sleep(ADOPT_AGAIN) => {}
            () = self.changed() => {}
        }
        if self.intent.borrow().want != Want::Run {
            // Without its monitor there is no gentle way; releasing kills it.
            return Stage::Rest;
        }
        match self.context.link.find(&self.name).await {
            Ok(Some(now)) if matches!(now.state, SlotState::Running | SlotState::Spawning | SlotState::Quarantined) => {
                Stage::Adopt(Box::new(Found { record: now, ..found }))
            }
            Ok(Some(now)) => {
                let exit = now.exit.unwrap_or(ExitStatus::Unknown);
                self.take_note_of_exit(exit);
                self.after_failure(format!("it ended with {exit}"))
            }
            Ok(None) => {
                self.without_slot();
                self.after_failure("it is gone, with its slot".into())
            }
            Err(_) => Stage::Adopt(Box::new(found)),
        }
    }
}

/// What a refusal of the supervisor means for the next try.
fn judge(error: &Error) -> NotStarted {
    let reason = error.to_string();
    match error {
        // Not by itself: root changes the grants, somebody the file; a full host empties when another VM goes.
        Error::Denied { .. } | Error::Invalid { .. } | Error::Unsupported { .. } | Error::Exhausted { .. } => NotStarted::Refused(reason),
        // It may have been done all the same.
        Error::Timeout { .. } | Error::WrongState { .. } | Error::NotFound { .. } | Error::Conflict { .. } => NotStarted::OutOfStep(reason),
        Error::Superseded | Error::Failed { .. } => NotStarted::Failed(reason),
    }
}

fn word(accelerator: diarch_ipc::spec::Accelerator) -> &'static str {
    match accelerator {
        diarch_ipc::spec::Accelerator::Kvm => "kvm",
        diarch_ipc::spec::Accelerator::Tcg => "tcg",
    }
}
