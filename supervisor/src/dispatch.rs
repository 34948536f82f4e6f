//! One request's way through the supervisor: admit, audit the intent, do, audit the outcome.
//!
//! ```text
//!   limits -> session still active? -> intent into the audit -> handler: vet, record, act -> outcome into the audit -> reply
//! ```

use crate::audit::{Fields, push, quoted};
use crate::state::{Given, InFlight, Supervisor};
use crate::{mount, net, socket, vfio, vm};
use diarch_ipc::Error;
use diarch_ipc::frame::Call;
use diarch_ipc::name::RequestId;
use diarch_ipc::operation::{Class, Effect, Operation, Reply, Request};
use diarch_ipc::peer::Peer;
use diarch_ipc::received::Received;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Operations that are worked on at one time, over all sessions and however long their callers wait; what takes something back has as much room again.
/// Each holds its request and up to 13 descriptors.
const MAX_WORK: usize = 128;
/// Arguments in an audit record; longer ones are named by their hash. The largest that can be granted (8 disks, 4 cards with 32 forwards each, a
/// command line of 2 KiB) stays below.
const MAX_ARGUMENTS: usize = 24 * 1024;

/// Who asks: a session number and the peer behind it.
#[derive(Debug, Clone)]
pub struct Asker {
    pub session: u64,
    /// The peer as JSON fields of the audit.
    pub described: Rc<str>,
}

impl Asker {
    pub fn new(session: u64, peer: &Peer) -> Self {
        let mut described = format!(",\"session\":{session},\"peer\":{{\"uid\":{},\"pid\":{}", peer.uid, peer.pid);
        if let Some(unit) = &peer.unit {
            let _ = write!(described, ",\"unit\":{}", quoted(unit, 100));
        }
        described.push('}');
        Self { session, described: described.into() }
    }
}

/// Does what changes nothing, at once.
pub fn read(supervisor: &Supervisor, asker: &Asker, call: &Call) -> Given {
    let started = Instant::now();
    let row = call.request.operation();
    let given = admit(supervisor, asker, row, started).and_then(|()| match &call.request {
        Request::HostInventory(ask) => Ok((Reply::HostInventory(vm::inventory::inventory(supervisor, ask)), Vec::new())),
        _ => Err(Error::Failed { step: "dispatch".into(), errno: None, detail: "not a read operation".into() }),
    });
    without_effect(supervisor, asker, call, given, started)
}

/// Audits a request in which nothing happened between intent and outcome: both records go with one write. A fault is counted, and hides nothing from
/// who asks. What the limiter refused is counted there, and written as a sum.
fn without_effect(supervisor: &Supervisor, asker: &Asker, call: &Call, given: Given, started: Instant) -> Given {
    if !limited(&given) {
        let row = call.request.operation();
        let records: [(&str, Fields<'_>); 2] =
            [("intent", &|line| intent(line, asker, row, call, Asked::First)), ("outcome", &|line| outcome(line, row, call.id, &given, started))];
        let _ = supervisor.audit.borrow_mut().append_all(&records);
    }
    supervisor.sync_soon();
    given
}

/// Does what may change something. The work goes on when the caller's deadline or connection ends, and a caller that asks
/// again under the same id gets its result.
pub async fn change(supervisor: &Rc<Supervisor>, asker: &Asker, call: Call, fds: Received) -> Given {
    let row = call.request.operation();
    let id = call.id;
    let patience = Duration::from_millis(call.deadline_ms.into());
    let started = Instant::now();
    let running = supervisor.in_flight.borrow().get(&id).cloned();
    let admitted = admit(supervisor, asker, row, started).and_then(|()| match &running {
        Some(other) if other.request != call.request => Err(Error::invalid("id", "under this id, another request is being worked on")),
        Some(_) => Ok(()),
        None => room_for(supervisor, row),
    });
    if let Err(error) = admitted {
        return without_effect(supervisor, asker, &call, Err(error), started);
    }
    let mut result = match running {
        Some(running) => {
            let _ = supervisor.audit.borrow_mut().append_all(&[("intent", &|line| intent(line, asker, row, &call, Asked::Again))]);
            running.result
        }
        None => {
            let written = supervisor.audit.borrow_mut().append_all(&[("intent", &|line| intent(line, asker, row, &call, Asked::First))]);
            if let (Err(fault), Effect::Grant) = (written, row.effect) {
                return Err(Error::Failed { step: "audit".into(), errno: None, detail: format!("{fault}: nothing is granted until it can") });
            }
            begin(supervisor, row, call, fds, started)
        }
    };
    match tokio::time::timeout(patience, result.wait_for(Option::is_some)).await {
        Ok(Ok(given)) => given.clone().unwrap_or_else(|| Err(lost_result())),
        Ok(Err(_)) => Err(lost_result()),
        Err(_) => Err(Error::Timeout { step: row.name.into(), after_ms: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX) }),
    }
}

/// Refuses a request of a worker that was replaced.
pub fn superseded(supervisor: &Supervisor, asker: &Asker, call: &Call) -> Given {
    without_effect(supervisor, asker, call, Err(Error::Superseded), Instant::now())
}

fn room_for(supervisor: &Supervisor, row: &Operation) -> Result<(), Error> {
    let limit = if row.effect == Effect::Grant { MAX_WORK } else { 2 * MAX_WORK };
    if supervisor.in_flight.borrow().len() < limit {
        return Ok(());
    }
    Err(Error::Exhausted { what: "operations at one time".into(), limit: limit as u64, retry_after_ms: Some(100) })
}

fn lost_result() -> Error {
    Error::Failed { step: "dispatch".into(), errno: None, detail: "the operation ended without a result; its panic is in the journal".into() }
}

fn begin(supervisor: &Rc<Supervisor>, row: &'static Operation, call: Call, fds: Received, started: Instant) -> watch::Receiver<Option<Given>> {
    let (done, result) = watch::channel(None);
    let id = call.id;
    supervisor.in_flight.borrow_mut().insert(id, InFlight { request: call.request.clone(), result: result.clone() });
    let supervisor = Rc::clone(supervisor);
    tokio::task::spawn_local(async move {
        // Also when the handler panics: the entry must not stay.
        let _entry = Entry { supervisor: Rc::clone(&supervisor), id };
        let given = handle(&supervisor, row, call, fds).await;
        for said in supervisor.host.take_said() {
            supervisor.note(&format!("rehearsed: {said}"));
        }
        let _ = supervisor.audit.borrow_mut().append_all(&[("outcome", &|line| outcome(line, row, id, &given, started))]);
        supervisor.sync_soon();
        let _ = done.send(Some(given));
    });
    result
}

struct Entry {
    supervisor: Rc<Supervisor>,
    id: RequestId,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.supervisor.in_flight.borrow_mut().remove(&self.id);
    }
}

