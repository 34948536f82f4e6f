//! What there is: a function's group, and all that the host has on it, read from the kernel at one time. Nothing is decided here (`critical` does), and
//! nothing is taken from memory: a mount or an interface of a second ago counts.
//!
//! What can't be read is an error and not an absence, so that nothing is taken because something could not be looked at.

use super::node;
use super::openers::{self, Node, Opener};
use crate::host::{Host, there};
use diarch_ipc::Error;
use diarch_ipc::name::Bdf;
use rustix::fs::FileType;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// The driver that gives a function to a VM.
pub const VFIO_DRIVER: &str = "vfio-pci";
/// Directories below one function: a host controller with its hubs and disks has some hundreds. More is an error.
const MAX_DIRECTORIES: usize = 20_000;
/// A partition below a disk below a hub below a controller: a dozen.
const MAX_DEPTH: usize = 32;

/// A group, and what the host has on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Picture {
    pub group: u32,
    pub functions: Vec<Function>,
    /// Members of the group that are no PCI functions.
    pub others: Vec<String>,
    /// The group's name where the kernel gives one: `vfio-noiommu`, for one without an IOMMU behind it.
    pub name: Option<String>,
    /// vfio-pci is loaded.
    pub vfio_driver: bool,
    /// Who has `/dev/vfio/GROUP` open.
    pub holders: Vec<Opener>,
    /// The host started on a display of the group, and the text console is drawn on a framebuffer.
    pub framebuffer_console: bool,
}

/// One PCI function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    pub function: Bdf,
    /// Below sysfs, without links.
    pub path: String,
    pub vendor: u16,
    pub device: u16,
    /// Class, subclass, programming interface.
    pub class: u32,
    pub driver: Option<String>,
    pub driver_override: Option<String>,
    pub mmio_mib: u64,
    pub resettable: bool,
    pub boot_vga: bool,
    /// Virtual functions that are switched on.
    pub virtual_functions: u32,
    /// It is one itself.
    pub virtual_function: bool,
    pub blocks: Vec<Block>,
    pub interfaces: Vec<Interface>,
    /// Network interfaces that are in another network namespace than ours: of them there is nothing to be seen but their number.
    pub elsewhere: u64,
    pub openers: Vec<Opener>,
}

/// A disk or partition below a function.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Block {
    pub name: String,
    /// What is built on it, and on that: `dm-0`, `md127`.
    pub holders: Vec<String>,
    /// Where it, or what is built on it, is mounted, in any process's view.
    pub mounted: Vec<String>,
    pub swap: bool,
    /// The file system of several disks that it is part of.
    pub member: Option<String>,
}

/// A network interface of a function.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub up: bool,
    pub default_route: bool,
    /// What it is part of: a bridge, a bond, a VLAN's lower end.
    pub part_of: Option<String>,
}

/// The group of a function; `None` where there is no such function.
pub fn group_of(host: &Host, function: &Bdf) -> Result<Option<u32>, Error> {
    let at = format!("bus/pci/devices/{function}");
    if there(host.sysfs().resolve(&at)).map_err(|error| unreadable(&at, &error))?.is_none() {
        return Ok(None);
    }
    let link = format!("{at}/iommu_group");
    match there(host.sysfs().link_name(&link)).map_err(|error| unreadable(&link, &error))? {
        Some(number) => number.parse().map(Some).map_err(|_| unreadable(&link, &io::Error::other(format!("{number:?} is no group's number")))),
        None => Err(Error::Unsupported {
            missing: format!(
                "an IOMMU: the kernel has {function} in no IOMMU group. Switch VT-d or AMD-Vi on in the firmware, and have `intel_iommu=on` (AMD needs \
                 nothing) and `iommu=pt` on the kernel's command line"
            ),
        }),
    }
}

fn unreadable(what: &str, error: &io::Error) -> Error {
    Error::io(format!("look at {what}"), error)
}

/// Looks at a group.
pub fn look(host: &Host, group: u32) -> Result<Picture, Error> {
    gather(host, group).map_err(|error| unreadable(&format!("IOMMU group {group}"), &error))
}

