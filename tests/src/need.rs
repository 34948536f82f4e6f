//! What a test can't do without, and the named skip when it is not there.
//!
//! A missing prerequisite prints `skipped: NAME needs ...` and the test passes; with `CI=true` it fails instead. With
//! `DIARCH_TEST_FAST=1` (`make test-fast`) everything that needs root or QEMU is skipped without a word.

use std::path::PathBuf;

/// A prerequisite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Root,
    /// `qemu-system-x86_64`.
    Qemu,
    /// The guest's kernel and initial RAM disk (`tests/guest/build`), named by `DIARCH_GUEST`.
    Guest,
    /// This kernel version or a newer one.
    Kernel(u32, u32),
    /// What [`Machine`](crate::machine::Machine) boots, and boots it with: root, systemd-nspawn, cgroup v2, and the tree (`tests/debian/build`) named by
    /// `DIARCH_TREE`.
    Machine,
    /// What [`Lab`](crate::lab::Lab) boots, and boots it with: `mke2fs`, QEMU, and the image (`tests/lab/build`) named by `DIARCH_LAB`.
    Lab,
    /// The modules with which the lab's kernel has iommufd (`tests/lab/iommufd`), in the directory named by `DIARCH_IOMMUFD`.
    Iommufd,
    /// `ip` and `nft`.
    Network,
    /// `/usr/bin/passt`.
    Passt,
    /// What makes and mounts an erofs and a squashfs: the tools, the kernel's file systems, loop devices.
    Images,
    /// The package (`make deb`), named by `DIARCH_DEB`.
    Package,
}

impl Need {
    /// What is missing, and how to get it; `None` when it is there.
    pub fn missing(self) -> Option<String> {
        match self {
            Need::Root => (!rustix::process::geteuid().is_root()).then(|| "root (run it with sudo)".into()),
            Need::Qemu => qemu().is_none().then(|| "qemu-system-x86_64 (apt install qemu-system-x86)".into()),
            Need::Guest => guest().is_none().then(|| "the test guest (run tests/guest/build and set DIARCH_GUEST to its directory)".into()),
            Need::Machine => {
                let parts = [
                    Need::Root.missing(),
                    nspawn().is_none().then(|| "systemd-nspawn (apt install systemd-container)".into()),
                    crate::machine::hierarchy().is_none().then(|| "a cgroup v2 hierarchy (/sys/fs/cgroup or /sys/fs/cgroup/unified)".into()),
                    tree().is_none().then(|| "the test machine's Debian (run tests/debian/build as root and set DIARCH_TREE to its directory)".into()),
                ];
                let missing: Vec<String> = parts.into_iter().flatten().collect();
                (!missing.is_empty()).then(|| missing.join(" and "))
            }
            Need::Lab => {
                let parts = [
                    Need::Qemu.missing(),
                    program("mke2fs").is_none().then(|| "mke2fs (apt install e2fsprogs)".into()),
                    lab().is_none().then(|| "the lab's image (run make lab and set DIARCH_LAB to its directory)".into()),
                ];
                let missing: Vec<String> = parts.into_iter().flatten().collect();
                (!missing.is_empty()).then(|| missing.join(" and "))
            }
            Need::Iommufd => iommufd().is_none().then(|| "the lab's modules of iommufd (run make iommufd and set DIARCH_IOMMUFD to their directory)".into()),
            Need::Passt => (!PathBuf::from("/usr/bin/passt").exists()).then(|| "passt (apt install passt)".into()),
            Need::Network => {
                let tool = |name: &str| ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().any(|dir| PathBuf::from(dir).join(name).exists());
                let lacks: Vec<&str> = [("ip", "iproute2"), ("nft", "nftables")].iter().filter(|(name, _)| !tool(name)).map(|(_, package)| *package).collect();
                (!lacks.is_empty()).then(|| format!("{} (apt install {})", lacks.join(" and "), lacks.join(" ")))
            }
            Need::Images => {
                let tool = |name: &str| ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].iter().any(|dir| PathBuf::from(dir).join(name).exists());
                let kernel = |name: &str| std::fs::read_to_string("/proc/filesystems").unwrap_or_default().lines().any(|line| line.trim() == name);
                let parts = [
                    (!tool("mkfs.erofs")).then_some("mkfs.erofs (apt install erofs-utils)"),
                    (!tool("mksquashfs")).then_some("mksquashfs (apt install squashfs-tools)"),
                    (!kernel("erofs")).then_some("erofs in the kernel (modprobe erofs)"),
                    (!kernel("squashfs")).then_some("squashfs in the kernel (modprobe squashfs)"),
                    (!PathBuf::from("/dev/loop-control").exists()).then_some("loop devices (modprobe loop)"),
                ];
                let missing: Vec<&str> = parts.into_iter().flatten().collect();
                (!missing.is_empty()).then(|| missing.join(" and "))
            }
            Need::Package => package().is_none().then(|| "the package (run make deb and set DIARCH_DEB to its path)".into()),
            Need::Kernel(major, minor) => {
                let release = rustix::system::uname().release().to_string_lossy().into_owned();
                (version(&release) < (major, minor)).then(|| format!("Linux {major}.{minor} (this is {release})"))
            }
        }
    }
}

fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// QEMU's path on this machine.
pub fn qemu() -> Option<PathBuf> {
    ["/usr/bin", "/usr/local/bin"].iter().map(|d| PathBuf::from(d).join("qemu-system-x86_64")).find(|p| p.exists())
}

/// The directory with `vmlinuz` and `initrd.img`.
pub fn guest() -> Option<PathBuf> {
    let named = std::env::var_os("DIARCH_GUEST").map(PathBuf::from);
    named.into_iter().find(|dir| dir.join("vmlinuz").exists() && dir.join("initrd.img").exists())
}

fn nspawn() -> Option<PathBuf> {
    ["/usr/bin", "/bin"].iter().map(|d| PathBuf::from(d).join("systemd-nspawn")).find(|p| p.exists())
}

/// The directory with `tree` and `stamp`.
pub fn tree() -> Option<PathBuf> {
    let named = std::env::var_os("DIARCH_TREE").map(PathBuf::from);
    named.into_iter().find(|dir| dir.join("tree/usr/lib/systemd/systemd").exists() && dir.join("stamp").exists())
}

fn program(name: &str) -> Option<PathBuf> {
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().map(|d| PathBuf::from(d).join(name)).find(|p| p.exists())
}

/// The directory with `vmlinuz`, `initrd.img`, `root.img` and `stamp`.
pub fn lab() -> Option<PathBuf> {
    let named = std::env::var_os("DIARCH_LAB").map(PathBuf::from).and_then(|dir| std::fs::canonicalize(dir).ok());
    named.into_iter().find(|dir| ["vmlinuz", "initrd.img", "root.img", "stamp"].iter().all(|name| dir.join(name).exists()))
}

/// The modules, in the order in which they are loaded.
pub fn iommufd() -> Option<Vec<PathBuf>> {
    let mut modules: Vec<PathBuf> = std::fs::read_dir(std::env::var_os("DIARCH_IOMMUFD")?).ok()?.flatten().map(|entry| entry.path()).collect();
    modules.retain(|path| path.extension().is_some_and(|extension| extension == "ko"));
    modules.sort();
    (!modules.is_empty()).then_some(modules)
}

/// The `.deb`.
pub fn package() -> Option<PathBuf> {
    std::env::var_os("DIARCH_DEB").map(PathBuf::from).filter(|deb| deb.is_file())
}

/// Whether the test goes on; see [`need!`](crate::need!).
pub fn met(test: &str, needs: &[Need]) -> bool {
    if std::env::var("DIARCH_TEST_FAST").is_ok_and(|v| v == "1") {
        return false;
    }
    let missing: Vec<String> = needs.iter().filter_map(|n| n.missing()).collect();
    if missing.is_empty() {
        return true;
    }
    let sentence = format!("skipped: {test} needs {}", missing.join(" and "));
    assert!(!std::env::var("CI").is_ok_and(|v| v == "true"), "{sentence}");
    // Past the test harness's capture: a skip must be seen.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{sentence}\n").as_bytes());
    false
}

/// Returns from the calling test unless everything named is there: `need!(Root, Qemu)`.
#[macro_export]
macro_rules! need {
    ($($need:expr),+ $(,)?) => {{
        #[allow(unused_imports)]
        use $crate::need::Need::{Guest, Images, Iommufd, Kernel, Lab, Machine, Network, Package, Passt, Qemu, Root};
        let name = std::thread::current().name().unwrap_or(module_path!()).to_owned();
        if !$crate::need::met(&name, &[$($need),+]) {
            return;
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_compared_by_their_numbers() {
        assert!(version("6.18.44-cloud") > version("6.5.0"));
        assert_eq!(version("6.5"), (6, 5));
        assert_eq!(version("nonsense"), (0, 0));
    }
}
