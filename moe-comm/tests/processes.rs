//! A world whose ranks are processes: most ranks here are threads with a line each to one hub, some are processes.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use moe_comm::processes::{GroupId, Hub, Lane, Process};
use moe_comm::{Collective, Error, Reduction, Result, Signature};
use moe_kernels::DType;
use moe_topology::{Attention, Expert, GroupKey};

/// Longer than a busy machine keeps a rank waiting.
const LONG: Duration = Duration::from_secs(60);
/// For tests of what happens at the deadline: long enough for all to come.
const SHORT: Duration = Duration::from_secs(3);

fn signature(op: Collective) -> Signature {
    Signature { group: Attention::TP.into(), op, dtype: DType::F32, elements: 6, cols: 3 }
}

fn sum() -> Signature {
    signature(Collective::AllReduce(Reduction::Sum))
}

fn hub(size: usize, deadline: Duration) -> (Hub, String) {
    let hub = Hub::listen("127.0.0.1:0", size, deadline).unwrap();
    let address = hub.address().to_string();
    (hub, address)
}

/// Runs `body` on a thread for each rank of a world, when all have come: a failure ends also what was done and not yet
/// noticed, be it a barrier or the start.
fn run<R: Send + 'static>(
    size: usize,
    deadline: Duration,
    body: impl Fn(Process) -> R + Clone + Send + 'static,
) -> Vec<R> {
    let (_hub, address) = hub(size, deadline);
    let start = Arc::new(Barrier::new(size));
    let ranks: Vec<_> = (0..size)
        .map(|rank| {
            let (address, body, start) = (address.clone(), body.clone(), start.clone());
            thread::spawn(move || {
                let process = Process::join(&address, rank, size, deadline).unwrap();
                start.wait();
                body(process)
            })
        })
        .collect();
    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
}

/// The group of these ranks, and where this rank stands in it.
fn group(process: &Process, ranks: &[usize]) -> (GroupId, usize) {
    let (id, _) = process.meet(Attention::TP.into(), None, ranks, None).unwrap();
    (id, ranks.iter().position(|&rank| rank == process.rank()).unwrap())
}

/// Waits until this rank hears of the world's failure. A rank that waits so has not left.
fn heard(process: &Process) -> Error {
    let (told, heard) = channel();
    process.on_failure(move |failure| told.send(failure.clone()).unwrap());
    let failure = heard.recv().unwrap();
    assert_eq!(process.failure(), Some(failure.clone()));
    assert_eq!(process.barrier(), Err(failure.clone()));
    failure
}

/// The failure that all ranks have heard of.
fn same(failures: &[Error]) -> &Error {
    assert!(failures.iter().all(|failure| *failure == failures[0]), "{failures:?}");
    &failures[0]
}

#[test]
fn all_meet_and_go_on_together() {
    let shared = run(3, LONG, |process| {
        assert_eq!(process.size(), 3);
        assert_eq!(process.deadline(), LONG);
        let seed = process.share((process.rank() == 0).then_some(&b"seed"[..])).unwrap();
        process.barrier().unwrap();
        let more = process.share((process.rank() == 0).then_some(&b""[..])).unwrap();
        (seed, more)
    });
    assert_eq!(shared, vec![(b"seed".to_vec(), Vec::new()); 3]);
}

/// Two groups whose ranks make groups within them, in another order on each: both find their own.
#[test]
fn groups_within_others_do_not_depend_on_the_order_of_those() {
    let met = run(2, LONG, |process| {
        let key = Attention::TP.into();
        let outer = [0, 1].map(|_| process.meet(key, None, &[0, 1], None).unwrap().0);
        let order = if process.rank() == 0 { [0, 1] } else { [1, 0] };
        let mut inner = order
            .map(|at| {
                let offer = (process.rank() == 0).then(|| vec![at as u8]);
                (
                    at,
                    std::thread::spawn({
                        let (process, within) = (process.clone(), outer[at]);
                        move || process.meet(key, Some(within), &[0, 1], offer).unwrap()
                    }),
                )
            })
            .map(|(at, thread)| (at, thread.join().unwrap()));
        inner.sort_by_key(|(at, _)| *at);
        inner
    });
    assert_eq!(met[0], met[1]);
    assert_eq!(met[0].each_ref().map(|(_, (_, bytes))| bytes[0]), [0, 1]);
}

