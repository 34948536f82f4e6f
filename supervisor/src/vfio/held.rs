//! Whether somebody still has a device whose VM has ended. A QEMU that is taken over can hand its descriptors on, over any socket that it has: the device would
//! read as bound and alive, and go to the next VM, while somebody else drives it.
//!
//! The kernel tells: a group's node opens once, and not at all while a function of the group is open in either way (`EBUSY`), be it in a process or in a message that
//! nobody has taken. So it is opened here, and closed again. Who has it is then looked for in `/proc`, to be named.

use super::openers::{self, Node, Opener};
use super::record::Record;
use super::thread::Progress;
use super::{facts, node};
use crate::host::Host;
use std::io;
use std::time::{Duration, Instant};

/// QEMU's last descriptors close a moment after its end is seen: KVM lets go of its devices on a thread of the kernel's.
const CLOSING: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(10);
/// Of those who have it, so many are named.
const NAMED: usize = 4;

/// Fails with the names of those who have it.
pub fn by_nobody(host: &Host, record: &Record, progress: &Progress) -> Result<(), String> {
    if host.is_rehearsed() {
        return Ok(());
    }
    let until = Instant::now() + CLOSING;
    loop {
        // Each look is a step of its own: to wait for somebody, on purpose, is not to hang.
        progress.undoing("look whether somebody has it".into());
        let busy = busy(host, record.group).map_err(|error| format!("whether somebody has it can't be found out: {error}"))?;
        let openers = openers(host, record).map_err(|error| format!("who has it open can't be looked at: {error}"))?;
        if !busy && openers.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(told(host, record, &openers));
        }
        std::thread::sleep(AGAIN);
    }
}

/// A node that is gone is nobody's. One that this process may not open (the unit's list of devices is older than its driver) says nothing.
fn busy(host: &Host, group: u32) -> io::Result<bool> {
    match node::take(host, group) {
        Ok(_closed_again) => Ok(false),
        Err(error) => match error.raw_os_error() {
            Some(nix::libc::EBUSY) => Ok(true),
            Some(nix::libc::ENOENT | nix::libc::ENODEV | nix::libc::ENXIO) => Ok(false),
            Some(nix::libc::EPERM | nix::libc::EACCES) => {
                tracing::warn!(group, %error, "the group's node can't be opened: only /proc tells who has it");
                Ok(false)
            }
            _ => Err(error),
        },
    }
}

fn nodes(host: &Host, record: &Record) -> io::Result<Vec<Node>> {
    let paths: Vec<String> = record.functions.iter().map(|taken| taken.path.clone()).collect();
    facts::nodes(host, record.group, &paths)
}

fn openers(host: &Host, record: &Record) -> io::Result<Vec<Opener>> {
    // This process itself has the node open for the moment of a look, on another thread.
    let ourselves = std::process::id();
    Ok(openers::of(host, &openers::processes(host)?, &nodes(host, record)?)?.into_iter().filter(|opener| opener.pid != ourselves).collect())
}

fn told(host: &Host, record: &Record, openers: &[Opener]) -> String {
    let list = |openers: &[Opener]| openers.iter().take(NAMED).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let who = if openers.is_empty() {
        // A device that came by its group has no name of its own (before Linux 6.17), so these may have another's.
        let devices = openers::of_vfio_devices(host).unwrap_or_default();
        if devices.is_empty() {
            "no process shows it: it lies in a message that nobody has taken".to_owned()
        } else {
            format!("perhaps one of these: {}", list(&devices))
        }
    } else {
        list(openers)
    };
    format!("somebody still has IOMMU group {} ({who}); end him, and reset it (vfio.recover)", record.group)
}
