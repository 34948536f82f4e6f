//! As many VMs as a host has: adoption, the inventory's pages, and what each costs the supervisor.

use diarch_ipc::name::Slot;
use diarch_ipc::operation::{Inventory, Reply, Request, SlotState, VmRecord};
use diarch_tests::host::{Host, Session, assert_same, rss_kib};
use diarch_tests::need;
use diarch_tests::stand_in::Unit;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const VMS: u16 = 200;

fn every_page(session: &Session) -> (Vec<VmRecord>, usize) {
    let (mut all, mut pages, mut after): (Vec<VmRecord>, usize, Option<Slot>) = (Vec::new(), 0, None);
    loop {
        let Ok((Reply::HostInventory(page), _)) = session.ask(Request::HostInventory(Inventory { after }), Vec::new()) else { panic!("host.inventory") };
        assert_eq!(page.vms_total, u32::from(VMS));
        pages += 1;
        after = page.vms.last().map(|vm| vm.slot);
        all.extend(page.vms);
        if !page.more {
            return (all, pages);
        }
    }
}

#[test]
fn two_hundred_vms_are_found_again_by_a_new_supervisor_and_cost_little() {
    need!(Root, Kernel(6, 5));
    let mut builder = Host::builder().without_worker();
    builder.vms_max = VMS;
    let host = builder.start();
    let empty = host.inventory();
    let session = host.session();
    session.inventory();
    let alone = rss_kib(host.supervisor_pid());

    let started = Instant::now();
    let mut pids = BTreeSet::new();
    for n in 0..VMS {
        let claimed = session.claim(&format!("vm-{n}"));
        pids.insert(session.spawn(&host, claimed.tenancy, "").0.pid);
    }
    eprintln!("{VMS} VMs claimed and spawned in {:?}", started.elapsed());
    assert_eq!(pids.len(), usize::from(VMS));
    let (vms, pages) = every_page(&session);
    assert_eq!((vms.len(), pages), (usize::from(VMS), 3));
    let spawned = rss_kib(host.supervisor_pid());

    let took = host.manager().kill_and_wait(Unit::Supervisor);
    let (vms, _) = every_page(&session);
    assert!(vms.iter().all(|vm| vm.adopted && vm.state == SlotState::Running));
    assert_eq!(vms.iter().filter_map(|vm| vm.pid).collect::<BTreeSet<_>>(), pids);
    let adopted = rss_kib(host.supervisor_pid());
    eprintln!("adopted after {took:?}; the supervisor's memory: {alone} KiB alone, {spawned} KiB with {VMS} VMs, {adopted} KiB after adopting them");
    // The bound for a release build; a debug build's data is the same.
    for now in [spawned, adopted] {
        assert!(now.saturating_sub(alone) <= 64 * u64::from(VMS), "{} KiB a VM", now.saturating_sub(alone) / u64::from(VMS));
    }

    for vm in vms {
        assert!(session.release(vm.tenancy()).existed);
    }
    assert!(host.qemus().is_empty() && host.ledger().is_empty());
    drop(session);
    std::thread::sleep(Duration::from_millis(50));
    assert_same(&empty, &host);
}
