//! What is mounted for a VM, and nowhere else.
//!
//! A mount is *held*, and never put anywhere: it hangs from a descriptor, in no tree of directories, so that no process of the host can name it and
//! `/proc/*/mountinfo` shows nothing of it. Whoever is to see it is handed the descriptor. Nothing is below it but its own files, and `..` at its root is the root.
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
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

/// Closes what was held, off the loop: the kernel waits until nobody looks at the mount any more, and a network's file system may take its time.
pub(crate) async fn let_go(supervisor: &Rc<Supervisor>, mounts: Vec<Arc<OwnedFd>>) {
    if mounts.is_empty() {
        return;
    }
    if let Err(error) = supervisor.helpers.run("unmount", move || drop(mounts)).await {
        tracing::error!(%error, "a mount could not be let go on a helper");
    }
}
