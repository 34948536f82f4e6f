//! Log lines of both halves, on standard error.
//!
//! Under systemd that is the journal, which takes a line's severity from a number in front of it (`<4>`, sd-daemon(3)): so `journalctl -p warning` finds the warnings.

use std::io::{self, Write};
use tracing::{Level, Metadata};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Colour codes in a journal are noise, and a terminal is not where this is read. What can't be written is dropped: the subscriber's own complaint about that would
/// panic on the same stream.
pub fn to_standard_error(level: LevelFilter) {
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    tracing_subscriber::fmt().log_internal_errors(false).with_max_level(level).with_ansi(false).with_target(false).with_writer(Lines { journal }).init();
}

struct Lines {
    journal: bool,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { severity: "" }
    }

    fn make_writer_for(&'a self, about: &Metadata<'_>) -> Line {
        Line { severity: if self.journal { severity(*about.level()) } else { "" } }
    }
}

/// syslog(3).
fn severity(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

/// Writes one whole line, which is how it gets them.
struct Line {
    severity: &'static str,
}

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let whole = [self.severity.as_bytes(), line].concat();
        io::stderr().lock().write_all(&whole)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().lock().flush()
    }
}
