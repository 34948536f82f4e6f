//! Defects that a hostile review found, one test each: every one of them fails when its mend is taken out.

use diarch_ipc::Error;
use diarch_ipc::frame::{Call, ClientFrame, Outcome, ServerFrame};
use diarch_ipc::name::{Label, QemuName, RequestId, Slot, Tenancy};
use diarch_ipc::operation::{Claim, Event, Inventory, Release, Reply, Request, Signal, SignalKind, SlotState, Spawn};
use diarch_ipc::spec::{Boot, Disk, DiskAccess, DiskFormat, Presence};
use diarch_tests::host::{Host, WORKER, descriptors, stub_vm};
use diarch_tests::need;
use diarch_tests::stand_in::{Ask, Unit, UnitState};
use diarch_tests::stepper::{Outcome as Stepped, kill_at_syscall, kill_when_forked};
use diarch_tests::wire::{Raw, Received};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, Instant};

/// Tests ask faster than any honest worker.
const NO_LIMITS: &str = "[limits]\nread_per_second = 100000\nread_burst = 100000\nensure_per_second = 100000\nensure_burst = 100000\n\
                         once_per_second = 100000\nonce_burst = 100000\n";

fn label(text: &str) -> Label {
    Label::new(text).unwrap()
}

fn borrowed(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

fn eventually(what: &str, within: Duration, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < within, "not within {within:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn claim(raw: &mut Raw, name: &str) -> Tenancy {
    match raw.ask(Request::VmClaim(Claim { label: label(name) }), &[]) {
        Ok((Outcome::Ok(Reply::VmClaim(claimed)), _)) => claimed.tenancy,
        other => panic!("vm.claim: {other:?}"),
    }
}

fn spawn(host: &Host, raw: &mut Raw, slot: Tenancy, words: &str) -> Outcome {
    let (spec, fds) = host.spec(words);
    raw.ask(Request::VmSpawn(Spawn { tenancy: slot, spec }), &borrowed(&fds)).unwrap().0
}

/// The pid of a stub that was started in the slot.
fn spawned(host: &Host, raw: &mut Raw, slot: Tenancy, words: &str) -> u32 {
    match spawn(host, raw, slot, words) {
        Outcome::Ok(Reply::VmSpawn(spawned)) => spawned.pid,
        other => panic!("vm.spawn: {other:?}"),
    }
}

fn released(raw: &mut Raw, slot: Tenancy) {
    let (outcome, _) = raw.ask(Request::VmRelease(Release { tenancy: slot }), &[]).unwrap();
    assert!(matches!(outcome, Outcome::Ok(Reply::VmRelease(_))), "{outcome:?}");
}

/// Whether a thread of the process runs, whatever its first thread does and whatever it calls itself.
fn lives(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|task| std::fs::read(task.path().join("stat")).ok()).any(|stat| {
        let behind = stat.iter().rposition(|byte| *byte == b')').map(|at| at + 2);
        behind.and_then(|at| stat.get(at)).is_some_and(|state| !matches!(state, b'Z' | b'X'))
    })
}

// ---- the supervisor's start ----

