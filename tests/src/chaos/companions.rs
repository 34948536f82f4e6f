//! What the ledger explains of the programs beside a QEMU: passt for each user-mode card, virtiofsd for each share.
//!
//! They run as long as their QEMU does, unless this run killed them: then they are missed by their guest, and by nobody else. The ports that a passt listens on are
//! those that the ledger has forwarded to its VM.

use super::compare::Explained;
use super::kernel::{Noun, Process};
use super::ledger::Ledger;
use serde_json::Value;
use std::collections::BTreeSet;

const PASST: &str = "passt";

pub fn explain(record: &Value, killed: &BTreeSet<(i64, u64)>, explained: &mut Explained) {
    let companions = Ledger::companions(record);
    for one in &companions {
        // The supervisor has it until its QEMU has ended.
        explained.may.add(Noun::Descriptor, PIDFD);
        if !killed.contains(&(one.pid, one.start_time)) {
            explained.must.add(Noun::Descriptor, PIDFD);
            explained.must.add(Noun::Process, Process::fact(one.pid, one.start_time, Ledger::uid(record)));
        }
    }
    let passts = companions.iter().filter(|one| one.kind == PASST);
    let all_live = passts.clone().count() > 0 && passts.clone().all(|one| !killed.contains(&(one.pid, one.start_time)));
    for forward in record["run"]["forwards"].as_array().into_iter().flatten().filter(|_| Ledger::state(record) == "running") {
        let Some(port) = port(forward) else { continue };
        // Which of several cards it leads to, the ledger does not say. Where there is no passt, QEMU listens, and a stub does not.
        if all_live {
            explained.must.add(Noun::Port, port);
        } else {
            explained.may.add(Noun::Port, port);
        }
    }
}

pub const PIDFD: &str = "anon_inode:[pidfd]";

/// As the kernel shows a socket that is bound to 127.0.0.1.
fn port(forward: &Value) -> Option<String> {
    Some(format!("{} 0100007F:{:04X}", forward["protocol"].as_str()?, forward["host_port"].as_u64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(state: &str) -> Value {
        let one = |kind: &str, pid: i64| serde_json::json!({"kind": kind, "process": {"pid": pid, "start_time": 9}});
        let forward = serde_json::json!({"protocol": "tcp", "host_address": "127.0.0.1", "host_port": 3000, "guest_port": 80});
        let run = serde_json::json!({"process": {"pid": 40, "start_time": 9}, "companions": [one("passt", 38), one("virtiofsd", 39)], "forwards": [forward]});
        serde_json::json!({"state": state, "uid": 300_001, "run": run})
    }

    fn explained(state: &str, killed: &[(i64, u64)]) -> Explained {
        let mut explained = Explained::default();
        explain(&record(state), &killed.iter().copied().collect(), &mut explained);
        explained
    }

    #[test]
    fn companions_are_there_as_long_as_their_qemu_and_no_longer() {
        let all = explained("running", &[]);
        assert_eq!(all.must.of(Noun::Process).count(), 2);
        assert_eq!(all.must.of(Noun::Port).collect::<Vec<_>>(), ["tcp 0100007F:0BB8"]);
        assert_eq!(explained("exited", &[]).must.0.len() + explained("exited", &[]).may.0.len(), 0);
    }

    #[test]
    fn one_that_was_killed_is_not_missed_and_must_not_be_there() {
        let without = explained("running", &[(38, 9)]);
        assert_eq!(without.must.of(Noun::Process).collect::<Vec<_>>(), ["pid 39 start 9 uid 300001"]);
        assert_eq!((without.must.of(Noun::Port).count(), without.may.of(Noun::Port).count()), (0, 1));
        assert_eq!(without.may.count(Noun::Process, "pid 38 start 9 uid 300001"), 0);
        // Another process of that number was not killed.
        assert_eq!(explained("running", &[(38, 8)]).must.of(Noun::Process).count(), 2);
    }
}
