//! What the ledger says, read as anybody could read it: JSON files in a directory, without the supervisor's own types.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The records, by slot; a record that can't be read is `Null`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    pub slots: BTreeMap<u64, Value>,
    /// The groups of devices, by their number.
    pub devices: BTreeMap<u64, Value>,
}

/// A passt or a virtiofsd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Companion {
    pub kind: String,
    pub pid: i64,
    pub start_time: u64,
}

impl Ledger {
    pub fn read(run_directory: &Path) -> Self {
        let mut slots = BTreeMap::new();
        for entry in fs::read_dir(run_directory.join("vm")).into_iter().flatten().flatten() {
            let Some(slot) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let text = fs::read(entry.path().join("record.json")).unwrap_or_default();
            slots.insert(slot, serde_json::from_slice(&text).unwrap_or(Value::Null));
        }
        Self { slots, devices: super::devices::records(&run_directory.join("device")) }
    }

    pub fn state(record: &Value) -> &str {
        record["state"].as_str().unwrap_or("unreadable")
    }

    /// What runs beside a QEMU that runs.
    pub fn companions(record: &Value) -> Vec<Companion> {
        let all = record["run"]["companions"].as_array().into_iter().flatten().filter(|_| Self::state(record) == "running");
        let one = |of: &Value| {
            let (kind, process) = (of["kind"].as_str()?.to_owned(), &of["process"]);
            Some(Companion { kind, pid: process["pid"].as_i64()?, start_time: process["start_time"].as_u64()? })
        };
        all.filter_map(one).collect()
    }

    pub fn uid(record: &Value) -> u32 {
        record["uid"].as_u64().and_then(|uid| u32::try_from(uid).ok()).unwrap_or(u32::MAX)
    }

    /// QEMU's process while it runs: number and start time.
    pub fn process(record: &Value) -> Option<(i64, u64)> {
        let process = &record["run"]["process"];
        (Self::state(record) == "running").then(|| Some((process["pid"].as_i64()?, process["start_time"].as_u64()?)))?
    }
}
