//! The fabric of the example, and the dispatchers on it, pass the conformance suite: no crate of ours but the topology.

#[path = "../examples/plain_vec.rs"]
mod plain_vec;

use moe_dispatch::conformance::{self, HIDDEN, Inspect};
use moe_dispatch::{AllGather, AllToAll, DispatcherKind, Error, TokenDispatcher};
use plain_vec::VecFabric;

impl Inspect for VecFabric {
    fn tensor(&self, rows: usize, values: &[f64]) -> Result<Vec<f32>, Error> {
        assert_eq!(values.len(), rows * HIDDEN);
        self.weights(values)
    }
    fn weights(&self, values: &[f64]) -> Result<Vec<f32>, Error> {
        Ok(values.iter().map(|&v| v as f32).collect())
    }
    fn read_tensor(&self, x: &Vec<f32>) -> Result<Vec<f64>, Error> {
        self.read_weights(x)
    }
    fn read_weights(&self, w: &Vec<f32>) -> Result<Vec<f64>, Error> {
        Ok(w.iter().map(|&v| f64::from(v)).collect())
    }
    fn read_index(&self, index: &Vec<i32>) -> Result<Vec<i32>, Error> {
        Ok(index.clone())
    }
}

#[test]
fn the_example_conforms() {
    for (ep, etp) in [(1, 1), (4, 1), (1, 3), (2, 2), (3, 2), (2, 4)] {
        plain_vec::world(ep, etp, move |fabric| {
            let tolerance = 1e-5;
            let checked = conformance::fabric(fabric, tolerance)
                .and_then(|()| {
                    conformance::dispatcher(fabric, |num_experts| AllToAll { num_experts }, tolerance)
                })
                .and_then(|()| {
                    conformance::dispatcher(fabric, |num_experts| AllGather { num_experts }, tolerance)
                });
            checked.unwrap_or_else(|failure| panic!("ep {ep}, etp {etp}: {failure}"));
            for kind in DispatcherKind::ALL {
                let make = |num_experts| TokenDispatcher { kind, num_experts };
                conformance::dispatcher(fabric, make, tolerance)
                    .unwrap_or_else(|failure| panic!("{kind}: {failure}"));
            }
        });
    }
}

#[test]
fn the_example_runs() {
    plain_vec::main();
}

#[test]
fn names_are_those_of_the_configuration() {
    for kind in DispatcherKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
    let error = "alltoall".parse::<DispatcherKind>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "no dispatcher is called `alltoall`; there are `all-to-all` and `all-gather`"
    );
}
