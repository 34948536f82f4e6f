//! `/etc/diarch/grants.toml`: what root allows the worker to ask for. Nothing that is not written there is open.
//!
//! The file is trusted because of who could have written it: every directory on the way to it and the file itself belong to root and nobody
//! else can write them. It is opened once, and what was opened is what is checked and read (THREATS 4).

mod devices;
mod mounts;
mod network;

pub use devices::{DeviceGrant, Devices};
pub use mounts::{ImageType, Mountable, Socket, SocketKind, Source};
pub use network::{MAX_INTERFACE_NAME, Network, Nft, Place, Ports, Range};

use diarch_ipc::name::{Forward, Port, QemuName};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where the grants are unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/diarch/grants.toml";
/// A grants file is a page, not a book; bounds what is read.
const MAX_BYTES: u64 = 256 * 1024;

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grants {
    pub worker: Worker,
    pub vms: Vms,
    /// QEMU binaries by name: `[qemu.default]`.
    #[serde(default)]
    pub qemu: BTreeMap<String, Program>,
    #[serde(default)]
    pub forwards: Forwards,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub devices: Devices,
    /// Networks by name: `[network.lan]`.
    #[serde(default)]
    pub network: BTreeMap<String, Network>,
    #[serde(default)]
    pub ports: Ports,
    /// The program that sets the packet filter's rules.
    #[serde(default)]
    pub nft: Nft,
    /// What may be mounted, by name: `[mounts.models]`.
    #[serde(default)]
    pub mounts: BTreeMap<String, Mountable>,
    /// Sockets by name: `[sockets.downloader]`.
    #[serde(default)]
    pub sockets: BTreeMap<String, Socket>,
    /// The program that carries user-mode networking; without it, QEMU does so itself.
    pub passt: Option<Program>,
    /// The program that serves shared directories.
    pub virtiofsd: Option<Program>,
}

/// Who the worker is.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Worker {
    /// A user's name, or its number.
    pub user: User,
    /// The systemd unit it must be in; without it the user alone decides.
    pub unit: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum User {
    Uid(u32),
    Name(String),
}

impl User {
    /// The user's number and first group.
    pub fn resolve(&self) -> Result<(u32, u32), GrantsError> {
        let refuse = |reason: String| GrantsError::Value { field: "worker.user", reason };
        let found = match self {
            User::Uid(uid) => nix::unistd::User::from_uid((*uid).into()),
            User::Name(name) => nix::unistd::User::from_name(name),
        };
        let (uid, gid) = match (self, found) {
            (_, Ok(Some(user))) => (user.uid.as_raw(), user.gid.as_raw()),
            // A number needs no entry in the user database; its group is then the same number.
            (User::Uid(uid), Ok(None)) => (*uid, *uid),
            (User::Name(name), Ok(None)) => return Err(refuse(format!("there is no user {name:?}"))),
            (_, Err(error)) => return Err(refuse(format!("the user can't be looked up: {error}"))),
        };
        if uid == 0 {
            return Err(refuse("the worker can't be root: the two halves are kept apart by their users".into()));
        }
        Ok((uid, gid))
    }
}

/// What VMs may be in all.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vms {
    /// How many at one time: slots 0 to `max - 1`.
    pub max: u16,
    /// Slot *n* runs as user and group `uid_first + n`; nothing else on the host may use these numbers. One more,
    /// `uid_first + max`, is for the KVM probe.
    pub uid_first: u32,
    /// Guest memory of all running VMs together, in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs of one VM at most.
    pub cpus_each: u16,
    /// Whether VMs may use `/dev/kvm`.
    #[serde(default)]
    pub kvm: bool,
}

/// A program that a VM needs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    pub path: PathBuf,
    /// The file's SHA-256, hex; without it, its path, owner and mode decide.
    pub sha256: Option<String>,
    /// Directories of libraries and firmware that it needs beside the system's own (`/usr/lib`, `/usr/share/qemu` and the like): its jail has no others.
    #[serde(default)]
    pub libraries: Vec<PathBuf>,
}

