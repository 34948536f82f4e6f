//! `/dev/iommu`, and each function's own node `/dev/vfio/devices/vfioN` (Linux 6.6, where it is configured): opened here, and handed to QEMU as descriptors.
//!
//! It is the narrower way into a VM. By a group's node a QEMU has every function of the group, and must be able to open that node: an access list, a device in its
//! control group's list, a node in its jail. A descriptor is one function, already open, and needs none of these; nor anything of sysfs.
//!
//! The kernel's own module has what the group's way has not: pages are counted for the user, and not for the process. And it lacks something: one device's memory
//! can't be mapped for another's access (peer to peer), so root may want the group's way (`devices.iommufd`).

use super::attach::Passed;
use crate::host::{Host, there};
use diarch_ipc::Error;
use rustix::fs::{FileType, OFlags};
use std::io;
use std::os::fd::OwnedFd;

/// What a QEMU is given instead of nodes.
#[derive(Debug)]
pub struct Descriptors {
    /// A context of its own: no other process has it.
    pub iommu: OwnedFd,
    /// For each function, in their order.
    pub devices: Vec<OwnedFd>,
}

/// A function's own node.
#[derive(Debug, PartialEq, Eq)]
struct Node {
    /// Below `/dev`.
    name: String,
    number: (u32, u32),
}

/// Whether this kernel has it, for all of these functions.
pub fn offered(host: &Host, passed: &[Passed]) -> Result<bool, Error> {
    Ok(nodes(host, passed)?.is_some())
}

/// Opens them. `None`: this kernel has no such thing, or the supervisor may not open it; then the group's node is the way.
pub fn open(host: &Host, passed: &[Passed]) -> Result<Option<Descriptors>, Error> {
    let Some((iommu, nodes)) = nodes(host, passed)? else { return Ok(None) };
    let mut opened = Vec::with_capacity(nodes.len() + 1);
    for node in [&iommu].into_iter().chain(&nodes) {
        match open_node(host, node) {
            Ok(fd) => opened.push(fd),
            // The unit's DeviceAllow= knows a node that was there when the unit started.
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EPERM | nix::libc::EACCES | nix::libc::ENOENT)) => {
                tracing::warn!(node = node.name, %error, "devices go by their groups' nodes: load vfio-pci before diarch-supervisor.service starts");
                return Ok(None);
            }
            Err(error) => return Err(Error::io(format!("open /dev/{}", node.name), &error)),
        }
    }
    let mut opened = opened.into_iter();
    Ok(opened.next().map(|iommu| Descriptors { iommu, devices: opened.collect() }))
}

/// `/dev/iommu`, and the functions' nodes, as sysfs names them.
fn nodes(host: &Host, passed: &[Passed]) -> Result<Option<(Node, Vec<Node>)>, Error> {
    let look = || {
        let Some(iommu) = node(host, "class/misc/iommu", "iommu".into())? else { return Ok(None) };
        let mut nodes = Vec::with_capacity(passed.len());
        for function in passed {
            let at = format!("{}/vfio-dev", function.path);
            let names = there(host.sysfs().names(&at))?.unwrap_or_default();
            let Some(name) = names.into_iter().find(|name| is_node(name)) else { return Ok(None) };
            let Some(found) = node(host, &format!("{at}/{name}"), format!("vfio/devices/{name}"))? else { return Ok(None) };
            nodes.push(found);
        }
        Ok(Some((iommu, nodes)))
    };
    look().map_err(|error: io::Error| Error::io("look for the devices' own nodes", &error))
}

