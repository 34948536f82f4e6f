//! systemd, asked over D-Bus: to restart the supervisor, what the worker's user may do besides, and how the units stand.
//!
//! ```text
//!   worker --RestartUnit--> dbus --> systemd --may it?--> polkit (50-diarch.rules: this user, this unit, the verb restart)
//!          <--JobRemoved (done, failed, timeout, ...)---/
//! ```
//!
//! A connection lives for one question, since the bus may have been restarted after the last one. Nothing is asked interactively. Who asks bounds the
//! time, and a question that is dropped takes its connection along.

use crate::control::protocol::{Need, RightVerdict, RightView};
use diarch_ipc::frame::printable;
use futures_core::Stream;
use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::pin;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};
use zbus::connection::{self, Connection};
use zbus::fdo::PropertiesProxy;
use zbus::names::InterfaceName;
use zbus::proxy::CacheProperties;
use zbus::{ObjectPath, OwnedObjectPath, OwnedVariant};

pub const SUPERVISOR: &str = "diarch-supervisor.service";
pub const SOCKET: &str = "diarch-supervisor.socket";
pub const WORKER: &str = "diarch-worker.service";
/// Where the package puts the rule.
pub const POLKIT_RULE: &str = "/usr/share/polkit-1/rules.d/50-diarch.rules";
/// The system bus, as the D-Bus specification has it.
const BUS: &str = "/run/dbus/system_bus_socket";

/// Of its some hundred methods those that are needed.
#[zbus::proxy(interface = "org.freedesktop.systemd1.Manager", default_service = "org.freedesktop.systemd1", default_path = "/org/freedesktop/systemd1")]
trait Manager {
    fn restart_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    fn list_units_by_patterns(&self, states: &[&str], patterns: &[&str]) -> zbus::Result<Vec<ListedUnit>>;
    #[zbus(property)]
    fn version(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn system_state(&self) -> zbus::Result<String>;
    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: ObjectPath<'_>, unit: &str, result: &str) -> zbus::Result<()>;
}

/// Name, description, load state, active state, sub state, followed unit, path, and its job: number, type, path.
type ListedUnit = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// Why systemd did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    #[error("{0}")]
    NoBus(String),
    #[error("it is not allowed ({0})")]
    NotAllowed(String),
    /// systemd's own answer: the name of the error, and its text.
    #[error("{text}")]
    Refused { name: String, text: String },
    #[error("{0}")]
    Other(String),
}

impl From<zbus::Error> for Trouble {
    fn from(error: zbus::Error) -> Self {
        let error = match error {
            // Those of the D-Bus specification come as types of their own; the name and the text are what counts.
            zbus::Error::FDO(error) => {
                use zbus::DBusError;
                let (name, text) = (error.name().to_string(), error.description().unwrap_or_default().to_owned());
                return Self::answered(&name, &text);
            }
            other => other,
        };
        match &error {
            zbus::Error::MethodError(name, text, _) => Self::answered(name.as_str(), text.as_deref().unwrap_or_default()),
            other => Trouble::Other(format!("D-Bus: {}", printable(&other.to_string(), 200))),
        }
    }
}

impl Trouble {
    fn answered(name: &str, text: &str) -> Self {
        let text = printable(text, 200);
        match name {
            "org.freedesktop.DBus.Error.AccessDenied" | "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired" => Trouble::NotAllowed(text),
            _ => Trouble::Refused { name: printable(name, 100), text: if text.is_empty() { printable(name, 100) } else { text } },
        }
    }
}

fn no_bus(bus: &str, error: &std::io::Error) -> String {
    use std::io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
    let advice = match error.kind() {
        NotFound => "the package dbus must be installed and dbus.socket active",
        ConnectionRefused => "systemctl restart dbus.socket",
        PermissionDenied => "the worker's unit must let it connect there",
        _ => "systemctl status dbus",
    };
    format!("the system bus {bus} can't be used ({error}): {advice}")
}

/// How a unit stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Unit {
    pub name: String,
    /// `loaded`, `not-found`, `masked`, ...
    pub load: String,
    /// `active`, `inactive`, `failed`, `activating`, ...
    pub active: String,
    pub sub: String,
    /// `enabled`, `disabled`, `static`, ...; empty where there is no file.
    pub enabled: String,
    /// When it last became active, milliseconds since 1970; 0: never.
    pub active_since_ms: u64,
    /// Of a service: how often systemd restarted it by itself.
    pub restarts: u32,
    /// Its file changed since systemd read it.
    pub needs_reload: bool,
    /// What it says of itself (`STATUS=`).
    pub status: String,
}

/// What the doctor asks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Units {
    /// systemd's own, in words: `257.9-1~deb13u1`.
    pub version: String,
    pub supervisor: Unit,
    pub worker: Unit,
    pub socket: Unit,
    /// The VMs' scopes that are active.
    pub scopes: Vec<String>,
}

