//! What the supervisor knows while it runs: the ledger's records with the handles that can't be written down.

use crate::audit::Audit;
use crate::grants::Grants;
use crate::helper::Helpers;
use crate::host::Host;
use crate::ledger::{Ledger, Record};
use crate::limiter::Limiter;
use crate::qemu::{Abilities, HashCache};
use crate::session::Sessions;
use crate::vfio::Devices;
use diarch_ipc::Error;
use diarch_ipc::name::{Label, NicIndex, RequestId, ShareName, Slot, Tenancy};
use diarch_ipc::operation::{Event, KvmVerdict, Operation, Reply, Request, SlotState};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};

/// The whole state. It lives on one thread; no borrow of a `RefCell` is held over an `await`.
pub struct Supervisor {
    pub grants: Grants,
    /// The user whom the grants call the worker, as looked up at the start: who is heard is this one.
    pub worker_uid: u32,
    pub ledger: Ledger,
    /// Where mounts are kept beyond our end.
    pub store: crate::mount::store::Store,
    pub helpers: Helpers,
    pub host: Arc<Host>,
    pub devices: Devices,
    pub sessions: Sessions,
    pub hashes: HashCache,
    pub abilities: Abilities,
    pub qemu_grants: Vec<diarch_ipc::operation::QemuGrant>,
    pub started_ms: u64,
    pub kernel: String,
    /// Whether each QEMU goes into a systemd scope of its own.
    pub scopes: bool,
    pub kvm: RefCell<KvmVerdict>,
    pub audit: RefCell<Audit>,
    pub limiter: RefCell<Limiter>,
    pub slots: RefCell<BTreeMap<Slot, Vm>>,
    /// Slots whose record can't be read: given to nobody.
    pub closed: BTreeSet<Slot>,
    /// Requests that are being worked on, for those that ask again meanwhile.
    pub in_flight: RefCell<HashMap<RequestId, InFlight>>,
    pub sync_scheduled: Cell<bool>,
    pub sync_wanted: tokio::sync::Notify,
    pub filter: crate::net::Turn,
}

/// What a handler gives: the reply with its descriptors, or a refusal. Cheap to clone, since a repeated request gets the same.
pub type Given = Result<(Reply, Vec<Rc<OwnedFd>>), Error>;

/// A request that is being worked on, and where its result will be.
#[derive(Clone)]
pub struct InFlight {
    pub request: Request,
    pub result: watch::Receiver<Option<Given>>,
}

/// One slot.
pub struct Vm {
    pub record: Record,
    /// QEMU's process, while the slot is running.
    pub pidfd: Option<Rc<OwnedFd>>,
    /// The programs beside it.
    pub companions: Vec<Rc<OwnedFd>>,
    /// Which of them has ended, and how, while QEMU runs on.
    pub impaired: Option<String>,
    /// What is mounted for it: gone with the last of its descriptors.
    pub mounts: BTreeMap<ShareName, crate::mount::Held>,
    /// Its taps that no QEMU has yet: gone with the last of their descriptors.
    pub taps: BTreeMap<NicIndex, crate::net::Held>,
    /// It ran before this supervisor started.
    pub adopted: bool,
    /// The step that does not end, if one doesn't.
    pub quarantined: Option<String>,
    /// What was killed and does not end (`vm::lingering`).
    pub lingering: Vec<Rc<OwnedFd>>,
    /// One operation at a time changes a slot.
    pub lock: std::sync::Arc<Mutex<()>>,
}

impl Vm {
    pub fn new(record: Record) -> Self {
        Self {
            record,
            pidfd: None,
            companions: Vec::new(),
            impaired: None,
            mounts: BTreeMap::new(),
            taps: BTreeMap::new(),
            adopted: false,
            quarantined: None,
            lingering: Vec::new(),
            lock: std::sync::Arc::default(),
        }
    }

    /// The state as others see it.
    pub fn state(&self) -> SlotState {
        if self.quarantined.is_some() || !self.lingering.is_empty() { SlotState::Quarantined } else { self.record.state }
    }
}

