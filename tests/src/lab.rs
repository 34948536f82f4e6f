//! A whole host that a test may take apart: Debian 13 on an emulated machine with an IOMMU, in which KVM works.
//!
//! ```text
//!   a test ---- Lab ---- timeout ---- qemu-system-x86_64 (emulated: it needs no /dev/kvm, and no network)
//!                |                        |
//!                |   a virtio port    Linux 6.12, systemd as PID 1
//!                +------------------------+-- diarch-lab-agent.service: run, sh, read, write
//!                                         +-- devices to bind and to pass on: `device`
//!                                         +-- nested VMs, by KVM
//! ```
//!
//! | what there is in it     | where                                                                                            |
//! |-------------------------|--------------------------------------------------------------------------------------------------|
//! | Debian                  | the image of `tests/lab/build` (`DIARCH_LAB`), never written to: what is written goes with the lab |
//! | programs of this build  | `/srv/lab/bin`, on a disk that is made at each start: `payload`                                    |
//! | the package             | `/srv/lab/diarch.deb` (`DIARCH_DEB`), not installed                                                |
//! | a guest                 | `/srv/guest`: the lab's own kernel, and `tests/guest/init`; it drives an `e1000e`                  |
//!
//! It takes some 20 s to boot, so the tests of one test program share one: [`Lab::turn`] gives it to one of them at a time, which has to leave it as it
//! found it. It ends with the test program, however that ends. One lab runs at a time on a host.

mod agent;
pub mod device;
mod payload;
mod qemu;
pub mod scene;
mod supervised;
mod turn;

pub use agent::serve;
pub use supervised::{DIRECTORY, SUPERVISOR};
pub use turn::Turn;

use crate::machine::{Output, Slot};
use agent::{Agent, Answer, Ask};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The word on the kernel command line by which everything that writes to real devices knows that they are the lab's.
pub const WORD: &str = "diarch.lab=1";

/// Whether this program runs in the lab. Nothing but this may decide whether a test writes to `/sys/bus/pci`.
pub fn in_lab() -> bool {
    fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.split_whitespace().any(|word| word == WORD))
}

/// What a command may take unless it is given more. Everything takes ten times as long as on a processor that isn't emulated.
const COMMAND: Duration = Duration::from_secs(60);
/// From power on to the agent's first word: 10 s, and much more on a busy host.
const BOOT_PATIENCE: Duration = Duration::from_secs(240);
/// How long a test program waits for another one's lab; longer than any lab may live.
const SLOT_PATIENCE: Duration = Duration::from_secs(40 * 60);

/// A booted lab.
#[derive(Debug)]
pub struct Lab {
    // Before the process: its end is the end of the connection.
    agent: Agent,
    qemu: qemu::Process,
    started: Instant,
    booted: Duration,
    _slot: Slot,
}

// ---- its life ----

impl Lab {
    /// The lab of this test program, for the calling test alone until it drops the turn. Boots it for the first one.
    pub fn turn() -> Turn<'static> {
        static SHARED: OnceLock<Lab> = OnceLock::new();
        Turn::wait(|| SHARED.get_or_init(Lab::boot))
    }

    /// A lab of one's own: no other one may run in this process.
    pub fn boot() -> Lab {
        Lab::boot_with(&[])
    }

    /// With more words on the kernel command line.
    pub fn boot_with(words: &[&str]) -> Lab {
        let images = crate::need::lab().expect("need!(Lab) comes first");
        let slot = Slot::wait("diarch-lab", 1, SLOT_PATIENCE);
        // Who builds the image anew waits until QEMU has opened the old one.
        let stamp = fs::File::open(images.join("stamp")).expect("need!(Lab) comes first");
        stamp.lock_shared().expect("flock");
        // Once it has booted, this directory is not needed any more.
        forget_killed();
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir().expect("a directory for the lab");
        payload::make(&dir.path().join("payload.img"));
        let started = Instant::now();
        let qemu = qemu::Process::start(&images, dir.path(), words);
        let agent = Agent::connect(&dir.path().join("agent"), BOOT_PATIENCE, &qemu);
        let mut lab = Lab { agent, qemu, started, booted: Duration::ZERO, _slot: slot };
        // The agent speaks before udev has named the last card.
        let settled = lab.run_within(BOOT_PATIENCE, &["/bin/sh", "-c", "systemctl is-system-running --wait; udevadm settle"]);
        assert_eq!(settled.stdout.trim(), "running", "the lab did not boot well\n{}", lab.state());
        lab.booted = started.elapsed();
        if std::env::var_os("DIARCH_LAB_CONSOLE").is_some() {
            // Not under the name that the next lab clears away.
            let kept = dir.keep();
            let console = std::env::temp_dir().join(format!("lab-console-{}", std::process::id()));
            let _ = fs::rename(kept.join("console"), &console).and_then(|()| fs::remove_dir_all(kept));
            eprintln!("the lab's console: {}", console.display());
        }
        lab
    }

    /// From power on to the end of systemd's start jobs.
    pub fn booted_after(&self) -> Duration {
        self.booted
    }

    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn console(&self) -> String {
        self.qemu.console()
    }

    /// Everything that tells why a test failed.
    pub fn state(&self) -> String {
        let console = self.console();
        let short = |script: &str| self.ask_run(Duration::from_secs(20), &["/bin/bash", "-c", script], &[]).map_or_else(|e| e.to_string(), |out| out.stdout);
        format!(
            "---- the lab's console ----\n{}\n---- its kernel ----\n{}\n---- its journal ----\n{}",
            tail(&console, 2000),
            short("dmesg | tail -n 40"),
            short("journalctl --no-pager -o short-precise -n 60")
        )
    }
}

