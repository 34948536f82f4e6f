//! The kernel's files that are written. Each function here brings a state about from whatever it finds, so that it may be asked again after a death at any
//! point of it, and each may hang: they run on a device thread.
//!
//! ```text
//!   hold       driver_override = vfio-pci     all functions
//!              unbind                         all functions, from what drivers they have
//!              drivers_probe                  all functions; then: same group, same ids, vfio-pci, and the node is there
//!   give_back  unbind, override as before     all functions, last first
//!              bind                           to the drivers of before
//! ```
//!
//! What is written are constants, a function's own name, and the names of drivers that were read from the kernel.

use super::facts::{self, VFIO_DRIVER};
use super::node;
use super::record::{Record, Taken};
use super::thread::{Abandoned, Progress};
use crate::host::{Host, there};
use diarch_ipc::Error;
use std::io;
use std::time::{Duration, Instant};

/// The kernel has done what it was told when the write returns. What still differs after so long stays different. (On a stage, somebody plays the kernel.)
const EFFECT_PATIENCE: Duration = Duration::from_secs(1);
/// The node is made by devtmpfs after the driver has bound, and not at once.
const NODE_PATIENCE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(1);

/// Why a group was not taken, and what of it could not be given back again.
#[derive(Debug)]
pub struct NotTaken {
    pub error: Error,
    pub left: Option<String>,
}

/// The functions of a group, in words.
fn named(record: &Record) -> String {
    record.functions.iter().map(|taken| taken.function.as_str()).collect::<Vec<_>>().join(", ")
}

/// Takes a group, or gives all of it back.
pub fn take(host: &Host, record: &Record, progress: &Progress) -> Result<(), NotTaken> {
    let taken = hold(host, record, progress).and_then(|()| Ok(progress.step("end".into())?));
    taken.map_err(|error| {
        let left = give_back(host, record, progress).err();
        NotTaken { error, left }
    })
}

/// All functions of the group are vfio-pci's, and its node is there.
pub fn hold(host: &Host, record: &Record, progress: &Progress) -> Result<(), Error> {
    if host.rehearses(|| format!("take {} from their drivers, and give them to {VFIO_DRIVER}", named(record))) {
        return Ok(());
    }
    for taken in &record.functions {
        progress.step(format!("write {}'s driver_override", taken.function))?;
        set_override(host, taken, Some(VFIO_DRIVER)).map_err(|error| step(taken, "driver_override", &error))?;
    }
    for taken in &record.functions {
        if let Some(driver) = facts::driver(host, &taken.path).map_err(|error| step(taken, "driver", &error))?
            && driver != VFIO_DRIVER
        {
            progress.step(format!("take {} from {driver}", taken.function))?;
            unbind(host, taken, &driver).map_err(|error| step(taken, &format!("unbind from {driver}"), &error))?;
        }
    }
    for taken in &record.functions {
        progress.step(format!("give {} to {VFIO_DRIVER}", taken.function))?;
        probe(host, taken, VFIO_DRIVER).map_err(|error| step(taken, &format!("bind to {VFIO_DRIVER}"), &error))?;
    }
    verify(host, record)?;
    progress.step(format!("wait for /dev/vfio/{}", record.group))?;
    node::wait(host, record.group, NODE_PATIENCE)
}

/// Whether the group is as it was when it was taken, and vfio-pci's.
pub fn verify(host: &Host, record: &Record) -> Result<(), Error> {
    if host.is_rehearsed() {
        return Ok(());
    }
    for taken in &record.functions {
        let differs = |what: String| Error::Failed { step: format!("look at {} again", taken.function), errno: None, detail: what };
        match facts::group_of(host, &taken.function)? {
            Some(group) if group == record.group => {}
            Some(group) => return Err(differs(format!("it is in IOMMU group {group} now, and was in {}", record.group))),
            None => return Err(differs("it is gone".into())),
        }
        let driver = facts::driver(host, &taken.path).map_err(|error| step(taken, "driver", &error))?;
        if driver.as_deref() != Some(VFIO_DRIVER) {
            return Err(differs(format!("its driver is {}", driver.unwrap_or_else(|| "none".into()))));
        }
        for (name, id) in [("vendor", taken.vendor), ("device", taken.device)] {
            let text = host.sysfs().text(&format!("{}/{name}", taken.path)).map_err(|error| step(taken, name, &error))?;
            if text != format!("{id:#06x}") {
                return Err(differs(format!("its {name} id is {text} now, and was {id:#06x}: it is another device")));
            }
        }
    }
    Ok(())
}

