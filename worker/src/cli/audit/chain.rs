//! The chain of the audit's records, checked one line at a time.
//!
//! ```text
//! {"seq":7,"time_ms":...,"kind":"intent",...,"prev":"HASH OF RECORD 6","hash":"HASH OF THIS RECORD"}\n
//! |<------------- SHA-256 over these bytes gives the hash ------------>|<------- 75 bytes ------->|
//! ```
//!
//! Whoever changes a record breaks its hash; whoever mends the hash breaks the next record's `prev`; whoever mends all of them up to the
//! end has another head than the one that the supervisor holds in memory. So the end must be compared, and is.

use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// A record's hash and its key, at the end of the line: `,"hash":"` + 64 hex digits + `"}`.
const TAIL: usize = 75;
const TAIL_KEY: &[u8] = br#","hash":""#;
/// What the first record ever has for `prev`.
pub const NOTHING_BEFORE: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// A record is at most this long: a request's frame is at most 64 KiB, and escaping makes six bytes of one at worst.
pub const MAX_RECORD: usize = 1024 * 1024;
/// Requests that may be open at the same time before the rest is only counted: memory stays bounded whatever the file holds.
const MAX_OPEN: usize = 64 * 1024;

/// What the chain needs to know of a record.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Record {
    pub seq: u64,
    pub time_ms: u64,
    pub kind: String,
    pub request: Option<String>,
    pub operation: Option<String>,
    /// Records that a gap stands for.
    pub lost: Option<u64>,
    pub prev: String,
    pub hash: String,
}

/// The first thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Broken {
    pub line: u64,
    pub seq: Option<u64>,
    pub what: String,
}

/// An intent whose outcome has not been seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    pub seq: u64,
    pub time_ms: u64,
    pub operation: String,
    times: u32,
}

/// What has been seen of a file so far.
#[derive(Debug, Default)]
pub struct Chain {
    pub lines: u64,
    /// Sequence number and `prev` of the file's first record.
    pub first: Option<(u64, String)>,
    /// Sequence number and hash of the last record.
    pub last: Option<(u64, String)>,
    pub open: BTreeMap<String, Open>,
    /// Intents whose outcome a death of the supervisor took.
    pub cut: u64,
    /// Outcomes whose intent is not in the file (it is in an older one, or in a gap).
    pub without_intent: u64,
    pub starts: u64,
    pub gaps: u64,
    /// Records that the gaps stand for.
    pub lost: u64,
    /// The record to be remembered, and its hash once it was seen.
    pub sought: Option<(u64, Option<String>)>,
}

impl Chain {
    /// A chain that remembers the hash of the record `seq`, to compare it with the supervisor's head.
    pub fn seeking(seq: Option<u64>) -> Self {
        Self { sought: seq.map(|seq| (seq, None)), ..Self::default() }
    }

    /// Takes the next line, without its line end.
    pub fn line(&mut self, line: &[u8]) -> Result<(), Broken> {
        self.lines += 1;
        let record = self.check(line).map_err(|(seq, what)| Broken { line: self.lines, seq, what })?;
        self.count(&record);
        if let Some((seq, hash)) = &mut self.sought
            && *seq == record.seq
        {
            *hash = Some(record.hash.clone());
        }
        if self.first.is_none() {
            self.first = Some((record.seq, record.prev.clone()));
        }
        self.last = Some((record.seq, record.hash));
        Ok(())
    }

    /// The bytes after the last line end, when there are any.
    pub fn torn(&mut self, rest: &[u8]) -> Broken {
        self.lines += 1;
        let what = format!("the last line is unfinished ({} bytes without a line end): its writing was cut off", rest.len());
        Broken { line: self.lines, seq: self.last.as_ref().map(|(seq, _)| seq + 1), what }
    }

