//! `vfio_bind`: a network card bound by the supervisor, against the same by hand; `vfio_bind_nvme`: an NVMe disk. In the lab, with its emulated IOMMU, by one program in
//! there, which has a connection that is warm and plays both the worker and the one who writes into sysfs. Both ways end when `/dev/vfio/GROUP` is there, for which
//! both look each millisecond. By hand nothing is looked at, written down, audited or undone.
//!
//! Everything that is no driver's work is dear there: the emulated processor runs programs some twenty times slower than a real one.

use crate::{line, median, milliseconds};
use diarch_ipc::frame::Outcome;
use diarch_ipc::name::{Bdf, Label};
use diarch_ipc::operation::{Bind, Claim, Release, Reply, Request, Unbind};
use diarch_tests::lab::{Lab, device, in_lab};
use diarch_tests::need::Need;
use diarch_tests::wire::{Raw, User};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const RUNS: usize = 11;
const GRANTS: &str = "[worker]\nuser = \"diarch\"\n[vms]\nmax = 4\nuid_first = 2100000000\nmemory_mib = 2048\ncpus_each = 1\n\
    [devices]\nallow = [\"8086:10d3\", \"class:0108\"]\n";
/// Where programs may be run from, unlike /run.
const PROGRAM: &str = "/root/diarch-bench";

#[derive(Serialize, Deserialize)]
struct Ask {
    function: String,
    driver: String,
    uid: u32,
    gid: u32,
}

/// Milliseconds of each run.
#[derive(Serialize, Deserialize)]
struct Times {
    ours: Vec<f64>,
    by_hand: Vec<f64>,
}

pub fn run() {
    if let Some(missing) = Need::Lab.missing() {
        eprintln!("bench: devices: SKIPPED: it needs {missing}");
        return;
    }
    let lab = Lab::boot();
    lab.supervise(GRANTS);
    lab.copy_in(&std::env::current_exe().expect("our path"), PROGRAM, 0o755);
    let id = |flag: &str| lab.sh(&format!("id {flag} diarch")).parse().expect("a number");
    let (uid, gid) = (id("-u"), id("-g"));
    for (name, function, driver) in [("vfio_bind", device::CARD, "e1000e"), ("vfio_bind_nvme", device::NVME, "nvme")] {
        let ask = serde_json::to_string(&Ask { function: function.into(), driver: driver.into(), uid, gid }).expect("JSON");
        let out = lab.run_within(Duration::from_secs(300), &[PROGRAM, "--bind", &ask]).expect_success("the measurement in the lab");
        let Times { ours, by_hand } = serde_json::from_str(&out.stdout).expect("JSON");
        line(name, median(ours), "ms", median(by_hand));
    }
    lab.end_supervision();
}

/// In the lab: prints [`Times`].
pub fn inside(ask: &str) -> ExitCode {
    if !in_lab() {
        eprintln!("diarch-bench: this is not the lab: nothing is bound here");
        return ExitCode::FAILURE;
    }
    let Ask { function, driver, uid, gid } = serde_json::from_str(ask).expect("JSON");
    let hand = Hand::new(&function, &driver);
    let mut raw = Raw::ready(Path::new(diarch_ipc::SUPERVISOR_SOCKET), User { uid, gid });
    let mut request = |request: Request| match raw.ask(request, &[]) {
        Ok((Outcome::Ok(reply), _)) => reply,
        other => panic!("{other:?}"),
    };
    let Reply::VmClaim(claimed) = request(Request::VmClaim(Claim { label: Label::new("bench").expect("a label") })) else { panic!("vm.claim") };
    let tenancy = claimed.tenancy;
    let name = || Bdf::new(function.as_str()).expect("an address");
    let (mut ours, mut by_hand) = (Vec::new(), Vec::new());
    for run in 0..=RUNS {
        let started = Instant::now();
        hand.bind();
        let theirs = milliseconds(started.elapsed());
        settle();
        hand.release();
        settle();
        let started = Instant::now();
        request(Request::VfioBind(Bind { tenancy, function: name() }));
        let took = milliseconds(started.elapsed());
        assert!(hand.node.exists(), "what is bound has its node");
        settle();
        request(Request::VfioRelease(Unbind { tenancy, function: name() }));
        settle();
        // The first one warms up.
        if run > 0 {
            ours.push(took);
            by_hand.push(theirs);
        }
    }
    request(Request::VmRelease(Release { tenancy }));
    println!("{}", serde_json::to_string(&Times { ours, by_hand }).expect("JSON"));
    ExitCode::SUCCESS
}

/// Until udev is done with what happened, and its interface or disk is there again.
fn settle() {
    assert!(Command::new("udevadm").arg("settle").status().expect("udevadm").success());
    std::thread::sleep(Duration::from_millis(200));
}

/// One function, by the kernel's files.
struct Hand<'a> {
    function: &'a str,
    driver: &'a str,
    at: PathBuf,
    node: PathBuf,
}

impl<'a> Hand<'a> {
    fn new(function: &'a str, driver: &'a str) -> Self {
        let at = Path::new("/sys/bus/pci/devices").join(function);
        let group = std::fs::read_link(at.join("iommu_group")).expect("a group");
        let node = Path::new("/dev/vfio").join(group.file_name().expect("its number"));
        Self { function, driver, at, node }
    }

    fn write(path: impl AsRef<Path>, text: &str) {
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()));
    }

    fn bind(&self) {
        Self::write(self.at.join("driver_override"), "vfio-pci");
        Self::write(self.at.join("driver/unbind"), self.function);
        Self::write("/sys/bus/pci/drivers_probe", self.function);
        while !self.node.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn release(&self) {
        Self::write(self.at.join("driver_override"), "\n");
        Self::write(self.at.join("driver/unbind"), self.function);
        Self::write(format!("/sys/bus/pci/drivers/{}/bind", self.driver), self.function);
    }
}
