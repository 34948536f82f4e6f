//! Writes what is installed beside the programs and made from their own definitions: manual pages and shell completions.
//!
//! ```text
//!   diarch_worker::cli::command()  --+--> man1/diarch.1, man1/diarch-vm.1, ...     diarch.bash, _diarch, diarch.fish
//!   diarch_worker::arguments         +--> man8/diarch-worker.8
//!   diarch_supervisor::usage::HELP --+--> man8/diarch-supervisor.8
//! ```
//!
//! `scripts/deb` runs it. Nothing in its output depends on when or where it ran: the package is the same, byte for byte, wherever it is built.

#![forbid(unsafe_code)]

mod manual;

use clap_complete::Shell;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(directory), None) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: diarch-package DIRECTORY");
        return ExitCode::from(2);
    };
    match write(Path::new(&directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("diarch-package: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn write(directory: &Path) -> Result<(), String> {
    let failed = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    for page in manual::pages()? {
        let section = directory.join(format!("man{}", page.section));
        std::fs::create_dir_all(&section).map_err(|error| failed(&section, error))?;
        let file = section.join(format!("{}.{}", page.name, page.section));
        std::fs::write(&file, page.text).map_err(|error| failed(&file, error))?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut diarch_worker::cli::command(), "diarch", directory).map_err(|error| failed(directory, error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(files(&path).into_iter().map(|(name, bytes)| (Path::new(path.file_name().unwrap()).join(name), bytes)));
            } else {
                found.insert(path.file_name().unwrap().into(), std::fs::read(&path).unwrap());
            }
        }
        found
    }

    #[test]
    fn two_runs_write_the_same() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(one.path()).unwrap();
        write(two.path()).unwrap();
        let one = files(one.path());
        assert_eq!(one, files(two.path()));
        for name in ["man1/diarch.1", "man1/diarch-vm-start.1", "man8/diarch-worker.8", "man8/diarch-supervisor.8", "diarch.bash", "_diarch", "diarch.fish"] {
            assert!(one.get(Path::new(name)).is_some_and(|bytes| !bytes.is_empty()), "{name}");
        }
    }

    #[test]
    fn completions_know_every_command() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path()).unwrap();
        for name in ["diarch.bash", "_diarch", "diarch.fish"] {
            let text = std::fs::read_to_string(directory.path().join(name)).unwrap();
            for command in diarch_worker::cli::command().get_subcommands() {
                assert!(text.contains(command.get_name()), "{name}: {}", command.get_name());
            }
        }
    }

    /// As installed, but for the worker's user, who does not exist where this is built.
    #[test]
    fn the_installed_grants_are_accepted_and_open_nothing() {
        let text = include_str!("../grants.toml").replace("user = \"diarch\"", "user = 64000");
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("grants.toml");
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        let grants = diarch_supervisor::grants::Grants::load(&file, rustix::process::geteuid().as_raw()).unwrap();
        assert_eq!(grants.worker.user, diarch_supervisor::grants::User::Uid(64000), "the worker's user is not where this test replaces it");
        assert_eq!(grants.worker.unit.as_deref(), Some("diarch-worker.service"));
        assert_eq!((grants.vms.max, grants.vms.memory_mib, grants.vms.cpus_each, grants.vms.kvm), (0, 0, 0, false));
        assert!(grants.forwards.allow.is_empty() && !grants.forwards.egress);
    }

    /// They are written out so that they can be found, and say nothing that the worker would not do by itself: with the file lost, nothing is.
    #[test]
    fn the_installed_settings_are_the_defaults() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.json");
        assert_eq!(diarch_worker::config::Config::load(&file).unwrap(), diarch_worker::config::Config::default());
    }
}
