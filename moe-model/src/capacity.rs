//! Dropping: which tokens compete for the places of an expert, and where each of them stands.

use moe_dispatch::capacity::{DropPolicy, Spread, drop_excess, expert_capacity, expert_rank_budget};
use moe_dispatch::{RouterSum, Routing, RoutingOn, Shapes};
use moe_kernels::family::DropLimit;
use moe_kernels::{Backend, Device, Element, Float, Tensor, View};
use moe_topology::{Attention, Folding};

use crate::axes::TP_CP;
use crate::context::positions;
use crate::cx::Mode;
use crate::{Cx, Error, Result};

/// A capacity of experts, in training: evaluation drops nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertCapacity {
    /// Multiplies the choices that an expert would get of a unit if all got equally many
    /// (`moe_expert_capacity_factor`).
    pub factor: f64,
    /// Which choices are kept (`moe_token_drop_policy`).
    pub policy: DropPolicy,
    /// The tokens that compete with each other.
    pub unit: DropUnit,
    /// Whether every rank sends so many rows to each expert, choices or not (`moe_pad_expert_input_to_capacity`):
    /// shapes that are known beforehand, and no exchange of counts. Rows without a choice are zeros.
    ///
    /// Where a unit is what a rank holds, the rows are its capacity. Where its tokens are spread over ranks, any of them
    /// may hold all that an expert keeps: then they are the capacity or the rank's tokens, whatever is less.
    pub pad: bool,
}

/// The tokens that compete with each other for the places of an expert: a micro-batch, or the parts into which `tp · cp`
/// ranks would cut it, each with a capacity of its own.
///
/// With the sizes of the folding that trains, a part is what one rank holds, and ranks decide alone (sub-sequence
/// dropping). Any other sizes compute the same under this folding as there, by gathering choices over TP×CP: so
/// dropping never depends on the mapping, but on these numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropUnit {
    /// Parts of consecutive rows of a context-parallel part.
    pub tp: usize,
    /// Parts of two chunks of each sequence, as [`zigzag`](crate::context::zigzag) deals them.
    pub cp: usize,
}

/// The place of a rank among those that hold a micro-batch, and the rows of the micro-batch that it holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Rank and size.
    pub tp: (usize, usize),
    /// Rank and size.
    pub cp: (usize, usize),
}

/// Slots of a rank's tokens.
struct Slots {
    /// One for each row.
    slots: Vec<i32>,
    /// Slots of a unit.
    unit_slots: usize,
    /// Units of which the rank may hold tokens, the same number on all ranks.
    units: usize,
    /// Whether units are spread over ranks.
    spread: bool,
}

impl DropUnit {
    /// A whole micro-batch (full-sequence dropping).
    pub const MICRO_BATCH: Self = DropUnit { tp: 1, cp: 1 };

    /// What one rank of `folding` holds (sub-sequence dropping).
    pub fn of_rank(folding: &Folding) -> Self {
        DropUnit { tp: folding.size(Attention::TP), cp: folding.size(Attention::CP) }
    }

    /// That sequences of `seq_len` tokens can be cut so.
    ///
    /// # Errors
    /// [`Error::Chunks`] or [`Error::DropUnit`] if they cannot.
    pub fn check(self, seq_len: usize) -> Result<()> {
        let DropUnit { tp, cp } = self;
        let chunks = 2 * cp;
        if tp == 0 || cp == 0 || !(seq_len / cp).is_multiple_of(tp) {
            return Err(Error::DropUnit { seq_len, tp, cp });
        }
        match cp > 1 && !seq_len.is_multiple_of(chunks) {
            true => Err(Error::Chunks { seq_len, chunks }),
            false => Ok(()),
        }
    }

