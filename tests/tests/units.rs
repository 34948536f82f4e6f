//! The unit files, against the table of operations and against each other. Nothing here needs systemd: what it makes of them is seen where one is booted.

use diarch_ipc::{OPERATIONS, SUPERVISOR_SOCKET};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

const SUPERVISOR: &str = "diarch-supervisor.service";
const WORKER: &str = "diarch-worker.service";
const SOCKET: &str = "diarch-supervisor.socket";
const SLICE: &str = "diarch-vms.slice";

fn text(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../units").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// One line `Key=value`, with the comment right above it.
#[derive(Debug)]
struct Directive {
    section: String,
    key: String,
    value: String,
    reason: String,
}

#[derive(Debug)]
struct Unit {
    name: &'static str,
    directives: Vec<Directive>,
}

impl Unit {
    /// systemd.syntax(7), less continued lines, which are refused: their comments would be nobody's.
    fn read(name: &'static str) -> Self {
        let (mut section, mut reason) = (String::new(), String::new());
        let mut directives = Vec::new();
        for line in text(name).lines() {
            assert!(!line.ends_with('\\') && line == line.trim_end(), "{name}: {line:?}");
            assert!(line.len() <= 160, "{name}: longer than 160: {line}");
            if line.starts_with("# ----") {
                // The heading of a group is no reason.
                reason.clear();
                continue;
            }
            if let Some(comment) = line.strip_prefix('#') {
                reason = format!("{reason} {}", comment.trim()).trim().to_owned();
                continue;
            }
            if let Some(header) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                header.clone_into(&mut section);
            } else if let Some((key, value)) = line.split_once('=') {
                directives.push(Directive { section: section.clone(), key: key.into(), value: value.into(), reason: reason.clone() });
            } else {
                assert!(line.is_empty(), "{name}: neither a section nor a directive: {line:?}");
            }
            reason.clear();
        }
        Self { name, directives }
    }

    fn all<'a>(&'a self, key: &str) -> impl Iterator<Item = &'a Directive> {
        self.directives.iter().filter(move |directive| directive.key == key)
    }

    /// The value of what stands there once; `None` when it doesn't.
    fn one(&self, key: &str) -> Option<&str> {
        let values: Vec<&str> = self.all(key).map(|directive| directive.value.as_str()).collect();
        assert!(values.len() <= 1, "{}: {key}= stands there {} times", self.name, values.len());
        values.first().copied()
    }

    /// The words of all lines of this key together.
    fn words(&self, key: &str) -> BTreeSet<String> {
        self.all(key).flat_map(|directive| directive.value.split_whitespace()).map(str::to_owned).collect()
    }
}

fn units() -> [Unit; 4] {
    [SUPERVISOR, WORKER, SOCKET, SLICE].map(Unit::read)
}

