//! systemd: how the units of both halves stand, and whether each VM has its scope.

use super::Host;
use super::finding::Finding;
use crate::cli::clock;
use crate::cli::screen::count;
use crate::control::protocol::VmView;
use crate::systemd::{Trouble, Unit, Units};

/// Scopes are made of pidfds from this version on.
const PIDFDS: u32 = 255;

/// What systemd says; or why it can't be asked.
pub fn units(host: &Host, known: &Result<Units, Trouble>, now_ms: u64) -> Vec<Finding> {
    if !host.root.join("run/systemd/system").is_dir() {
        return vec![Finding::warn(
            "systemd",
            "it is not what this host was booted with: nobody respawns the halves, and no VM has a scope",
            "tests, demo and rehearsal need none; a host that VMs are to live on does",
        )];
    }
    let units = match known {
        Ok(units) => units,
        Err(trouble) => return vec![Finding::warn("systemd", format!("it can't be asked: {trouble}"), "apt-get install dbus; systemctl start dbus.socket")],
    };
    let mut found = vec![version(&units.version)];
    found.extend([&units.socket, &units.supervisor, &units.worker].map(|unit| one(unit, units, now_ms)));
    found
}

fn version(shown: &str) -> Finding {
    let number: u32 = shown.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0);
    match number {
        PIDFDS.. => Finding::ok("systemd", format!("{shown}: scopes are made by pidfd")),
        _ => Finding::ok("systemd", format!("{shown}: scopes are made by pid, of a process that waits for it ({PIDFDS} takes pidfds)")),
    }
}

fn one(unit: &Unit, all: &Units, now_ms: u64) -> Finding {
    const CHECK: &str = "unit";
    let name = &unit.name;
    if unit.load != "loaded" {
        return Finding::warn(CHECK, format!("{name} is {}", unit.load), "install the package; for a masked one: systemctl unmask");
    }
    let mut detail = format!("{name} is {} ({})", unit.active, unit.sub);
    if unit.active == "active" && unit.active_since_ms > 0 {
        detail += &format!(" for {}", clock::since(unit.active_since_ms, now_ms));
    }
    if unit.restarts > 0 {
        detail += &format!(", restarted by itself {}", count(unit.restarts, "time"));
    }
    if !unit.status.is_empty() {
        detail += &format!(": {}", unit.status);
    }
    let journal = format!("journalctl -u {name} -e");
    match unit.active.as_str() {
        "active" => {}
        // It is started by whoever calls.
        "inactive" if *name == all.supervisor.name && all.socket.active == "active" => return Finding::info(CHECK, format!("{detail}; its socket starts it")),
        "activating" | "deactivating" | "reloading" => return Finding::warn(CHECK, detail, journal),
        "inactive" => return Finding::fail(CHECK, detail, format!("systemctl enable --now {name}")),
        _ => return Finding::fail(CHECK, detail, format!("{journal}; systemctl restart {name}")),
    }
    if unit.needs_reload {
        return Finding::warn(
            CHECK,
            format!("{detail}; its file has changed since"),
            format!("systemctl daemon-reload && systemctl restart {name} (VMs run on)"),
        );
    }
    if !matches!(unit.enabled.as_str(), "enabled" | "enabled-runtime" | "static" | "linked" | "generated") {
        return Finding::warn(CHECK, format!("{detail}; {}: it is not started when the host boots", unit.enabled), format!("systemctl enable {name}"));
    }
    match unit.restarts {
        0 => Finding::ok(CHECK, detail),
        _ => Finding::info(CHECK, detail).or(journal),
    }
}

