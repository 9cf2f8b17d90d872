//! The thread transports alone.

use std::time::Duration;

use moe_pipeline::transport::{Channels, buffered, rendezvous};
use moe_pipeline::{Error, Flow, Message, Post, Transport};

const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(20);

fn message(microbatch: u32) -> Message {
    Message { flow: Flow::Forward, stage: 1, microbatch }
}

fn send(to_rank: u32, microbatch: u32) -> Vec<Post<u32>> {
    vec![Post::Send { to_rank, message: message(microbatch), act: 100 + microbatch }]
}

fn recv(from_rank: u32, microbatch: u32) -> Vec<Post<u32>> {
    vec![Post::Recv { from_rank, message: message(microbatch) }]
}

fn pair(mut channels: Vec<Channels<u32>>) -> (Channels<u32>, Channels<u32>) {
    let second = channels.pop().unwrap();
    (channels.pop().unwrap(), second)
}

#[test]
fn a_buffered_send_does_not_block() {
    let (mut a, mut b) = pair(buffered(2, SHORT));
    let sent = a.post([send(1, 0), send(1, 1), send(1, 2)].concat()).unwrap();
    for ticket in sent {
        assert_eq!(a.wait(ticket).unwrap(), None);
    }
    // Waited for in another order than posted.
    let mut tickets = b.post([recv(0, 0), recv(0, 1), recv(0, 2)].concat()).unwrap();
    assert_eq!(b.wait(tickets.remove(1)).unwrap(), Some(101));
    assert_eq!(b.wait(tickets.remove(1)).unwrap(), Some(102));
    assert_eq!(b.wait(tickets.remove(0)).unwrap(), Some(100));
}

#[test]
fn a_rendezvous_send_blocks_until_received() {
    let (mut a, _b) = pair(rendezvous(2, SHORT));
    let timeout = Error::Timeout { rank: 0, peer: 1, message: message(0), after: SHORT };
    assert_eq!(a.post(send(1, 0)).unwrap_err(), timeout);

    let (mut a, mut b) = pair(rendezvous(2, LONG));
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let tickets = b.post([recv(0, 0), recv(0, 1)].concat()).unwrap();
            tickets.into_iter().map(|t| b.wait(t).unwrap().unwrap()).collect::<Vec<_>>()
        });
        let tickets = a.post([send(1, 0), send(1, 1)].concat()).unwrap();
        assert!(tickets.into_iter().all(|t| a.wait(t).unwrap().is_none()));
        assert_eq!(receiver.join().unwrap(), [100, 101]);
    });
}

#[test]
fn a_rendezvous_of_two_senders_deadlocks_until_the_deadline() {
    let (mut a, mut b) = pair(rendezvous(2, SHORT));
    std::thread::scope(|scope| {
        // Both stay until both have given up.
        let other = scope.spawn(|| b.post([send(0, 0), recv(0, 0)].concat()).map(|_| ()));
        let mine = a.post([send(1, 0), recv(1, 0)].concat()).map(|_| ());
        assert!(matches!(mine, Err(Error::Timeout { rank: 0, peer: 1, .. })));
        assert!(matches!(other.join().unwrap(), Err(Error::Timeout { rank: 1, peer: 0, .. })));
    });
}

#[test]
fn another_message_than_expected_is_reported() {
    let (mut a, mut b) = pair(buffered(2, SHORT));
    a.post(send(1, 4)).unwrap();
    let ticket = b.post(recv(0, 3)).unwrap().remove(0);
    let mismatch = Error::Mismatch { rank: 1, peer: 0, expected: message(3), got: message(4) };
    assert_eq!(b.wait(ticket).unwrap_err(), mismatch);
}

#[test]
fn what_was_sent_before_the_end_still_arrives() {
    let (mut a, mut b) = pair(buffered(2, LONG));
    a.post(send(1, 0)).unwrap();
    drop(a);
    let mut tickets = b.post([recv(0, 0), recv(0, 1)].concat()).unwrap();
    assert_eq!(b.wait(tickets.remove(0)).unwrap(), Some(100));
    let gone = Error::PeerGone { rank: 1, peer: 0, message: message(1) };
    assert_eq!(b.wait(tickets.remove(0)).unwrap_err(), gone);
}

#[test]
fn an_abort_reaches_all_with_its_reason() {
    let mut channels: Vec<Channels<u32>> = buffered(3, LONG);
    channels[2].abort("out of memory");
    let aborted = Error::Aborted { peer: 2, why: "out of memory".into() };
    for (rank, from) in [(0, 1), (1, 0)] {
        let ticket = channels[rank].post(recv(from, 0)).unwrap().remove(0);
        assert_eq!(channels[rank].wait(ticket).unwrap_err(), aborted);
    }
}

#[test]
fn unknown_ranks_are_errors() {
    let mut channels: Vec<Channels<u32>> = buffered(2, SHORT);
    assert_eq!(channels[0].post(send(2, 0)).unwrap_err(), Error::UnknownRank { rank: 2, ranks: 2 });
    assert_eq!(channels[0].post(recv(9, 0)).unwrap_err(), Error::UnknownRank { rank: 9, ranks: 2 });
}
