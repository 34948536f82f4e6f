//! `diarch-supervisor`: the command line of the privileged half.

use diarch_supervisor::usage::HELP;
use diarch_supervisor::{audit, grants, kvm, listen, run};
use lexopt::prelude::*;
use sd_notify::NotifyState;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tracing_subscriber::filter::LevelFilter;

/// Configuration that is refused, as sysexits.h has it: no restart makes it right.
const EX_CONFIG: u8 = 78;
const USAGE: u8 = 2;
/// A service manager starts us anew at once and for ever, so that a mended file heals by itself. This keeps the loop from becoming a storm, and leaves time
/// to read the reason in `systemctl status`.
const FAILED_START_PAUSE: Duration = Duration::from_secs(1);

enum Command {
    Run(run::Settings),
    Operations(Format),
    CheckGrants(PathBuf),
    ProbeKvm,
    Say(String),
}

#[derive(Clone, Copy)]
enum Format {
    Table,
    Json,
    Markdown,
}

fn main() -> ExitCode {
    let command = match parse() {
        Ok(command) => command,
        Err(error) => {
            eprintln!("diarch-supervisor: {error} (--help lists what there is)");
            return ExitCode::from(USAGE);
        }
    };
    match command {
        Command::Run(settings) => serve(&settings),
        Command::Operations(format) => print(&operations(format)),
        Command::CheckGrants(file) => check_grants(&file),
        Command::ProbeKvm => print(&format!("{}\n", kvm::probe_main())),
        Command::Say(text) => print(&text),
    }
}

fn parse() -> Result<Command, lexopt::Error> {
    let mut args = lexopt::Parser::from_env();
    let mut settings = run::Settings {
        grants: grants::DEFAULT_PATH.into(),
        run_dir: "/run/diarch".into(),
        audit: audit::DEFAULT_PATH.into(),
        socket: PathBuf::new(),
        rehearse: None,
        host_root: None,
    };
    let mut word: Option<OsString> = None;
    let mut file: Option<PathBuf> = None;
    let mut format = Format::Table;
    while let Some(argument) = args.next()? {
        match argument {
            Long("grants") => settings.grants = args.value()?.into(),
            Long("run-dir") => settings.run_dir = args.value()?.into(),
            Long("audit") => settings.audit = args.value()?.into(),
            Long("socket") => settings.socket = args.value()?.into(),
            Long("rehearse") => settings.rehearse = Some(args.value()?.into()),
            Long("host-root") => settings.host_root = Some(args.value()?.into()),
            Long("format") => {
                format = match args.value()?.to_str() {
                    Some("table") => Format::Table,
                    Some("json") => Format::Json,
                    Some("markdown") => Format::Markdown,
                    _ => return Err("--format is table, json or markdown".into()),
                }
            }
            Long("help") | Short('h') => return Ok(Command::Say(HELP.into())),
            Long("version") | Short('V') => return Ok(Command::Say(format!("diarch-supervisor {}\n", diarch_ipc::VERSION))),
            Value(value) if word.is_none() => word = Some(value),
            Value(value) if file.is_none() => file = Some(value.into()),
            other => return Err(other.unexpected()),
        }
    }
    if settings.socket.as_os_str().is_empty() {
        settings.socket = settings.run_dir.join("supervisor.sock");
    }
    let word = word.map(|word| word.to_string_lossy().into_owned());
    match (word.as_deref(), file) {
        (None | Some("run"), None) => Ok(Command::Run(settings)),
        (Some("operations"), None) => Ok(Command::Operations(format)),
        (Some("check-grants"), Some(file)) => Ok(Command::CheckGrants(file)),
        (Some("check-grants"), None) => Err("check-grants needs a file".into()),
        (Some("probe-kvm"), None) => Ok(Command::ProbeKvm),
        (Some(other), _) => Err(format!("{other:?} is no command").into()),
        (None, Some(_)) => Err("no command".into()),
    }
}

