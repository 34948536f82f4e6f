//! `diarch doctor`: what is right and wrong with this host, and what would mend it.
//!
//! ```text
//!   kernel, cgroup, iommu, sev-snp, tdx     files of the kernel's            (kernel, confidential)
//!   systemd, unit, scopes                   D-Bus, which everybody may ask   (units)
//!   root socket, socket, disks              owners, modes, room              (sockets, disk)
//!   grants file, qemu                       the programs themselves, bounded (grants, qemu, bounded)
//!   nft, passt, virtiofsd, ip forwarding    where some VM needs them         (programs)
//!   polkit                                  tried by the worker              (rights)
//!   worker, supervisor, kvm, audit, ...     what the halves say              (halves)
//! ```
//!
//! Needs no root, no running worker and no systemd; nothing in it waits for ever.

mod bounded;
mod confidential;
mod disk;
mod finding;
mod grants;
mod halves;
mod kernel;
mod programs;
mod qemu;
mod rights;
mod sockets;
mod units;

use super::connection::ask;
use super::escape;
use super::screen::{Exit, Screen, Stop};
use super::table::{Tone, tinted};
use crate::control::protocol::{Reply, Request, StatusView, Uses, VmView};
use crate::systemd::{Systemd, Trouble, Units};
use finding::{Finding, Level};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// For all that is asked of systemd: it answers in milliseconds, unless it is stuck.
const SYSTEMD: Duration = Duration::from_secs(3);

/// Where things are; a test has its own.
#[derive(Debug, Clone)]
pub struct Host {
    pub root: PathBuf,
    pub audit_file: PathBuf,
    pub systemd: Systemd,
    /// Who owns what must be root's.
    pub root_uid: u32,
    /// Who may connect to the supervisor.
    pub worker_group: String,
}

impl Host {
    /// The host that is seen below `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), audit_file: super::audit::FILE.into(), systemd: Systemd::default(), root_uid: 0, worker_group: "diarch".into() }
    }

    fn try_read(&self, path: impl AsRef<Path>) -> Option<String> {
        std::fs::read_to_string(self.root.join(path)).ok().map(|text| text.trim().to_owned())
    }

    fn read(&self, path: impl AsRef<Path>) -> String {
        self.try_read(path).unwrap_or_default()
    }
}

#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    checks: Vec<Finding>,
}

/// Prints every check, and fails when one of them does.
pub fn doctor(socket: &Path, host: &Host, screen: &mut Screen<'_>) -> Result<Exit, Stop> {
    let checks = examine(socket, host, screen)?;
    let failed = checks.iter().filter(|check| check.level == Level::Fail).count();
    let warned = checks.iter().filter(|check| check.level == Level::Warn).count();
    let exit = if failed == 0 { Exit::Ok } else { Exit::Failed };
    if screen.json {
        screen.document(&Report { ok: failed == 0, checks })?;
        return Ok(exit);
    }
    for check in &checks {
        let (word, tone) = match check.level {
            Level::Ok => ("ok  ", Tone::Good),
            Level::Info => ("info", Tone::Faint),
            Level::Warn => ("warn", Tone::Busy),
            Level::Fail => ("fail", Tone::Bad),
        };
        screen.say(format!("{}  {:<12}  {}", tinted(word, tone, screen), check.check, escape::cell(&check.detail)))?;
        if let Some(fix) = &check.fix {
            screen.say(format!("{:20}fix: {}", "", escape::cell(fix)))?;
        }
    }
    screen.say(match (failed, warned) {
        (0, 0) => "all is well".to_owned(),
        _ => format!("{failed} failed, {warned} to look at"),
    })?;
    Ok(exit)
}

