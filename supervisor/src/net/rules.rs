//! The rules, as text for nft: constant, with sets that are filled from the ledger. An auditor reads them in `rules.nft`; what varies is numbers, canonical
//! addresses, and names that are derived or checked (THREATS 12, 16).

use super::tap;
use crate::grants::{Grants, Place, Range};
use crate::ledger::Record;
use diarch_ipc::name::{Forward, Mac};
use diarch_ipc::operation::SlotState;
use diarch_ipc::spec::Egress;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};

/// Both tables away. To delete what may not be there, it is added first; nft 1.0 knows no `destroy`.
pub const NOTHING: &str = "add table netdev diarch\ndelete table netdev diarch\nadd table inet diarch\ndelete table inet diarch\n";

/// The tables with their rules, and `%NAME%` where a set's elements go.
const RULES: &str = include_str!("rules.nft");

/// Devices of one chain at most (`NFT_NETDEVICE_MAX` in net/netfilter/nf_tables_api.c).
const DEVICES: usize = 256;

/// One card with a tap, as the rules see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    pub name: String,
    pub mac: Mac,
    pub address: Option<IpAddr>,
    pub place: Where,
    pub host: bool,
    pub metadata: bool,
    pub masquerade: bool,
    pub peers: bool,
    pub forwards: Vec<Forward>,
}

/// A VM whose user-mode networking is a process of the host's: by its user the kernel knows what is its guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub egress: Egress,
}

/// The users of these records' VMs, from before such a process starts until after it has ended.
pub fn users<'a>(records: impl Iterator<Item = &'a Record>) -> Vec<User> {
    let live = |record: &&Record| matches!(record.state, SlotState::Spawning | SlotState::Running | SlotState::Releasing);
    records.filter(live).filter_map(|record| Some(User { uid: record.uid, egress: record.run.as_ref()?.egress? })).collect()
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Where {
    Bridge(String),
    Routed(Range),
}

/// The cards of these records. One whose network is no longer granted has no rule that lets a frame through, and a forward that is no longer granted leads
/// nowhere: the grants of today count.
pub fn cards<'a>(grants: &Grants, records: impl Iterator<Item = &'a Record>) -> Vec<Card> {
    let mut cards = Vec::new();
    for record in records {
        for of in &record.resources.taps {
            let Some(network) = grants.network.get(of.network.as_str()) else { continue };
            let place = match network.place() {
                Ok(Place::Bridge(name)) => Where::Bridge(name.to_owned()),
                Ok(Place::Routed(range)) => Where::Routed(range),
                Err(_) => continue,
            };
            let published = record.resources.published.iter().filter(|publication| publication.nic == of.nic).flat_map(|publication| &publication.forwards);
            cards.push(Card {
                name: tap::name(record.slot, of.nic),
                mac: of.mac.clone(),
                address: of.address.map(|address| address.0),
                place,
                host: network.host,
                metadata: network.metadata,
                masquerade: network.masquerade,
                peers: network.peers,
                forwards: published.filter(|forward| grants.ports.publish.iter().any(|range| range.covers(forward))).copied().collect(),
            });
        }
    }
    cards
}

/// The link-local address that a card's MAC gives (RFC 4291, appendix A: modified EUI-64).
fn link_local(mac: &Mac) -> Ipv6Addr {
    let mut bytes = [0u8; 6];
    for (byte, pair) in bytes.iter_mut().zip(mac.as_str().split(':')) {
        *byte = u8::from_str_radix(pair, 16).unwrap_or_default();
    }
    let [a, b, c, d, e, f] = bytes;
    let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, pair(a ^ 2, b), pair(c, 0xff), pair(0xfe, d), pair(e, f))
}

