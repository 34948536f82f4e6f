//! `diarch doctor`: what is right and wrong with this host, and what would mend it. Needs no root, and no running worker.

use super::connection::{ask, group_name, group_of_first_seen, user_name};
use super::screen::{Exit, Screen, Stop, count};
use super::table::{Tone, tinted};
use super::{clock, escape, validate};
use crate::control::protocol::{Reply, Request, StatusView, SupervisorView};
use diarch_ipc::operation::KvmVerdict;
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The oldest kernel that tells a peer's pid by descriptor (SO_PEERPIDFD).
const KERNEL: (u32, u32) = (6, 5);
/// With less room than this the audit is about to fail, and with it every grant.
const DISK_FAIL: u64 = 64 << 20;
const DISK_WARN: u64 = 1 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Level {
    Ok,
    /// A fact, neither good nor bad.
    Info,
    Warn,
    Fail,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    detail: String,
    /// What mends it.
    fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, detail: detail.into(), fix: None }
    }
    fn info(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, level: Level::Info, detail: detail.into(), fix: None }
    }
    fn warn(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, level: Level::Warn, detail: detail.into(), fix: Some(fix.into()) }
    }
    fn fail(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, level: Level::Fail, detail: detail.into(), fix: Some(fix.into()) }
    }
}

/// Where the kernel's files are; a test has its own.
#[derive(Debug, Clone)]
pub struct Host {
    pub root: PathBuf,
    pub audit_file: PathBuf,
}

#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    checks: Vec<Finding>,
}

/// Prints every check, and fails when one of them does.
pub fn doctor(socket: &Path, host: &Host, screen: &mut Screen<'_>) -> Result<Exit, Stop> {
    let status = match ask(socket, &Request::Status {}, screen) {
        Ok(Reply::Status(status)) => Ok(status),
        Ok(_) => Err((Exit::Failed, "it answered something else than its status".to_owned())),
        Err(Stop::Failure { exit, message }) => Err((exit, message)),
        Err(stop) => return Err(stop),
    };
    let mut checks = vec![kernel(host), cgroup(host), iommu(host), socket_mode(socket)];
    match &status {
        Ok(status) => {
            checks.extend(of_status(status, screen.now_ms));
            checks.push(disk("log disk", Path::new(&status.log_directory)));
        }
        Err((exit, message)) => {
            let fix = match exit {
                Exit::Denied => join(socket),
                _ => "systemctl start diarch-worker; journalctl -u diarch-worker -e".to_owned(),
            };
            checks.push(Finding::fail("worker", message.clone(), fix));
            checks.push(Finding::warn("supervisor", "not known: the command reaches it through the worker only", "systemctl status diarch-supervisor"));
        }
    }
    checks.push(disk("audit disk", host.audit_file.parent().unwrap_or(Path::new("/"))));
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

fn kernel(host: &Host) -> Finding {
    let release = read(&host.root.join("proc/sys/kernel/osrelease"));
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().ok());
    let (Some(Some(major)), Some(Some(minor))) = (parts.next(), parts.next()) else {
        return Finding::warn("kernel", format!("its release can't be read: '{release}'"), "mount /proc");
    };
    let needed = format!("{}.{}", KERNEL.0, KERNEL.1);
    match (major, minor) >= KERNEL {
        true => Finding::ok("kernel", format!("{release}, and {needed} is needed")),
        false => Finding::fail(
            "kernel",
            format!("{release} is older than {needed}: a peer's unit can't be told safely"),
            format!("boot a kernel of {needed} or newer"),
        ),
    }
}

fn cgroup(host: &Host) -> Finding {
    match host.root.join("sys/fs/cgroup/cgroup.controllers").exists() {
        true => Finding::ok("cgroup", "version 2 is mounted"),
        false => Finding::warn(
            "cgroup",
            "version 2 is not mounted at /sys/fs/cgroup: no unit of a peer can be told, and no VM has a scope",
            "boot without systemd.unified_cgroup_hierarchy=0",
        ),
    }
}

fn iommu(host: &Host) -> Finding {
    let groups = std::fs::read_dir(host.root.join("sys/kernel/iommu_groups")).map_or(0, Iterator::count);
    match groups {
        0 => Finding::info("iommu", "no IOMMU groups: no device can be passed through (intel_iommu=on or the firmware's switch would make them)"),
        n => Finding::info("iommu", format!("{}: devices can be passed through", count(n, "IOMMU group"))),
    }
}