/// The way to systemd.
#[derive(Debug, Clone)]
pub struct Systemd {
    bus: String,
}

impl Default for Systemd {
    fn default() -> Self {
        Self { bus: BUS.into() }
    }
}

impl Systemd {
    /// Behind a bus elsewhere.
    pub fn behind(bus: impl Into<String>) -> Self {
        Self { bus: bus.into() }
    }

    async fn connect(&self) -> Result<Connection, Trouble> {
        // Ours, and not zbus's: its error has lost what kind it was of.
        let stream = UnixStream::connect(&self.bus).await.and_then(UnixStream::into_std).map_err(|error| Trouble::NoBus(no_bus(&self.bus, &error)))?;
        Ok(connection::Builder::unix_stream(stream).build().await?)
    }

    /// Restarts the supervisor's unit, and returns when systemd says that it is up.
    pub async fn restart_supervisor(&self) -> Result<(), String> {
        self.restart().await.map_err(|trouble| match trouble {
            Trouble::NotAllowed(said) => not_allowed(&said),
            other => format!("systemd: {other}"),
        })
    }

    async fn restart(&self) -> Result<(), Trouble> {
        let connection = self.connect().await?;
        let manager = manager(&connection).await?;
        // Before there is a job: one that ends at once would not be seen.
        let mut removed = pin!(manager.receive_job_removed().await?);
        let job = manager.restart_unit(SUPERVISOR, "replace").await?;
        while let Some(signal) = poll_fn(|context| removed.as_mut().poll_next(context)).await {
            let signal = signal.args().map_err(Trouble::from)?;
            if *signal.job() != *job {
                continue;
            }
            return match *signal.result() {
                "done" => Ok(()),
                result => Err(Trouble::Other(format!("the restart of {SUPERVISOR} ended as {}{}", printable(result, 32), last_exit(&connection).await))),
            };
        }
        Err(Trouble::Other("the bus went away before the restart had ended".into()))
    }

