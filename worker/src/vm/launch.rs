//! From a desired machine to what `vm.spawn` takes: files opened with the worker's own rights, and a typed specification.

use crate::journal::Journal;
use crate::logs::Logs;
use crate::supervisor::{Link, describe};
use crate::vmfile::{Accel, Machine};
use diarch_ipc::name::Label;
use diarch_ipc::operation::KvmVerdict;
use diarch_ipc::spec::{Accelerator, Backend, Boot, Disk, DiskAccess, Nic, Presence, Share, VmSpec};
use rustix::fs::{FileType, Mode, OFlags};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The probe's guest runs for some milliseconds; one that hangs is given up by the supervisor long before.
const KVM_PROBE: Duration = Duration::from_secs(10);

/// The opened files of one start, in the order of [`VmSpec::fds`].
#[derive(Debug)]
pub struct Opened {
    pub fds: Vec<OwnedFd>,
    pub log_mark: u64,
}

/// Opens the logs and all that the machine names. Blocks: a network file system can take its time.
pub fn open(logs: &Logs, name: &Label, machine: &Machine) -> Result<Opened, String> {
    let opened = logs.append(name).map_err(|error| format!("its logs can't be opened: {error}"))?;
    let mut fds = vec![opened.qemu, opened.console];
    fds.extend(files(machine)?);
    Ok(Opened { fds, log_mark: opened.mark })
}

/// All that the machine names, opened as its QEMU gets it.
pub fn files(machine: &Machine) -> Result<Vec<OwnedFd>, String> {
    let mut fds = Vec::new();
    for (what, path) in [("kernel", &machine.kernel), ("initrd", &machine.initrd), ("firmware", &machine.firmware)] {
        if let Some(path) = path {
            fds.push(readable_by_qemu(what, path, file(what, path, OFlags::RDONLY, Accept::Regular)?)?);
        }
    }
    for disk in &machine.disks {
        let access = match disk.access {
            DiskAccess::ReadOnly => OFlags::RDONLY,
            DiskAccess::ReadWrite => OFlags::RDWR,
        };
        fds.push(file("disk", &disk.path, access, Accept::RegularOrBlock)?);
    }
    Ok(fds)
}

/// A kernel, initial RAM disk or firmware that is not world-readable and larger than this is a mistake.
const MAX_COPY: u64 = 256 << 20;

/// QEMU's user opens these three again (through `/proc/self/fd`). Where the file's mode doesn't let it, it gets a sealed copy in memory: we may read it, and so
/// may give it away. The copy lives as long as the VM, on the worker's account.
fn readable_by_qemu(what: &str, path: &Path, fd: OwnedFd) -> Result<OwnedFd, String> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, memfd_create, sendfile};
    let failed = |error: rustix::io::Errno| format!("{what} {}: {}", path.display(), std::io::Error::from(error));
    let stat = fstat(&fd).map_err(failed)?;
    if stat.st_mode & 0o004 != 0 {
        return Ok(fd);
    }
    if u64::try_from(stat.st_size).unwrap_or(u64::MAX) > MAX_COPY {
        return Err(format!("{what} {}: is not world-readable, and too large to be copied (over {} MiB)", path.display(), MAX_COPY >> 20));
    }
    let copy = memfd_create(what, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(failed)?;
    let mut offset = 0;
    while offset <= MAX_COPY && sendfile(&copy, &fd, Some(&mut offset), 1 << 20).map_err(failed)? > 0 {}
    fcntl_add_seals(&copy, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL).map_err(failed)?;
    // A second, read-only description of the same file: the first one could be written but for its seals.
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&copy));
    rustix::fs::open(link, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Accept {
    Regular,
    RegularOrBlock,
}

fn file(what: &str, path: &Path, access: OFlags, accept: Accept) -> Result<OwnedFd, String> {
    let failed = |error: rustix::io::Errno| {
        let advice = if error == rustix::io::Errno::ROFS { read_only(path) } else { String::new() };
        format!("{what} {}: {}{advice}", path.display(), std::io::Error::from(error))
    };
    // O_NONBLOCK: a FIFO in a disk's place must not hold the worker up. Taken off again for QEMU.
    let fd = rustix::fs::open(path, access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty()).map_err(failed)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd).map_err(failed)?.st_mode);
    if kind != FileType::RegularFile && !(accept == Accept::RegularOrBlock && kind == FileType::BlockDevice) {
        let wanted = if accept == Accept::Regular { "a regular file" } else { "a regular file or a block device" };
        return Err(format!("{what} {}: is not {wanted}", path.display()));
    }
    rustix::fs::fcntl_setfl(&fd, access).map_err(failed)?;
    Ok(fd)
}

/// The unit shows the worker all but its own directories read-only, and from in here that looks like a file system that is.
fn read_only(path: &Path) -> String {
    let directory = path.parent().unwrap_or(Path::new("/")).display();
    format!(
        ". If the file system itself can be written, it is the worker's unit that forbids it: 'systemctl edit diarch-worker', the lines '[Service]' and \
         'ReadWritePaths={directory}', then 'systemctl restart diarch-worker' (the VMs run on). A guest that only reads needs \"disk_access\": \"read-only\""
    )
}

