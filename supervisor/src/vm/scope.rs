//! A VM's place among the service manager's units: `diarch-vm-SLOT.scope` in `diarch-vms.slice`.
//!
//! In a unit of its own a QEMU is nobody's to stop by accident (`systemctl stop` of either half, an upgrade, `daemon-reexec`), has limits that the
//! kernel keeps, and is seen by name. It is moved there while it still waits at its gate (`jail`), so that it never runs anywhere else.
//!
//! Root calls two D-Bus methods (org.freedesktop.systemd1(5)): `StartTransientUnit`, for a name, a slice and properties that are ours (of the worker's request they
//! hold the label and three numbers), and `StopUnit`, for a scope of that name in which no process is or that was not made in time. That the process was moved is not taken from
//! systemd's word: `/proc/PID/cgroup` says it.

use super::jail::Gated;
use diarch_ipc::Error;
use diarch_ipc::frame::printable;
use diarch_ipc::name::{Label, Slot};
use diarch_ipc::peer::unit_in;
use diarch_ipc::spec::{Accelerator, VmSpec};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use zbus::{Connection, Fd, OwnedObjectPath, Variant, proxy};

/// The unit in which this program makes scopes. In any other (a test, a developer's terminal) QEMU stays in the caller's.
const OUR_UNIT: &str = "diarch-supervisor.service";
const SLICE: &str = "diarch-vms.slice";
/// For the bus, for systemd's job, and for the last VM's scope to be gone: all are matters of milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(1);
/// After so many tries an old scope in which nobody is will not go by itself any more. (systemd learns of a scope's end when its last process leaves it. Of a
/// process that ended at the moment it was moved in, as a waiting child does when we are killed, it may never learn.)
const STUCK: u32 = 50;
/// More of them, and it is not the slot's last QEMU that is in the way.
const TRIES: u32 = 1_000;
/// The first systemd that takes pidfds (`PIDFDs=`); an older one gets the number, which is as safe for a child that is not reaped.
const TAKES_PIDFDS: u32 = 255;

/// What the kernel lets a VM have beside the guest's memory.
///
/// * QEMU itself: its heap, device models, stacks, user-mode network, the disks' requests under way.
/// * page tables, QEMU's and the nested ones: 16 bytes for each 4 KiB, doubled: 1/128, and as much for what is rounded up.
/// * the translator's buffer for TCG: 1 GiB (QEMU's `tb-size`).
/// * each program beside it (`companion`).
///
/// The page cache of its disks counts as well, but gives way.
const OF_QEMU: u64 = 256 << 20;
const OF_EACH_CPU: u64 = 16 << 20;
const OF_TRANSLATOR: u64 = 1 << 30;
/// passt's buffers are static and take some 30 MiB; virtiofsd's are less, and its table of open files grows with the guest's.
const OF_EACH_COMPANION: u64 = 64 << 20;

/// A scope that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    name: String,
    description: String,
    memory_max: u64,
    tasks_max: u64,
    kvm: bool,
    /// Device nodes that it may open.
    nodes: Vec<String>,
}

impl Scope {
    pub fn of(slot: Slot, label: &Label, spec: &VmSpec, tasks_max: u64, companions: usize) -> Self {
        let guest = u64::from(spec.memory.get()) << 20;
        let translator = if spec.accelerator == Accelerator::Tcg { OF_TRANSLATOR } else { 0 };
        Self {
            name: format!("diarch-vm-{slot}.scope"),
            // In quotes: needrestart takes the first word of a unit's description that ends in ".service" for a service to restart, and the label is
            // the worker's.
            description: format!("Diarch VM \"{label}\" (slot {slot})"),
            memory_max: guest + guest / 64 + OF_QEMU + OF_EACH_CPU * u64::from(spec.cpus.get()) + translator + OF_EACH_COMPANION * companions as u64,
            tasks_max,
            kvm: spec.accelerator == Accelerator::Kvm,
            nodes: Vec::new(),
        }
    }

    /// With these device nodes, and no others of their kind.
    pub fn with_nodes(self, nodes: Vec<String>) -> Self {
        Self { nodes, ..self }
    }
}

