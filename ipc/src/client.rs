//! The worker's end of the contract.
//!
//! ```text
//!                 Hello answered                    connection lost
//!   Connecting ------------------> Ready ---------------------------> Lost
//!       ^                                                               |
//!       |  +------------- reconnect at once, and then every few ms -----+
//!       |  |                                                            |
//!       +--+                              no connection for `patience`  v
//!       ^                                                          Restarting (at most `restarts` times,
//!       +---------- the supervisor's unit was restarted ---------------+     with growing pauses)
//!                                                                      |
//!                                         still no connection          v
//!                                                                   GaveUp
//! ```
//!
//! A call is written down before it is sent, with its file descriptors, and stays so until its answer came or its
//! deadline passed. After a reconnection all calls without an answer are sent again, under the same ids and in the same order: the
//! supervisor's ledger sees to it that each has its effect once. So whoever calls never sees that the supervisor died.

use crate::channel::{Channel, ReceiveError, Receiver};
use crate::error::Error;
use crate::frame::{self, Call, ClientFrame, Hello, Outcome, ServerFrame};
use crate::name::RequestId;
use crate::operation::{Ask, Event, Reply, Request};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

/// Where a client stands; see the picture above.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Connecting,
    Ready {
        /// The supervisor's release.
        version: String,
    },
    Lost {
        reason: String,
    },
    Restarting {
        attempt: u32,
    },
    /// Nothing more will come of this client. `reason` is one line for people.
    GaveUp {
        reason: String,
    },
}

/// How the supervisor is restarted when it can't be reached: systemd's `RestartUnit`, or what stands in for it.
pub trait Restarter: Send + Sync + 'static {
    fn restart(&mut self) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>>;
}

/// The client's patience.
#[derive(Debug, Clone)]
pub struct Settings {
    pub socket: PathBuf,
    /// Who must be serving there (0: root).
    pub server_uid: u32,
    /// The supervisor must answer our Hello within this.
    pub handshake: Duration,
    /// How long a connection that is refused is tried again before the supervisor is restarted: its service manager may be
    /// respawning it right now.
    pub patience: Duration,
    /// One entry for each restart: how long to wait for a connection after it.
    pub restarts: Vec<Duration>,
}

impl Settings {
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            server_uid: 0,
            handshake: Duration::from_secs(3),
            patience: Duration::from_millis(500),
            restarts: vec![Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(9)],
        }
    }
}

/// The answer to one request, with the file descriptors that came with it.
pub type Answered = Result<(Reply, Vec<OwnedFd>), Error>;

struct Outgoing {
    request: Request,
    fds: Vec<OwnedFd>,
    deadline: Instant,
    answer: oneshot::Sender<Answered>,
}

/// A handle on the connection; cheap to clone. When the last one goes, the connection closes.
#[derive(Clone)]
pub struct Client {
    outgoing: mpsc::UnboundedSender<Outgoing>,
    state: watch::Receiver<State>,
    /// Why it gave up, once it did.
    end: Arc<OnceLock<Error>>,
}

/// The calls without an answer at one time, in all; more wait in the queue.
const MAX_PENDING: usize = 256;
/// However soon a limit is said to pass, asking again at once would be a busy loop.
const SHORTEST_WAIT_MS: u32 = 5;
/// Between two attempts to connect. Short: a restarting supervisor listens again within a few milliseconds.
const RECONNECT_PAUSE: Duration = Duration::from_millis(5);

impl Client {
    /// Starts a client on the current runtime. Events go to the second value; it ends when the client gave up, was
    /// superseded, or has no handle left.
    pub fn start(settings: Settings, restarter: Box<dyn Restarter>) -> (Client, mpsc::UnboundedReceiver<Event>) {
        let (outgoing, queue) = mpsc::unbounded_channel();
        let (state_in, state) = watch::channel(State::Connecting);
        let (events, events_out) = mpsc::unbounded_channel();
        let mut session = [0u8; 8];
        // getrandom(2) can't fail for 8 bytes once the kernel's pool is ready; a zero session is still a session.
        let _ = rustix::rand::getrandom(&mut session, rustix::rand::GetRandomFlags::empty());
        let end = Arc::default();
        let driver = Driver {
            end: Arc::clone(&end),
            settings,
            restarter,
            queue,
            state: state_in,
            events,
            session: u64::from_ne_bytes(session),
            serial: 0,
            pending: BTreeMap::new(),
        };
        tokio::spawn(driver.run());
        (Client { outgoing, state, end }, events_out)
    }

