//! The worker in one line, for `systemctl status diarch-worker`: told when it changes, and not otherwise.

use crate::control::protocol::Phase;
use crate::worker::Worker;
use diarch_ipc::client::State;
use diarch_ipc::frame::printable;
use sd_notify::NotifyState;
use std::sync::Arc;
use std::time::Duration;

/// Changes within this are told together: fifty VMs that start are not fifty messages to PID 1.
const TOGETHER: Duration = Duration::from_millis(200);
/// Longer reasons are cut.
const LONGEST: usize = 300;

/// How many VMs are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    pub running: usize,
    pub unhealthy: usize,
    /// Wanted, and not running: failed or waiting for their next start.
    pub down: usize,
}

impl Census {
    pub fn of(phases: impl Iterator<Item = Phase>) -> Self {
        let mut census = Census::default();
        for phase in phases {
            match phase {
                Phase::Booting | Phase::Healthy | Phase::Stopping => census.running += 1,
                Phase::Unhealthy => {
                    census.running += 1;
                    census.unhealthy += 1;
                }
                Phase::BackOff | Phase::Failed => census.down += 1,
                Phase::Unknown | Phase::Starting | Phase::Stopped => {}
            }
        }
        census
    }
}

/// Tells for ever.
pub async fn keep(worker: Arc<Worker>) {
    let mut link = worker.link.state();
    let mut told = String::new();
    loop {
        let state = link.borrow_and_update().clone();
        let now = line(&state, worker.census(), worker.config.restart_pauses.len());
        if now != told {
            tell(&now);
            told = now;
        }
        let gone = tokio::select! {
            changed = link.changed() => changed.is_err(),
            () = worker.vm_changed() => false,
        };
        if gone {
            // The link's end is told by the main loop, as the last thing.
            return std::future::pending().await;
        }
        tokio::time::sleep(TOGETHER).await;
    }
}

pub fn tell(line: &str) {
    let _ = sd_notify::notify(&[NotifyState::Status(&printable(line, LONGEST))]);
}

fn line(state: &State, census: Option<Census>, restarts: usize) -> String {
    let supervisor = match state {
        State::Connecting => "supervisor: connecting".to_owned(),
        State::Ready { .. } => "supervisor connected".to_owned(),
        State::Lost { reason } => format!("supervisor lost: {reason}"),
        State::Restarting { attempt } => format!("supervisor lost; restart {attempt} of {restarts}"),
        State::GaveUp { reason } => format!("gave up: {reason}"),
    };
    let Some(census) = census else { return format!("what runs is not known yet; {supervisor}") };
    let mut line = match census.running {
        1 => "1 VM running".to_owned(),
        n => format!("{n} VMs running"),
    };
    for (count, word) in [(census.unhealthy, "unhealthy"), (census.down, "failed")] {
        if count > 0 {
            line += &format!(", {count} {word}");
        }
    }
    format!("{line}; {supervisor}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_many_run_and_how_the_supervisor_stands() {
        let ready = State::Ready { version: "1".into() };
        let census = Census::of([Phase::Healthy, Phase::Booting, Phase::Stopped, Phase::Starting, Phase::Unhealthy].into_iter());
        assert_eq!(line(&ready, Some(census), 3), "3 VMs running, 1 unhealthy; supervisor connected");
        let census = Census::of([Phase::Healthy, Phase::Failed, Phase::BackOff].into_iter());
        assert_eq!(line(&State::Restarting { attempt: 2 }, Some(census), 3), "1 VM running, 2 failed; supervisor lost; restart 2 of 3");
        assert_eq!(line(&State::Lost { reason: "closed".into() }, Some(Census::default()), 3), "0 VMs running; supervisor lost: closed");
    }
}
