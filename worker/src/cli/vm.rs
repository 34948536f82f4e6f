//! `diarch vm`: what the VMs are doing, and changing it.

use super::clock;
use super::comeback::{self, Ended};
use super::connection::{Connection, Patience, ask, unexpected};
use super::escape;
use super::screen::{Screen, Spinner, Stop};
use super::table::{Column, Tone, Value, sheet, table};
use crate::control::protocol::{ForwardView, LogSource, Phase, Progress, Reply, Request, ShareView, TapView, VmView};
use diarch_ipc::spec::DiskAccess;
use std::path::Path;
use std::time::Duration;

const COLUMNS: &[Column] = &[
    Column::text("NAME"),
    Column::text("PHASE"),
    Column::number("PID").expendable(3),
    Column::number("UPTIME").expendable(1),
    Column::number("CPUS").expendable(7),
    Column::number("MEMORY").expendable(6),
    Column::text("ACCEL").expendable(5),
    Column::text("FORWARDS").expendable(2),
    Column::number("RESTARTS").expendable(4),
    Column::text("REASON"),
];

/// `diarch vm list`.
pub fn list(socket: &Path, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let mut connection = Connection::open(socket)?;
    connection.send(&Request::VmList {})?;
    let mut answer = None;
    while let Some(reply) = connection.next(Patience::Answer, screen)? {
        match reply {
            // Beside the list, which scripts read.
            Reply::Notice { message } => {
                let _ = writeln!(screen.err, "{}", escape::cell(&message));
            }
            Reply::Vms(vms) => answer = Some(vms),
            _ => {}
        }
    }
    let Some(vms) = answer else { return Err(unexpected("something else than a list of VMs")) };
    if screen.json {
        return screen.document(&vms);
    }
    let rows: Vec<Vec<Value>> = vms.iter().map(|vm| row(vm, screen)).collect();
    screen.say(table(COLUMNS, &rows, screen))?;
    if vms.is_empty() && screen.width.is_some() {
        screen.say("No VMs: 'diarch plan' tells which files are seen, 'diarch doctor' where they are looked for.")?;
    }
    Ok(())
}

fn row(vm: &VmView, screen: &Screen<'_>) -> Vec<Value> {
    let forwards: Vec<String> = vm.forwards.iter().map(forward).collect();
    vec![
        Value::plain(vm.name.as_str()),
        Value::new(phase_word(vm.phase), tone(vm.phase)),
        Value::maybe(vm.pid),
        Value::maybe(vm.started_ms.map(|then| clock::since(then, screen.now_ms))),
        Value::maybe(vm.cpus),
        Value::maybe(vm.memory_mib.map(memory)),
        Value::maybe(vm.accelerator.as_deref()),
        match screen.width {
            _ if forwards.is_empty() => Value::plain("-"),
            Some(_) => Value::lines(forwards),
            None => Value::plain(forwards.join(",")),
        },
        Value::plain(vm.restarts.to_string()),
        Value::maybe(reason(vm, screen.now_ms)),
    ]
}

/// `diarch vm show NAME`.
pub fn show(socket: &Path, name: &str, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let Reply::Vm(vm) = ask(socket, &Request::VmShow { name: name.to_owned() }, screen)? else { return Err(unexpected("something else than a VM")) };
    if screen.json {
        return screen.document(&vm);
    }
    let maybe = |of: Option<String>| of.unwrap_or_else(|| "-".to_owned());
    let moment = |of: Option<u64>| maybe(of.map(|then| format!("{} ({} ago)", clock::utc(then), clock::since(then, screen.now_ms))));
    let forwards: Vec<String> = vm.forwards.iter().map(forward).collect();
    let text = sheet(&[
        ("name", vm.name.to_string()),
        ("phase", phase_word(vm.phase).to_owned()),
        ("reason", maybe(reason(&vm, screen.now_ms))),
        ("enabled", if vm.enabled { "yes" } else { "no" }.to_owned()),
        ("file", vm.file.clone().map_or_else(|| "none: it is gone, and the VM still runs".to_owned(), |file| escape::cell(&file).into_owned())),
        ("slot", maybe(vm.slot.map(|slot| slot.to_string()))),
        ("pid", maybe(vm.pid.map(|pid| pid.to_string()))),
        ("started", moment(vm.started_ms)),
        ("healthy", moment(vm.healthy_ms)),
        ("health probe", maybe(vm.health.clone())),
        ("accelerator", maybe(vm.accelerator.clone())),
        ("CPUs", maybe(vm.cpus.map(|cpus| cpus.to_string()))),
        ("memory", maybe(vm.memory_mib.map(memory))),
        ("network", vm.tap.as_ref().map_or_else(|| "user-mode".to_owned(), tap)),
        ("forwards", if forwards.is_empty() { "-".to_owned() } else { forwards.join("\n") }),
        ("devices", lines(vm.devices.iter().map(ToString::to_string).collect())),
        ("shares", lines(vm.shares.iter().map(share).collect())),
        ("restarts", vm.restarts.to_string()),
        ("guest reboots", vm.guest_reboots.to_string()),
        ("last exit", maybe(vm.last_exit.clone())),
    ]);
    screen.say(text)
}

