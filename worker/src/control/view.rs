//! What the command shows, from what the worker knows.

use super::protocol::{ForwardView, Phase, RightsView, StatusView, SupervisorView, VmView};
use crate::config::RestartSupervisor;
use crate::supervisor::describe;
use crate::systemd::Systemd;
use crate::worker::{Shown, Worker};
use diarch_ipc::client::State;
use diarch_ipc::operation::{HostInventory, KvmVerdict};
use diarch_ipc::spec::Accelerator;
use std::time::Duration;
use tokio::time::timeout;

/// A status is shown now; a supervisor that takes longer is shown as it was last seen.
const INVENTORY: Duration = Duration::from_secs(2);
/// For all that is tried of systemd together. The first question may have to wait for polkit to be started.
const RIGHTS: Duration = Duration::from_secs(5);

pub fn vm(shown: Shown) -> VmView {
    let Shown { name, desired, status, held, unusable, known } = shown;
    // Where a broken file told nothing yet: what runs was enabled.
    let enabled = desired.as_ref().map_or(unusable.is_some(), |vm| vm.enabled);
    let file = unusable.as_ref().and(status.as_ref()).and_then(|status| status.file.clone());
    let phase = status.as_ref().map_or(if known { Phase::Stopped } else { Phase::Unknown }, |status| status.phase);
    let mut reason = status.as_ref().and_then(|status| status.reason.clone());
    if phase == Phase::Unknown {
        reason = Some("the supervisor has not been reached since the worker started; QEMUs that ran run on: systemctl list-units 'diarch-vm-*'".into());
    } else if phase == Phase::Stopped {
        let disabled = desired.as_ref().filter(|vm| !vm.enabled).map(|vm| format!("it is disabled in {}", vm.file));
        reason = held.or(disabled).or(reason);
    } else if reason.is_none() {
        reason = desired.as_ref().and_then(|vm| vm.warnings.first().cloned());
    }
    if let Some(refused) = status.as_ref().and_then(|status| status.refused.as_ref()) {
        reason = Some(reason.map_or_else(|| refused.sentence.clone(), |reason| format!("{reason}; {}", refused.sentence)));
    }
    if let Some(unusable) = unusable {
        let meanwhile = match phase {
            Phase::Booting | Phase::Healthy | Phase::Unhealthy => "the VM runs on as it was started",
            Phase::Unknown | Phase::Stopped | Phase::Starting | Phase::Stopping | Phase::BackOff | Phase::Failed => "what it said last counts",
        };
        let unusable = format!("{unusable}; {meanwhile}");
        reason = Some(reason.map_or_else(|| unusable.clone(), |reason| format!("{reason}; {unusable}")));
    }
    // What runs is shown as it runs, and not as its file has become since.
    let machine = status.as_ref().and_then(|status| status.machine.as_deref()).or(desired.as_ref().map(|vm| &vm.machine)).cloned();
    VmView {
        name,
        file: desired.as_ref().map(|vm| vm.file.clone()).or(file),
        enabled,
        phase,
        reason,
        slot: status.as_ref().and_then(|status| status.tenancy).map(|tenancy| tenancy.slot.get()),
        pid: status.as_ref().and_then(|status| status.pid),
        accelerator: status.as_ref().and_then(|status| status.accelerator).map(|accelerator| match accelerator {
            Accelerator::Kvm => "kvm".into(),
            Accelerator::Tcg => "tcg".into(),
        }),
        cpus: machine.as_ref().map(|machine| machine.cpus.get()),
        memory_mib: machine.as_ref().map(|machine| machine.memory.get()),
        forwards: machine.iter().flat_map(|machine| &machine.forwards).map(forward).collect(),
        started_ms: status.as_ref().and_then(|status| status.started_ms),
        healthy_ms: status.as_ref().and_then(|status| status.healthy_ms),
        restarts: status.as_ref().map_or(0, |status| status.restarts),
        guest_reboots: status.as_ref().map_or(0, |status| status.guest_reboots),
        last_exit: status.as_ref().and_then(|status| status.last_exit.clone()),
        retry_ms: status.as_ref().and_then(|status| status.retry_ms),
        health: desired.and_then(|vm| vm.health).map(|health| health.probe.to_string()),
    }
}

fn forward(forward: &diarch_ipc::name::Forward) -> ForwardView {
    ForwardView {
        protocol: forward.protocol.to_string(),
        host_address: forward.host_address.to_string(),
        host_port: forward.host_port,
        guest_port: forward.guest_port,
    }
}

/// How the worker stands to the supervisor, without asking it.
pub fn supervisor_state(worker: &Worker) -> String {
    match &*worker.link.state().borrow() {
        State::Connecting => "connecting".into(),
        State::Ready { .. } => "ready".into(),
        State::Lost { reason } => format!("lost: {reason}"),
        State::Restarting { attempt } => format!("restarting (attempt {attempt})"),
        State::GaveUp { reason } => format!("gave up: {reason}"),
    }
}

pub async fn status(worker: &Worker) -> StatusView {
    // Fills the facts; what it says of VMs is not asked here.
    let _ = timeout(INVENTORY, worker.link.inventory()).await;
    let supervisor = worker.link.facts().borrow().clone().map(supervisor);
    StatusView {
        worker_version: diarch_ipc::VERSION.into(),
        worker_started_ms: worker.started_ms,
        worker_uid: rustix::process::geteuid().as_raw(),
        worker_pid: std::process::id(),
        supervisor_state: supervisor_state(worker),
        supervisor,
        configs_dir: worker.config.configs_dir.display().to_string(),
        log_directory: worker.config.log_directory.display().to_string(),
        problems: worker.problems(),
    }
}

/// What the worker's user may do, tried now.
pub async fn rights(worker: &Worker) -> RightsView {
    match &worker.config.restart_supervisor {
        RestartSupervisor::Systemd => RightsView::Systemd(Systemd::default().rights(RIGHTS).await),
        RestartSupervisor::Command(command) => RightsView::Command { program: command.first().cloned().unwrap_or_default() },
    }
}

fn supervisor(facts: HostInventory) -> SupervisorView {
    let accelerator = match &facts.kvm {
        KvmVerdict::Usable => "kvm: a tiny guest ran on it".into(),
        other => format!("tcg, many times slower: KVM is {}", describe(other)),
    };
    SupervisorView {
        version: facts.version,
        kernel: facts.kernel,
        started_ms: facts.started_ms,
        kvm: facts.kvm,
        accelerator,
        qemu: facts.qemu,
        limits: facts.limits,
        vms_total: facts.vms_total,
        audit: facts.audit,
    }
}
