//! scratch
use diarch_tests::machine::{Machine, vm_file_stub};
use diarch_tests::need;

#[test]
#[ignore]
fn explore() {
    need!(Machine, Package);
    let machine =
        Machine::installed().vm(vm_file_stub("a")).vm(diarch_tests::machine::vm_file_guest("guest", 8080)).limit(std::time::Duration::from_secs(3000)).boot();
    println!("{}", machine.leader());
    std::fs::write("/tmp/rights.leader", machine.leader().to_string()).unwrap();
    while std::path::Path::new("/tmp/rights.leader").exists() {
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}
