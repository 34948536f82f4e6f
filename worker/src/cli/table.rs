//! Tables and sheets: plain columns without borders.
//!
//! On a terminal the last column is wrapped to what room is left, and a narrow one does without some columns; into a pipe each row is one line, so that `awk` and `grep` can be used on it.

use super::escape;
use super::screen::Screen;
use comfy_table::{Attribute, Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, Table, Width, presets};

/// What a cell means; becomes a colour where there are colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Good,
    Busy,
    Bad,
    Faint,
}

/// What stands in a cell; it is escaped when it is drawn.
#[derive(Debug, Clone)]
pub struct Value {
    lines: Vec<String>,
    tone: Tone,
}

impl Value {
    pub fn new(text: impl Into<String>, tone: Tone) -> Self {
        Self { lines: vec![text.into()], tone }
    }
    pub fn plain(text: impl Into<String>) -> Self {
        Self::new(text, Tone::Plain)
    }
    /// A cell of several lines.
    pub fn lines(lines: Vec<String>) -> Self {
        Self { lines, tone: Tone::Plain }
    }
    fn width(&self) -> usize {
        self.lines.iter().map(|line| escape::cell(line).chars().count()).max().unwrap_or(0)
    }
    fn shown(&self) -> String {
        self.lines.iter().map(|line| escape::cell(line)).collect::<Vec<_>>().join("\n")
    }
    /// `-` for what there isn't.
    pub fn maybe(of: Option<impl ToString>) -> Self {
        Self::plain(of.map_or_else(|| "-".to_owned(), |value| value.to_string()))
    }
}

/// A column's title and side, and whether a narrow terminal can do without it.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    title: &'static str,
    side: CellAlignment,
    /// 0: always shown. Others are left out of a narrow terminal, the highest first.
    expendable: u8,
}

impl Column {
    pub const fn text(title: &'static str) -> Self {
        Self { title, side: CellAlignment::Left, expendable: 0 }
    }
    pub const fn number(title: &'static str) -> Self {
        Self { title, side: CellAlignment::Right, expendable: 0 }
    }
    pub const fn expendable(self, rank: u8) -> Self {
        Self { expendable: rank, ..self }
    }
}

/// Between two columns.
const SPACE: u16 = 2;

/// The last column gets at least this many columns of a narrow terminal, and the rows are then wider than it.
const LAST_COLUMN_MIN: u16 = 16;

/// A table of rows with the columns' number of cells each. Cells are escaped here.
pub fn table(columns: &[Column], rows: &[Vec<Value>], screen: &Screen<'_>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).force_no_tty();
    if screen.colour {
        table.enforce_styling();
    }
    match screen.width {
        Some(width) => table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width),
        None => table.set_content_arrangement(ContentArrangement::Disabled),
    };
    let shown = fitting(columns, rows, screen.width);
    table.set_header(shown.iter().map(|index| Cell::new(columns[*index].title).add_attribute(Attribute::Bold)));
    for row in rows {
        table.add_row(shown.iter().filter_map(|index| row.get(*index)).map(|value| tint(Cell::new(value.shown()), value.tone)));
    }
    for (place, (index, column)) in shown.iter().zip(table.column_iter_mut()).enumerate() {
        let last = place + 1 == shown.len();
        column.set_padding((0, if last { 0 } else { SPACE }));
        column.set_cell_alignment(columns[*index].side);
        if screen.width.is_some() {
            column.set_constraint(match last {
                true => ColumnConstraint::LowerBoundary(Width::Fixed(LAST_COLUMN_MIN)),
                false => ColumnConstraint::ContentWidth,
            });
        }
    }
    table.trim_fmt()
}

/// The columns that are shown in this width: all, or as many as leave room for the last.
fn fitting(columns: &[Column], rows: &[Vec<Value>], width: Option<u16>) -> Vec<usize> {
    let mut shown: Vec<usize> = (0..columns.len()).collect();
    let Some(width) = width else { return shown };
    let last = columns.len().saturating_sub(1);
    let needs = |index: usize| {
        let cells = rows.iter().filter_map(|row| row.get(index)).map(Value::width).max().unwrap_or(0);
        let content = cells.max(columns[index].title.len());
        if index == last { content.min(usize::from(LAST_COLUMN_MIN)) } else { content + usize::from(SPACE) }
    };
    while shown.iter().map(|index| needs(*index)).sum::<usize>() > usize::from(width) {
        let Some(least) = shown.iter().copied().filter(|index| columns[*index].expendable > 0).max_by_key(|index| columns[*index].expendable) else {
            break;
        };
        shown.retain(|index| *index != least);
    }
    shown
}

