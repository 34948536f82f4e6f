//! Does KVM work here? A tiny 64-bit guest is let run, and must compute a sum and come to its HLT.
//!
//! On some hosts `/dev/kvm` opens, answers its version, makes a VM, and then can't run it (paravirtual nesting); a `hlt` in real mode may even get through, emulated. So
//! nothing less than a guest that ran in the mode that kernels run in is believed.
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
use std::time::{Duration, Instant};

pub const DEVICE: &str = "/dev/kvm";
/// The guest needs microseconds; a host that swaps may need longer.
const PATIENCE: Duration = Duration::from_secs(5);

// From linux/kvm.h (the API is stable since Linux 2.6.22, version 12).
const KVM_API_VERSION: i32 = 12;
const KVM_GET_API_VERSION: libc::c_ulong = 0xAE00;
const KVM_CREATE_VM: libc::c_ulong = 0xAE01;
const KVM_GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xAE04;
const KVM_GET_SUPPORTED_CPUID: libc::c_ulong = 0xC008_AE05;
const KVM_CREATE_VCPU: libc::c_ulong = 0xAE41;
const KVM_RUN: libc::c_ulong = 0xAE80;
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_AE46;
const KVM_GET_SREGS: libc::c_ulong = 0x8138_AE83;
const KVM_SET_SREGS: libc::c_ulong = 0x4138_AE84;
const KVM_SET_REGS: libc::c_ulong = 0x4090_AE82;
const KVM_SET_CPUID2: libc::c_ulong = 0x4008_AE90;
const KVM_EXIT_HLT: u32 = 5;
/// `struct kvm_sregs`.
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

/// `struct kvm_cpuid2` with room for all that KVM may say (`KVM_MAX_CPUID_ENTRIES`); an entry is ten words.
#[repr(C)]
struct Cpuid {
    entries: u32,
    padding: u32,
    entry: [[u32; 10]; 256],
}

/// The group that a process needs to open `/dev/kvm`, if a group helps.
pub fn device_group() -> Option<u32> {
    let meta = std::fs::metadata(DEVICE).ok()?;
    (meta.mode() & 0o060 == 0o060 && meta.gid() != 0).then(|| meta.gid())
}

/// Runs the probe as user `uid`, for at most [`PATIENCE`].
pub fn probe_as(uid: u32, walls: jail::Walls) -> KvmVerdict {
    match run_probe(uid, walls) {
        Ok(verdict) => verdict,
        Err(error) => KvmVerdict::Absent { reason: format!("the probe did not run: {error}") },
    }
}

fn run_probe(uid: u32, walls: jail::Walls) -> Result<KvmVerdict, Error> {
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
        groups: device_group().into_iter().collect(),
        limits: jail::Limits { tasks: 16, open_files: 64, locked_bytes: jail::LOCKED_BYTES },
        root: jail::Root::of_a_program().node(DEVICE),
        network: jail::Network::Own,
        sockets: jail::Sockets::Unix,
        sandbox: jail::Sandbox::Ours,
        walls,
    };
    let pidfd = jail::fork(plan)?.open(PATIENCE).map_err(|failed| failed.error)?;
    let ended = crate::process::wait_ended(&pidfd, PATIENCE).map_err(io)?;
    if !ended {
        let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
        let _ = crate::process::wait_ended(&pidfd, PATIENCE);
    }
    crate::process::reap(&pidfd);
    if !ended {
        return Ok(KvmVerdict::Lies { reason: format!("the guest did not end within {} s", PATIENCE.as_secs()) });
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
    match run_guest(&device) {
        Ok(Ran { exit_reason, .. }) if exit_reason != KVM_EXIT_HLT => {
            format!("lies {DEVICE} opens and makes a VM, and the guest ends with exit reason {exit_reason} instead of a halt (17: internal error)")
        }
        Ok(Ran { sum_is_right: false, .. }) => format!("lies {DEVICE} opens and makes a VM, and the guest halted without having computed"),
        Ok(Ran { nanoseconds, .. }) if nanoseconds > SLOWEST_NS => {
            format!("lies {DEVICE} runs a guest, and takes {nanoseconds} ns for an instruction: it interprets, and QEMU's own translator is faster")
        }
        Ok(_) => "usable".into(),
        Err((step, error)) => format!("lies {DEVICE} opens, and {step} fails: {error}"),
    }
}

