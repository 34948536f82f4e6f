//! `/dev/vfio/GROUP`: whoever opens it has the group. It is root's. While a VM has the group, one entry in its access list lets the VM's user open it, and nobody
//! else. (An access list, and not another owner: the owner of a file may change it without a capability, and root stays the owner.)

use crate::host::{Host, there};
use diarch_ipc::Error;
use rustix::fs::{FileType, Mode, OFlags, XattrFlags};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

const AGAIN: Duration = Duration::from_millis(1);
/// udev sets a new node's mode, some milliseconds after it appeared; an access list from before would be cut by it.
const UDEV_PATIENCE: Duration = Duration::from_secs(3);
const ACCESS_LIST: &str = "system.posix_acl_access";

/// The node of a group, below /dev.
fn name(group: u32) -> String {
    format!("vfio/{group}")
}

/// The nodes that a QEMU with these groups needs in its jail and in its control group's list, by their full names.
pub fn names(groups: impl IntoIterator<Item = u32>) -> Vec<String> {
    let mut names: Vec<String> = groups.into_iter().map(|group| format!("/dev/{}", name(group))).collect();
    if !names.is_empty() {
        names.insert(0, "/dev/vfio/vfio".into());
    }
    names
}

/// Waits for the node.
pub fn wait(host: &Host, group: u32, patience: Duration) -> Result<(), Error> {
    let failed = |error: io::Error| Error::io(format!("look at /dev/{}", name(group)), &error);
    let until = Instant::now() + patience;
    while there(open(host, group)).map_err(failed)?.is_none() {
        if Instant::now() >= until {
            let ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
            return Err(Error::Timeout { step: format!("/dev/{} to appear", name(group)), after_ms: ms });
        }
        std::thread::sleep(AGAIN);
    }
    Ok(())
}

/// Waits for udev to have seen the node. Most often it has: between a bind and a start there is time.
fn wait_for_udev(host: &Host, node: &OwnedFd) -> io::Result<()> {
    if host.is_staged() || !host.run().exists("udev/control")? {
        return Ok(());
    }
    let number = rustix::fs::fstat(node)?.st_rdev;
    let record = format!("udev/data/c{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    let until = Instant::now() + UDEV_PATIENCE;
    while !host.run().exists(&record)? && Instant::now() < until {
        std::thread::sleep(AGAIN);
    }
    Ok(())
}

/// The node itself, not opened: opening it is taking the group.
fn open(host: &Host, group: u32) -> io::Result<OwnedFd> {
    let node = host.dev().open(&name(group), OFlags::PATH | OFlags::NOFOLLOW)?;
    let found = FileType::from_raw_mode(rustix::fs::fstat(&node)?.st_mode);
    // On a stage nobody can make device nodes.
    let right = if host.is_staged() { FileType::RegularFile } else { FileType::CharacterDevice };
    if found == right { Ok(node) } else { Err(io::Error::other("it is no device node")) }
}

fn path(node: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", node.as_raw_fd())
}

/// Opens the group itself, which only one can: `EBUSY` while somebody has it.
pub fn take(host: &Host, group: u32) -> io::Result<OwnedFd> {
    open(host, group)?;
    host.dev().open(&name(group), OFlags::RDWR | OFlags::NOFOLLOW)
}

/// Its numbers, by which it is known under whatever name. `None`: there is no node.
pub fn number(host: &Host, group: u32) -> io::Result<Option<(u32, u32)>> {
    let Some(node) = there(open(host, group))? else { return Ok(None) };
    let number = rustix::fs::fstat(&node)?.st_rdev;
    Ok((!host.is_staged()).then(|| (rustix::fs::major(number), rustix::fs::minor(number))))
}

/// The node's mode, to go back to: what udev made it.
pub fn mode(host: &Host, group: u32) -> io::Result<u32> {
    let node = open(host, group)?;
    wait_for_udev(host, &node)?;
    Ok(rustix::fs::fstat(&node)?.st_mode & 0o7777)
}

/// Lets the user open it, beside its owner.
pub fn open_to(host: &Host, group: u32, mode: u32, uid: u32) -> io::Result<()> {
    let node = open(host, group)?;
    Ok(rustix::fs::setxattr(path(&node), ACCESS_LIST, &access_list(mode, uid), XattrFlags::empty())?)
}

/// As it was before. A node that is gone needs nothing.
pub fn close(host: &Host, group: u32, mode: u32) -> io::Result<()> {
    let Some(node) = there(open(host, group))? else { return Ok(()) };
    match rustix::fs::removexattr(path(&node), ACCESS_LIST) {
        Ok(()) | Err(rustix::io::Errno::NODATA) => {}
        Err(error) => return Err(error.into()),
    }
    // The list's mask has become the mode of the group.
    Ok(rustix::fs::chmod(path(&node), Mode::from_raw_mode(mode))?)
}

/// linux/posix_acl_xattr.h: a version, and entries of tag, rights and id, in the order of their tags.
fn access_list(mode: u32, uid: u32) -> Vec<u8> {
    const VERSION: u32 = 2;
    const NOBODY: u32 = u32::MAX;
    const READ_WRITE: u16 = 6;
    let rights = |shift: u32| u16::try_from(mode >> shift & 7).unwrap_or(0);
    let (owner, user, group, mask, other) = (0x01_u16, 0x02_u16, 0x04_u16, 0x10_u16, 0x20_u16);
    let mut list = VERSION.to_le_bytes().to_vec();
    for (tag, rights, id) in
        [(owner, rights(6), NOBODY), (user, READ_WRITE, uid), (group, rights(3), NOBODY), (mask, READ_WRITE | rights(3), NOBODY), (other, rights(0), NOBODY)]
    {
        list.extend(tag.to_le_bytes());
        list.extend(rights.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_node_is_opened_to_one_user_and_closed_again_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("dev/vfio")).unwrap();
        let at = dir.path().join("dev/vfio/12");
        std::fs::write(&at, "").unwrap();
        std::fs::set_permissions(&at, std::fs::Permissions::from_mode(0o600)).unwrap();
        let host = Host::staged(dir.path());
        wait(&host, 12, Duration::ZERO).unwrap();
        let before = mode(&host, 12).unwrap();
        open_to(&host, 12, before, 200_007).unwrap();
        let mut list = [0u8; 64];
        let got = rustix::fs::getxattr(&at, ACCESS_LIST, &mut list).unwrap();
        assert_eq!(&list[..got], access_list(0o600, 200_007));
        assert_eq!(std::fs::metadata(&at).unwrap().permissions().mode() & 0o007, 0, "nobody else gained a right");
        open_to(&host, 12, before, 200_008).unwrap();
        close(&host, 12, before).unwrap();
        close(&host, 12, before).unwrap();
        assert_eq!(rustix::fs::getxattr(&at, ACCESS_LIST, &mut list).unwrap_err(), rustix::io::Errno::NODATA);
        assert_eq!(std::fs::metadata(&at).unwrap().permissions().mode() & 0o7777, 0o600);
        close(&host, 13, before).unwrap();
        assert_eq!(wait(&host, 13, Duration::from_millis(5)).unwrap_err().kind(), "timeout");
    }

    #[test]
    fn a_jail_gets_the_container_and_its_own_groups_and_nothing_without_a_device() {
        assert_eq!(names([12, 14]), ["/dev/vfio/vfio", "/dev/vfio/12", "/dev/vfio/14"]);
        assert!(names([]).is_empty());
    }
}
