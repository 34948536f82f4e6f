//! What may hang, and is not waited for: other programs, and file systems.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;

/// A program that only says something is done in milliseconds; a debug build on a loaded host takes longer.
const PROGRAM: Duration = Duration::from_secs(5);
/// A local file system answers at once.
const FILES: Duration = Duration::from_secs(2);
/// What is read of a program's output; the rest is not waited for.
const OUTPUT: u64 = 16 * 1024;
/// Everybody's "nobody" (systemd's and Debian's number).
const NOBODY: u32 = 65534;

/// As whom a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum As {
    Caller,
    /// Whoever calls; but for root nobody, since what is only asked for its version needs no right.
    CallerButNotRoot,
}

/// What a program said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// It ended with code 0.
    pub well: bool,
    pub out: String,
    pub err: String,
}

/// Runs a program with an empty environment and nothing to read. It is killed when its time is over.
pub async fn run(program: &Path, arguments: &[&OsStr], who: As) -> std::io::Result<Said> {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    if who == As::CallerButNotRoot && rustix::process::geteuid().is_root() {
        // The other groups go with the change.
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut child = command.spawn()?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let ended = async {
        let (out, err) = tokio::join!(first_of(out), first_of(err));
        // A program that says more than is read may wait for its reader for ever.
        let well = child.wait().await?.success();
        Ok(Said { well, out: out?, err: err? })
    };
    match timeout(PROGRAM, ended).await {
        Ok(said) => said,
        Err(_) => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, format!("it was not done within {} s", PROGRAM.as_secs()))),
    }
}

async fn first_of(stream: Option<impl AsyncRead + Unpin>) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(OUTPUT).read_to_end(&mut bytes).await?;
    }
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// Does what may hang in a thread of its own, which is left behind when it does.
pub fn files<T: Send + 'static>(look: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (found, seen) = mpsc::channel();
    std::thread::spawn(move || found.send(look()));
    seen.recv_timeout(FILES).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    async fn shell(script: &str) -> std::io::Result<Said> {
        run(Path::new("/bin/sh"), &["-c".as_ref(), script.as_ref()], As::CallerButNotRoot).await
    }

    #[tokio::test]
    async fn a_program_says_how_it_ended_and_gets_no_environment() {
        let said = shell("echo out; echo err >&2; test -z \"$HOME\"").await.unwrap();
        assert_eq!(said, Said { well: true, out: "out".into(), err: "err".into() });
        assert!(!shell("exit 3").await.unwrap().well);
        assert!(run(Path::new("/nonexistent"), &[], As::Caller).await.is_err());
    }

    #[tokio::test]
    async fn a_program_that_asks_for_nothing_but_its_version_is_not_run_as_root() {
        let said = shell("id -u").await.unwrap();
        assert_ne!(said.out, "0");
        assert!(!said.out.is_empty(), "{said:?}");
    }

    #[tokio::test]
    async fn a_program_that_hangs_or_never_stops_talking_is_not_waited_for() {
        for script in ["sleep 60", "while :; do echo again; done"] {
            let begun = Instant::now();
            let ended = shell(script).await;
            assert!(ended.is_err() || !ended.unwrap().well, "{script}");
            assert!(begun.elapsed() < PROGRAM + Duration::from_secs(2), "{script}");
        }
    }

    #[test]
    fn a_file_system_that_hangs_is_not_waited_for() {
        let begun = Instant::now();
        assert_eq!(files(|| std::thread::sleep(Duration::from_secs(60))), None);
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert_eq!(files(|| 7), Some(7));
    }
}