    /// Asks, and waits for the answer at most `within`. The file descriptors are kept until it is answered.
    pub async fn call<A: Ask>(&self, ask: A, fds: Vec<OwnedFd>, within: Duration) -> Result<(A::Reply, Vec<OwnedFd>), Error> {
        let (reply, fds) = self.request(ask.into_request(), fds, within).await?;
        match A::from_reply(reply) {
            Some(reply) => Ok((reply, fds)),
            None => Err(Error::Failed { step: "answer".into(), errno: None, detail: "the supervisor answered another operation".into() }),
        }
    }

    /// As [`Client::call`], untyped.
    pub async fn request(&self, request: Request, fds: Vec<OwnedFd>, within: Duration) -> Answered {
        let (answer, answered) = oneshot::channel();
        let outgoing = Outgoing { request, fds, deadline: Instant::now() + within, answer };
        if self.outgoing.send(outgoing).is_err() {
            return Err(self.gone());
        }
        answered.await.unwrap_or_else(|_| Err(self.gone()))
    }

    fn gone(&self) -> Error {
        let ended = || Error::Failed { step: "connect".into(), errno: None, detail: "the client has ended".into() };
        self.end.get().cloned().unwrap_or_else(ended)
    }

    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }
}

struct Pending {
    frame: Vec<u8>,
    fds: Vec<OwnedFd>,
    deadline: Instant,
    within_ms: u32,
    answer: oneshot::Sender<Answered>,
}

struct Driver {
    end: Arc<OnceLock<Error>>,
    settings: Settings,
    restarter: Box<dyn Restarter>,
    queue: mpsc::UnboundedReceiver<Outgoing>,
    state: watch::Sender<State>,
    events: mpsc::UnboundedSender<Event>,
    session: u64,
    serial: u64,
    pending: BTreeMap<RequestId, Pending>,
}

/// Why a connection ended.
enum End {
    /// No handle is left.
    Unused,
    Lost(String),
    /// The supervisor told us to go: asking again is of no use.
    Final(Error),
}

impl Driver {
    async fn run(mut self) {
        loop {
            self.set(State::Connecting);
            let (channel, receiver) = match self.connect().await {
                Ok(connected) => connected,
                Err(End::Final(error)) => return self.give_up(&error),
                Err(End::Lost(reason)) => return self.give_up(&Error::Failed { step: "connect".into(), errno: None, detail: reason }),
                Err(End::Unused) => return,
            };
            match self.serve(&channel, receiver).await {
                End::Unused => return,
                End::Lost(reason) => self.set(State::Lost { reason }),
                End::Final(error) => return self.give_up(&error),
            }
        }
    }

    fn set(&self, state: State) {
        tracing::debug!(?state, "supervisor connection");
        self.state.send_replace(state);
    }

    fn give_up(&mut self, error: &Error) {
        let _ = self.end.set(error.clone());
        self.set(State::GaveUp { reason: error.to_string() });
        self.queue.close();
        for (_, pending) in std::mem::take(&mut self.pending) {
            let _ = pending.answer.send(Err(error.clone()));
        }
        while let Ok(outgoing) = self.queue.try_recv() {
            let _ = outgoing.answer.send(Err(error.clone()));
        }
    }

    /// Tries until `patience` is over, then restarts the supervisor, as often as the settings say.
    async fn connect(&mut self) -> Result<(Channel, Receiver), End> {
        let mut reason = match self.try_until(Instant::now() + self.settings.patience).await {
            Ok(connected) => return Ok(connected),
            Err(End::Lost(reason)) => reason,
            Err(end) => return Err(end),
        };
        let pauses = self.settings.restarts.clone();
        for (attempt, pause) in (1..).zip(&pauses) {
            self.set(State::Restarting { attempt });
            tracing::warn!(attempt, %reason, "the supervisor can't be reached: restarting it");
            let until = Instant::now() + *pause;
            let restarted = match tokio::time::timeout_at(until, self.restarter.restart()).await {
                Ok(Ok(())) => String::new(),
                Ok(Err(error)) => format!(" (restart: {error})"),
                Err(_) => " (restart: it took too long)".to_owned(),
            };
            match self.try_until(until).await {
                Ok(connected) => return Ok(connected),
                Err(End::Lost(why)) => reason = why + &restarted,
                Err(end) => return Err(end),
            }
        }
        Err(End::Lost(format!("the supervisor can't be reached at {} and {} restarts did not help: {reason}", self.settings.socket.display(), pauses.len())))
    }

