//! PCI devices given to a VM, by VFIO. What is given is an IOMMU group: the smallest set of functions that the hardware keeps apart from the rest.
//!
//! ```text
//!   vfio.bind     facts   the whole group, and all that the host has on it, from live state    (device thread; changes nothing)
//!                 vet     pure: request x grants x records x facts -> Vetted<Record>           (`critical`: what the host lives on)
//!                 record  /run/diarch/device/GROUP.json: the drivers that it is taken from
//!                 act     override, unbind, probe, look again, wait for the node; or all of it back, in reverse   (device thread)
//!                 record  bound
//!   vm.spawn      attached: as descriptors (`iommufd`), or the node is opened to the VM's user, and to nobody else   (`attach`)
//!   QEMU ends     a node is closed again; what nobody holds any more and answers is bound, all else is quarantined
//!   vfio.release  back to the drivers that it was taken from
//! ```
//!
//! | file       | operation / noun  |                                                                      |
//! |------------|-------------------|----------------------------------------------------------------------|
//! | `bind`     | `vfio.bind`       | a group is taken                                                     |
//! | `release`  | `vfio.release`    | and given back                                                       |
//! | `recover`  | `vfio.recover`    | and reset                                                            |
//! | `attach`   | (in `vm.spawn`)   | and given to a QEMU                                                  |
//! | `adopt`    | (at start)        | what an earlier supervisor took                                      |
//! | `devices`  |                   | the groups that are taken, and a lock for each                       |
//! | `record`   |                   | what is written down of one                                          |
//! | `facts`    |                   | what there is, read from the kernel                                  |
//! | `openers`  |                   | which processes have a device's nodes open                           |
//! | `critical` |                   | what the host lives on                                               |
//! | `sysfs`    |                   | the kernel's files that are written                                  |
//! | `node`     |                   | `/dev/vfio/GROUP`, and who may open it                               |
//! | `iommufd`  |                   | `/dev/iommu` and the functions' own nodes, as descriptors            |
//! | `held`     |                   | whether somebody has a device whose VM has ended                     |
//! | `thread`   |                   | where a step may hang, and nothing else hangs with it                |

pub mod adopt;
pub mod attach;
pub mod bind;
pub mod critical;
pub mod devices;
pub mod facts;
pub mod held;
pub mod iommufd;
pub mod node;
pub mod openers;
pub mod record;
pub mod recover;
pub mod release;
pub mod sysfs;
pub mod thread;

pub use attach::Passed;
pub use devices::Devices;
