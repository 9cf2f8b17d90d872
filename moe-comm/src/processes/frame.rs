//! Messages on a connection: each is four bytes that say how long it is, then its own bytes.

use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use super::wire::Message;

/// Bytes that one rank may hand to the others.
pub(super) const OFFER: usize = 1 << 20;

/// The most bytes that a message of a world of `size` may have: an offer, or the counts and the ranks of a group, or
/// a report that quotes two calls with theirs.
pub(super) const fn limit(size: usize) -> usize {
    size.saturating_mul(128).saturating_add(OFFER + 4096)
}

/// Reads a message; `None` at the end of the connection. `buffer` keeps its memory from one to the next.
pub(super) fn read<M: Message>(
    from: &mut impl Read,
    buffer: &mut Vec<u8>,
    limit: usize,
) -> io::Result<Option<M>> {
    let mut len = [0; 4];
    if !fill(from, &mut len)? {
        return Ok(None);
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > limit {
        let what = format!("a message of {len} bytes, where at most {limit} are legal");
        return Err(io::Error::new(ErrorKind::InvalidData, what));
    }
    buffer.resize(len, 0);
    from.read_exact(buffer)?;
    M::decode(buffer).map(Some).map_err(|bad| io::Error::new(ErrorKind::InvalidData, bad))
}

/// Like `read_exact`, but false if nothing is left at all.
fn fill(from: &mut impl Read, out: &mut [u8]) -> io::Result<bool> {
    loop {
        match from.read(out) {
            Ok(0) => return Ok(false),
            Ok(n) => return from.read_exact(&mut out[n..]).map(|()| true),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Writes one message.
pub(super) fn write(to: &mut impl Write, message: &impl Message, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    buffer.extend([0; 4]);
    message.encode(buffer);
    let len = (buffer.len() - 4) as u32;
    buffer[..4].copy_from_slice(&len.to_le_bytes());
    to.write_all(buffer)
}

/// Writes what comes out of `mail`, several messages at once if they are there, until `None` or until nobody can send
/// more; then says that nothing more will come. After `idle` without a message it sends `ping`.
pub(super) fn pump<M: Message>(mail: &Receiver<Option<M>>, stream: &TcpStream, idle: Duration, ping: &M) {
    // The reader of the same connection says what has become of it.
    let _ = drain(mail, stream, idle, ping);
    // What the peer has sent is still read: a connection that is closed before may lose what was just written.
    let _ = stream.shutdown(Shutdown::Write);
}

fn drain<M: Message>(
    mail: &Receiver<Option<M>>,
    stream: &TcpStream,
    idle: Duration,
    ping: &M,
) -> io::Result<()> {
    let (mut to, mut buffer) = (BufWriter::new(stream), Vec::new());
    loop {
        match mail.recv_timeout(idle) {
            Ok(Some(message)) => write(&mut to, &message, &mut buffer)?,
            Err(RecvTimeoutError::Timeout) => write(&mut to, ping, &mut buffer)?,
            Ok(None) | Err(RecvTimeoutError::Disconnected) => return to.flush(),
        }
        while let Ok(message) = mail.try_recv() {
            match message {
                Some(message) => write(&mut to, &message, &mut buffer)?,
                None => return to.flush(),
            }
        }
        to.flush()?;
    }
}
