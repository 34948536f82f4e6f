//! What the kernel has, in this run's namespaces: told by the kernel and its own tools, and never by Diarch.
//!
//! Everything is a *fact*: a noun and a line of text that says the same as long as the thing is the same (no interface numbers, no handles, no counters).
//! Facts are counted, so that two of a kind are not one.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What kind of thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Noun {
    Process,
    /// A cgroup that some process is in.
    Cgroup,
    Link,
    Address,
    Route,
    /// A rule of the routing policy.
    Policy,
    /// A table, chain, set or rule of the packet filter.
    Filter,
    Mount,
    /// A file below the supervisor's run directory.
    File,
    /// A UNIX socket with a name.
    Socket,
    /// A TCP or UDP socket that is bound.
    Port,
    /// A descriptor of the supervisor's, by its kind.
    Descriptor,
    /// A file or link of the stage on which devices are.
    Device,
    /// A descriptor that the service manager has, by its kind: what it keeps for the next supervisor.
    Kept,
}

impl fmt::Display for Noun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// Facts with their number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts(pub BTreeMap<(Noun, String), usize>);

impl Facts {
    pub fn add(&mut self, noun: Noun, text: impl Into<String>) {
        *self.0.entry((noun, text.into())).or_insert(0) += 1;
    }

    pub fn of(&self, noun: Noun) -> impl Iterator<Item = &str> {
        self.0.keys().filter(move |(of, _)| *of == noun).map(|(_, text)| text.as_str())
    }

    pub fn count(&self, noun: Noun, text: &str) -> usize {
        self.0.get(&(noun, text.to_owned())).copied().unwrap_or(0)
    }
}

/// Where to look.
#[derive(Debug, Clone)]
pub struct View {
    pub supervisor: i32,
    pub manager: i32,
    /// Processes that are this run's own.
    pub own: Vec<i32>,
    pub run_directory: PathBuf,
    pub stage: PathBuf,
    /// The host's directory.
    pub directory: PathBuf,
}

/// A process, by what does not change while it lives.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub start_time: u64,
    pub state: char,
    pub name: String,
    pub uid: u32,
}

impl Process {
    pub fn fact(pid: i64, start_time: u64, uid: u32) -> String {
        format!("pid {pid} start {start_time} uid {uid}")
    }
}

/// Everything, once.
pub fn look(view: &View) -> io::Result<Facts> {
    let mut facts = Facts::default();
    let processes = processes();
    for process in processes.iter().filter(|process| !view.own.contains(&process.pid) && process.pid != view.supervisor) {
        facts.add(Noun::Process, Process::fact(process.pid.into(), process.start_time, process.uid));
    }
    for process in &processes {
        for line in fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default().lines() {
            if facts.count(Noun::Cgroup, line) == 0 {
                facts.add(Noun::Cgroup, line);
            }
        }
    }
    network(&mut facts)?;
    for line in fs::read_to_string(format!("/proc/{}/mountinfo", view.supervisor))?.lines() {
        facts.add(Noun::Mount, mount(line));
    }
    tree(&view.run_directory, &view.run_directory, &mut facts);
    for part in ["sys", "dev"] {
        stage(&view.stage, &view.stage.join(part), &mut facts);
    }
    let below = view.directory.to_string_lossy();
    for line in fs::read_to_string("/proc/net/unix")?.lines().skip(1) {
        // Num RefCount Protocol Flags Type St Inode Path; of connections, only the named end's flags say that it listens.
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [_, _, _, flags, _, _, _, path, ..] = fields[..]
            && path.starts_with(&*below)
            && u32::from_str_radix(flags, 16).unwrap_or(0) & 0x1_0000 != 0
        {
            facts.add(Noun::Socket, path.strip_prefix(&*below).unwrap_or(path).trim_start_matches('/'));
        }
    }
    ports(&mut facts);
    for (noun, pid) in [(Noun::Descriptor, view.supervisor), (Noun::Kept, view.manager)] {
        for fd in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            if let Ok(target) = fs::read_link(fd.path()) {
                facts.add(noun, descriptor(&target.to_string_lossy()));
            }
        }
    }
    Ok(facts)
}

