use super::*;
use crate::ledger::{Publication, Resources};
use diarch_ipc::Request;
use diarch_ipc::name::{Label, NetworkName, Queues, RequestId, Tenancy};
use diarch_ipc::operation::SlotState;

fn grants() -> Grants {
    toml::from_str(
        "[worker]\nuser = 64000\n[vms]\nmax = 4\nuid_first = 200000\nmemory_mib = 64\ncpus_each = 1\n\
         [network.lan]\nbridge = \"br0\"\n[network.p2p]\nrouted = \"10.77.0.0/29\"\n[network.wire]\nbridge = \"eth0\"\n[network.gone]\nbridge = \"br9\"\n",
    )
    .unwrap()
}

fn link(name: &str, kind: &str, index: u32) -> Link {
    Link { index, name: name.into(), kind: kind.into(), mtu: 9000, address: [2, 0, 0, 0, 0, 9], ..Link::default() }
}

fn facts() -> Facts {
    Facts { links: vec![link("lo", "", 1), link("eth0", "", 2), link("br0", "bridge", 3)], forwards: true }
}

fn tenancy(slot: u64) -> Tenancy {
    Tenancy { slot: Slot::new(slot).unwrap(), claim: RequestId { session: 1, serial: slot } }
}

fn vm(slot: u64, taps: Vec<Tap>) -> (Slot, Vm) {
    let Tenancy { slot, claim } = tenancy(slot);
    let label = Label::new(format!("vm{slot}")).unwrap();
    let resources = Resources { taps, ..Resources::default() };
    (slot, Vm::new(Record { slot, label, uid: 200_000, claim, state: SlotState::Claimed, run: None, resources }))
}

fn ask(network: &str) -> OpenTap {
    let example = Request::examples().into_iter().find_map(|request| if let Request::TapOpen(ask) = request { Some(ask) } else { None });
    OpenTap { tenancy: tenancy(0), nic: NicIndex::new(0).unwrap(), network: NetworkName::new(network).unwrap(), address: None, ..example.unwrap() }
}

fn tap(ask: &OpenTap) -> Tap {
    Tap { nic: ask.nic, network: ask.network.clone(), mac: ask.mac.clone(), address: ask.address, queues: ask.queues }
}

fn ip(text: &str) -> Option<IpText> {
    Some(IpText::try_from(text.to_owned()).unwrap())
}

fn judged(ask: &OpenTap, facts: &Facts) -> Result<Opening, Error> {
    vet(&grants(), &BTreeMap::from([vm(0, Vec::new())]), ask, facts).map(Vetted::into_inner)
}

#[test]
fn a_name_has_room_for_every_slot_and_card() {
    let longest = name(Slot::new(4095).unwrap(), NicIndex::new(3).unwrap());
    assert_eq!(longest, "dvm4095n3");
    assert_ne!(host_mac(Slot::new(1).unwrap(), NicIndex::new(2).unwrap()), host_mac(Slot::new(2).unwrap(), NicIndex::new(1).unwrap()));
}

#[test]
fn a_bridge_is_found_by_the_index_it_has_now_and_gives_its_mtu() {
    let opening = judged(&ask("lan"), &facts()).unwrap();
    assert_eq!((opening.place, opening.mtu, opening.stale), (Plug::Bridge { index: 3 }, 9000, None));
    assert_eq!(opening.record.resources.taps, [tap(&ask("lan"))]);
}

#[test]
fn a_routed_card_gets_its_address_and_no_other() {
    let opening = judged(&ask("p2p"), &facts()).unwrap();
    assert_eq!(opening.place, Plug::Routed { gateway: Ipv4Addr::new(10, 77, 0, 1), guest: Ipv4Addr::new(10, 77, 0, 2) });
    assert_eq!(opening.tap.address, ip("10.77.0.2"));
    assert_eq!(judged(&OpenTap { address: ip("10.77.0.3"), ..ask("p2p") }, &facts()).unwrap_err().kind(), "invalid");
    // Slot 1 has its second address behind the end of the /29.
    let far = OpenTap { tenancy: tenancy(1), nic: NicIndex::new(1).unwrap(), ..ask("p2p") };
    let error = vet(&grants(), &BTreeMap::from([vm(1, Vec::new())]), &far, &facts()).unwrap_err();
    assert!(matches!(&error, Error::Denied { grant, reason } if grant == "network.p2p.routed" && reason.contains("larger")), "{error}");
    let Error::Unsupported { missing } = judged(&ask("p2p"), &Facts { forwards: false, ..facts() }).unwrap_err() else { panic!() };
    assert!(missing.contains("net.ipv4.ip_forward=1"), "{missing}");
}

#[test]
fn what_is_no_bridge_or_not_there_or_not_granted_is_told_apart() {
    let error = |network: &str| judged(&ask(network), &facts()).unwrap_err();
    assert!(matches!(error("wire"), Error::Denied { grant, .. } if grant == "network.wire.bridge"));
    assert!(matches!(error("gone"), Error::Unsupported { missing } if missing.contains("br9")));
    assert!(matches!(error("other"), Error::Denied { grant, reason } if grant == "network.other" && reason.contains("lan")));
}