fn ioctl(fd: RawFd, request: libc::c_ulong, argument: u64, step: &'static str) -> Result<i32, (&'static str, io::Error)> {
    // SAFETY: each caller passes the argument that the request takes: a number, or the address of a live value of the right size.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    if result < 0 { Err((step, io::Error::last_os_error())) } else { Ok(result) }
}

/// Guest memory: code at 0x1000, page tables from 0x2000, the result at 0x5000.
const MEMORY: usize = 0x6000;
const CODE: usize = 0x1000;
const TABLES: [usize; 3] = [0x2000, 0x3000, 0x4000];
const RESULT: usize = 0x5000;
const PAGE: usize = 4096;

/// 64-bit code that no stub can answer for: it counts down, adds up, stores the sum and halts.
///
/// ```text
///   mov ecx, 200000      b9 40 0d 03 00
///   xor eax, eax         31 c0
///   add rax, rcx         48 01 c8       <-+
///   dec ecx              ff c9            |
///   jnz                  75 f9          --+
///   mov [0x5000], rax    48 89 04 25 00 50 00 00
///   hlt                  f4
/// ```
const PROGRAM: [u8; 24] =
    [0xb9, 0x40, 0x0d, 0x03, 0, 0x31, 0xc0, 0x48, 0x01, 0xc8, 0xff, 0xc9, 0x75, 0xf9, 0x48, 0x89, 0x04, 0x25, 0x00, 0x50, 0, 0, 0xf4, 0xf4];
const ROUNDS: u64 = 200_000;
const SUM: u64 = ROUNDS * (ROUNDS + 1) / 2;
/// A processor needs less than a nanosecond for each, QEMU's translator a few. Above this KVM is not the processor but an interpreter in the kernel (seen: half a
/// microsecond), under which a guest takes minutes to boot: TCG is the better choice.
const SLOWEST_NS: u64 = 50;
/// A busy host may interrupt a run; the fastest of some counts.
const RUNS: usize = 5;

/// What became of the guest.
struct Ran {
    exit_reason: u32,
    sum_is_right: bool,
    /// The fastest run, for each instruction.
    nanoseconds: u64,
}

