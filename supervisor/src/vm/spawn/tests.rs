use super::start::{Reach, reach};
use super::*;
use crate::ledger::Process;
use diarch_ipc::Request;
use diarch_ipc::name::{Cpus, Label, Mac, MiB, NetworkName, NicIndex, Port, Queues, Tenancy};
use diarch_ipc::operation::ExitStatus;
use diarch_ipc::spec::{Egress, MAX_DISKS, MAX_FORWARDS, MAX_NICS, VmSpec};

fn grants() -> Grants {
    toml::from_str(
        "[worker]\nuser = 64000\n[vms]\nmax = 4\nuid_first = 200000\nmemory_mib = 1024\ncpus_each = 2\n\
         [qemu.default]\npath = \"/usr/bin/qemu-system-x86_64\"\n[forwards]\nallow = [\"127.0.0.1:8000-8099\"]\n",
    )
    .unwrap()
}
fn id(serial: u64) -> RequestId {
    RequestId { session: 1, serial }
}
fn ask() -> Spawn {
    Request::examples()
        .into_iter()
        .find_map(|request| match request {
            // Of the VM in slot 0; see `record`.
            Request::VmSpawn(spawn) => Some(Spawn { tenancy: Tenancy { claim: id(0), ..spawn.tenancy }, spec: VmSpec { shares: Vec::new(), ..spawn.spec } }),
            _ => None,
        })
        .unwrap()
}
fn facts() -> Facts {
    Facts {
        program: File::open("/bin/true").unwrap(),
        hashed: None,
        fds: Received::new(Vec::new(), drop),
        libraries: Vec::new(),
        walls: jail::Walls::Jail,
        vhost: Vec::new(),
        devices: Vec::new(),
        descriptors: None,
        ability: None,
        lockable: None,
        staged: false,
        passt: passt::Facts::Unasked,
        virtiofsd: Vec::new(),
    }
}
fn record(slot: u64, label: &str, state: SlotState, run: Option<Run>) -> Record {
    let slot = Slot::new(slot).unwrap();
    Record {
        slot,
        label: Label::new(label).unwrap(),
        uid: 200_000 + u32::from(slot.get()),
        claim: id(slot.get().into()),
        state,
        run,
        resources: Default::default(),
    }
}
/// The forwards of the first card.
fn forwards(ask: &mut Spawn) -> &mut Vec<diarch_ipc::name::Forward> {
    match &mut ask.spec.nics[0].backend {
        Backend::User { forwards, .. } => forwards,
        Backend::Tap { .. } => panic!("the example has a card of user-mode networking"),
    }
}
fn slots(records: Vec<Record>) -> BTreeMap<Slot, Vm> {
    records.into_iter().map(|record| (record.slot, Vm::new(record))).collect()
}
fn claimed() -> BTreeMap<Slot, Vm> {
    slots(vec![record(0, "web", SlotState::Claimed, None)])
}
fn other(state: SlotState, memory: u64, port: u64) -> Record {
    let forward = forwards(&mut ask())[0];
    let run = Run {
        spawn: id(77),
        asked: String::new(),
        process: Some(Process { pid: 1, start_time: 1 }),
        spawned_ms: 1,
        cpus: Cpus::new(1).unwrap(),
        memory: MiB::new(memory).unwrap(),
        accelerator: Accelerator::Tcg,
        forwards: vec![diarch_ipc::name::Forward { host_port: Port::new(port).unwrap(), ..forward }],
        exit: (state == SlotState::Exited).then_some(ExitStatus::Code(0)),
        egress: None,
        companions: Vec::new(),
    };
    record(1, "other", state, Some(run))
}
fn judged(slots: &BTreeMap<Slot, Vm>, change: impl FnOnce(&mut Spawn)) -> Result<Vetted<Launch>, Error> {
    let mut ask = ask();
    change(&mut ask);
    vet(&grants(), slots, &KvmVerdict::NotGranted, id(5), &ask, facts())
}

#[test]
fn the_example_is_accepted_and_recorded_before_it_exists() {
    let launch = judged(&claimed(), |_| ()).unwrap();
    assert_eq!(launch.record.state, SlotState::Spawning);
    let run = launch.record.run.as_ref().unwrap();
    assert_eq!((run.spawn, run.process), (id(5), None));
    assert_eq!((launch.accelerator, reach(&launch, Carrier::Slirp)), (Accelerator::Tcg, Reach::Host), "its user-mode network is the host's");
    let alone = judged(&claimed(), |ask| ask.spec.nics.clear()).unwrap();
    assert_eq!(reach(&alone, Carrier::Slirp), Reach::Nowhere);
}

#[test]
fn each_refusal_names_the_grant() {
    let denied = |change: fn(&mut Spawn)| match judged(&claimed(), change).unwrap_err() {
        Error::Denied { grant, .. } => grant,
        other => panic!("{other}"),
    };
    assert_eq!(denied(|ask| ask.spec.cpus = Cpus::new(3).unwrap()), "vms.cpus_each");
    assert_eq!(denied(|ask| ask.spec.memory = MiB::new(2000).unwrap()), "vms.memory_mib");
    assert_eq!(denied(|ask| ask.spec.nics[0].backend = Backend::User { egress: Egress::Host, forwards: Vec::new() }), "forwards.egress");
    assert_eq!(denied(|ask| forwards(ask)[0].host_port = Port::new(22).unwrap()), "forwards.allow");
    assert_eq!(denied(|ask| ask.spec.accelerator = Accelerator::Kvm), "vms.kvm");
    assert_eq!(denied(|ask| ask.spec.qemu = diarch_ipc::name::QemuName::new("mine").unwrap()), "qemu.mine");
}

