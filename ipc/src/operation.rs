//! **The table.** Everything that root can be asked to do, declared once.
//!
//! A new operation is one entry of `operations!` below. From it come the `Request` and `Reply` enums (so that dispatch
//! in the supervisor is an exhaustive `match` that stops compiling until the operation is handled), the printed table
//! (`diarch-supervisor operations`, `docs/OPERATIONS.md`), the table hash that both halves compare in their `Hello`, and
//! the hostile requests of the tests, which start from each operation's example.

mod device;
mod host;
mod mount;
mod network;
mod vm;

pub use device::*;
pub use host::*;
pub use mount::*;
pub use network::*;
pub use vm::*;

use crate::name::{
    Bdf, Cpus, Forward, IpText, Label, Mac, MiB, NetworkName, NicIndex, Port, Protocol, Queues, RequestId, ShareName, Slot, SocketName, Tenancy,
};
use crate::spec::FdRole;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// How often an operation may be asked, and what asking twice means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Changes nothing: may always be repeated.
    Read,
    /// Brings about a state: repeating it finds the state and answers the same.
    Ensure,
    /// Has an effect each time it is asked *anew*. The request id is kept in the ledger, so that the same request
    /// repeated gets the same answer and no second effect.
    Once,
}

/// What an operation does to the worker's power over the host; decides what happens when it can't be audited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// Shows something. Goes on without an audit, counted: an operator must be able to see what is wrong.
    Observe,
    /// Hands something out. Fails closed without an audit.
    Grant,
    /// Takes something back. Goes on without an audit, counted: stopping must always be possible.
    Revoke,
}

/// The states of a slot (and of the VM in it).
///
/// ```text
///              vm.claim           vm.spawn                    QEMU ends
///   (free) ------------> claimed ---------> spawning -> running -------> exited
///      ^                    |  ^                |                          |  |
///      |                    |  +-- not started -+                          |  +-- vm.spawn --> spawning
///      +---- vm.release ----+--------------------------- vm.release -------+
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotState {
    Claimed,
    Spawning,
    Running,
    Exited,
    Releasing,
    /// A step of the kernel's or QEMU's did not end: nothing but `vm.signal` and `vm.release` is tried any more.
    Quarantined,
}

impl SlotState {
    pub const fn as_str(self) -> &'static str {
        match self {
            SlotState::Claimed => "claimed",
            SlotState::Spawning => "spawning",
            SlotState::Running => "running",
            SlotState::Exited => "exited",
            SlotState::Releasing => "releasing",
            SlotState::Quarantined => "quarantined",
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Operation {
    pub name: &'static str,
    pub class: Class,
    pub effect: Effect,
    /// The Linux capabilities without which the supervisor can't do it.
    pub capability: &'static [&'static str],
    /// The states of the slot in which it is legal; empty where no slot is concerned.
    pub states: &'static [SlotState],
    /// The file descriptors that come with the request, in this order; `?` may be absent, `*` may repeat.
    pub fds_in: &'static [&'static str],
    /// The file descriptors that come with the reply, in this order.
    pub fds_out: &'static [&'static str],
    /// Fields that are never shown in the audit or a log.
    pub secret_fields: &'static [&'static str],
    /// The grants that must allow it; empty where being the granted worker is enough.
    pub grant: &'static [&'static str],
    /// Why it must be root.
    pub reason: &'static str,
    /// The longest that the supervisor works on it, in milliseconds.
    pub deadline_ms: u32,
}

/// Every operation's request gives one of these: what the table's tests, its hash and the hostile requests start from.
pub trait Example {
    fn example() -> Self;
}

