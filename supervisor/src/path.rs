//! A path that root wrote into the grants, walked so that nobody can lead it astray (THREATS 4).
//!
//! ```text
//!   /            held by a descriptor (O_PATH): whose is it, and who else can write it?
//!     srv/       opened below that very descriptor, never following a link; the same questions
//!       models   the last one: whatever it is, it is what is used from here on, and not its name
//! ```
//!
//! A directory in which others can add and remove names could show one thing to whoever looks and another to whoever uses. In a sticky one (`/tmp`) they
//! can't replace what is root's, so there what comes next must be root's.

use diarch_ipc::Error;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// Where a walk ended.
#[derive(Debug)]
pub struct Found {
    /// `O_PATH`: names the very thing, and gives no right to what is in it.
    pub fd: OwnedFd,
    pub kind: FileType,
    pub uid: u32,
    /// Permission bits, the set-id and sticky bits included.
    pub mode: u32,
}

/// Why a walk did not reach its end.
#[derive(Debug, thiserror::Error)]
pub enum Stray {
    #[error("{path}: there is no such file or directory")]
    Missing { path: PathBuf },
    #[error("{path} {reason}; {mend}")]
    Untrusted { path: PathBuf, reason: String, mend: String },
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
}

impl Stray {
    /// As the answer to a request, under the grant whose path it is.
    pub fn under(self, grant: &str) -> Error {
        match &self {
            Stray::Missing { .. } => Error::NotFound { what: format!("{self} ({grant} in the grants)") },
            Stray::Untrusted { .. } => Error::denied(grant, self.to_string()),
            // Without CAP_DAC_OVERRIDE root may enter only what the mode opens; the package's unit hides some places as well.
            Stray::Io { error, .. } if error.raw_os_error() == Some(nix::libc::EACCES) => {
                Error::denied(grant, format!("{self}: the supervisor can't enter it (its unit hides /home, /root and /tmp from it)"))
            }
            Stray::Io { error, .. } => Error::Failed { step: format!("open what {grant} names"), errno: error.raw_os_error(), detail: self.to_string() },
        }
    }
}

/// Whether the walk may take this path: absolute, with a name, and without `..`.
pub fn is_plain(path: &Path) -> bool {
    let mut parts = path.components();
    parts.next() == Some(Component::RootDir) && parts.clone().next().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// Walks to `path`. Each directory on the way belongs to root or to one of `owners`, and nobody else can write it.
pub fn walk(path: &Path, owners: &[u32]) -> Result<Found, Stray> {
    let io = |at: &Path, error: Errno| Stray::Io { path: at.to_owned(), error: error.into() };
    if !is_plain(path) {
        return Err(Stray::Untrusted { path: path.to_owned(), reason: "is no plain absolute path".into(), mend: "write it without '..'".into() });
    }
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat2(CWD, "/", directory, Mode::empty(), ResolveFlags::empty()).map_err(|error| io(Path::new("/"), error))?;
    let mut at = PathBuf::from("/");
    let mut found = look(root, &at)?;
    for name in path.components().filter_map(|part| if let Component::Normal(name) = part { Some(name) } else { None }) {
        let above = trusted_directory(found, &at, owners)?;
        at.push(name);
        found = look(below(&above.fd, name, &at)?, &at)?;
        if above.others_write && !is_owner(found.uid, owners) {
            let parent = at.parent().unwrap_or(Path::new("/")).display();
            let reason = format!("belongs to uid {}, in a directory that everybody can write ({parent})", found.uid);
            return Err(Stray::Untrusted { path: at.clone(), reason, mend: "move it to where only root can".into() });
        }
        if found.kind == FileType::Symlink {
            return Err(Stray::Untrusted { path: at, reason: "is a symbolic link".into(), mend: "name it by its real path".into() });
        }
    }
    Ok(found)
}

/// A directory that was found to be fit for a step into it.
struct Step {
    fd: OwnedFd,
    others_write: bool,
}

fn trusted_directory(found: Found, at: &Path, owners: &[u32]) -> Result<Step, Stray> {
    let untrusted = |reason: String, mend: String| Err(Stray::Untrusted { path: at.to_owned(), reason, mend });
    if found.kind != FileType::Directory {
        return untrusted("is not a directory".into(), "name what is there".into());
    }
    if !is_owner(found.uid, owners) {
        return untrusted(format!("belongs to uid {}, who could put something else in its place", found.uid), format!("chown root {}", at.display()));
    }
    let others_write = found.mode & 0o022 != 0;
    if others_write && found.mode & 0o1000 == 0 {
        let reason = format!("can be written by others (mode {:04o}), who could put something else in its place", found.mode);
        return untrusted(reason, format!("chmod go-w {}", at.display()));
    }
    Ok(Step { fd: found.fd, others_write })
}

fn is_owner(uid: u32, owners: &[u32]) -> bool {
    uid == 0 || owners.contains(&uid)
}

fn below(directory: &OwnedFd, name: &OsStr, at: &Path) -> Result<OwnedFd, Stray> {
    // The last component as it is, a link as a link; and nothing that leads out of `directory`. Other file systems are entered (no NO_XDEV): /srv may be one.
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), how).map_err(|error| match error {
        Errno::NOENT => Stray::Missing { path: at.to_owned() },
        error => Stray::Io { path: at.to_owned(), error: error.into() },
    })
}