    fn check(&self, line: &[u8]) -> Result<Record, (Option<u64>, String)> {
        let expected = self.last.as_ref().map(|(seq, _)| seq + 1);
        if line.len() > MAX_RECORD {
            return Err((expected, format!("a line of more than {MAX_RECORD} bytes is no record")));
        }
        let record: Record = serde_json::from_slice(line).map_err(|error| (expected, format!("not a whole record, it was changed or torn ({error})")))?;
        let at = Some(record.seq);
        let split = line.len().saturating_sub(TAIL);
        let (hashed, tail) = line.split_at(split);
        if !line.is_ascii() || !tail.starts_with(TAIL_KEY) || tail.get(TAIL_KEY.len()..TAIL - 2) != Some(record.hash.as_bytes()) {
            return Err((at, "the record was changed: it does not end in its hash as the supervisor writes it".into()));
        }
        let hash = hex(&Sha256::digest(hashed));
        if hash != record.hash {
            return Err((at, format!("the record was changed after it was written: its bytes give the hash {hash}, and it says {}", record.hash)));
        }
        match &self.last {
            None if (record.seq <= 1) != (record.prev == NOTHING_BEFORE) => Err((
                at,
                match record.seq {
                    0 | 1 => "this is record 1, and it names a record before it".into(),
                    seq => format!("the first record of the file is {seq}, and says that there was none before it: the file was put together anew"),
                },
            )),
            None => Ok(record),
            Some((last, _)) if record.seq > last + 1 => Err((at, missing(last + 1, record.seq - 1))),
            Some((last, _)) if record.seq <= *last => Err((at, format!("record {} comes after record {last}: records were repeated or moved", record.seq))),
            Some((last, hash)) if record.prev != *hash => {
                Err((at, format!("the record does not continue record {last} as it stands here: one of the two was replaced")))
            }
            Some(_) => Ok(record),
        }
    }

    fn count(&mut self, record: &Record) {
        match record.kind.as_str() {
            "start" => {
                self.starts += 1;
                self.cut += self.open.values().map(|open| u64::from(open.times)).sum::<u64>();
                self.open.clear();
            }
            "gap" => {
                self.gaps += 1;
                self.lost = self.lost.saturating_add(record.lost.unwrap_or(0));
            }
            "intent" => {
                let Some(request) = &record.request else { return };
                if let Some(open) = self.open.get_mut(request) {
                    // The same request asked again over a new connection.
                    open.times = open.times.saturating_add(1);
                } else if self.open.len() < MAX_OPEN {
                    let open = Open { seq: record.seq, time_ms: record.time_ms, operation: record.operation.clone().unwrap_or_default(), times: 1 };
                    self.open.insert(request.clone(), open);
                }
            }
            "outcome" => {
                let Some(request) = &record.request else { return };
                match self.open.get_mut(request) {
                    Some(open) if open.times > 1 => open.times -= 1,
                    Some(_) => drop(self.open.remove(request)),
                    None => self.without_intent += 1,
                }
            }
            _ => {}
        }
    }
}

