//! What the two halves say of themselves.

use super::finding::Finding;
use crate::cli::connection::user_name;
use crate::cli::screen::count;
use crate::cli::{clock, validate};
use crate::control::protocol::{StatusView, SupervisorView};
use diarch_ipc::operation::{DeviceRecord, DeviceState, KvmVerdict};

/// Everything but the QEMU binaries.
pub fn of_status(status: &StatusView, now_ms: u64) -> Vec<Finding> {
    let mut found = vec![worker(status, now_ms)];
    match &status.supervisor {
        None => found.push(Finding::fail(
            "supervisor",
            format!("never reached since the worker started: {}", status.supervisor_state),
            "systemctl status diarch-supervisor; journalctl -u diarch-supervisor -e",
        )),
        Some(supervisor) => {
            found.push(reached(status, supervisor, now_ms));
            found.push(versions(status, supervisor));
            found.push(kvm(supervisor));
            found.push(audit(supervisor));
            found.push(limits(supervisor));
            found.extend(devices(supervisor));
        }
    }
    found.push(files(status));
    found
}

fn worker(status: &StatusView, now_ms: u64) -> Finding {
    let detail = format!(
        "{}, pid {}, user {}, started {} ago",
        status.worker_version,
        status.worker_pid,
        user_name(status.worker_uid),
        clock::since(status.worker_started_ms, now_ms)
    );
    match status.worker_uid {
        0 => Finding::fail("worker", format!("{detail}: it runs as root, and needs no right at all"), "run it by its unit, as its own user"),
        _ => Finding::ok("worker", detail),
    }
}

fn reached(status: &StatusView, supervisor: &SupervisorView, now_ms: u64) -> Finding {
    let detail = format!("{}, started {} ago, kernel {}", supervisor.version, clock::since(supervisor.started_ms, now_ms), supervisor.kernel);
    match status.supervisor_state.as_str() {
        "ready" => Finding::ok("supervisor", detail),
        state => Finding::fail("supervisor", format!("{state}; last seen: {detail}"), "systemctl status diarch-supervisor; journalctl -u diarch-supervisor -e"),
    }
}

fn versions(status: &StatusView, supervisor: &SupervisorView) -> Finding {
    let (worker, root, command) = (status.worker_version.as_str(), supervisor.version.as_str(), env!("CARGO_PKG_VERSION"));
    match worker == root && worker == command {
        true => Finding::ok("versions", format!("supervisor, worker and command are {command}")),
        false => Finding::warn(
            "versions",
            format!("supervisor {root}, worker {worker}, command {command}"),
            "restart the older half after an upgrade: systemctl restart diarch-supervisor diarch-worker (VMs run on)",
        ),
    }
}

fn kvm(supervisor: &SupervisorView) -> Finding {
    let auto = &supervisor.accelerator;
    match &supervisor.kvm {
        KvmVerdict::Usable => Finding::ok("kvm", format!("a tiny guest ran; accel auto: {auto}")),
        KvmVerdict::Probing => Finding::info("kvm", format!("the tiny guest that tells is being run; accel auto: {auto}")),
        KvmVerdict::NotGranted => {
            Finding::warn("kvm", format!("not granted; accel auto: {auto}"), "set kvm = true under [vms] in /etc/diarch/grants.toml, if VMs may use it")
        }
        KvmVerdict::Absent { reason } | KvmVerdict::Lies { reason } if reason.contains("Permission denied") => Finding::warn(
            "kvm",
            format!("it may not be opened: {reason}; accel auto: {auto}"),
            "give the VMs' users the group of /dev/kvm: its mode should be 0660 and its group not root",
        ),
        KvmVerdict::Absent { reason } => Finding::warn(
            "kvm",
            format!("absent: {reason}; accel auto: {auto}"),
            "load kvm_intel or kvm_amd, switch on virtualization in the firmware (nested, in a VM)",
        ),
        KvmVerdict::Lies { reason } => Finding::warn(
            "kvm",
            format!("opens, and can't run a guest: {reason}; accel auto: {auto}"),
            "this host is a VM without real nested virtualization: switch it on in the host above, or live with TCG",
        ),
    }
}

fn audit(supervisor: &SupervisorView) -> Finding {
    let audit = &supervisor.audit;
    let lost = match audit.lost {
        0 => String::new(),
        n => format!("; {} could not be written since the supervisor started", count(n, "record")),
    };
    match &audit.trouble {
        Some(trouble) => Finding::fail(
            "audit",
            format!("can't be written: {trouble}; nothing is granted until it can{lost}"),
            "make room on its disk: the supervisor tries again by itself",
        ),
        None if audit.lost > 0 => Finding::warn("audit", format!("record {}{lost}", audit.sequence), "diarch audit verify shows the gaps"),
        None => Finding::ok("audit", format!("written, up to record {}", audit.sequence)),
    }
}

