//! Confidential guests: whether this host's kernel says that it can run them, and what is missing where that is known.
//!
//! The module parameter is the kernel's word: it reads `Y` only after the set-up succeeded. A flag in `/proc/cpuinfo` says what the processor has, and nothing of the
//! firmware's set-up, so it is a hint and no more.

use super::Host;
use super::finding::Finding;
use super::kernel::release;

/// KVM with SEV-SNP guests: Linux 6.11 (arch/x86/kvm/svm/sev.c, `sev_snp`).
const SNP: (u32, u32) = (6, 11);
/// KVM with TDX guests: Linux 6.16 (arch/x86/kvm/vmx/tdx.c, `tdx`).
const TDX: (u32, u32) = (6, 16);

/// What is known of the processor.
struct Cpu {
    vendor: String,
    flags: Vec<String>,
}

impl Cpu {
    fn of(host: &Host) -> Self {
        let info = host.read("proc/cpuinfo");
        let field = |name: &str| {
            let line = info.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
            line.and_then(|line| line.split_once(':')).map_or_else(String::new, |(_, value)| value.trim().to_owned())
        };
        Self { vendor: field("vendor_id"), flags: field("flags").split_whitespace().map(str::to_owned).collect() }
    }
    fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|one| one == flag)
    }
}

/// One of the two, and where to look for it.
struct Kind {
    check: &'static str,
    name: &'static str,
    vendor: &'static str,
    module: &'static str,
    parameter: &'static str,
    flag: &'static str,
    since: (u32, u32),
    /// The processor has it, and the kernel did not set it up.
    not_set_up: &'static str,
    /// The processor does not show it.
    not_shown: &'static str,
}

const KINDS: [Kind; 2] = [
    Kind {
        check: "sev-snp",
        name: "SEV-SNP",
        vendor: "AuthenticAMD",
        module: "kvm_amd",
        parameter: "sev_snp",
        flag: "sev_snp",
        since: SNP,
        not_set_up: "in the firmware: SMEE, SEV-SNP, SNP memory (RMP table) coverage, an SEV-ES ASID limit above 1; on the kernel command line neither iommu=pt nor \
                     amd_iommu=off; 'dmesg | grep -i -e sev -e rmp -e snp' says which",
        not_shown: "it takes an EPYC of the third generation or later, with SMEE and SEV switched on in the firmware, and no hypervisor below this host",
    },
    Kind {
        check: "tdx",
        name: "TDX",
        vendor: "GenuineIntel",
        module: "kvm_intel",
        parameter: "tdx",
        flag: "tdx_host_platform",
        since: TDX,
        not_set_up: "kvm_intel.tdx=1 and nohibernate on the kernel command line; 'dmesg | grep -i tdx' says what else",
        not_shown: "it takes a Xeon of the fifth generation or later, with TME, TME-MT, TDX, SEAM loader and private key ids switched on in the firmware, and no hypervisor \
                    below this host",
    },
];

pub fn confidential(host: &Host) -> Vec<Finding> {
    let cpu = Cpu::of(host);
    KINDS.iter().map(|kind| one(host, kind, &cpu)).collect()
}

fn one(host: &Host, kind: &Kind, cpu: &Cpu) -> Finding {
    let Kind { check, name, module, parameter, .. } = *kind;
    if cpu.vendor != kind.vendor {
        let vendor = if cpu.vendor.is_empty() { "unknown" } else { &cpu.vendor };
        return Finding::info(check, format!("not of this processor ({vendor})"));
    }
    let set = host.try_read(format!("sys/module/{module}/parameters/{parameter}"));
    match set.as_deref() {
        Some("Y" | "1") => return Finding::ok(check, format!("the kernel has set it up: {name} guests can run")),
        None if !host.root.join("sys/module").join(module).exists() => {
            return Finding::info(check, format!("not known: {module} is not loaded")).or(format!("modprobe {module}"));
        }
        None if release(host).is_ok_and(|release| release < kind.since) => {
            let needed = format!("{}.{}", kind.since.0, kind.since.1);
            return Finding::info(check, format!("this kernel's {module} knows no {name} guests")).or(format!("boot a kernel of {needed} or newer"));
        }
        _ => {}
    }
    match cpu.has(kind.flag) {
        true => Finding::info(check, format!("the processor has it, and the kernel has not set it up ({module}.{parameter} is not Y)")).or(kind.not_set_up),
        false => Finding::info(check, format!("the processor does not show it ({} is not among its flags)", kind.flag)).or(kind.not_shown),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::super::tests::host;
    use super::*;

    fn found(of: &[Finding], check: &str) -> (Level, String, String) {
        let one = of.iter().find(|finding| finding.check == check).expect(check);
        (one.level, one.detail.clone(), one.fix.clone().unwrap_or_default())
    }

    #[test]
    fn only_the_modules_own_word_is_a_yes() {
        let (_directory, host) = host();
        host.write("proc/cpuinfo", "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu sev sev_es sev_snp\n");
        let (level, detail, fix) = found(&confidential(&host), "sev-snp");
        assert_eq!((level, fix.as_str()), (Level::Info, "modprobe kvm_amd"), "{detail}");
        host.write("sys/module/kvm_amd/parameters/sev_snp", "N");
        let (level, detail, fix) = found(&confidential(&host), "sev-snp");
        assert!(level == Level::Info && detail.contains("has not set it up") && fix.contains("RMP table"), "{detail} {fix}");
        host.write("sys/module/kvm_amd/parameters/sev_snp", "Y");
        assert_eq!(found(&confidential(&host), "sev-snp").0, Level::Ok);
        assert_eq!(found(&confidential(&host), "tdx").1, "not of this processor (AuthenticAMD)");
    }

    #[test]
    fn an_old_kernel_and_a_processor_without_it_are_told_apart() {
        let (_directory, host) = host();
        host.write("proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n");
        host.write("sys/module/kvm_intel/parameters/nested", "Y");
        host.write("proc/sys/kernel/osrelease", "6.12.0");
        assert!(found(&confidential(&host), "tdx").2.contains("6.16"));
        host.write("proc/sys/kernel/osrelease", "6.17.0");
        assert!(found(&confidential(&host), "tdx").1.contains("does not show it"));
        host.write("proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: vmx tdx_host_platform\n");
        host.write("sys/module/kvm_intel/parameters/tdx", "N");
        assert!(found(&confidential(&host), "tdx").2.contains("kvm_intel.tdx=1"));
    }
}
