//! A QEMU on its way down.
//!
//! ```text
//!   power button (QMP system_powerdown) --30 s--> QMP quit --5 s--> kill (vm.signal) --> ended
//!                                     an operator's kill, at any time ----^
//! ```

use super::qemu::Qemu;
use super::{Stage, Vm, Want};
use crate::control::protocol::Phase;
use crate::supervisor::Link;
use diarch_ipc::operation::SignalKind;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

/// A guest flushes its disks within this, or hangs.
const POWER_OFF: Duration = Duration::from_secs(30);
/// One that failed its health probe seldom hears the button; its users wait meanwhile.
const POWER_OFF_UNHEALTHY: Duration = Duration::from_secs(10);
/// A guest that was still booting did not hear the first press.
const PRESS_AGAIN: Duration = Duration::from_secs(5);
/// QEMU closes its disks and ends.
const QUIT: Duration = Duration::from_secs(5);
/// For one word of QEMU's on the monitor.
const WORD: Duration = Duration::from_secs(2);
/// QEMU greets within some ten milliseconds.
const GREETING: Duration = Duration::from_secs(5);
/// After SIGKILL only a process that the kernel holds (a device, a dead file system) is still there; the signal is repeated
/// for the case that the supervisor was away.
const KILLED: Duration = Duration::from_secs(5);

/// Why, and so how gently.
#[derive(Debug)]
pub enum Cause {
    Stop,
    Kill,
    Failure(String),
}

impl Vm {
    pub(super) async fn bring_down(&mut self, mut qemu: Box<Qemu>, cause: Cause) -> Stage {
        let why = match &cause {
            Cause::Failure(reason) => reason.clone(),
            Cause::Stop | Cause::Kill => self.intent.borrow().why.clone(),
        };
        self.set(|status| {
            status.phase = Phase::Stopping;
            status.reason = Some(why.clone());
        });
        self.note("vm.stopping", why);
        let started = Instant::now();
        let limit = match &cause {
            Cause::Stop => Some(POWER_OFF),
            Cause::Failure(_) => Some(POWER_OFF_UNHEALTHY),
            Cause::Kill => None,
        };
        let how = match limit {
            Some(limit) if self.gently(&qemu, limit).await => "it went down by itself",
            Some(_) | None => {
                self.kill(&qemu).await;
                "it was killed"
            }
        };
        let status = qemu.exit_status(&self.context.link, &self.name).await;
        self.take_note_of_exit(status);
        let took = started.elapsed().as_millis();
        self.set(|now| {
            now.pid = None;
            now.healthy_ms = None;
            now.last_exit = Some(format!("{how} ({status})"));
        });
        self.note("vm.stopped", format!("{how} within {took} ms ({status})"));
        drop(qemu);
        match cause {
            Cause::Failure(reason) => self.after_failure(reason),
            Cause::Stop | Cause::Kill => self.wanted(),
        }
    }

    /// The power button, and then QMP's `quit`. True: it ended. False: force is called for.
    async fn gently(&mut self, qemu: &Qemu, limit: Duration) -> bool {
        let power_off = async {
            let until = Instant::now() + limit;
            // One that was adopted a moment ago has not been greeted; one that was refuses the second time, which is no harm.
            if qemu.monitor.greet(GREETING).await.is_err() {
                return;
            }
            loop {
                if qemu.monitor.execute("system_powerdown", WORD).await.is_err() {
                    // A monitor that is closed or mute presses no button; waiting for the guest is of no use.
                    return;
                }
                sleep(PRESS_AGAIN.min(until.saturating_duration_since(Instant::now()))).await;
                if Instant::now() >= until {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            () = qemu.ended() => return true,
            () = self.kill_called_for() => return false,
            () = power_off => {}
        }
        let quit = async {
            if qemu.monitor.execute("quit", WORD).await.is_ok() {
                sleep(QUIT).await;
            }
        };
        tokio::select! {
            biased;
            () = qemu.ended() => true,
            () = self.kill_called_for() => false,
            () = quit => false,
        }
    }

    async fn kill_called_for(&mut self) {
        while self.intent.borrow_and_update().want != Want::Kill {
            self.changed().await;
        }
    }

    /// Until it is dead. There is nothing else to be done with this VM, and no other VM waits.
    async fn kill(&self, qemu: &Qemu) {
        tokio::select! {
            biased;
            () = qemu.ended() => {}
            () = self.keep_killing(&self.context.link, qemu) => {}
        }
    }

    async fn keep_killing(&self, link: &Link, qemu: &Qemu) {
        for attempt in 1u32.. {
            let until = Instant::now() + KILLED;
            let sent = timeout_at(until, link.signal(qemu.tenancy, SignalKind::Kill)).await;
            tokio::time::sleep_until(until).await;
            let trouble = match sent {
                Ok(Ok(())) => "it does not die of it".to_owned(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            self.set(|status| status.reason = Some(format!("it was sent SIGKILL {attempt} times: {trouble}")));
            tracing::warn!(vm = %self.name, attempt, %trouble, "a QEMU can't be killed");
        }
    }
}
