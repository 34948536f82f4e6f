//! Before a QEMU that runs is stopped for a restart: whether the next one could be started at all.
//!
//! ```text
//!   a restart is wanted --> trial (files opened and closed, limits compared; the VM runs on meanwhile)
//!                             |-- it could start ----> Down, Start
//!                             +-- it couldn't -------> vm.not-restarted; tried again every 60 s, and when the file changes
//! ```

use super::start::OPEN_FILES;
use super::{Context, RETRY_REFUSED, Refused, Vm, Want, launch};
use crate::plan::NOT_STARTABLE;
use crate::vmfile::{Desired, Machine};
use diarch_ipc::name::Label;
use diarch_ipc::operation::{DeviceState, HostInventory};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// The inventory is one quick question; where it takes longer, a start would not succeed either.
const INVENTORY: Duration = Duration::from_secs(10);

/// What is tried while a QEMU is watched over.
#[derive(Default)]
pub struct Trials {
    now: Option<Trial>,
    /// The intent's `restarts` that were tried in vain: only a higher number asks anew.
    tried: u64,
    pub again: Option<Instant>,
}

struct Trial {
    task: JoinHandle<Result<(), String>>,
    desired: Arc<Desired>,
    restarts: u64,
    /// Asked for by the worker or an operator, and not just repeated.
    ordered: bool,
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Trials {
    /// How the trial under way ends; never, where there is none.
    pub async fn outcome(&mut self) -> Result<(), String> {
        match &mut self.now {
            Some(trial) => (&mut trial.task).await.unwrap_or_else(|error| Err(format!("looking whether it can failed: {error}"))),
            None => std::future::pending().await,
        }
    }
}

impl Vm {
    /// Begins a trial where the intent asks for a restart, and drops what the intent has overtaken.
    pub(super) fn look_for_restart(&self, trials: &mut Trials) {
        let intent = self.intent.borrow().clone();
        let Some(desired) = intent.desired.filter(|_| intent.want == Want::Run) else { return };
        let (seen, refused) = {
            let status = self.status.borrow();
            (status.seen_restarts, status.refused.as_ref().map(|refused| refused.revision.clone()))
        };
        if intent.restarts > seen.max(trials.tried) {
            match &mut trials.now {
                Some(trial) if trial.desired.revision == desired.revision => (trial.restarts, trial.ordered) = (intent.restarts, true),
                _ => trials.now = Some(self.trial(desired, intent.restarts, true)),
            }
        } else if refused.is_some_and(|revision| revision != desired.revision) {
            // The file changed once more, and back to what runs: else the plan had asked for a restart.
            (trials.now, trials.again) = (None, None);
            self.set(|status| status.refused = None);
        }
    }

    /// Tries again what was refused.
    pub(super) fn try_again(&self, trials: &mut Trials) {
        trials.again = None;
        let intent = self.intent.borrow().clone();
        if let Some(desired) = intent.desired
            && trials.now.is_none()
        {
            trials.now = Some(self.trial(desired, intent.restarts, false));
        }
    }

    /// True: the restart may begin.
    pub(super) fn tried(&self, trials: &mut Trials, outcome: Result<(), String>) -> bool {
        let Some(trial) = trials.now.take() else { return false };
        let differs = self.status.borrow().machine.as_deref() != Some(&trial.desired.machine);
        let Err(reason) = outcome else {
            trials.again = None;
            self.set(|status| status.refused = None);
            return trial.ordered || differs;
        };
        let what = if differs { NOT_STARTABLE } else { "its file can't be started" };
        let sentence = format!("{what}: {reason}; runs on as before");
        let known = self.status.borrow().refused.as_ref().is_some_and(|refused| refused.sentence == sentence);
        if trial.ordered || !known {
            self.note("vm.not-restarted", sentence.clone());
        }
        trials.tried = trial.restarts;
        trials.again = Some(Instant::now() + RETRY_REFUSED);
        let (revision, restarts) = (trial.desired.revision.clone(), trial.restarts);
        self.set(|status| status.refused = Some(Refused { revision, sentence, restarts }));
        false
    }

