//! The process groups of Megatron-Core's `parallel_state.py`, by its names and in its orders.

use crate::{Attention, Axes, Expert, Folding, Group, View};

/// Groups as lists of ranks, as Megatron-Core hands them to `new_group`.
pub type Lists = Vec<Vec<usize>>;

/// All twenty named groups of a folding: the name, the lists of ranks, each made when the iterator reaches it.
///
/// Lists and ranks within them stand in Megatron's order, which is ascending but for three cases: groups that are cut
/// into optimizer instances ([`Mapping::optimizer_instances`](crate::Mapping::optimizer_instances)) stand together
/// (`intra_*`, `inter_dist_opt`), and `intra_dist_opt` chains whole `tp_ep_pp` groups. With instances and an order that
/// has `dp` before `cp`, `intra_dp_cp` is not Megatron's: that cuts through context-parallel groups.
///
/// ```
/// use moe_topology::{Folding, Mapping, megatron};
///
/// let folding = Folding::new(Mapping { world_size: 8, tp: 2, ep: 8, ..Mapping::default() })?;
/// let (name, lists) = megatron::groups(&folding).next().unwrap();
/// assert_eq!(name, "tp");
/// assert_eq!(lists, [[0, 1], [2, 3], [4, 5], [6, 7]]);
/// # Ok::<(), moe_topology::Error>(())
/// ```
pub fn groups(folding: &Folding) -> impl Iterator<Item = (&'static str, Lists)> {
    TABLE.iter().map(|(name, lists)| (*name, lists(folding)))
}

type Named = (&'static str, fn(&Folding) -> Lists);

const TABLE: [Named; 20] = [
    ("tp", |f| all(f, Attention::TP)),
    ("cp", |f| all(f, Attention::CP)),
    ("dp", |f| all(f, Attention::DP)),
    ("pp", |f| all(f, Attention::PP)),
    ("dp_cp", |f| all(f, DP_CP)),
    ("tp_cp", |f| all(f, Attention::TP | Attention::CP)),
    ("tp_dp", |f| all(f, Attention::TP | Attention::DP)),
    ("tp_dp_cp", |f| all(f, Attention::TP | DP_CP)),
    ("mp", |f| all(f, Attention::TP | Attention::PP)),
    ("embd", |f| of_pipelines(f, |pp| pp.iter().step_by((pp.len() - 1).max(1)).collect())),
    ("pos_embd", |f| of_pipelines(f, |pp| vec![pp.get(0)])),
    ("ep", |f| all(f, Expert::EP)),
    ("expt_tp", |f| all(f, Expert::ETP)),
    ("tp_ep", |f| all(f, Expert::ETP | Expert::EP)),
    ("tp_ep_pp", |f| all(f, TP_EP_PP)),
    ("expt_dp", |f| all(f, Expert::EDP)),
    ("intra_dp_cp", |f| cut(f, DP_CP, DP_CP.minus(Attention::DP_OUTER))),
    ("intra_expt_dp", |f| cut(f, Expert::EDP, Expert::EDP_INNER)),
    ("inter_dist_opt", |f| cut(f, Expert::EDP, Expert::EDP_OUTER)),
    ("intra_dist_opt", |f| {
        let instances = f.groups(Expert::ALL.minus(Expert::EDP_OUTER));
        instances.map(|instance| f.groups_within(instance, TP_EP_PP).flatten().collect()).collect()
    }),
];

const DP_CP: Axes<Attention> = Attention::DP.union(Attention::CP);
const TP_EP_PP: Axes<Expert> = Expert::ETP.union(Expert::EP).union(Expert::PP);

fn all<V: View>(folding: &Folding, axes: Axes<V>) -> Lists {
    folding.groups(axes).map(|group| group.iter().collect()).collect()
}

/// The groups over `axes`, each cut into its groups over `part`.
fn cut<V: View>(folding: &Folding, axes: Axes<V>, part: Axes<V>) -> Lists {
    let cut = |group| folding.groups_within(group, part).map(|part| part.iter().collect());
    folding.groups(axes).flat_map(cut).collect()
}

/// Of each pipeline some ranks: the first and the last stage hold the tied embedding.
fn of_pipelines(folding: &Folding, some: fn(Group<Attention>) -> Vec<usize>) -> Lists {
    folding.groups(Attention::PP).map(some).collect()
}