/// A descriptor's kind: a file by its path, sockets and the like by their word. (`socket:[123]` is one of many; `anon_inode:[pidfd]` tells more.)
fn descriptor(target: &str) -> String {
    match target.split_once(":[") {
        Some((kind, rest)) if rest.trim_end_matches(']').bytes().all(|b| b.is_ascii_digit()) => kind.to_owned(),
        _ => target.to_owned(),
    }
}

// ---- processes ----

/// The number of every process of this PID namespace.
pub fn numbers() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Every process of this PID namespace; zombies too, since nobody should leave them.
pub fn processes() -> Vec<Process> {
    let mut found: Vec<Process> = numbers().into_iter().filter_map(process).collect();
    found.sort();
    found
}

pub fn process(pid: i32) -> Option<Process> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    // "PID (NAME) STATE PPID ...": the name may hold anything, so from the last bracket. The start is field 22.
    let (open, close) = (stat.find('(')?, stat.rfind(')')?);
    let fields: Vec<&str> = stat[close + 1..].split_whitespace().collect();
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()?;
    Some(Process {
        pid,
        parent: fields.get(1)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
        state: fields.first()?.chars().next()?,
        name: stat[open + 1..close].to_owned(),
        uid,
    })
}

/// What [`role`] calls an nft, and what is about to become one.
pub const NFT: &str = "nft";
pub const VIRTIOFSD: &str = "virtiofsd";

/// What a process below the supervisor is.
pub fn role(process: &Process) -> &'static str {
    let pid = process.pid;
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if program.contains("qemu") {
        return "QEMU";
    }
    for name in ["passt", VIRTIOFSD, NFT] {
        if program.contains(name) {
            return name;
        }
    }
    // Between fork and exec it is the supervisor's program still; of a jail's the kernel tells a second number, in its own namespace.
    let status = fs::read(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = String::from_utf8_lossy(&status).lines().find_map(|line| Some(line.strip_prefix("NSpid:")?.split_whitespace().count()));
    match numbers {
        Some(1) if program.contains("supervisor") => NFT,
        Some(2..) if program.contains("supervisor") => "jail at its gate",
        // A supervisor to be.
        _ if program.contains("stand-in") => "supervisor, at its birth",
        _ => "other child",
    }
}

/// A process for people: what it is, and whose child.
pub fn described(pid: i64) -> String {
    let Some(process) = i32::try_from(pid).ok().and_then(process) else { return "gone by now".into() };
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut command = String::from_utf8_lossy(&command).replace('\0', " ");
    command.truncate(command.char_indices().nth(160).map_or(command.len(), |(at, _)| at));
    format!("{} ({}), child of {}: {command}", process.name, process.state, process.parent)
}

// ---- the network ----

fn network(facts: &mut Facts) -> io::Result<()> {
    let words = |value: &Value, keys: &[&str]| -> String {
        let word = |key: &&str| {
            let found = key.split('.').try_fold(value, |at, part| at.get(part))?;
            Some(format!("{key} {}", found.as_str().map_or_else(|| found.to_string(), str::to_owned)))
        };
        keys.iter().filter_map(word).collect::<Vec<_>>().join(" ")
    };
    for link in list(&["ip", "-j", "-d", "addr"])? {
        // An operational state follows its fellow's by a moment, and the flags repeat it.
        facts.add(Noun::Link, words(&link, &["ifname", "linkinfo.info_kind", "master", "mtu", "address"]));
        let name = link["ifname"].as_str().unwrap_or_default();
        for address in link["addr_info"].as_array().into_iter().flatten() {
            facts.add(Noun::Address, format!("{name} {}", words(address, &["local", "address", "prefixlen", "scope"])));
        }
    }
    for family in ["-4", "-6"] {
        for route in list(&["ip", "-j", family, "route", "show", "table", "all"])? {
            facts.add(Noun::Route, format!("{family} {}", words(&route, &["type", "dst", "gateway", "dev", "table", "prefsrc", "scope"])));
        }
        for rule in list(&["ip", "-j", family, "rule"])? {
            facts.add(Noun::Policy, format!("{family} {}", words(&rule, &["priority", "src", "dst", "iif", "table"])));
        }
    }
    let filter = run(&["nft", "-j", "list", "ruleset"])?;
    for mut item in filter["nftables"].as_array().cloned().unwrap_or_default() {
        if item.get("metainfo").is_none() {
            forget(&mut item);
            facts.add(Noun::Filter, item.to_string());
        }
    }
    Ok(())
}

