//! Networks of a test's own: nothing here touches the machine's.
//!
//! ```text
//!   this thread and all that it starts           a thread of its own
//!   +----------- host ------------+        +------- world --------+
//!   | supervisor    dvm0n0, br0   |--veth--|  192.0.2.2           |
//!   | 192.0.2.1                   |        |  169.254.169.254     |
//!   +-----------------------------+        +----------------------+
//! ```
//!
//! A guest is played by the test: it writes raw frames into the tap's descriptor, and reads what comes out. (The supervisor gives that to nobody but QEMU. A test is
//! root, and takes a copy.)

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Gives the calling thread, and all that it starts from now on, a network of its own with nothing in it but a loopback interface; packets are
/// forwarded in it.
pub fn enter() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare needs root");
    ip("link set lo up");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("ip_forward");
}

/// `ip WORDS`, in the network of the calling thread.
pub fn ip(words: &str) -> String {
    run("ip", &words.split_whitespace().collect::<Vec<_>>())
}

/// A program with its output; panics when it fails.
pub fn run(program: &str, words: &[&str]) -> String {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(program).args(words).env("PATH", path).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

type Job = Box<dyn FnOnce() + Send>;

/// Another network, and the thread that is in it.
pub struct World {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl World {
    /// Joined to the calling thread's network by a pair of interfaces: `link` here, `far` there, both up.
    pub fn joined(link: &str) -> World {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare");
            ip("link set lo up");
            let _ = tell.send(nix::unistd::gettid());
            for job in queue {
                job();
            }
        });
        let world = World { jobs: Some(jobs), thread: Some(thread) };
        let tid = told.recv().expect("the thread");
        ip(&format!("link add {link} type veth peer name far netns {tid}"));
        ip(&format!("link set {link} up"));
        world.inside(|| ip("link set far up"));
        world
    }

    /// Does it there.
    pub fn inside<T: Send + 'static>(&self, action: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = mpsc::channel();
        let job: Job = Box::new(move || {
            let _ = tell.send(action());
        });
        self.jobs.as_ref().expect("the thread").send(job).expect("the thread");
        told.recv().expect("it panicked there")
    }

    /// Hears every frame of every interface there.
    pub fn ear(&self) -> Ear {
        self.inside(Ear::here)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A socket that gets a copy of every frame of one network.
pub struct Ear(OwnedFd);

impl Ear {
    pub fn here() -> Ear {
        Ear(socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, Some(eth::ALL)).expect("a packet socket"))
    }

    /// Whether a frame with these bytes in it comes within the time.
    pub fn hears(&self, mark: &[u8], within: Duration) -> bool {
        let mut buffer = vec![0; 65536];
        wait(
            &self.0,
            within,
            || match recv(&self.0, &mut buffer[..], RecvFlags::empty()) {
                Ok((length, _)) => Some(buffer[..length].to_vec()),
                Err(_) => None,
            },
            |frame| frame.windows(mark.len()).any(|part| part == mark),
        )
        .is_some()
    }
}

/// The first frame that is wanted, of those that come within the time.
fn wait(fd: &OwnedFd, within: Duration, mut next: impl FnMut() -> Option<Vec<u8>>, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    let until = Instant::now() + within;
    loop {
        while let Some(frame) = next() {
            if wanted(&frame) {
                return Some(frame);
            }
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        let _ = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() }));
    }
}

/// A guest without a kernel: what it sends is what the test says.
#[derive(Debug)]
pub struct Guest {
    pub tap: OwnedFd,
    pub mac: [u8; 6],
    pub address: Ipv4Addr,
}

/// `struct virtio_net_hdr` in front of each frame, without offloads: all zero.
const HEADER: usize = 10;
pub const BROADCAST: [u8; 6] = [0xff; 6];
pub const ARP: u16 = 0x0806;
pub const IPV4: u16 = 0x0800;
pub const IPV6: u16 = 0x86dd;

impl Guest {
    /// Writes a frame.
    pub fn send(&self, frame: &[u8]) {
        rustix::io::write(&self.tap, &[&[0; HEADER], frame].concat()).expect("write a frame");
    }

