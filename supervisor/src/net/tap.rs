//! `tap.open`: a network interface whose other end is a VM.

use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::{OpenTap, Operation, TapOpened};
use std::os::fd::OwnedFd;
use std::rc::Rc;

pub async fn open(_supervisor: &Rc<Supervisor>, _row: &'static Operation, _ask: &OpenTap) -> Result<(TapOpened, Vec<Rc<OwnedFd>>), Error> {
    Err(Error::Unsupported { missing: "this operation is not built yet".into() })
}