/// `key: value` lines with the values below each other; further lines of a value are set below its first.
pub fn sheet(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(key, _)| key.len() + 2).max().unwrap_or(0);
    let mut out = Vec::new();
    for (key, value) in rows {
        for (index, line) in value.split('\n').enumerate() {
            let head = if index == 0 { format!("{key}:") } else { String::new() };
            out.push(format!("{head:width$}{}", escape::cell(line)));
        }
    }
    out.join("\n")
}

/// `text` in the colour of `tone`, where there are colours.
pub fn tinted(text: &str, tone: Tone, screen: &Screen<'_>) -> String {
    let code = match tone {
        _ if !screen.colour => return text.to_owned(),
        Tone::Plain => return text.to_owned(),
        Tone::Good => "32",
        Tone::Busy => "33",
        Tone::Bad => "31",
        Tone::Faint => "90",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

fn tint(cell: Cell, tone: Tone) -> Cell {
    match tone {
        Tone::Plain => cell,
        Tone::Good => cell.fg(Color::DarkGreen),
        Tone::Busy => cell.fg(Color::DarkYellow),
        Tone::Bad => cell.fg(Color::DarkRed),
        Tone::Faint => cell.fg(Color::DarkGrey),
    }
}

#[cfg(test)]
mod tests {
    use super::super::screen::tests::Printed;
    use super::*;

    fn rows() -> Vec<Vec<Value>> {
        vec![
            vec![Value::plain("web"), Value::plain("512"), Value::new("the guest's probe answers on port 8080 again", Tone::Good)],
            vec![Value::plain("a-longer-name"), Value::plain("8"), Value::maybe(None::<u8>)],
        ]
    }
    const COLUMNS: &[Column] = &[Column::text("NAME"), Column::number("MIB").expendable(1), Column::text("REASON")];

    #[test]
    fn a_piped_table_is_one_line_a_row_and_holds_no_escape() {
        let mut printed = Printed::default();
        let expected = "\
NAME           MIB  REASON
web            512  the guest's probe answers on port 8080 again
a-longer-name    8  -";
        assert_eq!(table(COLUMNS, &rows(), &printed.screen()), expected);
    }

    #[test]
    fn a_narrow_terminal_wraps_the_last_column() {
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        screen.width = Some(40);
        let expected = "\
NAME           MIB  REASON
web            512  the guest's probe
                    answers on port 8080
                    again
a-longer-name    8  -";
        assert_eq!(table(COLUMNS, &rows(), &screen), expected);
    }

    #[test]
    fn a_very_narrow_terminal_does_without_the_expendable_columns() {
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        screen.width = Some(34);
        let expected = "\
NAME           REASON
web            the guest's probe
               answers on port
               8080 again
a-longer-name  -";
        assert_eq!(table(COLUMNS, &rows(), &screen), expected);
        screen.width = Some(1);
        assert!(table(COLUMNS, &rows(), &screen).starts_with("NAME           REASON\n"));
    }

    #[test]
    fn colours_are_only_where_they_were_asked_for() {
        let mut printed = Printed::default();
        let mut screen = printed.screen();
        assert!(!table(COLUMNS, &rows(), &screen).contains('\x1b'));
        screen.colour = true;
        assert!(table(COLUMNS, &rows(), &screen).contains('\x1b'));
        assert_eq!(tinted("x", Tone::Bad, &screen), "\x1b[31mx\x1b[0m");
    }

    #[test]
    fn a_cell_with_line_ends_and_escapes_stays_one_line() {
        let mut printed = Printed::default();
        let evil = vec![vec![Value::plain("x\ny\u{1b}[2J\u{202e}")]];
        assert_eq!(table(&[Column::text("A")], &evil, &printed.screen()), "A\nx\\ny\\x1b[2J\\u{202e}");
    }

    #[test]
    fn a_sheet_sets_its_values_below_each_other() {
        assert_eq!(sheet(&[("name", "web".into()), ("forwards", "a\nb".into())]), "name:     web\nforwards: a\n          b");
    }
}
