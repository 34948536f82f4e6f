//! What the worker keeps in files, so that its next life knows it. Nothing here is true by itself: the supervisor's inventory is.
//!
//! ```text
//!   state_directory/holds.json        which VMs are not to be started by themselves, and why
//!   state_directory/vms/NAME.json     what VM NAME was started as (compared with its file after a restart of the worker)
//! ```
//!
//! Each file is written beside its place and renamed over it, so that a reader sees the old or the new one, and never a part.

use crate::vmfile::Machine;
use diarch_ipc::name::{Label, Slot};
use diarch_ipc::operation::TapOpened;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The VMs that stay stopped.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holds {
    vms: BTreeMap<String, Hold>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    pub why: HoldWhy,
    /// One sentence for people.
    pub reason: String,
    /// Of the VM file at that time: a changed file ends the hold.
    pub revision: String,
    /// The host's boot at that time, without dashes.
    pub boot_id: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HoldWhy {
    /// An operator said stop or kill: it holds over a reboot of the host.
    Operator,
    /// It ended by its own will, or its policy is never to restart it: a reboot of the host starts it again.
    PoweredOff,
}

impl Holds {
    /// The hold on a VM whose file has this revision.
    pub fn of(&self, name: &Label, revision: &str) -> Option<&Hold> {
        self.vms.get(name.as_str()).filter(|hold| hold.revision == revision)
    }

    pub fn hold(&mut self, name: &Label, why: HoldWhy, reason: String, revision: String) {
        self.vms.insert(name.to_string(), Hold { why, reason, revision, boot_id: boot_id() });
    }

    /// Whose they are.
    pub fn names(&self) -> Vec<Label> {
        self.vms.keys().filter_map(|name| Label::new(name).ok()).collect()
    }

    /// Whether there was one.
    pub fn release(&mut self, name: &Label) -> bool {
        self.vms.remove(name.as_str()).is_some()
    }

    /// Forgets the holds that a reboot or a changed file has ended. True: something was forgotten.
    pub fn prune(&mut self, revision_of: impl Fn(&str) -> Option<String>) -> bool {
        let boot = boot_id();
        let before = self.vms.len();
        // A file that is away for a moment (replaced, or bad) does not end its hold.
        self.vms.retain(|name, hold| (hold.why == HoldWhy::Operator || hold.boot_id == boot) && revision_of(name).is_none_or(|now| now == hold.revision));
        self.vms.len() != before
    }
}

/// What a VM was started as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Started {
    pub slot: Slot,
    /// When its QEMU was spawned, as the supervisor has it: tells this start from every other in the slot.
    pub spawned_ms: u64,
    /// The VM file's name.
    pub file: String,
    pub machine: Machine,
    #[serde(default)]
    pub tap: Option<TapOpened>,
}

/// The directory of these files.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// Makes the directory where it is missing.
    pub fn open(directory: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o750).create(directory.join("vms"))?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// The holds; none where the file is missing or can't be used (which is logged: operators' stops are lost then).
    pub fn holds(&self) -> Holds {
        read(&self.directory.join("holds.json")).unwrap_or_default()
    }

    /// Written through to the disk: an operator's stop must hold after a power failure.
    pub fn save_holds(&self, holds: &Holds) -> io::Result<()> {
        write(&self.directory.join("holds.json"), holds, Durability::Disk)
    }

    pub fn started(&self, name: &Label) -> Option<Started> {
        read(&self.of(name))
    }

    /// Not written through: after a power failure no VM runs that it could speak of.
    pub fn save_started(&self, name: &Label, started: &Started) -> io::Result<()> {
        write(&self.of(name), started, Durability::Cache)
    }

    pub fn forget_started(&self, name: &Label) {
        if let Err(error) = std::fs::remove_file(self.of(name))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(vm = %name, %error, "a record can't be removed");
        }
    }

    /// A label is plain ASCII without '/', so it is a file name.
    fn of(&self, name: &Label) -> PathBuf {
        self.directory.join("vms").join(format!("{name}.json"))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Durability {
    Disk,
    Cache,
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "a state file can't be read, and counts as missing");
            return None;
        }
    };
    crate::json::parse(&bytes)
        .inspect_err(
            |error| tracing::warn!(file = %path.display(), path = %error.path, reason = %error.reason, "a state file can't be used, and counts as missing"),
        )
        .ok()
}

