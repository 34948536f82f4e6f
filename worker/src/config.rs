//! The worker's own settings: `config.json`.
//!
//! ```text
//!   { "vm_config": { "configs_dir": "/etc/diarch/vms" },        <- as the watchdog writes it
//!     "diarch":    { "supervisor_socket": ..., ... } }          <- ours; every field has a default
//! ```
//!
//! A missing file means the defaults; a wrong one stops the worker with the JSON path of what is wrong, since a worker that guesses
//! where its VM files are would find none, and stop everything that runs.

use serde::Deserialize;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where `config.json` is unless told otherwise.
pub const CONFIG: &str = "/etc/diarch/config.json";
/// Where the worker listens unless told otherwise: in the directory in `/run/diarch` that is its own (the other is root's alone). The `diarch` command comes in
/// by the link `/run/diarch/worker.sock`, as every installation has it.
pub const CONTROL_SOCKET: &str = "/run/diarch/worker/worker.sock";

/// What the worker works with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The directory of the VM files.
    pub configs_dir: PathBuf,
    pub supervisor_socket: PathBuf,
    /// Who must be serving there (0: root; another one for rehearsals and tests).
    pub supervisor_uid: u32,
    pub control_socket: PathBuf,
    /// The group whose members may use the control socket: a name or a number. None: the group that the kernel gives a file there, which is that of a
    /// set-group-id directory, and otherwise the worker's own.
    pub operators_group: Option<String>,
    /// Holds and records; nothing in it that can't be lost.
    pub state_directory: PathBuf,
    pub log_directory: PathBuf,
    pub restart_supervisor: RestartSupervisor,
    /// How long to wait for a connection after each restart of the supervisor.
    pub restart_pauses: Vec<Duration>,
    /// How long a refused connection is tried again before the supervisor is restarted.
    pub patience: Duration,
}

/// How a supervisor that can't be reached is restarted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RestartSupervisor {
    /// systemd restarts `diarch-supervisor.service`; polkit allows the worker's user exactly that.
    Systemd,
    /// A program and its arguments; the program's path is absolute.
    Command(Vec<String>),
}

