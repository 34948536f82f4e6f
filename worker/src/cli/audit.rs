//! `diarch audit`: the supervisor's record of every request, read and checked. The file is read as it is; root's word is not needed.

mod chain;
mod tail;

pub use tail::{tail, tail_from};

use super::connection::{ask, group_of_first_seen};
use super::screen::{Exit, Screen, Spinner, Stop, count};
use super::{clock, escape};
use crate::control::protocol::{Reply, Request};
use chain::{Broken, Chain, MAX_RECORD};
use diarch_ipc::operation::AuditState;
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::time::{Duration, Instant};

/// Where the supervisor writes it.
pub const FILE: &str = "/var/log/diarch/audit.jsonl";

/// Whether the file's end is held against what the supervisor remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    WithSupervisor,
    /// An older file, or another host's.
    No,
}

/// How the file's end stands to the supervisor's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
enum End {
    /// The supervisor's last record is in the file, and is the same.
    Same {
        seq: u64,
    },
    /// The file ends before the supervisor's last record.
    Truncated {
        file: u64,
        supervisor: u64,
    },
    /// The record is there, and is another.
    Differs {
        seq: u64,
        file: String,
        supervisor: String,
    },
    NotCompared {
        reason: String,
    },
}

/// What the check found; its JSON is `diarch audit verify --json`.
#[derive(Debug, Serialize)]
struct Findings {
    file: String,
    ok: bool,
    records: u64,
    first_seq: Option<u64>,
    /// What the first record says was before it.
    first_prev: Option<String>,
    last_seq: Option<u64>,
    head: Option<String>,
    starts: u64,
    gaps: u64,
    lost: u64,
    /// Intents whose outcome a death of the supervisor took.
    cut: u64,
    /// Outcomes whose intent is in an older file or was lost.
    without_intent: u64,
    /// Requests still without an outcome at the end.
    open: Vec<OpenRequest>,
    broken: Option<Broken>,
    end: End,
}

#[derive(Debug, Serialize)]
struct OpenRequest {
    request: String,
    operation: String,
    seq: u64,
    time_ms: u64,
}

/// `diarch audit verify`.
pub fn verify(socket: &Path, file: &Path, compare: Compare, screen: &mut Screen<'_>) -> Result<Exit, Stop> {
    let mut handle = open(file)?;
    // Asked before the file is read: then every record up to the one it names has been written.
    let state = match compare {
        Compare::WithSupervisor => state(socket, screen),
        Compare::No => Err("as asked".to_owned()),
    };
    let mut chain = Chain::seeking(state.as_ref().ok().map(|state| state.sequence));
    let broken = read(&mut handle, &mut chain, screen.live && !screen.json).map_err(|error| unreadable(file, &error))?;
    let end = end(&chain, broken.as_ref(), state);
    let findings = findings(file, chain, broken, end);
    match screen.json {
        true => screen.document(&findings)?,
        false => print(&findings, screen)?,
    }
    Ok(if findings.ok { Exit::Ok } else { Exit::Failed })
}

/// What the supervisor last told the worker of its audit, or why that is not known.
fn state(socket: &Path, screen: &Screen<'_>) -> Result<AuditState, String> {
    match ask(socket, &Request::Status {}, screen) {
        Ok(Reply::Status(status)) => match status.supervisor {
            Some(supervisor) => Ok(supervisor.audit),
            None => Err("the worker has not reached the supervisor yet".into()),
        },
        Ok(_) => Err("the worker answered something else than its status".into()),
        Err(Stop::Failure { message, .. }) => Err(message),
        Err(_) => Err("the worker was not asked".into()),
    }
}

/// Reads the file line by line, and ends at the first broken record. Memory does not grow with the file.
fn read(file: &mut File, chain: &mut Chain, live: bool) -> io::Result<Option<Broken>> {
    let mut reader = BufReader::with_capacity(64 * 1024, file);
    let (mut line, since, mut spinner) = (Vec::new(), Instant::now(), None);
    let mut patience = 3;
    loop {
        let room = (MAX_RECORD + 2).saturating_sub(line.len()) as u64;
        let got = reader.by_ref().take(room).read_until(b'\n', &mut line)?;
        if line.ends_with(b"\n") {
            if let Err(broken) = chain.line(&line[..line.len() - 1]) {
                return Ok(Some(broken));
            }
            line.clear();
        } else if line.is_empty() {
            return Ok(None);
        } else if room == 0 {
            return Ok(chain.line(&line).err());
        } else if got == 0 {
            // The supervisor may be in the middle of this very line.
            if patience == 0 {
                return Ok(Some(chain.torn(&line)));
            }
            patience -= 1;
            std::thread::sleep(Duration::from_millis(50));
        }
        if live && chain.lines.is_multiple_of(1024) && since.elapsed() > Duration::from_secs(1) {
            spinner.get_or_insert_with(|| Spinner::start("checking", since.elapsed())).say(&format!("checking: {} records", chain.lines));
        }
    }
}

