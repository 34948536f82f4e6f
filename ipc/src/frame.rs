//! How a message is encoded, and everything that makes one hostile.
//!
//! ```text
//!   one SEQPACKET message (at most 64 KiB)                 beside it: its file descriptors (at most 16)
//!   +------------------------------------------------+
//!   | named MessagePack of a ClientFrame/ServerFrame |
//!   +------------------------------------------------+
//! ```
//!
//! There is exactly one encoding of every message: what decodes is encoded again, and if the bytes differ the frame is hostile. So
//! structs sent as arrays, variants sent by number, integers in a longer form than needed, repeated or reordered
//! fields and trailing bytes are all refused by one rule, and the value that is authorised and audited is the one that
//! was sent.

use crate::error::Error;
use crate::name::RequestId;
use crate::operation::{Event, Reply, Request, table_hash};
use crate::{PROTOCOL, VERSION};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::sync::OnceLock;

/// A frame is at most this long; the receiving buffer is no longer, so nothing larger is ever held.
pub const MAX_FRAME: usize = 64 * 1024;
/// File descriptors with one frame: log, console, kernel, initrd, firmware and 8 disks are 13.
pub const MAX_FDS: usize = 16;
/// The deepest message of the table has 8 levels. (`rmp-serde` 1.3 would allow 1024, which overflows a small stack.)
const MAX_DEPTH: usize = 16;

/// The first frame, both ways.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    pub protocol: u32,
    pub version: String,
    /// [`table_hash`]: both halves must know the same operations.
    pub table: String,
    /// `/proc/sys/kernel/random/boot_id`: tells a restarted peer from a restarted host.
    pub boot_id: String,
}

impl Hello {
    pub fn ours() -> Self {
        static OURS: OnceLock<Hello> = OnceLock::new();
        OURS.get_or_init(|| Hello {
            protocol: PROTOCOL,
            version: VERSION.to_owned(),
            table: table_hash(),
            boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned(),
        })
        .clone()
    }

    /// Whether a half that says `theirs` can work with this one; the sentence says what to do otherwise.
    pub fn check(&self, theirs: &Hello, their_name: &str) -> Result<(), Error> {
        if theirs.protocol == self.protocol && theirs.table == self.table {
            return Ok(());
        }
        Err(Error::Unsupported {
            missing: format!(
                "the {their_name} is version {} (protocol {}, operations {:.12}) and this half is version {} (protocol {}, operations {:.12}); \
                 restart both from the same release",
                printable(&theirs.version, 32),
                theirs.protocol,
                printable(&theirs.table, 12),
                self.version,
                self.protocol,
                self.table
            ),
        })
    }
}

/// What the worker sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ClientFrame {
    Hello(Hello),
    Call(Call),
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    pub id: RequestId,
    /// How long the caller still waits, in milliseconds; the operation's own deadline holds if it is shorter.
    pub deadline_ms: u32,
    pub request: Request,
}

/// What the supervisor sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ServerFrame {
    Hello(Hello),
    /// The last frame of a connection that is closed for a reason.
    Refused(Error),
    Answer(Answer),
    Event(Event),
}

/// The answer to the call with this id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    pub id: RequestId,
    pub outcome: Outcome,
}

/// `Result`, spelled so that its encoding is ours.
// As for `Reply`: one lives at a time.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Outcome {
    Ok(Reply),
    Error(Error),
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("the frame is longer than {MAX_FRAME} bytes")]
    TooLong,
    #[error("the frame does not decode: {0}")]
    Undecodable(String),
    #[error("the frame is not in the one canonical encoding (trailing bytes, an array for a struct, a longer integer, ...)")]
    NotCanonical,
    #[error("the frame's file descriptors were cut off by the kernel: more than {MAX_FDS}")]
    TooManyFds,
    #[error("the request needs {expected} file descriptors and came with {got}")]
    WrongFdCount { expected: usize, got: usize },
}

/// Encodes a frame, appending to `into` (which is cleared first, so that a connection can reuse its buffer).
pub fn encode(frame: &impl Serialize, into: &mut Vec<u8>) -> Result<(), Error> {
    into.clear();
    let mut serializer = rmp_serde::Serializer::new(&mut *into).with_struct_map();
    frame.serialize(&mut serializer).map_err(|error| Error::Failed { step: "encode".into(), errno: None, detail: error.to_string() })?;
    if into.len() > MAX_FRAME {
        return Err(Error::Exhausted { what: "the bytes of one frame".into(), limit: MAX_FRAME as u64, retry_after_ms: None });
    }
    Ok(())
}

/// Decodes one frame from a peer that nothing is believed of, and refuses every other spelling of it.
pub fn decode<T: DeserializeOwned + Serialize>(bytes: &[u8], scratch: &mut Vec<u8>) -> Result<T, Malformed> {
    let (value, _) = read(bytes)?;
    encode(&value, scratch).map_err(|error| Malformed::Undecodable(error.to_string()))?;
    if scratch.as_slice() == bytes { Ok(value) } else { Err(Malformed::NotCanonical) }
}

/// Decodes one frame of the supervisor's: the same limits, and no second look at its spelling. What it says is acted on by nobody with more rights
/// than its sender.
pub fn decode_from_root<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Malformed> {
    let (value, mut rest) = read(bytes)?;
    // This reader tells no position. A number needs one marker byte first, and only the end of the slice has none.
    match u8::deserialize(&mut rest) {
        Err(rmp_serde::decode::Error::InvalidMarkerRead(_)) => Ok(value),
        _ => Err(Malformed::NotCanonical),
    }
}

