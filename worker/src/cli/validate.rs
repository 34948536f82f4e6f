//! `diarch validate PATH`: what is wrong with VM files, before a worker reads them. Needs no worker.

use super::escape;
use super::screen::{Exit, Screen, Stop, count};
use crate::control::protocol::FileProblem;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::Path;

/// The answer as JSON.
#[derive(Debug, Serialize)]
struct Verdict {
    ok: bool,
    /// The VMs that are well defined.
    vms: Vec<String>,
    problems: Vec<FileProblem>,
}

/// Prints all problems, and fails when there is one.
pub fn validate(path: &Path, screen: &mut Screen<'_>) -> Result<Exit, Stop> {
    let shown = path.display().to_string();
    if let Err(error) = path.metadata() {
        let exit = match error.kind() {
            std::io::ErrorKind::NotFound => Exit::NotFound,
            std::io::ErrorKind::PermissionDenied => Exit::Denied,
            _ => Exit::Failed,
        };
        return Err(Stop::new(exit, format!("{shown} can't be read: {error}")));
    }
    let (vms, problems) = read(path);
    let exit = if problems.is_empty() { Exit::Ok } else { Exit::Failed };
    if screen.json {
        screen.document(&Verdict { ok: problems.is_empty(), vms, problems })?;
        return Ok(exit);
    }
    for problem in &problems {
        screen.say(line(problem))?;
    }
    let files: BTreeSet<&str> = problems.iter().map(|problem| problem.file.as_str()).collect();
    screen.say(match problems.len() {
        0 => format!("{}: no problems", count(vms.len(), "VM")),
        n => format!("{} in {}; {} without problems", count(n, "problem"), count(files.len(), "file"), count(vms.len(), "VM")),
    })?;
    Ok(exit)
}

/// The names of the well-defined VMs, and what is wrong with the others.
fn read(path: &Path) -> (Vec<String>, Vec<FileProblem>) {
    let (vms, problems) = crate::vmfile::validate(path);
    (vms.iter().map(|vm| vm.name.to_string()).collect(), problems)
}

/// `FILE:LINE: JSON PATH: REASON`, as editors and people expect it of a compiler.
pub fn line(problem: &FileProblem) -> String {
    let place = problem.line.map(|line| format!("{line}:")).unwrap_or_default();
    format!("{}:{place} {}: {}", escape::cell(&problem.file), escape::cell(&problem.path), escape::cell(&problem.reason))
}

#[cfg(test)]
mod tests {
    use super::super::screen::tests::Printed;
    use super::*;

    #[test]
    fn a_problem_names_file_line_path_and_reason_and_cannot_act() {
        let mut problem = FileProblem { file: "vms/\u{1b}[2J.json".into(), path: "$.x".into(), line: None, reason: "a\nb".into() };
        assert_eq!(line(&problem), "vms/\\x1b[2J.json: $.x: a\\nb");
        problem.line = Some(7);
        assert_eq!(line(&problem), "vms/\\x1b[2J.json:7: $.x: a\\nb");
    }

    #[test]
    fn a_missing_path_is_not_found() {
        let result = validate(Path::new("no/such/path"), &mut Printed::default().screen());
        assert!(matches!(result, Err(Stop::Failure { exit: Exit::NotFound, .. })));
    }

    #[test]
    fn a_file_that_is_not_json_is_a_problem_and_a_failure() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("bad.json");
        std::fs::write(&file, "{ \"name\": ").expect("written");
        for json in [false, true] {
            let mut printed = Printed::default();
            let mut screen = printed.screen();
            screen.json = json;
            assert_eq!(validate(&file, &mut screen), Ok(Exit::Failed));
            assert!(printed.out().contains("bad.json"), "{}", printed.out());
            if json {
                let verdict: serde_json::Value = serde_json::from_str(&printed.out()).expect("JSON");
                assert_eq!(verdict["ok"], false);
            }
        }
    }
}
