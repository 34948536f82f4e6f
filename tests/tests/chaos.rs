//! A short chaos run (`make chaos` makes a long one), and the proof that such a run finds what it is made to find.

use diarch_tests::chaos::plant::{self, Plant};
use diarch_tests::host::binary;
use diarch_tests::need;
use std::process::{Command, Output};

/// A run that is bounded by time would find something else on each machine.
const ROUNDS: &str = "60";
const ON_A_TREE: &str = "30";

fn chaos(arguments: &[&str]) -> (Output, String) {
    // Its programs are built by whoever asks for one first.
    for name in ["diarch-supervisor", "diarch-stand-in", "diarch-stub-qemu", "diarch-stub-virtiofsd", "diarch"] {
        binary(name);
    }
    let output = Command::new(binary("diarch-chaos")).args(arguments).output().expect("diarch-chaos");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output, text)
}

#[test]
fn random_operations_and_random_deaths_leave_the_kernel_with_what_the_ledger_says() {
    need!(Root, Kernel(6, 5), Network, Passt, Qemu);
    let (output, text) = chaos(&["--rounds", ROUNDS]);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("clean: 60 rounds"), "{text}");
    eprintln!("{text}");
}

/// There the programs beside QEMU can all be real; the virtiofsd of Debian 12 can't do without capabilities.
#[test]
fn the_same_is_so_on_a_debian_whose_virtiofsd_serves_a_real_qemu() {
    need!(Root, Kernel(6, 5), Machine);
    let tree = need::tree().expect("need!(Machine) comes first").join("tree");
    let (output, text) = chaos(&["--rounds", ON_A_TREE, "--tree", &tree.to_string_lossy()]);
    assert!(output.status.success() && text.contains("with stubs and QEMU, passt, virtiofsd\n"), "{text}");
    eprintln!("{text}");
}

#[test]
fn whatever_is_left_behind_is_found_and_named_with_its_seed() {
    need!(Root, Kernel(6, 5), Network, Passt);
    for plant in plant::ALL {
        let (output, text) = chaos(&["--rounds", "4", "--seed", "1", "--plant", &plant.to_string()]);
        assert_eq!(output.status.code(), Some(1), "{plant}: {text}");
        let named = match plant {
            Plant::Record => "written and not told: slot 77".to_owned(),
            Plant::Amnesia => "told and not written".to_owned(),
            Plant::Quarantine => "quarantined for nothing: group 20: ".to_owned(),
            Plant::Passt | Plant::Virtiofsd => "left behind: process ".to_owned(),
            other => format!("left behind: {other} "),
        };
        let line = text.lines().find(|line| line.contains(&named));
        assert!(line.is_some() && text.contains("--seed 1"), "{plant}: no {named:?} in\n{text}");
        // A program is named by its own arguments.
        if matches!(plant, Plant::Passt | Plant::Virtiofsd) {
            assert!(line.is_some_and(|line| line.contains(&format!("/{plant} -"))), "{plant}: not named in\n{text}");
        }
    }
}
