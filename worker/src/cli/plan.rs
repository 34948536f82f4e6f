//! `diarch plan`: what the worker would change now, and why.

use super::connection::{ask, unexpected};
use super::screen::{Screen, Stop};
use super::table::{Column, Tone, Value, table};
use super::validate;
use crate::control::protocol::{PlanView, Reply, Request};
use crate::plan::NOT_STARTABLE;
use std::path::Path;

pub fn plan(socket: &Path, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let Reply::Plan(plan) = ask(socket, &Request::Plan {}, screen)? else { return Err(unexpected("something else than a plan")) };
    if screen.json {
        return screen.document(&plan);
    }
    let PlanView { steps, problems } = plan;
    let (kept, changed): (Vec<_>, Vec<_>) =
        steps.into_iter().partition(|step| step.action == "keep" && !step.reasons.iter().any(|reason| reason.starts_with(NOT_STARTABLE)));
    let rows: Vec<Vec<Value>> = changed
        .into_iter()
        .map(|step| {
            let tone = match step.action.as_str() {
                "start" | "adopt" => Tone::Good,
                "restart" => Tone::Busy,
                "stop" | "release" => Tone::Bad,
                _ => Tone::Plain,
            };
            let reasons = match screen.width {
                Some(_) if !step.reasons.is_empty() => Value::lines(step.reasons),
                _ => Value::maybe((!step.reasons.is_empty()).then(|| step.reasons.join("; "))),
            };
            vec![Value::new(step.action, tone), Value::plain(step.name.as_str()), reasons]
        })
        .collect();
    match rows.is_empty() {
        true => screen.say("nothing to do")?,
        false => screen.say(table(&[Column::text("ACTION"), Column::text("NAME"), Column::text("WHY")], &rows, screen))?,
    }
    match kept.len() {
        0 => {}
        1 => screen.say("1 VM stays as it is")?,
        n => screen.say(format!("{n} VMs stay as they are"))?,
    }
    if !problems.is_empty() {
        // Not all of them are left out: one whose kernel is missing is tried, and may come to run.
        screen.say("\nwrong in the VM files:")?;
        for problem in &problems {
            screen.say(validate::line(problem))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::connection::tests::FakeWorker;
    use super::super::screen::tests::Printed;
    use super::*;
    use crate::control::protocol::{FileProblem, PlanStep};
    use diarch_ipc::name::Label;

    fn printed(plan: PlanView) -> String {
        let worker = FakeWorker::answering(&[Reply::Plan(plan), Reply::Done {}]);
        let mut printed = Printed::default();
        super::plan(&worker.socket, &mut printed.screen()).expect("planned");
        printed.out()
    }

    fn step(action: &str, name: &str, reasons: &[&str]) -> PlanStep {
        PlanStep { name: Label::new(name).expect("a name"), action: action.into(), reasons: reasons.iter().map(|r| (*r).to_owned()).collect() }
    }

    #[test]
    fn an_empty_plan_says_so() {
        assert_eq!(printed(PlanView { steps: vec![], problems: vec![] }), "nothing to do\n");
        assert_eq!(printed(PlanView { steps: vec![step("keep", "web", &[])], problems: vec![] }), "nothing to do\n1 VM stays as it is\n");
    }

    #[test]
    fn a_vm_whose_changed_file_can_t_be_started_is_kept_with_its_reason() {
        let steps = vec![step("keep", "web", &["the changed file can't be started: no kernel; runs on as before"])];
        let said = printed(PlanView { steps, problems: vec![] });
        assert_eq!(said, "ACTION  NAME  WHY\nkeep    web   the changed file can't be started: no kernel; runs on as before\n");
    }

    #[test]
    fn steps_come_with_their_reasons_and_problems_after_them() {
        let plan = PlanView {
            steps: vec![
                step("keep", "a", &[]),
                step("restart", "web", &["memory: 512 MiB becomes 1024 MiB", "a port forward is new"]),
                step("stop", "old", &["the file is gone"]),
            ],
            problems: vec![FileProblem { file: "vms/bad.json".into(), path: "$.name".into(), line: Some(3), reason: "a name is needed".into() }],
        };
        let expected = "\
ACTION   NAME  WHY
restart  web   memory: 512 MiB becomes 1024 MiB; a port forward is new
stop     old   the file is gone
1 VM stays as it is

wrong in the VM files:
vms/bad.json:3: $.name: a name is needed
";
        assert_eq!(printed(plan), expected);
    }
}
