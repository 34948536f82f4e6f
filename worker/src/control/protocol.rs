//! What the `diarch` command and the worker say to each other over `/run/diarch/worker.sock`.
//!
//! A stream socket, one JSON value a line. The command sends one [`Request`]; the worker answers with any number of [`Reply`] lines, the last of
//! which is `Done` or `Error` (`Console` is the exception: after it both directions carry the console's raw bytes). Who may connect is
//! the socket's owner, group and mode.

use diarch_ipc::name::{Bdf, Label, Port};
use diarch_ipc::operation::{DeviceRecord, KvmVerdict};
use serde::{Deserialize, Serialize};

/// A request line is at most this long.
pub const MAX_LINE: usize = 64 * 1024;

/// What the command asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Replies `Vms`, in name order; before it `Notice`, where the supervisor can't be reached.
    VmList {},
    /// Replies `Vm`.
    VmShow {
        name: String,
    },
    /// Each of these replies `Progress` lines until the VM is where it was asked to be (or, with `wait: false`, at once).
    VmStart {
        name: String,
        wait: bool,
    },
    VmStop {
        name: String,
        wait: bool,
    },
    VmRestart {
        name: String,
        wait: bool,
    },
    VmKill {
        name: String,
        wait: bool,
    },
    /// Replies `Console`, and then raw bytes both ways until one side closes.
    VmConsole {
        name: String,
    },
    /// Replies `Log` lines: the last `lines`, and with `follow` all that come.
    VmLogs {
        name: String,
        source: LogSource,
        lines: u32,
        follow: bool,
    },
    /// Replies `Devices`; before it `Notice`, where the answer is not whole.
    DeviceList {},
    /// As `VmRestart`, of the VM that has this device or names it in its file, with its devices reset in between.
    DeviceRecover {
        function: String,
        wait: bool,
    },
    /// Replies `Plan`.
    Plan {},
    /// Replies `Event` lines: the last `last`, and with `follow` all that come.
    Events {
        last: u32,
        follow: bool,
    },
    /// Replies `Status`.
    Status {},
    /// Replies `Rights`: what the service manager lets the worker's user do, tried without effect.
    Rights {},
}

/// Which of a VM's logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogSource {
    /// What the guest wrote to its serial console.
    Console,
    /// What QEMU itself wrote.
    Qemu,
}

/// What the worker answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reply {
    /// Said before the answer: one sentence about how far it can be trusted.
    Notice {
        message: String,
    },
    Vms(Vec<VmView>),
    Vm(Box<VmView>),
    Devices(Vec<DeviceView>),
    Progress(Progress),
    Console {},
    Log {
        line: String,
    },
    Plan(PlanView),
    Event(EventView),
    Status(Box<StatusView>),
    Rights(RightsView),
    Done {},
    Error(Failure),
}

/// Why a request was not done; `kind` decides the command's exit code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    pub kind: FailureKind,
    /// One sentence for people.
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// Exit code 1.
    Failed,
    /// Exit code 2.
    Usage,
    /// Exit code 3.
    NotFound,
    /// Exit code 4.
    Denied,
    /// Exit code 5.
    Conflict,
    /// Exit code 6: the worker is there and its supervisor isn't.
    Unreachable,
}

/// Where a VM is in its life, as the worker sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The supervisor has not been reached since this worker started: whether it runs is not known.
    Unknown,
    /// Not running, and not meant to.
    Stopped,
    /// Claimed or being spawned.
    Starting,
    /// QEMU runs; its health is not known yet.
    Booting,
    /// Its probe answers (or QEMU runs, where no probe is configured).
    Healthy,
    /// Its probe stopped answering.
    Unhealthy,
    /// On its way down.
    Stopping,
    /// It failed, and is started again when its pause is over.
    BackOff,
    /// It failed too often, or can't be started as it is written: an operator's `start` or a changed file tries again.
    Failed,
}

/// One VM as the command shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmView {
    pub name: Label,
    /// The file that defines it; none: it runs, and its file is gone.
    pub file: Option<String>,
    pub enabled: bool,
    pub phase: Phase,
    /// One sentence: why it is in this phase (the last failure, the operator who stopped it, ...).
    pub reason: Option<String>,
    pub slot: Option<u16>,
    pub pid: Option<u32>,
    pub accelerator: Option<String>,
    pub cpus: Option<u16>,
    pub memory_mib: Option<u32>,
    /// The host's ports that lead into it, by QEMU or (with a tap) by the packet filter.
    pub forwards: Vec<ForwardView>,
    /// None: it has QEMU's user-mode network.
    pub tap: Option<TapView>,
    pub devices: Vec<Bdf>,
    pub shares: Vec<ShareView>,
    /// When the present QEMU started, milliseconds since 1970.
    pub started_ms: Option<u64>,
    /// When it last became healthy, milliseconds since 1970.
    pub healthy_ms: Option<u64>,
    /// Starts after a failure, since the worker first saw this VM.
    pub restarts: u32,
    /// Reboots that the guest made by itself within the present QEMU.
    pub guest_reboots: u32,
    /// How the previous QEMU ended.
    pub last_exit: Option<String>,
    /// In `BackOff`: when it is tried again, milliseconds since 1970.
    pub retry_ms: Option<u64>,
    /// The probe, in words: `http :8080/`.
    pub health: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForwardView {
    pub protocol: String,
    pub host_address: String,
    pub host_port: Port,
    pub guest_port: Port,
}

