//! The audit: one line of JSON for each intent and each outcome, chained by hashes.
//!
//! ```text
//!   {"seq":7,"time_ms":...,"kind":"intent", ... ,"prev":"<hash of 6>","hash":"<SHA-256 of this line up to here>"}
//! ```
//!
//! `hash` covers the line's bytes up to `,"hash":"`; `prev` is the hash of the line before. So a changed, removed or reordered line shows, and
//! `diarch audit verify` says which. A cut-off end shows too, while the supervisor runs, since it tells its own head in
//! `host.inventory`.
//!
//! An intent is in the kernel's hands (written, not fsynced: the audit survives our death, and what a power cut may take is the last second)
//! before anything is done. When it can't be written, what would grant something fails, and what takes something back goes on and is counted.

use diarch_ipc::frame::printable;
use diarch_ipc::operation::AuditState;
use rustix::fs::{Mode, OFlags};
use sha2::{Digest, Sha256};
use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Where the audit is unless told otherwise.
pub const DEFAULT_PATH: &str = "/var/log/diarch/audit.jsonl";
/// `,"hash":"` + 64 hex digits + `"}`.
const SEAL_BYTES: usize = 9 + 64 + 2;
/// A line is shorter than the largest frame's arguments with every byte escaped.
const MAX_LINE: u64 = 512 * 1024;

/// The open audit file and the end of its chain.
pub struct Audit {
    path: PathBuf,
    file: File,
    sequence: u64,
    head: String,
    trouble: Option<String>,
    lost: u64,
    /// Records lost since the last `gap` record.
    unreported: u64,
    line: Vec<u8>,
}

/// Writes a record's own fields: nothing, or `,"name":value...`.
pub type Fields<'a> = &'a dyn Fn(&mut Vec<u8>);

/// Formats onto the end of a line. Writing to memory can't fail.
pub fn push(line: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    let _ = line.write_fmt(text);
}

