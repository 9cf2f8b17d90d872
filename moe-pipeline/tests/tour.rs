//! The pictures of the documentation are what is drawn.

use moe_pipeline::generate::Sizes;
use moe_pipeline::{Costs, Link, StageCost, lower, simulate, validate};

/// The picture under a header: name, ranks, stages per rank, micro-batches; a unit of time is two characters.
fn picture(header: &str) -> String {
    let (name, rest) = header.split_once(", ").unwrap();
    let numbers: Vec<u32> = rest.split(' ').filter_map(|word| word.parse().ok()).collect();
    let &[ranks, virtual_stages, microbatches] = numbers.as_slice() else { panic!("{header}") };
    let named: moe_pipeline::generate::Named = name.parse().unwrap();
    let schedule = named.generate(Sizes { ranks, virtual_stages, microbatches, group: None }).unwrap();
    let program = validate(lower(&schedule).unwrap(), None).unwrap();
    let cost = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
    let costs = Costs::uniform(schedule.placement().stages(), cost, Link::FREE);
    let timeline = simulate(&program, &costs).unwrap();
    let kept: Vec<String> = program.peak_in_flight().iter().map(u32::to_string).collect();
    let drawn = timeline.draw(2 * timeline.makespan as u16);
    format!("{header}\n{drawn}step {}, kept {}\n", timeline.makespan, kept.join(" "))
}

#[test]
fn the_tours_pictures_are_what_is_drawn() {
    let docs = include_str!("../src/generate/mod.rs");
    let docs: String = docs
        .lines()
        .filter_map(|line| line.strip_prefix("//!"))
        .fold(String::new(), |docs, line| docs + line.strip_prefix(' ').unwrap_or(line) + "\n");
    let mut seen = 0;
    for block in docs.split("```text\n").skip(1) {
        let block = block.split("```").next().unwrap();
        assert_eq!(block, picture(block.lines().next().unwrap()));
        seen += 1;
    }
    assert_eq!(seen, 9);
}
