//! `tap.open`: a network interface whose other end is a VM.
//!
//! ```text
//!   facts   the interfaces that there are; whether the host forwards              (helper thread; changes nothing)
//!   vet     pure: request x grants x ledger x facts -> Vetted<Opening>
//!   record  the tap, with the MAC and the address that its rules will hold the guest to
//!   act     made, down -> rules -> bridge or routes -> up -> held                  (helper thread; see `held`)
//! ```
//!
//! Whatever fails or dies in between, the descriptors close and the tap is gone with them. Nobody is handed one: `vm.spawn` puts them into QEMU's jail.

use super::filter::Program;
use super::held::{self, Held};
use super::link::{Link, Links, Settings};
use super::{cards, rules, tun, users};
use crate::grants::{Grants, Place};
use crate::ledger::{Record, Tap};
use crate::state::{Supervisor, Vm};
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::name::{IpText, Mac, NicIndex, Slot};
use diarch_ipc::operation::{OpenTap, Operation, TapOpened};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;

/// Of a routed network, whose guests no other network's limit concerns.
const ROUTED_MTU: u32 = 1500;

/// What a card's tap is called: derived from two numbers of ours, at most nine bytes (THREATS 16).
pub fn name(slot: Slot, nic: NicIndex) -> String {
    format!("dvm{slot}n{nic}")
}

/// The tap's own MAC address, the host's end: locally administered, and high, for a bridge takes the lowest of its ports' as its own (bridge(8)).
fn host_mac(slot: Slot, nic: NicIndex) -> [u8; 6] {
    let [high, low] = slot.get().to_be_bytes();
    [0xfe, 0x64, 0x76, high, low, u8::try_from(nic.get()).unwrap_or_default()]
}

/// The host as it is.
struct Facts {
    links: Vec<Link>,
    forwards: bool,
}

/// A tap to be made.
#[derive(Debug)]
pub(super) struct Opening {
    record: Record,
    pub(super) tap: Tap,
    place: Plug,
    mtu: u32,
    /// An earlier one of this card's: held, or of a QEMU that the kernel has not taken apart yet.
    stale: Option<u32>,
}

/// Where its host end goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plug {
    Bridge { index: u32 },
    Routed { gateway: Ipv4Addr, guest: Ipv4Addr },
}

pub async fn open(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &OpenTap) -> Result<TapOpened, Error> {
    let _lock = supervisor.lock(ask.tenancy).await?;
    supervisor.check_state(row, ask.tenancy)?;
    let vetted = vetted(supervisor, row, ask).await?;

    let before = supervisor.with(ask.tenancy, |vm| vm.record.clone())?;
    supervisor.record(vetted.record.clone())?;
    let answer = opened(&vetted, ask.tenancy.slot);
    let would = || format!("make the tap {} (queues: {}) on network {}, and its rules", answer.name, vetted.tap.queues, vetted.tap.network);
    if supervisor.host.rehearses(would) {
        return Ok(answer);
    }
    if let Err(error) = raise(supervisor, row, vetted).await {
        supervisor.record_or_believe(before);
        return Err(error);
    }
    Ok(answer)
}

/// Looks at the host, and vets.
pub(super) async fn vetted(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &OpenTap) -> Result<Vetted<Opening>, Error> {
    let facts =
        if supervisor.host.is_rehearsed() { staged(&supervisor.grants) } else { supervisor.act(row, ask.tenancy.slot, "look at interfaces", gather).await?? };
    vet(&supervisor.grants, &supervisor.slots.borrow(), ask, &facts)
}

/// Makes a tap that the ledger has, and holds it. An earlier one of the card's is gone, whatever becomes of this.
pub(super) async fn raise(supervisor: &Rc<Supervisor>, row: &'static Operation, vetted: Vetted<Opening>) -> Result<(), Error> {
    let (slot, nic) = (vetted.record.slot, vetted.tap.nic);
    let earlier = supervisor.slots.borrow_mut().get_mut(&slot).and_then(|vm| vm.taps.remove(&nic));
    // No other's rules in between: they would not have this tap, which is there.
    let _one = supervisor.filter.take().await;
    let (all, users) = (cards(supervisor, None), users(supervisor));
    let (program, node) = (Program::of(supervisor), supervisor.host.dev().join("net/tun"));
    let make = move || {
        drop(earlier);
        make(vetted, &all, &users, &program, &node)
    };
    let made = supervisor.act(row, slot, "make a tap", make).await.and_then(|made| made);
    // Where it fails, there may be rules for an interface that is not.
    supervisor.filter.done(&made);
    let held = made?;
    if let Some(vm) = supervisor.slots.borrow_mut().get_mut(&slot) {
        vm.taps.insert(nic, held);
    }
    Ok(())
}

