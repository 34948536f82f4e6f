//! The kernel, and what of it VMs are kept in.

use super::Host;
use super::finding::Finding;
use crate::cli::screen::count;

/// The oldest kernel that tells a peer's pid by descriptor (SO_PEERPIDFD).
const NEEDED: (u32, u32) = (6, 5);
/// Which control group limits what of a VM.
const CONTROLLERS: [(&str, &str); 2] = [("memory", "memory"), ("pids", "number of threads")];

/// Major and minor of the running kernel.
pub fn release(host: &Host) -> Result<(u32, u32), String> {
    let release = host.read("proc/sys/kernel/osrelease");
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().ok());
    match (parts.next(), parts.next()) {
        (Some(Some(major)), Some(Some(minor))) => Ok((major, minor)),
        _ => Err(release),
    }
}

pub fn kernel(host: &Host) -> Finding {
    let needed = format!("{}.{}", NEEDED.0, NEEDED.1);
    let shown = host.read("proc/sys/kernel/osrelease");
    match release(host) {
        Err(release) => Finding::warn("kernel", format!("its release can't be read: '{release}'"), "mount /proc"),
        Ok(release) if release >= NEEDED => Finding::ok("kernel", format!("{shown}, and {needed} is needed")),
        Ok(_) => Finding::fail(
            "kernel",
            format!("{shown} is older than {needed}: a peer's unit can't be told safely"),
            format!("boot a kernel of {needed} or newer"),
        ),
    }
}

pub fn cgroup(host: &Host) -> Finding {
    let Some(root) = host.try_read("sys/fs/cgroup/cgroup.controllers") else {
        return Finding::warn(
            "cgroup",
            "version 2 is not mounted at /sys/fs/cgroup: no unit of a peer can be told, and no VM has a scope",
            "boot without systemd.unified_cgroup_hierarchy=0",
        );
    };
    let missing: Vec<&str> = CONTROLLERS.iter().filter(|(name, _)| !root.split_whitespace().any(|one| one == *name)).map(|(_, limits)| *limits).collect();
    match missing.as_slice() {
        [] => Finding::ok("cgroup", format!("version 2, with {root}")),
        missing => Finding::warn(
            "cgroup",
            format!("version 2, without what limits a VM's {} (it has: {})", missing.join(" and "), if root.is_empty() { "nothing" } else { root.as_str() }),
            "boot without cgroup_disable= and without cgroup v1 mounts, which keep controllers to themselves",
        ),
    }
}

pub fn iommu(host: &Host) -> Finding {
    let groups = std::fs::read_dir(host.root.join("sys/kernel/iommu_groups")).map_or(0, Iterator::count);
    match groups {
        0 => Finding::info("iommu", "no IOMMU groups: no device can be passed through")
            .or("for passthrough: the firmware's switch (VT-d, AMD-Vi), and intel_iommu=on on the kernel command line"),
        n => Finding::info("iommu", format!("{}: devices can be passed through", count(n, "IOMMU group"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::super::tests::host;
    use super::*;

    #[test]
    fn kernels_are_compared_by_their_numbers() {
        for (release, expected) in
            [("6.5.0", Level::Ok), ("6.12.9-cloud-amd64", Level::Ok), ("7.0", Level::Ok), ("6.4.99", Level::Fail), ("5.15.0", Level::Fail), ("", Level::Warn)]
        {
            let (_directory, host) = host();
            host.write("proc/sys/kernel/osrelease", release);
            assert_eq!(kernel(&host).level, expected, "{release}");
        }
    }

    #[test]
    fn a_controller_that_is_missing_is_named_by_what_it_limits() {
        let (_directory, host) = host();
        assert_eq!(cgroup(&host).level, Level::Ok);
        host.write("sys/fs/cgroup/cgroup.controllers", "cpu memory_recursiveprot pids");
        let found = cgroup(&host);
        assert_eq!(found.level, Level::Warn);
        assert!(found.detail.contains("limits a VM's memory (") && !found.detail.contains("threads"), "{}", found.detail);
        let bare = Host::at("/no/such/place");
        assert_eq!((cgroup(&bare).level, iommu(&bare).level), (Level::Warn, Level::Info));
        assert_eq!(iommu(&host).detail, "1 IOMMU group: devices can be passed through");
    }
}
