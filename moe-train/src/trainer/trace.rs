//! Record and replay of routing: the choices of each step on disk, known by token and not by rank.
//!
//! A step is a folder in the format of checkpoints, with three matrices for each layer that has experts. Row `i·S + p` of
//! `…gate.choices` holds the K experts of the token at position `p` of the step's `i`-th sequence, before dropping. So every
//! rank writes what its tokens chose, and reads what its tokens are to choose, under any mapping. The same row of
//! `…gate.margins`, one column of doubles, says by how much that choice [stands](moe_dispatch::Margins): where it
//! is near 0 another precision may choose otherwise. `…gate.weights`, as wide as the choices, are their weights in doubles: where
//! two of an expert's are near each other, dropping by weight may. Replay reads neither.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use moe_kernels::{Backend, DType, Float};
use moe_model::tokens::TokenIds;
use moe_model::{Choices, Cx, Recorded, RecordedRouting};
use moe_topology::Attention;
use serde_json::{Value, json};

use super::Setup;
use crate::checkpoint::container::{Checkpoint, PieceSpec, PieceWriter, step_folder};
use crate::checkpoint::publish;
use crate::durable::Context;
use crate::{Error, Result};

const KIND: &str = "routing";

/// The folder of a step's choices.
pub fn recorded_step(root: &Path, step: u64) -> PathBuf {
    step_folder(root, step)
}

fn name(layer: usize, of: &str) -> String {
    format!("model.layers.{layer}.block_sparse_moe.gate.{of}")
}

/// The choices of one step, as ranks write and read them.
pub(super) struct StepTrace<'a> {
    pub setup: &'a Setup,
    pub rank: usize,
    pub step: u64,
    /// Index of the step's first sequence.
    pub first: u64,
}

/// Rows that follow each other here and on disk.
struct Run {
    /// Rows of the matrix.
    rows: Range<usize>,
    /// The place of each of them among the rows of this rank.
    own: Vec<usize>,
}