/// `vfio` and a number: it becomes part of a path.
fn is_node(name: &str) -> bool {
    name.strip_prefix("vfio").is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn node(host: &Host, at: &str, name: String) -> io::Result<Option<Node>> {
    let Some(text) = there(host.sysfs().text(&format!("{at}/dev")))? else { return Ok(None) };
    let number = text.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    match number {
        Some(number) if host.dev().exists(&name)? => Ok(Some(Node { name, number })),
        Some(_) => Ok(None),
        None => Err(io::Error::other(format!("{at}/dev holds {text:?}"))),
    }
}

/// What is opened is the very device that sysfs speaks of, and not what else may stand at that name.
fn open_node(host: &Host, node: &Node) -> io::Result<OwnedFd> {
    let held = host.dev().open(&node.name, OFlags::PATH | OFlags::NOFOLLOW)?;
    recognise(host, &held, node)?;
    let opened = host.dev().open(&node.name, OFlags::RDWR | OFlags::NOFOLLOW)?;
    recognise(host, &opened, node)?;
    Ok(opened)
}

fn recognise(host: &Host, fd: &OwnedFd, node: &Node) -> io::Result<()> {
    let stat = rustix::fs::fstat(fd)?;
    let found = FileType::from_raw_mode(stat.st_mode);
    // On a stage nobody can make device nodes.
    if host.is_staged() {
        return if found == FileType::RegularFile { Ok(()) } else { Err(io::Error::other("it is no file of the stage")) };
    }
    let number = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    if found == FileType::CharacterDevice && number == node.number {
        return Ok(());
    }
    let (major, minor) = node.number;
    Err(io::Error::other(format!("it is not the device {major}:{minor} that sysfs speaks of, but {found:?} {}:{}", number.0, number.1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::name::Bdf;
    use std::path::Path;

    const PATH: &str = "devices/pci0000:00/0000:01:00.0";

    fn put(root: &Path, name: &str, text: &str) {
        let at = root.join(name);
        std::fs::create_dir_all(at.parent().unwrap()).unwrap();
        std::fs::write(at, text).unwrap();
    }
    fn passed() -> Vec<Passed> {
        vec![Passed { function: Bdf::new("0000:01:00.0").unwrap(), group: 12, path: PATH.into(), mmio_mib: 1 }]
    }

    #[test]
    fn it_is_offered_where_the_kernel_shows_all_of_it_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let parts = [
            ("sys/class/misc/iommu/dev".to_owned(), "10:259\n"),
            ("dev/iommu".to_owned(), ""),
            (format!("sys/{PATH}/vfio-dev/vfio3/dev"), "511:3\n"),
            ("dev/vfio/devices/vfio3".to_owned(), ""),
        ];
        for (name, text) in &parts {
            put(dir.path(), name, text);
        }
        let host = Host::staged(dir.path());
        assert!(offered(&host, &passed()).unwrap());
        assert_eq!(open(&host, &passed()).unwrap().unwrap().devices.len(), 1);
        for (name, text) in &parts {
            std::fs::remove_file(dir.path().join(name)).unwrap();
            assert!(!offered(&host, &passed()).unwrap(), "without {name}");
            put(dir.path(), name, text);
        }
        put(dir.path(), &parts[2].0, "what\n");
        assert!(offered(&host, &passed()).unwrap_err().to_string().contains("own nodes"), "what can't be read is not taken for nothing");
    }

    #[test]
    fn a_name_that_could_lead_elsewhere_is_no_node() {
        assert!(is_node("vfio0") && is_node("vfio12"));
        for name in ["vfio", "vfio/0", "vfio0/..", "..", "vfio-1", "vfio0x"] {
            assert!(!is_node(name), "{name}");
        }
    }

    #[test]
    fn what_is_opened_has_the_number_that_sysfs_names() {
        let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        let node = |number| Node { name: "null".into(), number };
        recognise(&Host::real(), &null, &node((1, 3))).unwrap();
        let error = recognise(&Host::real(), &null, &node((511, 0))).unwrap_err();
        assert!(error.to_string().contains("511:0") && error.to_string().contains("1:3"), "{error}");
        let file: OwnedFd = std::fs::File::open("/proc/self/status").unwrap().into();
        recognise(&Host::real(), &file, &node((1, 3))).unwrap_err();
    }
}