    /// The slot of the token at `position` of sequence `b` of `batch`. The slots of a unit follow each other, in the order
    /// of (position, sequence): ranks hold their tokens in this order too, since of a rank's two chunks the first is the
    /// earlier one.
    fn slot(self, position: usize, b: usize, seq_len: usize, batch: usize) -> usize {
        let cp = self.cp;
        let (part, index) = if cp == 1 {
            (0, position)
        } else {
            let len = seq_len / (2 * cp);
            let chunk = position / len;
            let second = if chunk < cp { 0 } else { len };
            (chunk.min(2 * cp - 1 - chunk), second + position % len)
        };
        (part * (seq_len / cp) + index) * batch + b
    }
}

impl Place {
    /// Of a rank of a folding.
    pub fn of(folding: &Folding, rank: usize) -> Self {
        let along = |axes| (folding.coordinate(rank, axes), folding.size(axes));
        Place { tp: along(Attention::TP), cp: along(Attention::CP) }
    }

    /// Of the numbers of all tokens of a context-parallel rank, `[1, n]`, those of the `rows` that this rank routes.
    pub fn own<E: Element, D: Device>(self, all: &Tensor<E, D>, rows: usize) -> Result<View<'_, E, D>> {
        let first = self.tp.0 * rows;
        Ok(all.view().columns(first..first + rows)?)
    }

    /// A routing without the choices beyond the capacity of the context; how many were dropped, the statistics of `layer` count.
    /// Evaluation drops nothing.
    pub fn drop_excess<T: Float, D: Backend<T>>(
        self,
        m: u32,
        layer: usize,
        routing: RoutingOn<T, D>,
        num_experts: usize,
        cx: &mut Cx<T, D>,
    ) -> Result<RoutingOn<T, D>> {
        let Some(ExpertCapacity { factor, policy, unit, pad }) =
            cx.capacity.filter(|_| cx.mode != Mode::Evaluate)
        else {
            return Ok(routing);
        };
        let Slots { slots, unit_slots, units, spread } =
            self.slots(unit, routing.tokens, cx.batch(m)?.batch)?;
        let slots = Tensor::from_slice(&cx.device, 1, slots.len(), &slots)?;
        let capacity = expert_capacity(factor, unit_slots, routing.top_k, num_experts)?;
        let limit = DropLimit { num_experts, unit_slots, capacity };
        // Not `Cx::group`, which would hold the statistics too.
        let group = cx.comms.group(TP_CP)?;
        let tokens = vec![routing.tokens; group.size()];
        let spread = spread.then_some(Spread { group, tokens: &tokens });
        let mut sums = cx.stats.moe.of(layer)?;
        let dropped = sums.as_mut().map(RouterSum::dropped).transpose()?;
        let mut routing = drop_excess::<T, D>(&cx.device, routing, policy, &slots, limit, spread, dropped)?;
        if pad {
            routing.shapes = Shapes::PerExpert((capacity * units).min(routing.tokens));
        }
        Ok(routing)
    }

    /// The slots of this rank's `rows` rows of a micro-batch of `batch` sequences.
    fn slots(self, unit: DropUnit, rows: usize, batch: usize) -> Result<Slots> {
        let ((tp_rank, tp), (cp_rank, cp)) = (self.tp, self.cp);
        if unit == (DropUnit { tp, cp }) {
            return Ok(Slots {
                slots: (0..rows as i32).collect(),
                unit_slots: rows,
                units: 1,
                spread: false,
            });
        }
        let seq_len = rows * tp * cp / batch.max(1);
        unit.check(seq_len)?;
        let of_position = |p| (0..batch).map(move |b| unit.slot(p, b, seq_len, batch) as i32);
        let slots = positions(seq_len, cp, cp_rank)?.flat_map(of_position).skip(tp_rank * rows).take(rows);
        let units = unit.tp * unit.cp;
        let unit_slots = seq_len * batch / units;
        Ok(Slots { slots: slots.collect(), unit_slots, units, spread: tp * cp > 1 })
    }
}

