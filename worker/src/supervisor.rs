//! The link to the supervisor: what the VM tasks ask of it, and its events on their way to them.
//!
//! ```text
//!   VM task --claim, spawn, attach, signal, release--> Link --> ipc::Client ==socket==> supervisor
//!   VM task <--SlotEvent-- (by slot) <---------------- Link <-- events  <==============/
//!   all     <--Facts (KVM, limits, QEMU binaries) <--- Link
//! ```
//!
//! Nothing here retries: the client repeats a call that was on its way when the connection was lost, under its own id, and waits out limits that pass by
//! themselves.

use crate::config::{Config, RestartSupervisor};
use crate::journal::Journal;
use crate::systemd::Systemd;
use diarch_ipc::Error;
use diarch_ipc::client::{Client, Restarter, Settings, State};
use diarch_ipc::name::{Bdf, Forward, IpText, Label, NicIndex, Port, Protocol, ShareName, Slot, SocketName, Tenancy};
use diarch_ipc::operation::{
    Ask, Attach, AttachMount, Bind, Claim, ConnectSocket, Console, DetachMount, DeviceRecord, DeviceState, Event, ExitStatus, HostInventory, Inventory,
    KvmVerdict, Listen, OpenTap, Publish, Recover, Release, Signal, SignalKind, Spawn, Spawned, TapOpened, Unbind, VmRecord, Withdraw,
};
use diarch_ipc::spec::{DiskAccess, VmSpec};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// How long a call is waited for: the longest operation (10 s) and a supervisor that needs all three restarts (13.5 s) fit in.
const CALL: Duration = Duration::from_secs(30);
/// As above, where a driver is waited for (60 s), or a slot's devices go back to theirs.
const DEVICE_CALL: Duration = Duration::from_secs(80);

/// What the supervisor says of a slot without being asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotEvent {
    Exited(ExitStatus),
    Quarantined(String),
    /// A part of the VM outside of its QEMU has ended.
    Impaired(String),
}

/// The two descriptors of a running QEMU.
#[derive(Debug)]
pub struct Handles {
    pub pidfd: OwnedFd,
    pub qmp: OwnedFd,
}

pub struct Link {
    client: Client,
    /// The last inventory without its VMs.
    facts: watch::Sender<Option<HostInventory>>,
    slots: Mutex<HashMap<Slot, mpsc::UnboundedSender<SlotEvent>>>,
}

impl Link {
    /// Connects in the background. The second value ends when the link can't be used any more, with one line that says why.
    pub fn start(config: &Config, journal: Arc<Journal>) -> (Arc<Self>, tokio::task::JoinHandle<String>) {
        let settings = Settings {
            server_uid: config.supervisor_uid,
            patience: config.patience,
            restarts: config.restart_pauses.clone(),
            ..Settings::new(&config.supervisor_socket)
        };
        let (client, events) = Client::start(settings, restarter(&config.restart_supervisor));
        let link = Arc::new(Self { client, facts: watch::Sender::new(None), slots: Mutex::default() });
        let ended = tokio::spawn(distribute(Arc::clone(&link), events, journal));
        (link, ended)
    }

    pub fn state(&self) -> watch::Receiver<State> {
        self.client.state()
    }

    /// What is known of the host; none until the first inventory.
    pub fn facts(&self) -> watch::Receiver<Option<HostInventory>> {
        self.facts.subscribe()
    }