impl Supervisor {
    /// Finds the VM that a request speaks of. In its slot there may be another by now.
    pub fn tenant(slots: &BTreeMap<Slot, Vm>, tenancy: Tenancy) -> Result<&Vm, Error> {
        let slot = tenancy.slot;
        match slots.get(&slot) {
            Some(vm) if vm.record.claim == tenancy.claim => Ok(vm),
            Some(_) => Err(Error::NotFound { what: format!("slot {slot} under claim {}: it was released, and has been given to another VM", tenancy.claim) }),
            None => Err(Error::NotFound { what: format!("slot {slot}: nobody claimed it") }),
        }
    }

    /// Reads one VM.
    pub fn with<T>(&self, tenancy: Tenancy, read: impl FnOnce(&Vm) -> T) -> Result<T, Error> {
        Self::tenant(&self.slots.borrow(), tenancy).map(read)
    }

    /// Takes the VM's lock, so that nobody else changes it; waits for whoever has it.
    pub async fn lock(&self, tenancy: Tenancy) -> Result<OwnedMutexGuard<()>, Error> {
        let lock = self.with(tenancy, |vm| vm.lock.clone())?;
        Ok(lock.lock_owned().await)
    }

    /// Takes the VM's lock if nobody has it.
    pub fn try_lock(&self, tenancy: Tenancy) -> Result<OwnedMutexGuard<()>, Error> {
        let lock = self.with(tenancy, |vm| vm.lock.clone())?;
        let busy = |_| Error::Conflict { holder: format!("slot {}", tenancy.slot), reason: "another operation on it is under way".into() };
        lock.try_lock_owned().map_err(busy)
    }

    /// Refuses what the table says is not legal in the slot's state.
    pub fn check_state(&self, row: &Operation, tenancy: Tenancy) -> Result<(), Error> {
        let (state, slot) = (self.with(tenancy, Vm::state)?, tenancy.slot);
        if row.states.contains(&state) {
            return Ok(());
        }
        let legal: Vec<&str> = row.states.iter().map(|s| s.as_str()).collect();
        Err(Error::WrongState { state: state.as_str().into(), reason: format!("{} needs slot {slot} to be {}", row.name, legal.join(" or ")) })
    }

    /// Writes a changed record down, and only then takes it as true.
    pub fn record(&self, record: Record) -> Result<(), Error> {
        self.ledger.write(&record).map_err(|error| Error::io("ledger", &error))?;
        if let Some(vm) = self.slots.borrow_mut().get_mut(&record.slot) {
            vm.record = record;
        }
        Ok(())
    }

    /// As [`Supervisor::record`], for what is so, whether it can be written down or not: /run may be full. A restarted supervisor will find it
    /// out again.
    pub fn record_or_believe(&self, record: Record) {
        if let Err(error) = self.record(record.clone()) {
            tracing::error!(slot = %record.slot, state = record.state.as_str(), %error, "the ledger can't be written");
            if let Some(vm) = self.slots.borrow_mut().get_mut(&record.slot) {
                vm.record = record;
            }
        }
    }