fn write(path: &Path, value: &impl Serialize, durability: Durability) -> io::Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&beside)?;
    file.write_all(&bytes)?;
    if durability == Durability::Disk {
        file.sync_all()?;
    }
    std::fs::rename(&beside, path)?;
    if durability == Durability::Disk
        && let Some(parent) = path.parent()
    {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Names this boot of the host, in a unit that hides `/proc/sys` (`ProcSubset=pid`) too: there systemd writes it in place of `%b`.
const BOOT_ID_VARIABLE: &str = "DIARCH_BOOT_ID";

/// Empty where nobody says: then no boot differs from another.
fn boot_id() -> String {
    static KNOWN: OnceLock<String> = OnceLock::new();
    KNOWN
        .get_or_init(|| {
            let id = plain(&diarch_ipc::frame::Hello::ours().boot_id);
            let id = if id.is_empty() { plain(&std::env::var(BOOT_ID_VARIABLE).unwrap_or_default()) } else { id };
            if id.is_empty() {
                tracing::warn!(
                    "this boot can't be told from others: VMs that powered themselves off stay off over a reboot of the host; the unit should have \
                                Environment={BOOT_ID_VARIABLE}=%b or ProcSubset=all"
                );
            }
            id
        })
        .clone()
}

/// The kernel writes it with dashes, and systemd without.
fn plain(id: &str) -> String {
    id.chars().filter(char::is_ascii_hexdigit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmfile::tests::desired;

    #[test]
    fn a_hold_survives_the_worker() {
        let dir = tempfile::tempdir().unwrap();
        let vm = desired("a");
        let store = Store::open(dir.path()).unwrap();
        let mut holds = store.holds();
        holds.hold(&vm.name, HoldWhy::Operator, "stopped by uid 7".into(), vm.revision.clone());
        store.save_holds(&holds).unwrap();
        let again = Store::open(dir.path()).unwrap().holds();
        assert_eq!(again, holds);
        assert_eq!(again.of(&vm.name, &vm.revision).unwrap().reason, "stopped by uid 7");
        assert!(again.of(&vm.name, "changed").is_none());
    }

    #[test]
    fn a_reboot_ends_the_hold_of_a_power_off_and_not_that_of_an_operator() {
        let (a, b) = (desired("a"), desired("b"));
        let mut holds = Holds::default();
        holds.hold(&a.name, HoldWhy::Operator, String::new(), a.revision.clone());
        holds.hold(&b.name, HoldWhy::PoweredOff, String::new(), b.revision.clone());
        assert!(!holds.prune(|_| None));
        for hold in holds.vms.values_mut() {
            hold.boot_id = "another boot".into();
        }
        assert!(holds.prune(|_| None));
        assert!(holds.of(&a.name, &a.revision).is_some() && holds.of(&b.name, &b.revision).is_none());
        assert!(holds.prune(|_| Some("changed".into())));
    }

    #[test]
    fn a_cut_file_counts_as_missing() {
        let dir = tempfile::tempdir().unwrap();
        let vm = desired("a");
        let store = Store::open(dir.path()).unwrap();
        let started = Started { slot: Slot::new(1).unwrap(), spawned_ms: 5, file: vm.file, machine: vm.machine, tap: None };
        store.save_started(&vm.name, &started).unwrap();
        assert_eq!(store.started(&vm.name), Some(started));
        std::fs::write(dir.path().join("vms/a.json"), "{\"slot\":").unwrap();
        assert_eq!(store.started(&vm.name), None);
        store.forget_started(&vm.name);
        assert!(!dir.path().join("vms/a.json").exists());
    }
}
