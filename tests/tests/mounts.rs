//! Mounts of VMs, on this kernel: that they are what the grants say, have the flags that they must have, show nowhere, and survive what they should.
//!
//! A mount hangs from a descriptor of the supervisor's, of which root can have a copy (pidfd_getfd): so each test looks through the very mount.

use diarch_ipc::Error;
use diarch_ipc::frame::Outcome;
use diarch_ipc::name::{Label, ShareName, SocketName, Tenancy};
use diarch_ipc::operation::{AttachMount, Claim, ConnectSocket, DetachMount, MountDetached, Release, Reply, Request};
use diarch_ipc::spec::DiskAccess::{self, ReadOnly, ReadWrite};
use diarch_tests::host::{Host, WORKER, assert_same};
use diarch_tests::machine::{Machine, SUPERVISOR};
use diarch_tests::need;
use diarch_tests::puppet::{self, Puppet};
use diarch_tests::stand_in::{Ask, Unit};
use diarch_tests::stepper::{Outcome as Stepped, kill_at_syscall};
use diarch_tests::wire::{Raw, User, as_user};
use rustix::fs::{AtFlags, Mode, OFlags, StatVfsMountFlags, fstatvfs, openat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A host with something to mount: directories with a file each, a small tmpfs, images.
struct Granted {
    host: Host,
    /// Root's, like every directory above it.
    at: tempfile::TempDir,
}

fn granted() -> Granted {
    granted_with(|_| String::new())
}

fn granted_with(more: impl FnOnce(&Path) -> String) -> Granted {
    let at = tempfile::Builder::new().prefix("diarch-mounts-").tempdir().unwrap();
    fs::set_permissions(at.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["models", "work"] {
        fs::create_dir(at.path().join(name)).unwrap();
        fs::write(at.path().join(name).join("file"), format!("in {name}\n")).unwrap();
    }
    let path = at.path().display();
    let mut lines = format!(
        "[mounts.models]\ndirectory = \"{path}/models\"\n[mounts.work]\ndirectory = \"{path}/work\"\nwrite = true\n[mounts.secrets]\ntmpfs_mib = 1\n\
         [mounts.scratch]\ntmpfs_mib = 1\nwrite = true\n[limits]\nensure_per_second = 100000\nensure_burst = 100000\n"
    );
    lines += &more(at.path());
    let host = Host::builder().without_worker().grants(&lines).start();
    Granted { host, at }
}

impl Granted {
    fn held(&self) -> Vec<OwnedFd> {
        held(self.host.supervisor_pid())
    }

    fn only(&self) -> OwnedFd {
        let mut held = self.held();
        assert_eq!(held.len(), 1);
        held.remove(0)
    }

    fn stored(&self) -> Vec<String> {
        self.host.manager().unit(Unit::Supervisor).stored
    }
}

/// The mounts that a supervisor holds: directories that it opened with `O_PATH` and that are the root of all that is above them.
fn held(supervisor: i32) -> Vec<OwnedFd> {
    let pidfd = pidfd_open(Pid::from_raw(supervisor).unwrap(), PidfdFlags::empty()).unwrap();
    let fds = fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap().flatten();
    let roots = fds.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/")));
    let copies = roots.filter_map(|fd| pidfd_getfd(&pidfd, fd.file_name().to_str()?.parse().ok()?, PidfdGetfdFlags::empty()).ok());
    copies.filter(|fd| rustix::fs::fcntl_getfl(fd).is_ok_and(|flags| flags.contains(OFlags::PATH))).collect()
}

fn claim(raw: &mut Raw, label: &str) -> Tenancy {
    match raw.ask(Request::VmClaim(Claim { label: Label::new(label).unwrap() }), &[]) {
        Ok((Outcome::Ok(Reply::VmClaim(claimed)), _)) => claimed.tenancy,
        other => panic!("vm.claim: {other:?}"),
    }
}

fn attach(raw: &mut Raw, tenancy: Tenancy, share: &str, access: DiskAccess) -> Result<Option<OwnedFd>, Error> {
    match raw.ask(Request::MountAttach(AttachMount { tenancy, share: ShareName::new(share).unwrap(), access }), &[]) {
        Ok((Outcome::Ok(Reply::MountAttach(_)), mut fds)) => {
            assert!(fds.len() <= 1);
            Ok(fds.pop())
        }
        Ok((Outcome::Error(error), fds)) => {
            assert!(fds.is_empty());
            Err(error)
        }
        other => panic!("mount.attach: {other:?}"),
    }
}

fn detach(raw: &mut Raw, tenancy: Tenancy, share: &str) -> Result<bool, Error> {
    match raw.ask(Request::MountDetach(DetachMount { tenancy, share: ShareName::new(share).unwrap() }), &[]) {
        Ok((Outcome::Ok(Reply::MountDetach(MountDetached { existed })), _)) => Ok(existed),
        Ok((Outcome::Error(error), _)) => Err(error),
        other => panic!("mount.detach: {other:?}"),
    }
}

fn release(raw: &mut Raw, tenancy: Tenancy) {
    match raw.ask(Request::VmRelease(Release { tenancy }), &[]) {
        Ok((Outcome::Ok(Reply::VmRelease(_)), _)) => {}
        other => panic!("vm.release: {other:?}"),
    }
}

fn at(mount: &OwnedFd, name: &str, flags: OFlags) -> Result<fs::File, Errno> {
    openat(mount, name, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o640)).map(fs::File::from)
}

fn text(mount: &OwnedFd, name: &str) -> String {
    let mut text = String::new();
    at(mount, name, OFlags::RDONLY).unwrap().read_to_string(&mut text).unwrap();
    text
}

fn mountinfo(of: impl std::fmt::Display) -> String {
    fs::read_to_string(format!("/proc/{of}/mountinfo")).unwrap()
}

fn flags(mount: &OwnedFd) -> StatVfsMountFlags {
    fstatvfs(mount).unwrap().f_flag
}

const ALWAYS: [(&str, StatVfsMountFlags); 3] =
    [("nosuid", StatVfsMountFlags::NOSUID), ("nodev", StatVfsMountFlags::NODEV), ("noexec", StatVfsMountFlags::NOEXEC)];

// ---- what a mount is ----

#[test]
fn a_mount_shows_nowhere_and_leaves_nothing() {
    need!(Root, Kernel(6, 5));
    let granted = granted();
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    let supervisor = granted.host.supervisor_pid();
    let (before, ours, theirs) = (granted.host.inventory(), mountinfo("self"), mountinfo(supervisor));
    for (share, access) in [("models", ReadOnly), ("work", ReadWrite), ("secrets", ReadOnly), ("scratch", ReadWrite)] {
        attach(&mut raw, tenancy, share, access).unwrap();
    }
    assert_eq!(granted.held().len(), 4);
    assert_eq!((mountinfo("self"), mountinfo(supervisor)), (ours.clone(), theirs.clone()), "no tree of directories has it, not even the supervisor's");
    for share in ["models", "work", "secrets", "scratch"] {
        assert_eq!(detach(&mut raw, tenancy, share), Ok(true));
        assert_eq!(detach(&mut raw, tenancy, share), Ok(false), "again");
    }
    assert_eq!((mountinfo("self"), mountinfo(supervisor)), (ours, theirs));
    assert_same(&before, &granted.host);
    assert!(granted.stored().is_empty());
}

#[test]
fn a_thousand_mounts_cost_no_descriptor() {
    need!(Root, Kernel(6, 5));
    let granted = granted();
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    let mut round = |share: &str, access| {
        let root = attach(&mut raw, tenancy, share, access).unwrap();
        assert_eq!(root.is_some(), share == "scratch", "only what the worker fills is given to it");
        assert_eq!(detach(&mut raw, tenancy, share), Ok(true));
    };
    round("scratch", ReadWrite);
    let before = granted.host.inventory();
    for n in 0..1000 {
        let (share, access) = if n % 2 == 0 { ("models", ReadOnly) } else { ("scratch", ReadWrite) };
        round(share, access);
    }
    assert_same(&before, &granted.host);
}

#[test]
fn set_id_bits_devices_execution_and_links_do_not_count_in_any_mount() {
    need!(Root, Kernel(6, 5), Images);
    let granted = granted_with(images);
    let work = granted.at.path().join("work");
    let program = |to: &Path| {
        fs::copy("/bin/true", to).unwrap();
        fs::set_permissions(to, fs::Permissions::from_mode(0o4755)).unwrap();
    };
    let tricks = |dir: &Path| {
        program(&dir.join("suid"));
        let (kind, null) = (rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(1, 3));
        rustix::fs::mknodat(rustix::fs::CWD, dir.join("null"), kind, Mode::from_raw_mode(0o666), null).unwrap();
        symlink("file", dir.join("link")).unwrap();
    };
    tricks(&work);
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    for (share, access) in [("work", ReadWrite), ("work", ReadOnly), ("scratch", ReadWrite), ("erofs", ReadOnly), ("squashfs", ReadOnly)] {
        let root = attach(&mut raw, tenancy, share, access).unwrap();
        let mount = granted.only();
        if let Some(root) = root {
            // The test is root, with every right: a worker can't make nodes at all.
            let inside = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&root)));
            fs::write(inside.join("file"), "in scratch\n").unwrap();
            tricks(&inside);
        }
        for (name, flag) in ALWAYS {
            assert!(flags(&mount).contains(flag), "{share} is not {name}");
        }
        assert_eq!(flags(&mount).contains(StatVfsMountFlags::RDONLY), access == ReadOnly, "{share}");
        // Not by its flags alone: the kernel refuses the deeds.
        let inside = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&mount));
        let run = Command::new(format!("{inside}/suid")).status();
        assert_eq!(run.unwrap_err().raw_os_error(), Some(nix::libc::EACCES), "{share}: execution");
        assert_eq!(at(&mount, "null", OFlags::RDONLY).unwrap_err(), Errno::ACCESS, "{share}: a device");
        assert_eq!(at(&mount, "link", OFlags::RDONLY).unwrap_err(), Errno::LOOP, "{share}: a link");
        assert!(text(&mount, "file").starts_with("in "), "{share}: and what is meant to be read is");
        assert_eq!(detach(&mut raw, tenancy, share), Ok(true));
    }
    // The same files, from the host's own tree: without the mount they do count.
    assert!(Command::new(work.join("suid")).status().unwrap().success());
}

