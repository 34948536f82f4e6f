//! The packet filter, made to say what the ledger says: one change at a time, and none forgotten.
//!
//! A change that fails (an nft that was killed, or is not there for a while) leaves rules other than the ledger's. What asked for it says so, or goes on all the
//! same, as a release does. The difference is owed then: the next change that succeeds makes it good, for each sets the whole; and if none comes, it is tried
//! again by itself.

use super::{cards, filter, users};
use crate::ledger::Record;
use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::Operation;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::{Mutex, MutexGuard, Notify};

/// Before what failed is tried again, and at most: an nft that is not there comes with a package, and not within a second.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_AT_MOST: Duration = Duration::from_secs(60);

/// Whose turn it is to change the packet filter, and whether it is behind the ledger.
#[derive(Debug, Default)]
pub struct Turn {
    one: Mutex<()>,
    behind: Cell<bool>,
    wanted: Notify,
}

impl Turn {
    /// Held from reading the records until the packet filter says the same: two changes never cross.
    pub async fn take(&self) -> MutexGuard<'_, ()> {
        self.one.lock().await
    }

    /// The whole was set, or could not be.
    pub fn done<T>(&self, of: &Result<T, Error>) {
        self.behind.set(of.is_err());
        if of.is_err() {
            self.wanted.notify_one();
        }
    }
}

/// Makes the packet filter say what the ledger says, without the taps and published ports of `except`. (Its user stays in the rules as long as it is in the ledger:
/// it may have processes.)
pub async fn settle(supervisor: &Rc<Supervisor>, row: &'static Operation, of: &Record, except: Option<&Record>) -> Result<(), Error> {
    let _one = supervisor.filter.take().await;
    let (cards, users, program) = (cards(supervisor, except), users(supervisor), filter::Program::of(supervisor));
    let done = supervisor.act(row, of.slot, "packet filter", move || program.settle(&cards, &users)).await.and_then(|done| done);
    supervisor.filter.done(&done);
    done
}

/// As [`settle`], for what goes on whatever becomes of the rules. An nft that was killed is a matter of that moment, so it is asked once more; one that hangs, or is
/// not there, would only be waited for again.
pub async fn settle_or_owe(supervisor: &Rc<Supervisor>, row: &'static Operation, of: &Record, except: Option<&Record>) -> Result<(), Error> {
    match settle(supervisor, row, of, except).await {
        Err(Error::Failed { .. }) => settle(supervisor, row, of, except).await,
        done => done,
    }
}

/// As [`settle`], for no slot's sake.
pub async fn settle_all(supervisor: &Rc<Supervisor>) -> Result<(), Error> {
    let _one = supervisor.filter.take().await;
    let (cards, users, program) = (cards(supervisor, None), users(supervisor), filter::Program::of(supervisor));
    let done = supervisor.helpers.run("packet filter", move || program.settle(&cards, &users)).await.and_then(|done| done);
    supervisor.filter.done(&done);
    done
}

/// Makes good what is owed. Runs as long as the supervisor does.
pub async fn keep_settled(supervisor: Rc<Supervisor>) {
    loop {
        supervisor.filter.wanted.notified().await;
        let mut pause = AGAIN;
        loop {
            tokio::time::sleep(pause).await;
            // Somebody's change made it good meanwhile.
            if !supervisor.filter.behind.get() {
                break;
            }
            match settle_all(&supervisor).await {
                Ok(()) => {
                    supervisor.note("the packet filter says again what the ledger says");
                    break;
                }
                Err(error) => tracing::warn!(%error, "the packet filter is not as the ledger says; it is tried again"),
            }
            pause = (pause * 2).min(AGAIN_AT_MOST);
        }
    }
}
