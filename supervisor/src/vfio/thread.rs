//! Threads on which a device's steps run. A driver that does not let go of its device holds whoever asked it to, for ever; so each work has a thread alone, there
//! are only so many, and none of them is a helper that starts or stops VMs (`helper`).

use crate::pool::Pool;
use diarch_ipc::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Threads at one time: as many hanging devices are bearable.
const MOST: usize = 16;
/// The steps use little.
const STACK_BYTES: usize = 256 * 1024;

/// The way to these threads.
#[derive(Debug, Clone)]
pub struct Threads {
    places: Arc<Semaphore>,
    pool: Pool,
}

impl Default for Threads {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(MOST)), pool: Pool::new("diarch-device", MOST, STACK_BYTES) }
    }
}

/// Which step the work is at, and whether anybody still wants it.
#[derive(Debug)]
pub struct Progress(Mutex<At>);

#[derive(Debug)]
struct At {
    step: String,
    since: Instant,
    abandoned: bool,
}

impl Default for Progress {
    fn default() -> Self {
        Self(Mutex::new(At { step: "begin".into(), since: Instant::now(), abandoned: false }))
    }
}

/// Nobody waits any more: what was done is to be undone.
#[derive(Debug)]
pub struct Abandoned;

impl Progress {
    /// Called before each step.
    pub fn step(&self, step: String) -> Result<(), Abandoned> {
        let mut at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (at.step, at.since) = (step, Instant::now());
        if at.abandoned { Err(Abandoned) } else { Ok(()) }
    }

    /// Called before each step of undoing, which goes on whoever waits.
    pub fn undoing(&self, step: String) {
        let _ = self.step(step);
    }

    fn now(&self) -> (String, Instant) {
        let at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (at.step.clone(), at.since)
    }

    fn abandon(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).abandoned = true;
    }
}

/// Work under way.
#[derive(Debug)]
pub struct Running<T> {
    done: oneshot::Receiver<T>,
    progress: Arc<Progress>,
}

/// One step took longer than it may.
#[derive(Debug, Clone)]
pub struct Stuck {
    pub step: String,
    pub after: Duration,
}

impl Threads {
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce(&Progress) -> T + Send + 'static) -> Result<Running<T>, Error> {
        let exhausted = |_| Error::Exhausted { what: "device threads: others hang".into(), limit: MOST as u64, retry_after_ms: None };
        let place: OwnedSemaphorePermit = Arc::clone(&self.places).try_acquire_owned().map_err(exhausted)?;
        let progress = Arc::new(Progress::default());
        let shared = Arc::clone(&progress);
        let done = self.pool.run(move || {
            let result = work(&shared);
            drop(place);
            result
        });
        let done = done.map_err(|error| Error::io("make a device thread", &error))?;
        Ok(Running { done, progress })
    }
}

impl<T> Running<T> {
    /// Waits until the work has ended, or one step has taken `patience`; the work is then told that nobody waits.
    pub async fn within(&mut self, patience: Duration) -> Result<Result<T, Error>, Stuck> {
        loop {
            let (_, since) = self.progress.now();
            let left = (since + patience).saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, &mut self.done).await {
                Ok(done) => return Ok(done.map_err(|_| panicked())),
                Err(_) => {
                    let (step, now) = self.progress.now();
                    if now == since {
                        self.progress.abandon();
                        return Err(Stuck { step, after: patience });
                    }
                }
            }
        }
    }

    /// Waits for the end, however long it takes.
    pub async fn ended(self) -> Result<T, Error> {
        self.done.await.map_err(|_| panicked())
    }
}

fn panicked() -> Error {
    Error::Failed { step: "device thread".into(), errno: None, detail: "it panicked; its message is in the journal".into() }
}

impl Stuck {
    pub fn error(&self) -> Error {
        Error::Timeout { step: self.step.clone(), after_ms: u64::try_from(self.after.as_millis()).unwrap_or(u64::MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    #[test]
    fn a_step_that_hangs_is_named_and_its_work_is_told_when_it_goes_on() {
        block_on(async {
            let (release, stuck) = std::sync::mpsc::channel::<()>();
            let mut running = Threads::default()
                .run(move |progress| {
                    progress.step("one".into()).unwrap();
                    std::thread::sleep(Duration::from_millis(30));
                    progress.step("two".into()).unwrap();
                    let _ = stuck.recv();
                    progress.step("three".into()).is_err()
                })
                .unwrap();
            let said = running.within(Duration::from_millis(50)).await.unwrap_err();
            assert_eq!(said.step, "two", "the first step ended in time");
            release.send(()).unwrap();
            assert!(running.ended().await.unwrap(), "the third step is refused");
        });
    }

    #[test]
    fn hanging_devices_are_counted_and_a_panic_is_an_error() {
        block_on(async {
            let threads = Threads::default();
            let (release, stuck) = std::sync::mpsc::channel::<()>();
            let stuck = Arc::new(Mutex::new(stuck));
            let hang = |stuck: Arc<Mutex<std::sync::mpsc::Receiver<()>>>| move |_: &Progress| stuck.lock().unwrap().recv().is_ok();
            let running: Vec<_> = (0..MOST).map(|_| threads.run(hang(Arc::clone(&stuck))).unwrap()).collect();
            assert_eq!(threads.run(|_| ()).unwrap_err().kind(), "exhausted");
            drop(release);
            for one in running {
                one.ended().await.unwrap();
            }
            while threads.places.available_permits() < MOST {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(threads.run(|_| -> u8 { panic!("as a bug would") }).unwrap().ended().await.unwrap_err().kind(), "failed");
        });
    }
}
