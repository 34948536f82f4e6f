//! What the ledger explains of the network: taps with their addresses and routes, and the packet filter's own tables.
//!
//! A tap goes with the supervisor or the QEMU that has it, and the ledger does not hear of it: what it speaks of may be gone. What must be held is
//! there, where the ledger says, and with rules that hold it to its MAC address; and the supervisor has its queues, unless a VM runs, which has them then. What the filter lets through is compared by what varies in it: the
//! names of taps, their MAC addresses, published ports, and the users of VMs with a passt.

use super::compare::Explained;
use super::enclosure::BRIDGE;
use super::kernel::{Facts, Noun};
use super::ledger::Ledger;
use serde_json::Value;
use std::collections::BTreeSet;

/// The tables that are the supervisor's.
const TABLE: &str = "diarch";

struct Tap<'a> {
    slot: u64,
    name: String,
    of: &'a Value,
    /// The ports that lead to it.
    ports: Vec<u64>,
    /// No VM has it: none runs.
    waits: bool,
}

pub fn differences(start: &Facts, now: &Facts, ledger: &Ledger, held: &[(u64, u64)], explained: &mut Explained) -> Vec<String> {
    let mut wrong = Vec::new();
    let taps = taps(ledger);
    let names: BTreeSet<&str> = taps.iter().map(|tap| tap.name.as_str()).collect();
    let there = |name: &str| now.of(Noun::Link).find(|fact| device(Noun::Link, fact) == Some(name));
    for (slot, nic) in held {
        let name = format!("dvm{slot}n{nic}");
        if names.contains(name.as_str()) && there(&name).is_none() {
            wrong.push(format!("lost: link {name}, which nobody took"));
        }
    }
    // Whatever is on a tap that the ledger has; how it must be is below.
    for noun in [Noun::Link, Noun::Address, Noun::Route] {
        for fact in now.of(noun).filter(|fact| device(noun, fact).is_some_and(|device| names.contains(device))) {
            explained.may.0.insert((noun, fact.to_owned()), now.count(noun, fact));
        }
    }
    for tap in taps.iter().filter(|tap| tap.waits) {
        let queues = tap.of["queues"].as_u64().unwrap_or(0);
        for _ in 0..queues {
            explained.may.add(Noun::Descriptor, "/dev/net/tun");
        }
    }
    let filter: Vec<&str> =
        now.of(Noun::Filter).filter(|fact| fact.contains(&format!("\"{TABLE}\""))).filter(|fact| start.count(Noun::Filter, fact) == 0).collect();
    let text = filter.join("\n");
    for tap in taps.iter() {
        let Some(link) = there(&tap.name) else { continue };
        if !link.contains("info_kind tun") {
            wrong.push(format!("not a tap: {link}"));
        }
        let routed = tap.of["network"] == "routed";
        let address = tap.of["address"].as_str().unwrap_or_default();
        if routed {
            let routes = now.of(Noun::Route).filter(|fact| device(Noun::Route, fact) == Some(&tap.name) && fact.contains(&format!("dst {address} "))).count();
            if routes != 1 || link.contains("master") {
                wrong.push(format!("slot {}: {} routes lead to {address} on {link}", tap.slot, routes));
            }
        } else if !link.contains(&format!("master {BRIDGE}")) {
            wrong.push(format!("slot {}: not on its bridge: {link}", tap.slot));
        }
        let mac = tap.of["mac"].as_str().unwrap_or("no MAC address");
        if !text.contains(mac) {
            wrong.push(format!("slot {}: {} is there, and no rule holds it to {mac}", tap.slot, tap.name));
        }
        for port in &tap.ports {
            if !text.contains(&port.to_string()) {
                wrong.push(format!("slot {}: port {port} is published, and no rule knows it", tap.slot));
            }
        }
    }
    // Nothing that names a tap or a port which the ledger does not have.
    for name in words(&text).filter(|word| is_tap(word) && !names.contains(word)) {
        wrong.push(format!("left behind: filter: it names {name}, which the ledger does not"));
    }
    let ports: BTreeSet<u64> = taps.iter().flat_map(|tap| &tap.ports).copied().collect();
    for port in words(&text).filter_map(|word| word.parse::<u64>().ok()).filter(|port| (2000..2100).contains(port) && !ports.contains(port)) {
        wrong.push(format!("left behind: filter: it names port {port}, which the ledger does not"));
    }
    let users = users(ledger);
    let told = |set: &str| filter.iter().find_map(|fact| elements(fact, set)).unwrap_or_default();
    for (set, of_all) in [("users", true), ("closed_users", false)] {
        let in_set = told(set);
        for user in users.iter().filter(|user| user.runs && (of_all || user.closed) && !in_set.contains(&user.uid)) {
            wrong.push(format!("slot {}: user {} has a passt, and is not among the filter's {set}", user.slot, user.uid));
        }
        // After its end a QEMU's user stays until the next change.
        let known = |uid: &u64| users.iter().any(|user| user.uid == *uid && (of_all || user.closed || !user.runs));
        for uid in in_set.iter().filter(|uid| !known(uid)) {
            wrong.push(format!("left behind: filter: {uid} is among its {set}, and the ledger does not say so"));
        }
    }
    // Our tables are there as long as the lock says so, and no longer than some slot has a tap or a passt.
    if !taps.is_empty() || !users.is_empty() || filter.is_empty() {
        for fact in filter {
            explained.may.0.insert((Noun::Filter, fact.to_owned()), now.count(Noun::Filter, fact));
        }
        explained.may.add(Noun::File, "vm/.nft");
    }
    wrong.sort();
    wrong.dedup();
    wrong
}

