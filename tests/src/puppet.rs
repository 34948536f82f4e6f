//! The test's end of `diarch-puppet`: a will for the program that has taken the worker's place in a booted [`Machine`].

use crate::machine::Machine;
use diarch_ipc::name::{CommandLine, Cpus, Label, MiB, QemuName, Tenancy};
use diarch_ipc::operation::{Attach, Claim, Console, Inventory, Release, Request, Signal, SignalKind, Spawn};
use diarch_ipc::spec::{Accelerator, Boot, Presence, VmSpec};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// In the machine. The directory is the worker's own, so that its unit's sandbox lets the puppet in.
const SOCKET: &str = "/var/lib/diarch/puppet.sock";
const DROP_INS: &str = "/run/systemd/system/diarch-worker.service.d";
/// Longer than the puppet itself waits for a call.
const PATIENCE: Duration = Duration::from_secs(40);

pub struct Puppet<'a> {
    machine: &'a Machine,
    write: Mutex<UnixStream>,
    answers: Arc<Answers>,
    sent: Mutex<u64>,
}

#[derive(Default)]
struct Answers {
    /// By request, each answer that came: more than one would be a fault.
    came: Mutex<BTreeMap<u64, Vec<Value>>>,
    more: Condvar,
}

impl<'a> Puppet<'a> {
    /// Stops the worker, and starts the puppet in its unit. VMs run on.
    pub fn instead_of_the_worker(machine: &'a Machine) -> Self {
        let inside = machine.root().join(SOCKET.trim_start_matches('/'));
        let _ = std::fs::remove_file(&inside);
        let listener = UnixListener::bind(&inside).expect("a socket in the machine");
        machine.copy_program("diarch-puppet");
        machine.sh(&format!("mkdir -p {DROP_INS}"));
        machine.write(&format!("{DROP_INS}/puppet.conf"), &format!("[Service]\nExecStart=\nExecStart=/usr/local/bin/diarch-puppet {SOCKET} /var/lib/diarch\n"));
        machine.sh(&format!("chown diarch {SOCKET}; systemctl daemon-reload; systemctl restart diarch-worker.service"));
        let (stream, _) = listener.accept().expect("the puppet connects");
        let answers = Arc::new(Answers::default());
        let (reading, into) = (stream.try_clone().expect("dup"), Arc::clone(&answers));
        std::thread::spawn(move || {
            for line in BufReader::new(reading).lines().map_while(Result::ok) {
                let answer: Value = serde_json::from_str(&line).expect("JSON");
                into.came.lock().expect("not poisoned").entry(answer["n"].as_u64().expect("a number")).or_default().push(answer);
                into.more.notify_all();
            }
        });
        Self { machine, write: Mutex::new(stream), answers, sent: Mutex::new(0) }
    }

    /// Gives the unit back to the worker, and waits until it is ready.
    pub fn give_back(self) {
        self.machine
            .sh(&format!("rm -f {DROP_INS}/puppet.conf {SOCKET} /var/lib/diarch/puppet-*; systemctl daemon-reload; systemctl restart diarch-worker.service"));
    }

    /// Asks without waiting; the number is for [`Puppet::answer`].
    pub fn send(&self, request: &Request) -> u64 {
        let mut sent = self.sent.lock().expect("not poisoned");
        *sent += 1;
        let line = format!("{}\n", json!({"n": *sent, "ask": request}));
        self.write.lock().expect("not poisoned").write_all(line.as_bytes()).expect("the puppet reads");
        *sent
    }

    /// The whole answer to a request: `{"ok": ...}` or `{"error": {"kind", "text"}}`.
    pub fn answer(&self, n: u64) -> Value {
        let until = Instant::now() + PATIENCE;
        let mut came = self.answers.came.lock().expect("not poisoned");
        loop {
            if let Some(answers) = came.get(&n) {
                return answers[0].clone();
            }
            assert!(Instant::now() < until, "request {n} was not answered within {PATIENCE:?}");
            came = self.answers.more.wait_timeout(came, Duration::from_millis(200)).expect("not poisoned").0;
        }
    }

    /// How many requests were sent, how many were answered, and how many answers came.
    pub fn counts(&self) -> (u64, u64, u64) {
        let came = self.answers.came.lock().expect("not poisoned");
        (*self.sent.lock().expect("not poisoned"), came.len() as u64, came.values().map(|answers| answers.len() as u64).sum())
    }

    /// Asks and waits; `Err` is the refusal.
    pub fn try_ask(&self, request: &Request) -> Result<Value, Value> {
        let mut answer = self.answer(self.send(request));
        match answer.get_mut("ok").map(Value::take) {
            // {"vm.claim": {...}}: the name says nothing new.
            Some(Value::Object(reply)) => Ok(reply.into_iter().next().map_or(Value::Null, |(_, fields)| fields)),
            _ => Err(answer["error"].take()),
        }
    }

    pub fn ask(&self, request: &Request) -> Value {
        self.try_ask(request).unwrap_or_else(|error| panic!("{request:?}: {error}"))
    }

    pub fn claim(&self, label: &str) -> Tenancy {
        tenancy(self.ask(&claim(label)))
    }

    /// The inventory's VMs, by label.
    pub fn vms(&self) -> BTreeMap<String, Value> {
        let inventory = self.ask(&inventory());
        let vms = inventory["vms"].as_array().expect("a list").iter();
        vms.map(|vm| (vm["label"].as_str().expect("a label").to_owned(), vm.clone())).collect()
    }
}

/// Of an answer to `vm.claim`.
pub fn tenancy(mut claimed: Value) -> Tenancy {
    serde_json::from_value(claimed["tenancy"].take()).expect("a tenancy")
}

pub fn inventory() -> Request {
    Request::HostInventory(Inventory { after: None })
}
pub fn claim(label: &str) -> Request {
    Request::VmClaim(Claim { label: Label::new(label).expect("a label") })
}
pub fn release(tenancy: Tenancy) -> Request {
    Request::VmRelease(Release { tenancy })
}
pub fn attach(tenancy: Tenancy) -> Request {
    Request::VmAttach(Attach { tenancy })
}
pub fn console(tenancy: Tenancy) -> Request {
    Request::VmConsole(Console { tenancy })
}
pub fn kill(tenancy: Tenancy) -> Request {
    Request::VmSignal(Signal { tenancy, signal: SignalKind::Kill })
}
/// A stub of 16 MiB, by the binary that the grants call `stub`.
pub fn spawn(tenancy: Tenancy) -> Request {
    let spec = VmSpec {
        qemu: QemuName::new("stub").expect("a name"),
        accelerator: Accelerator::Tcg,
        cpus: Cpus::new(1).expect("in range"),
        memory: MiB::new(16).expect("in range"),
        boot: Boot::Kernel { command_line: CommandLine::new("stub").expect("ASCII"), initrd: Presence::Absent, firmware: Presence::Absent },
        disks: Vec::new(),
        nics: Vec::new(),
        devices: Vec::new(),
        shares: Vec::new(),
    };
    Request::VmSpawn(Spawn { tenancy, spec })
}
