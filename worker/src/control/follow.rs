//! What goes on: logs and events, the last of them and all that come.

use super::protocol::{FailureKind, LogSource, Reply};
use super::server::{Answered, Client};
use crate::worker::{Worker, failure};
use std::io::{self, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::broadcast::error::RecvError;

/// A followed log is looked at this often, and only while somebody follows it.
const LOOK: Duration = Duration::from_millis(200);
/// The last lines are searched for in so much of a log's end.
const TAIL: u64 = 1024 * 1024;
/// A longer line is cut into several replies.
const LINE: usize = 8 * 1024;

pub async fn events(client: &mut Client, worker: &Arc<Worker>, last: u32, follow: bool) -> Answered {
    let (kept, mut new) = worker.journal.follow(usize::try_from(last).unwrap_or(usize::MAX));
    for event in kept {
        client.reply(&Reply::Event(event)).await?;
    }
    if !follow {
        return Ok(Ok(()));
    }
    loop {
        tokio::select! {
            event = new.recv() => match event {
                Ok(event) => client.reply(&Reply::Event(event)).await?,
                Err(RecvError::Lagged(missed)) => {
                    return Ok(Err(failure(FailureKind::Failed, format!("this follower is too slow: {missed} events were missed"))));
                }
                Err(RecvError::Closed) => return Ok(Ok(())),
            },
            () = Client::gone(&mut client.read) => return Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

pub async fn logs(client: &mut Client, worker: &Arc<Worker>, name: &str, source: LogSource, lines: u32, follow: bool) -> Answered {
    let shown = match worker.show(name) {
        Ok(shown) => shown,
        Err(failure) => return Ok(Err(failure)),
    };
    let path = worker.logs.path(&shown.name, source);
    let mut log = match Log::open(&path).await {
        Ok(log) => log,
        Err(error) if error.kind() == io::ErrorKind::NotFound && follow => None,
        Err(error) => return Ok(Err(failure(FailureKind::Failed, format!("{}: {error}", path.display())))),
    };
    if let Some(log) = &mut log {
        log.last(client, lines).await?;
    }
    if !follow {
        if let Some(log) = &mut log {
            log.flush(client).await?;
        }
        return Ok(Ok(()));
    }
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = Client::gone(&mut client.read) => return Err(io::ErrorKind::BrokenPipe.into()),
        }
        if let Some(log) = &mut log {
            log.added(client).await?;
        }
        // Rotated: what is left of the old one has just been sent.
        if !same(&log, &path).await
            && let Ok(Some(mut newer)) = Log::open(&path).await
        {
            newer.added(client).await?;
            log = Some(newer);
        }
    }
}

async fn same(log: &Option<Log>, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Some(log) = log else { return false };
    let (Ok(open), Ok(named)) = (log.file.metadata().await, tokio::fs::metadata(path).await) else { return true };
    (open.dev(), open.ino()) == (named.dev(), named.ino())
}

/// A log, read up to some point.
struct Log {
    file: File,
    /// The beginning of a line whose end has not come.
    part: Vec<u8>,
}

impl Log {
    async fn open(path: &Path) -> io::Result<Option<Self>> {
        Ok(Some(Self { file: File::open(path).await?, part: Vec::new() }))
    }

    /// The last lines that are there.
    async fn last(&mut self, client: &mut Client, lines: u32) -> io::Result<()> {
        let length = self.file.metadata().await?.len();
        let from = length.saturating_sub(TAIL);
        self.file.seek(SeekFrom::Start(from)).await?;
        let mut tail = Vec::new();
        (&mut self.file).take(length - from).read_to_end(&mut tail).await?;
        let start = start_of_last(&tail, usize::try_from(lines).unwrap_or(usize::MAX));
        self.take(client, &tail[start..]).await
    }

    /// All that was added.
    async fn added(&mut self, client: &mut Client) -> io::Result<()> {
        // A log that was cut short in place starts anew.
        if self.file.stream_position().await? > self.file.metadata().await?.len() {
            self.file.seek(SeekFrom::Start(0)).await?;
        }
        let mut chunk = vec![0u8; 16 * 1024];
        loop {
            let got = self.file.read(&mut chunk).await?;
            if got == 0 {
                return Ok(());
            }
            self.take(client, &chunk[..got]).await?;
        }
    }

    async fn take(&mut self, client: &mut Client, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.part.extend_from_slice(piece);
            if self.part.ends_with(b"\n") {
                self.part.pop();
                self.flush_part(client).await?;
            }
            while self.part.len() > LINE {
                let rest = self.part.split_off(LINE);
                self.flush_part(client).await?;
                self.part = rest;
            }
        }
        Ok(())
    }

    /// A last line without an end.
    async fn flush(&mut self, client: &mut Client) -> io::Result<()> {
        if self.part.is_empty() { Ok(()) } else { self.flush_part(client).await }
    }

    /// Raw: the command escapes for its terminal.
    async fn flush_part(&mut self, client: &mut Client) -> io::Result<()> {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.part)).into_owned();
        client.reply(&Reply::Log { line }).await
    }
}

/// Where the last `lines` lines of `text` begin; the last may lack its end.
fn start_of_last(text: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return text.len();
    }
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    body.iter().enumerate().rev().filter(|(_, b)| **b == b'\n').nth(lines - 1).map_or(0, |(at, _)| at + 1)
}

#[cfg(test)]
mod tests {
    use super::start_of_last;

    #[test]
    fn the_last_lines_are_found_with_and_without_a_final_line_break() {
        for (text, lines, expected) in
            [("a\nb\nc\n", 2, "b\nc\n"), ("a\nb\nc", 2, "b\nc"), ("a\n", 5, "a\n"), ("", 3, ""), ("a\nb\n", 0, ""), ("\n\n", 1, "\n")]
        {
            assert_eq!(&text[start_of_last(text.as_bytes(), lines)..], expected, "{text:?} {lines}");
        }
    }
}