    /// Does an effect on a helper thread. If it does not end within the operation's deadline, the slot is quarantined until it does.
    pub async fn act<T: Send + 'static>(
        self: &Rc<Self>,
        row: &Operation,
        slot: Slot,
        step: &'static str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let patience = Duration::from_millis(row.deadline_ms.into());
        // Waiting for a thread is not the slot's fault, and quarantines nothing.
        let place = self.helpers.place(row.effect, patience).await?;
        let mut running = std::pin::pin!(self.helpers.run_in(place, step, work));
        match tokio::time::timeout(patience, running.as_mut()).await {
            Ok(done) => done,
            Err(_) => {
                self.quarantine(slot, Some(format!("{step} did not end within {} ms", row.deadline_ms)));
                let done = running.await;
                self.quarantine(slot, None);
                done
            }
        }
    }

    fn quarantine(&self, slot: Slot, reason: Option<String>) {
        let label = {
            let mut slots = self.slots.borrow_mut();
            let Some(vm) = slots.get_mut(&slot) else { return };
            vm.quarantined.clone_from(&reason);
            vm.record.label.clone()
        };
        if let Some(reason) = reason {
            self.tell_quarantined(slot, label, reason);
        }
    }

    pub fn tell_quarantined(&self, slot: Slot, label: Label, reason: String) {
        tracing::error!(%slot, %label, %reason, "slot quarantined");
        self.note(&format!("slot {slot} quarantined: {reason}"));
        self.sessions.tell(Event::VmQuarantined { slot, label, reason });
    }

    /// As [`Supervisor::note`], for what anybody can cause by connecting: a storm of it must not fill the audit's disk.
    pub fn note_connection(&self, text: &str) {
        if self.limiter.borrow_mut().admit_note(std::time::Instant::now()) {
            tracing::info!("{text}");
            self.note(text);
        }
        self.sync_soon();
    }

    /// Writes something that happened by itself into the audit; a failure is counted there.
    pub fn note(&self, text: &str) {
        let _ = self.audit.borrow_mut().append("note", &format!(",\"text\":{}", crate::audit::quoted(text, 500)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::OPERATIONS;
    use std::time::Instant;

    fn supervisor(directory: &std::path::Path) -> Rc<Supervisor> {
        let text = "[worker]\nuser = 64000\n[vms]\nmax = 4\nuid_first = 200000\nmemory_mib = 64\ncpus_each = 1\n";
        let grants: Grants = toml::from_str(text).unwrap();
        Rc::new(Supervisor {
            limiter: Limiter::new(&grants.limits, Instant::now()).into(),
            kvm: KvmVerdict::NotGranted.into(),
            grants,
            worker_uid: 64_000,
            ledger: Ledger::open(directory).unwrap(),
            store: crate::mount::store::Store::open().unwrap(),
            helpers: Helpers::default(),
            host: Arc::new(Host::real()),
            devices: Devices::open(directory).unwrap(),
            sessions: Sessions::default(),
            hashes: HashCache::default(),
            abilities: Abilities::default(),
            qemu_grants: Vec::new(),
            started_ms: 0,
            kernel: String::new(),
            scopes: false,
            audit: Audit::open(&directory.join("audit")).unwrap().into(),
            slots: RefCell::default(),
            closed: BTreeSet::new(),
            in_flight: RefCell::default(),
            sync_scheduled: Cell::default(),
            sync_wanted: tokio::sync::Notify::new(),
            filter: crate::net::Turn::default(),
        })
    }

    fn claimed(supervisor: &Supervisor) -> Tenancy {
        let slot = Slot::new(0).unwrap();
        let claim = RequestId { session: 1, serial: 1 };
        let record =
            Record { slot, label: Label::new("web").unwrap(), uid: 200_000, claim, state: SlotState::Claimed, run: None, resources: Default::default() };
        supervisor.ledger.create(&record).unwrap();
        supervisor.slots.borrow_mut().insert(slot, Vm::new(record));
        Tenancy { slot, claim }
    }

    #[test]
    fn a_step_that_does_not_end_quarantines_its_slot_and_nothing_else_until_it_does() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let supervisor = supervisor(directory.path());
            let tenancy = claimed(&supervisor);
            let slot = tenancy.slot;
            let state = || supervisor.with(tenancy, Vm::state).unwrap();
            let row: &'static Operation = Box::leak(Box::new(Operation { deadline_ms: 50, ..OPERATIONS[3] }));
            let (release, stuck) = std::sync::mpsc::channel::<()>();
            let acting = Rc::clone(&supervisor);
            let act = tokio::task::spawn_local(async move { acting.act(row, slot, "start QEMU", move || stuck.recv().is_ok()).await });
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert_eq!(state(), SlotState::Claimed);
            tokio::time::sleep(Duration::from_millis(80)).await;
            assert_eq!(state(), SlotState::Quarantined);
            // What needs another state is refused, what ends things is not, and other slots' work goes on.
            let of = |name: &str| OPERATIONS.iter().find(|row| row.name == name).unwrap();
            assert_eq!(supervisor.check_state(of("vm.spawn"), tenancy).unwrap_err().kind(), "wrong-state");
            supervisor.check_state(of("vm.release"), tenancy).unwrap();
            supervisor.check_state(of("vm.signal"), tenancy).unwrap();
            assert!(supervisor.helpers.run("other", || true).await.unwrap());
            release.send(()).unwrap();
            assert!(act.await.unwrap().unwrap(), "its result is not lost");
            assert_eq!(state(), SlotState::Claimed);
        });
    }

    #[test]
    fn a_helper_that_panics_is_an_error_of_its_caller_only() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let supervisor = supervisor(directory.path());
            let error = supervisor.helpers.run("a step", || -> u8 { panic!("as a bug would") }).await.unwrap_err();
            assert_eq!(error.kind(), "failed");
            assert!(supervisor.helpers.run("next", || true).await.unwrap());
        });
    }
}
