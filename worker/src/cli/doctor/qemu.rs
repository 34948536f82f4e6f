//! The granted QEMU binaries: whether they can be used, their versions, and what those can do.
//!
//! The paths are those of the grants file, which is root's. What the worker says of them is shown and never run: it may be a broken worker.

use super::bounded::{As, run};
use super::finding::Finding;
use diarch_ipc::operation::QemuGrant;
use std::path::{Path, PathBuf};

/// The oldest that takes what the supervisor writes: JSON for `-netdev` (since 7.2, qapi/net.json by `-netdev`'s parser); `-device` took it from 6.2 on.
const NEEDED: Version = Version(7, 2);

/// What came with which version.
struct Gate {
    what: &'static str,
    since: Version,
}

/// As "Since:" has it in QEMU's qapi/qom.json (`IOMMUFDProperties`, `SevSnpGuestProperties`, `TdxGuestProperties`).
const GATES: [Gate; 3] =
    [Gate { what: "IOMMUFD", since: Version(9, 0) }, Gate { what: "SEV-SNP guests", since: Version(9, 1) }, Gate { what: "TDX guests", since: Version(10, 1) }];

/// Major and minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// A binary that was asked.
pub struct Asked {
    pub name: String,
    pub path: PathBuf,
    pub answer: Result<String, String>,
}

pub async fn ask(qemus: Vec<(String, PathBuf)>) -> Vec<Asked> {
    let mut asked = Vec::new();
    for (name, path) in qemus {
        let answer = version_of(&path).await;
        asked.push(Asked { name, path, answer });
    }
    asked
}

/// The first line of its `--version`.
async fn version_of(path: &Path) -> Result<String, String> {
    match run(path, &["--version".as_ref()], As::CallerButNotRoot).await {
        Ok(said) if said.well => said.out.lines().next().map(str::to_owned).ok_or_else(|| "it says no version".to_owned()),
        Ok(said) => Err(format!("--version fails: {}", said.err.lines().next().unwrap_or("without a word"))),
        Err(error) => Err(error.to_string()),
    }
}

/// `QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)`.
fn parse(line: &str) -> Option<Version> {
    let number = line.split("version ").nth(1)?.split_whitespace().next()?;
    let mut parts = number.split('.').map(str::parse);
    Some(Version(parts.next()?.ok()?, parts.next()?.ok()?))
}

/// `granted`: as the supervisor has it in its hands; none where it can't be asked.
pub fn qemu(granted: Option<&[QemuGrant]>, asked: &[Asked]) -> Vec<Finding> {
    let mut found = Vec::new();
    match granted {
        Some([]) => {
            found.push(Finding::fail("qemu", "no binary is granted: no VM can start", "add a [qemu.NAME] with its path to /etc/diarch/grants.toml"));
        }
        Some(granted) => {
            for qemu in granted {
                let shown = format!("{}: {}", qemu.name, qemu.path);
                found.push(match (&qemu.trouble, asked.iter().find(|one| one.name == qemu.name.as_str() && one.path == Path::new(&qemu.path))) {
                    (Some(trouble), _) => Finding::fail(
                        "qemu",
                        format!("{shown}: {trouble}"),
                        "install it (apt-get install qemu-system-x86), or correct its path or sha256 in /etc/diarch/grants.toml",
                    ),
                    (None, None) => Finding::ok("qemu", shown),
                    (None, Some(asked)) => gates(shown, asked),
                });
            }
        }
        None => found.extend(asked.iter().map(|one| gates(format!("{}: {}", one.name, one.path.display()), one))),
    }
    found
}

fn gates(shown: String, asked: &Asked) -> Finding {
    let line = match &asked.answer {
        Ok(line) => line,
        Err(error) => return Finding::warn("qemu", format!("{shown}: its version can't be had: {error}"), format!("{} --version", asked.path.display())),
    };
    let Some(version) = parse(line) else {
        return Finding::info("qemu", format!("{shown}: '{line}' tells no version"));
    };
    if version < NEEDED {
        return Finding::fail("qemu", format!("{shown} is {version}, and {NEEDED} is needed: no VM can start on it"), "install a newer one, and grant it");
    }
    let can: Vec<String> = GATES
        .iter()
        .map(|gate| match version >= gate.since {
            true => gate.what.to_owned(),
            false => format!("no {} (since {})", gate.what, gate.since),
        })
        .collect();
    Finding::ok("qemu", format!("{shown} is {version}: {}", can.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::super::tests::{host, status};
    use super::*;

    fn asked(answer: Result<&str, &str>) -> Vec<Asked> {
        let answer = answer.map(str::to_owned).map_err(str::to_owned);
        vec![Asked { name: "default".into(), path: "/usr/bin/qemu-system-x86_64".into(), answer }]
    }

    #[test]
    fn versions_open_their_gates() {
        for (line, expected) in [
            ("QEMU emulator version 10.1.0", "IOMMUFD, SEV-SNP guests, TDX guests"),
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)", "IOMMUFD, SEV-SNP guests, no TDX guests (since 10.1)"),
            ("QEMU emulator version 9.0.50", "IOMMUFD, no SEV-SNP guests (since 9.1), no TDX guests (since 10.1)"),
            ("QEMU emulator version 7.2.19 (Debian 1:7.2+dfsg-7)", "no IOMMUFD (since 9.0), no SEV-SNP guests (since 9.1), no TDX guests (since 10.1)"),
        ] {
            let found = qemu(None, &asked(Ok(line)));
            assert!(found[0].level == Level::Ok && found[0].detail.ends_with(expected), "{found:?}");
        }
        for (answer, expected) in [(Ok("QEMU emulator version 6.2.0"), Level::Fail), (Ok("something"), Level::Info), (Err("hangs"), Level::Warn)] {
            assert_eq!(qemu(None, &asked(answer))[0].level, expected, "{answer:?}");
        }
    }

    #[test]
    fn what_the_supervisor_can_not_use_fails_whatever_its_version() {
        let mut granted = status().supervisor.expect("a supervisor").qemu;
        let new = asked(Ok("QEMU emulator version 10.1.0"));
        assert!(qemu(Some(&granted), &new)[0].detail.contains("is 10.1"));
        assert_eq!(qemu(Some(&granted), &[])[0].level, Level::Ok);
        granted[0].trouble = Some("no such file".into());
        assert_eq!(qemu(Some(&granted), &new)[0].level, Level::Fail);
        assert_eq!(qemu(Some(&[]), &new)[0].level, Level::Fail);
        // Another path than root's file has is nothing that was asked.
        (granted[0].trouble, granted[0].path) = (None, "/tmp/evil".into());
        assert!(!qemu(Some(&granted), &new)[0].detail.contains("10.1"));
    }

    #[tokio::test]
    async fn a_binary_is_asked_and_one_that_is_not_there_has_an_error() {
        let (_directory, host) = host();
        let path = host.program("qemu", "test \"$1\" = --version && echo QEMU emulator version 9.2.1");
        let asked = ask(vec![("a".into(), path), ("b".into(), "/nonexistent".into())]).await;
        assert_eq!(asked[0].answer.as_deref(), Ok("QEMU emulator version 9.2.1"));
        assert!(asked[1].answer.is_err());
    }
}