const PREFIX: &str = "diarch-lab-";

/// Removes the directory of a lab whose test program was killed while it booted. Whoever calls has the only slot, so no live lab has one.
fn forget_killed() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn tail(text: &str, most: usize) -> &str {
    let mut from = text.len().saturating_sub(most);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

// ---- commands ----

impl Lab {
    fn ask_run(&self, within: Duration, argv: &[&str], input: &[u8]) -> io::Result<Output> {
        let argv = argv.iter().map(|word| (*word).to_owned()).collect();
        let within_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
        // The agent ends the command; the rest is for its answer.
        match self.agent.ask(&Ask::Run { argv, within_ms }, input, within + Duration::from_secs(60))? {
            (Answer::Ended { code, stdout }, mut output) => {
                let stderr = output.split_off(stdout.min(output.len()));
                let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                Ok(Output { code, stdout: text(output), stderr: text(stderr) })
            }
            (other, _) => Err(io::Error::other(format!("the agent answered {other:?}"))),
        }
    }

    /// Runs a program as root, in the agent's unit, at most a minute.
    #[track_caller]
    pub fn run(&self, argv: &[&str]) -> Output {
        self.run_within(COMMAND, argv)
    }

    #[track_caller]
    pub fn run_within(&self, within: Duration, argv: &[&str]) -> Output {
        self.ask_run(within, argv, &[]).unwrap_or_else(|e| panic!("{argv:?} in the lab: {e}\n{}", tail(&self.console(), 2000)))
    }

    /// Runs a program with this on its standard input.
    #[track_caller]
    pub fn run_with_input(&self, argv: &[&str], input: &[u8]) -> Output {
        self.ask_run(COMMAND, argv, input).unwrap_or_else(|e| panic!("{argv:?} in the lab: {e}"))
    }

    /// Runs a script of bash's that must succeed; gives what it printed, without the last newline.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.try_sh(script).expect_success(script).stdout.trim_end().to_owned()
    }

    #[track_caller]
    pub fn try_sh(&self, script: &str) -> Output {
        self.run(&["/bin/bash", "-euo", "pipefail", "-c", script])
    }

    #[track_caller]
    pub fn systemctl(&self, words: &[&str]) -> String {
        let argv: Vec<&str> = ["systemctl", "--no-pager"].iter().chain(words).copied().collect();
        self.run(&argv).expect_success(&argv.join(" ")).stdout.trim_end().to_owned()
    }

    /// Tries `ready` again and again until it gives something.
    #[track_caller]
    pub fn wait_for<T>(&self, what: &str, within: Duration, mut ready: impl FnMut() -> Option<T>) -> T {
        let until = Instant::now() + within;
        loop {
            if let Some(value) = ready() {
                return value;
            }
            assert!(Instant::now() < until, "not within {within:?}: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

// ---- files ----

impl Lab {
    /// A file's bytes; the error is the kernel's of there.
    pub fn try_read(&self, path: &str) -> io::Result<Vec<u8>> {
        self.agent.ask(&Ask::Read { path: path.to_owned() }, &[], COMMAND).map(|(_, bytes)| bytes)
    }

    #[track_caller]
    pub fn read(&self, path: &str) -> String {
        let bytes = self.try_read(path).unwrap_or_else(|e| panic!("{path} in the lab: {e}"));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Writes a file in place with one system call, as files of sysfs want it; makes it (0644) where it is not. The error is the kernel's of there.
    pub fn try_write(&self, path: &str, bytes: &[u8]) -> io::Result<()> {
        self.agent.ask(&Ask::Write { path: path.to_owned(), mode: 0o644 }, bytes, COMMAND).map(drop)
    }

    #[track_caller]
    pub fn write(&self, path: &str, text: &str) {
        self.try_write(path, text.as_bytes()).unwrap_or_else(|e| panic!("{path} in the lab: {e}"));
    }

    #[track_caller]
    pub fn copy_in(&self, from: &Path, path: &str, mode: u32) {
        let bytes = fs::read(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
        let asked = self.agent.ask(&Ask::Write { path: path.to_owned(), mode }, &bytes, COMMAND);
        asked.unwrap_or_else(|e| panic!("{path} in the lab: {e}"));
    }

    #[track_caller]
    pub fn copy_out(&self, path: &str, to: &Path) {
        let bytes = self.try_read(path).unwrap_or_else(|e| panic!("{path} in the lab: {e}"));
        fs::write(to, bytes).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
    }

    /// Where a symbolic link leads, as it is written there: `/sys/bus/pci/devices/BDF/driver`.
    pub fn link(&self, path: &str) -> Option<PathBuf> {
        let (_, bytes) = self.agent.ask(&Ask::Link { path: path.to_owned() }, &[], COMMAND).ok()?;
        Some(PathBuf::from(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Links are followed.
    pub fn exists(&self, path: &str) -> bool {
        self.agent.ask(&Ask::Exists { path: path.to_owned() }, &[], COMMAND).is_ok()
    }
}
