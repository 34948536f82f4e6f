//! What a round does: decided by the seed and the round's number, and by nothing else.

use crate::host::Qemu;
use diarch_ipc::operation::SignalKind;
use diarch_ipc::spec::{DiskAccess, Egress};
use std::fmt;

/// VMs by name; one more than there are slots, so that slots run out.
pub const NAMES: usize = 5;
pub const SLOTS: u16 = 4;

/// A sequence that its seed decides (splitmix64: every seed is a good one).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64, round: u64) -> Self {
        let mut mixed = Self(seed ^ round.wrapping_mul(0xa076_1d64_78bd_642f));
        mixed.next();
        mixed
    }

    #[allow(clippy::should_implement_trait)] // a stream of numbers, and no iterator
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap_or(0)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// One of these, each as often as its weight says.
    pub fn weighed<T: Clone>(&mut self, from: &[(usize, T)]) -> T {
        let mut at = self.below(from.iter().map(|(weight, _)| weight).sum());
        for (weight, value) in from {
            if at < *weight {
                return value.clone();
            }
            at -= weight;
        }
        from[0].1.clone()
    }
}

/// What a VM is told to do with itself (see `diarch-stub-qemu`).
pub const WORDS: [&str; 5] = ["", "stub.mute", "stub.exit=3", "stub.crash-after-ms=3", "stub.poweroff-after-ms=5"];
/// Of these, so many don't end by themselves.
pub const LASTING: usize = 2;

/// What is asked of the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Inventory,
    Claim,
    Spawn {
        words: usize,
        cast: Cast,
    },
    Attach,
    Console,
    Signal(SignalKind),
    Release,
    OpenTap {
        nic: u64,
        network: &'static str,
        queues: u64,
    },
    /// The ports of this many VMs' worth, from the first one on.
    Publish {
        nic: u64,
        first: u64,
        count: u64,
    },
    Withdraw,
    Listen {
        port: u64,
    },
    AttachMount {
        share: &'static str,
        access: DiskAccess,
    },
    DetachMount {
        share: &'static str,
    },
    Connect,
    Bind {
        function: &'static str,
    },
    Unbind {
        function: &'static str,
    },
    Recover {
        function: &'static str,
    },
}

/// Who plays in a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cast {
    pub qemu: Qemu,
    /// Cards of user-mode networking: a passt for each.
    pub cards: u64,
    pub egress: Egress,
    pub shares: Shares,
}

/// Nobody but the stub.
pub const ALONE: Cast = Cast { qemu: Qemu::Stub, cards: 0, egress: Egress::Closed, shares: Shares::None };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shares {
    None,
    /// A virtiofsd for each mount that the VM has.
    Attached,
}

/// What the grants of the run call them.
pub const NETWORKS: [&str; 2] = ["bridged", "routed"];
pub const SHARES: [&str; 3] = ["memory", "directory", "read-only"];
pub const SOCKET: &str = "service";
/// One alone, one of two in a group.
pub const FUNCTIONS: [&str; 3] = ["0000:17:00.0", "0000:01:00.0", "0000:01:00.1"];
/// Their groups, and their drivers.
pub const GROUPS: [u64; 3] = [20, 12, 12];
pub const DRIVERS: [&str; 3] = ["nvidia", "nvidia", "snd_hda_intel"];
pub const VFIO: &str = "vfio-pci";

/// In whose name it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// The claim that the name has, or had last.
    Own,
    /// The slot that the name has, under a claim that nobody made.
    Forged,
    /// The slot that the name has, under the claim that had it before.
    Former,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    Wait,
    /// The next step comes while this is under way.
    GoOn,
}

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Supervisor,
    /// Asked to go (SIGTERM), and started anew.
    SupervisorInOrder,
    Qemu {
        name: usize,
    },
    /// A passt or a virtiofsd, beside a QEMU that goes on.
    Companion {
        name: usize,
        which: usize,
    },
    /// Any process below the supervisor that is no running QEMU: one that waits at its gate, a helper's child.
    Child {
        which: usize,
    },
}

