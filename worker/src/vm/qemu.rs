//! A QEMU that runs: the descriptors by which the worker knows it.

use crate::journal::now_ms;
use crate::qmp::{Monitor, Seen};
use crate::supervisor::{Handles, Link, SlotEvent};
use diarch_ipc::name::{Label, Tenancy};
use diarch_ipc::operation::{ExitStatus, SlotState};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// The supervisor reaps the process when its pidfd turns readable, as ours does: its word comes within a millisecond, or was lost with it.
const EXIT_EVENT: Duration = Duration::from_millis(100);
/// What QEMU wrote to its monitor before it ended lies in the socket; reading it takes no longer.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// Whether this worker started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Spawned,
    Adopted,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    Ended,
    Quarantined(String),
    Impaired(String),
}

#[derive(Debug)]
pub struct Qemu {
    pub tenancy: Tenancy,
    pub origin: Origin,
    pub spawned_ms: u64,
    /// Where in QEMU's log this start begins; none when adopted.
    pub log_mark: Option<u64>,
    pub monitor: Arc<Monitor>,
    pidfd: AsyncFd<OwnedFd>,
    events: mpsc::UnboundedReceiver<SlotEvent>,
    exit: Option<ExitStatus>,
}

impl Qemu {
    pub fn new(
        tenancy: Tenancy,
        origin: Origin,
        spawned_ms: u64,
        log_mark: Option<u64>,
        handles: Handles,
        mut events: mpsc::UnboundedReceiver<SlotEvent>,
    ) -> io::Result<Self> {
        // What came before the process that we hold speaks of the one before it.
        while events.try_recv().is_ok() {}
        let pidfd = crate::ready::readable(handles.pidfd)?;
        Ok(Self { tenancy, origin, spawned_ms, log_mark, monitor: Arc::new(Monitor::open(handles.qmp)?), pidfd, events, exit: None })
    }

    pub fn age(&self) -> Duration {
        Duration::from_millis(now_ms().saturating_sub(self.spawned_ms))
    }

    /// Until the process has ended: the kernel's word, at once.
    pub async fn ended(&self) {
        // An error here can only mean that the runtime is ending.
        let _ = self.pidfd.readable().await;
    }

    /// Until the process has ended, or the supervisor says something else of the slot. (How it ended is kept for [`Qemu::exit_status`].)
    pub async fn happened(&mut self) -> Happened {
        loop {
            tokio::select! {
                biased;
                _ = self.pidfd.readable() => return Happened::Ended,
                event = self.events.recv() => match event {
                    Some(SlotEvent::Exited(status)) => self.exit = Some(status),
                    Some(SlotEvent::Quarantined(reason)) => return Happened::Quarantined(reason),
                    Some(SlotEvent::Impaired(reason)) => return Happened::Impaired(reason),
                    None => {
                        self.ended().await;
                        return Happened::Ended;
                    }
                },
            }
        }
    }

    /// How it ended: the supervisor's event, or its ledger where the event was lost with a supervisor that died.
    pub async fn exit_status(&mut self, link: &Link, name: &Label) -> ExitStatus {
        if self.exit.is_none() {
            let event = async {
                loop {
                    match self.events.recv().await {
                        Some(SlotEvent::Exited(status)) => return Some(status),
                        Some(SlotEvent::Quarantined(_) | SlotEvent::Impaired(_)) => {}
                        None => return None,
                    }
                }
            };
            self.exit = timeout(EXIT_EVENT, event).await.ok().flatten();
        }
        if let Some(status) = self.exit {
            return status;
        }
        match link.find(name).await {
            Ok(Some(record)) if record.tenancy() == self.tenancy && record.state == SlotState::Exited => record.exit.unwrap_or(ExitStatus::Unknown),
            _ => ExitStatus::Unknown,
        }
    }

    /// All that QEMU said of its guest, to its last word.
    pub async fn last_seen(&self) -> Seen {
        let mut seen = self.monitor.seen();
        let _ = timeout(LAST_WORDS, seen.wait_for(|seen| seen.closed.is_some())).await;
        seen.borrow_and_update().clone()
    }
}