/// What `diarch vm start` and its like ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Start,
    Stop,
    Restart,
    Kill,
    /// Of the VM that has the device of this name.
    Recover,
}

/// Whether the command stays until the VM is where it was asked to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stay {
    UntilDone,
    UntilAccepted,
}

impl Change {
    fn request(self, name: &str, stay: Stay) -> Request {
        let (name, wait) = (name.to_owned(), stay == Stay::UntilDone);
        match self {
            Change::Start => Request::VmStart { name, wait },
            Change::Stop => Request::VmStop { name, wait },
            Change::Restart => Request::VmRestart { name, wait },
            Change::Kill => Request::VmKill { name, wait },
            Change::Recover => Request::DeviceRecover { function: name, wait },
        }
    }
    fn word(self) -> &'static str {
        match self {
            Change::Start => "start",
            Change::Stop => "stop",
            Change::Restart => "restart",
            Change::Kill => "kill",
            Change::Recover => "recovery",
        }
    }
    fn done(self) -> &'static str {
        match self {
            Change::Start => "started",
            Change::Stop => "stopped",
            Change::Restart => "restarted",
            Change::Kill => "killed",
            Change::Recover => "recovered",
        }
    }
}

/// `diarch vm start|stop|restart|kill NAME`, `diarch device recover DEVICE`.
pub fn change(socket: &Path, change: Change, name: &str, stay: Stay, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let shown = escape::cell(name).into_owned();
    let mut last: Option<Progress> = None;
    // A recovery that a worker's end has interrupted is not asked for again: resetting a device is nothing to be done twice by itself.
    if stay == Stay::UntilAccepted || change == Change::Recover {
        let mut connection = Connection::open(socket)?;
        follow(&mut connection, &change.request(name, stay), &shown, change, &mut last, screen)?;
    } else {
        // A restart is no state that could be asked for twice: by when its QEMU was started it is seen whether it has happened.
        let before = if change == Change::Restart { started(socket, name, screen)? } else { None };
        let mut first = true;
        let what = format!("{} of {name}", change.word());
        let unknown = format!("Whether {name} was {} is not known: 'diarch vm show {name}' tells when the worker runs.", change.done());
        comeback::insist(socket, screen, &what, &escape::cell(&unknown), |mut connection, screen| {
            let anew = std::mem::take(&mut first);
            let asked = if anew || change != Change::Restart { change } else { Change::Start };
            let result = follow(&mut connection, &asked.request(name, stay), &shown, change, &mut last, screen);
            if asked == change || result.is_err() {
                return Ended::of(result, &connection);
            }
            match started(socket, name, screen) {
                // It runs as it did before: the old worker had not come to it.
                Ok(now) if now == before => match Connection::open(socket) {
                    Ok(mut connection) => Ended::of(follow(&mut connection, &change.request(name, stay), &shown, change, &mut last, screen), &connection),
                    Err(stop) => Ended::For(Err(stop)),
                },
                Ok(_) => Ended::For(Ok(())),
                Err(stop) => Ended::For(Err(stop)),
            }
        })?;
    }
    match last {
        _ if screen.json => Ok(()),
        _ if stay == Stay::UntilAccepted => screen.say(format!("{shown}: {} asked for", change.word())),
        Some(last) => screen.say(format!("{} is {} after {}", last.name, phase_word(last.phase), clock::words(last.elapsed_ms))),
        None => screen.say(format!("{shown}: {} done", change.word())),
    }
}

