use super::*;
use crate::frame::Answer;
use crate::name::{Label, RequestId, Slot, Tenancy};
use crate::operation::{Claim, Claimed, Inventory};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A supervisor of a few lines: what it does with each connection is the test's.
struct Fake {
    _dir: Dir,
    path: PathBuf,
    listener: Option<tokio::net::UnixListener>,
}
struct Dir(PathBuf);
impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
impl Fake {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("diarch-ipc-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("s");
        Self { path, _dir: Dir(dir), listener: None }
    }
    fn listen(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
        listen(&socket, 8).unwrap();
        self.listener = Some(tokio::net::UnixListener::from_std(socket.into()).unwrap());
    }
    async fn accept(&self) -> Peer {
        let (stream, _) = self.listener.as_ref().unwrap().accept().await.unwrap();
        let mut peer = Peer { channel: Channel::from_fd(stream.into_std().unwrap().into()).unwrap(), receiver: Receiver::default() };
        let (frame, _) = peer.channel.receive::<ClientFrame>(&mut peer.receiver).await.unwrap();
        assert!(matches!(frame, ClientFrame::Hello(_)));
        peer.channel.send(&ServerFrame::Hello(Hello::ours()), &[]).await.unwrap();
        peer
    }
    fn settings(&self) -> Settings {
        Settings {
            server_uid: rustix::process::geteuid().as_raw(),
            handshake: Duration::from_millis(200),
            patience: Duration::from_millis(50),
            restarts: vec![Duration::from_millis(50), Duration::from_millis(100), Duration::from_millis(200)],
            ..Settings::new(&self.path)
        }
    }
}
struct Peer {
    channel: Channel,
    receiver: Receiver,
}
impl Peer {
    async fn call(&mut self) -> Call {
        match self.channel.receive::<ClientFrame>(&mut self.receiver).await.unwrap().0 {
            ClientFrame::Call(call) => call,
            ClientFrame::Hello(_) => panic!("a second Hello"),
        }
    }
    async fn answer(&self, id: RequestId, outcome: Outcome) {
        self.channel.send(&ServerFrame::Answer(Answer { id, outcome }), &[]).await.unwrap();
    }
}

struct Counting(Arc<AtomicU32>);
impl Restarter for Counting {
    fn restart(&mut self) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }
}
fn counting() -> (Box<Counting>, Arc<AtomicU32>) {
    let count = Arc::new(AtomicU32::new(0));
    (Box::new(Counting(Arc::clone(&count))), count)
}
fn claim() -> Claim {
    Claim { label: Label::new("web").unwrap() }
}
fn claimed() -> Outcome {
    Outcome::Ok(Reply::VmClaim(Claimed { tenancy: Tenancy { slot: Slot::new(3).unwrap(), claim: RequestId { session: 1, serial: 1 } }, uid: 7 }))
}
const LONG: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_call_in_flight_when_the_connection_dies_is_repeated_under_the_same_id() {
    let mut fake = Fake::new("repeat");
    fake.listen();
    let (restarter, restarts) = counting();
    let (client, _events) = Client::start(fake.settings(), restarter);
    let asking = tokio::spawn(async move { client.call(claim(), vec![], LONG).await });
    let mut first = fake.accept().await;
    let before = first.call().await;
    drop(first);
    let mut second = fake.accept().await;
    let again = second.call().await;
    assert_eq!(again.id, before.id);
    second.answer(again.id, claimed()).await;
    assert_eq!(asking.await.unwrap().unwrap().0.tenancy.slot.get(), 3);
    assert_eq!(restarts.load(Ordering::SeqCst), 0, "a respawned supervisor needs no restart");
}

