//! What each half may do on a real systemd, and what it may not: the rights that polkit gives, the identity that the supervisor asks for, and what the units
//! take away. Everything here is tried by `diarch-probe`, or by the tools that an intruder would find.

use diarch_ipc::OPERATIONS;
use diarch_tests::machine::builder::Until;
use diarch_tests::machine::{Machine, Process, SUPERVISOR, SUPERVISOR_SOCKET, WORKER, vm_file_guest, vm_file_stub};
use diarch_tests::need;
use diarch_worker::control::protocol::Phase;
use rustix::fs::StatVfsMountFlags;
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);
const PROBE: &str = "/usr/local/bin/diarch-probe";
const SOCKET: &str = "/run/diarch/supervisor.sock";

// ---- polkit: one user, one unit, one verb ----

/// What nobody but root may do. Each is a line of bash's; `$supervisor` is the process.
#[rustfmt::skip]
const REFUSED: &[&str] = &[
    // The other verbs, on the very unit.
    "systemctl stop diarch-supervisor.service",
    "systemctl start diarch-supervisor.service",
    "systemctl try-restart diarch-supervisor.service",
    "systemctl reload diarch-supervisor.service",
    "systemctl reload-or-restart diarch-supervisor.service",
    "systemctl try-reload-or-restart diarch-supervisor.service",
    "systemctl kill diarch-supervisor.service",
    "systemctl kill --signal=HUP diarch-supervisor.service",
    "systemctl freeze diarch-supervisor.service",
    "systemctl thaw diarch-supervisor.service",
    "systemctl reset-failed diarch-supervisor.service",
    "systemctl clean diarch-supervisor.service",
    "systemctl set-property diarch-supervisor.service MemoryMax=1G",
    "systemctl set-property --runtime diarch-supervisor.service IPAddressAllow=any",
    "systemctl bind diarch-supervisor.service /etc /mnt",
    // The same verb, on another unit.
    "systemctl restart diarch-worker.service",
    "systemctl restart diarch-supervisor.socket",
    "systemctl restart dbus.service",
    "systemctl restart diarch-vm-0.scope",
    "systemctl restart diarch-vms.slice",
    "systemctl restart rescue.target",
    "systemctl restart diarch-supervisor.service diarch-worker.service && systemctl restart diarch-worker.service",
    "systemctl restart diarch-supervisor@x.service",
    "systemctl restart diarch-supervisor.service.service",
    "systemctl restart diarch-supervisor.timer",
    "systemctl restart Diarch-supervisor.service",
    "systemctl restart x-diarch-supervisor.service",
    "systemctl restart 'diarch\\x2dsupervisor.service'",
    // Other units.
    "systemctl start rescue.target",
    "systemctl stop diarch-worker.service",
    "systemctl stop diarch-vm-0.scope",
    "systemctl stop diarch-vms.slice",
    "systemctl stop diarch-supervisor.socket",
    "systemctl kill --signal=KILL diarch-vm-0.scope",
    "systemctl freeze diarch-vm-0.scope",
    "systemctl set-property diarch-vm-0.scope MemoryMax=infinity",
    // Units of one's own.
    "systemd-run id",
    "systemd-run --unit=diarch-supervisor.service id",
    "systemd-run --unit=diarch-supervisor-1.service id",
    "systemd-run --unit=diarch-worker.service id",
    "systemd-run --scope id",
    "systemd-run --scope --unit=diarch-supervisor.service.scope id",
    "systemd-run --scope --unit=diarch-vm-7.scope --slice=diarch-vms.slice id",
    "systemd-run --on-active=1s --unit=diarch-supervisor.timer id",
    "systemd-run --path-property=PathExists=/ --unit=diarch-supervisor.path id",
    "systemd-run --socket-property=ListenStream=/run/x --unit=diarch-supervisor.socket id",
    // Unit files.
    "systemctl enable diarch-vms.slice",
    "systemctl enable /tmp/evil.service",
    "systemctl disable diarch-worker.service",
    "systemctl reenable diarch-supervisor.service",
    "systemctl mask diarch-worker.service",
    "systemctl mask --runtime dbus.service",
    "systemctl unmask diarch-worker.service",
    "systemctl link /tmp/evil.service",
    "systemctl link --runtime /tmp/diarch-supervisor.service",
    "systemctl revert diarch-supervisor.service",
    "systemctl preset diarch-supervisor.service",
    "systemctl preset-all",
    "systemctl add-wants multi-user.target rescue.service",
    "systemctl set-default rescue.target",
    "echo '[Service]' | command systemctl --no-ask-password edit --stdin diarch-supervisor.service",
    "echo '[Service]' | command systemctl --no-ask-password edit --stdin --runtime --full --force evil.service",
    // The manager.
    "systemctl daemon-reload",
    "systemctl daemon-reexec",
    "systemctl set-environment LD_PRELOAD=/tmp/evil.so",
    "systemctl unset-environment PATH",
    "systemctl log-level debug",
    "systemctl service-watchdogs no",
    "systemctl cancel",
    "systemctl isolate rescue.target",
    "systemctl rescue",
    "systemctl poweroff",
    "systemctl reboot",
    "systemctl halt",
    "systemctl soft-reboot",
    "systemctl exit 3",
    // Without systemd.
    "kill -KILL $supervisor",
    "kill -STOP $supervisor",
    "kill -KILL $qemu",
    "cat /proc/$supervisor/environ",
    "cat /proc/$supervisor/mem",
    "rm /run/diarch/supervisor.sock",
    "mv /run/diarch/worker /run/diarch/x",
    "ls /run/diarch/vm",
    "echo >>/etc/diarch/grants.toml",
    "echo >>/var/log/diarch/audit.jsonl",
    "cat /var/log/diarch/audit.jsonl",
    "echo >/sys/fs/cgroup/system.slice/diarch-worker.service/cgroup.procs",
];

/// The one thing, in the words that there are for it.
const RESTARTS: &[&str] = &[
    "systemctl restart diarch-supervisor.service",
    "systemctl restart diarch-supervisor",
    "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager RestartUnit ss diarch-supervisor.service replace",
    "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1/unit/diarch_2dsupervisor_2eservice org.freedesktop.systemd1.Unit Restart s fail",
];

/// Names that come near, asked for as a program asks: systemctl would mend them.
const NEAR: &[&str] = &[
    "diarch-supervisor.socket",
    "diarch-supervisor.slice",
    "diarch-supervisor@.service",
    "diarch-supervisor@x.service",
    "diarch-supervisor.service.service",
    "DIARCH-SUPERVISOR.SERVICE",
    "diarch-supervisor",
    "diarch-supervisor.servic",
    "diarch-supervisor.service ",
    " diarch-supervisor.service",
    "./diarch-supervisor.service",
    "/usr/lib/systemd/system/diarch-supervisor.service",
    "diarch-*.service",
    "",
];

/// What was tried, how it ended, what it said.
struct Attempt {
    line: String,
    code: i32,
    said: String,
}

