//! Virtual machines: slots, and the QEMU in each.
//!
//! | file        | operation                     |                                                              |
//! |-------------|-------------------------------|--------------------------------------------------------------|
//! | `claim`     | `vm.claim`                    | a slot: a number, a user, a directory                        |
//! | `spawn`     | `vm.spawn`                    | QEMU in it                                                   |
//! | `attach`    | `vm.attach`, `vm.console`     | fresh connections to a QEMU that runs                        |
//! | `signal`    | `vm.signal`                   | ends it from outside                                         |
//! | `release`   | `vm.release`                  | undoes all of it                                             |
//! | `inventory` | `host.inventory`              | what there is                                                |
//! | `adopt`     | (at start)                    | finds again what an earlier supervisor made                  |
//! | `watch`     | (event `vm.exited`)           | sees QEMU end                                                |
//! | `argv`      |                               | the argument vector, from a typed specification              |
//! | `jail`      |                               | what a program is started in, and how                        |
//! | `companion` | (event `vm.impaired`)         | programs beside QEMU, each in a jail of its own              |
//! | `lingering` |                               | killed processes that do not end                             |
//! | `ability`   |                               | what a granted QEMU can do                                   |
//! | `scope`     |                               | its systemd unit, with the limits that the kernel keeps      |
//! | `stage`     |                               | what of it is started in a rehearsal                         |
//! | `sockets`   |                               | QEMU's monitor and console sockets                           |
//!
//! Every operation reads: **vet, record, act** (audit and reply stand around all of them, in `dispatch`).

pub mod ability;
pub mod adopt;
pub mod argv;
pub mod attach;
pub mod claim;
pub mod companion;
pub mod inventory;
pub mod jail;
pub mod lingering;
pub mod release;
pub mod scope;
pub mod signal;
pub mod sockets;
pub mod spawn;
pub mod stage;
pub mod watch;