    /// Events of this slot, from now on, until somebody else subscribes.
    pub fn subscribe(&self, slot: Slot) -> mpsc::UnboundedReceiver<SlotEvent> {
        let (to, events) = mpsc::unbounded_channel();
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).insert(slot, to);
        events
    }

    pub fn unsubscribe(&self, slot: Slot) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).remove(&slot);
    }

    pub async fn claim(&self, label: &Label) -> Result<Tenancy, Error> {
        Ok(self.ask(Claim { label: label.clone() }, Vec::new()).await?.0.tenancy)
    }

    /// `fds` in the order of [`VmSpec::fds`].
    pub async fn spawn(&self, tenancy: Tenancy, spec: VmSpec, fds: Vec<OwnedFd>) -> Result<(Spawned, Handles), Error> {
        let (spawned, fds) = self.ask(Spawn { tenancy, spec }, fds).await?;
        Ok((spawned, handles(fds)?))
    }

    pub async fn attach(&self, tenancy: Tenancy) -> Result<Handles, Error> {
        handles(self.ask(Attach { tenancy }, Vec::new()).await?.1)
    }

    pub async fn console(&self, tenancy: Tenancy) -> Result<OwnedFd, Error> {
        let (_, fds) = self.ask(Console { tenancy }, Vec::new()).await?;
        fds.into_iter().next().ok_or_else(|| short("vm.console"))
    }

    pub async fn signal(&self, tenancy: Tenancy, signal: SignalKind) -> Result<(), Error> {
        self.ask(Signal { tenancy, signal }, Vec::new()).await.map(drop)
    }

    pub async fn release(&self, tenancy: Tenancy) -> Result<(), Error> {
        self.client.call(Release { tenancy }, Vec::new(), DEVICE_CALL).await.map(drop)
    }

    pub async fn bind(&self, tenancy: Tenancy, function: &Bdf) -> Result<DeviceRecord, Error> {
        Ok(self.client.call(Bind { tenancy, function: function.clone() }, Vec::new(), DEVICE_CALL).await?.0.device)
    }

    pub async fn unbind(&self, tenancy: Tenancy, function: &Bdf) -> Result<(), Error> {
        self.client.call(Unbind { tenancy, function: function.clone() }, Vec::new(), DEVICE_CALL).await.map(drop)
    }

    pub async fn recover(&self, tenancy: Tenancy, function: &Bdf) -> Result<DeviceRecord, Error> {
        Ok(self.client.call(Recover { tenancy, function: function.clone() }, Vec::new(), DEVICE_CALL).await?.0.device)
    }

    /// The tap stays the supervisor's, until it gives it to the VM's QEMU.
    pub async fn open_tap(&self, ask: OpenTap) -> Result<TapOpened, Error> {
        Ok(self.ask(ask, Vec::new()).await?.0)
    }

    /// These, and no others.
    pub async fn publish(&self, tenancy: Tenancy, nic: NicIndex, forwards: Vec<Forward>) -> Result<(), Error> {
        self.ask(Publish { tenancy, nic, forwards }, Vec::new()).await.map(drop)
    }

    pub async fn withdraw(&self, tenancy: Tenancy) -> Result<(), Error> {
        self.ask(Withdraw { tenancy }, Vec::new()).await.map(drop)
    }

    pub async fn attach_share(&self, tenancy: Tenancy, share: &ShareName, access: DiskAccess) -> Result<(), Error> {
        self.ask(AttachMount { tenancy, share: share.clone(), access }, Vec::new()).await.map(drop)
    }

    pub async fn detach_share(&self, tenancy: Tenancy, share: &ShareName) -> Result<(), Error> {
        self.ask(DetachMount { tenancy, share: share.clone() }, Vec::new()).await.map(drop)
    }

    /// A socket that is bound to this port of the host; for TCP it listens.
    pub async fn listen(&self, protocol: Protocol, address: IpText, port: Port) -> Result<OwnedFd, Error> {
        let (_, fds) = self.ask(Listen { protocol, address, port }, Vec::new()).await?;
        fds.into_iter().next().ok_or_else(|| short("port.listen"))
    }

    /// A connection to the socket that the grants call so.
    pub async fn connect_socket(&self, socket: &SocketName) -> Result<OwnedFd, Error> {
        let (_, fds) = self.ask(ConnectSocket { socket: socket.clone() }, Vec::new()).await?;
        fds.into_iter().next().ok_or_else(|| short("socket.connect"))
    }

    /// Everything that the supervisor owns, page by page.
    pub async fn inventory(&self) -> Result<Vec<VmRecord>, Error> {
        let mut all: Vec<VmRecord> = Vec::new();
        let mut after = None;
        loop {
            let (mut page, _) = self.ask(Inventory { after }, Vec::new()).await?;
            if page.devices.is_empty() && after.is_some() {
                // Told with the first page, if not with each.
                let known = self.facts.borrow().as_ref().map(|facts| facts.devices.clone());
                page.devices = known.unwrap_or_default();
            }
            let vms = std::mem::take(&mut page.vms);
            let more = page.more;
            let last = vms.last().map(|vm| vm.slot);
            all.extend(vms);
            self.facts.send_replace(Some(page));
            // A page that brings nothing new would be asked for again for ever.
            if !more || last.is_none() || last <= after {
                return Ok(all);
            }
            after = last;
        }
    }

    /// What the supervisor has under this name.
    pub async fn find(&self, label: &Label) -> Result<Option<VmRecord>, Error> {
        Ok(self.inventory().await?.into_iter().find(|vm| vm.label == *label))
    }

    /// The verdict on KVM; waits for it at most `within` while the probe is running.
    pub async fn kvm(&self, within: Duration) -> KvmVerdict {
        let mut facts = self.facts();
        let known = |facts: &Option<HostInventory>| facts.as_ref().is_some_and(|facts| facts.kvm != KvmVerdict::Probing);
        let _ = tokio::time::timeout(within, facts.wait_for(known)).await;
        let verdict = facts.borrow().as_ref().map(|facts| facts.kvm.clone());
        verdict.unwrap_or(KvmVerdict::Probing)
    }

    async fn ask<A: Ask>(&self, ask: A, fds: Vec<OwnedFd>) -> Result<(A::Reply, Vec<OwnedFd>), Error> {
        self.client.call(ask, fds, CALL).await
    }
}

