//! `vm.claim`: a slot, with the user and the directory that belong to it alone.

use crate::grants::Vms;
use crate::ledger::{Record, Resources};
use crate::state::{Supervisor, Vm};
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::name::{RequestId, Slot, Tenancy};
use diarch_ipc::operation::{Claim, Claimed, SlotState};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

pub fn claim(supervisor: &Rc<Supervisor>, id: RequestId, ask: &Claim) -> Result<Claimed, Error> {
    if let Some(answer) = asked_before(&supervisor.slots.borrow(), id, ask)? {
        return Ok(answer);
    }
    let vetted = vet(&supervisor.slots.borrow(), &supervisor.closed, &supervisor.grants.vms, id, ask)?;
    // Record and effect are one: the slot's directory is what appears by the rename that makes the record. (On a tmpfs: nothing to wait for.)
    let record = vetted.into_inner();
    supervisor.ledger.create(&record).map_err(|error| Error::io("ledger", &error))?;
    let claimed = Claimed { tenancy: Tenancy { slot: record.slot, claim: record.claim }, uid: record.uid };
    supervisor.slots.borrow_mut().insert(record.slot, Vm::new(record));
    Ok(claimed)
}

/// The same request, repeated by a worker that lost the connection: the same answer.
fn asked_before(slots: &BTreeMap<Slot, Vm>, id: RequestId, ask: &Claim) -> Result<Option<Claimed>, Error> {
    match slots.values().map(|vm| &vm.record).find(|record| record.claim == id) {
        None => Ok(None),
        Some(record) if record.label == ask.label => Ok(Some(Claimed { tenancy: Tenancy { slot: record.slot, claim: record.claim }, uid: record.uid })),
        Some(record) => Err(Error::invalid("id", format!("under this id, {} was claimed", record.label))),
    }
}

/// The lowest free slot, for a label that no other slot has.
fn vet(slots: &BTreeMap<Slot, Vm>, closed: &BTreeSet<Slot>, vms: &Vms, id: RequestId, ask: &Claim) -> Result<Vetted<Record>, Error> {
    if let Some(vm) = slots.values().find(|vm| vm.record.label == ask.label) {
        let holder = format!("slot {}", vm.record.slot);
        return Err(Error::Conflict { holder, reason: format!("it has the label {}; release it first", ask.label) });
    }
    // A user id that a slot from before a change of the grants still has is given to no second VM.
    let uid_of = |slot: Slot| vms.uid_first.checked_add(u32::from(slot.get())).filter(|uid| slots.values().all(|vm| vm.record.uid != *uid));
    let candidates = (0..u64::from(vms.max)).filter_map(|n| Slot::new(n).ok()).filter(|slot| !slots.contains_key(slot) && !closed.contains(slot));
    let Some((slot, uid)) = candidates.filter_map(|slot| Some((slot, uid_of(slot)?))).next() else {
        return Err(Error::Exhausted { what: "slots (vms.max in the grants)".into(), limit: u64::from(vms.max), retry_after_ms: None });
    };
    Ok(Vetted::by_vet(Record { slot, label: ask.label.clone(), uid, claim: id, state: SlotState::Claimed, run: None, resources: Resources::default() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::name::Label;

    fn id(serial: u64) -> RequestId {
        RequestId { session: 1, serial }
    }
    fn ask(label: &str) -> Claim {
        Claim { label: Label::new(label).unwrap() }
    }

    fn vms(uid_first: u32) -> Vms {
        Vms { max: 3, uid_first, memory_mib: 1, cpus_each: 1, kvm: false }
    }
    fn judged(slots: &BTreeMap<Slot, Vm>, serial: u64, label: &str) -> Result<Record, Error> {
        vet(slots, &BTreeSet::new(), &vms(200_000), id(serial), &ask(label)).map(Vetted::into_inner)
    }

    #[test]
    fn the_lowest_free_slot_is_given_and_each_has_its_own_user() {
        let mut slots = BTreeMap::new();
        for (n, label) in ["a", "b", "c"].iter().enumerate() {
            let record = judged(&slots, n as u64, label).unwrap();
            assert_eq!((usize::from(record.slot.get()), record.uid), (n, 200_000 + n as u32));
            slots.insert(record.slot, Vm::new(record));
        }
        assert_eq!(judged(&slots, 9, "d").unwrap_err().kind(), "exhausted");
        slots.remove(&Slot::new(1).unwrap());
        assert_eq!(judged(&slots, 9, "d").unwrap().slot.get(), 1);
    }

    #[test]
    fn a_slot_whose_record_can_not_be_read_is_given_to_nobody_and_stops_nobody() {
        let closed = BTreeSet::from([Slot::new(0).unwrap()]);
        assert_eq!(vet(&BTreeMap::new(), &closed, &vms(200_000), id(1), &ask("a")).unwrap().slot.get(), 1);
    }

    #[test]
    fn two_vms_never_have_one_user_also_when_the_grants_were_changed_between_them() {
        let mut slots = BTreeMap::new();
        let record = judged(&slots, 1, "a").unwrap();
        slots.insert(record.slot, Vm::new(record));
        // Slot 1 would be user 200000 now, which is slot 0's.
        let record = vet(&slots, &BTreeSet::new(), &vms(199_999), id(2), &ask("b")).unwrap().into_inner();
        assert_eq!((record.slot.get(), record.uid), (2, 200_001));
    }

    #[test]
    fn a_label_is_claimed_once_and_the_conflict_names_the_slot() {
        let mut slots = BTreeMap::new();
        let record = judged(&slots, 1, "a").unwrap();
        slots.insert(record.slot, Vm::new(record));
        let Error::Conflict { holder, .. } = judged(&slots, 2, "a").unwrap_err() else { panic!() };
        assert_eq!(holder, "slot 0");
        assert_eq!(asked_before(&slots, id(1), &ask("a")).unwrap().unwrap().tenancy.slot.get(), 0);
        assert!(asked_before(&slots, id(2), &ask("a")).unwrap().is_none());
        assert_eq!(asked_before(&slots, id(1), &ask("b")).unwrap_err().kind(), "invalid", "another request under a used id");
    }
}
