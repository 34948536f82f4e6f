//! The socket: accepts, finds out who it is, shakes hands, and reads requests.
//!
//! One task for each connection. A connection that is silent, slow or hostile costs its own task and nothing else.

use crate::closer;
use crate::dispatch::{self, Asker};
use crate::state::{Given, Supervisor};
use diarch_ipc::Error;
use diarch_ipc::channel::{Channel, ReceiveError, Receiver};
use diarch_ipc::frame::{Answer, ClientFrame, Hello, Malformed, Outcome, ServerFrame, encode, printable};
use diarch_ipc::name::RequestId;
use diarch_ipc::operation::{Class, Event, KvmVerdict};
use diarch_ipc::peer::{Expected, Peer};
use interprocess::local_socket::tokio::{Listener, Stream, prelude::*};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};

/// Connections at one time, in all. A host has one worker; the rest is room for its successors and for tests.
const MAX_CONNECTIONS: usize = 64;
/// A peer says Hello within this.
const HELLO_PATIENCE: Duration = Duration::from_secs(2);
/// A peer takes an answer within this.
const SEND_PATIENCE: Duration = Duration::from_secs(10);
/// Requests of one session that are worked on at one time; more wait in the socket.
const MAX_IN_FLIGHT: usize = 64;

/// The listening end.
pub struct Server {
    supervisor: Rc<Supervisor>,
    expected: Rc<Expected>,
    crowd: Rc<Crowd>,
    /// Given up when descriptors run out, so that there is one to accept and refuse with (THREATS 6).
    reserve: RefCell<Option<File>>,
}

impl Server {
    pub fn new(supervisor: Rc<Supervisor>, expected: Expected) -> Self {
        Self { supervisor, expected: Rc::new(expected), crowd: Rc::default(), reserve: RefCell::new(File::open("/dev/null").ok()) }
    }

    /// Counts on while others than we ourselves are accepted and looked up.
    pub fn heard(&self) -> Rc<Cell<u64>> {
        Rc::clone(&self.crowd.heard)
    }

    /// Accepts for ever.
    pub async fn serve(&self, listener: &Listener) {
        loop {
            match listener.accept().await {
                Ok(stream) => match channel(stream) {
                    Ok(channel) => self.begin(channel),
                    Err(error) => self.accept_failed(&error, listener).await,
                },
                Err(error) => self.accept_failed(&error, listener).await,
            }
        }
    }

    async fn accept_failed(&self, error: &io::Error, listener: &Listener) {
        tracing::error!(%error, "accept failed");
        if matches!(error.raw_os_error(), Some(nix::libc::EMFILE | nix::libc::ENFILE)) {
            // Whoever waits without a word makes room; its task closes its socket when it runs next.
            if self.crowd.evict(Evict::Silent) {
                tokio::time::sleep(Duration::from_millis(1)).await;
                return;
            }
            self.reserve.borrow_mut().take();
            // The connection that waits is accepted with the descriptor just freed, and closed.
            let _ = tokio::time::timeout(Duration::from_millis(1), listener.accept()).await;
            *self.reserve.borrow_mut() = File::open("/dev/null").ok();
        }
        // Whatever it is, it must not become a busy loop.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    fn begin(&self, channel: Channel) {
        let channel = Rc::new(channel);
        let place = Crowd::enter(&self.crowd);
        let (supervisor, expected) = (Rc::clone(&self.supervisor), Rc::clone(&self.expected));
        tokio::task::spawn_local(async move {
            if let Err(error) = connection(&supervisor, &expected, &channel, &place).await {
                supervisor.note_connection(&format!("connection refused: {error}"));
                let _ = tokio::time::timeout(Duration::from_millis(100), channel.send(&ServerFrame::Refused(error), &[])).await;
            }
        });
    }
}

/// Connects to our own socket, and waits until that was noticed: the watchdog's question. It is told apart by its process, which is this one,
/// and leaves no trace.
pub async fn knock(door: &Path) -> io::Result<()> {
    let channel = Channel::connect(door)?;
    match channel.receive::<ServerFrame>(&mut Receiver::default()).await {
        Err(ReceiveError::Closed) => Ok(()),
        Err(error) => Err(io::Error::other(error.to_string())),
        Ok(_) => Err(io::Error::other("it was answered, and should have been let go")),
    }
}

/// Takes the socket out of `interprocess`'s hands: its stream can't carry descriptors, and watches for more than reading.
fn channel(stream: Stream) -> io::Result<Channel> {
    let Stream::UdSocket(stream) = stream;
    Channel::from_fd(OwnedFd::try_from(stream)?)?.closed_by(closer::close)
}

/// The open connections. When there are too many, the one that has waited longest without saying Hello must go: so the silent never keep
/// the honest out (THREATS 6, 7). Those that said Hello are sessions, of which the oldest goes: a superseded one.
#[derive(Default)]
struct Crowd {
    count: Cell<u64>,
    /// Of these, others whose identity was looked up.
    heard: Rc<Cell<u64>>,
    places: RefCell<BTreeMap<u64, Standing>>,
}