#[test]
fn read_only_is_read_only_and_read_write_writes() {
    need!(Root, Kernel(6, 5));
    let granted = granted();
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    for share in ["models", "work"] {
        attach(&mut raw, tenancy, share, ReadOnly).unwrap();
        let mount = granted.only();
        for flags in [OFlags::WRONLY, OFlags::WRONLY | OFlags::TRUNC, OFlags::RDWR] {
            assert_eq!(at(&mount, "file", flags).unwrap_err(), Errno::ROFS);
        }
        assert_eq!(at(&mount, "new", OFlags::WRONLY | OFlags::CREATE).unwrap_err(), Errno::ROFS);
        assert_eq!(rustix::fs::unlinkat(&mount, "file", AtFlags::empty()).unwrap_err(), Errno::ROFS);
        assert_eq!(rustix::fs::chmodat(&mount, "file", Mode::empty(), AtFlags::empty()).unwrap_err(), Errno::ROFS);
        assert_eq!(text(&mount, "file"), format!("in {share}\n"));
        detach(&mut raw, tenancy, share).unwrap();
    }
    attach(&mut raw, tenancy, "work", ReadWrite).unwrap();
    at(&granted.only(), "new", OFlags::WRONLY | OFlags::CREATE).unwrap().write_all(b"by the guest").unwrap();
    assert_eq!(fs::read_to_string(granted.at.path().join("work/new")).unwrap(), "by the guest");
    // The other directory, and what is above, are not reached through it.
    assert_eq!(fs::read_to_string(granted.at.path().join("models/file")).unwrap(), "in models\n");
}

