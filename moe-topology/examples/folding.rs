//! Folds 32 ranks and prints what became of them; with `--svg` the figure, with `--json` the lists.
//!
//! `cargo run -p moe-topology --example folding -- --svg > folding.svg`

use moe_topology::{Attention, Cluster, Error, Expert, Folding, Mapping, draw};

fn main() -> Result<(), Error> {
    let mapping = Mapping { world_size: 32, tp: 2, cp: 2, pp: 2, ep: 8, ..Mapping::default() };
    let folding = Folding::new(mapping)?;
    match std::env::args().nth(1).as_deref() {
        Some("--svg") => print!("{}", draw::svg(&folding)),
        Some("--json") => println!("{}", draw::json(&folding)),
        _ => explain(&folding),
    }
    Ok(())
}

fn explain(folding: &Folding) {
    let cluster = Cluster::default();
    println!("{}", draw::text(folding));
    println!("{}", draw::table(folding, &cluster));

    let rank = 21;
    let [tp, cp, dp, pp] = folding.coordinates::<Attention>(rank);
    println!("rank {rank} in attention: tp {tp}, cp {cp}, dp {dp}, pp {pp}");
    let [etp, ep, edp, pp] = folding.coordinates::<Expert>(rank);
    println!("rank {rank} in the MoE:   etp {etp}, ep {ep}, edp {edp}, pp {pp}");
    let experts = folding.group(rank, Expert::EP);
    println!(
        "its tokens travel among {:?}, {} one node",
        experts.iter().collect::<Vec<_>>(),
        if cluster.inside_node(experts.ranks()) { "inside" } else { "beyond" }
    );

    // What cannot be folded is refused with its reason and what comes nearest.
    let illegal = Mapping { tp: 3, ..folding.mapping().clone() };
    if let Err(error) = Folding::new(illegal) {
        println!("\n{error}");
    }
}