fn examine(socket: &Path, host: &Host, screen: &Screen<'_>) -> Result<Vec<Finding>, Stop> {
    let status = match ask(socket, &Request::Status {}, screen) {
        Ok(Reply::Status(status)) => Ok(status),
        Ok(_) => Err((Exit::Failed, "it answered something else than its status".to_owned())),
        Err(Stop::Failure { exit, message }) => Err((exit, message)),
        Err(stop) => return Err(stop),
    };
    let supervisor = status.as_ref().ok().and_then(|status| status.supervisor.as_ref());
    let Outside { units: known, grants, qemus } = outside(host, supervisor.map(|supervisor| supervisor.started_ms))?;

    let uses = status.as_ref().map_or_else(|_| Uses::default(), |status| status.uses);
    let mut checks = vec![kernel::kernel(host), kernel::cgroup(host), kernel::iommu(host, uses.devices)];
    checks.extend(confidential::confidential(host));
    checks.extend(units::units(host, &known, screen.now_ms));
    checks.extend([sockets::of_supervisor(host), sockets::of_worker(socket), grants]);
    match &status {
        Ok(status) => of_worker(socket, status, &known, &mut checks, screen)?,
        Err((exit, message)) => {
            let fix = match exit {
                Exit::Denied => sockets::join(socket),
                _ => "systemctl start diarch-worker; journalctl -u diarch-worker -e".to_owned(),
            };
            checks.push(Finding::fail("worker", message.clone(), fix));
            checks.push(Finding::warn("supervisor", "not known: the command reaches it through the worker only", "systemctl status diarch-supervisor"));
            checks.push(Finding::info("polkit", "not known: the worker tries it"));
        }
    }
    checks.extend(qemu::qemu(supervisor.map(|supervisor| supervisor.qemu.as_slice()), &qemus));
    checks.extend(programs::programs(host, &uses));
    if let Ok(status) = &status {
        checks.push(disk::disk("log disk", Path::new(&status.log_directory)));
    }
    checks.push(disk::disk("audit disk", host.audit_file.parent().unwrap_or(Path::new("/"))));
    Ok(checks)
}

/// What others than the worker say: systemd, and the programs that are installed.
struct Outside {
    units: Result<Units, Trouble>,
    grants: Finding,
    qemus: Vec<qemu::Asked>,
}

fn outside(host: &Host, started_ms: Option<u64>) -> Result<Outside, Stop> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Stop::failed(format!("the runtime can't be made: {error}")))?;
    let said = runtime.block_on(async {
        let late = |_| Err(Trouble::Other(format!("no answer within {} s", SYSTEMD.as_secs())));
        let units = tokio::time::timeout(SYSTEMD, host.systemd.units()).await.unwrap_or_else(late);
        let grants::Grants { finding, qemus } = grants::grants(host, started_ms).await;
        Outside { units, grants: finding, qemus: qemu::ask(qemus).await }
    });
    runtime.shutdown_background();
    Ok(said)
}

/// What only the worker knows.
fn of_worker(socket: &Path, status: &StatusView, known: &Result<Units, Trouble>, checks: &mut Vec<Finding>, screen: &Screen<'_>) -> Result<(), Stop> {
    checks.push(match ask(socket, &Request::Rights {}, screen) {
        Ok(Reply::Rights(tried)) => rights::rights(&tried),
        Ok(_) => Finding::warn("polkit", "the worker answered something else than what it tried", "systemctl restart diarch-worker (VMs run on)"),
        Err(Stop::Failure { message, .. }) => Finding::warn("polkit", format!("not known: {message}"), "systemctl restart diarch-worker (VMs run on)"),
        Err(stop) => return Err(stop),
    });
    checks.extend(halves::of_status(status, screen.now_ms));
    if let Ok(units) = known
        && let Some(vms) = listed(socket, screen)?
    {
        checks.extend(units::scopes(units, &vms));
    }
    Ok(())
}

