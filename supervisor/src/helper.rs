//! Bounded helper threads: what may wait on the kernel happens here, never in the loop that answers the socket.

use diarch_ipc::Error;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Threads at one time. A thread may hang in the kernel for minutes; three more then still work.
pub const THREADS: usize = 4;
/// Work that runs or waits for a thread, at most.
const QUEUE: usize = 64;

/// The way to the helper threads (tokio's blocking pool, limited to [`THREADS`] when the runtime is built).
#[derive(Debug, Clone)]
pub struct Helpers {
    places: Arc<Semaphore>,
}

impl Default for Helpers {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(QUEUE)) }
    }
}

impl Helpers {
    /// Runs `work` on a helper thread. It is never cut off in the middle: a caller that no longer waits leaves it to
    /// finish and to settle the ledger.
    pub async fn run<T: Send + 'static>(&self, step: &'static str, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
        let full = |_| Error::Exhausted { what: "helper threads and their queue".into(), limit: QUEUE as u64, retry_after_ms: Some(100) };
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(full)?;
        let joined = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(place);
            result
        })
        .await;
        joined.map_err(|_| Error::Failed { step: step.into(), errno: None, detail: "the helper thread panicked; its message is in the journal".into() })
    }
}
