//! passt: user-mode networking in a process of its own, one for each card.
//!
//! It turns the guest's frames into connections of its own, in the host's network, and listens there for the guest's forwards. It has no rule of its own about where a
//! guest may connect to: the packet filter knows its user and drops what is not granted (`net/rules.nft`, `of_users`), from before its gate opens.
//!
//! The guest finds what it finds with QEMU's own user-mode networking: it is 10.0.2.15, its gateway 10.0.2.2, its name server 10.0.2.3. What
//! differs: 10.0.2.2 is not the host's loopback.
//!
//! Checked against passt of Debian 12 (2023-01) and Debian 13 (2025-05).

use super::{Order, TALK_FD, Talk};
use crate::grants::{Grants, Program};
use crate::host::Host;
use crate::ledger::CompanionKind;
use crate::qemu;
use crate::vm::jail::{Network, Root, Sandbox, Sockets};
use diarch_ipc::Error;
use diarch_ipc::name::{Forward, Protocol};
use diarch_ipc::spec::{Backend, Egress, Nic, VmSpec};
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// For the guest's connections, and those into it.
const OPEN_FILES: u64 = 4096;
const GUEST: &str = "10.0.2.15";
const GATEWAY: &str = "10.0.2.2";
const NAME_SERVER: &str = "10.0.2.3";

/// What is known before anything is decided: the program for each user-mode card, or why QEMU carries them itself.
#[derive(Debug)]
pub enum Facts {
    /// There is no such card, or no such grant.
    Unasked,
    Usable(Vec<Ready>),
    Unusable(String),
}

/// The program for one card, opened and checked.
#[derive(Debug)]
pub struct Ready {
    program: File,
    libraries: Vec<(PathBuf, OwnedFd)>,
}

/// Looks at the host; changes nothing.
pub fn look(grants: &Grants, host: &Host, spec: &VmSpec) -> Facts {
    let cards = cards(spec).count();
    match &grants.passt {
        Some(granted) if cards > 0 && !host.is_rehearsed() => open(granted, host, cards).unwrap_or_else(Facts::Unusable),
        _ => Facts::Unasked,
    }
}

fn open(granted: &Program, host: &Host, cards: usize) -> Result<Facts, String> {
    let routes = std::fs::read_to_string("/proc/thread-self/net/route").map_err(|error| format!("the host's routes can't be read: {error}"))?;
    if !has_default_route(&routes) {
        return Err("passt needs a default route on the host (IPv4), and there is none".into());
    }
    let one = || {
        let (program, _) = qemu::open_program("passt", granted, host.owner(), None)?;
        Ok(Ready { program, libraries: qemu::libraries_of("passt", granted)? })
    };
    let all: Result<Vec<Ready>, Error> = (0..cards).map(|_| one()).collect();
    all.map(Facts::Usable).map_err(|error| error.to_string())
}

/// Fields of proc(5), `/proc/net/route`: interface, destination, gateway, flags, ..., mask. Bit 0 of the flags: the route is up.
fn has_default_route(routes: &str) -> bool {
    routes.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
        let zero = |at: usize| fields.get(at).is_some_and(|field| *field == "00000000");
        let up = fields.get(3).and_then(|flags| u32::from_str_radix(flags, 16).ok()).is_some_and(|flags| flags & 1 == 1);
        zero(1) && zero(7) && up
    })
}

fn cards(spec: &VmSpec) -> impl Iterator<Item = &Nic> {
    spec.nics.iter().filter(|nic| matches!(nic.backend, Backend::User { .. }))
}

/// What the packet filter has to hold the user to, or why passt can't carry these cards.
fn admit(spec: &VmSpec) -> Result<Egress, String> {
    let mut egresses = cards(spec).filter_map(|nic| if let Backend::User { egress, .. } = &nic.backend { Some(*egress) } else { None });
    let first = egresses.next().unwrap_or(Egress::Closed);
    if egresses.any(|egress| egress != first) {
        return Err("one card may connect outwards and another may not, and the packet filter knows them by one user".into());
    }
    if cards(spec).flat_map(Nic::forwards).any(|forward| forward.host_address.0.is_ipv6()) {
        return Err("a forward of an IPv6 address: the guest has no IPv6 address that passt could lead it to".into());
    }
    Ok(first)
}

