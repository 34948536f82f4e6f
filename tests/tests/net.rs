//! Taps, published ports and listening sockets, each in networks of the test's own. Most guests are played by the test, frame by frame; one is real.

use diarch_ipc::Error;
use diarch_ipc::name::{CommandLine, Forward, IpText, Mac, MiB, NetworkName, NicIndex, Port, Protocol, Queues, Tenancy};
use diarch_ipc::operation::{Listen, OpenTap, Publish, Reply, Request, SlotState, Spawn, TapOpened, Withdraw};
use diarch_ipc::spec::{Backend, Boot, Egress, Nic, Presence, VmSpec};
use diarch_tests::host::{Host, Session, assert_same, descriptors};
use diarch_tests::need;
use diarch_tests::netns::{self, BROADCAST, Ear, Guest, IPV4, IPV6, World, ethernet, ip, run, udp};
use diarch_tests::stand_in::Unit;
use diarch_tests::stepper::{Outcome, kill_at_syscall};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(3);
/// What is to be dropped is dropped within microseconds; this is how long nothing may come.
const NEVER: Duration = Duration::from_millis(150);

/// The host's address towards the world, and the world's own.
const HERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const THERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

const GRANTS: &str = "[network.p2p]\nrouted = \"10.77.0.0/18\"\nmasquerade = true\n\
    [network.open]\nrouted = \"10.78.0.0/18\"\nmetadata = true\nhost = true\npeers = true\n\
    [network.lan]\nbridge = \"br0\"\n[network.trusted]\nbridge = \"br0\"\nhost = true\nmetadata = true\n[network.wire]\nbridge = \"wan\"\n\
    [ports]\npublish = [\"192.0.2.1:8000-8999\", \"0.0.0.0:9000-9099\"]\nlisten = [\"127.0.0.1:80-90\", \"[::]:80\"]\n";

/// A host with its supervisor in a network of its own: `wan` leads to the world, and `br0` is a bridge with the address 10.9.0.1/24.
fn host() -> (Host, World) {
    netns::enter();
    let world = World::joined("wan");
    ip("address add 192.0.2.1/24 dev wan");
    ip("link add br0 address 02:00:00:00:00:b0 type bridge");
    ip("address add 10.9.0.1/24 dev br0");
    ip("link set br0 up");
    world.inside(|| {
        ip("address add 192.0.2.2/24 dev far");
        // Who has no address of the host's behind masquerading is answered through it all the same.
        ip("route add default via 192.0.2.1");
    });
    ip(&format!("route add {METADATA}/32 via {THERE}"));
    let host = Host::builder().without_worker().grants(GRANTS).start();
    (host, world)
}

fn nic(number: u64) -> NicIndex {
    NicIndex::new(number).unwrap()
}

fn mac(number: u8) -> Mac {
    Mac::new(format!("52:54:00:00:00:{number:02x}")).unwrap()
}

fn text(address: impl ToString) -> IpText {
    IpText::try_from(address.to_string()).unwrap()
}

fn tap_request(tenancy: Tenancy, network: &str, number: u8) -> OpenTap {
    OpenTap { tenancy, nic: nic(0), network: NetworkName::new(network).unwrap(), mac: mac(number), address: None, queues: Queues::new(1).unwrap() }
}

fn ask_for(session: &Session, ask: OpenTap) -> Result<TapOpened, Error> {
    match session.ask(Request::TapOpen(ask), Vec::new())? {
        (Reply::TapOpen(opened), fds) if fds.is_empty() => Ok(opened),
        other => panic!("tap.open: {other:?}"),
    }
}

/// As the worker asks; and copies of the queues, which nobody but root can take from the supervisor.
fn open(host: &Host, session: &Session, ask: OpenTap) -> Result<(TapOpened, Vec<OwnedFd>), Error> {
    let queues = usize::from(ask.queues.get());
    let opened = ask_for(session, ask)?;
    let fds = netns::queues(host.supervisor_pid(), &opened.name);
    assert_eq!(fds.len(), queues, "{opened:?}");
    Ok((opened, fds))
}

/// A claimed slot with a tap, and the guest behind it; on a bridge it has this address.
fn guest(host: &Host, session: &Session, network: &str, number: u8, address: Option<Ipv4Addr>) -> (Tenancy, Guest) {
    let tenancy = session.claim(&format!("vm{number}")).tenancy;
    let (opened, mut fds) = open(host, session, OpenTap { address: address.map(text), ..tap_request(tenancy, network, number) }).unwrap();
    assert_eq!((opened.name, fds.len()), (format!("dvm{}n0", tenancy.slot), 1));
    let given = opened.address.map(|address| match address.0 {
        std::net::IpAddr::V4(v4) => v4,
        std::net::IpAddr::V6(_) => panic!("routed networks are IPv4"),
    });
    let address = given.or(address).unwrap_or(Ipv4Addr::new(10, 9, 0, number));
    (tenancy, Guest { tap: fds.remove(0), mac: [0x52, 0x54, 0, 0, 0, number], address })
}

fn forward(protocol: Protocol, host: Ipv4Addr, port: u64, guest: u64) -> Forward {
    Forward { protocol, host_address: text(host), host_port: Port::new(port).unwrap(), guest_port: Port::new(guest).unwrap() }
}

fn publish(session: &Session, tenancy: Tenancy, forwards: &[Forward]) -> Result<(), Error> {
    session.ask(Request::NetPublish(Publish { tenancy, nic: nic(0), forwards: forwards.to_vec() }), Vec::new()).map(drop)
}

