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

/// `with_devices`: how many enabled VMs want some.
pub fn iommu(host: &Host, with_devices: u32) -> Finding {
    let groups = std::fs::read_dir(host.root.join("sys/kernel/iommu_groups")).map_or(0, Iterator::count);
    let wanted = format!("{} can't start without", count(with_devices as usize, "VM"));
    let (detail, fix) = match (groups, vfio_pci(host)) {
        (0, _) => ("no IOMMU groups", "the firmware's switch (VT-d, AMD-Vi), and intel_iommu=on on the kernel command line"),
        (_, false) => ("IOMMU groups, and no driver vfio-pci", "modprobe vfio-pci, or a kernel that has it"),
        (n, true) => {
            let how =
                if host.root.join("sys/class/misc/iommu").exists() { "as descriptors of iommufd's, by a QEMU that knows it" } else { "by their groups' nodes" };
            return Finding::info("iommu", format!("{} and vfio-pci: devices can be passed through, {how}", count(n, "IOMMU group")));
        }
    };
    match with_devices {
        0 => Finding::info("iommu", format!("{detail}: no device can be passed through")).or(format!("for passthrough: {fix}")),
        _ => Finding::fail("iommu", format!("{detail}: no device can be passed through, and {wanted}"), fix),
    }
}

/// Loaded, built in, or there to be loaded when the first device is bound.
fn vfio_pci(host: &Host) -> bool {
    let modules = format!("lib/modules/{}", host.read("proc/sys/kernel/osrelease"));
    let listed = |list: &str| host.read(format!("{modules}/{list}")).lines().any(|line| line.contains("/vfio-pci.ko"));
    host.root.join("sys/bus/pci/drivers/vfio-pci").exists() || listed("modules.builtin") || listed("modules.dep")
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
        assert_eq!((cgroup(&bare).level, iommu(&bare, 0).level), (Level::Warn, Level::Info));
    }

    #[test]
    fn without_an_iommu_or_its_driver_a_vm_with_devices_is_a_fail() {
        let bare = Host::at("/no/such/place");
        assert_eq!((iommu(&bare, 0).level, iommu(&bare, 1).level), (Level::Info, Level::Fail));
        let (_directory, host) = host();
        let without = iommu(&host, 2);
        assert!(without.level == Level::Fail && without.detail.contains("vfio-pci") && without.detail.contains("2 VMs"), "{without:?}");
        host.write("lib/modules/6.12.0/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz");
        let with = iommu(&host, 2);
        assert_eq!((with.level, with.detail.as_str()), (Level::Info, "1 IOMMU group and vfio-pci: devices can be passed through, by their groups' nodes"));
        host.write("sys/class/misc/iommu/dev", "10:259");
        assert!(iommu(&host, 2).detail.ends_with("passed through, as descriptors of iommufd's, by a QEMU that knows it"));
    }
}
