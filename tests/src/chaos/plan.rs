//! What a round does: decided by the seed and the round's number, and by nothing else.

use diarch_ipc::operation::SignalKind;
use diarch_ipc::spec::DiskAccess;
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

/// What the grants of the run call them.
pub const NETWORKS: [&str; 2] = ["bridged", "routed"];
pub const SHARES: [&str; 3] = ["memory", "directory", "read-only"];
pub const SOCKET: &str = "service";
/// One alone, one of two in a group.
pub const FUNCTIONS: [&str; 3] = ["0000:17:00.0", "0000:01:00.0", "0000:01:00.1"];

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
    /// Any process below the supervisor that is no running QEMU: one that waits at its gate, a helper's child.
    Child {
        which: usize,
    },
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
    /// One claim, asked twice under one id, with the supervisor's death in between or not.
    Twice {
        name: usize,
        killed: bool,
    },
    Kill(Victim),
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
            Step::Twice { name, killed } => {
                write!(f, "claim {} twice under one id{}", label(*name), if *killed { ", the supervisor killed in between" } else { "" })
            }
            Step::Kill(victim) => write!(f, "kill {victim:?}"),
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
        let step = match random.below(100) {
            0..=71 => {
                let ask = ask(&mut random);
                // Most of what is asked of nobody's slot is refused at the door: not too much of that.
                if !matches!(ask, Ask::Claim | Ask::Inventory | Ask::Release | Ask::Listen { .. } | Ask::Connect) && random.below(3) > 0 {
                    steps.push(Step::Ask { name, ask: Ask::Claim, claim: Claim::Own, then: Then::Wait });
                }
                // The longest of them makes some three hundred.
                let most = random.pick(&[20, 60, 150, 350]);
                let cut = Step::Cut { name, ask, at: 1 + random.next() % most };
                let then = random.weighed(&[(1, Then::Wait), (1, Then::GoOn)]);
                let asked = Step::Ask { name, ask, claim: claim(&mut random), then };
                random.weighed(&[(4, asked), (1, cut)])
            }
            72..=86 => Step::Kill(victim(&mut random, name)),
            87..=91 => Step::Succeed(random.pick(&[Succession::Death, Succession::Rivalry])),
            92..=94 => Step::Twice { name, killed: random.below(2) == 0 },
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

fn ask(random: &mut Random) -> Ask {
    let spawn = Ask::Spawn { words: random.weighed(&[(6, 0), (1, 1), (1, 2), (1, 3), (1, 4)]) };
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
    let child = Victim::Child { which: random.below(1_000) };
    random.weighed(&[(8, Victim::Supervisor), (1, Victim::SupervisorInOrder), (4, Victim::Qemu { name }), (4, child)])
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
        for kind in ["kill Supervisor", "kill Qemu", "kill Child", "another worker", "hostile frame", "pause"] {
            assert!(steps.iter().any(|step| step.contains(kind)), "no step with {kind}");
        }
    }
}
