//! The native fabric, and the dispatchers on it, pass the conformance suite.

use std::time::Duration;

use moe_comm::{Comms, ThreadRank, ThreadWorld, World};
use moe_dispatch::conformance;
use moe_dispatch::{AllGather, AllToAll, Error, Grid, InnerAxis, NativeFabric};
use moe_kernels::{Backend, Cpu, Float};
use moe_topology::{Expert, Folding, Mapping};

fn comms(rank: &ThreadRank, device: &Cpu, folding: &Folding) -> Result<Comms<Cpu>, moe_comm::Error> {
    let builder = Comms::<Cpu>::builder().expert(Expert::EP).expert(Expert::ETP);
    builder.expert(Expert::EP | Expert::ETP).build(rank, device, folding)
}

fn conforms<T: Float>(ep: usize, etp: usize, order: &str, tolerance: f64)
where
    Cpu: Backend<T>,
{
    let order = order.parse().unwrap();
    let mapping = Mapping { world_size: ep * etp, ep, etp, order, ..Mapping::default() };
    let folding = Folding::new(mapping).unwrap();
    let rank = move |rank: ThreadRank| -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let device = Cpu::poisoned(1);
        let comms = comms(&rank, &device, &folding)?;
        let grid = Grid::of(&folding, World::<Cpu>::rank(&rank))?;
        let fabric = NativeFabric::<T, Cpu>::new(&device, grid, &comms)?;
        conformance::fabric(&fabric, tolerance)?;
        conformance::dispatcher(&fabric, |num_experts| AllToAll { num_experts }, tolerance)?;
        conformance::dispatcher(&fabric, |num_experts| AllGather { num_experts }, tolerance)?;
        Ok(())
    };
    if let Err(error) = ThreadWorld::run(ep * etp, Duration::from_secs(20), rank) {
        panic!("EP {ep}, ETP {etp}: {error}");
    }
}

#[test]
fn it_conforms() {
    for (ep, etp) in [(1, 1), (4, 1), (1, 3), (2, 2), (3, 2), (2, 4)] {
        for order in ["tp-cp-ep-dp-pp", "ep-tp-cp-dp-pp"] {
            conforms::<f64>(ep, etp, order, 1e-13);
        }
        conforms::<f32>(ep, etp, "tp-cp-ep-dp-pp", 1e-5);
    }
}

#[test]
fn one_rank_needs_no_communicators() {
    let device = Cpu::poisoned(1);
    let fabric = NativeFabric::<f64, Cpu>::single(&device);
    conformance::dispatcher(&fabric, |num_experts| AllToAll { num_experts }, 1e-13).unwrap();
    conformance::dispatcher(&fabric, |num_experts| AllGather { num_experts }, 1e-13).unwrap();
}

#[test]
fn a_grid_that_is_not_the_communicators_is_refused() {
    let mapping = Mapping { world_size: 2, ep: 2, ..Mapping::default() };
    let folding = Folding::new(mapping).unwrap();
    let rank = move |rank: ThreadRank| -> Result<bool, moe_comm::Error> {
        let device = Cpu::new(1);
        let comms = comms(&rank, &device, &folding)?;
        let wrong = Grid::new((0, 1), (World::<Cpu>::rank(&rank), 2), InnerAxis::Etp).unwrap();
        Ok(matches!(NativeFabric::<f64, Cpu>::new(&device, wrong, &comms), Err(Error::Grid { .. })))
    };
    assert_eq!(ThreadWorld::run(2, Duration::from_secs(5), rank).unwrap(), [true, true]);
}
