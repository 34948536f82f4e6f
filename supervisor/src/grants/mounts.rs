//! `[mounts.NAME]` and `[sockets.NAME]`.

use super::GrantsError;
use crate::path::is_plain;
use diarch_ipc::name::{ShareName, SocketName};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Something that may be mounted for a VM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct Mountable {
    pub source: Source,
    /// Whether a VM may write; an image never can.
    pub write: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Directory(PathBuf),
    /// A new and empty file system in memory, of this size at most.
    Tmpfs {
        mib: u32,
    },
    /// The file of a read-only file system; the kernel will read whatever is in it.
    Image {
        path: PathBuf,
        kind: ImageType,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageType {
    Squashfs,
    Erofs,
}

impl ImageType {
    /// The kernel's word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            ImageType::Squashfs => "squashfs",
            ImageType::Erofs => "erofs",
        }
    }
}

/// As it stands in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    directory: Option<PathBuf>,
    tmpfs_mib: Option<u32>,
    image: Option<PathBuf>,
    image_type: Option<ImageType>,
    #[serde(default)]
    write: bool,
}

impl TryFrom<Written> for Mountable {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let Written { directory, tmpfs_mib, image, image_type, write } = written;
        let source = match (directory, tmpfs_mib, image, image_type) {
            (Some(path), None, None, None) => Source::Directory(path),
            (None, Some(0), None, None) => return Err("tmpfs_mib is the size, and 0 would mean without a limit".into()),
            (None, Some(mib), None, None) => Source::Tmpfs { mib },
            (None, None, Some(_), Some(_)) if write => return Err("an image is read-only: take out the write".into()),
            (None, None, Some(path), Some(kind)) => Source::Image { path, kind },
            (None, None, Some(_), None) => return Err("an image needs its image_type: \"squashfs\" or \"erofs\"".into()),
            (_, _, None, Some(_)) => return Err("image_type is for an image".into()),
            _ => return Err("exactly one of directory, tmpfs_mib and image is needed".into()),
        };
        if let Source::Directory(path) | Source::Image { path, .. } = &source {
            plain(path)?;
        }
        Ok(Mountable { source, write })
    }
}

/// A socket that the worker may be connected to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "WrittenSocket")]
pub struct Socket {
    pub path: PathBuf,
    pub kind: SocketKind,
    /// Beside root, the user that the directories on the way and the socket may belong to.
    pub owner: Option<u32>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SocketKind {
    #[default]
    Stream,
    Seqpacket,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSocket {
    path: PathBuf,
    #[serde(default, rename = "type")]
    kind: SocketKind,
    owner: Option<u32>,
}

impl TryFrom<WrittenSocket> for Socket {
    type Error = String;

    fn try_from(written: WrittenSocket) -> Result<Self, String> {
        plain(&written.path)?;
        Ok(Socket { path: written.path, kind: written.kind, owner: written.owner })
    }
}

fn plain(path: &std::path::Path) -> Result<(), String> {
    if is_plain(path) { Ok(()) } else { Err(format!("{path:?} is no absolute path below /, without '..'")) }
}

/// The names, which the parser takes as they are.
pub(super) fn check(mounts: &BTreeMap<String, Mountable>, sockets: &BTreeMap<String, Socket>) -> Result<(), GrantsError> {
    let refuse = |field, name: &str| GrantsError::Value { field, reason: format!("{name:?} is not a name (ASCII letters, digits, '-', '_', '.')") };
    if let Some(name) = mounts.keys().find(|name| ShareName::new(name.as_str()).is_err()) {
        return Err(refuse("mounts", name));
    }
    if let Some(name) = sockets.keys().find(|name| SocketName::new(name.as_str()).is_err()) {
        return Err(refuse("sockets", name));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mountable(text: &str) -> Result<Mountable, String> {
        toml::from_str(text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn a_mount_is_one_thing_and_read_only_unless_it_says_so() {
        let models = mountable("directory = \"/srv/models\"").unwrap();
        assert_eq!(models, Mountable { source: Source::Directory("/srv/models".into()), write: false });
        assert!(mountable("tmpfs_mib = 64\nwrite = true").unwrap().write);
        let image = mountable("image = \"/srv/a.squashfs\"\nimage_type = \"squashfs\"").unwrap();
        assert!(matches!(image.source, Source::Image { kind: ImageType::Squashfs, .. }));
        for (bad, says) in [
            ("", "exactly one of"),
            ("write = true", "exactly one of"),
            ("directory = \"/a\"\ntmpfs_mib = 1", "exactly one of"),
            ("directory = \"/a\"\nimage = \"/b\"\nimage_type = \"erofs\"", "exactly one of"),
            ("directory = \"/a\"\nimage_type = \"erofs\"", "image_type is for an image"),
            ("directory = \"/\"", "below /"),
            ("directory = \"a\"", "below /"),
            ("directory = \"/a/../b\"", "below /"),
            ("tmpfs_mib = 0", "without a limit"),
            ("image = \"/a\"", "image_type"),
            ("image = \"/a\"\nimage_type = \"ext4\"", "unknown variant"),
            ("image = \"/a\"\nimage_type = \"erofs\"\nwrite = true", "read-only"),
            ("directory = \"/a\"\noptions = \"exec\"", "unknown field"),
        ] {
            let sentence = mountable(bad).unwrap_err();
            assert!(sentence.contains(says), "{bad}: {sentence}");
        }
    }

    #[test]
    fn a_socket_is_a_stream_of_roots_unless_it_says_so() {
        let socket: Socket = toml::from_str("path = \"/run/a.sock\"").unwrap();
        assert_eq!((socket.kind, socket.owner), (SocketKind::Stream, None));
        let socket: Socket = toml::from_str("path = \"/run/a.sock\"\ntype = \"seqpacket\"\nowner = 105").unwrap();
        assert_eq!((socket.kind, socket.owner), (SocketKind::Seqpacket, Some(105)));
        for bad in ["path = \"a.sock\"", "path = \"/run/../a\"", "path = \"/a\"\ntype = \"datagram\""] {
            toml::from_str::<Socket>(bad).unwrap_err();
        }
    }
}