fn gather(host: &Host, group: u32) -> io::Result<Picture> {
    let sysfs = host.sysfs();
    let at = format!("kernel/iommu_groups/{group}");
    let mut picture = Picture {
        group,
        name: there(sysfs.text(&format!("{at}/name")))?.filter(|name| !name.is_empty()),
        vfio_driver: sysfs.exists(&format!("bus/pci/drivers/{VFIO_DRIVER}"))?,
        ..Picture::default()
    };
    let mut around = Around::new(host);
    let mut nodes: Vec<(usize, Node)> = Vec::new();
    for name in sysfs.names(&format!("{at}/devices"))? {
        let Ok(function) = Bdf::new(name.as_str()) else {
            picture.others.push(name);
            continue;
        };
        let (found, below) = function_at(host, function, &mut around)?;
        nodes.extend(below.into_iter().map(|node| (picture.functions.len(), node)));
        picture.framebuffer_console |= found.boot_vga && framebuffer_console(host)?;
        picture.functions.push(found);
    }
    let own = Node { name: format!("/dev/vfio/{group}"), number: node::number(host, group)? };
    let mut wanted: Vec<Node> = nodes.iter().map(|(_, node)| node.clone()).collect();
    // Of a group that vfio does not have there is no node, and nobody has it open.
    if sysfs.exists(&format!("class/vfio/{group}"))? || host.dev().exists(&format!("vfio/{group}"))? {
        wanted.push(own.clone());
    }
    if wanted.is_empty() {
        return Ok(picture);
    }
    for opener in openers::of(host, around.processes()?, &wanted)? {
        if opener.node == own.name {
            picture.holders.push(opener);
        } else if let Some(function) = nodes.iter().find(|(_, node)| node.name == opener.node).and_then(|(at, _)| picture.functions.get_mut(*at)) {
            function.openers.push(opener);
        }
    }
    Ok(picture)
}

/// What is the same for all functions of a group: read when the first of them needs it, and once.
struct Around<'a> {
    host: &'a Host,
    processes: Option<Vec<u32>>,
    storage: Option<Storage>,
    network: Option<Network>,
}

impl<'a> Around<'a> {
    fn new(host: &'a Host) -> Self {
        Self { host, processes: None, storage: None, network: None }
    }

    fn processes(&mut self) -> io::Result<&[u32]> {
        let processes = match self.processes.take() {
            Some(processes) => processes,
            None => openers::processes(self.host)?,
        };
        Ok(self.processes.insert(processes))
    }

    fn storage(&mut self) -> io::Result<&Storage> {
        let storage = match self.storage.take() {
            Some(storage) => storage,
            None => Storage::look(self.host, self.processes()?)?,
        };
        Ok(self.storage.insert(storage))
    }

    fn network(&mut self) -> io::Result<&Network> {
        let network = match self.network.take() {
            Some(network) => network,
            None => Network::look(self.host)?,
        };
        Ok(self.network.insert(network))
    }
}

/// The nodes of a group's functions and of the group itself: who hangs on to them is asked again when a driver does not let go.
pub fn nodes(host: &Host, group: u32, paths: &[String]) -> io::Result<Vec<Node>> {
    let mut nodes = vec![Node { name: format!("/dev/vfio/{group}"), number: node::number(host, group)? }];
    for path in paths {
        let mut below = Below::default();
        below.walk(host, path, 0)?;
        nodes.append(&mut below.nodes);
        nodes.extend(nvidia_node(host, path)?);
    }
    Ok(nodes)
}

