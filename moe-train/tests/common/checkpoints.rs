//! Checkpoints of the training runs of these tests.

use std::collections::BTreeMap;
use std::path::Path;

use moe_train::checkpoint::container::{Checkpoint, PendingCheckpoint, PieceSpec, PieceWriter};
use moe_train::checkpoint::{Meta, RunState};
use moe_train::config::RunConfig;
use moe_train::trainer::Setup;

/// The meta data of a run of `setup` that made `step` steps.
pub fn meta(setup: &Setup, step: u64, updates: u64) -> Meta {
    let text = "
        [model]
        vocab_size = 256
        hidden_size = 8
        intermediate_size = 4
        num_hidden_layers = 1
        num_attention_heads = 2
        num_key_value_heads = 2
        num_local_experts = 2
        num_experts_per_tok = 1
        [train]
        steps = 10
        global_batch_size = 1
        sequence_length = 8
        output = 'run'
        [data]
        files = ['*.md']
    ";
    let mut config = RunConfig::parse(text, "a test", &[] as &[&str]).unwrap();
    config.model = setup.model.clone();
    let cursor = step * setup.global_batch_size as u64;
    let skipped = Default::default();
    Meta::of_run(RunState { updates, skipped, cursor, blend_samples: Vec::new(), config }, None)
}

/// All tensors of a checkpoint by name and kind, byte for byte.
pub fn tensors(path: &Path) -> BTreeMap<(String, String), Vec<u8>> {
    let checkpoint = Checkpoint::open(path).unwrap();
    assert!(checkpoint.verify().is_empty());
    let read = |name: &str, kind: &str| {
        ((name.to_owned(), kind.to_owned()), checkpoint.read_tensor(name, kind).unwrap())
    };
    checkpoint.tensors().map(|tensor| read(tensor.name, tensor.kind)).collect()
}

/// Copies a checkpoint to `root`, each tensor as `change` returns it; a tensor for which that is `None` is left out.
pub fn rewrite(
    path: &Path,
    root: &Path,
    mut change: impl FnMut(&str, &str, Vec<u8>) -> Option<Vec<u8>>,
) -> std::path::PathBuf {
    let checkpoint = Checkpoint::open(path).unwrap();
    let pending = PendingCheckpoint::create(root, checkpoint.step()).unwrap();
    let mut writer = PieceWriter::create(pending.folder(), 0).unwrap();
    for tensor in checkpoint.tensors() {
        let [rows, cols] = tensor.dims;
        let spec = PieceSpec {
            tensor: tensor.name.to_owned(),
            kind: tensor.kind.to_owned(),
            dtype: tensor.dtype,
            dims: tensor.dims,
            rows: 0..rows,
            cols: 0..cols,
            part: 0..rows * cols,
        };
        let data = checkpoint.read_tensor(tensor.name, tensor.kind).unwrap();
        if let Some(data) = change(tensor.name, tensor.kind, data) {
            writer.write(spec, &data).unwrap();
        }
    }
    pending.commit(vec![writer.finish().unwrap()], checkpoint.meta().clone()).unwrap()
}
