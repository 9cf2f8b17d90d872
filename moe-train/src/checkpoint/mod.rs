//! Checkpoints: complete or absent, checked end to end, independent of the mapping that wrote them.
//!
//! [`container`] is the format on disk; [`save`] and [`restore`] move a rank's state to it and back. State is kept by logical
//! tensor under its hub name (one per expert), never by rank or bucket, so that any folding reads what another one wrote.

pub mod container;
mod export;
mod hub;
mod import;
mod meta;
mod state;
pub mod upcycle;
mod weights;

pub use export::{ExportOptions, export};
pub(crate) use hub::copy_side_files;
pub use hub::{is_hub_folder, open_hub, read_config};
pub use import::import;
pub use meta::{HubOrigin, Meta, RunState};
pub(crate) use state::{publish, read_params};
pub use state::{restore, restore_weights, save};
pub use upcycle::upcycle;
pub use weights::Weights;