macro_rules! operations {
    ($( $variant:ident ($name:literal): $request:ident => $reply:ident { $($field:ident: $value:expr),* $(,)? } )*) => {
        /// A request: exactly one operation and its arguments.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub enum Request {
            $( #[serde(rename = $name)] $variant($request), )*
        }

        /// The answer to the request of the same name.
        // One reply lives at a time and is moved once: boxing the inventory would cost more than it saves.
        #[allow(clippy::large_enum_variant)]
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub enum Reply {
            $( #[serde(rename = $name)] $variant($reply), )*
        }

        /// The whole list.
        pub const OPERATIONS: &[Operation] = &[
            $( Operation { name: $name, $($field: $value),* }, )*
        ];

        impl Request {
            /// The row of the table that this is a request for.
            pub fn operation(&self) -> &'static Operation {
                match self {
                    $( Request::$variant(_) => { const ROW: &Operation = &Operation { name: $name, $($field: $value),* }; ROW } )*
                }
            }
            /// One well-formed request for each operation.
            pub fn examples() -> Vec<Request> {
                vec![ $( Request::$variant($request::example()), )* ]
            }
        }

        impl Reply {
            /// One well-formed reply for each operation.
            pub fn examples() -> Vec<Reply> {
                vec![ $( Reply::$variant($reply::example()), )* ]
            }
        }

        $(
            impl Ask for $request {
                type Reply = $reply;
                fn into_request(self) -> Request { Request::$variant(self) }
                fn from_reply(reply: Reply) -> Option<$reply> {
                    match reply { Reply::$variant(reply) => Some(reply), #[allow(unreachable_patterns)] _ => None }
                }
            }
        )*
    };
}

/// A request type together with the type of its answer.
pub trait Ask {
    type Reply;
    fn into_request(self) -> Request;
    /// `None`: the other end answered another question.
    fn from_reply(reply: Reply) -> Option<Self::Reply>;
}

operations! {
    HostInventory("host.inventory"): Inventory => HostInventory {
        class: Class::Read,
        effect: Effect::Observe,
        capability: &[],
        states: &[],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &[],
        reason: "Only the supervisor knows what it owns, what it adopted after a restart, and what its audit says.",
        deadline_ms: 1_000,
    }
    VmClaim("vm.claim"): Claim => Claimed {
        class: Class::Once,
        effect: Effect::Grant,
        capability: &[],
        states: &[],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &["vms.max", "vms.uid_first"],
        reason: "A slot is a user id and a directory that no other VM shares, and both are root's to give.",
        deadline_ms: 2_000,
    }
    VmRelease("vm.release"): Release => Released {
        class: Class::Ensure,
        effect: Effect::Revoke,
        capability: &["CAP_KILL"],
        states: &[SlotState::Claimed, SlotState::Spawning, SlotState::Running, SlotState::Exited, SlotState::Releasing, SlotState::Quarantined],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &[],
        reason: "Undoes all that stands under a slot, in reverse: a process of another user is ended, root's directory is removed.",
        // What is killed may take 8 s to end, and what ran beside it as long; the packet filter 5 s; devices are waited for 30 s, and go on by themselves.
        deadline_ms: 60_000,
    }
    VmSpawn("vm.spawn"): Spawn => Spawned {
        class: Class::Once,
        effect: Effect::Grant,
        capability: &["CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"],
        states: &[SlotState::Claimed, SlotState::Exited],
        fds_in: &["log", "console", "kernel?", "initrd?", "firmware?", "disk*"],
        fds_out: &["pidfd", "qmp"],
        secret_fields: &[],
        grant: &["qemu", "vms.memory_mib", "vms.cpus_each", "vms.kvm", "forwards.allow", "forwards.egress", "network", "passt", "virtiofsd"],
        reason: "QEMU runs under a user id of its own, which only root can give it; so a VM that escapes finds nothing of another's.",
        deadline_ms: 10_000,
    }
    VmAttach("vm.attach"): Attach => Attached {
        class: Class::Ensure,
        effect: Effect::Grant,
        capability: &[],
        states: &[SlotState::Running],
        fds_in: &[],
        fds_out: &["pidfd", "qmp"],
        secret_fields: &[],
        grant: &[],
        reason: "A respawned worker needs the two descriptors that its predecessor lost; the monitor socket lies in root's directory.",
        deadline_ms: 2_000,
    }
    VmConsole("vm.console"): Console => ConsoleOpened {
        class: Class::Ensure,
        effect: Effect::Grant,
        capability: &[],
        states: &[SlotState::Running],
        fds_in: &[],
        fds_out: &["console"],
        secret_fields: &[],
        grant: &[],
        reason: "The serial console's socket lies in root's directory, where QEMU's user can't replace it.",
        deadline_ms: 2_000,
    }
    VmSignal("vm.signal"): Signal => Signalled {
        class: Class::Ensure,
        effect: Effect::Revoke,
        capability: &["CAP_KILL"],
        states: &[SlotState::Running, SlotState::Exited, SlotState::Quarantined],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &[],
        reason: "QEMU runs as another user, whom the worker can't signal.",
        deadline_ms: 2_000,
    }
    VfioBind("vfio.bind"): Bind => Bound {
        class: Class::Ensure,
        effect: Effect::Grant,
        capability: &["CAP_SYS_PTRACE"],
        states: &[SlotState::Claimed, SlotState::Exited],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &["devices.allow"],
        reason: "Takes a PCI function with its whole IOMMU group from its drivers and gives it to vfio-pci: sysfs files and device nodes are root's.",
        deadline_ms: 60_000,
    }
    VfioRelease("vfio.release"): Unbind => Unbound {
        class: Class::Ensure,
        effect: Effect::Revoke,
        capability: &[],
        states: &[SlotState::Claimed, SlotState::Exited, SlotState::Releasing, SlotState::Quarantined],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &[],
        reason: "Gives the group's functions back to the drivers that they were taken from.",
        deadline_ms: 60_000,
    }
    VfioRecover("vfio.recover"): Recover => Recovered {
        class: Class::Ensure,
        effect: Effect::Grant,
        capability: &[],
        states: &[SlotState::Claimed, SlotState::Exited],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &["devices.allow"],
        reason: "Resets what a dirty exit left behind: a function's reset file is root's.",
        deadline_ms: 60_000,
    }
    TapOpen("tap.open"): OpenTap => TapOpened {
        class: Class::Ensure,
        effect: Effect::Grant,
        capability: &["CAP_NET_ADMIN"],
        states: &[SlotState::Claimed, SlotState::Exited],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &["network"],
        reason: "A network interface, its place on a bridge and its routes are made in the host's network namespace.",
        deadline_ms: 5_000,
    }
    NetPublish("net.publish"): Publish => Published {
        class: Class::Ensure,
        effect: Effect::Grant,
        capability: &["CAP_NET_ADMIN"],
        states: &[SlotState::Claimed, SlotState::Running, SlotState::Exited],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &["network", "ports.publish"],
        reason: "Forwards of the host's ports are rules of the host's packet filter.",
        deadline_ms: 5_000,
    }
    NetWithdraw("net.withdraw"): Withdraw => Withdrawn {
        class: Class::Ensure,
        effect: Effect::Revoke,
        capability: &["CAP_NET_ADMIN"],
        states: &[SlotState::Claimed, SlotState::Spawning, SlotState::Running, SlotState::Exited, SlotState::Releasing, SlotState::Quarantined],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &[],
        reason: "Takes such rules away.",
        deadline_ms: 5_000,
    }
    PortListen("port.listen"): Listen => Listening {
        class: Class::Ensure,
        effect: Effect::Grant,
        capability: &["CAP_NET_BIND_SERVICE"],
        states: &[],
        fds_in: &[],
        fds_out: &["listener"],
        secret_fields: &[],
        grant: &["ports.listen"],
        reason: "Ports below 1024 are root's to bind.",
        deadline_ms: 2_000,
    }
    MountAttach("mount.attach"): AttachMount => MountAttached {
        class: Class::Ensure,
        effect: Effect::Grant,
        capability: &["CAP_SYS_ADMIN"],
        states: &[SlotState::Claimed, SlotState::Exited],
        fds_in: &[],
        fds_out: &["directory?"],
        secret_fields: &[],
        grant: &["mounts"],
        reason: "Only root mounts; nothing of it is seen outside the VM that it is for.",
        deadline_ms: 5_000,
    }
    MountDetach("mount.detach"): DetachMount => MountDetached {
        class: Class::Ensure,
        effect: Effect::Revoke,
        capability: &[],
        states: &[SlotState::Claimed, SlotState::Exited, SlotState::Releasing, SlotState::Quarantined],
        fds_in: &[],
        fds_out: &[],
        secret_fields: &[],
        grant: &[],
        reason: "Takes such a mount away.",
        deadline_ms: 5_000,
    }
    SocketConnect("socket.connect"): ConnectSocket => SocketConnected {
        class: Class::Ensure,
        effect: Effect::Grant,
        capability: &[],
        states: &[],
        fds_in: &[],
        fds_out: &["socket"],
        secret_fields: &[],
        grant: &["sockets"],
        reason: "Some services listen on sockets that are open to root alone.",
        deadline_ms: 2_000,
    }
}

impl Request {
    /// The file descriptors that must come with this very request.
    pub fn fds_in(&self) -> Vec<FdRole> {
        match self {
            Request::VmSpawn(spawn) => spawn.spec.fds(),
            Request::HostInventory(_)
            | Request::VmClaim(_)
            | Request::VmRelease(_)
            | Request::VmAttach(_)
            | Request::VmConsole(_)
            | Request::VmSignal(_)
            | Request::VfioBind(_)
            | Request::VfioRelease(_)
            | Request::VfioRecover(_)
            | Request::TapOpen(_)
            | Request::NetPublish(_)
            | Request::NetWithdraw(_)
            | Request::PortListen(_)
            | Request::MountAttach(_)
            | Request::MountDetach(_)
            | Request::SocketConnect(_) => Vec::new(),
        }
    }

    /// The VM that it speaks of.
    pub fn tenancy(&self) -> Option<Tenancy> {
        match self {
            Request::HostInventory(_) | Request::VmClaim(_) | Request::PortListen(_) | Request::SocketConnect(_) => None,
            Request::VmRelease(r) => Some(r.tenancy),
            Request::VmSpawn(r) => Some(r.tenancy),
            Request::VmAttach(r) => Some(r.tenancy),
            Request::VmConsole(r) => Some(r.tenancy),
            Request::VmSignal(r) => Some(r.tenancy),
            Request::VfioBind(r) => Some(r.tenancy),
            Request::VfioRelease(r) => Some(r.tenancy),
            Request::VfioRecover(r) => Some(r.tenancy),
            Request::TapOpen(r) => Some(r.tenancy),
            Request::NetPublish(r) => Some(r.tenancy),
            Request::NetWithdraw(r) => Some(r.tenancy),
            Request::MountAttach(r) => Some(r.tenancy),
            Request::MountDetach(r) => Some(r.tenancy),
        }
    }
}

/// What the supervisor says without being asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event {
    /// A VM's QEMU ended. The slot stays, with this status, until it is released or spawned anew.
    #[serde(rename = "vm.exited")]
    VmExited { slot: Slot, label: Label, status: ExitStatus, spawn: RequestId },
    /// A step on this slot did not end within its deadline.
    #[serde(rename = "vm.quarantined")]
    VmQuarantined { slot: Slot, label: Label, reason: String },
    /// A program that a VM needs beside its QEMU ended, and QEMU runs on without it.
    #[serde(rename = "vm.impaired")]
    VmImpaired { slot: Slot, label: Label, what: String, spawn: RequestId },
    /// A device does not answer after its VM, or a step on it did not end.
    #[serde(rename = "device.quarantined")]
    DeviceQuarantined { function: Bdf, group: u32, reason: String },
    /// The KVM probe ended.
    #[serde(rename = "host.kvm")]
    HostKvm { verdict: KvmVerdict },
    /// A newer worker said Hello; the receiver has nothing more to say.
    #[serde(rename = "session.superseded")]
    SessionSuperseded {},
}