#[test]
fn an_interface_of_that_name_that_the_ledger_does_not_know_is_left_alone() {
    for kind in ["tun", "dummy", ""] {
        let mut facts = facts();
        facts.links.push(link("dvm0n0", kind, 9));
        let error = judged(&ask("lan"), &facts).unwrap_err();
        assert!(matches!(&error, Error::Conflict { holder, .. } if holder == "the interface dvm0n0"), "{kind}: {error}");
    }
}

#[test]
fn asked_again_the_earlier_tap_goes_and_no_other_kind_of_interface_does() {
    let slots = BTreeMap::from([vm(0, vec![tap(&ask("lan"))])]);
    let mut facts = facts();
    facts.links.push(link("dvm0n0", "tun", 9));
    assert_eq!(vet(&grants(), &slots, &ask("lan"), &facts).unwrap().stale, Some(9));
    facts.links.last_mut().unwrap().kind = "dummy".into();
    assert_eq!(vet(&grants(), &slots, &ask("lan"), &facts).unwrap_err().kind(), "conflict");
}

#[test]
fn no_two_cards_of_a_network_have_one_address() {
    let theirs = OpenTap { address: ip("192.0.2.7"), ..ask("lan") };
    let slots = BTreeMap::from([vm(0, Vec::new()), vm(1, vec![tap(&theirs)])]);
    let error = |ask: &OpenTap| vet(&grants(), &slots, ask, &facts()).map(drop);
    let Error::Conflict { holder, .. } = error(&ask("lan")).unwrap_err() else { panic!() };
    assert_eq!(holder, "VM vm1");
    let other = OpenTap { mac: Mac::new("52:54:00:99:99:99").unwrap(), ..theirs };
    assert_eq!(error(&other).unwrap_err().kind(), "conflict", "the same IP address");
    error(&OpenTap { address: None, ..other }).unwrap();
}

#[test]
fn an_address_that_no_guest_has_is_invalid() {
    for bad in ["0.0.0.0", "127.0.0.1", "169.254.169.254", "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "ff02::1", "::ffff:10.0.0.1"] {
        let error = judged(&OpenTap { address: ip(bad), ..ask("lan") }, &facts()).unwrap_err();
        assert_eq!(error.kind(), "invalid", "{bad}");
    }
    for bad in ["00:00:00:00:00:00", "fe:64:76:00:00:00"] {
        assert_eq!(judged(&OpenTap { mac: Mac::new(bad).unwrap(), ..ask("lan") }, &facts()).unwrap_err().kind(), "invalid", "{bad}");
    }
    let bridges = OpenTap { mac: Mac::new("02:00:00:00:00:09").unwrap(), ..ask("lan") };
    assert_eq!(judged(&bridges, &facts()).unwrap_err().kind(), "conflict");
}

#[test]
fn ports_that_lead_to_an_address_go_when_the_card_gets_another() {
    let old = OpenTap { address: ip("192.0.2.7"), ..ask("lan") };
    let mut slots = BTreeMap::from([vm(0, vec![tap(&old)])]);
    let published = &mut slots.get_mut(&Slot::new(0).unwrap()).unwrap().record.resources.published;
    published.push(Publication { nic: old.nic, forwards: Vec::new() });
    let left = |ask: &OpenTap| vet(&grants(), &slots, ask, &facts()).unwrap().record.resources.published.len();
    assert_eq!((left(&old), left(&OpenTap { queues: Queues::new(2).unwrap(), ..old.clone() }), left(&ask("lan"))), (1, 1, 0));
}

#[test]
fn queues_that_wait_are_counted_over_all_vms_without_the_cards_own_and_have_an_end() {
    let held = |count| Held { queues: (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect(), index: 1, master: None };
    let nic = |number| NicIndex::new(number).unwrap();
    let mut slots = BTreeMap::from([vm(0, Vec::new()), vm(1, Vec::new())]);
    let [first, second] = [0, 1].map(|slot| Slot::new(slot).unwrap());
    slots.get_mut(&first).unwrap().taps.extend([(nic(0), held(2)), (nic(1), held(1))]);
    slots.get_mut(&second).unwrap().taps.insert(nic(0), held(4));
    assert_eq!(held::waiting(&slots, first, nic(0)).queues, 5, "asked again, its own go");
    assert_eq!(held::waiting(&slots, first, nic(2)).queues, 7);
    let room = |taps, queues| held::room(held::Waiting { taps, queues }, Queues::new(2).unwrap());
    room(held::MAX_TAPS - 1, held::MAX_QUEUES - 2).unwrap();
    assert_eq!(room(held::MAX_TAPS, 0).unwrap_err().kind(), "exhausted");
    assert_eq!(room(0, held::MAX_QUEUES - 1).unwrap_err().kind(), "exhausted");
}