/// What lets a person in whom the socket's mode keeps out.
fn join(socket: &Path) -> String {
    match group_of_first_seen(socket) {
        Some(group) => format!("join the group {group}: usermod -aG {group} YOU, and log in again"),
        None => "join the group that may use it: an administrator knows which".to_owned(),
    }
}

fn socket_mode(socket: &Path) -> Finding {
    const FIX: &str = "set the socket's group and mode in the worker's configuration, and restart diarch-worker";
    // Followed: the path that people use may be a link into the worker's own directory.
    let about = match socket.metadata() {
        Ok(about) => about,
        Err(error) => {
            let fix = match error.kind() {
                std::io::ErrorKind::PermissionDenied => join(socket),
                _ => "systemctl status diarch-worker".to_owned(),
            };
            return Finding::warn("socket", format!("{} can't be looked at: {error}", socket.display()), fix);
        }
    };
    let mode = about.mode() & 0o7777;
    let detail = format!("{} is {}:{} {mode:04o}", socket.display(), user_name(about.uid()), group_name(about.gid()));
    match mode & 0o002 == 0 {
        true => Finding::ok("socket", detail),
        false => Finding::fail("socket", format!("{detail}: everybody on this host can command the VMs"), FIX),
    }
}

/// Everything that the two halves say of themselves.
fn of_status(status: &StatusView, now_ms: u64) -> Vec<Finding> {
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
            found.extend(qemu(supervisor));
            found.push(audit(supervisor));
            found.push(limits(supervisor));
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

fn qemu(supervisor: &SupervisorView) -> Vec<Finding> {
    if supervisor.qemu.is_empty() {
        return vec![Finding::fail("qemu", "no binary is granted: no VM can start", "add a [qemu.NAME] with its path to /etc/diarch/grants.toml")];
    }
    let one = |qemu: &diarch_ipc::operation::QemuGrant| match &qemu.trouble {
        None => Finding::ok("qemu", format!("{}: {}", qemu.name, qemu.path)),
        Some(trouble) => Finding::fail(
            "qemu",
            format!("{}: {}: {trouble}", qemu.name, qemu.path),
            "install it (apt-get install qemu-system-x86), or correct its path or sha256 in /etc/diarch/grants.toml",
        ),
    };
    supervisor.qemu.iter().map(one).collect()
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
    match supervisor.vms_total >= limits.vms || limits.memory_mib_used >= limits.memory_mib {
        false => Finding::ok("grants", detail),
        true => Finding::warn("grants", format!("{detail}: used up"), "raise [vms] in /etc/diarch/grants.toml, or stop a VM"),
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

fn disk(check: &'static str, directory: &Path) -> Finding {
    let shown = directory.display();
    let about = match rustix::fs::statvfs(directory) {
        Ok(about) => about,
        Err(error) => return Finding::warn(check, format!("{shown} can't be looked at: {error}"), "see that the directory exists and may be passed through"),
    };
    let free = about.f_bavail.saturating_mul(about.f_frsize);
    let detail = format!("{} MiB free at {shown}", free >> 20);
    match free {
        0..DISK_FAIL => Finding::fail(check, detail, "make room: without an audit nothing is granted, and without logs nobody knows why"),
        DISK_FAIL..DISK_WARN => Finding::warn(check, detail, "make room before it is full"),
        // File systems without inodes of their own (btrfs) say 0 of 0.
        _ if about.f_files > 0 && about.f_favail == 0 => Finding::fail(check, format!("no inode is free at {shown}"), "remove files"),
        _ => Finding::ok(check, detail),
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
pub mod tests {
    use super::super::connection::tests::FakeWorker;
    use super::super::screen::tests::Printed;
    use super::*;
    use crate::control::protocol::FileProblem;
    use diarch_ipc::name::QemuName;
    use diarch_ipc::operation::{AuditState, Limits, QemuGrant};

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
                audit: AuditState { sequence: 7, head: "00".repeat(32), trouble: None, lost: 0 },
            }),
            configs_dir: "vms".into(),
            log_directory: "/".into(),
            problems: vec![],
        }
    }

    fn host(release: &str) -> (tempfile::TempDir, Host) {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path().to_owned();
        for made in ["proc/sys/kernel", "sys/fs/cgroup", "sys/kernel/iommu_groups/0"] {
            std::fs::create_dir_all(root.join(made)).expect("made");
        }
        std::fs::write(root.join("proc/sys/kernel/osrelease"), format!("{release}\n")).expect("written");
        std::fs::write(root.join("sys/fs/cgroup/cgroup.controllers"), "cpu memory\n").expect("written");
        let host = Host { audit_file: root.join("audit.jsonl"), root };
        (directory, host)
    }

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
        let cases: [(&str, Level, Change<'_>); 9] = [
            ("worker", Level::Fail, &|w, _| w.worker_uid = 0),
            ("supervisor", Level::Fail, &|w, _| w.supervisor_state = "lost: closed".into()),
            ("versions", Level::Warn, &|_, s| s.version = "0.0.9".into()),
            ("kvm", Level::Warn, &|_, s| s.kvm = lies.clone()),
            ("qemu", Level::Fail, &|_, s| s.qemu[0].trouble = Some("no such file".into())),
            ("qemu", Level::Fail, &|_, s| s.qemu.clear()),
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
    fn an_old_kernel_fails_and_missing_cgroups_are_a_warning() {
        for (release, expected) in
            [("6.5.0", Level::Ok), ("6.12.9-cloud-amd64", Level::Ok), ("7.0", Level::Ok), ("6.4.99", Level::Fail), ("5.15.0", Level::Fail), ("", Level::Warn)]
        {
            let (_directory, host) = host(release);
            assert_eq!(kernel(&host).level, expected, "{release}");
            assert_eq!(cgroup(&host).level, Level::Ok);
            assert_eq!(iommu(&host).detail, "1 IOMMU group: devices can be passed through");
        }
        let bare = Host { root: "no/such/place".into(), audit_file: "audit.jsonl".into() };
        assert_eq!((cgroup(&bare).level, iommu(&bare).level), (Level::Warn, Level::Info));
    }

    #[test]
    fn a_dead_worker_is_a_fail_with_its_fix_and_the_rest_is_still_told() {
        let (directory, host) = host("6.12.0");
        for json in [false, true] {
            let mut printed = Printed::default();
            let mut screen = printed.screen();
            screen.json = json;
            assert_eq!(doctor(&directory.path().join("none.sock"), &host, &mut screen), Ok(Exit::Failed));
            if json {
                let report: serde_json::Value = serde_json::from_str(&printed.out()).expect("JSON");
                assert_eq!(report["ok"], false);
            } else {
                for part in ["ok    kernel", "fail  worker", "fix: systemctl start diarch-worker", "warn  supervisor", "1 failed, "] {
                    assert!(printed.out().contains(part), "{}", printed.out());
                }
            }
        }
    }

    #[test]
    fn a_kvm_that_may_not_be_opened_is_a_matter_of_its_group() {
        let mut supervisor = status().supervisor.expect("a supervisor");
        supervisor.kvm = KvmVerdict::Absent { reason: "/dev/kvm: Permission denied (os error 13)".into() };
        assert!(kvm(&supervisor).fix.expect("a fix").contains("the group of /dev/kvm"));
    }

    #[test]
    fn a_link_to_the_socket_is_followed() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().expect("a directory");
        let (socket, link) = (directory.path().join("worker.sock"), directory.path().join("link.sock"));
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o660)).expect("changed");
        std::os::unix::fs::symlink(&socket, &link).expect("linked");
        assert_eq!(socket_mode(&link).level, Level::Ok);
    }

    #[test]
    fn a_socket_that_everybody_may_write_is_a_fail() {
        use std::os::unix::fs::PermissionsExt;
        let worker = FakeWorker::answering(&[Reply::Status(Box::new(status())), Reply::Done {}]);
        for (mode, expected) in [(0o660, Level::Ok), (0o666, Level::Fail)] {
            std::fs::set_permissions(&worker.socket, std::fs::Permissions::from_mode(mode)).expect("changed");
            assert_eq!(socket_mode(&worker.socket).level, expected);
        }
        assert!(matches!(ask(&worker.socket, &Request::Status {}, &Printed::default().screen()), Ok(Reply::Status(_))));
    }
}
