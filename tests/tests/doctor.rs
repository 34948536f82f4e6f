//! `diarch doctor` on an installed host: what it says when all is well, and that it sees what is broken.

use diarch_tests::machine::{Machine, Output, SUPERVISOR, WORKER, vm_file_stub};
use diarch_tests::need;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);

/// The findings by their check; a check that tells of several things has several.
fn findings(output: &Output) -> BTreeMap<String, Vec<(String, String)>> {
    let mut found: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for check in output.json()["checks"].as_array().expect("a list") {
        let word = |key: &str| check[key].as_str().unwrap_or_default().to_owned();
        if matches!(check["level"].as_str(), Some("warn" | "fail")) {
            assert!(!word("fix").is_empty(), "a trouble has a fix: {check}");
        }
        found.entry(word("check")).or_default().push((word("level"), word("detail") + " | " + &word("fix")));
    }
    found
}

fn doctor(machine: &Machine) -> BTreeMap<String, Vec<(String, String)>> {
    findings(&machine.diarch(&["doctor", "--json"]))
}

#[track_caller]
fn expect(found: &BTreeMap<String, Vec<(String, String)>>, check: &str, level: &str, words: &str) {
    let all = found.get(check).unwrap_or_else(|| panic!("no check {check:?} in {found:#?}"));
    assert!(all.iter().any(|(l, text)| l == level && text.contains(words)), "{check}: no {level} with {words:?} in {all:#?}");
}

#[test]
fn a_healthy_host_fails_nothing_and_an_operator_needs_no_root() {
    need!(Machine, Package, Qemu);
    let machine = Machine::installed().vm(vm_file_stub("a")).boot();
    machine.sh("useradd --groups diarch-operators insider");
    let output = machine.as_user("insider", "diarch doctor --json");
    assert_eq!(output.code, Some(0), "{output:#?}");
    let found = findings(&output);
    expect(&found, "systemd", "ok", "257");
    expect(&found, "polkit", "ok", "restart");
    expect(&found, "grants", "ok", "");
    expect(&found, "grants file", "ok", "");
    expect(&found, "qemu", "ok", "10.");
    expect(&found, "supervisor", "ok", "started");
    expect(&found, "worker", "ok", "started");
    for (check, all) in &found {
        assert!(all.iter().all(|(level, _)| level != "fail"), "{check}: {all:#?}");
    }
    // For people, the same.
    let text = machine.as_user("insider", "diarch doctor").stdout;
    assert!(text.contains("ok") && text.contains("polkit"), "{text}");
}

#[test]
fn each_broken_thing_is_told_with_its_fix() {
    need!(Machine, Package, Qemu);
    let machine = Machine::installed().vm(vm_file_stub("a")).boot();
    let rule = "/usr/share/polkit-1/rules.d/50-diarch.rules";
    let units = || [SUPERVISOR, WORKER].map(|unit| machine.main_process(unit));
    let before = units();

    // polkit reads its rules anew by itself, a moment later.
    let tried = |level: &str, words: &str| {
        machine.wait_for(&format!("polkit to be {level}"), SOON, || {
            doctor(&machine)["polkit"].iter().any(|(l, text)| l == level && text.contains(words)).then_some(())
        });
    };
    machine.sh(&format!("mv {rule} /root/rule"));
    tried("fail", "50-diarch.rules");
    // A rule that lets it do more is worse than none.
    machine.write(
        "/etc/polkit-1/rules.d/10-wide.rules",
        "polkit.addRule(function(action, subject) { if (subject.user == 'diarch') return polkit.Result.YES; });\n",
    );
    tried("fail", "more");
    machine.sh(&format!("rm /etc/polkit-1/rules.d/10-wide.rules; mv /root/rule {rule}"));
    tried("ok", "restart");
    assert_eq!(units(), before, "trying a right restarts nothing");

    machine.sh("cp /etc/diarch/grants.toml /root/grants; echo nonsense >>/etc/diarch/grants.toml");
    expect(&doctor(&machine), "grants file", "fail", "line");
    machine.sh("cp /root/grants /etc/diarch/grants.toml; chmod 666 /etc/diarch/grants.toml");
    expect(&doctor(&machine), "grants file", "fail", "chmod");
    machine.sh("chmod 644 /etc/diarch/grants.toml; systemctl stop diarch-worker.service");
    let down = machine.diarch(&["doctor", "--json"]);
    assert_eq!(down.code, Some(1), "{down:#?}");
    expect(&findings(&down), "worker", "fail", "");
    assert!(down.json()["ok"] == Value::Bool(false));
}