/// The orders, one for each card, and the egress to be enforced; or why there are none.
pub fn orders(facts: Facts, granted: Option<&Program>, spec: &VmSpec) -> Result<(Vec<Order>, Egress), Option<String>> {
    let ready = match facts {
        Facts::Unasked => return Err(None),
        Facts::Unusable(reason) => return Err(Some(reason)),
        Facts::Usable(ready) => ready,
    };
    let egress = admit(spec).map_err(Some)?;
    let name = granted.map_or_else(|| "passt".into(), |program| program.path.to_string_lossy());
    let order = |(Ready { program, libraries }, nic): (Ready, &Nic)| Order {
        kind: CompanionKind::Passt,
        program: program.into(),
        argv: argv(&name, nic.forwards()),
        libraries,
        // Its inner walls are a root in /tmp; it is told that it has them.
        root: Root::of_a_program().empty("/tmp").host_if_there("/etc/resolv.conf"),
        network: Network::Host,
        sockets: Sockets::InternetAndRoutes,
        sandbox: Sandbox::Pretended,
        talk: Talk::Connected,
        open_files: OPEN_FILES,
    };
    Ok((ready.into_iter().zip(cards(spec)).map(order).collect(), egress))
}

fn argv(program: &str, forwards: &[Forward]) -> Vec<String> {
    let fd = TALK_FD.to_string();
    // In the foreground, until the connection ends (-1). Without the mapping of the gateway's address to the host's loopback; with what QEMU's own network
    // tells a guest, and without the host's search list.
    let fixed = [
        program,
        "-f",
        "-1",
        "-q",
        "--no-map-gw",
        "-4",
        "-a",
        GUEST,
        "-n",
        "24",
        "-g",
        GATEWAY,
        "--dns-forward",
        NAME_SERVER,
        "-D",
        NAME_SERVER,
        "--no-dhcp-search",
        "-m",
        "1500",
        "-F",
        &fd,
    ];
    let mut argv: Vec<String> = fixed.iter().map(|word| (*word).to_owned()).collect();
    for forward in forwards {
        let flag = match forward.protocol {
            Protocol::Tcp => "-t",
            Protocol::Udp => "-u",
        };
        let address = match forward.host_address.0 {
            // Its word for every address is none.
            IpAddr::V4(host) if host.is_unspecified() => String::new(),
            host => format!("{host}/"),
        };
        argv.extend([flag.to_owned(), format!("{address}{}:{}", forward.host_port, forward.guest_port)]);
    }
    argv
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::operation::{Example, Spawn};

    fn spec(cards: &[(Egress, &str)]) -> VmSpec {
        let mut spec = Spawn::example().spec;
        let example = spec.nics.first().unwrap().clone();
        let card = |(egress, host): &(Egress, &str)| {
            let mut forward = example.forwards()[0];
            forward.host_address = diarch_ipc::name::IpText::try_from((*host).to_owned()).unwrap();
            Nic { backend: Backend::User { egress: *egress, forwards: vec![forward] }, ..example.clone() }
        };
        spec.nics = cards.iter().map(card).collect();
        spec
    }

    #[test]
    fn its_arguments_are_numbers_and_canonical_addresses() {
        let argv = argv("passt", spec(&[(Egress::Closed, "127.0.0.1")]).nics[0].forwards());
        assert_eq!(argv[argv.len() - 4..], ["-F", "3", "-t", "127.0.0.1/8080:80"]);
        assert!(argv.contains(&"--no-map-gw".to_owned()));
        let argv = super::argv("passt", spec(&[(Egress::Closed, "0.0.0.0")]).nics[0].forwards());
        assert_eq!(argv.last().unwrap(), "8080:80");
    }

    #[test]
    fn cards_that_differ_in_what_they_may_reach_are_qemus_own() {
        use Egress::{Closed, Host};
        assert_eq!(admit(&spec(&[(Closed, "127.0.0.1"), (Closed, "127.0.0.1")])), Ok(Closed));
        assert_eq!(admit(&spec(&[(Host, "127.0.0.1")])), Ok(Host));
        admit(&spec(&[(Host, "127.0.0.1"), (Closed, "127.0.0.1")])).unwrap_err();
        admit(&spec(&[(Closed, "::1")])).unwrap_err();
    }

    #[test]
    fn a_default_route_is_one_to_everywhere_that_is_up() {
        let head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        let route = |destination: &str, flags: &str, mask: &str| format!("{head}eth0\t{destination}\t010200C0\t{flags}\t0\t0\t0\t{mask}\t0\t0\t0\n");
        assert!(has_default_route(&route("00000000", "0003", "00000000")));
        assert!(!has_default_route(&route("00000000", "0002", "00000000")));
        assert!(!has_default_route(&route("00000000", "0003", "00000080")));
        assert!(!has_default_route(&route("000200C0", "0001", "00FFFFFF")));
        assert!(!has_default_route(head));
    }
}
