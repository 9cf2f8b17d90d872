//! How much of what devices can compute a model gets.

use moe_model::ModelConfig;

/// Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): of the operations that the model needs per token, not of those that
/// a run makes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Utilisation {
    flops_per_token: f64,
    ranks: f64,
    peak_tflops: Option<f64>,
}

impl Utilisation {
    /// For a model on sequences of `sequence_length` over `ranks` ranks, each with a device of `peak_tflops`, if that is
    /// known.
    pub fn new(model: &ModelConfig, sequence_length: usize, ranks: usize, peak_tflops: Option<f64>) -> Self {
        let flops_per_token = model.training_flops_per_token(sequence_length);
        Utilisation { flops_per_token, ranks: ranks as f64, peak_tflops }
    }

    /// TFLOP/s of each rank, by the tokens per second of all.
    pub fn tflops_per_rank(&self, tokens_per_second: f64) -> f64 {
        self.flops_per_token * tokens_per_second / self.ranks / 1e12
    }

    /// The same as a fraction of the peak; none where that is not known.
    pub fn mfu(&self, tokens_per_second: f64) -> Option<f64> {
        Some(self.tflops_per_rank(tokens_per_second) / self.peak_tflops?)
    }
}

/// TFLOP/s of products of dense matrices in bf16 that NVIDIA's data sheets give for a GPU, by the driver's name of it; none for
/// others and for parts of one (MIG).
pub fn peak_bf16_tflops(gpu: &str) -> Option<f64> {
    const PEAKS: [(&str, f64); 11] = [
        // The first that is part of the name counts.
        ("H100 PCIe", 756.5),
        ("H100 NVL", 835.5),
        ("H200 NVL", 835.5),
        ("H100", 989.5),
        ("H200", 989.5),
        ("GH200", 989.5),
        ("H800 PCIe", 756.5),
        ("H800", 989.5),
        ("A100", 312.0),
        ("A800", 312.0),
        ("B200", 2250.0),
    ];
    let is_part = gpu.split_whitespace().any(|word| word == "MIG");
    let named = |name: &str| match name.split_once(' ') {
        // A word of the name begins so: "A100-SXM4-80GB", and not "GB200" for "B200".
        None => gpu.split_whitespace().any(|word| word.split('-').next() == Some(name)),
        Some(_) => gpu.contains(&format!(" {name}")),
    };
    PEAKS.iter().find(|(name, _)| !is_part && named(name)).map(|(_, peak)| *peak)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiled transformers' Mixtral of 3 layers on 4 sequences of 4096: the formula of the peers' scripts by hand.
    #[test]
    fn mfu_is_what_the_model_needs_by_what_the_devices_could() {
        let model: ModelConfig = serde_json::from_str(
            r#"{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 3,
                "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}"#,
        )
        .unwrap();
        // 8 185 184 256 operations a token; at 16384 tokens in 200 ms.
        let rate = 16384.0 / 0.2;
        let tflops = 8.185_184_256e9 * rate / 1e12;
        let one = Utilisation::new(&model, 4096, 1, Some(989.5));
        assert!((one.tflops_per_rank(rate) - tflops).abs() < 1e-9, "{}", one.tflops_per_rank(rate));
        assert!((one.mfu(rate).unwrap() - tflops / 989.5).abs() < 1e-12);
        let four = Utilisation::new(&model, 4096, 4, None);
        assert!((four.tflops_per_rank(rate) - tflops / 4.0).abs() < 1e-9);
        assert_eq!(four.mfu(rate), None);
    }

    #[test]
    fn gpus_are_known_by_the_names_that_the_driver_gives_them() {
        for (name, peak) in [
            ("NVIDIA H200", Some(989.5)),
            ("NVIDIA H200 NVL", Some(835.5)),
            ("NVIDIA H100 80GB HBM3", Some(989.5)),
            ("NVIDIA H100 PCIe", Some(756.5)),
            ("NVIDIA GH200 480GB", Some(989.5)),
            ("NVIDIA A100-SXM4-80GB", Some(312.0)),
            ("NVIDIA A100 80GB PCIe", Some(312.0)),
            ("NVIDIA B200", Some(2250.0)),
            ("NVIDIA GB200", None),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
            ("NVIDIA GeForce RTX 4090", None),
            ("", None),
        ] {
            assert_eq!(peak_bf16_tflops(name), peak, "{name}");
        }
    }
}
