//! The sets of axes that a decoder's placements and collectives use.

use moe_comm::{Comms, CommsBuilder};
use moe_kernels::Device;
use moe_topology::{Attention, Axes, Expert};

/// Ranks that see different tokens of a batch with the same weights sharded over TP: the gradient of a weight that is
/// sharded over TP is partial over these.
pub const CP_DP: Axes<Attention> = Attention::CP.union(Attention::DP);

/// All ranks of a stage. Under sequence parallelism each holds its own tokens, so the gradient of a weight that all of
/// them hold is partial over these.
pub const TP_CP_DP: Axes<Attention> = Attention::TP.union(CP_DP);

/// Ranks that hold the tokens of one micro-batch: the unit of the load-balancing loss.
pub const TP_CP: Axes<Attention> = Attention::TP.union(Attention::CP);

/// Ranks that hold one KV head when TP exceeds the KV heads, and those with other tokens.
pub const SHARED_KV: Axes<Attention> = Attention::TP_INNER.union(CP_DP);

/// Ranks among which the tokens of a dispatch move.
pub const ETP_EP: Axes<Expert> = Expert::ETP.union(Expert::EP);

/// The attention groups of several instances of the distributed optimizer: those that one instance cuts its state over, and
/// the ranks that hold the same of it.
pub const INSTANCE_GROUPS: [Axes<Attention>; 4] = [
    CP_DP.minus(Attention::DP_OUTER),
    TP_CP_DP.minus(Attention::DP_OUTER),
    SHARED_KV.minus(Attention::DP_OUTER),
    Attention::DP_OUTER,
];

/// The same of the experts.
pub const EXPERT_INSTANCE_GROUPS: [Axes<Expert>; 2] = [Expert::EDP_INNER, Expert::EDP_OUTER];

/// The attention groups that layers and reductions call.
pub const ATTENTION_GROUPS: [Axes<Attention>; 7] =
    [Attention::TP, Attention::CP_INNER, Attention::CP_OUTER, TP_CP, CP_DP, TP_CP_DP, SHARED_KV];

/// The expert groups that layers and reductions call.
pub const EXPERT_GROUPS: [Axes<Expert>; 4] = [Expert::EP, Expert::ETP, ETP_EP, Expert::EDP];

/// The communicators of these groups, to be built or added to.
pub fn communicators<D: Device>() -> CommsBuilder<D> {
    let builder = ATTENTION_GROUPS.into_iter().fold(Comms::builder(), CommsBuilder::attention);
    EXPERT_GROUPS.into_iter().fold(builder, CommsBuilder::expert)
}