#[test]
fn groups_have_one_number_on_all_ranks_and_another_each_time() {
    let met = run(3, LONG, |process| {
        let rank = process.rank();
        let meet = |ranks: &[usize]| {
            let offer = (ranks[0] == rank).then(|| vec![rank as u8; 4]);
            ranks.contains(&rank).then(|| process.meet(Attention::TP.into(), None, ranks, offer).unwrap())
        };
        let groups: [&[usize]; 6] = [&[0, 1, 2], &[0, 1, 2], &[2, 0], &[0, 2], &[1], &[2, 0]];
        groups.map(meet)
    });
    for (at, (first, members)) in [
        (0, vec![0, 1, 2]),
        (0, vec![0, 1, 2]),
        (2, vec![0, 2]),
        (0, vec![0, 2]),
        (1, vec![1]),
        (2, vec![0, 2]),
    ]
    .into_iter()
    .enumerate()
    {
        for &rank in &members {
            let (id, bytes) = met[rank][at].clone().unwrap();
            assert_eq!(bytes, [first; 4]);
            assert_eq!(Some(id), met[members[0]][at].as_ref().map(|(id, _)| *id));
            let others = met.iter().flat_map(|met| met.iter().enumerate());
            assert!(
                others
                    .flat_map(|(i, met)| met.as_ref().map(|met| (i, met.0)))
                    .all(|(i, other)| { (i == at) == (other == id) })
            );
        }
    }
}

#[test]
fn ranks_that_form_no_group_are_refused_and_the_world_goes_on() {
    let refused = run(2, LONG, |process| {
        let key = GroupKey::from(Expert::EP);
        let why = |ranks: &[usize]| match process.meet(key, None, ranks, None) {
            Err(Error::BadGroup { group, ranks: named, why }) => {
                assert_eq!((group, &*named), (key, ranks));
                why
            }
            other => panic!("{other:?}"),
        };
        let why = [why(&[0, 1, 0]), why(&[0, 1, 2]), why(&[1 - process.rank()]), why(&[])];
        process.barrier().unwrap();
        why
    });
    let outside = "this rank is not among them";
    let why = ["a rank is named twice", "a rank is outside of the world", outside, outside];
    assert_eq!(refused, [why, why]);
}

#[test]
fn rank_0_alone_gives_what_is_shared_and_no_more_than_a_mebibyte() {
    let largest = vec![7; 1 << 20];
    let shared = run(2, LONG, |process| {
        let rank = process.rank();
        let refused = |bytes: Option<&[u8]>| match process.share(bytes) {
            Err(error @ Error::Argument { op: "share", .. }) => error.to_string(),
            other => panic!("{other:?}"),
        };
        let wrong = refused((rank == 1).then_some(b"mine"));
        assert_eq!(wrong, format!("share: rank 0 gives the bytes, and nobody else; this is rank {rank}"));
        if rank == 0 {
            let large = refused(Some(&[0; (1 << 20) + 1]));
            assert_eq!(large, "share: 1048577 bytes, where at most 1048576 are legal");
        }
        process.share((rank == 0).then_some(&[7; 1 << 20][..])).unwrap()
    });
    assert!(shared == [largest.clone(), largest]);
}

