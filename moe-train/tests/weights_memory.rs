//! What import, export and a run that starts from weights have in memory at a time: by an allocator that counts. In a binary of
//! its own, with one test, so that nothing else is counted.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{DEADLINE, setup, tiny_model};
use moe_comm::ThreadWorld;
use moe_kernels::Cpu;
use moe_model::ModelConfig;
use moe_model::hf::{Family, FloatType, HubFolder, HubNames, WritePlan};
use moe_topology::Mapping;
use moe_train::Error;
use moe_train::checkpoint::{ExportOptions, Weights, export, import, restore_weights};
use moe_train::run::open_weights;
use moe_train::trainer::RankTrainer;

/// Bytes in use, and the most of them since the last reset.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::SeqCst) + bytes;
    PEAK.fetch_max(live, Ordering::SeqCst);
}

// SAFETY: all calls go to the system's allocator as they are.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may be there while bytes are copied.
        count(size);
        // SAFETY: as above.
        let moved = unsafe { System.realloc(memory, layout, size) };
        LIVE.fetch_sub(layout.size(), Ordering::SeqCst);
        moved
    }
}

/// The most bytes that `work` has in use beyond what was before.
fn peak<R>(work: impl FnOnce() -> R) -> (usize, R) {
    let before = LIVE.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    let result = work();
    (PEAK.load(Ordering::SeqCst) - before, result)
}

/// 12 layers of 32 experts; the embedding is the largest tensor, 3.5 MB in single precision.
fn model() -> ModelConfig {
    ModelConfig {
        vocab_size: 9_001,
        hidden_size: 96,
        intermediate_size: 48,
        num_hidden_layers: 12,
        num_local_experts: 32,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: Some(16),
        ..tiny_model()
    }
}

fn write(folder: &Path, names: &HubNames) {
    let plan = WritePlan::new(names.tensors().iter().map(|tensor| (tensor, FloatType::Bf16)), 2_000_000);
    plan.write(folder, |tensor, sink| {
        let row: Vec<f32> = (0..tensor.dims[1]).map(|n| n as f32 / 64.0).collect();
        (0..tensor.dims[0]).try_for_each(|_| sink.put(&row))
    })
    .unwrap();
}

#[test]
fn one_tensor_at_a_time_is_in_memory() {
    /// A piece of an imported checkpoint, which is read whole, as its hash is.
    const PIECE: usize = 4 << 20;
    /// Names, manifests, buffers of files.
    const SLACK: usize = 5 << 19;
    let model = model();
    let names = HubNames::new(Family::Mixtral, &model).unwrap();
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    std::fs::create_dir(at("hub")).unwrap();
    write(&at("hub"), &names);
    let largest = 4 * names.tensors().iter().map(|tensor| tensor.len()).max().unwrap();
    let all = 4 * names.tensors().iter().map(|tensor| tensor.len()).sum::<usize>();
    let bound = largest + PIECE + SLACK;
    assert!(2 * bound < all, "{bound} of {all}");

    let open = |names: HubNames| {
        let folder = HubFolder::open(&at("hub"), names).unwrap();
        let config = serde_json::json!({
            "model_type": "mixtral", "vocab_size": 9_001, "hidden_size": 96, "intermediate_size": 48,
            "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "num_local_experts": 32, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
            "torch_dtype": "bfloat16",
        });
        Weights::of_hub(folder, config, model.clone()).unwrap()
    };
    let direct = Arc::new(open(names));
    let (used, path) = peak(|| import::<f32>(&direct, &at("import")).unwrap());
    assert!(used < largest + SLACK, "import: {used} bytes, where the largest tensor has {largest}");
    let imported = Arc::new(open_weights(&path).unwrap());
    let (used, ()) = peak(|| export(&imported, &at("out"), ExportOptions::default()).unwrap());
    assert!(used < bound, "export: {used} bytes, where the largest tensor has {largest}");

    for weights in [direct, imported] {
        for mapping in [Mapping::default(), Mapping { world_size: 2, tp: 2, ep: 2, ..Mapping::default() }] {
            let (setup, weights) = (setup(model.clone(), mapping), weights.clone());
            let ranks = setup.folding.world_size();
            let used = ThreadWorld::run(ranks, DEADLINE, move |world| {
                let mut trainer = RankTrainer::<f32, Cpu>::new(setup.clone(), &world, Cpu::new(1))?;
                let all = trainer.cx().comms.group(moe_topology::Attention::ALL)?;
                all.barrier()?;
                let (used, ()) = peak(|| restore_weights(&mut trainer, &weights).unwrap());
                Ok::<_, Error>(used)
            });
            // What ranks use is counted together; each also rounds the master weights of a layer into new weights.
            let (used, layer) = (used.unwrap().into_iter().max().unwrap(), all / model.num_hidden_layers);
            let bound = bound * ranks + layer;
            assert!(used < bound, "{ranks} ranks: {used} bytes, {bound} allowed");
        }
    }
}