/// Kills a starting supervisor at its `first`, `first + every` ... system call, and looks each time at what the next one finds.
fn start_killed_from(first: u64, every: u64) -> u64 {
    let mut builder = Host::builder().without_worker().grants(NO_LIMITS);
    // It waits for the stepper before it does anything of its own.
    builder.prelude = Some("if [ -e \"$host/gate\" ]; then kill -STOP $$; fi".into());
    let host = builder.start();
    let manager = host.manager();
    let mut raw = host.raw();
    let (running, also, mut claimed) = (claim(&mut raw, "running"), claim(&mut raw, "also"), claim(&mut raw, "claimed"));
    let mut pids = [spawned(&host, &mut raw, running, ""), spawned(&host, &mut raw, also, "")].map(u32::cast_signed);
    pids.sort_unstable();
    drop(raw);
    let mut n = first;
    loop {
        let before = manager.unit(Unit::Supervisor);
        std::fs::write(host.path("gate"), "").unwrap();
        // Written anew at every start, as after a start that did not come to it.
        std::fs::remove_file(host.path("run/vm/.boot_id")).unwrap();
        manager.ask(&Ask::Kill(Unit::Supervisor, 9)).unwrap();
        let mut pid = 0;
        eventually("the next one waits at the gate", Duration::from_secs(5), || {
            pid = manager.unit(Unit::Supervisor).pid.unwrap_or_default();
            Some(pid) != before.pid && std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") T "))
        });
        std::fs::remove_file(host.path("gate")).unwrap();
        let (outcome, _) = kill_at_syscall(pid, n, || {
            rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::CONT).unwrap();
            manager.wait_ready(Unit::Supervisor, before.starts, Duration::from_secs(10))
        })
        .unwrap();

        let what = format!("killed at system call {n} of its start ({outcome:?})");
        let mut raw = host.raw();
        let (answer, _) = raw.ask(Request::HostInventory(Inventory { after: None }), &[]).unwrap();
        let Outcome::Ok(Reply::HostInventory(inventory)) = answer else { panic!("{what}: {answer:?}") };
        let found: Vec<_> = inventory.vms.iter().map(|vm| (vm.tenancy(), vm.state)).collect();
        let wanted = [(running, SlotState::Running), (also, SlotState::Running), (claimed, SlotState::Claimed)];
        assert_eq!(found, wanted, "{what}");
        let mut named: Vec<i32> = inventory.vms.iter().filter_map(|vm| vm.pid).map(u32::cast_signed).collect();
        named.sort_unstable();
        assert_eq!(named, pids, "{what}");
        assert_eq!(host.ledger().values().filter_map(|record| record["state"].as_str()).count(), 3, "{what}: {:?}", host.ledger());
        let mut processes: Vec<i32> = manager.processes().into_iter().map(|process| process.pid).filter(|pid| *pid != host.supervisor_pid()).collect();
        processes.sort_unstable();
        assert_eq!(processes, pids, "{what}: a process is left, or one is gone");
        // What it adopted and what it only read can both be given back, and the number is free again.
        released(&mut raw, claimed);
        let again = claim(&mut raw, "claimed");
        assert_eq!(again.slot, claimed.slot, "{what}");
        claimed = again;
        match outcome {
            Stepped::Killed { .. } => n += every,
            Stepped::Survived { syscalls } => {
                released(&mut raw, running);
                released(&mut raw, also);
                released(&mut raw, claimed);
                assert!(host.qemus().is_empty() && host.ledger().is_empty());
                return syscalls;
            }
            Stepped::Ended { .. } => panic!("{what}: it ended by itself"),
        }
    }
}

#[test]
fn a_supervisor_killed_at_every_step_of_its_start_forgets_no_vm() {
    need!(Root, Kernel(6, 5));
    let started = Instant::now();
    // Two hosts, each with every second step: one alone would mostly wait.
    let syscalls = std::thread::scope(|scope| [1, 2].map(|first| scope.spawn(move || start_killed_from(first, 2))).map(|half| half.join().unwrap()));
    eprintln!("a start: killed at each of {syscalls:?} system calls, {:?} in all", started.elapsed());
    assert!(syscalls.iter().all(|count| *count > 50), "{syscalls:?}: too few for a start");
}

// ---- what a QEMU can do to its own name and state ----

fn adopted_though(words: &str) {
    let host = Host::builder().without_worker().start();
    let mut raw = host.raw();
    let slot = claim(&mut raw, "disguised");
    let pid = spawned(&host, &mut raw, slot, words);
    let shows = |stat: &[u8]| stat.contains(&0xff) || stat.windows(4).any(|part| part == b") Z ");
    eventually("the stub shows what it was told to", Duration::from_secs(2), || std::fs::read(format!("/proc/{pid}/stat")).is_ok_and(|stat| shows(&stat)));
    assert!(lives(pid));
    let before = host.owned();
    host.manager().kill_and_wait(Unit::Supervisor);
    let now = host.owned();
    let found: Vec<_> = now.vms.iter().map(|vm| (vm.tenancy(), vm.state, vm.pid, vm.adopted)).collect();
    assert_eq!(found, [(slot, SlotState::Running, Some(pid), true)]);
    assert_eq!(now.limits.memory_mib_used, before.limits.memory_mib_used, "its memory stays its own");
    let mut raw = host.raw();
    assert_ne!(claim(&mut raw, "another").slot, slot.slot, "its slot stays its own");
    assert!(lives(pid));
    released(&mut raw, slot);
    assert!(!lives(pid), "vm.release answered, and it lives");
    assert_eq!(claim(&mut raw, "next").slot, slot.slot);
}

