//! How soon after a failure a VM is started again: pure.

use std::time::Duration;

/// The second failure in a row waits this long, and each further one twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longer would leave a VM down whose trouble has passed; shorter would burn the host on one that never comes up.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// So many failures in a row without one healthy moment are a mistake that time does not mend (about three minutes of trying).
const GIVE_UP_AFTER: u32 = 10;
/// A VM that was healthy for so long has overcome its trouble: the next failure is a first one.
pub const SETTLED_AFTER: Duration = Duration::from_secs(5 * 60);

/// The failures of one VM so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pace {
    in_a_row: u32,
    was_healthy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Now,
    After(Duration),
    GiveUp,
}

impl Pace {
    /// One more failure.
    pub fn failed(&mut self) -> Next {
        self.in_a_row = self.in_a_row.saturating_add(1);
        match self.in_a_row {
            1 => Next::Now,
            n if n >= GIVE_UP_AFTER && !self.was_healthy => Next::GiveUp,
            n => Next::After(FIRST_PAUSE.saturating_mul(1u32 << (n - 2).min(10)).min(LONGEST_PAUSE)),
        }
    }

    pub fn healthy(&mut self) {
        self.was_healthy = true;
    }

    /// It was healthy for [`SETTLED_AFTER`], or an operator said start, or its file changed.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    pub fn failures(&self) -> u32 {
        self.in_a_row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_restart_is_immediate_and_the_pauses_double_up_to_a_minute() {
        let mut pace = Pace::default();
        pace.healthy();
        let pauses: Vec<Next> = (0..10).map(|_| pace.failed()).collect();
        let seconds = |n| Next::After(Duration::from_secs(n));
        assert_eq!(pauses, [Next::Now, seconds(1), seconds(2), seconds(4), seconds(8), seconds(16), seconds(32), seconds(60), seconds(60), seconds(60)]);
        for _ in 0..100 {
            assert_eq!(pace.failed(), seconds(60));
        }
    }

    #[test]
    fn a_vm_that_never_was_healthy_is_given_up() {
        let mut pace = Pace::default();
        for _ in 0..9 {
            assert_ne!(pace.failed(), Next::GiveUp);
        }
        assert_eq!(pace.failed(), Next::GiveUp);
        pace.forget();
        assert_eq!(pace.failed(), Next::Now);
    }
}
