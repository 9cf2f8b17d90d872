//! The input is the text of an order of two woven passes. What is read is written back the same and takes a finite time.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_pipeline::StageCost;
use moe_pipeline::weave::{Layer, LayerCost, Order};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(order) = text.parse::<Order>() else { return };
    assert_eq!(order.to_string().parse().as_ref(), Ok(&order));
    let compute = StageCost { forward: 1.0, backward_input: 1.5, backward_weight: 0.5 };
    let cost = |layer: &Layer| match layer {
        Layer::Dense => LayerCost::Dense(compute),
        Layer::Moe => LayerCost::Moe { attention: compute, experts: compute, all_to_all: 0.75 },
    };
    let [forward, backward] =
        [order.forward(), order.backward()].map(|layers| layers.iter().map(cost).collect::<Vec<_>>());
    let woven = order.simulate(&forward, &backward).expect("costs of the order's layers");
    assert!(woven.exposed() >= 0.0 && woven.makespan.is_finite());
});
