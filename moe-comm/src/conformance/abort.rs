//! A rank that ends the world.

use moe_kernels::Device;
use moe_topology::Attention;

use super::sample::tensor;
use super::{Case, Outcome, ended, typed, whole};
use crate::{Error, Pending, Reduction, World};

/// The cases in which the last rank aborts: every rank has its word. Each wants a fresh world, of any size.
pub fn aborts<D: Device>() -> Vec<Case<D>> {
    vec![("abort", abort)]
}

fn abort<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let alone = world.communicator(Attention::PP.into(), &[world.rank()])?;
    let raw = whole(world)?;
    let (alone, comm) = (typed(&*alone, device), typed(&*raw, device));
    let last = comm.size() - 1;
    let x = tensor::<f64, D>(device, 0, comm.rank(), [2, 3])?;
    let mut errors = Vec::new();
    if comm.rank() == last {
        // What could be done is ended as well.
        let started = alone.start_all_reduce(&x, Reduction::Sum)?;
        raw.abort("enough");
        errors.push(started.ready().err());
        errors.push(started.wait().err());
    } else {
        let outcome = comm.start_all_reduce(&x, Reduction::Sum).and_then(Pending::wait).map(drop);
        errors.push(ended(&comm, device, outcome));
    }
    errors.push(comm.barrier().err());
    errors.push(alone.barrier().err());
    for (i, error) in errors.into_iter().enumerate() {
        match error {
            Some(Error::Poisoned { rank, ref why, .. }) if rank == last && why.contains("enough") => {}
            other => return Err(format!("after an abort, call {i} returned {other:?}").into()),
        }
    }
    Ok(())
}
