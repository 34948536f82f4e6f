//! What there is in a machine, to be the same before and after.

use super::{Machine, SUPERVISOR, WORKER};
use crate::host::descriptors;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// What must be the same before and after whatever leaves nothing behind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inventory {
    /// Each VM's first process, by its scope.
    pub qemus: BTreeMap<String, String>,
    /// By kind, with their number.
    pub supervisor_fds: BTreeMap<String, usize>,
    pub worker_fds: BTreeMap<String, usize>,
    /// Mount points, in the machine and as the supervisor sees them.
    pub mounts: Vec<String>,
    pub links: Vec<String>,
    /// Below `/run/diarch`: the sockets, the ledger, the VMs' directories.
    pub run_directory: Vec<String>,
    /// The machine's cgroups of Diarch's.
    pub cgroups: Vec<String>,
}

impl Machine {
    /// Taken when it has settled: a half that has just said READY=1 may still hold the socket that it said it on.
    pub fn inventory(&self) -> Inventory {
        let mut last = self.glance();
        for _ in 0..50 {
            std::thread::sleep(Duration::from_millis(50));
            let now = self.glance();
            if now == last {
                break;
            }
            last = now;
        }
        last
    }

    fn glance(&self) -> Inventory {
        let fds = |unit: &str| self.main_process(unit).map(|process| descriptors(process.host_pid)).unwrap_or_default();
        let mut mounts = mount_points(self.leader);
        if let Some(supervisor) = self.main_process(SUPERVISOR) {
            mounts.extend(mount_points(supervisor.host_pid).into_iter().map(|point| format!("the supervisor's {point}")));
        }
        mounts.sort();
        // Through the leader: the directory shows the network namespace of the one who mounted it.
        let links = fs::read_to_string(format!("/proc/{}/net/dev", self.leader)).unwrap_or_default();
        let mut links: Vec<String> = links.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect();
        links.sort();
        Inventory {
            qemus: self.qemus().into_iter().map(|(scope, process)| (scope, format!("{process:?}"))).collect(),
            supervisor_fds: fds(SUPERVISOR),
            worker_fds: fds(WORKER),
            mounts,
            links,
            run_directory: below(&self.root().join("run/diarch")),
            // Of those that the kernel shows, the directories are the groups.
            cgroups: below(&self.cgroup()).into_iter().filter(|path| path.contains("diarch") && self.cgroup().join(path).is_dir()).collect(),
        }
    }

    /// Waits a little for everything to be as it was, and fails with the difference when it is not.
    #[track_caller]
    pub fn assert_same(&self, before: &Inventory) {
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            let now = self.glance();
            if &now == before {
                return;
            }
            assert!(Instant::now() < until, "something was left behind, or is missing:\n{}", difference(before, &now));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn difference(before: &Inventory, now: &Inventory) -> String {
    let (before, now) = (format!("{before:#?}"), format!("{now:#?}"));
    let lines = |of: &str| of.lines().map(str::to_owned).collect::<Vec<_>>();
    let (before, now) = (lines(&before), lines(&now));
    let only =
        |these: &[String], those: &[String], sign: &str| these.iter().filter(|l| !those.contains(l)).map(|l| format!("{sign} {l}\n")).collect::<String>();
    only(&before, &now, "before:") + &only(&now, &before, "now:   ")
}

fn mount_points(pid: i32) -> Vec<String> {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    mounts.lines().filter_map(|line| line.split(' ').nth(4).map(str::to_owned)).collect()
}

/// All paths below `dir`, relative and in order.
fn below(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut queue = vec![dir.to_owned()];
    while let Some(next) = queue.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            let relative = path.strip_prefix(dir).unwrap_or(&path);
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                queue.push(path.clone());
            }
            found.push(relative.to_string_lossy().into_owned());
        }
    }
    found.sort();
    found
}
