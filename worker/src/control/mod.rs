//! The socket that people's commands come in by.

mod console;
mod follow;
mod orders;
pub mod protocol;
pub mod server;
pub mod view;
