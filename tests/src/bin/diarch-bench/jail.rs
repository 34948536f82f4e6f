//! `jail_setup`: from the decision until a program runs, in a jail as a VM's, against the same program started by the C library alone: what the stage costs
//! `vm_start`. The program is `/bin/true`, whose end is waited for in both.

use crate::{line, median, milliseconds};
use diarch_supervisor::vm::jail::{self, Limits, Network, Plan, Root, Sandbox, Sockets, Walls};
use diarch_supervisor::vm::spawn::firmware;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const RUNS: usize = 200;
const UID: u32 = 290_001;
/// What the stage may cost.
const LIMIT_MS: f64 = 15.0;
const SOON: Duration = Duration::from_secs(5);

pub fn run() {
    let (mut jailed, mut bare) = (Vec::new(), Vec::new());
    for run in 0..=RUNS {
        let started = Instant::now();
        let mut child = Command::new("/bin/true").stdin(Stdio::null()).spawn().expect("/bin/true");
        child.wait().expect("wait");
        let b = milliseconds(started.elapsed());
        let started = Instant::now();
        in_a_jail();
        let a = milliseconds(started.elapsed());
        if run > 0 {
            jailed.push(a);
            bare.push(b);
        }
    }
    line("jail_setup", median(jailed) - median(bare), "ms", LIMIT_MS);
}

fn in_a_jail() {
    let null = || OwnedFd::from(File::options().read(true).write(true).open("/dev/null").expect("/dev/null"));
    let plan = Plan {
        program: File::open("/bin/true").expect("/bin/true").into(),
        argv: vec!["true".into()],
        fds: vec![null(), null(), null()],
        uid: UID,
        groups: Vec::new(),
        limits: Limits { tasks: 16, open_files: 64, locked_bytes: jail::LOCKED_BYTES },
        root: firmware(Root::of_a_program()).own("/run/vm", UID, 1024 * 1024),
        network: Network::Own,
        sockets: Sockets::Unix,
        sandbox: Sandbox::Ours,
        walls: Walls::Jail,
    };
    let pidfd = jail::fork(plan).and_then(|gated| gated.open(SOON).map_err(|failed| failed.error)).expect("a jail");
    assert!(diarch_supervisor::process::wait_ended(&pidfd, SOON).expect("wait"), "it ends");
    assert_eq!(diarch_supervisor::process::reap(&pidfd), diarch_ipc::operation::ExitStatus::Code(0));
}