    /// Connects and shakes hands, again and again until `until`. Calls whose deadline passes meanwhile are answered.
    async fn try_until(&mut self, until: Instant) -> Result<(Channel, Receiver), End> {
        loop {
            let started = Instant::now();
            let reason = match self.handshake().await {
                Ok(connected) => return Ok(connected),
                Err(End::Lost(reason)) => reason,
                Err(end) => return Err(end),
            };
            self.expire();
            // A handshake that hung has used its time up: restarting is the answer, not trying the same again.
            if Instant::now() >= until || started.elapsed() >= self.settings.handshake {
                return Err(End::Lost(reason));
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    async fn handshake(&self) -> Result<(Channel, Receiver), End> {
        let lost = |step: &str, error: &dyn std::fmt::Display| End::Lost(format!("{step}: {error}"));
        let channel = Channel::connect(&self.settings.socket).map_err(|e| lost("connect", &e))?;
        let uid = channel.peer_uid().map_err(|e| lost("peer", &e))?;
        if uid != self.settings.server_uid {
            // Somebody squats on the socket (THREATS 24). Not ours to repair by a restart.
            return Err(End::Final(Error::denied(
                "server",
                format!("{} is served by uid {uid}, not {}", self.settings.socket.display(), self.settings.server_uid),
            )));
        }
        let mut receiver = Receiver::default();
        let greet = async {
            // Who refuses us may have closed already, and what it said is still there to read: behind a failed send, and behind one "connection reset".
            let _ = channel.send(&ClientFrame::Hello(Hello::ours()), &[]).await;
            match channel.receive_from_root::<ServerFrame>(&mut receiver).await {
                Err(ReceiveError::Closed) => channel.receive_from_root::<ServerFrame>(&mut receiver).await,
                received => received,
            }
            .map_err(|e| lost("hello", &e))
        };
        let (frame, _) = tokio::time::timeout(self.settings.handshake, greet)
            .await
            .map_err(|_| End::Lost(format!("no Hello within {} ms", self.settings.handshake.as_millis())))??;
        match frame {
            ServerFrame::Hello(theirs) => {
                Hello::ours().check(&theirs, "supervisor").map_err(End::Final)?;
                self.set(State::Ready { version: theirs.version });
                Ok((channel, receiver))
            }
            // Too many connections passes by itself; a refusal of us does not.
            ServerFrame::Refused(error @ Error::Exhausted { .. }) => Err(lost("hello", &error)),
            ServerFrame::Refused(error) => Err(End::Final(error)),
            ServerFrame::Answer(_) | ServerFrame::Event(_) => Err(End::Lost("the supervisor's first frame was not a Hello".into())),
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let late: Vec<RequestId> = self.pending.iter().filter(|(_, p)| p.deadline <= now).map(|(id, _)| *id).collect();
        for id in late {
            let after_ms = self.pending.get(&id).map_or(0, |pending| u64::from(pending.within_ms));
            self.settle(id, Err(Error::Timeout { step: "answer".into(), after_ms }));
        }
    }

    /// Uses a connection until it ends. Sending and receiving never wait for each other: a peer that stops reading still has its answers read.
    async fn serve(&mut self, channel: &Channel, mut receiver: Receiver) -> End {
        // What was not answered is asked again, in the order in which it was asked first.
        let mut to_send: VecDeque<RequestId> = self.pending.keys().copied().collect();
        let mut later: Vec<(Instant, RequestId)> = Vec::new();
        // Armed when something is due before it fires, and not touched otherwise: a call that is answered in time costs no timer.
        let mut timer = std::pin::pin!(tokio::time::sleep_until(self.next_timer(&later)));
        loop {
            // What was answered meanwhile (its deadline passed) is not sent any more.
            while to_send.front().is_some_and(|id| !self.pending.contains_key(id)) {
                to_send.pop_front();
            }
            let next = to_send.front().and_then(|id| self.pending.get(id));
            tokio::select! {
                biased;
                received = channel.receive_from_root::<ServerFrame>(&mut receiver) => match received {
                    Ok((ServerFrame::Answer(answer), fds)) => match answer.outcome {
                        // A limit on requests a second passes by itself: the same request goes again.
                        Outcome::Error(Error::Exhausted { retry_after_ms: Some(wait), .. }) if self.can_wait(answer.id, wait) => {
                            let at = Instant::now() + Duration::from_millis(wait.max(SHORTEST_WAIT_MS).into());
                            if later.iter().all(|(_, id)| *id != answer.id) {
                                later.push((at, answer.id));
                            }
                            timer.as_mut().reset(self.next_timer(&later));
                        }
                        Outcome::Error(Error::Superseded) => return End::Final(Error::Superseded),
                        Outcome::Ok(reply) => self.settle(answer.id, Ok((reply, fds))),
                        Outcome::Error(error) => self.settle(answer.id, Err(error)),
                    },
                    Ok((ServerFrame::Event(Event::SessionSuperseded {}), _)) => {
                        let _ = self.events.send(Event::SessionSuperseded {});
                        return End::Final(Error::Superseded);
                    }
                    Ok((ServerFrame::Event(event), _)) => {
                        let _ = self.events.send(event);
                    }
                    Ok((ServerFrame::Refused(error), _)) => return End::Final(error),
                    Ok((ServerFrame::Hello(_), _)) => return End::Lost("the supervisor said Hello twice".into()),
                    Err(ReceiveError::Closed) => return End::Lost("the connection was closed".into()),
                    Err(error) => return End::Lost(error.to_string()),
                },
                sent = send(channel, next), if next.is_some() => match sent {
                    Ok(()) => { to_send.pop_front(); }
                    Err(error) => return End::Lost(error.to_string()),
                },
                outgoing = self.queue.recv(), if self.pending.len() < MAX_PENDING => match outgoing {
                    None => return End::Unused,
                    Some(outgoing) => if let Some((id, pending)) = self.admit(outgoing) {
                        if pending.deadline < timer.deadline() {
                            timer.as_mut().reset(pending.deadline);
                        }
                        self.pending.insert(id, pending);
                        to_send.push_back(id);
                    },
                },
                () = timer.as_mut() => {
                    self.expire();
                    let now = Instant::now();
                    let due = later.extract_if(.., |(at, _)| *at <= now);
                    to_send.extend(due.map(|(_, id)| id));
                    timer.as_mut().reset(self.next_timer(&later));
                }
            }
        }
    }

    /// When something is due next; with nothing due, a day from now.
    fn next_timer(&self, later: &[(Instant, RequestId)]) -> Instant {
        let due = self.pending.values().map(|pending| pending.deadline).chain(later.iter().map(|(at, _)| *at)).min();
        due.unwrap_or_else(|| Instant::now() + Duration::from_secs(86_400))
    }

    fn can_wait(&self, id: RequestId, wait_ms: u32) -> bool {
        self.pending.get(&id).is_some_and(|pending| pending.deadline > Instant::now() + Duration::from_millis(wait_ms.into()))
    }

    fn settle(&mut self, id: RequestId, answered: Answered) {
        if let Some(pending) = self.pending.remove(&id) {
            let _ = pending.answer.send(answered);
        }
    }

    /// Gives a call its id and its encoding; answers at once what can't be sent.
    fn admit(&mut self, outgoing: Outgoing) -> Option<(RequestId, Pending)> {
        let within = outgoing.deadline.saturating_duration_since(Instant::now());
        if within.is_zero() {
            let _ = outgoing.answer.send(Err(Error::Timeout { step: "send".into(), after_ms: 0 }));
            return None;
        }
        self.serial += 1;
        let id = RequestId { session: self.session, serial: self.serial };
        let within_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        let call = ClientFrame::Call(Call { id, deadline_ms: within_ms, request: outgoing.request });
        let mut frame = Vec::with_capacity(256);
        match frame::encode(&call, &mut frame) {
            Ok(()) => Some((id, Pending { frame, fds: outgoing.fds, deadline: outgoing.deadline, within_ms, answer: outgoing.answer })),
            Err(error) => {
                let _ = outgoing.answer.send(Err(error));
                None
            }
        }
    }
}

/// Sends a call; with none to send, waits for ever.
async fn send(channel: &Channel, next: Option<&Pending>) -> std::io::Result<()> {
    let Some(pending) = next else { return std::future::pending().await };
    let fds: Vec<_> = pending.fds.iter().map(AsFd::as_fd).collect();
    channel.send_encoded(&pending.frame, &fds).await
}

#[cfg(test)]
mod tests;