fn function_at(host: &Host, function: Bdf, around: &mut Around<'_>) -> io::Result<(Function, Vec<Node>)> {
    let sysfs = host.sysfs();
    let path = sysfs.resolve(&format!("bus/pci/devices/{function}"))?;
    let at = |name: &str| format!("{path}/{name}");
    let hex = |name: &str| {
        let text = sysfs.text(&at(name))?;
        let digits = text.trim_start_matches("0x");
        u32::from_str_radix(digits, 16).map_err(|_| io::Error::other(format!("{path}/{name} holds {text:?}")))
    };
    let number = |name: &str| io::Result::Ok(there(sysfs.text(&at(name)))?.and_then(|text| text.parse::<u32>().ok()).unwrap_or(0));
    let id = |name: &str| io::Result::Ok(u16::try_from(hex(name)?).unwrap_or(u16::MAX));

    let mut below = Below::default();
    below.walk(host, &path, 0)?;
    // The disks of an NVMe controller with several ways to it hang below its subsystem, and not below the controller.
    for subsystem in there(sysfs.names("class/nvme-subsystem"))?.unwrap_or_default() {
        let Some(place) = there(sysfs.resolve(&format!("class/nvme-subsystem/{subsystem}")))? else { continue };
        for (name, kind) in sysfs.entries(&place)? {
            if kind != FileType::Directory
                && let Some(controller) = there(sysfs.resolve(&format!("{place}/{name}")))?
                && controller.starts_with(&format!("{path}/"))
            {
                below.walk(host, &place, 0)?;
                break;
            }
        }
    }
    let mut nodes = below.nodes;
    nodes.extend(nvidia_node(host, &path)?);
    let mut interfaces = Vec::new();
    for name in below.interfaces {
        interfaces.extend(around.network()?.interface(host, name)?);
    }
    let elsewhere = below.elsewhere;
    let blocks = below.blocks.into_iter().map(|name| around.storage()?.block(host, name)).collect::<io::Result<_>>()?;
    let found = Function {
        vendor: id("vendor")?,
        device: id("device")?,
        class: hex("class")?,
        driver: driver(host, &path)?,
        driver_override: driver_override(host, &path)?,
        mmio_mib: mmio_mib(&sysfs.text(&at("resource"))?),
        resettable: sysfs.exists(&at("reset"))?,
        boot_vga: number("boot_vga")? != 0,
        virtual_functions: number("sriov_numvfs")?,
        virtual_function: sysfs.exists(&at("physfn"))?,
        blocks,
        interfaces,
        elsewhere,
        openers: Vec::new(),
        function,
        path,
    };
    Ok((found, nodes))
}

/// The driver that a function has now.
pub fn driver(host: &Host, path: &str) -> io::Result<Option<String>> {
    there(host.sysfs().link_name(&format!("{path}/driver")))
}

/// What is written in its `driver_override`: nothing shows as `(null)`.
pub fn driver_override(host: &Host, path: &str) -> io::Result<Option<String>> {
    let text = there(host.sysfs().text(&format!("{path}/driver_override")))?;
    // A line; on a stage, the rest of a longer one may follow.
    let name = text.as_deref().and_then(|text| text.lines().next()).unwrap_or_default();
    Ok((!name.is_empty() && name != "(null)").then(|| name.to_owned()))
}

/// What a function's memory BARs take: the first six lines of `resource` are BARs, each `first last flags` (linux/ioport.h: 0x200 is memory).
fn mmio_mib(resource: &str) -> u64 {
    const IORESOURCE_MEM: u64 = 0x200;
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let size = |line: &str| {
        let mut fields = line.split_whitespace().map(number);
        let (first, last, flags) = (fields.next()??, fields.next()??, fields.next()??);
        (flags & IORESOURCE_MEM != 0 && last > first).then(|| (last - first).saturating_add(1))
    };
    resource.lines().take(6).filter_map(size).fold(0u64, u64::saturating_add).div_ceil(1 << 20)
}

/// What hangs below a device in sysfs.
#[derive(Debug, Default)]
struct Below {
    blocks: Vec<String>,
    interfaces: Vec<String>,
    nodes: Vec<Node>,
    elsewhere: u64,
    directories: usize,
}

