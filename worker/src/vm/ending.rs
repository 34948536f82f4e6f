//! How a QEMU ended, and why: pure.
//!
//! ```text
//!   what the guest did (QMP, seen before the end)  +  how the process ended (the supervisor, which reaped it)  ->  Ending
//! ```

use crate::qmp::{Seen, Shutdown};
use diarch_ipc::operation::ExitStatus;
use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest rebooted, and its QEMU is one that ends then (a confidential guest's).
    Rebooted,
    /// The guest's kernel panicked.
    Panicked,
    /// Somebody on the host ended QEMU in an orderly way: QMP's `quit`, or a SIGTERM.
    Quit {
        cause: String,
    },
    /// QEMU was killed, or crashed.
    Signal(i32),
    /// QEMU gave up; with its last words.
    Exited {
        code: i32,
        said: Option<String>,
    },
    Unknown,
}

/// Whether an ending is held against the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// By its own will: it stays off unless its policy is `always`.
    OwnWill,
    /// A reboot: it is started anew, without a pause.
    Reboot,
    Failure,
}

impl Ending {
    pub fn of(seen: &Seen, status: ExitStatus, said: impl FnOnce() -> Option<String>) -> Self {
        match (&seen.shutdown, status) {
            // A signal that kills is the last word, whatever the guest was up to.
            (_, ExitStatus::Signal(signal)) => Ending::Signal(signal),
            _ if seen.panicked => Ending::Panicked,
            (Some(Shutdown { reason, .. }), _) if reason == "guest-panic" => Ending::Panicked,
            (Some(Shutdown { guest: true, reason }), _) if reason == "guest-reset" => Ending::Rebooted,
            (Some(Shutdown { guest: true, .. }), _) => Ending::PoweredOff,
            (Some(Shutdown { guest: false, reason }), ExitStatus::Code(0) | ExitStatus::Unknown) => Ending::Quit { cause: reason.clone() },
            // Without a word on the monitor: QEMU ends with 0 only when it was told to, by its guest or from outside.
            (None, ExitStatus::Code(0)) => Ending::Quit { cause: "without a word on its monitor".into() },
            (_, ExitStatus::Code(code)) => Ending::Exited { code, said: said() },
            (_, ExitStatus::Unknown) => Ending::Unknown,
        }
    }

    pub fn blame(&self) -> Blame {
        match self {
            Ending::PoweredOff => Blame::OwnWill,
            Ending::Rebooted => Blame::Reboot,
            Ending::Panicked | Ending::Quit { .. } | Ending::Signal(_) | Ending::Exited { .. } | Ending::Unknown => Blame::Failure,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ending::PoweredOff => f.write_str("the guest powered itself off"),
            Ending::Rebooted => f.write_str("the guest rebooted, which ends its QEMU"),
            Ending::Panicked => f.write_str("the guest's kernel panicked"),
            Ending::Quit { cause } => write!(f, "QEMU was ended from the host ({cause})"),
            Ending::Signal(9) => f.write_str("QEMU was killed (signal 9)"),
            Ending::Signal(signal) => write!(f, "QEMU ended by signal {signal}"),
            Ending::Exited { code, said: Some(said) } => write!(f, "QEMU exited with code {code}: {said}"),
            Ending::Exited { code, said: None } => write!(f, "QEMU exited with code {code}, and said nothing"),
            Ending::Unknown => f.write_str("QEMU ended, and nobody was there to be told how"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(guest: bool, reason: &str) -> Seen {
        Seen { shutdown: Some(Shutdown { guest, reason: reason.into() }), ..Seen::default() }
    }
    fn ending(seen: &Seen, status: ExitStatus) -> Ending {
        Ending::of(seen, status, || Some("its words".into()))
    }

    #[test]
    fn a_power_off_a_reboot_a_panic_and_a_crash_are_told_apart() {
        let clean = ExitStatus::Code(0);
        assert_eq!(ending(&seen(true, "guest-shutdown"), clean), Ending::PoweredOff);
        assert_eq!(ending(&seen(true, "guest-reset"), clean), Ending::Rebooted);
        assert_eq!(ending(&seen(true, "guest-panic"), clean), Ending::Panicked);
        assert_eq!(ending(&Seen { panicked: true, ..Seen::default() }, clean), Ending::Panicked);
        assert_eq!(ending(&seen(false, "host-signal"), clean), Ending::Quit { cause: "host-signal".into() });
        assert_eq!(ending(&Seen::default(), ExitStatus::Signal(9)), Ending::Signal(9));
        assert_eq!(ending(&seen(true, "guest-shutdown"), ExitStatus::Signal(11)), Ending::Signal(11));
        assert_eq!(ending(&Seen::default(), ExitStatus::Unknown), Ending::Unknown);
    }

    #[test]
    fn a_qemu_that_gave_up_is_quoted() {
        let ending = ending(&Seen::default(), ExitStatus::Code(1));
        assert_eq!(ending.to_string(), "QEMU exited with code 1: its words");
        assert_eq!(ending.blame(), Blame::Failure);
    }
}