/// Gives a group back to the drivers that it was taken from. All that can go back does; what can't is told. A function that is gone needs nothing.
pub fn give_back(host: &Host, record: &Record, progress: &Progress) -> Result<(), String> {
    if host.rehearses(|| format!("give {} back to their drivers", named(record))) {
        return Ok(());
    }
    let mut troubles = Vec::new();
    let mut going = Vec::new();
    for taken in record.functions.iter().rev() {
        match let_go(host, taken, progress) {
            Ok(true) => going.push(taken),
            Ok(false) => {}
            Err(trouble) => troubles.push(trouble),
        }
    }
    for taken in going {
        if let Some(driver) = &taken.driver {
            progress.undoing(format!("give {} back to {driver}", taken.function));
            if let Err(trouble) = bind(host, taken, driver) {
                troubles.push(trouble);
            }
        }
    }
    if troubles.is_empty() { Ok(()) } else { Err(troubles.join("; ")) }
}

/// A function is vfio-pci's no more, and prefers the drivers that it preferred before. `false`: there is no such function.
fn let_go(host: &Host, taken: &Taken, progress: &Progress) -> Result<bool, String> {
    let name = &taken.function;
    let failed = |what: &str, error: &io::Error| format!("{name}: {what}: {error}");
    if there(host.sysfs().names(&taken.path)).map_err(|error| failed("look", &error))?.is_none() {
        return Ok(false);
    }
    progress.undoing(format!("take {name} from {VFIO_DRIVER}"));
    let driver = facts::driver(host, &taken.path).map_err(|error| failed("driver", &error))?;
    let ours = driver.as_deref() == Some(VFIO_DRIVER) && taken.driver.as_deref() != Some(VFIO_DRIVER);
    if ours && taken.driver.is_some() {
        // The host's driver would meet a dead device, and the host its errors.
        alive(host, taken).map_err(|trouble| format!("{trouble}; it stays with {VFIO_DRIVER}"))?;
    }
    let gone = |result: io::Result<()>| there(result).map(|done| done.is_some());
    let mut here = gone(set_override(host, taken, taken.driver_override.as_deref())).map_err(|error| failed("driver_override", &error))?;
    if ours {
        here &= gone(unbind(host, taken, VFIO_DRIVER)).map_err(|error| failed(&format!("unbind from {VFIO_DRIVER}"), &error))?;
    }
    Ok(here)
}

fn bind(host: &Host, taken: &Taken, driver: &str) -> Result<(), String> {
    let name = &taken.function;
    let failed = |error: &io::Error| format!("{name}: {driver} does not take it back: {error}");
    if facts::driver(host, &taken.path).map_err(|error| failed(&error))?.as_deref() == Some(driver) {
        return Ok(());
    }
    if !host.sysfs().exists(&format!("bus/pci/drivers/{driver}")).map_err(|error| failed(&error))? {
        // Whoever unloaded it meant to. The kernel offers it to the others.
        tracing::warn!(function = %name, driver, "its driver is not loaded any more: it has none now");
        return there(host.sysfs().write("bus/pci/drivers_probe", name.as_str())).map(drop).map_err(|error| failed(&error));
    }
    // Exactly this one: another might match as well.
    let bound = host.sysfs().write(&format!("bus/pci/drivers/{driver}/bind"), name.as_str());
    if let Err(error) = bound
        && there(host.sysfs().names(&taken.path)).map_err(|error| failed(&error))?.is_some()
        && facts::driver(host, &taken.path).map_err(|error| failed(&error))?.as_deref() != Some(driver)
    {
        return Err(failed(&error));
    }
    match there(becomes(host, taken, |now| now == Some(driver))) {
        Ok(_) => Ok(()),
        Err(error) => Err(failed(&error)),
    }
}