/// What the kernel does wrong with a device, until the round ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Whoever asks this driver to let go of something waits.
    Hang { driver: &'static str },
    /// This driver does not take this function.
    Refusal { driver: &'static str, which: usize },
    /// The function reads all ones.
    Death { which: usize },
}

impl Fault {
    /// The groups whose quarantine it explains.
    pub fn groups(self) -> Vec<u64> {
        match self {
            Fault::Hang { .. } => GROUPS.to_vec(),
            Fault::Refusal { which, .. } | Fault::Death { which } => vec![GROUPS[which]],
        }
    }
}

/// How another worker comes to take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Succession {
    /// The one before it dies, with all that it asked.
    Death,
    /// The one before it is still there.
    Rivalry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Ask {
        name: usize,
        ask: Ask,
        claim: Claim,
        then: Then,
    },
    /// As `Ask` and `Wait`, and the supervisor is killed at its so many-th system call from then on.
    Cut {
        name: usize,
        ask: Ask,
        at: u64,
    },
    /// As `Ask`, and the so many-th process that is made for it dies a moment after it was made: a jail at its gate, a companion, an nft.
    Hunt {
        name: usize,
        ask: Ask,
        nth: usize,
        micros: u64,
    },
    /// One claim, asked twice under one id, with the supervisor's death in between or not.
    Twice {
        name: usize,
        killed: bool,
    },
    Kill(Victim),
    Fault(Fault),
    Succeed(Succession),
    /// A frame that no honest worker sends.
    Frame {
        which: usize,
    },
    Pause {
        micros: u64,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Ask { name, ask, claim, then } => {
                write!(f, "ask {ask:?} of {}", label(*name))?;
                if *claim != Claim::Own {
                    write!(f, ", {claim:?} claim")?;
                }
                if *then == Then::GoOn { f.write_str(", and go on") } else { Ok(()) }
            }
            Step::Cut { name, ask, at } => write!(f, "ask {ask:?} of {}, the supervisor killed at its system call {at}", label(*name)),
            Step::Hunt { name, ask, nth, micros } => write!(f, "ask {ask:?} of {}, and kill its process {nth} after {micros} us", label(*name)),
            Step::Twice { name, killed } => {
                write!(f, "claim {} twice under one id{}", label(*name), if *killed { ", the supervisor killed in between" } else { "" })
            }
            Step::Kill(victim) => write!(f, "kill {victim:?}"),
            Step::Fault(fault) => write!(f, "from now on {fault:?}"),
            Step::Succeed(how) => write!(f, "another worker, by {how:?}"),
            Step::Frame { which } => write!(f, "hostile frame {which}"),
            Step::Pause { micros } => write!(f, "pause {micros} us"),
        }
    }
}

pub fn label(name: usize) -> String {
    format!("chaos-{name}")
}