fn opened(opening: &Opening, slot: Slot) -> TapOpened {
    let (address, gateway) = match opening.place {
        Plug::Bridge { .. } => (None, None),
        Plug::Routed { gateway, guest } => (Some(IpText(guest.into())), Some(IpText(gateway.into()))),
    };
    TapOpened { name: name(slot, opening.tap.nic), mtu: opening.mtu, address, gateway }
}

/// What a rehearsal takes the host to be: it forwards, and has every bridge that is granted.
fn staged(grants: &Grants) -> Facts {
    let bridges = grants.network.values().filter_map(|network| match network.place() {
        Ok(Place::Bridge(name)) => Some(name.to_owned()),
        _ => None,
    });
    let link =
        |(index, name)| Link { index, name, kind: "bridge".into(), master: None, address: [0; 6], mtu: 1500, owner: None, queues: None, disabled_queues: None };
    Facts { links: (1..).zip(bridges).map(link).collect(), forwards: true }
}

fn gather() -> Result<Facts, Error> {
    let links = Links::open().and_then(|mut links| links.all()).map_err(|error| Error::io("list interfaces", &error))?;
    let forwards = std::fs::read("/proc/sys/net/ipv4/ip_forward").is_ok_and(|value| value.starts_with(b"1"));
    Ok(Facts { links, forwards })
}

fn vet(grants: &Grants, slots: &BTreeMap<Slot, Vm>, ask: &OpenTap, facts: &Facts) -> Result<Vetted<Opening>, Error> {
    let vm = Supervisor::tenant(slots, ask.tenancy)?;
    let slot = ask.tenancy.slot;
    let grant = format!("network.{}", ask.network);
    let Some(network) = grants.network.get(ask.network.as_str()) else {
        let known: Vec<&str> = grants.network.keys().map(String::as_str).collect();
        return Err(Error::denied(grant, format!("there is no such section; there are: {}", if known.is_empty() { "none".into() } else { known.join(", ") })));
    };
    let all_zero = ask.mac.as_str().bytes().all(|byte| matches!(byte, b'0' | b':'));
    // fe:64:76 is the host's end of taps; see `host_mac`.
    if all_zero || ask.mac.as_str().starts_with("fe:64:76:") {
        return Err(Error::invalid("mac", "it is no card's address (00:00:00:00:00:00), or one of the host's own (fe:64:76:...)"));
    }
    let (plug, address, mtu) = match network.place().map_err(|reason| Error::denied(&*grant, reason))? {
        Place::Bridge(bridge) => {
            let found = facts.links.iter().find(|link| link.name == bridge);
            let link = found.ok_or_else(|| Error::Unsupported {
                missing: format!("the bridge {bridge:?} ({grant}.bridge in the grants): ip link add {bridge} type bridge"),
            })?;
            if link.kind != "bridge" {
                let kind = if link.kind.is_empty() { "hardware" } else { &link.kind };
                return Err(Error::denied(format!("{grant}.bridge"), format!("{bridge:?} is no bridge ({kind})")));
            }
            if bytes(&ask.mac) == Some(link.address) {
                return Err(Error::Conflict { holder: format!("the bridge {bridge}"), reason: format!("it has the MAC address {}", ask.mac) });
            }
            if let Some(IpText(address)) = ask.address {
                no_host_address(address)?;
            }
            (Plug::Bridge { index: link.index }, ask.address, link.mtu)
        }
        Place::Routed(range) => {
            let short =
                || Error::denied(format!("{grant}.routed"), format!("{range} has no address for card {} of slot {slot}; a larger range is needed", ask.nic));
            let guest = range.guest(slot, ask.nic).ok_or_else(short)?;
            if ask.address.is_some_and(|address| address.0 != IpAddr::V4(guest)) {
                return Err(Error::invalid("address", format!("on a routed network the supervisor gives it: {guest}")));
            }
            if !facts.forwards {
                let missing = format!(
                    "{grant} is routed, and this host forwards no IPv4 packets: sysctl -w net.ipv4.ip_forward=1, and in /etc/sysctl.d for the next boot"
                );
                return Err(Error::Unsupported { missing });
            }
            (Plug::Routed { gateway: range.gateway(), guest }, Some(IpText(guest.into())), ROUTED_MTU)
        }
    };
    let tap = Tap { nic: ask.nic, network: ask.network.clone(), mac: ask.mac.clone(), address, queues: ask.queues };
    unique(grants, slots, slot, &tap)?;
    held::room(held::waiting(slots, slot, tap.nic), tap.queues)?;
    let mut record = vm.record.clone();
    let known = record.resources.taps.iter().any(|known| known.nic == tap.nic);
    let stale = facts.links.iter().find(|link| link.name == name(slot, tap.nic));
    let stale = match stale {
        None => None,
        // The same asked again, after a lost answer, or for the next start.
        Some(link) if known && link.kind == "tun" => Some(link.index),
        Some(link) => {
            let reason = "it is not this supervisor's, and its name is the one that this card's tap would have; ip link del removes it".into();
            return Err(Error::Conflict { holder: format!("the interface {}", link.name), reason });
        }
    };
    // Ports that were published for the card lead to its address; with another one they would lead elsewhere.
    let same = record.resources.taps.iter().any(|known| known.nic == tap.nic && known.network == tap.network && known.address == tap.address);
    if !same {
        record.resources.published.retain(|publication| publication.nic != tap.nic);
    }
    record.resources.taps.retain(|known| known.nic != tap.nic);
    record.resources.taps.push(tap.clone());
    record.resources.taps.sort_by_key(|tap| tap.nic);
    Ok(Vetted::by_vet(Opening { record, tap, place: plug, mtu, stale }))
}

