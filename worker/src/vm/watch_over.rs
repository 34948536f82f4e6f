//! Over a QEMU that runs: its end, its monitor, its health, and what the worker wants of it.

use super::bring_down::Cause;
use super::ending::{Blame, Ending};
use super::pace::SETTLED_AFTER;
use super::qemu::{Happened, Origin, Qemu};
use super::trial::Trials;
use super::{Note, Stage, Vm, Want};
use crate::control::protocol::Phase;
use crate::health::{self, Target, Verdict};
use crate::journal::now_ms;
use crate::vmfile::{Desired, Health, Machine, Probe, RestartPolicy};
use diarch_ipc::spec::Accelerator;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};

/// QEMU greets within some ten milliseconds, unless it has hundreds of GiB to lay out first.
const GREETING: Duration = Duration::from_secs(30);
/// Guests boot some five times slower when a translator executes them.
const TCG_GRACE: u32 = 5;
/// A QEMU whose guest panicked ends by itself at once, unless it was told to stay for a debugger.
const AFTER_PANIC: Duration = Duration::from_secs(2);
/// A guest that reboots tries several ways of it one after the other (the keyboard controller, ACPI, ...), and QEMU tells of each (seen with
/// Linux on q35: twice within 100 ms). No guest boots so fast that two reboots are this close.
const ONE_REBOOT: Duration = Duration::from_secs(1);
/// A VM that ended by its own will after less than this is started again (policy `always`) as after a failure: it would spin otherwise.
const SHORT_LIFE: Duration = Duration::from_secs(10);

