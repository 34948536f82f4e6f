//! `mount_attach`: attach and detach, asked for and audited, against what a careful program of root's does with the bare system calls for the same mount: the walk from
//! `/`, each directory looked at; the mount with the same flags and limits; its end. (Without what nobody can have from a system call: a ledger, an audit, another
//! user who asks.) Of a directory and of a tmpfs. All pinned to one processor. The ledger is on a tmpfs, as /run is, and the audit on a disk.

use crate::{line, median};
use diarch_ipc::frame::Outcome;
use diarch_ipc::name::{Label, ShareName};
use diarch_ipc::operation::{AttachMount, Claim, DetachMount, Reply, Request};
use diarch_ipc::spec::DiskAccess;
use diarch_supervisor::vm::jail::mount::Attributes;
use diarch_tests::host::{Host, WORKER};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, open_tree,
};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

const ROUNDS: usize = 41;
const CALLS: u32 = 100;

pub fn run() {
    let at = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(at.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    let directory = at.path().join("models");
    std::fs::create_dir(&directory).expect("mkdir");
    let limits = "[limits]\nensure_per_second = 4000000000\nensure_burst = 4000000000\n";
    let grants = format!("{limits}[mounts.directory]\ndirectory = {directory:?}\n[mounts.tmpfs]\ntmpfs_mib = 1\nwrite = true\n");
    let mut builder = Host::builder().without_worker().grants(&grants);
    builder.run_tmpfs_kib = Some(1024);
    let host = builder.start();
    crate::rpc::pin(Some(host.supervisor_pid()));
    // It keeps a copy of each mount, as systemd would.
    crate::rpc::pin(Some(host.manager().pid()));
    let mut raw = host.raw();
    let claimed = raw.ask(Request::VmClaim(Claim { label: Label::new("bench").expect("a label") }), &[]);
    let Ok((Outcome::Ok(Reply::VmClaim(claimed)), _)) = claimed else { panic!("vm.claim: {claimed:?}") };
    let tenancy = claimed.tenancy;
    crate::rpc::pin(None);
    type Bare = fn(&Path, u32) -> Vec<OwnedFd>;
    for (name, access, bare) in [("directory", DiskAccess::ReadOnly, bare_directory as Bare), ("tmpfs", DiskAccess::ReadWrite, bare_tmpfs)] {
        let share = || ShareName::new(name).expect("a name");
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let started = Instant::now();
            for _ in 0..CALLS {
                for request in
                    [Request::MountAttach(AttachMount { tenancy, share: share(), access }), Request::MountDetach(DetachMount { tenancy, share: share() })]
                {
                    let answer = raw.ask(request, &[]);
                    assert!(matches!(answer, Ok((Outcome::Ok(_), _))), "{answer:?}");
                }
            }
            let a = started.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS);
            let started = Instant::now();
            for _ in 0..CALLS {
                drop(bare(&directory, host.uid_first));
            }
            let b = started.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS);
            // The first round warms up.
            if round > 0 {
                ours.push(a);
                theirs.push(b);
            }
        }
        line(&format!("mount_attach_{name}"), median(ours), "us", median(theirs));
    }
}

/// What `path` names, by a way that is root's at each step and has no link in it.
fn walk(path: &Path) -> OwnedFd {
    let mut at = openat2(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::empty()).expect("openat2");
    for name in path.components().skip(1) {
        let stat = rustix::fs::fstat(&at).expect("fstat");
        assert!(stat.st_uid == 0 && (stat.st_mode & 0o022 == 0 || stat.st_mode & 0o1000 != 0), "{} is not root's alone", path.display());
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        at = openat2(&at, name.as_os_str(), OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), resolve).expect("openat2");
    }
    let stat = rustix::fs::fstat(&at).expect("fstat");
    assert_eq!(FileType::from_raw_mode(stat.st_mode), FileType::Directory);
    at
}

const FLAGS: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC)
    .union(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW);

fn bare_directory(path: &Path, _: u32) -> Vec<OwnedFd> {
    let found = walk(path);
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(&found, c"", flags).expect("open_tree");
    let set = FLAGS | MountAttrFlags::MOUNT_ATTR_RDONLY;
    Attributes::private(set.bits().into(), 0).apply(mount.as_raw_fd(), c"", rustix::fs::AtFlags::EMPTY_PATH.bits().cast_signed()).expect("mount_setattr");
    vec![mount]
}

fn bare_tmpfs(_: &Path, vm: u32) -> Vec<OwnedFd> {
    let new = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).expect("fsopen");
    let (worker, vm) = (WORKER.uid.to_string(), vm.to_string());
    for (key, value) in [("size", "1m"), ("nr_inodes", "1024"), ("uid", &worker), ("gid", &vm), ("mode", "2775")] {
        fsconfig_set_string(&new, key, value).expect("fsconfig");
    }
    fsconfig_set_flag(&new, "noswap").expect("fsconfig");
    fsconfig_create(&new).expect("fsconfig");
    let mount = fsmount(&new, FsMountFlags::FSMOUNT_CLOEXEC, FLAGS).expect("fsmount");
    // For whoever fills it.
    let root = openat(&mount, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).expect("openat");
    vec![root, mount]
}
