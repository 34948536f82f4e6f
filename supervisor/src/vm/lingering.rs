//! Killed processes that do not end: the kernel holds them, in a device that does not answer, say, or a file system that is gone. As long as one lives it has its
//! slot's user, and what it had open. So its slot is quarantined until it has ended: nothing is started in it, and its release waits for it.

use crate::ledger::Record;
use crate::process;
use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::name::Tenancy;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A killed process ends at once, unless it sits in the kernel.
pub const KILLED: Duration = Duration::from_secs(2);
/// Between two attempts to watch.
const AGAIN: Duration = Duration::from_secs(1);

/// A start of which nothing runs, and what may be left of it.
#[derive(Debug)]
pub struct NotStarted {
    pub error: Error,
    /// Killed, and not ended.
    pub left: Vec<OwnedFd>,
    /// Which processes those are, for a restarted supervisor.
    pub record: Option<Record>,
}

impl From<Error> for Box<NotStarted> {
    fn from(error: Error) -> Self {
        Box::new(NotStarted { error, left: Vec::new(), record: None })
    }
}

/// Kills all of them, waits for all of them together, and gives those that have not ended within that time.
pub fn kill(processes: Vec<OwnedFd>, within: Duration) -> Vec<OwnedFd> {
    for pidfd in &processes {
        let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
    }
    let until = Instant::now() + within;
    processes.into_iter().filter(|pidfd| !ends(pidfd, until.saturating_duration_since(Instant::now()))).collect()
}

/// Whether it ends within this time; then it is reaped. What can't be told is taken for no.
pub fn ends(pidfd: &OwnedFd, within: Duration) -> bool {
    let ended = process::wait_ended(pidfd, within).unwrap_or(false);
    if ended {
        process::reap(pidfd);
    }
    ended
}

/// Keeps a slot from everybody until these have ended, and does then what could not be done before.
pub fn keep(supervisor: &Rc<Supervisor>, tenancy: Tenancy, left: Vec<OwnedFd>, what: &str, then: impl FnOnce(&Rc<Supervisor>) + 'static) {
    let left: Vec<Rc<OwnedFd>> = left.into_iter().map(Rc::new).collect();
    let (supervisor, slot) = (Rc::clone(supervisor), tenancy.slot);
    let label = {
        let mut slots = supervisor.slots.borrow_mut();
        let Some(vm) = slots.get_mut(&slot).filter(|vm| vm.record.claim == tenancy.claim) else { return };
        vm.lingering.extend(left.iter().cloned());
        vm.record.label.clone()
    };
    supervisor.tell_quarantined(slot, label, format!("{what} was killed and has not ended: the kernel holds it. Nothing is started here until it has"));
    tokio::task::spawn_local(async move {
        for pidfd in &left {
            loop {
                match ended(pidfd).await {
                    Ok(true) => break,
                    Ok(false) => {}
                    Err(error) => tracing::error!(%slot, %error, "a killed process can't be watched; trying again"),
                }
                tokio::time::sleep(AGAIN).await;
            }
            let _ = process::reap_child(pidfd);
        }
        {
            let mut slots = supervisor.slots.borrow_mut();
            let Some(vm) = slots.get_mut(&slot).filter(|vm| vm.record.claim == tenancy.claim) else { return };
            vm.lingering.retain(|pidfd| !left.iter().any(|ended| Rc::ptr_eq(ended, pidfd)));
        }
        supervisor.note(&format!("slot {slot}: what was killed there has ended"));
        then(&supervisor);
    });
}

/// Waits for it. What the loop says is asked of the kernel again: here, a slot is given away by it.
async fn ended(pidfd: &OwnedFd) -> std::io::Result<bool> {
    // A descriptor of its own: the loop polls one only once, and others may poll that.
    #[allow(deprecated)] // as in `watch`
    let watched = AsyncFd::with_interest(pidfd.try_clone()?, Interest::READABLE)?;
    drop(watched.readable().await?);
    process::wait_ended(pidfd, Duration::ZERO)
}