/// The events with what they carry and mean, for the printed table.
pub const EVENTS: &[(&str, &str, &str)] = &[
    ("vm.exited", "slot, label, status, spawn", "A VM's QEMU ended; the slot keeps the status until it is released or spawned anew."),
    ("vm.quarantined", "slot, label, reason", "A step on this slot did not end within its deadline; only vm.signal and vm.release are tried any more."),
    ("vm.impaired", "slot, label, what, spawn", "A program beside a VM's QEMU (its network, a share) ended; QEMU runs on without it until it is started anew."),
    (
        "device.quarantined",
        "function, group, reason",
        "A device does not answer after its VM, or a step on it did not end; nobody gets it until vfio.recover or vfio.release succeeds.",
    ),
    ("host.kvm", "verdict", "The tiny guest that tells whether KVM works has run."),
    ("session.superseded", "", "A newer worker said Hello; every later request of the older one gets Superseded."),
];

// ---- the table, printed and hashed ----

/// The table as people read it: `docs/OPERATIONS.md` is this text.
pub fn markdown() -> String {
    let list = |items: &[&str]| if items.is_empty() { "-".to_owned() } else { items.join(", ") };
    let mut out = String::from(
        "# Operations\n\n\
         Everything that `diarch-supervisor` (root) can be asked to do. Generated: `diarch-supervisor operations --format markdown`;\n\
         a test fails when this page and the program differ.\n\n\
         **class**: *read* changes nothing; *ensure* may be repeated and finds the state it made; *once* is remembered by its request id in the ledger,\n\
         so that the same request repeated gets the same answer and no second effect.\n\
         **effect**: when the audit can't be written, *grant* fails closed, *observe* and *revoke* go on and are counted.\n\n\
         | name | class | effect | capability | states | fds_in | fds_out | secret_fields | grant | deadline | reason |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in OPERATIONS {
        let states: Vec<&str> = row.states.iter().map(|s| s.as_str()).collect();
        out += &format!(
            "| `{}` | {} | {} | {} | {} | {} | {} | {} | {} | {} ms | {} |\n",
            row.name,
            word(row.class),
            word(row.effect),
            list(row.capability),
            list(&states),
            list(row.fds_in),
            list(row.fds_out),
            list(row.secret_fields),
            list(row.grant),
            row.deadline_ms,
            row.reason
        );
    }
    out += "\n## Events\n\nWhat the supervisor says without being asked, to the active session.\n\n| event | carries | meaning |\n|---|---|---|\n";
    for (name, fields, meaning) in EVENTS {
        out += &format!("| `{name}` | {} | {meaning} |\n", if fields.is_empty() { "-" } else { fields });
    }
    out
}

