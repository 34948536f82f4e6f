//! The worker and the command with a supervisor under them: files that are wrong, VMs that can't be, and what people are told.

use diarch_tests::host::{Diarch, Host, assert_same, stub_vm};
use diarch_tests::need;
use diarch_tests::stand_in::{Ask, Unit};
use diarch_worker::control::protocol::{self, Phase, Reply, Request};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(10);

fn problems(host: &Host) -> Vec<protocol::FileProblem> {
    let replies = host.ask_worker(&Request::Plan {});
    replies.into_iter().find_map(|reply| if let Reply::Plan(plan) = reply { Some(plan.problems) } else { None }).expect("a plan")
}

fn wait_problems(host: &Host, what: &str, wanted: impl Fn(&[protocol::FileProblem]) -> bool) -> Vec<protocol::FileProblem> {
    let until = Instant::now() + SOON;
    loop {
        let now = problems(host);
        if wanted(&now) {
            return now;
        }
        assert!(Instant::now() < until, "{what}: {now:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ok(said: &Diarch) -> &str {
    assert_eq!(said.code, Some(0), "{said:#?}");
    &said.stdout
}

#[test]
fn a_bad_vm_file_is_named_with_its_json_path_and_stops_no_other() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().start();
    let kernel = host.path("files/kernel");
    host.write_vm("good", &stub_vm("good", &kernel, ""));
    let first = host.wait_healthy("good", SOON);
    let inventory = host.inventory();

    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut file = stub_vm("bad", &kernel, "");
        change(&mut file);
        file.to_string()
    };
    let cases: Vec<(&str, String, &str)> = vec![
        ("empty", String::new(), "$"),
        ("not JSON", "name = bad".into(), "$"),
        ("cut off", "{\"name\": \"bad\"".into(), "$"),
        ("an array", "[]".into(), "$"),
        ("a wrong type", with(&|f| f["qemu_configuration"]["cores"] = "two".into()), "cores"),
        ("an unknown field", with(&|f| f["qemu_configuration"]["coresx"] = 2.into()), "coresx"),
        ("a negative memory", with(&|f| f["qemu_configuration"]["mem_mb"] = (-1).into()), "mem_mb"),
        ("too much memory", with(&|f| f["qemu_configuration"]["mem_mb"] = 1e15.into()), "mem_mb"),
        ("a name that is a path", with(&|f| f["name"] = "../x".into()), "name"),
        ("an unknown policy", with(&|f| f["restart"]["policy"] = "sometimes".into()), "policy"),
        ("a kernel that is relative", with(&|f| f["image"]["kernel"] = "vmlinuz".into()), "kernel"),
    ];
    for (what, text, path) in &cases {
        host.write_vm_text("bad.json", text);
        let found = wait_problems(&host, what, |p| p.iter().any(|p| p.file.ends_with("bad.json") && p.path.contains(path)));
        assert!(found.iter().all(|p| p.file.ends_with("bad.json") && !p.reason.is_empty()), "{what}: {found:#?}");
    }
    // A second file with the same name: neither takes the other's VM away.
    std::fs::remove_file(host.path("vms/bad.json")).unwrap();
    host.write_vm("twin", &stub_vm("good", &kernel, "other"));
    wait_problems(&host, "a duplicate name", |p| p.iter().any(|p| p.path.contains("name")));
    std::fs::remove_file(host.path("vms/twin.json")).unwrap();
    wait_problems(&host, "all good again", <[_]>::is_empty);

    let now = host.vm("good").unwrap();
    assert_eq!((now.pid, now.restarts, now.phase), (first.pid, 0, Phase::Healthy));
    assert_same(&inventory, &host);
}

#[test]
fn a_vm_that_can_not_be_started_says_why_and_leaves_nothing() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().grants("[qemu.gone]\npath = \"/usr/bin/there-is-no-such-qemu\"\n").start();
    let kernel = host.path("files/kernel");
    let empty = host.inventory();

    let mut cases: Vec<(&str, serde_json::Value, Vec<&str>)> = vec![
        ("no-kernel", stub_vm("no-kernel", &host.path("files/there-is-none"), ""), vec!["there-is-none"]),
        ("exits", stub_vm("exits", &kernel, "stub.say=the+machine+has+no+wheels stub.exit=3"), vec!["the machine has no wheels"]),
    ];
    let mut gone = stub_vm("gone", &kernel, "");
    gone["qemu_configuration"]["qemu"] = "gone".into();
    cases.push(("gone", gone, vec!["qemu"]));
    let mut unknown = stub_vm("unknown", &kernel, "");
    unknown["qemu_configuration"]["qemu"] = "unheard-of".into();
    cases.push(("unknown", unknown, vec!["qemu"]));
    let mut big = stub_vm("big", &kernel, "");
    big["qemu_configuration"]["mem_mb"] = 100_000.into();
    cases.push(("big", big, vec!["memory"]));
    let mut not_granted = stub_vm("not-granted", &kernel, "");
    not_granted["network"] = serde_json::json!({"forwards": [{"protocol": "tcp", "host_address": "127.0.0.1", "host_port": 80, "guest_port": 80}]});
    cases.push(("not-granted", not_granted, vec!["forwards.allow"]));

    for (name, file, _) in &cases {
        host.write_vm(name, file);
    }
    for (name, _, words) in &cases {
        let vm = host.wait_vm(name, SOON, "failing with its reason", |vm| {
            let text = format!("{} {}", vm.reason.as_deref().unwrap_or_default(), vm.last_exit.as_deref().unwrap_or_default()).to_lowercase();
            matches!(vm.phase, Phase::BackOff | Phase::Failed) && words.iter().all(|word| text.contains(&word.to_lowercase()))
        });
        eprintln!("{name}: {:?}: {}", vm.phase, vm.reason.unwrap_or_default());
        std::fs::remove_file(host.path("vms").join(format!("{name}.json"))).unwrap();
    }
    let until = Instant::now() + SOON;
    while !host.ledger().is_empty() {
        assert!(Instant::now() < until, "slots are left: {:?}", host.ledger());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_same(&empty, &host);
}

