//! Training steps on one rank, over any communicators and device.

mod rank;
mod report;
mod setup;
mod skipped;
mod source;
mod trace;

pub use rank::RankTrainer;
pub use report::{MoeLayerReport, StepReport};
pub use setup::Setup;
pub use skipped::SkippedSteps;
pub(crate) use source::HostBatch;
pub use source::{BatchSource, Sequence};
pub use trace::{check_recorded, recorded_step};
