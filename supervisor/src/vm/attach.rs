//! `vm.attach` and `vm.console`: fresh connections to a QEMU that runs, for a worker that was respawned.

use super::sockets;
use crate::state::Supervisor;
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::name::{Slot, Tenancy};
use diarch_ipc::operation::{Attach, Attached, Console, ConsoleOpened, Event, Operation};
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// A slot whose QEMU runs.
struct Live {
    slot: Slot,
    pid: u32,
    pidfd: Rc<OwnedFd>,
    /// What was told before, and is to be told again to a worker that may not have heard it.
    impaired: Option<Event>,
}

pub fn attach(supervisor: &Supervisor, row: &Operation, ask: &Attach) -> Result<(Attached, Vec<Rc<OwnedFd>>), Error> {
    let live = vet(supervisor, row, ask.tenancy)?.into_inner();
    // Nothing to record: a connection leaves nothing behind.
    let qmp = connect(supervisor, live.slot, sockets::QMP)?;
    if let Some(event) = live.impaired {
        supervisor.sessions.tell(event);
    }
    Ok((Attached { pid: live.pid }, vec![live.pidfd, Rc::new(qmp)]))
}

pub fn console(supervisor: &Supervisor, row: &Operation, ask: &Console) -> Result<(ConsoleOpened, Vec<Rc<OwnedFd>>), Error> {
    let live = vet(supervisor, row, ask.tenancy)?.into_inner();
    let console = connect(supervisor, live.slot, sockets::CONSOLE)?;
    Ok((ConsoleOpened {}, vec![Rc::new(console)]))
}

fn vet(supervisor: &Supervisor, row: &Operation, tenancy: Tenancy) -> Result<Vetted<Live>, Error> {
    supervisor.check_state(row, tenancy)?;
    let slot = tenancy.slot;
    let live = supervisor.with(tenancy, |vm| {
        let run = vm.record.run.as_ref()?;
        let told = |what: &String| Event::VmImpaired { slot, label: vm.record.label.clone(), what: what.clone(), spawn: run.spawn };
        Some(Live { slot, pid: run.process?.pid, pidfd: vm.pidfd.clone()?, impaired: vm.impaired.as_ref().map(told) })
    })?;
    let ended = || Error::WrongState { state: "running".into(), reason: format!("QEMU in slot {slot} is just ending") };
    Ok(Vetted::by_vet(live.ok_or_else(ended)?))
}

fn connect(supervisor: &Supervisor, slot: Slot, name: &str) -> Result<OwnedFd, Error> {
    sockets::connection(&supervisor.ledger.directory(slot), name).map_err(|error| match error.raw_os_error() {
        Some(nix::libc::EAGAIN) => Error::Failed {
            step: format!("connect to {name}"),
            errno: error.raw_os_error(),
            detail: "QEMU does not accept connections: it hangs, or somebody holds this one".into(),
        },
        _ => Error::io(format!("connect to {name}"), &error),
    })
}
