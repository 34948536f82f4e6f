//! `vfio.bind`: a PCI function with its whole IOMMU group.

use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::operation::{Bind, Bound, Operation};
use std::rc::Rc;

pub async fn bind(_supervisor: &Rc<Supervisor>, _row: &'static Operation, _ask: &Bind) -> Result<Bound, Error> {
    Err(Error::Unsupported { missing: "this operation is not built yet".into() })
}
