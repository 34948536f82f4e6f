//! `mount.attach`: something granted, mounted for one VM.

use super::{Held, let_go, store, tree};
use crate::grants::{Grants, Source};
use crate::host::Host;
use crate::ledger::{Ledger, MountKind, Mounted};
use crate::state::{Supervisor, Vm};
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::name::{ShareName, Slot, Tenancy};
use diarch_ipc::operation::{AttachMount, MountAttached, Operation};
use diarch_ipc::spec::{DiskAccess, MAX_SHARES};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

/// The answer; with a tmpfs comes its root, which the worker fills.
type Attached = (MountAttached, Vec<Rc<OwnedFd>>);

pub async fn attach(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &AttachMount) -> Result<Attached, Error> {
    let slot = ask.tenancy.slot;
    let _lock = supervisor.lock(ask.tenancy).await?;
    supervisor.check_state(row, ask.tenancy)?;
    let vetted = vet(&supervisor.grants, supervisor.worker_uid, &supervisor.slots.borrow(), &supervisor.ledger, ask)?;
    let kind = vetted.kind();
    if let Some(mount) = supervisor.with(ask.tenancy, |vm| vm.mounts.get(&ask.share).cloned())? {
        let root = supervisor.act(row, slot, "open the mount", move || root(kind, &mount.mount)).await??;
        return Ok((MountAttached {}, root.into_iter().map(Rc::new).collect()));
    }
    let host = Arc::clone(&supervisor.host);
    let (mount, root) = supervisor.act(row, slot, "mount", move || make(vetted, &host)).await??;
    hold(supervisor, ask, kind, mount).await?;
    Ok((MountAttached {}, root.into_iter().map(Rc::new).collect()))
}

/// Everything that can be refused without a look at the host is refused here.
pub(super) fn vet(grants: &Grants, worker: u32, slots: &BTreeMap<Slot, Vm>, ledger: &Ledger, ask: &AttachMount) -> Result<Vetted<tree::Order>, Error> {
    let vm = Supervisor::tenant(slots, ask.tenancy)?;
    let grant = format!("mounts.{}", ask.share);
    let Some(granted) = grants.mounts.get(ask.share.as_str()) else {
        let known: Vec<&str> = grants.mounts.keys().map(String::as_str).collect();
        let there = if known.is_empty() { "none".into() } else { known.join(", ") };
        return Err(Error::denied(grant, format!("there is no such section; there are: {there}")));
    };
    if ask.access == DiskAccess::ReadWrite && !granted.write {
        let why = if matches!(granted.source, Source::Image { .. }) { "an image is read-only" } else { "it is granted read-only (no write = true)" };
        return Err(Error::denied(grant, why));
    }
    let mounts = &vm.record.resources.mounts;
    match mounts.iter().find(|mounted| mounted.share == ask.share) {
        Some(mounted) if mounted.kind != tree::kind(&granted.source) || mounted.access != ask.access => {
            let how = match (mounted.kind == tree::kind(&granted.source), mounted.access) {
                (false, _) => "as the grants had it earlier",
                (true, DiskAccess::ReadOnly) => "read-only",
                (true, DiskAccess::ReadWrite) => "read-write",
            };
            return Err(Error::Conflict { holder: format!("VM {}", vm.record.label), reason: format!("it has {} attached {how}; detach it first", ask.share) });
        }
        None if mounts.len() >= MAX_SHARES => {
            return Err(Error::Exhausted { what: format!("mounts of VM {}", vm.record.label), limit: MAX_SHARES as u64, retry_after_ms: None });
        }
        _ => {}
    }
    Ok(Vetted::by_vet(tree::Order {
        slot: vm.record.slot,
        share: ask.share.clone(),
        source: granted.source.clone(),
        access: ask.access,
        worker,
        uid: vm.record.uid,
        directory: ledger.directory(vm.record.slot),
    }))
}

/// From here on the host changes; and when this fails, it has not.
fn make(vetted: Vetted<tree::Order>, host: &Host) -> Result<(OwnedFd, Option<OwnedFd>), Error> {
    let kind = vetted.kind();
    let mount = tree::make(vetted, host)?;
    let root = root(kind, &mount)?;
    Ok((mount, root))
}

fn root(kind: MountKind, mount: &OwnedFd) -> Result<Option<OwnedFd>, Error> {
    if kind != MountKind::Tmpfs {
        return Ok(None);
    }
    // It is the worker's, who may have closed it to others: and so to root, which has no power over modes here.
    tree::root(mount).map(Some).map_err(|error| Error::Failed {
        step: "open the root of the tmpfs".into(),
        errno: error.raw_os_error(),
        detail: format!("{error} (its mode must leave it open to others; nobody else has a way to it)"),
    })
}

/// Gives the service manager a copy. Without one, the mount ends with this supervisor.
pub(super) fn keep(supervisor: &Supervisor, tenancy: Tenancy, share: &ShareName, held: &Held) {
    if let Err(error) = supervisor.store.keep(&store::name(tenancy, share, held.generation), &held.mount) {
        tracing::warn!(slot = %tenancy.slot, %share, %error, "the service manager does not take the mount: it will end with this supervisor");
    }
}