    fn trial(&self, desired: Arc<Desired>, restarts: u64, ordered: bool) -> Trial {
        let task = tokio::spawn(can_start(Arc::clone(&self.context), self.name.clone(), Arc::clone(&desired)));
        Trial { task, desired, restarts, ordered }
    }
}

/// As far as that can be known without doing it.
async fn can_start(context: Arc<Context>, name: Label, desired: Arc<Desired>) -> Result<(), String> {
    let vm = Arc::clone(&desired);
    // Not the logs: opening them could rotate the one that QEMU writes.
    match timeout(OPEN_FILES, tokio::task::spawn_blocking(move || launch::files(&vm.machine).map(drop))).await {
        Ok(Ok(opened)) => opened?,
        Ok(Err(error)) => return Err(format!("opening its files failed: {error}")),
        Err(_) => return Err(format!("its files did not open within {} s", OPEN_FILES.as_secs())),
    }
    let vms = match timeout(INVENTORY, context.link.inventory()).await {
        Ok(vms) => vms.map_err(|error| format!("the supervisor can't say whether it may: {error}"))?,
        Err(_) => return Err(format!("the supervisor did not say within {} s whether it may", INVENTORY.as_secs())),
    };
    let own = vms.iter().find(|vm| vm.label == name).and_then(|vm| vm.memory).map_or(0, |memory| u64::from(memory.get()));
    if let Some(facts) = context.link.facts().borrow().as_ref() {
        within(&desired.machine, facts, own)?;
        free(&desired.machine, facts, &name)?;
    }
    launch::accelerator(desired.machine.accel, &context.link, &context.journal, &context.tcg).await.map(drop)
}

/// `own`: the memory that the stop would give back.
fn within(machine: &Machine, facts: &HostInventory, own: u64) -> Result<(), String> {
    let limits = &facts.limits;
    if machine.cpus.get() > limits.cpus_each {
        return Err(format!("{} cores, and the grants allow {} to each VM", machine.cpus, limits.cpus_each));
    }
    let memory = u64::from(machine.memory.get());
    let free = limits.memory_mib.saturating_sub(limits.memory_mib_used.saturating_sub(own));
    if memory > free {
        return Err(format!("{memory} MiB of memory, and of the {} MiB that the grants allow to all VMs {free} are left to it", limits.memory_mib));
    }
    if !facts.qemu.iter().any(|granted| granted.name == machine.qemu) {
        return Err(format!("no QEMU named {} is granted", machine.qemu));
    }
    Ok(())
}

/// Of the devices, those that are on the supervisor's list: what it would say of the others only the kernel knows.
fn free(machine: &Machine, facts: &HostInventory, name: &Label) -> Result<(), String> {
    for function in &machine.devices {
        let held = facts.devices.iter().find(|record| record.functions.iter().any(|known| known.function == *function));
        match held.map(|record| (record, record.label.as_ref())) {
            // Its own is no conflict, whatever its state: a restart is how it is mended.
            None => {}
            Some((_, Some(label))) if label == name => {}
            Some((_, Some(label))) => return Err(format!("the device {function} is held by {label}")),
            Some((record, None)) if record.state == DeviceState::Quarantined => {
                let why = record.trouble.as_deref().unwrap_or("without a reason");
                return Err(format!("the device {function} is quarantined ({why}): diarch device recover {function}"));
            }
            Some((_, None)) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmfile::tests::desired;
    use diarch_ipc::name::{Cpus, MiB, QemuName};
    use diarch_ipc::operation::{AuditState, KvmVerdict, Limits, QemuGrant};

    #[tokio::test]
    async fn a_vm_runs_on_when_its_changed_file_can_t_be_started() {
        let dir = tempfile::tempdir().unwrap();
        let config =
            crate::config::Config { supervisor_socket: dir.path().join("none.sock"), patience: Duration::from_secs(60), ..crate::config::Config::default() };
        let journal = Arc::new(crate::journal::Journal::default());
        let (link, _) = crate::supervisor::Link::start(&config, Arc::clone(&journal));
        let (notes, _) = tokio::sync::mpsc::unbounded_channel();
        let (store, logs) = (crate::state::Store::open(dir.path()).unwrap(), crate::logs::Logs::open(dir.path()).unwrap());
        let old = desired("a");
        let mut new = Desired { revision: "new".into(), ..old.clone() };
        new.machine.kernel = Some(dir.path().join("none"));
        let intent = super::super::Intent { desired: Some(Arc::new(new)), want: Want::Run, starts: 1, restarts: 1, recovers: 0, why: String::new() };
        let (intents, intent) = tokio::sync::watch::channel(intent);
        let status = super::super::Status { machine: Some(Arc::new(old.machine.clone())), ..super::super::Status::new() };
        let vm = Vm::new(Arc::new(Context::new(link, journal, store, logs, notes)), old.name.clone(), intent, tokio::sync::watch::channel(status).0);
        let mut trials = Trials::default();
        vm.look_for_restart(&mut trials);
        let outcome = trials.outcome().await;
        assert!(!vm.tried(&mut trials, outcome));
        let refused = vm.status.borrow().refused.clone().unwrap();
        assert!(refused.sentence.starts_with(NOT_STARTABLE) && refused.sentence.contains("No such file"), "{}", refused.sentence);
        assert!(trials.again.is_some());
        // The same restart is not asked for twice, and a file that is as it was before ends it.
        vm.look_for_restart(&mut trials);
        assert!(trials.now.is_none());
        intents.send_modify(|intent| intent.desired = Some(Arc::new(old)));
        vm.look_for_restart(&mut trials);
        assert!(vm.status.borrow().refused.is_none() && trials.again.is_none());
        intents.send_modify(|intent| intent.restarts = 2);
        vm.look_for_restart(&mut trials);
        assert!(vm.tried(&mut trials, Ok(())));
    }

    fn facts() -> HostInventory {
        HostInventory {
            version: String::new(),
            kernel: String::new(),
            started_ms: 0,
            vms: vec![],
            more: false,
            vms_total: 1,
            kvm: KvmVerdict::NotGranted,
            qemu: vec![QemuGrant { name: QemuName::new("default").unwrap(), path: "/q".into(), trouble: None }],
            limits: Limits { vms: 8, memory_mib: 1024, memory_mib_used: 1024, cpus_each: 4 },
            audit: AuditState { sequence: 0, head: String::new(), trouble: None, lost: 0 },
            scopes: true,
            devices: vec![],
            devices_total: 0,
        }
    }

    #[test]
    fn a_device_of_another_vm_or_in_quarantine_is_found_before_the_stop_and_its_own_is_no_conflict() {
        use diarch_ipc::operation::{DeviceRecord, Example};
        let mut facts = facts();
        let record = DeviceRecord { label: Some(desired("other").name), ..diarch_ipc::operation::Bound::example().device };
        let function = record.functions[0].function.clone();
        let machine = Machine { devices: vec![function], ..desired("a").machine };
        let name = desired("a").name;
        assert_eq!(free(&machine, &facts, &name), Ok(()));
        facts.devices = vec![record.clone()];
        assert!(free(&machine, &facts, &name).unwrap_err().contains("held by other"));
        facts.devices = vec![DeviceRecord { label: Some(name.clone()), state: DeviceState::Quarantined, ..record.clone() }];
        assert_eq!(free(&machine, &facts, &name), Ok(()));
        facts.devices = vec![DeviceRecord { label: None, state: DeviceState::Quarantined, trouble: Some("no answer".into()), ..record }];
        assert!(free(&machine, &facts, &name).unwrap_err().contains("(no answer): diarch device recover 0000:65:00.0"));
    }

    #[test]
    fn a_machine_beyond_the_grants_is_refused_and_its_own_memory_counts_as_free() {
        let facts = facts();
        let with = |cpus, memory| Machine { cpus: Cpus::new(cpus).unwrap(), memory: MiB::new(memory).unwrap(), ..desired("a").machine };
        assert_eq!(within(&with(4, 512), &facts, 512), Ok(()));
        assert!(within(&with(5, 512), &facts, 512).unwrap_err().contains("allow 4"));
        assert!(within(&with(4, 513), &facts, 512).unwrap_err().contains("512 are left"));
        let other = Machine { qemu: QemuName::new("other").unwrap(), ..with(1, 64) };
        assert!(within(&other, &facts, 512).unwrap_err().contains("other"));
    }
}
