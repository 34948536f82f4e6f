//! virtiofsd: what serves a shared directory to its guest, one for each share.
//!
//! ```text
//!   guest --(virtio queue, in memory that both map)--> virtiofsd --> a copy of the mount that mount.attach made
//!                QEMU <---(vhost-user, one connection)----'            (/shared in its tree)
//! ```
//!
//! It finds its libraries, the share, and nothing else of the host's; the flags of the mount hold for it as for anybody. It runs as the VM's user, without a capability: so
//! a guest gets what that user may have. It has a descriptor of the guest's whole memory, as QEMU has.
//!
//! Checked against virtiofsd 1.13 (Debian 13). Older ones lack options; the one in C (Debian 12) ends when it has no capability.

use super::{Order, TALK_FD, Talk};
use crate::grants::{Grants, Program};
use crate::host::Host;
use crate::ledger::CompanionKind;
use crate::qemu;
use crate::state::Vm;
use crate::vm::jail::{Network, Root, Sandbox, Sockets};
use diarch_ipc::Error;
use diarch_ipc::name::ShareName;
use diarch_ipc::spec::{MAX_SHARES, VmSpec};
use rustix::process::{Resource, getrlimit};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Each file that the guest knows is a descriptor.
const OPEN_FILES: u64 = 65_536;
/// What it looks at to know how many it could have.
const NR_OPEN: &str = "/proc/sys/fs/nr_open";
/// In its own tree, and in no other. (A descriptor would do, but it asks for the path of what it shares, and takes that.)
const SHARED: &str = "/shared";

/// The program, opened for one share, with its own directories.
pub type Opened = (File, Vec<(PathBuf, OwnedFd)>);

/// Opens it for each share; changes nothing. In a rehearsal nothing is served.
pub fn look(grants: &Grants, host: &Host, spec: &VmSpec) -> Result<Vec<Opened>, Error> {
    if spec.shares.is_empty() || host.is_rehearsed() {
        return Ok(Vec::new());
    }
    let Some(granted) = &grants.virtiofsd else {
        return Err(Error::denied("virtiofsd", "there is no such section: a shared directory needs the program that serves it"));
    };
    let open = |_| Ok((qemu::open_program("virtiofsd", granted, host.owner(), None)?.0, qemu::libraries_of("virtiofsd", granted)?));
    spec.shares.iter().map(open).collect()
}

/// The mounts of this VM that its guest is to see.
pub fn admit(vm: &Vm, spec: &VmSpec) -> Result<Vec<ShareName>, Error> {
    if spec.shares.len() > MAX_SHARES {
        return Err(Error::invalid("spec.shares", format!("at most {MAX_SHARES}, and there are {}", spec.shares.len())));
    }
    let mut shares = Vec::new();
    for (number, share) in spec.shares.iter().enumerate() {
        if spec.shares.iter().take(number).any(|other| other.tag == share.tag || other.share == share.share) {
            return Err(Error::invalid("spec.shares", format!("the share {} or the tag {} is there twice", share.share, share.tag)));
        }
        if !vm.mounts.contains_key(&share.share) {
            return Err(Error::NotFound { what: format!("the share {} of slot {}: mount.attach comes first", share.share, vm.record.slot) });
        }
        shares.push(share.share.clone());
    }
    Ok(shares)
}

/// The order for a copy of the share's mount, which ends with the jail.
pub fn order((program, libraries): Opened, granted: Option<&Program>, uid: u32, mount: OwnedFd) -> Order {
    let name = granted.map_or_else(|| "virtiofsd".into(), |program| program.path.to_string_lossy());
    Order {
        kind: CompanionKind::Virtiofsd,
        program: program.into(),
        argv: argv(&name, uid),
        libraries,
        root: Root::of_a_program().kernel_file(NR_OPEN).mount(SHARED, mount),
        network: Network::Own,
        sockets: Sockets::Unix,
        sandbox: Sandbox::Ours,
        talk: Talk::Listener,
        // No more than we have: nobody here may raise it.
        open_files: getrlimit(Resource::Nofile).maximum.map_or(OPEN_FILES, |ours| ours.min(OPEN_FILES)),
    }
}

fn argv(program: &str, uid: u32) -> Vec<String> {
    let mut argv = vec![program.to_owned()];
    let mut push = |option: &str, value: String| argv.push(format!("{option}={value}"));
    push("--shared-dir", SHARED.into());
    push("--fd", TALK_FD.to_string());
    // Its own walls need capabilities; it stands within ours. Its filter of system calls it lays over ours.
    push("--sandbox", "none".into());
    push("--inode-file-handles", "never".into());
    push("--rlimit-nofile", "0".into());
    push("--cache", "auto".into());
    // The guest's root is the VM's user, both ways; its others make files as that user too, which is all that it can be.
    for kind in ["--translate-uid", "--translate-gid"] {
        push(kind, format!("map:0:{uid}:1"));
        push(kind, format!("squash-guest:1:{uid}:4294967294"));
    }
    argv
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Record, Resources};
    use diarch_ipc::Request;
    use diarch_ipc::name::{Label, RequestId, Slot, Tag};
    use diarch_ipc::operation::SlotState;
    use diarch_ipc::spec::Share;
    use std::sync::Arc;

    fn vm(shares: &[&str]) -> Vm {
        let record = Record {
            slot: Slot::new(0).unwrap(),
            label: Label::new("web").unwrap(),
            uid: 200_000,
            claim: RequestId { session: 1, serial: 1 },
            state: SlotState::Claimed,
            run: None,
            resources: Resources::default(),
        };
        let held = || crate::mount::Held { mount: Arc::new(File::open("/").unwrap().into()), generation: 0 };
        let mut vm = Vm::new(record);
        vm.mounts = shares.iter().map(|share| (ShareName::new(*share).unwrap(), held())).collect();
        vm
    }
    fn spec(shares: &[(&str, &str)]) -> VmSpec {
        let spawn = Request::examples().into_iter().find_map(|request| if let Request::VmSpawn(spawn) = request { Some(spawn) } else { None });
        let share = |(share, tag): &(&str, &str)| Share { share: ShareName::new(*share).unwrap(), tag: Tag::new(*tag).unwrap() };
        VmSpec { shares: shares.iter().map(share).collect(), ..spawn.unwrap().spec }
    }

    #[test]
    fn only_what_is_attached_is_served_and_each_once() {
        let vm = vm(&["models", "work"]);
        let names = admit(&vm, &spec(&[("work", "w"), ("models", "m")])).unwrap();
        assert_eq!(names.iter().map(ShareName::as_str).collect::<Vec<_>>(), ["work", "models"]);
        for (shares, kind, says) in [
            (vec![("other", "o")], "not-found", "mount.attach comes first"),
            (vec![("work", "w"), ("work", "x")], "invalid", "twice"),
            (vec![("work", "w"), ("models", "w")], "invalid", "twice"),
        ] {
            let error = admit(&vm, &spec(&shares)).unwrap_err();
            assert!(error.kind() == kind && error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn its_options_hold_nothing_that_was_asked_for() {
        let argv = argv("/usr/libexec/virtiofsd", 2_100_000_003);
        assert_eq!(argv[..3], ["/usr/libexec/virtiofsd", "--shared-dir=/shared", "--fd=3"]);
        assert!(argv.contains(&"--translate-uid=map:0:2100000003:1".to_owned()));
    }
}
