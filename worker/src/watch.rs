//! The directory of the VM files, watched by inotify: no polling.
//!
//! ```text
//!   /etc/diarch/vms   is there:      watched for files that were written, renamed into it, or removed
//!                     is not there:  its nearest ancestor is watched until it is
//! ```
//!
//! What changed is not looked at: any change means that all files are read again, once they have been quiet for a moment. (An editor writes
//! a file in several steps, and a deployment several files.)

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::sleep;

/// Changes within this belong together.
const QUIET: Duration = Duration::from_millis(100);
/// Without inotify (its per-user limits are reached, say) the files are read this often.
const FALLBACK: Duration = Duration::from_secs(10);

/// Watches `directory` for ever, as long as the second value is polled, and tells of changes, the first time as soon as it watches.
pub fn start(directory: PathBuf) -> (Arc<Notify>, impl Future<Output = ()> + Send + 'static) {
    let changed = Arc::new(Notify::new());
    let tell = Arc::clone(&changed);
    let watching = async move {
        loop {
            if let Err(error) = watch(&directory, &tell).await {
                tracing::warn!(directory = %directory.display(), %error, "the VM files can't be watched; they are read every {} s", FALLBACK.as_secs());
                sleep(FALLBACK).await;
                tell.notify_one();
            }
        }
    };
    (changed, watching)
}

/// One round: until what is watched has gone, or something nearer has come.
async fn watch(directory: &Path, tell: &Notify) -> io::Result<()> {
    let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let watched = nearest(directory);
    let in_it = WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM | WatchFlags::DELETE | WatchFlags::CREATE | WatchFlags::ATTRIB;
    inotify::add_watch(&fd, watched, in_it | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF | WatchFlags::ONLYDIR)?;
    // What came between two rounds was not seen by either.
    tell.notify_one();
    let fd = crate::ready::readable(fd)?;
    loop {
        drain(&fd).await?;
        sleep(QUIET).await;
        if watched != nearest(directory) || !still(&fd, watched) {
            return Ok(());
        }
        if watched == directory {
            tell.notify_one();
        }
    }
}

/// The directory itself, or of those above it the first that is there.
fn nearest(directory: &Path) -> &Path {
    directory.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"))
}

/// Whether the watch still stands on what has this name now (it follows a directory that is renamed, and ends with one that is removed).
fn still(fd: &AsyncFd<OwnedFd>, watched: &Path) -> bool {
    // Adding the same directory again gives the same watch, which is number 1; another directory gives a new one.
    let flags = WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF | WatchFlags::ONLYDIR | WatchFlags::MASK_ADD;
    inotify::add_watch(fd.get_ref(), watched, flags).is_ok_and(|number| number == 1)
}

/// Waits for events, and forgets them.
async fn drain(fd: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut some = false;
    loop {
        let mut ready = fd.readable().await?;
        let mut buffer = [0u8; 4096];
        match rustix::io::read(fd.get_ref(), &mut buffer) {
            Ok(_) => some = true,
            Err(rustix::io::Errno::AGAIN) => {
                ready.clear_ready();
                if some {
                    return Ok(());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tokio::time::timeout;

    fn start(directory: PathBuf) -> Arc<Notify> {
        let (changed, watching) = super::start(directory);
        tokio::spawn(watching);
        changed
    }

    async fn told(changed: &Notify) -> bool {
        timeout(Duration::from_secs(2), changed.notified()).await.is_ok()
    }

    #[tokio::test]
    async fn a_written_a_renamed_and_a_removed_file_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let changed = start(dir.path().to_owned());
        assert!(told(&changed).await);
        fs::write(dir.path().join("a.json"), "{}").unwrap();
        assert!(told(&changed).await);
        fs::write(dir.path().join(".b"), "{}").unwrap();
        fs::rename(dir.path().join(".b"), dir.path().join("b.json")).unwrap();
        assert!(told(&changed).await);
        fs::remove_file(dir.path().join("a.json")).unwrap();
        assert!(told(&changed).await);
        assert!(timeout(Duration::from_millis(300), changed.notified()).await.is_err(), "a quiet directory is told of");
    }

    #[tokio::test]
    async fn a_directory_that_comes_later_or_is_replaced_is_watched() {
        let dir = tempfile::tempdir().unwrap();
        let vms = dir.path().join("etc/vms");
        let changed = start(vms.clone());
        assert!(told(&changed).await);
        fs::create_dir_all(&vms).unwrap();
        assert!(told(&changed).await);
        sleep(Duration::from_millis(300)).await;
        while timeout(Duration::from_millis(200), changed.notified()).await.is_ok() {}
        fs::write(vms.join("a.json"), "{}").unwrap();
        assert!(told(&changed).await, "a file in the new directory");
        fs::rename(&vms, dir.path().join("etc/old")).unwrap();
        assert!(told(&changed).await, "the directory went");
        fs::create_dir(&vms).unwrap();
        assert!(told(&changed).await, "another one came");
        sleep(Duration::from_millis(300)).await;
        while timeout(Duration::from_millis(200), changed.notified()).await.is_ok() {}
        fs::write(vms.join("b.json"), "{}").unwrap();
        assert!(told(&changed).await, "a file in it");
    }
}
