//! What a run measures: one JSON line and one set of TensorBoard scalars per step, and a line for people.

mod jsonl;
mod progress;
mod record;
mod tensorboard;
mod utilisation;

pub use jsonl::{JsonLines, MetricsError};
pub use progress::Progress;
pub(crate) use progress::{duration, short};
pub use record::{EvalRecord, SetLoss, StepRecord};
pub use tensorboard::EventFile;
pub use utilisation::{Utilisation, peak_bf16_tflops};