fn look(fd: OwnedFd, at: &Path) -> Result<Found, Stray> {
    let stat = statx(&fd, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE | StatxFlags::MODE | StatxFlags::UID)
        .map_err(|error| Stray::Io { path: at.to_owned(), error: error.into() })?;
    let mode = u32::from(stat.stx_mode);
    Ok(Found { fd, kind: FileType::from_raw_mode(mode), uid: stat.stx_uid, mode: mode & 0o7777 })
}

/// The name by which the kernel leads to exactly what a descriptor holds, with no step on the way that anybody could change.
pub fn of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn mine() -> Vec<u32> {
        vec![rustix::process::geteuid().as_raw()]
    }
    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    fn refused(path: &Path) -> String {
        walk(path, &mine()).unwrap_err().to_string()
    }

    #[test]
    fn a_plain_path_is_walked_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let found = walk(&dir.path().join("a/b"), &mine()).unwrap();
        assert_eq!(found.kind, FileType::Directory);
        assert_eq!(fs::canonicalize(of(&found.fd)).unwrap(), fs::canonicalize(dir.path().join("a/b")).unwrap());
    }

    #[test]
    fn only_absolute_paths_without_dots_are_plain() {
        for good in ["/a", "/srv/models", "/a/./b", "//a/"] {
            assert!(is_plain(Path::new(good)), "{good}");
        }
        for bad in ["", "/", "a", "./a", "../a", "/..", "/a/../b", "/a/.."] {
            assert!(!is_plain(Path::new(bad)), "{bad}");
            walk(Path::new(bad), &mine()).unwrap_err();
        }
    }

    #[test]
    fn a_symbolic_link_is_refused_wherever_it_stands() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("real/end")).unwrap();
        symlink("real", dir.path().join("link")).unwrap();
        symlink("end", dir.path().join("real/last")).unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        for path in ["link/end", "link", "real/last", "dangling"] {
            assert!(refused(&dir.path().join(path)).contains("is a symbolic link"), "{path}");
        }
        // The kernel's own links lead anywhere.
        assert!(refused(Path::new("/proc/self/fd")).contains("symbolic link"), "/proc/self is one");
        let process = format!("/proc/{}/root/etc", std::process::id());
        assert!(refused(Path::new(&process)).contains("symbolic link"));
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused_and_the_sentence_says_what_helps() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        fs::create_dir_all(open.join("end")).unwrap();
        for bits in [0o775, 0o757, 0o777] {
            mode(&open, bits);
            let sentence = refused(&open.join("end"));
            assert!(sentence.contains("can be written by others") && sentence.contains("chmod go-w"), "{sentence}");
        }
        // Sticky: what is there and is root's stays what it is.
        mode(&open, 0o1777);
        walk(&open.join("end"), &mine()).unwrap();
        // The last one is what is shared, and may be anybody's.
        mode(&open, 0o755);
        mode(&open.join("end"), 0o777);
        walk(&open.join("end"), &mine()).unwrap();
    }

    #[test]
    fn what_belongs_to_somebody_else_is_refused_on_the_way_and_in_a_sticky_directory() {
        if !rustix::process::geteuid().is_root() {
            return; // only root can give a directory away
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("theirs/end")).unwrap();
        std::os::unix::fs::chown(dir.path().join("theirs"), Some(64_001), None).unwrap();
        assert!(refused(&dir.path().join("theirs/end")).contains("belongs to uid 64001"));
        walk(&dir.path().join("theirs/end"), &[64_001]).unwrap();
        walk(&dir.path().join("theirs"), &mine()).unwrap();
        mode(dir.path(), 0o1777);
        assert!(refused(&dir.path().join("theirs")).contains("everybody can write"));
    }

    #[test]
    fn what_is_missing_or_no_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(matches!(walk(&dir.path().join("none"), &mine()), Err(Stray::Missing { .. })));
        assert!(refused(&dir.path().join("file/below")).contains("is not a directory"));
    }
}
