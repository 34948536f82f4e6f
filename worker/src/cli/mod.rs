//! The `diarch` command: what people type.
//!
//! This file is the definition of the command line and the way from each command to its module; `connection` is the way to the
//! worker, `screen` the way to the terminal, and `escape` stands between what others wrote and the latter.

mod audit;
mod clock;
mod comeback;
mod connection;
mod console;
mod device;
mod doctor;
mod escape;
mod event;
mod plan;
mod rehearse;
mod screen;
mod table;
mod validate;
mod vm;

use crate::control::protocol::LogSource;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use screen::{Exit, Screen, Stop};
use std::io::{self, BufWriter};
use std::path::PathBuf;
use std::process::ExitCode;
use vm::{Change, Stay};

/// Where the worker listens.
const SOCKET: &str = "/run/diarch/worker.sock";
/// Names another socket, when `--socket` doesn't.
const SOCKET_VARIABLE: &str = "DIARCH_SOCKET";

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  wrong usage
  3  not found
  4  denied
  5  conflict
  6  the worker (or its supervisor) can't be reached

Environment:
  DIARCH_SOCKET  the worker's socket, unless --socket names it
  NO_COLOR       no colours, unless --color says otherwise";

/// Keeps QEMU virtual machines alive: shows them, changes them, and tells what root was asked to do for them
#[derive(Debug, Parser)]
#[command(name = "diarch", version, after_help = EXIT_CODES, arg_required_else_help = true)]
struct Cli {
    /// The worker's socket [default: /run/diarch/worker.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print one JSON document, or one JSON object a line where there is no end to wait for
    #[arg(long, global = true)]
    json: bool,
    /// When to use colours
    #[arg(long, global = true, value_enum, default_value_t = Colour::Auto, value_name = "WHEN")]
    color: Colour,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Colour {
    /// On a terminal, and without NO_COLOR
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show and change virtual machines
    #[command(subcommand)]
    Vm(Vm),
    /// Show the PCI devices that are given to VMs, and reset them
    #[command(subcommand)]
    Device(Device),
    /// Show what the worker would change now, and why
    Plan,
    /// Check VM files without a worker: prints every problem, and fails if there is one
    Validate {
        /// A VM file, or a directory of them
        path: PathBuf,
    },
    /// Show what happened to the VMs and to the two halves
    Events {
        #[command(flatten)]
        last: Last<20>,
    },
    /// Read and check the record of everything that root was asked to do
    #[command(subcommand)]
    Audit(Audit),
    /// Tell what is right and wrong with this host, and what mends it
    Doctor,
    /// Run both halves on a directory of VM files, as an ordinary user, and print what root would have been asked to do
    ///
    /// Nothing of this host is changed: devices, taps, mounts and packet filter rules are a stage's. QEMU is real where there is one; otherwise a stub
    /// takes its place.
    Rehearse {
        /// A directory of VM files
        directory: PathBuf,
        /// The host to play on: a directory with sys, proc and dev [default: a host without devices]
        #[arg(long, value_name = "DIR")]
        host: Option<PathBuf>,
        /// The grants to hold it against [default: what the files need, which is printed]
        #[arg(long, value_name = "FILE")]
        grants: Option<PathBuf>,
        /// Go on until it is interrupted, so that files can be edited meanwhile
        #[arg(long)]
        stay: bool,
    },
}

#[derive(Debug, Subcommand)]
enum Vm {
    /// One line for each VM
    List,
    /// Everything about one VM
    Show(Name),
    /// Start a VM, and wait until it is healthy
    Start(Changed),
    /// Ask a VM's guest to power off, and wait until it has
    Stop(Changed),
    /// Stop a VM and start it again
    Restart(Changed),
    /// End a VM's QEMU at once: the guest is not asked
    Kill(Changed),
    /// Use a VM's serial console; Ctrl-] leaves it
    ///
    /// When the input is not a terminal, it is sent to the guest as it is, and the console is left when the guest has been
    /// silent for 2 seconds after the input's end.
    Console(Name),
    /// Show what a VM's guest wrote to its serial console
    Logs {
        #[command(flatten)]
        name: Name,
        #[command(flatten)]
        last: Last<50>,
        /// What QEMU itself wrote, instead of the guest
        #[arg(long)]
        qemu: bool,
    },
}

#[derive(Debug, Subcommand)]
enum Device {
    /// One line for each device that is taken, or that a VM file names
    List,
    /// Reset a device that is quarantined or misbehaves
    ///
    /// The VM that has it, or whose file names it, is stopped; all its devices are reset; and it is started again.
    Recover {
        /// The device, as 0000:65:00.0
        function: String,
        /// Return as soon as the worker has taken it on
        #[arg(long)]
        no_wait: bool,
    },
}

#[derive(Debug, Subcommand)]
enum Audit {
    /// The last records, one a line
    Tail {
        #[command(flatten)]
        file: AuditFile,
        #[command(flatten)]
        last: Last<20>,
    },
    /// Check that no record was changed, removed or cut off: fails, and names the first
    Verify {
        #[command(flatten)]
        file: AuditFile,
        /// Don't hold the file's end against what the supervisor remembers: for an older file, or another host's
        #[arg(long)]
        no_compare: bool,
    },
}

#[derive(Debug, Args)]
struct Name {
    /// The VM's name
    name: String,
}

#[derive(Debug, Args)]
struct Changed {
    /// The VM's name
    name: String,
    /// Return as soon as the worker has taken it on
    #[arg(long)]
    no_wait: bool,
}

#[derive(Debug, Args)]
struct AuditFile {
    /// The audit file
    #[arg(long, value_name = "PATH", default_value = audit::FILE)]
    file: PathBuf,
}

/// Which part of something that goes on and on; `COUNT` lines when not said otherwise.
#[derive(Debug, Args)]
struct Last<const COUNT: u32> {
    /// Show so many of the last
    #[arg(short = 'n', long = "lines", value_name = "N", default_value_t = COUNT)]
    lines: u32,
    /// Go on with what comes
    #[arg(short, long)]
    follow: bool,
}

/// The definition of the command line, for manual pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command that this process was started as.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version go to stdout and are no error; clap knows which is which.
        Err(said) => {
            let _ = said.print();
            return ExitCode::from(if said.use_stderr() { Exit::Usage as u8 } else { Exit::Ok as u8 });
        }
    };
    let colour = match cli.color {
        Colour::Auto => None,
        Colour::Always => Some(true),
        Colour::Never => Some(false),
    };
    // Not locked: the console's printer is a thread of its own.
    let (mut out, mut err) = (BufWriter::new(io::stdout()), io::stderr());
    let code = run(&cli, &mut Screen::real(&mut out, &mut err, cli.json, colour));
    // What is still buffered was refused already; trying again at drop would only repeat that.
    let _ = out.into_parts();
    ExitCode::from(code)
}

