//! `vfio.recover`: resets what a dirty exit left.

use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::{Operation, Recover, Recovered};
use std::rc::Rc;

pub async fn recover(_supervisor: &Rc<Supervisor>, _row: &'static Operation, _ask: &Recover) -> Result<Recovered, Error> {
    Err(Error::Unsupported { missing: "this operation is not built yet".into() })
}