#[test]
fn a_qemu_whose_name_is_not_utf_8_is_adopted_and_ended_by_its_release() {
    need!(Root, Kernel(6, 5));
    adopted_though("stub.name-bytes");
}

#[test]
fn a_qemu_whose_first_thread_has_ended_is_adopted_and_ended_by_its_release() {
    need!(Root, Kernel(6, 5));
    adopted_though("stub.leader-exits");
}

// ---- two forks ----

/// Two spawns, asked for at one time; the answers, or the end of the connection.
fn two_spawns(host: &Host, raw: &mut Raw, slots: [Tenancy; 2]) {
    let calls = slots.map(|slot| {
        let (spec, fds) = host.spec("");
        (Call { id: raw.next_id(), deadline_ms: 5000, request: Request::VmSpawn(Spawn { tenancy: slot, spec }) }, fds)
    });
    for (call, fds) in &calls {
        let _ = raw.send_frame(&ClientFrame::Call(call.clone()), &borrowed(fds));
    }
    for (call, _) in &calls {
        let _ = raw.answer(call.id, Duration::from_secs(5));
    }
}

/// After a kill: waits for the next supervisor, and for the end of every process that runs the supervisor's program beside it. (By the program: a child
/// at its gate has the name of the thread that made it.)
fn no_child_at_its_gate(host: &Host, starts: u64, what: &str) {
    host.manager().wait_ready(Unit::Supervisor, starts, Duration::from_secs(10));
    let supervisor = host.supervisor_pid();
    let mut beside = Vec::new();
    eventually(&format!("no child at its gate, {what}"), Duration::from_secs(2), || {
        beside = host.manager().processes();
        beside.retain(|process| process.pid != supervisor && program(process.pid).is_some_and(|name| name.contains("diarch-supervisor")));
        beside.is_empty()
    });
}

#[test]
fn two_children_whose_forks_met_both_go_when_the_supervisor_is_killed() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().without_worker().grants(NO_LIMITS).start();
    for _ in 0..3 {
        let mut raw = host.raw();
        let slots = [claim(&mut raw, "one"), claim(&mut raw, "two")];
        let before = host.manager().unit(Unit::Supervisor);
        let (outcome, ()) = kill_when_forked(before.pid.unwrap(), 2, || two_spawns(&host, &mut raw, slots)).unwrap();
        assert!(matches!(outcome, Stepped::Killed { .. }), "{outcome:?}");
        no_child_at_its_gate(&host, before.starts, "after a kill with both gates closed");
        assert!(host.qemus().is_empty(), "no gate was open");
        let mut raw = host.raw();
        for slot in slots {
            released(&mut raw, slot);
        }
    }
}

#[test]
fn two_spawns_at_once_killed_at_many_steps_leave_no_child_at_its_gate() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().without_worker().grants(NO_LIMITS).start();
    let mut killed = 0;
    for n in (20..).step_by(3) {
        let mut raw = host.raw();
        let slots = [claim(&mut raw, "one"), claim(&mut raw, "two")];
        let before = host.manager().unit(Unit::Supervisor);
        let (outcome, ()) = kill_at_syscall(before.pid.unwrap(), n, || two_spawns(&host, &mut raw, slots)).unwrap();
        let was_killed = matches!(outcome, Stepped::Killed { .. });
        no_child_at_its_gate(&host, before.starts - u64::from(!was_killed), &format!("after a kill at step {n} ({outcome:?})"));
        let mut raw = host.raw();
        for slot in slots {
            released(&mut raw, slot);
        }
        assert!(host.qemus().is_empty());
        if !was_killed {
            break;
        }
        killed += 1;
    }
    eprintln!("two spawns at once: killed at {killed} steps");
    assert!(killed > 20, "{killed}");
}

/// The file name of what a process runs.
fn program(pid: i32) -> Option<String> {
    Some(std::fs::read_link(format!("/proc/{pid}/exe")).ok()?.file_name()?.to_string_lossy().into_owned())
}

// ---- bounded work ----

