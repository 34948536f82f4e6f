//! A VM in a rehearsal: the same request, vetted and written down as any other, and a QEMU that an ordinary user can start.

use diarch_ipc::spec::{Backend, Egress, Nic, VmSpec};

/// The specification without what needs root. A card keeps its place and its address, and leads nowhere.
pub fn playable(spec: &VmSpec) -> VmSpec {
    let card = |nic: &Nic| match nic.backend {
        Backend::User { .. } => nic.clone(),
        Backend::Tap { .. } => Nic { backend: Backend::User { egress: Egress::Closed, forwards: Vec::new() }, ..nic.clone() },
    };
    VmSpec { nics: spec.nics.iter().map(card).collect(), shares: Vec::new(), ..spec.clone() }
}