fn eventually(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + 2 * SOON;
    while !done() {
        assert!(Instant::now() < until, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// All of the packet filter, without what counts.
fn ruleset() -> serde_json::Value {
    serde_json::from_str(&run("nft", &["-j", "list", "ruleset"])).unwrap()
}

fn tables() -> Vec<String> {
    run("nft", &["list", "tables"]).lines().map(str::to_owned).collect()
}

#[test]
fn a_routed_guest_reaches_its_gateway_and_the_world_and_nothing_else() {
    need!(Root, Network, Kernel(6, 5));
    let (host, world) = host();
    let before = host.inventory();
    let session = host.session();
    let (tenancy, guest) = guest(&host, &session, "p2p", 1, None);
    assert_eq!(guest.address, Ipv4Addr::new(10, 77, 0, 2 + 4 * u8::try_from(tenancy.slot.get()).unwrap()));
    let gateway = guest.resolve(GATEWAY, SOON).expect("the gateway answers");
    assert!(guest.ping(gateway, GATEWAY, SOON));

    // Out, under the host's address, and the answer comes back.
    let socket = world.inside(|| UdpSocket::bind((THERE, 7000)).unwrap());
    socket.set_read_timeout(Some(SOON)).unwrap();
    guest.udp(gateway, (THERE, 7000), b"hello, world");
    let mut buffer = [0; 100];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.ip()), (&b"hello, world"[..], HERE.into()), "masqueraded");
    socket.send_to(b"hello, guest", from).unwrap();
    assert!(guest.answer_arp_until(SOON, |frame| frame.ends_with(b"hello, guest")).is_some());

    // The host itself: no other address of its answers, and no port of any.
    let service = UdpSocket::bind("0.0.0.0:7001").unwrap();
    service.set_read_timeout(Some(NEVER)).unwrap();
    for target in [GATEWAY, HERE, Ipv4Addr::new(10, 9, 0, 1)] {
        guest.udp(gateway, (target, 7001), b"let me in");
        service.recv_from(&mut buffer).unwrap_err();
    }
    assert!(!guest.ping(gateway, HERE, NEVER), "only the gateway is pinged");

    // The cloud's metadata.
    let ear = world.ear();
    guest.udp(gateway, (METADATA, 80), b"credentials, please");
    assert!(!ear.hears(b"credentials, please", NEVER));

    // Nobody comes in from outside without a published port, the route known or not.
    let (to, gone) = (guest.address, world.inside(|| UdpSocket::bind((THERE, 0)).unwrap()));
    gone.send_to(b"unasked", (to, 80)).unwrap();
    assert!(guest.answer_arp_until(NEVER, |frame| frame.windows(7).any(|part| part == b"unasked")).is_none());

    session.release(tenancy);
    assert!(!ip("-o link").contains("dvm"), "released, while a descriptor is still open");
    assert_eq!(tables(), Vec::<String>::new());
    drop((guest, session));
    assert_same(&before, &host);
}

#[test]
fn a_guest_that_sends_under_another_address_is_not_heard() {
    need!(Root, Network, Kernel(6, 5));
    let (host, world) = host();
    let session = host.session();
    let (_, guest) = guest(&host, &session, "p2p", 1, None);
    let gateway = guest.resolve(GATEWAY, SOON).unwrap();
    let other = [0x52, 0x54, 0, 0, 0, 0x99];
    let neighbour = Ipv4Addr::new(10, 77, 0, 99);
    let heard = |what: &str| {
        // An answer to whoever was named: it comes out of this tap all the same.
        let answer = |frame: &[u8]| frame.get(12..14) == Some(&netns::ARP.to_be_bytes()) && frame.get(20..22) == Some(&[0, 2]);
        assert!(guest.receive(NEVER, answer).is_none(), "{what} was answered");
    };

    guest.ask_mac(other, other, guest.address, GATEWAY);
    heard("an ARP request from another MAC address");
    guest.ask_mac(guest.mac, other, guest.address, GATEWAY);
    heard("an ARP request that claims another MAC address");
    guest.ask_mac(guest.mac, guest.mac, neighbour, GATEWAY);
    heard("an ARP request from another IP address");

    let ear = world.ear();
    let send = |mark: &[u8], frame: Vec<u8>| {
        guest.send(&frame);
        assert!(!ear.hears(mark, NEVER), "{} passed", String::from_utf8_lossy(mark));
    };
    let from = |source: Ipv4Addr, mark: &[u8]| udp((source, 5000), (THERE, 7000), mark);
    send(b"other mac", ethernet(gateway, other, IPV4, &from(guest.address, b"other mac")));
    for source in [neighbour, GATEWAY, THERE, HERE, Ipv4Addr::UNSPECIFIED, Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST] {
        send(b"other ip", ethernet(gateway, guest.mac, IPV4, &from(source, b"other ip")));
    }
    // In a VLAN, twice in one, in a frame of another kind, in IPv6.
    let tagged = [&[0, 5, 8, 0][..], &from(guest.address, b"tagged one")].concat();
    send(b"tagged one", ethernet(gateway, guest.mac, 0x8100, &tagged));
    send(b"tagged two", ethernet(gateway, guest.mac, 0x88a8, &[&[0, 5, 0x81, 0, 0, 6, 8, 0][..], &from(guest.address, b"tagged two")].concat()));
    send(b"unknown kind", ethernet(gateway, guest.mac, 0x88b5, &from(guest.address, b"unknown kind")));
    let six = [&[0x60, 0, 0, 0, 0, 20, 59, 64][..], &[0xfe, 0x80], &[0; 13], &[1], &[0xff, 2], &[0; 13], &[1], b"an IPv6 packet's rest"].concat();
    send(b"an IPv6 packet's rest", ethernet(BROADCAST, guest.mac, IPV6, &six));
    // And as itself, it is heard: the ear is not deaf.
    guest.udp(gateway, (THERE, 7000), b"as itself");
    assert!(ear.hears(b"as itself", SOON));
}

#[test]
fn guests_reach_each_other_the_host_and_the_metadata_exactly_where_it_is_granted() {
    need!(Root, Network, Kernel(6, 5));
    let (host, world) = host();
    let session = host.session();
    let (_, closed) = guest(&host, &session, "p2p", 1, None);
    let (_, closed_too) = guest(&host, &session, "p2p", 2, None);
    let (_, open_one) = guest(&host, &session, "open", 3, None);
    let (_, open_two) = guest(&host, &session, "open", 4, None);
    let passes = |from: &Guest, gateway: Ipv4Addr, to: &Guest| {
        let gateway = from.resolve(gateway, SOON).unwrap();
        from.udp(gateway, (to.address, 80), b"between guests");
        to.answer_arp_until(NEVER, |frame| frame.windows(14).any(|part| part == b"between guests")).is_some()
    };
    let opens = Ipv4Addr::new(10, 78, 0, 1);
    assert!(!passes(&closed, GATEWAY, &closed_too));
    assert!(passes(&open_one, opens, &open_two));
    assert!(!passes(&open_one, opens, &closed) && !passes(&closed, GATEWAY, &open_one), "between two networks");

    let service = UdpSocket::bind((HERE, 7001)).unwrap();
    service.set_read_timeout(Some(SOON)).unwrap();
    let gateway = open_one.resolve(opens, SOON).unwrap();
    open_one.udp(gateway, (HERE, 7001), b"granted");
    assert_eq!(service.recv_from(&mut [0; 10]).unwrap().0, 7);
    let ear = world.ear();
    open_one.udp(gateway, (METADATA, 80), b"credentials");
    assert!(ear.hears(b"credentials", SOON));
    // Without masquerading it leaves under its own address.
    assert!(
        ear.hears(&[&open_one.address.octets()[..], &METADATA.octets()].concat(), NEVER) || {
            open_one.udp(gateway, (METADATA, 80), b"again");
            ear.hears(&[&open_one.address.octets()[..], &METADATA.octets()].concat(), SOON)
        }
    );
}

#[test]
fn a_bridged_guest_is_held_to_its_addresses_and_gives_none_to_others() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    let lan = World::joined("port");
    ip("link set port master br0");
    lan.inside(|| ip("address add 10.9.0.2/24 dev far"));
    let session = host.session();
    let (_, bound) = guest(&host, &session, "lan", 1, Some(Ipv4Addr::new(10, 9, 0, 11)));
    let (_, free) = guest(&host, &session, "lan", 2, None);
    let (_, trusted) = guest(&host, &session, "trusted", 3, Some(Ipv4Addr::new(10, 9, 0, 13)));
    assert!(ip("-o link show dvm0n0").contains("master br0"));

    // On the wire, as anybody.
    let far = bound.resolve(Ipv4Addr::new(10, 9, 0, 2), SOON).expect("the neighbour answers");
    let ear = lan.ear();
    let passes = |guest: &Guest, mark: &[u8], body: Vec<u8>| {
        guest.send(&ethernet(far, guest.mac, IPV4, &body));
        ear.hears(mark, if mark.starts_with(b"good") { SOON } else { NEVER })
    };
    let there = (Ipv4Addr::new(10, 9, 0, 2), 7000);
    assert!(passes(&bound, b"good one", udp((bound.address, 5000), there, b"good one")));
    assert!(passes(&free, b"good two", udp((Ipv4Addr::new(10, 9, 0, 77), 5000), there, b"good two")), "no address is known");
    assert!(!passes(&bound, b"spoofed", udp((Ipv4Addr::new(10, 9, 0, 2), 5000), there, b"spoofed")));
    for guest in [&bound, &free, &trusted] {
        assert!(!passes(guest, b"an offer", udp((guest.address, 67), (there.0, 68), b"an offer")), "a DHCP server");
        assert!(!{
            guest.send(&ethernet(far, [2, 0, 0, 0, 0, 0x77], IPV4, &udp((guest.address, 1), there, b"another mac")));
            ear.hears(b"another mac", NEVER)
        });
    }
    assert!(passes(&bound, b"good request", udp((Ipv4Addr::UNSPECIFIED, 68), (Ipv4Addr::BROADCAST, 67), b"good request")), "asking for an address");
    assert!(!passes(&bound, b"credentials", udp((bound.address, 5000), (METADATA, 80), b"credentials")));
    assert!(passes(&trusted, b"good credentials", udp((trusted.address, 5000), (METADATA, 80), b"good credentials")));

    // A router advertisement: ICMPv6 134, from a link-local address, to all nodes.
    let six = |from: u8, body: &[u8]| {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&[0x60, 0, 0, 0, length[0], length[1], 58, 255, 0xfe, 0x80][..], &[0; 13], &[from], &[0xff, 2], &[0; 13], &[1], body].concat()
    };
    for (kind, mark) in [(134u8, &b"router of its own"[..]), (137, b"redirected by it!")] {
        free.send(&ethernet(BROADCAST, free.mac, IPV6, &six(7, &[&[kind, 0, 0, 0, 64, 0, 7, 8][..], mark].concat())));
        assert!(!ear.hears(mark, NEVER), "ICMPv6 {kind}");
    }
    free.send(&ethernet(BROADCAST, free.mac, IPV6, &six(7, &[&[128, 0, 0, 0, 0, 0, 0, 0][..], b"an echo request"].concat())));
    assert!(ear.hears(b"an echo request", SOON));
    bound.send(&ethernet(BROADCAST, bound.mac, IPV6, &six(7, &[&[128, 0, 0, 0, 0, 0, 0, 0][..], b"without address"].concat())));
    assert!(!ear.hears(b"without address", NEVER), "its IPv6 address is not known, so there is none");

    // The host behind the bridge: a ping for all, its ports for those that may.
    let own = Ipv4Addr::new(10, 9, 0, 1);
    let service = UdpSocket::bind((own, 7001)).unwrap();
    let mut buffer = [0; 20];
    for (guest, may) in [(&bound, false), (&free, false), (&trusted, true)] {
        let bridge = guest.resolve(own, SOON).expect("the bridge has an address");
        assert!(guest.ping(bridge, own, SOON));
        guest.udp(bridge, (own, 7001), b"let me in");
        service.set_read_timeout(Some(if may { SOON } else { NEVER })).unwrap();
        assert_eq!(service.recv_from(&mut buffer).is_ok(), may);
    }
}

