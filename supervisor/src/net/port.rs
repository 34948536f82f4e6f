//! `port.listen`: a port below 1024.

use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::{Listen, Listening, Operation};
use std::os::fd::OwnedFd;
use std::rc::Rc;

pub fn listen(_supervisor: &Rc<Supervisor>, _row: &'static Operation, _ask: &Listen) -> Result<(Listening, Vec<Rc<OwnedFd>>), Error> {
    Err(Error::Unsupported { missing: "this operation is not built yet".into() })
}