impl Below {
    /// Links are not followed: they lead to other devices.
    fn walk(&mut self, host: &Host, path: &str, depth: usize) -> io::Result<()> {
        self.directories += 1;
        if depth > MAX_DEPTH || self.directories > MAX_DIRECTORIES {
            return Err(io::Error::other(format!("{path}: more hangs below it than can be looked at")));
        }
        let sysfs = host.sysfs();
        // It may vanish while it is looked at; whatever was below it is then gone too.
        let Some(entries) = there(sysfs.entries(path))? else { return Ok(()) };
        if depth > 0 && entries.iter().any(|(name, _)| name == "subsystem") {
            let name = path.rsplit('/').next().unwrap_or_default();
            let kind = there(sysfs.link_name(&format!("{path}/subsystem")))?.unwrap_or_default();
            match kind.as_str() {
                "block" => self.blocks.push(name.to_owned()),
                "net" => self.interfaces.push(name.to_owned()),
                _ => {}
            }
            if entries.iter().any(|(name, _)| name == "dev") {
                self.nodes.extend(node_of(host, path)?);
            }
        }
        // The directory of a class (`net`) shows the interfaces of one network namespace, and counts them all. A device's own directory has a `subsystem`.
        if depth > 0 && !entries.iter().any(|(name, _)| name == "subsystem") {
            self.elsewhere += hidden(host, path)?;
        }
        for (name, _) in entries.iter().filter(|(name, kind)| *kind == FileType::Directory && name != "power" && name != "msi_irqs") {
            self.walk(host, &format!("{path}/{name}"), depth + 1)?;
        }
        Ok(())
    }
}

/// How many directories of this one are not shown. One may come or go between the list and the count, but not twice.
fn hidden(host: &Host, path: &str) -> io::Result<u64> {
    let mut least = u64::MAX;
    for _ in 0..2 {
        let Some(entries) = there(host.sysfs().entries(path))? else { return Ok(0) };
        let shown = entries.iter().filter(|(_, kind)| *kind == FileType::Directory).count() as u64;
        let Some(all) = there(host.sysfs().directories(path))? else { return Ok(0) };
        least = least.min(all.saturating_sub(shown));
        if least == 0 {
            break;
        }
    }
    Ok(least)
}

fn node_of(host: &Host, path: &str) -> io::Result<Option<Node>> {
    let Some(uevent) = there(host.sysfs().text(&format!("{path}/uevent")))? else { return Ok(None) };
    let field = |key: &str| uevent.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let number = |key: &str| field(key).and_then(|text| text.parse::<u32>().ok());
    let Some(name) = field("DEVNAME") else { return Ok(None) };
    Ok(Some(Node { name: format!("/dev/{name}"), number: number("MAJOR").zip(number("MINOR")) }))
}

/// NVIDIA's own driver makes its nodes without telling sysfs.
fn nvidia_node(host: &Host, path: &str) -> io::Result<Option<Node>> {
    const MAJOR: u32 = 195;
    let function = path.rsplit('/').next().unwrap_or_default();
    let Some(text) = there(host.procfs().text(&format!("driver/nvidia/gpus/{function}/information")))? else { return Ok(None) };
    let minor = text.lines().find_map(|line| line.strip_prefix("Device Minor:")?.trim().parse::<u32>().ok());
    Ok(minor.map(|minor| Node { name: format!("/dev/nvidia{minor}"), number: Some((MAJOR, minor)) }))
}

/// Whether the kernel's text console is on a framebuffer now.
fn framebuffer_console(host: &Host) -> io::Result<bool> {
    let sysfs = host.sysfs();
    for console in there(sysfs.names("class/vtconsole"))?.unwrap_or_default() {
        let at = |name: &str| there(sysfs.text(&format!("class/vtconsole/{console}/{name}")));
        if at("name")?.is_some_and(|name| name.contains("frame buffer")) && at("bind")?.as_deref() == Some("1") {
            return Ok(true);
        }
    }
    Ok(false)
}

// ---- disks ----

/// What the host has on disks.
#[derive(Debug, Default)]
struct Storage {
    mounts: Vec<Mount>,
    /// Names below /dev.
    swaps: BTreeSet<String>,
    /// Disk to file system, for those of several disks, whose mounts show none of them or one.
    members: BTreeMap<String, String>,
    /// Loop devices with the file behind each, which may be a disk's node: the kernel shows no holder for that.
    loops: Vec<(String, String)>,
    zfs: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    number: String,
    source: String,
    point: String,
}

