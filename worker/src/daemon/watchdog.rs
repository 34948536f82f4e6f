//! systemd's watchdog is fed when the main loop has answered, and at no other time.
//!
//! ```text
//!   feed --ping--> main loop (between two of its events) --answer--> feed --WATCHDOG=1--> systemd
//! ```
//!
//! The loop waits for nothing that can hang (see `worker`), and it ends when one of the tasks that it depends on does: so who answers here does the
//! worker's work.

use sd_notify::NotifyState;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};

/// Answered by dropping or sending.
pub type Ping = oneshot::Sender<()>;

/// Beats in one period of systemd's: an answer may take most of it, and still be in time.
const BEATS: u32 = 4;

/// Asks the loop for ever, and feeds `beat` for each answer.
pub async fn feed(period: Duration, pings: mpsc::Sender<Ping>, beat: impl Fn()) {
    // One before the loop runs: reading the first files counts as life.
    beat();
    let mut due = interval((period / BEATS).max(Duration::from_millis(20)));
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        let (ping, mut answer) = oneshot::channel();
        if pings.send(ping).await.is_err() {
            // The loop has ended, and with it the worker.
            return std::future::pending().await;
        }
        let answered = match timeout(period / 2, &mut answer).await {
            Ok(answered) => answered,
            Err(_) => {
                tracing::error!("the main loop has been silent for {} ms; systemd restarts this worker soon, and the VMs run on", (period / 2).as_millis());
                answer.await
            }
        };
        if answered.is_ok() {
            beat();
        }
    }
}

/// To systemd.
pub fn beat() {
    let _ = sd_notify::notify(&[NotifyState::Watchdog]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test(start_paused = true)]
    async fn only_a_loop_that_answers_is_fed_for() {
        let period = Duration::from_secs(10);
        let beats = Arc::new(AtomicU32::new(0));
        let (pings_in, mut pings) = mpsc::channel::<Ping>(1);
        let counted = Arc::clone(&beats);
        tokio::spawn(feed(period, pings_in, move || {
            counted.fetch_add(1, Ordering::SeqCst);
        }));
        // The first comes by itself.
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(beats.load(Ordering::SeqCst), 1);
        for _ in 0..8 {
            let _ = pings.recv().await.unwrap().send(());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        let alive = beats.load(Ordering::SeqCst);
        assert_eq!(alive, 9);
        // A loop that hangs: no beat, however long.
        tokio::time::sleep(period * 5).await;
        assert_eq!(beats.load(Ordering::SeqCst), alive);
        // And one that goes on.
        let _ = pings.recv().await.unwrap().send(());
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(beats.load(Ordering::SeqCst), alive + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_within_most_of_the_period_keeps_the_beats_closer_than_the_period() {
        let period = Duration::from_secs(10);
        let (pings_in, mut pings) = mpsc::channel::<Ping>(1);
        let (beats_in, mut beats) = mpsc::unbounded_channel();
        tokio::spawn(feed(period, pings_in, move || {
            let _ = beats_in.send(tokio::time::Instant::now());
        }));
        tokio::spawn(async move {
            while let Some(ping) = pings.recv().await {
                // As slow as one reading of hung files makes the loop.
                tokio::time::sleep(crate::worker::READ_WITHIN).await;
                let _ = ping.send(());
            }
        });
        let mut last = beats.recv().await.unwrap();
        for _ in 0..20 {
            let next = beats.recv().await.unwrap();
            assert!(next - last < period / 2, "{:?}", next - last);
            last = next;
        }
    }
}
