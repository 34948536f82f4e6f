//! `diarch events`: what happened to the VMs and to the halves.

use super::comeback::{self, Ended};
use super::connection::{Connection, Patience, unexpected};
use super::screen::{Screen, Stop};
use super::table::{Tone, tinted};
use super::{clock, escape};
use crate::control::protocol::{EventView, Reply, Request};
use std::path::Path;

/// More than a worker keeps.
const ALL: u32 = u32::MAX;

pub fn events(socket: &Path, last: u32, follow: bool, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let mut shown = None;
    if !follow {
        return some(&mut Connection::open(socket)?, &Request::Events { last, follow }, &mut shown, screen);
    }
    let mut last = last;
    comeback::insist(socket, screen, "events", "", |mut connection, screen| {
        let result = some(&mut connection, &Request::Events { last, follow }, &mut shown, screen);
        // A new worker remembers nothing of the old one's, so that all it has is new.
        last = ALL;
        Ended::of(result, &connection)
    })
}

/// `shown` is the last one.
fn some(connection: &mut Connection, request: &Request, shown: &mut Option<EventView>, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let follow = matches!(request, Request::Events { follow: true, .. });
    connection.send(request)?;
    let patience = if follow { Patience::Event } else { Patience::Answer };
    let before = shown.clone();
    while let Some(reply) = connection.next(patience, screen)? {
        let Reply::Event(event) = reply else { return Err(unexpected("something else than an event")) };
        // It was the same worker, then.
        if before.as_ref().is_some_and(|before| event.at_ms < before.at_ms || event == *before) {
            continue;
        }
        *shown = Some(event.clone());
        if screen.json {
            screen.object(&event)?;
            continue;
        }
        screen.say(line(&event, screen))?;
        if follow {
            screen.flush()?;
        }
    }
    Ok(())
}

/// `TIME  VM  KIND  MESSAGE`, with columns that most names fit in.
fn line(event: &EventView, screen: &Screen<'_>) -> String {
    let vm = event.vm.as_ref().map_or("-", |name| name.as_str());
    let kind = escape::cell(&event.kind);
    format!("{}  {vm:<16}  {kind:<20}  {}", tinted(&clock::utc(event.at_ms), Tone::Faint, screen), escape::cell(&event.message))
}

#[cfg(test)]
mod tests {
    use super::super::connection::tests::FakeWorker;
    use super::super::screen::tests::Printed;
    use super::*;
    use diarch_ipc::name::Label;

    #[test]
    fn events_are_lines_in_which_nothing_acts() {
        let event = |vm: Option<&str>, kind: &str, message: &str| {
            Reply::Event(EventView { at_ms: 1_700_000_000_000, vm: vm.map(|v| Label::new(v).expect("a name")), kind: kind.into(), message: message.into() })
        };
        let replies =
            [event(Some("web"), "vm.exited", "QEMU ended: \"\u{1b}[2J\r\n\u{202e}\""), event(None, "supervisor.lost", "the connection broke"), Reply::Done {}];
        let worker = FakeWorker::answering(&replies);
        let mut printed = Printed::default();
        events(&worker.socket, 20, false, &mut printed.screen()).expect("printed");
        let expected = "\
2023-11-14T22:13:20.000Z  web               vm.exited             QEMU ended: \"\\x1b[2J\\r\\n\\u{202e}\"
2023-11-14T22:13:20.000Z  -                 supervisor.lost       the connection broke
";
        assert_eq!(printed.out(), expected);
        assert_eq!(worker.request(), Request::Events { last: 20, follow: false });

        let worker = FakeWorker::answering(&replies);
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        screen.json = true;
        events(&worker.socket, 20, false, &mut screen).expect("printed");
        for line in printed.out().lines() {
            serde_json::from_str::<EventView>(line).expect("one object a line");
        }
        assert_eq!(printed.out().lines().count(), 2);
    }

    #[test]
    fn a_follower_goes_on_with_the_next_worker_and_repeats_nothing() {
        let event = |at_ms: u64, kind: &str| Reply::Event(EventView { at_ms, vm: None, kind: kind.into(), message: String::new() });
        let (one, two, three) = (event(1, "one"), event(2, "two"), event(3, "three"));
        let worker = FakeWorker::again_and_again(vec![vec![one.clone(), two.clone()], vec![one, two, three, Reply::Done {}]]);
        let mut printed = Printed::default();
        events(&worker.socket, 1, true, &mut printed.screen()).expect("printed");
        for (kind, times) in [("one", 1), ("two", 1), ("three", 1)] {
            assert_eq!(printed.out().matches(kind).count(), times, "{}", printed.out());
        }
        assert!(printed.err().contains("events: the worker went away"), "{}", printed.err());
        assert_eq!(worker.requests(), [Request::Events { last: 1, follow: true }, Request::Events { last: ALL, follow: true }]);
    }
}