/// Every operation, and no other: this match stops compiling when the table grows.
async fn handle(supervisor: &Rc<Supervisor>, row: &'static Operation, call: Call, fds: Received) -> Given {
    match call.request {
        Request::HostInventory(ask) => Ok((Reply::HostInventory(vm::inventory::inventory(supervisor, &ask)), Vec::new())),
        Request::VmClaim(ask) => vm::claim::claim(supervisor, call.id, &ask).map(|reply| (Reply::VmClaim(reply), Vec::new())),
        Request::VmRelease(ask) => vm::release::release(supervisor, row, &ask).await.map(|reply| (Reply::VmRelease(reply), Vec::new())),
        Request::VmSpawn(ask) => vm::spawn::spawn(supervisor, row, call.id, ask, fds).await.map(|(reply, fds)| (Reply::VmSpawn(reply), fds)),
        Request::VmAttach(ask) => vm::attach::attach(supervisor, row, &ask).map(|(reply, fds)| (Reply::VmAttach(reply), fds)),
        Request::VmConsole(ask) => vm::attach::console(supervisor, row, &ask).map(|(reply, fds)| (Reply::VmConsole(reply), fds)),
        Request::VmSignal(ask) => vm::signal::signal(supervisor, row, &ask).map(|reply| (Reply::VmSignal(reply), Vec::new())),
        Request::VfioBind(ask) => vfio::bind::bind(supervisor, row, &ask).await.map(|reply| (Reply::VfioBind(reply), Vec::new())),
        Request::VfioRelease(ask) => vfio::release::release(supervisor, row, &ask).await.map(|reply| (Reply::VfioRelease(reply), Vec::new())),
        Request::VfioRecover(ask) => vfio::recover::recover(supervisor, row, &ask).await.map(|reply| (Reply::VfioRecover(reply), Vec::new())),
        Request::TapOpen(ask) => net::tap::open(supervisor, row, &ask).await.map(|reply| (Reply::TapOpen(reply), Vec::new())),
        Request::NetPublish(ask) => net::publish::publish(supervisor, row, &ask).await.map(|reply| (Reply::NetPublish(reply), Vec::new())),
        Request::NetWithdraw(ask) => net::publish::withdraw(supervisor, row, &ask).await.map(|reply| (Reply::NetWithdraw(reply), Vec::new())),
        Request::PortListen(ask) => net::port::listen(supervisor, row, &ask).map(|(reply, fds)| (Reply::PortListen(reply), fds)),
        Request::MountAttach(ask) => mount::attach::attach(supervisor, row, &ask).await.map(|(reply, fds)| (Reply::MountAttach(reply), fds)),
        Request::MountDetach(ask) => mount::detach::detach(supervisor, row, &ask).await.map(|reply| (Reply::MountDetach(reply), Vec::new())),
        Request::SocketConnect(ask) => socket::connect(supervisor, row, &ask).await.map(|(reply, fds)| (Reply::SocketConnect(reply), fds)),
    }
}