/// A routing whose rows are bounded by the context's budget of expert ranks, which share an expert among `etp`. Evaluation
/// has none, and neither have shapes that are fixed already.
pub(crate) fn within_budget<T: Float, D: Backend<T>>(
    routing: RoutingOn<T, D>,
    etp: usize,
    cx: &Cx<T, D>,
) -> Result<RoutingOn<T, D>> {
    Ok(match (cx.expert_rank_capacity, cx.mode, routing.shapes) {
        (Some(factor), Mode::Train { .. }, Shapes::Exact) => {
            let budget = expert_rank_budget(factor, routing.tokens, routing.top_k, etp)?;
            Routing { shapes: Shapes::PerRank(budget), ..routing }
        }
        _ => routing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens as (position, sequence) of every rank, dealt from the definition.
    fn dealt(seq_len: usize, batch: usize, tp: usize, cp: usize) -> Vec<Vec<(usize, usize)>> {
        let chunks: Vec<Vec<usize>> = match cp {
            1 => vec![(0..seq_len).collect(), vec![]],
            _ => (0..seq_len).collect::<Vec<_>>().chunks(seq_len / (2 * cp)).map(<[_]>::to_vec).collect(),
        };
        let mut ranks = Vec::new();
        for c in 0..cp {
            let mut rows = Vec::new();
            for &position in chunks[c].iter().chain(&chunks[2 * cp - 1 - c]) {
                rows.extend((0..batch).map(|b| (position, b)));
            }
            ranks.extend(rows.chunks(rows.len() / tp).map(<[_]>::to_vec));
        }
        ranks
    }

    #[test]
    fn units_are_what_ranks_of_their_sizes_hold_whoever_asks() {
        let (seq_len, batch) = (24, 2);
        for (tp, cp) in [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (4, 3), (2, 6)] {
            let unit = DropUnit { tp, cp };
            let units = dealt(seq_len, batch, tp, cp);
            for (own_tp, own_cp) in [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3)] {
                let mut seen = vec![None; seq_len * batch];
                let ranks = dealt(seq_len, batch, own_tp, own_cp);
                for (rank, tokens) in ranks.into_iter().enumerate() {
                    let place = Place { tp: (rank % own_tp, own_tp), cp: (rank / own_tp, own_cp) };
                    let Slots { slots, unit_slots, spread, .. } =
                        place.slots(unit, tokens.len(), batch).unwrap();
                    assert_eq!(unit_slots, seq_len * batch / (tp * cp));
                    if (tp, cp) == (own_tp, own_cp) {
                        assert!(!spread && slots == (0..tokens.len() as i32).collect::<Vec<_>>());
                        continue;
                    }
                    assert_eq!(spread, own_tp * own_cp > 1);
                    for (token, slot) in tokens.into_iter().zip(slots) {
                        assert_eq!(seen[slot as usize].replace(token), None);
                    }
                }
                if (tp, cp) != (own_tp, own_cp) {
                    let seen: Vec<_> = seen.into_iter().map(Option::unwrap).collect();
                    for (unit, tokens) in seen.chunks(seq_len * batch / (tp * cp)).zip(&units) {
                        assert_eq!(unit, tokens);
                        assert!(unit.is_sorted(), "in the order of (position, sequence)");
                    }
                }
            }
        }
    }

    #[test]
    fn sequences_that_cannot_be_cut_are_refused() {
        let refused = |tp, cp| DropUnit { tp, cp }.check(12).unwrap_err().to_string();
        assert_eq!(
            refused(5, 1),
            "sequences of 12 tokens cannot be cut into drop units of tp = 5 and cp = 1: give sizes for which \
             (12/cp) % tp = 0"
        );
        assert!(refused(0, 1).starts_with("sequences of 12 tokens cannot be cut"));
        assert!(refused(1, 4).starts_with("a sequence of 12 tokens is not 8 (2·cp) equal chunks"));
        DropUnit { tp: 3, cp: 2 }.check(12).unwrap();
    }
}