fn listed(socket: &Path, screen: &Screen<'_>) -> Result<Option<Vec<VmView>>, Stop> {
    match ask(socket, &Request::VmList {}, screen) {
        Ok(Reply::Vms(vms)) => Ok(Some(vms)),
        Ok(_) | Err(Stop::Failure { .. }) => Ok(None),
        Err(stop) => Err(stop),
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::connection::tests::FakeWorker;
    use super::super::screen::tests::Printed;
    use super::*;
    use crate::control::protocol::{Need, Phase, RightVerdict, RightView, RightsView, SupervisorView};
    use diarch_ipc::name::{Label, QemuName};
    use diarch_ipc::operation::{AuditState, KvmVerdict, Limits, QemuGrant};
    use std::os::unix::fs::PermissionsExt;

    /// Two halves with which all is well.
    pub fn status() -> StatusView {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        StatusView {
            worker_version: version.clone(),
            worker_started_ms: 1_700_000_000_000 - 60_000,
            worker_uid: 4_000_000_000,
            worker_pid: 77,
            supervisor_state: "ready".into(),
            supervisor: Some(SupervisorView {
                version,
                kernel: "6.12.0".into(),
                started_ms: 1_700_000_000_000 - 192_000,
                kvm: KvmVerdict::Usable,
                accelerator: "kvm".into(),
                qemu: vec![QemuGrant { name: QemuName::new("default").expect("a name"), path: "/usr/bin/qemu-system-x86_64".into(), trouble: None }],
                limits: Limits { vms: 8, memory_mib: 4096, memory_mib_used: 512, cpus_each: 4 },
                vms_total: 1,
                devices: vec![],
                audit: AuditState { sequence: 7, head: "00".repeat(32), trouble: None, lost: 0 },
            }),
            uses: Uses { user_networks: 1, ..Uses::default() },
            configs_dir: "vms".into(),
            log_directory: "/".into(),
            problems: vec![],
        }
    }

    /// A VM that is healthy in slot 0.
    pub fn vm() -> VmView {
        VmView {
            name: Label::new("web").expect("a name"),
            file: None,
            enabled: true,
            phase: Phase::Healthy,
            reason: None,
            slot: Some(0),
            pid: Some(4321),
            accelerator: None,
            cpus: None,
            memory_mib: None,
            forwards: vec![],
            tap: None,
            devices: vec![],
            shares: vec![],
            started_ms: None,
            healthy_ms: None,
            restarts: 0,
            guest_reboots: 0,
            last_exit: None,
            retry_ms: None,
            health: None,
        }
    }

    impl Host {
        pub fn write(&self, path: &str, text: &str) {
            let path = self.root.join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            std::fs::write(path, format!("{text}\n")).expect("written");
        }

        /// A shell script in a program's place. Everybody may run it: a program that needs no right is not run as root.
        pub fn program(&self, path: &str, script: &str) -> PathBuf {
            self.write(path, &format!("#!/bin/sh\n{script}"));
            let path = self.root.join(path);
            for part in path.ancestors().take_while(|part| part.starts_with(&self.root)) {
                std::fs::set_permissions(part, std::fs::Permissions::from_mode(0o755)).expect("changed");
            }
            path
        }
    }

    /// A host on which nothing is wrong with the kernel.
    pub fn host() -> (tempfile::TempDir, Host) {
        let directory = tempfile::tempdir().expect("a directory");
        let host = Host {
            audit_file: directory.path().join("audit.jsonl"),
            systemd: Systemd::behind("/nonexistent/bus"),
            root_uid: rustix::process::geteuid().as_raw(),
            worker_group: super::super::connection::group_name(rustix::process::getegid().as_raw()),
            ..Host::at(directory.path())
        };
        std::fs::create_dir_all(host.root.join("sys/kernel/iommu_groups/0")).expect("made");
        std::fs::create_dir_all(host.root.join("run/systemd/system")).expect("made");
        host.write("proc/sys/kernel/osrelease", "6.12.0");
        host.write("sys/fs/cgroup/cgroup.controllers", "cpu memory pids");
        (directory, host)
    }

    #[test]
    fn a_dead_worker_is_a_fail_with_its_fix_and_the_rest_is_still_told() {
        let (directory, host) = host();
        for json in [false, true] {
            let mut printed = Printed::default();
            let mut screen = printed.screen();
            screen.json = json;
            assert_eq!(doctor(&directory.path().join("none.sock"), &host, &mut screen), Ok(Exit::Failed));
            if json {
                let report: serde_json::Value = serde_json::from_str(&printed.out()).expect("JSON");
                assert_eq!(report["ok"], false);
            } else {
                for part in ["ok    kernel", "fail  worker", "fix: systemctl start diarch-worker", "warn  supervisor", "info  polkit", "1 failed, "] {
                    assert!(printed.out().contains(part), "{}", printed.out());
                }
            }
        }
    }

    #[test]
    fn the_worker_is_asked_for_its_state_and_for_what_it_tried() {
        let (_directory, host) = host();
        host.program("usr/sbin/diarch-supervisor", "echo grants.toml: accepted");
        let tried = RightView { what: "restart of it".into(), need: Need::Needed, verdict: RightVerdict::Allowed };
        let worker = FakeWorker::again_and_again(vec![
            vec![Reply::Status(Box::new(status())), Reply::Done {}],
            vec![Reply::Rights(RightsView::Systemd(vec![tried])), Reply::Done {}],
        ]);
        let mut printed = Printed::default();
        assert_eq!(doctor(&worker.socket, &host, &mut printed.screen()), Ok(Exit::Ok), "{}", printed.out());
        for part in ["ok    polkit", "ok    supervisor", "ok    grants file", "ok    qemu", "warn  systemd", "0 failed, "] {
            assert!(printed.out().contains(part), "{part}: {}", printed.out());
        }
        assert_eq!(worker.requests(), [Request::Status {}, Request::Rights {}]);
    }
}
