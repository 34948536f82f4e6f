//! A VM's serial console, to one person at a time.

use super::protocol::{FailureKind, Reply};
use super::server::{Answered, Client};
use crate::journal::now_ms;
use crate::worker::{Worker, failure};
use diarch_ipc::Error;
use diarch_ipc::name::Label;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// Who has which console.
#[derive(Debug, Default)]
pub struct Holders {
    by_name: Mutex<HashMap<Label, Holder>>,
}

#[derive(Debug, Clone)]
struct Holder {
    who: String,
    since_ms: u64,
}

/// A console that is given back when it is dropped.
struct Held<'a> {
    holders: &'a Holders,
    name: Label,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.holders.by_name.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

impl Holders {
    fn take(&self, name: &Label, who: &str) -> Result<Held<'_>, Holder> {
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holder) = by_name.get(name) {
            return Err(holder.clone());
        }
        by_name.insert(name.clone(), Holder { who: who.to_owned(), since_ms: now_ms() });
        Ok(Held { holders: self, name: name.clone() })
    }
}

/// Copies both ways until one side closes.
pub async fn proxy(client: &mut Client, worker: &Arc<Worker>, holders: &Holders, name: &str) -> Answered {
    let shown = match worker.show(name) {
        Ok(shown) => shown,
        Err(failure) => return Ok(Err(failure)),
    };
    let tenancy = shown.status.as_ref().filter(|status| status.pid.is_some()).and_then(|status| status.tenancy);
    let Some(tenancy) = tenancy else {
        return Ok(Err(failure(FailureKind::Conflict, format!("{} does not run", shown.name))));
    };
    let held = match holders.take(&shown.name, &client.who) {
        Ok(held) => held,
        Err(holder) => {
            let seconds = now_ms().saturating_sub(holder.since_ms) / 1000;
            return Ok(Err(failure(FailureKind::Conflict, format!("the console of {} is held by {} for {seconds} s", shown.name, holder.who))));
        }
    };
    let console = match worker.link.console(tenancy).await {
        Ok(console) => console,
        Err(error) => {
            let kind = match error {
                Error::Denied { .. } => FailureKind::Denied,
                Error::Conflict { .. } | Error::WrongState { .. } => FailureKind::Conflict,
                _ => FailureKind::Failed,
            };
            return Ok(Err(failure(kind, format!("the console can't be opened: {error}"))));
        }
    };
    rustix::io::ioctl_fionbio(&console, true)?;
    let console = UnixStream::from_std(std::os::unix::net::UnixStream::from(console))?;
    client.reply(&Reply::Console {}).await?;
    let (mut from_guest, mut to_guest) = console.into_split();
    to_guest.write_all(&std::mem::take(&mut client.rest)).await?;
    // Either side's end ends both: a person who leaves takes the console along.
    let ended = tokio::select! {
        ended = copy(&mut client.read, &mut to_guest) => ended,
        ended = copy(&mut from_guest, &mut client.write) => ended,
    };
    drop(held);
    // No `Done` line: what is on this connection now is the console's.
    ended.and(Err(io::ErrorKind::ConnectionAborted.into()))
}

async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    tokio::io::copy(from, to).await.map(drop)
}
