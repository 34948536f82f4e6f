//! The installed layer: what a real boot, `dpkg -i` and a clean power-off left over the tree, made once per package.

use super::guard::{Boot, Slot};
use super::{Machine, Output};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Layers of other packages that are kept: a comparison with the last one needs no new installation.
const KEPT: usize = 4;

/// What tells one package over one tree from another. Found out once in a process: it takes a second where the hash is not optimised.
fn key(tree: &Path, deb: &Path) -> String {
    static KNOWN: Mutex<BTreeMap<PathBuf, String>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(key) = known.get(deb) {
        return key.clone();
    }
    let read = |path: &Path| fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let hash = Sha256::new().chain_update(read(deb)).chain_update(read(&tree.join("stamp"))).finalize();
    let key = hash[..8].iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    known.insert(deb.to_owned(), key.clone());
    key
}

/// The layer of this package over this tree; made now if there is none. Whoever comes meanwhile waits.
pub fn of(tree: &Path, deb: &Path) -> PathBuf {
    let key = key(tree, deb);
    let layer = tree.join(format!("installed-{key}.tar"));
    if layer.exists() {
        return layer;
    }
    let lock = fs::File::create(tree.join("installed.lock")).unwrap_or_else(|e| panic!("{}: {e}", tree.display()));
    lock.lock().expect("flock");
    if !layer.exists() {
        let boot = Boot { save: Some(layer.clone()), limit: Duration::from_secs(180), ..Boot::default() };
        let machine = Machine::start(tree, Machine::directory(), &boot, Slot::of_a_machine());
        machine.guard.wait_booted();
        install(&machine, deb).expect_success("dpkg -i");
        // Its systemd has seen the units; what it has queued for them is done before the lights go out.
        let left = machine.power_off();
        assert!(left.is_empty() && layer.exists(), "the machine that the package was installed in left {left:?}, and no {}", layer.display());
        forget_old(tree);
    }
    layer
}

/// `dpkg -i` in the machine.
pub fn install(machine: &Machine, deb: &Path) -> Output {
    machine.copy_in(deb, "/var/tmp/diarch.deb", 0o644);
    let output = machine.run_within(Duration::from_secs(120), &["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "-i", "/var/tmp/diarch.deb"]);
    machine.run(&["rm", "/var/tmp/diarch.deb"]);
    output
}

fn forget_old(tree: &Path) {
    let is_layer = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("installed-"));
    let mut layers: Vec<PathBuf> = fs::read_dir(tree).into_iter().flatten().flatten().map(|e| e.path()).filter(is_layer).collect();
    layers.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).and_then(|m| m.modified()).ok()));
    for old in layers.iter().skip(KEPT) {
        let _ = fs::remove_file(old);
    }
}
