//! What is written down of a group before it is touched: who has it, and what it was.
//!
//! ```text
//!   /run/diarch/device/        root only, 0700
//!     12.json                  IOMMU group 12
//! ```
//!
//! A record lives longer than its slot when its device could not be given back. It is of one boot, whose id is in it: groups are numbered anew at each.

use crate::ledger::write_whole;
use diarch_ipc::name::{Bdf, Label, Tenancy};
use diarch_ipc::operation::{DeviceRecord, DeviceState, FunctionRecord, Passing};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// One group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub group: u32,
    /// `reserved`: on its way to vfio-pci, or from it; a restarted supervisor gives it back.
    pub state: DeviceState,
    /// `None`: its VM was released, and it could not be given back.
    pub holder: Option<Holder>,
    pub functions: Vec<Taken>,
    pub trouble: Option<String>,
    /// How its VM has it, while it is attached.
    #[serde(default)]
    pub passing: Option<Passing>,
    /// The mode of the group's node, while a VM's user may open it.
    #[serde(default)]
    pub node_mode: Option<u32>,
}

/// Whose it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    pub tenancy: Tenancy,
    pub label: Label,
}

/// A function, and what it goes back to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Taken {
    pub function: Bdf,
    /// Below sysfs: `devices/pci0000:00/...`.
    pub path: String,
    pub vendor: u16,
    pub device: u16,
    pub class: u32,
    pub mmio_mib: u64,
    pub resettable: bool,
    /// A virtual function has no ids in its config space (SR-IOV 1.1, 3.4.1.1).
    pub virtual_function: bool,
    /// Its driver before.
    pub driver: Option<String>,
    /// Its `driver_override` before.
    pub driver_override: Option<String>,
}

impl Record {
    pub fn has(&self, function: &Bdf) -> bool {
        self.functions.iter().any(|taken| taken.function == *function)
    }

    pub fn held_by(&self, tenancy: Tenancy) -> bool {
        self.holder.as_ref().is_some_and(|holder| holder.tenancy == tenancy)
    }

    /// As the contract shows it.
    pub fn shown(&self) -> DeviceRecord {
        let function = |taken: &Taken| FunctionRecord {
            function: taken.function.clone(),
            vendor: taken.vendor,
            device: taken.device,
            class: taken.class,
            mmio_mib: taken.mmio_mib,
            resettable: taken.resettable,
        };
        DeviceRecord {
            group: self.group,
            state: self.state,
            functions: self.functions.iter().map(function).collect(),
            slot: self.holder.as_ref().map(|holder| holder.tenancy.slot),
            label: self.holder.as_ref().map(|holder| holder.label.clone()),
            passing: self.passing.filter(|_| self.state == DeviceState::Attached),
            trouble: self.trouble.clone(),
        }
    }
}

/// A record as it lies on the disk.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    boot: String,
    record: Record,
}

/// Where the records are.
#[derive(Debug, Clone)]
pub struct Shelf {
    root: PathBuf,
    boot: String,
}

/// A group whose record can't be read: nobody gets it, and nothing of it is touched.
#[derive(Debug)]
pub struct Unreadable {
    pub group: u32,
    pub reason: String,
}

impl Shelf {
    pub fn open(run_dir: &Path) -> io::Result<Self> {
        let root = run_dir.join("device");
        DirBuilder::new().recursive(true).mode(0o700).create(&root)?;
        Ok(Self { root, boot: fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned() })
    }

    pub fn write(&self, record: &Record) -> io::Result<()> {
        let written = Written { boot: self.boot.clone(), record: record.clone() };
        write_whole(&self.root, &format!("{}.json", record.group), &serde_json::to_vec(&written)?)
    }

    pub fn remove(&self, group: u32) -> io::Result<()> {
        match fs::remove_file(self.root.join(format!("{group}.json"))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// All records of this boot; those of an earlier one are swept, and what was only half written too.
    pub fn load(&self) -> io::Result<(Vec<Record>, Vec<Unreadable>)> {
        let (mut records, mut unreadable) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.ends_with(".new") {
                fs::remove_file(entry.path())?;
                continue;
            }
            let Some(group) = name.strip_suffix(".json").and_then(|number| number.parse::<u32>().ok()) else { continue };
            match fs::read(entry.path()).and_then(|text| Ok(serde_json::from_slice::<Written>(&text)?)) {
                Ok(written) if written.boot != self.boot => {
                    tracing::warn!(group, "a device's record is from before the last boot: removed");
                    fs::remove_file(entry.path())?;
                }
                Ok(written) if written.record.group == group => records.push(written.record),
                Ok(written) => unreadable.push(Unreadable { group, reason: format!("it speaks of group {}", written.record.group) }),
                Err(error) => unreadable.push(Unreadable { group, reason: error.to_string() }),
            }
        }
        records.sort_by_key(|record| record.group);
        Ok((records, unreadable))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use diarch_ipc::name::{RequestId, Slot};

    pub fn taken(function: &str, driver: Option<&str>) -> Taken {
        Taken {
            function: Bdf::new(function).unwrap(),
            path: format!("devices/pci0000:00/{function}"),
            vendor: 0x10de,
            device: 0x2330,
            class: 0x03_0200,
            mmio_mib: 16,
            resettable: true,
            virtual_function: false,
            driver: driver.map(str::to_owned),
            driver_override: None,
        }
    }

    pub fn holder(slot: u64, label: &str) -> Holder {
        Holder { tenancy: Tenancy { slot: Slot::new(slot).unwrap(), claim: RequestId { session: 1, serial: slot } }, label: Label::new(label).unwrap() }
    }

    pub fn record(group: u32, state: DeviceState) -> Record {
        let functions = vec![taken("0000:65:00.0", Some("nvidia")), taken("0000:65:00.1", None)];
        Record { group, state, holder: Some(holder(3, "web")), functions, trouble: None, passing: None, node_mode: None }
    }

    #[test]
    fn what_was_written_is_read_back_and_what_was_removed_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf::open(dir.path()).unwrap();
        shelf.write(&record(12, DeviceState::Reserved)).unwrap();
        shelf.write(&record(7, DeviceState::Bound)).unwrap();
        assert_eq!(shelf.load().unwrap().0, [record(7, DeviceState::Bound), record(12, DeviceState::Reserved)]);
        shelf.remove(12).unwrap();
        shelf.remove(12).unwrap();
        assert_eq!(shelf.load().unwrap().0.len(), 1);
    }

    #[test]
    fn a_record_of_another_boot_is_swept_and_one_that_can_not_be_read_closes_its_group() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf::open(dir.path()).unwrap();
        shelf.write(&record(1, DeviceState::Bound)).unwrap();
        let other = Shelf { boot: "another".into(), ..shelf.clone() };
        other.write(&record(2, DeviceState::Bound)).unwrap();
        fs::write(dir.path().join("device/3.json"), "{\"boot\":").unwrap();
        fs::write(dir.path().join("device/4.json.new"), "{").unwrap();
        fs::copy(dir.path().join("device/1.json"), dir.path().join("device/5.json")).unwrap();
        let (records, unreadable) = shelf.load().unwrap();
        assert_eq!(records.iter().map(|record| record.group).collect::<Vec<_>>(), [1]);
        let mut closed: Vec<u32> = unreadable.iter().map(|lost| lost.group).collect();
        closed.sort_unstable();
        assert_eq!(closed, [3, 5]);
        assert!(!dir.path().join("device/2.json").exists() && !dir.path().join("device/4.json.new").exists());
    }
}
