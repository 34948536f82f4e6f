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