#[test]
fn an_operation_is_awaited_until_all_have_arrived() {
    run(2, LONG, |process| {
        let (group, index) = group(&process, &[1, 0]);
        if process.rank() == 0 {
            // Nobody waits for the other rank, which is at the barrier.
            for sequence in 0..3 {
                process.arrive(group, Lane::All, sequence, index, &sum()).unwrap();
            }
            let last = process.arrive_and_wait(group, Lane::All, 3, index, &sum()).unwrap();
            // Given up: the operation goes on.
            drop(process.arrive_and_wait(group, Lane::All, 4, index, &sum()).unwrap());
            assert_eq!(last.ready(), Ok(false));
            process.barrier().unwrap();
            assert_eq!(last.wait(), Ok(()));
        } else {
            process.barrier().unwrap();
            for sequence in 0..4 {
                process.arrive(group, Lane::All, sequence, index, &sum()).unwrap();
            }
            let last = process.arrive_and_wait(group, Lane::All, 4, index, &sum()).unwrap();
            while !last.ready().unwrap() {
                thread::yield_now();
            }
        }
        process.barrier().unwrap();
    });
}

#[test]
fn messages_pair_by_sender_and_receiver() {
    let ended = run(3, LONG, |process| -> Result<()> {
        let (group, me) = group(&process, &[2, 0, 1]);
        // To each of the others, two at a time, and to itself.
        for sequence in 0..2 {
            for peer in 0..3 {
                let tag = sequence * 100 + (10 * me + peer) as u64;
                let send = signature(Collective::Send { to: peer, tag });
                process.arrive(group, Lane::Pair(me, peer), sequence, 0, &send)?;
            }
            for peer in 0..3 {
                let tag = sequence * 100 + (10 * peer + me) as u64;
                let recv = signature(Collective::Recv { from: peer, tag, count: 6 });
                process.arrive_and_wait(group, Lane::Pair(peer, me), sequence, 1, &recv)?.wait()?;
            }
        }
        process.barrier()
    });
    assert_eq!(ended, [Ok(()), Ok(()), Ok(())]);
}

/// Rank 0 makes the first call, rank 1 the other one.
fn mismatch(first: Signature, other: Signature, lane: Lane) {
    let calls = [first.clone(), other.clone()];
    let failures = run(2, LONG, move |process| {
        let (group, index) = group(&process, &[0, 1]);
        // It may fail as soon as it starts.
        let _ = process.arrive(group, lane, 0, index, &calls[index]);
        heard(&process)
    });
    let Error::Poisoned { rank, group, op, sequence, why } = same(&failures) else { panic!("{failures:?}") };
    let [mine, theirs] = if *rank == 0 { [&first, &other] } else { [&other, &first] };
    let peer = 1 - rank;
    assert_eq!(**why, format!("mismatch: rank {rank} calls {mine}, rank {peer} calls {theirs}"));
    assert_eq!((*group, *op, *sequence), (Some(mine.group), Some(mine.op.name()), Some(0)));
}

#[test]
fn calls_that_do_not_agree_are_told_to_all() {
    let gather = |counts: [usize; 2]| signature(Collective::AllGather { counts: counts.into() });
    let scatter = |reduction| Collective::ReduceScatter { reduction, counts: [3, 3].into() };
    let all_to_all = |send: [usize; 2], recv: [usize; 2]| {
        signature(Collective::AllToAll { send: send.into(), recv: recv.into() })
    };
    let broadcast = |root| signature(Collective::Broadcast { root, count: 6 });
    for (first, other) in [
        (sum(), signature(Collective::Barrier)),
        (sum(), Signature { dtype: DType::F64, ..sum() }),
        (sum(), Signature { elements: 9, ..sum() }),
        (sum(), Signature { cols: 2, ..sum() }),
        (sum(), Signature { group: Expert::ETP.into(), ..sum() }),
        (sum(), signature(Collective::AllReduce(Reduction::Max))),
        (gather([3, 3]), gather([3, 6])),
        (signature(scatter(Reduction::Sum)), signature(scatter(Reduction::Max))),
        (all_to_all([1, 5], [1, 4]), all_to_all([5, 2], [5, 2])),
        (broadcast(0), broadcast(1)),
    ] {
        mismatch(first, other, Lane::All);
    }
    let send = |tag| signature(Collective::Send { to: 1, tag });
    let recv = |tag, count| signature(Collective::Recv { from: 0, tag, count });
    for (first, other) in [(send(1), recv(2, 6)), (send(1), recv(1, 5)), (send(1), send(1))] {
        mismatch(first, other, Lane::Pair(0, 1));
    }
}

