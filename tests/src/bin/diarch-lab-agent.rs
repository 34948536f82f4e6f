//! The agent in the lab: does what a test asks for through a virtio port. Started by systemd there; anywhere else it refuses.

fn main() -> std::process::ExitCode {
    match diarch_tests::lab::serve() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("diarch-lab-agent: {e}");
            std::process::ExitCode::FAILURE
        }
    }
}
