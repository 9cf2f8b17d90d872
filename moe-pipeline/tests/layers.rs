//! Pipelines whose stages are layers: the simulator with the second level's costs.

use moe_pipeline::generate::{dual_pipe_v, one_f_one_b, overlapped_1f1b};
use moe_pipeline::weave::{LayerCost, weave};
use moe_pipeline::{
    Costs, Error, Kind, Link, Placement, Program, Schedule, StageCost, Timeline, lower, simulate, validate,
};

fn cost(forward: f64, backward_input: f64, backward_weight: f64) -> StageCost {
    StageCost { forward, backward_input, backward_weight }
}

fn moe(all_to_all: f64) -> LayerCost {
    LayerCost::Moe { attention: cost(1.0, 1.25, 0.75), experts: cost(2.0, 2.25, 1.75), all_to_all }
}

fn program(schedule: &Schedule) -> Program {
    validate(lower(schedule).unwrap(), None).unwrap()
}

fn run(schedule: &Schedule, layers: &[Vec<LayerCost>]) -> Timeline {
    let links = vec![Link { transfer: 0.5, latency: 0.25 }; layers.len() - 1];
    let costs = Costs::of_layers(schedule.placement(), layers, links).unwrap();
    simulate(&program(schedule), &costs).unwrap()
}

/// Every pass alone takes its compute and all its all-to-alls; every overlap what its order takes; and what a rank waits within its
/// passes is their length less its compute.
#[test]
fn passes_take_what_their_layers_take() {
    let dense = LayerCost::Dense(cost(3.0, 2.5, 2.0));
    let cases = [
        (
            overlapped_1f1b(2, 2, 6, None).unwrap(),
            vec![vec![dense, moe(1.5)], vec![moe(1.5); 2], vec![moe(1.5)], vec![]],
        ),
        (overlapped_1f1b(3, 1, 5, None).unwrap(), vec![vec![moe(0.5)], vec![moe(0.5); 3], vec![moe(4.0); 2]]),
        (dual_pipe_v(2, 7).unwrap(), vec![vec![moe(2.0); 2]; 4]),
        (one_f_one_b(2, 3).unwrap(), vec![vec![moe(2.0)], vec![dense]]),
    ];
    for (schedule, layers) in cases {
        let timeline = run(&schedule, &layers);
        let mut overlaps = 0;
        for (rank, spans) in timeline.spans.iter().enumerate() {
            let mut compute = 0.0;
            for span in spans {
                let of_part = |part: moe_pipeline::Action| -> (f64, f64) {
                    let of_layer = |layer: &LayerCost| {
                        let (all, hidden) = match *layer {
                            LayerCost::Dense(cost) => (vec![cost], 0.0),
                            LayerCost::Moe { attention, experts, all_to_all } => {
                                (vec![attention, experts], 2.0 * all_to_all)
                            }
                        };
                        let sum = |of: fn(&StageCost) -> f64| all.iter().map(of).sum::<f64>();
                        match part.kind {
                            Kind::Forward => (sum(|c| c.forward), hidden),
                            Kind::BackwardInput => (sum(|c| c.backward_input), hidden),
                            Kind::BackwardWeight => (sum(|c| c.backward_weight), 0.0),
                            _ => (sum(|c| c.backward_input + c.backward_weight), hidden),
                        }
                    };
                    let of_layers = layers[part.stage as usize].iter().map(of_layer);
                    of_layers.fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
                };
                let (busy, waits) =
                    span.action.parts().map(of_part).fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
                compute += busy;
                let took = span.end - span.start;
                match span.action.kind {
                    Kind::Overlap { stage, .. } => {
                        let (f, b) = (&layers[span.action.stage as usize], &layers[stage as usize]);
                        let woven = weave(f, b).unwrap().simulate(f, b).unwrap();
                        assert_eq!(took, woven.makespan);
                        assert!(took >= busy && took <= busy + waits);
                        overlaps += 1;
                    }
                    _ => assert_eq!(took, busy + waits),
                }
            }
            let within: f64 = spans.iter().map(|span| span.end - span.start).sum();
            assert_eq!(timeline.all_to_all[rank], within - compute);
        }
        let expected = schedule.actions().filter(|at| at.action.parts().count() == 2).count();
        assert_eq!(overlaps, expected);
    }
}

/// Where all-to-alls take half as long as compute, overlapped 1F1B is the shorter step, though its ranks go further ahead.
#[test]
fn overlaps_gain_what_all_to_alls_cost() {
    let layers = vec![vec![moe(1.5); 2]; 4];
    let (plain, overlapped) =
        (run(&one_f_one_b(4, 32).unwrap(), &layers), run(&overlapped_1f1b(4, 1, 32, None).unwrap(), &layers));
    // 18 of compute and 12 of all-to-alls per micro-batch: what overlaps hide is most of 40% of it.
    assert!(overlapped.makespan < 0.75 * plain.makespan);
    // Rank 0 has 7 forward passes before its first pair and 7 backward passes after its last; of the 25 pairs little shows.
    let alone = 2.0 * 7.0 * 6.0;
    assert_eq!(plain.all_to_all[0], 2.0 * 32.0 * 6.0);
    assert!(overlapped.all_to_all[0] >= alone && overlapped.all_to_all[0] < alone + 25.0);
}

#[test]
fn costs_of_layers_are_checked() {
    let placement = Placement::looped(2, 2).unwrap();
    let layers = vec![vec![moe(1.0)]; 4];
    let links = vec![Link::FREE; 3];
    let costs = Costs::of_layers(&placement, &layers, links.clone()).unwrap();
    assert_eq!(
        Costs::of_layers(&placement, &layers[1..], links.clone()),
        Err(Error::CostCount { what: "stages", expected: 4, got: 3 })
    );
    assert_eq!(
        Costs::of_layers(&placement, &layers, Vec::new()),
        Err(Error::CostCount { what: "links", expected: 3, got: 0 })
    );
    let negative = vec![vec![moe(-1.0)]; 4];
    assert_eq!(
        Costs::of_layers(&placement, &negative, links),
        Err(Error::Cost { what: "layer", index: 0, value: -1.0 })
    );
    // Rank 0 of a V has stages 0 and 3, which no rank has together in rounds.
    let error = simulate(&program(&dual_pipe_v(2, 4).unwrap()), &costs).unwrap_err();
    assert!(matches!(error, Error::NotWoven { .. }), "{error}");
}
