//! The system calls that a jailed program may not make, whatever it has become.
//!
//! A list of what is refused, over two lists of what is allowed: the unit's (`SystemCallFilter=`), which a supervisor without a unit does not have, and QEMU's
//! own (`-sandbox`), which a program has only from the moment it installs it. This one is there before its first instruction. Refused means `EPERM`, which a
//! program can survive; a call by another architecture's numbers ends it.
//!
//! `execve` can't be on the list, as it comes after. QEMU's `spawn=deny` refuses it from then on; and whatever is executed has this filter, no capability, and the
//! same tree, where nothing that it wrote can be executed.

use nix::libc;
use seccompiler::{BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch, sock_filter};
use std::collections::BTreeMap;
use std::ffi::c_long;

/// Who makes the program's inner walls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    /// We do, and the program does not try.
    Ours,
    /// We do. The program would make its own besides, by a user namespace and an empty root, and ends when it can't (passt); so it is told that it has, and nothing is
    /// done. To be let make them, it would need the part of the kernel that most escapes went through, and so would whoever takes it over.
    Pretended,
}

/// Which sockets it may make. Those it was given are no matter of this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sockets {
    Unix,
    /// User-mode networking.
    Internet,
    /// And that asks the kernel for addresses and routes.
    InternetAndRoutes,
}

/// Namespaces, as clone(2) and unshare(2) take them. Not CLONE_NEWTIME, which unshare alone has.
const NAMESPACES: [i32; 7] =
    [libc::CLONE_NEWNS, libc::CLONE_NEWCGROUP, libc::CLONE_NEWUTS, libc::CLONE_NEWIPC, libc::CLONE_NEWUSER, libc::CLONE_NEWPID, libc::CLONE_NEWNET];
/// linux/sched.h; the same bit is part of clone(2)'s signal.
const CLONE_NEWTIME: i32 = 0x80;
/// Since Linux 6.15, and not yet in libc.
const SYS_OPEN_TREE_ATTR: c_long = 467;
/// personality(2): tells and changes nothing.
const PERSONALITY_QUERY: u64 = 0xffff_ffff;

/// How a program makes walls of its own, as far as one that we start does.
const WALLS: [c_long; 4] = [libc::SYS_unshare, libc::SYS_mount, libc::SYS_pivot_root, libc::SYS_umount2];

/// What a tap is, whose, and how long (linux/if_tun.h: TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNSETLINK, TUNSETGROUP; SIOCSIFHWADDR): the driver asks whoever holds
/// a queue for no right. A bridge takes the tap's own MAC address for the host's, so another's put there takes packets from it.
const TAP_OWNERS: [u32; 6] = [0x4004_54ca, 0x4004_54cb, 0x4004_54cc, 0x4004_54cd, 0x4004_54ce, 0x8924];

/// Another tree than the one it was given.
const MOUNTS: &[c_long] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_open_tree,
    SYS_OPEN_TREE_ATTR,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
];

/// Each group with its reason, refused in every jail.
const REFUSED: &[&[c_long]] = &[
    MOUNTS,
    // Somebody else's namespaces.
    &[libc::SYS_setns],
    // Other processes' memory, descriptors and secrets: a jail has one process, and its helper has no business there.
    &[
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_process_mrelease,
        libc::SYS_kcmp,
        libc::SYS_pidfd_getfd,
    ],
    // Programs in the kernel, and looks into it.
    &[libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_fanotify_init, libc::SYS_fanotify_mark, libc::SYS_lookup_dcookie, libc::SYS_syslog],
    // Page faults held open by their cause: how races in the kernel are won.
    &[libc::SYS_userfaultfd],
    // What it does, no filter sees.
    &[libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register],
    // Keys, which are shared by user number and outlive processes. (Its session keyring was made before.)
    &[libc::SYS_keyctl, libc::SYS_add_key, libc::SYS_request_key],
    // Another kernel, and another's code in this one.
    &[libc::SYS_kexec_load, libc::SYS_kexec_file_load, libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module],
    // Files by number, past every directory's rights.
    &[libc::SYS_open_by_handle_at, libc::SYS_name_to_handle_at],
    // The host's end, swap, accounts, quotas, name and clock.
    &[libc::SYS_reboot, libc::SYS_swapon, libc::SYS_swapoff, libc::SYS_acct, libc::SYS_quotactl, libc::SYS_quotactl_fd],
    &[libc::SYS_sethostname, libc::SYS_setdomainname],
    &[libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_adjtimex, libc::SYS_clock_adjtime],
    // Memory, semaphores and queues that are found by number or name: old code, which neither program uses.
    &[libc::SYS_shmget, libc::SYS_shmat, libc::SYS_shmctl, libc::SYS_shmdt],
    &[libc::SYS_semget, libc::SYS_semop, libc::SYS_semctl, libc::SYS_semtimedop],
    &[libc::SYS_msgget, libc::SYS_msgsnd, libc::SYS_msgrcv, libc::SYS_msgctl],
    &[libc::SYS_mq_open, libc::SYS_mq_unlink, libc::SYS_mq_timedsend, libc::SYS_mq_timedreceive, libc::SYS_mq_notify, libc::SYS_mq_getsetattr],
    // The processor's ports and segments, and calls that only the oldest programs make.
    #[cfg(target_arch = "x86_64")]
    &[libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt, libc::SYS_uselib, libc::SYS_ustat, libc::SYS_sysfs],
];

