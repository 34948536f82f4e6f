//! Something left behind on purpose, of each kind that the kernel's account knows: a run that does not find it proves nothing.

use super::plan::{FUNCTIONS, SHARES};
use crate::host::{Host, Session};
use crate::stage::Stage;
use crate::stand_in::Unit;
use diarch_ipc::name::{Bdf, Mac, ShareName, Tag};
use diarch_ipc::operation::{AttachMount, Bind, DeviceState, Request, Spawn};
use diarch_ipc::spec::{Backend, DiskAccess, Egress, Nic, Share};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// Of a VM's user.
    Process,
    Link,
    Address,
    Route,
    Policy,
    Filter,
    Mount,
    File,
    Socket,
    Port,
    /// A record that the supervisor does not know.
    Record,
    /// A running VM's record that is gone.
    Amnesia,
    /// A passt of which the ledger does not know any more.
    Passt,
    /// And a virtiofsd.
    Virtiofsd,
    /// A device that was quarantined, and nobody knows why.
    Quarantine,
}

pub const ALL: [Plant; 15] = [
    Plant::Process,
    Plant::Link,
    Plant::Address,
    Plant::Route,
    Plant::Policy,
    Plant::Filter,
    Plant::Mount,
    Plant::File,
    Plant::Socket,
    Plant::Port,
    Plant::Record,
    Plant::Amnesia,
    Plant::Passt,
    Plant::Virtiofsd,
    Plant::Quarantine,
];

impl std::fmt::Display for Plant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

impl std::str::FromStr for Plant {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        ALL.into_iter().find(|plant| plant.to_string() == text).ok_or_else(|| format!("there is no plant {text:?}"))
    }
}

impl Plant {
    pub fn put(self, host: &Host, stage: &Stage, user: u32) -> io::Result<()> {
        let ip = |words: &[&str]| command(Command::new("ip").args(words));
        match self {
            Plant::Process => {
                let child = Command::new("sleep").arg("1000").uid(user).gid(user).stdin(Stdio::null()).spawn()?;
                // It ends with the namespace; nobody waits for it.
                std::mem::forget(child);
                Ok(())
            }
            Plant::Link => ip(&["link", "add", "stray0", "type", "bridge"]),
            Plant::Address => ip(&["address", "add", "127.7.7.7/32", "dev", "lo"]),
            Plant::Route => ip(&["route", "add", "10.99.0.0/16", "dev", "lo"]),
            Plant::Policy => ip(&["rule", "add", "from", "10.99.0.1", "table", "99"]),
            Plant::Filter => command(Command::new("nft").args(["add", "table", "inet", "stray"])),
            Plant::Mount => {
                let pid = host.manager().unit(Unit::Supervisor).pid.unwrap_or_default().to_string();
                command(Command::new("nsenter").args(["-t", &pid, "-m", "mount", "-t", "tmpfs", "stray", "/mnt"]))
            }
            Plant::File => std::fs::write(host.inside("run/vm/.3.gone"), ""),
            Plant::Socket => {
                let listener = std::os::unix::net::UnixListener::bind(host.path("run/vm").join("stray.sock"))?;
                std::mem::forget(listener);
                Ok(())
            }
            Plant::Port => {
                std::mem::forget(std::net::TcpListener::bind("127.0.0.1:0")?);
                Ok(())
            }
            Plant::Record => {
                let slot = host.inside("run/vm/77");
                std::fs::create_dir(&slot)?;
                std::fs::write(slot.join("record.json"), "{\"slot\": 77, \"state\": \"claimed\"}")
            }
            Plant::Amnesia => {
                let session = empty(host);
                let tenancy = session.claim("forgotten").tenancy;
                session.spawn(host, tenancy, "");
                remove(&host.inside("run/vm").join(tenancy.slot.to_string()))
            }
            Plant::Passt | Plant::Virtiofsd => {
                let session = empty(host);
                let tenancy = session.claim("beside").tenancy;
                let (mut spec, fds) = host.spec("");
                if self == Plant::Passt {
                    let mac = Mac::new("52:54:00:00:00:77").map_err(io::Error::other)?;
                    spec.nics.push(Nic { mac, backend: Backend::User { egress: Egress::Closed, forwards: Vec::new() } });
                } else {
                    let share = ShareName::new(SHARES[0]).map_err(io::Error::other)?;
                    let attach = AttachMount { tenancy, share: share.clone(), access: DiskAccess::ReadOnly };
                    session.ask(Request::MountAttach(attach), Vec::new()).map_err(io::Error::other)?;
                    spec.shares.push(Share { share, tag: Tag::new("tag").map_err(io::Error::other)? });
                }
                session.ask(Request::VmSpawn(Spawn { tenancy, spec }), fds).map_err(io::Error::other)?;
                let path = host.inside("run/vm").join(tenancy.slot.to_string()).join("record.json");
                let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
                let forgotten = record["run"]["companions"].take();
                if forgotten.as_array().is_none_or(|all| all.len() != 1) {
                    return Err(io::Error::other(format!("it runs with {forgotten}")));
                }
                record["run"]["companions"] = serde_json::json!([]);
                std::fs::write(&path, record.to_string())
            }
            Plant::Quarantine => {
                let session = empty(host);
                let tenancy = session.claim("quarantined").tenancy;
                let function = Bdf::new(FUNCTIONS[0]).map_err(io::Error::other)?;
                session.ask(Request::VfioBind(Bind { tenancy, function }), Vec::new()).map_err(io::Error::other)?;
                stage.die(FUNCTIONS[0]);
                // The next supervisor looks whether it answers.
                host.manager().kill_and_wait(Unit::Supervisor);
                let until = Instant::now() + Duration::from_secs(5);
                while !session.inventory().devices.iter().any(|device| device.state == DeviceState::Quarantined) {
                    if Instant::now() > until {
                        return Err(io::Error::other("it was not quarantined"));
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                stage.revive(FUNCTIONS[0], (0x10de, 0x2330));
                Ok(())
            }
        }
    }
}

/// A worker that has every slot free.
fn empty(host: &Host) -> Session {
    let session = host.session();
    session.inventory().vms.iter().for_each(|vm| {
        session.release(vm.tenancy());
    });
    session
}

fn remove(directory: &Path) -> io::Result<()> {
    std::fs::remove_dir_all(directory)
}

fn command(command: &mut Command) -> io::Result<()> {
    let status = command.stdin(Stdio::null()).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{command:?}: {status}"))) }
}
