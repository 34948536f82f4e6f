//! Threads that are kept for their next work, each waiting for it on a channel of its own: handing work over wakes one thread, once. (A pool whose threads wait on one
//! lock wakes them into it while it is held: two more switches for each work on one processor.) None of them ever ends; a thread that waits holds the few pages of its
//! stack that were used.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use tokio::sync::oneshot;

/// Work, and what it leaves to be done when its thread is free again: telling who waits.
type Work = Box<dyn FnOnce() -> Telling + Send>;
type Telling = Box<dyn FnOnce() + Send>;

/// Threads of one kind.
#[derive(Debug, Clone)]
pub struct Pool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    name: &'static str,
    stack_bytes: usize,
    most: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    threads: usize,
    /// The one that was busy last is taken first.
    idle: Vec<mpsc::Sender<Work>>,
    /// While all are busy.
    queue: VecDeque<Work>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("threads", &self.threads).field("idle", &self.idle.len()).field("queue", &self.queue.len()).finish()
    }
}

impl Pool {
    pub fn new(name: &'static str, most: usize, stack_bytes: usize) -> Self {
        Self(Arc::new(Shared { name, stack_bytes, most, state: Mutex::default() }))
    }

    /// Runs the work on a thread; it waits for one when all are busy. What comes of it is received, and nothing if it panics.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<oneshot::Receiver<T>> {
        let (tell, done) = oneshot::channel();
        let work = move || -> Telling {
            let result = catch_unwind(AssertUnwindSafe(work));
            Box::new(move || {
                if let Ok(result) = result {
                    // Who does not wait any more needs no telling.
                    let _ = tell.send(result);
                }
            })
        };
        self.0.give(Box::new(work))?;
        Ok(done)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(self: &Arc<Self>, work: Work) -> io::Result<()> {
        let mut state = self.state();
        if let Some(thread) = state.idle.pop() {
            drop(state);
            // It waits, and does nothing else.
            return thread.send(work).map_err(|_| io::Error::other("an idle thread is gone"));
        }
        if state.threads >= self.most {
            state.queue.push_back(work);
            return Ok(());
        }
        state.threads += 1;
        drop(state);
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new().name(self.name.into()).stack_size(self.stack_bytes);
        match thread.spawn(move || shared.live(work)) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.state().threads -= 1;
                Err(error)
            }
        }
    }

    fn live(&self, first: Work) {
        let (sender, receiver) = mpsc::channel();
        let mut work = first;
        loop {
            let tell = work();
            let next = {
                let mut state = self.state();
                let next = state.queue.pop_front();
                if next.is_none() {
                    state.idle.push(sender.clone());
                }
                next
            };
            // Only now: whoever hears of it and has more to do finds this thread idle.
            tell();
            work = match next.map_or_else(|| receiver.recv(), Ok) {
                Ok(work) => work,
                Err(_) => return,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait<T>(done: oneshot::Receiver<T>) -> Option<T> {
        done.blocking_recv().ok()
    }

    #[test]
    fn one_thread_does_one_work_after_another() {
        let pool = Pool::new("test", 4, 64 * 1024);
        let id = || std::thread::current().id();
        let first = wait(pool.run(id).unwrap()).unwrap();
        for _ in 0..100 {
            assert_eq!(wait(pool.run(id).unwrap()), Some(first));
        }
        assert_eq!(wait(pool.run(|| -> u8 { panic!("as a bug would") }).unwrap()), None);
        assert_eq!(wait(pool.run(id).unwrap()), Some(first), "a panic is not its end");
    }

    #[test]
    fn more_work_than_threads_waits_and_is_done() {
        let pool = Pool::new("test", 2, 64 * 1024);
        let (release, stuck) = mpsc::channel::<()>();
        let stuck = Arc::new(Mutex::new(stuck));
        let hang = || {
            let stuck = Arc::clone(&stuck);
            pool.run(move || stuck.lock().unwrap().recv().is_ok()).unwrap()
        };
        let (one, two) = (hang(), hang());
        let mut later = pool.run(|| 3).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(later.try_recv().is_err(), "both threads hang");
        assert_eq!(pool.0.state().threads, 2);
        release.send(()).unwrap();
        assert_eq!(wait(later), Some(3));
        drop(release);
        assert_eq!([wait(one), wait(two)].into_iter().flatten().filter(|got| *got).count(), 1);
    }
}