/// Kept, and only then written down: what is in the ledger is also in the store.
pub(super) async fn hold(supervisor: &Rc<Supervisor>, ask: &AttachMount, kind: MountKind, mount: OwnedFd) -> Result<(), Error> {
    let slot = ask.tenancy.slot;
    let held = Held { mount: Arc::new(mount), generation: 0 };
    keep(supervisor, ask.tenancy, &ask.share, &held);
    let mut record = supervisor.with(ask.tenancy, |vm| vm.record.clone())?;
    let mounts = &mut record.resources.mounts;
    mounts.retain(|mounted| mounted.share != ask.share);
    mounts.push(Mounted { share: ask.share.clone(), access: ask.access, kind });
    if let Err(error) = supervisor.record(record) {
        let _ = supervisor.store.forget(&store::name(ask.tenancy, &ask.share, held.generation));
        let_go(supervisor, vec![held.mount]).await;
        return Err(error);
    }
    if let Some(vm) = supervisor.slots.borrow_mut().get_mut(&slot) {
        vm.mounts.insert(ask.share.clone(), held);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Record, Resources};
    use diarch_ipc::name::{Label, RequestId};
    use diarch_ipc::operation::SlotState;

    fn grants() -> Grants {
        toml::from_str(
            "[worker]\nuser = 64000\n[vms]\nmax = 4\nuid_first = 200000\nmemory_mib = 64\ncpus_each = 1\n[mounts.models]\ndirectory = \"/srv/models\"\n\
             [mounts.work]\ndirectory = \"/srv/work\"\nwrite = true\n[mounts.app]\nimage = \"/srv/app\"\nimage_type = \"erofs\"\n[mounts.secrets]\ntmpfs_mib = 4\n",
        )
        .unwrap()
    }
    fn slots(mounts: Vec<Mounted>) -> BTreeMap<Slot, Vm> {
        let slot = Slot::new(0).unwrap();
        let record = Record {
            slot,
            label: Label::new("web").unwrap(),
            uid: 200_000,
            claim: RequestId { session: 1, serial: 1 },
            state: SlotState::Claimed,
            run: None,
            resources: Resources { mounts, ..Resources::default() },
        };
        BTreeMap::from([(slot, Vm::new(record))])
    }
    fn ask(share: &str, access: DiskAccess) -> AttachMount {
        let tenancy = Tenancy { slot: Slot::new(0).unwrap(), claim: RequestId { session: 1, serial: 1 } };
        AttachMount { tenancy, share: ShareName::new(share).unwrap(), access }
    }
    fn judged(mounts: Vec<Mounted>, ask: &AttachMount) -> Result<tree::Order, Error> {
        let dir = tempfile::tempdir().unwrap();
        vet(&grants(), 64_000, &slots(mounts), &Ledger::open(dir.path()).unwrap(), ask).map(Vetted::into_inner)
    }
    fn mounted(share: &str, access: DiskAccess, kind: MountKind) -> Mounted {
        Mounted { share: ShareName::new(share).unwrap(), access, kind }
    }
    use DiskAccess::{ReadOnly, ReadWrite};

    #[test]
    fn only_what_is_granted_is_mounted_and_only_as_it_is_granted() {
        assert_eq!(judged(vec![], &ask("models", ReadOnly)).unwrap().source, Source::Directory("/srv/models".into()));
        judged(vec![], &ask("work", ReadWrite)).unwrap();
        for (share, access, says) in [
            ("other", ReadOnly, "denied by mounts.other in the grants: there is no such section; there are: app, models, secrets, work"),
            ("models", ReadWrite, "denied by mounts.models in the grants: it is granted read-only (no write = true)"),
            ("secrets", ReadWrite, "granted read-only"),
            ("app", ReadWrite, "an image is read-only"),
        ] {
            let sentence = judged(vec![], &ask(share, access)).unwrap_err().to_string();
            assert!(sentence.contains(says), "{sentence}");
        }
    }

    #[test]
    fn what_is_attached_is_attached_again_only_as_it_is() {
        judged(vec![mounted("work", ReadWrite, MountKind::Directory)], &ask("work", ReadWrite)).unwrap();
        for held in [mounted("work", ReadWrite, MountKind::Directory), mounted("work", ReadOnly, MountKind::Tmpfs)] {
            let error = judged(vec![held], &ask("work", ReadOnly)).unwrap_err();
            assert!(error.kind() == "conflict" && error.to_string().contains("detach it first"), "{error}");
        }
    }

    #[test]
    fn a_vm_has_eight_mounts_at_most() {
        let many = |n: usize| (0..n).map(|n| mounted(&format!("m{n}"), ReadOnly, MountKind::Tmpfs)).collect::<Vec<_>>();
        judged(many(MAX_SHARES - 1), &ask("models", ReadOnly)).unwrap();
        assert_eq!(judged(many(MAX_SHARES), &ask("models", ReadOnly)).unwrap_err().kind(), "exhausted");
        let mut full = many(MAX_SHARES - 1);
        full.push(mounted("models", ReadOnly, MountKind::Directory));
        judged(full, &ask("models", ReadOnly)).unwrap();
    }

    #[test]
    fn another_vms_claim_gets_nothing() {
        let mut other = ask("models", ReadOnly);
        other.tenancy.claim.serial = 2;
        assert_eq!(judged(vec![], &other).unwrap_err().kind(), "not-found");
    }
}
