//! Manual pages, as roff.
//!
//! Options and subcommands are rendered by clap_mangen. What a program says after them, and the supervisor's whole help, is text of one shape:
//!
//! ```text
//!   Exit codes:          <- a section; at the line's start, ends with a colon
//!     0  done            <- an entry: two spaces or more between the term and what it means
//!
//!   Defaults: --x, ...   <- a section of one paragraph
//! ```

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

/// One manual page.
#[derive(Debug, PartialEq, Eq)]
pub struct Page {
    pub name: String,
    pub section: &'static str,
    pub text: String,
}

const USER: &str = "1";
const ADMINISTRATION: &str = "8";
const BOOK: &str = "Diarch";
/// A page has the version and no date. Not the empty string: roff's writer doesn't quote that, and the version would stand in its place.
const UNDATED: &str = " ";

/// All of them.
pub fn pages() -> Result<Vec<Page>, String> {
    let mut pages = Vec::new();
    let mut diarch = diarch_worker::cli::command().disable_help_subcommand(true);
    diarch.build();
    with_subcommands(&diarch, &["diarch-supervisor(8)", "diarch-worker(8)"], &mut pages)?;
    let mut worker = diarch_worker::arguments::command();
    worker.build();
    pages.push(page(&worker, ADMINISTRATION, &["diarch(1)".into(), "diarch-supervisor(8)".into()])?);
    pages.push(from_help(diarch_supervisor::usage::HELP, &["diarch(1)".into(), "diarch-worker(8)".into()])?);
    Ok(pages)
}

/// A page for the command, and one for each below it.
fn with_subcommands(command: &Command, above: &[&str], pages: &mut Vec<Page>) -> Result<(), String> {
    let below = || command.get_subcommands().filter(|below| !below.is_hide_set());
    let mut see_also: Vec<String> = above.iter().map(|&page| page.to_owned()).collect();
    see_also.extend(below().map(|below| format!("{}({USER})", name(below))));
    pages.push(page(command, USER, &see_also)?);
    let here = format!("{}({USER})", name(command));
    below().try_for_each(|below| with_subcommands(below, &[&here], pages))
}

/// `diarch-vm-start`, as its page is called.
fn name(command: &Command) -> String {
    command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned()
}

fn source() -> String {
    format!("{BOOK} {}", env!("CARGO_PKG_VERSION"))
}

fn page(command: &Command, section: &'static str, see_also: &[String]) -> Result<Page, String> {
    let name = name(command);
    // Its own VERSION section would say again what the page's last line says.
    let man = Man::new(command.clone()).title(name.to_uppercase()).section(section).date(UNDATED).source(source()).manual(BOOK);
    let rendered = |render: &dyn Fn(&mut Vec<u8>) -> std::io::Result<()>| {
        let mut bytes = Vec::new();
        render(&mut bytes).map_err(|error| format!("{name}: {error}"))?;
        String::from_utf8(bytes).map_err(|error| format!("{name}: {error}"))
    };
    let mut text = rendered(&|to| man.render_title(to))?;
    let mut add = |part: String| text.push_str(without_preamble(&part));
    add(rendered(&|to| man.render_name_section(to))?);
    add(rendered(&|to| man.render_synopsis_section(to))?);
    add(rendered(&|to| man.render_description_section(to))?);
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        add(rendered(&|to| man.render_options_section(to))?);
    }
    if command.get_subcommands().any(|below| !below.is_hide_set()) {
        add(rendered(&|to| man.render_subcommands_section(to))?);
    }
    if let Some(after) = command.get_after_long_help().or_else(|| command.get_after_help()) {
        let after = after.to_string();
        add(sections(&after.lines().collect::<Vec<_>>()).map_err(|line| format!("{name}: the help has a line of no known shape: {line:?}"))?.render());
    }
    add(refer(see_also).render());
    Ok(Page { name, section, text })
}

/// The supervisor's page, from its help: it has no definition that a library could render.
fn from_help(help: &str, see_also: &[String]) -> Result<Page, String> {
    let wrong = |line: &str| format!("the supervisor's help has a line of no known shape: {line:?}");
    let mut lines = help.lines().peekable();
    let first = lines.next().unwrap_or_default();
    let (name, about) = first.split_once(": ").ok_or_else(|| wrong(first))?;
    if lines.next() != Some("") {
        return Err(wrong("no empty line after the first"));
    }
    let (mut synopsis, mut commands) = (Roff::new(), Roff::new());
    synopsis.control("SH", ["SYNOPSIS"]);
    commands.control("SH", ["COMMANDS"]);
    let mut usage = lines.by_ref().take_while(|line| !line.is_empty()).peekable();
    let mut forms = 0;
    while let Some(line) = usage.next() {
        let form = line.strip_prefix("  ").and_then(|form| form.strip_prefix(name)).filter(|form| form.starts_with(' ')).ok_or_else(|| wrong(line))?;
        if forms > 0 {
            synopsis.control("br", []);
        }
        forms += 1;
        synopsis.text([bold(name), roman(form)]);
        if let Some(meaning) = usage.next_if(|line| line.starts_with("      ")) {
            commands.control("TP", []).text([bold(name), roman(form)]).text([roman(meaning.trim_start())]);
        }
        while let Some(more) = usage.next_if(|line| line.starts_with("      ")) {
            commands.text([roman(more.trim_start())]);
        }
    }
    if forms == 0 {
        return Err(wrong("no command"));
    }
    let rest: Vec<&str> = lines.collect();

    let mut head = Roff::new();
    head.control("TH", [&*name.to_uppercase(), ADMINISTRATION, UNDATED, &source(), BOOK]);
    head.control("SH", ["NAME"]).text([roman(format!("{name} - {about}"))]);
    let mut text = head.render();
    for part in [synopsis, commands, sections(&rest).map_err(|line| wrong(&line))?, refer(see_also)] {
        text.push_str(without_preamble(&part.render()));
    }
    Ok(Page { name: name.to_owned(), section: ADMINISTRATION, text })
}