#[test]
fn an_ipv6_guest_has_its_address_and_the_one_its_mac_gives_and_no_other() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    let lan = World::joined("port");
    ip("link set port master br0");
    let session = host.session();
    let tenancy = session.claim("six").tenancy;
    let (_, mut fds) = open(&host, &session, OpenTap { address: Some(text("2001:db8::7")), ..tap_request(tenancy, "lan", 1) }).unwrap();
    let guest = Guest { tap: fds.remove(0), mac: [0x52, 0x54, 0, 0, 0, 1], address: Ipv4Addr::new(10, 9, 0, 11) };
    let ear = lan.ear();
    let sent = |from: std::net::Ipv6Addr, body: &[u8], mark: &[u8]| {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        let to: std::net::Ipv6Addr = "ff02::1".parse().unwrap();
        let whole = [&[0x60, 0, 0, 0, length[0], length[1], 58, 255][..], &from.octets(), &to.octets(), body].concat();
        guest.send(&ethernet(BROADCAST, guest.mac, IPV6, &whole));
        ear.hears(mark, NEVER)
    };
    let echo = |mark: &[u8]| [&[128, 0, 0, 0, 0, 0, 0, 0][..], mark].concat();
    let advert = |target: &str, mark: &[u8]| [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target.parse::<std::net::Ipv6Addr>().unwrap().octets(), mark].concat();
    let (own, local) = ("2001:db8::7".parse().unwrap(), "fe80::5054:ff:fe00:1".parse().unwrap());
    assert!(sent(own, &echo(b"own address"), b"own address") && sent(local, &echo(b"own link-local"), b"own link-local"));
    for other in ["2001:db8::8", "fe80::1", "::"] {
        assert!(!sent(other.parse().unwrap(), &echo(b"not its own"), b"not its own"), "{other}");
    }
    assert!(sent(local, &advert("2001:db8::7", b"I have seven"), b"I have seven") && sent(own, &advert("fe80::5054:ff:fe00:1", b"and local"), b"and local"));
    assert!(!sent(own, &advert("2001:db8::1", b"I am the router"), b"I am the router"), "another's address advertised");
    guest.send(&ethernet(BROADCAST, guest.mac, IPV4, &udp((guest.address, 1), (Ipv4Addr::BROADCAST, 9), b"in version four")));
    assert!(!ear.hears(b"in version four", NEVER), "its IPv4 address is not known, so there is none");
}