/// What of the tap the file says, and (with a name) what of it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapView {
    pub network: String,
    pub queues: u16,
    pub name: Option<String>,
    /// The guest's.
    pub address: Option<String>,
    /// The host's end, on a routed network.
    pub gateway: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareView {
    pub share: String,
    pub tag: String,
    pub access: diarch_ipc::spec::DiskAccess,
}

/// A PCI function that the supervisor has taken from its driver, or that a VM file names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceView {
    pub function: Bdf,
    /// `free` (the host's), `reserved`, `bound`, `attached`, `resetting`, `quarantined`.
    pub state: String,
    /// Which VM has it.
    pub vm: Option<Label>,
    /// The enabled VMs whose files name it.
    pub wanted_by: Vec<Label>,
    // What the supervisor says of one that it has.
    pub group: Option<u32>,
    /// `10de:2330`.
    pub model: Option<String>,
    /// Class, subclass and programming interface: `030200`.
    pub class: Option<String>,
    pub mmio_mib: Option<u64>,
    pub resettable: Option<bool>,
    /// How a VM has it, while one runs with it: `group` (its node) or `iommufd` (descriptors).
    pub passing: Option<String>,
    /// Why it is quarantined.
    pub trouble: Option<String>,
}

/// A step on the way of a start or stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    pub name: Label,
    pub phase: Phase,
    pub message: String,
    /// Since the request, in milliseconds.
    pub elapsed_ms: u64,
}

/// What would be changed now, and what is wrong with the files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanView {
    pub steps: Vec<PlanStep>,
    pub problems: Vec<FileProblem>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanStep {
    pub name: Label,
    /// `start`, `stop`, `restart`, `adopt`, `keep`, `release`.
    pub action: String,
    /// Why, field by field where it is a change.
    pub reasons: Vec<String>,
}

/// What is wrong with a VM file. `path` is the JSON path of the field, `$` for the whole file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileProblem {
    pub file: String,
    pub path: String,
    pub line: Option<u32>,
    pub reason: String,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventView {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    pub vm: Option<Label>,
    /// `vm.spawned`, `vm.healthy`, `vm.exited`, `vm.guest-reboot`, `supervisor.lost`, ...
    pub kind: String,
    pub message: String,
}

/// The state of both halves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatusView {
    pub worker_version: String,
    pub worker_started_ms: u64,
    pub worker_uid: u32,
    pub worker_pid: u32,
    /// The client's state in words: `ready`, `connecting`, `lost: ...`, `restarting (attempt 2)`.
    pub supervisor_state: String,
    /// What the supervisor last said of itself; none while it was never reached.
    pub supervisor: Option<SupervisorView>,
    pub uses: Uses,
    pub configs_dir: String,
    pub log_directory: String,
    pub problems: Vec<FileProblem>,
}

/// How many of the enabled VMs need what of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Uses {
    pub user_networks: u32,
    pub taps: u32,
    /// Of the taps, those that are known to be on a routed network: that is seen when they are opened.
    pub routed: u32,
    pub devices: u32,
    pub shares: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SupervisorView {
    pub version: String,
    pub kernel: String,
    pub started_ms: u64,
    pub kvm: KvmVerdict,
    /// What `accel: auto` means now, and why.
    pub accelerator: String,
    pub qemu: Vec<diarch_ipc::operation::QemuGrant>,
    pub limits: diarch_ipc::operation::Limits,
    pub vms_total: u32,
    /// At most [`diarch_ipc::operation::HostInventory::DEVICES`] of them.
    pub devices: Vec<DeviceRecord>,
    pub audit: diarch_ipc::operation::AuditState,
}

/// How the worker would restart the supervisor, and what came of trying its rights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum RightsView {
    Systemd(Vec<RightView>),
    /// A program of the settings: what it may do is not known here.
    Command {
        program: String,
    },
}

/// One thing that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RightView {
    /// `restart of diarch-supervisor.service`.
    pub what: String,
    pub need: Need,
    pub verdict: RightVerdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// The worker needs it.
    Needed,
    /// The worker must not have it.
    Excess,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum RightVerdict {
    Allowed,
    Refused {
        reason: String,
    },
    /// It could not be tried.
    Unknown {
        reason: String,
    },
}
