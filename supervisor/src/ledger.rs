//! The ledger: what this supervisor made, written down before it exists.
//!
//! ```text
//!   /run/diarch/vm/            root only, 0700
//!     3/                       slot 3
//!       record.json            who claimed it, its state, QEMU's pid and start time
//!       qmp.sock console.sock  QEMU's listening sockets
//!     .3.new  .3.gone          a slot on its way in or out; swept at start
//! ```
//!
//! A record is replaced by rename, so that a reader finds the old one or the new one. The directory is on a tmpfs: the ledger survives the
//! supervisor's death, not the host's, and nothing it speaks of does either.

use diarch_ipc::name::{Cpus, Forward, IpText, Label, Mac, MiB, NetworkName, NicIndex, Queues, RequestId, ShareName, Slot};
use diarch_ipc::operation::{ExitStatus, SlotState};
use diarch_ipc::spec::{Accelerator, DiskAccess, Egress};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What is written down of one slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub slot: Slot,
    pub label: Label,
    pub uid: u32,
    /// The request that claimed it: repeated, it gets the same answer.
    pub claim: RequestId,
    pub state: SlotState,
    pub run: Option<Run>,
    /// What else stands under the slot; its devices have records of their own (`vfio`), since they may outlive it.
    #[serde(default)]
    pub resources: Resources,
}

/// What was made for a slot, in the order in which it is undone from behind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    pub taps: Vec<Tap>,
    pub published: Vec<Publication>,
    pub mounts: Vec<Mounted>,
}

/// A tap that was opened. It goes with its last descriptor, so it may be gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tap {
    pub nic: NicIndex,
    pub network: NetworkName,
    pub mac: Mac,
    /// The guest's address, where it is known: no other may come from the tap.
    pub address: Option<IpText>,
    pub queues: Queues,
}

/// The published ports of one network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publication {
    pub nic: NicIndex,
    pub forwards: Vec<Forward>,
}

/// A mount that was attached: it was there before this was written, and goes with the last of its descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mounted {
    pub share: ShareName,
    pub access: DiskAccess,
    pub kind: MountKind,
}

/// What was mounted; the grants may say something else by now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountKind {
    Directory,
    /// Its content is nowhere else.
    Tmpfs,
    Image,
}

/// One QEMU process, from the intent to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The request that started it: repeated, it gets the same answer.
    pub spawn: RequestId,
    /// SHA-256 of that request, hex: another request under its id is a mistake, and gets told so.
    #[serde(default)]
    pub asked: String,
    pub process: Option<Process>,
    pub spawned_ms: u64,
    pub cpus: Cpus,
    pub memory: MiB,
    pub accelerator: Accelerator,
    pub forwards: Vec<Forward>,
    pub exit: Option<ExitStatus>,
    /// Set where user-mode networking is a process beside QEMU: what the packet filter lets the slot's user open.
    #[serde(default)]
    pub egress: Option<Egress>,
    /// The programs beside QEMU, each started before it.
    #[serde(default)]
    pub companions: Vec<Companion>,
}

/// A program that runs beside a QEMU, for it alone, under the same user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Companion {
    pub kind: CompanionKind,
    pub process: Process,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompanionKind {
    /// Carries a card of user-mode networking.
    Passt,
    /// Serves a share.
    Virtiofsd,
}

impl CompanionKind {
    pub fn as_str(self) -> &'static str {
        match self {
            CompanionKind::Passt => "passt",
            CompanionKind::Virtiofsd => "virtiofsd",
        }
    }
}

/// How a process of ours is found again by a restarted supervisor. Together with the user id, which nothing else on the host may have, these name one process
/// of one boot; from then on a pidfd does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`: clock ticks since boot.
    pub start_time: u64,
}

/// The directory that holds the records.
#[derive(Debug, Clone)]
pub struct Ledger {
    root: PathBuf,
}

