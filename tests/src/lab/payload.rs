//! The disk that brings into the lab what this build has made: it is made at each start, so that new code needs no new image.

use crate::host::binary;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What tests run there. In `/srv/lab/bin`, which is on a command's PATH.
const PROGRAMS: [&str; 8] =
    ["diarch", "diarch-worker", "diarch-supervisor", "diarch-lab-agent", "diarch-load", "diarch-probe", "diarch-puppet", "diarch-stub-qemu"];

/// Makes the image: ext4, called `diarch-payload`, as large as what is in it.
pub fn make(image: &Path) {
    let dir = image.with_extension("d");
    fs::create_dir_all(dir.join("bin")).expect("a directory for the payload");
    let mut children = Vec::new();
    for name in PROGRAMS {
        // Without what only a debugger reads, which is most of it.
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg("-o").arg(dir.join("bin").join(name)).arg(binary(name));
        children.push(strip.spawn().expect("strip (apt install binutils)"));
    }
    for mut child in children {
        assert!(child.wait().expect("strip").success(), "strip failed");
    }
    if let Some(deb) = crate::need::package() {
        fs::copy(deb, dir.join("diarch.deb")).expect("the package");
    }
    let used: u64 = [dir.join("bin"), dir.clone()]
        .iter()
        .flat_map(|at| fs::read_dir(at).expect("a directory"))
        .flatten()
        .map(|e| e.metadata().map_or(0, |m| m.len()))
        .sum();
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args([
        "-q",
        "-t",
        "ext4",
        "-O",
        "^has_journal,^metadata_csum",
        "-m",
        "0",
        "-L",
        "diarch-payload",
        "-d",
    ]);
    // A tenth and 16 MiB more, for what a file system needs itself.
    let made = mke2fs.arg(&dir).arg(image).arg(format!("{}k", used / 1024 * 11 / 10 + 16 * 1024)).output().expect("mke2fs (apt install e2fsprogs)");
    assert!(made.status.success(), "mke2fs: {}", String::from_utf8_lossy(&made.stderr));
    fs::remove_dir_all(&dir).expect("our own directory");
}
