//! Whether a VM does its work.
//!
//! ```text
//!   Unknown --probe answers--> Healthy --`failures` in a row--> Unhealthy --probe answers--> Healthy
//!      |                                                            ^
//!      +---- grace is over, and then `failures` in a row -----------+
//! ```
//!
//! One task for each VM that has a probe; without one nothing ticks. Changes of the verdict are told, not each probe.

use crate::qmp::Monitor;
use crate::vmfile::{Health, Probe};
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// Between probes of a VM that has not been healthy yet: its users wait for it.
const BOOTING_INTERVAL: Duration = Duration::from_millis(500);
/// QEMU's user-mode network accepts a forwarded connection itself and only then asks the guest, where nobody may listen: the connection is
/// closed a moment later. What is open for this long, or brought data, was accepted by the guest (or the guest has no network yet: an
/// HTTP probe knows more).
const TCP_SETTLES: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Unknown,
    Healthy,
    Unhealthy(String),
}

/// What is probed.
#[derive(Debug, Clone)]
pub struct Target {
    pub address: Option<SocketAddr>,
    pub monitor: Arc<Monitor>,
}

/// Probes for ever. `grace_until`: failures before it don't count.
pub async fn watch(health: Health, target: Target, grace_until: Instant, verdict: watch::Sender<Verdict>) {
    let mut failures = 0;
    loop {
        let started = Instant::now();
        match timeout(health.timeout, probe(&health.probe, &target, health.timeout)).await.unwrap_or_else(|_| Err(late(health.timeout))) {
            Ok(()) => {
                failures = 0;
                verdict.send_if_modified(|verdict| std::mem::replace(verdict, Verdict::Healthy) != Verdict::Healthy);
            }
            Err(reason) if *verdict.borrow() != Verdict::Unknown || started >= grace_until => {
                failures += 1;
                if failures >= health.failures {
                    verdict.send_if_modified(|verdict| {
                        let first = !matches!(verdict, Verdict::Unhealthy(_));
                        if first {
                            *verdict = Verdict::Unhealthy(format!("{} failed {failures} times: {reason}", health.probe));
                        }
                        first
                    });
                }
            }
            Err(_) => {}
        }
        let booting = *verdict.borrow() == Verdict::Unknown && started < grace_until;
        tokio::time::sleep(if booting { health.interval.min(BOOTING_INTERVAL) } else { health.interval }).await;
    }
}

fn late(after: Duration) -> String {
    format!("no answer within {} ms", after.as_millis())
}

async fn probe(probe: &Probe, target: &Target, within: Duration) -> Result<(), String> {
    match (probe, target.address) {
        (Probe::Http { path, .. }, Some(address)) => http(address, path).await,
        (Probe::Tcp { .. }, Some(address)) => tcp(address).await,
        (Probe::Qmp, _) => match target.monitor.running(within).await {
            Ok(true) => Ok(()),
            Ok(false) => Err("the guest is paused".into()),
            Err(error) => Err(error.to_string()),
        },
        (Probe::Http { .. } | Probe::Tcp { .. }, None) => Err("the probe has no address".into()),
    }
}

/// 2xx and 3xx are healthy. The body is not read: the status line says it, and a body can be endless.
async fn http(address: SocketAddr, path: &str) -> Result<(), String> {
    let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(16 * 1024)
        .handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let request = hyper::Request::get(path)
        .header(hyper::header::HOST, address.to_string())
        .header(hyper::header::CONNECTION, "close")
        .header(hyper::header::USER_AGENT, "diarch")
        .body(Empty::new())
        .map_err(|error| error.to_string())?;
    // The connection lives in this future only: when the probe is over, or late, so is the connection.
    let mut connection = std::pin::pin!(connection);
    let response = tokio::select! {
        biased;
        response = sender.send_request(request) => response.map_err(|error| describe(&error))?,
        ended = &mut connection => return Err(ended.map_or_else(|error| describe(&error), |()| "the connection was closed without an answer".into())),
    };
    let status = response.status();
    if status.is_success() || status.is_redirection() { Ok(()) } else { Err(format!("HTTP status {}", status.as_u16())) }
}