/// The text that replaces both tables.
pub fn render(cards: &[&Card], users: &[User]) -> String {
    let mut sets = Sets::default();
    for user in users {
        sets.put("users", user.uid.to_string());
        if user.egress == Egress::Closed {
            sets.put("closed_users", user.uid.to_string());
        }
    }
    let mut neighbours = String::new();
    for card in cards {
        let name = format!("\"{}\"", card.name);
        sets.put("macs", format!("{name} . {}", card.mac));
        match card.address {
            None => sets.put("unbound", name.clone()),
            Some(IpAddr::V4(address)) => {
                sets.put("bound4", name.clone());
                sets.put("senders4", format!("{name} . {address}"));
            }
            Some(IpAddr::V6(address)) => {
                let local = link_local(&card.mac);
                sets.put("bound6", name.clone());
                for own in [address, local] {
                    sets.put("senders6", format!("{name} . {own}"));
                    // The target of a neighbour advertisement, as a number: nft 1.0 can't put that field into a set.
                    let _ = writeln!(neighbours, "        iifname {name} @th,64,128 {:#034x} accept", own.to_bits());
                }
            }
        }
        if card.metadata {
            sets.put("metadata_open", name.clone());
        }
        match &card.place {
            Where::Bridge(bridge) => {
                sets.put("bridged", name.clone());
                if !card.host {
                    sets.put("neighbours", format!("\"{bridge}\" . {}", card.mac));
                }
            }
            Where::Routed(range) => {
                sets.put("routed", name.clone());
                sets.put("gateways", format!("{name} . {}", range.gateway()));
                sets.put("ranges", range.to_string());
                if card.host {
                    sets.put("host_open", name.clone());
                }
                if card.peers {
                    sets.put("peers", format!("{name} . {range}"));
                }
                if let (true, Some(address)) = (card.masquerade, card.address) {
                    sets.put("masqueraded", address.to_string());
                }
            }
        }
        publish(&mut sets, card);
    }
    let mut text = String::from(NOTHING);
    // The comments are for people.
    for line in RULES.lines().filter(|line| !line.trim_start().starts_with('#')) {
        match line.split_once('%').and_then(|(before, rest)| Some((before, rest.split_once('%')?.0))) {
            Some((_, "ingress")) => ingress(&mut text, cards),
            Some((_, "own_neighbours")) => text += &neighbours,
            Some((before, set)) => {
                // An empty list of elements is a syntax error.
                if let Some(elements) = sets.0.get(set) {
                    let _ = writeln!(text, "{before}elements = {{ {} }};", elements.join(", "));
                }
            }
            None => {
                text += line;
                text.push('\n');
            }
        }
    }
    text
}

/// The hook of each tap.
fn ingress(text: &mut String, cards: &[&Card]) {
    for (number, cards) in cards.chunks(DEVICES).enumerate() {
        let devices: Vec<&str> = cards.iter().map(|card| card.name.as_str()).collect();
        // Before everything else that hooks in there; what no rule names is dropped.
        let _ = writeln!(
            text,
            "    chain ingress{number} {{\n        type filter hook ingress devices = {{ {} }} priority -500; policy drop;\n        goto from_guest\n    }}",
            devices.join(", ")
        );
    }
}

fn publish(sets: &mut Sets, card: &Card) {
    for forward in &card.forwards {
        let Some(guest) = card.address.filter(|guest| guest.is_ipv4() == forward.host_address.0.is_ipv4()) else { continue };
        let (set, key) = match forward.host_address.0 {
            IpAddr::V4(host) if host.is_unspecified() => ("everywhere4", String::new()),
            IpAddr::V6(host) if host.is_unspecified() => ("everywhere6", String::new()),
            IpAddr::V4(host) => ("published4", format!("{host} . ")),
            IpAddr::V6(host) => ("published6", format!("{host} . ")),
        };
        sets.put(set, format!("{} . {key}{} : {guest} . {}", forward.protocol, forward.host_port, forward.guest_port));
        if matches!(card.place, Where::Bridge(_)) {
            sets.put(if guest.is_ipv4() { "behind4" } else { "behind6" }, guest.to_string());
        }
    }
}

