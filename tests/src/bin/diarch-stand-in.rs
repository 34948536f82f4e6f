//! `diarch-stand-in`: what respawns the two halves where there is no systemd. See `diarch_tests::stand_in`.

use diarch_tests::stand_in::manager::{self, Lifeline};
use diarch_tests::stand_in::{Ask, Told, Unit, ask};
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "usage: diarch-stand-in run --config FILE [--lifeline]
       diarch-stand-in status|shutdown --control SOCKET
       diarch-stand-in start|restart|stop|hold|refuse|permit UNIT --control SOCKET
       diarch-stand-in kill UNIT [SIGNAL] --control SOCKET

UNIT is supervisor or worker. `run` keeps the units of FILE (JSON) alive until SIGTERM, SIGINT, `shutdown` or, with --lifeline,
the end of its standard input; then it ends both, and every VM that is left.";

/// What the command line asks for.
enum Job {
    Run { config: PathBuf, lifeline: Lifeline },
    Ask { ask: Ask, control: PathBuf },
}

fn parse(args: &[String]) -> Result<Job, String> {
    let mut words = Vec::new();
    let (mut config, mut control, mut lifeline) = (None, None, Lifeline::None);
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let mut value = || rest.next().map(PathBuf::from).ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--config" => config = Some(value()?),
            "--control" => control = Some(value()?),
            "--lifeline" => lifeline = Lifeline::Stdin,
            option if option.starts_with('-') => return Err(format!("there is no option {option}")),
            word => words.push(word),
        }
    }
    let job = match words.as_slice() {
        ["run"] => return Ok(Job::Run { config: config.ok_or("run needs --config FILE")?, lifeline }),
        ["status"] => Ask::Status,
        ["shutdown"] => Ask::Shutdown,
        ["kill", unit] => Ask::Kill(unit.parse()?, 9),
        ["kill", unit, signal] => Ask::Kill(unit.parse()?, signal.parse().map_err(|_| format!("{signal:?} is not a signal's number"))?),
        [verb, unit] => {
            let unit: Unit = unit.parse()?;
            match *verb {
                "start" => Ask::Start(unit),
                "restart" => Ask::Restart(unit),
                "stop" => Ask::Stop(unit),
                "hold" => Ask::Hold(unit),
                "refuse" => Ask::Refuse(unit),
                "permit" => Ask::Permit(unit),
                other => return Err(format!("there is no command {other:?}")),
            }
        }
        _ => return Err("what is it to do?".into()),
    };
    Ok(Job::Ask { ask: job, control: control.ok_or("--control SOCKET is needed")? })
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let job = match parse(&args) {
        Ok(job) => job,
        Err(sentence) => {
            eprintln!("diarch-stand-in: {sentence}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match job {
        Job::Run { config, lifeline } => {
            let read = std::fs::read(&config).map_err(|e| format!("{}: {e}", config.display()));
            let parsed = read.and_then(|text| serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", config.display())));
            match parsed.and_then(|parsed| manager::run(parsed, lifeline).map_err(|e| e.to_string())) {
                Ok(()) => ExitCode::SUCCESS,
                Err(sentence) => {
                    eprintln!("diarch-stand-in: {sentence}");
                    ExitCode::from(1)
                }
            }
        }
        Job::Ask { ask: what, control } => match ask(&control, &what) {
            Ok(Told::Ok) => ExitCode::SUCCESS,
            Ok(Told::Error(sentence)) => {
                eprintln!("diarch-stand-in: {sentence}");
                ExitCode::from(1)
            }
            Ok(told) => {
                println!("{}", serde_json::to_string_pretty(&told).unwrap_or_default());
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("diarch-stand-in: {}: {error}", control.display());
                ExitCode::from(1)
            }
        },
    }
}
