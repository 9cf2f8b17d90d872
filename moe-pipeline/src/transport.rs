//! How messages travel: the trait that the executor posts to, and two transports between threads.
//!
//! [`rendezvous`] is the strictest transport there is: a send blocks until it is received, a receive until it is sent. A
//! program that runs over it runs over any. [`buffered`] is the most lenient: a send never blocks.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crate::{Error, Message};

/// For so long a thread looks for a packet before it sleeps: one that is about to be sent comes sooner than a sleeping thread wakes.
const NEAR: Duration = Duration::from_micros(50);

/// A message operation, as the executor posts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Post<A> {
    /// Sends to a pipeline rank.
    Send {
        /// The rank that receives.
        to_rank: u32,
        /// The header; the receiver posts the same.
        message: Message,
        /// What is sent.
        act: A,
    },
    /// Receives from a pipeline rank.
    Recv {
        /// The rank that sends.
        from_rank: u32,
        /// The header; the sender posts the same.
        message: Message,
    },
}

/// Point-to-point messages between the ranks of a pipeline.
///
/// What one rank sends another, activations and gradients together, is posted in the same order on both sides. A validated
/// program cannot deadlock whether posts block until their counterpart is posted (in the batch's order, or all of the batch
/// together) or never do.
///
/// Nothing may wait for ever: a call whose peer is dead or silent returns an error within a deadline of the transport. After an
/// error, or [`abort`](Transport::abort), the executor makes no other call.
pub trait Transport<A> {
    /// A started operation.
    type Ticket;
    /// Why a call can fail.
    type Error;

    /// Starts operations; one ticket for each, in order.
    fn post(&mut self, batch: Vec<Post<A>>) -> Result<Vec<Self::Ticket>, Self::Error>;

    /// Ends an operation: what a receive received, `None` for a send.
    fn wait(&mut self, ticket: Self::Ticket) -> Result<Option<A>, Self::Error>;

    /// Tells all peers that this rank gives up, so that their calls fail at once rather than at the deadline. The
    /// executor calls it before it returns an error.
    fn abort(&mut self, why: &str);
}

/// Channels between `ranks` threads, one element per rank, whose sends and receives block in [`Transport::post`] until
/// they meet. A call waits for each message for `deadline` at most. What has failed once cannot be used again.
pub fn rendezvous<A>(ranks: u32, deadline: Duration) -> Vec<Channels<A>> {
    connect(ranks, deadline, true)
}

/// Channels between `ranks` threads, one element per rank, whose sends never block. [`Transport::wait`] waits for each
/// message, those posted before its own among them, for `deadline` at most. What has failed once cannot be used again.
pub fn buffered<A>(ranks: u32, deadline: Duration) -> Vec<Channels<A>> {
    connect(ranks, deadline, false)
}

/// One rank's end of [`rendezvous`] or [`buffered`]. Dropping it, also in a panic, tells all peers.
#[derive(Debug)]
pub struct Channels<A> {
    rank: u32,
    deadline: Duration,
    rendezvous: bool,
    inbox: Receiver<(u32, Packet<A>)>,
    peers: Vec<Peer<A>>,
    aborted: Option<(u32, String)>,
}

#[derive(Debug)]
enum Packet<A> {
    Data(Message, A),
    /// A rendezvous: the oldest unacknowledged packet was received.
    Ack,
    /// A rank gave up, and why: not always the sender, who passes it on before it ends.
    Abort(u32, String),
    Gone,
}

/// What this rank knows of another.
#[derive(Debug)]
struct Peer<A> {
    outbox: Sender<(u32, Packet<A>)>,
    /// Arrived, not yet matched with a receive.
    arrived: VecDeque<(Message, A)>,
    /// Posted receives that nothing was matched with yet.
    expected: VecDeque<Message>,
    /// Matched while another receive was waited for.
    matched: HashMap<Message, A>,
    acks: usize,
    gone: bool,
}

/// A started operation of [`Channels`].
#[derive(Debug)]
pub struct Ticket(Option<(u32, Message)>);

fn connect<A>(ranks: u32, deadline: Duration, rendezvous: bool) -> Vec<Channels<A>> {
    let (outboxes, inboxes): (Vec<_>, Vec<_>) = (0..ranks).map(|_| channel()).unzip();
    let peer = |outbox: &Sender<_>| Peer {
        outbox: outbox.clone(),
        arrived: VecDeque::new(),
        expected: VecDeque::new(),
        matched: HashMap::new(),
        acks: 0,
        gone: false,
    };
    let channels = |(rank, inbox)| Channels {
        rank,
        deadline,
        rendezvous,
        inbox,
        peers: outboxes.iter().map(peer).collect(),
        aborted: None,
    };
    (0..).zip(inboxes).map(channels).collect()
}

impl<A> Channels<A> {
    fn peer(&mut self, rank: u32) -> Result<&mut Peer<A>, Error> {
        let ranks = self.peers.len() as u32;
        self.peers.get_mut(rank as usize).ok_or(Error::UnknownRank { rank, ranks })
    }

    /// Tells a peer something. It may have ended meanwhile: whoever waits for it learns that from its last packet.
    fn tell(&self, rank: u32, packet: Packet<A>) {
        if let Some(peer) = self.peers.get(rank as usize) {
            let _ = peer.outbox.send((self.rank, packet));
        }
    }

