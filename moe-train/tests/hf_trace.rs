//! Logits, losses and every gradient equal those of transformers in float64, under any folding.
//!
//! The numbers are of `fixtures/hf/make.py`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use moe_kernels::{Backend, Cpu, Float};
use moe_model::RecomputeModule;
use moe_pipeline::generate::Named;
use moe_train::checkpoint::Weights;
use moe_train::config::{Dispatcher, ParallelConfig};
use moe_train::run::open_weights;
use moe_train::trace::{Options, Tokens, Trace, trace};
use safetensors::{Dtype, SafeTensors, View};

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf").join(name)
}

fn weights(name: &str) -> Arc<Weights> {
    Arc::new(open_weights(&folder(name)).unwrap_or_else(|error| panic!("{name}: {error}")))
}

/// What transformers computed: names, shapes and numbers.
struct Golden(BTreeMap<String, (Vec<usize>, Vec<f64>)>);

impl Golden {
    fn of(name: &str) -> Self {
        let bytes = std::fs::read(folder(name).join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().filter(|(_, tensor)| tensor.dtype() == Dtype::F64).map(|(name, tensor)| {
            let values =
                tensor.data().chunks_exact(8).map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap()));
            (name.to_owned(), (tensor.shape().to_vec(), values.collect()))
        });
        Golden(tensors.collect())
    }

    fn grad_norm(&self) -> f64 {
        let grads = self.0.iter().filter(|(name, _)| name.starts_with("grad."));
        grads.flat_map(|(_, (_, values))| values).map(|g| g * g).sum::<f64>().sqrt()
    }

    /// Per tensor, `max|a−b| ≤ tolerance·max|b| + floor`: *Equality* of docs/semantics.md.
    fn check<T: Float>(&self, trace: &Trace<T>, [tolerance, floor]: [f64; 2], what: &str) {
        let names: Vec<&str> = trace.tensors().map(|(name, _)| name).collect();
        let mut sorted = names.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq(self.0.keys().map(String::as_str)), "{what}: {sorted:?}");
        let floor = floor * self.grad_norm();
        for (name, tensor) in trace.tensors() {
            let (shape, golden) = &self.0[name];
            assert_eq!(tensor.shape(), shape, "{what}: {name}");
            let values = tensor.values();
            let largest = golden.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            let worst = values.iter().zip(golden).fold(0.0, |m: f64, (a, b)| m.max((a.to_f64() - b).abs()));
            let floor = if name.starts_with("grad.") { floor } else { 0.0 };
            assert!(
                worst <= tolerance * largest + floor,
                "{what}: {name} differs by {worst:e}, largest {largest:e}"
            );
        }
    }
}

/// `8 tp2 cp4 u2 pp2 v2 zb-v ep4 etp2 ag order`: ranks, sizes of axes, a schedule, all-gather.
fn parallel(text: &str) -> ParallelConfig {
    let mut parallel = ParallelConfig::default();
    for word in text.split(' ') {
        let (name, size) = word.split_at(word.find(|c: char| c.is_ascii_digit()).unwrap_or(word.len()));
        let size = || size.parse().unwrap();
        match name {
            "" => parallel.world_size = size(),
            "tp" => parallel.tp = size(),
            "cp" => parallel.cp = size(),
            "u" => parallel.cp_ulysses = size(),
            "pp" => parallel.pp = size(),
            "v" => parallel.vpp = size(),
            "ep" => parallel.ep = size(),
            "etp" => parallel.etp = size(),
            "zb-v" => parallel.schedule = Some(Named::ZbV),
            "ag" => parallel.dispatcher = Dispatcher::AllGather,
            order => parallel.order = order.to_owned(),
        }
    }
    parallel
}

