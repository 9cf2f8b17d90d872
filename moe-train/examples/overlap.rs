//! Times training steps of eight thread-ranks (TP2 DP2 PP2 VPP2, experts EP2 EDP2) with `overlap_grad_reduce` and
//! `overlap_param_gather` on and off: two trainers that take turns, so that both see the same machine.
//!
//! ```text
//! cargo run --release -p moe-train --example overlap [STEPS]
//! ```

use std::time::{Duration, Instant};

use moe_comm::{ThreadWorld, World};
use moe_kernels::Cpu;
use moe_train::config::RunConfig;
use moe_train::run::setup;
use moe_train::trainer::{BatchSource, RankTrainer, Sequence};

const SEQUENCE: usize = 128;

const CONFIG: &str = "
    [model]
    vocab_size = 256
    hidden_size = 256
    intermediate_size = 512
    num_hidden_layers = 8
    num_attention_heads = 8
    num_key_value_heads = 4
    num_local_experts = 8
    num_experts_per_tok = 2

    [parallel]
    world_size = 8
    tp = 2
    pp = 2
    vpp = 2
    ep = 2

    [train]
    steps = 1
    global_batch_size = 8
    sequence_length = 128
    output = 'unused'

    [data]
    files = ['unused']
";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let steps: u64 = std::env::args().nth(1).map_or(Ok(20), |n| n.parse())?;
    let with = |overlap: bool| {
        let overrides = ["grad_reduce", "param_gather"].map(|what| format!("train.overlap_{what}={overlap}"));
        Ok::<_, Box<dyn std::error::Error>>(setup(&RunConfig::parse(CONFIG, "this example", &overrides)?)?)
    };
    let setups = [with(true)?, with(false)?];
    let ranks = ThreadWorld::run(8, Duration::from_secs(60), move |world| {
        let world: &dyn World<Cpu> = &world;
        let [on, off] = setups.clone().map(|setup| RankTrainer::<f32, Cpu>::new(setup, world, Cpu::new(1)));
        let mut trainers = [on?, off?];
        let mut seconds = [Vec::new(), Vec::new()];
        for step in 1..=steps {
            // Each is first every other time.
            for which in if step % 2 == 0 { [0, 1] } else { [1, 0] } {
                let start = Instant::now();
                trainers[which].step(step, &RandomTokens)?;
                seconds[which].push(start.elapsed().as_secs_f64());
            }
        }
        Ok::<_, moe_train::Error>(seconds)
    })?;
    // The first steps fill the allocator.
    let [on, off] = ranks[0].clone().map(|all| Quartiles::of(all[2.min(all.len() - 1)..].to_vec()));
    println!(
        "seconds of a step: lower quartile, median, upper quartile of {} steps",
        steps.saturating_sub(2)
    );
    println!("  overlap      {:.4} {:.4} {:.4}", on.0[0], on.0[1], on.0[2]);
    println!("  no overlap   {:.4} {:.4} {:.4}", off.0[0], off.0[1], off.0[2]);
    println!("median with overlap / without: {:.3}", on.0[1] / off.0[1]);
    Ok(())
}

struct Quartiles([f64; 3]);

impl Quartiles {
    fn of(mut all: Vec<f64>) -> Self {
        all.sort_by(f64::total_cmp);
        Quartiles([1, 2, 3].map(|quarter| all[(all.len() - 1) * quarter / 4]))
    }
}

/// Any tokens: only time matters.
struct RandomTokens;

impl BatchSource for RandomTokens {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let mut state = step << 32 | (u as u64 + 1);
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u32
        };
        Ok(vec![Sequence::unweighted((0..=SEQUENCE).map(|_| next()).collect())])
    }
}