type Slice<'a> = rmp_serde::Deserializer<rmp_serde::decode::ReadRefReader<'a, [u8]>>;

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, Slice<'_>), Malformed> {
    if bytes.len() > MAX_FRAME {
        return Err(Malformed::TooLong);
    }
    let mut deserializer = rmp_serde::Deserializer::from_read_ref(bytes);
    deserializer.set_max_depth(MAX_DEPTH);
    let value = T::deserialize(&mut deserializer).map_err(|error| Malformed::Undecodable(printable(&error.to_string(), 200)))?;
    Ok((value, deserializer))
}

/// Somebody else's text, made fit for a log line: printable ASCII, at most `max` bytes.
pub fn printable(text: &str, max: usize) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let piece = if (' '..='~').contains(&c) { c.to_string() } else { c.escape_default().to_string() };
        if out.len() + piece.len() > max {
            out.truncate(max.saturating_sub(3));
            out.push_str("...");
            break;
        }
        out.push_str(&piece);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn calls() -> Vec<ClientFrame> {
        let id = RequestId { session: u64::MAX, serial: 7 };
        Request::examples().into_iter().map(|request| ClientFrame::Call(Call { id, deadline_ms: 1000, request })).collect()
    }
    fn bytes(frame: &impl Serialize) -> Vec<u8> {
        let mut out = Vec::new();
        encode(frame, &mut out).unwrap();
        out
    }
    fn decoded(bytes: &[u8]) -> Result<ClientFrame, Malformed> {
        decode(bytes, &mut Vec::new())
    }

    #[test]
    fn every_example_comes_back_as_it_was() {
        for call in calls() {
            assert_eq!(decoded(&bytes(&call)).unwrap(), call);
        }
        for reply in Reply::examples() {
            let frame = ServerFrame::Answer(Answer { id: RequestId { session: 1, serial: 1 }, outcome: Outcome::Ok(reply) });
            assert_eq!(decode::<ServerFrame>(&bytes(&frame), &mut Vec::new()).unwrap(), frame);
        }
    }

    #[test]
    fn a_frame_cut_anywhere_is_refused() {
        for call in calls() {
            let whole = bytes(&call);
            for end in 0..whole.len() {
                decoded(&whole[..end]).unwrap_err();
            }
        }
    }

    #[test]
    fn a_byte_too_many_is_refused() {
        for call in calls() {
            for extra in [0u8, 0xc0, 0x80, 0xff] {
                let mut long = bytes(&call);
                long.push(extra);
                assert_eq!(decoded(&long), Err(Malformed::NotCanonical));
            }
        }
    }

    #[test]
    fn a_byte_too_many_is_refused_from_root_too() {
        let frame = ServerFrame::Event(Event::SessionSuperseded {});
        assert_eq!(decode_from_root::<ServerFrame>(&bytes(&frame)).unwrap(), frame);
        for extra in 0..=255u8 {
            let mut long = bytes(&frame);
            long.push(extra);
            assert_eq!(decode_from_root::<ServerFrame>(&long), Err(Malformed::NotCanonical), "{extra:#x}");
        }
    }

    #[test]
    fn a_struct_sent_as_an_array_is_refused() {
        for call in calls() {
            decoded(&rmp_serde::to_vec(&call).unwrap()).unwrap_err();
        }
    }

    #[test]
    fn an_integer_in_a_longer_form_is_refused() {
        // {"call": {"id": {"session": 1, ...: the 1 as a u64.
        let call = ClientFrame::Call(Call { id: RequestId { session: 1, serial: 2 }, deadline_ms: 3, request: Request::examples().remove(0) });
        let good = bytes(&call);
        let at = good.windows(7).position(|w| w == b"session").unwrap() + 7;
        assert_eq!(good[at], 1);
        let mut long = good.clone();
        long.splice(at..=at, [0xcf, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(decoded(&long), Err(Malformed::NotCanonical));
    }

    #[test]
    fn a_deep_frame_is_refused_and_does_not_overflow_the_stack() {
        for opener in [0x91u8, 0x81] {
            let deep = vec![opener; MAX_FRAME];
            std::thread::Builder::new().stack_size(128 * 1024).spawn(move || decoded(&deep).unwrap_err()).unwrap().join().unwrap();
        }
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_before_it_is_decoded() {
        assert_eq!(decoded(&vec![0; MAX_FRAME + 1]), Err(Malformed::TooLong));
    }

    #[test]
    fn a_length_that_promises_gigabytes_allocates_nothing() {
        // str32, bin32, array32 and map32 headers that claim 4 GiB.
        for head in [0xdbu8, 0xc6, 0xdd, 0xdf] {
            decoded(&[head, 0xff, 0xff, 0xff, 0xff]).unwrap_err();
        }
    }

    #[test]
    fn halves_of_different_releases_get_a_sentence() {
        let ours = Hello::ours();
        let older = Hello { version: "0.0.1\n\u{1b}[31m".into(), table: "00".into(), ..ours.clone() };
        let sentence = ours.check(&older, "worker").unwrap_err().to_string();
        assert!(sentence.contains("restart both from the same release") && !sentence.contains('\n') && !sentence.contains('\u{1b}'), "{sentence}");
        ours.check(&ours, "worker").unwrap();
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decoded(&data);
        }
        #[test]
        fn a_changed_byte_never_gives_the_same_meaning(which in 0usize..7, at in 0usize..400, value in any::<u8>()) {
            let call = &calls()[which];
            let good = bytes(call);
            let at = at % good.len();
            if good[at] != value {
                let mut bad = good.clone();
                bad[at] = value;
                if let Ok(other) = decoded(&bad) {
                    prop_assert_ne!(&other, call);
                }
            }
        }
        #[test]
        fn printable_text_is_printable_and_short(text in ".*", max in 3usize..100) {
            let out = printable(&text, max);
            prop_assert!(out.len() <= max && out.bytes().all(|b| (0x20..0x7f).contains(&b)));
        }
    }
}
