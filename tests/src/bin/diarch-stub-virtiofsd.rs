//! Stands for virtiofsd where a test has no guest that would mount anything: takes the connection of its VM's QEMU from the listening socket that it was given as
//! `--fd`, and ends when QEMU does. It serves nothing.

use rustix::net::{SocketFlags, accept_with};
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

fn main() -> ExitCode {
    let number = std::env::args().find_map(|word| word.strip_prefix("--fd=").and_then(|number| number.parse::<i32>().ok()));
    let Some(number) = number.filter(|number| *number > 2) else {
        eprintln!("diarch-stub-virtiofsd: it needs --fd=N");
        return ExitCode::from(2);
    };
    // SAFETY: whoever started us gave us this descriptor, and nothing else in this process knows its number.
    let listener = unsafe { OwnedFd::from_raw_fd(number) };
    let connection = match accept_with(&listener, SocketFlags::CLOEXEC) {
        Ok(connection) => connection,
        Err(error) => {
            eprintln!("diarch-stub-virtiofsd: accept: {error}");
            return ExitCode::from(1);
        }
    };
    drop(listener);
    let mut stream = UnixStream::from(connection);
    // What is said is not understood.
    let mut buffer = [0; 4096];
    while matches!(stream.read(&mut buffer), Ok(1..)) {}
    ExitCode::SUCCESS
}
