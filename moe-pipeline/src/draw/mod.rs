//! Pictures of a [`Timeline`](crate::Timeline).

mod svg;
mod terminal;
mod trace;