#[test]
fn a_published_port_leads_to_its_guest_from_outside_and_from_the_host_until_it_is_withdrawn() {
    need!(Root, Network, Kernel(6, 5));
    let (host, world) = host();
    let session = host.session();
    let (tenancy, guest) = guest(&host, &session, "p2p", 1, None);
    let (rival, _rivals) = self::guest(&host, &session, "p2p", 2, None);
    let udp_port = forward(Protocol::Udp, HERE, 8053, 53);
    publish(&session, tenancy, &[udp_port, forward(Protocol::Udp, Ipv4Addr::UNSPECIFIED, 9000, 90)]).unwrap();

    let gateway = guest.resolve(GATEWAY, SOON).unwrap();
    let asked = |socket: &UdpSocket, to: (Ipv4Addr, u16), mark: &'static [u8]| {
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.send_to(mark, to).unwrap();
        let frame = guest.answer_arp_until(NEVER, |frame| frame.windows(mark.len()).any(|part| part == mark))?;
        // Back the way it came; who asked sees the address that it asked.
        let (source, port) = (Ipv4Addr::from_octets(frame[26..30].try_into().unwrap()), u16::from_be_bytes([frame[34], frame[35]]));
        let own = u16::from_be_bytes([frame[36], frame[37]]);
        guest.send(&ethernet(gateway, guest.mac, IPV4, &udp((guest.address, own), (source, port), b"an answer")));
        let from = socket.recv_from(&mut [0; 20]).unwrap().1;
        assert_eq!(from, SocketAddr::from(to));
        Some(own)
    };
    let outside = world.inside(|| UdpSocket::bind((THERE, 0)).unwrap());
    let inside = UdpSocket::bind("0.0.0.0:0").unwrap();
    assert_eq!(asked(&outside, (HERE, 8053), b"from outside"), Some(53));
    assert_eq!(asked(&outside, (HERE, 9000), b"to any address"), Some(90));
    assert_eq!(asked(&inside, (HERE, 8053), b"from the host"), Some(53));
    assert_eq!(asked(&inside, (Ipv4Addr::new(10, 9, 0, 1), 9000), b"to the bridge's"), Some(90));
    assert_eq!(asked(&outside, (HERE, 8054), b"another port"), None);

    // Whose it is, is said.
    let error = publish(&session, rival, &[forward(Protocol::Udp, HERE, 8053, 53)]).unwrap_err();
    assert!(matches!(&error, Error::Conflict { holder, .. } if holder == "VM vm1"), "{error}");
    let denied = publish(&session, tenancy, &[forward(Protocol::Tcp, HERE, 22, 22)]).unwrap_err();
    assert!(matches!(&denied, Error::Denied { grant, .. } if grant == "ports.publish"), "{denied}");

    // The set is replaced, and taken away.
    publish(&session, tenancy, &[forward(Protocol::Udp, HERE, 8055, 55)]).unwrap();
    let again = world.inside(|| UdpSocket::bind((THERE, 0)).unwrap());
    assert_eq!(asked(&again, (HERE, 8053), b"the old port"), None);
    assert_eq!(asked(&again, (HERE, 8055), b"the new port"), Some(55));
    let withdrawn = |existed| {
        let answer = session.ask(Request::NetWithdraw(Withdraw { tenancy }), Vec::new()).unwrap().0;
        assert!(matches!(&answer, Reply::NetWithdraw(withdrawn) if withdrawn.existed == existed), "{answer:?}");
    };
    withdrawn(true);
    withdrawn(false);
    let third = world.inside(|| UdpSocket::bind((THERE, 0)).unwrap());
    assert_eq!(asked(&third, (HERE, 8055), b"withdrawn"), None);
    publish(&session, rival, &[forward(Protocol::Udp, HERE, 8053, 53)]).unwrap();
}

#[test]
fn a_guest_whose_tap_is_gone_is_not_looked_for_elsewhere() {
    need!(Root, Network, Kernel(6, 5));
    let (host, world) = host();
    ip("route add default via 192.0.2.2");
    let session = host.session();
    let (tenancy, guest) = guest(&host, &session, "p2p", 1, None);
    let (_, _other) = self::guest(&host, &session, "p2p", 2, None);
    publish(&session, tenancy, &[forward(Protocol::Udp, HERE, 8053, 53)]).unwrap();
    ip("link del dvm0n0");
    drop(guest);
    let ear = world.ear();
    for socket in [world.inside(|| UdpSocket::bind((THERE, 0)).unwrap()), UdpSocket::bind("0.0.0.0:0").unwrap()] {
        let _ = socket.send_to(b"for the guest", (HERE, 8053));
    }
    // The world hears itself ask, and does not get it back.
    let to_guest = |ear: &Ear| ear.hears(&Ipv4Addr::new(10, 77, 0, 2).octets(), NEVER);
    assert!(!to_guest(&ear));
}

#[test]
fn two_hundred_taps_come_and_go_and_leave_nothing() {
    need!(Root, Network, Kernel(6, 5));
    netns::enter();
    let mut builder = Host::builder().without_worker().grants(GRANTS);
    builder.vms_max = 256;
    let host = builder.start();
    let before = (host.inventory(), ip("-o link"), ip("route"), ruleset());
    let session = host.session();
    let started = Instant::now();
    let mut held = Vec::new();
    for number in 0..200u8 {
        held.push(guest(&host, &session, "p2p", number, None));
    }
    eprintln!("200 taps opened in {:?}", started.elapsed());
    assert_eq!(ip("-o link").lines().filter(|line| line.contains("dvm")).count(), 200);
    assert_eq!(descriptors(host.supervisor_pid()).get("/dev/net/tun"), Some(&200));
    // One of many still has its own rules.
    let (_, last) = held.last().unwrap();
    assert!(last.resolve(GATEWAY, SOON).is_some());
    // Half of them go by their release, half by somebody's hand.
    for (number, (tenancy, guest)) in held.into_iter().enumerate() {
        drop(guest);
        if number % 2 == 0 {
            ip(&format!("link del dvm{}n0", tenancy.slot));
        }
        session.release(tenancy);
    }
    eprintln!("and released, {:?} in all", started.elapsed());
    drop(session);
    assert_same(&before.0, &host);
    assert_eq!((before.1, before.2, before.3), (ip("-o link"), ip("route"), ruleset()));
}