#[test]
fn nothing_above_or_mounted_below_a_directory_is_in_its_mount() {
    need!(Root, Kernel(6, 5));
    // A mount below the granted directory, in the host's own namespace of mounts: that of the stand-in and the supervisor.
    let mut builder = Host::builder().without_worker();
    builder.audit_tmpfs_kib = Some(1024);
    let at_host = tempfile::Builder::new().prefix("diarch-mounts-").tempdir().unwrap();
    fs::set_permissions(at_host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let shared = at_host.path().join("shared");
    fs::create_dir_all(shared.join("below")).unwrap();
    builder.prelude = Some(format!("mount -t tmpfs tmpfs {0}/below && echo hidden >{0}/below/file", shared.display()));
    let host = builder.grants(&format!("[mounts.shared]\ndirectory = {shared:?}\n")).start();
    let granted = Granted { host, at: at_host };
    let supervisor = granted.host.supervisor_pid();
    let theirs = PathBuf::from(format!("/proc/{supervisor}/root")).join(shared.strip_prefix("/").unwrap());
    assert_eq!(fs::read_to_string(theirs.join("below/file")).unwrap(), "hidden\n", "the test has its mount");
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    attach(&mut raw, tenancy, "shared", ReadOnly).unwrap();
    let mount = granted.only();
    assert_eq!(at(&mount, "below/file", OFlags::RDONLY).unwrap_err(), Errno::NOENT, "not what is mounted below");
    let inode = |name: &str| rustix::fs::statat(&mount, name, AtFlags::empty()).map(|stat| stat.st_ino);
    for name in ["..", "../..", "below/../../.."] {
        assert_eq!(inode(name), inode("."), "{name} ends at the root");
    }
}

#[test]
fn a_tmpfs_is_the_workers_to_fill_the_vms_to_read_and_no_larger_than_granted() {
    need!(Root, Kernel(6, 5));
    let granted = granted();
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    let vm = User { uid: granted.host.uid_first, gid: granted.host.uid_first };
    for (share, access) in [("secrets", ReadOnly), ("scratch", ReadWrite)] {
        let root = attach(&mut raw, tenancy, share, access).unwrap().expect("its root");
        let meta = fs::metadata(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&root))).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (WORKER.uid, vm.gid));
        as_user(WORKER, || at(&root, "key", OFlags::WRONLY | OFlags::CREATE).unwrap().write_all(b"s3cret").unwrap());
        let mount = granted.only();
        assert_eq!(as_user(vm, || text(&mount, "key")), "s3cret");
        let another = User { uid: vm.uid + 1, gid: vm.gid + 1 };
        assert_eq!(as_user(another, || at(&mount, "key", OFlags::RDONLY)).unwrap_err(), Errno::ACCESS, "even one who had the descriptor");
        let written = as_user(vm, || at(&mount, "new", OFlags::WRONLY | OFlags::CREATE).map(drop));
        assert_eq!(written.err(), if access == ReadOnly { Some(Errno::ACCESS) } else { None }, "{share}");

        // 1 MiB, and not a page more; nor inodes without end.
        let mut file = as_user(WORKER, || at(&root, "large", OFlags::WRONLY | OFlags::CREATE).unwrap());
        let full = (0..512).find_map(|_| file.write_all(&[7; 4096]).err());
        assert_eq!(full.unwrap().kind(), std::io::ErrorKind::StorageFull);
        assert!(file.metadata().unwrap().len() <= 1024 * 1024);
        rustix::fs::unlinkat(&root, "large", AtFlags::empty()).unwrap();
        drop(file);
        let many = (0..5000).find_map(|n| at(&root, &format!("f{n}"), OFlags::WRONLY | OFlags::CREATE).err());
        assert_eq!(many, Some(Errno::NOSPC));
        // From its root there is no way up.
        assert_eq!(as_user(WORKER, || at(&root, "../../etc/passwd", OFlags::RDONLY)).unwrap_err(), Errno::NOENT);
        drop((root, mount));
        detach(&mut raw, tenancy, share).unwrap();
        assert!(granted.held().is_empty());
    }
}

