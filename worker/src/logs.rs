//! The two logs of a VM: what its guest wrote to the serial console, and what QEMU itself wrote.
//!
//! ```text
//!   log_directory/NAME.console.log    log_directory/NAME.qemu.log      (each with one older generation, `.1`)
//! ```
//!
//! QEMU gets them as descriptors opened for appending, and goes on writing when both halves of Diarch are gone.

use diarch_ipc::frame::printable;
use diarch_ipc::name::Label;
use rustix::fs::{Mode, OFlags};
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::control::protocol::LogSource;

/// A log that is longer when its VM starts becomes the older generation.
const ROTATE_ABOVE: u64 = 10 * 1024 * 1024;
/// What of QEMU's last words is quoted at most: its lines are long, and only the last ones say why.
const QUOTED_LINES: usize = 3;
const QUOTED_BYTES: usize = 400;

#[derive(Debug, Clone)]
pub struct Logs {
    directory: PathBuf,
}

/// The logs of one start.
#[derive(Debug)]
pub struct Opened {
    pub qemu: OwnedFd,
    pub console: OwnedFd,
    /// Where in QEMU's log this start begins.
    pub mark: u64,
}

impl Logs {
    /// Makes the directory where it is missing.
    pub fn open(directory: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o750).create(directory)?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// A label is plain ASCII without '/', so it is a part of a file name.
    pub fn path(&self, name: &Label, source: LogSource) -> PathBuf {
        let source = match source {
            LogSource::Console => "console",
            LogSource::Qemu => "qemu",
        };
        self.directory.join(format!("{name}.{source}.log"))
    }

    /// Opens both for appending; a long one is rotated first.
    pub fn append(&self, name: &Label) -> io::Result<Opened> {
        let (console, _) = append(&self.path(name, LogSource::Console))?;
        let (qemu, mark) = append(&self.path(name, LogSource::Qemu))?;
        Ok(Opened { qemu, console, mark })
    }

    /// The end of QEMU's log since `mark`, escaped, in one line; none when it said nothing.
    pub fn last_words(&self, name: &Label, mark: u64) -> Option<String> {
        let mut file = File::open(self.path(name, LogSource::Qemu)).ok()?;
        let length = file.metadata().ok()?.len();
        // Only the tail: a hostile QEMU can have written gigabytes.
        let from = mark.min(length).max(length.saturating_sub(4096));
        file.seek(SeekFrom::Start(from)).ok()?;
        let mut tail = Vec::new();
        file.take(4096).read_to_end(&mut tail).ok()?;
        let tail = String::from_utf8_lossy(&tail);
        let lines: Vec<&str> = tail.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = lines[lines.len().saturating_sub(QUOTED_LINES)..].join(" | ");
        (!last.is_empty()).then(|| printable(&last, QUOTED_BYTES))
    }
}

fn append(path: &Path) -> io::Result<(OwnedFd, u64)> {
    if std::fs::metadata(path).is_ok_and(|found| found.len() > ROTATE_ABOVE) {
        let mut older = path.as_os_str().to_owned();
        older.push(".1");
        std::fs::rename(path, older)?;
    }
    // NOFOLLOW: the directory is ours, and nothing in it is a link.
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o640))?;
    let length = rustix::fs::fstat(&fd)?.st_size;
    Ok((fd, u64::try_from(length).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_last_words_are_those_of_this_start_and_escaped() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(&dir.path().join("logs")).unwrap();
        let name = Label::new("a").unwrap();
        let mut first = File::from(logs.append(&name).unwrap().qemu);
        first.write_all(b"of the start before\n").unwrap();
        let second = logs.append(&name).unwrap();
        assert_eq!(logs.last_words(&name, second.mark), None);
        File::from(second.qemu).write_all(b"one\ntwo\nqemu: no\x1b[31m such port\n\n").unwrap();
        assert_eq!(logs.last_words(&name, second.mark).unwrap(), "one | two | qemu: no\\u{1b}[31m such port");
    }

    #[test]
    fn a_long_log_becomes_the_older_generation() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path()).unwrap();
        let name = Label::new("a").unwrap();
        File::from(logs.append(&name).unwrap().console).set_len(ROTATE_ABOVE + 1).unwrap();
        let console = File::from(logs.append(&name).unwrap().console);
        assert_eq!(console.metadata().unwrap().len(), 0);
        assert!(dir.path().join("a.console.log.1").exists());
    }
}