#[test]
fn somebody_elses_tables_are_byte_for_byte_as_they_were() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    // Of the names that ours have, too.
    let theirs = [
        "table inet filter {\nchain forward {\ntype filter hook forward priority 10; policy accept;\nct state invalid drop\n}",
        "set diarch {\ntype ipv4_addr\nelements = { 192.0.2.9 }\n}\n}",
        "table ip nat {\nchain pre {\ntype nat hook prerouting priority -90\ntcp dport 4711 redirect to :80\n}\n}",
        "table ip diarch {\nchain mine {\ndrop\n}\n}",
        "table netdev edge {\nchain wan {\ntype filter hook ingress device \"wan\" priority 0; policy accept;\n}\n}\n",
    ]
    .join("\n");
    let file = host.path("files/theirs.nft");
    std::fs::write(&file, theirs).unwrap();
    run("nft", &["-f", file.to_str().unwrap()]);
    let whole = || run("nft", &["-j", "list", "ruleset"]);
    let each = || {
        ["inet filter", "ip nat", "ip diarch", "netdev edge"]
            .map(|table| run("nft", &[&["-j", "list", "table"], &table.split(' ').collect::<Vec<_>>()[..]].concat()))
    };
    let before = (whole(), each());
    assert!(before.0.contains("mine") && before.0.contains("192.0.2.9"));
    let session = host.session();
    let (tenancy, guest) = guest(&host, &session, "p2p", 1, None);
    publish(&session, tenancy, &[forward(Protocol::Tcp, HERE, 8080, 80)]).unwrap();
    assert!(tables().contains(&"table netdev diarch".into()) && tables().contains(&"table inet diarch".into()));
    assert_eq!(each(), before.1);
    session.release(tenancy);
    drop(guest);
    assert_eq!((whole(), each()), before);
}

#[test]
fn an_interface_of_the_taps_name_that_is_somebody_elses_is_not_touched() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    let session = host.session();
    let before = host.ledger();
    let tenancy = session.claim("a").tenancy;
    for kind in ["link add dvm0n0 type bridge", "tuntap add dvm0n0 mode tap"] {
        ip(kind);
        let link = ip("-d -o link show dvm0n0");
        let error = open(&host, &session, tap_request(tenancy, "lan", 1)).unwrap_err();
        assert!(matches!(&error, Error::Conflict { holder, .. } if holder == "the interface dvm0n0"), "{error}");
        assert_eq!(ip("-d -o link show dvm0n0"), link);
        ip("link del dvm0n0");
    }
    // Nothing of it is in the ledger, and with the name free it works.
    assert!(host.ledger()["0"]["resources"]["taps"].as_array().unwrap().is_empty());
    drop(open(&host, &session, tap_request(tenancy, "lan", 1)).unwrap());
    session.release(tenancy);
    assert_eq!(host.ledger(), before);
    let tenancy = session.claim("b").tenancy;
    let error = open(&host, &session, tap_request(tenancy, "wire", 1)).unwrap_err();
    assert!(matches!(&error, Error::Denied { grant, .. } if grant == "network.wire.bridge"), "{error}");
}

#[test]
fn asked_again_a_tap_is_made_anew_and_the_old_descriptor_is_dead() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    let session = host.session();
    let (tenancy, old) = guest(&host, &session, "p2p", 1, None);
    let (_, mut fds) = open(&host, &session, tap_request(tenancy, "p2p", 1)).unwrap();
    let new = Guest { tap: fds.remove(0), ..old };
    assert!(new.resolve(GATEWAY, SOON).is_some());
    // Made persistent by whoever holds it, it goes with the slot all the same.
    netns::persist(&new.tap).unwrap();
    drop(new);
    assert!(ip("-o link").contains("dvm0n0"));
    session.release(tenancy);
    assert!(!ip("-o link").contains("dvm0n0"));
}

/// Starts the VM with its tap.
fn start(host: &Host, session: &Session, tenancy: Tenancy, number: u8, queues: u64, words: &str) -> Result<i32, Error> {
    let (mut spec, fds) = host.spec(words);
    spec.nics = vec![Nic { mac: mac(number), backend: Backend::Tap { queues: Queues::new(queues).unwrap() } }];
    match session.ask(Request::VmSpawn(Spawn { tenancy, spec }), fds)? {
        (Reply::VmSpawn(spawned), _) => Ok(spawned.pid.cast_signed()),
        other => panic!("vm.spawn: {other:?}"),
    }
}

fn end(pid: i32) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL).unwrap();
}

#[test]
fn nobody_but_its_qemu_gets_a_taps_queues_and_the_tap_is_as_long_as_that() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    let before = host.inventory();
    let session = host.session();
    let tenancy = session.claim("web").tenancy;
    let two = || OpenTap { queues: Queues::new(2).unwrap(), ..tap_request(tenancy, "lan", 1) };
    // `ask_for` sees that no descriptor comes with the answer.
    ask_for(&session, two()).unwrap();
    let held = |pid: i32| netns::queues(pid, "dvm0n0").len();
    assert_eq!(held(host.supervisor_pid()), 2);
    for (number, queues, word) in [(2, 2, "its tap was opened for"), (1, 1, "its tap was opened with 2")] {
        let error = start(&host, &session, tenancy, number, queues, "").unwrap_err();
        assert!(matches!(&error, Error::Invalid { .. }) && error.to_string().contains(word), "{word}: {error}");
    }
    assert_eq!(held(host.supervisor_pid()), 2, "a refused start takes nothing");
    // A tap of another card, with a start that does not have it, is not left behind.
    ask_for(&session, OpenTap { nic: nic(1), ..tap_request(tenancy, "lan", 7) }).unwrap();
    assert!(ip("-o link").contains("dvm0n1"));
    let qemu = start(&host, &session, tenancy, 1, 2, "").unwrap();
    assert_eq!((held(qemu), held(host.supervisor_pid())), (2, 0));
    assert!(ip("-o link show dvm0n0").contains("master br0"));
    assert!(!ip("-o link").contains("dvm0n1"));
    end(qemu);
    eventually("the tap is gone with its QEMU", || !ip("-o link").contains("dvm0n0"));
    eventually("its end is known", || session.record(tenancy).is_some_and(|record| record.state == SlotState::Exited));
    // Another start of the VM makes it anew, as it was; and with one that comes to nothing it is gone.
    let error = start(&host, &session, tenancy, 1, 2, "stub.exit=0").map(end).err();
    eventually("and goes again", || !ip("-o link").contains("dvm0n0") && session.record(tenancy).is_some_and(|record| record.pid.is_none()));
    let qemu = start(&host, &session, tenancy, 1, 2, "").unwrap_or_else(|late| panic!("{error:?}, {late}"));
    assert_eq!((held(qemu), held(host.supervisor_pid())), (2, 0));
    session.release(tenancy);
    drop(session);
    assert_same(&before, &host);
}

