//! A supervisor of this build in the lab, as its unit runs it: so its sandbox counts too.

use super::Lab;

/// Below it is what a supervisor of [`Lab::supervise`] has, and what those who ask it write.
pub const DIRECTORY: &str = "/run/diarch-devices";
pub const SUPERVISOR: &str = "diarch-supervisor.service";
const UNITS: &str = "/run/systemd/system";

impl Lab {
    /// Starts one with these grants. Its worker's user is there, and nobody who plays it.
    #[track_caller]
    pub fn supervise(&self, grants: &str) {
        let unit = include_str!("../../../units/diarch-supervisor.service");
        let (before, after) =
            ("ExecStart=/usr/sbin/diarch-supervisor run\n", format!("ExecStart=/srv/lab/bin/diarch-supervisor run --grants {DIRECTORY}/grants.toml\n"));
        assert!(unit.contains(before), "the unit has another command now");
        self.sh(&format!("modprobe kvm_amd; modprobe vfio-pci; mkdir -p {UNITS} {DIRECTORY}/files"));
        self.write(&format!("{UNITS}/{SUPERVISOR}"), &unit.replace(before, &after));
        self.write(&format!("{UNITS}/diarch-supervisor.socket"), include_str!("../../../units/diarch-supervisor.socket"));
        self.write(&format!("{UNITS}/diarch-vms.slice"), include_str!("../../../units/diarch-vms.slice"));
        self.write(&format!("{DIRECTORY}/sysusers.conf"), include_str!("../../../units/diarch.sysusers.conf"));
        self.write(&format!("{DIRECTORY}/grants.toml"), grants);
        self.sh(&format!(
            "systemd-sysusers {DIRECTORY}/sysusers.conf; install -d -o diarch {DIRECTORY}/logs; install -d /run/diarch /var/log/diarch
             ln -sf /srv/guest/vmlinuz {DIRECTORY}/files/kernel; ln -sf /srv/guest/initrd.img {DIRECTORY}/files/initrd
             systemctl start diarch-supervisor.socket {SUPERVISOR}"
        ));
    }

    /// Takes all of it away again, but for what it did to devices.
    #[track_caller]
    pub fn end_supervision(&self) {
        let gone = self.try_sh(&format!(
            "systemctl stop diarch-supervisor.socket {SUPERVISOR}
             rm -rf {UNITS}/diarch-supervisor.* {UNITS}/diarch-vms.slice {DIRECTORY} /run/diarch /var/log/diarch
             systemctl daemon-reload"
        ));
        if !gone.success() {
            eprintln!("what was made for the supervisor is not all gone: {gone:?}");
        }
    }
}
