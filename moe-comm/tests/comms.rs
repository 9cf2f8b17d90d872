//! A rank's communicators over the groups of a folding.

use std::time::Duration;

use moe_comm::count::{Counted, Counters};
use moe_comm::trace::{Moment, Trace, Traced};
use moe_comm::{Comms, Error, Reduction, ThreadWorld, World};
use moe_kernels::{Cpu, Tensor};
use moe_topology::{Attention, Axes, Expert, Folding, GroupKey, Mapping};

const DEADLINE: Duration = Duration::from_secs(60);

/// The same ranks as [`Expert::EP`].
const TP_DP: Axes<Attention> = Attention::TP.union(Attention::DP);

fn folding() -> Folding {
    Folding::new(Mapping { world_size: 8, tp: 2, cp: 1, pp: 2, ep: 4, ..Mapping::default() }).unwrap()
}

#[test]
fn every_group_has_its_ranks_and_sums_over_them() {
    ThreadWorld::run(8, DEADLINE, |world| -> Result<(), Error> {
        let folding = folding();
        let attention =
            [Attention::TP, Attention::DP, Attention::PP, Attention::TP | Attention::DP, Axes::NONE];
        let expert = [Expert::EP, Expert::EDP, Expert::ETP | Expert::EP, Expert::ALL];
        let mut groups = Comms::builder();
        for axes in attention {
            groups = groups.attention(axes);
        }
        for axes in expert {
            groups = groups.expert(axes);
        }
        let comms = groups.build(&world, &Cpu::new(1), &folding)?;
        let me = world.rank() as i64;
        for axes in attention {
            let group = folding.group(world.rank(), axes);
            let comm = comms.group(axes)?;
            assert_eq!(comm.key(), GroupKey::from(axes));
            assert!(comm.ranks().iter().copied().eq(group.iter()));
            assert_eq!(Some(comm.rank()), group.position(world.rank()));
            let sum: usize = group.iter().sum();
            assert_eq!(comm.all_reduce_host(&[me], Reduction::Sum)?, [sum as i64]);
        }
        for axes in expert {
            let group = folding.group(world.rank(), axes);
            let comm = comms.keyed(axes.into())?;
            assert_eq!(
                comm.all_gather_host(&[me])?,
                group.iter().map(|rank| rank as i64).collect::<Vec<_>>()
            );
        }
        // The same ranks, the same communicator; others, another.
        let raw = |key: GroupKey| comms.keyed(key).map(|comm| comm.raw().key());
        assert_eq!(raw(Expert::EP.into())?, raw((Attention::TP | Attention::DP).into())?);
        assert_eq!(raw(Expert::EP.into())?, raw((Expert::ETP | Expert::EP).into())?);
        assert_ne!(raw(Expert::EP.into())?, raw(Expert::ALL.into())?);
        Ok(())
    })
    .unwrap();
}