#[test]
fn each_vm_has_a_tmpfs_of_its_own_and_a_new_one_is_empty() {
    need!(Root, Kernel(6, 5));
    let granted = granted();
    let mut raw = granted.host.raw();
    let (one, two) = (claim(&mut raw, "one"), claim(&mut raw, "two"));
    let first = attach(&mut raw, one, "secrets", ReadOnly).unwrap().unwrap();
    at(&first, "key", OFlags::WRONLY | OFlags::CREATE).unwrap();
    let again = attach(&mut raw, one, "secrets", ReadOnly).unwrap().unwrap();
    at(&again, "key", OFlags::RDONLY).expect("the same one");
    let second = attach(&mut raw, two, "secrets", ReadOnly).unwrap().unwrap();
    assert_eq!(at(&second, "key", OFlags::RDONLY).unwrap_err(), Errno::NOENT);
    assert_eq!(granted.held().len(), 2);
    detach(&mut raw, one, "secrets").unwrap();
    let anew = attach(&mut raw, one, "secrets", ReadOnly).unwrap().unwrap();
    assert_eq!(at(&anew, "key", OFlags::RDONLY).unwrap_err(), Errno::NOENT);
    // The next VM in the slot starts with nothing.
    release(&mut raw, one);
    let next = claim(&mut raw, "next");
    assert_eq!(next.slot, one.slot);
    assert_eq!(granted.held().len(), 1);
    let anew = attach(&mut raw, next, "secrets", ReadOnly).unwrap().unwrap();
    assert_eq!(at(&anew, "key", OFlags::RDONLY).unwrap_err(), Errno::NOENT);
}

// ---- images ----

/// An erofs and a squashfs of one directory with a file, a set-id program, a device node and a link; and what is no image.
fn images(at: &Path) -> String {
    let from = at.join("image");
    fs::create_dir(&from).unwrap();
    fs::write(from.join("file"), "in image\n").unwrap();
    fs::copy("/bin/true", from.join("suid")).unwrap();
    fs::set_permissions(from.join("suid"), fs::Permissions::from_mode(0o4755)).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, from.join("null"), rustix::fs::FileType::CharacterDevice, Mode::from_raw_mode(0o666), rustix::fs::makedev(1, 3))
        .unwrap();
    symlink("file", from.join("link")).unwrap();
    let made = |command: &mut Command| assert!(command.output().expect("the tool").status.success());
    made(Command::new("mkfs.erofs").arg(at.join("a.erofs")).arg(&from));
    made(Command::new("mksquashfs").arg(&from).arg(at.join("a.squashfs")).args(["-quiet", "-no-progress"]));
    fs::write(at.join("text"), "no image at all").unwrap();
    // A superblock that begins well and goes on badly.
    for (image, from) in [("a.erofs", 1028), ("a.squashfs", 4)] {
        let mut bytes = fs::read(at.join(image)).unwrap();
        bytes[from..from + 60].fill(0xff);
        fs::write(at.join(format!("damaged-{image}")), bytes).unwrap();
    }
    fs::copy(at.join("a.erofs"), at.join("theirs")).unwrap();
    chown(at.join("theirs"), Some(64_001), None).unwrap();
    fs::copy(at.join("a.erofs"), at.join("open")).unwrap();
    fs::set_permissions(at.join("open"), fs::Permissions::from_mode(0o666)).unwrap();
    symlink("a.erofs", at.join("linked")).unwrap();
    fs::create_dir(at.join("directory")).unwrap();
    let mut lines = String::new();
    for (name, file, kind) in [
        ("erofs", "a.erofs", "erofs"),
        ("squashfs", "a.squashfs", "squashfs"),
        ("mistaken", "a.erofs", "squashfs"),
        ("text", "text", "squashfs"),
        ("damaged-erofs", "damaged-a.erofs", "erofs"),
        ("damaged-squashfs", "damaged-a.squashfs", "squashfs"),
        ("theirs", "theirs", "erofs"),
        ("open", "open", "erofs"),
        ("linked", "linked", "erofs"),
        ("directory", "directory", "erofs"),
        ("missing", "missing", "erofs"),
    ] {
        lines += &format!("[mounts.{name}]\nimage = {:?}\nimage_type = {kind:?}\n", at.join(file));
    }
    lines
}

