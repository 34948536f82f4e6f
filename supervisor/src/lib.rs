//! The privileged half of Diarch. It holds no policy: it does what is in the table of `diarch_ipc::operation`, for one
//! authenticated peer, inside what root wrote into the grants.
//!
//! ```text
//!   listen -> server -> dispatch -> vm::* : vet, record, act
//!             peer?     limits,     |        |      |
//!             Hello     audit       Vetted   ledger helper threads, jail
//! ```
//!
//! | module                 | noun                                                          |
//! |------------------------|---------------------------------------------------------------|
//! | `grants`               | what root allows                                              |
//! | `listen`, `server`     | the socket and its connections                                |
//! | `session`              | which worker is the present one                               |
//! | `dispatch`             | one request's way: limits, audit, handler, audit              |
//! | `vetted`               | the type that only a `vet` function can make                  |
//! | `vm`                   | slots and the QEMU in each                                    |
//! | `vfio`                 | PCI devices given to a VM                                     |
//! | `net`                  | taps, published ports, privileged ports                       |
//! | `mount`                | what is mounted for a VM, and nowhere else                    |
//! | `socket`               | connections to granted sockets                                |
//! | `path`                 | a path of the grants, walked so that nobody can lead it astray |
//! | `host`                 | the machine that is acted on, or a stage in its place         |
//! | `fd`, `qemu`, `kvm`    | what comes from outside, looked at before it is used          |
//! | `ledger`               | what exists, written down before it does                      |
//! | `audit`                | who asked for what, and what came of it                       |
//! | `limiter`, `helper`    | bounds: requests a second; threads that may wait on the kernel |
//! | `pool`, `closer`       | threads that are kept for their next work; one such work      |
//! | `privilege`, `process` | what the supervisor gives up; processes by pidfd              |

// Unsafe code is where system calls have no safe wrapper, each place by its own `allow`: vm::jail, mount::image, kvm, process, listen, main.
#![deny(unsafe_code)]

pub mod audit;
pub mod closer;
pub mod dispatch;
pub mod fd;
pub mod grants;
pub mod helper;
pub mod host;
pub mod kvm;
pub mod ledger;
pub mod limiter;
pub mod listen;
pub mod mount;
pub mod net;
pub mod path;
pub mod pool;
pub mod privilege;
pub mod process;
pub mod qemu;
pub mod run;
pub mod server;
pub mod session;
pub mod socket;
pub mod state;
pub mod usage;
pub mod vetted;
pub mod vfio;
pub mod vm;