#[test]
fn steps_of_the_world_are_compared() {
    let failures = run(2, LONG, |process| {
        let stepped =
            if process.rank() == 0 { process.share(Some(b"")).map(drop) } else { process.barrier() };
        assert_eq!(stepped, Err(heard(&process)));
        heard(&process)
    });
    let failure = same(&failures).to_string();
    let all = "of attention tp-cp-dp-pp";
    let (share, barrier) = (format!("rank 0 calls share {all}"), format!("rank 1 calls barrier {all}"));
    let ways = [
        format!("rank 0 failed at share #0 {all}: mismatch: {share}, {barrier}"),
        format!("rank 1 failed at barrier #0 {all}: mismatch: {barrier}, {share}"),
    ];
    assert!(ways.contains(&failure), "{failure}");
}

#[test]
fn who_does_not_arrive_is_named_at_the_deadline() {
    let failures = run(3, SHORT, |process| {
        let (group, index) = group(&process, &[0, 1, 2]);
        process.arrive(group, Lane::All, 0, index, &sum()).unwrap();
        if process.rank() != 1 {
            process.arrive(group, Lane::All, 1, index, &sum()).unwrap();
        }
        heard(&process)
    });
    let late = "rank 1 failed at all_reduce #1 of attention tp: ranks [1] did not arrive within 3s";
    assert_eq!(same(&failures).to_string(), late);
}

/// Rank 0 is waited for by nobody, waits for 1, which waits for 2.
#[test]
fn the_chain_of_those_that_wait_is_followed() {
    let failures = run(3, SHORT, |process| {
        let rank = process.rank();
        if rank < 2 {
            let (group, index) = group(&process, &[0, 1]);
            if rank == 0 {
                process.arrive(group, Lane::All, 0, index, &sum()).unwrap();
            }
        }
        if rank > 0 {
            let (group, index) = group(&process, &[1, 2]);
            if rank == 1 {
                let call = Signature { group: Expert::EP.into(), ..sum() };
                process.arrive(group, Lane::All, 0, index, &call).unwrap();
            }
        }
        heard(&process)
    });
    let late = "rank 2 failed at all_reduce #0 of expert ep: ranks [2] did not arrive within 3s";
    assert_eq!(same(&failures).to_string(), late);
}

#[test]
fn a_circle_of_those_that_wait_is_a_deadlock() {
    let failures = run(2, SHORT, |process| {
        let groups = [group(&process, &[0, 1]), group(&process, &[0, 1])];
        let (group, index) = groups[process.rank()];
        process.arrive(group, Lane::All, 0, index, &sum()).unwrap();
        heard(&process)
    });
    let Error::Poisoned { why, .. } = same(&failures) else { panic!("{failures:?}") };
    let circle = "deadlock for 3s: rank 0 for [1] in all_reduce #0 of attention tp, \
                  rank 1 for [0] in all_reduce #0 of attention tp";
    assert_eq!(&**why, circle);
}

#[test]
fn a_rank_that_computes_alone_is_late_for_nothing() {
    let ended = run(2, SHORT, |process| {
        // Longer than the deadline, while nobody waits.
        thread::sleep(SHORT + SHORT / 2);
        process.barrier()
    });
    assert_eq!(ended, [Ok(()), Ok(())]);
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let (hub, address) = hub(3, SHORT);
    let ranks = [0, 2].map(|rank| {
        let address = address.clone();
        thread::spawn(move || Process::join(&address, rank, 3, SHORT).unwrap_err())
    });
    let failures = ranks.map(|rank| rank.join().unwrap());
    let late = "rank 1 failed at join #0 of attention tp-cp-dp-pp: ranks [1] did not arrive within 3s";
    assert_eq!(same(&failures).to_string(), late);
    // It comes too late.
    assert_eq!(Process::join(&address, 1, 3, SHORT).unwrap_err(), failures[0]);
    assert_eq!(hub.failure().as_ref(), Some(&failures[0]));
}