fn loop_devices() -> Vec<(PathBuf, String)> {
    let devices = fs::read_dir("/sys/block").unwrap().flatten().filter(|d| d.file_name().to_string_lossy().starts_with("loop"));
    devices.filter_map(|d| Some((d.path(), fs::read_to_string(d.path().join("loop/backing_file")).ok()?))).collect()
}

#[test]
fn an_image_is_read_only_and_frees_what_it_stood_on() {
    need!(Root, Kernel(6, 5), Images);
    let granted = granted_with(images);
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    let ours = |devices: Vec<(PathBuf, String)>| devices.into_iter().filter(|(_, file)| file.starts_with(granted.at.path().to_str().unwrap())).count();
    let before = granted.host.inventory();
    for share in ["erofs", "squashfs"] {
        assert!(attach(&mut raw, tenancy, share, ReadOnly).unwrap().is_none());
        let mount = granted.only();
        assert_eq!(text(&mount, "file"), "in image\n");
        assert_eq!(at(&mount, "file", OFlags::WRONLY).unwrap_err(), Errno::ROFS);
        drop(mount);
        assert_eq!(detach(&mut raw, tenancy, share), Ok(true));
    }
    let until = Instant::now() + Duration::from_secs(5);
    while ours(loop_devices()) > 0 {
        assert!(Instant::now() < until, "a loop device stays");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_same(&before, &granted.host);
}

#[test]
fn what_is_no_sound_image_of_roots_is_refused_and_leaves_nothing() {
    need!(Root, Kernel(6, 5), Images);
    let granted = granted_with(images);
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    let before = granted.host.inventory();
    for (share, kind, says) in [
        ("mistaken", "unsupported", "does not begin as squashfs does (image_type of mounts.mistaken in the grants)"),
        ("text", "unsupported", "does not begin as squashfs does"),
        ("damaged-erofs", "failed", "the kernel finds no sound erofs in the image"),
        ("damaged-squashfs", "failed", "the kernel finds no sound squashfs in the image"),
        ("theirs", "denied", "can be written by others than root (uid 64001"),
        ("open", "denied", "mode 0666"),
        ("linked", "denied", "is a symbolic link"),
        ("directory", "denied", "is not a regular file"),
        ("missing", "not-found", "there is no such file"),
    ] {
        let error = attach(&mut raw, tenancy, share, ReadOnly).unwrap_err();
        assert_eq!(error.kind(), kind, "{share}: {error}");
        assert!(error.to_string().contains(says), "{share}: {error}");
        assert_eq!(attach(&mut raw, tenancy, share, ReadWrite).unwrap_err().kind(), "denied");
    }
    assert_same(&before, &granted.host);
    assert!(loop_devices().iter().all(|(_, file)| !file.starts_with(granted.at.path().to_str().unwrap())));
}

// ---- who may what ----

#[test]
fn requests_that_are_not_allowed_get_their_sentence_and_leave_nothing() {
    need!(Root, Kernel(6, 5));
    let granted = granted();
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    attach(&mut raw, tenancy, "work", ReadOnly).unwrap();
    let before = granted.host.inventory();
    let refused = |answer: Result<Option<OwnedFd>, Error>, kind: &str, says: &str| {
        let error = answer.unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(says), "{error}");
    };
    refused(attach(&mut raw, tenancy, "models", ReadWrite), "denied", "mounts.models in the grants: it is granted read-only");
    refused(attach(&mut raw, tenancy, "passwd", ReadOnly), "denied", "no such section; there are: models, scratch, secrets, work");
    refused(attach(&mut raw, tenancy, "work", ReadWrite), "conflict", "it has work attached read-only; detach it first");
    assert_eq!(attach(&mut raw, tenancy, "work", ReadOnly).map(|fd| fd.is_some()), Ok(false), "the same again");
    // Somebody else's slot, and one that nobody has.
    let mut wrong = tenancy;
    wrong.claim.serial += 1;
    refused(attach(&mut raw, wrong, "models", ReadOnly), "not-found", "was released");
    assert_eq!(detach(&mut raw, wrong, "work").unwrap_err().kind(), "not-found");
    wrong.slot = diarch_ipc::name::Slot::new(7).unwrap();
    refused(attach(&mut raw, wrong, "models", ReadOnly), "not-found", "nobody claimed it");
    // While QEMU runs, what it has stays as it is.
    let (spec, fds) = granted.host.spec("");
    let fds: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
    let spawned = raw.ask(Request::VmSpawn(diarch_ipc::operation::Spawn { tenancy, spec }), &fds).unwrap();
    assert!(matches!(spawned.0, Outcome::Ok(_)), "{spawned:?}");
    refused(attach(&mut raw, tenancy, "models", ReadOnly), "wrong-state", "needs slot 0 to be claimed or exited");
    assert_eq!(detach(&mut raw, tenancy, "work").unwrap_err().kind(), "wrong-state");
    assert_eq!(granted.held().len(), 1);
    // Its release takes all of it, in whatever state.
    drop(spawned);
    release(&mut raw, tenancy);
    assert!(granted.held().is_empty() && granted.stored().is_empty());
    let tenancy = claim(&mut raw, "web");
    attach(&mut raw, tenancy, "work", ReadOnly).unwrap();
    assert_same(&before, &granted.host);
}

