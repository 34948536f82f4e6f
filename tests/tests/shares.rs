//! A directory of the host's in a guest: mounted by the supervisor, served by a virtiofsd in a jail of its own, seen by a guest that booted. On a Debian 13, whose
//! virtiofsd can do without capabilities.

use diarch_tests::machine::{Machine, Process, SUPERVISOR, vm_file_guest};
use diarch_tests::need;
use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

/// Under TCG on a busy machine with two processors.
const BOOT: Duration = Duration::from_secs(150);
const GRANTS: &str =
    "[virtiofsd]\npath = \"/usr/libexec/virtiofsd\"\n[mounts.models]\ndirectory = \"/srv/models\"\n[mounts.work]\ndirectory = \"/srv/work\"\nwrite = true\n";

fn machine() -> Machine {
    let mut vm = vm_file_guest("web", 8080);
    vm["shares"] = serde_json::json!([{"share": "models", "tag": "models"}, {"share": "work", "tag": "work", "access": "read-write"}]);
    let words = vm["image"]["cmdline"].as_str().unwrap().to_owned();
    vm["image"]["cmdline"] = format!("{words} diarch.share=models diarch.share=work").into();
    let machine = Machine::installed()
        .grants_more(GRANTS)
        .file("/srv/models/file", "seven billion\n")
        .file("/srv/work/file", "to do\n")
        .file("/etc/tmpfiles.d/work.conf", "z /srv/work 0777 - - -\n")
        .vm(vm)
        .boot();
    machine.sh("chmod 0777 /srv/work");
    machine
}

/// The virtiofsds of the VM, from this host's side.
fn serving(machine: &Machine) -> Vec<Process> {
    machine.processes_of("diarch-vm-0.scope").into_iter().filter(|process| name(process.host_pid) == "virtiofsd").collect()
}

fn name(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

fn status(pid: i32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_else(|| panic!("no {field}")).trim().to_owned()
}

#[test]
fn a_guest_reads_and_writes_what_it_was_granted_and_what_serves_it_has_nothing_else() {
    need!(Machine, Package, Guest);
    let machine = machine();
    let vm = machine.wait_healthy("web", BOOT);
    let said = machine.run(&["diarch", "vm", "logs", "web"]).stdout;
    for says in ["share models holds seven billion", "share models was refused to", "share work holds to do", "share work was written to, by 0"] {
        assert!(said.contains(says), "{says}: {said}");
    }
    assert_eq!(machine.read("/srv/work/from-guest"), "from the guest\n");
    assert!(!machine.exists("/srv/models/from-guest"));
    let owner = machine.sh("stat -c %u /srv/work/from-guest").trim().parse::<u32>().unwrap();

    let serving = serving(&machine);
    assert_eq!(serving.len(), 2, "in the VM's own scope");
    for process in &serving {
        let pid = process.host_pid;
        assert_eq!(status(pid, "Uid:").split_whitespace().collect::<BTreeSet<_>>(), BTreeSet::from([owner.to_string().as_str()]), "the VM's user");
        for set in ["CapEff:", "CapPrm:", "CapBnd:", "CapAmb:", "CapInh:"] {
            assert_eq!(status(pid, set), "0000000000000000", "{set}");
        }
        assert_eq!((status(pid, "NoNewPrivs:").as_str(), status(pid, "Seccomp:").as_str()), ("1", "2"));
        let root = format!("/proc/{pid}/root");
        let top: BTreeSet<String> = fs::read_dir(&root).unwrap().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        for nothing in ["srv", "home", "var", "root", "tmp", "run", "sys"] {
            assert!(!top.contains(nothing), "{nothing} is in its tree: {top:?}");
        }
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        assert_eq!(mounts.matches("/srv/").count(), 1, "its own share, and no other: {mounts}");
        let shared = mounts.lines().find(|line| line.contains(" /shared ")).unwrap_or_else(|| panic!("no share: {mounts}"));
        let access = if shared.contains("/srv/work") { "rw," } else { "ro," };
        for flag in ["nosuid", "nodev", "noexec", "nosymfollow", access] {
            assert!(shared.contains(flag), "{flag}: {shared}");
        }
        let interfaces = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
        assert!(interfaces.lines().skip(2).all(|line| line.trim().starts_with("lo:")), "{interfaces}");
    }

    // The supervisor dies: nobody notices.
    machine.kill(SUPERVISOR, rustix::process::Signal::KILL);
    machine.wait_active(SUPERVISOR, Duration::from_secs(30));
    assert_eq!(self::serving(&machine), serving);
    assert_eq!(machine.wait_healthy("web", BOOT).pid, vm.pid);

    // QEMU dies: what served it ends with it, and the next start has its own, of the same mounts.
    rustix::process::kill_process(rustix::process::Pid::from_raw(machine.host_pid(vm.pid.unwrap()).unwrap()).unwrap(), rustix::process::Signal::KILL).unwrap();
    machine.wait_for("they end with QEMU", Duration::from_secs(10), || {
        serving.iter().all(|process| machine.process(process.host_pid).as_ref() != Some(process)).then_some(())
    });
    let again = machine
        .wait_vm("web", BOOT, "healthy again", |now| now.pid.is_some() && now.pid != vm.pid && now.phase == diarch_worker::control::protocol::Phase::Healthy);
    let next = self::serving(&machine);
    assert_eq!(next.len(), 2);

    // One that dies by itself is missed, loudly.
    rustix::process::kill_process(rustix::process::Pid::from_raw(next[0].host_pid).unwrap(), rustix::process::Signal::KILL).unwrap();
    machine.wait_for("it is told", Duration::from_secs(10), || {
        machine.journal(SUPERVISOR).contains("a share of the guest's does not answer any more").then_some(())
    });
    assert_eq!(machine.vm("web").unwrap().pid, again.pid);

    // Its guest waits for that share, and hears no power button.
    machine.run_within(Duration::from_secs(150), &["diarch", "vm", "stop", "web"]).expect_success("vm stop");
    machine.wait_for("nothing is left", Duration::from_secs(30), || self::serving(&machine).is_empty().then_some(()));
}