fn traced<T: Float<Acc = T>>(weights: &Arc<Weights>, name: &str, parallel: ParallelConfig) -> Trace<T>
where
    Cpu: Backend<T>,
{
    let tokens = Tokens::read(&folder(name).join("golden.safetensors")).unwrap();
    let options = Options { parallel, grads: true, ..Options::default() };
    trace(weights, &tokens, &options).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The fixture `name` on one rank and under `foldings`, in f64; on one rank and under the first two in f32.
fn check(name: &str, foldings: &[&str]) {
    let (golden, weights) = (Golden::of(name), weights(name));
    let one = [["1"].as_slice(), foldings].concat();
    for &folding in &one {
        let trace = traced::<f64>(&weights, name, parallel(folding));
        golden.check(&trace, [1e-9, 1e-16], &format!("{name}, {folding}"));
    }
    for &folding in one.iter().take(3) {
        let trace = traced::<f32>(&weights, name, parallel(folding));
        golden.check(&trace, [1e-5, 1e-16], &format!("{name} in f32, {folding}"));
    }
}

#[test]
fn mixtral() {
    check(
        "mixtral",
        &[
            "12 tp2 cp2 pp3 ep2 etp2",
            "6 tp6 ep3 ag",
            "2",
            "2 tp2",
            "3 ep3",
            "6 ep6",
            "4 etp4",
            "2 cp2",
            "2 cp2 u2",
            "4 cp4 u2 ep2 etp2",
            "3 pp3",
            "12 tp2 ep3 etp2 ag",
            "8 tp2 cp2 ep2 etp2",
            "12 tp2 pp3 ep2 etp2 tp-cp-pp-ep-dp",
        ],
    );
}

#[test]
fn qwen2_moe() {
    check(
        "qwen2_moe",
        &[
            "12 tp3 cp2 ep6 etp2 ag",
            "6 tp6 ep2 etp3",
            "2",
            "3 tp3",
            "2 ep2",
            "6 ep6 ag",
            "3 etp3",
            "2 cp2",
            "3 cp3 u3",
            "6 cp6 u3 ep3 etp2",
            "3 pp3",
            "9 tp3 pp3 ep3",
            "12 tp3 cp2 ep3 etp2",
            "12 cp2 pp3 ep2",
        ],
    );
}

#[test]
fn qwen3_moe() {
    check(
        "qwen3_moe",
        &[
            "8 tp2 pp2 v2 ep4 ag",
            "12 tp12 ep4 etp3",
            "2",
            "2 tp2",
            "4 tp4 ep4",
            "8 ep8 ag",
            "6 etp6",
            "2 cp2",
            "4 cp4 u4",
            "8 cp8 u2 ep4 etp2",
            "4 pp4",
            "2 pp2 v2",
            "4 tp2 pp2 v2 zb-v ep2",
            "8 tp2 cp2 pp2 ep2 etp2",
            "12 tp6 pp2 ep2 etp3",
            "12 tp2 cp2 ep4 etp3 ag",
        ],
    );
}

/// Its padding id is 1, which some of the tokens are.
#[test]
fn olmoe() {
    check(
        "olmoe",
        &[
            "12 tp2 cp2 ep3 etp2 ag",
            "6 tp6 ep3 etp2",
            "2",
            "2 tp2",
            "3 tp3 ep3",
            "9 ep9 ag",
            "6 etp6",
            "2 cp2",
            "2 cp2 u2",
            "8 cp4 u2 pp2 etp2",
            "2 pp2",
            "12 tp3 pp2 ep3 etp2",
            "12 tp2 cp3 u3 pp2 ep3",
        ],
    );
}

#[test]
fn deepseek_v3() {
    check(
        "deepseek_v3",
        &[
            "12 tp2 cp2 pp3 ep4 ag",
            "4 tp4 ep2 etp2",
            "2",
            "2 tp2",
            "4 ep4",
            "8 ep8 ag",
            "6 etp6",
            "2 cp2",
            "4 cp4 u4",
            "8 cp4 u2 ep4 etp2",
            "3 pp3",
            "12 tp4 pp3 ep2 etp2",
            "12 tp2 cp2 ep4 etp3",
            "6 pp3 ep2",
        ],
    );
}

/// Linear RoPE, a window, a padding id, an older spelling.
#[test]
fn mixtral_linear_window() {
    check("mixtral_linear_window", &["8 tp2 cp2 u2 ep4 etp2 ag", "4 tp4 ep2", "3", "2 pp2"]);
}

/// Experts in every other layer, weights divided by their sum, no auxiliary loss.
#[test]
fn qwen2_moe_sparse_step() {
    check("qwen2_moe_sparse_step", &["12 tp3 pp2 ep2 etp3", "4 pp2 v2 cp2 ep2 ag", "4 pp4", "6 tp3 cp2 ep2"]);
}

/// A tied head, a dense layer, weights not divided by their sum.
#[test]
fn qwen3_moe_tied() {
    check("qwen3_moe_tied", &["12 tp2 pp3 ep4 ag", "4 tp4 ep2 etp2", "6 pp3 cp2 u2 etp2", "3"]);
}

/// A tied head, fewer key-value heads than queries, weights divided by their sum.
#[test]
fn olmoe_grouped() {
    check("olmoe_grouped", &["8 tp2 cp2 pp2 ep2 etp2", "4 tp4 ep4 ag", "4 cp4 u4 ep2", "3"]);
}

/// YaRN with both scales, one group, no latent of queries.
#[test]
fn deepseek_v3_yarn() {
    check("deepseek_v3_yarn", &["8 tp2 pp2 cp2 ep2", "6 tp2 ep6 ag", "4 cp4 u2 etp2", "3"]);
}

/// Without gradients the same numbers, and the same whatever backward makes again.
#[test]
fn parts_of_a_trace() {
    let (name, root) = ("deepseek_v3", tempfile::tempdir().unwrap());
    let weights = weights(name);
    let tokens = Tokens::read(&folder(name).join("golden.safetensors")).unwrap();
    let of = |options: &Options| trace::<f64>(&weights, &tokens, options).unwrap();
    let whole = of(&Options { parallel: parallel("6 tp2 pp3"), grads: true, ..Options::default() });
    let forward = of(&Options { parallel: parallel("6 tp2 pp3"), ..Options::default() });
    let values = |trace: &Trace<f64>, name: &str| {
        let found =
            trace.tensors().find(|(own, _)| *own == name).map(|(_, tensor)| tensor.values().into_owned());
        found.unwrap_or_default()
    };
    assert_eq!(forward.tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["logits", "loss"]);
    assert_eq!(values(&forward, "logits"), values(&whole, "logits"));
    assert_eq!((forward.loss, forward.aux_loss), (whole.loss, None));

    let recompute = vec![RecomputeModule::Full];
    let again = of(&Options { parallel: parallel("6 tp2 pp3"), recompute, grads: true });
    let path = root.path().join("trace.safetensors");
    again.write(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), whole.tensors().count() + 1);
    assert_eq!(Tokens::read(&path).unwrap(), tokens);
    for (name, tensor) in whole.tensors() {
        let written = file.tensor(name).unwrap();
        assert_eq!((written.dtype(), written.shape()), (Dtype::F64, tensor.shape()));
        assert!(written.data() == &*tensor.data(), "{name}");
    }
}