#[test]
fn a_rank_that_left_is_not_waited_for() {
    for awaited_before in [true, false] {
        let failures = run(2, LONG, move |process| {
            let (group, index) = group(&process, &[0, 1]);
            if process.rank() == 1 {
                if awaited_before {
                    process.barrier().unwrap();
                }
                return None;
            }
            let arrived = process.arrive(group, Lane::All, 0, index, &sum());
            if awaited_before {
                arrived.unwrap();
                // The other may have left before this one notices.
                let _ = process.barrier();
            }
            Some(heard(&process).to_string())
        });
        let left = "rank 1 failed at all_reduce #0 of attention tp: it ended without joining";
        assert_eq!(failures, [Some(left.to_string()), None]);
    }
}

#[test]
fn a_rank_leaves_with_its_last_handle() {
    let ended = run(2, LONG, |process| {
        let last = process.clone();
        drop(process);
        last.barrier()
    });
    assert_eq!(ended, [Ok(()), Ok(())]);
}

#[test]
fn the_first_failure_reaches_all_with_its_reason() {
    let failures = run(3, LONG, |process| match process.rank() {
        0 => heard(&process),
        1 => process.fail("no more"),
        _ => {
            heard(&process);
            process.fail("and no less")
        }
    });
    assert_eq!(same(&failures).to_string(), "rank 1 failed: no more");
}

#[test]
fn a_failure_says_where_the_rank_was() {
    let done = Arc::new(Barrier::new(2));
    let failures = run(2, LONG, move |process| {
        let (group, index) = group(&process, &[0, 1]);
        process.arrive_and_wait(group, Lane::All, 0, index, &sum()).unwrap().wait().unwrap();
        done.wait();
        if process.rank() == 0 { process.fail("no more") } else { heard(&process) }
    });
    let after = "rank 0 failed: no more (after all_reduce #0 of attention tp)";
    assert_eq!(same(&failures).to_string(), after);
}

#[test]
fn a_failure_ends_what_was_done_and_not_yet_awaited() {
    let seen = Arc::new(Barrier::new(2));
    run(2, LONG, move |process| {
        let (group, index) = group(&process, &[0, 1]);
        let done = process.arrive_and_wait(group, Lane::All, 0, index, &sum()).unwrap();
        process.barrier().unwrap();
        assert_eq!(done.ready(), Ok(true));
        seen.wait();
        let failure = if process.rank() == 0 { process.fail("no more") } else { heard(&process) };
        assert_eq!(done.ready(), Err(failure.clone()));
        assert_eq!(done.wait(), Err(failure.clone()));
        assert_eq!(process.arrive(group, Lane::All, 1, index, &sum()), Err(failure));
    });
}

#[test]
fn every_callback_is_called_once_also_late_ones() {
    run(2, LONG, |process| {
        let (told, heard) = channel();
        for i in 0..3 {
            let told = told.clone();
            process.on_failure(move |_| {
                told.send(i).unwrap();
                assert_ne!(i, 1, "a callback that panics");
            });
        }
        // All have registered theirs, also if another has failed since.
        let _ = process.barrier();
        process.fail("no more");
        for i in 0..3 {
            assert_eq!(heard.recv(), Ok(i));
        }
        process.on_failure(move |failure| {
            assert!(failure.to_string().contains("no more"));
            told.send(3).unwrap();
        });
        assert_eq!(heard.try_recv(), Ok(3));
        // And nobody is there to call again.
        assert!(heard.recv().is_err());
    });
}