fn short(operation: &str) -> Error {
    Error::Failed { step: operation.into(), errno: None, detail: "the supervisor's answer came without its file descriptors".into() }
}

fn handles(fds: Vec<OwnedFd>) -> Result<Handles, Error> {
    let mut fds = fds.into_iter();
    match (fds.next(), fds.next()) {
        (Some(pidfd), Some(qmp)) => Ok(Handles { pidfd, qmp }),
        _ => Err(short("vm.spawn")),
    }
}

/// Hands events on, and keeps the journal of the connection, until the client gives up.
async fn distribute(link: Arc<Link>, mut events: mpsc::UnboundedReceiver<Event>, journal: Arc<Journal>) -> String {
    let mut state = link.state();
    let mut reached = false;
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => link.deliver(event, &journal),
                None => {
                    return match &*link.client.state().borrow() {
                        State::GaveUp { reason } => reason.clone(),
                        other => format!("the supervisor's client has ended ({other:?})"),
                    };
                }
            },
            changed = state.changed() => {
                if changed.is_err() {
                    continue;
                }
                let now = state.borrow_and_update().clone();
                match now {
                    State::Connecting | State::GaveUp { .. } => {}
                    State::Ready { version } => {
                        journal.note(None, "supervisor.ready", format!("connected to the supervisor {}", diarch_ipc::frame::printable(&version, 32)));
                        reached = true;
                    }
                    State::Lost { reason } if reached => journal.warn("supervisor.lost", reason),
                    State::Lost { .. } => {}
                    State::Restarting { attempt } => journal.warn("supervisor.restarting", format!("it can't be reached; restart {attempt}")),
                }
            }
        }
    }
}

impl Link {
    fn deliver(&self, event: Event, journal: &Journal) {
        let (slot, event) = match event {
            Event::VmExited { slot, status, .. } => (slot, SlotEvent::Exited(status)),
            Event::VmQuarantined { slot, label, reason } => {
                journal.note(Some(&label), "vm.quarantined", reason.clone());
                (slot, SlotEvent::Quarantined(reason))
            }
            Event::VmImpaired { slot, what, .. } => (slot, SlotEvent::Impaired(what)),
            Event::HostKvm { verdict } => {
                journal.note(None, "host.kvm", format!("KVM: {}", describe(&verdict)));
                self.facts.send_modify(|facts| {
                    if let Some(facts) = facts {
                        facts.kvm = verdict;
                    }
                });
                return;
            }
            Event::DeviceQuarantined { function, group, reason } => {
                let message = format!("{function} (IOMMU group {group}): {reason}; 'diarch device recover {function}' tries to reset it");
                match self.quarantine(group, reason) {
                    Some(label) => journal.note(Some(&label), "device.quarantined", message),
                    None => journal.warn("device.quarantined", message),
                }
                return;
            }
            Event::SessionSuperseded {} => return,
        };
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(to) = slots.get(&slot) {
            let _ = to.send(event);
        }
    }
}

