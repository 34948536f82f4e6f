//! What the supervisor gives up before it listens.
//!
//! Capabilities, `no_new_privs` and dumpability belong to a thread and are inherited by those it makes: this runs in a plain `main`, before any
//! other thread exists.

use caps::{CapSet, Capability, CapsHashSet};
use diarch_ipc::OPERATIONS;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use std::io;

/// The capabilities that the table's rows name, and no other.
pub fn needed() -> CapsHashSet {
    OPERATIONS.iter().flat_map(|row| row.capability).filter_map(|name| name.parse::<Capability>().ok()).collect()
}

/// Keeps only what the table needs, for this process and all that it will ever exec.
pub fn shed() -> io::Result<()> {
    let fail = |error: caps::errors::CapsError| io::Error::other(error.to_string());
    let keep = needed();
    // A device that reads and writes a guest's memory keeps all of it in place, and a child can only lower what it inherits. Where this is refused, such a child is.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
    // The bounding set needs CAP_SETPCAP to shrink, so it goes first.
    for capability in caps::read(None, CapSet::Bounding).map_err(fail)?.difference(&keep) {
        caps::drop(None, CapSet::Bounding, *capability).map_err(fail)?;
    }
    caps::clear(None, CapSet::Ambient).map_err(fail)?;
    caps::clear(None, CapSet::Inheritable).map_err(fail)?;
    caps::set(None, CapSet::Effective, &keep).map_err(fail)?;
    caps::set(None, CapSet::Permitted, &keep).map_err(fail)?;
    confine()
}

/// What any process can give up, and every one of ours does.
pub fn confine() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    // /proc/self is root's alone, and nothing of us is written to a core (THREATS 17, 21).
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    // Each VM costs a few descriptors; the soft limit of 1024 is for programs that use select(2).
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum })?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    Ok(())
}

/// The oldest kernel with everything that the two halves rely on (`SO_PEERPIDFD`, Linux 6.5).
const KERNEL_FLOOR: (u32, u32) = (6, 5);

/// The kernel's release, when it is new enough.
pub fn check_kernel(release: &str) -> Result<(), String> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().ok());
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) >= KERNEL_FLOOR => Ok(()),
        _ => Err(format!("Linux {}.{} or newer is needed (SO_PEERPIDFD), and this is {release}", KERNEL_FLOOR.0, KERNEL_FLOOR.1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_in_the_table_is_one_that_exists() {
        let named: std::collections::HashSet<&str> = OPERATIONS.iter().flat_map(|row| row.capability).copied().collect();
        assert_eq!(named.len(), needed().len());
    }

    #[test]
    fn an_old_kernel_gets_a_sentence() {
        for good in ["6.5.0", "6.18.44-x", "7.0", "10.1"] {
            check_kernel(good).unwrap();
        }
        for bad in ["6.4.12", "5.15.0-generic", "6", "", "x.y"] {
            assert!(check_kernel(bad).unwrap_err().contains("6.5"));
        }
    }
}
