//! Times training steps on the CPU in f32: forward, backward and AdamW of a 4-layer MoE (hidden 256, 8 experts, top-2,
//! sequences of 256, batch 8) on one rank with two threads, and on eight folded thread-ranks. `benchmarks/cpu_training.sh`
//! runs it beside the same model in PyTorch.
//!
//! ```text
//! cargo run --release -p moe-train --example cpu_training [STEPS]
//! ```

use std::time::{Duration, Instant};

use moe_comm::{ThreadWorld, World};
use moe_dispatch::DispatcherKind;
use moe_kernels::Cpu;
use moe_model::{ModelConfig, PipelineLayout};
use moe_pipeline::generate::Named;
use moe_topology::{Folding, Mapping};
use moe_train::optim::Hyper;
use moe_train::schedule::{LrSchedule, LrShape};
use moe_train::trainer::{BatchSource, RankTrainer, Sequence, Setup};

const BATCH: usize = 8;
const SEQUENCE: usize = 256;
const CORES: usize = 2;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let steps = std::env::args().nth(1).map_or(Ok(12), |n| n.parse())?;
    let eight = Mapping { world_size: 8, tp: 2, pp: 2, ep: 4, ..Mapping::default() };
    let one = time("1 rank", Mapping::default(), BATCH, steps)?;
    let folded = time("8 ranks, TP2 DP2 PP2 / EP4", eight, 2, steps)?;
    println!("8 ranks take {:.2}x the time of one", folded / one);
    Ok(())
}

/// Median seconds of a step.
fn time(
    what: &str,
    mapping: Mapping,
    micro_batch_size: usize,
    steps: u64,
) -> Result<f64, Box<dyn std::error::Error>> {
    let model = model()?;
    let pipeline = PipelineLayout::even(model.num_hidden_layers, mapping.pp, 1)?;
    let folding = Folding::new(model.split_tp(mapping))?;
    let world_size = folding.world_size();
    let setup = Setup {
        model,
        folding,
        pipeline,
        schedule: Named::OneFOneB,
        micro_batch_group_size: None,
        dispatcher: DispatcherKind::AllToAll,
        capacity: None,
        moe_shared_expert_overlap: false,
        expert_rank_capacity: None,
        recompute: Default::default(),
        seed: 0,
        global_batch_size: BATCH,
        rampup_batch_size: None,
        micro_batch_size,
        sequence_length: SEQUENCE,
        overlap_grad_reduce: true,
        overlap_param_gather: true,
        optimizer: Hyper {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            moments: Default::default(),
        },
        groups: Vec::new(),
        lr: LrSchedule { max: 1e-3, min: 1e-3, warmup_steps: 0, shape: LrShape::Constant },
        clip_grad: 1.0,
        expert_bias_update_rate: 0.0,
        forced_routing: None,
        record_routing: None,
        replay_routing: None,
    };
    let threads = (CORES / world_size).max(1);
    let ranks = ThreadWorld::run(world_size, Duration::from_secs(60), move |world| {
        let source = RandomTokens(micro_batch_size);
        let world: &dyn World<Cpu> = &world;
        let mut trainer = RankTrainer::<f32, Cpu>::new(setup.clone(), world, Cpu::new(threads))?;
        let mut seconds = Vec::new();
        for step in 1..=steps {
            let start = Instant::now();
            trainer.step(step, &source)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        Ok::<_, moe_train::Error>(seconds)
    })?;
    // The first steps fill the allocator.
    let mut seconds = ranks[0][2.min(ranks[0].len() - 1)..].to_vec();
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let tokens = (BATCH * SEQUENCE) as f64;
    println!("moe-train, {what}, {CORES} cores: {median:.4} s/step, {:.0} tokens/s", tokens / median);
    Ok(median)
}

fn model() -> Result<ModelConfig, serde_json::Error> {
    serde_json::from_str(
        r#"{"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
            "rope_theta": 10000.0, "router_aux_loss_coef": 0.01}"#,
    )
}

/// Any tokens: only time matters.
struct RandomTokens(usize);

impl BatchSource for RandomTokens {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let mut state = step << 32 | (u as u64 + 1);
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u32
        };
        let sequences = (0..self.0).map(|_| Sequence::unweighted((0..=SEQUENCE).map(|_| next()).collect()));
        Ok(sequences.collect())
    }
}