#[test]
fn memory_is_counted_over_all_that_run_and_not_over_what_ended() {
    let with = |state| {
        let mut all = claimed();
        all.extend(slots(vec![other(state, 900, 8090)]));
        judged(&all, |_| ())
    };
    for state in [SlotState::Running, SlotState::Spawning, SlotState::Releasing] {
        assert_eq!(with(state).unwrap_err().kind(), "exhausted");
    }
    with(SlotState::Exited).unwrap();
}

#[test]
fn a_port_that_another_vm_has_is_a_conflict_with_its_name() {
    let mut all = claimed();
    all.extend(slots(vec![other(SlotState::Running, 100, 8080)]));
    let Error::Conflict { holder, .. } = judged(&all, |_| ()).unwrap_err() else { panic!() };
    assert_eq!(holder, "VM other");
}

#[test]
fn a_port_that_is_published_for_another_vm_is_a_conflict_too() {
    let mut other = record(1, "other", SlotState::Claimed, None);
    let forward = forwards(&mut ask())[0];
    other.resources.published = vec![crate::ledger::Publication { nic: NicIndex::new(0).unwrap(), forwards: vec![forward] }];
    let mut all = claimed();
    all.extend(slots(vec![other]));
    let Error::Conflict { holder, reason } = judged(&all, |_| ()).unwrap_err() else { panic!() };
    assert!(holder == "VM other" && reason.contains("published"), "{reason}");
}

#[test]
fn a_card_on_a_tap_is_the_one_that_the_tap_was_opened_for() {
    let tap = |ask: &mut Spawn, mac: &str, queues: u64| {
        let queues = Queues::new(queues).unwrap();
        ask.spec.nics = vec![Nic { mac: Mac::new(mac).unwrap(), backend: Backend::Tap { queues } }];
        ask.spec.nics[0].clone()
    };
    assert_eq!(judged(&claimed(), |ask| drop(tap(ask, "52:54:00:00:00:01", 1))).unwrap_err().kind(), "not-found");
    let mut all = claimed();
    all.get_mut(&Slot::new(0).unwrap()).unwrap().record.resources.taps = vec![crate::ledger::Tap {
        nic: NicIndex::new(0).unwrap(),
        network: NetworkName::new("lan").unwrap(),
        mac: Mac::new("52:54:00:00:00:01").unwrap(),
        address: None,
        queues: Queues::new(1).unwrap(),
    }];
    judged(&all, |ask| drop(tap(ask, "52:54:00:00:00:01", 1))).unwrap();
    for (mac, queues) in [("52:54:00:00:00:02", 1), ("52:54:00:00:00:01", 2)] {
        assert_eq!(judged(&all, |ask| drop(tap(ask, mac, queues))).unwrap_err().kind(), "invalid");
    }
}

#[test]
fn a_port_twice_in_one_vm_is_invalid() {
    let twice = |ask: &mut Spawn| {
        let forward = forwards(ask)[0];
        forwards(ask).push(forward);
    };
    assert_eq!(judged(&claimed(), twice).unwrap_err().kind(), "invalid");
}

#[test]
fn too_many_disks_cards_or_forwards_are_invalid() {
    assert_eq!(judged(&claimed(), |ask| ask.spec.disks = vec![ask.spec.disks[0].clone(); MAX_DISKS + 1]).unwrap_err().kind(), "invalid");
    assert_eq!(judged(&claimed(), |ask| ask.spec.nics = vec![ask.spec.nics[0].clone(); MAX_NICS + 1]).unwrap_err().kind(), "invalid");
    let many = |ask: &mut Spawn| *forwards(ask) = vec![forwards(ask)[0]; MAX_FORWARDS + 1];
    assert_eq!(judged(&claimed(), many).unwrap_err().kind(), "invalid");
}

#[test]
fn a_vm_with_a_device_locks_its_memory_and_one_without_does_not() {
    let passed = Passed { function: diarch_ipc::name::Bdf::new("0000:65:00.0").unwrap(), group: 12, path: "devices/x".into(), mmio_mib: 16 };
    let with = |lockable| {
        let facts = Facts { devices: vec![passed.clone()], lockable, ..facts() };
        vet(&grants(), &claimed(), &KvmVerdict::NotGranted, id(5), &ask(), facts)
    };
    let memory = u64::from(ask().spec.memory.get());
    assert_eq!(with(None).unwrap().memlock, Some((memory + 16 + 1024) << 20));
    let error = with(Some(8 << 20)).unwrap_err();
    assert!(error.to_string().contains("LimitMEMLOCK"), "{error}");
    assert_eq!(judged(&claimed(), |_| ()).unwrap().memlock, None);
}

#[test]
fn kvm_that_lies_is_refused_with_the_reason() {
    let mut grants = grants();
    grants.vms.kvm = true;
    let mut ask = ask();
    ask.spec.accelerator = Accelerator::Kvm;
    let lies = KvmVerdict::Lies { reason: "exit reason 17".into() };
    let error = vet(&grants, &claimed(), &lies, id(5), &ask, facts()).unwrap_err();
    assert!(error.kind() == "unsupported" && error.to_string().contains("exit reason 17"), "{error}");
    vet(&grants, &claimed(), &KvmVerdict::Usable, id(5), &ask, facts()).unwrap();
}
