//! The grants file, read by the one program whose reading counts.

use super::Host;
use super::bounded::{As, Said, run};
use super::finding::Finding;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

const CHECK: &str = "grants file";
/// After a change of the file.
const RESTART: &str = "systemctl restart diarch-supervisor (VMs run on)";

/// The file, and the QEMU binaries that it grants and that can be used.
pub struct Grants {
    pub finding: Finding,
    pub qemus: Vec<(String, PathBuf)>,
}

/// `started_ms`: when the supervisor that serves now read it.
pub async fn grants(host: &Host, started_ms: Option<u64>) -> Grants {
    let (program, file) = (host.root.join("usr/sbin/diarch-supervisor"), host.root.join("etc/diarch/grants.toml"));
    let said = run(&program, &["check-grants".as_ref(), file.as_os_str()], As::Caller).await;
    let changed_ms = file.metadata().ok().and_then(|about| about.modified().ok()).and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let changed_ms = changed_ms.map(|since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
    match said {
        Ok(said) => of(&said, changed_ms, started_ms),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Grants { finding: Finding::info(CHECK, format!("not checked: there is no {}, which knows how", program.display())), qemus: Vec::new() }
        }
        Err(error) => {
            let finding = Finding::warn(CHECK, format!("{} can't be run: {error}", program.display()), "install the package anew");
            Grants { finding, qemus: Vec::new() }
        }
    }
}

fn of(said: &Said, changed_ms: Option<u64>, started_ms: Option<u64>) -> Grants {
    let qemus = said.out.lines().filter_map(|line| line.strip_prefix("QEMU ")?.split_once(": ")).map(|(name, path)| (name.to_owned(), path.into())).collect();
    let warnings: Vec<&str> = said.out.lines().filter_map(|line| line.strip_prefix("warning: ")).collect();
    let last = said.out.lines().last().unwrap_or_default();
    let finding = if !said.well {
        let reason = said.err.lines().next_back().unwrap_or("without a word");
        let reason = reason.strip_prefix("diarch-supervisor: ").unwrap_or(reason);
        let fix = match reason.contains("Permission denied") {
            true => "it holds no secret: chmod 0644 /etc/diarch/grants.toml, or run this as root".to_owned(),
            false => format!("mend /etc/diarch/grants.toml; 'diarch-supervisor check-grants /etc/diarch/grants.toml' says when it is right; then {RESTART}"),
        };
        Finding::fail(CHECK, reason, fix)
    } else if let [first, others @ ..] = warnings.as_slice() {
        let more = if others.is_empty() { "" } else { "; ..." };
        Finding::warn(CHECK, format!("{last}, and: {first}{more}"), format!("mend it in /etc/diarch/grants.toml, then {RESTART}"))
    } else if changed_ms.zip(started_ms).is_some_and(|(changed, started)| changed > started) {
        Finding::warn(CHECK, format!("{last}, and changed since the supervisor read it"), RESTART)
    } else {
        Finding::ok(CHECK, last)
    };
    Grants { finding, qemus }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::super::tests::host;
    use super::*;

    fn said(well: bool, out: &str, err: &str) -> Said {
        Said { well, out: out.into(), err: err.into() }
    }

    #[test]
    fn what_is_accepted_is_fine_until_it_changes() {
        let accepted = said(true, "QEMU default: /usr/bin/qemu\n/etc/diarch/grants.toml: accepted (8 VMs, 2048 MiB, KVM granted)", "");
        let grants = of(&accepted, Some(1), Some(2));
        assert_eq!((grants.finding.level, grants.qemus), (Level::Ok, vec![("default".to_owned(), PathBuf::from("/usr/bin/qemu"))]));
        assert_eq!(of(&accepted, Some(3), Some(2)).finding.level, Level::Warn);
        assert_eq!(of(&accepted, Some(3), None).finding.level, Level::Ok);
        let warned = of(&said(true, "warning: QEMU \"x\": no such file\ng: accepted (0 VMs)", ""), None, None).finding;
        assert!(warned.level == Level::Warn && warned.detail.contains("no such file"), "{warned:?}");
    }

    #[test]
    fn what_is_refused_is_a_fail_with_the_parsers_own_reason() {
        let refused = of(&said(false, "", "diarch-supervisor: the grants are refused: line 3, column 1: unknown field `vm`"), None, None).finding;
        assert!(refused.level == Level::Fail && refused.detail.starts_with("the grants are refused: line 3"), "{refused:?}");
        let hidden = of(&said(false, "", "diarch-supervisor: /etc/diarch/grants.toml: Permission denied (os error 13)"), None, None).finding;
        assert!(hidden.fix.expect("a fix").contains("chmod 0644"));
    }

    #[tokio::test]
    async fn the_supervisors_own_program_is_asked_where_there_is_one() {
        let (_directory, host) = host();
        assert_eq!(grants(&host, None).await.finding.level, Level::Info);
        host.program("usr/sbin/diarch-supervisor", "test \"$1\" = check-grants && echo \"QEMU a: /b\" && echo \"$2: accepted (1 VMs)\"");
        let found = grants(&host, None).await;
        assert_eq!((found.finding.level, found.qemus.len()), (Level::Ok, 1), "{:?}", found.finding);
        assert!(found.finding.detail.contains("etc/diarch/grants.toml: accepted"), "{}", found.finding.detail);
    }
}
