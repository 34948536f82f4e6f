//! Three accounts of one host, side by side: the kernel's, the ledger's, and what the supervisor says in `host.inventory`.
//!
//! ```text
//!   kernel now  =  kernel at the start  +  what the ledger explains        and        ledger  =  host.inventory
//!                  (nothing claimed)       must be there | may be there
//! ```
//!
//! What is in the kernel and explained by nobody was left behind; what must be there and is not was lost.

use super::kernel::{Facts, Noun, Process, described};
use super::ledger::Ledger;
use super::{companions, devices, network};
use diarch_ipc::operation::{HostInventory, VmRecord};
use serde_json::Value;
use std::collections::BTreeSet;

/// What the ledger accounts for.
#[derive(Debug, Default)]
pub struct Explained {
    pub must: Facts,
    pub may: Facts,
    /// Of the start's, what need not be there now.
    pub excused: Facts,
}

/// What the run itself did, and what that excuses.
#[derive(Debug, Default)]
pub struct Deeds {
    /// Taps whose queues it has: (slot, card).
    pub held: Vec<(u64, u64)>,
    /// Processes that it killed: (number, start time).
    pub killed: BTreeSet<(i64, u64)>,
    /// Groups of devices with which its kernel did something wrong.
    pub troubled: BTreeSet<u64>,
}

impl Explained {
    pub fn by(ledger: &Ledger, deeds: &Deeds) -> Self {
        let mut all = Self::default();
        for (slot, record) in &ledger.slots {
            all.slot(*slot, record);
            companions::explain(record, &deeds.killed, &mut all);
        }
        all
    }

    fn slot(&mut self, slot: u64, record: &Value) {
        let (must, may) = (&mut self.must, &mut self.may);
        let at = format!("vm/{slot}");
        must.add(Noun::File, &at);
        must.add(Noun::File, format!("{at}/record.json"));
        // Left by a supervisor that died between writing and renaming; the next record takes its name.
        may.add(Noun::File, format!("{at}/record.json.new"));
        for socket in ["qmp.sock", "console.sock"] {
            let file = format!("{at}/{socket}");
            // The files stay until the slot is released or QEMU is started anew; who listens is QEMU alone.
            may.add(Noun::File, &file);
            may.add(Noun::Socket, format!("run/{file}"));
        }
        // A mount hangs from the supervisor's descriptor, which shows its root, and from the one that the service manager keeps.
        for _ in record["resources"]["mounts"].as_array().into_iter().flatten() {
            must.add(Noun::Descriptor, "/");
            must.add(Noun::Kept, "/");
        }
        if let Some((pid, start_time)) = Ledger::process(record) {
            must.add(Noun::Process, Process::fact(pid, start_time, Ledger::uid(record)));
            must.add(Noun::Descriptor, companions::PIDFD);
            may.add(Noun::Descriptor, companions::PIDFD);
            must.add(Noun::Socket, format!("run/{at}/qmp.sock"));
            must.add(Noun::Socket, format!("run/{at}/console.sock"));
        }
    }
}

/// What is wrong, in sentences; none: all agree.
pub fn differences(start: &Facts, now: &Facts, ledger: &Ledger, deeds: &Deeds, told: &HostInventory) -> Vec<String> {
    let mut explained = Explained::by(ledger, deeds);
    let mut wrong = network::differences(start, now, ledger, &deeds.held, &mut explained);
    wrong.extend(devices::differences(start, now, ledger, &deeds.troubled, &told.devices, &mut explained));
    wrong.extend(kernel(start, now, &explained));
    wrong.extend(inventory(ledger, &told.vms));
    wrong
}