/// Runs [`PROGRAM`] in long mode with paging, as any guest kernel would run.
///
/// A `hlt` in real mode would prove less: a hypervisor that emulates real mode and can't run the rest gets through it.
fn run_guest(device: &File) -> Result<Ran, (&'static str, io::Error)> {
    let kvm = device.as_raw_fd();
    let version = ioctl(kvm, KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")?;
    if version != KVM_API_VERSION {
        return Err(("KVM_GET_API_VERSION", io::Error::other(format!("version {version}, not {KVM_API_VERSION}"))));
    }
    // SAFETY: KVM_CREATE_VM returned a new descriptor that nobody else holds.
    let vm = unsafe { OwnedFd::from_raw_fd(ioctl(kvm, KVM_CREATE_VM, 0, "KVM_CREATE_VM")?) };
    // SAFETY: a new private anonymous mapping; nothing else points into it.
    let memory =
        unsafe { mmap_anonymous(std::ptr::null_mut(), MEMORY, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) }.map_err(|e| ("mmap", e.into()))?;
    let at = |offset: usize| memory.cast::<u8>().wrapping_add(offset);
    // SAFETY: the program fits into its page, which lies within the mapping.
    unsafe { at(CODE).copy_from_nonoverlapping(PROGRAM.as_ptr(), PROGRAM.len()) };
    // Three levels down to one page of 2 MiB at address 0: present, writable (and large).
    for (table, entry) in [(TABLES[0], TABLES[1] as u64 | 3), (TABLES[1], TABLES[2] as u64 | 3), (TABLES[2], 0x83)] {
        // SAFETY: the first entry of a page-aligned table within the mapping.
        unsafe { at(table).cast::<u64>().write(entry) };
    }
    let region = MemoryRegion { slot: 0, flags: 0, guest_phys_addr: 0, memory_size: MEMORY as u64, userspace_addr: memory.addr() as u64 };
    ioctl(vm.as_raw_fd(), KVM_SET_USER_MEMORY_REGION, (&raw const region).addr() as u64, "KVM_SET_USER_MEMORY_REGION")?;
    // SAFETY: as KVM_CREATE_VM.
    let vcpu = unsafe { OwnedFd::from_raw_fd(ioctl(vm.as_raw_fd(), KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU")?) };
    let size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")?;
    let size = usize::try_from(size).unwrap_or(PAGE).max(PAGE);
    // SAFETY: a shared mapping of the vcpu's own run area, of the size that KVM said.
    let run = unsafe { mmap(std::ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &vcpu, 0) }.map_err(|e| ("mmap", e.into()))?;

    // A processor that does not say that it has long mode is refused it (seen with Linux 6.12 and SVM: EINVAL for EFER).
    let mut cpuid = Box::new(Cpuid { entries: 256, padding: 0, entry: [[0; 10]; 256] });
    ioctl(kvm, KVM_GET_SUPPORTED_CPUID, (&raw mut *cpuid).addr() as u64, "KVM_GET_SUPPORTED_CPUID")?;
    ioctl(vcpu.as_raw_fd(), KVM_SET_CPUID2, (&raw const *cpuid).addr() as u64, "KVM_SET_CPUID2")?;
    let mut sregs = SpecialRegisters { bytes: [0; SREGS_BYTES] };
    ioctl(vcpu.as_raw_fd(), KVM_GET_SREGS, (&raw mut sregs).addr() as u64, "KVM_GET_SREGS")?;
    sregs.long_mode();
    ioctl(vcpu.as_raw_fd(), KVM_SET_SREGS, (&raw const sregs).addr() as u64, "KVM_SET_SREGS")?;
    let mut ran = Ran { exit_reason: 0, sum_is_right: false, nanoseconds: u64::MAX };
    for _ in 0..RUNS {
        let mut regs = [0u64; REGS];
        regs[REGS - 2] = CODE as u64; // rip
        regs[REGS - 1] = 2; // rflags: bit 1 is always set
        // SAFETY: within the mapping, aligned to 8, and the guest does not run now.
        unsafe { at(RESULT).cast::<u64>().write_volatile(0) };
        ioctl(vcpu.as_raw_fd(), KVM_SET_REGS, regs.as_ptr().addr() as u64, "KVM_SET_REGS")?;
        let started = Instant::now();
        ioctl(vcpu.as_raw_fd(), KVM_RUN, 0, "KVM_RUN")?;
        let took = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let exit_reason = run.cast::<u8>().wrapping_add(RUN_EXIT_REASON).cast::<u32>();
        // SAFETY: it lies within the mapping, aligned to 4, and the vcpu does not run now.
        ran.exit_reason = unsafe { exit_reason.read_volatile() };
        // SAFETY: as above.
        ran.sum_is_right = unsafe { at(RESULT).cast::<u64>().read_volatile() } == SUM;
        ran.nanoseconds = ran.nanoseconds.min(took / (3 * ROUNDS));
        if ran.exit_reason != KVM_EXIT_HLT || !ran.sum_is_right || ran.nanoseconds <= SLOWEST_NS {
            break;
        }
    }
    Ok(ran)
}

/// `struct kvm_sregs` as bytes: eight segments of 24 bytes, two tables of 16, then cr0, cr2, cr3, cr4, cr8, efer, apic_base and a bitmap.
#[repr(C, align(8))]
struct SpecialRegisters {
    bytes: [u8; SREGS_BYTES],
}

impl SpecialRegisters {
    const SEGMENT: usize = 24;
    const CONTROL: usize = 8 * Self::SEGMENT + 2 * 16;

    fn put(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    }

    /// Flat segments, paging through [`TABLES`], 64-bit code (Intel SDM volume 3, 10.8.5).
    fn long_mode(&mut self) {
        // cs, ds, es, fs, gs, ss: base 0, no limit; type, present, dpl, db, s, l, g, avl, unusable, padding.
        for segment in 0..6 {
            let at = segment * Self::SEGMENT;
            let (selector, kind, wide, long): (u16, u8, u8, u8) = if segment == 0 { (8, 0xb, 0, 1) } else { (16, 3, 1, 0) };
            self.put(at, 0);
            self.bytes[at + 8..at + 12].copy_from_slice(&u32::MAX.to_ne_bytes());
            self.bytes[at + 12..at + 14].copy_from_slice(&selector.to_ne_bytes());
            self.bytes[at + 14..at + 24].copy_from_slice(&[kind, 1, 0, wide, 1, long, 1, 0, 0, 0]);
        }
        self.put(Self::CONTROL, 0x8005_0033); // cr0: PG, AM, WP, NE, ET, MP, PE
        self.put(Self::CONTROL + 16, TABLES[0] as u64); // cr3
        self.put(Self::CONTROL + 24, 0x20); // cr4: PAE
        self.put(Self::CONTROL + 40, 0x500); // efer: LMA, LME
    }
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
