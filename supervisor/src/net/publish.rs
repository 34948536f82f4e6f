//! `net.publish` and `net.withdraw`: ports of the host that lead into a VM.

use crate::grants::Grants;
use crate::ledger::{Publication, Record};
use crate::net::settle;
use crate::state::{Supervisor, Vm};
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::name::{Forward, Slot, Tenancy};
use diarch_ipc::operation::{Operation, Publish, Published, SlotState, Withdraw, Withdrawn};
use diarch_ipc::spec::MAX_FORWARDS;
use std::collections::BTreeMap;
use std::rc::Rc;

pub async fn publish(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &Publish) -> Result<Published, Error> {
    let _lock = supervisor.lock(ask.tenancy).await?;
    supervisor.check_state(row, ask.tenancy)?;
    let vetted = vet(&supervisor.grants, &supervisor.slots.borrow(), ask)?;
    replace(supervisor, row, ask.tenancy, vetted).await?;
    Ok(Published {})
}

pub async fn withdraw(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &Withdraw) -> Result<Withdrawn, Error> {
    let _lock = supervisor.lock(ask.tenancy).await?;
    supervisor.check_state(row, ask.tenancy)?;
    let mut record = supervisor.with(ask.tenancy, |vm| vm.record.clone())?;
    if record.resources.published.is_empty() {
        return Ok(Withdrawn { existed: false });
    }
    record.resources.published.clear();
    take_back(supervisor, row, ask.tenancy, record).await?;
    Ok(Withdrawn { existed: true })
}

/// The ledger first, then the packet filter; when that fails, both as they were.
async fn replace(supervisor: &Rc<Supervisor>, row: &'static Operation, tenancy: Tenancy, vetted: Vetted<Record>) -> Result<(), Error> {
    let before = supervisor.with(tenancy, |vm| vm.record.clone())?;
    let record = vetted.into_inner();
    supervisor.record(record.clone())?;
    set(supervisor, row, record, before).await
}

/// As [`replace`], for what must go on when /run is full.
async fn take_back(supervisor: &Rc<Supervisor>, row: &'static Operation, tenancy: Tenancy, record: Record) -> Result<(), Error> {
    let before = supervisor.with(tenancy, |vm| vm.record.clone())?;
    supervisor.record_or_believe(record.clone());
    set(supervisor, row, record, before).await
}

async fn set(supervisor: &Rc<Supervisor>, row: &'static Operation, record: Record, before: Record) -> Result<(), Error> {
    let said = || {
        let forwards = record.resources.published.iter().flat_map(|publication| &publication.forwards);
        let each: Vec<String> = forwards.map(|f| format!("{}:{}/{} to {}", f.host_address, f.host_port, f.protocol, f.guest_port)).collect();
        format!("set the published ports of slot {}: {}", record.slot, if each.is_empty() { "none".into() } else { each.join(", ") })
    };
    if supervisor.host.rehearses(said) {
        return Ok(());
    }
    let Err(error) = settle(supervisor, row, &record, None).await else { return Ok(()) };
    // QEMU may have ended meanwhile: of the record as it is now, only this goes back.
    let published = before.resources.published;
    let now = supervisor.slots.borrow().get(&record.slot).map(|vm| vm.record.clone());
    if let Some(mut now) = now.filter(|now| now.claim == record.claim) {
        now.resources.published = published;
        supervisor.record_or_believe(now);
    }
    // One transaction took nothing or all, so there is as a rule nothing to set; an nft that was killed may have ended either way.
    if let Err(again) = settle(supervisor, row, &record, None).await {
        tracing::error!(slot = %record.slot, %again, "the packet filter is not as the ledger says; it is tried again");
    }
    Err(error)
}

fn vet(grants: &Grants, slots: &BTreeMap<Slot, Vm>, ask: &Publish) -> Result<Vetted<Record>, Error> {
    let vm = Supervisor::tenant(slots, ask.tenancy)?;
    if ask.forwards.len() > MAX_FORWARDS {
        return Err(Error::invalid("forwards", format!("at most {MAX_FORWARDS}, and there are {}", ask.forwards.len())));
    }
    let slot = ask.tenancy.slot;
    let tap = vm.record.resources.taps.iter().find(|tap| tap.nic == ask.nic);
    let tap = tap.ok_or_else(|| Error::NotFound { what: format!("a tap for card {} of slot {slot}: tap.open comes first", ask.nic) })?;
    let Some(guest) = tap.address else {
        return Err(Error::invalid("nic", format!("the address of card {} is not known; tap.open takes one for a bridged network", ask.nic)));
    };
    for (number, forward) in ask.forwards.iter().enumerate() {
        let (host, text) = (forward.host_address.0, text(forward));
        if !grants.ports.publish.iter().any(|range| range.covers(forward)) {
            return Err(Error::denied("ports.publish", format!("no entry covers {text}")));
        }
        if host.is_ipv4() != guest.0.is_ipv4() {
            return Err(Error::invalid("forwards", format!("{text}: the guest's address is {guest}, and addresses are not translated between IPv4 and IPv6")));
        }
        if ask.forwards[..number].iter().any(|other| clash(other, forward)) {
            return Err(Error::invalid("forwards", format!("{text} is there twice")));
        }
        if let Some(other) = holder(slots, slot, Some(ask.nic), forward) {
            return Err(Error::Conflict { holder: format!("VM {other}"), reason: format!("it has {text}") });
        }
    }
    let mut record = vm.record.clone();
    record.resources.published.retain(|publication| publication.nic != ask.nic);
    if !ask.forwards.is_empty() {
        record.resources.published.push(Publication { nic: ask.nic, forwards: ask.forwards.clone() });
    }
    Ok(Vetted::by_vet(record))
}

/// The label of the VM that has a port already: published, or through user-mode networking of one that runs. `nic`: but for this card's.
pub fn holder(slots: &BTreeMap<Slot, Vm>, slot: Slot, nic: Option<diarch_ipc::name::NicIndex>, forward: &Forward) -> Option<String> {
    let live = |record: &Record| matches!(record.state, SlotState::Spawning | SlotState::Running | SlotState::Releasing);
    let has = |record: &Record| {
        let published = record.resources.published.iter().filter(|publication| (record.slot, Some(publication.nic)) != (slot, nic));
        let user_mode = record.run.iter().filter(|_| live(record)).flat_map(|run| &run.forwards);
        published.flat_map(|publication| &publication.forwards).chain(user_mode).any(|other| clash(other, forward))
    };
    slots.values().map(|vm| &vm.record).find(|record| has(record)).map(|record| record.label.to_string())
}

/// Whether both want the same port of the host: `0.0.0.0` is every address.
pub fn clash(one: &Forward, other: &Forward) -> bool {
    let (a, b) = (one.host_address.0, other.host_address.0);
    let overlap = a == b || (a.is_ipv4() == b.is_ipv4() && (a.is_unspecified() || b.is_unspecified()));
    (one.protocol, one.host_port) == (other.protocol, other.host_port) && overlap
}

fn text(forward: &Forward) -> String {
    match forward.host_address.0 {
        std::net::IpAddr::V4(v4) => format!("{v4}:{}/{}", forward.host_port, forward.protocol),
        std::net::IpAddr::V6(v6) => format!("[{v6}]:{}/{}", forward.host_port, forward.protocol),
    }
}

#[cfg(test)]
mod tests;
