//! The command that people type; see `diarch_worker::cli`.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    diarch_worker::cli::main()
}
