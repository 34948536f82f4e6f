//! When systemd stops the worker because the whole host goes down: the guests are powered off first. (Otherwise VMs run on.)
//!
//! ```text
//!   SIGTERM -> SystemState of systemd is "stopping"? --no, or can't say--> the worker ends
//!                 | yes
//!                 v
//!   every VM is brought down as by `diarch vm stop`, all at once, and not held: the next boot starts it again
//!   meanwhile: nothing is started, systemd is asked for more time, the watchdog is fed
//! ```
//!
//! A VM's scope is ordered before the worker's unit, so that systemd does not end it meanwhile.

use super::status;
use crate::systemd::Systemd;
use crate::worker::Worker;
use sd_notify::NotifyState;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// For systemd's answer: when the host goes down it is busy with just that, and a "no" for want of an answer would cost every guest its file systems. (A bus that
/// hangs makes a restart by hand as slow. One that is not there is no at once.)
const ANSWER: Duration = Duration::from_secs(8);
/// The longest way down of a VM (power button, quit, kill) and some room.
const ALL_DOWN: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(100);
/// Asked for again long before it is over (`EXTEND_TIMEOUT_USEC=`, sd_notify(3)).
const MORE_TIME: Duration = Duration::from_secs(10);

/// Ends when the worker may.
pub async fn close(worker: Arc<Worker>) {
    more_time();
    if !timeout(ANSWER, Systemd::default().host_goes_down()).await.unwrap_or(false) {
        return;
    }
    let running = worker.close();
    worker.journal.note(None, "host.stopping", format!("the host goes down: {running} VMs are brought down"));
    let until = Instant::now() + ALL_DOWN;
    let mut asked = None;
    loop {
        let left = worker.not_down();
        if left.is_empty() {
            return;
        }
        if Instant::now() >= until {
            worker.journal.warn("host.stopping", format!("not down within {} s, and left to systemd: {}", ALL_DOWN.as_secs(), left.join(", ")));
            return;
        }
        if asked.is_none_or(|at: Instant| at.elapsed() >= MORE_TIME / 4) {
            asked = Some(Instant::now());
            more_time();
            status::tell(&format!("the host goes down: waiting for {}", left.join(", ")));
        }
        sleep(LOOK).await;
    }
}

fn more_time() {
    let more = u32::try_from(MORE_TIME.as_micros()).unwrap_or(u32::MAX);
    let _ = sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(more)]);
}