fn admit(supervisor: &Supervisor, asker: &Asker, row: &Operation, now: Instant) -> Result<(), Error> {
    // The limits first: what they refuse is counted and not written, whoever asks.
    supervisor.limiter.borrow_mut().admit(row.class, now)?;
    if supervisor.sessions.is_active(asker.session) { Ok(()) } else { Err(Error::Superseded) }
}

/// A refusal by the limiter is counted, not written: a storm must not fill the audit's disk.
fn limited(given: &Given) -> bool {
    matches!(given, Err(Error::Exhausted { retry_after_ms: Some(_), what, .. }) if what.ends_with("requests a second"))
}

/// Whether a request comes for the first time, or while it is being worked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    First,
    Again,
}

fn intent(line: &mut Vec<u8>, asker: &Asker, row: &Operation, call: &Call, asked: Asked) {
    push(line, format_args!(",\"request\":\"{}\",\"operation\":\"{}\"{}", call.id, row.name, asker.described));
    if asked == Asked::Again {
        line.extend_from_slice(b",\"repeated\":true");
    }
    line.extend_from_slice(b",\"arguments\":");
    // The decoded value, never the bytes; printable, since every string in it is of a checked type. Writing to memory can't fail.
    let start = line.len();
    if row.secret_fields.is_empty() {
        let _ = serde_json::to_writer(&mut *line, &call.request);
    } else if let Ok(mut value) = serde_json::to_value(&call.request) {
        hide(&mut value, row.secret_fields);
        push(line, format_args!("{value}"));
    } else {
        line.extend_from_slice(b"null");
    }
    let length = line.len() - start;
    if length > MAX_ARGUMENTS {
        let digest: String = Sha256::digest(&line[start..]).iter().map(|byte| format!("{byte:02x}")).collect();
        line.truncate(start);
        push(line, format_args!("{{\"bytes\":{length},\"sha256\":\"{digest}\"}}"));
    }
}

/// Takes the values of secret fields out, wherever they are.
fn hide(value: &mut serde_json::Value, secret: &[&str]) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, field) in fields {
                if secret.contains(&name.as_str()) { *field = "(secret)".into() } else { hide(field, secret) }
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(|item| hide(item, secret)),
        _ => {}
    }
}

fn outcome(line: &mut Vec<u8>, row: &Operation, id: RequestId, given: &Given, started: Instant) {
    let verdict = given.as_ref().map_or_else(Error::kind, |_| "ok");
    push(line, format_args!(",\"request\":\"{id}\",\"operation\":\"{}\",\"verdict\":\"{verdict}\"", row.name));
    match given {
        // What was given, where it is more than an answer to read.
        Ok((reply, _)) if row.class != Class::Read => {
            line.extend_from_slice(b",\"reply\":");
            let _ = serde_json::to_writer(&mut *line, reply);
        }
        Ok(_) => {}
        Err(error) => {
            push(line, format_args!(",\"error\":{}", quoted(&error.to_string(), 500)));
            if let Some(errno) = error.errno() {
                push(line, format_args!(",\"errno\":{errno}"));
            }
        }
    }
    push(line, format_args!(",\"micros\":{}", started.elapsed().as_micros()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_fields_are_hidden_at_every_depth() {
        let mut value = serde_json::json!({"vm.x": {"name": "a", "key": "s3cret", "list": [{"key": {"deep": "s3cret"}}]}});
        hide(&mut value, &["key"]);
        assert!(!value.to_string().contains("s3cret"));
        assert_eq!(value["vm.x"]["name"], "a");
    }

    #[test]
    fn an_error_with_control_bytes_stays_one_printable_line() {
        let row = Request::examples()[0].operation();
        let given: Given = Err(Error::Failed { step: "x".into(), errno: Some(5), detail: "a\n\u{1b}[31m\u{202e}\"b".into() });
        let mut line = Vec::new();
        outcome(&mut line, row, RequestId { session: 1, serial: 1 }, &given, Instant::now());
        assert!(line.iter().all(|b| (0x20..0x7f).contains(b)), "{line:?}");
        let fields = String::from_utf8(line).unwrap();
        let record: serde_json::Value = serde_json::from_str(&format!("{{\"x\":1{fields}}}")).unwrap();
        assert_eq!(record["errno"], 5);
    }
}