impl Ledger {
    /// Makes the directory where it is missing.
    pub fn open(run_dir: &Path) -> io::Result<Self> {
        let root = run_dir.join("vm");
        DirBuilder::new().recursive(true).mode(0o700).create(&root)?;
        let boot_file = root.join(".boot_id");
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        // A run directory that outlived its boot (not on a tmpfs) speaks of processes that are gone and numbers that are reused.
        let recorded = fs::read_to_string(&boot_file).unwrap_or_default();
        if recorded != boot_id {
            // Only another boot's whole id clears; a missing or torn one is no reason to forget VMs that run.
            if recorded.trim().len() == boot_id.trim().len() {
                tracing::warn!(directory = %root.display(), "the ledger is from before the last boot: cleared");
                fs::remove_dir_all(&root)?;
                DirBuilder::new().mode(0o700).create(&root)?;
            }
            // On a full tmpfs this waits for the next start: VMs that run must be found now.
            if let Err(error) = write_whole(&root, ".boot_id", boot_id.as_bytes()) {
                tracing::warn!(directory = %root.display(), %error, "the boot id can't be written down");
            }
        }
        Ok(Self { root })
    }

    /// Where a slot's record and sockets are. Derived from the number alone.
    pub fn directory(&self, slot: Slot) -> PathBuf {
        self.root.join(slot.to_string())
    }

    /// The file that whoever sets the packet filter's rules locks. It is there as long as there may be rules of ours.
    pub fn filter_lock(&self) -> PathBuf {
        self.root.join(".nft")
    }

    /// Writes a new slot's record together with its directory: both are there, or neither.
    pub fn create(&self, record: &Record) -> io::Result<()> {
        let new = self.root.join(format!(".{}.new", record.slot));
        remove_tree(&new)?;
        DirBuilder::new().mode(0o700).create(&new)?;
        write_record(&new, record)?;
        fs::rename(&new, self.directory(record.slot))
    }

    /// Replaces a slot's record.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        write_record(&self.directory(record.slot), record)
    }

    /// Takes a slot out of the ledger, and then its directory away.
    pub fn remove(&self, slot: Slot) -> io::Result<()> {
        let gone = self.root.join(format!(".{slot}.gone"));
        remove_tree(&gone)?;
        match fs::rename(self.directory(slot), &gone) {
            Ok(()) => remove_tree(&gone),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// All records, in slot order; what was on its way in or out is swept. A record that can't be read is named and left, with its slot.
    pub fn load(&self) -> io::Result<(Vec<Record>, Vec<Unreadable>)> {
        let mut records = Vec::new();
        let mut unreadable = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with('.') {
                if name.ends_with(".new") || name.ends_with(".gone") {
                    remove_tree(&entry.path())?;
                }
                continue;
            }
            let Some(slot) = name.parse::<u64>().ok().and_then(|n| Slot::new(n).ok()).filter(|s| s.to_string() == name) else { continue };
            match read_record(&entry.path(), slot) {
                Ok(record) => records.push(record),
                Err(error) => unreadable.push(Unreadable { slot, reason: error.to_string() }),
            }
        }
        records.sort_by_key(|record| record.slot);
        Ok((records, unreadable))
    }
}

/// A slot whose record can't be read. It is not given to anybody.
#[derive(Debug)]
pub struct Unreadable {
    pub slot: Slot,
    pub reason: String,
}

fn read_record(directory: &Path, slot: Slot) -> io::Result<Record> {
    let record: Record = serde_json::from_slice(&fs::read(directory.join("record.json"))?)?;
    if record.slot == slot { Ok(record) } else { Err(io::Error::other(format!("the record speaks of slot {}", record.slot))) }
}

fn write_record(directory: &Path, record: &Record) -> io::Result<()> {
    write_whole(directory, "record.json", &serde_json::to_vec(record)?)
}

