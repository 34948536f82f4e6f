//! An `nft` that is killed: as often as the file `deaths` beside it says, it dies before it does anything. Otherwise it is the real one.

use std::os::unix::process::CommandExt;

fn main() {
    // It was executed from a descriptor; the kernel knows its name.
    let deaths = std::env::current_exe().expect("/proc/self/exe").with_file_name("deaths");
    let left: u32 = std::fs::read_to_string(&deaths).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    if left > 0 {
        std::fs::write(&deaths, (left - 1).to_string()).expect("count");
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
    let error = std::process::Command::new("/usr/sbin/nft").args(std::env::args_os().skip(1)).exec();
    panic!("/usr/sbin/nft: {error}");
}
