//! With a cache of keys and values, tokens that come in parts have the logits of a pass over all of them.

use std::ops::Range;
use std::time::Duration;

use moe_comm::{ThreadWorld, World, WorldError};
use moe_kernels::{Cpu, Tensor};
use moe_model::axes::communicators;
use moe_model::context::Documents;
use moe_model::params::{ParamLayoutBuilder, ParamStore};
use moe_model::{
    Cx, DecoderStage, Error, Execution, KvCache, MicroBatch, ModelConfig, Objective, PipelineLayout, Result,
    RopeTable,
};
use moe_topology::{Folding, Mapping};
use proptest::prelude::*;
use serde_json::{Value, json};

const LONGEST: usize = 21;

/// A small model with the keys of `more`. Its starting weights are large, so that attention has something to choose.
fn model(more: Value) -> ModelConfig {
    let mut keys = json!({
        "vocab_size": 37, "hidden_size": 20, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 5, "num_experts_per_tok": 2,
        "initializer_range": 0.6, "rope_theta": 50.0,
    });
    let (keys_of, Value::Object(more)) = (keys.as_object_mut().unwrap(), more) else { unreachable!() };
    for (key, value) in more {
        match value {
            Value::Null => keys_of.remove(&key),
            value => keys_of.insert(key, value),
        };
    }
    let model: ModelConfig = serde_json::from_value(keys).unwrap();
    model.check().unwrap();
    model
}

/// Every kind of attention, with every kind of layer and of choice beside it.
fn models() -> Vec<ModelConfig> {
    let latent = json!({
        "head_dim": null, "num_key_value_heads": 6, "kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4,
        "v_head_dim": 5, "scoring_func": "sigmoid", "first_k_dense_replace": 1, "n_shared_experts": 1,
    });
    let latent = |more: Value| {
        let mut keys = latent.clone();
        keys.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        model(keys)
    };
    vec![
        model(json!({})),
        model(json!({"sliding_window": 4, "attention_bias": true, "mlp_only_layers": [1]})),
        model(json!({"sliding_window": 1, "tie_word_embeddings": true})),
        model(json!({"use_qk_norm": true, "scoring_func": "softmax", "shared_expert_intermediate_size": 8})),
        model(json!({"use_qk_norm": true, "qk_norm_scope": "projection", "num_key_value_heads": 6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}})),
        model(
            json!({"rope_interleave": true, "moe_router_sinkhorn_iterations": 3, "router_aux_loss_coef": 0.0,
            "router_jitter_noise": 0.3}),
        ),
        latent(json!({"q_lora_rank": 9, "attention_bias": true, "moe_router_enable_expert_bias": true})),
        latent(json!({"sliding_window": 6})),
    ]
}

struct Rank {
    stage: DecoderStage,
    cx: Cx<f64, Cpu>,
    batch: usize,
    /// Sequence-major.
    ids: Vec<i32>,
}

impl Rank {
    /// Puts the positions `range` of all sequences into the context.
    fn load(&mut self, range: Range<usize>) -> Result<()> {
        let rows = range.start * self.batch..range.end * self.batch;
        let positions: Vec<i32> = range.flat_map(|position| vec![position as i32; self.batch]).collect();
        let (ids, n) = (&self.ids[rows], positions.len());
        let (labels, weights) = (vec![0; n], vec![0.0; n]);
        let batch = MicroBatch::new(&self.cx.device, self.batch, ids, &positions, &labels, &weights, 0.0)?;
        self.cx.batches = vec![batch];
        Ok(())
    }

    /// The logits of all positions in one pass.
    fn whole(&mut self) -> Result<Vec<f64>> {
        self.load(0..self.ids.len() / self.batch)?;
        self.stage.infer(0, None, &mut self.cx)?.x.to_f64(&self.cx.device).map_err(Error::from)
    }

    fn cache(&self, capacity: usize) -> Result<KvCache<f64, Cpu>> {
        self.stage.cache(&self.cx.device, self.batch, capacity)
    }

    /// The logits of the last `logits` of the positions `range`, which follow those in the cache.
    fn part(
        &mut self,
        range: Range<usize>,
        cache: &mut KvCache<f64, Cpu>,
        logits: usize,
    ) -> Result<Vec<f64>> {
        self.load(range)?;
        let y = self.stage.extend(0, None, cache, logits, &mut self.cx)?;
        Ok(y.x.to_f64(&self.cx.device)?)
    }
}

/// Runs `body` on one rank with `model` and `batch` sequences of `len` tokens.
fn on_rank<R: Send + 'static>(
    model: &ModelConfig,
    batch: usize,
    len: usize,
    body: impl Fn(&mut Rank) -> Result<R> + Send + Sync + 'static,
) -> R {
    let results = on_ranks(model, Mapping::default(), batch, len, body);
    results.unwrap_or_else(|error| panic!("{error}")).remove(0)
}

