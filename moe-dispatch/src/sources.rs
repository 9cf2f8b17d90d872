//! What a rank has to send, before a dispatcher decides how.

use crate::plan::Counts;
use crate::{Error, Fabric, Routing, Shapes, Sorted, SortedRows};

/// A rank's own choices, and the numbers of rows of its group.
pub(crate) struct Sources<I> {
    /// The chosen experts; all −1 if they overflowed.
    pub experts: I,
    /// The own choices by expert.
    pub sorted: Sorted<I>,
    /// Absent in a group of one rank, whose rows are the sorted ones.
    pub counts: Option<Counts>,
    /// Rows that experts of this rank get.
    pub rows: SortedRows,
    /// Whether a budget was too small.
    pub overflowed: bool,
}

impl<I> Sources<I> {
    /// Sorts the choices and exchanges counts, unless these are fixed.
    pub fn plan<F: Fabric<Index = I>>(
        fabric: &F,
        num_experts: usize,
        routing: &Routing<I, F::Weights>,
    ) -> Result<Self, F::Error>
    where
        I: Clone,
    {
        let &Routing { ref experts, tokens, top_k, shapes, .. } = routing;
        let (grid, choices) = (fabric.grid(), fabric.index_len(experts));
        if tokens.checked_mul(top_k) != Some(choices) {
            return Err(Error::Routing { choices, tokens, top_k }.into());
        }
        let own = match shapes {
            Shapes::Exact | Shapes::PerRank(_) => SortedRows::Packed(choices),
            Shapes::PerExpert(rows) => SortedRows::PerExpert(rows),
        };
        let sort =
            |experts: &I, rows| fabric.sort_by_expert(experts, top_k, num_experts, 0..num_experts, rows);
        let experts = experts.clone();
        let sorted = sort(&experts, own)?;
        let counts = match (grid.size(), shapes) {
            (1, _) => None,
            (_, Shapes::PerExpert(rows)) => Some(Counts::uniform(grid, num_experts, rows, tokens)?),
            (_, Shapes::Exact | Shapes::PerRank(_)) => {
                let exchanged = fabric.exchange_counts(&sorted.offsets, tokens)?;
                Some(Counts::from_exchange(grid, num_experts, &exchanged)?)
            }
        };
        // A rank alone does not read its counts: its rows are as many as its choices.
        let all_choices =
            counts.as_ref().map_or(choices, |counts| counts.tokens().iter().sum::<usize>() * top_k);
        let received = || counts.as_ref().map_or(choices, Counts::most_received);
        let (rows, overflowed) = match shapes {
            Shapes::Exact => {
                let rows = counts.as_ref().map_or(choices, |counts| counts.expert_rows().iter().sum());
                (SortedRows::Packed(rows), false)
            }
            Shapes::PerExpert(rows) => (SortedRows::PerExpert(rows.saturating_mul(grid.size())), false),
            Shapes::PerRank(budget) => (SortedRows::Packed(budget.min(all_choices)), received() > budget),
        };
        if !overflowed {
            return Ok(Sources { experts, sorted, counts, rows, overflowed });
        }
        let experts = fabric.index(&vec![-1; choices])?;
        let sorted = sort(&experts, if counts.is_some() { own } else { rows })?;
        Ok(Sources { experts, sorted, counts: counts.map(Counts::without_rows), rows, overflowed })
    }
}
