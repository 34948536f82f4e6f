//! What the host lives on, and nobody gets, whatever the grants say (THREATS 13). Pure: a picture of the group in, a sentence out.
//!
//! | what is found on any function of the group            | why it is refused                                          |
//! |--------------------------------------------------------|------------------------------------------------------------|
//! | a disk that is mounted, swapped to, or part of another | the host, or a container of it, loses its files            |
//! | an interface that is up, has a default route, is part of a bridge or bond | the host loses its network              |
//! | an interface in another network namespace, or a network driver whose interface is nowhere to be seen | somebody uses it there |
//! | virtual functions that are switched on                 | they go with their parent                                  |
//! | the console that the host draws on                     | nobody sees the host any more                              |
//! | a process that has a node of it open                   | its driver would not let go, and whoever waits hangs       |
//! | a member that is no PCI function; no IOMMU             | it can't be given, or would not be held                    |

use super::facts::{Block, Function, Interface, Picture, VFIO_DRIVER};
use diarch_ipc::Error;

/// What a bridge between buses is (class 06, subclass 04), and what connects a processor to one (subclass 00). Neither is a guest's to have.
const PCI_BRIDGE: u32 = 0x0604;
const HOST_BRIDGE: u32 = 0x0600;
/// The drivers that the kernel lets a bridge of a group keep (drivers/vfio, drivers/pci/pcie/portdrv.c).
const BRIDGE_DRIVERS: [&str; 2] = ["pcieport", "pci-stub"];

/// Whether the function stays where it is while the rest of its group is given: bridges, and hosts' ends that have no driver.
pub fn stays(function: &Function) -> bool {
    match function.class >> 8 {
        PCI_BRIDGE => true,
        HOST_BRIDGE => function.driver.is_none(),
        _ => false,
    }
}

/// Refuses the group if anything of it is the host's.
pub fn judge(picture: &Picture) -> Result<(), Error> {
    if let Some(name) = picture.name.as_ref().filter(|name| name.contains("noiommu")) {
        return Err(Error::Unsupported { missing: format!("an IOMMU: group {} is of the kind {name}, which holds no device back", picture.group) });
    }
    if let Some(other) = picture.others.first() {
        return Err(host_has(format!("IOMMU group {} has a member that is no PCI function: {other}", picture.group)));
    }
    for function in &picture.functions {
        judge_function(picture, function)?;
    }
    match picture.holders.first() {
        Some(opener) => Err(Error::Conflict { holder: format!("process {}", opener.pid), reason: opener.to_string() }),
        None => Ok(()),
    }
}

fn judge_function(picture: &Picture, function: &Function) -> Result<(), Error> {
    let name = &function.function;
    if stays(function) {
        return match &function.driver {
            Some(driver) if !BRIDGE_DRIVERS.contains(&driver.as_str()) => {
                Err(host_has(format!("the bridge {name} is in the group and has the driver {driver}, with which the kernel gives the group to nobody")))
            }
            _ => Ok(()),
        };
    }
    if function.virtual_functions > 0 {
        let count = function.virtual_functions;
        return Err(host_has(format!("{name} has {count} virtual functions in use; write 0 to its sriov_numvfs first")));
    }
    for block in &function.blocks {
        judge_block(function, block)?;
    }
    for interface in &function.interfaces {
        judge_interface(function, interface)?;
    }
    if function.elsewhere > 0 {
        return Err(host_has(format!(
            "{name} has {} in another network namespace, where nothing tells whether it is in use; end the container that has it, or bring it back from \
             there (`ip link set dev NAME netns 1`)",
            if function.elsewhere == 1 { "a network interface".to_owned() } else { format!("{} network interfaces", function.elsewhere) }
        )));
    }
    let network = function.class >> 16 == 0x02;
    let driven = function.driver.as_ref().filter(|driver| *driver != VFIO_DRIVER);
    if let (true, true, Some(driver)) = (network, function.interfaces.is_empty(), driven) {
        return Err(host_has(format!(
            "{name} is a network card, and the interface of its driver {driver} is not to be seen: it may be in another network namespace; take it from \
             {driver} by hand if it is not in use"
        )));
    }
    if function.boot_vga && (driven.is_some() || picture.framebuffer_console) {
        let on = driven.map_or_else(|| "through the firmware's framebuffer".to_owned(), |driver| format!("with the driver {driver}"));
        return Err(host_has(format!("{name} is the display that the host started on, and it is drawn on {on}")));
    }
    match function.openers.first() {
        Some(opener) => Err(Error::Conflict {
            holder: format!("process {}", opener.pid),
            reason: format!("{opener}: the driver of {name} would wait for it for ever; end it first"),
        }),
        None => Ok(()),
    }
}

fn judge_block(function: &Function, block: &Block) -> Result<(), Error> {
    let Block { name, holders, mounted, swap, member } = block;
    let on = &function.function;
    let through = if holders.is_empty() { String::new() } else { format!(" through {}", holders.join(", ")) };
    if let Some(point) = mounted.first() {
        let more = if mounted.len() > 1 { format!(" and {} more places", mounted.len() - 1) } else { String::new() };
        return Err(host_has(format!("{on} has the disk {name}, which is mounted{through} on {point}{more}")));
    }
    if *swap {
        return Err(host_has(format!("{on} has the disk {name}, to which the host swaps{through}")));
    }
    if let Some(member) = member {
        return Err(host_has(format!("{on} has the disk {name}, which is part of {member}")));
    }
    if !holders.is_empty() {
        return Err(host_has(format!("{on} has the disk {name}, which is part of {}", holders.join(", "))));
    }
    Ok(())
}