/// The steps of a round.
pub fn plan(seed: u64, round: u64) -> Vec<Step> {
    let mut random = Random::new(seed, round);
    let mut steps = Vec::new();
    // Few names in a round: operations must meet.
    let names = [random.below(NAMES), random.below(NAMES), random.below(NAMES)];
    for _ in 0..4 + random.below(10) {
        let name = random.pick(&names);
        let step = match random.below(1_000) {
            0..=719 => {
                let ask = ask(&mut random);
                // Most of what is asked of nobody's slot is refused at the door: not too much of that.
                if !matches!(ask, Ask::Claim | Ask::Inventory | Ask::Release | Ask::Listen { .. } | Ask::Connect) && random.below(3) > 0 {
                    steps.push(Step::Ask { name, ask: Ask::Claim, claim: Claim::Own, then: Then::Wait });
                }
                // Where nothing is attached nothing is served.
                if matches!(ask, Ask::Spawn { cast: Cast { shares: Shares::Attached, .. }, .. }) && random.below(3) > 0 {
                    let access = random.pick(&[DiskAccess::ReadOnly, DiskAccess::ReadWrite]);
                    let attach = Ask::AttachMount { share: random.pick(&SHARES), access };
                    steps.push(Step::Ask { name, ask: attach, claim: Claim::Own, then: Then::Wait });
                }
                // The longest of them makes some three hundred.
                let most = random.pick(&[20, 60, 150, 350]);
                let cut = Step::Cut { name, ask, at: 1 + random.next() % most };
                let then = random.weighed(&[(1, Then::Wait), (1, Then::GoOn)]);
                let asked = Step::Ask { name, ask, claim: claim(&mut random), then };
                // An inventory is answered without anybody's help.
                let hunt =
                    Step::Hunt { name, ask, nth: random.weighed(&[(3, 0), (2, 1), (1, 2), (1, 3)]), micros: random.next() % random.pick(&[100, 1_000, 5_000]) };
                random.weighed(&[(40, asked), (10, cut), (if ask == Ask::Inventory { 0 } else { 6 }, hunt)])
            }
            720..=864 => Step::Kill(victim(&mut random, name)),
            865..=874 => {
                let (mut before, fault, after) = trouble(&mut random, name);
                steps.append(&mut before);
                steps.push(Step::Fault(fault));
                after
            }
            875..=914 => Step::Succeed(random.pick(&[Succession::Death, Succession::Rivalry])),
            915..=944 => Step::Twice { name, killed: random.below(2) == 0 },
            _ => Step::Frame { which: random.below(100_000) },
        };
        steps.push(step);
        // The next one is met while it looks at what this one left.
        if step == Step::Kill(Victim::Supervisor) && random.below(3) == 0 {
            steps.push(Step::Pause { micros: random.next() % 15_000 });
            steps.push(Step::Kill(Victim::Supervisor));
        }
        // What is under way is met at another point each time.
        if matches!(step, Step::Ask { then: Then::GoOn, .. }) && random.below(2) == 0 {
            let most = random.pick(&[50, 300, 2_000, 12_000]);
            steps.push(Step::Pause { micros: random.next() % most });
        }
    }
    steps
}

/// A fault of the kernel's where it is met: what comes before it, the fault, what comes after it.
fn trouble(random: &mut Random, name: usize) -> (Vec<Step>, Fault, Step) {
    let which = random.below(FUNCTIONS.len());
    let function = FUNCTIONS[which];
    let step = |ask| Step::Ask { name, ask, claim: Claim::Own, then: Then::Wait };
    let then = random.pick(&[Then::Wait, Then::GoOn]);
    let last = |ask| Step::Ask { name, ask, claim: Claim::Own, then };
    let (claimed, bound) = (vec![step(Ask::Claim)], vec![step(Ask::Claim), step(Ask::Bind { function })]);
    // What takes a group from vfio-pci, in three ways.
    let back = random.pick(&[Ask::Unbind { function }, Ask::Recover { function }, Ask::Release]);
    match random.below(8) {
        0 => (claimed, Fault::Hang { driver: DRIVERS[which] }, last(Ask::Bind { function })),
        1 => (bound, Fault::Hang { driver: VFIO }, last(back)),
        2 => (claimed, Fault::Refusal { driver: VFIO, which }, last(Ask::Bind { function })),
        3 => (bound, Fault::Refusal { driver: DRIVERS[which], which }, last(back)),
        4 => (bound, Fault::Death { which }, last(back)),
        5 => (bound, Fault::Death { which }, Step::Kill(Victim::Supervisor)),
        // It dies in a VM, which ends in its own way or in ours.
        ending => {
            let mut running = bound;
            running.push(step(Ask::Spawn { words: if ending == 6 { 4 } else { 0 }, cast: ALONE }));
            (running, Fault::Death { which }, last(Ask::Signal(SignalKind::Kill)))
        }
    }
}

