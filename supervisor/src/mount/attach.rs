//! `mount.attach`: something granted, mounted for one VM.

use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::{AttachMount, MountAttached, Operation};
use std::os::fd::OwnedFd;
use std::rc::Rc;

pub async fn attach(_supervisor: &Rc<Supervisor>, _row: &'static Operation, _ask: &AttachMount) -> Result<(MountAttached, Vec<Rc<OwnedFd>>), Error> {
    Err(Error::Unsupported { missing: "this operation is not built yet".into() })
}