struct Standing {
    greeted: bool,
    leave: Rc<Notify>,
}

/// Who may be sent away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Evict {
    Silent,
    Anybody,
}

/// One connection's place among the others.
struct Place {
    crowd: Rc<Crowd>,
    number: u64,
    leave: Rc<Notify>,
}

impl Crowd {
    fn enter(crowd: &Rc<Self>) -> Place {
        let number = crowd.count.get() + 1;
        crowd.count.set(number);
        if crowd.places.borrow().len() >= MAX_CONNECTIONS {
            crowd.evict(Evict::Anybody);
        }
        let leave = Rc::new(Notify::new());
        crowd.places.borrow_mut().insert(number, Standing { greeted: false, leave: Rc::clone(&leave) });
        Place { crowd: Rc::clone(crowd), number, leave }
    }

    /// Sends the one away that has waited longest, the silent first; whether there was one.
    fn evict(&self, whom: Evict) -> bool {
        let mut places = self.places.borrow_mut();
        let candidates = places.iter().filter(|(_, standing)| whom == Evict::Anybody || !standing.greeted);
        let oldest = candidates.min_by_key(|(number, standing)| (standing.greeted, **number)).map(|(number, _)| *number);
        let gone = oldest.and_then(|number| places.remove(&number));
        if let Some(gone) = &gone {
            gone.leave.notify_one();
        }
        gone.is_some()
    }
}

impl Place {
    fn greeted(&self) {
        if let Some(standing) = self.crowd.places.borrow_mut().get_mut(&self.number) {
            standing.greeted = true;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.crowd.places.borrow_mut().remove(&self.number);
    }
}

/// One connection, from its first byte to its last. An error is told to the peer before the connection closes.
async fn connection(supervisor: &Rc<Supervisor>, expected: &Expected, channel: &Rc<Channel>, place: &Place) -> Result<(), Error> {
    let crowded = || Error::Exhausted { what: "connections".into(), limit: MAX_CONNECTIONS as u64, retry_after_ms: Some(1000) };
    tokio::select! {
        biased;
        ended = converse(supervisor, expected, channel, place) => ended,
        () = place.leave.notified() => Err(crowded()),
    }
}

async fn converse(supervisor: &Rc<Supervisor>, expected: &Expected, channel: &Rc<Channel>, place: &Place) -> Result<(), Error> {
    let peer = Peer::of(&**channel, expected.unit.is_some())?;
    if peer.is_this_process() {
        return Ok(());
    }
    place.crowd.heard.set(place.crowd.heard.get() + 1);
    peer.check(expected)?;
    let mut receiver = Receiver::default();
    let first = tokio::time::timeout(HELLO_PATIENCE, channel.receive::<ClientFrame>(&mut receiver)).await;
    match first.map_err(|_| Error::Timeout { step: "Hello".into(), after_ms: 2000 })? {
        Ok((ClientFrame::Hello(theirs), fds)) if fds.is_empty() => Hello::ours().check(&theirs, "worker")?,
        Ok(_) => return Err(Error::invalid("frame", "the first frame must be a Hello, without file descriptors")),
        Err(ReceiveError::Closed) => return Ok(()),
        Err(error) => return Err(hostile(&error)),
    }
    channel.send(&ServerFrame::Hello(Hello::ours()), &[]).await?;
    place.greeted();
    let session = supervisor.sessions.begin(channel);
    let asker = Asker::new(session, &peer);
    supervisor.note_connection(&format!("session {session} began: uid {} pid {} version {}", peer.uid, peer.pid, diarch_ipc::VERSION));
    requests(supervisor, &asker, channel, &mut receiver).await
}

fn hostile(error: &ReceiveError) -> Error {
    Error::invalid("frame", printable(&error.to_string(), 300))
}

/// Reads requests until the peer goes, or sends something that no honest peer sends.
async fn requests(supervisor: &Rc<Supervisor>, asker: &Asker, channel: &Rc<Channel>, receiver: &mut Receiver) -> Result<(), Error> {
    let places = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let mut bytes = Vec::new();
    loop {
        let (call, fds) = match channel.receive::<ClientFrame>(receiver).await {
            Ok((ClientFrame::Call(call), fds)) => (call, fds),
            Ok((ClientFrame::Hello(_), _)) => return Err(Error::invalid("frame", "a second Hello")),
            Err(ReceiveError::Closed) => return Ok(()),
            Err(error) => return Err(hostile(&error)),
        };
        let expected = call.request.fds_in().len();
        if fds.len() != expected {
            return Err(hostile(&Malformed::WrongFdCount { expected, got: fds.len() }.into()));
        }
        if !supervisor.sessions.is_active(asker.session) {
            // Told once, and gone: a replaced worker must not use up what the present one may ask for.
            let given = dispatch::superseded(supervisor, asker, &call);
            return send(channel, call.id, given, &mut bytes).await;
        }
        if call.request.operation().class == Class::Read {
            let given = dispatch::read(supervisor, asker, &call);
            send(channel, call.id, given, &mut bytes).await?;
            continue;
        }
        // When the session's places are taken, the next request waits in the socket: that is the peer's to notice.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        let (supervisor, asker, channel) = (Rc::clone(supervisor), asker.clone(), Rc::clone(channel));
        tokio::task::spawn_local(async move {
            let _place = place;
            let id = call.id;
            let given = dispatch::change(&supervisor, &asker, call, fds).await;
            // A peer that is gone asks again from its next connection.
            let _ = send(&channel, id, given, &mut Vec::new()).await;
        });
    }
}

async fn send(channel: &Channel, id: RequestId, given: Given, bytes: &mut Vec<u8>) -> Result<(), Error> {
    let (outcome, fds) = match given {
        Ok((reply, fds)) => (Outcome::Ok(reply), fds),
        Err(error) => (Outcome::Error(error), Vec::new()),
    };
    encode(&ServerFrame::Answer(Answer { id, outcome }), bytes)?;
    let borrowed: Vec<_> = fds.iter().map(|fd: &Rc<OwnedFd>| fd.as_fd()).collect();
    match channel.try_send_encoded(bytes, &borrowed) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        sent => return sent.map_err(|error| Error::io("send", &error)),
    }
    match tokio::time::timeout(SEND_PATIENCE, channel.send_encoded(bytes, &borrowed)).await {
        Ok(sent) => sent.map_err(|error| Error::io("send", &error)),
        Err(_) => Err(Error::Timeout { step: "send: the peer does not read".into(), after_ms: 10_000 }),
    }
}