fn missing(from: u64, to: u64) -> String {
    match from == to {
        true => format!("record {from} is missing before this one"),
        false => format!("records {from} to {to} are missing before this one"),
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Lines as the supervisor writes them. `body` is what stands between `time_ms` and `prev`, with its commas.
    pub fn lines(first: u64, prev: &str, bodies: &[&str]) -> Vec<String> {
        let mut prev = prev.to_owned();
        let mut lines = Vec::new();
        for (seq, body) in (first..).zip(bodies) {
            let hashed = format!("{{\"seq\":{seq},\"time_ms\":{},{body},\"prev\":\"{prev}\"", 1_700_000_000_000 + seq);
            prev = hex(&Sha256::digest(&hashed));
            lines.push(format!("{hashed},\"hash\":\"{prev}\"}}"));
        }
        lines
    }

    pub const START: &str = r#""kind":"start","version":"0.1.0","adopted":0"#;
    pub const INTENT: &str = r#""kind":"intent","request":"00000000000000aa.1","operation":"vm.claim","peer":{"uid":997,"pid":12,"unit":null},"session":1,"arguments":{"label":"web"}"#;
    pub const OUTCOME: &str = r#""kind":"outcome","request":"00000000000000aa.1","operation":"vm.claim","verdict":"ok","error":null,"errno":null,"micros":340"#;
    pub const DENIED: &str = r#""kind":"outcome","request":"00000000000000aa.1","operation":"vm.claim","verdict":"denied","error":"denied by vms.count in the grants: \u001b[2J","errno":null,"micros":1200"#;

    fn run(lines: &[String]) -> (Chain, Result<(), Broken>) {
        let mut chain = Chain::default();
        let result = lines.iter().try_for_each(|line| chain.line(line.as_bytes()));
        (chain, result)
    }

    fn broken(lines: &[String]) -> Broken {
        run(lines).1.expect_err("broken")
    }

    #[test]
    fn a_whole_chain_is_accepted_and_counted() {
        let gap = r#""kind":"gap","lost":3"#;
        let (chain, result) = run(&lines(1, NOTHING_BEFORE, &[START, INTENT, OUTCOME, gap, INTENT, START, OUTCOME, INTENT, INTENT, OUTCOME]));
        assert_eq!(result, Ok(()));
        assert_eq!((chain.lines, chain.starts, chain.gaps, chain.lost, chain.cut, chain.without_intent), (10, 2, 1, 3, 1, 1));
        assert_eq!(chain.open.len(), 1);
        assert_eq!(chain.last.map(|(seq, _)| seq), Some(10));
    }

    #[test]
    fn each_changed_byte_of_each_record_is_found_in_its_line_or_the_next() {
        let good = lines(1, NOTHING_BEFORE, &[START, INTENT, OUTCOME]);
        for index in 0..good[1].len() {
            let mut bytes = good[1].clone().into_bytes();
            bytes[index] ^= 1;
            let mut chain = Chain::default();
            chain.line(good[0].as_bytes()).expect("unchanged");
            let broken = chain.line(&bytes).expect_err("changed");
            assert_eq!(broken.line, 2, "byte {index}");
        }
        let changed = good[1].replace("\"web\"", "\"wob\"");
        let broken = broken(&[good[0].clone(), changed, good[2].clone()]);
        assert_eq!((broken.line, broken.seq), (2, Some(2)));
        assert!(broken.what.contains("changed after it was written"), "{}", broken.what);
    }

    #[test]
    fn a_record_replaced_with_a_fitting_hash_breaks_the_next() {
        let good = lines(1, NOTHING_BEFORE, &[START, INTENT, OUTCOME]);
        let forged = lines(2, &serde_json::from_str::<Record>(&good[0]).expect("a record").hash, &[r#""kind":"note","text":"nothing happened""#]);
        let broken = broken(&[good[0].clone(), forged[0].clone(), good[2].clone()]);
        assert_eq!((broken.line, broken.seq), (3, Some(3)));
        assert!(broken.what.contains("was replaced"), "{}", broken.what);
    }

    #[test]
    fn removed_repeated_and_reordered_records_are_told_apart() {
        let good = lines(1, NOTHING_BEFORE, &[START, INTENT, OUTCOME, INTENT, OUTCOME]);
        let pick = |order: &[usize]| broken(&order.iter().map(|i| good[*i].clone()).collect::<Vec<_>>());
        assert_eq!(pick(&[0, 2, 3]).what, "record 2 is missing before this one");
        assert_eq!(pick(&[0, 1, 4]).what, "records 3 to 4 are missing before this one");
        assert_eq!(pick(&[0, 2, 1]), Broken { line: 2, seq: Some(3), what: "record 2 is missing before this one".into() });
        assert_eq!(pick(&[0, 1, 1]).what, "record 2 comes after record 2: records were repeated or moved");
    }

    #[test]
    fn a_rotated_file_starts_later_and_names_what_was_before() {
        let before = "ab".repeat(32);
        let (chain, result) = run(&lines(8, &before, &[INTENT, OUTCOME]));
        assert_eq!(result, Ok(()));
        assert_eq!(chain.first, Some((8, before.clone())));
        assert!(broken(&lines(8, NOTHING_BEFORE, &[INTENT])).what.contains("put together anew"));
        assert!(broken(&lines(1, &before, &[INTENT])).what.contains("names a record before it"));
    }

    #[test]
    fn lines_that_are_no_records_are_broken_and_not_a_panic() {
        let good = lines(1, NOTHING_BEFORE, &[START]);
        let duplicate = good[0].replacen("\"seq\":1", "\"seq\":1,\"seq\":1", 1);
        let spaced = format!("{} ", good[0]);
        for line in ["", "{}", "[]", "null", "\u{0}", "{\"seq\":1", &duplicate, &spaced, &good[0][..40]] {
            let broken = Chain::default().line(line.as_bytes()).expect_err(line);
            assert_eq!(broken.line, 1);
        }
        assert!(Chain::default().line(&[0xff; 200]).is_err());
        assert!(Chain::default().line(&vec![b' '; MAX_RECORD + 1]).is_err());
    }
}