/// The filter, for seccomp(2).
pub(super) fn program(sandbox: Sandbox, sockets: Sockets) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut refuse = |calls: &[c_long]| rules.extend(calls.iter().map(|call| (*call, Vec::new())));
    REFUSED.iter().for_each(|group| refuse(group));
    // With none of these flags both are for threads.
    let any_of = |flags: &[i32]| flags.iter().map(|flag| rule(&[has(*flag)?])).collect::<Result<Vec<_>, _>>();
    rules.insert(libc::SYS_clone, any_of(&NAMESPACES)?);
    rules.insert(libc::SYS_unshare, any_of(&[&NAMESPACES[..], &[CLONE_NEWTIME]].concat())?);
    let told = |request: &u32| rule(&[SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(*request))?]);
    rules.insert(libc::SYS_ioctl, TAP_OWNERS.iter().map(told).collect::<Result<Vec<_>, _>>()?);
    // Another personality makes memory executable that was not meant to be.
    rules.insert(libc::SYS_personality, vec![rule(&[isnt(0, 0)?, isnt(0, PERSONALITY_QUERY)?])?]);
    let families: &[i32] = match sockets {
        Sockets::Unix => &[libc::AF_UNIX],
        Sockets::Internet => &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6],
        Sockets::InternetAndRoutes => &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK],
    };
    let others = families.iter().map(|family| isnt(0, family.unsigned_abs().into())).collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_socket, vec![rule(&others)?]);

    let target: TargetArch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM.unsigned_abs()), target)?;
    let list: BpfProgram = filter.try_into()?;
    Ok(head(sandbox).into_iter().chain(list).collect())
}

fn rule(conditions: &[SeccompCondition]) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(conditions.to_vec())
}

fn has(flag: i32) -> Result<SeccompCondition, seccompiler::BackendError> {
    let flag = u64::from(flag.unsigned_abs());
    SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(flag), flag)
}

/// The kernel takes these arguments as 32 bits, and looks at no others.
fn isnt(argument: u8, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value)
}

