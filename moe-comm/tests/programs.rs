//! Random programs over random groups, against a model that computes each operation on the host.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use moe_comm::{Call, Collective, Error, Flight, RawComm, Reduction, Result, ThreadRank, ThreadWorld, World};
use moe_kernels::{Cpu, DType, Device};
use moe_topology::Attention;
use proptest::prelude::*;

/// Values are whole numbers, so that sums are exact.
type Values = Vec<f64>;

#[derive(Debug, Clone)]
struct Step {
    /// Which group.
    group: prop::sample::Index,
    kind: Kind,
    /// Makes values and counts differ.
    salt: usize,
    /// The most operations that a rank leaves in flight after this step.
    in_flight: usize,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    AllReduce(Reduction),
    AllGather,
    ReduceScatter(Reduction),
    AllToAll,
    Broadcast,
    Barrier,
    /// From the first rank of the group to the last.
    Message,
}

#[derive(Debug, Clone)]
struct Program {
    size: usize,
    groups: Vec<Vec<usize>>,
    steps: Vec<Step>,
}

fn program() -> impl Strategy<Value = Program> {
    let reduction = prop_oneof![Just(Reduction::Sum), Just(Reduction::Max)];
    let kind = prop_oneof![
        reduction.clone().prop_map(Kind::AllReduce),
        Just(Kind::AllGather),
        reduction.prop_map(Kind::ReduceScatter),
        Just(Kind::AllToAll),
        Just(Kind::Broadcast),
        Just(Kind::Barrier),
        Just(Kind::Message),
    ];
    let step = (any::<prop::sample::Index>(), kind, 0..1000usize, 0..4usize)
        .prop_map(|(group, kind, salt, in_flight)| Step { group, kind, salt, in_flight });
    (1..7usize).prop_flat_map(move |size| {
        let ranks: Vec<usize> = (0..size).collect();
        let group = prop::sample::subsequence(ranks, 1..=size).prop_shuffle();
        (prop::collection::vec(group, 1..5), prop::collection::vec(step.clone(), 1..30))
            .prop_map(move |(groups, steps)| Program { size, groups, steps })
    })
}

/// Elements from `from` to `to`: mostly few, now and then too many for one piece of work.
fn count(salt: usize, from: usize, to: usize) -> usize {
    let n = (salt * 31 + from * 7 + to * 3) % 6;
    if salt.is_multiple_of(17) { n * 1501 } else { n }
}

fn values(salt: usize, rank: usize, n: usize) -> Values {
    (0..n).map(|i| ((salt * 131 + rank * 37 + i * 11) % 1009) as f64 - 500.0).collect()
}

fn block(salt: usize, rank: usize, counts: &[usize], index: usize) -> Values {
    let start = counts[..index].iter().sum::<usize>();
    values(salt, rank, counts.iter().sum())[start..start + counts[index]].to_vec()
}

fn reduced(reduction: Reduction, sent: impl Iterator<Item = Values>) -> Values {
    sent.reduce(|mut all, values| {
        for (a, b) in all.iter_mut().zip(values) {
            *a = if reduction == Reduction::Sum { *a + b } else { a.max(b) };
        }
        all
    })
    .unwrap()
}

/// What `me` of `n` calls and sends, and what it is to receive.
fn side(step: &Step, me: usize, n: usize) -> Option<(Collective, Option<Values>, Option<Values>)> {
    let salt = step.salt;
    let counts: Arc<[usize]> = (0..n).map(|rank| count(salt, rank, 0)).collect();
    let total = counts.iter().sum();
    Some(match step.kind {
        Kind::AllReduce(reduction) => {
            let sent = (0..n).map(|rank| values(salt, rank, total));
            let op = Collective::AllReduce(reduction);
            (op, Some(values(salt, me, total)), Some(reduced(reduction, sent)))
        }
        Kind::AllGather => {
            let all = (0..n).flat_map(|rank| values(salt, rank, counts[rank])).collect();
            let sent = values(salt, me, counts[me]);
            (Collective::AllGather { counts }, Some(sent), Some(all))
        }
        Kind::ReduceScatter(reduction) => {
            let part = reduced(reduction, (0..n).map(|rank| block(salt, rank, &counts, me)));
            (Collective::ReduceScatter { reduction, counts }, Some(values(salt, me, total)), Some(part))
        }
        Kind::AllToAll => {
            let table = |from: usize| (0..n).map(|to| count(salt, from, to)).collect::<Vec<_>>();
            let received = (0..n).flat_map(|from| block(salt, from, &table(from), me)).collect();
            let (send, recv): (Arc<[usize]>, _) =
                (table(me).into(), (0..n).map(|from| count(salt, from, me)).collect());
            let sent = values(salt, me, send.iter().sum());
            (Collective::AllToAll { send, recv }, Some(sent), Some(received))
        }
        Kind::Broadcast => {
            let root = salt % n;
            let sent = values(salt, root, total);
            let op = Collective::Broadcast { root, count: total };
            if me == root { (op, Some(sent), None) } else { (op, None, Some(sent)) }
        }
        Kind::Barrier => (Collective::Barrier, None, None),
        Kind::Message => {
            let (message, tag) = (values(salt, 0, total), salt as u64);
            match me {
                _ if n == 1 => return None,
                0 => (Collective::Send { to: n - 1, tag }, Some(message), None),
                _ if me == n - 1 => (Collective::Recv { from: 0, tag, count: total }, None, Some(message)),
                _ => return None,
            }
        }
    })
}