#[test]
fn what_was_not_made_is_named() {
    ThreadWorld::run(8, DEADLINE, |world| -> Result<(), Error> {
        let comms = Comms::builder().attention(Attention::TP).build(&world, &Cpu::new(1), &folding())?;
        let error = comms.group(Expert::EP).map(drop).unwrap_err();
        assert_eq!(error.to_string(), "no communicator for expert ep; created are: attention tp");
        Ok(())
    })
    .unwrap();
    ThreadWorld::run(2, DEADLINE, |world| -> Result<(), Error> {
        let error = Comms::builder().build(&world, &Cpu::new(1), &folding()).map(drop).unwrap_err();
        assert_eq!(error, Error::WorldSize { folding: 8, world: 2 });
        let key = GroupKey::from(Attention::TP);
        for ranks in [&[0, 1, 1][..], &[0, 1, 2], &[1 - world.rank()], &[]] {
            let error = world.communicator(key, ranks).map(drop).unwrap_err();
            assert!(matches!(error, Error::BadGroup { .. }), "{ranks:?}: {error}");
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn calls_and_bytes_are_counted_by_group_and_operation() {
    let counts = ThreadWorld::run(8, DEADLINE, |world| -> Result<_, Error> {
        let (rank, counters) = (world.rank(), Counters::default());
        let world: Box<dyn World<Cpu>> = Box::new(Counted::new(world, counters.clone()));
        let groups = Comms::builder().attention(Attention::TP).attention(Axes::NONE).expert(Expert::EP);
        // The ranks of EP: the communicator is shared, the counts are not.
        let groups = groups.attention(TP_DP);
        let comms = groups.build(&world, &Cpu::new(1), &folding())?;
        let x = Tensor::<f32, Cpu>::zeros(&Cpu::new(1), 4, 5)?;
        let (tp, ep, alone) =
            (comms.group(Attention::TP)?, comms.group(Expert::EP)?, comms.group::<Attention>(Axes::NONE)?);
        tp.all_reduce(&x, Reduction::Sum)?;
        tp.all_reduce(&x.rows(0..1)?, Reduction::Sum)?;
        comms.group(TP_DP)?.barrier()?;
        ep.all_to_all_rows_v(&x, &[1; 4], &[1; 4])?;
        alone.all_gather_rows(&x)?;
        if rank % 2 == 0 {
            tp.send(1, 0, &x)?.wait()?;
        } else {
            tp.recv::<f32>(0, 0, 4, 5)?.wait()?;
        }
        Ok(counters.snapshot())
    })
    .unwrap();
    for (rank, counts) in counts.into_iter().enumerate() {
        let tp = GroupKey::from(Attention::TP);
        let message = if rank % 2 == 0 { "send" } else { "recv" };
        let expected = [
            ((GroupKey::from(Axes::<Attention>::NONE), "all_gather"), (1, 80)),
            ((tp, "all_reduce"), (2, 100)),
            ((tp, message), (1, 80)),
            ((TP_DP.into(), "barrier"), (1, 0)),
            ((Expert::EP.into(), "all_to_all"), (1, 80)),
        ];
        let counts: Vec<_> = counts.into_iter().map(|(at, count)| (at, (count.calls, count.bytes))).collect();
        assert_eq!(counts, expected);
    }
}

#[test]
fn starts_and_waits_are_recorded_in_their_order() {
    let traces = ThreadWorld::run(8, DEADLINE, |world| -> Result<_, Error> {
        let (rank, trace) = (world.rank(), Trace::default());
        let world: Box<dyn World<Cpu>> = Box::new(Traced::new(world, trace.clone()));
        let groups = Comms::builder().attention(Attention::TP).attention(TP_DP).expert(Expert::EP);
        let comms = groups.build(&world, &Cpu::new(1), &folding())?;
        let x = Tensor::<f32, Cpu>::zeros(&Cpu::new(1), 4, 5)?;
        let (tp, ep) = (comms.group(Attention::TP)?, comms.group(Expert::EP)?);
        let sum = tp.start_all_reduce(&x, Reduction::Sum)?;
        ep.all_gather_rows(&x)?;
        sum.wait()?;
        let first = trace.take();
        if rank % 2 == 0 {
            tp.send(1, 0, &x)?.wait()?;
        } else {
            drop(tp.recv::<f32>(0, 0, 4, 5)?);
        }
        Ok((first, trace.take()))
    })
    .unwrap();
    for (rank, (first, second)) in traces.into_iter().enumerate() {
        let (tp, ep) = (GroupKey::from(Attention::TP), GroupKey::from(Expert::EP));
        let tuples = |events: Vec<moe_comm::trace::Event>| -> Vec<_> {
            events.into_iter().map(|event| (event.moment, event.op, event.group, event.number)).collect()
        };
        let expected = [
            (Moment::Start, "all_reduce", tp, 0),
            (Moment::Start, "all_gather", ep, 1),
            (Moment::Wait, "all_gather", ep, 1),
            (Moment::Wait, "all_reduce", tp, 0),
        ];
        assert_eq!(tuples(first), expected);
        let message = [(Moment::Start, "send", tp, 2), (Moment::Wait, "send", tp, 2)];
        let dropped = [(Moment::Start, "recv", tp, 2)];
        assert_eq!(tuples(second), if rank % 2 == 0 { &message[..] } else { &dropped });
    }
}
