//! Does KVM work here? A tiny guest is let run, and must come to its HLT.
//!
//! On some hosts `/dev/kvm` opens, answers its version, makes a VM, and then fails at the first guest instruction (paravirtual nesting). So nothing
//! less than a guest that ran is believed.
//!
//! The probe is `diarch-supervisor probe-kvm`, a process of a VM's kind: its own user, no capability, a deadline. What it prints is one line.

#![allow(unsafe_code)]

use crate::vm::jail;
use diarch_ipc::Error;
use diarch_ipc::frame::printable;
use diarch_ipc::operation::KvmVerdict;
use nix::libc;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

const DEVICE: &str = "/dev/kvm";
/// The guest needs microseconds; a host that swaps may need longer.
const PATIENCE: Duration = Duration::from_secs(5);

// From linux/kvm.h (the API is stable since Linux 2.6.22, version 12).
const KVM_API_VERSION: i32 = 12;
const KVM_GET_API_VERSION: libc::c_ulong = 0xAE00;
const KVM_CREATE_VM: libc::c_ulong = 0xAE01;
const KVM_GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xAE04;
const KVM_CREATE_VCPU: libc::c_ulong = 0xAE41;
const KVM_RUN: libc::c_ulong = 0xAE80;
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_AE46;
const KVM_GET_SREGS: libc::c_ulong = 0x8138_AE83;
const KVM_SET_SREGS: libc::c_ulong = 0x4138_AE84;
const KVM_SET_REGS: libc::c_ulong = 0x4090_AE82;
const KVM_EXIT_HLT: u32 = 5;
/// `struct kvm_sregs`: 0x138 bytes; the code segment is its first member: base (u64), limit (u32), selector (u16).
const SREGS_BYTES: usize = 0x138;
/// `struct kvm_regs`: 18 registers of 8 bytes; rip and rflags are the last two.
const REGS: usize = 18;
/// `exit_reason` in `struct kvm_run`.
const RUN_EXIT_REASON: usize = 8;

#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
}

/// The group that a process needs to open `/dev/kvm`, if a group helps.
pub fn device_group() -> Option<u32> {
    let meta = std::fs::metadata(DEVICE).ok()?;
    (meta.mode() & 0o060 == 0o060 && meta.gid() != 0).then(|| meta.gid())
}

/// Runs the probe as user `uid`, for at most [`PATIENCE`].
pub fn probe_as(uid: u32) -> KvmVerdict {
    match run_probe(uid) {
        Ok(verdict) => verdict,
        Err(error) => KvmVerdict::Absent { reason: format!("the probe did not run: {error}") },
    }
}

fn run_probe(uid: u32) -> Result<KvmVerdict, Error> {
    if !std::path::Path::new(DEVICE).exists() {
        return Ok(KvmVerdict::Absent { reason: format!("there is no {DEVICE} (kvm_intel or kvm_amd is not loaded, or virtualisation is off)") });
    }
    let io = |error: io::Error| Error::io("KVM probe", &error);
    let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
    let (reader, writer) = io::pipe().map_err(io)?;
    let program = File::open("/proc/self/exe").map_err(io)?;
    let plan = jail::Plan {
        program: program.into(),
        argv: vec!["diarch-supervisor".into(), "probe-kvm".into()],
        fds: vec![null().map_err(io)?, writer.into(), null().map_err(io)?],
        uid,
        extra_group: device_group(),
        max_tasks: 16,
        max_open_files: 64,
    };
    let pidfd = jail::fork(plan)?.open(PATIENCE)?;
    let ended = crate::process::wait_ended(&pidfd, PATIENCE).map_err(io)?;
    if !ended {
        let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
        let _ = crate::process::wait_ended(&pidfd, PATIENCE);
    }
    crate::process::reap(&pidfd);
    if !ended {
        return Ok(KvmVerdict::Lies { reason: format!("a guest of one instruction did not end within {} s", PATIENCE.as_secs()) });
    }
    let mut text = String::new();
    reader.take(512).read_to_string(&mut text).map_err(io)?;
    Ok(parse(text.trim()))
}

fn parse(line: &str) -> KvmVerdict {
    let reason = |text: &str| printable(text, 200);
    match line.split_once(' ').unwrap_or((line, "")) {
        ("usable", _) => KvmVerdict::Usable,
        ("absent", why) => KvmVerdict::Absent { reason: reason(why) },
        ("lies", why) => KvmVerdict::Lies { reason: reason(why) },
        _ => KvmVerdict::Lies { reason: format!("the probe died without a word ({:?})", reason(line)) },
    }
}