#[test]
fn four_hundred_spawns_that_nobody_waits_for_hold_no_descriptors_and_no_release_up() {
    need!(Root, Kernel(6, 5));
    // Its hash is never right, and takes a while to be wrong.
    let dir = tempfile::Builder::new().prefix("diarch-large-").tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let large = dir.path().join("large-qemu");
    std::fs::File::create(&large).unwrap().set_len(64 << 20).unwrap();
    std::fs::set_permissions(&large, std::fs::Permissions::from_mode(0o755)).unwrap();
    let more = format!("[qemu.large]\npath = {large:?}\nsha256 = \"{}\"\n{NO_LIMITS}", "0".repeat(64));
    let host = Host::builder().without_worker().grants(&more).start();
    let mut raw = host.raw();
    let (slot, other) = (claim(&mut raw, "busy"), claim(&mut raw, "other"));
    let pid = spawned(&host, &mut raw, other, "");
    let (mut spec, fds) = host.spec("");
    spec.qemu = QemuName::new("large").unwrap();
    let supervisor = host.supervisor_pid();
    let mut most = 0;
    for at in 0..450 {
        let request = Request::VmSpawn(Spawn { tenancy: slot, spec: spec.clone() });
        let call = Call { id: raw.next_id(), deadline_ms: 0, request };
        raw.send_frame(&ClientFrame::Call(call), &borrowed(&fds)).unwrap();
        while let Received::Frame(..) = raw.receive(Duration::ZERO) {}
        if at % 16 == 0 {
            most = most.max(descriptors(supervisor).values().sum::<usize>());
        }
    }
    let asked = Instant::now();
    released(&mut raw, other);
    let took = asked.elapsed();
    most = most.max(descriptors(supervisor).values().sum::<usize>());
    eprintln!("450 spawns: at most {most} descriptors; a release beside them took {took:?}");
    assert!(most < 420, "{most} descriptors");
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert!(!lives(pid));
}

// ---- standard error is gone ----

#[test]
fn a_supervisor_whose_standard_error_is_a_closed_pipe_serves_and_ends_well() {
    need!(Root, Kernel(6, 5));
    let mut builder = Host::builder().without_worker();
    builder.prelude = Some("mkfifo \"$host/pipe-$$\"\nexec 8<>\"$host/pipe-$$\" 2>\"$host/pipe-$$\"\nexec 8<&-".into());
    let host = builder.start();
    let pipe = std::fs::read_link(format!("/proc/{}/fd/2", host.supervisor_pid())).unwrap();
    assert!(pipe.to_string_lossy().contains("/pipe-"), "{}", pipe.display());
    let starts = host.manager().unit(Unit::Supervisor).starts;
    let mut raw = host.raw();
    let slot = claim(&mut raw, "a");
    spawned(&host, &mut raw, slot, "");
    drop(raw);
    // A worker that comes and goes, and one that is refused: each is a line in the log.
    let refused = Raw::connect_as(&host.socket(), WORKER).unwrap();
    refused.send(&[0xc1], &[]).unwrap();
    let _ = refused.wait_closed(Duration::from_secs(2)).unwrap();
    released(&mut host.raw(), slot);
    assert!(host.qemus().is_empty());
    host.manager().ask(&Ask::Stop(Unit::Supervisor)).unwrap();
    let now = host.manager().unit(Unit::Supervisor);
    assert_eq!((now.state, now.starts), (UnitState::Stopped, starts));
    assert_eq!(now.last_death.unwrap().how, "exit 0");
}

// ---- a full /run ----

/// Takes every byte that is left.
fn fill(directory: &Path, name: &str) {
    use std::io::Write;
    let mut file = std::fs::File::create(directory.join(name)).unwrap();
    let ended = (0..1 << 20).find_map(|_| file.write_all(&[0; 1024]).err()).expect("it is never full");
    assert_eq!(ended.kind(), std::io::ErrorKind::StorageFull, "{ended}");
}

