//! Times and durations in words.

use std::time::{SystemTime, UNIX_EPOCH};

const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// Now, in milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// A duration in its two largest units: `850ms`, `12s`, `3m12s`, `5h7m`, `3d4h`.
pub fn words(ms: u64) -> String {
    match ms {
        0..SECOND => format!("{ms}ms"),
        SECOND..MINUTE => format!("{}s", ms / SECOND),
        MINUTE..HOUR => format!("{}m{}s", ms / MINUTE, ms % MINUTE / SECOND),
        HOUR..DAY => format!("{}h{}m", ms / HOUR, ms % HOUR / MINUTE),
        _ => format!("{}d{}h", ms / DAY, ms % DAY / HOUR),
    }
}

/// A duration that was measured in microseconds: `340us`, `1.2ms`, and then as `words`.
pub fn micros_words(micros: u64) -> String {
    match micros {
        0..1000 => format!("{micros}us"),
        1000..1_000_000 => format!("{}.{}ms", micros / 1000, micros % 1000 / 100),
        _ => words(micros / 1000),
    }
}

/// The time since `then`; clocks that ran backwards give 0.
pub fn since(then_ms: u64, now_ms: u64) -> String {
    words(now_ms.saturating_sub(then_ms))
}

/// A moment as `2026-11-20T21:39:25.123Z`.
pub fn utc(ms: u64) -> String {
    let (year, month, day) = civil(ms / DAY);
    let in_day = ms % DAY;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z", in_day / HOUR, in_day % HOUR / MINUTE, in_day % MINUTE / SECOND, in_day % SECOND)
}

/// The date of a number of days since 1970-01-01. Years are counted from March, so that the leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    const ERA: u64 = 146_097; // days in 400 years
    let days = days + 719_468; // from 0000-03-01 to 1970-01-01
    let (era, of_era) = (days / ERA, days % ERA);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_shows_its_two_largest_units() {
        for (ms, said) in [(0, "0ms"), (850, "850ms"), (12_345, "12s"), (192_000, "3m12s"), (18_420_000, "5h7m"), (277_200_000, "3d5h")] {
            assert_eq!(words(ms), said);
        }
        assert_eq!([micros_words(340), micros_words(1290), micros_words(2_500_000)], ["340us", "1.2ms", "2s"]);
        assert_eq!(since(10, 5), "0ms");
    }

    #[test]
    fn a_moment_is_shown_in_utc_with_its_leap_days() {
        for (ms, said) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
            (1_735_689_600_000, "2025-01-01T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(utc(ms), said);
        }
        utc(u64::MAX);
    }
}
