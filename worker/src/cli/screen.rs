//! Where the command prints to, how it ends, and what is shown while it waits.

use super::escape;
use crate::control::protocol::{Failure, FailureKind};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::event::{PollFd, PollFlags, poll};
use serde::Serialize;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// The command's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Ok = 0,
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    Denied = 4,
    Conflict = 5,
    Unreachable = 6,
}

/// Why the command ends before its work is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    Failure {
        exit: Exit,
        message: String,
    },
    /// Nobody reads our output any more (`| head -1`): no failure, and nothing to say.
    ReaderGone,
    /// A signal asked us to leave, and what had to be put back is put back.
    Signal(u8),
}

impl Stop {
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Stop::Failure { exit, message: message.into() }
    }
    pub fn failed(message: impl Into<String>) -> Self {
        Stop::new(Exit::Failed, message)
    }
}

/// An error of **printing**. Errors of files and sockets are turned into sentences where they happen.
impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Stop::ReaderGone,
            _ => Stop::failed(format!("the output can't be written: {error}")),
        }
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        let exit = match failure.kind {
            FailureKind::Failed => Exit::Failed,
            FailureKind::Usage => Exit::Usage,
            FailureKind::NotFound => Exit::NotFound,
            FailureKind::Denied => Exit::Denied,
            FailureKind::Conflict => Exit::Conflict,
            FailureKind::Unreachable => Exit::Unreachable,
        };
        Stop::new(exit, failure.message)
    }
}

/// The two outputs, and what may be done with them.
pub struct Screen<'a> {
    pub out: &'a mut dyn Write,
    pub err: &'a mut dyn Write,
    /// Print JSON instead of text for people.
    pub json: bool,
    pub colour: bool,
    /// Columns of the terminal that `out` is; none: it is no terminal.
    pub width: Option<u16>,
    /// `err` is a terminal, so that a spinner may be drawn there.
    pub live: bool,
    /// The file behind `out`, to see that its reader left.
    pub reader: Option<OwnedFd>,
    pub now_ms: u64,
}

impl<'a> Screen<'a> {
    /// The process's own outputs.
    pub fn real(out: &'a mut dyn Write, err: &'a mut dyn Write, json: bool, colour: Option<bool>) -> Self {
        let stdout = io::stdout();
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        // A terminal that does not know its width (a serial line) says 0.
        let width = match rustix::termios::tcgetwinsize(&stdout) {
            Ok(size) if stdout.is_terminal() => Some(if size.ws_col == 0 { 80 } else { size.ws_col }),
            _ => None,
        };
        Screen {
            out,
            err,
            json,
            colour: colour.unwrap_or(stdout.is_terminal() && !dumb && !no_colour),
            width,
            live: io::stderr().is_terminal() && !dumb,
            reader: stdout.as_fd().try_clone_to_owned().ok(),
            now_ms: super::clock::now_ms(),
        }
    }

    /// One line for people. The text must be escaped where it is not ours.
    pub fn say(&mut self, text: impl AsRef<str>) -> Result<(), Stop> {
        Ok(writeln!(self.out, "{}", text.as_ref())?)
    }

    /// The command's one JSON document.
    pub fn document(&mut self, value: &impl Serialize) -> Result<(), Stop> {
        let text = serde_json::to_string_pretty(value).map_err(|error| Stop::failed(format!("no JSON can be made of the answer: {error}")))?;
        self.say(escape::json(&text))
    }

    /// One JSON object of a stream, on its own line and at once.
    pub fn object(&mut self, value: &impl Serialize) -> Result<(), Stop> {
        let text = serde_json::to_string(value).map_err(|error| Stop::failed(format!("no JSON can be made of the answer: {error}")))?;
        self.say(escape::json(&text))?;
        self.flush()
    }

    pub fn flush(&mut self) -> Result<(), Stop> {
        Ok(self.out.flush()?)
    }

    /// Fails when nobody reads `out` any more: a follower that prints nothing would never find out by writing.
    pub fn reader_is_there(&self) -> Result<(), Stop> {
        let Some(fd) = &self.reader else { return Ok(()) };
        let mut fds = [PollFd::new(fd, PollFlags::empty())];
        match poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(1..) if fds[0].revents().contains(PollFlags::ERR) => Err(Stop::ReaderGone),
            _ => Ok(()),
        }
    }
}

/// `1 record`, `2 records`.
pub fn count(n: impl TryInto<u64>, what: &str) -> String {
    let n = n.try_into().unwrap_or(u64::MAX);
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A line on the terminal that moves while the command waits; it is gone when this is dropped.
#[derive(Debug)]
pub struct Spinner(ProgressBar);

impl Spinner {
    /// `waited` is how long the wait has been going on already.
    pub fn start(message: &str, waited: Duration) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_elapsed(waited);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}") {
            bar.set_style(style);
        }
        let spinner = Spinner(bar);
        spinner.say(message);
        spinner.0.enable_steady_tick(Duration::from_millis(100));
        spinner
    }

    pub fn say(&self, message: &str) {
        self.0.set_message(escape::cell(message).into_owned());
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// What a run printed, without a terminal.
    #[derive(Debug, Default)]
    pub struct Printed {
        pub out: Vec<u8>,
        pub err: Vec<u8>,
    }

    impl Printed {
        pub fn screen(&mut self) -> Screen<'_> {
            Screen { out: &mut self.out, err: &mut self.err, json: false, colour: false, width: None, live: false, reader: None, now_ms: 1_700_000_000_000 }
        }
        pub fn out(&self) -> String {
            String::from_utf8(self.out.clone()).expect("UTF-8")
        }
        pub fn err(&self) -> String {
            String::from_utf8(self.err.clone()).expect("UTF-8")
        }
    }

    #[test]
    fn a_reader_that_left_is_no_failure_and_a_full_disk_is() {
        assert_eq!(Stop::from(io::Error::from(io::ErrorKind::BrokenPipe)), Stop::ReaderGone);
        assert!(matches!(Stop::from(io::Error::from(io::ErrorKind::StorageFull)), Stop::Failure { exit: Exit::Failed, .. }));
    }

    #[test]
    fn a_follower_sees_that_its_reader_left() {
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        screen.reader = Some(write);
        assert_eq!(screen.reader_is_there(), Ok(()));
        drop(read);
        assert_eq!(screen.reader_is_there(), Err(Stop::ReaderGone));
    }
}