#[test]
fn a_full_run_directory_closes_grants_and_leaves_release_and_kill_open_also_after_a_restart() {
    need!(Root, Kernel(6, 5));
    let mut builder = Host::builder().without_worker();
    builder.run_tmpfs_kib = Some(256);
    let host = builder.start();
    let run = host.inside("run");
    let mut raw = host.raw();
    let slots = ["free", "signalled", "released", "kept"].map(|name| claim(&mut raw, name));
    let [free, signalled, gone, kept] = slots;
    let pids = [signalled, gone, kept].map(|slot| spawned(&host, &mut raw, slot, ""));

    fill(&run, "fill-1");
    let refused = spawn(&host, &mut raw, free, "");
    assert!(matches!(&refused, Outcome::Error(Error::Failed { step, .. }) if step.contains("ledger")), "{refused:?}");
    let state = |slot: Tenancy| host.owned().vms.into_iter().find(|vm| vm.tenancy() == slot).map(|vm| vm.state);
    assert_eq!(state(free), Some(SlotState::Claimed));
    let mut raw = host.raw();
    let (killed, _) = raw.ask(Request::VmSignal(Signal { tenancy: signalled, signal: SignalKind::Kill }), &[]).unwrap();
    assert!(matches!(killed, Outcome::Ok(_)), "{killed:?}");
    eventually("it ends", Duration::from_secs(2), || !lives(pids[0]));
    eventually("its slot says so", Duration::from_secs(2), || state(signalled) == Some(SlotState::Exited));
    let mut raw = host.raw();
    released(&mut raw, gone);
    assert!(!lives(pids[1]));

    // What could not be written down is found out again, with no more room than before.
    fill(&run, "fill-2");
    host.manager().kill_and_wait(Unit::Supervisor);
    let found: Vec<_> = host.owned().vms.into_iter().map(|vm| (vm.tenancy(), vm.state)).collect();
    assert_eq!(found, [(free, SlotState::Claimed), (signalled, SlotState::Exited), (kept, SlotState::Running)]);
    assert!(lives(pids[2]));
    let mut raw = host.raw();
    released(&mut raw, kept);
    assert!(!lives(pids[2]));

    for name in ["fill-1", "fill-2"] {
        std::fs::remove_file(run.join(name)).unwrap();
    }
    let again = claim(&mut raw, "again");
    spawned(&host, &mut raw, again, "");
    spawned(&host, &mut raw, free, "");
    for slot in [again, free, signalled] {
        released(&mut raw, slot);
    }
    assert!(host.qemus().is_empty() && host.ledger().is_empty());
}

// ---- a replaced worker ----

#[test]
fn a_replaced_worker_is_told_once_and_takes_nothing_from_its_successor() {
    need!(Root, Kernel(6, 5));
    let limits = "[limits]\nread_per_second = 1\nread_burst = 5\nensure_per_second = 1\nensure_burst = 5\n";
    let host = Host::builder().without_worker().grants(limits).start();
    let inventory = || Request::HostInventory(Inventory { after: None });
    let release = || Request::VmRelease(Release { tenancy: Tenancy { slot: Slot::new(0).unwrap(), claim: RequestId { session: 1, serial: 1 } } });
    let mut olds: Vec<Raw> = (0..3).map(|_| host.raw()).collect();
    let mut new = host.raw();
    for old in &mut olds {
        for _ in 0..50 {
            for request in [inventory(), release()] {
                let id = old.next_id();
                // Closed already: then there is no more to be sent.
                let _ = old.send_frame(&ClientFrame::Call(Call { id, deadline_ms: 1000, request }), &[]);
            }
        }
        let frames = old.wait_closed(Duration::from_secs(3)).unwrap();
        let mut answers = Vec::new();
        for frame in frames {
            match frame {
                ServerFrame::Answer(answer) => answers.push(answer.outcome),
                ServerFrame::Event(Event::SessionSuperseded {}) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(answers, [Outcome::Error(Error::Superseded)], "told once, and gone");
    }
    for _ in 0..4 {
        for request in [inventory(), release()] {
            let (answer, _) = new.ask(request, &[]).unwrap();
            assert!(matches!(answer, Outcome::Ok(_)), "{answer:?}");
        }
    }
}

// ---- files that QEMU would open by another way ----

#[test]
fn a_qcow2_image_whose_data_is_in_another_file_is_refused_and_starts_nothing() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let mut raw = host.raw();
    let slot = claim(&mut raw, "a");
    let image = host.path("files/disk.qcow2");
    let mut ask = |features: u8| {
        // Version 3; bit 2 of the incompatible features: an external data file (QEMU, docs/interop/qcow2.txt).
        let mut header = vec![0u8; 512];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        header[79] = features;
        std::fs::write(&image, header).unwrap();
        let (mut spec, mut fds) = host.spec("");
        fds.truncate(2);
        spec.boot = Boot::Disk { firmware: Presence::Absent };
        spec.disks = vec![Disk { format: DiskFormat::Qcow2, access: DiskAccess::ReadOnly }];
        fds.push(std::fs::File::open(&image).unwrap().into());
        raw.ask(Request::VmSpawn(Spawn { tenancy: slot, spec }), &borrowed(&fds)).unwrap().0
    };
    let refused = ask(4);
    assert!(matches!(&refused, Outcome::Error(Error::Invalid { field, reason }) if field.contains("disk") && reason.contains("another file")), "{refused:?}");
    assert!(host.qemus().is_empty());
    let accepted = ask(0);
    assert!(matches!(accepted, Outcome::Ok(_)), "{accepted:?}");
}

#[test]
fn a_kernel_that_only_the_worker_may_read_is_refused_by_the_supervisor_and_copied_by_the_worker() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().start();
    let kernel = host.path("files/private-kernel");
    std::fs::write(&kernel, "for the worker's eyes only\n").unwrap();
    chown(&kernel, Some(WORKER.uid), Some(WORKER.gid)).unwrap();
    std::fs::set_permissions(&kernel, std::fs::Permissions::from_mode(0o600)).unwrap();

    // As it is: `write_vm` would make a copy that everybody may read.
    host.write_vm_text("one.json", &stub_vm("one", &kernel, "").to_string());
    let vm = host.wait_healthy("one", Duration::from_secs(10));
    let copy = descriptors(vm.pid.unwrap().cast_signed());
    assert!(copy.keys().any(|target| target.starts_with("/memfd:kernel")) && !copy.keys().any(|target| target.contains("private-kernel")), "{copy:?}");
    host.manager().ask(&Ask::Stop(Unit::Worker)).unwrap();

    let mut raw = host.raw();
    let slot = claim(&mut raw, "direct");
    let (spec, mut fds) = host.spec("");
    fds[2] = std::fs::File::open(&kernel).unwrap().into();
    let id = RequestId { session: 7, serial: 1 };
    let (refused, _) = raw.ask_as(id, Request::VmSpawn(Spawn { tenancy: slot, spec }), &borrowed(&fds)).unwrap();
    assert!(
        matches!(&refused, Outcome::Error(Error::Invalid { field, reason }) if field.contains("kernel") && reason.contains("world-readable")),
        "{refused:?}"
    );
    assert_eq!(host.qemus(), [vm.pid.unwrap().cast_signed()]);
}

