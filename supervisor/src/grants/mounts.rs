//! `[mounts.NAME]` and `[sockets.NAME]`.

use serde::Deserialize;
use std::path::PathBuf;

/// Something that may be mounted for a VM: a directory, a file system in memory, or an image.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mountable {
    pub directory: Option<PathBuf>,
    /// A new and empty file system in memory of this size at most, in MiB.
    pub tmpfs_mib: Option<u32>,
    /// The file of a read-only file system; the kernel will read whatever is in it.
    pub image: Option<PathBuf>,
    /// Of an image: `squashfs` or `erofs`.
    pub image_type: Option<ImageType>,
    /// Whether a VM may write; an image never can.
    #[serde(default)]
    pub write: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageType {
    Squashfs,
    Erofs,
}

/// A socket that the worker may be connected to.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Socket {
    pub path: PathBuf,
}