/// When the VM's present QEMU was started.
pub fn started(socket: &Path, name: &str, screen: &Screen<'_>) -> Result<Option<u64>, Stop> {
    match ask(socket, &Request::VmShow { name: name.to_owned() }, screen)? {
        Reply::Vm(vm) => Ok(vm.started_ms),
        _ => Err(unexpected("something else than a VM")),
    }
}

/// Asks, and shows how it goes on until it is done.
fn follow(
    connection: &mut Connection,
    request: &Request,
    shown: &str,
    change: Change,
    last: &mut Option<Progress>,
    screen: &mut Screen<'_>,
) -> Result<(), Stop> {
    connection.send(request)?;
    let spinner = (screen.live && !screen.json).then(|| Spinner::start(&format!("{shown}: {} asked for", change.word()), Duration::ZERO));
    while let Some(reply) = connection.next(Patience::Event, screen)? {
        let Reply::Progress(progress) = reply else { return Err(unexpected("something else than progress")) };
        if screen.json {
            screen.object(&progress)?;
        } else if let Some(spinner) = &spinner {
            spinner.say(&step(&progress));
        } else if last.as_ref().is_none_or(|before| before.phase != progress.phase) {
            // Where nothing can move there is one line for each phase, not one for each look at the clock.
            let _ = writeln!(screen.err, "{} ({})", step(&progress), clock::words(progress.elapsed_ms));
        }
        *last = Some(progress);
    }
    Ok(())
}

fn step(progress: &Progress) -> String {
    let message = escape::cell(&progress.message);
    match message.is_empty() {
        true => format!("{}: {}", progress.name, phase_word(progress.phase)),
        false => format!("{}: {}: {message}", progress.name, phase_word(progress.phase)),
    }
}

/// `diarch vm logs NAME`.
pub fn logs(socket: &Path, request: LogRequest<'_>, screen: &mut Screen<'_>) -> Result<(), Stop> {
    if !request.follow {
        return some_logs(&mut Connection::open(socket)?, request, screen);
    }
    let what = format!("log of {}", request.name);
    let mut lines = request.lines;
    comeback::insist(socket, screen, &what, "", |mut connection, screen| {
        let result = some_logs(&mut connection, LogRequest { lines, ..request }, screen);
        let ended = Ended::of(result, &connection);
        if let Ended::Lost { .. } = &ended {
            // QEMU goes on writing, and how far this was read nobody knows any more.
            lines = 0;
            let _ = writeln!(screen.err, "lines that are written until the worker is back are not shown here: 'diarch vm logs' has them");
        }
        ended
    })
}

fn some_logs(connection: &mut Connection, request: LogRequest<'_>, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let LogRequest { name, source, lines, follow } = request;
    connection.send(&Request::VmLogs { name: name.to_owned(), source, lines, follow })?;
    let patience = if follow { Patience::Event } else { Patience::Answer };
    while let Some(reply) = connection.next(patience, screen)? {
        let Reply::Log { line } = &reply else { return Err(unexpected("something else than a log line")) };
        if screen.json {
            screen.object(&serde_json::json!({ "line": line }))?;
            continue;
        }
        screen.say(escape::line(line))?;
        if follow {
            screen.flush()?;
        }
    }
    Ok(())
}

/// Which lines of which log.
#[derive(Debug, Clone, Copy)]
pub struct LogRequest<'a> {
    pub name: &'a str,
    pub source: LogSource,
    pub lines: u32,
    pub follow: bool,
}

pub fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Unknown => "unknown",
        Phase::Stopped => "stopped",
        Phase::Starting => "starting",
        Phase::Booting => "booting",
        Phase::Healthy => "healthy",
        Phase::Unhealthy => "unhealthy",
        Phase::Stopping => "stopping",
        Phase::BackOff => "back-off",
        Phase::Failed => "failed",
    }
}