#[derive(Default)]
struct Sets(std::collections::BTreeMap<&'static str, Vec<String>>);

impl Sets {
    fn put(&mut self, set: &'static str, element: String) {
        let elements = self.0.entry(set).or_default();
        // A set takes an element once; networks and bridges come with each of their cards, one after the other.
        if elements.last() != Some(&element) && !(matches!(set, "ranges" | "behind4" | "behind6" | "neighbours") && elements.contains(&element)) {
            elements.push(element);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::name::{IpText, NetworkName, NicIndex, Port, Protocol, Queues, RequestId, Slot};

    fn forward(host: &str, port: u64) -> Forward {
        let host_address = IpText::try_from(host.to_owned()).unwrap();
        Forward { protocol: Protocol::Tcp, host_address, host_port: Port::new(port).unwrap(), guest_port: Port::new(80).unwrap() }
    }

    fn record(taps: &[(&str, Option<&str>)]) -> Record {
        let tap = |(nic, (network, address)): (u64, &(&str, Option<&str>))| crate::ledger::Tap {
            nic: NicIndex::new(nic).unwrap(),
            network: NetworkName::new(*network).unwrap(),
            mac: Mac::new(format!("52:54:00:00:00:0{nic}")).unwrap(),
            address: address.map(|address| IpText::try_from(address.to_owned()).unwrap()),
            queues: Queues::new(1).unwrap(),
        };
        Record {
            slot: Slot::new(7).unwrap(),
            label: diarch_ipc::name::Label::new("web").unwrap(),
            uid: 200_007,
            claim: RequestId { session: 1, serial: 1 },
            state: diarch_ipc::operation::SlotState::Claimed,
            run: None,
            resources: crate::ledger::Resources {
                taps: (0..).zip(taps).map(tap).collect(),
                published: vec![crate::ledger::Publication {
                    nic: NicIndex::new(0).unwrap(),
                    forwards: vec![forward("192.0.2.1", 8080), forward("0.0.0.0", 8081), forward("192.0.2.1", 22)],
                }],
                mounts: Vec::new(),
            },
        }
    }

    fn grants() -> Grants {
        toml::from_str(
            "[worker]\nuser = 64000\n[vms]\nmax = 4\nuid_first = 200000\nmemory_mib = 1024\ncpus_each = 2\n\
             [network.p2p]\nrouted = \"10.77.0.0/20\"\nmasquerade = true\n[network.lan]\nbridge = \"br0\"\nmetadata = true\n\
             [ports]\npublish = [\"192.0.2.1:8000-8099\", \"0.0.0.0:8000-8099\"]\n",
        )
        .unwrap()
    }

    fn rendered(record: &Record) -> String {
        let cards = cards(&grants(), std::iter::once(record));
        render(&cards.iter().collect::<Vec<_>>(), &[])
    }

    #[test]
    fn every_card_is_in_the_sets_that_its_grant_says() {
        let text = rendered(&record(&[("p2p", Some("10.77.0.30")), ("lan", None), ("lan", Some("fd00::7"))]));
        for line in [
            "elements = { \"dvm7n0\" . 52:54:00:00:00:00, \"dvm7n1\" . 52:54:00:00:00:01, \"dvm7n2\" . 52:54:00:00:00:02 };",
            "elements = { \"dvm7n0\" . 10.77.0.30 };",
            "elements = { \"dvm7n2\" . fd00::7, \"dvm7n2\" . fe80::5054:ff:fe00:2 };",
            "elements = { tcp . 192.0.2.1 . 8080 : 10.77.0.30 . 80 };",
            "elements = { tcp . 8081 : 10.77.0.30 . 80 };",
            "elements = { \"br0\" . 52:54:00:00:00:01, \"br0\" . 52:54:00:00:00:02 };",
            "devices = { dvm7n0, dvm7n1, dvm7n2 }",
            "iifname \"dvm7n2\" @th,64,128 0xfd000000000000000000000000000007 accept",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(!text.contains(". 22 :"), "what is no longer granted leads nowhere");
        assert!(!text.contains('%'), "{text}");
        assert!(text.starts_with(NOTHING));
    }

    #[test]
    fn a_card_whose_network_is_no_longer_granted_has_no_rule() {
        assert!(cards(&grants(), std::iter::once(&record(&[("gone", None)]))).is_empty());
    }

    #[test]
    fn no_rule_speaks_of_another_table_than_ours() {
        let text = rendered(&record(&[("p2p", Some("10.77.0.30"))]));
        assert!(!text.contains("ruleset") && !text.contains("flush"));
        for line in text.lines().filter(|line| line.contains("table ")) {
            assert!(line.contains("table netdev diarch") || line.contains("table inet diarch"), "{line}");
        }
    }

    #[test]
    fn a_user_is_in_the_rules_as_long_as_its_vm_may_have_a_process_and_closed_unless_its_guest_may_connect_out() {
        let run = |egress| crate::ledger::Run {
            spawn: RequestId { session: 1, serial: 2 },
            asked: String::new(),
            process: None,
            spawned_ms: 0,
            cpus: diarch_ipc::name::Cpus::new(1).unwrap(),
            memory: diarch_ipc::name::MiB::new(64).unwrap(),
            accelerator: diarch_ipc::spec::Accelerator::Tcg,
            forwards: Vec::new(),
            exit: None,
            egress,
            companions: Vec::new(),
        };
        let of = |state, egress| users(std::iter::once(&Record { state, run: Some(run(egress)), ..record(&[]) }));
        for state in [SlotState::Spawning, SlotState::Running, SlotState::Releasing] {
            assert_eq!(of(state, Some(Egress::Closed)), [User { uid: 200_007, egress: Egress::Closed }]);
            assert_eq!(of(state, None), []);
        }
        assert_eq!(of(SlotState::Exited, Some(Egress::Closed)), []);
        let both = [User { uid: 1, egress: Egress::Closed }, User { uid: 2, egress: Egress::Host }];
        let text = render(&[], &both);
        assert!(text.contains("elements = { 1, 2 };") && text.contains("elements = { 1 };"), "{text}");
    }

    #[test]
    fn more_taps_than_a_chain_takes_are_in_several() {
        let card = cards(&grants(), std::iter::once(&record(&[("lan", None)]))).remove(0);
        let cards: Vec<Card> = (0..600).map(|n| Card { name: format!("dvm{n}n0"), ..card.clone() }).collect();
        let text = render(&cards.iter().collect::<Vec<_>>(), &[]);
        assert!(text.contains("chain ingress2 {") && !text.contains("chain ingress3 {"));
    }
}