    fn tell_all(&self, packet: impl Fn() -> Packet<A>) {
        (0..self.peers.len() as u32)
            .filter(|&rank| rank != self.rank)
            .for_each(|rank| self.tell(rank, packet()));
    }

    fn send(&mut self, to: u32, message: Message, act: A) -> Result<(), Error> {
        self.peer(to)?;
        self.tell(to, Packet::Data(message, act));
        if self.rendezvous {
            self.until(to, message, |peer| (peer.acks > 0).then(|| peer.acks -= 1))?;
        }
        Ok(())
    }

    /// Matches what arrives from a peer with the posted receives, in order, up to `message`.
    fn receive(&mut self, from: u32, message: Message) -> Result<A, Error> {
        loop {
            let matched = &mut self.peer(from)?.matched;
            // Empty unless receives are waited for in another order than they were posted in.
            if !matched.is_empty()
                && let Some(act) = matched.remove(&message)
            {
                return Ok(act);
            }
            let (got, act) = self.until(from, message, |peer| peer.arrived.pop_front())?;
            let rank = self.rank;
            let expected = self.peer(from)?.expected.pop_front().unwrap_or(message);
            if got != expected {
                return Err(Error::Mismatch { rank, peer: from, expected, got });
            }
            if self.rendezvous {
                self.tell(from, Packet::Ack);
            }
            if got == message {
                return Ok(act);
            }
            self.peer(from)?.matched.insert(got, act);
        }
    }

    /// Files packets until `ready` finds what it looks for in those of `from`.
    fn until<R>(
        &mut self,
        from: u32,
        message: Message,
        mut ready: impl FnMut(&mut Peer<A>) -> Option<R>,
    ) -> Result<R, Error> {
        let mut start = None;
        loop {
            let rank = self.rank;
            let peer = self.peer(from)?;
            if let Some(found) = ready(peer) {
                return Ok(found);
            }
            let gone = peer.gone;
            if let Some((peer, why)) = &self.aborted {
                return Err(Error::Aborted { peer: *peer, why: why.clone() });
            }
            if gone {
                return Err(Error::PeerGone { rank, peer: from, message });
            }
            let (sender, packet) = match self.inbox.try_recv() {
                Ok(packet) => packet,
                Err(_) => self
                    .next(*start.get_or_insert_with(Instant::now))
                    .map_err(|after| Error::Timeout { rank, peer: from, message, after })?,
            };
            self.file(sender, packet);
        }
    }

    /// The next packet, or the deadline if none comes within it, from `start` on.
    fn next(&self, start: Instant) -> Result<(u32, Packet<A>), Duration> {
        while start.elapsed() < NEAR.min(self.deadline) {
            // Where threads outnumber cores, the sender may need this one.
            std::thread::yield_now();
            if let Ok(packet) = self.inbox.try_recv() {
                return Ok(packet);
            }
        }
        // Never disconnected: a rank holds an outbox to itself.
        self.inbox.recv_timeout(self.deadline.saturating_sub(start.elapsed())).map_err(|_| self.deadline)
    }

    fn file(&mut self, rank: u32, packet: Packet<A>) {
        let peer = &mut self.peers[rank as usize];
        match packet {
            Packet::Data(message, act) => peer.arrived.push_back((message, act)),
            Packet::Ack => peer.acks += 1,
            Packet::Gone => peer.gone = true,
            Packet::Abort(origin, why) => {
                self.aborted.get_or_insert((origin, why));
            }
        }
    }
}

impl<A> Transport<A> for Channels<A> {
    type Ticket = Ticket;
    type Error = Error;

    fn post(&mut self, batch: Vec<Post<A>>) -> Result<Vec<Ticket>, Error> {
        let start = |post| match post {
            Post::Send { to_rank, message, act } => {
                self.send(to_rank, message, act)?;
                Ok(Ticket(None))
            }
            Post::Recv { from_rank, message } => {
                self.peer(from_rank)?.expected.push_back(message);
                if self.rendezvous {
                    let act = self.receive(from_rank, message)?;
                    self.peer(from_rank)?.matched.insert(message, act);
                }
                Ok(Ticket(Some((from_rank, message))))
            }
        };
        batch.into_iter().map(start).collect()
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Option<A>, Error> {
        ticket.0.map(|(from, message)| self.receive(from, message)).transpose()
    }

    fn abort(&mut self, why: &str) {
        // The first reason is the one worth knowing. It is passed on, lest a peer see this rank end before it is told.
        let (origin, why) = self.aborted.get_or_insert_with(|| (self.rank, why.to_owned())).clone();
        self.tell_all(|| Packet::Abort(origin, why.clone()));
    }
}

impl<A> Drop for Channels<A> {
    fn drop(&mut self) {
        self.tell_all(|| Packet::Gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Flow;

    #[test]
    fn a_reason_is_passed_on_unchanged() {
        // Rank 2's abort has reached rank 1, but not yet rank 0.
        let mut channels: Vec<Channels<()>> = buffered(3, Duration::from_secs(20));
        channels[1].file(2, Packet::Abort(2, "out of memory".into()));
        channels[1].abort("rank 2 aborted: out of memory");
        let message = Message { flow: Flow::Backward, stage: 0, microbatch: 0 };
        let ticket = channels[0].post(vec![Post::Recv { from_rank: 1, message }]).unwrap().remove(0);
        assert_eq!(channels[0].wait(ticket), Err(Error::Aborted { peer: 2, why: "out of memory".into() }));
    }
}
