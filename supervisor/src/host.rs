//! The host that is acted on: the real one, or a stage (a rehearsal).
//!
//! Everything that reads or writes the host's sysfs, procfs or device nodes takes their places from here, so that vetting, ledger and audit are the same over a
//! fixture tree as over a kernel. On a stage, what can't be done by an ordinary user is said instead of done, and goes into the audit.

use crate::vm::jail::Walls;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Where the kernel shows itself, and who we are to it.
#[derive(Debug)]
pub struct Host {
    sysfs: PathBuf,
    procfs: PathBuf,
    dev: PathBuf,
    /// Root, or who rehearses.
    owner: u32,
    /// None: it is the real one.
    said: Option<Mutex<Vec<String>>>,
}

impl Host {
    /// The machine that this runs on.
    pub fn real() -> Self {
        Self { sysfs: "/sys".into(), procfs: "/proc".into(), dev: "/dev".into(), owner: 0, said: None }
    }

    /// A tree with the same shape under `root`: `root/sys`, `root/proc`, `root/dev`.
    pub fn staged(root: &Path) -> Self {
        Self { sysfs: root.join("sys"), procfs: root.join("proc"), dev: root.join("dev"), ..Self::real() }
    }

    /// As [`Host::staged`], for an ordinary user who rehearses.
    pub fn rehearsed(root: &Path) -> Self {
        Self { owner: rustix::process::geteuid().as_raw(), said: Some(Mutex::default()), ..Self::staged(root) }
    }

    pub fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    pub fn procfs(&self) -> &Path {
        &self.procfs
    }

    pub fn dev(&self) -> &Path {
        &self.dev
    }

    /// Who must own what is trusted because of its owner: grants, programs.
    pub fn owner(&self) -> u32 {
        self.owner
    }

    /// Nothing is done that needs root.
    pub fn is_rehearsed(&self) -> bool {
        self.said.is_some()
    }

    /// The user that a slot's processes really have: in a rehearsal all are ours.
    pub fn user_of(&self, slots_user: u32) -> u32 {
        if self.is_rehearsed() { self.owner } else { slots_user }
    }

    /// What stands around a VM's processes.
    pub fn walls(&self) -> Walls {
        if self.is_rehearsed() { Walls::Stage } else { Walls::Jail }
    }

    /// On a stage: says what would have been done, and that it was not. `true`: that was all.
    pub fn rehearses(&self, what: impl FnOnce() -> String) -> bool {
        match &self.said {
            None => false,
            Some(said) => {
                said.lock().unwrap_or_else(PoisonError::into_inner).push(what());
                true
            }
        }
    }

    /// What was said since this was last asked.
    pub fn take_said(&self) -> Vec<String> {
        self.said.as_ref().map_or_else(Vec::new, |said| std::mem::take(&mut *said.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}