    /// Whether systemd is about to stop everything (`SystemState`, org.freedesktop.systemd1(5)). Asked until it answers: while everything is stopped, a call may well fail
    /// once. Where there is no bus there is no systemd to ask.
    pub async fn host_goes_down(&self) -> bool {
        loop {
            let asked = async { manager(&self.connect().await?).await?.system_state().await.map_err(Trouble::from) };
            match asked.await {
                Ok(state) => return state == "stopping",
                Err(Trouble::NoBus(_)) => return false,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Tries what the worker's user may do, without effect. What is not known `within` the time is told as not known.
    pub async fn rights(&self, within: Duration) -> Vec<RightView> {
        let until = Instant::now() + within;
        let late = |_| Trouble::Other(format!("no answer within {} s", within.as_secs()));
        let connected = async { manager(&self.connect().await?).await.map_err(Trouble::from) };
        let manager = timeout_at(until, connected).await.unwrap_or_else(|elapsed| Err(late(elapsed)));
        let mut tried = Vec::new();
        for attempt in ATTEMPTS {
            let called = match &manager {
                Ok(manager) => timeout_at(until, attempt.call(manager)).await.unwrap_or_else(|elapsed| Err(late(elapsed))),
                Err(trouble) => Err(trouble.clone()),
            };
            tried.push(RightView { what: format!("{} of {}", attempt.verb.word(), attempt.unit), need: attempt.need, verdict: attempt.verdict(called) });
        }
        tried
    }

    /// How the units stand. Everybody may ask that.
    pub async fn units(&self) -> Result<Units, Trouble> {
        let connection = self.connect().await?;
        let manager = manager(&connection).await?;
        let scopes = manager.list_units_by_patterns(&["active", "activating", "deactivating"], &["diarch-vm-*.scope"]).await?;
        Ok(Units {
            version: manager.version().await?,
            supervisor: unit(&connection, &manager, SUPERVISOR).await?,
            worker: unit(&connection, &manager, WORKER).await?,
            socket: unit(&connection, &manager, SOCKET).await?,
            scopes: scopes.into_iter().map(|unit| printable(&unit.0, 100)).collect(),
        })
    }
}

/// Without a cache: it would be filled, and followed by signals, for a connection that lives for one question.
async fn manager(connection: &Connection) -> zbus::Result<ManagerProxy<'static>> {
    ManagerProxy::builder(connection).cache_properties(CacheProperties::No).build().await
}

async fn properties(connection: &Connection, path: &OwnedObjectPath, interface: &'static str) -> zbus::Result<HashMap<String, OwnedVariant>> {
    let proxy = PropertiesProxy::builder(connection).destination("org.freedesktop.systemd1").path(path.clone());
    let proxy = proxy.cache_properties(CacheProperties::No).build().await?;
    Ok(proxy.get_all(InterfaceName::from_static_str(interface)?).await?)
}

async fn unit(connection: &Connection, manager: &ManagerProxy<'_>, name: &str) -> zbus::Result<Unit> {
    let path = manager.load_unit(name).await?;
    let of_unit = properties(connection, &path, "org.freedesktop.systemd1.Unit").await?;
    let of_service = match name.ends_with(".service") {
        true => properties(connection, &path, "org.freedesktop.systemd1.Service").await?,
        false => HashMap::new(),
    };
    Ok(Unit {
        name: name.to_owned(),
        load: text(&of_unit, "LoadState"),
        active: text(&of_unit, "ActiveState"),
        sub: text(&of_unit, "SubState"),
        enabled: text(&of_unit, "UnitFileState"),
        active_since_ms: value(&of_unit, "ActiveEnterTimestamp").map_or(0, |at: u64| at / 1000),
        restarts: value(&of_service, "NRestarts").unwrap_or_default(),
        needs_reload: value(&of_unit, "NeedDaemonReload").unwrap_or_default(),
        status: text(&of_service, "StatusText"),
    })
}

fn value<'a, T: TryFrom<&'a OwnedVariant>>(of: &'a HashMap<String, OwnedVariant>, name: &str) -> Option<T> {
    of.get(name).and_then(|value| T::try_from(value).ok())
}

fn text(of: &HashMap<String, OwnedVariant>, name: &str) -> String {
    value::<&str>(of, name).map_or_else(String::new, |text| printable(text, 200))
}

/// How the supervisor's last process ended, where systemd knows it.
async fn last_exit(connection: &Connection) -> String {
    let known = async {
        let path = manager(connection).await?.load_unit(SUPERVISOR).await?;
        properties(connection, &path, "org.freedesktop.systemd1.Service").await
    };
    let Ok(known) = known.await else { return String::new() };
    let status = value(&known, "ExecMainStatus").unwrap_or(0i32);
    let why = match status {
        // As sysexits.h has it: EX_CONFIG.
        78 => ": its grants are refused",
        _ => "",
    };
    format!(" ({}, status {status}{why})", text(&known, "Result"))
}

fn not_allowed(said: &str) -> String {
    let uid = rustix::process::geteuid();
    let who = match nix::unistd::User::from_uid(uid.as_raw().into()) {
        Ok(Some(user)) => user.name,
        _ => format!("uid {}", uid.as_raw()),
    };
    format!(
        "polkit does not let {} restart {SUPERVISOR} ({said}): the rule {POLKIT_RULE} must be there, and the package polkitd installed",
        printable(&who, 64)
    )
}

// ---- what is tried ----

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Restart,
    Stop,
    Start,
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Verb::Restart => "restart",
            Verb::Stop => "stop",
            Verb::Start => "start",
        }
    }
}

/// A call that asks polkit first, and is refused afterwards whatever polkit says, for a job mode that its verb does not have
/// (`bus_unit_method_start_generic` and `manager_add_job` in systemd; read in several versions, tried with 257).
#[derive(Debug, Clone, Copy)]
struct Attempt {
    verb: Verb,
    unit: &'static str,
    need: Need,
}

const ATTEMPTS: [Attempt; 5] = [
    Attempt { verb: Verb::Restart, unit: SUPERVISOR, need: Need::Needed },
    // What a rule that is too wide would allow: another verb, ...
    Attempt { verb: Verb::Stop, unit: SUPERVISOR, need: Need::Excess },
    Attempt { verb: Verb::Start, unit: SUPERVISOR, need: Need::Excess },
    // ... a pattern of names, ...
    Attempt { verb: Verb::Restart, unit: WORKER, need: Need::Excess },
    // ... every unit.
    Attempt { verb: Verb::Restart, unit: "systemd-journald.service", need: Need::Excess },
];

