//! The unprivileged half of Diarch: it holds all policy.

#![forbid(unsafe_code)]

pub mod control;
