//! The values that a message may carry.
//!
//! Parsing gives these types and never a raw string or number, so that whatever has one of them in
//! hand holds a value that is already inside its limits. None of them can become a path or a kernel object's name:
//! the supervisor derives those from its own slot numbers.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// Why a value was refused; says what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadName(pub String);

/// A string newtype that is checked when it is made and when it is decoded.
macro_rules! checked_string {
    ($(#[$doc:meta])* $name:ident, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
        #[serde(try_from = "String")]
        pub struct $name(String);

        impl $name {
            /// Takes `value` when it keeps the rule of this type.
            pub fn new(value: impl Into<String>) -> Result<Self, BadName> {
                let value = value.into();
                let check: fn(&str) -> Result<(), String> = $check;
                check(&value).map_err(BadName)?;
                Ok(Self(value))
            }
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl TryFrom<String> for $name {
            type Error = BadName;
            fn try_from(value: String) -> Result<Self, BadName> {
                Self::new(value)
            }
        }
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(&self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// A number newtype with an inclusive range, checked when it is made and when it is decoded.
macro_rules! ranged {
    ($(#[$doc:meta])* $name:ident: $of:ty, $min:expr, $max:expr, $what:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
        #[serde(try_from = "u64")]
        pub struct $name($of);

        impl $name {
            pub const MIN: $of = $min;
            pub const MAX: $of = $max;
            /// Takes `value` when it is from `MIN` to `MAX`.
            pub fn new(value: u64) -> Result<Self, BadName> {
                match <$of>::try_from(value) {
                    Ok(n) if (Self::MIN..=Self::MAX).contains(&n) => Ok(Self(n)),
                    _ => Err(BadName(format!("{} must be from {} to {}, and is {value}", $what, Self::MIN, Self::MAX))),
                }
            }
            pub const fn get(self) -> $of {
                self.0
            }
        }
        impl TryFrom<u64> for $name {
            type Error = BadName;
            fn try_from(value: u64) -> Result<Self, BadName> {
                Self::new(value)
            }
        }
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_u64(u64::from(self.0))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

fn label(value: &str) -> Result<(), String> {
    // ASCII only: `char::is_alphanumeric` accepts letters that look like others (THREATS 3 and 19).
    let first = value.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = value.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if first && rest && value.len() <= Label::MAX_BYTES {
        Ok(())
    } else {
        Err("a name is 1 to 63 ASCII letters, digits, '-', '_' or '.', and starts with a letter or digit".into())
    }
}

fn command_line(value: &str) -> Result<(), String> {
    if value.len() > CommandLine::MAX_BYTES {
        return Err(format!("a kernel command line is at most {} bytes, and this is {}", CommandLine::MAX_BYTES, value.len()));
    }
    match value.bytes().find(|b| !(0x20..0x7f).contains(b)) {
        None => Ok(()),
        Some(b) => Err(format!("a kernel command line is printable ASCII, and this holds the byte 0x{b:02x}")),
    }
}

fn mac(value: &str) -> Result<(), String> {
    let rule = "a MAC address is six pairs of lower-case hex digits joined by ':', and not a multicast one";
    let parts: Vec<&str> = value.split(':').collect();
    let pair = |p: &&str| p.len() == 2 && p.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if parts.len() != 6 || !parts.iter().all(pair) {
        return Err(rule.into());
    }
    match u8::from_str_radix(parts[0], 16) {
        Ok(first) if first & 1 == 0 => Ok(()),
        _ => Err(rule.into()),
    }
}

fn bdf(value: &str) -> Result<(), String> {
    let rule = "a PCI function is DOMAIN:BUS:DEVICE.FUNCTION in lower-case hex with leading zeros, such as 0000:65:00.0";
    let hex =
        |part: &str, digits: std::ops::RangeInclusive<usize>| digits.contains(&part.len()) && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let good = || {
        let (address, function) = value.split_once('.')?;
        let mut parts = address.split(':');
        let (domain, bus, device) = (parts.next()?, parts.next()?, parts.next()?);
        // A domain has more than four digits only where four don't suffice (drivers/pci: "%04x"); five bits of device, three of function.
        let domain_good = hex(domain, 4..=8) && (domain.len() == 4 || !domain.starts_with('0'));
        let device_good = hex(device, 2..=2) && u8::from_str_radix(device, 16).is_ok_and(|device| device < 32);
        let function_good = function.len() == 1 && matches!(function.as_bytes()[0], b'0'..=b'7');
        Some(parts.next().is_none() && domain_good && hex(bus, 2..=2) && device_good && function_good)
    };
    if good() == Some(true) { Ok(()) } else { Err(rule.into()) }
}

fn tag(value: &str) -> Result<(), String> {
    label(value).and_then(|()| if value.len() <= 36 { Ok(()) } else { Err("a tag is at most 36 bytes".into()) })
}

checked_string!(
    /// What people call a VM. A label only: it is shown and compared, and nothing is derived from it.
    Label,
    label
);
checked_string!(
    /// The name of a QEMU binary in the grants (`[qemu.NAME]`), not a path.
    QemuName,
    label
);
checked_string!(
    /// A guest kernel's command line; passed to QEMU as one argument, which no byte in it can split.
    CommandLine,
    command_line
);
checked_string!(
    /// A unicast MAC address, `52:54:00:12:34:56`.
    Mac,
    mac
);
checked_string!(
    /// A PCI function as sysfs names it. Which ones may be taken, the grants and the host's live state say.
    Bdf,
    bdf
);
checked_string!(
    /// The name of a network in the grants (`[network.NAME]`), not an interface.
    NetworkName,
    label
);
checked_string!(
    /// The name of something that may be mounted in the grants (`[mounts.NAME]`), not a path.
    ShareName,
    label
);
checked_string!(
    /// The name of a socket in the grants (`[sockets.NAME]`), not a path.
    SocketName,
    label
);
checked_string!(
    /// What a guest mounts a shared directory by: `mount -t virtiofs TAG DIRECTORY`. 36 bytes in the device's configuration (virtio 1.2, 5.11.4).
    Tag,
    tag
);

impl Label {
    /// 63 and not 64: the limit of a DNS label and of a systemd unit's readable part.
    pub const MAX_BYTES: usize = 63;
}
impl CommandLine {
    /// x86's `COMMAND_LINE_SIZE` is 2048 with the final NUL (Linux, Documentation/arch/x86/boot.rst).
    pub const MAX_BYTES: usize = 2047;
}

ranged!(
    /// The supervisor's number for a VM: run directory, uid and scope are derived from it.
    Slot: u16, 0, 4095, "a slot"
);
ranged!(
    /// Virtual CPUs.
    Cpus: u16, 1, 1024, "the number of CPUs"
);
ranged!(
    /// Guest memory in MiB (2^20 bytes).
    MiB: u32, 16, 16 * 1024 * 1024, "memory in MiB"
);
ranged!(
    /// A TCP or UDP port.
    Port: u16, 1, 65535, "a port"
);

ranged!(
    /// The number of a VM's network card, from 0.
    NicIndex: u16, 0, 3, "the number of a network card"
);
ranged!(
    /// Pairs of receive and transmit queues of a network card.
    Queues: u16, 1, 8, "the number of queues"
);

/// One request, for ever: `session` is random for each start of a worker, `serial` counts within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestId {
    pub session: u64,
    pub serial: u64,
}

/// A slot, from one claim to its release. The number is given again, to another VM, and the id of a claim never is: what was asked of one VM can't reach the next one
/// in its slot, however late it is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenancy {
    pub slot: Slot,
    pub claim: RequestId,
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}.{}", self.session, self.serial)
    }
}

/// A host address and port where QEMU's user-mode network listens for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    pub protocol: Protocol,
    pub host_address: IpText,
    pub host_port: Port,
    pub guest_port: Port,
}

/// The transport protocol of a forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    Tcp,
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

/// An IP address that travels as text, and only in its canonical spelling (`0177.1` is not `127.0.0.1`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct IpText(pub IpAddr);

impl TryFrom<String> for IpText {
    type Error = BadName;
    fn try_from(value: String) -> Result<Self, BadName> {
        match value.parse::<IpAddr>() {
            Ok(ip) if ip.to_string() == value => Ok(Self(ip)),
            _ => Err(BadName("an IP address in its canonical form is needed, such as 127.0.0.1 or ::1".into())),
        }
    }
}
impl Serialize for IpText {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&self.0)
    }
}
impl fmt::Display for IpText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_label_is_short_plain_ascii() {
        for good in ["a", "web-1", "0.x_y", &"a".repeat(63)] {
            Label::new(good).unwrap();
        }
        for bad in ["", ".", "..", "-a", "a/b", "a\0b", "a b", "é", "a\n", "\u{202e}a", &"a".repeat(64)] {
            Label::new(bad).unwrap_err();
        }
    }

    #[test]
    fn numbers_outside_their_range_are_refused_and_never_wrap() {
        assert!(Port::new(0).is_err() && Port::new(65536).is_err() && Port::new(u64::MAX).is_err());
        assert!(Cpus::new(0).is_err() && MiB::new(15).is_err() && Slot::new(4096).is_err());
        assert_eq!(Port::new(65535).unwrap().get(), 65535);
    }

    #[test]
    fn a_pci_function_is_named_as_sysfs_names_it_and_in_no_other_way() {
        for good in ["0000:00:1f.7", "0000:65:00.0", "10000:e1:00.0"] {
            Bdf::new(good).unwrap();
        }
        for bad in
            ["65:00.0", "0000:65:00", "0000:65:00.8", "0000:65:20.0", "0000:6A:00.0", "00000:65:00.0", "0000:65:00.0/..", "../../65:00.0", "0000:65:00.0\n"]
        {
            Bdf::new(bad).unwrap_err();
        }
    }

    #[test]
    fn a_mac_address_is_unicast_and_canonical() {
        Mac::new("52:54:00:12:34:56").unwrap();
        for bad in ["53:54:00:12:34:56", "52:54:00:12:34", "52:54:00:12:34:5g", "52:54:00:12:34:56,id=x", "52-54-00-12-34-56", "52:54:0:12:34:56"] {
            Mac::new(bad).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn no_label_can_be_a_path_or_hold_a_control_byte(text in ".*") {
            if let Ok(label) = Label::new(text) {
                let s = label.as_str();
                prop_assert!(!s.contains('/') && !s.contains('\0') && s != "." && s != "..");
                prop_assert!(s.bytes().all(|b| (0x21..0x7f).contains(&b)));
            }
        }
        #[test]
        fn no_command_line_can_hold_a_line_break(text in ".*") {
            if let Ok(line) = CommandLine::new(text) {
                prop_assert!(line.as_str().bytes().all(|b| (0x20..0x7f).contains(&b)));
            }
        }
    }
}