/// A reader finds the old content or the new, and never a part.
pub(crate) fn write_whole(directory: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let new = directory.join(format!("{name}.new"));
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(content)?;
    fs::rename(&new, directory.join(name))
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => fs::remove_file(path),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(slot: u64) -> Record {
        Record {
            slot: Slot::new(slot).unwrap(),
            label: Label::new("web").unwrap(),
            uid: 200_000,
            claim: RequestId { session: u64::MAX, serial: 1 },
            state: SlotState::Claimed,
            run: None,
            resources: Resources::default(),
        }
    }

    #[test]
    fn what_was_written_is_read_back_and_what_was_removed_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.create(&record(3)).unwrap();
        ledger.create(&record(1)).unwrap();
        let mut changed = record(3);
        changed.state = SlotState::Exited;
        ledger.write(&changed).unwrap();
        assert_eq!(ledger.load().unwrap().0, [record(1), changed]);
        ledger.remove(Slot::new(3).unwrap()).unwrap();
        ledger.remove(Slot::new(3).unwrap()).unwrap();
        assert_eq!(ledger.load().unwrap().0, [record(1)]);
    }

    /// An upgrade must find the VMs that run: what a record gains later needs a default, and this text stays as it is.
    #[test]
    fn a_record_of_release_0_1_is_read() {
        let text = r#"{"slot":1,"label":"web","uid":200001,"claim":{"session":18446744073709551615,"serial":1},"state":"running","run":{
            "spawn":{"session":18446744073709551615,"serial":2},"asked":"00","process":{"pid":100,"start_time":7},"spawned_ms":1700000000000,"cpus":2,
            "memory":256,"accelerator":"kvm","forwards":[{"protocol":"tcp","host_address":"127.0.0.1","host_port":8000,"guest_port":80}],
            "exit":{"signal":9}}}"#;
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.create(&record(1)).unwrap();
        fs::write(ledger.directory(Slot::new(1).unwrap()).join("record.json"), text).unwrap();
        let (records, unreadable) = ledger.load().unwrap();
        assert!(unreadable.is_empty(), "{unreadable:?}");
        let run = records[0].run.as_ref().unwrap();
        assert_eq!((run.process, run.forwards.len(), run.exit), (Some(Process { pid: 100, start_time: 7 }), 1, Some(ExitStatus::Signal(9))));
        assert_eq!((run.egress, run.companions.len()), (None, 0), "it had none");
    }

    #[test]
    fn slots_on_their_way_in_or_out_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        for name in [".5.new", ".6.gone"] {
            fs::create_dir(dir.path().join("vm").join(name)).unwrap();
            fs::write(dir.path().join("vm").join(name).join("record.json"), "{").unwrap();
        }
        assert!(ledger.load().unwrap().0.is_empty());
        assert_eq!(fs::read_dir(dir.path().join("vm")).unwrap().count(), 1, "only .boot_id stays");
    }

    #[test]
    fn a_record_that_can_not_be_read_keeps_its_slot_and_stops_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.create(&record(1)).unwrap();
        ledger.create(&record(2)).unwrap();
        fs::write(ledger.directory(Slot::new(2).unwrap()).join("record.json"), "{\"slot\":2").unwrap();
        let (records, unreadable) = ledger.load().unwrap();
        assert_eq!((records.len(), unreadable.len()), (1, 1));
        assert_eq!(unreadable[0].slot.get(), 2);
    }

    #[test]
    fn a_ledger_from_before_the_last_boot_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.create(&record(1)).unwrap();
        for torn in ["", "0123"] {
            fs::write(dir.path().join("vm/.boot_id"), torn).unwrap();
            assert_eq!(Ledger::open(dir.path()).unwrap().load().unwrap().0.len(), 1, "a torn id clears nothing");
        }
        fs::write(dir.path().join("vm/.boot_id"), "01234567-89ab-cdef-0123-456789abcdef\n").unwrap();
        assert!(Ledger::open(dir.path()).unwrap().load().unwrap().0.is_empty());
    }
}