fn describe(error: &hyper::Error) -> String {
    use std::error::Error as _;
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

async fn tcp(address: SocketAddr) -> Result<(), String> {
    let mut stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
    match timeout(TCP_SETTLES, stream.read(&mut [0; 1])).await {
        Err(_) | Ok(Ok(1..)) => Ok(()),
        Ok(Ok(0)) => Err("the connection was closed at once".into()),
        Ok(Err(error)) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diarch_ipc::name::Port;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    /// A server that writes `answer` to each connection while `on`, keeps it open for `hold`, and closes it.
    async fn server(answer: &'static str, hold: Duration) -> (SocketAddr, Arc<AtomicBool>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let on = Arc::new(AtomicBool::new(true));
        let switch = Arc::clone(&on);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                if switch.load(Ordering::Relaxed) {
                    tokio::spawn(async move {
                        let _ = stream.write_all(answer.as_bytes()).await;
                        tokio::time::sleep(hold).await;
                    });
                }
            }
        });
        (address, on)
    }

    #[tokio::test]
    async fn an_http_status_decides() {
        let (good, _) = server("HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", Duration::from_secs(1)).await;
        http(good, "/").await.unwrap();
        let (bad, on) = server("HTTP/1.1 503 Busy\r\n\r\n", Duration::ZERO).await;
        assert_eq!(http(bad, "/").await.unwrap_err(), "HTTP status 503");
        on.store(false, Ordering::Relaxed);
        http(bad, "/").await.unwrap_err();
        let (noise, _) = server("\0\x1b[31mnot http at all\n\n", Duration::from_secs(1)).await;
        http(noise, "/").await.unwrap_err();
    }

    #[tokio::test]
    async fn an_endless_header_is_cut() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\n").await.unwrap();
            while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
        });
        timeout(Duration::from_secs(5), http(address, "/")).await.unwrap().unwrap_err();
    }

    #[tokio::test]
    async fn a_connection_that_is_closed_at_once_is_not_healthy() {
        let (silent, on) = server("", Duration::from_secs(2)).await;
        tcp(silent).await.unwrap();
        let (banner, _) = server("SSH-2.0", Duration::ZERO).await;
        tcp(banner).await.unwrap();
        on.store(false, Ordering::Relaxed);
        assert_eq!(tcp(silent).await.unwrap_err(), "the connection was closed at once");
    }

    #[tokio::test]
    async fn it_takes_some_failures_in_a_row_to_be_unhealthy_and_one_answer_to_be_healthy() {
        let (address, on) = server("HTTP/1.1 200 OK\r\n\r\n", Duration::ZERO).await;
        let (monitor, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let target = Target { address: Some(address), monitor: Arc::new(Monitor::open(monitor.into()).unwrap()) };
        let millis = Duration::from_millis;
        let probe = Probe::Http { host_port: Port::new(u64::from(address.port())).unwrap(), path: "/".into() };
        let health = Health { probe, interval: millis(20), timeout: millis(500), failures: 3, start_grace: millis(0) };
        on.store(false, Ordering::Relaxed);
        let (to, mut verdict) = watch::channel(Verdict::Unknown);
        let grace = Instant::now() + millis(150);
        let task = tokio::spawn(super::watch(health, target, grace, to));
        tokio::time::sleep(millis(120)).await;
        assert_eq!(*verdict.borrow_and_update(), Verdict::Unknown);
        verdict.changed().await.unwrap();
        assert!(matches!(&*verdict.borrow_and_update(), Verdict::Unhealthy(why) if why.contains("failed 3 times")));
        on.store(true, Ordering::Relaxed);
        verdict.changed().await.unwrap();
        assert_eq!(*verdict.borrow_and_update(), Verdict::Healthy);
        task.abort();
    }
}