#[test]
fn a_vm_has_at_most_eight_mounts() {
    need!(Root, Kernel(6, 5));
    let granted = granted_with(|_| (0..9).map(|n| format!("[mounts.t{n}]\ntmpfs_mib = 1\n")).collect());
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    for n in 0..8 {
        attach(&mut raw, tenancy, &format!("t{n}"), ReadOnly).unwrap();
    }
    assert_eq!(attach(&mut raw, tenancy, "t8", ReadOnly).unwrap_err().kind(), "exhausted");
    release(&mut raw, tenancy);
    assert!(granted.held().is_empty());
}

#[test]
fn a_directory_that_somebody_else_could_swap_is_refused() {
    need!(Root, Kernel(6, 5));
    let granted = granted_with(|at| {
        fs::create_dir_all(at.join("theirs/inner")).unwrap();
        chown(at.join("theirs"), Some(64_001), None).unwrap();
        fs::create_dir_all(at.join("open/inner")).unwrap();
        fs::set_permissions(at.join("open"), fs::Permissions::from_mode(0o777)).unwrap();
        symlink("/etc", at.join("link")).unwrap();
        let section = |name: &str, path: &str| format!("[mounts.{name}]\ndirectory = {:?}\n", at.join(path));
        ["theirs/inner", "open/inner", "link", "models/file", "none"]
            .iter()
            .zip(["theirs", "open", "link", "file", "none"])
            .map(|(p, n)| section(n, p))
            .collect()
    });
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    for (share, kind, says) in [
        ("theirs", "denied", "belongs to uid 64001, who could put something else in its place; chown root"),
        ("open", "denied", "can be written by others (mode 0777)"),
        ("link", "denied", "is a symbolic link; name it by its real path"),
        ("file", "denied", "is not a directory"),
        ("none", "not-found", "there is no such file or directory (mounts.none in the grants)"),
    ] {
        let error = attach(&mut raw, tenancy, share, ReadOnly).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(says), "{share}: {error}");
    }
    assert!(granted.held().is_empty());
}

/// Ends the swapper, also when the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A directory on the way is a link to somewhere else half of the time: each attach has the right directory, or none.
#[test]
fn a_swapper_never_leads_a_mount_astray() {
    need!(Root, Kernel(6, 5));
    let granted = granted_with(|at| {
        for name in ["way/inner", "decoy/inner"] {
            fs::create_dir_all(at.join(name)).unwrap();
            fs::write(at.join(name).join("file"), name).unwrap();
        }
        symlink("decoy", at.join("turn")).unwrap();
        format!("[mounts.swapped]\ndirectory = {:?}\n", at.join("way/inner"))
    });
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    let before = granted.host.inventory();
    let (stop, way, turn) = (AtomicBool::new(false), granted.at.path().join("way"), granted.at.path().join("turn"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(rustix::fs::CWD, &way, rustix::fs::CWD, &turn, rustix::fs::RenameFlags::EXCHANGE).unwrap();
            }
        });
        let _ends = Ends(&stop);
        let (mut right, mut refused) = (0, 0);
        for _ in 0..2000 {
            match attach(&mut raw, tenancy, "swapped", ReadOnly) {
                Ok(_) => {
                    let mount = granted.only();
                    assert_eq!(text(&mount, "file"), "way/inner", "led astray");
                    drop(mount);
                    assert_eq!(detach(&mut raw, tenancy, "swapped"), Ok(true));
                    right += 1;
                }
                Err(error) => {
                    assert!(error.to_string().contains("is a symbolic link"), "{error}");
                    refused += 1;
                }
            }
        }
        assert!(right > 100 && refused > 100, "the swapper did not swap: {right} went well, {refused} were refused");
    });
    assert_same(&before, &granted.host);
}

// ---- the death of the supervisor ----