impl std::fmt::Display for Attempt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` ended with {}: {}", self.line, self.code, self.said)
    }
}

impl Attempt {
    /// For want of a right, and for nothing else that would make it fail by chance.
    fn was_refused(&self) -> bool {
        // The last one is said to root as well: of no unit of ours is the cgroup anybody else's.
        let because =
            ["Interactive authentication required", "Access denied", "Permission denied", "Operation not permitted", "not available on non-delegated units"];
        self.code != 0 && because.iter().any(|reason| self.said.contains(reason))
    }
    /// systemd would not even look for such a unit.
    fn was_no_name(&self) -> bool {
        self.code != 0 && self.said.contains("Unit name")
    }
}

/// Who tries, and from where.
#[derive(Debug, Clone, Copy)]
enum Who<'a> {
    /// A user outside every unit.
    Shell(&'a str),
    /// A service of this user's.
    Service(&'a str),
}

/// Tries each line, one after the other.
fn attempt(machine: &Machine, who: Who<'_>, lines: &[String]) -> Vec<Attempt> {
    let pid = |process: Option<Process>| process.map_or(0, |process| process.pid);
    let mut script = format!(
        "systemctl() {{ command systemctl --no-ask-password --no-pager \"$@\"; }}\n\
         systemd-run() {{ command systemd-run --no-ask-password \"$@\"; }}\n\
         busctl() {{ command busctl --allow-interactive-authorization=no \"$@\"; }}\n\
         supervisor={} qemu={}\n",
        pid(machine.main_process(SUPERVISOR)),
        pid(machine.qemus().into_values().next()),
    );
    for line in lines {
        script += &format!("said=$( {{ {line}\n}} 2>&1 </dev/null ); code=$?; printf '%s\\t%s\\n' $code \"${{said//$'\\n'/ | }}\"\n");
    }
    machine.write("/run/attempts", &script);
    let argv = ["/bin/bash", "/run/attempts"];
    let output = match who {
        Who::Shell(user) => machine.run(&[&["runuser", "-u", user, "--"], &argv[..]].concat()),
        Who::Service(user) => machine.in_unit("attempts.service", &[&format!("User={user}")], &argv),
    };
    let said = output.expect_success("the attempts").stdout;
    let answers: Vec<(&str, &str)> = said.lines().filter_map(|line| line.split_once('\t')).collect();
    assert_eq!(answers.len(), lines.len(), "an answer for each attempt:\n{said}");
    let paired = lines.iter().zip(answers);
    paired.map(|(line, (code, said))| Attempt { line: line.clone(), code: code.parse().expect("an exit code"), said: said.into() }).collect()
}

fn lines(of: &[&str]) -> Vec<String> {
    of.iter().map(|line| (*line).to_owned()).collect()
}

fn restart_by_name(name: &str) -> String {
    format!("busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager RestartUnit ss '{name}' replace")
}

/// What an attempt that was more than one would have changed.
fn standing(machine: &Machine) -> Vec<String> {
    let mut all = vec![format!("{:?} {:?} {:?}", machine.main_process(SUPERVISOR), machine.main_process(WORKER), machine.qemus())];
    let of_systemd = "systemctl show-environment; systemctl get-default; systemctl log-level; systemctl service-watchdogs; systemctl list-jobs --no-legend
        systemctl show -p MemoryMax,IPAddressAllow,FreezerState,SubState,DropInPaths diarch-supervisor.service diarch-worker.service diarch-vm-0.scope
        find /etc/systemd /run/systemd/system /run/systemd/transient /etc/diarch /run/diarch -printf '%p %y %m %u %s\\n' | sort
        systemctl list-unit-files --no-legend";
    all.extend(machine.sh(of_systemd).lines().map(str::to_owned));
    all
}

#[track_caller]
fn assert_all_refused(machine: &Machine, who: Who<'_>, lines: &[String]) {
    let before = standing(machine);
    let granted: Vec<String> = attempt(machine, who, lines).iter().filter(|tried| !tried.was_refused()).map(Attempt::to_string).collect();
    assert!(granted.is_empty(), "{who:?}, not refused for want of a right:\n{}", granted.join("\n"));
    assert_eq!(standing(machine), before, "{who:?} was refused everything, and something is different");
}

/// A machine with a VM, as something to lose.
fn with_a_vm() -> Machine {
    let machine = Machine::installed().vm(vm_file_stub("a")).program("diarch-probe").boot();
    machine.wait_healthy("a", SOON);
    machine.write("/tmp/evil.service", "[Service]\nExecStart=/bin/id\n");
    machine.write("/tmp/diarch-supervisor.service", "[Service]\nExecStart=/bin/id\n");
    machine
}

#[test]
fn the_workers_user_may_restart_the_supervisor_and_do_nothing_else() {
    need!(Machine, Package);
    let machine = with_a_vm();
    let (worker, vms) = (machine.main_process(WORKER), machine.qemus());
    // One line restarts the supervisor first, to see that a right does not rub off on the unit named beside it.
    let alone: Vec<String> = lines(REFUSED).into_iter().filter(|line| !line.contains("&&")).collect();
    for who in [Who::Shell("diarch"), Who::Service("diarch")] {
        assert_all_refused(&machine, who, &alone);
        for line in RESTARTS {
            let before = machine.main_process(SUPERVISOR);
            let tried = attempt(&machine, who, &lines(&[line]));
            assert_eq!(tried[0].code, 0, "{who:?}: {}", tried[0]);
            let another = || machine.main_process(SUPERVISOR).filter(|now| Some(*now) != before);
            machine.wait_for("another supervisor", SOON, another);
            machine.wait_active(SUPERVISOR, SOON);
        }
        for tried in attempt(&machine, who, &lines(&["systemctl restart diarch-supervisor.service diarch-worker.service"])) {
            assert!(tried.was_refused(), "{tried}");
        }
        machine.wait_active(SUPERVISOR, SOON);
        let before = standing(&machine);
        for tried in attempt(&machine, who, &NEAR.iter().map(|name| restart_by_name(name)).collect::<Vec<_>>()) {
            assert!(tried.was_refused() || tried.was_no_name(), "{tried}");
        }
        assert_eq!(standing(&machine), before);
    }
    assert_eq!((machine.main_process(WORKER), machine.qemus()), (worker, vms), "restarts of the supervisor touch nobody else");
}

#[test]
fn other_users_may_not_even_restart_it() {
    need!(Machine, Package);
    let machine = with_a_vm();
    machine.sh("useradd somebody; useradd -G diarch-operators deputy; useradd -G diarch,adm member");
    let all: Vec<String> = [REFUSED, RESTARTS].concat().iter().map(|line| (*line).to_owned()).collect();
    assert_all_refused(&machine, Who::Shell("nobody"), &all);
    assert_all_refused(&machine, Who::Shell("somebody"), &all);
    // In the worker's group, and in that of those who may read the audit.
    let readable = |line: &&String| *line != "cat /var/log/diarch/audit.jsonl";
    assert_all_refused(&machine, Who::Shell("member"), &all.iter().filter(readable).cloned().collect::<Vec<_>>());
    // An operator rules VMs through the worker, and nothing by systemd.
    assert_all_refused(&machine, Who::Service("deputy"), &all);
    let listed = machine.as_user("deputy", "diarch vm list").expect_success("an operator's own right").stdout;
    assert!(listed.contains('a'), "{listed}");
}

/// The methods that answer everybody: they read, or give back what the caller holds.
const OPEN_TO_ALL: &[&str] = &["Get", "List", "Lookup", "Dump", "Load", "Subscribe", "Unsubscribe", "Unref"];

/// Arguments of the methods that look at them before they ask polkit; `$job` waits for another one.
const ARGUMENTS: &[(&str, &str)] = &[
    ("AttachProcesses", "/ 1 1"),
    ("AttachProcessesToUnit", "diarch-supervisor.service / 1 1"),
    ("BindMount", "/etc /mnt false false"),
    ("BindMountUnit", "diarch-supervisor.service /etc /mnt false false"),
    ("CancelJob", "$job"),
    ("EnqueueJob", "stop replace"),
    ("Kill", "all 9"),
    ("KillUnit", "diarch-supervisor.service all 9"),
    ("MountImage", "/etc /mnt false false 0"),
    ("MountImageUnit", "diarch-supervisor.service /etc /mnt false false 0"),
    ("PresetAllUnitFiles", "full false false"),
    ("PresetUnitFilesWithMode", "1 diarch-supervisor.service full false false"),
    ("QueueSignal", "all 40 1"),
    ("QueueSignalUnit", "diarch-supervisor.service all 40 1"),
    ("SetEnvironment", "1 A=b"),
    ("StartUnitReplace", "waits.service diarch-supervisor.service replace"),
    ("UnsetAndSetEnvironment", "1 A 1 A=b"),
    ("UnsetEnvironment", "1 PATH"),
];

/// Two jobs of which one waits for the other, in the machine's queue.
fn queue_jobs(machine: &Machine) {
    machine.write("/run/systemd/system/slow.service", "[Service]\nType=oneshot\nExecStart=sleep 300\n");
    machine.write("/run/systemd/system/waits.service", "[Unit]\nAfter=slow.service\n[Service]\nType=oneshot\nExecStart=true\n");
    machine.sh("systemctl daemon-reload; systemctl start --no-block slow.service waits.service");
}

#[test]
fn no_method_of_systemds_manager_does_anything_for_the_workers_user() {
    need!(Machine, Package);
    let machine = with_a_vm();
    queue_jobs(&machine);
    let job = machine.sh("systemctl list-jobs --no-legend waits.service | cut -d' ' -f1");
    let unit = "/org/freedesktop/systemd1/unit/diarch_2dsupervisor_2eservice";
    let mut calls = Vec::new();
    // Of each the method that the rule is for.
    for (object, interface, allowed) in [
        ("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", "RestartUnit"),
        (unit, "org.freedesktop.systemd1.Unit", "Restart"),
        (unit, "org.freedesktop.systemd1.Service", ""),
    ] {
        let described = machine.sh(&format!("busctl --no-pager --no-legend introspect org.freedesktop.systemd1 {object} {interface}"));
        for line in described.lines() {
            let mut words = line.split_whitespace();
            let (Some(name), Some("method"), Some(signature)) = (words.next().and_then(|name| name.strip_prefix('.')), words.next(), words.next()) else {
                continue;
            };
            if name == allowed || OPEN_TO_ALL.iter().any(|open| name.starts_with(open)) {
                continue;
            }
            let first = if interface.ends_with("Manager") { "diarch-supervisor.service" } else { "replace" };
            let given = ARGUMENTS.iter().find(|(of, _)| *of == name).map_or_else(|| arguments(signature, first), |(_, given)| (*given).to_owned());
            let signature = if signature == "-" { String::new() } else { format!("'{signature}'") };
            calls.push(format!("job={job}; busctl call org.freedesktop.systemd1 {object} {interface} {name} {signature} {given}"));
        }
    }
    assert!(calls.len() > 70, "systemd 257 has some 100 of them: {}", calls.len());
    assert_all_refused(&machine, Who::Shell("diarch"), &calls);
}

/// Arguments of this signature that could do harm: `first` for the first text, and the mode of a job for the others.
fn arguments(signature: &str, first: &str) -> String {
    let mut words = Vec::new();
    let mut rest = signature.trim_matches('-');
    while let Some(kind) = rest.chars().next() {
        let (word, length) = match kind {
            'a' if rest.starts_with("as") => ("1 diarch-supervisor.service", 2),
            // Of other arrays, none.
            'a' => ("0", 1 + length_of_type(&rest[1..])),
            's' if words.is_empty() => (first, 1),
            's' => ("replace", 1),
            'b' => ("false", 1),
            _ => ("1", 1),
        };
        words.push(word);
        rest = &rest[length..];
    }
    words.join(" ")
}

/// The letters of the first type of a signature, as the D-Bus specification has it.
fn length_of_type(signature: &str) -> usize {
    let mut depth = 0;
    for (at, c) in signature.char_indices() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if depth == 0 && c != 'a' {
            return at + 1;
        }
    }
    signature.len()
}

#[test]
fn the_rule_can_not_see_a_jobs_mode_so_a_restart_can_cancel_jobs_that_wait() {
    need!(Machine, Package);
    // systemd 257 tells polkit the unit and the verb, and not the mode. One mode, "flush", cancels what waits in the queue: known, and no way to a right.
    let machine = with_a_vm();
    queue_jobs(&machine);
    let jobs = || machine.sh("systemctl list-jobs --no-legend waits.service");
    assert!(jobs().contains("waiting"), "{}", jobs());
    let tried = attempt(&machine, Who::Shell("diarch"), &[restart_by_name("diarch-supervisor.service").replace("replace", "flush")]);
    assert_eq!(tried[0].code, 0, "{}", tried[0]);
    machine.wait_active(SUPERVISOR, SOON);
    assert_eq!(jobs(), "", "if it waits still, systemd has changed: is the mode in the rule's sight now?");
}

// ---- identity: the worker's user, in the worker's unit ----

/// What the probe is told there.
#[track_caller]
fn hello_from(machine: &Machine, unit: &str, properties: &[&str]) -> String {
    machine.in_unit(unit, properties, &[PROBE, "hello", SOCKET]).expect_success(unit).stdout.trim().to_owned()
}

#[track_caller]
fn assert_refused_by(grant: &str, from: &str, answer: &str) {
    assert!(answer.starts_with(&format!("refused: denied by {grant} in the grants: ")), "{from}: {answer}");
}

/// Puts a program in the worker's place, in the worker's own unit. With the kind "oneshot" it has ended when this returns.
#[track_caller]
fn instead_of_the_worker(machine: &Machine, kind: &str, command: &str) {
    let text = format!("[Service]\nType={kind}\nRestart=no\nWatchdogSec=0\nExecStart=\nExecStart={command}\nStandardOutput=truncate:/run/said\n");
    machine.sh(&format!("mkdir -p /run/systemd/system/{WORKER}.d"));
    machine.write(&format!("/run/systemd/system/{WORKER}.d/probe.conf"), &text);
    machine.sh(&format!("rm -f /run/said; systemctl daemon-reload; systemctl restart {WORKER}"));
}

/// What the last program in a unit's place, or in a unit like it, said.
#[track_caller]
fn said(machine: &Machine) -> String {
    machine.read("/run/said").trim().to_owned()
}

/// Gives the unit back; the worker is ready when this returns.
#[track_caller]
fn give_back(machine: &Machine) {
    machine.sh(&format!("rm /run/systemd/system/{WORKER}.d/probe.conf; systemctl daemon-reload; systemctl restart {WORKER}"));
}

#[test]
fn the_workers_user_may_not_have_a_service_manager_of_its_own_as_every_other_user_may() {
    need!(Machine, Package);
    let machine = Machine::installed().boot();
    machine.sh("useradd --create-home somebody");
    // From a unit: to whom it can't see in one, logind says something else.
    let linger = |user: &str| machine.in_unit("linger.service", &[&format!("User={user}")], &["loginctl", "enable-linger", user]);
    linger("somebody").expect_success("what logind allows every user");
    let refused = linger("diarch");
    assert!(!refused.success() && refused.stderr.contains("denied"), "{refused:?}");
    assert!(!machine.exists("/var/lib/systemd/linger/diarch"));
    assert_eq!(machine.sh("getent passwd diarch | cut -d: -f6"), "/nonexistent", "no home in which a manager would find units");
}

#[test]
fn the_workers_user_outside_the_workers_unit_is_nobody() {
    need!(Machine, Package);
    let machine = with_a_vm();
    let diarch = machine.sh("id -u diarch");
    let vm = machine.sh("stat -c %u /proc/$(cat /sys/fs/cgroup/diarch.slice/diarch-vms.slice/diarch-vm-0.scope/cgroup.procs)");
    machine.sh("useradd -G diarch member; useradd -G diarch-operators deputy");
    let (worker, supervisor) = (machine.main_process(WORKER), machine.main_process(SUPERVISOR));

    // In a unit of every name that comes near, and in none.
    let user_slice = format!("Slice=user-{diarch}.slice");
    for (unit, more) in [
        ("evil.service", "Slice=system.slice"),
        ("diarch-worker.service.service", "Slice=system.slice"),
        ("x-diarch-worker.service", "Slice=system.slice"),
        ("diarch-worker@x.service", "Slice=system.slice"),
        ("Diarch-worker.service", "Slice=system.slice"),
        ("diarch-worker-1.service", "Slice=diarch-worker.slice"),
        ("in-a-session.service", &user_slice),
    ] {
        let answer = hello_from(&machine, unit, &["User=diarch", more]);
        assert_refused_by("worker.unit", unit, &answer);
        assert!(answer.contains(&format!("the peer is in {unit}, and the worker in diarch-worker.service")), "{answer}");
    }
    let scope = |name: &str| machine.sh(&format!("systemd-run --quiet --scope --unit={name} --uid=diarch {PROBE} hello {SOCKET}"));
    assert_refused_by("worker.unit", "a scope", &scope("diarch-worker.service.scope"));
    let in_no_unit = machine.as_user("diarch", &format!("{PROBE} hello {SOCKET}")).stdout;
    assert_refused_by("worker.unit", "no unit", &in_no_unit);

    // A unit that may make cgroups below its own, and calls one as the worker's unit is called.
    let delegated = "own=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
        mkdir $own/diarch-worker.service && echo $$ >$own/diarch-worker.service/cgroup.procs || exit
        cat /proc/self/cgroup; exec /usr/local/bin/diarch-probe hello /run/diarch/supervisor.sock";
    machine.write("/run/delegated", delegated);
    let said = machine.in_unit("delegated.service", &["User=diarch", "Delegate=yes"], &["/bin/bash", "/run/delegated"]).expect_success("delegated").stdout;
    assert!(said.contains("/system.slice/delegated.service/diarch-worker.service"), "{said}");
    assert!(said.contains("denied by worker.unit in the grants: the peer is in delegated.service,"), "{said}");

    // root: in a unit of its own, and where a login would be.
    assert_refused_by("worker.user", "root", &hello_from(&machine, "curious.service", &[]));
    assert_refused_by("worker.unit", "root in no unit", &machine.sh(&format!("{PROBE} hello {SOCKET}")));
    // Who is in the worker's group gets to the door, and not through it; to others there is no door. A VM is one of them.
    assert_refused_by("worker.user", "a member of the group", &hello_from(&machine, "member.service", &["User=member"]));
    for user in ["nobody", "deputy"] {
        assert_eq!(hello_from(&machine, "other.service", &[&format!("User={user}")]), "EACCES", "{user}");
    }
    let as_the_vm = machine.run(&["setpriv", "--reuid", &vm, "--regid", &vm, "--clear-groups", PROBE, "hello", SOCKET]);
    assert_eq!(as_the_vm.stdout.trim(), "EACCES", "the user of a VM");

    machine.sh("journalctl --sync");
    let journal = machine.journal(SUPERVISOR);
    let audit = machine.read("/var/log/diarch/audit.jsonl");
    for of in [&journal, &audit] {
        for said in ["the peer is in evil.service, and the worker in diarch-worker.service", "the peer is in delegated.service", "the peer's uid is 0, and"] {
            assert!(of.lines().any(|line| line.contains("connection refused") && line.contains(said)), "{said}:\n{of}");
        }
    }
    machine.diarch(&["audit", "verify"]).expect_success("the audit");
    assert_eq!((machine.main_process(WORKER), machine.main_process(SUPERVISOR)), (worker, supervisor));
    assert!(!machine.journal(WORKER).contains("supervisor.lost"), "the worker's own session was not disturbed");
}

#[test]
fn what_counts_is_who_made_the_connection_and_that_it_lives() {
    need!(Machine, Package);
    let machine = with_a_vm();
    // Whatever the unit runs is the unit: there is no telling a worker from what it started, and the unit is where its start is prevented.
    instead_of_the_worker(&machine, "oneshot", &format!("/bin/sh -c '{PROBE} hello {SOCKET}; true'"));
    assert_eq!(said(&machine), "welcome", "a child of the unit's main process");

    // A connection that an outsider made is an outsider's, in whosever hands it is.
    machine.sh(&format!("systemd-run --quiet --unit=lender.service -p User=diarch {PROBE} lend {SOCKET} /var/lib/diarch/via"));
    machine.sh("until [ -S /var/lib/diarch/via ]; do sleep 0.01; done");
    instead_of_the_worker(&machine, "oneshot", &format!("{PROBE} hello {SOCKET} /var/lib/diarch/via"));
    assert_refused_by("worker.unit", "lent to the unit", &said(&machine));
    assert!(said(&machine).contains("lender.service"), "{}", said(&machine));

    // One that the worker made is the worker's: it can lend its power as it can lend its answers. What it may do does not grow by that.
    machine.sh("rm /var/lib/diarch/via");
    instead_of_the_worker(&machine, "exec", &format!("{PROBE} lend {SOCKET} /var/lib/diarch/via"));
    machine.sh("until [ -S /var/lib/diarch/via ]; do sleep 0.01; done");
    let borrowed = machine.in_unit("borrower.service", &["User=diarch"], &[PROBE, "hello", SOCKET, "/var/lib/diarch/via"]).stdout;
    assert_eq!(borrowed.trim(), "welcome", "lent by the unit");

    // Right user and right unit, and gone when it is looked at: its number could be anybody's by now.
    let refused = || machine.journal(SUPERVISOR).matches("the peer's").count();
    let before = refused();
    machine.kill(SUPERVISOR, Signal::STOP);
    instead_of_the_worker(&machine, "oneshot", &format!("{PROBE} leave {SOCKET}"));
    machine.kill(SUPERVISOR, Signal::CONT);
    assert!(said(&machine).ends_with("was here"), "{}", said(&machine));
    machine.wait_for("the refusal", SOON, || (refused() > before).then_some(()));
    let journal = machine.journal(SUPERVISOR);
    let last = journal.lines().rfind(|line| line.contains("the peer's")).expect("it was there");
    assert!(last.contains("can't be looked up"), "{last}");
    give_back(&machine);
    machine.wait_healthy("a", SOON);
}

/// Grants with this `[worker]`; no VM.
fn grants(worker: &str) -> String {
    format!(
        "[worker]\n{worker}\n[vms]\nmax = 0\nuid_first = 2100000000\nmemory_mib = 0\ncpus_each = 1\n[qemu.default]\npath = \"/usr/bin/qemu-system-x86_64\"\n"
    )
}

#[test]
fn another_unit_or_any_is_let_in_only_when_the_grants_say_so() {
    need!(Machine, Package);
    let another = grants("user = \"diarch\"\nunit = \"second.service\"");
    let machine = Machine::installed().program("diarch-probe").grants(&another).mask(WORKER).until(Until::Booted).boot();
    machine.wait_active(SUPERVISOR, SOON);
    let second = || hello_from(&machine, "second.service", &["User=diarch"]);
    let first = || hello_from(&machine, "first.service", &["User=diarch"]);
    assert_eq!(second(), "welcome", "the unit that is named");
    assert_refused_by("worker.unit", "first.service", &first());

    machine.write("/etc/diarch/grants.toml", &grants("user = \"diarch\""));
    machine.systemctl(&["restart", SUPERVISOR]);
    assert_eq!((second(), first()), ("welcome".into(), "welcome".into()), "none is named: the user alone decides");
    assert_eq!(machine.as_user("diarch", &format!("{PROBE} hello {SOCKET}")).stdout.trim(), "welcome");
    assert_refused_by("worker.user", "root", &hello_from(&machine, "second.service", &[]));
    assert_eq!(hello_from(&machine, "second.service", &["User=nobody"]), "EACCES");

    // root is not let in by any grant: the two halves are two because they are two users.
    for root in ["user = 0", "user = \"root\""] {
        machine.write("/root/grants.toml", &grants(root));
        let checked = machine.run(&["diarch-supervisor", "check-grants", "/root/grants.toml"]);
        assert!(!checked.success() && checked.stderr.contains("the worker can't be root"), "{checked:?}");
    }
}

#[test]
fn the_worker_takes_no_other_users_socket_for_the_supervisors() {
    need!(Machine, Package);
    let machine = with_a_vm();
    machine.sh(&format!("systemctl mask --runtime --quiet {SUPERVISOR_SOCKET}; systemctl stop {WORKER} {SUPERVISOR_SOCKET} {SUPERVISOR}"));
    // Only root can put a socket there.
    for user in ["diarch", "nobody"] {
        for path in [SOCKET, "/run/diarch/other.sock"] {
            let said = machine.as_user(user, &format!("{PROBE} bind {path}")).stdout;
            assert_eq!(said.trim(), if machine.exists(path) { "EADDRINUSE" } else { "EACCES" }, "{user}: {path}");
        }
        assert!(machine.as_user(user, "rm -f /run/diarch/supervisor.sock; mv /run/diarch /run/x").stderr.contains("Permission denied"));
    }
    instead_of_the_worker(&machine, "oneshot", &format!("{PROBE} bind /run/diarch/other.sock"));
    assert!(["EACCES", "EROFS"].contains(&said(&machine).as_str()), "in the worker's own unit: {}", said(&machine));
    machine.sh(&format!("rm /run/systemd/system/{WORKER}.d/probe.conf; systemctl daemon-reload"));

    // So root does, for somebody else.
    machine
        .sh(&format!("rm -f {SOCKET}; systemd-run --quiet --unit=squatter.service {PROBE} squat {SOCKET} 65534; until [ -S {SOCKET} ]; do sleep 0.01; done"));
    machine.sh("journalctl --sync");
    let restarts = || machine.journal(WORKER).matches("supervisor.restarting").count();
    let before = restarts();
    machine.systemctl(&["start", "--no-block", WORKER]);
    let refused = || machine.journal(WORKER).contains("is served by uid 65534, not 0").then_some(());
    machine.wait_for("the worker's refusal", SOON, refused);
    machine.sh(&format!("systemctl stop {WORKER}; journalctl --sync"));
    assert_eq!((restarts(), machine.is_active(SUPERVISOR)), (before, false), "nobody was asked to restart what is not the cause");

    // systemd's own socket takes the name back.
    machine.sh(&format!("systemctl unmask --runtime --quiet {SUPERVISOR_SOCKET}; systemctl start {SUPERVISOR_SOCKET} {WORKER}"));
    machine.wait_healthy("a", SOON);
}

// ---- what the units take away ----

/// `systemd-analyze security`: the sum for a unit.
fn exposure(machine: &Machine, unit: &str) -> f64 {
    let report = machine.sh(&format!("systemd-analyze security --no-pager {unit}"));
    let sum = report.lines().find(|line| line.contains("Overall exposure level")).and_then(|line| line.rsplit_once(": "));
    sum.and_then(|(_, sum)| sum.split_whitespace().next()?.parse().ok()).unwrap_or_else(|| panic!("no sum:\n{report}"))
}

#[test]
fn the_exposure_of_both_units_is_low() {
    need!(Machine, Package);
    let machine = Machine::installed().boot();
    let (worker, supervisor) = (exposure(&machine, WORKER), exposure(&machine, SUPERVISOR));
    println!("exposure: {WORKER} {worker}, {SUPERVISOR} {supervisor}");
    assert!(worker <= 1.2 && supervisor <= 4.0, "{worker} {supervisor}");
    // The figure is of the unit as it is: one more capability shows.
    machine.sh(&format!("mkdir /run/systemd/system/{SUPERVISOR}.d"));
    machine.write(&format!("/run/systemd/system/{SUPERVISOR}.d/more.conf"), "[Service]\nCapabilityBoundingSet=CAP_DAC_OVERRIDE\n");
    machine.systemctl(&["daemon-reload"]);
    assert!(exposure(&machine, SUPERVISOR) > supervisor, "the drop-in counts");
}

/// The lines of `/proc/PID/status`.
fn status(process: Process) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(format!("/proc/{}/status", process.host_pid)).expect("it lives");
    text.lines().filter_map(|line| line.split_once(':')).map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// Its five capability sets, in this order: inheritable, permitted, effective, bounding, ambient.
fn capabilities(status: &BTreeMap<String, String>) -> [u64; 5] {
    ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| u64::from_str_radix(&status[set], 16).expect("hexadecimal"))
}

#[test]
fn the_running_halves_and_qemu_have_the_rights_of_the_table_and_no_other() {
    need!(Machine, Package, Guest);
    let machine = Machine::installed().vm(vm_file_guest("web", 8080)).boot();
    machine.wait_vm("web", SOON, "running", |vm| [Phase::Booting, Phase::Healthy].contains(&vm.phase));
    let process = |unit: &str| status(machine.main_process(unit).expect("it runs"));
    let (supervisor, worker) = (process(SUPERVISOR), process(WORKER));
    let diarch = machine.sh("id -u diarch");
    let four = |id: &str| [id; 4].join("\t");

    // The supervisor: what the rows name.
    let named: BTreeSet<String> = OPERATIONS.iter().flat_map(|row| row.capability).map(|name| name.to_lowercase()).collect();
    let number = |name: &String| -> u32 {
        let shown = machine.sh(&format!("systemd-analyze capability {name}"));
        shown.split_whitespace().last().and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{shown}"))
    };
    let bits = named.iter().map(|name| 1_u64 << number(name)).sum();
    assert_eq!(capabilities(&supervisor), [0, bits, bits, bits, 0], "of {named:?}");
    let granted = machine.show(SUPERVISOR, "CapabilityBoundingSet");
    assert_eq!(granted.split_whitespace().map(str::to_owned).collect::<BTreeSet<_>>(), named, "the unit's, and the table's");
    // The worker: nothing, and no group but its own.
    assert_eq!(capabilities(&worker), [0; 5]);
    assert_eq!((worker["Uid"].as_str(), worker["Groups"].as_str()), (four(&diarch).as_str(), machine.sh("id -g diarch").as_str()));
    for half in [&supervisor, &worker] {
        assert_eq!((half["NoNewPrivs"].as_str(), half["Seccomp"].as_str()), ("1", "2"));
    }

    // QEMU: nobody, alone, with its own files.
    let qemu = machine.qemus()["diarch-vm-0.scope"];
    let own = ["port 8080", "/run/diarch/vm/0/console.sock", "/run/diarch/vm/0/qmp.sock"].map(str::to_owned);
    let mut files = files_of_the_vm(qemu);
    for _ in 0..200 {
        if files.as_ref().is_ok_and(|sockets| *sockets == BTreeSet::from(own.clone())) {
            break;
        }
        // It may have just begun, and still read its libraries; a connection may have come between two looks.
        std::thread::sleep(Duration::from_millis(50));
        files = files_of_the_vm(qemu);
    }
    assert_eq!(files, Ok(BTreeSet::from(own)));
    let of_qemu = status(qemu);
    assert_eq!(capabilities(&of_qemu), [0; 5]);
    assert_eq!((of_qemu["NoNewPrivs"].as_str(), of_qemu["Seccomp"].as_str()), ("1", "2"));
    let first: u32 = machine.read("/etc/diarch/grants.toml").lines().find_map(|line| line.strip_prefix("uid_first = ")?.parse().ok()).expect("a number");
    assert_eq!((&of_qemu["Uid"], &of_qemu["Gid"], of_qemu["Groups"].as_str()), (&four(&first.to_string()), &four(&first.to_string()), ""));
    let filters = |of: &BTreeMap<String, String>| of["Seccomp_filters"].parse::<u32>().expect("a number");
    assert!(filters(&of_qemu) >= filters(&supervisor) + 2, "the jail's and its own -sandbox lie over the unit's filter");
    assert_eq!(machine.processes_of("diarch-vm-0.scope"), [qemu]);
    assert_eq!(machine.processes_of(SUPERVISOR).len(), 1, "the supervisor is alone in its cgroup");
}

/// Each descriptor of a VM's QEMU should be a file that it was given, a socket, or something without a name. Gives the sockets' names, or what is none of
/// these.
fn files_of_the_vm(qemu: Process) -> Result<BTreeSet<String>, String> {
    let table = |name: &str| std::fs::read_to_string(format!("/proc/{}/net/{name}", qemu.host_pid)).unwrap_or_default();
    let (unix, tcp) = (table("unix"), table("tcp"));
    let mut sockets = BTreeSet::new();
    for fd in std::fs::read_dir(format!("/proc/{}/fd", qemu.host_pid)).map_err(|e| e.to_string())?.flatten() {
        let target = std::fs::read_link(fd.path()).map_err(|e| e.to_string())?.to_string_lossy().into_owned();
        if std::fs::metadata(fd.path()).map_err(|e| e.to_string())?.is_dir() {
            return Err(format!("a directory: {target}"));
        }
        let Some(inode) = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) else {
            let given = ["/dev/null", "/var/log/diarch/vms/web.", "/srv/guest/", "anon_inode:[event", "anon_inode:[signalfd]"];
            if given.iter().any(|own| target.starts_with(own)) {
                continue;
            }
            return Err(format!("not its own: {target}"));
        };
        // The columns: /proc/net/unix ends with inode and path; /proc/net/tcp has the inode tenth, and the local address second, in hexadecimal.
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let with_inode = |table: &str, at: usize| table.lines().map(words).find(|line| line.get(at).is_some_and(|number| number == inode));
        let path = with_inode(&unix, 6).map(|line| line.get(7).cloned().unwrap_or("a socket without a name".into()));
        let port = with_inode(&tcp, 9).map(|line| line[1].replace("0100007F:1F90", "port 8080"));
        sockets.insert(path.or(port).ok_or_else(|| format!("a socket of another kind: {target}"))?);
    }
    Ok(sockets)
}

/// Runs a command in a unit that is the real one but for its name, what it executes, and `more`; gives what it said. The real one goes on.
#[track_caller]
fn in_twin(machine: &Machine, unit: &str, more: &str, command: &str) -> String {
    let twin = format!("twin-of-{unit}");
    let text = format!(
        "[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nExecStart=\nExecStart={command}\n\
         StandardOutput=truncate:/run/said\nStandardError=append:/run/said\n{more}\n"
    );
    machine.sh(&format!("mkdir -p /run/systemd/system/{twin}.d; cp /usr/lib/systemd/system/{unit} /run/systemd/system/{twin}"));
    machine.write(&format!("/run/systemd/system/{twin}.d/twin.conf"), &text);
    machine.sh(&format!("rm -f /run/said; systemctl daemon-reload; systemctl start {twin} || true"));
    said(machine)
}

/// As [`in_twin`], a script of bash's.
#[track_caller]
fn script_in_twin(machine: &Machine, unit: &str, script: &str) -> String {
    machine.write("/run/script", script);
    in_twin(machine, unit, "", "/bin/bash /run/script")
}

/// `diarch-probe calls`, by name.
fn answers(text: &str) -> BTreeMap<String, String> {
    let lines: BTreeMap<_, _> = text.lines().filter_map(|line| line.rsplit_once(": ")).map(|(name, answer)| (name.to_owned(), answer.to_owned())).collect();
    assert!(lines.len() > 100, "{text}");
    lines
}

/// What becomes of each call in the supervisor's unit and in the worker's. `filter`: the unit's `SystemCallFilter=` refuses it; an error: another directive
/// does; `-`: it reaches the kernel.
const CALLS: &str = "
reboot                          filter        filter
kexec_load                      filter        filter
kexec_file_load                 filter        filter
init_module                     filter        filter
finit_module                    filter        filter
delete_module                   filter        filter
swapon                          filter        filter
swapoff                         filter        filter
settimeofday                    filter        filter
clock_settime                   filter        filter
adjtimex                        filter        filter
clock_adjtime                   filter        filter
iopl                            filter        filter
ioperm                          filter        filter
ptrace                          filter        filter
process_vm_readv                filter        filter
process_vm_writev               filter        filter
pidfd_getfd                     filter        filter
userfaultfd                     filter        filter
bpf                             filter        filter
perf_event_open                 filter        filter
syslog                          filter        filter
fanotify_init                   filter        filter
acct                            filter        filter
quotactl                        filter        filter
open_by_handle_at               filter        filter
sethostname                     filter        filter
setdomainname                   filter        filter
io_uring_setup                  filter        filter
io_uring_enter                  filter        filter
io_uring_register               filter        filter
io_setup                        -             filter
add_key                         filter        filter
request_key                     filter        filter
keyctl                          -             filter
shmget                          filter        -
shmat                           filter        -
shmctl                          filter        -
shmdt                           filter        -
semget                          filter        -
semop                           filter        -
semtimedop                      filter        -
semctl                          filter        -
msgget                          filter        -
msgsnd                          filter        -
msgrcv                          filter        -
msgctl                          filter        -
mq_open                         filter        -
mq_unlink                       filter        -
mq_notify                       filter        -
mq_getsetattr                   filter        -
mq_timedsend                    filter        -
mq_timedreceive                 filter        -
setpriority                     filter        filter
ioprio_set                      filter        filter
sched_setscheduler              filter        filter
sched_setparam                  filter        filter
sched_setattr                   filter        filter
sched_setaffinity               filter        filter
set_mempolicy                   filter        filter
mbind                           filter        filter
migrate_pages                   filter        filter
move_pages                      filter        filter
setrlimit                       filter        filter
mlockall                        -             filter
setuid                          -             filter
setresuid                       -             filter
setresgid                       -             filter
setgroups                       -             filter
capset                          -             filter
chown                           -             filter
fchmodat set-uid                -             EPERM
chroot                          -             filter
pivot_root                      -             filter
mount                           -             filter
umount2                         -             filter
fsopen                          -             filter
fsmount                         -             filter
open_tree                       -             filter
move_mount                      -             filter
mount_setattr                   -             filter
openat2                         -             ENOSYS
unshare mount                   -             EPERM
unshare network                 -             EPERM
unshare user                    EPERM         EPERM
unshare pid                     -             EPERM
unshare ipc                     -             EPERM
unshare uts                     EPERM         EPERM
unshare cgroup                  EPERM         EPERM
unshare time                    EPERM         EPERM
clone user                      EPERM         EPERM
clone3                          ENOSYS        ENOSYS
setns mount                     -             EPERM
setns network                   -             EPERM
setns user                      EPERM         EPERM
setns any                       EPERM         EPERM
personality                     EPERM         EPERM
seccomp                         -             -
mmap writable and executable    -             EACCES
mprotect executable             -             EACCES
socket netlink                  -             EAFNOSUPPORT
socket packet                   EAFNOSUPPORT  EAFNOSUPPORT
getpid of another ABI           SIGSYS        SIGSYS
";

/// For a call that the unit's filter refuses, an error that nobody else gives: with it there is no mistaking a filter for a missing capability.
const FILTERED: &str = "EUCLEAN";

#[test]
fn each_system_call_outside_a_units_filter_fails_and_each_inside_reaches_the_kernel() {
    need!(Machine, Package);
    let machine = Machine::installed().program("diarch-probe").boot();
    let calls = format!("{PROBE} calls");
    let outside = answers(&machine.sh(&calls));
    // root in both, with the capability that most of these ask for: what is refused is refused by the unit.
    let marked = format!("SystemCallErrorNumber={FILTERED}\nCapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_CHROOT");
    let units = [
        (SUPERVISOR, answers(&in_twin(&machine, SUPERVISOR, "", &calls)), answers(&in_twin(&machine, SUPERVISOR, &marked, &calls))),
        (
            WORKER,
            answers(&in_twin(&machine, WORKER, "", &calls)),
            answers(&in_twin(&machine, WORKER, &format!("User=\nGroup=\nStateDirectory=\n{marked}"), &calls)),
        ),
    ];
    let mut wrong = Vec::new();
    let mut named = BTreeSet::new();
    for line in CALLS.lines().filter(|line| !line.is_empty()) {
        let (name, fates) = line.split_at(32);
        let name = name.trim();
        named.insert(name.to_owned());
        for ((unit, as_it_is, marked), fate) in units.iter().zip(fates.split_whitespace()) {
            let (without, plain, marked) = (&outside[name], &as_it_is[name], &marked[name]);
            let right = match fate {
                "filter" => plain == "EPERM" && marked == FILTERED,
                // Its own error shows that it got there, or the missing capability's.
                "-" => marked == without && (plain == without || plain == "EPERM"),
                error => plain == error && marked == error && without != error,
            };
            if !right {
                wrong.push(format!("{name} in {unit}: should be {fate}; it is {plain}, {marked} when marked, and {without} outside"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(named, outside.into_keys().collect(), "each call that is tried has its line");
}

#[test]
fn the_filter_of_the_twin_is_the_filter_of_the_half() {
    need!(Machine, Package);
    let machine = Machine::installed().boot();
    let filters = |text: &str| text.lines().find_map(|line| line.strip_prefix("Seccomp_filters:")).map(|number| number.trim().to_owned());
    for unit in [SUPERVISOR, WORKER] {
        let half = &status(machine.main_process(unit).expect("it runs"))["Seccomp_filters"];
        assert_eq!(filters(&in_twin(&machine, unit, "", "/bin/cat /proc/self/status")).as_ref(), Some(half), "{unit}");
    }
}

#[test]
fn the_supervisors_unit_lets_a_vms_jail_be_made_and_the_workers_does_not() {
    need!(Machine, Package);
    let machine = Machine::installed().program("diarch-probe").boot();
    let jail = format!("{PROBE} jail /run/diarch");
    let made = "own namespaces: ok\na mount by descriptor: ok\na copy of a mount: ok\na mount by path: ok\nanother root: ";
    assert_eq!(in_twin(&machine, SUPERVISOR, "", &jail), format!("{made}EPERM"), "chroot(2) needs a capability that no row names: a jail pivots");
    assert_eq!(in_twin(&machine, SUPERVISOR, "CapabilityBoundingSet=CAP_SYS_CHROOT", &jail), format!("{made}ok"));
    assert_eq!(in_twin(&machine, WORKER, "User=\nGroup=\nStateDirectory=\nCapabilityBoundingSet=CAP_SYS_ADMIN", &jail), "own namespaces: EPERM");
}

// ---- what the units hide ----

/// Whether a path, as this process sees it, can be written to by whoever has the right; `None`: it is not there.
fn writable(process: Process, path: &str) -> Option<bool> {
    let seen = format!("/proc/{}/root{path}", process.host_pid);
    Path::new(&seen).exists().then(|| !flags(&seen).contains(StatVfsMountFlags::RDONLY))
}

fn flags(path: &str) -> StatVfsMountFlags {
    rustix::fs::statvfs(path).unwrap_or_else(|e| panic!("{path}: {e}")).f_flag
}

/// Gives the machine the /sys that a host has: whole and writable. (A container's is in pieces, and read-only before any unit makes it so.) Nothing writes
/// there, and it ends with the machine.
fn like_a_host(machine: &Machine) {
    machine.sh("umount -l /sys; mount -t sysfs sysfs /sys; mount -o remount,rw /sys; mount -t cgroup2 cgroup2 /sys/fs/cgroup");
    machine.systemctl(&["restart", SUPERVISOR, WORKER]);
}

#[test]
fn the_supervisor_writes_its_own_directories_and_devices_and_nothing_else_of_the_file_system() {
    need!(Machine, Package);
    let machine = Machine::installed().program("diarch-probe").boot();
    like_a_host(&machine);
    let supervisor = machine.main_process(SUPERVISOR).expect("it runs");
    for path in ["/run/diarch", "/var/log/diarch", "/sys/devices"] {
        assert_eq!(writable(supervisor, path), Some(true), "{path}");
    }
    assert_ne!(writable(supervisor, "/sys/bus/pci"), Some(false), "where there is one");
    for path in [
        "/",
        "/tmp",
        "/var/tmp",
        "/etc",
        "/etc/diarch",
        "/usr",
        "/var",
        "/var/lib/diarch",
        "/srv",
        "/boot",
        "/run",
        "/run/systemd",
        "/proc/sys",
        "/sys/fs/cgroup",
    ] {
        assert_ne!(writable(supervisor, path), Some(true), "{path}");
    }
    // Of /sys what devices need. Which others there are is the kernel's business; in /sys itself are directories only.
    let sys = machine.sh("ls /sys");
    let open: Vec<&str> = sys.lines().filter(|name| *name != "devices" && writable(supervisor, &format!("/sys/{name}")) == Some(true)).collect();
    assert!(open.is_empty(), "writable below /sys: {open:?}");
    for path in ["/run/diarch", "/var/log/diarch", "/tmp", "/var/tmp"] {
        assert!(flags(&format!("/proc/{}/root{path}", supervisor.host_pid)).contains(StatVfsMountFlags::NOEXEC), "{path} holds no programs");
    }
    let script = "exec 2>&1
        for file in /etc/shadow /etc/gshadow /proc/kcore /proc/kallsyms; do read -r line <$file; done
        for dir in /root /home /etc/ssh /dev/shm /dev/mqueue; do [ ! -e $dir ] || ls $dir; done
        exec 3<>/dev/null 4<>/dev/net/tun && echo devices it will need
        exec 3<>/run/a-device";
    // A harmless device that is not on the list.
    machine.sh("mknod /run/a-device c 10 229; mount -o remount,dev /run; exec 3<>/run/a-device");
    let said = script_in_twin(&machine, SUPERVISOR, script);
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.contains(&"devices it will need"), "{said}");
    let denied = |of: &str| lines.iter().any(|line| line.contains(of) && (line.contains("Permission denied") || line.contains("Operation not permitted")));
    for of in ["/etc/shadow", "/etc/gshadow", "/root", "/home", "/dev/shm", "/dev/mqueue", "/run/a-device"] {
        assert!(denied(of), "{of}:\n{said}");
    }
}

#[test]
fn the_worker_sees_itself_and_its_own_directories_and_nothing_else() {
    need!(Machine, Package);
    let machine = Machine::installed().program("diarch-probe").boot();
    like_a_host(&machine);
    let worker = machine.main_process(WORKER).expect("it runs");
    for path in ["/run/diarch/worker", "/var/lib/diarch", "/var/log/diarch/vms", "/tmp"] {
        assert_eq!(writable(worker, path), Some(true), "{path}");
        assert!(flags(&format!("/proc/{}/root{path}", worker.host_pid)).contains(StatVfsMountFlags::NOEXEC), "{path} holds no programs");
    }
    for path in ["/", "/etc", "/usr", "/home", "/root", "/srv", "/var", "/var/log/diarch", "/run", "/run/diarch", "/dev", "/sys/fs/cgroup", "/sys/kernel"] {
        assert_ne!(writable(worker, path), Some(true), "{path}");
    }
    let script = "exec 2>&1
        echo processes: $(ls /proc)
        echo devices: $(ls /dev)
        for path in /etc/x /usr/x /home/x /run/x /run/diarch/x /sys/x /proc/self/oom_adj /var/log/diarch/x; do echo >$path && echo wrote $path; done
        for dir in /home /root /run/diarch/vm; do ls $dir && echo saw $dir; done
        cp /bin/true /var/lib/diarch/program; /var/lib/diarch/program && echo ran; rm /var/lib/diarch/program
        cat /proc/1/status /proc/meminfo /proc/sys/kernel/hostname && echo looked around";
    let said = script_in_twin(&machine, WORKER, script);
    for deed in ["wrote", "saw", "ran", "looked around"] {
        assert!(!said.lines().any(|line| line.starts_with(deed) && !line.contains("oom_adj")), "{deed}:\n{said}");
    }
    let words = |of: &str| said.lines().find_map(|line| line.strip_prefix(of)).unwrap_or_else(|| panic!("{said}")).split_whitespace().collect::<Vec<_>>();
    let processes = words("processes:");
    let supervisor = machine.main_process(SUPERVISOR).expect("it runs").pid.to_string();
    assert!(!processes.contains(&"1") && !processes.contains(&supervisor.as_str()), "other users' processes: {processes:?}");
    assert!(processes.iter().all(|name| name.parse::<u32>().is_ok() || ["self", "thread-self"].contains(name)), "more than processes: {processes:?}");
    let real =
        |name: &&&str| ["kvm", "vfio", "mem", "sd", "vd", "nvme", "loop", "net", "vhost", "dm-", "mapper", "kmsg", "rtc"].iter().any(|d| name.starts_with(d));
    assert_eq!(words("devices:").iter().find(real), None);
    // Somebody else's /tmp is another.
    machine.write("/tmp/of-the-host", "");
    assert_eq!(writable(worker, "/tmp/of-the-host"), None);
}

#[test]
fn neither_half_reaches_the_network_and_the_worker_only_its_own_hosts_ports() {
    need!(Machine, Package);
    let machine = Machine::installed().program("diarch-probe").boot();
    // An address of the host that is not a loopback one; nobody listens, and says so at once to who gets through.
    machine.sh("ip address add 192.0.2.1/32 dev lo");
    let reach = |address: &str| format!("{PROBE} reach {address} 7");
    let outside = |address: &str| machine.as_user("diarch", &reach(address)).stdout;
    assert_eq!((outside("127.0.0.1").trim(), outside("192.0.2.1").trim()), ("ECONNREFUSED", "ECONNREFUSED"), "without the unit");
    let from = |unit: &str, address: &str| in_twin(&machine, unit, "", &reach(address));
    assert_eq!((from(WORKER, "127.0.0.1").as_str(), from(WORKER, "192.0.2.1").as_str()), ("ECONNREFUSED", "no answer"));
    assert_eq!((from(WORKER, "::1").as_str(), from(SUPERVISOR, "::1").as_str()), ("ECONNREFUSED", "no answer"));
    assert_eq!((from(SUPERVISOR, "127.0.0.1").as_str(), from(SUPERVISOR, "192.0.2.1").as_str()), ("no answer", "no answer"));
    let listen = format!("{PROBE} listen 127.0.0.1 7777");
    assert_eq!(machine.as_user("diarch", &listen).stdout.trim(), "bound");
    assert_eq!(in_twin(&machine, WORKER, "", &listen), "EPERM");
}