/// Runs one command, says why it failed, and gives the exit code.
fn run(cli: &Cli, screen: &mut Screen<'_>) -> u8 {
    let result = dispatch(cli, screen);
    let flushed = screen.flush();
    match result.and_then(|exit| flushed.map(|()| exit)) {
        Ok(exit) => exit as u8,
        Err(Stop::Failure { exit, message }) => {
            let _ = writeln!(screen.err, "diarch: {}", escape::cell(&message));
            exit as u8
        }
        Err(Stop::ReaderGone) => Exit::Ok as u8,
        Err(Stop::Signal(number)) => 128 + number,
    }
}

fn dispatch(cli: &Cli, screen: &mut Screen<'_>) -> Result<Exit, Stop> {
    let from_variable = || std::env::var_os(SOCKET_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let socket = cli.socket.clone().or_else(from_variable).unwrap_or_else(|| SOCKET.into());
    let change = |change, of: &Changed, screen: &mut Screen<'_>| {
        let stay = if of.no_wait { Stay::UntilAccepted } else { Stay::UntilDone };
        vm::change(&socket, change, &of.name, stay, screen)
    };
    match &cli.command {
        Command::Vm(Vm::List) => vm::list(&socket, screen)?,
        Command::Vm(Vm::Show(Name { name })) => vm::show(&socket, name, screen)?,
        Command::Vm(Vm::Start(of)) => change(Change::Start, of, screen)?,
        Command::Vm(Vm::Stop(of)) => change(Change::Stop, of, screen)?,
        Command::Vm(Vm::Restart(of)) => change(Change::Restart, of, screen)?,
        Command::Vm(Vm::Kill(of)) => change(Change::Kill, of, screen)?,
        Command::Vm(Vm::Console(_)) if cli.json => return Err(Stop::new(Exit::Usage, "a console is bytes, and has no --json")),
        Command::Vm(Vm::Console(Name { name })) => console::console(&socket, name, screen)?,
        Command::Vm(Vm::Logs { name, last, qemu }) => {
            let source = if *qemu { LogSource::Qemu } else { LogSource::Console };
            vm::logs(&socket, vm::LogRequest { name: &name.name, source, lines: last.lines, follow: last.follow }, screen)?;
        }
        Command::Device(Device::List) => device::list(&socket, screen)?,
        Command::Device(Device::Recover { function, no_wait }) => {
            let stay = if *no_wait { Stay::UntilAccepted } else { Stay::UntilDone };
            vm::change(&socket, Change::Recover, function, stay, screen)?;
        }
        Command::Plan => plan::plan(&socket, screen)?,
        Command::Validate { path } => return validate::validate(path, screen),
        Command::Events { last } => event::events(&socket, last.lines, last.follow, screen)?,
        Command::Audit(Audit::Tail { file, last }) => audit::tail(&file.file, last.lines, last.follow, screen)?,
        Command::Audit(Audit::Verify { file, no_compare }) => {
            let compare = if *no_compare { audit::Compare::No } else { audit::Compare::WithSupervisor };
            return audit::verify(&socket, &file.file, compare, screen);
        }
        Command::Doctor => {
            return doctor::doctor(&socket, &doctor::Host::at("/"), screen);
        }
        Command::Rehearse { directory, host, grants, stay } => {
            let of = rehearse::Rehearsal { directory, stage: host.as_deref(), grants: grants.as_deref(), stay: *stay };
            return rehearse::rehearse(&of, screen);
        }
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::connection::tests::FakeWorker;
    use super::screen::tests::Printed;
    use super::*;
    use crate::control::protocol::{Failure, FailureKind, Reply, Request};
    use std::io::Write;

    fn typed(words: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("diarch").chain(words.iter().copied()))
    }

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn what_is_no_command_is_wrong_usage() {
        for words in [&[][..], &["vm"], &["vm", "start"], &["vm", "list", "extra"], &["plan", "--color", "often"], &["events", "-n", "-1"], &["frobnicate"]] {
            let error = typed(words).expect_err("no command");
            assert!(error.use_stderr(), "{words:?}");
        }
        assert!(!typed(&["--version"]).expect_err("not a command").use_stderr());
    }

    #[test]
    fn global_options_stand_anywhere() {
        for words in [["--json", "vm", "list"], ["vm", "--json", "list"], ["vm", "list", "--json"]] {
            assert!(typed(&words).expect("a command").json);
        }
    }

    #[test]
    fn a_refusal_is_one_escaped_line_and_an_exit_code() {
        let failure = Failure { kind: FailureKind::NotFound, message: "no VM is called \"\u{1b}[2J\n\"".into() };
        let worker = FakeWorker::answering(&[Reply::Error(failure)]);
        let mut printed = Printed::default();
        let socket = worker.socket.display().to_string();
        let cli = typed(&["vm", "show", "x", "--socket", &socket]).expect("a command");
        assert_eq!(run(&cli, &mut printed.screen()), 3);
        assert_eq!(printed.err(), "diarch: no VM is called \"\\x1b[2J\\n\"\n");
        assert_eq!(printed.out(), "");
        assert_eq!(worker.request(), Request::VmShow { name: "x".into() });
    }

    #[test]
    fn a_reader_that_left_is_a_quiet_success() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let worker = FakeWorker::answering(&[Reply::Vms(vec![]), Reply::Done {}]);
        let cli = typed(&["vm", "list", "--socket", &worker.socket.display().to_string()]).expect("a command");
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        let mut gone = BufWriter::new(Gone);
        screen.out = &mut gone;
        assert_eq!(run(&cli, &mut screen), 0);
        let _ = gone.into_parts();
        assert_eq!(printed.err(), "");
    }

    #[test]
    fn a_missing_worker_is_exit_code_6_and_a_console_has_no_json() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("none.sock").display().to_string();
        for (words, code) in [(&["vm", "list"][..], 6), (&["plan"], 6), (&["events"], 6), (&["vm", "console", "x"], 6), (&["vm", "console", "x", "--json"], 2)]
        {
            let mut printed = Printed::default();
            let cli = typed(&[words, &["--socket", &socket]].concat()).expect("a command");
            assert_eq!(run(&cli, &mut printed.screen()), code, "{words:?}");
            assert_eq!(printed.err().lines().count(), 1);
        }
    }
}
