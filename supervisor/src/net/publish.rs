//! `net.publish` and `net.withdraw`: ports of the host that lead into a VM.

use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::{Operation, Publish, Published, Withdraw, Withdrawn};
use std::rc::Rc;

pub async fn publish(_supervisor: &Rc<Supervisor>, _row: &'static Operation, _ask: &Publish) -> Result<Published, Error> {
    Err(Error::Unsupported { missing: "this operation is not built yet".into() })
}

pub async fn withdraw(_supervisor: &Rc<Supervisor>, _row: &'static Operation, _ask: &Withdraw) -> Result<Withdrawn, Error> {
    Err(Error::Unsupported { missing: "this operation is not built yet".into() })
}
