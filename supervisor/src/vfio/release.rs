//! `vfio.release`: gives a group back to its drivers.

use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::{Operation, Unbind, Unbound};
use std::rc::Rc;

pub async fn release(_supervisor: &Rc<Supervisor>, _row: &'static Operation, _ask: &Unbind) -> Result<Unbound, Error> {
    Err(Error::Unsupported { missing: "this operation is not built yet".into() })
}
