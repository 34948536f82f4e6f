//! `vm.release`: undoes all that stands under a slot, in reverse, and gives the slot back.

use super::{companion, lingering};
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

/// So long its devices are waited for.
const DEVICES: Duration = Duration::from_secs(30);

/// What is to be undone.
struct Undo {
    record: Record,
    pidfd: Option<OwnedFd>,
    /// What was killed there before, and has not ended.
    lingering: Vec<OwnedFd>,
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
    supervisor.act(row, slot, "end QEMU", move || end_qemu(vetted, &host)).await??;
    net::clear(supervisor, row, &ended).await?;
    mount::detach::all(supervisor, slot).await;
    // Nobody has them open any more. A slot does not wait for a driver, which may take minutes: what is not back by then goes on by itself, as nobody's.
    let devices = tokio::task::spawn_local({
        let (supervisor, tenancy) = (Rc::clone(supervisor), ask.tenancy);
        async move { vfio::release::all_of(&supervisor, tenancy).await }
    });
    if tokio::time::timeout(DEVICES, devices).await.is_err() {
        supervisor.note(&format!("slot {slot} is released, and not all of its devices are back yet"));
    }
    let ledger = supervisor.ledger.clone();
    supervisor.act(row, slot, "release", move || ledger.remove(slot).map_err(|error| Error::io("ledger", &error))).await??;
    supervisor.slots.borrow_mut().remove(&slot);
    net::forget_user(supervisor, row, &ended).await;
    Ok(Released { existed: true })
}

fn vet(supervisor: &Supervisor, row: &Operation, tenancy: Tenancy) -> Result<Vetted<Undo>, Error> {
    supervisor.check_state(row, tenancy)?;
    let copies = |fds: &[Rc<OwnedFd>]| fds.iter().map(|fd| fd.try_clone()).collect::<std::io::Result<Vec<_>>>().map_err(|error| Error::io("dup", &error));
    let (record, pidfd, lingering) = supervisor.with(tenancy, |vm| (vm.record.clone(), vm.pidfd.clone(), vm.lingering.clone()))?;
    let (pidfd, lingering) = (copies(pidfd.as_slice())?.pop(), copies(&lingering)?);
    let uid = supervisor.host.user_of(record.uid);
    Ok(Vetted::by_vet(Undo { uid, record: Record { state: SlotState::Releasing, ..record }, pidfd, lingering }))
}

/// Ends every process of the slot's user, all at one time.
fn end_qemu(undo: Vetted<Undo>, host: &Host) -> Result<(), Error> {
    let undo = undo.into_inner();
    let mut processes = undo.lingering;
    let recorded = undo.record.run.as_ref().filter(|run| run.exit.is_none()).and_then(|run| run.process);
    match (undo.pidfd, recorded) {
        (Some(pidfd), _) => processes.push(pidfd),
        // It could not be looked at before. Until it can, neither its user id nor its memory is free.
        (None, Some(recorded)) => processes.extend(process::find(recorded, undo.uid).map_err(|error| Error::io("look at the process", &error))?),
        (None, None) => {}
    }
    let beside = companion::find(&undo.record, host).map_err(|error| Error::io("look at the companions", &error))?;
    processes.extend(beside.into_iter().map(|(_, pidfd)| pidfd));
    end_all(processes)
}

/// Kills processes and waits until all have ended.
pub fn end_all(processes: Vec<OwnedFd>) -> Result<(), Error> {
    if lingering::kill(processes, END_PATIENCE).is_empty() { Ok(()) } else { Err(hangs()) }
}

fn hangs() -> Error {
    let after_ms = u64::try_from(END_PATIENCE.as_millis()).unwrap_or(u64::MAX);
    Error::Timeout { step: "the killed QEMU, and what ran beside it, to end (it hangs in the kernel)".into(), after_ms }
}

/// Kills a process and waits until it has ended.
pub fn end(pidfd: &OwnedFd) -> Result<(), Error> {
    match rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(Error::io("pidfd_send_signal", &error.into())),
    }
    if !process::wait_ended(pidfd, END_PATIENCE).map_err(|error| Error::io("wait", &error))? {
        return Err(hangs());
    }
    process::reap(pidfd);
    Ok(())
}
