//! `[network.NAME]` and `[ports]`: where a tap may be plugged in, and which ports of the host may lead to it.

use super::PortRange;
use serde::Deserialize;

/// One network: either a bridge of the host's, or routed.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The name of a bridge that root made.
    pub bridge: Option<String>,
    /// An IPv4 range of its own, `"10.77.0.0/20"`: each card gets an address of it, and the host routes.
    pub routed: Option<String>,
    /// Whether packets of a routed network leave the host under its own address.
    #[serde(default)]
    pub masquerade: bool,
    /// Whether guests may reach the host itself (beyond a ping of their gateway).
    #[serde(default)]
    pub host: bool,
    /// Whether guests may reach link-local addresses, where clouds keep a machine's credentials.
    #[serde(default)]
    pub metadata: bool,
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
