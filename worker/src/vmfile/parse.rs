//! One VM file.

use super::{Accel, Desired, DiskFile, Health, Machine, Probe, RestartPolicy, SharedDirectory, Tap};
use crate::control::protocol::FileProblem;
use crate::json;
use diarch_ipc::name::{Bdf, CommandLine, Cpus, Forward, IpText, Label, Mac, MiB, NetworkName, Port, Protocol, QemuName, Queues, ShareName, Tag};
use diarch_ipc::spec::{DiskAccess, DiskFormat, Egress, MAX_DEVICES, MAX_FORWARDS, MAX_SHARES};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::time::Duration;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    name: Label,
    #[serde(default = "yes")]
    enabled: bool,
    qemu_configuration: RawQemu,
    image: RawImage,
    #[serde(default)]
    network: RawNetwork,
    #[serde(default)]
    devices: Vec<Bdf>,
    #[serde(default)]
    shares: Vec<RawShare>,
    health: Option<RawHealth>,
    #[serde(default)]
    restart: RawRestart,
    /// The watchdog's object for its releases; accepted, so that its files can be read, and not used yet.
    run_configuration: Option<serde_json::Map<String, serde_json::Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawQemu {
    cores: Cpus,
    mem_gb: Option<u64>,
    mem_mb: Option<u64>,
    #[serde(default = "auto")]
    accel: Accel,
    qemu: Option<QemuName>,
    mac_address: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawImage {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: Option<CommandLine>,
    firmware: Option<PathBuf>,
    disk: Option<PathBuf>,
    disk_format: Option<DiskFormat>,
    disk_access: Option<DiskAccess>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawNetwork {
    forwards: Vec<RawForward>,
    egress: Option<Egress>,
    tap: Option<RawTap>,
    publish: Vec<RawPublish>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTap {
    network: NetworkName,
    queues: Option<Queues>,
    address: Option<IpText>,
}

/// As a forward; but the loopback, where the packet filter leads nobody, is no place to begin with.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPublish {
    #[serde(default = "tcp")]
    protocol: Protocol,
    host_address: IpText,
    host_port: Port,
    guest_port: Port,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawShare {
    share: ShareName,
    tag: Tag,
    #[serde(default = "read_only")]
    access: DiskAccess,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawForward {
    #[serde(default = "tcp")]
    protocol: Protocol,
    #[serde(default = "loopback")]
    host_address: IpText,
    host_port: Port,
    guest_port: Port,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHealth {
    http: Option<RawHttp>,
    tcp: Option<RawTcp>,
    qmp: Option<RawQmp>,
    interval_s: Option<u64>,
    timeout_s: Option<u64>,
    failures: Option<u32>,
    start_grace_s: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHttp {
    host_port: Port,
    #[serde(default = "slash")]
    path: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTcp {
    host_port: Port,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawQmp {}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawRestart {
    policy: Option<RestartPolicy>,
}

fn yes() -> bool {
    true
}
fn auto() -> Accel {
    Accel::Auto
}
fn tcp() -> Protocol {
    Protocol::Tcp
}
fn read_only() -> DiskAccess {
    DiskAccess::ReadOnly
}
fn slash() -> String {
    "/".into()
}
fn loopback() -> IpText {
    IpText(std::net::Ipv4Addr::LOCALHOST.into())
}

/// A day: a longer probe interval or grace is a slip of the keyboard.
const LONGEST_S: u64 = 86_400;

/// Collects all that is wrong with one file.
struct Problems<'a> {
    file: &'a str,
    found: Vec<FileProblem>,
}

impl Problems<'_> {
    fn add(&mut self, path: &str, reason: impl std::fmt::Display) {
        self.found.push(FileProblem { file: self.file.to_owned(), path: path.to_owned(), line: None, reason: reason.to_string() });
    }
    fn ok<T, E: std::fmt::Display>(&mut self, path: &str, value: Result<T, E>) -> Option<T> {
        value.map_err(|error| self.add(path, error)).ok()
    }
    fn seconds(&mut self, path: &str, value: Option<u64>, default: u64, least: u64) -> Duration {
        let value = value.unwrap_or(default);
        if !(least..=LONGEST_S).contains(&value) {
            self.add(path, format!("must be from {least} to {LONGEST_S} seconds, and is {value}"));
        }
        Duration::from_secs(value)
    }
    fn absolute(&mut self, path: &str, value: &Option<PathBuf>) {
        if let Some(value) = value {
            if !value.is_absolute() {
                self.add(path, "an absolute path is needed");
            } else if value.to_str().is_none_or(|text| text.contains('\0')) {
                self.add(path, "a path holds no NUL byte");
            }
        }
    }
}

/// Reads the contents of the file named `file`; gives all that is wrong with it otherwise.
pub fn parse(file: &str, bytes: &[u8]) -> Result<Desired, Vec<FileProblem>> {
    arrays(file, bytes)?;
    let raw: Raw = json::parse(bytes).map_err(|error| vec![FileProblem { file: file.to_owned(), path: error.path, line: error.line, reason: error.reason }])?;
    let mut problems = Problems { file, found: Vec::new() };
    let memory = memory(&raw.qemu_configuration, &mut problems);
    let mac = match raw.qemu_configuration.mac_address {
        None => stable_mac(&raw.name),
        // Upper case is as common in such files, and means the same.
        Some(text) => Mac::new(text.to_ascii_lowercase()),
    };
    let mac = problems.ok("$.qemu_configuration.mac_address", mac);
    let command_line = raw.image.cmdline.clone().map_or_else(|| CommandLine::new(""), Ok);
    let command_line = problems.ok("$.image.cmdline", command_line);
    let qemu = problems.ok("$.qemu_configuration.qemu", raw.qemu_configuration.qemu.map_or_else(|| QemuName::new("default"), Ok));
    image(&raw.image, &mut problems);
    devices(&raw.devices, &mut problems);
    shares(&raw.shares, &mut problems);
    let (egress, forwards, tap) = network(raw.network, &mut problems);
    let health = raw.health.and_then(|health| health_of(health, &mut problems));
    let (true, Some(memory), Some(mac), Some(command_line), Some(qemu)) = (problems.found.is_empty(), memory, mac, command_line, qemu) else {
        return Err(problems.found);
    };
    let disks = raw.image.disk.map(|path| DiskFile {
        path,
        // Never found out by looking: a guest with a raw disk could write a qcow2 header that names a file of the host.
        format: raw.image.disk_format.unwrap_or(DiskFormat::Raw),
        access: raw.image.disk_access.unwrap_or(DiskAccess::ReadWrite),
    });
    let warnings = raw.run_configuration.map(|_| "run_configuration is the watchdog's and is not used yet".to_owned());
    Ok(Desired {
        name: raw.name,
        file: file.to_owned(),
        revision: Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect(),
        enabled: raw.enabled,
        machine: Machine {
            qemu,
            accel: raw.qemu_configuration.accel,
            cpus: raw.qemu_configuration.cores,
            memory,
            mac,
            kernel: raw.image.kernel,
            initrd: raw.image.initrd,
            command_line,
            firmware: raw.image.firmware,
            disks: disks.into_iter().collect(),
            egress,
            forwards,
            tap,
            devices: raw.devices,
            shares: raw.shares.into_iter().map(|s| SharedDirectory { share: s.share, tag: s.tag, access: s.access }).collect(),
        },
        health,
        restart: raw.restart.policy.unwrap_or(RestartPolicy::OnFailure),
        warnings: warnings.into_iter().collect(),
    })
}

/// The objects of a VM file. serde takes an array for a struct, field by field in the order of its source: nobody means that.
const OBJECTS: &[&str] = &[
    "",
    "/qemu_configuration",
    "/image",
    "/network",
    "/network/tap",
    "/health",
    "/health/http",
    "/health/tcp",
    "/health/qmp",
    "/restart",
    "/run_configuration",
];
/// Its lists of objects.
const LISTS: &[&str] = &["/network/forwards", "/network/publish", "/shares"];

fn arrays(file: &str, bytes: &[u8]) -> Result<(), Vec<FileProblem>> {
    // What is no JSON at all is told better by who reads it next.
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(bytes) else { return Ok(()) };
    let path = |pointer: &str| format!("${}", pointer.replace('/', "."));
    let objects = OBJECTS.iter().filter_map(|pointer| Some((path(pointer), value.pointer(pointer)?)));
    let items = LISTS.iter().filter_map(|pointer| Some((path(pointer), value.pointer(pointer)?.as_array()?)));
    let items = items.flat_map(|(path, items)| items.iter().enumerate().map(move |(index, item)| (format!("{path}[{index}]"), item)));
    let found: Vec<FileProblem> = objects
        .chain(items)
        .filter(|(_, value)| value.is_array())
        .map(|(path, _)| FileProblem { file: file.to_owned(), path, line: None, reason: "an object is needed".into() })
        .collect();
    if found.is_empty() { Ok(()) } else { Err(found) }
}

/// Either QEMU's user-mode network with its forwards, or a tap with its published ports.
fn network(raw: RawNetwork, problems: &mut Problems<'_>) -> (Egress, Vec<Forward>, Option<Tap>) {
    for (path, length) in [("$.network.forwards", raw.forwards.len()), ("$.network.publish", raw.publish.len())] {
        if length > MAX_FORWARDS {
            problems.add(path, format!("at most {MAX_FORWARDS} ports are possible, and these are {length}"));
        }
    }
    if raw.tap.is_some() {
        if !raw.forwards.is_empty() {
            problems.add("$.network.forwards", "forwards are of QEMU's user-mode network; a VM with a tap has its ports in publish");
        }
        if raw.egress.is_some() {
            problems.add("$.network.egress", "egress is of QEMU's user-mode network; where a VM with a tap may go, the grants of its network say");
        }
    } else if !raw.publish.is_empty() {
        problems.add("$.network.publish", "ports are published for a VM with a tap; one without has them in forwards");
    }
    for (index, publish) in raw.publish.iter().enumerate().filter(|(_, publish)| publish.host_address.0.to_canonical().is_loopback()) {
        let reason = format!(
            "{} is a loopback address, and the kernel leads nothing from there into a guest with a tap; name another address of the host",
            publish.host_address
        );
        problems.add(&format!("$.network.publish[{index}].host_address"), reason);
    }
    let forward = |protocol, host_address, host_port, guest_port| Forward { protocol, host_address, host_port, guest_port };
    let forwards = raw.forwards.iter().map(|f| forward(f.protocol, f.host_address, f.host_port, f.guest_port)).collect();
    let publish = raw.publish.iter().map(|f| forward(f.protocol, f.host_address, f.host_port, f.guest_port)).collect();
    let tap = raw.tap.and_then(|tap| {
        let queues = problems.ok("$.network.tap.queues", tap.queues.map_or_else(|| Queues::new(1), Ok))?;
        Some(Tap { network: tap.network, queues, address: tap.address, publish })
    });
    (raw.egress.unwrap_or(Egress::Closed), forwards, tap)
}

fn devices(devices: &[Bdf], problems: &mut Problems<'_>) {
    if devices.len() > MAX_DEVICES {
        problems.add("$.devices", format!("at most {MAX_DEVICES} devices are possible, and these are {}", devices.len()));
    }
    for (index, function) in devices.iter().enumerate() {
        if devices[..index].contains(function) {
            problems.add(&format!("$.devices[{index}]"), format!("{function} is named twice"));
        }
    }
}

fn shares(shares: &[RawShare], problems: &mut Problems<'_>) {
    if shares.len() > MAX_SHARES {
        problems.add("$.shares", format!("at most {MAX_SHARES} shares are possible, and these are {}", shares.len()));
    }
    for (index, share) in shares.iter().enumerate() {
        if shares[..index].iter().any(|other| other.share == share.share) {
            problems.add(&format!("$.shares[{index}].share"), format!("{} is named twice", share.share));
        }
        if shares[..index].iter().any(|other| other.tag == share.tag) {
            problems.add(&format!("$.shares[{index}].tag"), format!("the tag {} is used twice", share.tag));
        }
    }
}

fn memory(qemu: &RawQemu, problems: &mut Problems<'_>) -> Option<MiB> {
    match (qemu.mem_gb, qemu.mem_mb) {
        (Some(gib), None) => problems.ok("$.qemu_configuration.mem_gb", MiB::new(gib.saturating_mul(1024))),
        (None, Some(mib)) => problems.ok("$.qemu_configuration.mem_mb", MiB::new(mib)),
        (None, None) => {
            problems.add("$.qemu_configuration", "mem_gb or mem_mb is needed");
            None
        }
        (Some(_), Some(_)) => {
            problems.add("$.qemu_configuration.mem_mb", "mem_gb and mem_mb exclude each other");
            None
        }
    }
}

fn image(image: &RawImage, problems: &mut Problems<'_>) {
    for (path, value) in
        [("$.image.kernel", &image.kernel), ("$.image.initrd", &image.initrd), ("$.image.firmware", &image.firmware), ("$.image.disk", &image.disk)]
    {
        problems.absolute(path, value);
    }
    if image.kernel.is_none() && image.disk.is_none() {
        problems.add("$.image", "a kernel or a disk is needed to boot from");
    }
    if image.kernel.is_none() {
        for (path, given) in [("$.image.initrd", image.initrd.is_some()), ("$.image.cmdline", image.cmdline.is_some())] {
            if given {
                problems.add(path, "is of use only with a kernel");
            }
        }
    }
    if image.disk.is_none() {
        for (path, given) in [("$.image.disk_format", image.disk_format.is_some()), ("$.image.disk_access", image.disk_access.is_some())] {
            if given {
                problems.add(path, "is of use only with a disk");
            }
        }
    }
}

fn health_of(raw: RawHealth, problems: &mut Problems<'_>) -> Option<Health> {
    let probe = match (raw.http, raw.tcp, raw.qmp) {
        (Some(http), None, None) => {
            // It becomes part of an HTTP request line.
            if !http.path.starts_with('/') || !http.path.bytes().all(|b| (0x21..0x7f).contains(&b)) || http.path.len() > 1024 {
                problems.add("$.health.http.path", "a path starts with '/' and is printable ASCII without spaces");
            }
            Some(Probe::Http { host_port: http.host_port, path: http.path })
        }
        (None, Some(tcp), None) => Some(Probe::Tcp { host_port: tcp.host_port }),
        (None, None, Some(RawQmp {})) => Some(Probe::Qmp),
        _ => {
            problems.add("$.health", "exactly one of http, tcp and qmp is needed");
            None
        }
    };
    let failures = raw.failures.unwrap_or(3);
    if !(1..=1000).contains(&failures) {
        problems.add("$.health.failures", "must be from 1 to 1000");
    }
    let interval = problems.seconds("$.health.interval_s", raw.interval_s, 10, 1);
    let timeout = problems.seconds("$.health.timeout_s", raw.timeout_s, 2, 1);
    let start_grace = problems.seconds("$.health.start_grace_s", raw.start_grace_s, 60, 0);
    Some(Health { probe: probe?, interval, timeout, failures, start_grace })
}

/// The same address for the same name, for ever: QEMU's prefix, which is locally administered, and three bytes of a hash.
fn stable_mac(name: &Label) -> Result<Mac, diarch_ipc::name::BadName> {
    let hash = Sha256::digest(name.as_str());
    Mac::new(format!("52:54:00:{:02x}:{:02x}:{:02x}", hash[0], hash[1], hash[2]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"{"name": "web", "enabled": false,
        "qemu_configuration": {"cores": 2, "mem_gb": 1, "accel": "kvm", "qemu": "new", "mac_address": "52:54:00:AA:bb:cc"},
        "image": {"kernel": "/k", "initrd": "/i", "cmdline": "a b", "firmware": "/f", "disk": "/d", "disk_format": "qcow2", "disk_access": "read-only"},
        "network": {"forwards": [{"protocol": "udp", "host_address": "::1", "host_port": 1, "guest_port": 2}], "egress": "host"},
        "health": {"http": {"host_port": 8080, "path": "/x"}, "interval_s": 1, "timeout_s": 2, "failures": 4, "start_grace_s": 5},
        "restart": {"policy": "always"}, "run_configuration": {"debug": true}}"#;

    fn wrong(text: &str) -> Vec<(String, String)> {
        parse("x.json", text.as_bytes()).unwrap_err().into_iter().map(|p| (p.path, p.reason)).collect()
    }
    fn with(from: &str, to: &str) -> Vec<(String, String)> {
        assert!(FULL.contains(from), "{from}");
        wrong(&FULL.replace(from, to))
    }

    #[test]
    fn every_field_is_taken() {
        let vm = parse("web.json", FULL.as_bytes()).unwrap();
        assert_eq!((vm.name.as_str(), vm.enabled, vm.machine.memory.get()), ("web", false, 1024));
        assert_eq!(vm.machine.mac.as_str(), "52:54:00:aa:bb:cc");
        assert_eq!(vm.machine.disks.len(), 1);
        assert_eq!(vm.restart, RestartPolicy::Always);
        assert_eq!(vm.health.unwrap().failures, 4);
        assert!(vm.warnings[0].contains("run_configuration"));
    }

    #[test]
    fn a_small_file_gets_the_defaults() {
        let text = r#"{"name": "a", "qemu_configuration": {"cores": 1, "mem_mb": 256}, "image": {"disk": "/d"}, "health": {"qmp": {}}}"#;
        let vm = parse("a.json", text.as_bytes()).unwrap();
        assert!(vm.enabled && vm.machine.accel == Accel::Auto && vm.restart == RestartPolicy::OnFailure && vm.machine.egress == Egress::Closed);
        assert!(vm.machine.mac.as_str().starts_with("52:54:00:"));
        assert_eq!(vm.machine.mac, parse("b.json", text.as_bytes()).unwrap().machine.mac);
        assert_eq!(vm.machine.disks[0].format, DiskFormat::Raw);
        assert_eq!(vm.health.unwrap().interval, Duration::from_secs(10));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_path() {
        for (from, to, path) in [
            ("\"cores\": 2", "\"cores\": 0", "$.qemu_configuration.cores"),
            ("\"cores\": 2", "\"cores\": \"2\"", "$.qemu_configuration.cores"),
            ("\"cores\"", "\"coers\"", "$.qemu_configuration.coers"),
            ("\"mem_gb\": 1", "\"mem_gb\": 0", "$.qemu_configuration.mem_gb"),
            ("\"mem_gb\": 1", "\"mem_gb\": 18446744073709551615", "$.qemu_configuration.mem_gb"),
            ("\"mem_gb\": 1,", "", "$.qemu_configuration"),
            ("\"web\"", "\"../web\"", "$.name"),
            ("\"/k\"", "\"k\"", "$.image.kernel"),
            ("\"::1\"", "\"0177.1\"", "$.network.forwards[0].host_address"),
            ("\"host_port\": 1,", "\"host_port\": 65536,", "$.network.forwards[0].host_port"),
            ("\"/x\"", "\"/x y\"", "$.health.http.path"),
            ("\"interval_s\": 1", "\"interval_s\": 0", "$.health.interval_s"),
            ("\"always\"", "\"sometimes\"", "$.restart.policy"),
            ("AA:bb", "AA", "$.qemu_configuration.mac_address"),
            ("\"a b\"", "\"a\\nb\"", "$.image.cmdline"),
        ] {
            let found = with(from, to);
            assert!(found.iter().any(|(p, _)| p == path), "{from} -> {to}: {found:?}");
        }
    }

    #[test]
    fn an_array_in_the_place_of_an_object_is_refused() {
        let network = r#""network": {"forwards": [{"protocol": "udp", "host_address": "::1", "host_port": 1, "guest_port": 2}], "egress": "host"}"#;
        for (from, to, path) in [
            (r#"{"policy": "always"}"#, r#"["always"]"#, "$.restart"),
            (r#"{"host_port": 8080, "path": "/x"}"#, r#"[8080, "/x"]"#, "$.health.http"),
            (network, r#""network": {"forwards": [["udp", "::1", 1, 2]]}"#, "$.network.forwards[0]"),
            (network, r#""network": [[], null]"#, "$.network"),
        ] {
            assert_eq!(with(from, to), [(path.to_owned(), "an object is needed".to_owned())]);
        }
        assert_eq!(wrong("[]")[0].0, "$");
        assert_eq!(wrong(r#"{"name": "a", "image": ["/x", null, null, null, null, null, null]}"#)[0].0, "$.image");
    }

    const HOST: &str = r#"{"name": "gpu", "qemu_configuration": {"cores": 1, "mem_mb": 256}, "image": {"disk": "/d"},
        "devices": ["0000:65:00.0", "0000:65:00.1"],
        "network": {"tap": {"network": "lan", "queues": 2, "address": "10.0.0.5"},
                    "publish": [{"host_address": "192.0.2.1", "host_port": 443, "guest_port": 8443}]},
        "shares": [{"share": "models", "tag": "m", "access": "read-write"}, {"share": "keys", "tag": "keys"}]}"#;

    #[test]
    fn devices_a_tap_and_shares_are_taken() {
        let machine = parse("gpu.json", HOST.as_bytes()).unwrap().machine;
        assert_eq!(machine.devices.iter().map(Bdf::as_str).collect::<Vec<_>>(), ["0000:65:00.0", "0000:65:00.1"]);
        assert_eq!(machine.tap, Some(super::super::tests::tap()));
        assert_eq!(
            machine.shares.iter().map(|s| (s.tag.as_str(), s.access)).collect::<Vec<_>>(),
            [("m", DiskAccess::ReadWrite), ("keys", DiskAccess::ReadOnly)]
        );
        let one = HOST.replace(r#", "queues": 2, "address": "10.0.0.5""#, "");
        let tap = parse("gpu.json", one.as_bytes()).unwrap().machine.tap.unwrap();
        assert_eq!((tap.queues.get(), tap.address), (1, None));
    }

    #[test]
    fn what_is_wrong_with_devices_a_tap_and_shares_is_named_by_its_path() {
        let many = format!("\"devices\": [{}]", (0..17).map(|n| format!("\"0000:00:{n:02x}.0\"")).collect::<Vec<_>>().join(","));
        for (from, to, path, reason) in [
            ("\"0000:65:00.1\"", "\"65:00.1\"", "$.devices[1]", "leading zeros"),
            ("\"0000:65:00.1\"", "\"0000:65:00.0\"", "$.devices[1]", "twice"),
            (r#""devices": ["0000:65:00.0", "0000:65:00.1"]"#, &many, "$.devices", "at most 16"),
            ("\"lan\"", "\"../lan\"", "$.network.tap.network", "ASCII"),
            ("\"queues\": 2", "\"queues\": 9", "$.network.tap.queues", "from 1 to 8"),
            ("\"10.0.0.5\"", "\"10.0.0.05\"", "$.network.tap.address", "canonical"),
            ("\"host_address\": \"192.0.2.1\", ", "", "$.network.publish[0]", "missing field `host_address`"),
            ("\"host_port\": 443", "\"host_port\": 0", "$.network.publish[0].host_port", "from 1"),
            ("\"192.0.2.1\"", "\"127.0.0.1\"", "$.network.publish[0].host_address", "is a loopback address"),
            (r#"{"share": "keys", "tag": "keys"}"#, r#"["keys", "keys"]"#, "$.shares[1]", "an object"),
            ("\"tag\": \"keys\"", "\"tag\": \"m\"", "$.shares[1].tag", "twice"),
            ("\"share\": \"keys\"", "\"share\": \"models\"", "$.shares[1].share", "twice"),
            ("\"tag\": \"keys\"", "\"tag\": \"a tag of more than thirty-six bytes, all in all\"", "$.shares[1].tag", "ASCII"),
            ("\"read-write\"", "\"write\"", "$.shares[0].access", "unknown variant"),
        ] {
            assert!(HOST.contains(from), "{from}");
            let found = wrong(&HOST.replace(from, to));
            assert!(found.iter().any(|(p, r)| p == path && r.contains(reason)), "{from} -> {to}: {found:?}");
        }
    }

    #[test]
    fn ports_of_the_wrong_kind_of_network_are_told_where_they_belong() {
        let both = HOST.replace("\"publish\":", r#""egress": "host", "forwards": [{"host_port": 80, "guest_port": 80}], "publish":"#);
        let found = wrong(&both);
        assert_eq!(found.iter().map(|(path, _)| path.as_str()).collect::<Vec<_>>(), ["$.network.forwards", "$.network.egress"]);
        assert!(found[0].1.contains("publish"), "{found:?}");
        let none = wrong(&HOST.replace(r#""tap": {"network": "lan", "queues": 2, "address": "10.0.0.5"},"#, ""));
        assert!(none.len() == 1 && none[0].0 == "$.network.publish" && none[0].1.contains("forwards"), "{none:?}");
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        let text = r#"{"name": "a", "qemu_configuration": {"cores": 1}, "image": {"initrd": "i"}, "health": {}}"#;
        let paths: Vec<String> = wrong(text).into_iter().map(|(path, _)| path).collect();
        assert_eq!(paths, ["$.qemu_configuration", "$.image.initrd", "$.image", "$.image.initrd", "$.health"]);
    }
}
