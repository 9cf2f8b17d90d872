use std::ops::Range;

use crate::{Error, Grid};

/// How many rows each rank of an EP×ETP group has for each expert, and how many tokens it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    grid: Grid,
    local: Range<usize>,
    num_experts: usize,
    /// `[position, expert]`.
    rows: Vec<usize>,
    /// `[position]`.
    tokens: Vec<usize>,
}

/// Row counts of one rank's transfers in all-to-all dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Splits {
    /// Rows to each EP rank.
    pub send: Vec<usize>,
    /// Rows from each EP rank.
    pub recv: Vec<usize>,
    /// Rows that each ETP rank has after the all-to-all and contributes to the gather over ETP.
    pub gathered: Vec<usize>,
}

impl Counts {
    /// Reads what [`Fabric::exchange_counts`](crate::Fabric::exchange_counts) returns: for each rank in the order of
    /// [`Grid::position`], `num_experts + 1` offsets from 0 and the number of tokens.
    ///
    /// # Errors
    /// [`Error::Experts`] if EP does not divide the experts, [`Error::Counts`] if these are no counts.
    pub fn from_exchange(grid: Grid, num_experts: usize, exchanged: &[i32]) -> Result<Self, Error> {
        let local = grid.local_experts(num_experts)?;
        let record = num_experts + 2;
        if exchanged.len() != grid.size() * record {
            let what = format!("{} numbers from {} ranks of {record} each", exchanged.len(), grid.size());
            return Err(Error::Counts { what });
        }
        let mut rows = Vec::with_capacity(grid.size() * num_experts);
        let mut tokens = Vec::with_capacity(grid.size());
        for (position, record) in exchanged.chunks_exact(record).enumerate() {
            let (offsets, own_tokens) = (&record[..=num_experts], record[num_experts + 1]);
            if offsets[0] != 0 || own_tokens < 0 || offsets.windows(2).any(|w| w[1] < w[0]) {
                let what = format!("rank {position} sent {own_tokens} tokens and offsets {offsets:?}");
                return Err(Error::Counts { what });
            }
            rows.extend(offsets.windows(2).map(|w| (w[1] - w[0]) as usize));
            tokens.push(own_tokens as usize);
        }
        Counts { grid, local, num_experts, rows, tokens }.checked()
    }

    /// Every rank has `rows` rows for every expert, and `tokens` tokens: nothing needs to be exchanged.
    ///
    /// # Errors
    /// [`Error::Experts`] if EP does not divide the experts, [`Error::Counts`] if an `i32` cannot count the rows.
    pub fn uniform(grid: Grid, num_experts: usize, rows: usize, tokens: usize) -> Result<Self, Error> {
        let local = grid.local_experts(num_experts)?;
        let (rows, tokens) = (vec![rows; grid.size() * num_experts], vec![tokens; grid.size()]);
        Counts { grid, local, num_experts, rows, tokens }.checked()
    }

    /// The same tokens without any rows.
    #[must_use]
    pub fn without_rows(mut self) -> Self {
        self.rows.fill(0);
        self
    }

    /// The most rows that any rank of the group receives.
    pub fn most_received(&self) -> usize {
        let per_rank = self.local.len();
        let received = |first: usize| -> usize {
            let rows =
                self.rows.chunks_exact(self.num_experts).flat_map(|rows| &rows[first..first + per_rank]);
            rows.fold(0, |sum, &rows| sum.saturating_add(rows))
        };
        (0..self.num_experts).step_by(per_rank).map(received).max().unwrap_or(0)
    }

    /// An `i32` can name the rows of every rank: all refuse alike, so that none waits for one that did.
    fn checked(self) -> Result<Self, Error> {
        let total = self.most_received();
        if i32::try_from(total).is_err() {
            return Err(Error::Counts { what: format!("{total} rows for one rank exceed an i32 index") });
        }
        Ok(self)
    }

    /// Experts of the layer.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// The experts of this rank.
    pub fn local_experts(&self) -> Range<usize> {
        self.local.clone()
    }

    /// Tokens of each rank, in the order of [`Grid::position`].
    pub fn tokens(&self) -> &[usize] {
        &self.tokens
    }

    /// Rows that the rank at these coordinates has for an expert.
    pub fn rows(&self, ep_rank: usize, etp_rank: usize, expert: usize) -> usize {
        self.rows[self.grid.position(ep_rank, etp_rank) * self.num_experts + expert]
    }

    /// Rows of each local expert, from all ranks.
    pub fn expert_rows(&self) -> Vec<usize> {
        let all_ranks = |expert| self.rows.iter().skip(expert).step_by(self.num_experts).sum();
        self.local.clone().map(all_ranks).collect()
    }

    /// First row of each local expert once rows are grouped by expert, and the end of the last one.
    pub fn offsets(&self) -> Vec<i32> {
        let mut end = 0;
        let ends = self.expert_rows().into_iter().map(|rows| {
            end += rows as i32; // from_exchange has checked that the total fits
            end
        });
        std::iter::once(0).chain(ends).collect()
    }

    /// Row counts of this rank's transfers.
    pub fn splits(&self) -> Splits {
        let (ep, etp) = (self.grid.ep_size(), self.grid.etp_size());
        let (ep_rank, etp_rank) = (self.grid.ep_rank(), self.grid.etp_rank());
        let per_rank = self.local.len();
        let to = |from: usize, slice: usize, experts: Range<usize>| -> usize {
            experts.map(|expert| self.rows(from, slice, expert)).sum()
        };
        let arriving = |slice| (0..ep).map(move |from| to(from, slice, self.local.clone()));
        Splits {
            send: (0..ep).map(|q| to(ep_rank, etp_rank, q * per_rank..(q + 1) * per_rank)).collect(),
            recv: arriving(etp_rank).collect(),
            gathered: (0..etp).map(|slice| arriving(slice).sum()).collect(),
        }
    }

    /// Rows in each chunk as they stand after the all-to-all over EP and the gather over ETP: in the order
    /// (ETP rank, EP rank, local expert).
    pub fn received_chunks(&self) -> Vec<usize> {
        let mut chunks = Vec::with_capacity(self.grid.size() * self.local.len());
        for etp_rank in 0..self.grid.etp_size() {
            for ep_rank in 0..self.grid.ep_size() {
                chunks.extend(self.local.clone().map(|expert| self.rows(ep_rank, etp_rank, expert)));
            }
        }
        chunks
    }
}
