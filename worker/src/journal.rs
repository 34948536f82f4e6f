//! What happened: the last events for whoever asks, and each new one for whoever follows. Every event is a log line too.

use crate::control::protocol::EventView;
use diarch_ipc::name::Label;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast;

/// Enough for a day of a quiet host; some 200 KiB at most.
const KEPT: usize = 1000;
/// A follower that lags further behind misses events, and is told so.
const BACKLOG: usize = 256;

#[derive(Debug)]
pub struct Journal {
    kept: Mutex<VecDeque<EventView>>,
    new: broadcast::Sender<EventView>,
}

impl Default for Journal {
    fn default() -> Self {
        Self { kept: Mutex::default(), new: broadcast::Sender::new(BACKLOG) }
    }
}

impl Journal {
    pub fn note(&self, vm: Option<&Label>, kind: &'static str, message: impl Into<String>) {
        let message = message.into();
        match vm {
            Some(vm) => tracing::info!(event = kind, %vm, "{message}"),
            None => tracing::info!(event = kind, "{message}"),
        }
        self.keep(EventView { at_ms: now_ms(), vm: vm.cloned(), kind: kind.to_owned(), message });
    }

    /// Of the whole host, and something to be put right.
    pub fn warn(&self, kind: &'static str, message: impl Into<String>) {
        let message = message.into();
        tracing::warn!(event = kind, "{message}");
        self.keep(EventView { at_ms: now_ms(), vm: None, kind: kind.to_owned(), message });
    }

    fn keep(&self, event: EventView) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        // Under the lock: whoever reads the kept ones and follows gets each event exactly once. No follower is no error.
        let _ = self.new.send(event);
    }

    /// The last `last` events, and all that come after them.
    pub fn follow(&self, last: usize) -> (Vec<EventView>, broadcast::Receiver<EventView>) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        (kept.iter().skip(kept.len().saturating_sub(last)).cloned().collect(), self.new.subscribe())
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_events_are_kept_and_a_follower_gets_each_once() {
        let journal = Journal::default();
        for n in 0..KEPT + 5 {
            journal.note(None, "test", n.to_string());
        }
        let (last, mut new) = journal.follow(2);
        journal.note(None, "test", "new");
        assert_eq!(last.iter().map(|e| e.message.as_str()).collect::<Vec<_>>(), ["1003", "1004"]);
        assert_eq!(new.try_recv().unwrap().message, "new");
        assert_eq!(journal.follow(usize::MAX).0.len(), KEPT);
    }
}
