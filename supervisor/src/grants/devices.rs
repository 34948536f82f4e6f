//! `[devices]`: the PCI functions that may be given to VMs.

use diarch_ipc::name::Bdf;
use serde::{Deserialize, Deserializer};

/// What may be taken from the host. The host's own disk and network are never in it, whatever is written here (`vfio`).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Devices {
    pub allow: Vec<DeviceGrant>,
    /// How long one step (a driver that lets go of a function, say) may take before the device is quarantined.
    pub step_seconds: u32,
    /// Where kernel and QEMU have it, functions go to a VM as descriptors of iommufd's. Not: by their groups' nodes.
    pub iommufd: bool,
}

impl Default for Devices {
    fn default() -> Self {
        // A GPU's driver takes some seconds over it; the longest seen were below ten.
        Self { allow: Vec::new(), step_seconds: 20, iommufd: true }
    }
}

/// `"0000:65:00.0"` (one function), `"10de:2330"` (vendor and device), or `"class:0302"` (class and subclass).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceGrant {
    Function(Bdf),
    Model { vendor: u16, device: u16 },
    Class(u16),
}

impl DeviceGrant {
    fn parse(text: &str) -> Option<Self> {
        // Lower-case and whole: `u16::from_str_radix` would take "+123".
        let hex = |part: &str| (part.len() == 4 && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))).then(|| u16::from_str_radix(part, 16).ok())?;
        if let Ok(function) = Bdf::new(text) {
            return Some(Self::Function(function));
        }
        match text.split_once(':')? {
            ("class", class) => Some(Self::Class(hex(class)?)),
            (vendor, device) => Some(Self::Model { vendor: hex(vendor)?, device: hex(device)? }),
        }
    }

    /// Whether it names this function; `class` has 24 bits.
    pub fn covers(&self, function: &Bdf, vendor: u16, device: u16, class: u32) -> bool {
        match self {
            Self::Function(granted) => granted == function,
            Self::Model { vendor: v, device: d } => (*v, *d) == (vendor, device),
            Self::Class(granted) => u32::from(*granted) == class >> 8,
        }
    }
}

impl<'de> Deserialize<'de> for DeviceGrant {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::parse(&text).ok_or_else(|| {
            serde::de::Error::custom("a PCI function (\"0000:65:00.0\"), vendor and device (\"10de:2330\") or a class (\"class:0302\") is needed")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_granted_by_place_model_or_class_and_by_nothing_else() {
        let gpu = Bdf::new("0000:65:00.0").unwrap();
        for text in ["0000:65:00.0", "10de:2330", "class:0302"] {
            assert!(DeviceGrant::parse(text).unwrap().covers(&gpu, 0x10de, 0x2330, 0x03_0200), "{text}");
        }
        for text in ["0000:65:00.1", "10de:2331", "10df:2330", "class:0300"] {
            assert!(!DeviceGrant::parse(text).unwrap().covers(&gpu, 0x10de, 0x2330, 0x03_0200), "{text}");
        }
        for text in ["", "*", "10de:*", "10DE:2330", "10de:+233", "class:03", "class:030200", "65:00.0"] {
            assert_eq!(DeviceGrant::parse(text), None, "{text}");
        }
    }
}