fn end(chain: &Chain, broken: Option<&Broken>, state: Result<AuditState, String>) -> End {
    let not = |reason: String| End::NotCompared { reason };
    let supervisor = match state {
        Ok(state) => state,
        Err(reason) => return not(reason),
    };
    let (file, first) = match (&chain.last, &chain.first) {
        _ if broken.is_some() => return not("the chain is broken before it".into()),
        (Some((last, _)), Some((first, _))) => (*last, *first),
        _ => (0, 1),
    };
    match &chain.sought {
        Some((seq, Some(hash))) if *hash == supervisor.head => End::Same { seq: *seq },
        Some((seq, Some(hash))) => End::Differs { seq: *seq, file: hash.clone(), supervisor: supervisor.head },
        _ if supervisor.sequence > file => End::Truncated { file, supervisor: supervisor.sequence },
        _ if supervisor.sequence == 0 => not("the supervisor has written no record yet".into()),
        _ => not(format!("the supervisor last told of record {}, and this file starts at {first}", supervisor.sequence)),
    }
}

fn findings(file: &Path, chain: Chain, broken: Option<Broken>, end: End) -> Findings {
    Findings {
        file: file.display().to_string(),
        ok: broken.is_none() && matches!(end, End::Same { .. } | End::NotCompared { .. }),
        records: chain.lines - u64::from(broken.is_some()),
        first_seq: chain.first.as_ref().map(|(seq, _)| *seq),
        first_prev: chain.first.map(|(_, prev)| prev),
        last_seq: chain.last.as_ref().map(|(seq, _)| *seq),
        head: chain.last.map(|(_, hash)| hash),
        starts: chain.starts,
        gaps: chain.gaps,
        lost: chain.lost,
        cut: chain.cut,
        without_intent: chain.without_intent,
        open: chain.open.into_iter().map(|(request, open)| OpenRequest { request, operation: open.operation, seq: open.seq, time_ms: open.time_ms }).collect(),
        broken,
        end,
    }
}

/// Open requests that are named one by one.
const OPEN_SHOWN: usize = 10;

fn print(found: &Findings, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let file = escape::cell(&found.file).into_owned();
    match &found.broken {
        Some(Broken { line, seq, what }) => {
            let seq = seq.map(|seq| format!(", record {seq}")).unwrap_or_default();
            screen.say(format!("BROKEN {file}: line {line}{seq}: {}", escape::cell(what)))?;
            screen.say(format!("before it: {}, an unbroken chain; what follows it proves nothing", count(found.records, "record")))?;
        }
        None => screen.say(format!("{file}: {}, an unbroken chain", count(found.records, "record")))?,
    }
    if let (Some(seq @ 2..), Some(prev)) = (found.first_seq, &found.first_prev) {
        screen.say(format!("starts at seq {seq}, prev {}: the last hash of the file before it must be this one", escape::cell(prev)))?;
    }
    if found.starts > 1 {
        screen.say(format!("{} of the supervisor", count(found.starts, "start")))?;
    }
    if found.gaps > 0 {
        screen.say(format!("{}: {} could not be written when made (a full disk?)", count(found.gaps, "gap"), count(found.lost, "record")))?;
    }
    if found.cut > 0 {
        screen.say(format!("{} without an outcome: the supervisor died before it, and started anew after", count(found.cut, "intent")))?;
    }
    if found.without_intent > 0 {
        screen.say(format!("{} whose intent is in an older file or in a gap", count(found.without_intent, "outcome")))?;
    }
    for open in found.open.iter().take(OPEN_SHOWN).filter(|_| found.broken.is_none()) {
        let since = clock::since(open.time_ms, screen.now_ms);
        screen.say(format!("no outcome yet: {} {} (record {}, {since} ago)", escape::cell(&open.operation), escape::cell(&open.request), open.seq))?;
    }
    if found.broken.is_none() && found.open.len() > OPEN_SHOWN {
        screen.say(format!("and {} more", found.open.len() - OPEN_SHOWN))?;
    }
    let end = match &found.end {
        End::Same { seq } => {
            // The supervisor writes down that it was asked, too.
            let own = if found.last_seq > Some(*seq) { " (the records after it are this command's own question)" } else { "" };
            format!("the end was compared: record {seq} is the one that the supervisor holds{own}")
        }
        End::Truncated { file, supervisor } => format!(
            "TRUNCATED: the file ends at record {file}, and the supervisor has written up to {supervisor} \
             (for an older file, say --no-compare)"
        ),
        End::Differs { seq, file, supervisor } => {
            format!("FORGED: record {seq} has the hash {file} here, and the supervisor remembers {}", escape::cell(supervisor))
        }
        End::NotCompared { reason } => format!("the end of the file was not compared with the supervisor's: {}", escape::cell(reason)),
    };
    screen.say(end)
}