fn tone(phase: Phase) -> Tone {
    match phase {
        Phase::Healthy => Tone::Good,
        Phase::Starting | Phase::Booting | Phase::Stopping => Tone::Busy,
        Phase::Unknown | Phase::Unhealthy | Phase::BackOff | Phase::Failed => Tone::Bad,
        Phase::Stopped => Tone::Faint,
    }
}

/// Why the VM is where it is, and when that ends by itself.
fn reason(vm: &VmView, now_ms: u64) -> Option<String> {
    let retry = vm.retry_ms.map(|then| match then.checked_sub(now_ms) {
        None | Some(0) => "tried again now".to_owned(),
        Some(left) => format!("tried again in {}", clock::words(left)),
    });
    match (&vm.reason, retry) {
        (Some(reason), Some(retry)) => Some(format!("{reason}; {retry}")),
        (reason, retry) => retry.or_else(|| reason.clone()),
    }
}

fn forward(of: &ForwardView) -> String {
    let address = if of.host_address.contains(':') { format!("[{}]", of.host_address) } else { of.host_address.clone() };
    format!("{address}:{}->{}/{}", of.host_port, of.guest_port, of.protocol)
}

fn lines(of: Vec<String>) -> String {
    if of.is_empty() { "-".to_owned() } else { of.join("\n") }
}

/// `lan (dvm0n0, 2 queues, 10.0.0.5 via 10.0.0.1)`: as much of it as is known.
fn tap(of: &TapView) -> String {
    let queues = (of.queues > 1).then(|| format!("{} queues", of.queues));
    let address = match (&of.address, &of.gateway) {
        (Some(address), Some(gateway)) => Some(format!("{address} via {gateway}")),
        (address, _) => address.clone(),
    };
    let known: Vec<String> = [of.name.clone(), queues, address].into_iter().flatten().collect();
    let known = if known.is_empty() { String::new() } else { format!(" ({})", known.join(", ")) };
    escape::cell(&format!("{}{known}", of.network)).into_owned()
}

fn share(of: &ShareView) -> String {
    let access = match of.access {
        DiskAccess::ReadOnly => "read-only",
        DiskAccess::ReadWrite => "read-write",
    };
    escape::cell(&format!("{} as {} ({access})", of.share, of.tag)).into_owned()
}

/// `512M`, `2G`, `1536M`: binary units, as in the VM files.
fn memory(mib: u32) -> String {
    if mib >= 1024 && mib.is_multiple_of(1024) { format!("{}G", mib / 1024) } else { format!("{mib}M") }
}

#[cfg(test)]
mod tests {
    use super::super::connection::tests::FakeWorker;
    use super::super::screen::Exit;
    use super::super::screen::tests::Printed;
    use super::*;
    use crate::control::protocol::{Failure, FailureKind};
    use diarch_ipc::name::{Label, Port};

    fn label(name: &str) -> Label {
        Label::new(name).expect("a name")
    }

    /// `now_ms` of the test's screen is 1 700 000 000 000.
    fn web() -> VmView {
        let port = |n| Port::new(n).expect("a port");
        let forward = |host: &str, from, to| ForwardView { protocol: "tcp".into(), host_address: host.into(), host_port: port(from), guest_port: port(to) };
        VmView {
            name: label("web"),
            file: Some("vms/web.json".into()),
            enabled: true,
            phase: Phase::Healthy,
            reason: None,
            slot: Some(0),
            pid: Some(4321),
            accelerator: Some("kvm".into()),
            cpus: Some(2),
            memory_mib: Some(2048),
            forwards: vec![forward("127.0.0.1", 8080, 80), forward("::1", 2222, 22)],
            tap: None,
            devices: vec![],
            shares: vec![],
            started_ms: Some(1_700_000_000_000 - 192_000),
            healthy_ms: Some(1_700_000_000_000 - 190_000),
            restarts: 0,
            guest_reboots: 1,
            last_exit: None,
            retry_ms: None,
            health: Some("http :8080/".into()),
        }
    }

