//! The network of VMs, in the host's own namespace.
//!
//! ```text
//!   guest -- QEMU -- fd -- tap dvm3n0 --+-- a bridge that root made                 bridge = "br0"
//!                           |           +-- the host routes: 10.77.0.14/32 dev dvm3n0   routed = "10.77.0.0/20"
//!                           |
//!            table netdev diarch, ingress     whose frame is it, and may it go there?
//!            table inet diarch                to the host, through it, translated?
//! ```
//!
//! | module    | operation                    | noun                                                          |
//! |-----------|------------------------------|---------------------------------------------------------------|
//! | `tap`     | `tap.open`                   | a tap, in its place                                           |
//! | `tun`     |                              | the device itself                                             |
//! | `link`    |                              | interfaces, addresses and routes (rtnetlink)                  |
//! | `publish` | `net.publish`, `net.withdraw` | ports of the host that lead into a VM                        |
//! | `rules`   |                              | the packet filter's text: constant rules, and sets from the ledger |
//! | `filter`  |                              | that text handed to nft, in one transaction                   |
//! | `turn`    |                              | who changes it next, and what is still owed                   |
//! | `held`    |                              | taps that wait for their QEMU                                 |
//! | `port`    | `port.listen`                | a bound socket                                                |
//!
//! What the host has is made from the ledger, always the whole of it. A tap is up only after its rules are there.

pub mod filter;
pub mod held;
pub mod link;
pub mod port;
pub mod publish;
pub mod rules;
pub mod tap;
pub mod tun;
pub mod turn;

pub use held::Held;
pub use turn::{Turn, settle};

use crate::ledger::Record;
use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::Operation;
use std::rc::Rc;

/// All cards that the ledger speaks of.
fn cards(supervisor: &Supervisor, except: Option<&Record>) -> Vec<rules::Card> {
    let slots = supervisor.slots.borrow();
    let records = slots.values().map(|vm| &vm.record).filter(|record| except.is_none_or(|except| except.slot != record.slot));
    rules::cards(&supervisor.grants, records)
}

/// All users that it speaks of.
fn users(supervisor: &Supervisor) -> Vec<rules::User> {
    rules::users(supervisor.slots.borrow().values().map(|vm| &vm.record))
}

/// After a slot was released, or a start of its VM failed: its user, which has no process any more, goes out of the rules.
pub async fn forget_user(supervisor: &Rc<Supervisor>, row: &'static Operation, record: &Record) {
    if record.run.as_ref().is_none_or(|run| run.egress.is_none()) {
        return;
    }
    if let Err(error) = turn::settle_or_owe(supervisor, row, record, None).await {
        tracing::error!(slot = %record.slot, %error, "the packet filter still has a user that has no process any more");
    }
}

/// Takes a slot's taps and published ports away: with its release. A packet filter that can't be set does not hold the slot: without a tap, its rules lead
/// nowhere, no tap comes up before they are right again, and they are made right as soon as that can be done (see `turn`).
pub async fn clear(supervisor: &Rc<Supervisor>, row: &'static Operation, record: &Record) -> Result<(), Error> {
    if record.resources.taps.is_empty() && record.resources.published.is_empty() {
        return Ok(());
    }
    if supervisor.host.rehearses(|| format!("remove the taps and published ports of slot {}", record.slot)) {
        return Ok(());
    }
    let (gone, held) = (record.clone(), held::all_of(supervisor, record.slot));
    let remove = move || {
        let removed = tap::remove(&gone);
        drop(held);
        removed
    };
    supervisor.act(row, record.slot, "remove taps", remove).await??;
    if let Err(error) = turn::settle_or_owe(supervisor, row, record, Some(record)).await {
        tracing::error!(slot = %record.slot, %error, "the packet filter still has the rules of a released slot");
        supervisor.note(&format!("slot {}: its rules could not be removed, which is tried again until they are: {error}", record.slot));
    }
    Ok(())
}

/// At start: the tables are made to equal the ledger, if there can be any.
pub async fn adopt(supervisor: &Rc<Supervisor>) {
    let nothing = cards(supervisor, None).is_empty() && users(supervisor).is_empty();
    if supervisor.host.is_rehearsed() || (nothing && !filter::Program::of(supervisor).was_used()) {
        return;
    }
    match turn::settle_all(supervisor).await {
        Ok(()) => supervisor.note("the packet filter's tables were made as the ledger says"),
        Err(error) => {
            tracing::error!(%error, "the packet filter can't be made as the ledger says");
            supervisor.note(&format!("the packet filter could not be made as the ledger says: {error}"));
        }
    }
}
