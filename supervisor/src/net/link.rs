//! Network interfaces through rtnetlink: the five questions and orders that taps need, encoded here (rtnetlink(7), linux/rtnetlink.h, linux/if_link.h).
//!
//! Everything goes by index: a name may change hands between two calls, an index is given once in a kernel's life.

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recvfrom, sendto, socket_with, sockopt};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The kernel answers while it is asked; longer than this, and another has held its lock for all that time.
const PATIENCE: Duration = Duration::from_secs(3);

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_REPLACE: u16 = 0x100;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_TUN_OWNER: u16 = 1;
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// No counters: they are most of a link's description.
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
/// linux/in6.h: no link-local address of the host's on a tap.
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
/// linux/ip.h: forward what comes from the guest; strict reverse path; answer ARP for the interface's own address only.
const IPV4_DEVCONF: [(u16, u32); 3] = [(1, 1), (8, 1), (19, 1)];
const IFA_LOCAL: u16 = 2;
const IFA_ADDRESS: u16 = 1;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PREFSRC: u16 = 7;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IFF_UP: u32 = 1;
const RT_TABLE_MAIN: u8 = 254;
/// linux/rtnetlink.h: "route installed by administrator" is `RTPROT_STATIC`.
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;

/// One interface as the kernel describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// `bridge`, `tun`, ...; empty for hardware.
    pub kind: String,
    pub master: Option<u32>,
    pub address: [u8; 6],
    pub mtu: u32,
    /// Of a tap: its owner and its queues, where it may have more than one.
    pub owner: Option<u32>,
    pub queues: Option<u32>,
    pub disabled_queues: Option<u32>,
}

/// What is set on an interface before it is up.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub address: [u8; 6],
    pub mtu: u32,
    pub master: Option<u32>,
}

/// A socket to the kernel.
#[derive(Debug)]
pub struct Links {
    socket: OwnedFd,
    sequence: u32,
}

impl Links {
    pub fn open() -> io::Result<Self> {
        // No protocol is number 0, and that is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// All interfaces of this network namespace.
    pub fn all(&mut self) -> io::Result<Vec<Link>> {
        // A list that changed while it was read may lack what was there all the time.
        for _ in 0..16 {
            let mut message = Message::link(RTM_GETLINK, NLM_F_DUMP, 0, 0);
            message.attribute(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
            let (mut links, mut torn) = (Vec::new(), false);
            self.ask(message, |kind, flags, body| {
                torn |= flags & NLM_F_DUMP_INTR != 0;
                links.extend((kind == RTM_NEWLINK).then(|| link(body)).flatten());
            })?;
            if !torn {
                return Ok(links);
            }
        }
        Err(io::Error::other("the list of interfaces changes all the time"))
    }

    /// One interface by name; `None`: there is none.
    pub fn named(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = Message::link(RTM_GETLINK, 0, 0, 0);
        message.attribute(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat());
        message.attribute(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
        let mut found = None;
        match self.ask(message, |kind, _, body| found = (kind == RTM_NEWLINK).then(|| link(body)).flatten()) {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => Ok(None),
            other => other.map(|()| found),
        }
    }

    /// Makes an interface that is down ready to be up.
    pub fn set(&mut self, index: u32, settings: Settings) -> io::Result<()> {
        let mut message = Message::link(RTM_SETLINK, 0, index, 0);
        message.attribute(IFLA_ADDRESS, &settings.address);
        message.attribute(IFLA_MTU, &settings.mtu.to_ne_bytes());
        if let Some(master) = settings.master {
            message.attribute(IFLA_MASTER, &master.to_ne_bytes());
        }
        self.order(message)?;
        let mut message = Message::link(RTM_SETLINK, 0, index, 0);
        message.nested(IFLA_AF_SPEC, |message| {
            message.nested(AF_INET6.into(), |message| message.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]));
        });
        match self.order(message) {
            // A kernel without IPv6, or where this interface has none.
            Err(error) if matches!(rustix::io::Errno::from_io_error(&error), Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::OPNOTSUPP)) => Ok(()),
            other => other,
        }
    }