impl Link {
    /// Takes down what an event says of a device, so that what is shown is not older than what was said. Gives whose it is.
    fn quarantine(&self, group: u32, reason: String) -> Option<Label> {
        let mut label = None;
        self.facts.send_modify(|facts| {
            if let Some(record) = facts.iter_mut().flat_map(|facts| &mut facts.devices).find(|record| record.group == group) {
                record.state = DeviceState::Quarantined;
                record.trouble = Some(reason);
                label.clone_from(&record.label);
            }
        });
        label
    }
}

/// A verdict in words.
pub fn describe(verdict: &KvmVerdict) -> String {
    match verdict {
        KvmVerdict::Usable => "usable: a tiny guest ran".into(),
        KvmVerdict::Absent { reason } => format!("absent: {reason}"),
        KvmVerdict::Lies { reason } => format!("it opens and can't run a guest: {reason}"),
        KvmVerdict::NotGranted => "not granted (vms.kvm)".into(),
        KvmVerdict::Probing => "not known yet: the probe is running".into(),
    }
}

// ---- how a supervisor is restarted ----

fn restarter(how: &RestartSupervisor) -> Box<dyn Restarter> {
    match how {
        RestartSupervisor::Systemd => Box::new(SystemdRestarter(Systemd::default())),
        RestartSupervisor::Command(command) => Box::new(CommandRestarter { command: command.clone() }),
    }
}

/// polkit lets the worker's user restart exactly this unit, and do nothing else.
struct SystemdRestarter(Systemd);

impl Restarter for SystemdRestarter {
    fn restart(&mut self) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>> {
        Box::pin(self.0.restart_supervisor())
    }
}

/// For who leaves a supervisor that can't be reached as it is.
pub struct Nobody;

impl Restarter for Nobody {
    fn restart(&mut self) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>> {
        Box::pin(async { Err("nobody restarts it here".into()) })
    }
}

/// Runs a program with an empty environment. The client bounds the time; the program is killed when that is over.
struct CommandRestarter {
    command: Vec<String>,
}

impl Restarter for CommandRestarter {
    fn restart(&mut self) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>> {
        Box::pin(async {
            let Some((program, arguments)) = self.command.split_first() else { return Err("no program is configured".into()) };
            let output = tokio::process::Command::new(program)
                .args(arguments)
                .env_clear()
                .current_dir("/")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .map_err(|error| format!("{program}: {error}"))?
                .wait_with_output()
                .await
                .map_err(|error| format!("{program}: {error}"))?;
            if output.status.success() {
                return Ok(());
            }
            let said = diarch_ipc::frame::printable(String::from_utf8_lossy(&output.stderr).trim(), 300);
            Err(format!("{program} ended with {}: {said}", output.status))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn run(command: &[&str]) -> Result<(), String> {
        CommandRestarter { command: command.iter().map(|s| (*s).to_owned()).collect() }.restart().await
    }

    #[tokio::test]
    async fn a_restart_command_gets_an_empty_environment_and_its_failure_is_quoted() {
        run(&["/bin/sh", "-c", "test -z \"$HOME\""]).await.unwrap();
        let error = run(&["/bin/sh", "-c", "echo no such unit >&2; exit 5"]).await.unwrap_err();
        assert!(error.contains("no such unit") && error.contains('5'), "{error}");
        assert!(run(&["/nonexistent/program"]).await.unwrap_err().contains("/nonexistent/program"));
    }
}