impl Storage {
    fn look(host: &Host, processes: &[u32]) -> io::Result<Self> {
        let (sysfs, proc) = (host.sysfs(), host.procfs());
        let mut storage = Storage { zfs: sysfs.exists("module/zfs")?, ..Storage::default() };
        // Not only the host's own view: a container may have mounted what nobody else sees.
        let mut seen = BTreeSet::new();
        for process in processes {
            let Some(view) = there(proc.link(&format!("{process}/ns/mnt")))? else { continue };
            if seen.insert(view)
                && let Some(text) = there(proc.text(&format!("{process}/mountinfo")))?
            {
                storage.mounts.extend(text.lines().flat_map(mounts));
            }
        }
        let swaps = there(proc.text("swaps"))?.unwrap_or_default();
        storage.swaps.extend(swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()?.strip_prefix("/dev/")).map(str::to_owned));
        for (place, inner) in [("fs/btrfs", "devices"), ("fs/bcachefs", "")] {
            for file_system in there(sysfs.names(place))?.unwrap_or_default() {
                let at = format!("{place}/{file_system}/{inner}");
                for entry in there(sysfs.names(at.trim_end_matches('/')))?.unwrap_or_default() {
                    // fs/btrfs/UUID/devices/sda is a link to the disk; fs/bcachefs/UUID/dev-0/block is.
                    let disk = if inner.is_empty() { there(sysfs.link_name(&format!("{at}{entry}/block")))? } else { Some(entry) };
                    if let Some(disk) = disk {
                        storage.members.insert(disk, format!("{} {file_system}", place.trim_start_matches("fs/")));
                    }
                }
            }
        }
        // A file system's journal on a disk of its own (ext4: `sdc`; within its own disk: `sdb1-8`). Nothing else in the kernel's files says so.
        for journal in there(proc.names("fs/jbd2"))?.unwrap_or_default() {
            let (disk, inode) = journal.rsplit_once('-').unwrap_or((&journal, "0"));
            let disk = if inode.bytes().all(|byte| byte.is_ascii_digit()) { disk } else { &journal };
            storage.members.entry(disk.to_owned()).or_insert_with(|| "a file system, with its journal".into());
        }
        for disk in there(sysfs.names("class/block"))?.unwrap_or_default().into_iter().filter(|name| name.starts_with("loop")) {
            if let Some(file) = there(sysfs.text(&format!("class/block/{disk}/loop/backing_file")))? {
                storage.loops.push((disk, file));
            }
        }
        Ok(storage)
    }

    fn block(&self, host: &Host, name: String) -> io::Result<Block> {
        let mut block = Block { name: name.clone(), ..Block::default() };
        let mut open = vec![name];
        let mut seen = BTreeSet::new();
        while let Some(next) = open.pop() {
            if !seen.insert(next.clone()) {
                continue;
            }
            let at = format!("class/block/{next}");
            let number = there(host.sysfs().text(&format!("{at}/dev")))?.unwrap_or_default();
            // The kernel writes `!` for the `/` of a node's name (cciss!c0d0).
            let node = format!("/dev/{}", next.replace('!', "/"));
            let here = self.mounts.iter().filter(|mount| (!number.is_empty() && mount.number == number) || mount.source == node);
            block.mounted.extend(here.map(|mount| mount.point.clone()));
            block.swap |= self.swaps.contains(node.trim_start_matches("/dev/"));
            if let Some(file_system) = self.members.get(&next) {
                block.member = Some(file_system.clone());
            }
            // ZFS says nowhere in the kernel's files which disks are its own; udev looked at what is written on them.
            if self.zfs && there(host.run().text(&format!("udev/data/b{number}")))?.is_some_and(|text| text.contains("ID_FS_TYPE=zfs_member")) {
                block.member = Some("a ZFS pool".into());
            }
            let holders = there(host.sysfs().names(&format!("{at}/holders")))?.unwrap_or_default();
            let looped = self.loops.iter().filter(|(_, file)| *file == node).map(|(name, _)| name.clone());
            let holders: Vec<String> = holders.into_iter().chain(looped).collect();
            block.holders.extend(holders.iter().cloned());
            open.extend(holders);
        }
        block.mounted.sort();
        block.mounted.dedup();
        Ok(block)
    }
}