/// Two cards with one address on one network would take each other's packets.
fn unique(grants: &Grants, slots: &BTreeMap<Slot, Vm>, slot: Slot, tap: &Tap) -> Result<(), Error> {
    // Two networks may be one bridge, with other rules for the one's guests than for the other's.
    let bridge = |name: &diarch_ipc::name::NetworkName| match grants.network.get(name.as_str()).map(crate::grants::Network::place) {
        Some(Ok(Place::Bridge(bridge))) => Some(bridge),
        _ => None,
    };
    let together = |other: &Tap| other.network == tap.network || bridge(&other.network).is_some_and(|other| bridge(&tap.network) == Some(other));
    for vm in slots.values() {
        let others = vm.record.resources.taps.iter().filter(|other| together(other) && (vm.record.slot, other.nic) != (slot, tap.nic));
        for other in others {
            let taken = if other.mac == tap.mac {
                Some(format!("the MAC address {}", tap.mac))
            } else {
                tap.address.filter(|address| other.address == Some(*address)).map(|address| format!("the address {address}"))
            };
            if let Some(what) = taken {
                return Err(Error::Conflict {
                    holder: format!("VM {}", vm.record.label),
                    reason: format!("card {} of it has {what} on network {}", other.nic, other.network),
                });
            }
        }
    }
    Ok(())
}

