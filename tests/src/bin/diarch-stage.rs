//! `diarch-stage`: a host with devices, for a rehearsal by who has none (`diarch rehearse --host`).

use diarch_tests::stage::{Shape, Stage};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn usage() -> String {
    let shapes: String = Shape::ALL.iter().map(|shape| format!("\n  {:<15} {}", shape.as_str(), shape.what())).collect();
    format!("usage: diarch-stage DIRECTORY SHAPE...\n\nMakes DIRECTORY, with sys, proc and dev as a kernel shows a host of these shapes:{shapes}")
}

/// A new directory, or an empty one: nobody's files are written over.
fn empty(path: &Path) -> std::io::Result<PathBuf> {
    std::fs::create_dir_all(path)?;
    if std::fs::read_dir(path)?.next().is_some() {
        return Err(std::io::Error::other("there is something in it: a stage needs a directory of its own"));
    }
    std::fs::canonicalize(path)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (directory, names) = match arguments.split_first() {
        Some((directory, names)) if !names.is_empty() && !directory.starts_with('-') => (Path::new(directory), names),
        _ => {
            eprintln!("{}", usage());
            return ExitCode::from(2);
        }
    };
    let mut shapes: Vec<Shape> = Vec::new();
    for name in names {
        match name.parse() {
            Ok(shape) if !shapes.contains(&shape) => shapes.push(shape),
            Ok(_) => {}
            Err(reason) => {
                eprintln!("diarch-stage: {reason}\n{}", usage());
                return ExitCode::from(2);
            }
        }
    }
    match empty(directory) {
        Ok(root) => {
            Stage::set(&root, &shapes);
            println!("{}", root.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("diarch-stage: {}: {error}", directory.display());
            ExitCode::FAILURE
        }
    }
}
