//! `[network.NAME]` and `[ports]`: where a tap may be plugged in, and which ports of the host may lead to it.

use super::PortRange;
use diarch_ipc::name::{NicIndex, Slot};
use serde::Deserialize;
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// One network: either a bridge of the host's, or routed.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The name of a bridge that root made.
    pub bridge: Option<String>,
    /// An IPv4 range of its own, `"10.77.0.0/20"`: each card gets an address of it, and the host routes.
    pub routed: Option<String>,
    /// Whether packets of a routed network leave the host under its own address.
    #[serde(default)]
    pub masquerade: bool,
    /// Whether guests of this routed network may reach each other. (On a bridge they do: that is what a bridge is.)
    #[serde(default)]
    pub peers: bool,
    /// Whether guests may reach the host itself (beyond a ping of their gateway).
    #[serde(default)]
    pub host: bool,
    /// Whether guests may reach link-local addresses, where clouds keep a machine's credentials.
    #[serde(default)]
    pub metadata: bool,
}

/// Where a network's taps go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place<'a> {
    Bridge(&'a str),
    Routed(Range),
}

/// The IPv4 range of a routed network: its first address is the host's end of every tap, and each card of each slot has one further on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    base: u32,
    length: u8,
}

impl Range {
    fn parse(text: &str) -> Result<Self, String> {
        let rule = "an IPv4 range is needed, such as \"10.77.0.0/20\": its first address, and a length from 8 to 29";
        let (address, length) = text.split_once('/').ok_or(rule)?;
        let (address, length): (Ipv4Addr, u8) = (address.parse().map_err(|_| rule)?, length.parse().map_err(|_| rule)?);
        if !(8..=29).contains(&length) || format!("{address}/{length}") != text {
            return Err(rule.into());
        }
        let range = Self { base: address.to_bits(), length };
        if range.base & !range.mask() != 0 {
            return Err(format!("{text} is not the first address of its range, which is {range}"));
        }
        // Of no network that packets are routed to (RFC 6890): "this network", loopback, link-local, multicast and beyond.
        let last = Ipv4Addr::from_bits(range.base | !range.mask());
        let beside = |what: Ipv4Addr| what.octets()[0] == 0 || what.is_loopback() || what.is_link_local() || what.octets()[0] >= 224;
        if beside(address) || beside(last) || range.overlaps(Self { base: Ipv4Addr::new(169, 254, 0, 0).to_bits(), length: 16 }) {
            return Err(format!("{range} holds addresses that no host has (loopback, link-local, multicast)"));
        }
        Ok(range)
    }

    const fn mask(self) -> u32 {
        u32::MAX << (32 - self.length)
    }

    fn overlaps(self, other: Self) -> bool {
        let mask = self.mask() & other.mask();
        self.base & mask == other.base & mask
    }

    /// The host's end of every tap.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base + 1)
    }

    /// The guest's address: derived from slot and card alone, so that nobody chooses it and no two have the same. `None`: the range ends before.
    pub fn guest(self, slot: Slot, nic: NicIndex) -> Option<Ipv4Addr> {
        let number = u32::from(slot.get()) * (u32::from(NicIndex::MAX) + 1) + u32::from(nic.get());
        // The last address is the range's broadcast.
        let (address, last) = (self.base + 2 + number, self.base | !self.mask());
        (address < last).then(|| Ipv4Addr::from_bits(address))
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from_bits(self.base & self.mask()), self.length)
    }
}

impl Network {
    /// Where its taps go; an error says what is wrong with the section.
    pub fn place(&self) -> Result<Place<'_>, String> {
        match (&self.bridge, &self.routed) {
            (Some(name), None) => {
                // The kernel expands '%' and takes '/' and ':' for something else (THREATS 16); the packet filter's text takes these only.
                let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
                if name.is_empty() || name.len() > MAX_INTERFACE_NAME || !plain || matches!(name.as_str(), "." | "..") {
                    return Err(format!("{name:?} is no interface's name: 1 to 15 ASCII letters, digits, '-', '_' or '.'"));
                }
                if self.masquerade || self.peers {
                    return Err("masquerade and peers are for a routed network; behind a bridge, root's own rules decide".into());
                }
                Ok(Place::Bridge(name))
            }
            (None, Some(range)) => Range::parse(range).map(Place::Routed),
            _ => Err("either bridge = \"NAME\" or routed = \"RANGE\" is needed, and not both".into()),
        }
    }
}

/// `IFNAMSIZ` with its final NUL is 16 (linux/if.h).
pub const MAX_INTERFACE_NAME: usize = 15;

/// Looks at all networks together: the name of the one that is refused, and why.
pub fn check(networks: &std::collections::BTreeMap<String, Network>) -> Result<(), String> {
    let mut ranges: Vec<(&str, Range)> = Vec::new();
    for (name, network) in networks {
        let at = |reason: String| format!("{name}: {reason}");
        diarch_ipc::name::NetworkName::new(name.as_str()).map_err(|error| at(error.to_string()))?;
        if let Place::Routed(range) = network.place().map_err(at)? {
            if let Some((other, _)) = ranges.iter().find(|(_, other)| other.overlaps(range)) {
                return Err(at(format!("its range {range} overlaps that of {other}")));
            }
            ranges.push((name, range));
        }
    }
    Ok(())
}