/// An address that no guest can have would let packets pass that no guest sends.
fn no_host_address(address: IpAddr) -> Result<(), Error> {
    let wrong = match address {
        IpAddr::V4(v4) => v4.is_unspecified() || v4.is_loopback() || v4.is_link_local() || v4.is_multicast() || v4.is_broadcast() || v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_unspecified() || v6.is_loopback() || v6.is_multicast() || v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    if wrong { Err(Error::invalid("address", format!("{address} is no address of one guest (loopback, link-local, multicast, unspecified)"))) } else { Ok(()) }
}

fn bytes(mac: &Mac) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    for (byte, pair) in bytes.iter_mut().zip(mac.as_str().split(':')) {
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(bytes)
}

/// From here on the host changes. What fails closes the descriptors, and the tap goes with them.
fn make(vetted: Vetted<Opening>, all: &[rules::Card], users: &[rules::User], program: &Program, node: &std::path::Path) -> Result<Held, Error> {
    let opening = vetted.into_inner();
    let slot = opening.record.slot;
    let (name, queues) = (name(slot, opening.tap.nic), opening.tap.queues.get());
    let step = |step: &'static str| move |error: io::Error| Error::io(step, &error);
    let mut links = Links::open().map_err(step("netlink"))?;
    if let Some(index) = opening.stale {
        remove_index(&mut links, index).map_err(step("remove the earlier tap"))?;
    }
    let fds = tun::create(node, &name, queues).map_err(|error| match error.raw_os_error() {
        Some(number) if number == nix::libc::EBUSY => {
            Error::Conflict { holder: format!("the interface {name}"), reason: "it appeared just now, and is not this supervisor's".into() }
        }
        Some(number) if number == nix::libc::ENOENT || number == nix::libc::ENODEV => {
            Error::Unsupported { missing: "/dev/net/tun: the kernel lacks the tun driver (modprobe tun)".into() }
        }
        _ => Error::io("make the tap", &error),
    })?;
    let there = links.all().map_err(step("list interfaces"))?;
    let link = there.iter().find(|link| link.name == name).ok_or_else(|| Error::Failed {
        step: "make the tap".into(),
        errno: None,
        detail: "it is not there".into(),
    })?;
    // Until it had an owner, anybody could attach a queue to one with several.
    let ours = link.owner == Some(0) && link.queues.is_none_or(|count| count == u32::from(queues)) && link.disabled_queues.unwrap_or(0) == 0;
    if !ours {
        return Err(Error::Conflict { holder: format!("the interface {name}"), reason: "somebody else attached to it while it was made".into() });
    }
    let index = link.index;

    // Rules before anything can pass: those of all taps that are there, this one among them.
    let cards: Vec<&rules::Card> = all.iter().filter(|card| there.iter().any(|link| link.kind == "tun" && link.name == card.name)).collect();
    program.set(&cards, users)?;

    let master = if let Plug::Bridge { index } = opening.place { Some(index) } else { None };
    links.set(index, Settings { address: host_mac(slot, opening.tap.nic), mtu: opening.mtu, master }).map_err(step("set up the tap"))?;
    if let Plug::Routed { gateway, .. } = opening.place {
        links.let_route(index).map_err(step("let the tap route"))?;
        links.add_address(index, gateway).map_err(step("the gateway's address"))?;
    }
    links.up(index).map_err(step("bring the tap up"))?;
    if let Plug::Routed { gateway, guest } = opening.place {
        links.add_route(index, guest, gateway).map_err(step("the guest's route"))?;
    }
    // By what the kernel says, and not by what it was asked.
    let now = links.named(&name).map_err(step("look at the tap"))?;
    if now.as_ref().is_none_or(|now| now.index != index || now.master != master) {
        return Err(Error::Failed { step: "make the tap".into(), errno: None, detail: format!("{name} is not where it was put") });
    }
    Ok(Held { queues: fds, index, master })
}

/// Removes the taps of a slot, whoever holds their descriptors.
pub fn remove(record: &Record) -> Result<(), Error> {
    if record.resources.taps.is_empty() {
        return Ok(());
    }
    let step = |error: io::Error| Error::io("remove taps", &error);
    let mut links = Links::open().map_err(step)?;
    for tap in &record.resources.taps {
        if let Some(link) = links.named(&name(record.slot, tap.nic)).map_err(step)?.filter(|link| link.kind == "tun") {
            remove_index(&mut links, link.index).map_err(step)?;
        }
    }
    Ok(())
}

fn remove_index(links: &mut Links, index: u32) -> io::Result<()> {
    match links.delete(index) {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(()),
        other => other,
    }
}

/// `/dev/vhost-net`, once for each queue: the kernel then moves the frames, and not QEMU. Empty where the host has none.
pub fn vhost(node: &std::path::Path, queues: u16) -> Vec<OwnedFd> {
    let open = || std::fs::File::options().read(true).write(true).open(node).map(OwnedFd::from);
    let fds: Vec<OwnedFd> = (0..queues).map_while(|_| open().ok()).collect();
    // All or none: QEMU wants one for each queue.
    if fds.len() == usize::from(queues) { fds } else { Vec::new() }
}

/// Where `/dev/vhost-net` is on this host.
pub fn vhost_node(host: &crate::host::Host) -> PathBuf {
    host.dev().join("vhost-net")
}

#[cfg(test)]
mod tests;
