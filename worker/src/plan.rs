//! From what should be and what is, to the steps between: a pure function, executed by the worker and printed by `diarch plan`.
//!
//! ```text
//!   wanted (a file, enabled, not held)       observed                       step
//!   -----------------------------------------------------------------------------------
//!   yes                                      nothing, or at rest            start
//!   yes                                      runs, unmanaged                adopt   (never restarted because we forgot)
//!   yes                                      runs as its file says          keep
//!   yes                                      runs otherwise                 restart, with each field that differs
//!   yes, and found not to be startable       runs otherwise                 keep, until its file changes
//!   yes                                      back-off or failed             keep, until its file changes
//!   yes                                      ended while nobody watched     start, or release where it ended by its own will
//!   no                                       runs                           stop
//!   no                                       a slot without a process       release
//!   unknown: its file can't be used          anything                       keep
//! ```

use crate::state::{HoldWhy, Holds};
use crate::vmfile::{Desired, Files, Machine, RestartPolicy};
use diarch_ipc::name::Label;
use diarch_ipc::operation::ExitStatus;
use std::collections::{BTreeMap, BTreeSet};

/// How the reason of a VM begins that runs on because its new file can't be started.
pub const NOT_STARTABLE: &str = "the changed file can't be started";

/// What is known of one VM that exists, or that a task drives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub name: Label,
    pub activity: Activity,
    pub driven: Driven,
    /// What it was started as; none where that was forgotten.
    pub machine: Option<Machine>,
    /// The file that it was started from, where known.
    pub file: Option<String>,
    /// The revision of its file that its task was last told.
    pub revision: Option<String>,
    /// A file that was found not to be startable while this runs: its revision, and the sentence for people.
    pub refused: Option<(String, String)>,
}

/// Whether a task of this worker has it in hand, and towards what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driven {
    /// Found in the supervisor's inventory; nobody's yet.
    Unmanaged,
    ToRun,
    ToStop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// No slot, no process.
    Stopped,
    /// A slot in which nothing was started.
    Claimed,
    /// Being started, or running.
    Running,
    Stopping,
    /// It ended, and no worker was there.
    Ended(ExitStatus),
    BackOff,
    Failed,
    /// The supervisor can do nothing but kill and release it.
    Quarantined,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub name: Label,
    pub action: Action,
    /// Why, field by field where it is a change.
    pub reasons: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Start,
    Stop,
    /// Stopped as a stop does it, and started as its file says now.
    Restart,
    Adopt,
    Keep,
    /// The slot is given back; with a hold, the VM is not started again by itself.
    Release(Option<HoldWhy>),
}

impl Action {
    pub fn as_str(self) -> &'static str {
        match self {
            Action::Start => "start",
            Action::Stop => "stop",
            Action::Restart => "restart",
            Action::Adopt => "adopt",
            Action::Keep => "keep",
            Action::Release(_) => "release",
        }
    }
}

/// The steps in name order, one for each VM that is wanted or exists.
pub fn plan(files: &Files, observed: &[Observed], holds: &Holds) -> Vec<Step> {
    let wanted: BTreeMap<&Label, &Desired> = files.vms.iter().map(|vm| (&vm.name, vm)).collect();
    let seen: BTreeMap<&Label, &Observed> = observed.iter().map(|vm| (&vm.name, vm)).collect();
    let names: BTreeSet<&Label> = wanted.keys().chain(seen.keys()).copied().collect();
    names.into_iter().filter_map(|name| one(files, name, wanted.get(name).copied(), seen.get(name).copied(), holds)).collect()
}

fn one(files: &Files, name: &Label, wanted: Option<&Desired>, seen: Option<&Observed>, holds: &Holds) -> Option<Step> {
    let step = |action, reasons| Some(Step { name: name.clone(), action, reasons });
    let unwanted = match wanted {
        None => {
            let file = seen.and_then(|vm| vm.file.as_deref());
            if files.unreadable {
                return step(Action::Keep, vec!["the directory of the VM files can't be read".into()]);
            }
            // A typo never stops a VM. Without a file name on record any file that can't be used may be the one.
            match file {
                Some(file) if files.broken.iter().any(|broken| broken == file) => {
                    return step(Action::Keep, vec![format!("its file {file} can't be used; it stays as it is")]);
                }
                None if !files.broken.is_empty() => {
                    return step(Action::Keep, vec!["it is in no file, and a file that can't be used may be its own".into()]);
                }
                Some(file) => format!("its file {file} is gone"),
                None => "no file defines it".into(),
            }
        }
        Some(vm) if !vm.enabled => format!("it is disabled in {}", vm.file),
        Some(vm) => match holds.of(&vm.name, &vm.revision) {
            Some(hold) => hold.reason.clone(),
            None => return wanted_step(name, vm, seen),
        },
    };
    let seen = seen?;
    match (seen.activity, seen.driven) {
        (Activity::Stopped, _) => None,
        (Activity::Stopping, Driven::ToStop) => step(Action::Keep, vec![format!("it is being stopped: {unwanted}")]),
        (Activity::Running | Activity::Stopping, _) => step(Action::Stop, vec![unwanted]),
        (Activity::Claimed | Activity::Ended(_) | Activity::BackOff | Activity::Failed | Activity::Quarantined, _) => {
            step(Action::Release(None), vec![unwanted])
        }
    }
}