#[test]
fn a_tap_that_is_gone_or_was_changed_before_its_start_is_made_anew_as_it_was() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    let before = host.inventory();
    let session = host.session();
    let tenancy = session.claim("web").tenancy;
    for what in ["the supervisor died", "removed", "taken from its bridge", "another bridge of that name", "nothing"] {
        let opened = ask_for(&session, tap_request(tenancy, "lan", 1)).unwrap();
        let index = || ip("-o link show dvm0n0").split(':').next().unwrap_or_default().to_owned();
        let first = index();
        match what {
            "the supervisor died" => {
                host.manager().kill_and_wait(Unit::Supervisor);
                assert!(!ip("-o link").contains("dvm0n0"), "the kernel takes it back");
            }
            "removed" => drop(ip("link del dvm0n0")),
            "taken from its bridge" => drop(ip("link set dvm0n0 nomaster")),
            "another bridge of that name" => {
                ip("link del br0");
                ip("link add br0 type bridge");
            }
            _ => {}
        }
        let qemu = start(&host, &session, tenancy, 1, 1, "").unwrap_or_else(|error| panic!("{what}: {error}"));
        let link = ip("-d -o link show dvm0n0");
        assert!(link.contains("master br0") && link.contains(",UP") && link.contains("user root"), "{what}: {link}");
        assert_eq!(index() == first, what == "nothing", "{what}: {first} {link}");
        assert!(ruleset().to_string().contains("52:54:00:00:00:01"), "{what}: {opened:?}");
        assert_eq!((netns::queues(qemu, "dvm0n0").len(), netns::queues(host.supervisor_pid(), "dvm0n0").len()), (1, 0), "{what}");
        end(qemu);
        eventually("its end is known", || session.record(tenancy).is_some_and(|record| record.state == SlotState::Exited));
    }
    // A network without its bridge: no start, and nothing of one.
    ip("link del br0");
    let error = start(&host, &session, tenancy, 1, 1, "").unwrap_err();
    assert!(matches!(&error, Error::Unsupported { missing } if missing.contains("br0")), "{error}");
    assert!(host.qemus().is_empty() && host.ledger()["0"]["state"] == "exited");
    session.release(tenancy);
    drop(session);
    assert_same(&before, &host);
}

#[test]
fn a_start_with_a_tap_killed_at_every_step_starts_one_qemu_that_has_it() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    let first = 1 + u64::from(std::process::id() % 13);
    let mut killed = 0;
    for step in (first..).step_by(13) {
        let session = host.session();
        let tenancy = session.claim("step").tenancy;
        ask_for(&session, tap_request(tenancy, "p2p", 9)).unwrap();
        let (outcome, answer) = kill_at_syscall(host.supervisor_pid(), step, || start(&host, &session, tenancy, 9, 1, "")).unwrap();
        let qemu = answer.unwrap_or_else(|error| panic!("step {step} ({outcome:?}): {error}"));
        host.manager().wait_ready(Unit::Supervisor, 0, SOON);
        assert_eq!(host.qemus(), [qemu], "step {step} ({outcome:?})");
        assert_eq!((netns::queues(qemu, "dvm0n0").len(), netns::queues(host.supervisor_pid(), "dvm0n0").len()), (1, 0), "step {step} ({outcome:?})");
        assert!(ip("route").contains("10.77.0.2 dev dvm0n0") && ruleset().to_string().contains("52:54:00:00:00:09"), "step {step} ({outcome:?})");
        host.session().release(tenancy);
        assert!(!ip("-o link").contains("dvm") && tables().is_empty() && host.ledger().is_empty(), "step {step} ({outcome:?})");
        match outcome {
            Outcome::Killed { .. } => killed += 1,
            Outcome::Survived { .. } => break,
            Outcome::Ended { .. } => panic!("it ended by itself"),
        }
    }
    assert!(killed > 10, "{killed}");
}

#[test]
fn rules_that_a_killed_nft_left_at_a_release_are_made_right_without_another_change() {
    need!(Root, Network, Kernel(6, 5));
    netns::enter();
    let place = tempfile::Builder::new().prefix("diarch-nft-").tempdir_in("/usr/local").unwrap();
    std::fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let nft = place.path().join("nft");
    std::fs::copy(diarch_tests::host::binary("diarch-mortal-nft"), &nft).unwrap();
    let dies = |times: u32| std::fs::write(place.path().join("deaths"), times.to_string()).unwrap();
    let left = || std::fs::read_to_string(place.path().join("deaths")).unwrap();
    let host = Host::builder().without_worker().grants(GRANTS).grants(&format!("[nft]\npath = {nft:?}\n")).start();
    let session = host.session();
    dies(0);
    let (_, stays) = guest(&host, &session, "p2p", 1, None);
    let named = || ruleset().to_string().contains("dvm1n0");

    // Killed once: the release itself asks again.
    let (once, _once) = guest(&host, &session, "p2p", 2, None);
    dies(1);
    session.release(once);
    assert_eq!((left().as_str(), named()), ("0", false));

    // Killed each time that the release asks, and once more: nobody changes anything, and it is made right.
    let (again, _again) = guest(&host, &session, "p2p", 3, None);
    dies(3);
    let started = Instant::now();
    assert!(session.release(again).existed);
    assert!(started.elapsed() < Duration::from_secs(2), "the VM's end waits for no rules");
    assert_eq!((left().as_str(), named()), ("1", true), "what this test is about");
    eventually("the rules are right again", || !named());
    assert_eq!(left(), "0");
    assert!(stays.resolve(GATEWAY, SOON).is_some(), "and nobody else's are lost");
    let audit = || std::fs::read_to_string(host.path("audit/audit.jsonl")).unwrap();
    assert!(audit().contains("its rules could not be removed"), "{}", audit());
    eventually("the audit tells it", || audit().contains("says again what the ledger says"));
}

