//! The native fabric, and the dispatchers on it, pass the conformance suite.

#[path = "../examples/layer.rs"]
mod layer;

use std::time::Duration;

use moe_comm::{Comms, ThreadRank, ThreadWorld, World};
use moe_dispatch::conformance;
use moe_dispatch::{
    AllGather, AllToAll, Dispatcher, Error, Fabric, Grid, InnerAxis, NativeFabric, Over, Routing, RoutingOn,
    Shapes, Transfer,
};
use moe_kernels::{Backend, Cpu, Float, Tensor};
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
fn the_example_of_a_layer_runs() {
    layer::main().unwrap();
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

/// Three tokens of one feature on one rank with two experts.
fn three_tokens(device: &Cpu) -> (Tensor<f64, Cpu>, RoutingOn<f64, Cpu>) {
    let x = Tensor::from_slice(device, 3, 1, &[1.0, 2.0, 3.0]).unwrap();
    let experts = Tensor::from_slice(device, 3, 1, &[1, 0, 1]).unwrap();
    let weights = Tensor::from_slice(device, 3, 1, &[0.1, 0.2, 0.3]).unwrap();
    (x, Routing { experts, weights, tokens: 3, top_k: 1, shapes: Shapes::Exact })
}

#[test]
fn what_is_in_flight_borrows_no_fabric() {
    let device = Cpu::poisoned(1);
    let (x, routing) = three_tokens(&device);
    let dispatcher = AllToAll { num_experts: 2 };
    let (flight, state) = {
        let fabric = NativeFabric::<f64, Cpu>::single(&device);
        dispatcher.dispatch_start(&fabric, &x, &routing).unwrap()
    };
    fn outlives_any_borrow<T: Send + 'static>(value: T) -> T {
        value
    }
    let (flight, state) = outlives_any_borrow((flight, state));
    let fabric = NativeFabric::<f64, Cpu>::single(&device);
    let batch = dispatcher.dispatch_finish(&fabric, flight, &state).unwrap();
    assert_eq!(batch.x.to_vec(&device).unwrap(), [2.0, 1.0, 3.0]);
    assert_eq!(batch.probs.to_vec(&device).unwrap(), [0.2, 0.1, 0.3]);
    assert_eq!((batch.offsets.to_vec(&device).unwrap(), batch.rows), (vec![0, 1, 3], 3));
}

#[test]
fn calls_that_do_not_belong_together_are_refused() {
    let device = Cpu::poisoned(1);
    let (x, routing) = three_tokens(&device);
    let fabric = NativeFabric::<f64, Cpu>::single(&device);
    let dispatcher = AllGather { num_experts: 2 };
    let state = dispatcher.plan(&fabric, &routing).unwrap();

    let without_probabilities = dispatcher.combine_backward_start(&fabric, &x, &state).unwrap();
    let error = dispatcher.dispatch_finish(&fabric, without_probabilities, &state).unwrap_err();
    assert_eq!(error, Error::Flight { call: "dispatch_finish", missing: "probabilities" });

    let combining = dispatcher.combine_start(&fabric, x.clone(), &state).unwrap();
    let error = dispatcher.dispatch_backward_finish(&fabric, combining, &state).unwrap_err();
    assert!(matches!(error, Error::Flight { call: "dispatch_backward_finish", .. }), "{error}");

    let nobody = fabric.start(&x, None, 0, Transfer::AllGather { over: Over::Etp, rows: &[3] });
    assert!(matches!(nobody, Err(Error::Alone)));
}

#[test]
fn more_rows_than_can_be_counted_are_refused() {
    let device = Cpu::poisoned(1);
    let fabric = NativeFabric::<f64, Cpu>::single(&device);
    let (_, routing) = three_tokens(&device);
    for rows in [usize::MAX, 1 << 63] {
        let routing = Routing { shapes: Shapes::PerExpert(rows), ..routing.clone() };
        let refused = AllToAll { num_experts: 2 }.plan(&fabric, &routing);
        assert!(matches!(refused, Err(Error::Device(moe_kernels::Error::OutOfMemory { .. }))), "{rows}");
    }
}

#[test]
fn a_routing_of_other_choices_than_its_tokens_have_is_refused() {
    let device = Cpu::poisoned(1);
    let fabric = NativeFabric::<f64, Cpu>::single(&device);
    let (_, routing) = three_tokens(&device);
    for (tokens, top_k) in [(2, 1), (4, 1), (3, 0), (3, 2), (usize::MAX, 3)] {
        for shapes in [Shapes::Exact, Shapes::PerExpert(4), Shapes::PerRank(4)] {
            let routing = Routing { tokens, top_k, shapes, ..routing.clone() };
            let refused = AllToAll { num_experts: 2 }.plan(&fabric, &routing).unwrap_err();
            assert_eq!(refused, Error::Routing { choices: 3, tokens, top_k });
            assert_eq!(AllGather { num_experts: 2 }.plan(&fabric, &routing).unwrap_err(), refused);
        }
    }
}
