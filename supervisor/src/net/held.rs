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

/// Queues that wait, of all taps. Each costs the kernel some 100 KiB, which count as ours, and a supervisor that ends takes its taps with it, at some 20 ms for each (Linux
/// 6.18): so whoever opens taps and starts nothing must not have many. A tap waits between two requests of one start.
pub const MAX_QUEUES: usize = 1024;
/// The same of taps: what a supervisor that ends has time for (`TimeoutStopSec=`).
pub const MAX_TAPS: usize = 256;

/// A tap that waits.
#[derive(Debug)]
pub struct Held {
    pub queues: Vec<OwnedFd>,
    /// As it was made. Whoever is root may have taken it away since, or its bridge.
    pub index: u32,
    pub master: Option<u32>,
}

/// Taps that wait, and their queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    pub taps: usize,
    pub queues: usize,
}

/// What waits, without this card.
pub fn waiting(slots: &BTreeMap<Slot, Vm>, slot: Slot, nic: NicIndex) -> Waiting {
    let all = slots.values().flat_map(|vm| vm.taps.iter().map(move |(of, held)| (vm.record.slot, *of, held)));
    let others = all.filter(|(of, card, _)| (*of, *card) != (slot, nic));
    others.fold(Waiting { taps: 0, queues: 0 }, |sum, (_, _, held)| Waiting { taps: sum.taps + 1, queues: sum.queues + held.queues.len() })
}

/// Whether there is room for one more.
pub fn room(waiting: Waiting, wanted: Queues) -> Result<(), Error> {
    let full = |what: &str, limit: usize| {
        let what = format!("{what} that wait for their VM's start; start or release some of those VMs");
        Err(Error::Exhausted { what, limit: limit as u64, retry_after_ms: None })
    };
    if waiting.taps >= MAX_TAPS {
        return full("taps", MAX_TAPS);
    }
    if waiting.queues + usize::from(wanted.get()) > MAX_QUEUES { full("queues of taps", MAX_QUEUES) } else { Ok(()) }
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
    let again = known.clone();
    let ask = OpenTap { tenancy, nic, network: again.network, mac: again.mac, address: again.address, queues: again.queues };
    let vetted = tap::vetted(supervisor, row, &ask).await?;
    // Its rules are made from the ledger. Under other grants than those of then, they would be of another tap than this one.
    if vetted.tap != known {
        return Err(Error::NotFound { what: format!("card {nic}'s tap as it was opened: the grants of its network have changed since; tap.open comes first") });
    }
    tap::raise(supervisor, row, vetted).await?;
    supervisor.note(&format!("slot {}: the tap {} was not there any more, and was made anew for this start", tenancy.slot, tap::name(tenancy.slot, nic)));
    Ok(())
}
