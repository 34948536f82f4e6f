//! A descriptor whose readiness is waited for.

use std::io;
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers with the runtime for reading.
// tokio deprecates this for types that could hand out a descriptor they don't own (tokio pull request 8587); an `OwnedFd` can't. Its
// successor is an `unsafe fn`, and this crate forbids those.
#[allow(deprecated)]
pub fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}
