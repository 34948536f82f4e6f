//! What the ledger explains of devices: IOMMU groups that are vfio-pci's now, on a stage that shows a kernel's files.
//!
//! A group that has a record is wholly taken: each of its functions at vfio-pci, and its node there. Only one with which the kernel did something wrong may be
//! quarantined: then nothing is said of its functions, and it may be nobody's. All other functions are as they were at the start, to the last attribute.

use super::compare::Explained;
use super::kernel::{Facts, Noun};
use super::ledger::Ledger;
use diarch_ipc::operation::DeviceRecord;
use serde_json::Value;
use std::collections::BTreeSet;

pub const QUARANTINED: &str = "quarantined";
/// A file of the stage's holds one name: of two that are written to it at one moment, for two groups, one is lost. No kernel loses one, and what takes a write and
/// does nothing is right to be distrusted.
const LOST: &str = "the kernel took it and did nothing";

pub fn differences(start: &Facts, now: &Facts, ledger: &Ledger, troubled: &BTreeSet<u64>, told: &[DeviceRecord], explained: &mut Explained) -> Vec<String> {
    let mut wrong = Vec::new();
    for (group, record) in &ledger.devices {
        let state = record["state"].as_str().unwrap_or("unreadable");
        let quarantined = state == QUARANTINED;
        let lost = record["trouble"].as_str().is_some_and(|trouble| trouble.contains(LOST));
        if quarantined && !troubled.contains(group) && !lost {
            wrong.push(format!("quarantined for nothing: group {group}: {}", record["trouble"]));
        }
        if quarantined != record["trouble"].is_string() {
            wrong.push(format!("group {group} is {state}, and its trouble is {}", record["trouble"]));
        }
        if !["bound", "attached", QUARANTINED].contains(&state) {
            wrong.push(format!("half done: group {group} is {state}: {}", record["trouble"]));
        }
        let claim = &record["holder"]["tenancy"]["claim"];
        let slot = record["holder"]["tenancy"]["slot"].as_u64().and_then(|slot| ledger.slots.get(&slot));
        if slot.is_none_or(|slot| slot["claim"] != *claim) && !(quarantined && record["holder"].is_null()) {
            wrong.push(format!("left behind: group {group} is a VM's that has no slot: {}", record["holder"]));
        }
        let functions: Vec<&str> = record["functions"].as_array().into_iter().flatten().filter_map(|taken| taken["function"].as_str()).collect();
        let node = format!("dev/vfio/{group} ");
        let of = |fact: &str| fact.starts_with(&node) || functions.iter().any(|function| fact.contains(function));
        for fact in now.of(Noun::Device).filter(|fact| of(fact)) {
            explained.may.0.insert((Noun::Device, fact.to_owned()), now.count(Noun::Device, fact));
        }
        for fact in start.of(Noun::Device).filter(|fact| of(fact)) {
            explained.excused.0.insert((Noun::Device, fact.to_owned()), start.count(Noun::Device, fact));
        }
        for function in functions.iter().filter(|_| !quarantined) {
            let bound = |fact: &str| fact.contains(&format!("/{function}/driver link ")) && fact.ends_with("/vfio-pci");
            if !now.of(Noun::Device).any(bound) {
                wrong.push(format!("lost: group {group} is {state}, and {function} is not at vfio-pci"));
            }
        }
        if !quarantined && !now.of(Noun::Device).any(|fact| fact.starts_with(&node)) {
            wrong.push(format!("lost: the node of group {group}, which is {state}"));
        }
        explained.must.add(Noun::File, format!("device/{group}.json"));
        explained.may.add(Noun::File, format!("device/{group}.json.new"));
        let shown = told.iter().find(|device| u64::from(device.group) == *group);
        let holder = record["holder"]["tenancy"]["slot"].as_u64();
        if shown.is_none_or(|shown| shown.state.as_str() != state || shown.slot.map(|slot| u64::from(slot.get())) != holder) {
            wrong.push(format!("group {group} is told as {shown:?} and written as {record}"));
        }
    }
    for device in told.iter().filter(|device| !ledger.devices.contains_key(&u64::from(device.group))) {
        wrong.push(format!("told and not written: group {}", device.group));
    }
    wrong
}

/// The records, by group.
pub fn records(directory: &std::path::Path) -> std::collections::BTreeMap<u64, Value> {
    let mut groups = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let Some(group) = entry.file_name().to_str().and_then(|name| name.strip_suffix(".json")).and_then(|name| name.parse().ok()) else { continue };
        let mut value: Value = std::fs::read(entry.path()).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or(Value::Null);
        groups.insert(group, value["record"].take());
    }
    groups
}
