//! The loop that every rank runs.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use moe_comm::{Reduction, World};
use moe_kernels::{Backend, Float};
use moe_topology::Attention;

use super::log::Log;
use super::ranks::Job;
use super::{HeldOut, RunFolder, TokenSource};
use crate::Result;
use crate::checkpoint::container::{Checkpoint, prune, step_folder};
use crate::checkpoint::{HubOrigin, Meta, RunState, Weights, restore, restore_weights, save};
use crate::config::RunConfig;
use crate::metrics::{EvalRecord, SetLoss};
use crate::trainer::{RankTrainer, Setup, SkippedSteps};

/// A run, the same on all ranks.
pub(super) struct Plan {
    pub setup: Setup,
    pub config: RunConfig,
    pub folder: RunFolder,
    pub train: Arc<TokenSource>,
    pub held_out: Arc<Vec<HeldOut>>,
    /// Where to go on from.
    pub checkpoint: Option<PathBuf>,
    /// Whose weights to start from, otherwise.
    pub init: Option<Arc<Weights>>,
    /// The folder of the hub that either came from.
    pub hub: Option<HubOrigin>,
    /// That of a rank's device, where it is known.
    pub peak_tflops: Option<f64>,
    /// Whether that is a GPU, whose memory is worth a metric.
    pub on_gpu: bool,
    pub interrupted: Arc<AtomicBool>,
}

/// What a run came to, the same on all ranks but for their memory.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub step: u64,
    pub val_loss: Option<f64>,
    /// The most that was taken of a GPU.
    pub peak_memory_bytes: Option<u64>,
    /// None if the run saves nothing.
    pub checkpoint: Option<PathBuf>,
    pub end: End,
}

/// Why it ended.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    /// After the last step.
    Complete,
    /// Someone asked.
    Interrupted,
    /// The loss or gradient of the next step was not finite, after `skipped` others in a row.
    NonFinite { skipped: u64 },
}

impl Job for Plan {
    type Outcome = Outcome;

    fn run<T: Float, D: Backend<T>>(&self, world: &dyn World<D>, device: D) -> Result<Outcome> {
        run(self, world, device)
    }
}

/// Trains on one rank until the last step or an interruption, then saves.
fn run<T: Float, D: Backend<T>>(plan: &Plan, world: &dyn World<D>, device: D) -> Result<Outcome> {
    let given = plan.checkpoint.is_some() || plan.init.is_some();
    let make = if given { RankTrainer::<T, D>::zeros } else { RankTrainer::new };
    let mut trainer = make(plan.setup.clone(), world, device)?;
    let (mut step, mut skipped) = match (&plan.checkpoint, &plan.init) {
        (Some(path), _) => {
            let checkpoint = Checkpoint::open(path)?;
            let run = restore(&mut trainer, &checkpoint)?;
            (checkpoint.step(), run.skipped)
        }
        (None, Some(weights)) => {
            restore_weights(&mut trainer, weights)?;
            (0, SkippedSteps::default())
        }
        (None, None) => (0, SkippedSteps::default()),
    };
    let mut saved = plan.checkpoint.is_some().then_some(step);
    let mut evaluated = None;
    let mut log = (world.rank() == 0)
        .then(|| Log::open(&plan.config, &plan.folder, saved, plan.peak_tflops))
        .transpose()?;
    let (last, eval_interval, save_interval) =
        (plan.config.train.steps, plan.config.train.eval_interval, plan.config.train.save_interval);
    let due = |interval: u64, step: u64| interval > 0 && step.is_multiple_of(interval);

    let mut end = End::Complete;
    while step < last && matches!(end, End::Complete) {
        let start = Instant::now();
        let report = trainer.step(step + 1, &*plan.train)?;
        let seconds = start.elapsed().as_secs_f64();
        let go_on = skipped.count(&report, plan.config.train.non_finite_limit());
        if let Some(log) = &mut log {
            let tokens = plan.train.tokens_after(step + 1);
            log.step(&report, seconds, peak_memory_bytes(&trainer, plan), skipped, tokens)?;
        }
        if !go_on {
            // What is saved below is the state before the step, so that a resume makes it again.
            end = End::NonFinite { skipped: skipped.in_a_row };
            break;
        }
        step += 1;
        if agreed(&trainer, plan.interrupted.load(Ordering::Relaxed))? {
            end = End::Interrupted;
        }
        if due(eval_interval, step) && step < last {
            evaluated = Some(step);
            evaluate(&mut trainer, plan, step, &mut log)?;
        }
        if due(save_interval, step) && step < last && matches!(end, End::Complete) {
            write(&trainer, plan, step, skipped, &log)?;
            saved = Some(step);
        }
    }

    let val_loss = match end {
        End::Complete if evaluated != Some(step) => evaluate(&mut trainer, plan, step, &mut log)?,
        _ => None,
    };
    let saves = plan.config.train.keep_checkpoints > 0;
    if saves && saved != Some(step) {
        write(&trainer, plan, step, skipped, &log)?;
    }
    if let Some(log) = &mut log {
        log.end()?;
    }
    let checkpoint = saves.then(|| step_folder(&plan.folder.checkpoints(), step));
    Ok(Outcome { step, val_loss, peak_memory_bytes: peak_memory_bytes(&trainer, plan), checkpoint, end })
}

/// The most bytes that were live so far, on a GPU.
fn peak_memory_bytes<T: Float, D: Backend<T>>(trainer: &RankTrainer<T, D>, plan: &Plan) -> Option<u64> {
    plan.on_gpu.then(|| trainer.cx().device.memory().peak as u64)
}

/// Whether any rank says so. Collective.
fn agreed<T: Float, D: Backend<T>>(trainer: &RankTrainer<T, D>, own: bool) -> Result<bool> {
    let world = trainer.cx().comms.group(Attention::ALL)?;
    Ok(world.all_reduce_host(&[i32::from(own)], Reduction::Max)?[0] > 0)
}

fn evaluate<T: Float, D: Backend<T>>(
    trainer: &mut RankTrainer<T, D>,
    plan: &Plan,
    step: u64,
    log: &mut Option<Log>,
) -> Result<Option<f64>> {
    let mut losses = Vec::new();
    for set in &*plan.held_out {
        if let Some(loss) = trainer.evaluate(set.micro_batches(), |u| set.micro_batch(u))? {
            losses.push(SetLoss { path: set.path().display().to_string(), loss });
        }
    }
    let record = EvalRecord::new(step, losses);
    if let (Some(log), Some(record)) = (log, &record) {
        log.eval(record)?;
    }
    Ok(record.map(|record| record.val_loss))
}

fn write<T: Float, D: Backend<T>>(
    trainer: &RankTrainer<T, D>,
    plan: &Plan,
    step: u64,
    skipped: SkippedSteps,
    log: &Option<Log>,
) -> Result<()> {
    // A checkpoint that survives a crash of the machine has the lines of its steps.
    if let Some(log) = log {
        log.sync()?;
    }
    let run = RunState {
        updates: trainer.optimizer().updates(),
        skipped,
        cursor: plan.train.cursor_after(step),
        blend_samples: plan.train.lengths(),
        config: plan.config.clone(),
    };
    let meta = Meta::of_run(run, plan.hub.clone());
    let root = plan.folder.checkpoints();
    save(trainer, &root, step, &meta)?;
    if trainer.rank() == 0 {
        prune(&root, plan.config.train.keep_checkpoints)?;
    }
    Ok(())
}