/// The refusal of a rank that would join.
fn refused(address: &str, rank: usize, size: usize, deadline: Duration) -> String {
    match Process::join(address, rank, size, deadline) {
        Err(Error::Rendezvous { what }) => {
            let what = what.strip_prefix(&format!("the hub at {address}: it refuses: "));
            what.expect("a refusal").to_string()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_is_no_rank_of_the_world_is_refused_and_the_world_goes_on() {
    let (hub, address) = hub(2, LONG);
    let first = thread::spawn({
        let address = address.clone();
        move || Process::join(&address, 0, 2, LONG)
    });
    assert_eq!(refused(&address, 1, 3, LONG), "rank 1 of 3 is none of the hub's 2 ranks");
    assert_eq!(refused(&address, 1, 2, SHORT), "rank 1 has a deadline of 3s, the hub of 60s");
    let second = Process::join(&address, 1, 2, LONG).unwrap();
    let first = first.join().unwrap().unwrap();
    assert_eq!(refused(&address, 1, 2, LONG), "rank 1 has come before");
    drop(second);
    assert_eq!(refused(&address, 1, 2, LONG), "rank 1 has come before");
    drop(first);
    assert_eq!(hub.failure(), None);
    let argument = Process::join(&address, 2, 2, LONG).unwrap_err();
    assert_eq!(argument.to_string(), "join: there is no rank 2 of 2");
}

#[test]
fn strangers_are_refused_and_the_world_goes_on() {
    let (hub, address) = hub(1, LONG);
    let hello = *b"\x0d\x00\x00\x00\x00moe-hub\n\xff\xff\xff\xff";
    let strangers: [&[u8]; 5] =
        [b"GET / HTTP/1.1\r\nHost: hub\r\n\r\n", &[0xff; 64], &[0; 4], &[1, 0, 0, 0, 6], &hello];
    for bytes in strangers {
        let mut stranger = TcpStream::connect(&address).unwrap();
        stranger.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        stranger.read_to_end(&mut answer).unwrap();
        // A frame, of a refusal, that ends in its reason.
        assert_eq!(answer[4], 1, "{bytes:?}");
        assert!(answer.len() > 13, "{bytes:?}");
    }
    // One that says nothing, and one that is gone.
    let silent = TcpStream::connect(&address).unwrap();
    drop(TcpStream::connect(&address).unwrap());
    let process = Process::join(&address, 0, 1, LONG).unwrap();
    process.barrier().unwrap();
    assert_eq!(hub.failure(), None);
    drop(silent);
}

#[test]
fn what_is_no_hub_is_not_joined() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let web = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        // Until the other side has read it.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let Err(Error::Rendezvous { what }) = Process::join(&address, 0, 1, LONG) else { panic!() };
    assert!(what.starts_with(&format!("the hub at {address}: it does not speak as a hub does: ")), "{what}");
    web.join().unwrap();
}

#[test]
fn a_hub_that_does_not_come_is_given_up_at_the_deadline() {
    // A port at which only the superuser could listen, and nobody does.
    let address = "127.0.0.1:1";
    let deadline = Duration::from_millis(300);
    let Err(Error::Rendezvous { what }) = Process::join(address, 3, 4, deadline) else { panic!() };
    let gone = "rank 3 did not reach the hub at 127.0.0.1:1 within 300ms: ";
    assert!(what.starts_with(gone), "{what}");
}

#[test]
fn a_hub_that_comes_later_is_awaited() {
    let early = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = early.local_addr().unwrap().to_string();
    let rank = thread::spawn({
        let address = address.clone();
        move || Process::join(&address, 0, 1, LONG)?.barrier()
    });
    drop(early.accept().unwrap());
    drop(early);
    let _hub = Hub::listen(&address, 1, LONG).unwrap();
    assert_eq!(rank.join().unwrap(), Ok(()));
}

#[test]
fn where_nobody_can_listen_there_is_no_hub() {
    let (_hub, address) = hub(1, LONG);
    let Err(Error::Rendezvous { what }) = Hub::listen(&address, 1, LONG) else { panic!() };
    assert!(what.starts_with(&format!("there can be no hub at {address}: ")), "{what}");
    assert!(matches!(Hub::listen("127.0.0.1:0", 0, LONG), Err(Error::Argument { .. })));
}

#[test]
fn ranks_fail_when_the_hub_is_gone() {
    let (hub, address) = hub(2, LONG);
    let ranks = [0, 1].map(|rank| {
        let address = address.clone();
        thread::spawn(move || Process::join(&address, rank, 2, LONG).unwrap())
    });
    let [waits, hears] = ranks.map(|rank| rank.join().unwrap());
    let waits = thread::spawn(move || waits.barrier().unwrap_err());
    drop(hub);
    let failures = [heard(&hears), waits.join().unwrap()];
    assert_eq!(*same(&failures), Error::Rendezvous { what: format!("the hub at {address} is gone") });
    // The port is free again, and a failure has nobody to wait for.
    Hub::listen(&address, 2, LONG).unwrap();
    assert_eq!(hears.fail("no more"), failures[0]);
}

#[test]
fn a_hub_that_is_closed_stays_until_all_have_left() {
    let (hub, address) = hub(2, LONG);
    let ranks = [0, 1].map(|rank| {
        let address = address.clone();
        thread::spawn(move || Process::join(&address, rank, 2, LONG).unwrap())
    });
    let [first, second] = ranks.map(|rank| rank.join().unwrap());
    let (closing, closed) = channel();
    let close = thread::spawn(move || {
        drop(first);
        closing.send(()).unwrap();
        hub.close();
    });
    closed.recv().unwrap();
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(10));
        assert_eq!(second.failure(), None);
    }
    drop(second);
    close.join().unwrap();
}

