//! The input is the text of a schedule, with or without messages. What is read is written back the same; what lowers is valid
//! or says why not; what is valid runs on paper, within its budget, and has its buffers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_pipeline::{Costs, Link, Schedule, StageCost, lower, simulate, validate};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(schedule) = text.parse::<Schedule>() else { return };
    let again: Schedule = schedule.to_string().parse().expect("what was written is read");
    assert_eq!(again, schedule);
    let stages = schedule.placement().stages();
    let Ok(program) = validate(lower(&schedule).unwrap_or(schedule), None) else { return };
    let cost = StageCost { forward: 1.0, backward_input: 1.5, backward_weight: 0.5 };
    let costs = Costs::uniform(stages, cost, Link { transfer: 0.25, latency: 0.5 });
    let timeline = simulate(&program, &costs).expect("a program at costs of its stages");
    for (spans, idle) in timeline.spans.iter().zip(&timeline.idle) {
        let busy: f64 = spans.iter().map(|span| span.end - span.start).sum();
        assert_eq!(busy + idle.total(), timeline.makespan);
    }
    for (rank, &peak) in (0..).zip(program.peak_in_flight()) {
        assert!(program.buffers(rank).saved() <= peak);
    }
});
