//! `rpc_roundtrip`: one audited `host.inventory` against a bare ping-pong of 64 bytes over a UNIX socket between two processes, all pinned to one
//! processor.

use crate::{line, median};
use diarch_ipc::client::{Client, Restarter, Settings};
use diarch_ipc::operation::Inventory;
use diarch_tests::host::{Host, WORKER};
use diarch_tests::wire::become_user;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 61;
const CALLS: u32 = 4000;
const BYTES: usize = 64;

/// The other process of the ping-pong: gives back what it gets on its standard input.
pub fn echo(bytes: usize) -> ExitCode {
    let mut buffer = vec![0u8; bytes];
    let socket = rustix::stdio::stdin();
    loop {
        match rustix::io::read(socket, &mut buffer) {
            Ok(n) if n == bytes => {}
            _ => return ExitCode::SUCCESS,
        }
        if rustix::io::write(socket, &buffer).is_err() {
            return ExitCode::SUCCESS;
        }
    }
}

struct NoRestart;
impl Restarter for NoRestart {
    fn restart(&mut self) -> std::pin::Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>> {
        Box::pin(async { Err("the bench restarts nothing".into()) })
    }
}

pub fn pin(pid: Option<i32>) {
    let mut cpu = rustix::thread::CpuSet::new();
    cpu.set(0);
    let pid = pid.and_then(rustix::process::Pid::from_raw);
    rustix::thread::sched_setaffinity(pid, &cpu).expect("sched_setaffinity");
}

pub fn run() {
    let limits = "[limits]\nread_per_second = 4000000000\nread_burst = 4000000000\n";
    let host = Host::builder().without_worker().grants(limits).start();
    pin(Some(host.supervisor_pid()));
    let socket = host.socket();

    let (mut near, far) = UnixStream::pair().expect("a pair");
    let mut partner =
        Command::new(std::env::current_exe().expect("our path")).args(["--echo", "64"]).stdin(Stdio::from(OwnedFd::from(far))).spawn().expect("spawn");
    pin(Some(partner.id().cast_signed()));

    let (ours, bare) = std::thread::spawn(move || {
        pin(None);
        become_user(WORKER);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let (client, _events) = Client::start(Settings::new(socket), Box::new(NoRestart));
            let (mut ours, mut bare) = (Vec::new(), Vec::new());
            for round in 0..=ROUNDS {
                let started = Instant::now();
                for _ in 0..CALLS {
                    let answered = client.call(Inventory { after: None }, Vec::new(), Duration::from_secs(5)).await;
                    answered.expect("an inventory");
                }
                let a = started.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS);
                let started = Instant::now();
                let mut buffer = [7u8; BYTES];
                for _ in 0..CALLS {
                    near.write_all(&buffer).expect("ping");
                    near.read_exact(&mut buffer).expect("pong");
                }
                let b = started.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS);
                // The first round warms up.
                if round > 0 {
                    ours.push(a);
                    bare.push(b);
                }
            }
            (ours, bare)
        })
    })
    .join()
    .expect("the measuring thread");
    let _ = partner.wait();
    let calls = u64::from(CALLS) * (ROUNDS as u64 + 1);
    let audited = host.owned().audit.sequence;
    assert!(audited >= 2 * calls, "every request has its intent and its outcome in the audit: {audited} records for {calls} requests");
    line("rpc_roundtrip", median(ours), "us", median(bare));
}
