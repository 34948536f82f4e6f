//! Closes what came from a peer, on threads that may wait for it: whoever sends a socket says by `SO_LINGER` how long its last close takes, and the loop has other peers.

use crate::pool::Pool;
use rustix::net::sockopt;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

/// More than one, as one can be made to wait: see [`close`].
const MOST: usize = 4;
const STACK_BYTES: usize = 64 * 1024;

/// Closes them, soon and elsewhere.
pub fn close(fds: Vec<OwnedFd>) {
    static POOL: OnceLock<Pool> = OnceLock::new();
    let pool = POOL.get_or_init(|| Pool::new("diarch-closer", MOST, STACK_BYTES));
    // What can't be handed over (no thread can be made) is closed here: to keep it would cost what is short.
    let _ = pool.run(move || {
        for fd in fds {
            // Nothing that is honest is a socket with something left to say. A peer that has kept the socket can set it again, and so hold one thread up.
            let _ = sockopt::set_socket_linger(&fd, None);
        }
    });
}
