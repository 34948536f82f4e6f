//! `tap_open`: a tap with its rules, address and route, asked of the supervisor, against the same device made and the same rules set by this program: one
//! `open`, two `ioctl`s, one `nft`. `nft_publish_N`: one port published while N are, against `nft` setting the same two tables.

use crate::{line, median, milliseconds};
use diarch_ipc::name::{Forward, IpText, Mac, NetworkName, NicIndex, Port, Protocol, Queues, Tenancy};
use diarch_ipc::operation::{OpenTap, Publish, Request};
use diarch_tests::host::{Host, Session};
use diarch_tests::netns::{self, create_tap, ip, run as program};
use std::process::{Command, Stdio};
use std::time::Instant;

const RUNS: usize = 25;
const FORWARDS: u64 = 500;
/// Forwards of one card at most (`MAX_FORWARDS`).
const EACH: u64 = 32;

pub fn run() {
    // In a network of this thread's own, and of all that it starts.
    let thread = std::thread::spawn(|| {
        netns::enter();
        ip("link add wan type bridge");
        ip("address add 192.0.2.1/24 dev wan");
        ip("link set wan up");
        let grants = "[network.p2p]\nrouted = \"10.77.0.0/18\"\nmasquerade = true\n[ports]\npublish = [\"192.0.2.1:1024-65535\"]\n";
        let host = Host::builder().without_worker().grants(grants).start();
        let session = host.session();
        tap_open(&host, &session);
        publish(&host, &session);
    });
    thread.join().expect("the part's thread");
}

fn open(session: &Session, tenancy: Tenancy, nic: u64) {
    let mac = Mac::new(format!("52:54:00:00:{:02x}:{nic:02x}", tenancy.slot.get())).expect("a MAC address");
    let (nic, network, queues) = (NicIndex::new(nic).expect("in range"), NetworkName::new("p2p").expect("a name"), Queues::new(1).expect("in range"));
    let ask = OpenTap { tenancy, nic, network, mac, address: None, queues };
    session.ask(Request::TapOpen(ask), Vec::new()).expect("tap.open");
}

/// Our two tables as they are, as a script that replaces them.
fn tables(host: &Host) -> std::path::PathBuf {
    let mut text = String::from("add table netdev diarch\ndelete table netdev diarch\nadd table inet diarch\ndelete table inet diarch\n");
    for family in ["netdev", "inet"] {
        text += &program("nft", &["list", "table", family, "diarch"]);
    }
    let file = host.path("files/tables.nft");
    std::fs::write(&file, text).expect("write");
    file
}

fn nft(file: &std::path::Path) {
    let input = std::fs::File::open(file).expect("the tables");
    let done = Command::new("/usr/sbin/nft").args(["-f", "-"]).env_clear().stdin(input).stdout(Stdio::null()).status().expect("nft");
    assert!(done.success(), "nft -f {}", file.display());
}

fn tap_open(host: &Host, session: &Session) {
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for run in 0..=RUNS {
        let tenancy = session.claim("one").tenancy;
        let started = Instant::now();
        open(session, tenancy, 0);
        let took = milliseconds(started.elapsed());
        let file = tables(host);
        // The slot is free again, and with it the tap's name.
        session.release(tenancy);
        let started = Instant::now();
        let tap = create_tap("dvm0n0");
        nft(&file);
        let alone = milliseconds(started.elapsed());
        drop(tap);
        if run > 0 {
            ours.push(took);
            bare.push(alone);
        }
    }
    line("tap_open", median(ours), "ms", median(bare));
}

fn publish(host: &Host, session: &Session) {
    let set = |tenancy: Tenancy, nic: u64, ports: std::ops::Range<u64>| {
        let host_address = IpText::try_from("192.0.2.1".to_owned()).expect("an address");
        let forward = |port| Forward {
            protocol: Protocol::Tcp,
            host_address,
            host_port: Port::new(port).expect("in range"),
            guest_port: Port::new(80).expect("in range"),
        };
        let ask = Publish { tenancy, nic: NicIndex::new(nic).expect("in range"), forwards: ports.map(forward).collect() };
        session.ask(Request::NetPublish(ask), Vec::new()).expect("net.publish");
    };
    let first = session.claim("first").tenancy;
    open(session, first, 0);
    let measure = |name: &str, others: u64| {
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for run in 0..=RUNS as u64 {
            let port = 2000 + run % 2;
            let started = Instant::now();
            set(first, 0, port..port + 1);
            let took = milliseconds(started.elapsed());
            let file = tables(host);
            let started = Instant::now();
            nft(&file);
            let alone = milliseconds(started.elapsed());
            if run > 0 {
                ours.push(took);
                bare.push(alone);
            }
        }
        line(&format!("{name}_{}", others + 1), median(ours), "ms", median(bare));
    };
    measure("nft_publish", 0);
    let (mut left, mut next) = (FORWARDS - 1, 3000);
    for vm in 0.. {
        let tenancy = session.claim(&format!("more{vm}")).tenancy;
        for nic in 0..4 {
            let some = left.min(EACH);
            open(session, tenancy, nic);
            set(tenancy, nic, next..next + some);
            (left, next) = (left - some, next + some);
            if left == 0 {
                return measure("nft_publish", FORWARDS - 1);
            }
        }
    }
}
