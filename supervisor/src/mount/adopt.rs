//! At start: the mounts that an earlier supervisor held.
//!
//! | the ledger has it | the store passed it on | then                                                                            |
//! |-------------------|------------------------|---------------------------------------------------------------------------------|
//! | yes               | yes                    | held, as it was: also its content, and also where the grants changed since       |
//! | yes               | no                     | a directory or image is made again, as the grants have it now; what can't be made, and a tmpfs, whose content is lost, leaves the ledger with a note in the audit |
//! | no                | yes                    | let go                                                                          |
//!
//! A tmpfs that was lost is not made again by itself: an empty one in its place would start a VM without what was in it. Whoever attaches it gets a new one, sees that
//! it is empty, and fills it.

use super::{Held, attach, detach, let_go, store, tree};
use crate::ledger::{MountKind, Mounted};
use crate::listen::Stored;
use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::name::Tenancy;
use diarch_ipc::operation::{AttachMount, OPERATIONS};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

/// Takes over what was passed on. Runs before the first request does; what has to be made again is made in tasks that hold their VM's lock.
pub fn adopt(supervisor: &Rc<Supervisor>, passed: Vec<Stored>) {
    let mut passed: HashMap<String, OwnedFd> = passed.into_iter().map(|stored| (stored.name, stored.fd)).collect();
    for vm in supervisor.slots.borrow_mut().values_mut() {
        let tenancy = Tenancy { slot: vm.record.slot, claim: vm.record.claim };
        let mut missing = Vec::new();
        for mounted in &vm.record.resources.mounts {
            // The latest, where a supervisor died while it put a copy in its place.
            let latest = passed.keys().filter_map(|name| store::generation(name, tenancy, &mounted.share)).max();
            let kept = latest.and_then(|generation| Some((passed.remove(&store::name(tenancy, &mounted.share, generation))?, generation)));
            match kept {
                Some((mount, generation)) => drop(vm.mounts.insert(mounted.share.clone(), Held { mount: Arc::new(mount), generation })),
                None => missing.push(mounted.clone()),
            }
        }
        if !missing.is_empty() {
            // Nobody else can have it: nothing else has begun.
            let lock = vm.lock.clone().try_lock_owned();
            let supervisor = Rc::clone(supervisor);
            tokio::task::spawn_local(async move {
                for mounted in missing {
                    if let Err(error) = again(&supervisor, tenancy, &mounted).await {
                        give_up(&supervisor, tenancy, &mounted, &error);
                    }
                }
                drop(lock);
            });
        }
    }
    for name in passed.keys() {
        detach::forget(supervisor, name);
    }
    let left: Vec<Arc<OwnedFd>> = passed.into_values().map(Arc::new).collect();
    let supervisor = Rc::clone(supervisor);
    tokio::task::spawn_local(async move { let_go(&supervisor, left).await });
}

/// Makes it again, under the grants of today.
async fn again(supervisor: &Rc<Supervisor>, tenancy: Tenancy, mounted: &Mounted) -> Result<(), Error> {
    if mounted.kind == MountKind::Tmpfs {
        return Err(Error::NotFound { what: "its content, which was in memory alone: attach it again and fill it".into() });
    }
    let ask = AttachMount { tenancy, share: mounted.share.clone(), access: mounted.access };
    let vetted = attach::vet(&supervisor.grants, supervisor.worker_uid, &supervisor.slots.borrow(), &supervisor.ledger, &ask)?;
    let row = OPERATIONS.iter().find(|row| row.name == "mount.attach").ok_or_else(|| Error::NotFound { what: "mount.attach in the table".into() })?;
    let host = Arc::clone(&supervisor.host);
    let mount = supervisor.act(row, tenancy.slot, "mount again", move || tree::make(vetted, &host)).await??;
    attach::hold(supervisor, &ask, mounted.kind, mount).await
}

fn give_up(supervisor: &Supervisor, tenancy: Tenancy, mounted: &Mounted, error: &Error) {
    let Ok(mut record) = supervisor.with(tenancy, |vm| vm.record.clone()) else { return };
    let note = format!("slot {} ({}): the mount {} is gone with the earlier supervisor: {error}", tenancy.slot, record.label, mounted.share);
    tracing::warn!("{note}");
    supervisor.note(&note);
    record.resources.mounts.retain(|other| other.share != mounted.share);
    supervisor.record_or_believe(record);
}