/// The probe itself: `diarch-supervisor probe-kvm`.
pub fn probe_main() -> String {
    let device = match File::options().read(true).write(true).open(DEVICE) {
        Ok(device) => device,
        Err(error) => return format!("absent {DEVICE} can't be opened by a VM's user: {error}"),
    };
    match halt_once(&device) {
        Ok(KVM_EXIT_HLT) => "usable".into(),
        Ok(reason) => format!("lies {DEVICE} opens and makes a VM, and the first guest instruction ends with exit reason {reason} instead of a halt"),
        Err((step, error)) => format!("lies {DEVICE} opens, and {step} fails: {error}"),
    }
}

fn ioctl(fd: RawFd, request: libc::c_ulong, argument: u64, step: &'static str) -> Result<i32, (&'static str, io::Error)> {
    // SAFETY: each caller passes the argument that the request takes: a number, or the address of a live value of the right size.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    if result < 0 { Err((step, io::Error::last_os_error())) } else { Ok(result) }
}

/// Runs `hlt` in real mode and returns the exit reason.
fn halt_once(device: &File) -> Result<u32, (&'static str, io::Error)> {
    const PAGE: usize = 4096;
    const HLT: u8 = 0xf4;
    let kvm = device.as_raw_fd();
    let version = ioctl(kvm, KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")?;
    if version != KVM_API_VERSION {
        return Err(("KVM_GET_API_VERSION", io::Error::other(format!("version {version}, not {KVM_API_VERSION}"))));
    }
    // SAFETY: KVM_CREATE_VM returned a new descriptor that nobody else holds.
    let vm = unsafe { OwnedFd::from_raw_fd(ioctl(kvm, KVM_CREATE_VM, 0, "KVM_CREATE_VM")?) };
    // SAFETY: a new private anonymous mapping; nothing else points into it.
    let memory =
        unsafe { mmap_anonymous(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) }.map_err(|e| ("mmap", e.into()))?;
    // SAFETY: the first byte of the page mapped above.
    unsafe { memory.cast::<u8>().write(HLT) };
    // The page lies at 0x1000: address 0 stays unmapped, as a guest that ran wild would show.
    let region = MemoryRegion { slot: 0, flags: 0, guest_phys_addr: 0x1000, memory_size: PAGE as u64, userspace_addr: memory.addr() as u64 };
    ioctl(vm.as_raw_fd(), KVM_SET_USER_MEMORY_REGION, (&raw const region).addr() as u64, "KVM_SET_USER_MEMORY_REGION")?;
    // SAFETY: as KVM_CREATE_VM.
    let vcpu = unsafe { OwnedFd::from_raw_fd(ioctl(vm.as_raw_fd(), KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU")?) };
    let size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")?;
    let size = usize::try_from(size).unwrap_or(PAGE).max(PAGE);
    // SAFETY: a shared mapping of the vcpu's own run area, of the size that KVM said.
    let run = unsafe { mmap(std::ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &vcpu, 0) }.map_err(|e| ("mmap", e.into()))?;

    // Aligned as the kernel's structures are.
    let mut sregs = [0u64; SREGS_BYTES / 8];
    ioctl(vcpu.as_raw_fd(), KVM_GET_SREGS, sregs.as_mut_ptr().addr() as u64, "KVM_GET_SREGS")?;
    sregs[0] = 0; // cs.base
    sregs[1] &= !(0xffff << 32); // cs.selector, above the 32 bits of cs.limit
    ioctl(vcpu.as_raw_fd(), KVM_SET_SREGS, sregs.as_ptr().addr() as u64, "KVM_SET_SREGS")?;
    let mut regs = [0u64; REGS];
    regs[REGS - 2] = 0x1000; // rip
    regs[REGS - 1] = 2; // rflags: bit 1 is always set
    ioctl(vcpu.as_raw_fd(), KVM_SET_REGS, regs.as_ptr().addr() as u64, "KVM_SET_REGS")?;
    ioctl(vcpu.as_raw_fd(), KVM_RUN, 0, "KVM_RUN")?;
    let exit_reason = run.cast::<u8>().wrapping_add(RUN_EXIT_REASON).cast::<u32>();
    // SAFETY: it lies within the mapping, aligned to 4, and the vcpu does not run now.
    Ok(unsafe { exit_reason.read_volatile() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_probe_prints_is_read_back() {
        assert_eq!(parse("usable"), KvmVerdict::Usable);
        assert!(matches!(parse("lies it does"), KvmVerdict::Lies { reason } if reason == "it does"));
        assert!(matches!(parse("absent no node"), KvmVerdict::Absent { .. }));
        assert!(matches!(parse(""), KvmVerdict::Lies { .. }), "a probe that was killed proves nothing good");
    }

    #[test]
    fn the_probe_says_one_of_its_three_words_here() {
        let line = probe_main();
        assert!(["usable", "lies ", "absent "].iter().any(|word| line.starts_with(word)), "{line}");
    }
}