#[test]
fn mounts_and_what_is_in_them_survive_the_supervisor() {
    need!(Root, Kernel(6, 5), Images);
    let granted = granted_with(images);
    let mut raw = granted.host.raw();
    let tenancy = claim(&mut raw, "web");
    let root = attach(&mut raw, tenancy, "secrets", ReadOnly).unwrap().unwrap();
    at(&root, "key", OFlags::WRONLY | OFlags::CREATE).unwrap().write_all(b"s3cret").unwrap();
    drop(root);
    for share in ["work", "erofs", "squashfs"] {
        attach(&mut raw, tenancy, share, ReadOnly).unwrap();
    }
    // A connection of ours would not outlive the supervisor.
    drop(raw);
    let before = granted.host.inventory();
    let ledger = granted.host.ledger();
    for _ in 0..3 {
        granted.host.manager().kill_and_wait(Unit::Supervisor);
    }
    assert_same(&before, &granted.host);
    assert_eq!((granted.host.ledger(), granted.stored().len()), (ledger, 4));
    let mut raw = granted.host.raw();
    let root = attach(&mut raw, tenancy, "secrets", ReadOnly).unwrap().unwrap();
    assert_eq!(text(&root, "key"), "s3cret");
    assert_eq!(granted.held().len(), 4);
    for share in ["work", "erofs", "squashfs", "secrets"] {
        assert_eq!(detach(&mut raw, tenancy, share), Ok(true));
    }
    assert!(granted.held().is_empty() && granted.stored().is_empty());
}

#[test]
fn without_a_store_directories_and_images_are_made_again_and_a_tmpfs_is_named_as_lost() {
    need!(Root, Kernel(6, 5), Images);
    // Nobody whom the supervisor could give anything to keep.
    let mut builder = Host::builder().without_worker();
    builder.prelude = Some("unset NOTIFY_SOCKET".into());
    let at_host = tempfile::Builder::new().prefix("diarch-mounts-").tempdir().unwrap();
    fs::set_permissions(at_host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(at_host.path().join("models")).unwrap();
    fs::create_dir(at_host.path().join("other")).unwrap();
    let lines = format!(
        "[mounts.models]\ndirectory = {:?}\n[mounts.gone]\ndirectory = {:?}\n[mounts.secrets]\ntmpfs_mib = 1\n{}",
        at_host.path().join("models"),
        at_host.path().join("other"),
        images(at_host.path())
    );
    let host = builder.grants(&lines).prepare();
    let granted = Granted { host, at: at_host };
    let raw = || {
        let until = Instant::now() + Duration::from_secs(10);
        while granted.host.manager().unit(Unit::Supervisor).pid.is_none() || !granted.host.log("supervisor.log").contains("serving") {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(5));
        }
        granted.host.raw()
    };
    let mut first = raw();
    let tenancy = claim(&mut first, "web");
    for share in ["models", "gone", "secrets", "squashfs"] {
        attach(&mut first, tenancy, share, ReadOnly).unwrap();
    }
    drop(first);
    fs::remove_dir(granted.at.path().join("other")).unwrap();
    granted.host.manager().ask(&Ask::Kill(Unit::Supervisor, nix::libc::SIGKILL)).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let mut next = raw();
    // Waits for what is made again: it holds the VM's lock.
    let root = attach(&mut next, tenancy, "secrets", ReadOnly).unwrap().expect("a new one");
    assert_eq!(
        fs::read_dir(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&root))).unwrap().count(),
        0,
        "and whoever looks sees that it is empty"
    );
    drop(root);
    let shares: Vec<String> =
        granted.host.ledger()["0"]["resources"]["mounts"].as_array().unwrap().iter().map(|m| m["share"].as_str().unwrap().to_owned()).collect();
    assert_eq!(shares, ["models", "squashfs", "secrets"]);
    assert_eq!(granted.held().len(), 3);
    let log = granted.host.log("supervisor.log");
    for says in
        ["the mount secrets is gone with the earlier supervisor: not found: its content, which was in memory alone", "the mount gone is gone with the earlier"]
    {
        assert!(log.contains(says), "{log}");
    }
}

/// What is interrupted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Attach,
    Detach,
}

