//! What is mounted for a VM.

pub mod attach;
pub mod detach;