/// What `vm.spawn` is asked.
pub fn spec(machine: &Machine, accelerator: Accelerator) -> VmSpec {
    let presence = |given: bool| if given { Presence::Given } else { Presence::Absent };
    let firmware = presence(machine.firmware.is_some());
    let boot = match machine.kernel {
        Some(_) => Boot::Kernel { command_line: machine.command_line.clone(), initrd: presence(machine.initrd.is_some()), firmware },
        None => Boot::Disk { firmware },
    };
    let backend = match &machine.tap {
        Some(tap) => Backend::Tap { queues: tap.queues },
        None => Backend::User { egress: machine.egress, forwards: machine.forwards.clone() },
    };
    VmSpec {
        qemu: machine.qemu.clone(),
        accelerator,
        cpus: machine.cpus,
        memory: machine.memory,
        boot,
        disks: machine.disks.iter().map(|disk| Disk { format: disk.format, access: disk.access }).collect(),
        nics: vec![Nic { mac: machine.mac.clone(), backend }],
        devices: machine.devices.clone(),
        shares: machine.shares.iter().map(|share| Share { share: share.share.clone(), tag: share.tag.clone() }).collect(),
    }
}

/// Says once for the whole worker that guests run without KVM.
#[derive(Debug, Default)]
pub struct TcgWarning {
    said: AtomicBool,
}

/// KVM only where a guest was seen to run on it (a `/dev/kvm` that opens may still lie).
pub async fn accelerator(accel: Accel, link: &Link, journal: &Journal, warning: &TcgWarning) -> Result<Accelerator, String> {
    if accel == Accel::Tcg {
        return Ok(Accelerator::Tcg);
    }
    let verdict = link.kvm(KVM_PROBE).await;
    match (accel, &verdict) {
        (_, KvmVerdict::Usable) => Ok(Accelerator::Kvm),
        (Accel::Kvm, _) => Err(format!("accel is kvm, and KVM is {}", describe(&verdict))),
        (Accel::Auto | Accel::Tcg, _) => {
            if !warning.said.swap(true, Ordering::Relaxed) {
                journal.warn("host.tcg", format!("VMs with accel auto run under TCG, many times slower. KVM is {}", describe(&verdict)));
            }
            Ok(Accelerator::Tcg)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmfile::DiskFile;
    use crate::vmfile::tests::desired;
    use diarch_ipc::spec::DiskFormat;

    #[test]
    fn the_opened_files_fit_the_roles_of_the_specification() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, name).unwrap();
            path
        };
        let mut machine = desired("a").machine;
        machine.kernel = Some(path("kernel"));
        machine.initrd = Some(path("initrd"));
        machine.firmware = Some(path("firmware"));
        machine.disks = vec![DiskFile { path: path("disk"), format: DiskFormat::Raw, access: DiskAccess::ReadOnly }];
        let logs = Logs::open(&dir.path().join("logs")).unwrap();
        let opened = open(&logs, &desired("a").name, &machine).unwrap();
        let roles: Vec<&str> = spec(&machine, Accelerator::Tcg).fds().iter().map(|role| role.name).collect();
        assert_eq!(roles, ["log", "console", "kernel", "initrd", "firmware", "disk"]);
        for (fd, role) in opened.fds.iter().zip(roles).skip(2) {
            let mut bytes = [0; 16];
            let got = rustix::io::read(fd, &mut bytes).unwrap();
            assert_eq!(&bytes[..got], role.as_bytes());
        }
    }

    #[test]
    fn a_kernel_that_is_not_world_readable_is_handed_on_as_a_sealed_copy() {
        use std::io::Read;
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        std::fs::write(&path, "vmlinuz").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let opened = || file("kernel", &path, OFlags::RDONLY, Accept::Regular).unwrap();
        let copy = readable_by_qemu("kernel", &path, opened()).unwrap();
        let stat = rustix::fs::fstat(&copy).unwrap();
        assert_eq!(stat.st_mode & 0o004, 0o004);
        let mut text = String::new();
        std::fs::File::from(copy).read_to_string(&mut text).unwrap();
        assert_eq!(text, "vmlinuz");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let same = readable_by_qemu("kernel", &path, opened()).unwrap();
        assert_ne!(rustix::fs::fstat(&same).unwrap().st_ino, stat.st_ino);
    }

    #[test]
    fn a_disk_that_the_unit_shows_read_only_says_what_to_do() {
        let sentence = read_only(Path::new("/srv/guests/db.qcow2"));
        for part in ["systemctl edit diarch-worker", "ReadWritePaths=/srv/guests'", "restart diarch-worker"] {
            assert!(sentence.contains(part), "{sentence}");
        }
    }

    #[test]
    fn a_missing_kernel_and_a_fifo_get_a_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path()).unwrap();
        let mut machine = desired("a").machine;
        machine.kernel = Some(dir.path().join("none"));
        assert!(open(&logs, &desired("a").name, &machine).unwrap_err().contains("No such file"));
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::RUSR).unwrap();
        machine.kernel = Some(fifo);
        assert!(open(&logs, &desired("a").name, &machine).unwrap_err().ends_with("is not a regular file"));
    }
}