    /// The first frame that is wanted.
    pub fn receive(&self, within: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 65536];
        wait(&self.tap, within, || rustix::io::read(&self.tap, &mut buffer).ok().map(|length| buffer[HEADER.min(length)..length].to_vec()), wanted)
    }

    /// Asks for the MAC address of `whose`, as whoever `sender` and `claimed` say.
    pub fn ask_mac(&self, sender: [u8; 6], claimed: [u8; 6], from: Ipv4Addr, whose: Ipv4Addr) {
        let body = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &claimed, &from.octets(), &[0; 6], &whose.octets()].concat();
        self.send(&ethernet(BROADCAST, sender, ARP, &body));
    }

    /// The MAC address of `whose`, if it answers.
    pub fn resolve(&self, whose: Ipv4Addr, within: Duration) -> Option<[u8; 6]> {
        self.ask_mac(self.mac, self.mac, self.address, whose);
        let answer =
            |frame: &[u8]| frame.get(12..14) == Some(&ARP.to_be_bytes()) && frame.get(20..22) == Some(&[0, 2]) && frame.get(28..32) == Some(&whose.octets());
        self.receive(within, answer)?.get(22..28)?.try_into().ok()
    }

    /// Sends a UDP packet with this mark in it, to the MAC address `to`.
    pub fn udp(&self, to: [u8; 6], target: (Ipv4Addr, u16), mark: &[u8]) {
        self.send(&ethernet(to, self.mac, IPV4, &udp((self.address, 5000), target, mark)));
    }

    /// Whether `whom` answers a ping within the time; asks on, since the first ones may still wait for an address to be resolved.
    pub fn ping(&self, to: [u8; 6], whom: Ipv4Addr, within: Duration) -> bool {
        let mut echo = [&[8, 0, 0, 0, 0x12, 0x34, 0, 1][..], b"ping of the test"].concat();
        let sum = checksum(&echo).to_be_bytes();
        echo[2..4].copy_from_slice(&sum);
        self.send(&ethernet(to, self.mac, IPV4, &packet(1, self.address, whom, &echo)));
        // ICMP, type 0, from there.
        self.answer_arp_until(within, |frame| frame.get(23) == Some(&1) && frame.get(34) == Some(&0) && frame.get(26..30) == Some(&whom.octets())).is_some()
    }

    /// As [`Guest::receive`], and says its MAC address to whoever asks meanwhile.
    pub fn answer_arp_until(&self, within: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let until = Instant::now() + within;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let asks = |frame: &[u8]| {
                frame.get(12..14) == Some(&ARP.to_be_bytes()) && frame.get(20..22) == Some(&[0, 1]) && frame.get(38..42) == Some(&self.address.octets())
            };
            let frame = self.receive(left, |frame| wanted(frame) || asks(frame))?;
            if !asks(&frame) {
                return Some(frame);
            }
            let body = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &self.mac, &self.address.octets(), &frame[22..28], &frame[28..32]].concat();
            self.send(&ethernet(frame[6..12].try_into().expect("six bytes"), self.mac, ARP, &body));
        }
    }
}

/// `TUNSETPERSIST`, `_IOW('T', 203, int)` (linux/if_tun.h).
const TUNSETPERSIST: u64 = 0x4004_54cb;

/// Copies of the queues of this tap that a process holds, in their order; none where it holds none.
pub fn queues(pid: i32, name: &str) -> Vec<OwnedFd> {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let pidfd = pidfd_open(Pid::from_raw(pid).expect("a process"), PidfdFlags::empty()).expect("pidfd_open");
    let infos = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let own = |info: &std::fs::DirEntry| std::fs::read_to_string(info.path()).is_ok_and(|text| text.lines().any(|line| line == format!("iff:\t{name}")));
    let mut numbers: Vec<i32> = infos.filter(own).filter_map(|info| info.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers.into_iter().map(|number| pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).expect("pidfd_getfd")).collect()
}

/// A tap of this name in the calling thread's network, made by hand.
pub fn create_tap(name: &str) -> OwnedFd {
    let fd = open_tun();
    attach_tap(&fd, name, 0).expect("TUNSETIFF");
    fd
}

/// `/dev/net/tun`, which belongs to no tap yet.
pub fn open_tun() -> OwnedFd {
    std::fs::File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun").into()
}

/// Makes the tap, or becomes a queue of it; `more` are flags beside those that ours have.
#[allow(unsafe_code)]
pub fn attach_tap(fd: &OwnedFd, name: &str, more: i32) -> std::io::Result<()> {
    use nix::libc;
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more) as i16;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Lets a tap outlive its descriptors, as whoever holds one can.
#[allow(unsafe_code)]
pub fn persist(tap: &OwnedFd) -> std::io::Result<()> {
    // SAFETY: TUNSETPERSIST takes a number.
    if unsafe { nix::libc::ioctl(tap.as_raw_fd(), TUNSETPERSIST as _, 1) } == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

pub fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &from, &kind.to_be_bytes(), body].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// An IPv4 packet (RFC 791).
pub fn packet(protocol: u8, from: Ipv4Addr, to: Ipv4Addr, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + body.len()).expect("a small packet").to_be_bytes();
    let mut head = [&[0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0][..], &from.octets(), &to.octets()].concat();
    let sum = checksum(&head).to_be_bytes();
    head[10..12].copy_from_slice(&sum);
    [&head[..], body].concat()
}

/// With UDP in it, without its checksum, which IPv4 allows (RFC 768).
pub fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + body.len()).expect("a small packet").to_be_bytes();
    let datagram = [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), &length, &[0, 0], body].concat();
    packet(17, from.0, to.0, &datagram)
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