#[test]
fn a_tap_with_several_queues_has_a_descriptor_for_each_and_room_for_no_stranger() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    let session = host.session();
    let tenancy = session.claim("many").tenancy;
    let (opened, fds) = open(&host, &session, OpenTap { queues: Queues::new(4).unwrap(), ..tap_request(tenancy, "p2p", 1) }).unwrap();
    assert_eq!(fds.len(), 4);
    let link = ip("-d -o link show dvm0n0");
    assert!(link.contains("multi_queue numqueues 4") && link.contains("user root"), "{opened:?} {link}");
    // /dev/net/tun is open to everybody, and a tap without an owner to whoever knows its name.
    let tun = netns::open_tun();
    let stranger = diarch_tests::wire::as_user(diarch_tests::host::STRANGER, || netns::attach_tap(&tun, "dvm0n0", nix::libc::IFF_MULTI_QUEUE));
    assert!(stranger.is_err(), "a stranger got a queue");
}

#[test]
fn without_forwarding_or_nft_no_tap_comes_up_and_the_sentence_says_what_to_do() {
    need!(Root, Network, Kernel(6, 5));
    netns::enter();
    let host = Host::builder().without_worker().grants(GRANTS).grants("[nft]\npath = \"/usr/sbin/there-is-no-nft\"\n").start();
    ip("link add br0 type bridge");
    let session = host.session();
    let tenancy = session.claim("a").tenancy;
    let before = host.inventory();
    let Error::Unsupported { missing } = open(&host, &session, tap_request(tenancy, "lan", 1)).unwrap_err() else { panic!() };
    assert!(missing.contains("apt install nftables") && missing.contains("there-is-no-nft"), "{missing}");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
    let Error::Unsupported { missing } = open(&host, &session, tap_request(tenancy, "p2p", 1)).unwrap_err() else { panic!() };
    assert!(missing.contains("net.ipv4.ip_forward=1"), "{missing}");
    assert!(!ip("-o link").contains("dvm"));
    assert!(host.ledger()["0"]["resources"]["taps"].as_array().unwrap().is_empty());
    assert_same(&before, &host);
}

#[test]
fn what_nft_refuses_leaves_ledger_and_rules_as_they_were() {
    need!(Root, Network, Kernel(6, 5));
    netns::enter();
    // It is executed from a descriptor, so it is a program and no script: a copy of the real one, and in its place one that always fails.
    let place = tempfile::Builder::new().prefix("diarch-nft-").tempdir_in("/usr/local").unwrap();
    std::fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let nft = place.path().join("nft");
    let put = |program: &str| {
        std::fs::copy(program, place.path().join("new")).unwrap();
        std::fs::rename(place.path().join("new"), &nft).unwrap();
    };
    put("/usr/sbin/nft");
    let host = Host::builder().without_worker().grants(GRANTS).grants(&format!("[nft]\npath = {nft:?}\n")).start();
    ip("link add br0 type bridge");
    let session = host.session();
    let (tenancy, guest) = guest(&host, &session, "p2p", 1, None);
    publish(&session, tenancy, &[forward(Protocol::Tcp, HERE, 8080, 80)]).unwrap();
    let before = (host.ledger(), ruleset());
    put("/bin/false");
    let error = publish(&session, tenancy, &[forward(Protocol::Tcp, HERE, 8081, 80)]).unwrap_err();
    assert!(matches!(&error, Error::Failed { step, detail, .. } if step == "nft" && detail.contains("exit status: 1")), "{error:?}");
    let other = session.claim("other").tenancy;
    open(&host, &session, tap_request(other, "p2p", 2)).unwrap_err();
    assert_eq!(ip("-o link").lines().filter(|line| line.contains("dvm")).count(), 1);
    session.release(other);
    assert_eq!((host.ledger(), ruleset()), before);
    // A release goes on, and what is left is put right when nft is.
    session.release(tenancy);
    assert!(host.ledger().is_empty());
    put("/usr/sbin/nft");
    host.manager().kill_and_wait(Unit::Supervisor);
    assert_eq!(tables(), Vec::<String>::new());
    drop(guest);
}

#[test]
fn a_supervisor_killed_at_every_step_leaves_rules_that_its_successor_makes_equal_to_the_ledger() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    let session = host.session();
    let (keeper, _keeper) = guest(&host, &session, "p2p", 1, None);
    publish(&session, keeper, &[forward(Protocol::Tcp, HERE, 8001, 80)]).unwrap();
    drop(session);
    // Not each of some hundreds: every third, from another beginning each time, meets all kinds of them.
    let first = 1 + u64::from(std::process::id() % 3);
    let mut killed = 0;
    for step in (first..).step_by(3) {
        let session = host.session();
        let port = if step % 2 == 0 { 8001 } else { 8002 };
        let pid = host.supervisor_pid();
        let (outcome, answer) = kill_at_syscall(pid, step, || publish(&session, keeper, &[forward(Protocol::Tcp, HERE, port, 80)])).unwrap();
        answer.unwrap_or_else(|error| panic!("step {step} ({outcome:?}): {error}"));
        host.manager().wait_ready(Unit::Supervisor, 0, SOON);
        let ledger = host.ledger()["0"]["resources"]["published"][0]["forwards"][0]["host_port"].as_u64().unwrap();
        let rules = ruleset().to_string();
        assert_eq!(ledger, port, "step {step}");
        for (there, number) in [(ledger == 8001, 8001), (ledger == 8002, 8002)] {
            assert_eq!(rules.contains(&format!(",{number}]")), there, "step {step} ({outcome:?}): {rules}");
        }
        match outcome {
            Outcome::Killed { .. } => killed += 1,
            Outcome::Survived { .. } => break,
            Outcome::Ended { .. } => panic!("it ended by itself"),
        }
    }
    assert!(killed > 10, "{killed}");
    // And between the ledger and the tap: what is not there has no rules.
    for step in (first..).step_by(7) {
        let session = host.session();
        let tenancy = session.claim("half").tenancy;
        let (outcome, answer) = kill_at_syscall(host.supervisor_pid(), step, || ask_for(&session, tap_request(tenancy, "p2p", 9))).unwrap();
        let opened = answer.unwrap_or_else(|error| panic!("step {step} ({outcome:?}): {error}"));
        host.manager().wait_ready(Unit::Supervisor, 0, SOON);
        // It died before its answer, and its successor made the tap; or after, and took the tap with it. Nobody else has it.
        let held = netns::queues(host.supervisor_pid(), "dvm1n0");
        assert_eq!(ip("-o link").contains("dvm1n0"), held.len() == 1, "step {step} ({outcome:?})");
        let fds = if held.is_empty() { open(&host, &session, tap_request(tenancy, "p2p", 9)).unwrap().1 } else { held };
        let guest = Guest { tap: fds.into_iter().next().unwrap(), mac: [0x52, 0x54, 0, 0, 0, 9], address: Ipv4Addr::new(10, 77, 0, 6) };
        assert!(guest.resolve(GATEWAY, SOON).is_some(), "step {step}: {opened:?}");
        session.release(tenancy);
        assert_eq!(ip("-o link").lines().filter(|line| line.contains("dvm")).count(), 1, "step {step} ({outcome:?})");
        assert!(!ruleset().to_string().contains("dvm1n0"), "step {step}");
        if matches!(outcome, Outcome::Survived { .. }) {
            break;
        }
    }
}

