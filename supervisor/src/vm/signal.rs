//! `vm.signal`: ends a VM's QEMU from outside, by its pidfd. Takes no lock: killing must work while something else hangs.

use crate::state::Supervisor;
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::operation::{Operation, Signal, SignalKind, Signalled};
use rustix::process::pidfd_send_signal;
use std::os::fd::OwnedFd;
use std::rc::Rc;

pub fn signal(supervisor: &Supervisor, row: &Operation, ask: &Signal) -> Result<Signalled, Error> {
    let Some(pidfd) = vet(supervisor, row, ask)?.into_inner() else { return Ok(Signalled { delivered: false }) };
    // Nothing to record: the end of the process is, when it comes.
    let number = match ask.signal {
        SignalKind::Terminate => rustix::process::Signal::TERM,
        SignalKind::Kill => rustix::process::Signal::KILL,
    };
    match pidfd_send_signal(&*pidfd, number) {
        Ok(()) => Ok(Signalled { delivered: true }),
        Err(rustix::io::Errno::SRCH) => Ok(Signalled { delivered: false }),
        Err(error) => Err(Error::io("pidfd_send_signal", &error.into())),
    }
}

/// The process to signal; none when it has ended already, which is what was wanted.
fn vet(supervisor: &Supervisor, row: &Operation, ask: &Signal) -> Result<Vetted<Option<Rc<OwnedFd>>>, Error> {
    supervisor.check_state(row, ask.tenancy)?;
    Ok(Vetted::by_vet(supervisor.with(ask.tenancy, |vm| vm.pidfd.clone())?))
}
