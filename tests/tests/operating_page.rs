//! `docs/OPERATING.md`, followed to the letter: every command of its `sh` blocks, in order, on a booted Debian without the package.

use diarch_tests::machine::Machine;
use diarch_tests::need;
use std::time::{Duration, Instant};

/// A command block, and the heading that it stands under.
struct Block {
    heading: String,
    script: String,
}

fn blocks(page: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let (mut heading, mut inside) = (String::new(), false);
    for line in page.lines() {
        match (inside, line) {
            (false, "```sh") => {
                inside = true;
                blocks.push(Block { heading: heading.clone(), script: String::new() });
            }
            (true, "```") => inside = false,
            (true, line) => blocks.last_mut().expect("begun").script += &format!("{line}\n"),
            (false, line) => {
                if let Some(title) = line.strip_prefix("## ") {
                    heading = title.to_owned();
                }
            }
        }
    }
    blocks
}

#[test]
fn every_command_of_the_page_does_what_the_page_says() {
    need!(Machine, Package, Guest, Qemu);
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OPERATING.md")).expect("the page");
    let machine = Machine::bare().boot();
    machine.sh("mkdir /root/packages");
    // The name under which apt-get sees it on the page.
    machine.copy_in(&need::package().expect("checked"), "/root/packages/diarch_0.0.0_amd64.deb", 0o644);
    let blocks = blocks(&page);
    assert!(blocks.len() >= 15, "the page has lost its blocks, or this test its eyes: {}", blocks.len());
    let mut said = String::new();
    let mut first = None;
    for block in &blocks {
        let script = format!("cd /root/packages\n{}", block.script);
        let output = machine.run_within(Duration::from_secs(120), &["/bin/bash", "-euo", "pipefail", "-c", &script]);
        said += &output.stdout;
        output.expect_success(&format!("{}:\n{}", block.heading, block.script));
        if block.script.contains("web.json") {
            machine.wait_healthy("web", Duration::from_secs(60));
            assert!(machine.get(8080).is_some(), "the guest serves on the port that the page names");
            first = Some(machine.qemus());
        }
        // From its start to its stop the VM is one process, whatever else the page does.
        if let Some(first) = first.as_ref().filter(|_| block.heading != "Remove") {
            let until = Instant::now() + Duration::from_secs(5);
            while machine.qemus() != *first && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(50));
            }
            assert_eq!(machine.qemus(), *first, "after {}:\n{}", block.heading, block.script);
        }
    }
    assert!(first.is_some(), "no VM was started");
    for words in ["web", "healthy", "Diarch VM \"web\" (slot 0)", "guest=web,"] {
        assert!(said.contains(words), "nothing printed {words:?}");
    }
    assert_eq!(machine.qemus().len(), 0, "removed");
    assert!(!machine.exists("/usr/bin/diarch") && !machine.exists("/var/log/diarch"));
}
