//! What the command shows, from what the worker knows.

use super::protocol::{DeviceView, ForwardView, Phase, RightsView, ShareView, StatusView, SupervisorView, TapView, VmView};
use crate::config::RestartSupervisor;
use crate::supervisor::describe;
use crate::systemd::Systemd;
use crate::vm::Status;
use crate::vmfile::Tap;
use crate::worker::{Shown, Worker};
use diarch_ipc::client::State;
use diarch_ipc::name::{Bdf, Label};
use diarch_ipc::operation::{HostInventory, KvmVerdict};
use diarch_ipc::spec::Accelerator;
use std::collections::BTreeMap;
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
        forwards: machine.iter().flat_map(|machine| machine.ports()).map(forward).collect(),
        tap: machine.as_ref().and_then(|machine| machine.tap.as_ref()).map(|wanted| tap(wanted, status.as_ref())),
        devices: machine.as_ref().map_or_else(Vec::new, |machine| machine.devices.clone()),
        shares: machine
            .iter()
            .flat_map(|machine| &machine.shares)
            .map(|of| ShareView { share: of.share.to_string(), tag: of.tag.to_string(), access: of.access })
            .collect(),
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

fn tap(tap: &Tap, status: Option<&Status>) -> TapView {
    let opened = status.and_then(|status| status.tap.as_ref());
    let text = |address: Option<diarch_ipc::name::IpText>| address.map(|address| address.to_string());
    TapView {
        network: tap.network.to_string(),
        queues: tap.queues.get(),
        name: opened.map(|opened| opened.name.clone()),
        address: text(opened.and_then(|opened| opened.address).or(tap.address)),
        gateway: text(opened.and_then(|opened| opened.gateway)),
    }
}

/// All devices that the supervisor has taken and all that VM files name, and what may be missing from the list.
pub async fn devices(worker: &Worker) -> (Vec<DeviceView>, Option<String>) {
    let asked = timeout(INVENTORY, worker.link.inventory()).await;
    let facts = worker.link.facts().borrow().clone();
    let notice = match (&asked, &facts) {
        (Ok(Ok(_)), Some(facts)) if facts.devices_total as usize > facts.devices.len() => {
            Some(format!("{} IOMMU groups are taken, of which the first {} are shown", facts.devices_total, facts.devices.len()))
        }
        (Ok(Ok(_)), _) => None,
        (Ok(Err(_)) | Err(_), _) => Some(format!("the supervisor can't be reached ({}): what is shown is what was last known", supervisor_state(worker))),
    };
    (device_views(facts.as_ref(), &worker.named_devices()), notice)
}

fn device_views(facts: Option<&HostInventory>, named: &[(Bdf, Label)]) -> Vec<DeviceView> {
    let mut views: BTreeMap<Bdf, DeviceView> = BTreeMap::new();
    for record in facts.iter().flat_map(|facts| &facts.devices) {
        for known in &record.functions {
            let view = DeviceView {
                function: known.function.clone(),
                state: record.state.as_str().into(),
                vm: record.label.clone(),
                wanted_by: Vec::new(),
                group: Some(record.group),
                model: Some(format!("{:04x}:{:04x}", known.vendor, known.device)),
                class: Some(format!("{:06x}", known.class)),
                mmio_mib: Some(known.mmio_mib),
                resettable: Some(known.resettable),
                passing: record.passing.map(|passing| passing.as_str().into()),
                trouble: record.trouble.clone(),
            };
            views.insert(known.function.clone(), view);
        }
    }
    for (function, name) in named {
        let free = || DeviceView {
            function: function.clone(),
            state: "free".into(),
            vm: None,
            wanted_by: Vec::new(),
            group: None,
            model: None,
            class: None,
            mmio_mib: None,
            resettable: None,
            passing: None,
            trouble: None,
        };
        views.entry(function.clone()).or_insert_with(free).wanted_by.push(name.clone());
    }
    views.into_values().collect()
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
        uses: worker.uses(),
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
        devices: facts.devices,
        audit: facts.audit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::operation::{DeviceState, Example};

    #[test]
    fn a_device_is_shown_that_is_taken_and_one_that_is_only_named() {
        let mut facts = HostInventory::example();
        (facts.devices[0].state, facts.devices[0].trouble) = (DeviceState::Quarantined, Some("no answer".into()));
        let bdf = |text: &str| Bdf::new(text).unwrap();
        let label = |name: &str| Label::new(name).unwrap();
        let named = [(bdf("0000:65:00.0"), label("gpu")), (bdf("0000:66:00.0"), label("gpu"))];
        let views = device_views(Some(&facts), &named);
        let [taken, free] = views.as_slice() else { panic!("{views:?}") };
        assert_eq!((taken.state.as_str(), taken.model.as_deref(), taken.class.as_deref()), ("quarantined", Some("10de:2330"), Some("030200")));
        assert_eq!(
            (taken.vm.as_ref(), taken.wanted_by.as_slice(), taken.trouble.as_deref()),
            (Some(&label("example")), &[label("gpu")][..], Some("no answer"))
        );
        assert_eq!((free.function.as_str(), free.state.as_str(), free.wanted_by.len()), ("0000:66:00.0", "free", 1));
    }
}
