//! The network of VMs, in the host's own namespace.

pub mod port;
pub mod publish;
pub mod tap;
