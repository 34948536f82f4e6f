//! `vm.release`: undoes all that stands under a slot, in reverse, and gives the slot back.

use super::companion;
use crate::host::Host;
use crate::ledger::Record;
use crate::state::Supervisor;
use crate::vetted::Vetted;
use crate::{mount, net, process, vfio};
use diarch_ipc::Error;
use diarch_ipc::name::Tenancy;
use diarch_ipc::operation::{Operation, Release, Released, SlotState};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// A killed process ends at once, unless it sits in the kernel; longer than this, and the slot stays `releasing`, until it is released again.
const END_PATIENCE: Duration = Duration::from_secs(8);

/// What is to be undone.
struct Undo {
    record: Record,
    pidfd: Option<OwnedFd>,
    /// The user that its process has.
    uid: u32,
}

pub async fn release(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &Release) -> Result<Released, Error> {
    let slot = ask.tenancy.slot;
    // Released, and perhaps another VM's by now.
    let Ok(_lock) = supervisor.lock(ask.tenancy).await else { return Ok(Released { existed: false }) };
    let vetted = match vet(supervisor, row, ask.tenancy) {
        // Released while this waited for the lock.
        Err(Error::NotFound { .. }) => return Ok(Released { existed: false }),
        other => other?,
    };
    // Undoing may be done twice, so it goes on when /run is full: with the old record there, a restarted supervisor finds the process gone.
    supervisor.record_or_believe(vetted.record.clone());
    // The processes first: nothing that may be waited for, such as the packet filter, keeps a VM alive.
    let (ended, host) = (vetted.record.clone(), Arc::clone(&supervisor.host));
    supervisor.act(row, slot, "end QEMU", move || end_qemu(&vetted, &host)).await??;
    net::clear(supervisor, row, &ended).await?;
    mount::detach::all(supervisor, slot).await;
    // Nobody has them open any more.
    vfio::release::all_of(supervisor, ask.tenancy).await;
    let ledger = supervisor.ledger.clone();
    supervisor.act(row, slot, "release", move || ledger.remove(slot).map_err(|error| Error::io("ledger", &error))).await??;
    supervisor.slots.borrow_mut().remove(&slot);
    net::forget_user(supervisor, row, &ended).await;
    Ok(Released { existed: true })
}

fn vet(supervisor: &Supervisor, row: &Operation, tenancy: Tenancy) -> Result<Vetted<Undo>, Error> {
    supervisor.check_state(row, tenancy)?;
    let (record, pidfd) = supervisor.with(tenancy, |vm| (vm.record.clone(), vm.pidfd.as_ref().map(|fd| fd.try_clone())))?;
    let pidfd = pidfd.transpose().map_err(|error| Error::io("dup", &error))?;
    let uid = supervisor.host.user_of(record.uid);
    Ok(Vetted::by_vet(Undo { uid, record: Record { state: SlotState::Releasing, ..record }, pidfd }))
}

/// In reverse: the processes first, and then what it stood on.
fn end_qemu(undo: &Vetted<Undo>, host: &Host) -> Result<(), Error> {
    let recorded = undo.record.run.as_ref().filter(|run| run.exit.is_none()).and_then(|run| run.process);
    match (&undo.pidfd, recorded) {
        (Some(pidfd), _) => end(pidfd)?,
        // It could not be looked at before. Until it can, neither its user id nor its memory is free.
        (None, Some(recorded)) => {
            let found = process::find(recorded, undo.uid).map_err(|error| Error::io("look at the process", &error))?;
            found.as_ref().map_or(Ok(()), end)?;
        }
        (None, None) => {}
    }
    companion::end_left(&undo.record, host)
}

/// Kills a process and waits until it has ended.
pub fn end(pidfd: &OwnedFd) -> Result<(), Error> {
    match rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(Error::io("pidfd_send_signal", &error.into())),
    }
    if !process::wait_ended(pidfd, END_PATIENCE).map_err(|error| Error::io("wait", &error))? {
        return Err(Error::Timeout {
            step: "the killed QEMU to end (it hangs in the kernel)".into(),
            after_ms: u64::try_from(END_PATIENCE.as_millis()).unwrap_or(u64::MAX),
        });
    }
    process::reap(pidfd);
    Ok(())
}
