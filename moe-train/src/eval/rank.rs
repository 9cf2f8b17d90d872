//! What one rank computes.

use moe_comm::World;
use moe_kernels::{Backend, Float};
use moe_model::{LossSum, Objective};
use moe_pipeline::generate::forward_only_over;
use moe_pipeline::{execute, lower, validate};
use moe_topology::Attention;

use super::Plan;
use super::windows::{Packed, padding};
use crate::Result;
use crate::checkpoint::Weights;
use crate::passes::{LoadedRank, Passes};
use crate::trainer::HostBatch;

/// Micro-batches that a rank passes through the pipeline in a row: what they take on the device does not grow with the text.
const IN_A_ROW: usize = 32;

/// This rank's part of the negative log-likelihood of each text; the parts of all ranks sum to the whole. Collective over the
/// world.
pub(super) fn run<T: Float, D: Backend<T>>(
    plan: &Plan,
    weights: &Weights,
    world: &dyn World<D>,
    device: D,
) -> Result<Vec<f64>> {
    let Passes { folding, pipeline, batch, length, .. } = &plan.passes;
    let (rank, dp) = (world.rank(), plan.passes.dp());
    let d = folding.coordinate(rank, Attention::DP);
    let LoadedRank { stages, mut transport, mut cx } =
        LoadedRank::open(&plan.passes, weights, world, device)?;
    let mut sums = Vec::new();
    for text in &plan.texts {
        cx.stats.loss = LossSum::default();
        let micro_batches = text.len().div_ceil(*batch).div_ceil(dp);
        for first in (0..micro_batches).step_by(IN_A_ROW) {
            let count = (micro_batches - first).min(IN_A_ROW);
            cx.batches = (first..first + count)
                .map(|j| {
                    let start = (j * dp + d) * batch;
                    let sequence = |index| {
                        text.get(index)
                            .map_or_else(|| padding(*length), |packed: &Packed| packed.sequence(*length))
                    };
                    let host: Vec<_> = (start..start + batch).map(sequence).collect();
                    let host = HostBatch::new(&host, start as u64, folding, rank)?;
                    host.upload(&cx.device, 1.0, folding, rank)
                })
                .collect::<Result<_>>()?;
            let sequences = count * dp * batch;
            cx.objective = Objective { micro_batches: count * dp, sequences, tokens: sequences * length };
            let schedule = forward_only_over(pipeline.placement(), count as u32)?;
            let program = validate(lower(&schedule)?, None)?;
            execute(&program, folding.stage(rank) as u32, &stages, &mut transport, &mut cx)?;
        }
        // All tensor-parallel ranks have the same.
        sums.push(if folding.coordinate(rank, Attention::TP) == 0 {
            cx.stats.loss.total(&cx.device)?
        } else {
            0.0
        });
    }
    Ok(sums)
}
