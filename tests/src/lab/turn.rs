//! One test's turn with the lab that all tests of a program share: what it did to the lab is undone by itself, or it fails.

use super::Lab;
use std::collections::BTreeSet;
use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The lab, for one test alone.
#[derive(Debug)]
pub struct Turn<'a> {
    lab: &'a Lab,
    before: BTreeSet<String>,
    _alone: MutexGuard<'static, ()>,
}

/// What a test has to leave as it was, a line each: the drivers of all devices, virtual functions, network links, mounts, rules of nftables,
/// VMs. (Links by name only: whether one has carrier is a matter of time.)
const INVENTORY: &str = r#"
for device in /sys/bus/pci/devices/*; do
    driver=$(readlink "$device/driver" || echo none)
    read -r override <"$device/driver_override" || true
    echo "device ${device##*/} driver ${driver##*/} override $override"
done
for link in /sys/class/net/*; do echo "link ${link##*/}"; done
while read -r _ _ _ _ at _; do echo "mount $at"; done </proc/self/mountinfo
while read -r device _; do echo "swap $device"; done </proc/swaps
nft list ruleset | sed 's/^/nft /'
for comm in /proc/[0-9]*/comm; do
    { read -r name <"$comm"; } 2>/dev/null || continue
    case $name in qemu-system-* | passt* | virtiofsd*) comm=${comm%/comm}; echo "process ${comm##*/} $name" ;; esac
done
"#;

/// Gives each device back to the driver that the kernel finds for it. By hand, as the rest of this program may be what is broken.
const MEND: &str = r#"
for comm in /proc/[0-9]*/comm; do
    { read -r name <"$comm"; } 2>/dev/null || continue
    case $name in qemu-system-* | passt* | virtiofsd*) pid=${comm%/comm}; kill -KILL "${pid##*/}" || true ;; esac
done
sleep 0.5
for device in /sys/bus/pci/devices/*; do
    read -r override <"$device/driver_override" || true
    if [ "$override" != '(null)' ]; then echo >"$device/driver_override"; fi
    driver=$(readlink "$device/driver" || echo none)
    if [ "${driver##*/}" = vfio-pci ]; then echo "${device##*/}" >"$device/driver/unbind"; driver=none; fi
    if [ "$driver" = none ]; then echo "${device##*/}" >/sys/bus/pci/drivers_probe || true; fi
done
"#;

impl Turn<'_> {
    pub(super) fn wait<'a>(lab: impl FnOnce() -> &'a Lab) -> Turn<'a> {
        static TURN: Mutex<()> = Mutex::new(());
        // A test that failed has left its turn too.
        let alone = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let lab = lab();
        Turn { lab, before: inventory(lab), _alone: alone }
    }

    /// What is in the lab now; a test that wants to know what it left compares two.
    pub fn inventory(&self) -> BTreeSet<String> {
        inventory(self.lab)
    }
}

fn inventory(lab: &Lab) -> BTreeSet<String> {
    lab.sh(INVENTORY).lines().map(str::to_owned).collect()
}

impl Deref for Turn<'_> {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        self.lab
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.lab.state());
            // A lab that has ended can't be mended, and a second panic would hide the first.
            let _ = self.lab.ask_run(super::COMMAND, &["/bin/bash", "-c", MEND], &[]);
            return;
        }
        let after = inventory(self.lab);
        let (gone, new): (Vec<_>, Vec<_>) = (self.before.difference(&after).collect(), after.difference(&self.before).collect());
        if !gone.is_empty() || !new.is_empty() {
            let _ = self.lab.try_sh(MEND);
            panic!("this test left the lab changed: gone {gone:#?}, new {new:#?}");
        }
    }
}