/// Why the settings can't be used; one line.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {path}: {reason}")]
pub struct BadConfig {
    pub file: String,
    /// The JSON path, `$` for the whole file.
    pub path: String,
    pub reason: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            configs_dir: "/etc/diarch/vms".into(),
            supervisor_socket: diarch_ipc::SUPERVISOR_SOCKET.into(),
            supervisor_uid: 0,
            control_socket: CONTROL_SOCKET.into(),
            operators_group: None,
            state_directory: "/var/lib/diarch".into(),
            log_directory: "/var/log/diarch/vms".into(),
            restart_supervisor: RestartSupervisor::Systemd,
            restart_pauses: [1_000, 3_000, 9_000].map(Duration::from_millis).into(),
            patience: Duration::from_millis(500),
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    vm_config: RawVmConfig,
    diarch: RawDiarch,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawVmConfig {
    configs_dir: Option<PathBuf>,
    /// The watchdog's; it belongs to the full VM file format and is not used yet.
    #[serde(rename = "authorized_keys_file")]
    _authorized_keys_file: Option<PathBuf>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawDiarch {
    supervisor_socket: Option<PathBuf>,
    supervisor_uid: Option<u32>,
    control_socket: Option<PathBuf>,
    operators_group: Option<RawGroup>,
    state_directory: Option<PathBuf>,
    log_directory: Option<PathBuf>,
    restart_supervisor: Option<RawRestart>,
    restart_pauses_ms: Option<Vec<u64>>,
    patience_ms: Option<u64>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a group's name or number")]
enum RawGroup {
    Name(String),
    Number(u32),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawRestart {
    Systemd,
    Command(Vec<String>),
}

impl Config {
    /// Reads `file`. A missing one gives the defaults, and says so in the log.
    pub fn load(file: &Path) -> Result<Self, BadConfig> {
        match std::fs::read(file) {
            Ok(bytes) => Self::parse(&bytes).map_err(|(path, reason)| BadConfig { file: file.display().to_string(), path, reason }),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                tracing::info!(file = %file.display(), "no such settings file: using the defaults");
                Ok(Self::default())
            }
            Err(error) => Err(BadConfig { file: file.display().to_string(), path: "$".into(), reason: error.to_string() }),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self, (String, String)> {
        let raw: Raw = crate::json::parse(bytes).map_err(|error| (error.path, error.reason))?;
        let default = Self::default();
        let d = raw.diarch;
        let restart_supervisor = match d.restart_supervisor {
            None | Some(RawRestart::Systemd) => RestartSupervisor::Systemd,
            Some(RawRestart::Command(command)) => {
                if !command.first().is_some_and(|program| program.starts_with('/')) {
                    return Err(("$.diarch.restart_supervisor.command".into(), "the first entry must be a program's absolute path".into()));
                }
                RestartSupervisor::Command(command)
            }
        };
        let restart_pauses = match d.restart_pauses_ms {
            None => default.restart_pauses,
            // "At most three times with growing pauses" (DESIGN 5): more would only hide a supervisor that can't live.
            Some(pauses) if pauses.len() > 3 => return Err(("$.diarch.restart_pauses_ms".into(), "at most 3 restarts are tried".into())),
            Some(pauses) => pauses.into_iter().map(Duration::from_millis).collect(),
        };
        let config = Self {
            configs_dir: raw.vm_config.configs_dir.unwrap_or(default.configs_dir),
            supervisor_socket: d.supervisor_socket.unwrap_or(default.supervisor_socket),
            supervisor_uid: d.supervisor_uid.unwrap_or(default.supervisor_uid),
            control_socket: d.control_socket.unwrap_or(default.control_socket),
            operators_group: d.operators_group.map(|group| match group {
                RawGroup::Name(name) => name,
                RawGroup::Number(gid) => gid.to_string(),
            }),
            state_directory: d.state_directory.unwrap_or(default.state_directory),
            log_directory: d.log_directory.unwrap_or(default.log_directory),
            restart_supervisor,
            restart_pauses,
            patience: d.patience_ms.map_or(default.patience, Duration::from_millis),
        };
        let absolute = [
            ("vm_config.configs_dir", &config.configs_dir),
            ("diarch.supervisor_socket", &config.supervisor_socket),
            ("diarch.control_socket", &config.control_socket),
            ("diarch.state_directory", &config.state_directory),
            ("diarch.log_directory", &config.log_directory),
        ];
        for (path, value) in absolute {
            if !value.is_absolute() {
                return Err((format!("$.{path}"), "an absolute path is needed".into()));
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> (String, String) {
        Config::parse(text.as_bytes()).unwrap_err()
    }

    #[test]
    fn the_watchdogs_file_is_a_config() {
        let config = Config::parse(br#"{"vm_config": {"configs_dir": "/etc/sp/watchdog/vms", "authorized_keys_file": "/k"}}"#).unwrap();
        assert_eq!(config.configs_dir, Path::new("/etc/sp/watchdog/vms"));
        assert_eq!(config.supervisor_socket, Path::new("/run/diarch/supervisor.sock"));
        assert_eq!(config.restart_supervisor, RestartSupervisor::Systemd);
    }

    #[test]
    fn every_field_of_ours_is_taken() {
        let config = Config::parse(
            br#"{"diarch": {"supervisor_socket": "/s", "supervisor_uid": 7, "control_socket": "/c", "operators_group": "kvm", "state_directory": "/st",
                "log_directory": "/l", "restart_supervisor": {"command": ["/bin/x", "y"]}, "restart_pauses_ms": [1, 2], "patience_ms": 3}}"#,
        )
        .unwrap();
        assert_eq!(config.supervisor_uid, 7);
        assert_eq!(config.restart_supervisor, RestartSupervisor::Command(vec!["/bin/x".into(), "y".into()]));
        assert_eq!(config.restart_pauses, [Duration::from_millis(1), Duration::from_millis(2)]);
        assert_eq!(config.operators_group.as_deref(), Some("kvm"));
        assert_eq!(config.patience, Duration::from_millis(3));
    }

    #[test]
    fn a_wrong_field_is_named_by_its_path() {
        assert_eq!(wrong(r#"{"vm_config": {"config_dir": "/x"}}"#).0, "$.vm_config.config_dir");
        assert_eq!(wrong(r#"{"diarch": {"supervisor_uid": "root"}}"#).0, "$.diarch.supervisor_uid");
        assert_eq!(wrong(r#"{"diarch": {"restart_pauses_ms": [1,2,3,4]}}"#).0, "$.diarch.restart_pauses_ms");
        assert_eq!(wrong(r#"{"diarch": {"restart_supervisor": {"command": ["sh"]}}}"#).0, "$.diarch.restart_supervisor.command");
        assert_eq!(wrong(r#"{"diarch": {"log_directory": "logs"}}"#).0, "$.diarch.log_directory");
        assert_eq!(wrong("").0, "$");
    }
}