fn start(
    raw: &dyn RawComm<Cpu>,
    op: Collective,
    send: Option<Values>,
    expected: usize,
) -> Result<Box<dyn Flight<Cpu>>> {
    let device = Cpu::new(1);
    let send = match send {
        Some(values) => {
            // Somewhere inside a buffer.
            let bytes = 8 * values.len();
            let mut buf = device.alloc(8 + bytes)?;
            device.upload(&mut buf, 8, bytemuck::cast_slice(&values))?;
            Some((Arc::new(buf), 8..8 + bytes))
        }
        None => None,
    };
    let receives = !matches!(op, Collective::Barrier | Collective::Send { .. })
        && !matches!(op, Collective::Broadcast { root, .. } if root == raw.rank());
    let recv = if receives { Some(device.alloc(8 * expected)?) } else { None };
    raw.start(Call { group: raw.key(), op, dtype: DType::F64, cols: 1, send, recv })
}

fn run(program: &Program, world: &ThreadRank) -> Result<()> {
    let mut raws = Vec::new();
    for ranks in &program.groups {
        let member = ranks.contains(&world.rank());
        raws.push(if member { Some(world.communicator(Attention::TP.into(), ranks)?) } else { None });
    }
    let mut flights = VecDeque::new();
    let finish = |(flight, expected): (Box<dyn Flight<Cpu>>, Option<Values>)| -> Result<()> {
        let received = flight.wait()?;
        let received = received.map(|buf| buf.as_slice::<f64>().to_vec());
        if received == expected {
            return Ok(());
        }
        Err(Error::Argument { op: "program", what: format!("received {received:?}, expected {expected:?}") })
    };
    for step in &program.steps {
        let Some(raw) = &raws[step.group.index(raws.len())] else { continue };
        let Some((op, send, expected)) = side(step, raw.rank(), raw.size()) else { continue };
        let length = expected.as_ref().map_or(0, Vec::len);
        flights.push_back((start(&**raw, op, send, length)?, expected));
        // Ranks await different ones, and in different order.
        while flights.len() > step.in_flight {
            let next = if (step.salt + world.rank()).is_multiple_of(2) {
                flights.pop_back()
            } else {
                flights.pop_front()
            };
            next.map(finish).transpose()?;
        }
    }
    flights.into_iter().try_for_each(finish)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn programs_do_what_the_model_says(program in program()) {
        let size = program.size;
        let ended = ThreadWorld::run(size, Duration::from_secs(60), move |world| run(&program, &world));
        prop_assert!(ended.is_ok(), "{}", ended.unwrap_err());
    }

    /// A rank that leaves out one of its steps: the world fails, at once or at the deadline, and does not hang.
    #[test]
    fn programs_that_differ_fail(
        program in program(),
        culprit in any::<prop::sample::Index>(),
        step in any::<prop::sample::Index>(),
    ) {
        let culprit = culprit.index(program.size);
        let step = step.index(program.steps.len());
        let ranks = &program.groups[program.steps[step].group.index(program.groups.len())];
        let part = ranks.iter().position(|&rank| rank == culprit);
        let part = part.and_then(|me| side(&program.steps[step], me, ranks.len()));
        prop_assume!(ranks.len() > 1 && part.is_some());
        let mut shorter = program.clone();
        shorter.steps.remove(step);
        let ended = ThreadWorld::run(program.size, Duration::from_millis(300), move |world| {
            run(if world.rank() == culprit { &shorter } else { &program }, &world)
        });
        let failed = matches!(ended.unwrap_err().failure, Error::Poisoned { .. });
        prop_assert!(failed);
    }
}
