//! `mount.detach`: takes it away.

use super::{let_go, store};
use crate::ledger::Record;
use crate::state::{Supervisor, Vm};
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::name::Slot;
use diarch_ipc::operation::{DetachMount, MountDetached, Operation};
use std::collections::BTreeMap;
use std::rc::Rc;

pub async fn detach(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &DetachMount) -> Result<MountDetached, Error> {
    let slot = ask.tenancy.slot;
    let _lock = supervisor.lock(ask.tenancy).await?;
    supervisor.check_state(row, ask.tenancy)?;
    let record = vet(&supervisor.slots.borrow(), ask)?.into_inner();
    let Some(record) = record else { return Ok(MountDetached { existed: false }) };
    // With the old record there, a restarted supervisor would hold it again: who asks is told, and asks again.
    supervisor.record(record)?;
    let held = supervisor.slots.borrow_mut().get_mut(&slot).and_then(|vm| vm.mounts.remove(&ask.share));
    if let Some(held) = held {
        forget(supervisor, &store::name(ask.tenancy, &ask.share, held.generation));
        let_go(supervisor, vec![held.mount]).await;
    }
    Ok(MountDetached { existed: true })
}

/// The record without it; none where it is not attached.
fn vet(slots: &BTreeMap<Slot, Vm>, ask: &DetachMount) -> Result<Vetted<Option<Record>>, Error> {
    let vm = Supervisor::tenant(slots, ask.tenancy)?;
    let mut record = vm.record.clone();
    record.resources.mounts.retain(|mounted| mounted.share != ask.share);
    let changed = record != vm.record;
    Ok(Vetted::by_vet(changed.then_some(record)))
}

/// The next supervisor does what could not be done here: it lets go of what the ledger does not have.
pub(crate) fn forget(supervisor: &Supervisor, name: &str) {
    if let Err(error) = supervisor.store.forget(name) {
        tracing::warn!(name, %error, "the service manager can't be told to let go of a mount");
    }
}

/// All of a VM's mounts, when its slot has been released.
pub(crate) async fn all(supervisor: &Rc<Supervisor>, slot: Slot) {
    let (names, mounts) = {
        let mut slots = supervisor.slots.borrow_mut();
        let Some(vm) = slots.get_mut(&slot) else { return };
        let tenancy = diarch_ipc::name::Tenancy { slot, claim: vm.record.claim };
        let names: Vec<String> = vm.mounts.iter().map(|(share, held)| store::name(tenancy, share, held.generation)).collect();
        (names, std::mem::take(&mut vm.mounts).into_values().map(|held| held.mount).collect())
    };
    for name in names {
        forget(supervisor, &name);
    }
    let_go(supervisor, mounts).await;
}
