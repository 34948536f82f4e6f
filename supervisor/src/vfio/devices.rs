//! The groups that are taken, with a lock for each: one operation at a time changes a group.

use super::record::{Record, Shelf};
use super::thread::{Progress, Running, Threads};
use super::{facts, openers};
use crate::host::Host;
use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::name::{Bdf, Tenancy};
use diarch_ipc::operation::{DeviceState, Event};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, OwnedMutexGuard};

/// A look at who has a node open takes a moment.
const LOOK_PATIENCE: Duration = Duration::from_secs(3);
/// Of those who have a hanging device open, so many are named.
const NAMED: usize = 4;

/// The right to change a group.
pub type Lock = OwnedMutexGuard<()>;

/// All that is known of devices.
#[derive(Debug)]
pub struct Devices {
    shelf: Shelf,
    threads: Threads,
    records: RefCell<BTreeMap<u32, Record>>,
    /// Groups whose record can't be read, and why.
    closed: BTreeMap<u32, String>,
    locks: RefCell<HashMap<u32, Arc<Mutex<()>>>>,
}

impl Devices {
    /// With what an earlier supervisor took.
    pub fn open(run_dir: &Path) -> io::Result<Self> {
        let shelf = Shelf::open(run_dir)?;
        let (records, unreadable) = shelf.load()?;
        Ok(Self {
            shelf,
            threads: Threads::default(),
            records: records.into_iter().map(|record| (record.group, record)).collect::<BTreeMap<_, _>>().into(),
            closed: unreadable.into_iter().map(|lost| (lost.group, lost.reason)).collect(),
            locks: RefCell::default(),
        })
    }

    pub fn all(&self) -> Vec<Record> {
        self.records.borrow().values().cloned().collect()
    }

    pub fn get(&self, group: u32) -> Option<Record> {
        self.records.borrow().get(&group).cloned()
    }

    /// The group that a function was taken with.
    pub fn with(&self, function: &Bdf) -> Option<Record> {
        self.records.borrow().values().find(|record| record.has(function)).cloned()
    }

    /// What a VM has.
    pub fn of(&self, tenancy: Tenancy) -> Vec<Record> {
        self.records.borrow().values().filter(|record| record.held_by(tenancy)).cloned().collect()
    }

    pub fn closed(&self) -> &BTreeMap<u32, String> {
        &self.closed
    }

    /// Writes a record down, and only then takes it as true.
    pub fn put(&self, record: Record) -> Result<(), Error> {
        self.shelf.write(&record).map_err(|error| Error::io("write the device's record", &error))?;
        self.records.borrow_mut().insert(record.group, record);
        Ok(())
    }

    /// As [`Devices::put`], for what is so, whether it can be written down or not.
    pub fn put_or_believe(&self, record: Record) {
        if let Err(error) = self.shelf.write(&record) {
            tracing::error!(group = record.group, state = record.state.as_str(), %error, "the device's record can't be written");
        }
        self.records.borrow_mut().insert(record.group, record);
    }

    /// The group is the host's again.
    pub fn forget(&self, group: u32) {
        if let Err(error) = self.shelf.remove(group) {
            // A restarted supervisor gives it back once more, which changes nothing.
            tracing::error!(group, %error, "the device's record can't be removed");
        }
        self.records.borrow_mut().remove(&group);
    }

    fn mutex(&self, group: u32) -> Arc<Mutex<()>> {
        Arc::clone(self.locks.borrow_mut().entry(group).or_default())
    }

    /// Waits for the group at most `patience`: who has it may hang.
    pub async fn lock(&self, group: u32, patience: Duration) -> Result<Lock, Error> {
        let busy = |_| Error::Conflict { holder: format!("IOMMU group {group}"), reason: "another operation on it is under way".into() };
        tokio::time::timeout(patience, self.mutex(group).lock_owned()).await.map_err(busy)
    }

    pub fn try_lock(&self, group: u32) -> Option<Lock> {
        self.mutex(group).try_lock_owned().ok()
    }
}

/// Why an act gave no result.
#[derive(Debug)]
pub enum NoResult {
    /// Nothing was done.
    NotBegun(Error),
    /// The group is quarantined, and its lock is gone until the step ends.
    Hangs(Error),
}

