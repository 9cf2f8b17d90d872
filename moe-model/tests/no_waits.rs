//! The passes of a rank that holds all experts read nothing back from its device: counts of choices stay there, and what routers saw is
//! added up there.

use moe_comm::SoloWorld;
use moe_dispatch::capacity::DropPolicy;
use moe_kernels::{Backend, Cpu, Float, Tensor};
use moe_model::axes::communicators;
use moe_model::params::{ParamLayoutBuilder, ParamStore};
use moe_model::recompute::Recompute;
use moe_model::{
    Block, Cx, DropUnit, Execution, ExpertCapacity, Hidden, Layer, MicroBatch, Mode, ModelConfig, MoeStats,
    Objective, Result, RopeTable,
};
use moe_topology::{Folding, Mapping};

const LAYERS: usize = 3;
const SEQUENCE: usize = 16;
const BATCH: usize = 2;
const MICRO_BATCHES: u32 = 2;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;

/// A model, and what is particular about it.
struct Case {
    what: &'static str,
    /// Keys beside those of every case.
    keys: serde_json::Value,
    capacity: bool,
    recompute: bool,
    /// Whether some tokens are padding.
    padding: bool,
}

impl Case {
    fn all() -> Vec<Case> {
        let case = |what, keys| Case { what, keys, capacity: false, recompute: false, padding: false };
        vec![
            case(
                "choices by softmax",
                serde_json::json!({ "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.01 }),
            ),
            Case {
                recompute: true,
                padding: true,
                ..case(
                    "sigmoids in groups with a bias and a shared expert",
                    serde_json::json!({
                        "scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
                        "moe_router_enable_expert_bias": true,
                        "router_aux_losses": [{ "scope": "sequence", "coef": 0.01 }]
                    }),
                )
            },
            Case {
                capacity: true,
                ..case(
                    "experts of limited capacity, noise",
                    serde_json::json!({ "router_jitter_noise": 0.1 }),
                )
            },
            case(
                "scores in double precision, a loss over all layers",
                serde_json::json!({
                    "moe_router_dtype": "f64", "router_aux_losses": [{ "scope": "model", "coef": 0.01 }]
                }),
            ),
        ]
    }

    fn config(&self) -> ModelConfig {
        let mut keys = serde_json::json!({
            "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K
        });
        let own = self.keys.as_object().unwrap();
        keys.as_object_mut().unwrap().extend(own.iter().map(|(key, value)| (key.clone(), value.clone())));
        serde_json::from_value(keys).unwrap()
    }
}

/// Passes of several micro-batches through a stack of layers, one after the other; `waits` says how often the host has waited.
fn passes<T: Float, D: Backend<T>>(case: &Case, device: &D, waits: impl Fn(&D) -> u64) -> Result<()> {
    let (folding, config) = (Folding::new(Mapping::default()).unwrap(), case.config());
    let mut layout = ParamLayoutBuilder::new(&folding, 0);
    let layers = (0..LAYERS).map(|layer| {
        let layer = Block::new(&mut layout, &config, Execution::default(), layer, 0)?;
        Ok(Recompute { layer, enabled: case.recompute })
    });
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let params = ParamStore::<T, D>::new(layout.build(), 1, device)?;
    let comms = communicators::<D>().build(&SoloWorld::new(device.clone()), device, &folding)?;
    let rope = RopeTable::of(device, &config, SEQUENCE)?;
    let tokens = SEQUENCE * BATCH;
    let objective = Objective {
        micro_batches: MICRO_BATCHES as usize,
        sequences: MICRO_BATCHES as usize * BATCH,
        tokens: MICRO_BATCHES as usize * tokens,
    };
    let mut cx = Cx::new(device.clone(), comms, params, rope, objective);
    cx.mode = Mode::Train { seed: 0, step: 1 };
    cx.capacity = case.capacity.then_some(ExpertCapacity {
        factor: 0.5,
        policy: DropPolicy::Probs,
        unit: DropUnit::MICRO_BATCH,
        pad: false,
    });
    cx.params.zero_grads(false);
    cx.stats.moe = MoeStats::new(device, (0..LAYERS).collect(), EXPERTS)?;
    let (zeros, at) = (vec![0; tokens], Vec::from_iter((0..tokens).map(|i| (i / BATCH) as i32)));
    let ones = vec![1.0; tokens];
    for _ in 0..MICRO_BATCHES {
        let mut batch = MicroBatch::new(device, BATCH, &zeros, &at, &zeros, &ones, tokens as f64)?;
        if case.padding {
            let valid: Vec<i32> = (0..tokens).map(|i| i32::from(i % 7 != 3)).collect();
            batch.valid = Some(Tensor::from_slice(device, 1, tokens, &valid)?);
        }
        cx.batches.push(batch);
    }
    let matrix = |key: usize| {
        let values: Vec<f64> = (0..tokens * 64).map(|i| ((i * 37 + key * 101) as f64).sin()).collect();
        Tensor::<T, D>::from_f64(device, tokens, 64, &values)
    };
    let operands = (0..MICRO_BATCHES as usize).map(|m| Ok((matrix(2 * m)?, matrix(2 * m + 1)?)));
    let operands = operands.collect::<Result<Vec<_>>>()?;
    device.synchronize()?;

    let before = waits(device);
    for (m, (x, dy)) in (0..MICRO_BATCHES).zip(operands) {
        let choices = (config.choices_of_all_layers() > 0).then(|| Tensor::zeros(device, 1, EXPERTS));
        cx.choices = choices.transpose()?;
        let (mut x, mut dx, mut kept) = (Hidden::from(x), dy, Vec::new());
        for layer in &layers {
            let (y, saved) = layer.forward(m, x, &mut cx)?;
            kept.push(saved);
            x = y;
        }
        for (layer, saved) in layers.iter().zip(kept).rev() {
            let (next, deferred) = layer.backward_input(m, dx, saved, &mut cx)?;
            layer.backward_weight(m, deferred, &mut cx)?;
            dx = next;
        }
    }
    assert_eq!(waits(device) - before, 0, "{}: reads of the device", case.what);

    // What was added up meanwhile is all there.
    let stats = cx.stats.moe.read(device)?;
    assert_eq!(waits(device) - before, 1, "{}: one read for all layers", case.what);
    let valid = (0..tokens).filter(|i| !case.padding || i % 7 != 3).count() * MICRO_BATCHES as usize;
    for (layer, stats) in stats {
        let sum = |counts: &[i64]| counts.iter().sum::<i64>() as usize;
        assert_eq!(sum(&stats.expert_counts), valid * TOP_K, "{}: choices in layer {layer}", case.what);
        assert_eq!(sum(&stats.plain_counts), valid * TOP_K, "{}: choices in layer {layer}", case.what);
        let shares: f64 = stats.prob_sums.iter().sum();
        assert!((shares - valid as f64).abs() < 1e-3 * valid as f64, "{}: shares {shares}", case.what);
        assert!(stats.aux_loss > 0.0 && stats.sequence_aux_loss > 0.0 && stats.z_loss_sum > 0.0);
        assert_eq!(stats.dropped > 0, case.capacity, "{}: {} dropped", case.what, stats.dropped);
        assert_eq!(stats.model_aux_loss > 0.0, config.choices_of_all_layers() > 0, "{}", case.what);
    }
    Ok(())
}

#[test]
fn passes_on_the_host_read_nothing_back() {
    for case in Case::all() {
        passes::<f32, Cpu>(&case, &Cpu::poisoned(1), Cpu::waits).unwrap();
    }
}

#[cfg(feature = "cuda")]
#[test]
fn passes_on_a_gpu_do_not_wait() {
    use moe_kernels::{Cuda, bf16, cuda};

    if !matches!(cuda::probe(), Ok(count) if count > 0) {
        assert!(std::env::var_os("MOE_REQUIRE_GPU").is_none(), "no CUDA device");
        eprintln!("skipped: no CUDA device");
        return;
    }
    let gpu = Cuda::poisoned(0).unwrap();
    for case in Case::all() {
        passes::<bf16, Cuda>(&case, &gpu, Cuda::waits).unwrap();
        passes::<f32, Cuda>(&case, &gpu, Cuda::waits).unwrap();
    }
}