/// Killed at each of its system calls, the supervisor leaves a ledger that says what there is; asked again, it does what it was asked.
fn stepped(share: &str, access: DiskAccess, change: Change) {
    let granted = granted();
    let named = || ShareName::new(share).unwrap();
    for n in 1.. {
        let mut raw = granted.host.raw();
        let tenancy = claim(&mut raw, "web");
        let request = match change {
            Change::Attach => Request::MountAttach(AttachMount { tenancy, share: named(), access }),
            Change::Detach => {
                attach(&mut raw, tenancy, share, access).unwrap();
                Request::MountDetach(DetachMount { tenancy, share: named() })
            }
        };
        let starts = granted.host.manager().unit(Unit::Supervisor).starts;
        // The answer may never come.
        let (outcome, _) = kill_at_syscall(granted.host.supervisor_pid(), n, || raw.ask(request.clone(), &[]).is_ok()).unwrap();
        let survived = matches!(outcome, Stepped::Survived { .. });
        if !survived {
            granted.host.manager().wait_ready(Unit::Supervisor, starts, Duration::from_secs(10));
        }
        // Equal: what the ledger has is held and stored, and nothing else is.
        let recorded = granted.host.ledger()["0"]["resources"]["mounts"].as_array().unwrap().len();
        let until = Instant::now() + Duration::from_secs(5);
        while (granted.held().len(), granted.stored().len()) != (recorded, recorded) {
            assert!(Instant::now() < until, "step {n} ({outcome:?}): {recorded} in the ledger, {} held, {:?} stored", granted.held().len(), granted.stored());
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut raw = granted.host.raw();
        assert!(matches!(raw.ask(request, &[]), Ok((Outcome::Ok(_), _))), "step {n}");
        release(&mut raw, tenancy);
        assert!(granted.held().is_empty() && granted.stored().is_empty(), "step {n}");
        if survived {
            assert!(n > 15, "only {n} steps");
            return;
        }
    }
}

#[test]
fn an_attach_killed_at_every_step_leaves_ledger_and_kernel_equal() {
    need!(Root, Kernel(6, 5));
    stepped("work", ReadWrite, Change::Attach);
    stepped("scratch", ReadWrite, Change::Attach);
}

#[test]
fn a_detach_killed_at_every_step_leaves_ledger_and_kernel_equal() {
    need!(Root, Kernel(6, 5));
    stepped("scratch", ReadWrite, Change::Detach);
}

// ---- under a real systemd ----

/// In its unit the supervisor sees the host read-only and a part of it not at all; and systemd keeps what it gave it, over whatever becomes of it.
#[test]
fn systemd_keeps_mounts_over_a_kill_a_restart_and_a_stop() {
    need!(Machine, Package);
    let grants = "[mounts.work]\ndirectory = \"/srv/work\"\nwrite = true\n[mounts.hidden]\ndirectory = \"/home/shared\"\n[mounts.scratch]\ntmpfs_mib = 1\nwrite = true\n\
        [sockets.private]\npath = \"/run/dbus/system_bus_socket\"\n";
    let machine = Machine::installed().grants_more(grants).file("/srv/work/file", "in work\n").file("/home/shared/file", "hidden\n").boot();
    let puppet = Puppet::instead_of_the_worker(&machine);
    let tenancy = puppet.claim("web");
    let attach = |share: &str, access| Request::MountAttach(AttachMount { tenancy, share: ShareName::new(share).unwrap(), access });
    let stored = || machine.show(SUPERVISOR, "NFileDescriptorStore");
    let supervisor = || machine.host_pid(machine.wait_for("the supervisor", Duration::from_secs(30), || machine.pid_of_unit(SUPERVISOR))).unwrap();
    puppet.ask(&attach("work", ReadWrite));
    puppet.ask(&attach("scratch", ReadWrite));
    let hidden = puppet.try_ask(&attach("hidden", ReadOnly)).unwrap_err()["text"].as_str().unwrap().to_owned();
    assert!(hidden.contains("/home") && hidden.contains("(its unit hides /home, /root and /tmp from it)"), "{hidden}");
    let connected = puppet.answer(puppet.send(&Request::SocketConnect(ConnectSocket { socket: SocketName::new("private").unwrap() })));
    assert_eq!(connected["fds"], 1, "{connected}");

    let scratch = |mounts: Vec<OwnedFd>| mounts.into_iter().find(|mount| at(mount, "file", OFlags::RDONLY).is_err()).expect("the tmpfs");
    let work = |mounts: Vec<OwnedFd>| mounts.into_iter().find(|mount| at(mount, "file", OFlags::RDONLY).is_ok()).expect("the directory");
    at(&scratch(held(supervisor())), "key", OFlags::WRONLY | OFlags::CREATE).unwrap().write_all(b"s3cret").unwrap();
    at(&work(held(supervisor())), "new", OFlags::WRONLY | OFlags::CREATE).unwrap().write_all(b"by the guest").unwrap();
    assert_eq!(machine.read("/srv/work/new"), "by the guest", "read-write, though the unit sees /srv read-only");

    for how in [
        "systemctl kill -s KILL diarch-supervisor",
        "systemctl restart diarch-supervisor",
        "systemctl stop diarch-supervisor.socket diarch-supervisor; systemctl start diarch-supervisor",
        "systemctl daemon-reexec",
    ] {
        let before = machine.main_process(SUPERVISOR);
        machine.sh(how);
        if !how.ends_with("reexec") {
            machine.wait_for("another supervisor", Duration::from_secs(30), || machine.main_process(SUPERVISOR).filter(|now| before.as_ref() != Some(now)));
        }
        machine.wait_active(SUPERVISOR, Duration::from_secs(30));
        puppet.ask(&attach("scratch", ReadWrite));
        let mounts = held(supervisor());
        assert_eq!((mounts.len(), stored().as_str()), (2, "2"), "after {how}");
        assert_eq!(text(&scratch(mounts), "key"), "s3cret", "after {how}");
    }
    puppet.ask(&Request::MountDetach(DetachMount { tenancy, share: ShareName::new("scratch").unwrap() }));
    machine.wait_for("systemd lets go of it", Duration::from_secs(10), || (stored() == "1").then_some(()));
    puppet.ask(&puppet::release(tenancy));
    machine.wait_for("and of all", Duration::from_secs(10), || (stored() == "0").then_some(()));
    assert!(held(supervisor()).is_empty());
    puppet.give_back();
}