/// Prints, and takes a closed pipe as it is.
fn print(text: &str) -> ExitCode {
    use std::io::Write;
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn operations(format: Format) -> String {
    use diarch_ipc::operation::{EVENTS, OPERATIONS, markdown, word};
    match format {
        Format::Markdown => markdown(),
        Format::Json => {
            let rows: Vec<serde_json::Value> = OPERATIONS.iter().filter_map(|row| serde_json::to_value(row).ok()).collect();
            let events: Vec<serde_json::Value> =
                EVENTS.iter().map(|(name, fields, meaning)| serde_json::json!({"name": name, "fields": fields, "meaning": meaning})).collect();
            format!("{:#}\n", serde_json::json!({"operations": rows, "events": events}))
        }
        Format::Table => {
            let list = |items: &[&str]| if items.is_empty() { "-".to_owned() } else { items.join(",") };
            let header = ["name", "class", "capability", "states", "fds_in", "fds_out", "secret_fields", "grant", "reason"].map(str::to_owned);
            let mut rows = vec![header];
            for row in OPERATIONS {
                let states: Vec<&str> = row.states.iter().map(|state| state.as_str()).collect();
                rows.push([
                    row.name.to_owned(),
                    word(row.class),
                    list(row.capability),
                    list(&states),
                    list(row.fds_in),
                    list(row.fds_out),
                    list(row.secret_fields),
                    list(row.grant),
                    row.reason.to_owned(),
                ]);
            }
            let mut out = String::new();
            let widths: Vec<usize> = (0..9).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
            for row in &rows {
                let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
                out += cells.join("  ").trim_end();
                out.push('\n');
            }
            out += "\nevents\n";
            for (name, fields, meaning) in EVENTS {
                out += &format!("{name:20}  {fields:28}  {meaning}\n");
            }
            out
        }
    }
}

fn check_grants(file: &std::path::Path) -> ExitCode {
    match grants::Grants::load(file, 0) {
        Ok(grants) => {
            for qemu in diarch_supervisor::vm::inventory::qemu_grants(&grants, 0) {
                match qemu.trouble {
                    Some(trouble) => println!("warning: {trouble}"),
                    None => println!("QEMU {}: {}", qemu.name, qemu.path),
                }
            }
            println!(
                "{}: accepted ({} VMs, {} MiB, KVM {})",
                file.display(),
                grants.vms.max,
                grants.vms.memory_mib,
                if grants.vms.kvm { "granted" } else { "not granted" }
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("diarch-supervisor: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(settings: &run::Settings) -> ExitCode {
    let inherited = match prepare() {
        Ok(inherited) => inherited,
        Err(error) => {
            eprintln!("diarch-supervisor: the passed-on socket: {error}");
            return ExitCode::from(EX_CONFIG);
        }
    };
    diarch_ipc::log::to_standard_error(LevelFilter::INFO);
    match run::run(settings, inherited) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "not started");
            if std::env::var_os("NOTIFY_SOCKET").is_some() {
                let _ = sd_notify::notify(&[NotifyState::Status(&format!("not started: {error}"))]);
                std::thread::sleep(FAILED_START_PAUSE);
            } else {
                eprintln!("diarch-supervisor: {error}");
            }
            match error {
                run::StartError::Grants(_) => ExitCode::from(EX_CONFIG),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// What must happen while there is one thread: take what systemd passed on, mark everything else to be closed, and wipe the environment.
#[allow(unsafe_code)]
fn prepare() -> std::io::Result<listen::Inherited> {
    let inherited = listen::inherited()?;
    // Descriptors that whoever started us forgot must not reach QEMU.
    // SAFETY: only sets close-on-exec flags; nothing is closed here.
    unsafe { nix::libc::syscall(nix::libc::SYS_close_range, 3, u32::MAX, nix::libc::CLOSE_RANGE_CLOEXEC) };
    let keep = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM"];
    let names: Vec<OsString> = std::env::vars_os().map(|(name, _)| name).filter(|name| !keep.iter().any(|k| name == k)).collect();
    for name in names {
        // SAFETY: no other thread exists that could read the environment.
        unsafe { std::env::remove_var(name) };
    }
    Ok(inherited)
}