/// The lines of a file of words, without its comments.
fn rows(name: &str) -> Vec<Vec<String>> {
    let text = text(name);
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

/// `path` to type, mode, owner and group.
fn tmpfiles() -> BTreeMap<String, [String; 4]> {
    rows("diarch.tmpfiles.conf").into_iter().map(|row| (row[1].clone(), [0, 2, 3, 4].map(|n| row[n].clone()))).collect()
}

/// The names of the given kind (`u`, `g`); a user brings a group of its name.
fn sysusers(kind: &str) -> BTreeSet<String> {
    rows("diarch.sysusers.conf").into_iter().filter(|row| row[0] == kind).map(|row| row[1].clone()).collect()
}

#[test]
fn the_supervisor_has_the_capabilities_that_the_table_names_and_no_other() {
    let unit = Unit::read(SUPERVISOR);
    let named: BTreeSet<String> = OPERATIONS.iter().flat_map(|row| row.capability).map(|name| (*name).to_owned()).collect();
    assert_eq!(unit.words("CapabilityBoundingSet"), named);
    assert_eq!(unit.one("AmbientCapabilities"), Some(""));
    assert_eq!(unit.one("NoNewPrivileges"), Some("yes"));
    // With an explicit user, beside these and a system call filter, systemd 257 takes CAP_SETUID away.
    assert_eq!((unit.one("User"), unit.one("Group")), (None, None));
}

#[test]
fn the_reason_of_a_capability_is_the_operations_that_name_it() {
    for line in Unit::read(SUPERVISOR).all("CapabilityBoundingSet") {
        let said: BTreeSet<&str> = OPERATIONS.iter().map(|row| row.name).filter(|name| line.reason.contains(name)).collect();
        for capability in line.value.split_whitespace() {
            let needing: BTreeSet<&str> = OPERATIONS.iter().filter(|row| row.capability.contains(&capability)).map(|row| row.name).collect();
            assert_eq!(said, needing, "{capability}: {}", line.reason);
        }
    }
}

#[test]
fn the_worker_has_no_power() {
    let unit = Unit::read(WORKER);
    assert_eq!(unit.one("CapabilityBoundingSet"), Some(""));
    assert_eq!(unit.one("AmbientCapabilities"), Some(""));
    assert_eq!(unit.one("NoNewPrivileges"), Some("yes"));
    assert_eq!((unit.one("User"), unit.one("Group")), (Some("diarch"), Some("diarch")));
    assert_eq!(unit.one("SupplementaryGroups"), None);
    assert_eq!(unit.one("PermissionsStartOnly"), None);
    for line in unit.directives.iter().filter(|line| line.key.starts_with("Exec")) {
        assert!(line.value.starts_with('/'), "a prefix gives rights: {line:?}");
    }
}

#[test]
fn each_line_of_a_system_call_filter_has_its_reason() {
    for name in [SUPERVISOR, WORKER] {
        let unit = Unit::read(name);
        let lines: Vec<&Directive> = unit.all("SystemCallFilter").collect();
        assert!(lines.len() > 3, "{name}");
        // The first line decides whether the list is one of what may be called.
        assert_eq!(lines[0].value, "@system-service", "{name}");
        for line in &lines {
            assert!(line.reason.len() >= 20 && line.reason.ends_with(['.', ')']), "{name}: no reason: {line:?}");
            assert!(!line.value.is_empty(), "{name}: an empty line would take back all that stands above it");
        }
        assert_eq!(unit.one("SystemCallErrorNumber"), Some("EPERM"), "{name}");
        assert_eq!(unit.one("SystemCallArchitectures"), Some("native"), "{name}");
    }
}

#[test]
fn what_the_supervisor_forks_is_not_kept_from_its_work() {
    let unit = Unit::read(SUPERVISOR);
    // For a translator of machine code, bound devices, /dev/kvm, jails, other users' processes and files: see the reasons there.
    for key in ["ProtectKernelTunables", "PrivateDevices", "MemoryDenyWriteExecute", "RestrictSUIDSGID", "PrivateUsers", "PrivateNetwork"] {
        for line in unit.all(key) {
            assert_eq!(line.value, "no", "{key}");
            assert!(!line.reason.is_empty(), "{key}=no has no reason");
        }
    }
    for (key, open) in [("ProtectProc", "default"), ("ProcSubset", "all")] {
        assert!(unit.one(key).is_none_or(|value| value == open), "{key}");
    }
    // A jail is one of each.
    if let Some(namespaces) = unit.one("RestrictNamespaces") {
        let open: BTreeSet<&str> = namespaces.split_whitespace().collect();
        assert!(namespaces == "no" || ["mnt", "net", "pid", "ipc"].iter().all(|kind| open.contains(kind)), "{namespaces}");
    }
    let allowed: BTreeSet<String> = unit.words("SystemCallFilter").into_iter().filter(|word| !word.starts_with('~')).collect();
    for needed in ["@system-service", "@mount", "seccomp"] {
        assert!(allowed.contains(needed), "{needed}");
    }
    for line in unit.all("SystemCallFilter").filter(|line| line.value.starts_with('~')) {
        for needed in ["@mount", "@setuid", "@chown", "@process", "@network-io", "seccomp", "keyctl", "openat2", "memfd_create", "prlimit64", "execveat"] {
            assert!(!line.value.trim_start_matches('~').split_whitespace().any(|word| word == needed), "{needed}");
        }
    }
    let families = unit.words("RestrictAddressFamilies");
    assert_eq!(families.iter().map(String::as_str).collect::<Vec<_>>(), ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_UNIX"]);
    let devices: BTreeSet<&str> = unit.all("DeviceAllow").filter_map(|line| line.value.split_whitespace().next()).collect();
    assert_eq!(
        devices.into_iter().collect::<Vec<_>>(),
        ["/dev/iommu", "/dev/kvm", "/dev/loop-control", "/dev/net/tun", "/dev/vhost-net", "block-loop", "char-vfio", "char-vfio-dev"]
    );
    assert_eq!(unit.one("DevicePolicy"), Some("closed"));
}

#[test]
fn a_vm_is_not_ended_with_the_supervisor() {
    let unit = Unit::read(SUPERVISOR);
    assert_eq!(unit.one("KillMode"), Some("process"));
    assert_eq!(unit.one("OOMPolicy"), Some("continue"));
    assert_eq!(unit.one("RuntimeDirectory"), None, "it would be removed with the unit, and the VMs' sockets with it");
}

#[test]
fn the_halves_are_linked_by_wants_and_after_only() {
    let allowed = ["Description", "Documentation", "Wants", "After", "StartLimitIntervalSec"];
    for unit in units() {
        for line in unit.directives.iter().filter(|line| line.section == "Unit") {
            assert!(allowed.contains(&line.key.as_str()), "{}: {line:?}", unit.name);
        }
        // A module is not another unit's life: what loads it ends at once.
        assert!(unit.words("Wants").iter().all(|wanted| wanted == SOCKET || wanted.starts_with("modprobe@")), "{}", unit.name);
        // Nobody waits for the worker, and a VM's slice for neither.
        assert!(!unit.words("After").contains(WORKER), "{}", unit.name);
    }
}

#[test]
fn a_half_that_can_t_start_is_tried_again_for_ever_and_at_one_pace() {
    for name in [SUPERVISOR, WORKER] {
        let unit = Unit::read(name);
        assert_eq!(unit.one("Restart"), Some("always"), "{name}");
        let limit: Vec<&Directive> = unit.all("StartLimitIntervalSec").collect();
        assert!(matches!(limit[..], [limit] if limit.section == "Unit" && limit.value == "0"), "{name}: {limit:?}");
        for key in ["RestartPreventExitStatus", "SuccessExitStatus", "StartLimitBurst", "StartLimitAction"] {
            assert_eq!(unit.one(key), None, "{name}: {key}");
        }
        assert_eq!((unit.one("RestartSec"), unit.one("RestartSteps")), (Some("100ms"), None), "{name}");
        // No steps: what a half gets that crashed this often in a year would be the longest, as systemd does not forget.
        assert_eq!((unit.one("Type"), unit.one("WatchdogSec")), (Some("notify"), Some("10s")), "{name}");
        assert_eq!(unit.one("LimitCORE"), Some("0"), "{name}");
    }
    assert_eq!(Unit::read(SOCKET).one("TriggerLimitIntervalSec"), Some("0"));
}

#[test]
fn vms_go_before_either_half_when_memory_runs_out() {
    let [supervisor, worker] = [SUPERVISOR, WORKER].map(|name| Unit::read(name).one("OOMScoreAdjust").unwrap().parse::<i32>().unwrap());
    // QEMU inherits the supervisor's; the largest of those with the same value goes first. -1000 is "never".
    assert_eq!(supervisor, worker);
    assert!((-999..0).contains(&supervisor));
}

#[test]
fn the_socket_is_roots_and_open_to_the_workers_group() {
    let unit = Unit::read(SOCKET);
    assert_eq!(unit.one("ListenSequentialPacket"), Some(SUPERVISOR_SOCKET));
    assert_eq!((unit.one("SocketUser"), unit.one("SocketGroup"), unit.one("SocketMode")), (Some("root"), Unit::read(WORKER).one("Group"), Some("0660")));
    assert_eq!(unit.one("Accept"), None);
    assert!(unit.directives.iter().all(|line| !line.key.starts_with("Exec") && (line.key == "ListenSequentialPacket" || !line.key.starts_with("Listen"))));
}

#[test]
fn nothing_is_writable_but_what_each_half_writes() {
    let writable = |name: &'static str| {
        let unit = Unit::read(name);
        assert_eq!(unit.one("ProtectSystem"), Some("strict"), "{name}");
        assert_eq!(unit.one("ProtectHome"), Some("yes"), "{name}");
        // systemd 257: ProtectControlGroups= leaves /run writable, and a path of ExecPaths= is.
        assert!(unit.words("ReadOnlyPaths").contains("/run"), "{name}");
        assert_eq!(unit.one("ExecPaths"), None, "{name}");
        let paths: BTreeSet<String> = unit.words("ReadWritePaths").into_iter().filter(|path| !path.starts_with("-/sys/")).collect();
        let mut own = paths.clone();
        own.extend(unit.one("StateDirectory").map(|name| format!("/var/lib/{name}")));
        own.extend(["/tmp".to_owned(), "/var/tmp".to_owned()]);
        assert_eq!(unit.words("NoExecPaths"), own, "{name}: what is written is never a program, and what is not written is not in that list");
        paths.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(writable(SUPERVISOR), ["/run/diarch", "/var/log/diarch"]);
    assert_eq!(writable(WORKER), ["/run/diarch/worker", "/var/log/diarch/vms"]);
}

#[test]
fn each_user_group_and_directory_that_a_unit_names_is_made_before() {
    let (users, mut groups, made) = (sysusers("u"), sysusers("g"), tmpfiles());
    groups.extend(users.clone());
    assert_eq!(groups.iter().map(String::as_str).collect::<Vec<_>>(), ["diarch", "diarch-operators"]);
    for unit in units() {
        for (key, known) in [("User", &users), ("SocketUser", &users), ("Group", &groups), ("SocketGroup", &groups)] {
            assert!(unit.one(key).is_none_or(|name| name == "root" || known.contains(name)), "{}: {key}", unit.name);
        }
        let written = unit.words("ReadWritePaths").into_iter().filter(|path| !path.starts_with('-'));
        for path in written.chain(unit.one("StateDirectory").map(|name| format!("/var/lib/{name}"))) {
            assert!(made.get(&path).is_some_and(|[kind, ..]| kind == "d"), "{}: {path} is not in diarch.tmpfiles.conf", unit.name);
        }
    }
    for (path, [kind, mode, user, group]) in &made {
        let known = |name: &str, names: &BTreeSet<String>| ["root", "adm"].contains(&name) || names.contains(name);
        assert!(kind == "L" || (known(user, &users) && known(group, &groups)), "{path}");
        assert!(kind == "L" || u32::from_str_radix(mode, 8).unwrap() & 0o022 == 0, "{path} can be written by others");
    }
    // The supervisor trusts its directories only if they are root's.
    for path in ["/run/diarch", "/var/log/diarch"] {
        assert_eq!(made[path][2], "root");
    }
    // setgid: what the worker makes there is the operators', of whom it is none.
    for path in ["/run/diarch/worker", "/var/log/diarch/vms"] {
        assert_eq!(made[path], ["d", "2750", "diarch", "diarch-operators"].map(str::to_owned));
    }
    // The worker listens in its own directory, and people come in by the link.
    let socket = std::path::Path::new(diarch_worker::config::CONTROL_SOCKET);
    let inside = socket.parent().unwrap().to_str().unwrap();
    assert!(Unit::read(WORKER).words("ReadWritePaths").contains(inside));
    assert!(made.contains_key("/run/diarch/worker.sock"), "the `diarch` command's way in");
    let link = rows("diarch.tmpfiles.conf").into_iter().find(|row| row[0] == "L").unwrap();
    assert_eq!(socket, std::path::Path::new(&link[1]).parent().unwrap().join(link.last().unwrap()));
}

#[test]
fn polkit_says_yes_once_to_one_user_one_unit_and_one_verb() {
    let rule: Vec<String> = text("50-diarch.rules").lines().map(str::trim).filter(|line| !line.starts_with("//")).map(str::to_owned).collect();
    // The whole of it: what it does not say can't be said by mistake.
    assert_eq!(
        rule,
        [
            "polkit.addRule(function (action, subject) {",
            "if (action.id === \"org.freedesktop.systemd1.manage-units\" &&",
            "action.lookup(\"unit\") === \"diarch-supervisor.service\" &&",
            "action.lookup(\"verb\") === \"restart\" &&",
            "subject.user === \"diarch\") {",
            "return polkit.Result.YES;",
            "}",
            "return subject.user === \"diarch\" ? polkit.Result.NO : polkit.Result.NOT_HANDLED;",
            "});",
        ]
    );
    assert_eq!(Some("diarch"), Unit::read(WORKER).one("User"));
}

#[test]
fn needrestart_does_not_look_at_a_vm_and_is_told_nothing_of_the_halves() {
    let text = text("needrestart.conf");
    let code: Vec<&str> = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    assert_eq!(code, ["push(@{$nrconf{blacklist}}, qr(^/usr/bin/qemu-system-[^/]+$));", "1;"]);
}

/// What systemd knows and is used here, so that a slip of the pen is not silently ignored at boot (which is what systemd does with it).
const KNOWN: &[(&str, &str)] = &[
    ("Unit", "Description Documentation Wants After StartLimitIntervalSec"),
    ("Install", "WantedBy Also"),
    ("Socket", "ListenSequentialPacket SocketUser SocketGroup SocketMode DirectoryMode Backlog TriggerLimitIntervalSec"),
    ("Slice", "CPUAccounting MemoryAccounting TasksAccounting IOAccounting"),
    // systemd.service(5), systemd.kill(5)
    ("Service", "Type ExecStart Restart RestartSec TimeoutStartSec TimeoutStopSec WatchdogSec WatchdogSignal Environment"),
    ("Service", "KillMode OOMPolicy FileDescriptorStoreMax FileDescriptorStorePreserve"),
    // systemd.resource-control(5)
    ("Service", "MemoryMax TasksMax DevicePolicy DeviceAllow IPAddressDeny IPAddressAllow SocketBindDeny"),
    // systemd.exec(5)
    (
        "Service",
        "User Group CapabilityBoundingSet AmbientCapabilities NoNewPrivileges KeyringMode UMask RemoveIPC OOMScoreAdjust LimitNOFILE LimitCORE LimitMEMLOCK",
    ),
    ("Service", "ProtectSystem ReadOnlyPaths ReadWritePaths NoExecPaths InaccessiblePaths ProtectHome PrivateTmp StateDirectory StateDirectoryMode"),
    ("Service", "ProtectKernelTunables ProtectControlGroups ProtectKernelModules ProtectKernelLogs ProtectClock ProtectHostname ProtectProc ProcSubset"),
    ("Service", "PrivateDevices PrivateIPC PrivateUsers RestrictAddressFamilies MemoryDenyWriteExecute RestrictNamespaces RestrictSUIDSGID"),
    ("Service", "RestrictRealtime LockPersonality SystemCallArchitectures SystemCallErrorNumber SystemCallFilter"),
];

#[test]
fn every_directive_is_one_that_systemd_knows_in_that_section() {
    for unit in units() {
        for line in &unit.directives {
            let known = KNOWN.iter().any(|(section, keys)| *section == line.section && keys.split(' ').any(|key| key == line.key));
            assert!(known, "{}: [{}] {}=", unit.name, line.section, line.key);
        }
    }
}

#[test]
fn what_is_started_is_what_is_installed() {
    assert_eq!(Unit::read(SUPERVISOR).one("ExecStart"), Some("/usr/sbin/diarch-supervisor run"));
    assert_eq!(Unit::read(WORKER).one("ExecStart"), Some("/usr/sbin/diarch-worker"));
    for (unit, target) in [(SUPERVISOR, "multi-user.target"), (WORKER, "multi-user.target"), (SOCKET, "sockets.target")] {
        assert_eq!(Unit::read(unit).one("WantedBy"), Some(target), "{unit}");
    }
}
