//! The host that is acted on: the real one, or a stage (DESIGN: rehearsal).
//!
//! Everything that reads or writes the host's sysfs or device nodes takes their places from here, so that vetting, ledger and audit are the same over a
//! fixture tree as over a kernel.

use std::path::{Path, PathBuf};

/// Where the kernel shows itself.
#[derive(Debug, Clone)]
pub struct Host {
    sysfs: PathBuf,
    dev: PathBuf,
}

impl Host {
    /// The machine that this runs on.
    pub fn real() -> Self {
        Self { sysfs: "/sys".into(), dev: "/dev".into() }
    }

    /// A tree with the same shape under `root`: `root/sys`, `root/dev`.
    pub fn staged(root: &Path) -> Self {
        Self { sysfs: root.join("sys"), dev: root.join("dev") }
    }

    pub fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    pub fn dev(&self) -> &Path {
        &self.dev
    }
}