/// What QEMU's user-mode network may do.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forwards {
    /// Host addresses and ports that may be forwarded into a guest: `"127.0.0.1:8000-8099"`.
    #[serde(default)]
    pub allow: Vec<PortRange>,
    /// Whether guests may open connections outwards. QEMU's user-mode network then also reaches the host's own
    /// loopback services.
    #[serde(default)]
    pub egress: bool,
}

/// `ADDRESS:FIRST-LAST` or `ADDRESS:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRange {
    pub address: IpAddr,
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    fn parse(text: &str) -> Option<Self> {
        let (address, ports) = text.rsplit_once(':')?;
        let address = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address).parse().ok()?;
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (first > 0 && first <= last).then_some(Self { address, first, last })
    }

    /// Exactly this address: a grant for 127.0.0.1 does not open 0.0.0.0.
    pub fn covers(&self, forward: &Forward) -> bool {
        self.holds(forward.host_address.0, forward.host_port)
    }

    pub fn holds(&self, address: IpAddr, port: Port) -> bool {
        self.address == address && (self.first..=self.last).contains(&port.get())
    }
}

impl std::fmt::Display for PortRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.address {
            IpAddr::V4(v4) => write!(f, "{v4}:")?,
            IpAddr::V6(v6) => write!(f, "[{v6}]:")?,
        }
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("an address and ports are needed, such as \"127.0.0.1:8000-8099\""))
    }
}

/// How many requests of each class the worker may make: tokens a second, and how many may come at once.
///
/// The defaults let 200 VMs be claimed and spawned in one go; what a looping worker costs then stays under a few percent
/// of a processor.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    pub read_per_second: u32,
    pub read_burst: u32,
    pub ensure_per_second: u32,
    pub ensure_burst: u32,
    pub once_per_second: u32,
    pub once_burst: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { read_per_second: 200, read_burst: 1000, ensure_per_second: 200, ensure_burst: 1000, once_per_second: 100, once_burst: 500 }
    }
}

/// Why a grants file is refused.
#[derive(Debug, thiserror::Error)]
pub enum GrantsError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{path} {reason}: whoever can write it could give the worker anything; {mend}")]
    Untrusted { path: PathBuf, reason: String, mend: String },
    #[error("{path} is larger than {MAX_BYTES} bytes")]
    TooLarge { path: PathBuf },
    #[error("{path}: {reason}")]
    Syntax { path: PathBuf, reason: String },
    #[error("{field}: {reason}")]
    Value { field: &'static str, reason: String },
}

impl Grants {
    /// Reads and checks the file; `owner` is who must own it (0: root).
    pub fn load(path: &Path, owner: u32) -> Result<Self, GrantsError> {
        let grants = Self::read(path, owner)?;
        grants.check()?;
        Ok(grants)
    }

    /// The same for who rehearses: he is the worker too, whoever it is on the host that the file was written for.
    pub fn rehearsed(path: &Path, owner: u32) -> Result<Self, GrantsError> {
        let mut grants = Self::read(path, owner)?;
        grants.worker = Worker { user: User::Uid(owner), unit: None };
        grants.check()?;
        Ok(grants)
    }

    fn read(path: &Path, owner: u32) -> Result<Self, GrantsError> {
        let mut file = open_trusted(path, owner)?;
        let io = |error| GrantsError::Io { path: path.to_owned(), error };
        let mut text = String::new();
        let read = Read::by_ref(&mut file).take(MAX_BYTES + 1).read_to_string(&mut text).map_err(io)?;
        if read as u64 > MAX_BYTES {
            return Err(GrantsError::TooLarge { path: path.to_owned() });
        }
        toml::from_str(&text).map_err(|error| GrantsError::Syntax { path: path.to_owned(), reason: in_one_line(&text, &error) })
    }

