//! Of taps, published ports and ports that are bound for the worker.

use crate::name::{Forward, IpText, Mac, NetworkName, NicIndex, Port, Protocol, Queues, Tenancy};
use serde::{Deserialize, Serialize};

/// Asks for a tap for one of the VM's network cards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenTap {
    pub tenancy: Tenancy,
    pub nic: NicIndex,
    pub network: NetworkName,
    /// The card's address: frames from the guest with another one are dropped.
    pub mac: Mac,
    /// On a bridged network, the guest's IP address, if the worker knows it: packets with another one are dropped. On a routed network the supervisor gives one.
    pub address: Option<IpText>,
    pub queues: Queues,
}

/// A tap. The supervisor alone holds its queues, until `vm.spawn` moves them into QEMU's jail; it goes with the last of them. One that is gone by then (a supervisor
/// that died in between, a start that failed) is made anew by `vm.spawn`, as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapOpened {
    /// For people: nothing takes it back.
    pub name: String,
    pub mtu: u32,
    /// On a routed network: the guest's address.
    pub address: Option<IpText>,
    /// On a routed network: the host's end.
    pub gateway: Option<IpText>,
}

/// Makes these, and no others, the published ports of one of the VM's network cards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    pub tenancy: Tenancy,
    pub nic: NicIndex,
    pub forwards: Vec<Forward>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {}

/// Takes all of the VM's published ports away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Withdraw {
    pub tenancy: Tenancy,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Withdrawn {
    /// False: nothing was published.
    pub existed: bool,
}

/// Asks for a socket that is bound to a port of the host; for TCP it listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    pub protocol: Protocol,
    pub address: IpText,
    pub port: Port,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listening {}