/// Every VM's process in its scope, and every scope with its VM.
pub fn scopes(units: &Units, vms: &[VmView]) -> Option<Finding> {
    const CHECK: &str = "scopes";
    // Elsewhere than in its unit the supervisor makes none.
    if units.supervisor.active != "active" {
        return None;
    }
    let name = |slot: u16| format!("diarch-vm-{slot}.scope");
    let running: Vec<(&VmView, String)> = vms.iter().filter(|vm| vm.pid.is_some()).filter_map(|vm| Some((vm, name(vm.slot?)))).collect();
    let outside: Vec<String> = running.iter().filter(|(_, scope)| !units.scopes.contains(scope)).map(|(vm, scope)| format!("{} ({scope})", vm.name)).collect();
    let left: Vec<&str> = units.scopes.iter().filter(|scope| running.iter().all(|(_, of)| of != *scope)).map(String::as_str).collect();
    Some(match (outside.as_slice(), left.as_slice()) {
        ([], []) => Finding::ok(CHECK, format!("{}, each in its scope: systemd-cgls -u diarch-vms.slice", count(running.len(), "running VM"))),
        ([], left) => Finding::warn(CHECK, format!("no running VM belongs to {}", left.join(", ")), format!("systemctl status {}", left.join(" "))),
        (outside, _) => Finding::warn(
            CHECK,
            format!("in no scope: {}; a stop of the supervisor's unit spares them, and no limit holds them", outside.join(", ")),
            "they were started outside of the unit or before an upgrade: diarch vm restart NAME",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::super::tests::host;
    use super::*;

    const NOW: u64 = 1_700_000_000_000;

    fn unit(name: &str) -> Unit {
        Unit {
            name: name.into(),
            load: "loaded".into(),
            active: "active".into(),
            sub: "running".into(),
            enabled: "enabled".into(),
            active_since_ms: NOW - 60_000,
            ..Unit::default()
        }
    }

    fn healthy() -> Units {
        Units {
            version: "257.9-1~deb13u1".into(),
            supervisor: unit("diarch-supervisor.service"),
            worker: Unit { status: "1 VM running; supervisor connected".into(), ..unit("diarch-worker.service") },
            socket: unit("diarch-supervisor.socket"),
            scopes: vec!["diarch-vm-0.scope".into()],
        }
    }

    #[test]
    fn units_that_are_well_say_since_when() {
        let (_directory, host) = host();
        let found = units(&host, &Ok(healthy()), NOW);
        assert!(found.iter().all(|finding| finding.level == Level::Ok), "{found:?}");
        assert_eq!(found[3].detail, "diarch-worker.service is active (running) for 1m0s: 1 VM running; supervisor connected");
        assert!(version("252.39-1~deb12u1").detail.contains("by pid,"));
    }

    #[test]
    fn each_way_of_being_unwell_has_its_level_and_a_fix() {
        type Change<'a> = &'a dyn Fn(&mut Units);
        let cases: [(usize, Level, &str, Change<'_>); 9] = [
            (3, Level::Warn, "install the package", &|units| units.worker.load = "not-found".into()),
            (3, Level::Fail, "systemctl restart diarch-worker.service", &|units| units.worker.active = "failed".into()),
            (3, Level::Fail, "systemctl enable --now diarch-worker.service", &|units| units.worker.active = "inactive".into()),
            (2, Level::Warn, "journalctl -u diarch-supervisor.service", &|units| units.supervisor.active = "activating".into()),
            (2, Level::Info, "", &|units| units.supervisor.active = "inactive".into()),
            (1, Level::Fail, "systemctl enable --now diarch-supervisor.socket", &|units| units.socket.active = "inactive".into()),
            (1, Level::Warn, "systemctl enable diarch-supervisor.socket", &|units| units.socket.enabled = "disabled".into()),
            (2, Level::Warn, "systemctl daemon-reload", &|units| units.supervisor.needs_reload = true),
            (3, Level::Info, "journalctl -u diarch-worker.service", &|units| units.worker.restarts = 3),
        ];
        let (_directory, host) = host();
        for (at, level, fix, change) in cases {
            let mut known = healthy();
            change(&mut known);
            let found = units(&host, &Ok(known), NOW);
            assert_eq!(found[at].level, level, "{:?}", found[at]);
            assert!(found[at].fix.clone().unwrap_or_default().contains(fix), "{:?}", found[at]);
        }
    }

    #[test]
    fn a_host_without_systemd_and_one_without_a_bus_are_one_line() {
        let (_directory, host) = host();
        let found = units(&host, &Err(Trouble::NoBus("no socket".into())), NOW);
        assert!(found.len() == 1 && found[0].level == Level::Warn && found[0].fix.as_deref().unwrap_or_default().contains("install dbus"), "{found:?}");
        let found = units(&Host::at("/no/such/place"), &Ok(healthy()), NOW);
        assert!(found.len() == 1 && found[0].level == Level::Warn, "{found:?}");
    }

    #[test]
    fn a_vm_outside_of_a_scope_and_a_scope_without_a_vm_are_seen() {
        let vm = |slot, pid| VmView { slot: Some(slot), pid, ..super::super::tests::vm() };
        let level = |vms: &[VmView]| scopes(&healthy(), vms).map(|finding| finding.level);
        assert_eq!(level(&[vm(0, Some(7))]), Some(Level::Ok));
        assert_eq!(level(&[vm(0, Some(7)), vm(1, None)]), Some(Level::Ok));
        assert_eq!(level(&[vm(1, Some(7))]), Some(Level::Warn));
        assert_eq!(level(&[]), Some(Level::Warn));
        let mut elsewhere = healthy();
        elsewhere.supervisor.active = "inactive".into();
        assert_eq!(scopes(&elsewhere, &[vm(1, Some(7))]), None);
    }
}