fn limits(supervisor: &SupervisorView) -> Finding {
    let limits = &supervisor.limits;
    let detail = format!(
        "{} of {} VMs, {} of {} MiB, at most {} CPUs each",
        supervisor.vms_total, limits.vms, limits.memory_mib_used, limits.memory_mib, limits.cpus_each
    );
    if limits.vms == 0 || limits.memory_mib == 0 || limits.cpus_each == 0 {
        let fix = "set max, memory_mib and cpus_each under [vms] in /etc/diarch/grants.toml, then systemctl restart diarch-supervisor";
        return Finding::warn("grants", format!("{detail}: no VM can start"), fix);
    }
    match supervisor.vms_total >= limits.vms || limits.memory_mib_used >= limits.memory_mib {
        false => Finding::ok("grants", detail),
        true => Finding::warn("grants", format!("{detail}: used up"), "raise [vms] in /etc/diarch/grants.toml, or stop a VM"),
    }
}

/// None where no device is taken.
fn devices(supervisor: &SupervisorView) -> Option<Finding> {
    let records = supervisor.devices.as_slice();
    let broken: Vec<&DeviceRecord> = records.iter().filter(|record| record.state == DeviceState::Quarantined).collect();
    match (records, broken.as_slice()) {
        ([], _) => None,
        (_, []) => Some(Finding::ok("devices", format!("{} taken for VMs", count(records.len(), "IOMMU group")))),
        (_, [first, ..]) => {
            let name = first.functions.first().map_or_else(|| format!("group {}", first.group), |known| known.function.to_string());
            let why = first.trouble.as_deref().unwrap_or("without a reason");
            let detail = format!("{} of {} quarantined: {name}: {why}", broken.len(), count(records.len(), "IOMMU group"));
            Some(Finding::warn("devices", detail, format!("diarch device recover {name} (its VM is restarted); all of them: diarch device list")))
        }
    }
}

fn files(status: &StatusView) -> Finding {
    match status.problems.as_slice() {
        [] => Finding::ok("VM files", format!("no problems in {}", status.configs_dir)),
        [first, others @ ..] => Finding::warn(
            "VM files",
            format!(
                "{} in {}: {}{}",
                count(others.len() + 1, "problem"),
                status.configs_dir,
                validate::line(first),
                if others.is_empty() { "" } else { ", ..." }
            ),
            format!("diarch validate {}", status.configs_dir),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::super::tests::status;
    use super::*;
    use crate::control::protocol::FileProblem;
    use diarch_ipc::operation::{Bound, Example};

    fn level(found: &[Finding], check: &str) -> Level {
        found.iter().find(|finding| finding.check == check).expect(check).level
    }

    #[test]
    fn a_healthy_pair_fails_nothing() {
        let found = of_status(&status(), 1_700_000_000_000);
        assert!(found.iter().all(|finding| finding.level == Level::Ok && finding.fix.is_none()), "{found:?}");
        assert_eq!(found[0].detail, format!("{}, pid 77, user 4000000000, started 1m0s ago", env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn each_trouble_has_its_level_and_a_fix() {
        let with = |change: &dyn Fn(&mut StatusView, &mut SupervisorView)| {
            let mut status = status();
            let mut supervisor = status.supervisor.take().expect("a supervisor");
            change(&mut status, &mut supervisor);
            status.supervisor = Some(supervisor);
            of_status(&status, 1_700_000_000_000)
        };
        let lies = KvmVerdict::Lies { reason: "KVM_RUN never came back".into() };
        type Change<'a> = &'a dyn Fn(&mut StatusView, &mut SupervisorView);
        let dead = || DeviceRecord { state: DeviceState::Quarantined, trouble: Some("no answer".into()), ..Bound::example().device };
        let cases: [(&str, Level, Change<'_>); 10] = [
            ("devices", Level::Warn, &|_, s| s.devices = vec![dead()]),
            ("worker", Level::Fail, &|w, _| w.worker_uid = 0),
            ("supervisor", Level::Fail, &|w, _| w.supervisor_state = "lost: closed".into()),
            ("versions", Level::Warn, &|_, s| s.version = "0.0.9".into()),
            ("kvm", Level::Warn, &|_, s| s.kvm = lies.clone()),
            ("grants", Level::Warn, &|_, s| s.limits.vms = 0),
            ("grants", Level::Warn, &|_, s| s.limits.memory_mib_used = s.limits.memory_mib),
            ("audit", Level::Fail, &|_, s| s.audit.trouble = Some("No space left on device".into())),
            ("audit", Level::Warn, &|_, s| s.audit.lost = 3),
            ("VM files", Level::Warn, &|w, _| {
                w.problems = vec![FileProblem { file: "vms/a.json".into(), path: "$".into(), line: None, reason: "empty".into() }];
            }),
        ];
        for (check, expected, change) in cases {
            let found = with(change);
            assert_eq!(level(&found, check), expected, "{check}");
            assert!(found.iter().filter(|finding| finding.level > Level::Info).all(|finding| finding.fix.is_some()));
        }
        let mut never = status();
        never.supervisor = None;
        assert_eq!(level(&of_status(&never, 0), "supervisor"), Level::Fail);
    }

    #[test]
    fn a_kvm_that_may_not_be_opened_is_a_matter_of_its_group() {
        let mut supervisor = status().supervisor.expect("a supervisor");
        supervisor.kvm = KvmVerdict::Absent { reason: "/dev/kvm: Permission denied (os error 13)".into() };
        assert!(kvm(&supervisor).fix.expect("a fix").contains("the group of /dev/kvm"));
    }
}
