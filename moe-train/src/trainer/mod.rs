//! Training steps on one rank, over any communicators and device.

mod rank;
mod report;
mod setup;
mod skipped;
mod source;

pub use rank::RankTrainer;
pub use report::StepReport;
pub use setup::Setup;
pub use skipped::SkippedSteps;
pub use source::{BatchSource, Sequence};
