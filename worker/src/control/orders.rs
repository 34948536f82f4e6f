//! Orders to a VM, and their progress.

use super::protocol::{FailureKind, Phase, Progress, Reply};
use super::server::{Answered, Client};
use crate::vm::Status;
use crate::worker::{Accepted, Goal, Order, Worker, failure};
use std::sync::Arc;
use tokio::time::Instant;

/// Gives the order; with `wait`, tells of every phase until the VM is where it was asked to be, or won't get there.
pub async fn carry_out(client: &mut Client, worker: &Arc<Worker>, order: Order, name: &str, wait: bool) -> Answered {
    let started = Instant::now();
    let who = client.who.clone();
    let Accepted { name, mut status, goal } = match worker.order(order, name, &who).await {
        Ok(accepted) => accepted,
        Err(failure) => return Ok(Err(failure)),
    };
    if !wait {
        return Ok(Ok(()));
    }
    let mut told = None;
    loop {
        let now = status.borrow_and_update().clone();
        let message = now.reason.clone().unwrap_or_default();
        if told.as_ref() != Some(&(now.phase, message.clone())) {
            told = Some((now.phase, message.clone()));
            let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            client.reply(&Reply::Progress(Progress { name: name.clone(), phase: now.phase, message, elapsed_ms })).await?;
        }
        match reached(&now, goal) {
            Some(Ok(())) => return Ok(Ok(())),
            Some(Err(reason)) => return Ok(Err(failure(FailureKind::Failed, reason))),
            None => {}
        }
        tokio::select! {
            changed = status.changed() => if changed.is_err() {
                // The task has ended: the VM went with its file.
                return Ok(if goal == Goal::Stopped { Ok(()) } else { Err(failure(FailureKind::Failed, format!("{name} is gone"))) });
            },
            () = Client::gone(&mut client.read) => return Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }
}

fn reached(status: &Status, goal: Goal) -> Option<Result<(), String>> {
    let reason = || status.reason.clone().unwrap_or_else(|| "without a reason".into());
    match goal {
        // It runs on as before, and this restart is not coming.
        Goal::Healthy { restarts, .. } if status.seen_restarts < restarts && status.refused.as_ref().is_some_and(|refused| refused.restarts >= restarts) => {
            status.refused.as_ref().map(|refused| Err(refused.sentence.clone()))
        }
        Goal::Stopped => (status.phase == Phase::Stopped).then_some(Ok(())),
        Goal::Healthy { starts, restarts } if status.seen_starts >= starts && status.seen_restarts >= restarts => match status.phase {
            Phase::Healthy => Some(Ok(())),
            Phase::Unknown | Phase::Failed | Phase::BackOff | Phase::Stopped => Some(Err(reason())),
            Phase::Starting | Phase::Booting | Phase::Unhealthy | Phase::Stopping => None,
        },
        Goal::Healthy { .. } => None,
    }
}
