//! `diarch device`: the PCI devices that are given to VMs.

use super::connection::{Connection, Patience, unexpected};
use super::escape;
use super::screen::{Screen, Stop};
use super::table::{Column, Tone, Value, table};
use crate::control::protocol::{DeviceView, Reply, Request};
use std::path::Path;

const COLUMNS: &[Column] = &[
    Column::text("DEVICE"),
    Column::text("STATE"),
    Column::text("VM"),
    Column::number("GROUP").expendable(2),
    Column::text("MODEL").expendable(1),
    Column::text("CLASS").expendable(4),
    Column::number("MMIO").expendable(5),
    Column::text("RESET").expendable(3),
    Column::text("BY").expendable(6),
    Column::text("TROUBLE"),
];

/// `diarch device list`.
pub fn list(socket: &Path, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let mut connection = Connection::open(socket)?;
    connection.send(&Request::DeviceList {})?;
    let mut answer = None;
    while let Some(reply) = connection.next(Patience::Answer, screen)? {
        match reply {
            Reply::Notice { message } => {
                let _ = writeln!(screen.err, "{}", escape::cell(&message));
            }
            Reply::Devices(devices) => answer = Some(devices),
            _ => {}
        }
    }
    let Some(devices) = answer else { return Err(unexpected("something else than a list of devices")) };
    if screen.json {
        return screen.document(&devices);
    }
    let rows: Vec<Vec<Value>> = devices.iter().map(row).collect();
    screen.say(table(COLUMNS, &rows, screen))?;
    if devices.is_empty() && screen.width.is_some() {
        screen.say("No devices: no VM has one, and no VM file names one.")?;
    }
    Ok(())
}

fn row(of: &DeviceView) -> Vec<Value> {
    let names = || of.wanted_by.iter().map(|name| name.to_string()).collect::<Vec<_>>().join(",");
    vec![
        Value::plain(of.function.as_str()),
        Value::new(of.state.as_str(), tone(&of.state)),
        match &of.vm {
            Some(vm) => Value::plain(vm.as_str()),
            None if of.wanted_by.is_empty() => Value::plain("-"),
            None => Value::plain(format!("({})", names())),
        },
        Value::maybe(of.group),
        Value::maybe(of.model.as_deref()),
        Value::maybe(of.class.as_deref()),
        Value::maybe(of.mmio_mib.map(|mib| format!("{mib}M"))),
        Value::maybe(of.resettable.map(|can| if can { "yes" } else { "no" })),
        Value::maybe(of.passing.as_deref()),
        Value::maybe(of.trouble.as_deref()),
    ]
}

fn tone(state: &str) -> Tone {
    match state {
        "attached" => Tone::Good,
        "reserved" | "resetting" => Tone::Busy,
        "quarantined" => Tone::Bad,
        "free" => Tone::Faint,
        _ => Tone::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::super::connection::tests::FakeWorker;
    use super::super::screen::tests::Printed;
    use super::*;
    use diarch_ipc::name::{Bdf, Label};

    fn views() -> Vec<DeviceView> {
        let label = |name: &str| Label::new(name).expect("a name");
        let gpu = DeviceView {
            function: Bdf::new("0000:65:00.0").expect("a function"),
            state: "quarantined".into(),
            vm: Some(label("gpu")),
            wanted_by: vec![label("gpu")],
            group: Some(7),
            model: Some("10de:2330".into()),
            class: Some("030200".into()),
            mmio_mib: Some(131_105),
            resettable: Some(true),
            passing: None,
            trouble: Some("its config space reads\u{1b}[2J ff".into()),
        };
        let free = DeviceView {
            function: Bdf::new("0000:66:00.0").expect("a function"),
            state: "free".into(),
            vm: None,
            wanted_by: vec![label("other")],
            group: None,
            model: None,
            class: None,
            mmio_mib: None,
            resettable: None,
            passing: None,
            trouble: None,
        };
        let card = DeviceView {
            function: Bdf::new("0000:82:00.0").expect("a function"),
            state: "attached".into(),
            passing: Some("iommufd".into()),
            trouble: None,
            ..gpu.clone()
        };
        vec![gpu, free, card]
    }

    #[test]
    fn devices_are_listed_with_their_vm_and_their_trouble() {
        let worker = FakeWorker::answering(&[Reply::Notice { message: "not all".into() }, Reply::Devices(views()), Reply::Done {}]);
        let mut printed = Printed::default();
        list(&worker.socket, &mut printed.screen()).expect("listed");
        let expected = "\
DEVICE        STATE        VM       GROUP  MODEL      CLASS      MMIO  RESET  BY       TROUBLE
0000:65:00.0  quarantined  gpu          7  10de:2330  030200  131105M  yes    -        its config space reads\\x1b[2J ff
0000:66:00.0  free         (other)      -  -          -             -  -      -        -
0000:82:00.0  attached     gpu          7  10de:2330  030200  131105M  yes    iommufd  -
";
        assert_eq!(printed.out(), expected);
        assert_eq!(printed.err(), "not all\n");
        assert_eq!(worker.request(), Request::DeviceList {});
    }

    #[test]
    fn the_list_as_json_is_the_protocols_own() {
        let worker = FakeWorker::answering(&[Reply::Devices(views()), Reply::Done {}]);
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        screen.json = true;
        list(&worker.socket, &mut screen).expect("listed");
        assert_eq!(serde_json::from_str::<Vec<DeviceView>>(&printed.out()).expect("JSON"), views());
    }
}