// ---- a request that is repeated after its VM has gone ----

#[test]
fn a_request_that_comes_late_does_not_reach_the_next_vm_in_its_slot() {
    need!(Root, Kernel(6, 5));
    let host = Host::builder().without_worker().grants(NO_LIMITS).start();
    let mut raw = host.raw();
    let gone = claim(&mut raw, "gone");
    released(&mut raw, gone);
    let next = claim(&mut raw, "next");
    assert_eq!(next.slot, gone.slot, "the number is given again");
    spawned(&host, &mut raw, next, "");
    // As a client does that lost the connection with an answer under way, and meets a supervisor that has done more since.
    let (outcome, _) = raw.ask(Request::VmRelease(Release { tenancy: gone }), &[]).unwrap();
    assert!(matches!(&outcome, Outcome::Ok(Reply::VmRelease(released)) if !released.existed), "{outcome:?}");
    let (spec, fds) = host.spec("");
    let late = [
        (Request::VmSignal(Signal { tenancy: gone, signal: SignalKind::Kill }), Vec::new()),
        (Request::VmAttach(diarch_ipc::operation::Attach { tenancy: gone }), Vec::new()),
        (Request::VmConsole(diarch_ipc::operation::Console { tenancy: gone }), Vec::new()),
        (Request::VmSpawn(Spawn { tenancy: gone, spec }), fds),
    ];
    for (request, fds) in late {
        let name = request.operation().name;
        let (outcome, _) = raw.ask(request, &borrowed(&fds)).unwrap();
        assert!(matches!(&outcome, Outcome::Error(error) if error.kind() == "not-found"), "{name}: {outcome:?}");
    }
    let (outcome, _) = raw.ask(Request::HostInventory(Inventory { after: None }), &[]).unwrap();
    let Outcome::Ok(Reply::HostInventory(inventory)) = outcome else { panic!("{outcome:?}") };
    let found: Vec<_> = inventory.vms.iter().map(|vm| (vm.tenancy(), vm.state)).collect();
    assert_eq!(found, [(next, SlotState::Running)]);
    released(&mut raw, next);
}
