//! A worker that goes away in the middle of a command that waits, and comes back: systemd starts it again, and no VM has noticed.
//!
//! ```text
//!   ask --connection lost--> wait (nobody listens, or no supervisor yet) --> ask again --> ...
//!                              \-- for too long: exit code 6, and what is not known
//! ```
//!
//! Only what may be asked twice comes here: a start of what is started already is no start.

use super::connection::Connection;
use super::screen::{Exit, Screen, Stop};
use super::{clock, escape};
use std::path::Path;
use std::time::{Duration, Instant};

/// systemd starts a worker again 100 ms after its end, and one that failed takes a second over that.
#[cfg(not(test))]
const WITHIN: Duration = Duration::from_secs(60);
#[cfg(test)]
const WITHIN: Duration = Duration::from_millis(800);
/// A connection that lasts so long is no worker that dies at once.
const BACK: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(100);

/// How one connection of a command ended.
pub enum Ended {
    /// The command is done, well or not.
    For(Result<(), Stop>),
    /// The worker went away; `Some` reply had come before.
    Lost { heard: bool },
}

impl Ended {
    /// A failure of the connection is a loss; one that the worker answered is not.
    pub fn of(result: Result<(), Stop>, connection: &Connection) -> Self {
        match result {
            Err(Stop::Failure { exit: Exit::Unreachable, .. }) if connection.lost() => Ended::Lost { heard: connection.heard() },
            other => Ended::For(other),
        }
    }
}

/// Asks by `ask` until the command is done, as long as a lost worker comes back soon enough. The first connection must succeed at once: a command that finds no
/// worker says so. `what` is waited for; `unknown` says what nobody knows if it stays away.
pub fn insist<'a>(
    socket: &Path,
    screen: &mut Screen<'a>,
    what: &str,
    unknown: &str,
    mut ask: impl FnMut(Connection, &mut Screen<'a>) -> Ended,
) -> Result<(), Stop> {
    let mut lost = match ask(Connection::open(socket)?, screen) {
        Ended::For(result) => return result,
        Ended::Lost { .. } => Instant::now(),
    };
    let what = escape::cell(what).into_owned();
    let _ = writeln!(screen.err, "{what}: the worker went away; waiting for it to come back (Ctrl-C gives up)");
    loop {
        std::thread::sleep(PAUSE);
        screen.reader_is_there()?;
        let begun = Instant::now();
        let why = match Connection::open(socket) {
            Ok(connection) => match ask(connection, screen) {
                Ended::For(Err(Stop::Failure { exit: Exit::Unreachable, message })) => message,
                Ended::For(result) => return result,
                Ended::Lost { heard } => {
                    // It was back, and went away anew. (Who follows may hear nothing for hours.)
                    if heard || begun.elapsed() > BACK {
                        lost = Instant::now();
                    }
                    "it goes away again and again".to_owned()
                }
            },
            Err(Stop::Failure { exit: Exit::Unreachable, message }) => message,
            Err(stop) => return Err(stop),
        };
        if lost.elapsed() >= WITHIN {
            let within = clock::words(u64::try_from(WITHIN.as_millis()).unwrap_or(u64::MAX));
            let unknown = if unknown.is_empty() { String::new() } else { format!(" {unknown}") };
            let message =
                format!("the worker went away, and is not back after {within} ({why}).{unknown} The VMs run on; see 'journalctl -u diarch-worker -e'");
            return Err(Stop::new(Exit::Unreachable, message));
        }
    }
}
