//! Of mounts, and of connections to granted sockets.

use crate::name::{ShareName, SocketName, Tenancy};
use crate::spec::DiskAccess;
use serde::{Deserialize, Serialize};

/// Asks for something granted to be mounted for this VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachMount {
    pub tenancy: Tenancy,
    pub share: ShareName,
    pub access: DiskAccess,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountAttached {}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetachMount {
    pub tenancy: Tenancy,
    pub share: ShareName,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountDetached {
    /// False: it was not attached.
    pub existed: bool,
}

/// Asks for a connection to a granted socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectSocket {
    pub socket: SocketName,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SocketConnected {}
