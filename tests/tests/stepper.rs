//! The stepper itself, on ordinary processes: it must kill exactly where it says, and let go without a trace.

use diarch_tests::stepper::{Outcome, kill_at_syscall};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// A process that is a shell's child (see `kill_at_syscall`): the shell tells how it ended.
struct Grandchild {
    shell: Child,
    input: ChildStdin,
    out: BufReader<ChildStdout>,
    pid: i32,
}

impl Grandchild {
    /// Runs a shell command line, which says "up" when it is ready.
    fn start(line: &str) -> Grandchild {
        // Without a job's own redirection a shell gives its background jobs /dev/null.
        let script = r#"exec 3<&0; sh -c "$0" <&3 3<&- & echo $!; wait $!; echo "ended $?""#;
        let mut shell = Command::new("/bin/sh").args(["-c", script, line]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let input = shell.stdin.take().unwrap();
        let mut out = BufReader::new(shell.stdout.take().unwrap());
        let (mut pid, mut up) = (String::new(), String::new());
        out.read_line(&mut pid).unwrap();
        out.read_line(&mut up).unwrap();
        if pid.trim() == "up" {
            std::mem::swap(&mut pid, &mut up);
        }
        Grandchild { shell, input, out, pid: pid.trim().parse().unwrap() }
    }

    fn ask(&mut self) -> String {
        let _ = self.input.write_all(b"a\n");
        let mut line = String::new();
        let _ = self.out.read_line(&mut line);
        line
    }

    /// The exit status, as a shell has it: 137 is SIGKILL.
    fn end(mut self) -> i32 {
        drop(self.input);
        let lines: Vec<String> = self.out.lines().map_while(Result::ok).collect();
        self.shell.wait().unwrap();
        lines.iter().find_map(|l| l.strip_prefix("ended ")).map_or(137, |code| code.parse().unwrap())
    }
}

/// Answers every line with "got LINE", and appends it to the file before.
fn echo(file: &tempfile::NamedTempFile) -> Grandchild {
    Grandchild::start(&format!("echo up; while read -r line; do echo $line >> {}; echo got $line; done", file.path().display()))
}

#[test]
fn a_process_is_killed_at_each_of_its_system_calls_in_turn() {
    let mut killed = 0;
    for n in 1..200 {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut echo = echo(&file);
        let (outcome, answer) = kill_at_syscall(echo.pid, n, || echo.ask()).unwrap();
        match outcome {
            Outcome::Killed { .. } => {
                killed += 1;
                assert!(answer == "ended 137\n" || echo.end() == 137, "{answer}");
            }
            Outcome::Survived { syscalls } => {
                assert_eq!(answer, "got a\n");
                assert!(syscalls < n, "it survived {syscalls} of {n} calls");
                // It goes on as if nothing had been.
                assert_eq!(echo.ask(), "got a\n");
                assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "a\na\n");
                assert_eq!(echo.end(), 0);
                assert!(killed > 5, "only {killed} steps");
                return;
            }
            Outcome::Ended { .. } => panic!("it ended by itself at step {n}"),
        }
    }
    panic!("200 steps were not enough for one line");
}

#[test]
fn the_call_it_is_killed_at_is_not_executed() {
    // The first write(2) after the line is read puts it into the file: killed there, the file stays empty.
    for n in 1..200 {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut echo = echo(&file);
        let (outcome, _) = kill_at_syscall(echo.pid, n, || echo.ask()).unwrap();
        let Outcome::Killed { syscall } = outcome else { panic!("no write(2) seen in {n} steps") };
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "", "{syscall:?} of step {n} was executed");
        if format!("{syscall:?}") == "write" {
            return;
        }
    }
}

#[test]
fn forked_children_are_neither_traced_nor_killed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let line = format!("echo up; read -r line; (sleep 0.3; echo child >> {0}) & while :; do /bin/true; done", file.path().display());
    let mut shell = Grandchild::start(&line);
    let (outcome, ()) = kill_at_syscall(shell.pid, 120, || {
        shell.input.write_all(b"go\n").unwrap();
        std::thread::sleep(Duration::from_millis(200));
    })
    .unwrap();
    assert!(matches!(outcome, Outcome::Killed { .. }), "{outcome:?}");
    assert_eq!(shell.end(), 137);
    let until = Instant::now() + Duration::from_secs(5);
    while std::fs::read_to_string(file.path()).unwrap() != "child\n" {
        assert!(Instant::now() < until, "the child did not live on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What the next test runs in a process of its own; by itself it has nothing to show.
#[test]
fn many_threads() {
    if std::env::var_os("DIARCH_MANY_THREADS").is_none() {
        return;
    }
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    std::thread::spawn(|| drop(std::fs::read("/proc/self/stat"))).join().unwrap();
                }
            });
        }
    });
}

#[test]
fn the_calls_of_every_thread_count_also_of_threads_born_later() {
    for n in [1, 50, 500, 5000] {
        let line = format!("echo up; DIARCH_MANY_THREADS=1 exec {} --exact many_threads > /dev/null 2>&1", std::env::current_exe().unwrap().display());
        let child = Grandchild::start(&line);
        let until = Instant::now() + Duration::from_secs(5);
        while std::fs::read_dir(format!("/proc/{}/task", child.pid)).map_or(0, Iterator::count) < 4 {
            assert!(Instant::now() < until, "the threads did not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        let started = Instant::now();
        let (outcome, ()) = kill_at_syscall(child.pid, n, || std::thread::sleep(Duration::from_secs(1))).unwrap();
        assert!(matches!(outcome, Outcome::Killed { .. }), "{outcome:?} after {:?}", started.elapsed());
        assert_eq!(child.end(), 137);
    }
}

#[test]
fn a_process_that_ends_by_itself_is_reported_so() {
    let mut child = Grandchild::start("echo up; read -r line; exit 3");
    let (outcome, ()) = kill_at_syscall(child.pid, 1000, || {
        child.input.write_all(b"a\n").unwrap();
        std::thread::sleep(Duration::from_millis(300));
    })
    .unwrap();
    assert!(matches!(outcome, Outcome::Ended { .. }), "{outcome:?}");
    assert_eq!(child.end(), 3);
}
