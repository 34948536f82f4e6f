//! What is mounted for a VM, and nowhere else.
//!
//! A mount is *held*, and never put anywhere: it hangs from a descriptor, in no tree of directories, so that no process of the host can name it and
//! `/proc/*/mountinfo` shows nothing of it. Nothing is below it but its own files, and `..` at its root is the root. A jail that is to see it has a copy in its tree
//! ([`copy`], `vm::share`).
//!
//! ```text
//!   mount.attach:  vet -> make (helper thread) -> into the service manager's store -> into the ledger -> held
//!   mount.detach:  vet -> out of the ledger -> out of the store -> let go (helper thread)
//! ```
//!
//! The order keeps ledger and kernel equal whenever the supervisor dies: a mount that nobody holds is gone, so nothing has to be undone. What the store
//! passes to the next supervisor and the ledger does not have is let go; what the ledger has and the store lost is made again, or, if its content
//! was in memory alone, taken out of the ledger and named in the audit.
//!
//! | module   | noun                                                                  |
//! |----------|-----------------------------------------------------------------------|
//! | `attach` | `mount.attach`                                                        |
//! | `detach` | `mount.detach`                                                        |
//! | `tree`   | the mount itself, with the flags that it always has                   |
//! | `image`  | the file of a read-only file system, and the loop device under it     |
//! | `store`  | the service manager's file descriptor store                           |
//! | `adopt`  | (at start) the mounts that an earlier supervisor held                 |

pub mod adopt;
pub mod attach;
pub mod detach;
mod image;
pub mod store;
pub mod tree;

use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::name::{ShareName, Tenancy};
use diarch_ipc::operation::Operation;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

/// A mount that is held.
#[derive(Debug, Clone)]
pub struct Held {
    pub mount: Arc<OwnedFd>,
    /// How often a copy has taken its place; part of its name in the store.
    pub generation: u64,
}

/// A mount for one start of the VM. What is held may be another one afterwards, with the same content.
pub(crate) async fn copy(supervisor: &Rc<Supervisor>, row: &Operation, tenancy: Tenancy, share: &ShareName) -> Result<OwnedFd, Error> {
    let missing = || Error::NotFound { what: format!("the share {share} of slot {}: mount.attach comes first", tenancy.slot) };
    let held = supervisor.with(tenancy, |vm| vm.mounts.get(share).cloned())?.ok_or_else(missing)?;
    let source = Arc::clone(&held.mount);
    let copied = supervisor.act(row, tenancy.slot, "copy a mount", move || tree::copy(&source)).await?;
    let copied = copied.map_err(|error| Error::Failed {
        step: format!("copy the mount {share}"),
        errno: error.raw_os_error(),
        detail: format!("{error}; a supervisor died while it did this: detach it, and attach it again"),
    })?;
    if let Some(instead) = copied.instead {
        let next = Held { mount: Arc::new(instead), generation: held.generation + 1 };
        // The old one is dead: the new one is kept first, so that there is always one.
        attach::keep(supervisor, tenancy, share, &next);
        detach::forget(supervisor, &store::name(tenancy, share, held.generation));
        if let Some(vm) = supervisor.slots.borrow_mut().get_mut(&tenancy.slot) {
            vm.mounts.insert(share.clone(), next);
        }
        let_go(supervisor, vec![held.mount]).await;
    }
    Ok(copied.mount)
}

/// Closes what was held, off the loop: the kernel waits until nobody looks at the mount any more, and a network's file system may take its time.
pub(crate) async fn let_go(supervisor: &Rc<Supervisor>, mounts: Vec<Arc<OwnedFd>>) {
    if mounts.is_empty() {
        return;
    }
    if let Err(error) = supervisor.helpers.run("unmount", move || drop(mounts)).await {
        tracing::error!(%error, "a mount could not be let go on a helper");
    }
}
