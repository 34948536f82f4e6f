//! What a granted QEMU can do, asked of itself, in a jail like a VM's with no device, no disk and no network.

use super::jail::{self, Plan};
use super::lingering::{self, NotStarted};
use diarch_ipc::Error;
use diarch_ipc::operation::ExitStatus;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// It loads its libraries, prints some lines and ends: some 50 ms.
const PATIENCE: Duration = Duration::from_secs(5);
/// Threads that QEMU has before it looks at its arguments, and room.
const TASKS: u64 = 16;
const OPEN_FILES: u64 = 256;

/// Whether it takes devices as descriptors of iommufd's: from QEMU 9.0 on, if it was built so. An older one does not know the object, and says so by its exit code.
pub fn takes_iommufd(program: OwnedFd, path: &str, uid: u32, root: jail::Root) -> Result<bool, Box<NotStarted>> {
    let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from).map_err(|error: io::Error| Error::io("open /dev/null", &error));
    let argv = [path, "-nodefaults", "-no-user-config", "-machine", "none", "-object", "iommufd,help"];
    let gated = jail::fork(Plan {
        program,
        argv: argv.map(str::to_owned).to_vec(),
        fds: vec![null()?, null()?, null()?],
        uid,
        groups: Vec::new(),
        limits: jail::Limits { tasks: TASKS, open_files: OPEN_FILES, locked_bytes: jail::LOCKED_BYTES },
        root,
        network: jail::Network::Own,
        sockets: jail::Sockets::Unix,
        sandbox: jail::Sandbox::Ours,
        walls: jail::Walls::Jail,
    })?;
    let asked = gated.open(PATIENCE)?;
    let ended = crate::process::wait_ended(&asked, PATIENCE).map_err(|error| Error::io("wait", &error))?;
    if ended {
        return match crate::process::reap(&asked) {
            ExitStatus::Code(0) => Ok(true),
            // As QEMU ends by its own will, where it knows no such object.
            ExitStatus::Code(1) => Ok(false),
            // Ended by somebody else: that is no answer, and is not remembered as one.
            other => Err(Error::Failed { step: "ask QEMU what it can do".into(), errno: None, detail: format!("it ended with {other}") }.into()),
        };
    }
    tracing::warn!(path, "this QEMU does not say within {} s whether it takes devices as descriptors", PATIENCE.as_secs());
    let after_ms = u64::try_from(PATIENCE.as_millis()).unwrap_or(u64::MAX);
    Err(Box::new(NotStarted {
        error: Error::Timeout { step: "a QEMU that was asked what it can do".into(), after_ms },
        left: lingering::kill(vec![asked], lingering::KILLED),
        record: None,
    }))
}