#[test]
fn what_a_vm_may_not_have_of_the_host_is_named_and_nothing_of_it_stays() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().start();
    let kernel = host.path("files/kernel");
    let empty = host.inventory();
    let tap = serde_json::json!({"tap": {"network": "lan", "queues": 2}, "publish": [{"host_address": "192.0.2.1", "host_port": 443, "guest_port": 443}]});
    // Nothing of it is granted. The device is on no bus: even a grant would not reach one of this machine's.
    let cases = [
        ("device", "devices", serde_json::json!(["ffff:1f:1f.7"]), "device ffff:1f:1f.7: "),
        ("share", "shares", serde_json::json!([{"share": "models", "tag": "m"}]), "share models: "),
        ("tap", "network", tap, "network lan: "),
    ];
    for (name, field, value, _) in &cases {
        let mut file = stub_vm(name, &kernel, "");
        file[field] = value.clone();
        host.write_vm(name, &file);
    }
    for (name, _, _, words) in &cases {
        let vm = host.wait_vm(name, SOON, "refused", |vm| vm.phase == Phase::Failed && vm.reason.as_ref().is_some_and(|reason| reason.contains(words)));
        eprintln!("{name}: {}", vm.reason.clone().unwrap_or_default());
        assert!(vm.retry_ms.is_some() && vm.slot.is_none() && vm.pid.is_none(), "{vm:?}");
    }
    let list = host.diarch(&["device", "list"]);
    assert!(ok(&list).contains("ffff:1f:1f.7  free   (device)"), "{list:?}");
    assert_eq!(host.diarch(&["device", "list", "--json"]).json()[0]["wanted_by"][0], "device");
    assert_eq!(host.diarch(&["device", "recover", "ffff:1f:1f.6"]).code, Some(3));
    assert_eq!(host.diarch(&["device", "recover", "1f.7"]).code, Some(2));
    let recovered = host.diarch(&["device", "recover", "ffff:1f:1f.7"]);
    assert!(recovered.code == Some(1) && recovered.stderr.contains("device ffff:1f:1f.7: "), "{recovered:?}");
    for (name, ..) in &cases {
        std::fs::remove_file(host.path("vms").join(format!("{name}.json"))).unwrap();
    }
    let until = Instant::now() + SOON;
    while !host.ledger().is_empty() {
        assert!(Instant::now() < until, "slots are left: {:?}", host.ledger());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_same(&empty, &host);
}

#[test]
fn a_guest_that_ignores_its_power_button_is_ended_all_the_same() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().start();
    let kernel = host.path("files/kernel");
    for (name, words) in [("polite", ""), ("slow", "stub.powerdown-ms=500"), ("deaf", "stub.ignore-powerdown"), ("mute", "stub.mute")] {
        host.write_vm(name, &stub_vm(name, &kernel, words));
    }
    for name in ["polite", "slow", "deaf"] {
        host.wait_healthy(name, SOON);
    }
    host.wait_vm("mute", SOON, "running", |vm| vm.pid.is_some());
    for name in ["polite", "slow", "deaf", "mute"] {
        let started = Instant::now();
        let said = host.diarch(&["vm", "stop", name]);
        ok(&said);
        let vm = host.vm(name).unwrap();
        assert_eq!((vm.phase, vm.pid), (Phase::Stopped, None), "{vm:?}");
        eprintln!("{name}: stopped in {:?}", started.elapsed());
    }
    assert!(host.qemus().is_empty());
}

#[test]
fn a_mute_vm_holds_no_other_up() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().start();
    let kernel = host.path("files/kernel");
    for n in 0..4 {
        host.write_vm(&format!("mute-{n}"), &stub_vm(&format!("mute-{n}"), &kernel, "stub.mute"));
    }
    for n in 0..4 {
        host.wait_vm(&format!("mute-{n}"), SOON, "running", |vm| vm.pid.is_some());
    }
    let started = Instant::now();
    host.write_vm("web", &stub_vm("web", &kernel, ""));
    let vm = host.wait_healthy("web", SOON);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let killed = Instant::now();
    ok(&host.diarch(&["vm", "kill", "web"]));
    ok(&host.diarch(&["vm", "start", "web"]));
    assert_ne!(host.wait_healthy("web", SOON).pid, vm.pid);
    assert!(killed.elapsed() < Duration::from_secs(3), "{:?}", killed.elapsed());
}

