//! PCI devices given to a VM, by VFIO.

pub mod bind;
pub mod recover;
pub mod release;