/// A record could not be written.
#[derive(Debug, thiserror::Error)]
#[error("the audit can't be written ({0})")]
pub struct AuditFault(String);

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl Audit {
    /// Opens the file, or makes it, and takes the chain up where it ends. A line that a killed supervisor left half written is cut off, and
    /// the cut is recorded.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mut file: File = rustix::fs::open(path, flags, Mode::from_raw_mode(0o640))?.into();
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::other("the audit is not a regular file"));
        }
        // Read by the directory's group, whatever the umask says (its unit's is 0077). Of a file that is there already, the mode is root's choice.
        if meta.len() == 0 {
            file.set_permissions(Permissions::from_mode(0o640))?;
        }
        let end = ChainEnd::read(&mut file, meta.len())?;
        if end.torn > 0 {
            file.set_len(end.whole)?;
        }
        let mut audit =
            Self { path: path.to_owned(), file, sequence: end.sequence, head: end.head, trouble: None, lost: 0, unreported: 0, line: Vec::with_capacity(2048) };
        if end.torn > 0 {
            let _ = audit.append("note", &format!(",\"text\":\"an unfinished line of {} bytes was cut off\"", end.torn));
        }
        Ok(audit)
    }

    pub fn state(&self) -> AuditState {
        AuditState { sequence: self.sequence, head: self.head.clone(), trouble: self.trouble.clone(), lost: self.lost }
    }

    /// Writes one record. `fields` is JSON after `"kind"`: empty, or `,"name":value...`.
    pub fn append(&mut self, kind: &str, fields: &str) -> Result<(), AuditFault> {
        self.append_all(&[(kind, &|line| line.extend_from_slice(fields.as_bytes()))])
    }

    /// Writes several records with one write: a read's intent and outcome, between which nothing happens. Each writes its fields by itself, into the one
    /// buffer that there is.
    pub fn append_all(&mut self, records: &[(&str, Fields<'_>)]) -> Result<(), AuditFault> {
        let mut line = std::mem::take(&mut self.line);
        line.clear();
        let before = (self.sequence, self.head.clone(), self.unreported);
        let now = now_ms();
        if self.unreported > 0 {
            let lost = self.unreported;
            self.render(&mut line, now, "gap", &|line| push(line, format_args!(",\"lost\":{lost}")));
            self.unreported = 0;
        }
        for (kind, fields) in records {
            self.render(&mut line, now, kind, *fields);
        }
        let written = self.write(&line);
        self.line = line;
        match written {
            Ok(()) => {
                if self.trouble.take().is_some() {
                    tracing::warn!(path = %self.path.display(), "the audit can be written again");
                }
                Ok(())
            }
            Err(error) => {
                (self.sequence, self.head, self.unreported) = before;
                let count = records.len() as u64;
                self.lost += count;
                self.unreported += count;
                let reason = format!("{}: {error}", self.path.display());
                if self.trouble.as_ref() != Some(&reason) {
                    tracing::error!(%reason, "the audit can't be written: nothing is granted until it can");
                }
                self.trouble = Some(reason.clone());
                Err(AuditFault(reason))
            }
        }
    }

    fn render(&mut self, line: &mut Vec<u8>, now: u64, kind: &str, fields: Fields<'_>) {
        let start = line.len();
        self.sequence += 1;
        push(line, format_args!("{{\"seq\":{},\"time_ms\":{now},\"kind\":\"{kind}\"", self.sequence));
        fields(line);
        line.extend_from_slice(b",\"prev\":\"");
        line.extend_from_slice(self.head.as_bytes());
        line.push(b'"');
        self.head.clear();
        hex_into(&Sha256::digest(&line[start..]), &mut self.head);
        line.extend_from_slice(b",\"hash\":\"");
        line.extend_from_slice(self.head.as_bytes());
        line.extend_from_slice(b"\"}\n");
    }

    /// All of it or nothing: what a full disk took in part is cut off again.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut written = 0;
        while written < bytes.len() {
            let error = match self.file.write(&bytes[written..]) {
                Ok(0) => io::Error::from(io::ErrorKind::WriteZero),
                Ok(count) => {
                    written += count;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            if written > 0 {
                // From the file's end as it is now: somebody may have cut it meanwhile (logrotate), and it must not grow by zeros.
                let length = self.file.metadata()?.len();
                self.file.set_len(length.saturating_sub(written as u64))?;
            }
            return Err(error);
        }
        Ok(())
    }

    /// Hands what was written to the disk. Called now and then from a helper thread, never before an answer.
    pub fn sync_handle(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

fn hex_into(bytes: &[u8], into: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        into.push(char::from(DIGITS[usize::from(byte >> 4)]));
        into.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

/// Text of somebody else's as a JSON string, short and printable.
pub fn quoted(text: &str, max: usize) -> String {
    serde_json::Value::String(printable(text, max)).to_string()
}

/// Where the chain of a file ends.
struct ChainEnd {
    sequence: u64,
    head: String,
    /// The length up to the last whole line, and the bytes after it.
    whole: u64,
    torn: u64,
}

impl ChainEnd {
    fn read(file: &mut File, length: u64) -> io::Result<Self> {
        let from = length.saturating_sub(MAX_LINE);
        file.seek(SeekFrom::Start(from))?;
        let mut tail = Vec::new();
        Read::by_ref(file).take(MAX_LINE).read_to_end(&mut tail)?;
        let Some(newline) = tail.iter().rposition(|b| *b == b'\n') else {
            if from > 0 {
                return Err(io::Error::other("the end of the audit is no line: move the file away to begin a new chain, and keep it as evidence"));
            }
            return Ok(Self { sequence: 0, head: "0".repeat(64), whole: 0, torn: length });
        };
        let begin = tail[..newline].iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let line = &tail[begin..newline];
        let (sequence, head) = Self::seal(line).ok_or_else(|| {
            io::Error::other("the last line of the audit is not one of ours: move the file away to begin a new chain, and keep it as evidence")
        })?;
        let torn = (tail.len() - newline - 1) as u64;
        Ok(Self { sequence, head, whole: length - torn, torn })
    }

    /// The sequence number and the hash of a line, when the hash is right.
    fn seal(line: &[u8]) -> Option<(u64, String)> {
        let body = line.get(..line.len().checked_sub(SEAL_BYTES)?)?;
        let stated = std::str::from_utf8(line.get(body.len() + 9..line.len() - 2)?).ok()?;
        let mut actual = String::new();
        hex_into(&Sha256::digest(body), &mut actual);
        let record: serde_json::Value = serde_json::from_slice(line).ok()?;
        (actual == stated).then(|| record.get("seq")?.as_u64()).flatten().map(|sequence| (sequence, actual))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(path: &Path) -> Vec<serde_json::Value> {
        std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn each_record_carries_the_hash_of_the_one_before_it_also_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        for _ in 0..2 {
            let mut audit = Audit::open(&path).unwrap();
            audit.append("start", "").unwrap();
            audit.append_all(&[("intent", &|line| push(line, format_args!(",\"a\":1"))), ("outcome", &|_| ())]).unwrap();
        }
        let all = records(&path);
        assert_eq!(all.len(), 6);
        for (n, pair) in all.windows(2).enumerate() {
            assert_eq!(pair[1]["prev"], pair[0]["hash"]);
            assert_eq!(pair[1]["seq"].as_u64(), Some(n as u64 + 2));
        }
        for line in std::fs::read_to_string(&path).unwrap().lines() {
            ChainEnd::seal(line.as_bytes()).unwrap();
        }
    }

    #[test]
    fn a_line_that_was_left_unfinished_is_cut_off_and_that_is_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        Audit::open(&path).unwrap().append("start", "").unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"seq\":2,\"ti").unwrap();
        drop(Audit::open(&path).unwrap());
        let all = records(&path);
        assert_eq!(all.len(), 2);
        assert!(all[1]["text"].as_str().unwrap().contains("12 bytes"));
        assert_eq!(all[1]["prev"], all[0]["hash"]);
    }

    #[test]
    fn a_long_tail_without_a_line_erases_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        Audit::open(&path).unwrap().append("start", "").unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(&vec![0; 600 * 1024]).unwrap();
        let before = std::fs::metadata(&path).unwrap().len();
        assert!(Audit::open(&path).err().unwrap().to_string().contains("keep it as evidence"));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), before);
    }

    #[test]
    fn a_file_whose_last_line_was_changed_is_not_continued() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        Audit::open(&path).unwrap().append("note", ",\"text\":\"yes\"").unwrap();
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replace("yes", "no!")).unwrap();
        assert!(Audit::open(&path).is_err());
    }

    #[test]
    fn what_can_not_be_written_is_counted_and_reported_when_it_can_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        let mut audit = Audit::open(&path).unwrap();
        audit.append("start", "").unwrap();
        let good = std::mem::replace(&mut audit.file, File::open("/dev/null").unwrap());
        audit.append("intent", "").unwrap_err();
        audit.append("outcome", "").unwrap_err();
        assert_eq!(audit.state().lost, 2);
        assert!(audit.state().trouble.is_some());
        audit.file = good;
        audit.append("note", "").unwrap();
        assert_eq!(audit.state().trouble, None);
        let all = records(&path);
        assert_eq!(all[1]["kind"], "gap");
        assert_eq!(all[1]["lost"], 2);
        assert_eq!(all[2]["seq"], 3);
    }
}
