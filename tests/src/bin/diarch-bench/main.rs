//! `diarch-bench`: speed and memory, each figure beside a baseline that was measured in the same run.
//!
//! One JSON object a line on standard output: `{"name","value","unit","baseline","ratio"}`, medians. `ratio` is value / baseline; where there is a
//! limit and no baseline, `baseline` is that limit. What it is doing goes to standard error.

mod booted;
mod death;
mod devices;
mod footprint;
mod jail;
mod mounts;
mod net;
mod rpc;
mod start;

use diarch_tests::host::Host;
use diarch_worker::control::protocol::{EventView, Reply, Request};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let mut only = Vec::new();
    while let Some(arg) = args.next() {
        match (arg.as_str(), args.next()) {
            // The other end of the ping-pong; see `rpc`.
            ("--echo", Some(bytes)) => return rpc::echo(bytes.parse().unwrap_or(64)),
            // The part of `devices` that runs in the lab.
            ("--bind", Some(ask)) => return devices::inside(&ask),

            ("--guest", Some(dir)) => set_guest(&PathBuf::from(dir)),
            ("--only", Some(name)) => only.push(name),
            _ => {
                eprintln!("usage: diarch-bench [--guest DIR] [--only rpc|start|jail|mounts|net|devices|death|footprint|booted]...");
                return ExitCode::from(2);
            }
        }
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("diarch-bench: the supervisor needs root: run it with sudo");
        return ExitCode::FAILURE;
    }
    type Part = (&'static str, fn());
    let parts: [Part; 9] = [
        ("rpc", rpc::run),
        ("start", start::run),
        ("jail", jail::run),
        ("mounts", mounts::run),
        ("net", net::run),
        ("devices", devices::run),
        ("death", death::run),
        ("footprint", footprint::run),
        ("booted", booted::run),
    ];
    for (name, part) in parts {
        if only.is_empty() || only.iter().any(|o| o == name) {
            eprintln!("bench: {name} ...");
            part();
        }
    }
    ExitCode::SUCCESS
}

#[allow(unsafe_code)]
fn set_guest(dir: &std::path::Path) {
    let dir = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    // SAFETY: the first thing that main does; no other thread exists.
    unsafe { std::env::set_var("DIARCH_GUEST", dir) };
}

/// One line of the result.
fn line(name: &str, value: f64, unit: &str, baseline: f64) {
    let round = |number: f64| (number * 1000.0).round() / 1000.0;
    let ratio = if baseline > 0.0 { value / baseline } else { 0.0 };
    let line = serde_json::json!({"name": name, "value": round(value), "unit": unit, "baseline": round(baseline), "ratio": round(ratio)});
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The worker's events as they come.
struct Events {
    lines: std::io::Lines<BufReader<UnixStream>>,
}

impl Events {
    fn follow(host: &Host) -> Self {
        let mut stream = UnixStream::connect(host.path("worker/worker.sock")).expect("the worker's socket");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
        let request = serde_json::to_string(&Request::Events { last: 0, follow: true }).expect("encode");
        stream.write_all(format!("{request}\n").as_bytes()).expect("ask");
        // The worker has subscribed us once it has read the request: give it that moment before anything is measured.
        std::thread::sleep(Duration::from_millis(50));
        Self { lines: BufReader::new(stream).lines() }
    }

    /// Waits for an event of this kind and VM; when it came.
    fn wait(&mut self, kind: &str, vm: &str) -> Instant {
        loop {
            let line = self.lines.next().expect("more events").expect("an event in time");
            let at = Instant::now();
            if let Ok(Reply::Event(EventView { vm: Some(of), kind: found, message, .. })) = serde_json::from_str(&line) {
                if of.as_str() == vm && found == kind {
                    return at;
                }
                assert!(found != "vm.failed", "{vm} failed: {message}");
            }
        }
    }
}