/// What a list of numbers can't say, before the list is looked at.
fn head(sandbox: Sandbox) -> Vec<sock_filter> {
    // linux/bpf_common.h: load a word of `struct seccomp_data`, jump if a bit is set or if equal, return.
    const LOAD: u16 = 0x20;
    const JUMP_IF_SET: u16 = 0x45;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// The numbers of x86's third system call table, whose calls are the second's under other numbers.
    const X32: u32 = 0x4000_0000;
    const NUMBER: u32 = 0;
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let mut steps = vec![step(LOAD, 0, 0, NUMBER), step(JUMP_IF_SET, 0, 1, X32), step(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS)];
    let mut answer = |call: c_long, errno: i32| {
        steps.push(step(JUMP_IF_EQUAL, 0, 1, u32::try_from(call).unwrap_or(u32::MAX)));
        steps.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno.unsigned_abs()));
    };
    // Its flags lie in memory, where no filter looks. ENOSYS: the C library then makes its threads by clone(2).
    answer(libc::SYS_clone3, libc::ENOSYS);
    if sandbox == Sandbox::Pretended {
        // No error, and nothing done.
        WALLS.into_iter().for_each(|call| answer(call, 0));
    }
    steps
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};

    /// What came of a call in a process of its own, under the filter or without it: its error, 0, or the signal that ended it as a negative number.
    fn outcome(filter: Option<&BpfProgram>, number: c_long, arguments: [c_long; 3]) -> i32 {
        let [a, b, c] = arguments;
        // SAFETY: the child makes system calls and ends.
        match unsafe { libc::fork() } {
            0 => {
                if let Some(filter) = filter
                    && seccompiler::apply_filter(filter).is_err()
                {
                    // SAFETY: ends the child.
                    unsafe { libc::_exit(255) };
                }
                // SAFETY: the tests' arguments are numbers, or addresses that the kernel refuses.
                let result = unsafe { libc::syscall(number, a, b, c, -1_i64, -1_i64, -1_i64) };
                let errno = if result < 0 { nix::errno::Errno::last_raw() } else { 0 };
                // SAFETY: ends the child, or the one that a clone(2) made.
                unsafe { libc::_exit(errno) };
            }
            pid => match waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap() {
                WaitStatus::Exited(_, code) => code,
                WaitStatus::Signaled(_, signal, _) => -(signal as i32),
                other => panic!("{other:?}"),
            },
        }
    }
    const NOWHERE: [c_long; 3] = [-1, -1, -1];

    #[test]
    fn each_refused_call_fails_and_would_have_reached_the_kernel() {
        let filter = program(Sandbox::Ours, Sockets::Unix).unwrap();
        for call in REFUSED.iter().copied().flatten() {
            assert_eq!(outcome(Some(&filter), *call, NOWHERE), libc::EPERM, "system call {call}");
            if rustix::process::geteuid().is_root() {
                // Root's own mistake is another: so it is the filter that refuses. (Calls that are gone, or need what this kernel lacks, say so.)
                assert_ne!(outcome(None, *call, NOWHERE), libc::EPERM, "system call {call}");
            }
        }
    }

    #[test]
    fn no_namespace_can_be_made_and_threads_can() {
        let ours = program(Sandbox::Ours, Sockets::Unix).unwrap();
        for flag in NAMESPACES {
            let flags = [c_long::from(flag), 0, 0];
            assert_eq!(outcome(Some(&ours), libc::SYS_unshare, flags), libc::EPERM, "{flag:#x}");
            assert_eq!(outcome(Some(&ours), libc::SYS_clone, [c_long::from(flag | libc::SIGCHLD), 0, 0]), libc::EPERM, "{flag:#x}");
        }
        assert_eq!(outcome(Some(&ours), libc::SYS_unshare, [CLONE_NEWTIME.into(), 0, 0]), libc::EPERM);
        assert_eq!(outcome(Some(&ours), libc::SYS_unshare, [libc::CLONE_FS.into(), 0, 0]), 0, "virtiofsd's threads do this");
        assert_eq!(outcome(Some(&ours), libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0]), 0);
        assert_eq!(outcome(Some(&ours), libc::SYS_clone3, NOWHERE), libc::ENOSYS);
    }

    #[test]
    fn a_program_that_would_wall_itself_in_is_told_that_it_has_and_nothing_is_done() {
        let filter = program(Sandbox::Pretended, Sockets::Unix).unwrap();
        for call in WALLS {
            // Its arguments are wrong: the kernel would have said so.
            assert_eq!(outcome(Some(&filter), call, NOWHERE), 0, "system call {call}");
            assert_ne!(outcome(None, call, NOWHERE), 0, "system call {call}");
        }
        assert_eq!(outcome(Some(&filter), libc::SYS_clone3, NOWHERE), libc::ENOSYS);
        for (call, first) in [(libc::SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD), (libc::SYS_setns, -1), (libc::SYS_chroot, -1), (libc::SYS_fsopen, -1)] {
            assert_eq!(outcome(Some(&filter), call, [first.into(), -1, -1]), libc::EPERM, "system call {call}");
        }
    }

    #[test]
    fn only_the_families_of_the_network_that_was_given_have_sockets() {
        let stream = c_long::from(libc::SOCK_STREAM);
        for (sockets, open) in [
            (Sockets::Unix, &[libc::AF_UNIX][..]),
            (Sockets::Internet, &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6]),
            (Sockets::InternetAndRoutes, &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK]),
        ] {
            let filter = program(Sandbox::Ours, sockets).unwrap();
            for family in 0..=45 {
                let refused = outcome(Some(&filter), libc::SYS_socket, [family.into(), stream, 0]) == libc::EPERM;
                assert_eq!(refused, !open.contains(&family), "{sockets:?}, family {family}");
            }
        }
    }

    #[test]
    fn who_moves_a_taps_frames_can_not_make_it_another_tap() {
        let filter = program(Sandbox::Ours, Sockets::Unix).unwrap();
        for request in TAP_OWNERS {
            assert_eq!(outcome(Some(&filter), libc::SYS_ioctl, [-1, request.into(), 0]), libc::EPERM, "{request:#x}");
        }
        // What QEMU needs: TUNGETIFF and TUNSETOFFLOAD; VFIO_DEVICE_SET_IRQS, _BIND_IOMMUFD and _ATTACH_IOMMUFD_PT; IOMMU_IOAS_ALLOC and _MAP.
        for request in [0x8004_54d2_i64, 0x4004_54d0, 0x3b6e, 0x3b76, 0x3b77, 0x3b81, 0x3b85] {
            assert_eq!(outcome(Some(&filter), libc::SYS_ioctl, [-1, request, 0]), libc::EBADF, "{request:#x}");
        }
    }

    #[test]
    fn another_architectures_numbers_end_the_program() {
        let filter = program(Sandbox::Ours, Sockets::Unix).unwrap();
        assert_eq!(outcome(Some(&filter), 0x4000_0000 | libc::SYS_getpid, NOWHERE), -libc::SIGSYS);
        assert_eq!(outcome(Some(&filter), libc::SYS_personality, [0, 0, 0]), 0);
        assert_eq!(outcome(Some(&filter), libc::SYS_personality, [0x0040_0000, 0, 0]), libc::EPERM, "READ_IMPLIES_EXEC");
    }
}
