//! Room for what must be written.

use super::bounded;
use super::finding::Finding;
use std::path::Path;

/// With less room than this the audit is about to fail, and with it every grant.
const FAIL: u64 = 64 << 20;
const WARN: u64 = 1 << 30;

pub fn disk(check: &'static str, directory: &Path) -> Finding {
    let shown = directory.display();
    let path = directory.to_owned();
    let about = match bounded::files(move || rustix::fs::statvfs(&path)) {
        Some(Ok(about)) => about,
        Some(Err(error)) => {
            return Finding::warn(check, format!("{shown} can't be looked at: {error}"), "see that the directory exists and may be passed through");
        }
        None => return Finding::fail(check, format!("{shown} does not answer: its file system hangs"), "findmnt -T tells which it is"),
    };
    let free = about.f_bavail.saturating_mul(about.f_frsize);
    let detail = format!("{} MiB free at {shown}", free >> 20);
    match free {
        0..FAIL => Finding::fail(check, detail, "make room: without an audit nothing is granted, and without logs nobody knows why"),
        FAIL..WARN => Finding::warn(check, detail, "make room before it is full"),
        // File systems without inodes of their own (btrfs) say 0 of 0.
        _ if about.f_files > 0 && about.f_favail == 0 => Finding::fail(check, format!("no inode is free at {shown}"), "remove files"),
        _ => Finding::ok(check, detail),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    #[test]
    fn a_directory_that_is_not_there_is_a_warning() {
        assert_eq!(disk("log disk", Path::new("/no/such/directory")).level, Level::Warn);
        assert!(disk("log disk", Path::new("/proc")).detail.contains("MiB free at /proc"));
    }
}
