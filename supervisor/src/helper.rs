//! Bounded helper threads: what may wait on the kernel happens here, never in the loop that answers the socket.

use crate::pool::Pool;
use diarch_ipc::Error;
use diarch_ipc::operation::Effect;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Threads at one time. A thread may hang in the kernel for minutes.
const THREADS: usize = 4;
const STACK_BYTES: usize = 512 * 1024;
/// Of these, what gives something may use so many: files on a mute file system can then never keep a VM from being stopped.
const GIVING: usize = 2;
/// Work that takes something back and runs or waits for a thread, at most.
const TAKING_BACK: usize = 256;

/// The way to the helper threads.
#[derive(Debug, Clone)]
pub struct Helpers {
    threads: Pool,
    giving: Arc<Semaphore>,
    taking_back: Arc<Semaphore>,
}

impl Default for Helpers {
    fn default() -> Self {
        let threads = Pool::new("diarch-helper", THREADS, STACK_BYTES);
        Self { threads, giving: Arc::new(Semaphore::new(GIVING)), taking_back: Arc::new(Semaphore::new(TAKING_BACK)) }
    }
}

/// The right to use a thread.
#[derive(Debug)]
pub struct Place(OwnedSemaphorePermit);

impl Helpers {
    /// Waits for a place, at most `patience`.
    pub async fn place(&self, effect: Effect, patience: Duration) -> Result<Place, Error> {
        let (places, limit) = match effect {
            Effect::Grant => (&self.giving, GIVING),
            Effect::Observe | Effect::Revoke => (&self.taking_back, TAKING_BACK),
        };
        match tokio::time::timeout(patience, Arc::clone(places).acquire_owned()).await {
            Ok(Ok(place)) => Ok(Place(place)),
            _ => Err(Error::Exhausted { what: "helper threads: others hang".into(), limit: limit as u64, retry_after_ms: None }),
        }
    }

    /// Runs `work` on a helper thread. It is never cut off in the middle: a caller that no longer waits leaves it to
    /// finish and to settle the ledger.
    pub async fn run_in<T: Send + 'static>(&self, place: Place, step: &'static str, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
        let failed = |errno, detail: String| Error::Failed { step: step.into(), errno, detail };
        let done = self.threads.run(move || {
            let result = work();
            drop(place.0);
            result
        });
        let done = done.map_err(|error| failed(error.raw_os_error(), format!("make a helper thread: {error}")))?;
        done.await.map_err(|_| failed(None, "the helper thread panicked; its message is in the journal".into()))
    }

    /// As [`Helpers::run_in`], for the supervisor's own work.
    pub async fn run<T: Send + 'static>(&self, step: &'static str, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
        let place = self.place(Effect::Observe, Duration::from_secs(10)).await?;
        self.run_in(place, step, work).await
    }
}
