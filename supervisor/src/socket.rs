//! `socket.connect`: a connection to a granted socket.

use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::{ConnectSocket, Operation, SocketConnected};
use std::os::fd::OwnedFd;
use std::rc::Rc;

pub async fn connect(_supervisor: &Rc<Supervisor>, _row: &'static Operation, _ask: &ConnectSocket) -> Result<(SocketConnected, Vec<Rc<OwnedFd>>), Error> {
    Err(Error::Unsupported { missing: "this operation is not built yet".into() })
}