/// Opens the audit file, or says who may.
fn open(file: &Path) -> Result<File, Stop> {
    let handle = File::open(file).map_err(|error| unreadable(file, &error))?;
    match handle.metadata() {
        Ok(about) if about.is_file() => Ok(handle),
        Ok(_) => Err(Stop::failed(format!("{} is not a regular file", file.display()))),
        Err(error) => Err(unreadable(file, &error)),
    }
}

fn unreadable(file: &Path, error: &io::Error) -> Stop {
    let shown = file.display();
    match error.kind() {
        io::ErrorKind::NotFound => Stop::new(Exit::NotFound, format!("there is no audit file {shown}: name the right one with --file")),
        io::ErrorKind::PermissionDenied => {
            let group = group_of_first_seen(file).map(|group| format!(": it is for the group {group}")).unwrap_or_default();
            Stop::new(Exit::Denied, format!("the audit file {shown} may not be read{group}"))
        }
        _ => Stop::failed(format!("the audit file {shown} can't be read: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::connection::tests::FakeWorker;
    use super::super::doctor::tests::status;
    use super::super::screen::tests::Printed;
    use super::chain::NOTHING_BEFORE;
    use super::chain::tests::{INTENT, OUTCOME, START, lines};
    use super::*;
    use std::path::PathBuf;

    struct Audit {
        directory: tempfile::TempDir,
        lines: Vec<String>,
    }

    impl Audit {
        fn new() -> Self {
            Self { directory: tempfile::tempdir().expect("a directory"), lines: lines(1, NOTHING_BEFORE, &[START, INTENT, OUTCOME, INTENT, START, INTENT]) }
        }
        fn write(&self, text: &str) -> PathBuf {
            let file = self.directory.path().join("audit.jsonl");
            std::fs::write(&file, text).expect("written");
            file
        }
        fn text(&self, count: usize) -> String {
            self.lines[..count].iter().map(|line| format!("{line}\n")).collect()
        }
        fn hash(&self, seq: usize) -> String {
            let line = &self.lines[seq - 1];
            line[line.len() - 66..line.len() - 2].to_owned()
        }
        /// Checks `text` against a supervisor whose last record is `seq` with this hash.
        fn verify(&self, text: &str, head: Option<(u64, String)>) -> (Exit, String) {
            let file = self.write(text);
            let worker = head.map(|(sequence, head)| {
                let mut status = status();
                if let Some(supervisor) = &mut status.supervisor {
                    supervisor.audit = AuditState { sequence, head, trouble: None, lost: 0 };
                }
                FakeWorker::answering(&[Reply::Status(Box::new(status)), Reply::Done {}])
            });
            let socket = worker.as_ref().map_or_else(|| self.directory.path().join("none.sock"), |worker| worker.socket.clone());
            let mut printed = Printed::default();
            let exit = super::verify(&socket, &file, Compare::WithSupervisor, &mut printed.screen()).expect("checked");
            (exit, printed.out().replace(&file.display().to_string(), "audit.jsonl"))
        }
    }

    #[test]
    fn a_whole_file_with_the_supervisors_head_is_fine() {
        let audit = Audit::new();
        let (exit, said) = audit.verify(&audit.text(6), Some((6, audit.hash(6))));
        let expected = "\
audit.jsonl: 6 records, an unbroken chain
2 starts of the supervisor
1 intent without an outcome: the supervisor died before it, and started anew after
no outcome yet: vm.claim 00000000000000aa.1 (record 6, 0ms ago)
the end was compared: record 6 is the one that the supervisor holds
";
        assert_eq!((exit, said.as_str()), (Exit::Ok, expected));
        // A status from before the last records were written is as good.
        let (exit, said) = audit.verify(&audit.text(6), Some((4, audit.hash(4))));
        assert_eq!(exit, Exit::Ok);
        assert!(said.ends_with("record 4 is the one that the supervisor holds (the records after it are this command's own question)\n"), "{said}");
    }

    #[test]
    fn a_cut_off_end_is_seen_by_the_supervisors_head() {
        let audit = Audit::new();
        let (exit, said) = audit.verify(&audit.text(4), Some((6, audit.hash(6))));
        assert_eq!(exit, Exit::Failed);
        assert!(said.contains("TRUNCATED: the file ends at record 4, and the supervisor has written up to 6"), "{said}");
        let (exit, said) = audit.verify("", Some((6, audit.hash(6))));
        assert_eq!(exit, Exit::Failed);
        assert!(said.contains("TRUNCATED"), "{said}");
    }

    #[test]
    fn a_rewritten_history_is_seen_by_the_supervisors_head() {
        let audit = Audit::new();
        let forged: String = lines(1, NOTHING_BEFORE, &[START, START, START, START, START, START]).iter().map(|line| format!("{line}\n")).collect();
        let (exit, said) = audit.verify(&forged, Some((6, audit.hash(6))));
        assert_eq!(exit, Exit::Failed);
        assert!(said.contains("FORGED: record 6"), "{said}");
    }

    #[test]
    fn without_a_worker_the_chain_is_checked_and_its_end_is_said_to_be_open() {
        let audit = Audit::new();
        let (exit, said) = audit.verify(&audit.text(3), None);
        assert_eq!(exit, Exit::Ok);
        assert!(said.contains("the end of the file was not compared"), "{said}");
    }

    #[test]
    fn changed_removed_and_torn_records_fail_with_their_line() {
        let audit = Audit::new();
        for (text, found) in [
            (audit.text(6).replacen("\"uid\":997", "\"uid\":998", 1), "line 2, record 2: the record was changed after it was written"),
            (format!("{}\n{}\n", audit.lines[0], audit.lines[2]), "line 2, record 3: record 2 is missing"),
            (audit.text(6)[..audit.text(6).len() - 1].to_owned(), "line 6, record 6: the last line is unfinished"),
            (audit.text(5)[..audit.text(5).len() - 40].to_owned(), "line 5, record 5: the last line is unfinished"),
            (format!("{}\n", "x".repeat(3 * MAX_RECORD)), "line 1: a line of more than"),
        ] {
            let (exit, said) = audit.verify(&text, None);
            assert_eq!(exit, Exit::Failed, "{said}");
            assert!(said.contains(found), "{said}");
            assert!(said.starts_with("BROKEN audit.jsonl: "), "{said}");
        }
    }

    #[test]
    fn a_rotated_file_says_where_it_starts() {
        let audit = Audit::new();
        let text: String = audit.lines[3..].iter().map(|line| format!("{line}\n")).collect();
        let (exit, said) = audit.verify(&text, Some((6, audit.hash(6))));
        assert_eq!(exit, Exit::Ok, "{said}");
        assert!(said.contains(&format!("starts at seq 4, prev {}", audit.hash(3))), "{said}");
        let (exit, said) = audit.verify(&text, Some((2, audit.hash(2))));
        assert_eq!(exit, Exit::Ok, "{said}");
        assert!(said.contains("the supervisor last told of record 2, and this file starts at 4"), "{said}");
    }

    #[test]
    fn a_missing_file_is_not_found() {
        let result = open(Path::new("no/such/audit.jsonl"));
        assert!(matches!(result, Err(Stop::Failure { exit: Exit::NotFound, .. })));
    }

    #[test]
    fn the_findings_as_json_name_the_broken_record() {
        let audit = Audit::new();
        let file = audit.write(&audit.text(6).replacen("vm.claim", "vm.clean", 1));
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        screen.json = true;
        assert_eq!(super::verify(Path::new("none"), &file, Compare::No, &mut screen), Ok(Exit::Failed));
        let found: serde_json::Value = serde_json::from_str(&printed.out()).expect("JSON");
        assert_eq!((&found["ok"], &found["broken"]["line"], &found["records"]), (&false.into(), &2.into(), &1.into()));
    }
}
