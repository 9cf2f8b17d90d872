//! Ranks that fail, and what the others are told.

use std::error::Error as StdError;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use moe_comm::fault::{Fate, Fault, Faulty};
use moe_comm::{Comm, Comms, Error, Reduction, ThreadRank, ThreadWorld, World, WorldError};
use moe_kernels::{Cpu, Tensor};
use moe_topology::{Attention, Expert, Folding, Mapping};

/// Long enough for what is meant to succeed.
const PATIENT: Duration = Duration::from_secs(60);
/// For what is meant to be late; longer than a busy machine delays a thread.
const SHORT: Duration = Duration::from_secs(1);

type Boxed = Box<dyn StdError + Send + Sync>;

fn folding() -> Folding {
    Folding::new(Mapping { world_size: 4, tp: 2, pp: 2, ep: 2, ..Mapping::default() }).unwrap()
}

fn comms(world: &dyn World<Cpu>) -> moe_comm::Result<Comms<Cpu>> {
    let groups = Comms::builder().attention(Attention::TP).attention(Attention::PP).attention(Attention::ALL);
    groups.expert(Expert::ALL).build(world, &Cpu::new(1), &folding())
}

type Op = fn(&Comm<'_, Attention, Cpu>) -> moe_comm::Result<()>;

fn x(rows: usize) -> Tensor<f32, Cpu> {
    Tensor::zeros(&Cpu::new(1), rows, 3).unwrap()
}

/// Every kind of operation, such that all ranks of the group wait for rank 2.
const OPS: [(&str, Op); 8] = [
    ("all_reduce", |c| c.all_reduce(&x(4), Reduction::Sum).map(drop)),
    ("all_gather", |c| c.all_gather_rows(&x(4)).map(drop)),
    ("reduce_scatter", |c| c.reduce_scatter_rows(&x(4)).map(drop)),
    ("all_to_all", |c| c.all_to_all_rows_v(&x(4), &[1; 4], &[1; 4]).map(drop)),
    ("broadcast", |c| c.broadcast(2, (c.rank() == 2).then_some(&x(4)), [4, 3]).map(drop)),
    ("barrier", |c| c.barrier()),
    ("send", |c| match c.rank() {
        2 => [0, 1, 3].into_iter().try_for_each(|to| c.send(to, 1, &x(1))?.wait().map(drop)),
        _ => c.recv::<f32>(2, 1, 1, 3)?.wait().map(drop),
    }),
    ("recv", |c| match c.rank() {
        2 => [0, 1, 3].into_iter().try_for_each(|from| c.recv::<f32>(from, 1, 1, 3)?.wait().map(drop)),
        _ => c.send(2, 1, &x(1))?.wait().map(drop),
    }),
];

struct Report {
    ended: Result<Vec<()>, WorldError>,
    /// Of each rank that came back from the operation.
    seen: Vec<(usize, Option<Error>)>,
    took: Duration,
}

/// Runs `op` three times on four ranks; rank 2 suffers `fate` at its second call.
fn suffer(name: &'static str, op: Op, fate: Fate, deadline: Duration) -> Report {
    let begin = Instant::now();
    let (sender, receiver) = mpsc::channel();
    let ended = ThreadWorld::run(4, deadline, move |world| {
        let rank = world.rank();
        let fault = Fault { fate, op: Some(name), group: Some(Attention::ALL.into()), call: 1 };
        let world = Faulty::new(world, (rank == 2).then_some(fault));
        let comms = comms(&world)?;
        let comm = comms.group(Attention::ALL)?;
        let outcome = (0..3).try_for_each(|_| op(&comm));
        // What comes after fails as well, in every group.
        if outcome.is_err() && rank != 2 {
            assert_eq!(comms.group(Attention::TP)?.barrier(), outcome);
        }
        sender.send((rank, outcome.clone().err())).unwrap();
        outcome.map_err(Boxed::from)
    });
    let took = begin.elapsed();
    let mut seen: Vec<_> = receiver.try_iter().collect();
    seen.sort_by_key(|(rank, _)| *rank);
    Report { ended, seen, took }
}

fn assert_all_name_rank_2(report: &Report, ranks: &[usize], op: &str, why: &str) {
    assert_eq!(report.seen.iter().map(|(rank, _)| *rank).collect::<Vec<_>>(), ranks, "{op}");
    for (rank, error) in report.seen.iter().filter(|(rank, _)| *rank != 2) {
        match error {
            Some(Error::Poisoned { rank: 2, why: told, .. }) if told.contains(why) => {}
            other => panic!("{op}: rank {rank} was told {other:?}"),
        }
    }
    let ended = report.ended.as_ref().unwrap_err();
    assert_eq!(ended.rank(), Some(2), "{op}: {ended}");
    assert!(ended.to_string().contains(why), "{op}: {ended}");
    assert!(report.took < PATIENT / 2, "{op} took {:?}", report.took);
}

#[test]
fn a_rank_that_panics_in_any_operation() {
    for (name, op) in OPS {
        let report = suffer(name, op, Fate::Panic, PATIENT);
        assert_all_name_rank_2(&report, &[0, 1, 3], name, "panicked: injected fault");
        assert!(report.ended.unwrap_err().source().is_none());
    }
}

#[test]
fn a_rank_that_returns_an_error_in_any_operation() {
    for (name, op) in OPS {
        let report = suffer(name, op, Fate::Fail, PATIENT);
        assert_all_name_rank_2(&report, &[0, 1, 2, 3], name, "injected fault");
        // Its first call was done; what failed is no operation of the group.
        let failure = report.ended.as_ref().unwrap_err().to_string();
        let after =
            format!("rank 2 failed: injected fault at {name} of attention tp-cp-dp-pp (after {name} #0 of");
        assert!(failure.starts_with(&after), "{failure}");
        // The rank's own error, not one of its consequences.
        let ended = report.ended.unwrap_err();
        let source = ended.source().unwrap().downcast_ref::<Error>();
        assert_eq!(source, Some(&Error::Injected { group: Attention::ALL.into(), op: name }));
        assert!(ended.running.is_empty());
    }
}

#[test]
fn a_rank_that_stops_answering_in_any_operation() {
    // All at once, since each takes its deadline.
    let worlds = OPS.map(|(name, op)| (name, thread::spawn(move || suffer(name, op, Fate::Hang, SHORT))));
    for (name, world) in worlds {
        let report = world.join().unwrap();
        assert_all_name_rank_2(&report, &[0, 1, 3], name, "ranks [2] did not arrive within 1s");
        let ended = report.ended.unwrap_err();
        assert_eq!(ended.running, [2]);
        let Error::Poisoned { op: at, sequence, .. } = ended.failure else { panic!("{}", ended.failure) };
        // The second call; a message is reported by the side that waits, and is the first or second of its pair.
        match name {
            "send" => assert_eq!(at, Some("recv")),
            "recv" => assert_eq!(at, Some("send")),
            _ => assert_eq!((at, sequence), (Some(name), Some(1))),
        }
    }
}

#[test]
fn a_rank_that_is_late_but_in_time() {
    for (name, op) in OPS {
        let report = suffer(name, op, Fate::Delay(Duration::from_millis(20)), PATIENT);
        assert_eq!(report.ended.unwrap(), [(); 4]);
        assert!(report.seen.iter().all(|(_, error)| error.is_none()), "{name}");
    }
}

/// Groups that share a communicator fail under their own names.
#[test]
fn a_rank_that_fails_in_one_of_two_groups_of_the_same_ranks() {
    let ended = ThreadWorld::run(4, PATIENT, |world| -> moe_comm::Result<()> {
        let group = Some(Expert::ALL.into());
        let fault = Fault { fate: Fate::Fail, op: Some("barrier"), group, call: 0 };
        let world = Faulty::new(world, [fault]);
        let comms = comms(&world)?;
        let (attention, expert) = (comms.group(Attention::ALL)?, comms.group(Expert::ALL)?);
        assert!(std::ptr::eq(attention.ranks(), expert.ranks()));
        attention.barrier()?;
        expert.barrier()
    });
    let error = ended.unwrap_err().to_string();
    assert!(error.contains("injected fault at barrier of expert"), "{error}");
    let late = blamed(4, |world| {
        let comms = comms(&world)?;
        comms.group(Attention::ALL)?.barrier()?;
        if world.rank() == 3 {
            thread::sleep(20 * SHORT);
        }
        Ok(comms.group(Expert::ALL)?.barrier()?)
    });
    let named =
        matches!(late.failure, Error::Poisoned { group: Some(group), .. } if group == Expert::ALL.into());
    assert!(named, "{late}");
}

#[test]
fn a_deadline_that_never_comes() {
    let ended = ThreadWorld::run(4, Duration::MAX, |world| -> moe_comm::Result<()> {
        comms(&world)?.group(Attention::ALL)?.barrier()
    });
    assert_eq!(ended.unwrap(), [(); 4]);
}

fn blamed<R: Send + 'static>(
    size: usize,
    body: impl Fn(ThreadRank) -> Result<R, Boxed> + Send + Sync + 'static,
) -> WorldError {
    match ThreadWorld::run(size, SHORT, body) {
        Ok(_) => panic!("the world did not fail"),
        Err(error) => error,
    }
}

