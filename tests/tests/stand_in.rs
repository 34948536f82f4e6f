//! The stand-in itself, with the real supervisor under it: what systemd would do, and no more.

use diarch_tests::host::{Activation, Host, STRANGER, WORKER};
use diarch_tests::need;
use diarch_tests::stand_in::{Ask, StartLimit, Told, Unit, UnitState, ask};
use diarch_tests::wire::as_user;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

#[test]
fn the_workers_user_may_restart_the_supervisor_and_ask_nothing_else() {
    need!(Root, Kernel(6, 5));
    // With a worker configured that never starts: its user is what counts.
    let host = Host::supervisor_only();
    let control = host.manager().control().to_owned();
    let told = |user, what: Ask| as_user(user, || ask(&control, &what)).unwrap();
    let before = host.manager().unit(Unit::Supervisor);
    assert!(matches!(told(WORKER, Ask::Restart(Unit::Supervisor)), Told::Ok));
    let after = host.manager().unit(Unit::Supervisor);
    assert_eq!((after.state, after.starts), (UnitState::Ready, before.starts + 1));
    assert_ne!(after.pid, before.pid);
    for what in
        [Ask::Status, Ask::Shutdown, Ask::Stop(Unit::Supervisor), Ask::Start(Unit::Supervisor), Ask::Restart(Unit::Worker), Ask::Kill(Unit::Supervisor, 9)]
    {
        let answer = told(WORKER, what.clone());
        assert!(matches!(&answer, Told::Error(why) if why.contains("denied")), "{what:?}: {answer:?}");
    }
    assert_eq!(host.manager().unit(Unit::Supervisor).starts, after.starts);
    assert!(host.shutdown().is_empty());
}

#[test]
fn the_socket_is_open_to_the_workers_group_and_to_nobody_else() {
    need!(Root, Kernel(6, 5));
    for activation in [Activation::Socket, Activation::Own] {
        let mut builder = Host::builder().without_worker();
        builder.activation = activation;
        let host = builder.start();
        let meta = std::fs::metadata(host.socket()).unwrap();
        assert_eq!((meta.permissions().mode() & 0o777, meta.uid(), meta.gid()), (0o660, 0, WORKER.gid), "{activation:?}");
        diarch_tests::wire::connect_as(&host.socket(), WORKER).unwrap();
        let refused = diarch_tests::wire::connect_as(&host.socket(), STRANGER).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied, "{activation:?}");
    }
}

#[test]
fn a_unit_that_dies_too_often_is_failed_until_somebody_asks() {
    need!(Root, Kernel(6, 5));
    let mut builder = Host::builder().without_worker();
    builder.start_limit = StartLimit { count: 3, within_ms: 10_000 };
    let host = builder.start();
    let manager = host.manager();
    for _ in 0..2 {
        manager.kill_and_wait(Unit::Supervisor);
    }
    manager.ask(&Ask::Kill(Unit::Supervisor, 9)).unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    while manager.unit(Unit::Supervisor).state != UnitState::Failed {
        assert!(Instant::now() < until, "{:?}", manager.unit(Unit::Supervisor));
        std::thread::sleep(Duration::from_millis(5));
    }
    manager.ask(&Ask::Start(Unit::Supervisor)).unwrap();
    assert_eq!(manager.unit(Unit::Supervisor).state, UnitState::Ready);
}

#[test]
fn a_vm_whose_supervisor_died_is_ended_with_the_host_and_named() {
    need!(Root, Kernel(6, 5));
    let host = Host::supervisor_only();
    let session = host.session();
    let slot = session.claim("orphan").tenancy;
    session.spawn(&host, slot, "");
    host.manager().ask(&Ask::Hold(Unit::Supervisor)).unwrap();
    host.manager().ask(&Ask::Kill(Unit::Supervisor, 9)).unwrap();
    drop(session);
    let qemu = host.qemus();
    assert_eq!(qemu.len(), 1);
    let left = host.shutdown();
    assert_eq!(left.iter().map(|l| l.pid).collect::<Vec<_>>(), qemu);
    assert!(!std::path::Path::new(&format!("/proc/{}", qemu[0])).exists());
}

#[test]
fn a_host_that_is_left_running_ends_when_it_is_asked_to_and_removes_its_directory() {
    need!(Root, Kernel(6, 5));
    let mut builder = Host::builder().without_worker();
    builder.lives_on = true;
    let host = builder.start();
    let session = host.session();
    let slot = session.claim("stays").tenancy;
    session.spawn(&host, slot, "");
    drop(session);
    let (directory, qemus, supervisor) = (host.path(""), host.qemus(), host.supervisor_pid());
    let control = host.leave_running();
    let lives = |pid: i32| std::path::Path::new(&format!("/proc/{pid}")).exists();
    assert!(lives(supervisor) && lives(qemus[0]));
    let Told::Ended { left } = ask(&control, &Ask::Shutdown).unwrap() else { panic!("not ended") };
    assert_eq!(left.iter().map(|l| l.pid).collect::<Vec<_>>(), qemus);
    assert!(!lives(supervisor) && !lives(qemus[0]) && !directory.exists());
}
