//! The harness: whole Diarchs that live in a directory and die with a test.
//!
//! ```text
//!   a test ----- Host ------------------- diarch-stand-in (its own process, a subreaper)
//!     |            |                          |            |            \
//!     |            |  control socket          |            |             +-- QEMUs, when the supervisor died
//!     |            +--------------------------+            |
//!     |  wire: speaks the contract by hand    |            +-- diarch-worker      (no privileges)
//!     +---------------------------------------+-- diarch-supervisor  (root)
//!     |  stepper: kills it at its n-th system call
//! ```
//!
//! | module     | noun                                                                                        |
//! |------------|---------------------------------------------------------------------------------------------|
//! | `need`     | what a test can't do without, and the named skip when it is not there                       |
//! | `stand_in` | the service manager that respawns the halves where there is no systemd                      |
//! | `host`     | one whole Diarch in a directory, and the inventory that shows what was left behind          |
//! | `machine`  | a Debian that was booted by a real systemd, with the package installed                      |
//! | `lab`      | a Debian on an emulated machine, with devices to pass on and KVM                            |
//! | `puppet`   | a worker without a will, in the worker's unit: asks what the test tells it to ask           |
//! | `netns`    | networks of a test's own, and guests that are played by the test                            |
//! | `stage`    | a host's devices as a tree of files, and somebody who plays the kernel in it                |
//! | `wire`     | connections under another user id, and frames that no honest worker sends                   |
//! | `chaos`    | random operations and random deaths, and three accounts of the host compared after each round |
//! | `stepper`  | kills a process at one chosen system call                                                   |
//! | `undying`  | a process that is killed and does not end                                                   |

pub mod chaos;
pub mod host;
pub mod lab;
pub mod machine;
pub mod need;
pub mod netns;
pub mod puppet;
pub mod stage;
pub mod stand_in;
pub mod stepper;
pub mod undying;
pub mod wire;