    /// The limits that need more than one field.
    fn check(&self) -> Result<(), GrantsError> {
        let refuse = |field, reason: String| Err(GrantsError::Value { field, reason });
        if self.vms.max > diarch_ipc::name::Slot::MAX + 1 {
            return refuse("vms.max", format!("at most {} VMs, and this is {}", diarch_ipc::name::Slot::MAX + 1, self.vms.max));
        }
        let (worker, group) = self.worker.user.resolve()?;
        // Below 1000 are the host's own users (Debian Policy 9.2.2); 65534 and 65535 mean "nobody" and "no change".
        let Some(last) = self.vms.uid_first.checked_add(u32::from(self.vms.max)).filter(|last| *last < u32::MAX) else {
            return refuse("vms.uid_first", "the range of user ids passes the highest one".into());
        };
        let range = self.vms.uid_first..=last;
        if self.vms.uid_first < 1000 || range.contains(&65534) || range.contains(&65535) {
            return refuse("vms.uid_first", format!("the user ids {} to {last} touch the host's own (below 1000, 65534, 65535)", self.vms.uid_first));
        }
        if range.contains(&worker) {
            return refuse("vms.uid_first", format!("the worker's own uid {worker} is in the VMs' range {} to {last}", self.vms.uid_first));
        }
        // A VM's group is the number of its user.
        if range.contains(&group) {
            return refuse("vms.uid_first", format!("the worker's group {group} is in the VMs' range {} to {last}", self.vms.uid_first));
        }
        for (name, qemu) in &self.qemu {
            if QemuName::new(name.as_str()).is_err() {
                return refuse("qemu", format!("{name:?} is not a name (ASCII letters, digits, '-', '_', '.')"));
            }
            if !qemu.path.is_absolute() {
                return refuse("qemu.*.path", format!("{} is not an absolute path", qemu.path.display()));
            }
            if let Some(directory) = qemu.libraries.iter().find(|directory| !plain(directory)) {
                return refuse("qemu.*.libraries", format!("{} is not an absolute path without `.` and `..`, or is the root", directory.display()));
            }
            if qemu.sha256.as_ref().is_some_and(|hex| hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))) {
                return refuse("qemu.*.sha256", format!("the hash of {name:?} is not 64 lower-case hex digits"));
            }
        }
        for (section, program) in [("passt", &self.passt), ("virtiofsd", &self.virtiofsd)] {
            let Some(program) = program else { continue };
            if !program.path.is_absolute() {
                return refuse(section, format!("{} is not an absolute path", program.path.display()));
            }
            if let Some(directory) = program.libraries.iter().find(|directory| !plain(directory)) {
                return refuse(section, format!("{} is not an absolute path without `.` and `..`, or is the root", directory.display()));
            }
            if program.sha256.as_ref().is_some_and(|hex| hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))) {
                return refuse(section, "its sha256 is not 64 lower-case hex digits".into());
            }
        }
        network::check(&self.network).or_else(|reason| refuse("network", reason))?;
        self.ports.check().or_else(|reason| refuse("ports.publish", reason))?;
        if !self.nft.path.is_absolute() {
            return refuse("nft.path", format!("{} is not an absolute path", self.nft.path.display()));
        }
        mounts::check(&self.mounts, &self.sockets)?;
        if self.devices.step_seconds == 0 {
            return refuse("devices.step_seconds", "no step takes no time; 20 is the default".into());
        }
        let limits = &self.limits;
        for (field, value) in [
            ("limits.read_per_second", limits.read_per_second),
            ("limits.read_burst", limits.read_burst),
            ("limits.ensure_per_second", limits.ensure_per_second),
            ("limits.ensure_burst", limits.ensure_burst),
            ("limits.once_per_second", limits.once_per_second),
            ("limits.once_burst", limits.once_burst),
        ] {
            if value == 0 {
                return refuse(field, "a limit of zero would stop everything, and stopping a VM with it; 1 is the least".into());
            }
        }
        Ok(())
    }
}

/// The parser's own wording draws the line over several; this goes to the journal, to `systemctl status`, and to other programs.
fn in_one_line(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else { return message };
    let (line, column) = (before.matches('\n').count() + 1, before.rsplit('\n').next().map_or(0, |last| last.chars().count()) + 1);
    format!("line {line}, column {column}: {message}")
}