impl Attempt {
    /// A start must not be tried with `isolate`, which is a start's own mode: it would stop the host. An old systemd has no `triggering`, and refuses it
    /// without asking polkit.
    fn mode(self) -> &'static str {
        match self.verb {
            Verb::Restart | Verb::Stop => "isolate",
            Verb::Start => "triggering",
        }
    }

    async fn call(self, manager: &ManagerProxy<'_>) -> Result<(), Trouble> {
        let called = match self.verb {
            Verb::Restart => manager.restart_unit(self.unit, self.mode()).await,
            Verb::Stop => manager.stop_unit(self.unit, self.mode()).await,
            Verb::Start => manager.start_unit(self.unit, self.mode()).await,
        };
        called.map(drop).map_err(Trouble::from)
    }

    fn verdict(self, called: Result<(), Trouble>) -> RightVerdict {
        match called {
            // It has happened, then: no systemd does that.
            Ok(()) => RightVerdict::Allowed,
            Err(Trouble::Refused { text, .. }) if text.contains("is only valid for") => RightVerdict::Allowed,
            Err(Trouble::NotAllowed(reason)) => RightVerdict::Refused { reason },
            Err(other) => RightVerdict::Unknown { reason: other.to_string() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;
    use tokio::time::timeout;

    const SHORT: Duration = Duration::from_millis(200);

    fn bus(dir: &tempfile::TempDir) -> (Systemd, UnixListener) {
        let path = dir.path().join("bus");
        (Systemd::behind(path.to_str().unwrap()), UnixListener::bind(path).unwrap())
    }

    #[tokio::test]
    async fn without_a_bus_the_package_is_named() {
        let error = Systemd::behind("/nonexistent/bus").restart_supervisor().await.unwrap_err();
        assert!(error.contains("package dbus") && !error.contains('\n'), "{error}");
        let rights = Systemd::behind("/nonexistent/bus").rights(SHORT).await;
        assert!(rights.iter().all(|right| matches!(right.verdict, RightVerdict::Unknown { .. })), "{rights:?}");
    }

    #[tokio::test]
    async fn a_dropped_question_takes_its_connection_along() {
        let dir = tempfile::tempdir().unwrap();
        let (systemd, listener) = bus(&dir);
        // A bus that accepts and says nothing.
        timeout(SHORT, systemd.restart_supervisor()).await.unwrap_err();
        let (mut connection, _) = listener.accept().await.unwrap();
        let mut said = Vec::new();
        timeout(SHORT, connection.read_to_end(&mut said)).await.expect("the other end is closed").unwrap();
        assert!(said.starts_with(b"\0AUTH EXTERNAL"), "{said:?}");
    }

    #[tokio::test]
    async fn a_bus_that_falls_silent_after_the_greeting_keeps_no_task_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        let (systemd, listener) = bus(&dir);
        let asking = tokio::spawn(async move { timeout(SHORT, systemd.restart_supervisor()).await });
        let (mut connection, _) = listener.accept().await.unwrap();
        let before = tokio::runtime::Handle::current().metrics().num_alive_tasks();
        for answer in ["OK 0123456789abcdef0123456789abcdef\r\n", "AGREE_UNIX_FD\r\n"] {
            connection.write_all(answer.as_bytes()).await.unwrap();
        }
        asking.await.unwrap().unwrap_err();
        let mut said = Vec::new();
        timeout(SHORT, connection.read_to_end(&mut said)).await.expect("the other end is closed").unwrap();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(said.contains("BEGIN") && said.contains("Hello"), "{said:?}");
        assert!(tokio::runtime::Handle::current().metrics().num_alive_tasks() < before, "the connection's reader lives on");
    }

    #[test]
    fn a_refusal_of_polkits_names_the_rule_and_the_package() {
        for name in ["org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"] {
            let Trouble::NotAllowed(said) = Trouble::answered(name, "Interactive\nauthentication") else { panic!("{name}") };
            let sentence = not_allowed(&said);
            assert!(sentence.contains(POLKIT_RULE) && sentence.contains("polkitd") && !sentence.contains('\n'), "{sentence}");
        }
    }

    #[test]
    fn only_systemds_own_refusal_of_the_mode_says_that_polkit_allowed_it() {
        let [restart, ..] = ATTEMPTS;
        let refused = |name: &str, text: &str| restart.verdict(Err(Trouble::answered(name, text)));
        assert_eq!(refused("org.freedesktop.DBus.Error.InvalidArgs", "Isolate is only valid for start."), RightVerdict::Allowed);
        for (name, text) in [
            ("org.freedesktop.DBus.Error.AccessDenied", "Permission denied"),
            ("org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", "Interactive authentication required."),
        ] {
            assert!(matches!(refused(name, text), RightVerdict::Refused { .. }));
        }
        // No polkit, an older systemd, no such unit: nothing was learnt.
        for (name, text) in [
            ("org.freedesktop.systemd1.UnitMasked", "Unit polkit.service is masked."),
            ("org.freedesktop.DBus.Error.InvalidArgs", "Job mode triggering invalid"),
            ("org.freedesktop.DBus.Error.NoReply", ""),
        ] {
            assert!(matches!(refused(name, text), RightVerdict::Unknown { .. }));
        }
    }

    #[test]
    fn nothing_that_is_tried_could_happen() {
        for attempt in ATTEMPTS {
            let own = match attempt.verb {
                Verb::Start => ["replace", "fail", "isolate"].as_slice(),
                Verb::Stop => &["replace", "fail", "triggering"],
                Verb::Restart => &["replace", "fail"],
            };
            assert!(!own.contains(&attempt.mode()), "{attempt:?}");
        }
    }
}
