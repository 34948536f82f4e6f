//! Connections under another user id, and frames that no honest worker sends.

use diarch_ipc::frame::{self, Answer, Call, ClientFrame, Hello, MAX_FDS, MAX_FRAME, Outcome, ServerFrame};
use diarch_ipc::name::RequestId;
use diarch_ipc::operation::Request;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A user and its group, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// Runs `action` on a thread that has this user's effective ids and no further group. The kernel keeps credentials per thread; a
/// socket that is connected there carries them for ever (`SO_PEERCRED`).
pub fn as_user<T: Send>(user: User, action: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            become_user(user);
            action()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Gives the calling thread, and it alone, this user's effective ids. There is no way back that a test should take: let the thread end.
pub fn become_user(user: User) {
    use rustix::process::{Gid, Uid};
    rustix::thread::set_thread_groups(&[]).expect("setgroups needs root");
    rustix::thread::set_thread_res_gid(None, Gid::from_raw(user.gid), None).expect("setresgid");
    // From 0 to another: the thread's effective capabilities go (capabilities(7)), so that modes and owners hold for it.
    rustix::thread::set_thread_res_uid(None, Uid::from_raw(user.uid), None).expect("setresuid");
}

/// Connects to a SEQPACKET socket as `user`.
pub fn connect_as(path: &Path, user: User) -> io::Result<OwnedFd> {
    as_user(user, || connect(path))
}

/// Connects to a SEQPACKET socket as whoever calls.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// What came, or did not.
#[derive(Debug)]
pub enum Received {
    Frame(Box<ServerFrame>, Vec<OwnedFd>),
    Closed,
    /// Nothing within the time.
    Silence,
}

/// A connection that is spoken to by hand.
#[derive(Debug)]
pub struct Raw {
    socket: OwnedFd,
    /// For one frame; made once, as measurements speak through this too.
    buffer: Mutex<Vec<u8>>,
    serial: u64,
    session: u64,
}

impl Raw {
    pub fn new(socket: OwnedFd) -> Self {
        let mut session = [0u8; 8];
        let _ = rustix::rand::getrandom(&mut session, rustix::rand::GetRandomFlags::empty());
        Raw { socket, buffer: Mutex::new(vec![0; MAX_FRAME]), serial: 0, session: u64::from_ne_bytes(session) }
    }

    pub fn connect_as(path: &Path, user: User) -> io::Result<Self> {
        connect_as(path, user).map(Raw::new)
    }

    /// Connects and shakes hands; panics when that fails, since every test that calls it means to be honest so far.
    pub fn ready(path: &Path, user: User) -> Self {
        let raw = Raw::connect_as(path, user).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        match raw.hello() {
            Received::Frame(frame, _) if matches!(*frame, ServerFrame::Hello(_)) => raw,
            other => panic!("Hello was answered by {other:?}"),
        }
    }

    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("more than 64 fds"));
        }
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    pub fn send_frame(&self, frame: &ClientFrame, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send(&encoded(frame), fds)
    }

    pub fn hello(&self) -> Received {
        // A peer that was refused on arrival may not be able to send any more; why is still there to read.
        let _ = self.send_frame(&ClientFrame::Hello(Hello::ours()), &[]);
        self.receive(Duration::from_secs(5))
    }

    pub fn receive(&self, within: Duration) -> Received {
        let timeout = Timespec { tv_sec: within.as_secs().cast_signed(), tv_nsec: within.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Received::Silence,
            Ok(_) => {}
            Err(error) => panic!("poll: {error}"),
        }
        let mut bytes = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut receive = || recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
        // A peer that closed before it had read all we sent is reported once, ahead of what it sent before (net/unix/af_unix.c).
        let got = match receive() {
            Err(rustix::io::Errno::CONNRESET) => receive(),
            other => other,
        };
        let got = match got {
            Ok(got) if got.bytes > 0 => got,
            _ => return Received::Closed,
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        let frame = frame::decode(&bytes[..got.bytes], &mut Vec::new()).unwrap_or_else(|e| panic!("the supervisor sent a malformed frame: {e}"));
        Received::Frame(Box::new(frame), fds)
    }

    /// Waits for the end of the connection; says what came before it.
    pub fn wait_closed(&self, within: Duration) -> Result<Vec<ServerFrame>, String> {
        let until = Instant::now() + within;
        let mut frames = Vec::new();
        loop {
            match self.receive(until.saturating_duration_since(Instant::now())) {
                Received::Closed => return Ok(frames),
                Received::Silence => return Err(format!("still open after {within:?}; came: {frames:?}")),
                Received::Frame(frame, _) => frames.push(*frame),
            }
        }
    }

    pub fn next_id(&mut self) -> RequestId {
        self.serial += 1;
        RequestId { session: self.session, serial: self.serial }
    }

    /// One request and its answer; events that come in between are dropped.
    pub fn ask(&mut self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<(Outcome, Vec<OwnedFd>), String> {
        let id = self.next_id();
        self.ask_as(id, request, fds)
    }

    /// As [`Raw::ask`], under an id of the caller's choice: an id used before is the same request asked again.
    pub fn ask_as(&mut self, id: RequestId, request: Request, fds: &[BorrowedFd<'_>]) -> Result<(Outcome, Vec<OwnedFd>), String> {
        self.send_frame(&ClientFrame::Call(Call { id, deadline_ms: 10_000, request }), fds).map_err(|e| format!("send: {e}"))?;
        self.answer(id, Duration::from_secs(15))
    }

    /// Waits for the answer to this id.
    pub fn answer(&self, id: RequestId, within: Duration) -> Result<(Outcome, Vec<OwnedFd>), String> {
        let until = Instant::now() + within;
        loop {
            match self.receive(until.saturating_duration_since(Instant::now())) {
                Received::Frame(frame, fds) => match *frame {
                    ServerFrame::Answer(Answer { id: of, outcome }) if of == id => return Ok((outcome, fds)),
                    ServerFrame::Refused(error) => return Err(format!("refused: {error}")),
                    _ => {}
                },
                Received::Closed => return Err("closed".into()),
                Received::Silence => return Err("silence".into()),
            }
        }
    }
}

impl AsFd for Raw {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

pub fn encoded(frame: &ClientFrame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::encode(frame, &mut bytes).expect("a frame that was built here");
    bytes
}

// ---- hostile frames ----

/// A frame that must end the connection it comes on.
#[derive(Debug, Clone)]
pub struct Hostile {
    /// The operation and what is wrong, for the message of a failing test.
    pub what: String,
    pub bytes: Vec<u8>,
}

/// Every way in which a call of the table can be wrong in its shape. A new operation gets all of them from its example.
pub fn hostile_frames() -> Vec<Hostile> {
    let mut all = Vec::new();
    for request in Request::examples() {
        let name = request.operation().name;
        let call = ClientFrame::Call(Call { id: RequestId { session: 3, serial: 1 }, deadline_ms: 1000, request });
        let good = encoded(&call);
        let mut add = |what: String, bytes: Vec<u8>| all.push(Hostile { what: format!("{name}: {what}"), bytes });
        for end in 1..good.len() {
            add(format!("cut off after {end} bytes"), good[..end].to_vec());
        }
        for extra in [0x00, 0x80, 0xc0, 0xff] {
            add(format!("the byte {extra:#04x} too many"), [&good[..], &[extra]].concat());
        }
        add("padded to one byte over the limit".into(), [&good[..], &vec![0xc0; MAX_FRAME + 1 - good.len()]].concat());
        add("as an array".into(), rmp_serde::to_vec(&call).expect("encode"));
        let (tree, rest) = Node::parse(&good).expect("our own encoding");
        assert!(rest.is_empty());
        for path in tree.paths() {
            for (what, change) in CHANGES {
                let mut wrong = tree.clone();
                if change(wrong.at(&path)) {
                    add(format!("{what} at {path:?}"), wrong.bytes());
                }
            }
        }
    }
    let deep = |opener: u8| vec![opener; 60_000];
    for (what, bytes) in [
        ("arrays, 60,000 deep", deep(0x91)),
        ("maps, 60,000 deep", deep(0x81)),
        ("one byte", vec![0xc1]),
        ("a string of 4 GiB", vec![0xdb, 0xff, 0xff, 0xff, 0xff]),
        ("a map of 4 Gi entries", vec![0xdf, 0xff, 0xff, 0xff, 0xff]),
        ("zeros", vec![0; 1000]),
        ("text", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("an unknown operation", b"\x81\xa4call\x83\xa2id\x82\xa7session\x03\xa6serial\x01\xabdeadline_ms\x01\xa7request\x81\xa7vm.boot\x80".to_vec()),
    ] {
        all.push(Hostile { what: what.into(), bytes });
    }
    // What a change left meaningful (the number 0 in place of the number 0) is no hostile frame.
    all.retain(|h| frame::decode::<ClientFrame>(&h.bytes, &mut Vec::new()).is_err());
    all
}

/// A frame in which one text is another than it may be.
#[derive(Debug, Clone)]
pub struct HostileText {
    pub what: String,
    /// The field's name, and whether it is one that takes any printable text.
    pub field: String,
    pub bytes: Vec<u8>,
}

/// The fields that are one argument of a program's, whatever is in them.
const FREE_TEXT: [&str; 1] = ["command_line"];

impl HostileText {
    /// Whether the field may take this very text: then what comes of it must be no more than of any other.
    pub fn is_free(&self) -> bool {
        FREE_TEXT.contains(&&*self.field)
    }
}

/// What names, paths, interfaces, options, terminals, logs and formats have been tricked with.
pub fn hostile_strings() -> Vec<(&'static str, String)> {
    let mut all: Vec<(&'static str, String)> = [
        ("nothing", ""),
        ("a blank", " "),
        ("the directory above", ".."),
        ("this directory", "."),
        ("a path", "/etc/shadow"),
        ("a path upwards", "../../etc/shadow"),
        ("a path behind a name", "a/../../b"),
        ("a NUL", "a\0b"),
        ("a line break", "a\nb"),
        ("a carriage return", "a\rb"),
        ("a terminal's escape", "\u{1b}[2Ja"),
        ("a right-to-left override", "a\u{202e}b"),
        ("a letter of another script", "\u{ff41}bc"),
        ("a combining accent", "e\u{301}"),
        ("an interface number", "tap%d"),
        ("a format", "%s%n%p"),
        ("a second option", "a,id=b"),
        ("a second QEMU option", "a -monitor stdio"),
        ("an option", "-a"),
        ("an assignment", "a=b"),
        ("the end of a JSON text", "\"}],\"a\":[{\""),
        ("a shell's substitution", "$(id)"),
        ("backquotes", "`id`"),
        ("a second command", "a;id"),
        ("a quote", "a'b"),
        ("a backslash", "a\\b"),
        ("a wildcard", "*"),
        ("an nft statement", "\" accept; drop \""),
        ("an nft set", "{ 1, 2 }"),
        ("a rule's comment", "a#b"),
    ]
    .map(|(what, text)| (what, text.to_owned()))
    .to_vec();
    all.extend([("too long", 64), ("longer than a path", 5000), ("longer than 65,535", 60_000)].map(|(what, length)| (what, "a".repeat(length))));
    all
}

/// Every text of every request, replaced by each of [`hostile_strings`]. A new operation gets all of them from its example.
pub fn hostile_texts() -> Vec<HostileText> {
    let mut all = Vec::new();
    for request in Request::examples() {
        let name = request.operation().name;
        let good = encoded(&ClientFrame::Call(Call { id: RequestId { session: 3, serial: 1 }, deadline_ms: 1000, request }));
        let (tree, _) = Node::parse(&good).expect("our own encoding");
        for path in tree.paths() {
            let Some(field) = tree.clone().at(&path).is_text().then(|| tree.field(&path)) else { continue };
            for (what, text) in hostile_strings() {
                let mut wrong = tree.clone();
                *wrong.at(&path) = Node::text(&text);
                all.push(HostileText { what: format!("{name}: {what} as {field}"), field: field.clone(), bytes: wrong.bytes() });
            }
        }
    }
    all
}

type Change = fn(&mut Node) -> bool;

/// What is done to each value of each request; false where it does not apply.
const CHANGES: &[(&str, Change)] = &[
    ("an unknown field", |node| match node {
        Node::Map(entries) => {
            entries.push((Node::text("zzz"), Node::Scalar(vec![0x01])));
            true
        }
        _ => false,
    }),
    ("a missing field", |node| match node {
        Node::Map(entries) => entries.pop().is_some(),
        _ => false,
    }),
    ("a field twice", |node| match node {
        Node::Map(entries) if !entries.is_empty() => {
            entries.push(entries[0].clone());
            true
        }
        _ => false,
    }),
    ("fields in another order", |node| match node {
        Node::Map(entries) if entries.len() > 1 => {
            entries.reverse();
            true
        }
        _ => false,
    }),
    ("nil", |node| node.becomes(&[0xc0])),
    ("true", |node| node.becomes(&[0xc3])),
    ("-1", |node| node.becomes(&[0xff])),
    ("the largest number", |node| node.becomes(&[0xcf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])),
    ("a fraction", |node| node.becomes(&[0xcb, 0x3f, 0xf8, 0, 0, 0, 0, 0, 0])),
    ("a string", |node| node.becomes(b"\xa3../")),
    ("bytes", |node| node.becomes(b"\xc4\x02ab")),
    ("an extension", |node| node.becomes(&[0xd4, 0x01, 0x00])),
    ("an empty map", |node| node.becomes(&[0x80])),
    ("an empty array", |node| node.becomes(&[0x90])),
    ("arrays, 30 deep", |node| node.becomes(&[&[0x91u8; 30][..], &[0xc0]].concat())),
];

/// A MessagePack value, as far as this contract uses it; scalars are kept as they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Scalar(Vec<u8>),
    Array(Vec<Node>),
    Map(Vec<(Node, Node)>),
}

impl Node {
    fn text(text: &str) -> Node {
        // The shortest form of each length, as the contract's one encoding has it.
        let length = text.len();
        let head = match length {
            0..=31 => vec![0xa0 | length as u8],
            32..=255 => vec![0xd9, length as u8],
            _ => vec![0xda, (length >> 8) as u8, length as u8],
        };
        Node::Scalar([&head, text.as_bytes()].concat())
    }

    fn is_text(&self) -> bool {
        matches!(self, Node::Scalar(bytes) if matches!(bytes.first(), Some(0xa0..=0xbf | 0xd9 | 0xda)))
    }

    /// The innermost name on the way to a value.
    fn field(&self, path: &[usize]) -> String {
        let Some((first, rest)) = path.split_first() else { return String::new() };
        match self {
            Node::Map(entries) => {
                let inner = entries[*first].1.field(rest);
                let Node::Scalar(name) = &entries[*first].0 else { return inner };
                // Keys are shorter than 32 bytes: one byte of head.
                if inner.is_empty() { String::from_utf8_lossy(&name[1..]).into_owned() } else { inner }
            }
            Node::Array(items) => items[*first].field(rest),
            Node::Scalar(_) => String::new(),
        }
    }

    fn becomes(&mut self, bytes: &[u8]) -> bool {
        *self = Node::Scalar(bytes.to_vec());
        true
    }

    fn parse(bytes: &[u8]) -> Option<(Node, &[u8])> {
        let first = *bytes.first()?;
        let number = |from: usize, length: usize| bytes.get(from..from + length).map(|b| b.iter().fold(0usize, |n, b| n << 8 | usize::from(*b)));
        let scalar = |length: usize| Some((Node::Scalar(bytes.get(..length)?.to_vec()), &bytes[length..]));
        match first {
            0x80..=0x8f => Self::parse_map(usize::from(first & 0x0f), &bytes[1..]),
            0xde => Self::parse_map(number(1, 2)?, &bytes[3..]),
            0x90..=0x9f => Self::parse_array(usize::from(first & 0x0f), &bytes[1..]),
            0xdc => Self::parse_array(number(1, 2)?, &bytes[3..]),
            0xa0..=0xbf => scalar(1 + usize::from(first & 0x1f)),
            0xd9 => scalar(2 + number(1, 1)?),
            0xda => scalar(3 + number(1, 2)?),
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => scalar(1),
            0xcc | 0xd0 => scalar(2),
            0xcd | 0xd1 => scalar(3),
            0xce | 0xd2 => scalar(5),
            0xcf | 0xd3 => scalar(9),
            _ => None,
        }
    }

    fn parse_map(length: usize, mut rest: &[u8]) -> Option<(Node, &[u8])> {
        let mut entries = Vec::new();
        for _ in 0..length {
            let (key, after) = Node::parse(rest)?;
            let (value, after) = Node::parse(after)?;
            entries.push((key, value));
            rest = after;
        }
        Some((Node::Map(entries), rest))
    }

    fn parse_array(length: usize, mut rest: &[u8]) -> Option<(Node, &[u8])> {
        let mut items = Vec::new();
        for _ in 0..length {
            let (item, after) = Node::parse(rest)?;
            items.push(item);
            rest = after;
        }
        Some((Node::Array(items), rest))
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Node::Scalar(bytes) => bytes.clone(),
            Node::Array(items) => [vec![0x90 | items.len() as u8], items.iter().flat_map(Node::bytes).collect()].concat(),
            Node::Map(entries) => [vec![0x80 | entries.len() as u8], entries.iter().flat_map(|(k, v)| [k.bytes(), v.bytes()].concat()).collect()].concat(),
        }
    }

    /// The way to every value, from the outside in.
    fn paths(&self) -> Vec<Vec<usize>> {
        let inner: Vec<&Node> = match self {
            Node::Scalar(_) => Vec::new(),
            Node::Array(items) => items.iter().collect(),
            Node::Map(entries) => entries.iter().map(|(_, v)| v).collect(),
        };
        let below = inner.iter().enumerate().flat_map(|(at, node)| node.paths().into_iter().map(move |path| [vec![at], path].concat()));
        std::iter::once(Vec::new()).chain(below).collect()
    }

    fn at(&mut self, path: &[usize]) -> &mut Node {
        let Some((first, rest)) = path.split_first() else { return self };
        match self {
            Node::Array(items) => items[*first].at(rest),
            Node::Map(entries) => entries[*first].1.at(rest),
            Node::Scalar(_) => unreachable!("paths come from the same tree"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_gives_back_the_bytes_it_was_read_from() {
        for request in Request::examples() {
            let bytes = encoded(&ClientFrame::Call(Call { id: RequestId { session: u64::MAX, serial: 1 }, deadline_ms: 70_000, request }));
            let (tree, rest) = Node::parse(&bytes).unwrap();
            assert_eq!((tree.bytes(), rest.len()), (bytes, 0));
        }
    }

    #[test]
    fn no_name_address_or_word_takes_a_hostile_text_and_a_command_line_takes_printable_ones() {
        let mut fields = std::collections::BTreeSet::new();
        for hostile in hostile_texts() {
            let taken = frame::decode::<ClientFrame>(&hostile.bytes, &mut Vec::new()).is_ok();
            let printable = hostile_strings()
                .iter()
                .any(|(what, text)| hostile.what.contains(&format!(": {what} as ")) && text.len() <= 2047 && text.bytes().all(|b| (0x20..0x7f).contains(&b)));
            assert_eq!(taken, hostile.is_free() && printable, "{}", hostile.what);
            fields.insert(hostile.field);
        }
        for field in ["label", "qemu", "command_line", "mac", "network", "share", "socket", "function", "address", "host_address", "tag", "signal", "protocol"]
        {
            assert!(fields.contains(field), "no hostile text for {field}: {fields:?}");
        }
    }

    #[test]
    fn every_operation_has_hostile_frames_of_every_kind() {
        let all = hostile_frames();
        for request in Request::examples() {
            let name = request.operation().name;
            let of: Vec<&Hostile> = all.iter().filter(|h| h.what.starts_with(name)).collect();
            for kind in ["cut off", "too many", "over the limit", "unknown field", "missing field", "nil", "deep", "a fraction"] {
                assert!(of.iter().any(|h| h.what.contains(kind)), "{name} has no frame with {kind}");
            }
        }
        assert!(all.len() > 1000, "{}", all.len());
    }
}