fn on_ranks<R: Send + 'static>(
    model: &ModelConfig,
    mapping: Mapping,
    batch: usize,
    len: usize,
    body: impl Fn(&mut Rank) -> Result<R> + Send + Sync + 'static,
) -> std::result::Result<Vec<R>, WorldError> {
    let model = model.clone();
    ThreadWorld::run(mapping.world_size, Duration::from_secs(60), move |world| {
        let (device, folding) = (Cpu::poisoned(1), Folding::new(model.split_tp(mapping.clone()))?);
        let mut layout = ParamLayoutBuilder::new(&folding, World::<Cpu>::rank(&world));
        let whole = PipelineLayout::even(model.num_hidden_layers, 1, 1)?;
        let stage = DecoderStage::of_rank(&mut layout, &model, Execution::default(), &whole)?.remove(0);
        let params = ParamStore::<f64, Cpu>::new(layout.build(), 3, &device)?;
        let comms = communicators::<Cpu>().build(&world, &device, &folding)?;
        let rope = RopeTable::of(&device, &model, LONGEST)?;
        let objective = Objective { micro_batches: 1, sequences: batch, tokens: batch * len };
        let ids = (0..batch * len).map(|i| (i * i * 5 + 3 * i) as i32 % 37).collect();
        body(&mut Rank { stage, cx: Cx::new(device, comms, params, rope, objective), batch, ids })
    })
}

fn assert_close(got: &[f64], want: &[f64], what: &str) {
    let largest = want.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let worst = got.iter().zip(want).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
    assert!(got.len() == want.len() && worst <= 1e-12 * largest, "{what}: {worst:e} of {largest:e}");
}

/// The parts that `cuts` cut `0..len` into.
fn parts(len: usize, cuts: &[bool]) -> Vec<Range<usize>> {
    let mut starts: Vec<usize> = (0..len).filter(|&at| at == 0 || cuts[at]).collect();
    starts.push(len);
    starts.windows(2).map(|ends| ends[0]..ends[1]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Whatever the length, the parts and how often they begin anew.
    #[test]
    fn parts_have_the_logits_of_the_whole(
        len in 1..=LONGEST,
        cuts in prop::collection::vec(any::<bool>(), LONGEST),
        batch in 1usize..=2,
        spare in 0usize..3,
    ) {
        for model in models() {
            let parts = parts(len, &cuts);
            let what = format!("{parts:?} of {batch} sequences, {model:?}");
            let (got, want) = on_rank(&model, batch, len, move |rank| {
                let want = rank.whole()?;
                let mut cache = rank.cache(len + spare)?;
                let mut got = Vec::new();
                for part in &parts {
                    got.extend(rank.part(part.clone(), &mut cache, part.len())?);
                    assert_eq!(cache.len(), part.end);
                }
                // Again from the middle.
                let again = parts[parts.len() / 2].clone();
                cache.truncate(again.start);
                let last = rank.part(again.clone(), &mut cache, 1)?;
                let width = batch * 37;
                assert_close(&last, &got[(again.end - 1) * width..again.end * width], "again");
                Ok((got, want))
            });
            assert_close(&got, &want, &what);
        }
    }
}

#[test]
fn tokens_one_by_one_after_a_prompt() {
    for model in models() {
        let (got, want) = on_rank(&model, 1, LONGEST, |rank| {
            let want = rank.whole()?;
            let mut cache = rank.cache(LONGEST)?;
            assert!(cache.is_empty() && rank.part(0..4, &mut cache, 0)?.is_empty());
            let mut got = want[..4 * 37].to_vec();
            for at in 4..LONGEST {
                got.extend(rank.part(at..at + 1, &mut cache, 1)?);
            }
            Ok((got, want))
        });
        assert_close(&got, &want, &format!("{model:?}"));
    }
}

#[test]
fn what_a_cache_cannot_hold_is_refused_and_changes_nothing() {
    on_rank(&model(json!({})), 2, 6, |rank| {
        let want = rank.whole()?;
        let mut cache = rank.cache(5)?;
        rank.part(0..3, &mut cache, 3)?;
        let full = rank.part(3..6, &mut cache, 1).unwrap_err();
        assert!(matches!(full, Error::CacheFull { len: 3, added: 3, capacity: 5 }), "{full}");

        let mut other = rank.stage.cache(&rank.cx.device, 3, 5)?;
        let error = rank.part(3..5, &mut other, 1).unwrap_err().to_string();
        assert!(error.contains("another number of sequences"), "{error}");

        rank.load(3..5)?;
        rank.cx.batches[0].valid = Some(Tensor::from_slice(&rank.cx.device, 1, 4, &[1, 1, 1, 0])?);
        let error = rank.stage.extend(0, None, &mut cache, 1, &mut rank.cx).unwrap_err().to_string();
        assert!(error.contains("padding"), "{error}");
        rank.load(3..5)?;
        let documents =
            Documents::new(&rank.cx.device, 2, &[0, 0, 1, 0], &Folding::new(Mapping::default())?, 0)?;
        rank.cx.batches[0].documents = Some(documents);
        let error = rank.stage.extend(0, None, &mut cache, 1, &mut rank.cx).unwrap_err().to_string();
        assert!(error.contains("documents"), "{error}");

        assert_eq!(cache.len(), 3);
        assert_close(&rank.part(3..5, &mut cache, 2)?, &want[3 * 74..5 * 74], "after refusals");
        Ok(())
    });
}

#[test]
fn sequences_that_are_cut_over_ranks_are_refused() {
    for (tp, cp) in [(2, 1), (1, 2)] {
        let mapping = Mapping { world_size: tp * cp, tp, cp, ..Mapping::default() };
        let error = on_ranks(&model(json!({})), mapping, 2, 4, |rank| {
            let mut cache = rank.cache(4)?;
            rank.part(0..1, &mut cache, 1)
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("cut over 2 ranks: use tp = 1 and cp = 1"), "{error}");
    }
}