/// A probe task that ends with its owner.
struct Prober {
    task: AbortHandle,
    verdict: watch::Receiver<Verdict>,
    health: Health,
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Vm {
    pub(super) async fn watch_over(&mut self, mut qemu: Box<Qemu>) -> Stage {
        // An adopted one may be unwanted from the start.
        if let Some(cause) = self.called_off() {
            return Stage::Down(qemu, cause);
        }
        self.impaired = None;
        let monitor = Arc::clone(&qemu.monitor);
        let mut greeting = std::pin::pin!(async move { monitor.greet(GREETING).await });
        let mut greeted = false;
        let mut seen = qemu.monitor.seen();
        let mut resets = 0;
        let mut last_reset = None;
        let mut prober: Option<Prober> = None;
        let mut settled: Option<Instant> = None;
        let mut mute: Option<Instant> = None;
        let mut trials = Trials::default();
        self.take_note_of_health();
        self.look_for_restart(&mut trials);
        loop {
            let settling = at(settled);
            let trying_again = at(trials.again);
            let muted = at(mute);
            let verdict = async {
                match &mut prober {
                    Some(prober) => {
                        if prober.verdict.changed().await.is_err() {
                            std::future::pending::<()>().await;
                        }
                        prober.verdict.borrow_and_update().clone()
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                happened = qemu.happened() => match happened {
                    Happened::Ended => return self.ended(qemu).await,
                    Happened::Quarantined(reason) => self.set(|status| status.reason = Some(format!("quarantined by the supervisor: {reason}"))),
                    // As a guest that does not answer: no probe may see it, and nothing mends it but another start.
                    Happened::Impaired(reason) => {
                        settled = None;
                        self.set(|status| { status.phase = Phase::Unhealthy; status.reason = Some(reason.clone()); });
                        // The supervisor tells it again to whoever attaches.
                        if self.impaired.as_ref() != Some(&reason) {
                            self.note("vm.impaired", reason.clone());
                        }
                        self.impaired = Some(reason.clone());
                        if self.desired().is_some_and(|desired| desired.restart != RestartPolicy::Never) {
                            return Stage::Down(qemu, Cause::Failure(reason));
                        }
                    }
                },
                answer = &mut greeting, if !greeted => {
                    greeted = true;
                    match answer {
                        Ok(runs) => {
                            let took = now_ms().saturating_sub(qemu.spawned_ms);
                            match qemu.origin {
                                Origin::Spawned if runs => self.note("vm.running", format!("QMP says running, {took} ms after the start")),
                                Origin::Spawned => self.note("vm.paused", "QEMU runs, and its guest is paused"),
                                Origin::Adopted => {}
                            }
                            prober = self.prober(&qemu, qemu.age());
                            if prober.is_none() {
                                settled = self.healthy();
                            }
                        }
                        // Perhaps it is just ending: its end says more.
                        Err(_) if qemu.origin == Origin::Spawned => mute = Some(Instant::now() + Duration::from_secs(1)),
                        Err(error) => {
                            self.set(|status| status.reason = Some(error.to_string()));
                            self.note("vm.mute", error.to_string());
                            prober = self.prober(&qemu, qemu.age());
                        }
                    }
                }
                () = muted => return Stage::Down(qemu, Cause::Failure("QEMU's monitor does not speak".into())),
                changed = self.intent.changed() => {
                    if changed.is_err() {
                        std::future::pending::<()>().await;
                    }
                    if let Some(cause) = self.called_off() {
                        return Stage::Down(qemu, cause);
                    }
                    self.take_note_of_file();
                    self.take_note_of_health();
                    self.look_for_restart(&mut trials);
                    if greeted && mute.is_none() && prober.as_ref().map(|prober| &prober.health) != self.health.as_ref() {
                        prober = self.prober(&qemu, qemu.age());
                        if prober.is_none() {
                            settled = self.healthy();
                        }
                    }
                }
                Ok(()) = seen.changed() => {
                    let (now, panicked) = { let seen = seen.borrow_and_update(); (seen.guest_resets, seen.panicked) };
                    let news = std::mem::replace(&mut resets, now) < now;
                    if news && last_reset.replace(Instant::now()).is_none_or(|last: Instant| last.elapsed() >= ONE_REBOOT) {
                        self.set(|status| status.guest_reboots = status.guest_reboots.saturating_add(1));
                        self.note("vm.guest-reboot", "the guest rebooted itself");
                        // It boots again, and has the time for it that a start has.
                        if prober.is_some() && self.impaired.is_none() {
                            self.set(|status| status.phase = Phase::Booting);
                            settled = None;
                            prober = self.prober(&qemu, Duration::ZERO);
                        }
                    }
                    if panicked {
                        self.note("vm.guest-panic", "the guest's kernel panicked");
                        tokio::select! {
                            () = qemu.ended() => return self.ended(qemu).await,
                            () = sleep(AFTER_PANIC) => return Stage::Down(qemu, Cause::Failure("the guest's kernel panicked".into())),
                        }
                    }
                }
                verdict = verdict => match verdict {
                    Verdict::Unknown => {}
                    Verdict::Healthy => settled = self.healthy(),
                    Verdict::Unhealthy(reason) => {
                        settled = None;
                        // What follows from the lack of a part is not the reason.
                        let shown = self.impaired.clone().unwrap_or_else(|| reason.clone());
                        self.set(|status| { status.phase = Phase::Unhealthy; status.reason = Some(shown.clone()); });
                        self.note("vm.unhealthy", reason.clone());
                        if self.desired().is_some_and(|desired| desired.restart != RestartPolicy::Never) {
                            return Stage::Down(qemu, Cause::Failure(reason));
                        }
                    }
                },
                outcome = trials.outcome() => if self.tried(&mut trials, outcome) {
                    return Stage::Down(qemu, Cause::Stop);
                },
                () = trying_again => self.try_again(&mut trials),
                () = settling => {
                    settled = None;
                    self.pace.forget();
                }
            }
        }
    }

    fn desired(&self) -> Option<Arc<Desired>> {
        self.intent.borrow().desired.clone()
    }

    /// Whether the worker wants this QEMU gone, whatever comes after it.
    fn called_off(&mut self) -> Option<Cause> {
        let intent = self.intent.borrow_and_update();
        match intent.want {
            Want::Kill => Some(Cause::Kill),
            Want::Stop => Some(Cause::Stop),
            Want::Run => None,
        }
    }

    /// A file that changed in nothing that needs another QEMU.
    fn take_note_of_file(&self) {
        let intent = self.intent.borrow();
        if let Some(desired) = &intent.desired {
            self.status.send_if_modified(|status| {
                let changed = status.revision.as_ref() != Some(&desired.revision) || status.seen_starts != intent.starts;
                status.revision = Some(desired.revision.clone());
                status.file = Some(desired.file.clone());
                status.seen_starts = intent.starts;
                changed
            });
        }
    }

    /// A file that asks for another machine may come with a probe that only that machine answers: until it runs, the old one counts.
    fn take_note_of_health(&mut self) {
        if let Some(desired) = self.desired()
            && self.status.borrow().machine.as_deref().is_none_or(|machine| *machine == desired.machine)
        {
            self.health = desired.health.clone();
        }
    }

    fn prober(&self, qemu: &Qemu, booting_for: Duration) -> Option<Prober> {
        let health = self.health.clone()?;
        let machine: Arc<Machine> = self.status.borrow().machine.clone().or_else(|| Some(Arc::new(self.desired()?.machine.clone())))?;
        let address = match &health.probe {
            Probe::Http { host_port, .. } | Probe::Tcp { host_port } => {
                let guest = self.status.borrow().tap.as_ref().and_then(|tap| tap.address);
                Some(machine.probe_address(*host_port, guest.map(|address| address.0)))
            }
            Probe::Qmp => None,
        };
        let slow = if self.status.borrow().accelerator == Some(Accelerator::Tcg) { TCG_GRACE } else { 1 };
        let grace = (health.start_grace * slow).saturating_sub(booting_for);
        let (to, verdict) = watch::channel(Verdict::Unknown);
        let target = Target { address, monitor: Arc::clone(&qemu.monitor) };
        let task = tokio::spawn(health::watch(health.clone(), target, Instant::now() + grace, to)).abort_handle();
        Some(Prober { task, verdict, health })
    }

    /// It does its work, as far as its probe can see. Gives when it has done so for long enough to be trusted again.
    fn healthy(&mut self) -> Option<Instant> {
        if self.impaired.is_some() {
            return None;
        }
        self.pace.healthy();
        let mut first = false;
        self.set(|status| {
            first = status.phase != Phase::Healthy;
            status.phase = Phase::Healthy;
            status.reason = None;
            if first {
                status.healthy_ms = Some(now_ms());
            }
        });
        if first {
            let since = self.status.borrow().started_ms.map_or(0, |started| now_ms().saturating_sub(started));
            self.note("vm.healthy", format!("healthy, {since} ms after its QEMU started"));
        }
        (self.pace.failures() > 0).then(|| Instant::now() + SETTLED_AFTER)
    }

    /// The process is gone. Why, and what now.
    async fn ended(&mut self, mut qemu: Box<Qemu>) -> Stage {
        // A supervisor that died at the same time answers late; what a person sees must not wait for it.
        self.set(|status| {
            status.phase = Phase::Starting;
            status.pid = None;
            status.healthy_ms = None;
        });
        let (seen, status) = {
            let last_seen = qemu.last_seen().await;
            (last_seen, qemu.exit_status(&self.context.link, &self.name).await)
        };
        self.take_note_of_exit(status);
        let ending = Ending::of(&seen, status, || self.context.logs.last_words(&self.name, qemu.log_mark?));
        let said = ending.to_string();
        self.set(|status| status.last_exit = Some(said.clone()));
        self.note("vm.exited", said.clone());
        if self.intent.borrow().want != Want::Run {
            return Stage::Rest;
        }
        let policy = self.desired().map_or(RestartPolicy::Never, |desired| desired.restart);
        match (ending.blame(), policy) {
            (_, RestartPolicy::Never) | (Blame::OwnWill, RestartPolicy::OnFailure) => {
                self.set(|status| status.reason = Some(said.clone()));
                let _ = self.context.notes.send(Note::Hold(self.name.clone(), said));
                Stage::Rest
            }
            (Blame::OwnWill | Blame::Reboot, _) if qemu.age() >= SHORT_LIFE => {
                self.set(|status| status.reason = Some(said));
                Stage::Start
            }
            (Blame::OwnWill | Blame::Reboot | Blame::Failure, _) => self.after_failure(said),
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
