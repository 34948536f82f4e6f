//! The file of a read-only file system. The kernel's own code reads what is in it, so it is taken from where root alone can have put it.

use crate::grants::ImageType;
use crate::host::Host;
use crate::path::{self, Found};
use diarch_ipc::Error;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::pread;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Opens an image that the walk found, and looks whether it is one.
pub fn open(path: &Path, found: Found, kind: ImageType, grant: &str, owner: u32) -> Result<OwnedFd, Error> {
    let refuse = |reason: String| Err(Error::denied(grant, format!("{} {reason}", path.display())));
    if found.kind != FileType::RegularFile {
        return refuse("is not a regular file".into());
    }
    if (found.uid != 0 && found.uid != owner) || found.mode & 0o022 != 0 {
        let (uid, mode) = (found.uid, found.mode);
        return refuse(format!(
            "can be written by others than root (uid {uid}, mode {mode:04o}), and the kernel would read what they wrote; chown root, chmod go-w"
        ));
    }
    // What was looked at is what is opened.
    let file = rustix::fs::open(path::of(&found.fd), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Error::io(format!("open {}", path.display()), &error.into()))?;
    if !begins_as(kind, &file).map_err(|error| Error::io(format!("read {}", path.display()), &error))? {
        return Err(Error::Unsupported {
            missing: format!("{} does not begin as {} does (image_type of {grant} in the grants)", path.display(), kind.as_str()),
        });
    }
    Ok(file)
}

/// By the magic number of its superblock: Documentation/filesystems/squashfs.rst (at 0) and erofs.rst (at 1024) in Linux.
fn begins_as(kind: ImageType, file: &OwnedFd) -> io::Result<bool> {
    let (offset, magic): (u64, u32) = match kind {
        ImageType::Squashfs => (0, 0x7371_7368),
        ImageType::Erofs => (1024, 0xe0f5_e1e2),
    };
    let mut found = [0u8; 4];
    let length = pread(file, &mut found, offset)?;
    Ok(length == found.len() && u32::from_le_bytes(found) == magic)
}

/// A loop device over an image. It frees itself when the last that uses it is gone.
pub struct Loop {
    pub path: String,
    _device: OwnedFd,
}

/// Attempts to get a free device before somebody else does.
const ATTEMPTS: u32 = 32;

/// Makes a read-only loop device of the image.
pub fn loop_device(image: &OwnedFd, host: &Host) -> io::Result<Loop> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let at = |name: String| host.dev().join(name);
    let control = rustix::fs::open(at("loop-control".into()), flags, Mode::empty())?;
    for _ in 0..ATTEMPTS {
        let number = free(&control)?;
        let path = at(format!("loop{number}"));
        let device = rustix::fs::open(&path, flags, Mode::empty())?;
        match configure(&device, image) {
            Ok(()) => return Ok(Loop { path: path.to_string_lossy().into_owned(), _device: device }),
            Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("others take every free loop device first"))
}

/// `struct loop_info64` (linux/loop.h).
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` (linux/loop.h).
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;

mod ioctl {
    #![allow(unsafe_code)]
    nix::ioctl_none_bad!(loop_ctl_get_free, 0x4c82);
    nix::ioctl_write_ptr_bad!(loop_configure, 0x4c0a, super::LoopConfig);
}

#[allow(unsafe_code)]
fn free(control: &OwnedFd) -> io::Result<i32> {
    // SAFETY: an ioctl without an argument.
    Ok(unsafe { ioctl::loop_ctl_get_free(control.as_raw_fd()) }?)
}

#[allow(unsafe_code)]
fn configure(device: &OwnedFd, image: &OwnedFd) -> io::Result<()> {
    let mut info = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: READ_ONLY | AUTOCLEAR,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    // For people who ask losetup.
    info.file_name[..6].copy_from_slice(b"diarch");
    let config = LoopConfig { fd: image.as_raw_fd().cast_unsigned(), block_size: 0, info, reserved: [0; 8] };
    // SAFETY: `config` has the layout that the kernel reads, and lives until the call returns.
    unsafe { ioctl::loop_configure(device.as_raw_fd(), &raw const config) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        assert_eq!((size_of::<LoopInfo>(), size_of::<LoopConfig>()), (232, 304));
    }

    #[test]
    fn an_image_is_known_by_its_superblock_and_a_short_file_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let begins = |kind, content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            begins_as(kind, &std::fs::File::open(&path).unwrap().into()).unwrap()
        };
        let mut erofs = vec![0; 1024];
        erofs.extend([0xe2, 0xe1, 0xf5, 0xe0]);
        assert!(begins(ImageType::Erofs, &erofs) && begins(ImageType::Squashfs, b"hsqs..."));
        for other in [&b""[..], b"hsq", b"sqsh", &erofs[..1027]] {
            assert!(!begins(ImageType::Erofs, other) && !begins(ImageType::Squashfs, other), "{other:?}");
        }
    }
}