fn wanted_step(name: &Label, vm: &Desired, seen: Option<&Observed>) -> Option<Step> {
    let step = |action, reasons| Some(Step { name: name.clone(), action, reasons });
    let start = |why: &str| step(Action::Start, vec![why.to_owned()]);
    let Some(seen) = seen else { return start("it should run, and doesn't") };
    match (seen.activity, seen.driven) {
        (Activity::Stopped | Activity::Claimed, Driven::ToRun) => step(Action::Keep, vec!["it is about to start".into()]),
        (Activity::Stopped | Activity::Claimed, _) => start("it should run, and doesn't"),
        (Activity::Running, driven) => {
            let differences = seen.machine.as_ref().map_or_else(Vec::new, |machine| machine.differences(&vm.machine));
            match (driven, differences.is_empty()) {
                // Its task tries again by itself.
                (Driven::ToRun, false) if seen.refused.as_ref().is_some_and(|(revision, _)| *revision == vm.revision) => {
                    step(Action::Keep, seen.refused.iter().map(|(_, sentence)| sentence.clone()).collect())
                }
                (_, false) => step(Action::Restart, differences),
                (Driven::Unmanaged, true) if seen.machine.is_none() => {
                    step(Action::Adopt, vec!["it runs, and how it was started is not on record: kept as it is".into()])
                }
                (Driven::Unmanaged, true) => step(Action::Adopt, vec!["it runs as its file says".into()]),
                (Driven::ToStop, true) => start("it was to be stopped, and is wanted again"),
                (Driven::ToRun, true) => step(Action::Keep, vec!["it runs as its file says".into()]),
            }
        }
        (Activity::Stopping, Driven::ToRun) => step(Action::Keep, vec!["it is being restarted".into()]),
        (Activity::Stopping, _) => start("it is wanted again, once it has stopped"),
        (Activity::Ended(status), _) => match (status, vm.restart) {
            (ExitStatus::Code(0), RestartPolicy::OnFailure | RestartPolicy::Never) => {
                step(Action::Release(Some(HoldWhy::PoweredOff)), vec!["it was shut down while no worker watched".into()])
            }
            (_, RestartPolicy::Never) => step(
                Action::Release(Some(HoldWhy::PoweredOff)),
                vec![format!("it ended with {status} while no worker watched, and its policy is never to restart it")],
            ),
            _ => step(Action::Start, vec![format!("it ended with {status} while no worker watched")]),
        },
        (Activity::BackOff | Activity::Failed, _) if seen.revision.as_ref() != Some(&vm.revision) => {
            let mut reasons = vec!["its file has changed since it failed".to_owned()];
            reasons.extend(seen.machine.as_ref().map_or_else(Vec::new, |machine| machine.differences(&vm.machine)));
            step(Action::Start, reasons)
        }
        (Activity::BackOff, _) => step(Action::Keep, vec!["it is started again when its pause is over".into()]),
        (Activity::Failed, _) => step(Action::Keep, vec!["it failed: an operator's start, or a change of its file, tries again".into()]),
        (Activity::Quarantined, _) => step(Action::Keep, vec!["it is quarantined by the supervisor; stop or kill it".into()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmfile::tests::desired;
    use diarch_ipc::name::Cpus;
    use proptest::prelude::*;

    fn files(vms: Vec<Desired>) -> Files {
        Files { vms, ..Files::default() }
    }
    fn runs(vm: &Desired) -> Observed {
        Observed {
            name: vm.name.clone(),
            activity: Activity::Running,
            driven: Driven::ToRun,
            machine: Some(vm.machine.clone()),
            file: Some(vm.file.clone()),
            revision: Some(vm.revision.clone()),
            refused: None,
        }
    }
    fn only(files: &Files, observed: &[Observed], holds: &Holds) -> (Action, Vec<String>) {
        let mut steps = plan(files, observed, holds);
        assert_eq!(steps.len(), 1, "{steps:?}");
        let step = steps.remove(0);
        (step.action, step.reasons)
    }

    #[test]
    fn a_changed_field_restarts_with_its_reason() {
        let vm = desired("a");
        let old = runs(&vm);
        let mut new = vm;
        new.machine.cpus = Cpus::new(4).unwrap();
        assert_eq!(only(&files(vec![new]), &[old], &Holds::default()), (Action::Restart, vec!["cores: 1 -> 4".to_owned()]));
    }

    #[test]
    fn a_changed_file_that_can_t_be_started_is_kept_until_it_changes_again() {
        let vm = desired("a");
        let refused = Some(("bad".to_owned(), "no such kernel".to_owned()));
        let old = Observed { refused, ..runs(&vm) };
        let mut new = vm;
        new.machine.cpus = Cpus::new(4).unwrap();
        new.revision = "bad".into();
        assert_eq!(only(&files(vec![new.clone()]), std::slice::from_ref(&old), &Holds::default()), (Action::Keep, vec!["no such kernel".to_owned()]));
        new.revision = "better".into();
        assert_eq!(only(&files(vec![new]), &[old], &Holds::default()).0, Action::Restart);
    }

    #[test]
    fn a_vm_that_runs_and_was_forgotten_is_adopted_and_not_restarted() {
        let vm = desired("a");
        let seen = Observed { driven: Driven::Unmanaged, machine: None, file: None, revision: None, ..runs(&vm) };
        assert_eq!(only(&files(vec![vm]), &[seen], &Holds::default()).0, Action::Adopt);
    }

    #[test]
    fn a_file_that_became_bad_stops_nothing() {
        let vm = desired("a");
        let broken = Files { broken: vec![vm.file.clone()], ..Files::default() };
        assert_eq!(only(&broken, &[runs(&vm)], &Holds::default()).0, Action::Keep);
        let forgotten = Observed { file: None, ..runs(&vm) };
        assert_eq!(only(&broken, &[forgotten], &Holds::default()).0, Action::Keep);
        let unreadable = Files { unreadable: true, ..Files::default() };
        assert_eq!(only(&unreadable, &[runs(&vm)], &Holds::default()).0, Action::Keep);
    }

    #[test]
    fn a_file_that_is_gone_or_disabled_stops_its_vm() {
        let mut vm = desired("a");
        let seen = runs(&vm);
        assert_eq!(only(&files(vec![]), std::slice::from_ref(&seen), &Holds::default()).0, Action::Stop);
        vm.enabled = false;
        assert_eq!(only(&files(vec![vm]), &[seen], &Holds::default()).0, Action::Stop);
    }

    #[test]
    fn a_hold_stops_until_the_file_changes() {
        let mut vm = desired("a");
        let mut holds = Holds::default();
        holds.hold(&vm.name, HoldWhy::Operator, "stopped by uid 1000".into(), vm.revision.clone());
        let stopped = Observed { activity: Activity::Stopped, driven: Driven::ToStop, ..runs(&vm) };
        assert_eq!(only(&files(vec![vm.clone()]), &[runs(&vm)], &holds), (Action::Stop, vec!["stopped by uid 1000".to_owned()]));
        assert!(plan(&files(vec![vm.clone()]), std::slice::from_ref(&stopped), &holds).is_empty());
        vm.revision = "other".into();
        assert_eq!(only(&files(vec![vm]), &[stopped], &holds).0, Action::Start);
    }

    #[test]
    fn a_shutdown_that_nobody_watched_stays_off_and_a_crash_does_not() {
        let vm = desired("a");
        let ended = |status| Observed { activity: Activity::Ended(status), driven: Driven::Unmanaged, ..runs(&vm) };
        let action = |status| only(&files(vec![vm.clone()]), &[ended(status)], &Holds::default()).0;
        assert_eq!(action(ExitStatus::Code(0)), Action::Release(Some(HoldWhy::PoweredOff)));
        assert_eq!(action(ExitStatus::Signal(9)), Action::Start);
        assert_eq!(action(ExitStatus::Unknown), Action::Start);
    }

    #[test]
    fn a_failed_vm_is_left_alone_until_its_file_changes() {
        let mut vm = desired("a");
        let failed = Observed { activity: Activity::Failed, ..runs(&vm) };
        assert_eq!(only(&files(vec![vm.clone()]), std::slice::from_ref(&failed), &Holds::default()).0, Action::Keep);
        vm.revision = "other".into();
        assert_eq!(only(&files(vec![vm]), &[failed], &Holds::default()).0, Action::Start);
    }

    /// What each step brings about when it succeeds.
    fn apply(files: &Files, observed: &mut Vec<Observed>, holds: &mut Holds, step: &Step) {
        let wanted = files.vms.iter().find(|vm| vm.name == step.name);
        let at = observed.iter().position(|vm| vm.name == step.name);
        match (step.action, wanted) {
            (Action::Start | Action::Restart, Some(vm)) => {
                observed.retain(|seen| seen.name != step.name);
                observed.push(runs(vm));
            }
            (Action::Adopt, Some(vm)) => {
                let seen = &mut observed[at.unwrap()];
                seen.driven = Driven::ToRun;
                // What was forgotten is taken to be what the file says now.
                seen.machine.get_or_insert_with(|| vm.machine.clone());
            }
            (Action::Stop | Action::Release(_), _) => {
                if let (Action::Release(Some(why)), Some(vm)) = (step.action, wanted) {
                    holds.hold(&vm.name, why, "shut down".into(), vm.revision.clone());
                }
                observed.retain(|seen| seen.name != step.name);
            }
            (Action::Keep, _) => {}
            (action, None) => panic!("{action:?} of a VM that nobody wants"),
        }
    }

    fn any_observed(name: &'static str) -> impl Strategy<Value = Option<Observed>> {
        let activity = prop_oneof![
            Just(Activity::Stopped),
            Just(Activity::Claimed),
            Just(Activity::Running),
            Just(Activity::Stopping),
            Just(Activity::Ended(ExitStatus::Code(0))),
            Just(Activity::Ended(ExitStatus::Signal(9))),
            Just(Activity::BackOff),
            Just(Activity::Failed),
            Just(Activity::Quarantined),
        ];
        let driven = prop_oneof![Just(Driven::Unmanaged), Just(Driven::ToRun), Just(Driven::ToStop)];
        (activity, driven, prop_oneof![Just(None), (1u64..3).prop_map(Some)], any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            move |(activity, driven, cpus, file, revision, exists)| {
                let vm = desired(name);
                exists.then(|| Observed {
                    activity,
                    driven,
                    machine: cpus.map(|n| Machine { cpus: Cpus::new(n).unwrap(), ..vm.machine.clone() }),
                    file: file.then(|| vm.file.clone()),
                    revision: revision.then(|| vm.revision.clone()),
                    ..runs(&vm)
                })
            },
        )
    }

    proptest! {
        #[test]
        fn applied_steps_leave_nothing_to_do(
            seen_a in any_observed("a"), seen_b in any_observed("b"),
            file_a in any::<bool>(), file_b in any::<bool>(), enabled in any::<bool>(), broken in any::<bool>(), unreadable in any::<bool>(), held in any::<bool>(),
            policy in prop_oneof![Just(RestartPolicy::Always), Just(RestartPolicy::OnFailure), Just(RestartPolicy::Never)],
        ) {
            let mut vms = Vec::new();
            if file_a { vms.push(Desired { enabled, restart: policy, ..desired("a") }); }
            if file_b { vms.push(desired("b")); }
            let files = Files { vms, broken: if broken { vec!["b.json".into()] } else { vec![] }, unreadable, problems: vec![] };
            let mut holds = Holds::default();
            if held { holds.hold(&desired("a").name, HoldWhy::Operator, "held".into(), desired("a").revision); }
            let mut observed: Vec<Observed> = seen_a.into_iter().chain(seen_b).collect();
            for step in plan(&files, &observed.clone(), &holds) {
                apply(&files, &mut observed, &mut holds, &step);
            }
            let again = plan(&files, &observed, &holds);
            prop_assert!(again.iter().all(|step| step.action == Action::Keep), "{again:?}");
        }

        #[test]
        fn what_runs_as_its_file_says_is_never_touched(policy in prop_oneof![Just(RestartPolicy::Always), Just(RestartPolicy::Never)], forgotten in any::<bool>()) {
            let vm = Desired { restart: policy, ..desired("a") };
            let mut seen = runs(&vm);
            if forgotten { seen.machine = None; }
            let steps = plan(&files(vec![vm]), &[seen], &Holds::default());
            prop_assert!(steps.iter().all(|step| step.action == Action::Keep));
        }
    }
}
