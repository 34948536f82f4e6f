//! Text of others (guests, QEMU, VM files, peers) on its way to a terminal.
//!
//! A guest that writes an escape sequence into its log must not be able to move the operator's cursor, retitle the window,
//! answer for the operator or hide what was printed before (THREATS 19). So everything that the command prints goes through here; the one
//! exception is `diarch vm console`, which is a terminal by nature.

use std::borrow::Cow;
use std::fmt::Write;

/// A printed log line is cut after so many bytes: a guest can write a line without end.
pub const MAX_LINE: usize = 16 * 1024;
/// A cell of a table or a sentence within a line is cut after so many bytes.
pub const MAX_CELL: usize = 1024;

/// A character that acts on a terminal, or that makes text look like other text.
fn acts(c: char) -> bool {
    // C0, DEL and C1: a terminal may take U+009B for ESC [.
    c.is_control()
        || matches!(c,
            '\u{061c}'
            // Zero-width characters and the directional marks.
            | '\u{200b}'..='\u{200f}'
            // Line separators, and the bidirectional embeddings and overrides.
            | '\u{2028}'..='\u{202e}'
            // Invisible operators and the bidirectional isolates.
            | '\u{2060}'..='\u{2069}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            // Invisible tags.
            | '\u{e0000}'..='\u{e007f}')
}

fn write_escaped(out: &mut String, c: char) {
    let _ = match c {
        '\n' => out.write_str("\\n"),
        '\r' => out.write_str("\\r"),
        '\t' => out.write_str("\\t"),
        c if u32::from(c) < 0x100 => write!(out, "\\x{:02x}", u32::from(c)),
        c => write!(out, "\\u{{{:x}}}", u32::from(c)),
    };
}

fn escape(text: &str, keep: Option<char>, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit && !text.chars().any(|c| acts(c) && Some(c) != keep) {
        return Cow::Borrowed(text);
    }
    let end = (0..=limit.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    let mut out = String::with_capacity(end + 16);
    for c in text[..end].chars() {
        if acts(c) && Some(c) != keep { write_escaped(&mut out, c) } else { out.push(c) }
    }
    if end < text.len() {
        let _ = write!(out, "... ({} bytes more)", text.len() - end);
    }
    Cow::Owned(out)
}

/// One line of a log. Tabs stay, and so does nothing else that acts; the carriage return that ends a serial line is dropped.
pub fn line(text: &str) -> Cow<'_, str> {
    escape(text.strip_suffix('\r').unwrap_or(text), Some('\t'), MAX_LINE)
}

/// A word or a sentence among others: not even a tab stays.
pub fn cell(text: &str) -> Cow<'_, str> {
    escape(text, None, MAX_CELL)
}

/// JSON text as `serde_json` wrote it, with what it leaves as it is (DEL, C1, bidirectional overrides) as `\u` escapes: the
/// same document, and harmless on a terminal. The line ends between the fields stay.
pub fn json(text: &str) -> Cow<'_, str> {
    if !text.chars().any(|c| c >= '\u{7f}' && acts(c)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if c >= '\u{7f}' && acts(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_shown_and_does_not_act() {
        for (raw, shown) in [
            ("plain text", "plain text"),
            ("two\nlines", "two\\nlines"),
            ("\x1b[2Jgone", "\\x1b[2Jgone"),
            ("good\rbad", "good\\rbad"),
            ("\u{9b}31mred", "\\x9b31mred"),
            ("\u{7f}\u{8}\u{0}", "\\x7f\\x08\\x00"),
            ("invoice\u{202e}gpj.exe", "invoice\\u{202e}gpj.exe"),
            ("\u{2066}isolate\u{2069}", "\\u{2066}isolate\\u{2069}"),
            ("we\u{200b}b", "we\\u{200b}b"),
            ("\u{e0041}", "\\u{e0041}"),
            ("שלום grüß 日本", "שלום grüß 日本"),
        ] {
            assert_eq!(line(raw), shown);
            assert_eq!(cell(raw), shown);
        }
    }

    #[test]
    fn a_log_line_keeps_its_tabs_and_loses_the_carriage_return_at_its_end() {
        assert_eq!(line("a\tb\r"), "a\tb");
        assert_eq!(cell("a\tb\r"), "a\\tb\\r");
    }

    #[test]
    fn a_line_without_end_is_cut_at_a_whole_character() {
        let long = "ä".repeat(MAX_LINE);
        let shown = line(&long);
        assert!(shown.len() < MAX_LINE + 40 && shown.ends_with(&format!("... ({MAX_LINE} bytes more)")), "{}", &shown[shown.len() - 40..]);
        assert!(cell(&format!("x{long}")).contains("bytes more"));
    }

    #[test]
    fn json_means_the_same_and_holds_nothing_that_acts() {
        let value = serde_json::json!({"a": "\u{1b}[2J\u{9b}\u{202e}\u{7f}\u{e0041}\n"});
        let text = serde_json::to_string_pretty(&value).expect("JSON");
        let safe = json(&text);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).expect("still JSON"), value);
        assert!(safe.chars().all(|c| c == '\n' || !acts(c)), "{safe}");
    }
}
