//! How a rank runs its layers.

use moe_dispatch::DispatcherKind;

use crate::recompute::RecomputeModules;

/// How a rank runs its layers, the same on all ranks. Nothing of it changes what is computed: no bit, but for the
/// order of sums that the dispatcher chooses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Execution {
    /// How tokens reach their experts.
    pub dispatcher: DispatcherKind,
    /// What backward makes again instead of keeping it.
    pub recompute: RecomputeModules,
    /// Whether shared experts compute while rows are on their way to the experts, forward and backward, instead of when
    /// they are back. In woven passes they compute with the experts, or backward with attention, either way: rows of the other pass are
    /// under way then.
    pub shared_expert_overlap: bool,
}