/// What the kernel has too much or too little, by what is explained.
pub fn kernel(start: &Facts, now: &Facts, explained: &Explained) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut all: Vec<&(Noun, String)> = start.0.keys().chain(now.0.keys()).chain(explained.must.0.keys()).collect();
    all.sort();
    all.dedup();
    for key in all {
        let count = |of: &Facts| of.0.get(key).copied().unwrap_or(0);
        let (is, was) = (count(now), count(start));
        let least = was.saturating_sub(count(&explained.excused)) + count(&explained.must);
        let most = was + count(&explained.must).max(count(&explained.may));
        let (noun, text) = key;
        if is > most {
            let who = if *noun == Noun::Process { pid_of(text).map(described).unwrap_or_default() } else { String::new() };
            wrong.push(format!("left behind: {noun} {text}: {is}, and {most} are explained. {who}"));
        } else if is < least {
            wrong.push(format!("lost: {noun} {text}: {is}, and {least} must be there"));
        }
    }
    wrong
}

fn pid_of(text: &str) -> Option<i64> {
    text.split_whitespace().nth(1)?.parse().ok()
}

fn inventory(ledger: &Ledger, told: &[VmRecord]) -> Vec<String> {
    let mut wrong = Vec::new();
    for vm in told {
        let Some(record) = ledger.slots.get(&u64::from(vm.slot.get())) else {
            wrong.push(format!("told and not written: slot {} ({})", vm.slot, vm.label));
            continue;
        };
        // The types' own names: what they are called in the ledger and in an answer is the same.
        let vm = serde_json::to_value(vm).unwrap_or_default();
        let run = &record["run"];
        for (field, written) in [("label", &record["label"]), ("uid", &record["uid"]), ("claim", &record["claim"]), ("state", &record["state"])] {
            if vm[field] != *written {
                wrong.push(format!("slot {}: {field} is told as {} and written as {written}", vm["slot"], vm[field]));
            }
        }
        if record["state"] == "running" && vm["pid"] != run["process"]["pid"] {
            wrong.push(format!("slot {}: pid is told as {} and written as {}", vm["slot"], vm["pid"], run["process"]["pid"]));
        }
        if record["state"] == "exited" && vm["exit"] != run["exit"] {
            wrong.push(format!("slot {}: exit is told as {} and written as {}", vm["slot"], vm["exit"], run["exit"]));
        }
    }
    for (slot, record) in &ledger.slots {
        if !told.iter().any(|vm| u64::from(vm.slot.get()) == *slot) {
            wrong.push(format!("written and not told: slot {slot}: {record}"));
        }
        // When nothing is under way, nothing is half done.
        if !["claimed", "running", "exited"].contains(&Ledger::state(record)) {
            wrong.push(format!("half done: slot {slot} is {}", Ledger::state(record)));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(all: &[(Noun, &str)]) -> Facts {
        let mut facts = Facts::default();
        all.iter().for_each(|(noun, text)| facts.add(*noun, *text));
        facts
    }

    fn running() -> Ledger {
        let record = serde_json::json!({"state": "running", "uid": 300_001, "run": {"process": {"pid": 40, "start_time": 9}}});
        Ledger { slots: [(1, record)].into(), ..Ledger::default() }
    }

    #[test]
    fn what_is_explained_is_neither_left_nor_lost() {
        let start = facts(&[(Noun::Descriptor, "anon_inode:[pidfd]"), (Noun::File, "vm")]);
        let mut now = start.clone();
        Explained::by(&running(), &Deeds::default()).must.0.into_iter().for_each(|(key, count)| *now.0.entry(key).or_insert(0) += count);
        assert_eq!(kernel(&start, &now, &Explained::by(&running(), &Deeds::default())), Vec::<String>::new());
    }

    #[test]
    fn one_too_many_was_left_and_one_too_few_was_lost() {
        let start = facts(&[(Noun::Link, "lo")]);
        let now = facts(&[(Noun::Link, "lo"), (Noun::Link, "tap0"), (Noun::Descriptor, "socket")]);
        let wrong = kernel(&start, &now, &Explained::default());
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert!(wrong.iter().all(|sentence| sentence.starts_with("left behind")));
        let wrong = kernel(&now, &start, &Explained::default());
        assert!(wrong.iter().all(|sentence| sentence.starts_with("lost")) && wrong.len() == 2, "{wrong:?}");
        let wrong = kernel(&start, &start, &Explained::by(&running(), &Deeds::default()));
        assert!(wrong.iter().any(|sentence| sentence.contains("process pid 40")), "{wrong:?}");
    }
}
