//! The unprivileged half of Diarch: it holds all policy.

#![forbid(unsafe_code)]

pub mod arguments;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod health;
pub mod journal;
pub mod json;
pub mod logs;
pub mod plan;
pub mod qmp;
pub mod ready;
pub mod state;
pub mod supervisor;
pub mod systemd;
pub mod vm;
pub mod vmfile;
pub mod watch;
pub mod worker;
