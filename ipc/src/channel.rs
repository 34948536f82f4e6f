//! A connected SEQPACKET socket that carries frames with their file descriptors.
//!
//! The runtime watches the socket for reading only. Watched for writing as well, it would wake the sender each time its peer takes a message off the queue
//! (`unix_write_space` in the kernel), which costs two more context switches for each request than there is work for.

use crate::error::Error;
use crate::frame::{self, MAX_FDS, MAX_FRAME, Malformed};
use crate::received::{Close, Received};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// One end of a connection. Frames go whole or not at all; both directions may be used at the same time.
#[derive(Debug)]
pub struct Channel {
    socket: AsyncFd<OwnedFd>,
    close: Close,
    /// A second descriptor of the socket, where closing it is somebody else's. Behind the first: so it is the last.
    _last: Option<Received>,
}

/// Has the runtime watch a descriptor that nobody else closes.
// Deprecated by tokio for types whose descriptor may change or close under it; an `OwnedFd`'s can't. The successor is an `unsafe fn`.
#[allow(deprecated)]
fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}

/// What came instead of a frame.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("the connection is closed")]
    Closed,
    #[error("hostile frame: {0}")]
    Malformed(#[from] Malformed),
    #[error("receiving failed: {0}")]
    Io(#[from] io::Error),
}

/// The buffers of one receiving end, allocated once.
pub struct Receiver {
    bytes: Vec<u8>,
    scratch: Vec<u8>,
}

impl Default for Receiver {
    fn default() -> Self {
        Self { bytes: vec![0; MAX_FRAME], scratch: Vec::new() }
    }
}

impl Channel {
    /// Connects to the supervisor's socket. A missing or refusing socket is an error at once.
    pub fn connect(path: &Path) -> io::Result<Self> {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        // A local connect is done or refused at once; EAGAIN means a full backlog, which is a refusal too.
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::from_fd(socket)
    }

    /// Takes a connected SEQPACKET socket.
    pub fn from_fd(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket: watch(socket, Interest::READABLE)?, close: drop, _last: None })
    }

    /// For who may not wait when something of the peer's is closed, the connection with what lies in it unread included.
    pub fn closed_by(self, close: Close) -> io::Result<Self> {
        let last = Received::new(vec![self.socket.get_ref().try_clone()?], close);
        Ok(Self { close, _last: Some(last), ..self })
    }

    /// The user of the process at the other end (`SO_PEERCRED`). For a client under socket activation this is whoever called `listen`, which is what
    /// it wants to know: who may answer on this socket.
    pub fn peer_uid(&self) -> io::Result<u32> {
        let creds = nix::sys::socket::getsockopt(&self.socket.get_ref(), nix::sys::socket::sockopt::PeerCredentials)?;
        Ok(creds.uid())
    }

    /// Sends bytes that are already encoded, if there is room for them now; `WouldBlock` if there is not.
    pub fn try_send_encoded(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many file descriptors for one frame"));
        }
        // SEQPACKET is all or nothing: a short count can't happen.
        Ok(sendmsg(self.socket.get_ref(), &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).map(drop)?)
    }

    /// Sends bytes that are already encoded.
    pub async fn send_encoded(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        match self.try_send_encoded(bytes, fds) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
        // The peer does not read: only now is it worth watching for room.
        let room = watch(self.socket.get_ref().try_clone()?, Interest::WRITABLE)?;
        room.async_io(Interest::WRITABLE, |_| self.try_send_encoded(bytes, fds)).await
    }

    /// Encodes and sends one frame.
    pub async fn send(&self, frame: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let mut bytes = Vec::new();
        frame::encode(frame, &mut bytes)?;
        self.send_encoded(&bytes, fds).await.map_err(|error| Error::io("send", &error))
    }

    /// Receives one frame from a peer that nothing is believed of. Descriptors that come with a frame that is refused are closed.
    pub async fn receive<T: DeserializeOwned + Serialize>(&self, with: &mut Receiver) -> Result<(T, Received), ReceiveError> {
        let (length, fds) = self.receive_bytes(&mut with.bytes).await?;
        Ok((frame::decode(&with.bytes[..length], &mut with.scratch)?, fds))
    }

    /// Receives one frame of the supervisor's; see [`frame::decode_from_root`].
    pub async fn receive_from_root<T: DeserializeOwned>(&self, with: &mut Receiver) -> Result<(T, Vec<OwnedFd>), ReceiveError> {
        let (length, fds) = self.receive_bytes(&mut with.bytes).await?;
        Ok((frame::decode_from_root(&with.bytes[..length])?, fds.into_inner()))
    }

    async fn receive_bytes(&self, buffer: &mut [u8]) -> Result<(usize, Received), ReceiveError> {
        let receive = |socket: &OwnedFd| {
            let mut fds = Vec::new();
            let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let got = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            Ok((got.bytes, got.flags, Received::new(fds, self.close)))
        };
        let (length, flags, fds) = match self.socket.async_io(Interest::READABLE, receive).await {
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(ReceiveError::Closed),
            Err(error) => return Err(error.into()),
        };
        if flags.contains(ReturnFlags::CTRUNC) {
            return Err(Malformed::TooManyFds.into());
        }
        if flags.contains(ReturnFlags::TRUNC) {
            return Err(Malformed::TooLong.into());
        }
        // An empty message and the end of the connection look alike, and neither is a frame.
        if length == 0 {
            return Err(ReceiveError::Closed);
        }
        Ok((length, fds))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

/// A connected pair, for tests and for handing one end to a child.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}