/// What the loop does beside answering: tells the audit what was refused by the limiter, and hands the audit to the disk.
impl Supervisor {
    /// Within a second, and once for many records. No tick: an idle supervisor sleeps.
    pub fn sync_soon(&self) {
        self.sync_scheduled.set(true);
        self.sync_wanted.notify_one();
    }

    /// The task behind [`Supervisor::sync_soon`].
    pub async fn keep_synced(&self) {
        loop {
            self.sync_wanted.notified().await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            if !self.sync_scheduled.replace(false) {
                continue;
            }
            let refused = self.limiter.borrow_mut().take_refused();
            if refused > 0 {
                self.note(&format!("{refused} requests and connections over the limits were not written here one by one"));
            }
            let handle = self.audit.borrow().sync_handle();
            if let Ok(file) = handle {
                let synced = self.helpers.run("sync the audit", move || file.sync_data()).await;
                if let Ok(Err(error)) = synced {
                    tracing::error!(%error, "the audit can't be handed to the disk");
                }
            }
        }
    }

    /// Tells the worker when the KVM probe has ended.
    pub async fn probe_kvm(&self) {
        let Some(uid) = self.grants.vms.uid_first.checked_add(self.grants.vms.max.into()) else { return };
        // Left by grants with another range: a VM's process must not be within the probe's reach, nor the probe in a VM's.
        let taken = self.slots.borrow().values().any(|vm| vm.record.uid == uid);
        let reason = format!("the user id {uid} of the probe (uid_first + max) is a VM's from before the grants were changed");
        let walls = self.host.walls();
        let probe = move || if taken { KvmVerdict::Absent { reason } } else { crate::kvm::probe_as(uid, walls) };
        if let Ok(verdict) = self.helpers.run("probe KVM", probe).await {
            tracing::info!(?verdict, "KVM probed");
            self.note(&format!("kvm: {verdict:?}"));
            self.kvm.replace(verdict.clone());
            self.sessions.tell(Event::HostKvm { verdict });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_knock_is_heard_when_somebody_accepts_and_not_when_the_socket_only_queues_it() {
        let directory = tempfile::tempdir().unwrap();
        let door = directory.path().join("door.sock");
        let socket = crate::listen::own(&door, rustix::process::getegid().as_raw()).unwrap();
        assert_eq!(crate::listen::path(&socket).unwrap(), door);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let waiting = tokio::time::timeout(Duration::from_millis(50), knock(&door)).await;
            assert!(waiting.is_err(), "connect(2) alone proves nothing: {waiting:?}");
            let listener = crate::listen::listener(socket).unwrap();
            let accepting = async {
                // The knock from above, whose end has gone, and the one from below.
                drop(listener.accept().await.unwrap());
                drop(listener.accept().await.unwrap());
            };
            let (heard, ()) = tokio::join!(knock(&door), accepting);
            heard.unwrap();
        });
        assert!(runtime.block_on(knock(&directory.path().join("none.sock"))).is_err());
    }
}
