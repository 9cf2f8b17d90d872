//! Continuing a text with a trained model, on one rank.

use std::sync::Arc;
use std::time::Duration;

use moe_comm::{Comms, ThreadWorld, World};
use moe_kernels::{Backend, Cpu, DType, Float};
use moe_model::axes::{ATTENTION_GROUPS, EXPERT_GROUPS};
use moe_model::params::ParamLayoutBuilder;
use moe_model::{Cx, DecoderStage, Execution, MicroBatch, Objective, PipelineLayout, RopeTable};
use moe_topology::{Folding, Mapping};

use crate::checkpoint::{Weights, read_params};
use crate::data::Tokenizer;
use crate::{Error, Result};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Tokens to add.
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Seed of the choices.
    pub seed: u64,
}

/// `prompt` and its continuation by the model of `weights`, which was trained on tokens of `tokenizer`.
///
/// # Errors
/// The weights are damaged, or of no training run, or the tokenizer refuses.
pub fn generate(
    weights: &Arc<Weights>,
    tokenizer: &Tokenizer,
    prompt: &str,
    sampling: Sampling,
) -> Result<String> {
    let weights = weights.clone();
    let prompt = tokenizer.encode(prompt.as_bytes(), true)?;
    let texts = ThreadWorld::run(1, Duration::from_secs(60), move |world| {
        let mut tokens = prompt.clone();
        match weights.dtype() {
            DType::F64 => Decoder::<f64>::open(&world, &weights)?.extend(&mut tokens, sampling)?,
            _ => Decoder::<f32>::open(&world, &weights)?.extend(&mut tokens, sampling)?,
        }
        Ok::<_, Error>(tokens)
    })?;
    Ok(tokenizer.decode(&texts.concat(), true)?)
}

/// A whole model on one rank, to run forward.
struct Decoder<T: Float>
where
    Cpu: Backend<T>,
{
    stages: Vec<DecoderStage>,
    cx: Cx<T, Cpu>,
    window: usize,
}

impl<T: Float> Decoder<T>
where
    Cpu: Backend<T>,
{
    fn open(world: &dyn World<Cpu>, source: &Weights) -> Result<Self> {
        let (model, config) = (source.model(), &source.run()?.config);
        let window = config.train.sequence_length;
        let device = Cpu::default();
        let folding = Folding::new(Mapping::default())?;
        let mut layout = ParamLayoutBuilder::new(&folding, 0);
        let whole = PipelineLayout::even(model.num_hidden_layers, 1, 1)?;
        let stages = DecoderStage::of_rank(&mut layout, model, Execution::default(), &whole)?;
        let params = read_params(layout.build(), source, &device)?;
        let mut groups = Comms::<Cpu>::builder();
        groups = ATTENTION_GROUPS.into_iter().fold(groups, |groups, axes| groups.attention(axes));
        groups = EXPERT_GROUPS.into_iter().fold(groups, |groups, axes| groups.expert(axes));
        let comms = groups.build(world, &device, &folding)?;
        let rope = RopeTable::of(&device, model, window)?;
        let objective = Objective { micro_batches: 1, sequences: 1, tokens: window };
        Ok(Decoder { stages, cx: Cx::new(device, comms, params, rope, objective), window })
    }

    /// Adds tokens, each from the logits after those before it, of which at most a training sequence is looked at.
    fn extend(&mut self, tokens: &mut Vec<u32>, sampling: Sampling) -> Result<()> {
        for n in 0..sampling.tokens {
            let seen = &tokens[tokens.len().saturating_sub(self.window)..];
            let logits = self.logits(seen)?;
            tokens.push(choose(&logits, sampling, n as u64));
        }
        Ok(())
    }

    /// The logits after the last of `tokens`.
    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f64>> {
        let ids: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
        let positions: Vec<i32> = (0..ids.len() as i32).collect();
        let unused = vec![0; ids.len()];
        let batch =
            MicroBatch::new(&self.cx.device, 1, &ids, &positions, &unused, &vec![0.0; ids.len()], 0.0)?;
        self.cx.batches = vec![batch];
        let mut x = None;
        for stage in &self.stages {
            x = Some(stage.infer(0, x, &mut self.cx)?);
        }
        let logits = x.ok_or(Error::Protocol { what: "a model without a stage" })?.x;
        let last = logits.shape()[0] - 1;
        Ok(logits.rows(last..last + 1)?.to_f64(&self.cx.device)?)
    }
}

/// The `n`-th choice: a token with the probability that the logits give it.
fn choose(logits: &[f64], sampling: Sampling, n: u64) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
    if sampling.temperature == 0.0 {
        return best as u32;
    }
    let weights: Vec<f64> =
        logits.iter().map(|l| ((l - logits[best]) / sampling.temperature).exp()).collect();
    let hash = blake3::Hasher::new().update(&sampling.seed.to_le_bytes()).update(&n.to_le_bytes()).finalize();
    let mut bits = [0; 8];
    bits.copy_from_slice(&hash.as_bytes()[..8]);
    let uniform = (u64::from_le_bytes(bits) >> 11) as f64 / (1u64 << 53) as f64;
    let mut left = uniform * weights.iter().sum::<f64>();
    for (token, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_follow_the_probabilities_and_the_seed() {
        let logits = [0.0, (3.0f64).ln(), f64::NEG_INFINITY];
        let sampling = Sampling { tokens: 0, temperature: 1.0, seed: 3 };
        let n = 20_000;
        let ones = (0..n).filter(|&i| choose(&logits, sampling, i) == 1).count() as f64 / n as f64;
        // 3/4, within five standard errors
        assert!((ones - 0.75).abs() < 5.0 * (0.75f64 * 0.25 / n as f64).sqrt(), "{ones}");
        assert!((0..n).all(|i| choose(&logits, sampling, i) != 2));
        assert!((0..99).all(|i| choose(&logits, sampling, i) == choose(&logits, sampling, i)));
        assert_eq!(choose(&logits, Sampling { temperature: 0.0, ..sampling }, 7), 1);
    }
}
