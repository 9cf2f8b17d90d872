//! Checkpoints that do not depend on the mapping that wrote them.

pub mod container;