    /// The interface's own part of `/proc/sys/net/ipv4/conf`, which the supervisor's unit has read-only.
    pub fn let_route(&mut self, index: u32) -> io::Result<()> {
        let mut message = Message::link(RTM_SETLINK, 0, index, 0);
        message.nested(IFLA_AF_SPEC, |message| {
            message.nested(AF_INET.into(), |message| {
                message.nested(IFLA_INET_CONF, |message| {
                    for (number, value) in IPV4_DEVCONF {
                        message.attribute(number, &value.to_ne_bytes());
                    }
                });
            });
        });
        self.order(message)
    }

    pub fn up(&mut self, index: u32) -> io::Result<()> {
        self.order(Message::link(RTM_SETLINK, 0, index, IFF_UP))
    }

    pub fn delete(&mut self, index: u32) -> io::Result<()> {
        self.order(Message::link(RTM_DELLINK, 0, index, 0))
    }

    /// Gives the interface this one address.
    pub fn add_address(&mut self, index: u32, address: Ipv4Addr) -> io::Result<()> {
        let mut message = Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL);
        // struct ifaddrmsg: family, prefix length, flags, scope (0: everywhere), index.
        message.put(&[AF_INET, 32, 0, 0]);
        message.put(&index.to_ne_bytes());
        message.attribute(IFA_LOCAL, &address.octets());
        message.attribute(IFA_ADDRESS, &address.octets());
        self.order(message)
    }

    /// Sends what is for `guest` to the interface. One that is there already led to a tap that is gone.
    pub fn add_route(&mut self, index: u32, guest: Ipv4Addr, from: Ipv4Addr) -> io::Result<()> {
        let mut message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE);
        // struct rtmsg: family, destination's and source's length, type of service, table, protocol, scope, type, flags.
        message.put(&[AF_INET, 32, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_LINK, RTN_UNICAST, 0, 0, 0, 0]);
        message.attribute(RTA_DST, &guest.octets());
        message.attribute(RTA_OIF, &index.to_ne_bytes());
        message.attribute(RTA_PREFSRC, &from.octets());
        self.order(message)
    }

    fn order(&mut self, message: Message) -> io::Result<()> {
        self.ask(message, |_, _, _| ())
    }

    /// Sends a message and reads the kernel's answer to its end.
    fn ask(&mut self, message: Message, mut seen: impl FnMut(u16, u16, &[u8])) -> io::Result<()> {
        self.sequence += 1;
        sendto(&self.socket, &message.finish(self.sequence), SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut buffer = vec![0u8; 64 * 1024];
        loop {
            // TRUNC: the length that it had, so that a cut one is seen.
            let (_, length, from) = recvfrom(&self.socket, &mut buffer[..], RecvFlags::TRUNC)?;
            // Any process of root's may send to this socket; the kernel is number 0.
            if from.and_then(|from| SocketAddrNetlink::try_from(from).ok()).is_none_or(|from| from.pid() != 0) {
                continue;
            }
            let mut rest = buffer.get(..length).ok_or_else(|| io::Error::other("an answer of the kernel's is longer than 64 KiB"))?;
            while let Some((header, body, behind)) = split(rest) {
                rest = behind;
                if header.sequence != self.sequence {
                    continue;
                }
                match header.kind {
                    // The end of a list, and the acknowledgement of everything else.
                    NLMSG_DONE | NLMSG_ERROR => return status(body),
                    kind => seen(kind, header.flags, body),
                }
            }
        }
    }
}

/// `struct nlmsgerr` and the end of a dump: a negative error number first, 0 for none.
fn status(body: &[u8]) -> io::Result<()> {
    match body.get(..4).and_then(|number| number.try_into().ok()).map_or(0, i32::from_ne_bytes) {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(-number)),
    }
}

struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
}

/// The first message of an answer, and what is behind it (`struct nlmsghdr`: length, type, flags, sequence, port).
fn split(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let head = bytes.get(..16)?;
    let length = usize::try_from(number(&head[..4])?).ok()?;
    let half = |at: usize| Some(u16::from_ne_bytes([*head.get(at)?, *head.get(at + 1)?]));
    let header = Header { kind: half(4)?, flags: half(6)?, sequence: number(&head[8..12])? };
    let body = bytes.get(16..length)?;
    Some((header, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// The attributes of a message or of another attribute (`struct rtattr`: length, type); the top bits of the type are flags.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let head = bytes.get(..4)?;
        let (length, kind) = (usize::from(u16::from_ne_bytes([head[0], head[1]])), u16::from_ne_bytes([head[2], head[3]]) & 0x3fff);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// `struct ifinfomsg` (16 bytes, the index at 4) and its attributes.
fn link(body: &[u8]) -> Option<Link> {
    let mut link = Link { index: number(body.get(4..8)?)?, ..Link::default() };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_MTU => link.mtu = number(value)?,
            IFLA_MASTER => link.master = number(value),
            IFLA_ADDRESS => link.address = value.try_into().unwrap_or_default(),
            IFLA_LINKINFO => {
                for (kind, value) in attributes(value) {
                    match kind {
                        IFLA_INFO_KIND => link.kind = text(value),
                        // Its attributes mean this for the kind "tun" alone; the kernel sends the kind first.
                        IFLA_INFO_DATA if link.kind == "tun" => {
                            for (kind, value) in attributes(value) {
                                match kind {
                                    IFLA_TUN_OWNER => link.owner = number(value),
                                    IFLA_TUN_NUM_QUEUES => link.queues = number(value),
                                    IFLA_TUN_NUM_DISABLED_QUEUES => link.disabled_queues = number(value),
                                    _ => {}
                                }
                            }
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(link)
}

/// A message on its way to the kernel.
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let flags = flags | NLM_F_REQUEST | if flags & NLM_F_DUMP == NLM_F_DUMP { 0 } else { NLM_F_ACK };
        let mut message = Self { bytes: vec![0; 4] };
        message.put(&kind.to_ne_bytes());
        message.put(&flags.to_ne_bytes());
        message.put(&[0; 8]);
        message
    }

    /// With a `struct ifinfomsg`: family, type, index, flags, and which of them are meant.
    fn link(kind: u16, flags: u16, index: u32, up: u32) -> Self {
        let mut message = Self::new(kind, flags);
        message.put(&[0; 4]);
        for value in [index, up, up] {
            message.put(&value.to_ne_bytes());
        }
        message
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.nested(kind, |message| message.put(value));
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.put(&[0, 0]);
        self.put(&kind.to_ne_bytes());
        fill(self);
        // All that is sent from here is some hundred bytes.
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_loopback_interface_is_found_by_name_and_in_the_list() {
        let mut links = Links::open().unwrap();
        let lo = links.named("lo").unwrap().unwrap();
        assert_eq!((lo.index, lo.name.as_str(), lo.kind.as_str()), (1, "lo", ""));
        assert!(links.all().unwrap().contains(&lo));
        assert_eq!(links.named("nosuchinterface").unwrap(), None);
    }

    #[test]
    fn a_refusal_of_the_kernels_is_its_number() {
        let error = Links::open().unwrap().delete(u32::MAX / 2).unwrap_err();
        assert!(matches!(rustix::io::Errno::from_io_error(&error), Some(rustix::io::Errno::NODEV | rustix::io::Errno::PERM)), "{error}");
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_reader_panic_or_loop(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut rest = &bytes[..];
            while let Some((_, body, behind)) = split(rest) {
                let _ = link(body);
                rest = behind;
            }
            prop_assert!(attributes(&bytes).count() <= bytes.len());
        }
    }
}
