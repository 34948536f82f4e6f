//! The socket that people's commands come in by.

pub mod protocol;