/// Ports of the host.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ports {
    /// Addresses and ports that the packet filter may lead into a guest.
    pub publish: Vec<PortRange>,
    /// Addresses and ports that the worker may have bound for it.
    pub listen: Vec<PortRange>,
}

impl Ports {
    /// Why the published ones are refused, if they are.
    pub fn check(&self) -> Result<(), String> {
        match self.publish.iter().find(|range| range.address.to_canonical().is_loopback()) {
            None => Ok(()),
            Some(range) => Err(format!(
                "{range}: the kernel leads no packet for a loopback address into a guest; name an address that the host has towards others, or lead the \
                 port by user-mode networking (forwards.allow)"
            )),
        }
    }
}

/// `[nft]`: the program that the packet filter's rules go through.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nft {
    pub path: PathBuf,
}

impl Default for Nft {
    fn default() -> Self {
        Self { path: "/usr/sbin/nft".into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routed(text: &str) -> Result<Range, String> {
        Range::parse(text)
    }
    fn bridge(name: &str) -> Result<(), String> {
        Network { bridge: Some(name.into()), ..Network::default() }.place().map(drop)
    }

    #[test]
    fn a_card_has_the_same_address_always_and_no_other_has_it() {
        let range = routed("10.77.0.0/18").unwrap();
        assert_eq!(range.gateway(), Ipv4Addr::new(10, 77, 0, 1));
        let mut seen = std::collections::BTreeSet::from([range.gateway()]);
        for slot in 0..=u64::from(Slot::MAX) {
            for nic in 0..=u64::from(NicIndex::MAX) {
                let Some(address) = range.guest(Slot::new(slot).unwrap(), NicIndex::new(nic).unwrap()) else { continue };
                assert!(seen.insert(address), "{address} is given twice");
                assert!(range.overlaps(Range { base: address.to_bits(), length: 32 }));
            }
        }
        assert!(seen.len() > 16_000);
    }

    #[test]
    fn a_range_that_is_too_small_says_so_and_gives_no_broadcast_address() {
        let range = routed("192.0.2.0/29").unwrap();
        let of = |slot, nic| range.guest(Slot::new(slot).unwrap(), NicIndex::new(nic).unwrap());
        assert_eq!(of(1, 0), Some(Ipv4Addr::new(192, 0, 2, 6)));
        assert_eq!((of(1, 1), of(4095, 3)), (None, None));
    }

    #[test]
    fn a_range_is_its_first_address_and_one_that_can_be_routed() {
        for good in ["10.0.0.0/8", "192.168.4.0/24", "172.16.0.8/29", "100.64.0.0/10"] {
            assert_eq!(routed(good).unwrap().to_string(), good);
        }
        for bad in [
            "",
            "10.77.0.0",
            "10.77.0.1/20",
            "10.77.0.0/30",
            "10.77.0.0/7",
            "010.77.0.0/20",
            "10.77.0.0/020",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "160.0.0.0/8 ",
            "224.0.0.0/8",
            "0.0.0.0/8",
            "fd00::/64",
            "169.0.0.0/8",
            "10.77.0.0/20\n",
        ] {
            assert!(routed(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_bridge_is_named_in_a_way_that_nothing_expands() {
        for good in ["br0", "virbr0", "br-lan.7", "a_b"] {
            bridge(good).unwrap();
        }
        for bad in ["", "br%d", "br/0", "br:0", ".", "..", "abcdefghijklmnop", "br 0", "br\"0", "br0\n", "bré"] {
            assert!(bridge(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_loopback_address_is_not_published_in_any_of_its_forms() {
        let ports = |list: &str| toml::from_str::<Ports>(&format!("publish = {list}\nlisten = [\"127.0.0.1:80\"]\n")).unwrap();
        ports("[\"192.0.2.1:80\", \"0.0.0.0:1-65535\", \"[::]:80\", \"[2001:db8::1]:80\"]").check().unwrap();
        for (bad, named) in
            [("127.0.0.1:80", "127.0.0.1:80:"), ("127.8.8.8:1-9", "127.8.8.8:1-9:"), ("[::1]:80", "[::1]:80:"), ("[::ffff:127.0.0.1]:80", "[::ffff:")]
        {
            let reason = ports(&format!("[\"192.0.2.1:80\", \"{bad}\"]")).check().unwrap_err();
            assert!(reason.starts_with(named) && reason.contains("forwards.allow"), "{reason}");
        }
    }

    #[test]
    fn a_network_is_one_thing_and_two_ranges_do_not_overlap() {
        let network = |text: &str| toml::from_str::<std::collections::BTreeMap<String, Network>>(text).unwrap();
        check(&network("[a]\nbridge = \"br0\"\n[b]\nrouted = \"10.0.0.0/24\"\nmasquerade = true\n[c]\nrouted = \"10.0.1.0/24\"\n")).unwrap();
        for bad in [
            "[a]\nhost = true\n",
            "[a]\nbridge = \"br0\"\nrouted = \"10.0.0.0/24\"\n",
            "[a]\nbridge = \"br0\"\nmasquerade = true\n",
            "[a]\nrouted = \"10.0.0.0/24\"\n[b]\nrouted = \"10.0.0.0/16\"\n",
            "[\"a b\"]\nbridge = \"br0\"\n",
        ] {
            assert!(check(&network(bad)).is_err(), "{bad}");
        }
    }
}