    fn db() -> VmView {
        VmView {
            name: label("db-primary"),
            phase: Phase::BackOff,
            reason: Some("QEMU ended with exit code 1: \"\u{1b}[31mno such device\n\u{202e}\"".into()),
            pid: None,
            accelerator: None,
            memory_mib: Some(1536),
            forwards: vec![],
            started_ms: None,
            restarts: 3,
            retry_ms: Some(1_700_000_012_000),
            ..web()
        }
    }

    #[test]
    fn the_piped_list_is_stable_and_shows_nothing_that_acts() {
        let worker = FakeWorker::answering(&[Reply::Vms(vec![db(), web()]), Reply::Done {}]);
        let mut printed = Printed::default();
        list(&worker.socket, &mut printed.screen()).expect("listed");
        let expected = "\
NAME        PHASE      PID  UPTIME  CPUS  MEMORY  ACCEL  FORWARDS                                   RESTARTS  REASON
db-primary  back-off     -       -     2   1536M  -      -                                                 3  QEMU ended with exit code 1: \"\\x1b[31mno such device\\n\\u{202e}\"; tried again in 12s
web         healthy   4321   3m12s     2      2G  kvm    127.0.0.1:8080->80/tcp,[::1]:2222->22/tcp         0  -
";
        assert_eq!(printed.out(), expected);
        assert_eq!(worker.request(), Request::VmList {});
    }

    #[test]
    fn the_list_on_a_terminal_sets_forwards_below_each_other_and_wraps_the_reason() {
        let worker = FakeWorker::answering(&[Reply::Vms(vec![db(), web()]), Reply::Done {}]);
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        screen.width = Some(120);
        list(&worker.socket, &mut screen).expect("listed");
        let expected = "\
NAME        PHASE      PID  UPTIME  CPUS  MEMORY  ACCEL  FORWARDS                RESTARTS  REASON
db-primary  back-off     -       -     2   1536M  -      -                              3  QEMU ended with exit code 1:
                                                                                           \"\\x1b[31mno such
                                                                                           device\\n\\u{202e}\"; tried
                                                                                           again in 12s
web         healthy   4321   3m12s     2      2G  kvm    127.0.0.1:8080->80/tcp         0  -
                                                         [::1]:2222->22/tcp
";
        assert_eq!(printed.out(), expected);
    }

    #[test]
    fn a_list_that_may_be_old_says_so_beside_it() {
        let worker = FakeWorker::answering(&[Reply::Notice { message: "the supervisor can't be reached".into() }, Reply::Vms(vec![]), Reply::Done {}]);
        let mut printed = Printed::default();
        list(&worker.socket, &mut printed.screen()).expect("listed");
        assert_eq!(printed.err(), "the supervisor can't be reached\n");
    }

    #[test]
    fn the_list_as_json_is_the_protocols_own() {
        let worker = FakeWorker::answering(&[Reply::Vms(vec![db(), web()]), Reply::Done {}]);
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        screen.json = true;
        list(&worker.socket, &mut screen).expect("listed");
        assert!(!printed.out().contains(['\u{1b}', '\u{202e}']));
        assert_eq!(serde_json::from_str::<Vec<VmView>>(&printed.out()).expect("JSON"), [db(), web()]);
    }

    #[test]
    fn a_vm_is_shown_as_a_sheet() {
        let worker = FakeWorker::answering(&[Reply::Vm(Box::new(web())), Reply::Done {}]);
        let mut printed = Printed::default();
        show(&worker.socket, "web", &mut printed.screen()).expect("shown");
        let expected = "\
name:          web
phase:         healthy
reason:        -
enabled:       yes
file:          vms/web.json
slot:          0
pid:           4321
started:       2023-11-14T22:10:08.000Z (3m12s ago)
healthy:       2023-11-14T22:10:10.000Z (3m10s ago)
health probe:  http :8080/
accelerator:   kvm
CPUs:          2
memory:        2G
network:       user-mode
forwards:      127.0.0.1:8080->80/tcp
               [::1]:2222->22/tcp
devices:       -
shares:        -
restarts:      0
guest reboots: 1
last exit:     -
";
        assert_eq!(printed.out(), expected);
        assert_eq!(worker.request(), Request::VmShow { name: "web".into() });
    }