/// Rank 0 waits for rank 1, which waits for rank 3, which does not answer: all of them blame rank 3.
#[test]
fn the_cause_is_named_not_its_consequences() {
    let error = blamed(4, |world| {
        let comms = comms(&world)?;
        let (tp, pp) = (comms.group(Attention::TP)?, comms.group(Attention::PP)?);
        match world.rank() {
            3 => thread::sleep(20 * SHORT),
            1 => drop(pp.all_reduce_host(&[1.0], Reduction::Sum)?),
            _ => {}
        }
        tp.barrier()?;
        Ok(())
    });
    // Either of the two groups in which rank 3 is missing.
    assert_eq!(error.rank(), Some(3), "{error}");
    assert!(error.to_string().contains("ranks [3] did not arrive"), "{error}");
}

#[test]
fn ranks_that_wait_for_each_other() {
    let error = blamed(4, |world| {
        let comms = comms(&world)?;
        let tp = comms.group(Attention::TP)?;
        tp.recv::<f32>(1 - tp.rank(), 0, 1, 1)?.wait()?;
        Ok(())
    });
    let text = error.to_string();
    assert!(
        text.contains("deadlock") && text.contains("rank 0 for [1] in recv #0 of attention tp"),
        "{text}"
    );
    assert!(text.contains("rank 1 for [0] in recv #0 of attention tp"), "{text}");
}