#[tokio::test]
async fn pipelined_calls_are_answered_in_any_order() {
    let mut fake = Fake::new("pipeline");
    fake.listen();
    let (client, _events) = Client::start(fake.settings(), counting().0);
    let one = tokio::spawn({
        let client = client.clone();
        async move { client.call(claim(), vec![], LONG).await }
    });
    let two = tokio::spawn(async move { client.call(claim(), vec![], LONG).await });
    let mut peer = fake.accept().await;
    let (a, b) = (peer.call().await, peer.call().await);
    peer.answer(b.id, claimed()).await;
    peer.answer(a.id, claimed()).await;
    one.await.unwrap().unwrap();
    two.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_call_without_an_answer_ends_at_its_deadline_and_the_next_is_served() {
    let mut fake = Fake::new("deadline");
    fake.listen();
    let (client, _events) = Client::start(fake.settings(), counting().0);
    let late = tokio::spawn({
        let client = client.clone();
        async move { client.call(claim(), vec![], Duration::from_millis(60)).await }
    });
    let mut peer = fake.accept().await;
    peer.call().await;
    assert_eq!(late.await.unwrap().unwrap_err().kind(), "timeout");
    let next = tokio::spawn(async move { client.call(claim(), vec![], LONG).await });
    let call = peer.call().await;
    peer.answer(call.id, claimed()).await;
    next.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_limit_that_passes_by_itself_is_waited_for() {
    let mut fake = Fake::new("limit");
    fake.listen();
    let (client, _events) = Client::start(fake.settings(), counting().0);
    let asking = tokio::spawn(async move { client.call(claim(), vec![], LONG).await });
    let mut peer = fake.accept().await;
    let first = peer.call().await;
    peer.answer(first.id, Outcome::Error(Error::Exhausted { what: "once requests a second".into(), limit: 1, retry_after_ms: Some(20) })).await;
    let again = peer.call().await;
    assert_eq!(again.id, first.id);
    peer.answer(again.id, claimed()).await;
    asking.await.unwrap().unwrap();
}

#[tokio::test]
async fn three_restarts_and_then_it_gives_up_with_one_line() {
    let fake = Fake::new("giveup");
    let (restarter, restarts) = counting();
    let (client, _events) = Client::start(fake.settings(), restarter);
    let error = client.call(Inventory { after: None }, vec![], LONG).await.unwrap_err();
    assert_eq!(restarts.load(Ordering::SeqCst), 3);
    let State::GaveUp { reason } = client.state().borrow().clone() else { panic!() };
    assert!(reason.contains("3 restarts did not help") && !reason.contains('\n'), "{reason}");
    assert_eq!(error.to_string(), reason);
    client.call(Inventory { after: None }, vec![], LONG).await.unwrap_err();
}

#[tokio::test]
async fn a_hung_handshake_leads_to_a_restart() {
    let mut fake = Fake::new("hung");
    fake.listen();
    let (restarter, restarts) = counting();
    let (client, _events) = Client::start(fake.settings(), restarter);
    let asking = tokio::spawn(async move { client.call(claim(), vec![], LONG).await });
    // Accepted and then silent, as a stopped supervisor under socket activation is.
    let silent = fake.listener.as_ref().unwrap().accept().await.unwrap();
    while restarts.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(silent);
    let mut peer = fake.accept().await;
    let call = peer.call().await;
    peer.answer(call.id, claimed()).await;
    asking.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_superseded_client_ends_and_never_restarts_anything() {
    let mut fake = Fake::new("superseded");
    fake.listen();
    let (restarter, restarts) = counting();
    let (client, mut events) = Client::start(fake.settings(), restarter);
    let peer = fake.accept().await;
    peer.channel.send(&ServerFrame::Event(Event::SessionSuperseded {}), &[]).await.unwrap();
    assert_eq!(events.recv().await, Some(Event::SessionSuperseded {}));
    assert_eq!(client.call(claim(), vec![], LONG).await.unwrap_err(), Error::Superseded);
    assert_eq!(restarts.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_socket_that_somebody_else_serves_is_not_used() {
    let mut fake = Fake::new("squatter");
    fake.listen();
    let settings = Settings { server_uid: rustix::process::geteuid().as_raw() + 1, ..fake.settings() };
    let (client, _events) = Client::start(settings, counting().0);
    let error = client.call(claim(), vec![], LONG).await.unwrap_err();
    assert_eq!(error.kind(), "denied");
}

#[tokio::test]
async fn an_answer_brings_as_many_descriptors_as_it_has() {
    use crate::operation::{Example, OpenTap, TapOpened};
    let mut fake = Fake::new("fds");
    fake.listen();
    let (client, _events) = Client::start(fake.settings(), counting().0);
    let mut peer = None;
    for count in [0, 1, 8, crate::frame::MAX_FDS] {
        let asking = tokio::spawn({
            let client = client.clone();
            async move { client.call(OpenTap::example(), vec![], LONG).await }
        });
        if peer.is_none() {
            peer = Some(fake.accept().await);
        }
        let peer = peer.as_mut().unwrap();
        let call = peer.call().await;
        let files: Vec<OwnedFd> = (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect();
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let answer = ServerFrame::Answer(Answer { id: call.id, outcome: Outcome::Ok(Reply::TapOpen(TapOpened::example())) });
        peer.channel.send(&answer, &fds).await.unwrap();
        assert_eq!(asking.await.unwrap().unwrap().1.len(), count);
    }
}

#[tokio::test]
async fn a_supervisor_that_does_not_read_still_has_its_answers_read() {
    let mut fake = Fake::new("fullpipe");
    fake.listen();
    let (client, _events) = Client::start(fake.settings(), counting().0);
    let mut asking = Vec::new();
    for _ in 0..200 {
        let client = client.clone();
        asking.push(tokio::spawn(async move { client.call(Inventory { after: None }, vec![], LONG).await }));
    }
    let mut peer = fake.accept().await;
    // Answers as large as they get fill the socket towards the client while its requests fill ours.
    let mut large = crate::operation::HostInventory { ..crate::operation::Example::example() };
    large.vms = vec![large.vms[0].clone(); crate::operation::HostInventory::PAGE];
    for _ in 0..200 {
        let call = peer.call().await;
        peer.answer(call.id, Outcome::Ok(Reply::HostInventory(large.clone()))).await;
    }
    for one in asking {
        one.await.unwrap().unwrap();
    }
}