/// The lower-case word of a unit variant.
pub fn word(of: impl std::fmt::Debug) -> String {
    format!("{of:?}").to_lowercase()
}

/// SHA-256 over the table and over one encoded example of every request and reply, hex: two halves whose tables or
/// message types differ see it in their Hello.
pub fn table_hash() -> String {
    let mut hash = Sha256::new();
    hash.update(markdown());
    for request in Request::examples() {
        hash.update(rmp_serde::to_vec_named(&request).unwrap_or_default());
    }
    for reply in Reply::examples() {
        hash.update(rmp_serde::to_vec_named(&reply).unwrap_or_default());
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

mod examples;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_finds_its_own_row() {
        let examples = Request::examples();
        assert_eq!(examples.len(), OPERATIONS.len());
        for (request, row) in examples.iter().zip(OPERATIONS) {
            assert_eq!(request.operation().name, row.name);
        }
    }

    #[test]
    fn no_generic_verb_is_in_the_table() {
        for row in OPERATIONS {
            for verb in ["run", "exec", "write", "shell", "systemctl", "file", "path"] {
                assert!(!row.name.contains(verb), "{} holds the word {verb}", row.name);
            }
            assert!(row.reason.ends_with('.') && row.deadline_ms > 0);
        }
    }

    #[test]
    fn every_row_that_hands_something_out_names_a_grant_or_a_state() {
        for row in OPERATIONS.iter().filter(|row| row.effect == Effect::Grant) {
            assert!(!row.grant.is_empty() || row.states == [SlotState::Running], "{}", row.name);
        }
    }

    #[test]
    fn the_fds_of_an_example_fit_its_row() {
        for request in Request::examples() {
            let row = request.operation();
            for role in request.fds_in() {
                assert!(row.fds_in.iter().any(|name| name.trim_end_matches(['?', '*']) == role.name), "{}: {}", row.name, role.name);
            }
        }
    }
}
