//! The programs and the switch of the kernel's that VMs' networks and shares need, as far as they can be seen without root. Only what some VM needs is told.

use super::Host;
use super::finding::Finding;
use crate::cli::screen::count;
use crate::control::protocol::Uses;

/// Where Debian's packages have them; the grants may name others.
const NFT: &str = "usr/sbin/nft";
const PASST: &str = "usr/bin/passt";
const VIRTIOFSD: &str = "usr/libexec/virtiofsd";

pub fn programs(host: &Host, uses: &Uses) -> Vec<Finding> {
    let there = |path: &str| host.root.join(path).exists();
    let vms = |n: u32| count(n as usize, "VM");
    let mut found = Vec::new();
    if uses.taps > 0 {
        found.push(match there(NFT) {
            true => Finding::ok("nft", format!("/{NFT}, for the taps of {}", vms(uses.taps))),
            false => {
                Finding::fail("nft", format!("there is no /{NFT}: without it no tap is opened, and {} need one", vms(uses.taps)), "apt-get install nftables")
            }
        });
        found.extend(forwarding(host, uses));
    }
    if uses.shares > 0 {
        found.push(match there(VIRTIOFSD) {
            true => Finding::ok("virtiofsd", format!("/{VIRTIOFSD}, for the shares of {}", vms(uses.shares))),
            false => Finding::warn(
                "virtiofsd",
                format!("there is no /{VIRTIOFSD}, and {} have shares", vms(uses.shares)),
                "apt-get install virtiofsd, or name another one under [virtiofsd] in /etc/diarch/grants.toml",
            ),
        });
    }
    if uses.user_networks > 0 {
        found.push(match there(PASST) {
            true => Finding::info("passt", format!("/{PASST}: the user-mode network of {} runs in it, where the grants name it", vms(uses.user_networks))),
            false => Finding::info("passt", format!("not there: the user-mode network of {} runs inside of QEMU", vms(uses.user_networks)))
                .or("for a QEMU without a network of its own: apt-get install passt, and [passt] in /etc/diarch/grants.toml"),
        });
    }
    found
}

/// Bridged networks do without it, and which is which is known when a tap is open.
fn forwarding(host: &Host, uses: &Uses) -> Option<Finding> {
    let check = "ip forwarding";
    match (host.try_read("proc/sys/net/ipv4/ip_forward")?.as_str(), uses.routed) {
        ("0", 0) => Some(Finding::info(check, "off: guests on a routed network would reach the host's end of it, and nothing behind")),
        ("0", routed) => Some(Finding::warn(
            check,
            format!("off, and {} on a routed network: what they send goes no further than the host", count(routed as usize, "VM")),
            "sysctl -w net.ipv4.ip_forward=1; for the next boot: the same line without sysctl -w in /etc/sysctl.d/diarch.conf",
        )),
        _ => Some(Finding::ok(check, "on")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::super::tests::host;
    use super::*;

    fn levels(found: &[Finding]) -> Vec<(&str, Level)> {
        found.iter().map(|finding| (finding.check, finding.level)).collect()
    }

    #[test]
    fn only_what_some_vm_needs_is_told() {
        let (_directory, host) = host();
        assert_eq!(programs(&host, &Uses::default()), []);
        let uses = Uses { taps: 2, shares: 1, user_networks: 3, ..Uses::default() };
        let found = programs(&host, &uses);
        assert_eq!(levels(&found), [("nft", Level::Fail), ("virtiofsd", Level::Warn), ("passt", Level::Info)]);
        assert!(found.iter().all(|finding| finding.fix.is_some()), "{found:?}");
        for path in [NFT, PASST, VIRTIOFSD] {
            host.program(path, "");
        }
        assert_eq!(levels(&programs(&host, &uses)), [("nft", Level::Ok), ("virtiofsd", Level::Ok), ("passt", Level::Info)]);
    }

    #[test]
    fn a_routed_network_without_forwarding_is_to_be_looked_at_and_a_bridged_one_is_not() {
        let (_directory, host) = host();
        for (value, routed, level) in [("0", 1, Level::Warn), ("0", 0, Level::Info), ("1", 1, Level::Ok)] {
            host.write("proc/sys/net/ipv4/ip_forward", value);
            let found = forwarding(&host, &Uses { taps: 1, routed, ..Uses::default() }).expect("a finding");
            assert_eq!((found.level, found.fix.is_some()), (level, level == Level::Warn), "{value} {routed}");
        }
    }
}