/// What tells this test binary that it is a rank, and what it is to do.
const CHILD: &str = "MOE_COMM_TEST_CHILD";

/// Starts a process that is rank 1 of 2.
fn child(address: &str, task: &str) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "the_other_process", "--nocapture"]).env(CHILD, format!("{task}={address}"));
    child.spawn().unwrap()
}

/// Not a test by itself: what the processes do that the tests start.
#[test]
fn the_other_process() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let (task, address) = task.split_once('=').unwrap();
    let process = Process::join(address, 1, 2, LONG).unwrap();
    arrive_and_meet(&process, true);
    match task {
        "stay" => drop(heard(&process)),
        "leave" => drop(process),
        _ => {}
    }
    // Nothing is dropped that has not been.
    std::process::exit(0);
}

/// When this returns the hub has heard of the operation that was started on the way.
fn arrive_and_meet(process: &Process, arrive: bool) {
    let (id, index) = group(process, &[0, 1]);
    if arrive {
        process.arrive(id, Lane::All, 0, index, &sum()).unwrap();
    }
    // The other process may be gone since.
    let _ = process.meet(Attention::TP.into(), None, &[0, 1], None);
}

#[test]
fn a_process_that_dies_fails_the_world() {
    let at = "rank 1 failed at all_reduce #0 of attention tp: its process ended";
    let after = "rank 1 failed: its process ended (after all_reduce #0 of attention tp)";
    for (task, arrive, report) in [("stay", false, at), ("stay", true, after), ("exit", true, after)] {
        let (hub, address) = hub(2, LONG);
        let mut child = child(&address, task);
        let process = Process::join(&address, 0, 2, LONG).unwrap();
        arrive_and_meet(&process, arrive);
        if task == "stay" {
            child.kill().unwrap();
        }
        assert_eq!(heard(&process).to_string(), report);
        child.wait().unwrap();
        drop(hub);
    }
}

#[test]
fn a_process_that_leaves_and_exits_at_once_fails_nothing() {
    let (hub, address) = hub(2, LONG);
    let mut child = child(&address, "leave");
    let process = Process::join(&address, 0, 2, LONG).unwrap();
    arrive_and_meet(&process, true);
    assert!(child.wait().unwrap().success());
    drop(process);
    assert_eq!(hub.failure(), None);
}
