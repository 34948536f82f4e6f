//! At start: finds again what an earlier supervisor made, undoes what it left half done, and touches nothing that is not in the ledger.
//!
//! | the ledger says | and the process                        | then it is                                          |
//! |-----------------|----------------------------------------|-----------------------------------------------------|
//! | claimed         |                                        | claimed                                             |
//! | spawning        | has no number                          | claimed: the gate never opened, the child went away |
//! | spawning        | is QEMU (within a moment)              | running, adopted                                    |
//! | spawning        | is gone                                | claimed: whoever asked asks again                   |
//! | running         | lives                                  | running, adopted                                    |
//! | running         | is gone                                | exited, how is unknown                              |
//! | any             | can't be looked at                     | as it was, quarantined: its release looks again     |
//! | exited          |                                        | exited                                              |
//! | releasing       | (killed, if it lives)                  | free                                                |

use super::{argv, companion, release, watch};
use crate::host::Host;
use crate::ledger::{CompanionKind, Ledger, Record, Unreadable};
use crate::state::{Supervisor, Vm};
use crate::{net, process};
use diarch_ipc::operation::{ExitStatus, SlotState};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A child between the opened gate and its exec is given this long to become QEMU or to go.
const HALF_MADE_PATIENCE: Duration = Duration::from_secs(2);

/// A slot as it was found, with its process where that lives.
pub struct Found {
    pub record: Record,
    pub pidfd: Option<OwnedFd>,
    /// The programs beside it that live.
    pub companions: Vec<(CompanionKind, OwnedFd)>,
    /// Why its process could not be looked at.
    pub trouble: Option<String>,
}

/// What was found, in sentences for the audit.
pub struct Findings {
    pub found: Vec<Found>,
    pub unreadable: Vec<Unreadable>,
    pub notes: Vec<String>,
}

/// Looks at every record. Runs before the loop does: it may wait a moment for half-made children.
pub fn find(ledger: &Ledger, host: &Host) -> io::Result<Findings> {
    let (records, unreadable) = ledger.load()?;
    let mut findings = Findings { found: Vec::new(), unreadable, notes: Vec::new() };
    for mut record in records {
        let slot = record.slot;
        let process = record.run.as_ref().and_then(|run| run.process);
        let mut pidfd = match process.map_or(Ok(None), |process| process::find(process, host.user_of(record.uid))) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                // "Can't look" is not "gone": the slot, its user id and its memory stay taken until it can be looked at.
                let trouble = format!("its process can't be looked at: {error}");
                findings.notes.push(format!("slot {slot} ({}): {trouble}", record.label));
                findings.found.push(Found { record, pidfd: None, companions: Vec::new(), trouble: Some(trouble) });
                continue;
            }
        };
        let was = record.state;
        let last = record.clone();
        match was {
            SlotState::Claimed | SlotState::Exited | SlotState::Quarantined => pidfd = None,
            SlotState::Spawning => {
                // Before its user is changed, a half-made child is still root's: `find` by the VM's user does not see it.
                let child = process.map(|process| half_made(process, &record, host));
                pidfd = child.flatten();
                if pidfd.is_some() {
                    record.state = SlotState::Running;
                } else {
                    record.state = SlotState::Claimed;
                    record.run = None;
                }
            }
            SlotState::Running if pidfd.is_none() => {
                record.state = SlotState::Exited;
                if let Some(run) = &mut record.run {
                    run.exit.get_or_insert(ExitStatus::Unknown);
                }
            }
            SlotState::Running => {}
            SlotState::Releasing => {
                // What can't be ended now must not keep the others from being found: the worker's release tries again.
                if let Some(Err(error)) = pidfd.as_ref().map(release::end) {
                    findings.notes.push(format!("slot {slot} ({}): its release could not be finished: {error}", record.label));
                    findings.found.push(Found { record, pidfd, companions: Vec::new(), trouble: None });
                    continue;
                }
                let removed =
                    companion::end_left(&record, host).and_then(|()| net::tap::remove(&record)).map_err(io::Error::other).and_then(|()| ledger.remove(slot));
                if let Err(error) = removed {
                    findings.notes.push(format!("slot {slot} ({}): its release could not be finished: {error}", record.label));
                    findings.found.push(Found { record, pidfd: None, companions: Vec::new(), trouble: None });
                    continue;
                }
                findings.notes.push(format!("slot {slot} ({}): its release was finished", record.label));
                continue;
            }
        }
        if record.state != was {
            findings.notes.push(format!("slot {slot} ({}): was {}, found {}", record.label, was.as_str(), record.state.as_str()));
            // A full tmpfs must not keep the VMs from being found: what is in memory counts, and the next start finds the same again.
            if let Err(error) = ledger.write(&record) {
                findings.notes.push(format!("slot {slot}: that could not be written down: {error}"));
            }
        } else if pidfd.is_some() {
            findings.notes.push(format!("slot {slot} ({}): adopted", record.label));
        }
        // Companions of a QEMU that lives are watched again; what is left of another's is ended.
        let companions = companion::find(&last, host).unwrap_or_else(|error| {
            findings.notes.push(format!("slot {slot} ({}): the programs beside its QEMU can't be looked at: {error}", record.label));
            Vec::new()
        });
        let companions = if pidfd.is_some() {
            companions
        } else {
            companion::end(&companions);
            Vec::new()
        };
        findings.found.push(Found { record, pidfd, companions, trouble: None });
    }
    for lost in &findings.unreadable {
        findings.notes.push(format!("slot {}: its record can't be read ({}); the slot stays closed, and its processes are left alone", lost.slot, lost.reason));
    }
    Ok(findings)
}

