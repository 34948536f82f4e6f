//! `diarch audit tail`: the last records, one line each.

use super::super::screen::{Screen, Stop};
use super::super::table::{Tone, tinted};
use super::super::{clock, escape};
use super::chain::MAX_RECORD;
use super::{open, unreadable};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// How often a followed file is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// Arguments are cut after so many characters: the whole record is one `--json` away.
const ARGUMENTS: usize = 100;

/// Prints the last `count` records, and with `follow` all that come, also when the file is rotated.
pub fn tail(file: &Path, count: u32, follow: bool, screen: &mut Screen<'_>) -> Result<(), Stop> {
    let mut handle = open(file)?;
    let start = start_of_last(&mut handle, count).map_err(|error| unreadable(file, &error))?;
    let mut lines = Lines::at(handle, start).map_err(|error| unreadable(file, &error))?;
    loop {
        while let Some(line) = lines.next().map_err(|error| unreadable(file, &error))? {
            print(&line, screen)?;
        }
        if !follow {
            // What is left has no line end.
            return if lines.partial.is_empty() { Ok(()) } else { print(&lines.partial, screen) };
        }
        screen.flush()?;
        screen.reader_is_there()?;
        std::thread::sleep(LOOK);
        if lines.was_replaced(file) {
            // What was written between our last look and the rotation is still in the old file.
            while let Some(line) = lines.next().map_err(|error| unreadable(file, &error))? {
                print(&line, screen)?;
            }
            if let Ok(handle) = open(file) {
                lines = Lines::at(handle, 0).map_err(|error| unreadable(file, &error))?;
            }
        }
    }
}

/// Prints the whole records from this position on; gives the position after the last.
pub fn tail_from(file: &Path, position: u64, screen: &mut Screen<'_>) -> Result<u64, Stop> {
    let mut lines = Lines::at(open(file)?, position).map_err(|error| unreadable(file, &error))?;
    while let Some(line) = lines.next().map_err(|error| unreadable(file, &error))? {
        print(&line, screen)?;
    }
    Ok(lines.position - lines.partial.len() as u64)
}

/// Whole lines of a file that grows.
struct Lines {
    reader: BufReader<File>,
    /// The beginning of a line whose end is not there yet.
    partial: Vec<u8>,
    position: u64,
}

impl Lines {
    fn at(mut file: File, position: u64) -> io::Result<Self> {
        file.seek(SeekFrom::Start(position))?;
        Ok(Self { reader: BufReader::new(file), partial: Vec::new(), position })
    }

    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let room = MAX_RECORD.saturating_sub(self.partial.len()).max(1) as u64;
        self.position += self.reader.by_ref().take(room).read_until(b'\n', &mut self.partial)? as u64;
        if self.partial.ends_with(b"\n") {
            self.partial.pop();
        } else if self.partial.len() < MAX_RECORD {
            return Ok(None);
        }
        Ok(Some(std::mem::take(&mut self.partial)))
    }

    /// The path leads to another file now, or to the same one emptied.
    fn was_replaced(&self, path: &Path) -> bool {
        match (path.metadata(), self.reader.get_ref().metadata()) {
            (Ok(there), Ok(here)) => (there.ino(), there.dev()) != (here.ino(), here.dev()) || there.len() < self.position,
            _ => false,
        }
    }
}

/// Where the last `count` lines begin, found from the end.
fn start_of_last(file: &mut File, count: u32) -> io::Result<u64> {
    const BLOCK: u64 = 64 * 1024;
    let end = file.seek(SeekFrom::End(0))?;
    if count == 0 {
        return Ok(end);
    }
    let (mut position, mut seen, mut block) = (end, 0u32, Vec::new());
    while position > 0 {
        let size = BLOCK.min(position);
        position -= size;
        file.seek(SeekFrom::Start(position))?;
        block.clear();
        file.by_ref().take(size).read_to_end(&mut block)?;
        for (index, _) in block.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            let after = position + index as u64 + 1;
            // The line end at the very end closes the last line, and begins none.
            if after != end {
                seen += 1;
                if seen == count {
                    return Ok(after);
                }
            }
        }
    }
    Ok(0)
}

fn print(line: &[u8], screen: &mut Screen<'_>) -> Result<(), Stop> {
    let text = String::from_utf8_lossy(line);
    if screen.json {
        // Records are ASCII; what a forger put in instead must not act on the terminal either.
        return screen.say(escape::line(&text));
    }
    match serde_json::from_str::<Map<String, Value>>(&text) {
        Ok(record) => screen.say(pretty(&record, screen)),
        Err(_) => screen.say(format!("not a record: {}", escape::cell(&text))),
    }
}

/// `TIME  SEQ  KIND  OPERATION  VERDICT  REQUEST  DURATION  what else there is`.
fn pretty(record: &Map<String, Value>, screen: &Screen<'_>) -> String {
    let number = |key: &str| record.get(key).and_then(Value::as_u64);
    let text = |key: &str| record.get(key).and_then(Value::as_str).map_or_else(|| "-".into(), |text| escape::cell(text).into_owned());
    let time = tinted(&number("time_ms").map_or_else(|| "-".into(), clock::utc), Tone::Faint, screen);
    let seq = number("seq").map_or_else(|| "-".into(), |seq| seq.to_string());
    let verdict = text("verdict");
    let tone = match verdict.as_str() {
        "ok" => Tone::Good,
        "-" => Tone::Plain,
        _ => Tone::Bad,
    };
    let verdict = tinted(&format!("{verdict:<12}"), tone, screen);
    let took = number("micros").map_or_else(|| "-".into(), clock::micros_words);
    let line = format!("{time}  {seq:>6}  {:<7}  {:<16}  {verdict}  {:<22}  {took:>7}  {}", text("kind"), text("operation"), text("request"), rest(record));
    line.trim_end().to_owned()
}