/// proc(5): `36 35 98:0 /root /mount/point options optional... - type source options`. XFS names the disks of its log and real-time section in the last.
fn mounts(line: &str) -> Vec<Mount> {
    let parse = || {
        let mut fields = line.split(' ');
        let (number, point) = (fields.nth(2)?, fields.nth(1)?);
        let mut behind = fields.skip_while(|field| *field != "-").skip(2);
        Some((number, point, behind.next()?, behind.next().unwrap_or_default()))
    };
    let Some((number, point, source, options)) = parse() else { return Vec::new() };
    let further = options.split(',').filter_map(|option| option.strip_prefix("logdev=").or_else(|| option.strip_prefix("rtdev=")));
    let mount = |(number, source): (&str, &str)| Mount { number: number.to_owned(), source: source.to_owned(), point: point.to_owned() };
    std::iter::once((number, source)).chain(further.map(|disk| ("", disk))).map(mount).collect()
}

// ---- network ----

/// The host's default routes.
#[derive(Debug, Default)]
struct Network {
    default_routes: BTreeSet<String>,
}

impl Network {
    fn look(host: &Host) -> io::Result<Self> {
        let text = |name: &str| io::Result::Ok(there(host.procfs().text(&format!("1/net/{name}")))?.unwrap_or_default());
        // `Iface Destination Gateway Flags RefCnt Use Metric Mask ...`, and from IPv6 `destination length source length next ... interface`.
        let (four, six) = (text("route")?, text("ipv6_route")?);
        let four = four.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            (fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000")).then(|| fields[0].to_owned())
        });
        let six = six.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            (fields.first()?.bytes().all(|b| b == b'0') && fields.get(1) == Some(&"00")).then(|| fields.last().map(|name| (*name).to_owned()))?
        });
        Ok(Network { default_routes: four.chain(six).filter(|name| name != "lo").collect() })
    }

    fn interface(&self, host: &Host, name: String) -> io::Result<Option<Interface>> {
        let sysfs = host.sysfs();
        let at = format!("class/net/{name}");
        let Some(flags) = there(sysfs.text(&format!("{at}/flags")))? else { return Ok(None) };
        let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).map_err(|_| io::Error::other(format!("{at}/flags holds {flags:?}")))?;
        let state = there(sysfs.text(&format!("{at}/operstate")))?;
        let mut part_of = there(sysfs.link_name(&format!("{at}/master")))?;
        if part_of.is_none() {
            part_of = there(sysfs.names(&at))?.unwrap_or_default().iter().find_map(|entry| entry.strip_prefix("upper_")).map(str::to_owned);
        }
        // IFF_UP, linux/if.h.
        let up = flags & 1 != 0 || state.as_deref() == Some("up");
        Ok(Some(Interface { up, default_route: self.default_routes.contains(&name), part_of, name }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_added_up_and_ports_and_roms_are_not() {
        let text = "0x00000000a0000000 0x00000000a0ffffff 0x0000000000040200\n0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x0000020000000000 0x0000021fffffffff 0x000000000014220c\n0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x0000000000003000 0x000000000000307f 0x0000000000040101\n0x00000000a1000000 0x00000000a1000fff 0x0000000000040200\n\
                    0x00000000a2000000 0x00000000a207ffff 0x0000000000046200\n";
        assert_eq!(mmio_mib(text), 16 + 131_072 + 1, "a page more is a whole MiB more");
        assert_eq!(mmio_mib(""), 0);
        assert_eq!(mmio_mib("0x0 0xffffffffffffffff 0x200\n0x0 0xffffffffffffffff 0x200\n"), 1 << 44, "and nothing overflows");
    }

    #[test]
    fn a_mount_is_read_with_and_without_optional_fields() {
        let of = |line: &str| mounts(line).into_iter().map(|mount| (mount.number, mount.source, mount.point)).collect::<Vec<_>>();
        let read = |number: &str, source: &str, point: &str| vec![(number.to_owned(), source.to_owned(), point.to_owned())];
        assert_eq!(of("36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw"), read("98:0", "/dev/root", "/mnt"));
        assert_eq!(of("24 1 259:2 / / rw - ext4 /dev/nvme0n1p2 rw"), read("259:2", "/dev/nvme0n1p2", "/"));
        assert_eq!(of("41 25 8:1 / /srv rw - xfs /dev/sda1 rw,logdev=/dev/sdx,noquota")[1..], read("", "/dev/sdx", "/srv"));
        assert!(of("24 1 259:2").is_empty());
    }
}