#[proxy(interface = "org.freedesktop.systemd1.Manager", default_service = "org.freedesktop.systemd1", default_path = "/org/freedesktop/systemd1")]
trait Manager {
    #[zbus(property)]
    fn version(&self) -> zbus::Result<String>;
    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[(&str, Variant<'_>)],
        others: &[(&str, &[(&str, Variant<'_>)])],
    ) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
}

/// Whether this process makes scopes: it does exactly when systemd runs it as its own unit, by the kernel's word.
pub fn wanted() -> bool {
    std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| unit_in(&text)).as_deref() == Some(OUR_UNIT)
}

/// Moves children that wait at their gates into their scope.
pub async fn enclose(scope: &Scope, children: &[&Gated]) -> Result<(), Error> {
    let failed = |detail: String| Error::Failed { step: format!("make {}", scope.name), errno: None, detail };
    match tokio::time::timeout(PATIENCE, start(scope, children)).await {
        Ok(Ok(())) => {}
        // Not the VM's fault: whoever asked tries again when there is a bus.
        Ok(Err(Refused::NoBus(missing))) => return Err(Error::Unsupported { missing }),
        Ok(Err(Refused::Said(detail))) => return Err(failed(detail)),
        Err(_) => return Err(Error::Unsupported { missing: format!("an answer of systemd on the system bus within {} s", PATIENCE.as_secs()) }),
    }
    let until = Instant::now() + PATIENCE;
    loop {
        let mut outside = 0;
        for child in children {
            let text = std::fs::read_to_string(format!("/proc/{}/cgroup", child.pid)).map_err(|error| Error::io("read /proc", &error))?;
            outside += u32::from(unit_in(&text).as_deref() != Some(&scope.name));
        }
        if outside == 0 {
            return Ok(());
        }
        if Instant::now() >= until {
            // The job must not run later, on a child that is gone and a number that is another's.
            let _ = tokio::time::timeout(Duration::from_secs(1), withdraw(scope)).await;
            return Err(failed(format!(
                "systemd took the job and did not move QEMU within {} s: is a stop of diarch-worker.service under way (systemctl list-jobs), which it waits for? journalctl -u {} may say more",
                PATIENCE.as_secs(),
                scope.name
            )));
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Why there is no scope.
enum Refused {
    NoBus(String),
    Said(String),
}

/// A connection for each: an idle supervisor holds none, hears nothing, and does not mind when the bus is restarted.
async fn start(scope: &Scope, children: &[&Gated]) -> Result<(), Refused> {
    let no_bus = |error: zbus::Error| Refused::NoBus(format!("the system bus, for {} ({}); is dbus running?", scope.name, printable(&error.to_string(), 200)));
    let bus = Connection::system().await.map_err(no_bus)?;
    let manager = ManagerProxy::builder(&bus).cache_properties(zbus::proxy::CacheProperties::No).build().await.map_err(no_bus)?;
    let version = manager.version().await.map_err(|error| said(&error))?;
    let pidfds = major(&version) >= TAKES_PIDFDS;
    for tried in 0..TRIES {
        let members = if pidfds {
            ("PIDFDs", Variant::from(children.iter().map(|child| Fd::from(child.pidfd.as_fd())).collect::<Vec<_>>()))
        } else {
            ("PIDs", Variant::from(children.iter().map(|child| child.pid).collect::<Vec<_>>()))
        };
        let mut properties = vec![
            ("Description", scope.description.as_str().into()),
            ("Slice", SLICE.into()),
            members,
            // Stopped in the reverse order: when the host shuts down, the worker brings its guests down before systemd ends what is left of them.
            ("Before", vec!["diarch-worker.service"].into()),
            // A scope whose last process was killed is "failed": it must not stay, since the next VM of this slot needs its name.
            ("CollectMode", "inactive-or-failed".into()),
            ("MemoryMax", scope.memory_max.into()),
            // The guest's memory is never written to a disk of the host.
            ("MemorySwapMax", 0u64.into()),
            ("TasksMax", scope.tasks_max.into()),
            // /dev/null and its like; what else a VM is given comes as an open descriptor.
            ("DevicePolicy", "closed".into()),
        ];
        let nodes: Vec<(&str, &str)> =
            scope.kvm.then_some("/dev/kvm").into_iter().chain(scope.nodes.iter().map(String::as_str)).map(|node| (node, "rw")).collect();
        if !nodes.is_empty() {
            properties.push(("DeviceAllow", nodes.into()));
        }
        match manager.start_transient_unit(&scope.name, "fail", &properties, &[]).await {
            Ok(_job) => return Ok(()),
            // The slot's last QEMU has ended and systemd has not noticed yet.
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == "org.freedesktop.systemd1.UnitExists" => {
                if tried % STUCK == STUCK - 1 && deserted(&scope.name) {
                    tracing::info!(scope = scope.name, "nobody is left in the old scope: stopping it");
                    manager.stop_unit(&scope.name, "replace").await.map_err(|error| said(&error))?;
                }
                tokio::time::sleep(AGAIN).await;
            }
            Err(error) => return Err(said(&error)),
        }
    }
    Err(Refused::Said(format!("there is one already, with a process in it that the ledger does not know: see systemctl status {}", scope.name)))
}

/// Cancels the job of a scope that was not made in time, or stops the scope if it was made this very moment.
async fn withdraw(scope: &Scope) -> zbus::Result<()> {
    let bus = Connection::system().await?;
    let manager = ManagerProxy::builder(&bus).cache_properties(zbus::proxy::CacheProperties::No).build().await?;
    manager.stop_unit(&scope.name, "replace").await.map(drop)
}

/// Whether the kernel knows no process in a scope of our slice. Nobody but we can have one moved there, and we hold the slot's lock.
fn deserted(name: &str) -> bool {
    match std::fs::read_to_string(format!("/sys/fs/cgroup/diarch.slice/{SLICE}/{name}/cgroup.events")) {
        Ok(events) => events.lines().any(|line| line == "populated 0"),
        // Where there is no cgroup v2 at that place, this says nothing.
        Err(error) => error.kind() == std::io::ErrorKind::NotFound && std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
    }
}

fn said(error: &zbus::Error) -> Refused {
    Refused::Said(format!("systemd said: {}", printable(&error.to_string(), 300)))
}

/// `257.9-1~deb13u1` is 257, as is `v257`; what can't be read is old.
fn major(version: &str) -> u32 {
    let digits: String = version.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::operation::{Example, Spawn};

    fn scope(accelerator: Accelerator, mib: u64, cpus: u64) -> Scope {
        let mut spec = Spawn::example().spec;
        spec.accelerator = accelerator;
        spec.memory = diarch_ipc::name::MiB::new(mib).unwrap();
        spec.cpus = diarch_ipc::name::Cpus::new(cpus).unwrap();
        Scope::of(Slot::new(7).unwrap(), &Label::new("web").unwrap(), &spec, 161, 0)
    }

    #[test]
    fn a_scope_is_named_by_its_slot_and_described_by_its_label() {
        let scope = scope(Accelerator::Kvm, 16, 1);
        assert_eq!(scope.name, "diarch-vm-7.scope");
        assert_eq!(scope.description, "Diarch VM \"web\" (slot 7)");
        assert_eq!(scope.tasks_max, 161);
    }

    #[test]
    fn the_memory_limit_leaves_room_for_qemu_the_page_tables_and_the_translator() {
        let mib = |scope: Scope| scope.memory_max >> 20;
        assert_eq!(mib(scope(Accelerator::Kvm, 1024, 2)), 1024 + 16 + 256 + 32);
        assert_eq!(mib(scope(Accelerator::Tcg, 1024, 2)), 1024 + 16 + 256 + 32 + 1024);
    }

    #[test]
    fn systemds_version_is_its_first_number() {
        for (text, number) in [("257.9-1~deb13u1", 257), ("252.39-1~deb12u2", 252), ("v255", 255), ("255", 255), ("", 0), ("x", 0)] {
            assert_eq!(major(text), number, "{text}");
        }
    }
}
