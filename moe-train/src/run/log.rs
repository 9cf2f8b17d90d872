//! What a run says about itself: `metrics.jsonl`, TensorBoard, and the terminal.

use std::io::{IsTerminal, Stdout};

use super::RunFolder;
use crate::Result;
use crate::config::RunConfig;
use crate::data::BatchSizes;
use crate::durable::Context;
use crate::metrics::{EvalRecord, EventFile, JsonLines, Progress, SetLoss, StepRecord, Utilisation};
use crate::trainer::{SkippedSteps, StepReport};

/// Writes on one rank what all ranks measured.
pub(super) struct Log {
    lines: JsonLines,
    events: EventFile,
    progress: Progress<Stdout>,
    batch_sizes: BatchSizes,
    sequence_length: u64,
    utilisation: Utilisation,
}

impl Log {
    /// For a run that starts, or goes on after step `resumed`, on devices of `peak_tflops`.
    pub fn open(
        config: &RunConfig,
        folder: &RunFolder,
        resumed: Option<u64>,
        peak_tflops: Option<f64>,
    ) -> Result<Self> {
        let lines = match resumed {
            None => JsonLines::create(&folder.metrics())?,
            Some(step) => JsonLines::resume(&folder.metrics(), step)?,
        };
        let events = EventFile::create(&folder.tensorboard(), resumed.unwrap_or(0) + 1)?;
        let (train, batch_sizes) = (&config.train, config.train.batch_sizes()?);
        let sequence_length = train.sequence_length as u64;
        let tokens = batch_sizes.cursor(train.steps + 1).saturating_mul(sequence_length);
        let out = std::io::stdout();
        let terminal = out.is_terminal();
        let progress = Progress::new(out, terminal, train.steps, tokens, train.log_interval);
        let ranks = config.parallel.world_size;
        let utilisation = Utilisation::new(&config.model, train.sequence_length, ranks, peak_tflops);
        Ok(Log { lines, events, progress, batch_sizes, sequence_length, utilisation })
    }

    /// A step that took `seconds`, the bytes of a GPU that were taken so far, the steps that were skipped so far, and the tokens of
    /// each dataset of a blend.
    pub fn step(
        &mut self,
        report: &StepReport,
        seconds: f64,
        peak_memory_bytes: Option<u64>,
        skipped: SkippedSteps,
        blend_tokens: Vec<u64>,
    ) -> Result<()> {
        let tokens_of_step = self.batch_sizes.of_step(report.step) as u64 * self.sequence_length;
        let tokens_per_second = tokens_of_step as f64 / seconds;
        let record = StepRecord {
            step: report.step,
            loss: report.loss,
            total_loss: report.total_loss,
            grad_norm: report.grad_norm.is_finite().then_some(report.grad_norm),
            lr: report.lr,
            tokens: self.batch_sizes.cursor(report.step + 1) * self.sequence_length,
            blend_tokens,
            tokens_per_second,
            tflops_per_rank: self.utilisation.tflops_per_rank(tokens_per_second),
            mfu: self.utilisation.mfu(tokens_per_second),
            peak_memory_bytes,
            aux_loss: report.aux_loss,
            sequence_aux_loss: report.sequence_aux_loss,
            global_aux_loss: report.global_aux_loss,
            z_loss: report.z_loss,
            dropped_tokens: report.dropped_tokens,
            reruns: report.reruns,
            skipped_steps: skipped.total,
            expert_load: report.expert_load.clone(),
            moe_layers: report.moe_layers.clone(),
        };
        self.lines.write(&record)?;
        self.events.step(&record)?;
        self.progress.step(&record).context("write", "standard output".as_ref())?;
        let step = report.step;
        match (report.updated, report.is_finite()) {
            (true, _) => Ok(()),
            (false, true) => self.note(&format!("step {step}: no token counts: no update")),
            (false, false) => {
                self.note(&format!("step {step}: the loss or the gradient is not finite: no update"))
            }
        }
    }

    /// An evaluation. One that was written before the run was resumed is not written again.
    pub fn eval(&mut self, record: &EvalRecord) -> Result<()> {
        if self.lines.evaluated() != Some(record.step) {
            self.lines.write(record)?;
            self.events.eval(record)?;
        }
        let EvalRecord { step, val_loss, val_losses } = record;
        for SetLoss { path, loss } in val_losses {
            self.note(&format!("step {step}: validation loss {loss:.4} on {path}"))?;
        }
        self.note(&format!("step {step}: validation loss {val_loss:.4}"))
    }

    /// A line that stays.
    pub fn note(&mut self, text: &str) -> Result<()> {
        Ok(self.progress.note(text).context("write", "standard output".as_ref())?)
    }

    /// Returns when all lines of metrics are on the disk.
    pub fn sync(&self) -> Result<()> {
        Ok(self.lines.sync()?)
    }

    /// Leaves the live line.
    pub fn end(&mut self) -> Result<()> {
        Ok(self.progress.end().context("write", "standard output".as_ref())?)
    }
}
