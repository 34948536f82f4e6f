//! A granted QEMU binary: opened once, checked as opened, executed from that very descriptor (THREATS 4).

use crate::grants::{self, Program};
use diarch_ipc::Error;
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What makes a file the same file with the same content, as far as the kernel tells: a verdict about its hash holds as long as these do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    fn of(file: &File) -> std::io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// The hashes that were already computed.
#[derive(Debug, Default)]
pub struct HashCache {
    known: RefCell<HashMap<PathBuf, (Identity, String)>>,
}

impl HashCache {
    pub fn get(&self, path: &Path) -> Option<Hashed> {
        self.known.borrow().get(path).map(|(identity, hash)| Hashed { identity: *identity, hash: hash.clone() })
    }
    pub fn put(&self, path: &Path, hashed: Hashed) {
        self.known.borrow_mut().insert(path.to_owned(), (hashed.identity, hashed.hash));
    }
}

/// What each granted binary said of itself.
#[derive(Debug, Default)]
pub struct Abilities {
    known: RefCell<HashMap<PathBuf, Ability>>,
}

impl Abilities {
    pub fn get(&self, path: &Path) -> Option<Ability> {
        self.known.borrow().get(path).copied()
    }
    pub fn put(&self, path: &Path, ability: Ability) {
        self.known.borrow_mut().insert(path.to_owned(), ability);
    }
}

/// What a binary said, and the file that said it.
#[derive(Debug, Clone, Copy)]
pub struct Ability {
    identity: Identity,
    pub iommufd: bool,
}

impl Ability {
    pub fn of(file: &File, iommufd: bool) -> std::io::Result<Self> {
        Ok(Self { identity: Identity::of(file)?, iommufd })
    }
    /// Whether it is this file that said so.
    pub fn is_of(&self, file: &File) -> bool {
        Identity::of(file).is_ok_and(|identity| identity == self.identity)
    }
}

/// A computed hash and the file that it is of.
#[derive(Debug, Clone)]
pub struct Hashed {
    identity: Identity,
    hash: String,
}

/// Opens the binary for execution; `owner` is who must own it besides root. `known` saves hashing a file again that has not changed; the hash that was needed is
/// returned for the cache.
pub fn open(name: &str, granted: &Program, owner: u32, known: Option<Hashed>) -> Result<(File, Option<Hashed>), Error> {
    open_program(&format!("QEMU {name:?}"), granted, owner, known)
}

/// The same for any granted program; `what` it is, for the sentence.
pub fn open_program(what: &str, granted: &Program, owner: u32, known: Option<Hashed>) -> Result<(File, Option<Hashed>), Error> {
    let refuse = |reason: String| Error::Unsupported { missing: format!("{what}: {reason}") };
    // Distributions link names (qemu-system-x86_64 -> ...): the link is followed first, and then each directory of the real path is checked.
    let real = std::fs::canonicalize(&granted.path).map_err(|error| refuse(format!("{}: {error}", granted.path.display())))?;
    let mut file = grants::open_trusted(&real, owner).map_err(|error| refuse(error.to_string()))?;
    let meta = file.metadata().map_err(|error| Error::io("stat the program", &error))?;
    if meta.mode() & 0o001 == 0 {
        return Err(refuse(format!("{} can't be executed by everybody, and VMs' users belong to no group", real.display())));
    }
    let Some(wanted) = &granted.sha256 else { return Ok((file, None)) };
    let identity = Identity::of(&file).map_err(|error| Error::io("stat the program", &error))?;
    let hashed = match known {
        Some(hashed) if hashed.identity == identity => hashed,
        _ => Hashed { identity, hash: hash(&mut file).map_err(|error| Error::io("hash the program", &error))? },
    };
    if hashed.hash == *wanted {
        Ok((file, Some(hashed)))
    } else {
        Err(refuse(format!("{} has the SHA-256 {}, and {wanted} is granted", real.display(), hashed.hash)))
    }
}

/// Opens the directories that it was granted beside the system's own: bound into its jail as they were opened.
pub fn libraries(name: &str, granted: &Program) -> Result<Vec<(PathBuf, OwnedFd)>, Error> {
    libraries_of(&format!("QEMU {name:?}"), granted)
}

/// The same for any granted program.
pub fn libraries_of(what: &str, granted: &Program) -> Result<Vec<(PathBuf, OwnedFd)>, Error> {
    let open = |path: &PathBuf| match grants::open_trusted_directory(path, 0) {
        Ok(directory) => Ok((path.clone(), directory.into())),
        Err(error) => Err(Error::Unsupported { missing: format!("{what}: {error}") }),
    };
    granted.libraries.iter().map(open).collect()
}

fn hash(file: &mut File) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(path: &str, sha256: Option<&str>) -> Program {
        Program { path: path.into(), sha256: sha256.map(str::to_owned), libraries: Vec::new() }
    }

    #[test]
    fn a_missing_binary_is_named() {
        let sentence = open("default", &granted("/nowhere/qemu", None), 0, None).unwrap_err().to_string();
        assert!(sentence.contains("default") && sentence.contains("/nowhere/qemu"), "{sentence}");
    }

    #[test]
    fn a_binary_with_another_hash_is_refused_and_with_its_own_accepted() {
        let sentence = open("default", &granted("/bin/true", Some(&"0".repeat(64))), 0, None).unwrap_err().to_string();
        let actual = sentence.split("has the SHA-256 ").nth(1).unwrap().split(',').next().unwrap();
        let (_, hashed) = open("default", &granted("/bin/true", Some(actual)), 0, None).unwrap();
        open("default", &granted("/bin/true", Some(actual)), 0, hashed).unwrap();
    }

    #[test]
    fn a_binary_that_others_can_write_is_refused() {
        if rustix::process::geteuid().as_raw() != 0 {
            return; // the file would belong to an ordinary user, which is refused for that already
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu");
        std::fs::write(&path, "x").unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o757)).unwrap();
        assert!(open("x", &granted(path.to_str().unwrap(), None), 0, None).unwrap_err().to_string().contains("written by others"));
    }
}
