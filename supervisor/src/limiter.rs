//! Token buckets, one per class of operation: a worker that loops costs little and harms nobody (THREATS 22).

use crate::grants::Limits;
use diarch_ipc::Error;
use diarch_ipc::operation::Class;
use std::time::{Duration, Instant};

/// One token, in the unit that buckets count in.
const TOKEN: u64 = 1_000_000;

/// Connections and refusals that are written to the audit one by one; an honest worker makes a few a day.
const NOTES_PER_SECOND: u32 = 5;
const NOTES_BURST: u32 = 100;

/// One bucket. Tokens are counted in millionths: microseconds times the rate, with nothing rounded away.
#[derive(Debug)]
struct Bucket {
    per_second: u32,
    burst: u32,
    micro_tokens: u64,
    filled: Instant,
}

impl Bucket {
    fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        Self { per_second, burst, micro_tokens: u64::from(burst) * TOKEN, filled: now }
    }

    /// Takes a token, or says how long until there is one.
    fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let micros = u64::try_from(now.saturating_duration_since(self.filled).as_micros()).unwrap_or(u64::MAX);
        let gained = micros.saturating_mul(u64::from(self.per_second));
        if gained > 0 {
            self.micro_tokens = self.micro_tokens.saturating_add(gained).min(u64::from(self.burst) * TOKEN);
            self.filled = now;
        }
        match self.micro_tokens.checked_sub(TOKEN) {
            Some(rest) => {
                self.micro_tokens = rest;
                Ok(())
            }
            None => Err(Duration::from_micros((TOKEN - self.micro_tokens) / u64::from(self.per_second.max(1)) + 1)),
        }
    }
}

/// The buckets of the worker. They outlive its sessions: connecting anew fills nothing.
#[derive(Debug)]
pub struct Limiter {
    read: Bucket,
    ensure: Bucket,
    once: Bucket,
    notes: Bucket,
    /// What was not written to the audit one by one, since the last time it was counted there.
    refused: u64,
}

impl Limiter {
    pub fn new(limits: &Limits, now: Instant) -> Self {
        Self {
            read: Bucket::new(limits.read_per_second, limits.read_burst, now),
            ensure: Bucket::new(limits.ensure_per_second, limits.ensure_burst, now),
            once: Bucket::new(limits.once_per_second, limits.once_burst, now),
            notes: Bucket::new(NOTES_PER_SECOND, NOTES_BURST, now),
            refused: 0,
        }
    }

    /// Counts one request of this class.
    pub fn admit(&mut self, class: Class, now: Instant) -> Result<(), Error> {
        let bucket = match class {
            Class::Read => &mut self.read,
            Class::Ensure => &mut self.ensure,
            Class::Once => &mut self.once,
        };
        let limit = u64::from(bucket.per_second);
        bucket.take(now).map_err(|wait| {
            self.refused += 1;
            let retry_after_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX).max(1);
            Error::Exhausted { what: format!("{} requests a second", diarch_ipc::operation::word(class)), limit, retry_after_ms: Some(retry_after_ms) }
        })
    }

    /// Whether something that anybody can cause by connecting may be written to the audit; what may not is counted.
    pub fn admit_note(&mut self, now: Instant) -> bool {
        let admitted = self.notes.take(now).is_ok();
        self.refused += u64::from(!admitted);
        admitted
    }

    /// The refusals since this was last asked.
    pub fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let start = Instant::now();
        let mut limiter = Limiter::new(&Limits { once_per_second: 10, once_burst: 5, ..Limits::default() }, start);
        for _ in 0..5 {
            limiter.admit(Class::Once, start).unwrap();
        }
        let Error::Exhausted { retry_after_ms: Some(wait), limit: 10, .. } = limiter.admit(Class::Once, start).unwrap_err() else { panic!() };
        assert!((95..=101).contains(&wait), "{wait}");
        limiter.admit(Class::Once, start + Duration::from_millis(101)).unwrap();
        limiter.admit(Class::Once, start + Duration::from_millis(110)).unwrap_err();
        assert_eq!(limiter.take_refused(), 2);
    }

    #[test]
    fn connections_fill_the_audit_only_slowly() {
        let start = Instant::now();
        let mut limiter = Limiter::new(&Limits::default(), start);
        let written = (0..10_000u64).filter(|n| limiter.admit_note(start + Duration::from_millis(*n / 10))).count();
        assert!((100..=106).contains(&written), "{written}");
        assert_eq!(limiter.take_refused(), 10_000 - written as u64);
    }

    #[test]
    fn one_class_never_starves_another() {
        let start = Instant::now();
        let mut limiter = Limiter::new(&Limits { read_per_second: 1, read_burst: 1, ..Limits::default() }, start);
        limiter.admit(Class::Read, start).unwrap();
        limiter.admit(Class::Read, start).unwrap_err();
        limiter.admit(Class::Ensure, start).unwrap();
    }

    #[test]
    fn many_small_steps_of_time_fill_as_one_large_one_does() {
        let start = Instant::now();
        let mut bucket = Bucket::new(7, 1, start);
        bucket.take(start).unwrap();
        let mut at = start;
        let mut taken = 0;
        for _ in 0..1_000_000 {
            at += Duration::from_micros(10);
            taken += u32::from(bucket.take(at).is_ok());
        }
        assert!((69..=70).contains(&taken), "{taken} in 10 s at 7 a second");
    }
}