/// Sections as in this module's header. The error is the line that is none of it.
fn sections(lines: &[&str]) -> Result<Roff, String> {
    let mut roff = Roff::new();
    for line in lines.iter().filter(|line| !line.is_empty()) {
        if let Some(entry) = line.strip_prefix("  ") {
            let (term, meaning) = entry.split_once("  ").ok_or_else(|| (*line).to_owned())?;
            roff.control("TP", []).text([bold(term)]).text([roman(meaning.trim_start())]);
        } else {
            let (title, paragraph) = line.split_once(':').ok_or_else(|| (*line).to_owned())?;
            roff.control("SH", [heading(title).as_str()]);
            if !paragraph.is_empty() {
                roff.text([roman(paragraph.trim_start())]);
            }
        }
    }
    Ok(roff)
}

/// As man-pages(7) has it.
fn heading(title: &str) -> String {
    if title == "Exit codes" { "EXIT STATUS".into() } else { title.to_uppercase() }
}

fn refer(to: &[String]) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["SEE ALSO"]);
    for (index, page) in to.iter().enumerate() {
        let (name, section) = page.split_at(page.find('(').unwrap_or(page.len()));
        let comma = if index + 1 < to.len() { "," } else { "" };
        roff.text([bold(name), roman(format!("{section}{comma}"))]);
    }
    roff.control("PP", []).text([roman("/usr/share/doc/diarch")]);
    roff
}

/// Each rendering begins with the same definition (how an apostrophe is set); one is enough for a page.
fn without_preamble(rendered: &str) -> &str {
    rendered.strip_prefix(&Roff::new().render()).unwrap_or(rendered)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(command: &Command) -> Vec<String> {
        command.get_subcommands().filter(|below| below.get_name() != "help").flat_map(|below| [vec![name(below)], names(below)].concat()).collect()
    }

    fn of<'p>(pages: &'p [Page], name: &str) -> &'p str {
        &pages.iter().find(|page| page.name == name).unwrap_or_else(|| panic!("no page {name}")).text
    }

    #[test]
    fn every_command_has_a_page_and_is_named_by_the_one_above_it() {
        let pages = pages().unwrap();
        let mut command = diarch_worker::cli::command();
        command.build();
        let names = names(&command);
        assert!(names.len() > 10, "{names:?}");
        for name in names {
            let above = name.rsplit_once('-').unwrap().0;
            assert!(of(&pages, above).contains(&name.replace('-', "\\-")), "{above} does not name {name}");
            assert!(of(&pages, &name).contains(".SH SYNOPSIS"));
        }
    }

    #[test]
    fn no_page_has_an_empty_section_or_one_twice() {
        for page in pages().unwrap() {
            let mut seen = Vec::new();
            for section in page.text.split("\n.SH ").skip(1) {
                let (title, body) = section.split_once('\n').unwrap_or((section, ""));
                let text: usize = body.lines().filter(|line| !line.starts_with('.')).map(|line| line.trim().len()).sum();
                assert!(text > 0, "{}: {title} is empty", page.name);
                assert!(!seen.contains(&title), "{}: {title} is there twice", page.name);
                seen.push(title);
            }
            assert!(page.text.contains("\" \" \"Diarch "), "{}: the title's arguments are shifted", page.name);
            assert!(seen.starts_with(&["NAME", "SYNOPSIS"]) && seen.ends_with(&["\"SEE ALSO\""]), "{}: {seen:?}", page.name);
        }
    }

    #[test]
    fn exit_codes_and_environment_are_sections_of_their_own() {
        let pages = pages().unwrap();
        for name in ["diarch", "diarch-worker", "diarch-supervisor"] {
            assert!(of(&pages, name).contains(".SH \"EXIT STATUS\"\n.TP\n\\fB0\\fR\n"), "{name}");
        }
        assert!(of(&pages, "diarch").contains(".SH ENVIRONMENT\n.TP\n\\fBDIARCH_SOCKET\\fR\n"));
    }

    #[test]
    fn the_supervisors_page_has_every_command_of_its_help() {
        let pages = pages().unwrap();
        let text = of(&pages, "diarch-supervisor");
        for line in diarch_supervisor::usage::HELP.lines().filter_map(|line| line.strip_prefix("      ")) {
            assert!(text.contains(&roff_text(line)), "{line}");
        }
        assert!(text.contains(".SH DEFAULTS\n"));
    }

    fn roff_text(text: &str) -> String {
        let mut roff = Roff::new();
        roff.text([roman(text)]);
        without_preamble(&roff.render()).trim_end().to_owned()
    }

    #[test]
    fn a_help_of_another_shape_is_an_error_and_not_a_page() {
        for help in [
            "",
            "x",
            "x: y\n  x z\n",
            "x: y\n\n",
            "x: y\n\n  other z\n      Meaning.\n",
            "x: y\n\n  x z\n      Meaning.\n\nno colon\n",
            "x: y\n\n  x z\n\nA:\n  b\n",
        ] {
            assert!(from_help(help, &[]).is_err(), "{help:?}");
        }
    }

    #[test]
    fn text_is_never_taken_for_a_request() {
        let page = from_help("x: y\n\n  x z\n      .so /etc/shadow\n\nNote: 'tis \\fB\n", &[]).unwrap().text;
        assert!(!page.contains("\n.so") && !page.contains("\n'tis") && page.contains("\\\\fB\n"), "{page}");
    }
}