impl From<NoResult> for Error {
    fn from(no: NoResult) -> Self {
        match no {
            NoResult::NotBegun(error) | NoResult::Hangs(error) => error,
        }
    }
}

impl Supervisor {
    /// How long one step of a device may take.
    pub fn step_patience(&self) -> Duration {
        Duration::from_secs(self.grants.devices.step_seconds.into())
    }

    /// Looks at something on a device thread.
    pub async fn look<T: Send + 'static>(self: &Rc<Self>, look: impl FnOnce(&Host) -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
        let host = Arc::clone(&self.host);
        let mut running = self.devices.threads.run(move |_: &Progress| look(&host))?;
        running.within(self.step_patience()).await.map_err(|stuck| stuck.error())??
    }

    /// Does something to a group on a device thread. If a step hangs, the group is quarantined, with the names of those who hold it; when the step ends after
    /// all, `late` sees to it.
    pub async fn act_on<T: Send + 'static>(
        self: &Rc<Self>,
        record: &Record,
        lock: &mut Option<Lock>,
        work: impl FnOnce(&Host, &Record, &Progress) -> T + Send + 'static,
        late: impl FnOnce(&Rc<Self>, Record, T) + 'static,
    ) -> Result<T, NoResult> {
        let (host, subject) = (Arc::clone(&self.host), record.clone());
        let mut running = self.devices.threads.run(move |progress| work(&host, &subject, progress)).map_err(NoResult::NotBegun)?;
        match running.within(self.step_patience()).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(panicked)) => {
                self.quarantine_device(record.group, panicked.to_string());
                Err(NoResult::Hangs(panicked))
            }
            Err(stuck) => {
                let after = stuck.after.as_secs();
                let mut trouble = format!("{} did not end within {after} s", stuck.step);
                let holders = self.who_holds(record).await;
                if !holders.is_empty() {
                    trouble = format!("{trouble}: {}", holders.join(", "));
                }
                self.quarantine_device(record.group, trouble.clone());
                self.when_it_ends(record.group, running, lock.take(), late);
                Err(NoResult::Hangs(Error::Timeout { step: trouble, after_ms: after.saturating_mul(1000) }))
            }
        }
    }

    fn when_it_ends<T: Send + 'static>(
        self: &Rc<Self>,
        group: u32,
        running: Running<T>,
        lock: Option<Lock>,
        late: impl FnOnce(&Rc<Self>, Record, T) + 'static,
    ) {
        let supervisor = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let done = running.ended().await;
            // Its VM may have been released meanwhile.
            if let (Ok(done), Some(record)) = (done, supervisor.devices.get(group)) {
                late(&supervisor, record, done);
            }
            drop(lock);
        });
    }

    async fn who_holds(self: &Rc<Self>, record: &Record) -> Vec<String> {
        let (group, paths) = (record.group, record.functions.iter().map(|taken| taken.path.clone()).collect::<Vec<_>>());
        let look = self.look(move |host| {
            let found = facts::nodes(host, group, &paths).and_then(|nodes| openers::of(host, &openers::processes(host)?, &nodes));
            found.map_err(|error| Error::io("look who has it open", &error))
        });
        match tokio::time::timeout(LOOK_PATIENCE, look).await {
            Ok(Ok(openers)) => openers.iter().take(NAMED).map(ToString::to_string).collect(),
            _ => Vec::new(),
        }
    }

    /// Nobody gets the group until a release or a reset of it succeeds.
    pub fn quarantine_device(&self, group: u32, trouble: String) {
        let Some(mut record) = self.devices.get(group) else { return };
        record.state = DeviceState::Quarantined;
        record.trouble = Some(trouble.clone());
        let function = record.functions.first().map(|taken| taken.function.clone());
        self.devices.put_or_believe(record);
        tracing::error!(group, trouble, "device quarantined");
        self.note(&format!("device group {group} quarantined: {trouble}"));
        if let Some(function) = function {
            self.sessions.tell(Event::DeviceQuarantined { function, group, reason: trouble });
        }
    }
}