/// Whoever waits for a rank that has ended is told at once.
#[test]
fn a_rank_that_ends_early() {
    let ended = ThreadWorld::run(4, PATIENT, |world| -> moe_comm::Result<()> {
        let comms = comms(&world)?;
        let all = comms.group(Attention::ALL)?;
        all.barrier()?;
        if world.rank() == 1 { Ok(()) } else { all.barrier() }
    });
    let error = ended.unwrap_err();
    assert_eq!(error.rank(), Some(1));
    assert!(
        error.to_string().contains("barrier #1 of attention tp-cp-dp-pp: it ended without joining"),
        "{error}"
    );
}

#[test]
fn a_rank_that_stops_outside_of_operations() {
    let begin = Instant::now();
    let error = blamed(3, |world| {
        if world.rank() == 1 {
            thread::sleep(100 * SHORT);
        }
        Ok(world.rank())
    });
    assert_eq!((error.rank(), &*error.running), (Some(1), &[1][..]));
    assert!(error.to_string().contains("ranks [1] did not end, and did nothing for 1s"), "{error}");
    assert!(begin.elapsed() < 50 * SHORT);
}

/// All of them are named.
#[test]
fn two_ranks_that_stop_outside_of_operations() {
    let error = blamed(3, |world| {
        if world.rank() > 0 {
            thread::sleep(100 * SHORT);
        }
        Ok(())
    });
    assert!(error.to_string().contains("ranks [1, 2] did not end"), "{error}");
}

/// Ranks that go on long after another one has ended are not late.
#[test]
fn ranks_that_outlive_another() {
    let ended = ThreadWorld::run(4, SHORT, |world| -> moe_comm::Result<()> {
        let comms = comms(&world)?;
        let tp = comms.group(Attention::TP)?;
        let rounds = if world.rank() < 2 { 0 } else { 25 };
        (0..rounds).try_for_each(|_| {
            thread::sleep(SHORT / 10);
            tp.barrier()
        })
    });
    assert_eq!(ended.unwrap(), [(); 4]);
}

#[test]
fn an_abort_ends_the_world() {
    let ended = ThreadWorld::run(4, PATIENT, |world| -> moe_comm::Result<()> {
        let comms = comms(&world)?;
        if world.rank() == 3 {
            comms.abort("interrupted");
        }
        comms.group(Attention::PP)?.barrier()
    });
    let error = ended.unwrap_err();
    assert_eq!(error.rank(), Some(3));
    assert!(error.to_string().contains("aborted: interrupted"), "{error}");
}

/// A rank that fails while others are awaited in what it has started fails there.
#[test]
fn a_failure_within_an_operation() {
    let ended = ThreadWorld::run(4, PATIENT, |world| -> Result<(), Boxed> {
        let comms = comms(&world)?;
        let tp = comms.group(Attention::TP)?;
        if world.rank() == 2 {
            let _started = tp.start_all_reduce(&x(4), Reduction::Sum)?;
            return Err("a disk is full".into());
        }
        Ok(comms.group(Attention::ALL)?.barrier()?)
    });
    let error = ended.unwrap_err();
    assert_eq!(error.to_string(), "rank 2 failed at all_reduce #0 of attention tp: a disk is full");
}

#[test]
fn an_error_of_another_type_is_the_source() {
    let ended = ThreadWorld::run(2, PATIENT, |world| match world.rank() {
        0 => Err("no such file"),
        _ => Ok(()),
    });
    let error = ended.unwrap_err();
    assert_eq!(error.to_string(), "rank 0 failed: no such file");
    assert_eq!(error.source().unwrap().to_string(), "no such file");
}

#[test]
fn what_a_rank_aborted_for_is_the_source() {
    let ended = ThreadWorld::run(4, PATIENT, |world| -> Result<(), Box<dyn StdError + Send + Sync>> {
        let comms = comms(&world)?;
        if world.rank() == 1 {
            comms.abort("a disk is full");
            return Err("no space left".into());
        }
        Ok(comms.group(Attention::PP)?.barrier()?)
    });
    let error = ended.unwrap_err();
    assert_eq!(error.rank(), Some(1));
    assert!(error.to_string().contains("aborted: a disk is full"), "{error}");
    assert_eq!(error.source().unwrap().to_string(), "no space left");
}