#[test]
fn the_command_says_by_its_exit_code_what_happened() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().start();
    host.write_vm("web", &stub_vm("web", &host.path("files/kernel"), ""));
    host.wait_healthy("web", SOON);

    let list = host.diarch(&["vm", "list"]);
    assert!(ok(&list).contains("web") && !list.stdout.contains('\u{1b}'), "{list:?}");
    let json = host.diarch(&["vm", "list", "--json"]);
    assert!(ok(&json).contains("\"web\""));
    json.json();
    for args in [&["plan", "--json"][..], &["events", "--json"], &["vm", "show", "web", "--json"], &["doctor", "--json"]] {
        let said = host.diarch(args);
        assert!(matches!(said.code, Some(0 | 1)), "{said:?}");
        for line in said.stdout.lines().take(1) {
            assert!(line.starts_with(['{', '[']), "{args:?}: {line}");
        }
    }
    assert_eq!(host.diarch(&["vm", "show", "nobody"]).code, Some(3));
    assert_eq!(host.diarch(&["vm", "fly", "web"]).code, Some(2));
    let bad = host.path("files/bad.json");
    std::fs::write(&bad, "{}").unwrap();
    assert_eq!(host.diarch(&["validate", bad.to_str().unwrap()]).code, Some(1));
    ok(&host.diarch(&["validate", host.path("vms").to_str().unwrap()]));
    host.manager().ask(&Ask::Stop(Unit::Worker)).unwrap();
    assert_eq!(host.diarch(&["vm", "list"]).code, Some(6));
}

#[test]
fn the_audit_of_all_that_happened_verifies_and_a_changed_record_does_not() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().start();
    host.write_vm("web", &stub_vm("web", &host.path("files/kernel"), ""));
    host.wait_healthy("web", SOON);
    for unit in [Unit::Supervisor, Unit::Worker, Unit::Supervisor] {
        host.manager().kill_and_wait(unit);
    }
    host.wait_healthy("web", SOON);
    ok(&host.diarch(&["vm", "restart", "web"]));
    let audit = host.path("audit/audit.jsonl");
    let verify = |file: &std::path::Path, more: &[&str]| host.diarch(&[&["audit", "verify", "--file", file.to_str().unwrap()][..], more].concat());
    ok(&verify(&audit, &[]));

    let text = std::fs::read_to_string(&audit).unwrap();
    assert!(text.contains("vm.spawn") && text.contains("vm.claim"), "{text}");
    let copy = host.path("files/audit.jsonl");
    let lines: Vec<&str> = text.lines().collect();
    let middle = lines.len() / 2;
    let forgeries: [(&str, String); 4] = [
        ("a record was changed", text.replacen("vm.claim", "vm.clean", 1)),
        ("a record is missing", [&lines[..middle], &lines[middle + 1..]].concat().join("\n") + "\n"),
        ("two records were swapped", [&lines[..middle], &[lines[middle + 1], lines[middle]][..], &lines[middle + 2..]].concat().join("\n") + "\n"),
        ("the end was cut off", lines[..lines.len() - 2].join("\n") + "\n"),
    ];
    for (what, forged) in forgeries {
        std::fs::write(&copy, forged).unwrap();
        assert_eq!(verify(&copy, &[]).code, Some(1), "{what}");
    }
}

#[test]
fn the_worker_refuses_to_be_root() {
    need!(Root);
    let mut child = std::process::Command::new(diarch_tests::host::binary("diarch-worker"))
        .args(["--config", "/nonexistent/config.json"])
        .env("TMPDIR", "/nonexistent")
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + SOON;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
    assert!(!status.success() && said.contains("root"), "{status}: {said}");
}

#[test]
fn the_worker_holds_no_privilege() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().start();
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.worker_pid())).unwrap();
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim().to_owned();
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16), Ok(0), "{set}");
    }
    assert!(field("Uid:").starts_with("64000\t64000\t64000"), "{status}");
    let supervisor = std::fs::read_to_string(format!("/proc/{}/status", host.supervisor_pid())).unwrap();
    let effective = supervisor.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap().trim();
    let effective = u64::from_str_radix(effective, 16).unwrap();
    // CAP_DAC_OVERRIDE (1), CAP_SYS_MODULE (16), CAP_SYS_RAWIO (17), CAP_SYS_CHROOT (18), CAP_SYS_BOOT (22): nothing on the list needs them.
    for forbidden in [1, 16, 17, 18, 22] {
        assert_eq!(effective & (1 << forbidden), 0, "the supervisor holds capability {forbidden}");
    }
}