    #[test]
    fn what_a_vm_has_of_the_host_is_in_its_sheet() {
        let bdf = |text: &str| diarch_ipc::name::Bdf::new(text).expect("a function");
        let text = |text: &str| Some(text.to_owned());
        let vm = VmView {
            tap: Some(TapView { network: "lan".into(), queues: 2, name: text("dvm0n0"), address: text("10.0.0.5"), gateway: text("10.0.0.1") }),
            devices: vec![bdf("0000:65:00.0"), bdf("0000:66:00.0")],
            shares: vec![ShareView { share: "models".into(), tag: "m".into(), access: DiskAccess::ReadOnly }],
            ..web()
        };
        let worker = FakeWorker::answering(&[Reply::Vm(Box::new(vm)), Reply::Done {}]);
        let mut printed = Printed::default();
        show(&worker.socket, "web", &mut printed.screen()).expect("shown");
        for part in [
            "network:       lan (dvm0n0, 2 queues, 10.0.0.5 via 10.0.0.1)\n",
            "devices:       0000:65:00.0\n               0000:66:00.0\n",
            "shares:        models as m (read-only)\n",
        ] {
            assert!(printed.out().contains(part), "{}", printed.out());
        }
    }

    #[test]
    fn a_device_is_recovered_by_its_own_name_and_the_vms_phases_are_told() {
        let worker = FakeWorker::answering(&[progress(Phase::Stopping, "", 3), progress(Phase::Healthy, "", 3400), Reply::Done {}]);
        let mut printed = Printed::default();
        change(&worker.socket, Change::Recover, "0000:65:00.0", Stay::UntilDone, &mut printed.screen()).expect("recovered");
        assert_eq!(printed.out(), "web is healthy after 3s\n");
        assert_eq!(worker.request(), Request::DeviceRecover { function: "0000:65:00.0".into(), wait: true });
    }

    fn progress(phase: Phase, message: &str, elapsed_ms: u64) -> Reply {
        Reply::Progress(Progress { name: label("web"), phase, message: message.into(), elapsed_ms })
    }

    #[test]
    fn a_start_says_each_phase_once_and_the_end() {
        let worker = FakeWorker::answering(&[
            progress(Phase::Starting, "spawning QEMU", 3),
            progress(Phase::Booting, "waiting for http :8080/", 120),
            progress(Phase::Booting, "waiting for http :8080/", 1120),
            progress(Phase::Healthy, "", 3400),
            Reply::Done {},
        ]);
        let mut printed = Printed::default();
        change(&worker.socket, Change::Start, "web", Stay::UntilDone, &mut printed.screen()).expect("started");
        assert_eq!(printed.err(), "web: starting: spawning QEMU (3ms)\nweb: booting: waiting for http :8080/ (120ms)\nweb: healthy (3s)\n");
        assert_eq!(printed.out(), "web is healthy after 3s\n");
        assert_eq!(worker.request(), Request::VmStart { name: "web".into(), wait: true });
    }

    #[test]
    fn no_wait_is_told_to_the_worker() {
        for (of, request) in [
            (Change::Start, Request::VmStart { name: "web".into(), wait: false }),
            (Change::Stop, Request::VmStop { name: "web".into(), wait: false }),
            (Change::Restart, Request::VmRestart { name: "web".into(), wait: false }),
            (Change::Kill, Request::VmKill { name: "web".into(), wait: false }),
        ] {
            let worker = FakeWorker::answering(&[Reply::Done {}]);
            let mut printed = Printed::default();
            change(&worker.socket, of, "web", Stay::UntilAccepted, &mut printed.screen()).expect("asked");
            assert_eq!(printed.out(), format!("web: {} asked for\n", of.word()));
            assert_eq!(worker.request(), request);
        }
    }

