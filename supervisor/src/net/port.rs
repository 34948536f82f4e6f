//! `port.listen`: a port of the host, bound for the worker, who has no right to it.
//!
//! A socket belongs for ever to the control group that it was made in, also when another process has it (`sk_cgrp_data` in the kernel). The supervisor's unit
//! has
//! `IPAddressDeny=any`, so a socket made here would hear nothing: root opens the unit where it grants ports. What the unit keeps shut is found out by sending
//! to oneself.

use crate::grants::Grants;
use crate::state::Supervisor;
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::name::Protocol;
use diarch_ipc::operation::{Listen, Listening, Operation};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, bind, getsockname, listen as listen_on, sendto, socket_with, sockopt};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// The kernel's own default for it (`SOMAXCONN`, since Linux 5.4); a lower `net.core.somaxconn` counts.
const BACKLOG: i32 = 4096;

pub fn listen(supervisor: &Rc<Supervisor>, _row: &'static Operation, ask: &Listen) -> Result<(Listening, Vec<Rc<OwnedFd>>), Error> {
    let vetted = vet(&supervisor.grants, ask)?;
    // Nothing to record: the socket is the worker's, and goes with its descriptor. Nothing here waits.
    Ok((Listening {}, vec![Rc::new(make(vetted)?)]))
}

fn vet(grants: &Grants, ask: &Listen) -> Result<Vetted<(Protocol, SocketAddr)>, Error> {
    let address = SocketAddr::new(ask.address.0, ask.port.get());
    if !grants.ports.listen.iter().any(|range| range.holds(ask.address.0, ask.port)) {
        return Err(Error::denied("ports.listen", format!("no entry covers {address}/{}", ask.protocol)));
    }
    Ok(Vetted::by_vet((ask.protocol, address)))
}

fn make(vetted: Vetted<(Protocol, SocketAddr)>) -> Result<OwnedFd, Error> {
    let (protocol, address) = vetted.into_inner();
    let failed = |step: &'static str| move |error: rustix::io::Errno| Error::io(step, &error.into());
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let make = |kind| socket_with(family(address), kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None);
    let socket = make(kind).map_err(failed("socket"))?;
    if address.is_ipv6() {
        // [::] is IPv6 alone: 0.0.0.0 is another grant.
        sockopt::set_ipv6_v6only(&socket, true).map_err(failed("IPV6_V6ONLY"))?;
    }
    if protocol == Protocol::Tcp {
        // Not for UDP, where it would let two have the same port.
        sockopt::set_socket_reuseaddr(&socket, true).map_err(failed("SO_REUSEADDR"))?;
    }
    let taken = |error: rustix::io::Errno| match error {
        rustix::io::Errno::ADDRINUSE => Error::Conflict { holder: "another process of this host".into(), reason: format!("it has {address}/{protocol}") },
        rustix::io::Errno::ADDRNOTAVAIL => Error::Unsupported { missing: format!("the address {}: this host does not have it now", address.ip()) },
        other => Error::io("bind", &other.into()),
    };
    bind(&socket, &address).map_err(taken)?;
    if protocol == Protocol::Tcp {
        listen_on(&socket, BACKLOG).map_err(taken)?;
    }
    heard(address)?;
    Ok(socket)
}

fn family(address: SocketAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

/// Sends nothing from the address to itself: the control group's filter refuses that with EPERM (`cgroup_skb/egress`), and looks at nothing but addresses.
fn heard(address: SocketAddr) -> Result<(), Error> {
    let itself = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    let try_it = || {
        let probe = socket_with(family(address), SocketType::DGRAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        bind(&probe, &SocketAddr::new(itself, 0))?;
        let own: SocketAddr = getsockname(&probe)?.try_into()?;
        sendto(&probe, &[], SendFlags::empty(), &own)
    };
    match try_it() {
        Err(rustix::io::Errno::PERM) => Err(Error::Unsupported {
            missing:
                "the way to this socket: the supervisor's unit has IPAddressDeny=any; where ports.listen is granted, root adds IPAddressAllow=any (or the \
                      clients' addresses) to it: systemctl edit diarch-supervisor"
                    .into(),
        }),
        // What else goes wrong is no reason: an interface may be down now.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::name::{IpText, Port};

    fn ask(protocol: Protocol, address: &str, port: u64) -> Listen {
        Listen { protocol, address: IpText::try_from(address.to_owned()).unwrap(), port: Port::new(port).unwrap() }
    }

    fn grants(listen: &str) -> Grants {
        toml::from_str(&format!("[worker]\nuser = 64000\n[vms]\nmax = 4\nuid_first = 200000\nmemory_mib = 64\ncpus_each = 1\n[ports]\nlisten = [{listen}]\n"))
            .unwrap()
    }

    #[test]
    fn exactly_the_granted_address_and_ports_are_bound() {
        let grants = grants("\"127.0.0.1:443-444\"");
        assert!(vet(&grants, &ask(Protocol::Tcp, "127.0.0.1", 443)).is_ok());
        for (address, port) in [("127.0.0.1", 445), ("127.0.0.1", 442), ("0.0.0.0", 443), ("127.0.0.2", 443), ("::1", 443), ("::ffff:127.0.0.1", 443)] {
            let error = vet(&grants, &ask(Protocol::Tcp, address, port)).unwrap_err();
            assert!(matches!(&error, Error::Denied { grant, .. } if grant == "ports.listen"), "{address}:{port}: {error}");
        }
    }

    #[test]
    fn a_port_that_somebody_has_is_a_conflict_and_a_free_one_serves() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let listen = || make(vet(&grants("\"127.0.0.1:1-65535\""), &ask(protocol, "127.0.0.1", own.port().into())).unwrap());
            let first = listen().unwrap();
            assert_eq!(SocketAddr::try_from(getsockname(&first).unwrap()).unwrap(), own);
            let error = listen().unwrap_err();
            assert_eq!(error.kind(), "conflict", "{error}");
            if protocol == Protocol::Tcp {
                std::net::TcpStream::connect(own).unwrap();
            }
        }
    }
}