fn judge_interface(function: &Function, interface: &Interface) -> Result<(), Error> {
    let Interface { name, up, default_route, part_of } = interface;
    let on = &function.function;
    if *default_route {
        return Err(host_has(format!("{on} has the interface {name}, over which a default route goes")));
    }
    if let Some(part_of) = part_of {
        return Err(host_has(format!("{on} has the interface {name}, which is part of {part_of}")));
    }
    if *up {
        return Err(host_has(format!("{on} has the interface {name}, which is up; `ip link set {name} down` if the host can do without it")));
    }
    Ok(())
}

fn host_has(reason: String) -> Error {
    Error::Conflict { holder: "this host".into(), reason }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::openers::Opener;
    use super::*;
    use diarch_ipc::name::Bdf;

    pub fn function(name: &str, class: u32, driver: Option<&str>) -> Function {
        Function {
            function: Bdf::new(name).unwrap(),
            path: format!("devices/pci0000:00/{name}"),
            vendor: 0x10de,
            device: 0x2330,
            class,
            driver: driver.map(str::to_owned),
            driver_override: None,
            mmio_mib: 16,
            resettable: true,
            boot_vga: false,
            virtual_functions: 0,
            virtual_function: false,
            blocks: Vec::new(),
            interfaces: Vec::new(),
            elsewhere: 0,
            openers: Vec::new(),
        }
    }

    pub fn picture(functions: Vec<Function>) -> Picture {
        Picture { group: 12, functions, vfio_driver: true, ..Picture::default() }
    }

    fn judged(change: impl FnOnce(&mut Picture)) -> Result<(), String> {
        let mut picture = picture(vec![
            function("0000:65:00.0", 0x03_0200, Some("nvidia")),
            function("0000:65:00.1", 0x04_0300, None),
            function("0000:64:00.0", 0x06_0400, Some("pcieport")),
        ]);
        change(&mut picture);
        judge(&picture).map_err(|error| error.to_string())
    }

    #[test]
    fn a_group_on_which_the_host_has_nothing_is_given() {
        judged(|_| ()).unwrap();
        judged(|picture| picture.functions[1].blocks.push(Block { name: "sda".into(), ..Block::default() })).unwrap();
        judged(|picture| picture.functions[1].interfaces.push(Interface { name: "eth1".into(), ..Interface::default() })).unwrap();
        judged(|picture| picture.functions[0].boot_vga = true).unwrap_err();
        judged(|picture| (picture.functions[0].boot_vga, picture.functions[0].driver) = (true, None)).unwrap();
    }

    /// What is done to the picture, and what the refusal says of it.
    type Case = (&'static str, fn(&mut Picture));

    #[test]
    fn each_thing_that_the_host_lives_on_is_refused_by_its_name_on_whichever_function_it_is() {
        let cases: &[Case] = &[
            ("nvme0n1p2, which is mounted on /boot", |p| {
                p.functions[1].blocks.push(Block { name: "nvme0n1p2".into(), mounted: vec!["/boot".into()], ..Block::default() });
            }),
            ("mounted through dm-0, dm-1 on / and 1 more places", |p| {
                p.functions[1].blocks.push(Block {
                    name: "sda3".into(),
                    holders: vec!["dm-0".into(), "dm-1".into()],
                    mounted: vec!["/".into(), "/home".into()],
                    ..Block::default()
                });
            }),
            ("to which the host swaps", |p| p.functions[0].blocks.push(Block { name: "sdb".into(), swap: true, ..Block::default() })),
            ("part of md127", |p| p.functions[0].blocks.push(Block { name: "sdb".into(), holders: vec!["md127".into()], ..Block::default() })),
            ("part of btrfs 1234", |p| p.functions[0].blocks.push(Block { name: "sdb".into(), member: Some("btrfs 1234".into()), ..Block::default() })),
            ("eth0, which is up", |p| p.functions[0].interfaces.push(Interface { name: "eth0".into(), up: true, ..Interface::default() })),
            ("default route", |p| p.functions[0].interfaces.push(Interface { name: "eth0".into(), default_route: true, ..Interface::default() })),
            ("part of br0", |p| p.functions[0].interfaces.push(Interface { name: "eth0".into(), part_of: Some("br0".into()), ..Interface::default() })),
            ("has a network interface in another network namespace", |p| {
                p.functions[1].interfaces.push(Interface { name: "eth1".into(), ..Interface::default() });
                p.functions[1].elsewhere = 1;
            }),
            ("has 3 network interfaces in another network namespace", |p| p.functions[0].elsewhere = 3),
            ("it may be in another network namespace", |p| (p.functions[1].class, p.functions[1].driver) = (0x02_0000, Some("e1000e".into()))),
            ("2 virtual functions in use", |p| p.functions[0].virtual_functions = 2),
            ("the display that the host started on", |p| (p.functions[0].boot_vga, p.framebuffer_console, p.functions[0].driver) = (true, true, None)),
            ("gdm (pid 7) has /dev/dri/card0 open", |p| {
                p.functions[0].openers.push(Opener { node: "/dev/dri/card0".into(), pid: 7, name: "gdm".into() });
            }),
            ("(pid 9) has /dev/vfio/12 open", |p| p.holders.push(Opener { node: "/dev/vfio/12".into(), pid: 9, name: "qemu".into() })),
            ("no PCI function: arm-smmu", |p| p.others.push("arm-smmu".into())),
            ("vfio-noiommu", |p| p.name = Some("vfio-noiommu".into())),
            ("has the driver shpchp", |p| p.functions[2].driver = Some("shpchp".into())),
        ];
        for (said, change) in cases {
            let refusal = judged(change).unwrap_err();
            assert!(refusal.contains(said), "{said}: {refusal}");
        }
    }
}