    #[test]
    fn each_kind_of_refusal_has_its_exit_code() {
        for (kind, exit) in [
            (FailureKind::Failed, Exit::Failed),
            (FailureKind::Usage, Exit::Usage),
            (FailureKind::NotFound, Exit::NotFound),
            (FailureKind::Denied, Exit::Denied),
            (FailureKind::Conflict, Exit::Conflict),
            (FailureKind::Unreachable, Exit::Unreachable),
        ] {
            let worker = FakeWorker::answering(&[Reply::Error(Failure { kind, message: "why".into() })]);
            let stop = change(&worker.socket, Change::Stop, "web", Stay::UntilDone, &mut Printed::default().screen());
            assert_eq!(stop, Err(Stop::new(exit, "why")));
        }
    }

    #[test]
    fn a_guests_log_cannot_act_on_the_terminal() {
        let line = |text: &str| Reply::Log { line: text.into() };
        let worker = FakeWorker::answering(&[line("boot\tok\r"), line("\u{1b}]0;root@host\u{7}"), line("a\nb"), line("x\u{202e}y"), Reply::Done {}]);
        let mut printed = Printed::default();
        let request = LogRequest { name: "web", source: LogSource::Console, lines: 4, follow: false };
        logs(&worker.socket, request, &mut printed.screen()).expect("printed");
        assert_eq!(printed.out(), "boot\tok\n\\x1b]0;root@host\\x07\na\\nb\nx\\u{202e}y\n");
        assert_eq!(worker.request(), Request::VmLogs { name: "web".into(), source: LogSource::Console, lines: 4, follow: false });
    }

    fn start() -> Request {
        Request::VmStart { name: "web".into(), wait: true }
    }

    #[test]
    fn a_start_goes_on_with_the_next_worker() {
        let not_yet = Failure { kind: FailureKind::Unreachable, message: "the supervisor has not been reached yet".into() };
        let worker = FakeWorker::again_and_again(vec![
            vec![progress(Phase::Starting, "spawning QEMU", 3)],
            vec![Reply::Error(not_yet)],
            vec![progress(Phase::Healthy, "", 9), Reply::Done {}],
        ]);
        let mut printed = Printed::default();
        change(&worker.socket, Change::Start, "web", Stay::UntilDone, &mut printed.screen()).expect("started");
        assert_eq!(printed.out(), "web is healthy after 9ms\n");
        assert!(printed.err().contains("start of web: the worker went away"), "{}", printed.err());
        assert_eq!(worker.requests(), [start(), start(), start()]);
    }

    #[test]
    fn a_restart_is_asked_for_again_only_if_it_did_not_happen() {
        let shown = |started_ms| vec![Reply::Vm(Box::new(VmView { started_ms, ..web() })), Reply::Done {}];
        let healthy = || vec![progress(Phase::Healthy, "", 9), Reply::Done {}];
        let (show, restart) = (Request::VmShow { name: "web".into() }, Request::VmRestart { name: "web".into(), wait: true });
        let until_the_loss = || vec![shown(Some(1)), vec![progress(Phase::Stopping, "", 3)], healthy()];
        for (after, asked) in [(Some(2), &[][..]), (Some(1), std::slice::from_ref(&restart))] {
            let mut script = until_the_loss();
            script.push(shown(after));
            script.extend(asked.iter().map(|_| healthy()));
            let worker = FakeWorker::again_and_again(script);
            change(&worker.socket, Change::Restart, "web", Stay::UntilDone, &mut Printed::default().screen()).expect("restarted");
            let expected = [&[show.clone(), restart.clone(), start(), show.clone()][..], asked].concat();
            assert_eq!(worker.requests(), expected);
        }
    }

    #[test]
    fn a_worker_that_stays_away_is_unreachable_and_what_is_not_known_is_said() {
        let worker = FakeWorker::again_and_again(vec![vec![progress(Phase::Stopping, "", 3)]]);
        let stop = change(&worker.socket, Change::Stop, "web", Stay::UntilDone, &mut Printed::default().screen());
        let Err(Stop::Failure { exit: Exit::Unreachable, message }) = stop else { panic!("{stop:?}") };
        for part in ["nobody listens", "Whether web was stopped is not known", "diarch vm show web", "The VMs run on"] {
            assert!(message.contains(part), "{message}");
        }
    }
}
