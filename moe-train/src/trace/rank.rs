//! What one rank computes of a trace.

use std::collections::BTreeMap;
use std::ops::Range;

use moe_comm::World;
use moe_dispatch::ModelUnit;
use moe_kernels::{Backend, Float, Tensor};
use moe_model::context::positions;
use moe_model::params::Part;
use moe_model::{Cx, Objective};
use moe_pipeline::generate::forward_only_over;
use moe_pipeline::{Action, Kind, Pass, Placement, Schedule, execute, lower, validate};
use moe_topology::Attention;

use super::Plan;
use crate::checkpoint::Weights;
use crate::optim::{reduce_gradients, sliced_parts};
use crate::passes::{LoadedRank, Passes};
use crate::trainer::HostBatch;
use crate::{Error, Result};

/// What a rank has of a trace. The parts of all ranks together are the whole, and each is there once.
#[derive(Debug)]
pub(super) struct RankTrace<T> {
    /// On the last stage.
    pub logits: Option<LogitsBlock<T>>,
    /// Sum of the cross-entropy over tokens.
    pub loss: f64,
    /// Choices of each expert that the load-balancing loss counts, over layers and tokens.
    pub choices: Vec<i64>,
    /// Shares of the scores of each expert, over layers and tokens.
    pub prob_sums: Vec<f64>,
    /// Of the gradients.
    pub grads: Vec<Piece<T>>,
}

/// A rank's block of the logits, `[positions · sequences, vocab block]`.
#[derive(Debug)]
pub(super) struct LogitsBlock<T> {
    /// Which positions of the padded sequences, in order.
    pub positions: Vec<usize>,
    /// Which sequences of the padded batch.
    pub sequences: Range<usize>,
    /// Which tokens of the vocabulary.
    pub vocab: Range<usize>,
    pub values: Vec<T>,
}

/// Elements `range` of the block of a logical tensor.
#[derive(Debug)]
pub(super) struct Piece<T> {
    pub part: Part,
    pub range: Range<usize>,
    pub values: Vec<T>,
}

/// Computes the part of this rank. Collective over the world.
pub(super) fn run<T: Float<Acc = T>, D: Backend<T>>(
    plan: &Plan,
    weights: &Weights,
    world: &dyn World<D>,
    device: D,
) -> Result<RankTrace<T>> {
    let Passes { folding, pipeline, batch, length, .. } = &plan.passes;
    let (rank, dp) = (world.rank(), plan.passes.dp());
    let LoadedRank { stages, mut transport, mut cx } =
        LoadedRank::open(&plan.passes, weights, world, device)?;
    cx.objective = Objective {
        micro_batches: dp,
        sequences: dp * batch,
        tokens: plan.tokens.batch * plan.tokens.length,
    };
    cx.model_unit = ModelUnit::Step;
    cx.logits = Some(BTreeMap::new());
    let d = folding.coordinate(rank, Attention::DP);
    let sequences = d * batch..(d + 1) * batch;
    let host: Vec<_> = sequences.clone().map(|index| plan.tokens.sequence(index, *length)).collect();
    let host = HostBatch::new(&host, sequences.start as u64, folding, rank)?;
    cx.batches = vec![host.upload(&cx.device, plan.targets() as f64, folding, rank)?];

    let schedule = match plan.grads {
        true => there_and_back(pipeline.placement())?,
        false => forward_only_over(pipeline.placement(), 1)?,
    };
    let program = validate(lower(&schedule)?, None)?;
    let pipeline_rank = folding.stage(rank) as u32;
    if plan.grads {
        cx.params.zero_grads(true);
    }
    execute(&program, pipeline_rank, &stages, &mut transport, &mut cx)?;
    let grads = if plan.grads { gradients(&mut cx)? } else { Vec::new() };

    let experts = plan.passes.model.num_local_experts;
    let mut traced = RankTrace {
        logits: None,
        // All tensor-parallel ranks have the same.
        loss: if folding.coordinate(rank, Attention::TP) == 0 {
            cx.stats.loss.total(&cx.device)?
        } else {
            0.0
        },
        choices: vec![0; experts],
        prob_sums: vec![0.0; experts],
        grads,
    };
    for stats in cx.stats.moe.read(&cx.device)?.into_values() {
        traced.choices.iter_mut().zip(&stats.plain_counts).for_each(|(sum, n)| *sum += n);
        traced.prob_sums.iter_mut().zip(&stats.prob_sums).for_each(|(sum, p)| *sum += p);
    }
    if let Some(logits) = cx.logits.take().and_then(|logits| logits.into_values().next()) {
        let cp = (folding.size(Attention::CP), folding.coordinate(rank, Attention::CP));
        traced.logits = Some(LogitsBlock {
            positions: positions(*length, cp.0, cp.1)?.collect(),
            sequences,
            vocab: vocabulary_block(&cx)?,
            values: logits.to_vec(&cx.device)?,
        });
    }
    Ok(traced)
}

/// One micro-batch forward through all stages, then backward.
fn there_and_back(placement: &Placement) -> Result<Schedule> {
    let list = |rank| {
        let own = placement.stages_of(rank).iter();
        let forward = own.clone().map(|&stage| Action::new(stage, Kind::Forward, 0));
        forward.chain(own.rev().map(|&stage| Action::new(stage, Kind::Backward, 0))).collect()
    };
    let lists = (0..placement.ranks()).map(list).collect();
    Ok(Schedule::new(placement.clone(), 1, Pass::ForwardBackward, lists)?)
}

/// This rank's slices of the gradients, of what several ranks hold on one of them. Collective.
fn gradients<T: Float<Acc = T>, D: Backend<T>>(cx: &mut Cx<T, D>) -> Result<Vec<Piece<T>>> {
    let slices: Vec<Tensor<T, D>> = reduce_gradients(cx)?;
    let mut pieces = Vec::new();
    for (bucket, slice) in cx.params.buckets().iter().zip(slices) {
        let values = slice.to_vec(&cx.device)?;
        for (part, range) in sliced_parts(bucket).filter(|(part, _)| part.counts) {
            let own = range.start - bucket.slice.start..range.end - bucket.slice.start;
            pieces.push(Piece {
                part: part.clone(),
                range: range.start - part.offset..range.end - part.offset,
                values: values[own].to_vec(),
            });
        }
    }
    Ok(pieces)
}

/// The tokens whose logits a rank of the last stage computes: its rows of the head's matrix.
fn vocabulary_block<T: Float, D: Backend<T>>(cx: &Cx<T, D>) -> Result<Range<usize>> {
    let parts = || cx.params.buckets().iter().flat_map(|bucket| &bucket.parts);
    let named = |name| parts().find(move |part| part.name == name);
    // A tied head has the name of the embedding.
    let head = named("lm_head.weight").or_else(|| named("model.embed_tokens.weight"));
    Ok(head.ok_or(Error::Protocol { what: "a last stage without a head" })?.rows.clone())
}
