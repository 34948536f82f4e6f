//! At start: finds again what an earlier supervisor made, undoes what it left half done, and touches nothing that is not in the ledger.
//!
//! | the ledger says | and the process                        | then it is                                          |
//! |-----------------|----------------------------------------|-----------------------------------------------------|
//! | claimed         |                                        | claimed                                             |
//! | spawning        | has no number                          | claimed: the gate never opened, the child went away |
//! | spawning        | is QEMU (within a moment)              | running, adopted                                    |
//! | spawning        | is gone                                | claimed: whoever asked asks again                   |
//! | spawning        | was killed, and does not end           | spawning, quarantined until it has (`lingering`)    |
//! | running         | lives                                  | running, adopted                                    |
//! | running         | is gone                                | exited, how is unknown                              |
//! | any             | can't be looked at                     | as it was, quarantined: its release looks again     |
//! | exited          |                                        | exited                                              |
//! | releasing       | (killed, if it lives)                  | free                                                |

use super::{argv, companion, lingering, release, watch};
use crate::host::Host;
use crate::ledger::{CompanionKind, Ledger, Record, Unreadable};
use crate::state::{Supervisor, Vm};
use crate::{net, process, vfio};
use diarch_ipc::name::Tenancy;
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
    /// What is left of an earlier start, was killed and has not ended.
    pub lingering: Vec<OwnedFd>,
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
                findings.found.push(Found { record, pidfd: None, companions: Vec::new(), trouble: Some(trouble), lingering: Vec::new() });
                continue;
            }
        };
        let was = record.state;
        let last = record.clone();
        let mut lingering = Vec::new();
        match was {
            SlotState::Claimed | SlotState::Exited | SlotState::Quarantined => pidfd = None,
            SlotState::Spawning => {
                // Before its user is changed, a half-made child is still root's: `find` by the VM's user does not see it.
                match process.map_or(HalfMade::Gone, |process| half_made(process, &record, host)) {
                    HalfMade::Qemu(qemu) => {
                        pidfd = Some(qemu);
                        record.state = SlotState::Running;
                    }
                    HalfMade::Gone => {
                        pidfd = None;
                        record.state = SlotState::Claimed;
                        record.run = None;
                    }
                    // It stays spawning, as it is written down, until it has ended.
                    HalfMade::Lingers(child) => {
                        pidfd = None;
                        lingering.push(child);
                    }
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
                    findings.found.push(Found { record, pidfd, companions: Vec::new(), trouble: None, lingering: Vec::new() });
                    continue;
                }
                let removed =
                    companion::end_left(&record, host).and_then(|()| net::tap::remove(&record)).map_err(io::Error::other).and_then(|()| ledger.remove(slot));
                if let Err(error) = removed {
                    findings.notes.push(format!("slot {slot} ({}): its release could not be finished: {error}", record.label));
                    findings.found.push(Found { record, pidfd: None, companions: Vec::new(), trouble: None, lingering: Vec::new() });
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
            lingering.extend(companion::end(companions));
            Vec::new()
        };
        if !lingering.is_empty() {
            findings.notes.push(format!("slot {slot} ({}): what is left of its last start was killed, and has not ended", record.label));
        }
        findings.found.push(Found { record, pidfd, companions, trouble: None, lingering });
    }
    for lost in &findings.unreadable {
        findings.notes.push(format!("slot {}: its record can't be read ({}); the slot stays closed, and its processes are left alone", lost.slot, lost.reason));
    }
    Ok(findings)
}

/// What became of a child that was caught between fork and exec.
enum HalfMade {
    Gone,
    Qemu(OwnedFd),
    /// It neither became QEMU nor went, and was killed, and has not ended.
    Lingers(OwnedFd),
}

/// Waits until it is QEMU under its own user (then it is adopted) or gone.
fn half_made(recorded: crate::ledger::Process, record: &Record, host: &Host) -> HalfMade {
    let name = argv::process_name(record.slot);
    let until = Instant::now() + HALF_MADE_PATIENCE;
    loop {
        match process::identity(recorded.pid) {
            Ok(Some((start_time, _))) if start_time == recorded.start_time => {}
            _ => return HalfMade::Gone,
        }
        let Ok(found) = process::find(recorded, host.user_of(record.uid)) else { return HalfMade::Gone };
        match found {
            Some(pidfd) if process::runs_as(recorded.pid, &name) => return HalfMade::Qemu(pidfd),
            found if Instant::now() >= until => {
                // While its identity is beyond doubt.
                let child = found.or_else(|| process::find(recorded, host.owner()).ok()?);
                let left = lingering::kill(child.into_iter().collect(), lingering::KILLED).pop();
                return left.map_or(HalfMade::Gone, HalfMade::Lingers);
            }
            _ => {}
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Takes over what was found.
pub fn adopt(supervisor: &Rc<Supervisor>, found: Vec<Found>) {
    for Found { record, pidfd, companions, trouble, lingering } in found {
        let tenancy = Tenancy { slot: record.slot, claim: record.claim };
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
        if !lingering.is_empty() {
            lingering::keep(supervisor, tenancy, lingering, "what is left of its last start", move |supervisor| {
                let record = supervisor.with(tenancy, |vm| vm.record.clone());
                if let Some(record) = record.ok().filter(|record| record.state == SlotState::Spawning) {
                    supervisor.record_or_believe(Record { state: SlotState::Claimed, run: None, ..record });
                    vfio::attach::ended(supervisor, tenancy);
                }
            });
        }
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
