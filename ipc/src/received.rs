//! Descriptors that a peer sent.

use std::ops::Deref;
use std::os::fd::OwnedFd;

/// Where descriptors are closed that come from a peer, its connection included.
pub type Close = fn(Vec<OwnedFd>);

/// Descriptors of a peer's choice. To close one can take as long as the peer likes (a TCP socket that lingers, a file on a mute file system), and so can it to close a
/// connection in which such a one lies unread. So whoever may not wait says who does it.
#[derive(Debug)]
pub struct Received {
    fds: Vec<OwnedFd>,
    close: Close,
}

impl Received {
    pub fn new(fds: Vec<OwnedFd>, close: Close) -> Self {
        Self { fds, close }
    }

    /// For whoever knows what they are, or may wait.
    pub fn into_inner(mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }
}

impl Deref for Received {
    type Target = [OwnedFd];
    fn deref(&self) -> &[OwnedFd] {
        &self.fds
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if !self.fds.is_empty() {
            (self.close)(std::mem::take(&mut self.fds));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    static CLOSED: AtomicUsize = AtomicUsize::new(0);

    #[test]
    fn what_is_not_taken_is_closed_by_whom_it_was_told() {
        let fds = || vec![OwnedFd::from(std::fs::File::open("/dev/null").unwrap())];
        let close: Close = |fds| {
            CLOSED.fetch_add(fds.len(), Ordering::Relaxed);
        };
        assert_eq!(Received::new(fds(), close).into_inner().len(), 1);
        assert_eq!(CLOSED.load(Ordering::Relaxed), 0);
        drop(Received::new(fds(), close));
        assert_eq!(CLOSED.load(Ordering::Relaxed), 1);
    }
}
