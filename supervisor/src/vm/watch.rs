//! Sees QEMU end, by its pidfd; writes it down and tells the worker.

use super::companion;
use crate::state::Supervisor;
use crate::{process, vfio};
use diarch_ipc::name::{RequestId, Slot, Tenancy};
use diarch_ipc::operation::{Event, ExitStatus, SlotState};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Between two attempts to watch.
const AGAIN: Duration = Duration::from_secs(1);

/// Watches the QEMU that the request `spawn` started in `slot`.
pub fn begin(supervisor: &Rc<Supervisor>, slot: Slot, spawn: RequestId, pidfd: Rc<OwnedFd>) {
    let supervisor = Rc::clone(supervisor);
    tokio::task::spawn_local(async move {
        let status = loop {
            match ended(&supervisor, &pidfd).await {
                Ok(status) => break status,
                // No descriptor left, say: that passes, and the end of QEMU must not be missed.
                Err(error) => tracing::error!(%slot, %error, "QEMU can't be watched; trying again"),
            }
            tokio::time::sleep(AGAIN).await;
        };
        companion::end_with(&supervisor, slot, spawn).await;
        settle(&supervisor, slot, spawn, status);
    });
}

async fn ended(supervisor: &Supervisor, pidfd: &Rc<OwnedFd>) -> std::io::Result<ExitStatus> {
    // Deprecated for types whose descriptor may change or close under it; an `Rc<OwnedFd>`'s can't while we hold it.
    #[allow(deprecated)]
    let watched = AsyncFd::with_interest(Rc::clone(pidfd), Interest::READABLE)?;
    drop(watched.readable().await?);
    if let Some(status) = process::reap_child(pidfd) {
        return Ok(status);
    }
    // On a helper: for a process that is another's child, the kernel may need a moment.
    let copy = pidfd.try_clone()?;
    Ok(supervisor.helpers.run("reap", move || process::reap(&copy)).await.unwrap_or(ExitStatus::Unknown))
}

/// Writes the end down, if the slot still speaks of that very QEMU.
pub fn settle(supervisor: &Rc<Supervisor>, slot: Slot, spawn: RequestId, status: ExitStatus) {
    let mut record = {
        let mut slots = supervisor.slots.borrow_mut();
        let Some(vm) = slots.get_mut(&slot).filter(|vm| vm.record.run.as_ref().is_some_and(|run| run.spawn == spawn)) else { return };
        if !matches!(vm.record.state, SlotState::Running | SlotState::Spawning) {
            return;
        }
        vm.pidfd = None;
        vm.record.clone()
    };
    record.state = SlotState::Exited;
    if let Some(run) = &mut record.run {
        run.exit = Some(status);
    }
    let (label, tenancy) = (record.label.clone(), Tenancy { slot, claim: record.claim });
    tracing::info!(%slot, %label, %status, "QEMU ended");
    supervisor.record_or_believe(record);
    vfio::attach::ended(supervisor, tenancy);
    supervisor.note(&format!("vm.exited slot={slot} label={label} status={status}"));
    supervisor.sessions.tell(Event::VmExited { slot, label, status, spawn });
}