#[test]
fn what_cannot_be_traced_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let weights = weights("mixtral");
    let refusal = |tokens: &Tokens, text: &str| {
        let options = Options { parallel: parallel(text), ..Options::default() };
        trace::<f64>(&weights, tokens, &options).unwrap_err().to_string()
    };
    let tokens = |batch, length, ids: &[i64]| Tokens { batch, length, ids: ids.to_vec() };
    let fine = tokens(1, 3, &[0, 66, 1]);
    assert_eq!(
        refusal(&tokens(2, 2, &[0, 66, 67, 1]), "1"),
        "input_ids[1, 0] = 67, but the model's vocabulary is 0 to 66"
    );
    assert_eq!(
        refusal(&tokens(1, 2, &[0, -1]), "1"),
        "input_ids[0, 1] = -1, but the model's vocabulary is 0 to 66"
    );
    assert!(refusal(&tokens(2, 1, &[0, 1]), "1").starts_with("input_ids is [2, 1]"));
    assert!(refusal(&tokens(0, 9, &[]), "1").starts_with("input_ids is [0, 9]"));
    assert!(
        refusal(&fine, "4 ep4").contains("num_experts must be a multiple of ep"),
        "{}",
        refusal(&fine, "4 ep4")
    );
    assert!(refusal(&fine, "4 pp4").contains("num_hidden_layers"), "{}", refusal(&fine, "4 pp4"));

    let path = root.path().join("other.safetensors");
    let written = |name: &str, dtype, shape: &[usize]| {
        let bytes = vec![0; shape.iter().product::<usize>() * 4];
        let view = safetensors::tensor::TensorView::new(dtype, shape.to_vec(), &bytes).unwrap();
        safetensors::serialize_to_file([(name, view)], None, &path).unwrap();
        Tokens::read(&path).unwrap_err().to_string()
    };
    assert!(
        written("input_ids", Dtype::I32, &[2, 3])
            .ends_with("input_ids is I32 [2, 3], but must be I64 [batch, seq]")
    );
    assert!(written("ids", Dtype::I32, &[2]).contains("input_ids"));
    std::fs::write(&path, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}").unwrap();
    assert!(Tokens::read(&path).unwrap_err().to_string().contains("is no file of tokens"));
}
