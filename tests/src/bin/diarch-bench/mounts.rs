//! `mount_attach`: attach and detach of a tmpfs and of a directory, asked for and audited, against the same by bare system calls in one process. All pinned to one
//! processor.

use crate::{line, median};
use diarch_ipc::frame::Outcome;
use diarch_ipc::name::{Label, ShareName};
use diarch_ipc::operation::{AttachMount, Claim, DetachMount, Reply, Request};
use diarch_ipc::spec::DiskAccess;
use diarch_tests::host::Host;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, open_tree};
use std::os::fd::OwnedFd;
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
    let host = Host::builder().without_worker().grants(&grants).start();
    crate::rpc::pin(Some(host.supervisor_pid()));
    let mut raw = host.raw();
    let claimed = raw.ask(Request::VmClaim(Claim { label: Label::new("bench").expect("a label") }), &[]);
    let Ok((Outcome::Ok(Reply::VmClaim(claimed)), _)) = claimed else { panic!("vm.claim: {claimed:?}") };
    let tenancy = claimed.tenancy;
    crate::rpc::pin(None);
    type Bare = fn(&Path) -> OwnedFd;
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
                drop(bare(&directory));
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

fn bare_directory(path: &Path) -> OwnedFd {
    let found = openat2(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::NO_SYMLINKS).expect("openat2");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(&found, c"", flags).expect("open_tree");
    rustix::fs::statat(&mount, c"", AtFlags::EMPTY_PATH).expect("stat");
    mount
}

fn bare_tmpfs(_: &Path) -> OwnedFd {
    let new = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).expect("fsopen");
    fsconfig_set_string(&new, "size", "1m").expect("fsconfig");
    fsconfig_create(&new).expect("fsconfig");
    fsmount(&new, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID).expect("fsmount")
}