/// The error of an outcome, the arguments of an intent, or the fields that only this kind has.
fn rest(record: &Map<String, Value>) -> String {
    const SHOWN: [&str; 14] =
        ["seq", "time_ms", "kind", "request", "operation", "peer", "session", "verdict", "error", "errno", "micros", "arguments", "prev", "hash"];
    let said = match (record.get("error").and_then(Value::as_str), record.get("arguments")) {
        (Some(error), _) => error.to_owned(),
        (None, Some(Value::Object(arguments))) => fields(arguments.iter()),
        (None, Some(arguments)) => arguments.to_string(),
        (None, None) => fields(record.iter().filter(|(key, _)| !SHOWN.contains(&key.as_str()))),
    };
    let limit = if record.contains_key("error") { escape::MAX_CELL } else { ARGUMENTS };
    let short: String = said.chars().take(limit).collect();
    let more = if short.len() < said.len() { "..." } else { "" };
    format!("{}{more}", escape::cell(&short))
}

fn fields<'a>(of: impl Iterator<Item = (&'a String, &'a Value)>) -> String {
    of.map(|(key, value)| match value {
        Value::String(text) => format!("{key}={text}"),
        value => format!("{key}={value}"),
    })
    .collect::<Vec<_>>()
    .join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::super::screen::tests::Printed;
    use super::super::chain::NOTHING_BEFORE;
    use super::super::chain::tests::{DENIED, INTENT, OUTCOME, START, lines};
    use super::*;
    use std::io::Write;

    fn written(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("audit.jsonl");
        std::fs::write(&file, text).expect("written");
        (directory, file)
    }

    #[test]
    fn the_last_records_are_shown_one_a_line_and_nothing_in_them_acts() {
        let note = r#""kind":"note","text":"two\nlines\u202e""#;
        let all: String = lines(1, NOTHING_BEFORE, &[START, INTENT, OUTCOME, INTENT, DENIED, note]).iter().map(|l| format!("{l}\n")).collect();
        let (_directory, file) = written(&all);
        let mut printed = Printed::default();
        tail(&file, 100, false, &mut printed.screen()).expect("printed");
        let expected = "\
2023-11-14T22:13:20.001Z       1  start    -                 -             -                             -  adopted=0 version=0.1.0
2023-11-14T22:13:20.002Z       2  intent   vm.claim          -             00000000000000aa.1            -  label=web
2023-11-14T22:13:20.003Z       3  outcome  vm.claim          ok            00000000000000aa.1        340us
2023-11-14T22:13:20.004Z       4  intent   vm.claim          -             00000000000000aa.1            -  label=web
2023-11-14T22:13:20.005Z       5  outcome  vm.claim          denied        00000000000000aa.1        1.2ms  denied by vms.count in the grants: \\x1b[2J
2023-11-14T22:13:20.006Z       6  note     -                 -             -                             -  text=two\\nlines\\u{202e}
";
        assert_eq!(printed.out(), expected);
    }

    #[test]
    fn json_gives_the_lines_as_they_are() {
        let all: String = lines(1, NOTHING_BEFORE, &[START, INTENT, OUTCOME]).iter().map(|l| format!("{l}\n")).collect();
        let (_directory, file) = written(&all);
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        screen.json = true;
        tail(&file, 2, false, &mut screen).expect("printed");
        assert_eq!(printed.out(), all.split_inclusive('\n').skip(1).collect::<String>());
    }

    #[test]
    fn the_last_lines_are_found_across_blocks() {
        let text: String = (0..5000).map(|n| format!("{n:0>40}\n")).collect();
        let (_directory, file) = written(&text);
        let mut handle = File::open(&file).expect("opened");
        for (count, start) in [(0, text.len()), (1, text.len() - 41), (3000, text.len() - 3000 * 41), (5000, 0), (9000, 0)] {
            assert_eq!(start_of_last(&mut handle, count).expect("read"), start as u64, "{count}");
        }
        let (_directory, file) = written("one\ntwo\ntorn");
        assert_eq!(start_of_last(&mut File::open(&file).expect("opened"), 2).expect("read"), 4);
        let mut printed = Printed::default();
        tail(&file, 1, false, &mut printed.screen()).expect("printed");
        assert_eq!(printed.out(), "not a record: torn\n");
    }

    #[test]
    fn a_growing_file_gives_whole_lines_and_a_rotation_is_seen() {
        let (directory, file) = written("one\ntw");
        let mut lines = Lines::at(File::open(&file).expect("opened"), 0).expect("read");
        assert_eq!(lines.next().expect("read"), Some(b"one".to_vec()));
        assert_eq!(lines.next().expect("read"), None);
        File::options().append(true).open(&file).expect("opened").write_all(b"o\n").expect("written");
        assert_eq!(lines.next().expect("read"), Some(b"two".to_vec()));
        assert!(!lines.was_replaced(&file));
        std::fs::rename(&file, directory.path().join("audit.jsonl.1")).expect("renamed");
        assert!(!lines.was_replaced(&file));
        std::fs::write(&file, "new\n").expect("written");
        assert!(lines.was_replaced(&file));
    }
}