fn taps(ledger: &Ledger) -> Vec<Tap<'_>> {
    let list = |of: &'_ Value| of.as_array().cloned().unwrap_or_default();
    let mut all = Vec::new();
    for (slot, record) in &ledger.slots {
        for of in record["resources"]["taps"].as_array().into_iter().flatten() {
            let published = list(&record["resources"]["published"]).into_iter().filter(|publication| publication["nic"] == of["nic"]);
            let ports = published.flat_map(|publication| list(&publication["forwards"])).filter_map(|forward| forward["host_port"].as_u64()).collect();
            let waits = record["state"] != "running";
            all.push(Tap { slot: *slot, name: format!("dvm{slot}n{}", of["nic"]), of, ports, waits });
        }
    }
    all
}

/// The user of a VM whose user-mode networking is a passt.
struct User {
    slot: u64,
    uid: u64,
    closed: bool,
    runs: bool,
}

fn users(ledger: &Ledger) -> Vec<User> {
    let mut all = Vec::new();
    for (slot, record) in &ledger.slots {
        if let (Some(egress), Some(uid)) = (record["run"]["egress"].as_str(), record["uid"].as_u64()) {
            all.push(User { slot: *slot, uid, closed: egress == "closed", runs: Ledger::state(record) == "running" });
        }
    }
    all
}

/// The numbers in one of our sets.
fn elements(fact: &str, set: &str) -> Option<Vec<u64>> {
    let value: Value = serde_json::from_str(fact).ok()?;
    let of = value.get("set").filter(|of| of["table"] == TABLE && of["name"] == set)?;
    Some(of["elem"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect())
}

/// The interface that a fact speaks of.
fn device(noun: Noun, fact: &str) -> Option<&str> {
    let mut words = fact.split(' ');
    match noun {
        Noun::Link => words.nth(1),
        Noun::Address => words.next(),
        _ => words.skip_while(|word| *word != "dev").nth(1),
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty())
}

fn is_tap(word: &str) -> bool {
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    word.strip_prefix("dvm").and_then(|rest| rest.split_once('n')).is_some_and(|(slot, nic)| digits(slot) && digits(nic))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        let tap = serde_json::json!({"nic": 0, "network": "bridged", "mac": "52:54:00:00:00:01", "address": null, "queues": 1});
        let published = serde_json::json!({"nic": 0, "forwards": [{"host_port": 2001}]});
        Ledger { slots: [(3, serde_json::json!({"state": "claimed", "resources": {"taps": [tap], "published": [published]}}))].into(), ..Ledger::default() }
    }

    fn found(facts: &[(Noun, &str)], held: &[(u64, u64)]) -> Vec<String> {
        let mut now = Facts::default();
        facts.iter().for_each(|(noun, text)| now.add(*noun, *text));
        differences(&Facts::default(), &now, &ledger(), held, &mut Explained::default())
    }

    const LINK: (Noun, &str) = (Noun::Link, "ifname dvm3n0 linkinfo.info_kind tun master br0 mtu 1500");
    const RULES: (Noun, &str) = (Noun::Filter, r#"{"set":{"table":"diarch","elem":["dvm3n0","52:54:00:00:00:01",2001]}}"#);

    #[test]
    fn a_tap_with_its_rules_is_as_it_must_be_and_one_that_is_gone_is_nobodys_loss() {
        assert_eq!(found(&[LINK, RULES], &[(3, 0)]), Vec::<String>::new());
        assert_eq!(found(&[], &[]), Vec::<String>::new());
    }

    #[test]
    fn a_user_with_a_passt_is_held_to_its_network_and_nobody_else_is() {
        let found = |state: &str, users: &str, closed: &str| {
            let record = serde_json::json!({"state": state, "uid": 300_001, "run": {"egress": "closed"}});
            let ledger = Ledger { slots: [(1, record)].into(), ..Ledger::default() };
            let mut now = Facts::default();
            for (name, elem) in [("users", users), ("closed_users", closed)] {
                now.add(Noun::Filter, format!(r#"{{"set":{{"table":"diarch","name":"{name}","elem":[{elem}]}}}}"#));
            }
            differences(&Facts::default(), &now, &ledger, &[], &mut Explained::default())
        };
        assert_eq!(found("running", "300001", "300001"), Vec::<String>::new());
        assert_eq!(found("exited", "300001", "300001"), Vec::<String>::new());
        assert_eq!(found("exited", "", ""), Vec::<String>::new());
        for (users, closed, says) in [
            ("", "300001", "not among the filter's users"),
            ("300001", "", "not among the filter's closed_users"),
            ("300001, 300002", "300001", "left behind: filter: 300002"),
        ] {
            let wrong = found("running", users, closed);
            assert!(wrong.len() == 1 && wrong[0].contains(says), "no {says:?} in {wrong:?}");
        }
    }

    #[test]
    fn a_tap_that_is_lost_astray_or_free_is_found() {
        for (facts, held, says) in [
            (vec![RULES], vec![(3, 0)], "which nobody took"),
            (vec![LINK], vec![], "no rule holds it"),
            (vec![(Noun::Link, "ifname dvm3n0 linkinfo.info_kind tun mtu 1500"), RULES], vec![], "not on its bridge"),
            (vec![LINK, RULES, (Noun::Filter, r#"{"set":{"table":"diarch","elem":["dvm4n0"]}}"#)], vec![], "it names dvm4n0"),
            (vec![LINK, RULES, (Noun::Filter, r#"{"map":{"table":"diarch","elem":[2002]}}"#)], vec![], "it names port 2002"),
        ] {
            let wrong = found(&facts, &held);
            assert!(wrong.iter().any(|sentence| sentence.contains(says)), "no {says:?} in {wrong:?}");
        }
    }
}