/// Takes out what says something else each time: handles, and what counters counted.
fn forget(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.remove("handle");
            if let Some(Value::Object(counter)) = fields.get_mut("counter") {
                counter.clear();
            }
            fields.values_mut().for_each(forget);
        }
        Value::Array(items) => items.iter_mut().for_each(forget),
        _ => {}
    }
}

fn run(words: &[&str]) -> io::Result<Value> {
    let output = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr))));
    }
    // Nothing to list is no text for some versions of ip.
    if output.stdout.trim_ascii().is_empty() {
        return Ok(Value::Array(Vec::new()));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn list(words: &[&str]) -> io::Result<Vec<Value>> {
    // ip lists `{}` for what it filtered out.
    let listed = run(words)?.as_array().cloned().unwrap_or_default();
    Ok(listed.into_iter().filter(|item| item.as_object().is_some_and(|fields| !fields.is_empty())).collect())
}

fn ports(facts: &mut Facts) {
    for (protocol, bound) in [("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")] {
        let text = fs::read_to_string(format!("/proc/net/{protocol}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            // sl local remote state ...
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields.get(3) == Some(&bound) {
                facts.add(Noun::Port, format!("{protocol} {}", fields[1]));
            }
        }
    }
}

// ---- files ----

/// A line of mountinfo(5) without the numbers of mount and parent, and without peer groups, which other mounts' making changes.
fn mount(line: &str) -> String {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let behind = fields.iter().position(|field| *field == "-").unwrap_or(fields.len());
    let of = |range: std::ops::Range<usize>| fields.get(range).unwrap_or_default().join(" ");
    format!("{} - {}", of(3..6), of(behind + 1..fields.len()))
}

fn tree(root: &Path, directory: &Path, facts: &mut Facts) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        facts.add(Noun::File, path.strip_prefix(root).unwrap_or(&path).to_string_lossy());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            tree(root, &path, facts);
        }
    }
}

/// Names with their links, modes and content.
fn stage(root: &Path, directory: &Path, facts: &mut Facts) {
    use std::os::unix::fs::PermissionsExt;
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.strip_prefix(root).unwrap_or(&path).display();
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.is_symlink() {
            facts.add(Noun::Device, format!("{name} link {}", fs::read_link(&path).unwrap_or_default().display()));
        } else if meta.is_dir() {
            stage(root, &path, facts);
        } else {
            facts.add(Noun::Device, format!("{name} file {:o} {}", meta.permissions().mode() & 0o7777, crate::stage::shown(&path).trim_end()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_named_by_its_kind_and_not_by_its_number() {
        assert_eq!(descriptor("socket:[123]"), "socket");
        assert_eq!(descriptor("anon_inode:[pidfd]"), "anon_inode:[pidfd]");
        assert_eq!(descriptor("/dev/net/tun"), "/dev/net/tun");
    }

    #[test]
    fn a_mount_is_named_without_what_changes_by_itself() {
        let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mount(line), "/mnt1 /mnt2 rw,noatime - ext3 /dev/root rw,errors=continue");
        assert_eq!(mount("22 1 0:5 / /dev rw - devtmpfs udev rw"), "/ /dev rw - devtmpfs udev rw");
    }

    #[test]
    fn a_rule_is_the_same_rule_whatever_its_handle_and_counter() {
        let mut one = serde_json::json!({"rule": {"handle": 4, "expr": [{"counter": {"packets": 1, "bytes": 2}}, {"drop": null}]}});
        let mut other = serde_json::json!({"rule": {"handle": 9, "expr": [{"counter": {"packets": 0, "bytes": 0}}, {"drop": null}]}});
        forget(&mut one);
        forget(&mut other);
        assert_eq!(one, other);
    }
}