/// Resets the group: each function that can be, all of them through another bind, and those that can be again.
pub fn reset(host: &Host, record: &Record, progress: &Progress) -> Result<(), String> {
    if host.rehearses(|| format!("reset {}", named(record))) {
        return answers(host, record);
    }
    let failed = |taken: &Taken, what: &str, error: &dyn std::fmt::Display| format!("{}: {what}: {error}", taken.function);
    let wanted = |step: Result<(), Abandoned>| step.map_err(|_| "nobody waits for the reset any more".to_owned());
    let reset = |taken: &Taken| {
        wanted(progress.step(format!("reset {}", taken.function)))?;
        host.sysfs().write(&format!("{}/reset", taken.path), "1").map_err(|error| failed(taken, "reset", &error))
    };
    let resettable = || record.functions.iter().filter(|taken| taken.resettable);
    // A device that hangs may refuse the first, and obey the second.
    for trouble in resettable().filter_map(|taken| reset(taken).err()) {
        tracing::warn!(trouble, "the first of two resets failed");
    }
    for taken in record.functions.iter().rev() {
        let driver = facts::driver(host, &taken.path).map_err(|error| failed(taken, "driver", &error))?;
        if driver.as_deref() == Some(VFIO_DRIVER) {
            wanted(progress.step(format!("take {} from {VFIO_DRIVER}", taken.function)))?;
            unbind(host, taken, VFIO_DRIVER).map_err(|error| failed(taken, "unbind", &error))?;
        }
    }
    hold(host, record, progress).map_err(|error| error.to_string())?;
    resettable().try_for_each(reset)?;
    answers(host, record)
}

/// Whether every function of the group answers on its bus.
pub fn answers(host: &Host, record: &Record) -> Result<(), String> {
    record.functions.iter().try_for_each(|taken| alive(host, taken))
}

/// Reads a function's config space. Where nobody answers, a bus reads all ones (PCI Local Bus 3.0, 6.1).
fn alive(host: &Host, taken: &Taken) -> Result<(), String> {
    let name = &taken.function;
    let header = host.sysfs().read_start(&format!("{}/config", taken.path), 64).map_err(|error| format!("{name} does not answer: {error}"))?;
    if header.len() < 64 || header.iter().all(|byte| *byte == 0xff) {
        return Err(format!("{name} does not answer: its config space reads all ones"));
    }
    let ids = [u16::from_le_bytes([header[0], header[1]]), u16::from_le_bytes([header[2], header[3]])];
    if !taken.virtual_function && ids != [taken.vendor, taken.device] {
        return Err(format!("{name} answers as {:04x}:{:04x}, and was {:04x}:{:04x}", ids[0], ids[1], taken.vendor, taken.device));
    }
    Ok(())
}

fn set_override(host: &Host, taken: &Taken, driver: Option<&str>) -> io::Result<()> {
    if facts::driver_override(host, &taken.path)?.as_deref() == driver {
        return Ok(());
    }
    // A line break alone clears it (Documentation/ABI/testing/sysfs-bus-pci).
    host.sysfs().write(&format!("{}/driver_override", taken.path), &format!("{}\n", driver.unwrap_or_default()))
}

fn unbind(host: &Host, taken: &Taken, driver: &str) -> io::Result<()> {
    // ENODEV: it has let go by itself. Whether it has is seen below.
    there(host.sysfs().write(&format!("bus/pci/drivers/{driver}/unbind"), taken.function.as_str()))?;
    becomes(host, taken, |now| now != Some(driver))
}

fn probe(host: &Host, taken: &Taken, driver: &str) -> io::Result<()> {
    if facts::driver(host, &taken.path)?.as_deref() == Some(driver) {
        return Ok(());
    }
    host.sysfs().write("bus/pci/drivers_probe", taken.function.as_str())?;
    becomes(host, taken, |now| now == Some(driver))
}

/// Waits for a function's driver to be what it should be.
fn becomes(host: &Host, taken: &Taken, wanted: impl Fn(Option<&str>) -> bool) -> io::Result<()> {
    let until = Instant::now() + EFFECT_PATIENCE;
    loop {
        let driver = facts::driver(host, &taken.path)?;
        if wanted(driver.as_deref()) {
            return Ok(());
        }
        if there(host.sysfs().names(&taken.path))?.is_none() {
            return Err(io::Error::from_raw_os_error(nix::libc::ENODEV));
        }
        if Instant::now() >= until {
            return Err(io::Error::other(format!("the kernel took it and did nothing: the driver is {}", driver.unwrap_or_else(|| "none".into()))));
        }
        std::thread::sleep(AGAIN);
    }
}

fn step(taken: &Taken, what: &str, error: &io::Error) -> Error {
    Error::io(format!("{what} of {}", taken.function), error)
}

impl From<Abandoned> for Error {
    fn from(_: Abandoned) -> Self {
        Error::Failed { step: "device".into(), errno: None, detail: "a step took too long, and what was done is undone".into() }
    }
}
