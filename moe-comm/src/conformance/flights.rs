//! Operations in flight, and the memory they hold.

use std::thread;
use std::time::{Duration, Instant};

use moe_kernels::{Device, Element, Tensor};
use moe_topology::{Attention, Expert};

use super::sample::{tensor, values};
use super::{Outcome, expect, expect_tensor, typed, whole};
use crate::{Pending, Reduction, World};

pub(super) fn awaited_out_of_order<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let (me, size) = (comm.rank(), comm.size());
    let mut pending = Vec::new();
    for salt in 0..5 {
        pending.push(comm.start_all_gather_rows(&tensor::<f32, D>(device, salt, me, [2 + salt, 3])?)?);
    }
    // Every rank waits in another order.
    for turn in 0..5 {
        pending.rotate_left((me + turn) % (5 - turn));
        let gathered = pending.remove(0).wait()?;
        let rows = gathered.shape()[0] / size;
        let salt = rows - 2;
        let expected: Vec<f32> = (0..size).flat_map(|rank| values::<f32>(salt, rank, rows * 3)).collect();
        expect_tensor("awaited out of order", device, &gathered, [size * rows, 3], &expected)?;
    }
    Ok(())
}

/// Groups of neighbours, groups of ranks far apart, and the world, all at once.
pub(super) fn several_groups<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let (me, size) = (world.rank(), world.size());
    let near: Vec<usize> = (0..size).filter(|rank| rank / 2 == me / 2).collect();
    let far: Vec<usize> = (0..size).filter(|rank| rank % 2 == me % 2).rev().collect();
    let raws = [
        whole(world)?,
        world.communicator(Attention::TP.into(), &near)?,
        world.communicator(Expert::EP.into(), &far)?,
    ];
    let groups = [(0..size).collect(), near, far];
    for round in 0..3 {
        let mut pending = Vec::new();
        for (salt, raw) in raws.iter().enumerate() {
            let comm = typed(&**raw, device);
            let x = tensor::<i64, D>(device, salt + round, me, [40, 50])?;
            pending.push((salt, comm.start_all_reduce(&x, Reduction::Sum)?));
        }
        pending.rotate_left((me + round) % 3);
        for (salt, pending) in pending {
            let mut expected = vec![0i64; 2000];
            for &rank in &groups[salt] {
                let sent = values::<i64>(salt + round, rank, 2000);
                expected.iter_mut().zip(sent).for_each(|(sum, x)| *sum += x);
            }
            expect_tensor("sum in one of several groups", device, &pending.wait()?, [40, 50], &expected)?;
        }
    }
    for (raw, ranks) in raws.iter().zip(&groups) {
        let comm = typed(&**raw, device);
        expect("ranks in group order", comm.ranks(), ranks.as_slice())?;
        expect("rank in the group", ranks[comm.rank()], me)?;
    }
    Ok(())
}

/// Rank 0 starts an operation, then waits for a message that its peer sends only when that operation is done.
pub(super) fn progress_without_waiting<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let me = comm.rank();
    for rows in [1, 2000] {
        let started = comm.start_all_reduce(&tensor::<f64, D>(device, 0, me, [rows, 8])?, Reduction::Sum)?;
        if comm.size() > 1 && me == 0 {
            comm.recv::<f64>(comm.size() - 1, 5, 1, 1)?.wait()?;
        }
        let sum = started.wait()?;
        if me > 0 && me + 1 == comm.size() {
            comm.send(0, 5, &tensor::<f64, D>(device, 0, me, [1, 1])?)?.wait()?;
        }
        expect("shape", sum.shape(), [rows, 8])?;
    }
    Ok(())
}

/// An operation is ready when all have started it, whether anybody waits or not.
pub(super) fn ready<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let (me, last) = (comm.rank(), comm.size() - 1);
    for rows in [1, 2000] {
        // The last rank starts when rank 0 has seen that it did not.
        if last > 0 && me == last {
            comm.recv::<f64>(0, 5, 1, 1)?.wait()?;
        }
        let started = comm.start_all_gather_rows(&tensor::<f64, D>(device, 0, me, [rows, 8])?)?;
        if last > 0 && me == 0 {
            expect("ready without the last rank", started.ready()?, false)?;
            comm.send(last, 5, &tensor::<f64, D>(device, 0, me, [1, 1])?)?.wait()?;
        }
        until_ready(&started)?;
        let all: Vec<f64> = (0..=last).flat_map(|rank| values::<f64>(0, rank, rows * 8)).collect();
        expect_tensor("what was ready", device, &started.wait()?, [(last + 1) * rows, 8], &all)?;
    }
    Ok(())
}

