//! What the fuzz targets share: a folder to put files in, and a model whose weights they read.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use moe_model::ModelConfig;
use moe_model::hf::{Family, HubFolder, HubNames};

/// A folder of this process in the system's folder for temporary files. A fuzzer does not end in order, so whoever starts it
/// removes what is left (`.ci/fuzz` gives it a folder of its own).
pub static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("moe-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for temporary files");
    folder
});

/// The names of a tiny Qwen3-MoE: one layer of two experts.
pub static NAMES: LazyLock<HubNames> = LazyLock::new(|| {
    let model: ModelConfig = serde_json::from_str(
        r#"{"vocab_size": 5, "hidden_size": 4, "intermediate_size": 3, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "use_qk_norm": true,
            "num_local_experts": 2, "num_experts_per_tok": 1}"#,
    )
    .expect("a model");
    HubNames::new(Family::Qwen3Moe, &model).expect("a model's names")
});

/// Writes a file of [`FOLDER`].
pub fn put(name: &str, data: &[u8]) -> PathBuf {
    let path = FOLDER.join(name);
    fs::write(&path, data).expect("a file in a folder of our own");
    path
}

/// Opens a folder of weights and reads all of it: every tensor that it says it has is there.
pub fn read_weights(folder: &Path) {
    let Ok(folder) = HubFolder::open(folder, NAMES.clone()) else { return };
    for tensor in NAMES.tensors() {
        let [rows, cols] = tensor.dims;
        // What is not finite is an error.
        if let Ok(values) = folder.read::<f32>(&tensor.name, 0..rows, 0..cols) {
            assert_eq!(values.len(), rows * cols);
        }
    }
}
