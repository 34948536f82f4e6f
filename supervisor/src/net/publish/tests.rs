use super::*;
use crate::ledger::{Resources, Tap};
use diarch_ipc::name::{IpText, Label, Mac, NetworkName, NicIndex, Port, Protocol, Queues, RequestId};

fn grants() -> Grants {
    toml::from_str(
        "[worker]\nuser = 64000\n[vms]\nmax = 4\nuid_first = 200000\nmemory_mib = 64\ncpus_each = 1\n\
         [ports]\npublish = [\"192.0.2.1:8000-8099\", \"0.0.0.0:8000-8099\", \"[2001:db8::1]:8000-8099\"]\n",
    )
    .unwrap()
}

fn ip(text: &str) -> IpText {
    IpText::try_from(text.to_owned()).unwrap()
}

fn forward(host: &str, port: u64) -> Forward {
    Forward { protocol: Protocol::Tcp, host_address: ip(host), host_port: Port::new(port).unwrap(), guest_port: Port::new(80).unwrap() }
}

fn tenancy(slot: u64) -> Tenancy {
    Tenancy { slot: Slot::new(slot).unwrap(), claim: RequestId { session: 1, serial: slot } }
}

fn vm(slot: u64, address: Option<&str>, forwards: &[Forward]) -> (Slot, Vm) {
    let Tenancy { slot, claim } = tenancy(slot);
    let nic = NicIndex::new(0).unwrap();
    let tap = Tap {
        nic,
        network: NetworkName::new("p2p").unwrap(),
        mac: Mac::new("52:54:00:00:00:01").unwrap(),
        address: address.map(ip),
        queues: Queues::new(1).unwrap(),
    };
    let published = if forwards.is_empty() { Vec::new() } else { vec![Publication { nic, forwards: forwards.to_vec() }] };
    let resources = Resources { taps: vec![tap], published, ..Resources::default() };
    (slot, Vm::new(Record { slot, label: Label::new(format!("vm{slot}")).unwrap(), uid: 200_000, claim, state: SlotState::Claimed, run: None, resources }))
}

fn judged(slots: &BTreeMap<Slot, Vm>, forwards: &[Forward]) -> Result<Record, Error> {
    vet(&grants(), slots, &Publish { tenancy: tenancy(0), nic: NicIndex::new(0).unwrap(), forwards: forwards.to_vec() }).map(Vetted::into_inner)
}

fn plain() -> BTreeMap<Slot, Vm> {
    BTreeMap::from([vm(0, Some("10.77.0.2"), &[forward("192.0.2.1", 8001)])])
}

#[test]
fn a_set_of_ports_replaces_the_cards_set_and_an_empty_one_removes_it() {
    let record = judged(&plain(), &[forward("192.0.2.1", 8002), forward("0.0.0.0", 8003)]).unwrap();
    assert_eq!(record.resources.published[0].forwards, [forward("192.0.2.1", 8002), forward("0.0.0.0", 8003)]);
    assert!(judged(&plain(), &[]).unwrap().resources.published.is_empty());
}

#[test]
fn what_is_not_granted_or_can_not_be_led_is_refused_with_the_reason() {
    let kind = |forwards: &[Forward]| judged(&plain(), forwards).unwrap_err().kind();
    assert_eq!(kind(&[forward("192.0.2.1", 22)]), "denied");
    assert_eq!(kind(&[forward("192.0.2.2", 8000)]), "denied");
    assert_eq!(kind(&[forward("127.0.0.1", 8000)]), "denied", "a loopback address, which no grant can name");
    assert_eq!(kind(&[forward("2001:db8::1", 8000)]), "invalid", "another family than the guest's");
    assert_eq!(kind(&[forward("192.0.2.1", 8000), forward("0.0.0.0", 8000)]), "invalid", "one port twice");
    assert_eq!(kind(&vec![forward("192.0.2.1", 8000); MAX_FORWARDS + 1]), "invalid");
    let unknown = BTreeMap::from([vm(0, None, &[])]);
    assert_eq!(judged(&unknown, &[forward("192.0.2.1", 8000)]).unwrap_err().kind(), "invalid");
    let mut none = plain();
    none.get_mut(&Slot::new(0).unwrap()).unwrap().record.resources.taps.clear();
    assert_eq!(judged(&none, &[forward("192.0.2.1", 8000)]).unwrap_err().kind(), "not-found");
}

#[test]
fn a_port_that_another_vm_has_is_a_conflict_with_its_name_also_through_every_address() {
    let mut slots = plain();
    slots.extend([vm(1, Some("10.77.0.6"), &[forward("0.0.0.0", 8050), forward("192.0.2.1", 8051)])]);
    for wanted in [forward("192.0.2.1", 8050), forward("0.0.0.0", 8051), forward("0.0.0.0", 8050)] {
        let Error::Conflict { holder, .. } = judged(&slots, &[wanted]).unwrap_err() else { panic!() };
        assert_eq!(holder, "VM vm1");
    }
    let udp = Forward { protocol: Protocol::Udp, ..forward("192.0.2.1", 8050) };
    judged(&slots, &[udp]).unwrap();
}
