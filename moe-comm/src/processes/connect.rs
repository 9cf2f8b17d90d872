//! How a rank reaches the hub.

use std::io::{self, ErrorKind};
use std::net::{TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use super::wire::{ToHub, ToLine, VERSION};
use super::{frame, rendezvous, silence};
use crate::Result;

/// Between two attempts to reach a hub that does not listen yet.
const PAUSE: Duration = Duration::from_millis(100);

/// Why an attempt came to nothing.
enum Failed {
    /// It may be too early.
    Early(io::Error),
    /// It would be the same the next time.
    Final(String),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        match error.kind() {
            ErrorKind::InvalidData | ErrorKind::InvalidInput => Failed::Final(error.to_string()),
            _ => Failed::Early(error),
        }
    }
}

/// A connection on which the hub has welcomed the rank.
pub(super) fn connect(hub: &str, rank: usize, size: usize, deadline: Duration) -> Result<TcpStream> {
    let hello = ToHub::Hello { version: VERSION.into(), rank, size, deadline };
    let begun = Instant::now();
    loop {
        let left = deadline.saturating_sub(begun.elapsed()).max(Duration::from_millis(1));
        match attempt(hub, &hello, left) {
            Ok(stream) => {
                let set = stream.set_read_timeout(Some(silence(deadline)));
                set.map_err(|error| rendezvous(format!("the hub at {hub}: {error}")))?;
                return Ok(stream);
            }
            Err(Failed::Final(what)) => return Err(rendezvous(format!("the hub at {hub}: {what}"))),
            Err(Failed::Early(error)) if begun.elapsed() >= deadline => {
                let what = format!("rank {rank} did not reach the hub at {hub} within {deadline:?}: {error}");
                return Err(rendezvous(what));
            }
            Err(Failed::Early(_)) => thread::sleep(PAUSE.min(deadline.saturating_sub(begun.elapsed()))),
        }
    }
}

fn attempt(hub: &str, hello: &ToHub, left: Duration) -> std::result::Result<TcpStream, Failed> {
    let mut last = io::Error::new(ErrorKind::NotFound, "its name has no address");
    for address in hub.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return greet(stream, hello, left),
            Err(error) => last = error,
        }
    }
    Err(last.into())
}

fn greet(mut stream: TcpStream, hello: &ToHub, left: Duration) -> std::result::Result<TcpStream, Failed> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(left))?;
    let mut buffer = Vec::new();
    frame::write(&mut stream, hello, &mut buffer)?;
    match frame::read(&mut stream, &mut buffer, frame::limit(0)).map_err(|error| match error.kind() {
        ErrorKind::InvalidData => Failed::Final(format!("it does not speak as a hub does: {error}")),
        _ => error.into(),
    })? {
        Some(ToLine::Welcome) => Ok(stream),
        Some(ToLine::Refused { what }) => Err(Failed::Final(format!("it refuses: {what}"))),
        Some(_) => Err(Failed::Final("it does not greet".into())),
        None => Err(io::Error::new(ErrorKind::ConnectionReset, "it ended the connection").into()),
    }
}