#[test]
fn a_privileged_port_is_bound_for_the_worker_exactly_as_granted() {
    need!(Root, Network, Kernel(6, 5));
    let (host, _world) = host();
    let session = host.session();
    let before = host.inventory();
    let listen = |protocol, address: &str, port| {
        let ask = Listen { protocol, address: text(address), port: Port::new(port).unwrap() };
        session.ask(Request::PortListen(ask), Vec::new()).map(|(_, mut fds)| fds.remove(0))
    };
    let listener = TcpListener::from(listen(Protocol::Tcp, "127.0.0.1", 80).unwrap());
    listener.set_nonblocking(false).unwrap();
    let mut client = TcpStream::connect("127.0.0.1:80").unwrap();
    client.write_all(b"hello").unwrap();
    let mut heard = [0; 5];
    listener.accept().unwrap().0.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello");
    let error = listen(Protocol::Tcp, "127.0.0.1", 80).unwrap_err();
    assert_eq!(error.kind(), "conflict", "{error}");
    let udp = UdpSocket::from(listen(Protocol::Udp, "127.0.0.1", 80).unwrap());
    udp.set_nonblocking(false).unwrap();
    UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"hello", "127.0.0.1:80").unwrap();
    assert_eq!(udp.recv(&mut heard).unwrap(), 5);
    // [::] is IPv6 alone.
    let six = TcpListener::from(listen(Protocol::Tcp, "::", 80).unwrap());
    assert_eq!(six.local_addr().unwrap().port(), 80);
    drop(TcpListener::bind("10.9.0.1:80").unwrap());
    for (address, port) in [("127.0.0.1", 91), ("0.0.0.0", 80), ("127.0.0.2", 80), ("::1", 80)] {
        let error = listen(Protocol::Tcp, address, port).unwrap_err();
        assert!(matches!(&error, Error::Denied { grant, .. } if grant == "ports.listen"), "{error}");
    }
    drop((listener, udp, six));
    assert_same(&before, &host);
}

#[test]
fn a_real_guest_serves_through_its_tap_and_its_published_port() {
    need!(Root, Qemu, Guest, Kernel(6, 5));
    netns::enter();
    let world = World::joined("wan");
    ip("address add 192.0.2.1/24 dev wan");
    world.inside(|| ip("address add 192.0.2.2/24 dev far"));
    let host = Host::builder().without_worker().real_qemu().grants(GRANTS).start();
    let session = host.session();
    let tenancy = session.claim("web").tenancy;
    let opened = ask_for(&session, OpenTap { queues: Queues::new(2).unwrap(), ..tap_request(tenancy, "p2p", 1) }).unwrap();
    let (address, gateway) = (opened.address.unwrap(), opened.gateway.unwrap());
    let (plain, mut fds) = host.spec("");
    fds.truncate(2);
    let files = need::guest().unwrap();
    for name in ["vmlinuz", "initrd.img"] {
        fds.push(std::fs::File::open(files.join(name)).unwrap().into());
    }
    let command_line = CommandLine::new(format!("console=ttyS0 quiet panic=-1 diarch.net={address}/18,{gateway}")).unwrap();
    let spec = VmSpec {
        memory: MiB::new(256).unwrap(),
        boot: Boot::Kernel { command_line, initrd: Presence::Given, firmware: Presence::Absent },
        nics: vec![
            Nic { mac: mac(1), backend: Backend::Tap { queues: Queues::new(2).unwrap() } },
            Nic { mac: mac(2), backend: Backend::User { egress: Egress::Closed, forwards: Vec::new() } },
        ],
        ..plain
    };
    session.ask(Request::VmSpawn(Spawn { tenancy, spec }), fds).unwrap();
    publish(&session, tenancy, &[forward(Protocol::Tcp, HERE, 8080, 80)]).unwrap();
    let get = |to: SocketAddr| -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_millis(500))?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let until = Instant::now() + Duration::from_secs(120);
    let direct = SocketAddr::new(address.0, 80);
    while !get(direct).is_ok_and(|answer| answer.contains("200")) {
        assert!(Instant::now() < until, "console: {}", std::fs::read_to_string(host.path("log/test-console.log")).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(200));
    }
    let outside = world.inside(move || get((HERE, 8080).into()));
    assert!(outside.as_ref().is_ok_and(|answer| answer.contains("200")), "{outside:?}");
    // A new supervisor knows it all, and it goes on meanwhile.
    host.manager().kill_and_wait(Unit::Supervisor);
    let outside = world.inside(move || get((HERE, 8080).into()));
    assert!(outside.as_ref().is_ok_and(|answer| answer.contains("200")), "{outside:?}");
    // The tap is the guest's, and goes with it.
    assert!(netns::queues(host.supervisor_pid(), "dvm0n0").is_empty());
    let pid = session.record(tenancy).and_then(|record| record.pid).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid.cast_signed()).unwrap(), rustix::process::Signal::KILL).unwrap();
    eventually("the tap is gone with its QEMU", || !ip("-o link").contains("dvm"));
    session.release(tenancy);
    assert!(!ip("-o link").contains("dvm") && tables().is_empty());
}
