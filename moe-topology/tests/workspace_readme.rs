//! The example of the workspace's README.

/// The lines of the first Rust example of a Markdown text, without indentation.
fn first_example(markdown: &str) -> Vec<&str> {
    let lines = markdown.lines().skip_while(|line| *line != "```rust").skip(1);
    lines.take_while(|line| *line != "```").map(str::trim).filter(|line| !line.is_empty()).collect()
}

#[test]
fn the_example_runs_and_is_the_one_in_the_readme() -> Result<(), moe_topology::Error> {
    // As in the README from here
    use moe_topology::{Attention, Expert, Folding, Mapping};

    // 128 GPUs, Mixtral 8x22B as in the paper: experts on EP8 although attention has TP2.
    let folding = Folding::new(Mapping { world_size: 128, tp: 2, pp: 8, ep: 8, ..Mapping::default() })?;
    assert!(folding.group(5, Expert::EP).iter().eq(0..8));
    assert!(folding.group(5, Attention::DP).iter().eq([1, 3, 5, 7, 9, 11, 13, 15]));
    // to here

    // The published crate stands alone.
    let Ok(readme) = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")) else {
        return Ok(());
    };
    let own = include_str!("workspace_readme.rs").lines().map(str::trim).filter(|line| !line.is_empty());
    let own: Vec<&str> = own
        .skip_while(|line| !line.ends_with("from here"))
        .skip(1)
        .take_while(|l| *l != "// to here")
        .collect();
    assert_eq!(first_example(&readme), own);
    Ok(())
}
