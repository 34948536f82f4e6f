//! The interrogation of file descriptors that come from the worker: before anything is done with one, it must be what its role says
//! (THREATS 5).

use diarch_ipc::Error;
use diarch_ipc::spec::{FdAccess, FdKind, FdRole};
use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags, fcntl_getfl, statx};
use std::os::fd::OwnedFd;

/// Checks one descriptor against its role. `index` is its place in the frame, for the sentence.
pub fn interrogate(fd: &OwnedFd, role: FdRole, index: usize) -> Result<(), Error> {
    let field = || format!("fds[{index}] ({})", role.name);
    let flags = fcntl_getfl(fd).map_err(|error| Error::io(field(), &error.into()))?;
    if flags.contains(OFlags::PATH) {
        return Err(Error::invalid(field(), "it was opened with O_PATH, which gives no right to the content"));
    }
    // Without asking the file system anew: a mute one (FUSE, NFS) must not hold a helper thread.
    let flags_at = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = statx(fd, c"", flags_at, StatxFlags::TYPE | StatxFlags::MODE).map_err(|error| Error::io(field(), &error.into()))?;
    let found = FileType::from_raw_mode(stat.stx_mode.into());
    let right_kind = match role.kind {
        FdKind::RegularFile => found == FileType::RegularFile,
        FdKind::RegularFileOrBlockDevice => matches!(found, FileType::RegularFile | FileType::BlockDevice),
    };
    if !right_kind {
        return Err(Error::invalid(field(), format!("it is a {}, and a {} is needed", kind_word(found), role_word(role.kind))));
    }
    // These three are opened again by QEMU's user, through /proc/self/fd.
    if matches!(role.name, "kernel" | "initrd" | "firmware") && stat.stx_mode & 0o004 == 0 {
        return Err(Error::invalid(field(), "QEMU's user can't read it: make the file world-readable, or send a copy in a sealed memfd"));
    }
    let mode = flags & OFlags::RWMODE;
    let (right_access, needed) = match role.access {
        FdAccess::Append => (mode == OFlags::WRONLY && flags.contains(OFlags::APPEND), "write-only and append-only"),
        FdAccess::ReadOnly => (mode == OFlags::RDONLY, "read-only"),
        FdAccess::ReadWrite => (mode == OFlags::RDWR, "read-write"),
    };
    if !right_access {
        return Err(Error::invalid(field(), format!("it must be opened {needed}")));
    }
    Ok(())
}

/// Refuses a qcow2 image whose content lies in another file, which its header names by a path: QEMU would open that (a backing file it is told not to open).
/// Protects from whoever made the image; a worker that changes the header later gains what QEMU's user may open.
pub fn no_external_data(fd: &OwnedFd, index: usize) -> Result<(), Error> {
    // The header, qemu docs/interop/qcow2.txt: magic, version at 4, and from version 3 on incompatible features at 72, of which bit 2 is
    // "external data file".
    let mut header = [0u8; 80];
    let got = rustix::io::pread(fd, &mut header, 0).map_err(|error| Error::io(format!("read fds[{index}] (disk)"), &error.into()))?;
    if got < header.len() || header[..4] != *b"QFI\xfb" {
        return Err(Error::invalid(format!("fds[{index}] (disk)"), "it is not a qcow2 image"));
    }
    let version = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    if version >= 3 && header[79] & 4 != 0 {
        return Err(Error::invalid(
            format!("fds[{index}] (disk)"),
            "the qcow2 image keeps its data in another file, named by its header; convert it (qemu-img convert)",
        ));
    }
    Ok(())
}

fn kind_word(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "regular file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Unknown => "kind of file without a name",
    }
}

fn role_word(kind: FdKind) -> &'static str {
    match kind {
        FdKind::RegularFile => "regular file",
        FdKind::RegularFileOrBlockDevice => "regular file or block device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::spec;
    use std::fs::{File, OpenOptions};
    use std::os::unix::fs::OpenOptionsExt;

    fn refused(fd: impl Into<OwnedFd>, role: FdRole) -> String {
        interrogate(&fd.into(), role, 3).unwrap_err().to_string()
    }

    #[test]
    fn each_role_takes_exactly_its_kind_and_access() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o604)).unwrap();
        let log = OpenOptions::new().append(true).create(true).open(&path).unwrap();
        interrogate(&log.into(), spec::LOG, 0).unwrap();
        let ro = || File::open(&path).unwrap();
        let rw = || OpenOptions::new().read(true).write(true).open(&path).unwrap();
        interrogate(&ro().into(), spec::KERNEL, 0).unwrap();
        interrogate(&rw().into(), spec::DISK_READ_WRITE, 0).unwrap();
        assert!(refused(rw(), spec::KERNEL).contains("fds[3] (kernel): it must be opened read-only"));
        assert!(refused(ro(), spec::DISK_READ_WRITE).contains("read-write"));
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        assert!(refused(ro(), spec::KERNEL).contains("world-readable"));
        assert!(refused(OpenOptions::new().write(true).open(&path).unwrap(), spec::LOG).contains("append-only"));
    }

    #[test]
    fn a_qcow2_image_with_its_data_elsewhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let image = |version: u8, features: u8| {
            let mut header = vec![0u8; 104];
            header[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]);
            header[79] = features;
            std::fs::write(&path, header).unwrap();
            no_external_data(&File::open(&path).unwrap().into(), 2)
        };
        image(3, 1).unwrap();
        image(2, 4).unwrap();
        assert!(image(3, 4).unwrap_err().to_string().contains("another file"));
        std::fs::write(&path, "raw").unwrap();
        assert!(no_external_data(&File::open(&path).unwrap().into(), 2).unwrap_err().to_string().contains("not a qcow2 image"));
    }

    #[test]
    fn a_directory_a_pipe_a_device_and_an_o_path_descriptor_are_refused() {
        assert!(refused(File::open("/").unwrap(), spec::KERNEL).contains("directory"));
        assert!(refused(File::open("/dev/zero").unwrap(), spec::KERNEL).contains("character device"));
        assert!(refused(std::io::pipe().unwrap().0, spec::INITRD).contains("pipe"));
        let path = OpenOptions::new().read(true).custom_flags(nix::libc::O_PATH).open("/etc/passwd").unwrap();
        assert!(refused(path, spec::KERNEL).contains("O_PATH"));
    }
}
