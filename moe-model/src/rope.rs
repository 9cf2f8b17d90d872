//! Tables of the rotary position embedding.

use moe_kernels::family::{RotaryHead, RotaryPairs, Rotation};
use moe_kernels::{Backend, Device, Float, Tensor, View, ViewMut};

use crate::Result;
use crate::config::{ModelConfig, RotaryFrequencies};
use crate::cx::MicroBatch;

/// Cosines and sines, `[positions, d / 2]`, of the angles `position · frequency`, times the attention factor of the
/// [frequencies](ModelConfig::rotary_frequencies), worked out in f64 and rounded once (arXiv 2104.09864). `d` is the part of a
/// head that is rotated: all of it but with latent attention.
#[derive(Debug)]
pub struct RopeTable<T: Float, D: Device> {
    pub(crate) cos: Tensor<T::Acc, D>,
    pub(crate) sin: Tensor<T::Acc, D>,
    pairs: RotaryPairs,
}

impl<T: Float, D: Device> Clone for RopeTable<T, D> {
    fn clone(&self) -> Self {
        RopeTable { cos: self.cos.clone(), sin: self.sin.clone(), pairs: self.pairs }
    }
}

impl<T: Float, D: Device> RopeTable<T, D> {
    /// For positions `0..positions`.
    pub fn new(
        device: &D,
        positions: usize,
        frequencies: &RotaryFrequencies,
        pairs: RotaryPairs,
    ) -> Result<Self> {
        let RotaryFrequencies { per_position, attention_factor } = frequencies;
        let table = |f: fn(f64) -> f64| {
            let row = |position| per_position.iter().map(move |w| f(position as f64 * w) * attention_factor);
            let values: Vec<f64> = (0..positions).flat_map(row).collect();
            Tensor::from_f64(device, positions, per_position.len(), &values)
        };
        Ok(RopeTable { cos: table(f64::cos)?, sin: table(f64::sin)?, pairs })
    }

    /// That of a model, for positions `0..positions`.
    pub fn of(device: &D, config: &ModelConfig, positions: usize) -> Result<Self> {
        Self::new(device, positions, &config.rotary_frequencies(), config.rotary_pairs())
    }

    /// What of a head is rotated: its last elements, as many as there are angles for.
    pub fn head(&self, head_dim: usize) -> RotaryHead {
        let first = head_dim.saturating_sub(2 * self.cos.shape()[1]);
        RotaryHead { head_dim, first, pairs: self.pairs }
    }
}

impl<T: Float, D: Backend<T>> RopeTable<T, D> {
    /// `y = x` with the last `d` elements of each head rotated; `x, y: [tokens, heads · head_dim]`.
    pub fn apply(
        &self,
        device: &D,
        y: ViewMut<'_, T, D>,
        x: View<'_, T, D>,
        head_dim: usize,
        batch: &MicroBatch<T, D>,
        rotation: Rotation,
    ) -> Result<()> {
        let (positions, head) = (batch.rotary_positions().view(), self.head(head_dim));
        device.rope(y, x, self.cos.view(), self.sin.view(), positions, head, rotation)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use moe_kernels::Cpu;
    use serde_json::{Value, json};

    use super::*;

    /// Plain, linear and YaRN, with and without latent attention, in and beyond the original length
    /// (`tests/fixtures/make_rope.py`).
    #[test]
    fn frequencies_tables_and_scales_are_those_of_transformers() {
        let golden: Value = serde_json::from_str(include_str!("../tests/fixtures/rope.json")).unwrap();
        let positions: Vec<usize> = serde_json::from_value(golden["positions"].clone()).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        for case in cases {
            let mut model = json!({
                "vocab_size": 7, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1
            });
            let fields = model.as_object_mut().unwrap();
            fields.extend(case["model"].as_object().unwrap().clone());
            if fields.contains_key("qk_rope_head_dim") {
                fields.extend([("kv_lora_rank".into(), 5.into()), ("v_head_dim".into(), 4.into())]);
            }
            let config: ModelConfig = serde_json::from_value(model).unwrap();
            config.check().unwrap();

            let of = |what: &Value| -> Vec<f64> { serde_json::from_value(what.clone()).unwrap() };
            let close = |name: &str, a: &[f64], b: &[f64], tolerance: f64| {
                assert_eq!(a.len(), b.len(), "{name}");
                for (a, b) in a.iter().zip(b) {
                    assert!(
                        (a - b).abs() <= tolerance * b.abs().max(1e-3),
                        "{name} {a}, {b}: {}",
                        case["model"]
                    );
                }
            };
            close("scale", &[config.attention_scale()], &[case["scale"].as_f64().unwrap()], 1e-15);
            let frequencies = config.rotary_frequencies();
            close("frequency", &frequencies.per_position, &of(&case["inv_freq"]), 1e-14);
            let table = RopeTable::<f64, Cpu>::of(&Cpu::new(1), &config, positions[positions.len() - 1] + 1);
            let table = table.unwrap();
            for (name, table) in [("cos", &table.cos), ("sin", &table.sin)] {
                let (values, half) = (table.to_f64(&Cpu::new(1)).unwrap(), table.shape()[1]);
                for (&position, row) in positions.iter().zip(case[name].as_array().unwrap()) {
                    // An angle of so many radians is rounded to so many units in the last place of one.
                    let tolerance = 1e-13 * (position as f64).max(1.0);
                    close(name, &values[position * half..][..half], &of(row), tolerance);
                }
            }
        }
        assert_eq!(cases.len(), 14);
    }
}