impl StepTrace<'_> {
    /// What the matrices are of; it must be the same where they are replayed.
    fn meta<T: Float, D: Backend<T>>(&self, cx: &Cx<T, D>) -> Value {
        let model = &self.setup.model;
        json!({
            "num_local_experts": model.num_local_experts,
            "num_experts_per_tok": model.num_experts_per_tok,
            "moe_layers": model.moe_layers().collect::<Vec<_>>(),
            "first_sequence": self.first,
            "sequences": cx.objective.sequences,
            "sequence_length": self.setup.sequence_length,
        })
    }

    fn dims<T: Float, D: Backend<T>>(&self, cx: &Cx<T, D>) -> [usize; 2] {
        [cx.objective.sequences * self.setup.sequence_length, self.setup.model.num_experts_per_tok]
    }

    /// The rows of micro-batch `m` on this rank.
    fn runs<T: Float, D: Backend<T>>(&self, m: usize, cx: &Cx<T, D>) -> Result<Vec<Run>> {
        let ids = TokenIds::of_rank(&self.setup.folding, self.rank, cx.batch(m as u32)?)?;
        let len = self.setup.sequence_length;
        let row = |t: &moe_model::tokens::TokenId| (t.sequence - self.first) as usize * len + t.position;
        let mut rows: Vec<(usize, usize)> =
            ids.tokens.iter().enumerate().map(|(own, t)| (row(t), own)).collect();
        rows.sort_unstable();
        let runs = rows.chunk_by(|(a, _), (b, _)| a + 1 == *b).map(|run| Run {
            rows: run[0].0..run[0].0 + run.len(),
            own: run.iter().map(|&(_, own)| own).collect(),
        });
        Ok(runs.collect())
    }

    /// Writes what routers chose to `root`; a step that is made again is recorded again. Collective over the world.
    pub fn record<T: Float, D: Backend<T>>(
        &self,
        root: &Path,
        recorded: &Recorded,
        cx: &Cx<T, D>,
    ) -> Result<()> {
        let world = cx.comms.group(Attention::ALL)?;
        let path = recorded_step(root, self.step);
        if world.rank() == 0 && path.exists() {
            fs::remove_dir_all(&path).context("remove", &path)?;
        }
        let ([tokens, top_k], meta) = (self.dims(cx), self.meta(cx));
        let write = |folder: &Path| {
            let mut writer = PieceWriter::create(folder, self.rank)?;
            for (&(m, layer), RecordedRouting { experts, weights, margins }) in recorded {
                for Run { rows, own } in self.runs(m as usize, cx)? {
                    let choices = || own.iter().flat_map(|&own| own * top_k..(own + 1) * top_k);
                    let experts: Vec<i32> = choices().map(|at| experts[at]).collect();
                    let weights: Vec<f64> = choices().map(|at| weights[at]).collect();
                    let margins: Vec<f64> = own.iter().map(|&own| margins[own]).collect();
                    let spec = |of, dtype, width| PieceSpec {
                        tensor: name(layer, of),
                        kind: KIND.to_owned(),
                        dtype,
                        dims: [tokens, width],
                        rows: rows.clone(),
                        cols: 0..width,
                        part: 0..rows.len() * width,
                    };
                    writer.write(spec("choices", DType::I32, top_k), bytemuck::cast_slice(&experts))?;
                    writer.write(spec("weights", DType::F64, top_k), bytemuck::cast_slice(&weights))?;
                    writer.write(spec("margins", DType::F64, 1), bytemuck::cast_slice(&margins))?;
                }
            }
            Ok(writer.finish()?)
        };
        publish(&world, &cx.device, root, self.step, &meta, write)?;
        Ok(())
    }

    /// Reads from `root` what the routers of `layers`, those of this rank, are to choose.
    ///
    /// # Errors
    /// [`Error::Replay`] if it was recorded for other tokens or another model; there is no such step, or it is damaged.
    pub fn replay<T: Float, D: Backend<T>>(
        &self,
        root: &Path,
        layers: &[usize],
        cx: &Cx<T, D>,
    ) -> Result<Choices> {
        let checkpoint = Checkpoint::open(&recorded_step(root, self.step))?;
        let meta = self.meta(cx);
        if let Some((key, wanted)) = meta
            .as_object()
            .into_iter()
            .flatten()
            .find(|(key, wanted)| checkpoint.meta().get(key) != Some(*wanted))
        {
            let recorded = checkpoint.meta().get(key).unwrap_or(&Value::Null).to_string();
            let (key, now, path) = (key.clone(), wanted.to_string(), checkpoint.path().to_owned());
            return Err(Error::Replay { path, key, recorded, now });
        }
        let [_, top_k] = self.dims(cx);
        let mut choices = Choices::new();
        for m in 0..cx.batches.len() {
            let runs = self.runs(m, cx)?;
            let tokens: usize = runs.iter().map(|run| run.own.len()).sum();
            for &layer in layers {
                let mut experts = vec![0i32; tokens * top_k];
                for Run { rows, own } in &runs {
                    let bytes =
                        checkpoint.read_block(&name(layer, "choices"), KIND, rows.clone(), 0..top_k)?;
                    let data = bytes.chunks_exact(size_of::<i32>()).map(bytemuck::pod_read_unaligned::<i32>);
                    let data: Vec<i32> = data.collect();
                    for (own, row) in own.iter().zip(data.chunks_exact(top_k)) {
                        experts[own * top_k..(own + 1) * top_k].copy_from_slice(row);
                    }
                }
                choices.insert((m as u32, layer), experts);
            }
        }
        Ok(choices)
    }
}

/// That `root` has all of `steps`.
///
/// # Errors
/// [`Error::Checkpoint`] about the first step that is missing.
pub fn check_recorded(root: &Path, mut steps: Range<u64>) -> Result<()> {
    if let Some(missing) = steps.find(|&step| !recorded_step(root, step).is_dir()) {
        Checkpoint::open(&recorded_step(root, missing))?;
    }
    Ok(())
}
