//! The contract between the two halves of Diarch.
//!
//! ```text
//!   diarch-worker                                     diarch-supervisor
//!   -------------                                     -----------------
//!   Client::call(Request, fds)                        one handler per Request, by exhaustive match
//!        |                                                 ^
//!        |   one SEQPACKET message = one frame = its fds   |
//!        +--> ClientFrame::Hello / Call  ------------------+
//!        <--- ServerFrame::Hello / Refused / Reply / Event
//! ```
//!
//! | module      | noun                                                                     |
//! |-------------|--------------------------------------------------------------------------|
//! | `name`      | the values a message may carry: slots, labels, ports, MiB ... never a path |
//! | `spec`      | what one virtual machine is made of                                      |
//! | `operation` | **the table**: every operation root can be asked for, declared once      |
//! | `error`     | the closed set of refusals and failures                                  |
//! | `frame`     | how a message is encoded, and everything that makes one hostile          |
//! | `channel`   | a connected socket that carries frames with file descriptors             |
//! | `peer`      | who is at the other end, in the kernel's word                            |
//! | `client`    | the worker's end: states, deadlines, "ask twice, get once"               |

#![forbid(unsafe_code)]

pub mod channel;
pub mod client;
pub mod error;
pub mod frame;
pub mod log;
pub mod name;
pub mod operation;
pub mod peer;
pub mod received;
pub mod spec;

pub use error::Error;
pub use operation::{Event, OPERATIONS, Operation, Reply, Request};

/// Where the supervisor listens unless told otherwise.
pub const SUPERVISOR_SOCKET: &str = "/run/diarch/supervisor.sock";
/// The version of the wire contract. Raised when a frame of the older version can't be understood any more.
pub const PROTOCOL: u32 = 1;
/// The release both halves are built from.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