/// The same of both sides of a message; then what was sent may be written again.
pub(super) fn messages_ready<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let (me, last) = (comm.rank(), comm.size() - 1);
    let mut x = tensor::<f32, D>(device, 0, me, [3, 2])?;
    let received = if me == 0 { Some(comm.recv::<f32>(last, 6, 3, 2)?) } else { None };
    if let Some(received) = &received {
        expect("received before it is sent", received.ready()?, false)?;
    }
    comm.barrier()?;
    if me == last {
        let sent = comm.send(0, 6, &x)?;
        until_ready(&sent)?;
        sent.wait()?;
        x.view_mut()?;
    }
    if let Some(received) = received {
        until_ready(&received)?;
        expect_tensor("message", device, &received.wait()?, [3, 2], &values::<f32>(0, last, 6))?;
    }
    Ok(())
}

fn until_ready<T: Element, D: Device>(pending: &Pending<T, D>) -> Outcome {
    let begin = Instant::now();
    while !pending.ready()? {
        if begin.elapsed() > Duration::from_secs(60) {
            return Err("not ready after a minute, though all have started it".into());
        }
        thread::yield_now();
    }
    Ok(())
}

/// A result that nobody waits for is given up, and nothing else is.
pub(super) fn dropped<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let me = comm.rank();
    for rows in [1, 1000] {
        let x = tensor::<f64, D>(device, 0, me, [rows, 16])?;
        let pending = comm.start_all_gather_rows(&x)?;
        if me % 2 == 0 {
            drop(pending);
        } else {
            expect("rows", pending.wait()?.shape(), [rows * comm.size(), 16])?;
        }
        drop(comm.start_all_reduce(&x, Reduction::Sum)?);
        expect("after drops", comm.all_reduce_host(&[1i64], Reduction::Sum)?, vec![comm.size() as i64])?;
    }
    Ok(())
}

/// When `wait` has returned, what was sent may be written again.
pub(super) fn memory_is_given_back<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let one_each = vec![1; comm.size()];
    for cols in [1, 10_000] {
        let mut x = tensor::<f64, D>(device, 0, comm.rank(), [comm.size(), cols])?;
        for round in 0..8 {
            let result = match round % 4 {
                0 => comm.all_reduce(&x, Reduction::Sum)?,
                1 => comm.all_gather_rows(&x)?,
                2 => comm.reduce_scatter_rows(&x)?,
                _ => comm.all_to_all_rows_v(&x, &one_each, &one_each)?,
            };
            if comm.size() == 1 {
                // There the result is what was sent.
                drop(result);
            }
            x.view_mut()?;
        }
    }
    Ok(())
}

pub(super) fn group_of_one<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = world.communicator(Attention::PP.into(), &[world.rank()])?;
    let comm = typed(&*raw, device);
    expect("rank and size", (comm.rank(), comm.size()), (0, 1))?;
    let x = tensor::<f64, D>(device, 3, world.rank(), [4, 3])?;
    let results = [
        comm.all_reduce(&x, Reduction::Sum)?,
        comm.all_gather_rows(&x)?,
        comm.reduce_scatter_rows(&x)?,
        comm.all_to_all_rows_v(&x, &[4], &[4])?,
        comm.broadcast(0, Some(&x), [4, 3])?,
    ];
    for result in results {
        expect_tensor("in a group of one", device, &result, [4, 3], &values::<f64>(3, world.rank(), 12))?;
        expect("it is what was sent", std::sync::Arc::ptr_eq(result.buf(), x.buf()), true)?;
    }
    comm.barrier()?;
    let empty = Tensor::<f32, D>::zeros(device, 0, 3)?;
    expect("nothing", comm.all_gather_rows(&empty)?.shape(), [0, 3])
}