fn cast(random: &mut Random) -> Cast {
    Cast {
        qemu: random.weighed(&[(20, Qemu::Stub), (1, Qemu::Real)]),
        cards: random.weighed(&[(5, 0), (2, 1), (1, 2)]),
        egress: random.pick(&[Egress::Closed, Egress::Host]),
        shares: random.weighed(&[(2, Shares::None), (1, Shares::Attached)]),
    }
}

fn ask(random: &mut Random) -> Ask {
    let spawn = Ask::Spawn { words: random.weighed(&[(6, 0), (1, 1), (1, 2), (1, 3), (1, 4)]), cast: cast(random) };
    let signal = Ask::Signal(random.pick(&[SignalKind::Kill, SignalKind::Terminate]));
    let nic = random.next() % 2;
    let tap = Ask::OpenTap { nic, network: random.pick(&NETWORKS), queues: 1 + random.next() % 2 };
    let publish = Ask::Publish { nic, first: random.next() % 6, count: random.next() % 4 };
    let (share, access) = (random.pick(&SHARES), random.pick(&[DiskAccess::ReadOnly, DiskAccess::ReadWrite]));
    let function = random.pick(&FUNCTIONS);
    let listen = Ask::Listen { port: 80 + random.next() % 3 };
    let vm = [(24, Ask::Claim), (34, spawn), (18, Ask::Release), (8, signal), (5, Ask::Attach), (5, Ask::Console), (4, Ask::Inventory)];
    let network = [(20, tap), (8, publish), (4, Ask::Withdraw), (2, listen)];
    let mounts = [(8, Ask::AttachMount { share, access }), (4, Ask::DetachMount { share }), (2, Ask::Connect)];
    let devices = [(8, Ask::Bind { function }), (4, Ask::Unbind { function }), (2, Ask::Recover { function })];
    random.weighed(&[&vm[..], &network, &mounts, &devices].concat())
}

fn claim(random: &mut Random) -> Claim {
    random.weighed(&[(16, Claim::Own), (1, Claim::Forged), (1, Claim::Former)])
}

fn victim(random: &mut Random, name: usize) -> Victim {
    let (child, companion) = (Victim::Child { which: random.below(1_000) }, Victim::Companion { name, which: random.below(8) });
    random.weighed(&[(8, Victim::Supervisor), (1, Victim::SupervisorInOrder), (4, Victim::Qemu { name }), (3, companion), (4, child)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_and_a_round_name_one_plan_and_others_name_others() {
        assert_eq!(plan(7, 3), plan(7, 3));
        assert_ne!(plan(7, 3), plan(7, 4));
        assert_ne!(plan(7, 3), plan(8, 3));
    }

    #[test]
    fn every_kind_of_step_comes_within_two_hundred_rounds() {
        let steps: Vec<String> = (0..200).flat_map(|round| plan(1, round)).map(|step| step.to_string()).collect();
        for kind in ["Claim", "Spawn", "Attach", "Console", "Signal", "Release", "Forged", "Former", "go on", "twice", "killed in between", "system call"] {
            assert!(steps.iter().any(|step| step.contains(kind)), "no step with {kind}");
        }
        for kind in ["OpenTap", "Publish", "Withdraw", "Listen", "AttachMount", "DetachMount", "Connect", "Bind", "Unbind", "Recover"] {
            assert!(steps.iter().any(|step| step.contains(kind)), "no step with {kind}");
        }
        for kind in ["qemu: Real", "cards: 2", "Attached", "Host", "its process 3", "kill Companion", "Hang", "Refusal", "Death"] {
            assert!(steps.iter().any(|step| step.contains(kind)), "no step with {kind}");
        }
        for kind in ["kill Supervisor", "kill Qemu", "kill Child", "another worker", "hostile frame", "pause"] {
            assert!(steps.iter().any(|step| step.contains(kind)), "no step with {kind}");
        }
    }
}
