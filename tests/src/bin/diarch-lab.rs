//! The lab by hand: boots it and runs each line of standard input in it, as root, by bash. `DIARCH_LAB` names its image.
//!
//! ```text
//!   diarch-lab                 a prompt, until the end of the input
//!   diarch-lab 'lspci -nn'     these commands, then the end; the exit code is the last one's
//! ```
//!
//! `:put FILE PATH` copies a file of this host in, with its mode, and `:get PATH FILE` one out.

use diarch_tests::lab::Lab;
use std::io::{BufRead, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const COMMAND: Duration = Duration::from_secs(600);

fn run(lab: &Lab, line: &str) -> Option<i32> {
    let started = Instant::now();
    match line.split_whitespace().collect::<Vec<_>>()[..] {
        [":put", from, to] => {
            let mode = std::fs::metadata(from).map_or(0o644, |meta| meta.permissions().mode() & 0o777);
            lab.copy_in(Path::new(from), to, mode);
            return Some(0);
        }
        [":get", from, to] => {
            lab.copy_out(from, Path::new(to));
            return Some(0);
        }
        _ => {}
    }
    let output = lab.run_within(COMMAND, &["/bin/bash", "-c", line]);
    print!("{}{}", output.stdout, output.stderr);
    eprintln!("[{}, {:?}]", output.code.map_or("killed".into(), |code| code.to_string()), started.elapsed());
    output.code
}

fn main() -> ExitCode {
    for need in [diarch_tests::need::Need::Lab, diarch_tests::need::Need::Qemu] {
        if let Some(missing) = need.missing() {
            eprintln!("diarch-lab needs {missing}");
            return ExitCode::FAILURE;
        }
    }
    let lab = Lab::boot();
    eprintln!("booted after {:?}", lab.booted_after());
    let mut last = Some(0);
    let lines: Vec<String> = std::env::args().skip(1).collect();
    for line in &lines {
        last = run(&lab, line);
    }
    if lines.is_empty() {
        let prompt = || {
            eprint!("lab# ");
            let _ = std::io::stderr().flush();
        };
        prompt();
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            last = run(&lab, &line);
            prompt();
        }
    }
    ExitCode::from(last.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}
