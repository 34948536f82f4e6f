//! Who may connect: the two sockets' owners and modes.

use super::Host;
use super::finding::Finding;
use crate::cli::connection::{group_name, group_of_first_seen, user_name};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// What lets a person in whom the socket's mode keeps out.
pub fn join(socket: &Path) -> String {
    match group_of_first_seen(socket) {
        Some(group) => format!("join the group {group}: usermod -aG {group} YOU, and log in again"),
        None => "join the group that may use it: an administrator knows which".to_owned(),
    }
}

/// The worker's, which people come in by.
pub fn of_worker(socket: &Path) -> Finding {
    // Followed: the path that people use may be a link into the worker's own directory.
    let about = match socket.metadata() {
        Ok(about) => about,
        Err(error) => {
            let fix = match error.kind() {
                std::io::ErrorKind::PermissionDenied => join(socket),
                _ => "systemctl status diarch-worker".to_owned(),
            };
            return Finding::warn("socket", format!("{} can't be looked at: {error}", socket.display()), fix);
        }
    };
    let detail = format!("{} is {}:{} {:04o}", socket.display(), user_name(about.uid()), group_name(about.gid()), about.mode() & 0o7777);
    match about.mode() & 0o002 == 0 {
        true => Finding::ok("socket", detail),
        false => Finding::fail(
            "socket",
            format!("{detail}: everybody on this host can command the VMs"),
            "systemctl restart diarch-worker makes it anew, with mode 0660; and find out who changed it",
        ),
    }
}

/// The supervisor's, which the worker comes in by. Who connects is asked for his user and unit besides.
pub fn of_supervisor(host: &Host) -> Finding {
    const CHECK: &str = "root socket";
    // A socket is not restarted while its service runs: systemd refuses.
    const ANEW: &str = "systemctl stop diarch-supervisor.socket diarch-supervisor.service; systemctl start diarch-supervisor.socket: that makes it as its unit \
                        says, root:diarch 0660 (VMs run on)";
    let path = host.root.join("run/diarch/supervisor.sock");
    let about = match path.symlink_metadata() {
        Ok(about) => about,
        Err(error) => {
            return Finding::warn(CHECK, format!("{} can't be looked at: {error}", path.display()), "systemctl enable --now diarch-supervisor.socket");
        }
    };
    let detail = format!("{} is {}:{} {:04o}", path.display(), user_name(about.uid()), group_name(about.gid()), about.mode() & 0o7777);
    if !about.file_type().is_socket() {
        return Finding::fail(CHECK, format!("{} is no socket", path.display()), ANEW);
    }
    if about.uid() != host.root_uid {
        return Finding::fail(CHECK, format!("{detail}: it is not root's, and who made it is no supervisor"), ANEW);
    }
    if about.mode() & 0o007 != 0 {
        return Finding::fail(CHECK, format!("{detail}: everybody on this host can knock"), ANEW);
    }
    let group = group_name(about.gid());
    match group == host.worker_group && about.mode() & 0o060 == 0o060 {
        true => Finding::ok(CHECK, detail),
        false => Finding::warn(CHECK, format!("{detail}: a worker of the group {} can't connect", host.worker_group), ANEW),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::super::tests::host;
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    fn mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("changed");
    }

    #[test]
    fn a_link_to_the_workers_socket_is_followed_and_one_that_everybody_may_write_is_a_fail() {
        let directory = tempfile::tempdir().expect("a directory");
        let (socket, link) = (directory.path().join("worker.sock"), directory.path().join("link.sock"));
        let _listener = UnixListener::bind(&socket).expect("a socket");
        std::os::unix::fs::symlink(&socket, &link).expect("linked");
        for (bits, expected) in [(0o660, Level::Ok), (0o666, Level::Fail)] {
            mode(&socket, bits);
            assert_eq!((of_worker(&link).level, of_worker(&socket).level), (expected, expected));
        }
        assert_eq!(of_worker(&directory.path().join("none")).level, Level::Warn);
    }

    #[test]
    fn the_supervisors_socket_is_roots_for_the_workers_group_and_for_nobody_else() {
        let (_directory, mut host) = host();
        assert_eq!(of_supervisor(&host).level, Level::Warn);
        let path = host.root.join("run/diarch/supervisor.sock");
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        let _listener = UnixListener::bind(&path).expect("a socket");
        for (bits, expected) in [(0o660, Level::Ok), (0o640, Level::Warn), (0o661, Level::Fail), (0o666, Level::Fail)] {
            mode(&path, bits);
            assert_eq!(of_supervisor(&host).level, expected, "{bits:o}");
        }
        mode(&path, 0o660);
        host.worker_group = "somebody-elses".into();
        assert_eq!(of_supervisor(&host).level, Level::Warn);
        host.root_uid += 1;
        assert_eq!(of_supervisor(&host).level, Level::Fail);
    }
}
