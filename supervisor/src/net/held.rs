//! Taps that wait for their QEMU.
//!
//! ```text
//!   tap.open  -> made -> held here                        (the worker hears its name and address, and gets no descriptor)
//!   vm.spawn  -> taken -> into QEMU's jail, and nowhere else: from here on the tap is as long as its QEMU
//!   vm.release, another tap.open -> removed
//! ```
//!
//! Who has a queue is asked for no right by the driver: it can give the host's end another's MAC address, make the tap outlive its VM, and send as the guest. So
//! between the two nobody has one but this supervisor (QEMU's jail refuses the rest; THREATS 32). There is nothing in a tap that is worth keeping over a supervisor's
//! death: the kernel removes it then, and `vm.spawn` makes it anew from the ledger, under the grants of that time.

use super::link::Links;
use super::tap;
use crate::state::{Supervisor, Vm};
use diarch_ipc::Error;
use diarch_ipc::name::{NicIndex, Queues, Slot, Tenancy};
use diarch_ipc::operation::{OpenTap, Operation};
use diarch_ipc::spec::Nic;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// Queues that wait, of all taps: a quarter of the descriptors that the unit allows (`LimitNOFILE=`), so that whoever opens taps and starts nothing takes none
/// that a release needs.
pub const MAX_QUEUES: usize = 16_384;

/// A tap that waits.
#[derive(Debug)]
pub struct Held {
    pub queues: Vec<OwnedFd>,
    /// As it was made. Whoever is root may have taken it away since, or its bridge.
    pub index: u32,
    pub master: Option<u32>,
}

/// The queues that wait, without those of this card.
pub fn waiting(slots: &BTreeMap<Slot, Vm>, slot: Slot, nic: NicIndex) -> usize {
    let all = slots.values().flat_map(|vm| vm.taps.iter().map(move |(of, held)| (vm.record.slot, *of, held)));
    all.filter(|(of, card, _)| (*of, *card) != (slot, nic)).map(|(_, _, held)| held.queues.len()).sum()
}

/// Whether there is room for more.
pub fn room(waiting: usize, wanted: Queues) -> Result<(), Error> {
    if waiting + usize::from(wanted.get()) <= MAX_QUEUES {
        return Ok(());
    }
    let what = "queues of taps that wait for their VM's start; start or release some of those VMs".into();
    Err(Error::Exhausted { what, limit: MAX_QUEUES as u64, retry_after_ms: None })
}

/// The queues of a VM's taps, card by card, for its QEMU: nothing is held for the VM afterwards. A tap that is not there any more, or not as it was made, is made
/// anew.
pub async fn take(supervisor: &Rc<Supervisor>, row: &'static Operation, tenancy: Tenancy, nics: &[Nic]) -> Result<Vec<OwnedFd>, Error> {
    if supervisor.host.is_rehearsed() {
        return Ok(Vec::new());
    }
    let mut cards = Vec::new();
    for (number, _) in (0..).zip(nics).filter(|(_, nic)| nic.queues() > 0) {
        cards.push(NicIndex::new(number).map_err(|error| Error::invalid("spec.nics", error.to_string()))?);
    }
    for nic in &cards {
        if !as_made(supervisor, row, tenancy, *nic).await? {
            again(supervisor, row, tenancy, *nic).await?;
        }
    }
    let mut held = all_of(supervisor, tenancy.slot);
    let mut queues = Vec::new();
    for nic in cards {
        let one =
            held.remove(&nic).ok_or_else(|| Error::Failed { step: "take the taps".into(), errno: None, detail: format!("that of card {nic} is gone") })?;
        queues.extend(one.queues);
    }
    if !held.is_empty() {
        // Of cards that this start does not have. The kernel takes its time to remove an interface.
        supervisor.act(row, tenancy.slot, "remove taps", move || drop(held)).await?;
    }
    Ok(queues)
}

/// All that is held for a slot; held no more.
pub fn all_of(supervisor: &Supervisor, slot: Slot) -> BTreeMap<NicIndex, Held> {
    supervisor.slots.borrow_mut().get_mut(&slot).map(|vm| std::mem::take(&mut vm.taps)).unwrap_or_default()
}

/// Whether the tap is held, and is in the kernel what it was when it was made.
async fn as_made(supervisor: &Rc<Supervisor>, row: &'static Operation, tenancy: Tenancy, nic: NicIndex) -> Result<bool, Error> {
    let Some(made) = supervisor.with(tenancy, |vm| vm.taps.get(&nic).map(|held| (held.index, held.master)))? else { return Ok(false) };
    let name = tap::name(tenancy.slot, nic);
    let look = move || Links::open().and_then(|mut links| links.named(&name));
    let link = supervisor.act(row, tenancy.slot, "look at a tap", look).await?.map_err(|error: io::Error| Error::io("look at a tap", &error))?;
    Ok(link.is_some_and(|link| link.kind == "tun" && (link.index, link.master) == made))
}

/// Made as the ledger has it, or not at all: the guest may know its address already.
async fn again(supervisor: &Rc<Supervisor>, row: &'static Operation, tenancy: Tenancy, nic: NicIndex) -> Result<(), Error> {
    let known = supervisor.with(tenancy, |vm| vm.record.resources.taps.iter().find(|tap| tap.nic == nic).cloned())?;
    let known = known.ok_or_else(|| Error::NotFound { what: format!("a tap for card {nic} of slot {}: tap.open comes first", tenancy.slot) })?;
    let ask = OpenTap { tenancy, nic, network: known.network, mac: known.mac, address: known.address, queues: known.queues };
    tap::raise(supervisor, row, tap::vetted(supervisor, row, &ask).await?).await?;
    supervisor.note(&format!("slot {}: the tap {} was not there any more, and was made anew for this start", tenancy.slot, tap::name(tenancy.slot, nic)));
    Ok(())
}
