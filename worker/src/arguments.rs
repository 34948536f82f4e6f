//! The command line of `diarch-worker`: here, and not in its program, so that its manual page is made from the same definition.

use clap::{CommandFactory, Parser};
use std::path::PathBuf;

const AFTER_HELP: &str = "\
Exit codes:
  0  told to stop by SIGTERM or SIGINT
  1  it can't go on, and said why
  2  wrong usage

Environment:
  DIARCH_LOG  how much is logged: error, warn, info (the default), debug, trace";

/// Decides which VMs run on this host, and keeps them running
///
/// Needs no privilege: what does, it asks of diarch-supervisor.
#[derive(Debug, Parser)]
#[command(name = "diarch-worker", version, after_help = AFTER_HELP)]
pub struct Arguments {
    /// The settings; a missing file means the defaults
    #[arg(long, value_name = "FILE", default_value = crate::config::CONFIG)]
    pub config: PathBuf,
}

/// The definition of the command line, for the manual page.
pub fn command() -> clap::Command {
    Arguments::command()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_definition_is_sound() {
        super::command().debug_assert();
    }
}
