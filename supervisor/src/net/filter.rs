//! The packet filter's rules, handed to `nft`: the whole of our two tables in one transaction, so that there is no moment without them (nft(8), "replace
//! atomically").
//!
//! A supervisor may die at any step of this, so:
//! * the text is complete, in a sealed memory file, before nft starts: half of it could be a script that only deletes;
//! * nft holds a lock that its successor waits for, so that no older text is set after a newer one;
//! * the file of that lock says that there may be tables, until they are gone.

use super::link::Links;
use super::rules::{self, Card, User};
use crate::grants;
use crate::process;
use crate::state::Supervisor;
use diarch_ipc::Error;
use diarch_ipc::frame::printable;
use rustix::fs::{FlockOperation, MemfdFlags, SealFlags, fcntl_add_seals, flock, memfd_create};
use rustix::process::{PidfdFlags, pidfd_open};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Within the operations' deadline of 5 s. nft sets a thousand elements in some ten milliseconds.
const PATIENCE: Duration = Duration::from_millis(4_500);
/// Of what nft says when it refuses; the rest repeats the text that it was given.
const MAX_SAID: u64 = 4096;

/// `nft`, and where the lock is.
#[derive(Debug, Clone)]
pub struct Program {
    nft: PathBuf,
    lock: PathBuf,
}

impl Program {
    pub fn of(supervisor: &Supervisor) -> Self {
        Self { nft: supervisor.grants.nft.path.clone(), lock: supervisor.ledger.filter_lock() }
    }

    /// Whether an earlier supervisor, or this one, may have made tables.
    pub fn was_used(&self) -> bool {
        self.lock.exists()
    }

    /// Sets the tables for those cards whose taps exist, and for these users. A tap goes when its last descriptor does, and then its card has no rules.
    pub fn settle(&self, cards: &[Card], users: &[User]) -> Result<(), Error> {
        let there = present().map_err(|error| Error::io("list interfaces", &error))?;
        let cards: Vec<&Card> = cards.iter().filter(|card| there.contains(&card.name)).collect();
        if cards.is_empty() && users.is_empty() && !self.was_used() {
            return Ok(());
        }
        self.set(&cards, users)
    }

    /// As [`Program::settle`], for cards of which the caller knows that they are there.
    pub fn set(&self, cards: &[&Card], users: &[User]) -> Result<(), Error> {
        let nothing = cards.is_empty() && users.is_empty();
        let until = Instant::now() + PATIENCE;
        // Followed first, as for QEMU: distributions link /usr/sbin and names in it.
        let missing = |reason: String| Error::Unsupported { missing: format!("the packet filter: {reason} (nft.path in the grants; apt install nftables)") };
        let real = std::fs::canonicalize(&self.nft).map_err(|error| missing(format!("{}: {error}", self.nft.display())))?;
        let program = grants::open_trusted(&real, 0).map_err(|error| missing(error.to_string()))?;
        let lock = self.lock(until)?;
        let text = if nothing { rules::NOTHING.to_owned() } else { rules::render(cards, users) };
        run(&program, &lock, &text, until)?;
        if nothing {
            std::fs::remove_file(&self.lock).map_err(|error| Error::io("remove the packet filter's lock", &error))?;
        }
        Ok(())
    }

    fn lock(&self, until: Instant) -> Result<File, Error> {
        let step = |error: io::Error| Error::io("the packet filter's lock", &error);
        let file = File::options().create(true).append(true).mode(0o600).open(&self.lock).map_err(step)?;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Err(timeout("nft of an earlier supervisor")),
                Err(error) => return Err(step(error.into())),
            }
        }
    }
}

/// The names of all taps and tuns of this network namespace. (Somebody else's may be among them; the ledger says which names are ours.)
fn present() -> io::Result<BTreeSet<String>> {
    Ok(Links::open()?.all()?.into_iter().filter(|link| link.kind == "tun").map(|link| link.name).collect())
}

fn timeout(step: &str) -> Error {
    Error::Timeout { step: step.into(), after_ms: u64::try_from(PATIENCE.as_millis()).unwrap_or(u64::MAX) }
}

/// Runs the opened program on the text. It gets nothing else: no environment, and of our descriptors none but the lock, on which it writes nothing.
fn run(program: &File, lock: &File, text: &str, until: Instant) -> Result<(), Error> {
    let step = |name: &'static str| move |error: io::Error| Error::io(name, &error);
    let memory = |name: &str| memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map(File::from);
    let mut script = memory("diarch-nft").map_err(|error| step("memfd_create")(error.into()))?;
    script.write_all(text.as_bytes()).and_then(|()| script.rewind()).map_err(step("write rules"))?;
    fcntl_add_seals(&script, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL).map_err(|error| step("seal rules")(error.into()))?;
    let mut said = memory("diarch-nft-said").map_err(|error| step("memfd_create")(error.into()))?;
    let copy = |file: &File| file.try_clone().map(Stdio::from);
    let mut child = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
        .args(["-f", "-"])
        .env_clear()
        .stdin(script)
        .stdout(copy(lock).map_err(step("dup"))?)
        .stderr(copy(&said).map_err(step("dup"))?)
        .spawn()
        .map_err(step("start nft"))?;
    // A child of ours that nobody has waited for: its number is its own.
    let pidfd = rustix::process::Pid::from_raw(child.id().cast_signed()).ok_or(rustix::io::Errno::SRCH).and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK));
    let ended = pidfd.map_err(io::Error::from).and_then(|pidfd| process::wait_ended(&pidfd, until.saturating_duration_since(Instant::now())));
    if !matches!(ended, Ok(true)) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(ended.map_or_else(|error| Error::io("wait for nft", &error), |_| timeout("nft")));
    }
    let status = child.wait().map_err(step("wait for nft"))?;
    if status.success() {
        return Ok(());
    }
    let mut words = Vec::new();
    let _ = said.rewind().and_then(|()| Read::by_ref(&mut said).take(MAX_SAID).read_to_end(&mut words));
    let words = String::from_utf8_lossy(&words).into_owned();
    // The first line is the reason; what follows quotes the text.
    let reason = printable(words.lines().next().unwrap_or("it said nothing"), 300);
    if words.contains("not supported") {
        return Err(Error::Unsupported { missing: format!("the packet filter: nft says {reason:?}; the kernel lacks a part of nftables") });
    }
    Err(Error::Failed { step: "nft".into(), errno: None, detail: format!("{status}: {reason}") })
}
