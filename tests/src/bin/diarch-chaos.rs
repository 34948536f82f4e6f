//! `diarch-chaos`: see `diarch_tests::chaos`.

use diarch_tests::chaos::{self, Settings, enclosure};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: diarch-chaos [--rounds N] [--seed N] [--from ROUND] [--plant THING] [--tree DIRECTORY]

Random operations, random deaths and a kernel that does wrong, around a real supervisor with stub QEMUs (and real ones, and passt and virtiofsd, where they are
installed), in namespaces of its own; after each of N rounds (2000) the kernel must have what the ledger says. Needs root, ip and nft. The seed decides what is done; without --seed it is random, and printed. With --plant something is left
behind half way on purpose, and must be found. With --tree all takes place on the tree of another Debian (tests/debian/build makes one), with its programs. Exit code 0: clean; 1: something was found.";

/// Differences that are printed: one lost table is a hundred.
const MOST: usize = 30;

struct Options {
    settings: Settings,
    inside: bool,
}

fn parse(arguments: &[String]) -> Result<Options, String> {
    let mut settings = Settings { seed: seed(), from: 0, rounds: 2000, users: diarch_tests::host::users(), plant: None, tree: None };
    let mut inside = false;
    let mut rest = arguments.iter();
    while let Some(option) = rest.next() {
        if option == "--inside" {
            inside = true;
            continue;
        }
        let value = rest.next().ok_or_else(|| format!("{option} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("{option}: {value:?} is not a number"));
        match option.as_str() {
            "--rounds" => settings.rounds = number()?,
            "--seed" => settings.seed = number()?,
            "--from" => settings.from = number()?,
            "--users" => settings.users = u32::try_from(number()?).map_err(|e| e.to_string())?,
            "--tree" => settings.tree = Some(value.into()),
            "--plant" => settings.plant = Some(value.parse()?),
            other => return Err(format!("there is no option {other:?}")),
        }
    }
    Ok(Options { settings, inside })
}

fn seed() -> u64 {
    let mut seed = [0u8; 8];
    let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(seed)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Options { settings, inside } = match parse(&arguments) {
        Ok(options) => options,
        Err(reason) => {
            eprintln!("diarch-chaos: {reason}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if !inside {
        return begin(&settings);
    }
    if let Err(error) = enclosure::furnish(settings.tree.as_deref()) {
        eprintln!("diarch-chaos: the namespaces: {error}");
        return ExitCode::from(2);
    }
    // A step that never ends is a finding too, and the namespaces' end ends it.
    watch(Duration::from_secs(60 + settings.rounds * 5));
    match chaos::run(&settings) {
        Ok(summary) => {
            let took = summary.took.as_secs_f64();
            for (answer, count) in &summary.answers {
                println!("  {count:6} {answer}");
            }
            for (what, count) in &summary.seen {
                println!("  {count:6} at a round's end: {what}");
            }
            for (whom, count) in &summary.kills {
                println!("  {count:6} killed: {whom}");
            }
            for (what, count) in &summary.done_wrong {
                println!("  {count:6} times the kernel had {what}");
            }
            println!(
                "clean: {} rounds, {} steps, {} kills, {} starts of the supervisor, {took:.1} s, {:.0} rounds a minute, seed {}",
                summary.rounds,
                summary.steps,
                summary.kills.values().sum::<u64>(),
                summary.starts,
                summary.rounds as f64 * 60.0 / took,
                settings.seed
            );
            ExitCode::SUCCESS
        }
        Err(found) => {
            println!("found in round {} (--seed {} --from {} --rounds 1, or from the last multiple of ten):", found.round, settings.seed, found.round);
            found.steps.iter().for_each(|step| println!("  {step}"));
            println!("and the answers, as they were taken note of:");
            found.heard.iter().for_each(|answer| println!("  {answer}"));
            found.wrong.iter().take(MOST).for_each(|sentence| println!("WRONG: {sentence}"));
            if found.wrong.len() > MOST {
                println!("WRONG: and {} more", found.wrong.len() - MOST);
            }
            println!("---- the end of supervisor.log ----\n{}", found.log);
            ExitCode::FAILURE
        }
    }
}

fn begin(settings: &Settings) -> ExitCode {
    println!("chaos: seed {}, {} rounds", settings.seed, settings.rounds);
    let mut arguments = vec!["--inside".to_owned()];
    let numbers = [("--seed", settings.seed), ("--from", settings.from), ("--rounds", settings.rounds), ("--users", settings.users.into())];
    numbers.into_iter().for_each(|(name, number)| arguments.extend([name.to_owned(), number.to_string()]));
    if let Some(plant) = settings.plant {
        arguments.extend(["--plant".to_owned(), plant.to_string()]);
    }
    if let Some(tree) = &settings.tree {
        arguments.extend(["--tree".to_owned(), tree.display().to_string()]);
    }
    match enclosure::enter(&arguments) {
        Ok(status) => ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
        Err(error) => {
            eprintln!("diarch-chaos: namespaces need root: {error}");
            ExitCode::from(2)
        }
    }
}

fn watch(limit: Duration) {
    let until = Instant::now() + limit;
    std::thread::spawn(move || {
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        eprintln!("diarch-chaos: not done after {limit:?}");
        std::process::exit(1);
    });
}