/// Waits until a child that was caught between fork and exec is QEMU under its own user (then it is adopted) or gone.
fn half_made(recorded: crate::ledger::Process, record: &Record, host: &Host) -> Option<OwnedFd> {
    let name = argv::process_name(record.slot);
    let until = Instant::now() + HALF_MADE_PATIENCE;
    loop {
        let (start_time, _) = process::identity(recorded.pid).ok()??;
        if start_time != recorded.start_time {
            return None;
        }
        let found = process::find(recorded, host.user_of(record.uid)).ok()?;
        if found.is_some() && process::runs_as(recorded.pid, &name) {
            return found;
        }
        if Instant::now() >= until {
            // It neither became QEMU nor went: end it, while its identity is beyond doubt.
            if let Some(pidfd) = found.or_else(|| process::find(recorded, host.owner()).ok()?) {
                let _ = release::end(&pidfd);
            }
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Takes over what was found.
pub fn adopt(supervisor: &Rc<Supervisor>, found: Vec<Found>) {
    for Found { record, pidfd, companions, trouble } in found {
        let (slot, spawn) = (record.slot, record.run.as_ref().map(|run| run.spawn));
        let mut missing: Vec<CompanionKind> = record.run.iter().flat_map(|run| &run.companions).map(|one| one.kind).collect();
        let companions: Vec<_> = companions.into_iter().map(|(kind, pidfd)| (kind, Rc::new(pidfd))).collect();
        let mut vm = Vm::new(record);
        vm.adopted = pidfd.is_some();
        vm.quarantined = trouble;
        vm.pidfd = pidfd.map(Rc::new);
        vm.companions = companions.iter().map(|(_, pidfd)| Rc::clone(pidfd)).collect();
        let pidfd = vm.pidfd.clone();
        supervisor.slots.borrow_mut().insert(slot, vm);
        if let (Some(pidfd), Some(spawn)) = (pidfd, spawn) {
            watch::begin(supervisor, slot, spawn, pidfd);
            for (kind, pidfd) in companions {
                if let Some(there) = missing.iter().position(|missing| *missing == kind) {
                    missing.remove(there);
                }
                companion::watch(supervisor, slot, spawn, kind, pidfd);
            }
            for kind in missing {
                let supervisor = Rc::clone(supervisor);
                tokio::task::spawn_local(async move { companion::impaired(&supervisor, slot, spawn, kind, "ended while no supervisor ran").await });
            }
        }
    }
}
