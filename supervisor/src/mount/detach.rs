//! `mount.detach`: takes it away.

use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::{DetachMount, MountDetached, Operation};
use std::rc::Rc;

pub async fn detach(_supervisor: &Rc<Supervisor>, _row: &'static Operation, _ask: &DetachMount) -> Result<MountDetached, Error> {
    Err(Error::Unsupported { missing: "this operation is not built yet".into() })
}