fn plain(path: &Path) -> bool {
    use std::path::Component;
    let mut parts = path.components();
    parts.next() == Some(Component::RootDir) && parts.as_path() != Path::new("") && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// Opens a file that only `owner` can have written: the file, and every directory above it.
pub fn open_trusted(path: &Path, owner: u32) -> Result<File, GrantsError> {
    let file = open_below_trusted(path, owner, OFlags::RDONLY | OFlags::NONBLOCK, "name the file by its real path")?;
    let meta = file.metadata().map_err(|error| GrantsError::Io { path: path.to_owned(), error })?;
    if !meta.is_file() {
        return Err(GrantsError::Untrusted { path: path.to_owned(), reason: "is not a regular file".into(), mend: "write it as one".into() });
    }
    check_owner(path, &meta, owner, 0o022)?;
    Ok(file)
}

/// Opens a directory that only `owner` can have filled, in the same way. What is in it is not looked at: its owner has put it there.
pub fn open_trusted_directory(path: &Path, owner: u32) -> Result<File, GrantsError> {
    let directory = open_below_trusted(path, owner, OFlags::PATH | OFlags::DIRECTORY, "name a directory by its real path")?;
    let meta = directory.metadata().map_err(|error| GrantsError::Io { path: path.to_owned(), error })?;
    check_owner(path, &meta, owner, 0o022)?;
    Ok(directory)
}

fn open_below_trusted(path: &Path, owner: u32, flags: OFlags, mend: &str) -> Result<File, GrantsError> {
    let io = |path: &Path, error: std::io::Error| GrantsError::Io { path: path.to_owned(), error };
    let link = |path: &Path| GrantsError::Untrusted { path: path.to_owned(), reason: "is a symbolic link".into(), mend: mend.into() };
    let absolute = std::path::absolute(path).map_err(|error| io(path, error))?;
    for directory in absolute.ancestors().skip(1) {
        let meta = std::fs::symlink_metadata(directory).map_err(|error| io(directory, error))?;
        if meta.is_symlink() {
            return Err(link(directory));
        }
        // In a sticky directory others can add files and can't replace root's (/tmp).
        let sticky = meta.mode() & 0o1000 != 0;
        check_owner(directory, &meta, owner, if sticky { 0 } else { 0o022 })?;
    }
    match rustix::fs::open(&absolute, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
        Ok(file) => Ok(file.into()),
        Err(rustix::io::Errno::LOOP) => Err(link(path)),
        // With O_DIRECTORY a link is no directory.
        Err(rustix::io::Errno::NOTDIR) if std::fs::symlink_metadata(&absolute).is_ok_and(|meta| meta.is_symlink()) => Err(link(path)),
        Err(error) => Err(io(path, error.into())),
    }
}

fn check_owner(path: &Path, meta: &std::fs::Metadata, owner: u32, forbidden: u32) -> Result<(), GrantsError> {
    let untrusted = |reason: String, mend: String| Err(GrantsError::Untrusted { path: path.to_owned(), reason, mend });
    if meta.uid() != owner && meta.uid() != 0 {
        return untrusted(format!("belongs to uid {}", meta.uid()), format!("chown root {}", path.display()));
    }
    if meta.mode() & forbidden != 0 {
        return untrusted(format!("can be written by others (mode {:04o})", meta.mode() & 0o7777), format!("chmod go-w {}", path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const GOOD: &str =
        "[worker]\nuser = 64000\n[vms]\nmax = 4\nuid_first = 200000\nmemory_mib = 1024\ncpus_each = 2\n[qemu.default]\npath = \"/usr/bin/qemu\"\n";

    fn me() -> u32 {
        rustix::process::geteuid().as_raw()
    }
    fn written(text: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("grants.toml");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }
    fn load(text: &str) -> Result<Grants, GrantsError> {
        let (_dir, path) = written(text, 0o600);
        Grants::load(&path, me())
    }

    #[test]
    fn a_plain_file_is_accepted_and_opens_nothing_unsaid() {
        let grants = load(GOOD).unwrap();
        assert!(!grants.vms.kvm && !grants.forwards.egress && grants.forwards.allow.is_empty() && grants.worker.unit.is_none());
    }

    #[test]
    fn a_published_loopback_address_is_refused_by_its_name() {
        load(&format!("{GOOD}[ports]\npublish = [\"0.0.0.0:80\"]\nlisten = [\"127.0.0.1:80\"]\n")).unwrap();
        let sentence = load(&format!("{GOOD}[ports]\npublish = [\"0.0.0.0:80\", \"127.0.0.1:8000-8099\"]\n")).unwrap_err().to_string();
        assert!(sentence.starts_with("ports.publish: 127.0.0.1:8000-8099: ") && sentence.contains("forwards.allow"), "{sentence}");
    }

    #[test]
    fn a_file_or_directory_that_others_can_write_is_refused() {
        for mode in [0o620, 0o602, 0o666] {
            let (_dir, path) = written(GOOD, mode);
            let sentence = Grants::load(&path, me()).unwrap_err().to_string();
            assert!(sentence.contains("can be written by others") && sentence.contains("chmod go-w"), "{sentence}");
        }
        let (dir, path) = written(GOOD, 0o600);
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Grants::load(&path, me()).unwrap_err().to_string().contains("can be written by others"));
    }

    #[test]
    fn a_symbolic_link_is_refused() {
        let (dir, path) = written(GOOD, 0o600);
        let link = dir.path().join("link.toml");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        Grants::load(&link, me()).unwrap_err();
    }

    #[test]
    fn a_directory_of_libraries_is_only_roots_and_no_link() {
        let dir = tempfile::tempdir().unwrap();
        open_trusted_directory(dir.path(), me()).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/usr/lib", &link).unwrap();
        assert!(open_trusted_directory(&link, me()).unwrap_err().to_string().contains("symbolic link"));
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(open_trusted_directory(dir.path(), me()).unwrap_err().to_string().contains("can be written by others"));
        for bad in ["lib", "/", "/opt/../etc", ""] {
            let sentence = load(&format!("{GOOD}libraries = [{bad:?}]\n")).unwrap_err().to_string();
            assert!(sentence.contains("libraries"), "{sentence}");
        }
        load(&format!("{GOOD}libraries = [\"/opt/qemu/lib\"]\n")).unwrap();
    }

    #[test]
    fn a_named_pipe_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("grants.toml");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(Grants::load(&path, me()).unwrap_err().to_string().contains("not a regular file"));
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let sentence = load(&format!("{GOOD}shell = true\n")).unwrap_err().to_string();
        assert!(sentence.contains("shell"), "{sentence}");
    }

    #[test]
    fn the_worker_is_never_root_and_never_a_vm() {
        assert!(load(&GOOD.replace("64000", "0")).unwrap_err().to_string().contains("can't be root"));
        assert!(load(&GOOD.replace("64000", "200002")).unwrap_err().to_string().contains("the worker's own uid"));
        assert!(load(&GOOD.replace("64000", "\"no-such-user\"")).unwrap_err().to_string().contains("no user"));
    }

    #[test]
    fn the_vms_users_never_touch_the_hosts() {
        for first in ["0", "999", "65533", "4294967294"] {
            load(&GOOD.replace("200000", first)).unwrap_err();
        }
    }

    #[test]
    fn a_port_range_is_exact() {
        let forward = |address: &str, port: u64| Forward {
            protocol: diarch_ipc::name::Protocol::Tcp,
            host_address: address.to_owned().try_into().unwrap(),
            host_port: diarch_ipc::name::Port::new(port).unwrap(),
            guest_port: diarch_ipc::name::Port::new(80).unwrap(),
        };
        let range = PortRange::parse("127.0.0.1:8000-8010").unwrap();
        assert!(range.covers(&forward("127.0.0.1", 8000)) && range.covers(&forward("127.0.0.1", 8010)));
        assert!(!range.covers(&forward("127.0.0.1", 8011)) && !range.covers(&forward("0.0.0.0", 8000)) && !range.covers(&forward("127.0.0.2", 8000)));
        assert!(PortRange::parse("[::1]:80").unwrap().covers(&forward("::1", 80)));
        for bad in ["", ":80", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:9-8", "127.0.0.1:65536", "localhost:80", "127.0.0.1:1-2-3"] {
            assert!(PortRange::parse(bad).is_none(), "{bad}");
        }
    }
}
