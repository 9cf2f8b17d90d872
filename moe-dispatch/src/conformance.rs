//! What a fabric and a dispatcher are held to, whoever wrote them.
//!
//! Every rank of an EP×ETP group calls the same checks at the same time, each on its own fabric; every rank knows all
//! tokens by formula, so that nothing but the fabric under test moves between them.
//!
//! Implement [`Inspect`], then run [`fabric`] and, for each dispatcher, [`dispatcher`], over several grids: one rank,
//! EP alone, ETP alone, both.

use std::fmt::Debug;

use crate::{DispatchState, Dispatcher, Fabric, Over, Routing, Shapes, SortedRows, Transfer};

/// Columns of the tensors that the checks make.
pub const HIDDEN: usize = 3;

/// Moves numbers between the host and a fabric under test.
pub trait Inspect: Fabric {
    /// A tensor `[rows, HIDDEN]`.
    fn tensor(&self, rows: usize, values: &[f64]) -> Result<Self::Tensor, Self::Error>;
    /// Weights.
    fn weights(&self, values: &[f64]) -> Result<Self::Weights, Self::Error>;
    /// The elements of a tensor, row by row.
    fn read_tensor(&self, x: &Self::Tensor) -> Result<Vec<f64>, Self::Error>;
    /// The elements of weights.
    fn read_weights(&self, w: &Self::Weights) -> Result<Vec<f64>, Self::Error>;
    /// The entries of an index.
    fn read_index(&self, index: &Self::Index) -> Result<Vec<i32>, Self::Error>;
}

/// Why a check failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure<E> {
    /// The fabric refused.
    #[error("the fabric refused: {0:?}")]
    Fabric(E),
    /// A result is wrong.
    #[error("{check}: expected {expected}, got {got}")]
    Wrong {
        /// What was checked.
        check: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
}

impl<E> From<E> for Failure<E> {
    fn from(error: E) -> Self {
        Failure::Fabric(error)
    }
}

type Checked<E> = Result<(), Failure<E>>;

fn equal<T: PartialEq + Debug, E>(check: &str, got: T, expected: T) -> Checked<E> {
    if got == expected {
        return Ok(());
    }
    let (expected, got) = (format!("{expected:?}"), format!("{got:?}"));
    Err(Failure::Wrong { check: check.to_owned(), expected, got })
}

/// Equal up to `tolerance · (1 + |expected|)`.
fn close<E>(check: &str, got: &[f64], expected: &[f64], tolerance: f64) -> Checked<E> {
    equal(&format!("{check}, number of elements"), got.len(), expected.len())?;
    let near = |(got, expected): (&f64, &f64)| (got - expected).abs() <= tolerance * (1.0 + expected.abs());
    match got.iter().zip(expected).position(|pair| !near(pair)) {
        None => Ok(()),
        Some(i) => equal(&format!("{check}, element {i}"), got[i], expected[i]),
    }
}

/// Element `h` of the row of token `g`; exact in bf16 for small `g`.
fn element(g: usize, h: usize) -> f64 {
    1.0 + g as f64 + 0.25 * h as f64
}

fn rows(tokens: impl IntoIterator<Item = usize>) -> Vec<f64> {
    tokens.into_iter().flat_map(|g| (0..HIDDEN).map(move |h| element(g, h))).collect()
}

/// Checks every operation of a fabric against its definition. Sums may differ by `tolerance`, relative.
///
/// # Errors
/// The first result that is wrong, or the fabric's error.
pub fn fabric<F: Inspect>(f: &F, tolerance: f64) -> Checked<F::Error> {
    local_operations(f, tolerance)?;
    if f.grid().size() == 1 {
        return Ok(());
    }
    counts(f)?;
    if f.grid().ep_size() > 1 {
        all_to_all(f)?;
    }
    if f.grid().etp_size() > 1 {
        gather_and_scatter(f, Over::Etp, tolerance)?;
    }
    gather_and_scatter(f, Over::EpEtp, tolerance)
}

fn local_operations<F: Inspect>(f: &F, tolerance: f64) -> Checked<F::Error> {
    let entries = [2, -1, 0, 2];
    let index = f.index(&entries)?;
    equal("index", f.read_index(&index)?, entries.to_vec())?;
    equal("index_len", f.index_len(&index), entries.len())?;

    let x = f.tensor(3, &rows(0..3))?;
    let mut gathered = rows([2, 0, 0, 2]);
    gathered[HIDDEN..2 * HIDDEN].fill(0.0);
    close("gather_rows", &f.read_tensor(&f.gather_rows(&x, &index)?)?, &gathered, 0.0)?;
    let sums: Vec<f64> =
        rows([2]).into_iter().chain((0..HIDDEN).map(|h| element(0, h) + element(2, h))).collect();
    close("gather_sum", &f.read_tensor(&f.gather_sum(&x, &index, 2)?)?, &sums, tolerance)?;
    let weights = f.weights(&[0.5, 0.25, 0.125])?;
    close(
        "gather_weights",
        &f.read_weights(&f.gather_weights(&weights, &index)?)?,
        &[0.125, 0.0, 0.5, 0.125],
        0.0,
    )?;

    let experts = f.index(&[3, 1, 1, -1, 0, 3])?;
    let all = f.sort_by_expert(&experts, 2, 4, 0..4, SortedRows::Packed(6))?;
    equal("sort, choice", f.read_index(&all.choice)?, vec![4, 1, 2, 0, 5, -1])?;
    equal("sort, token", f.read_index(&all.token)?, vec![2, 0, 1, 0, 2, -1])?;
    equal("sort, position", f.read_index(&all.position)?, vec![3, 1, 2, -1, 0, 4])?;
    equal("sort, offsets", f.read_index(&all.offsets)?, vec![0, 1, 3, 3, 5])?;
    let mut by_expert = rows([2, 0, 1, 0, 2, 2]);
    by_expert[5 * HIDDEN..].fill(0.0);
    close("to_sorted", &f.read_tensor(&f.to_sorted(&x, &all)?)?, &by_expert, 0.0)?;
    let some = f.sort_by_expert(&experts, 2, 4, 1..3, SortedRows::Packed(2))?;
    equal("sort of some, choice", f.read_index(&some.choice)?, vec![1, 2])?;
    equal("sort of some, token", f.read_index(&some.token)?, vec![0, 1])?;
    equal("sort of some, position", f.read_index(&some.position)?, vec![-1, 0, 1, -1, -1, -1])?;
    equal("sort of some, offsets", f.read_index(&some.offsets)?, vec![0, 2, 2])?;

    let roomy = f.sort_by_expert(&experts, 2, 4, 0..2, SortedRows::PerExpert(3))?;
    equal("sort with room, choice", f.read_index(&roomy.choice)?, vec![4, -1, -1, 1, 2, -1])?;
    equal("sort with room, token", f.read_index(&roomy.token)?, vec![2, -1, -1, 0, 1, -1])?;
    equal("sort with room, position", f.read_index(&roomy.position)?, vec![-1, 3, 4, -1, 0, -1])?;
    equal("sort with room, offsets", f.read_index(&roomy.offsets)?, vec![0, 3, 6])?;
    // A device that does not wait may say so at the next read.
    let full = f.sort_by_expert(&experts, 2, 4, 0..4, SortedRows::PerExpert(1));
    let refused = full.and_then(|full| f.read_index(&full.offsets)).is_err();
    equal("two choices of an expert with room for one are refused", refused, true)?;

    let none = f.index(&[])?;
    let empty = f.tensor(0, &[])?;
    equal("gather_rows of nothing", f.read_tensor(&f.gather_rows(&empty, &none)?)?, vec![])?;
    equal("gather_sum of nothing", f.read_tensor(&f.gather_sum(&empty, &none, 2)?)?, vec![])?;
    let sorted = f.sort_by_expert(&none, 2, 4, 0..4, SortedRows::Packed(0))?;
    equal("sort of nothing", f.read_index(&sorted.offsets)?, vec![0; 5])
}

fn counts<F: Inspect>(f: &F) -> Checked<F::Error> {
    let grid = f.grid();
    let me = grid.rank();
    let own = |position: usize| vec![0, position as i32, 2 * position as i32];
    let tokens = |position: usize| 3 * position;
    let all = |position| own(position).into_iter().chain([tokens(position) as i32]);
    let expected: Vec<i32> = (0..grid.size()).flat_map(all).collect();
    equal("exchange_counts", f.exchange_counts(&f.index(&own(me))?, tokens(me))?, expected)?;

    // Rank i gives i entries: the first none.
    let entries = |position: usize| vec![position as i32; position];
    let counts: Vec<usize> = (0..grid.size()).collect();
    let gathered = f.all_gather_index(&f.index(&entries(me))?, &counts)?;
    equal("all_gather_index", f.read_index(&gathered)?, (0..grid.size()).flat_map(entries).collect())
}

/// Rows that rank `from` of a group sends to rank `to`; some 0, no two matrices alike transposed.
fn sent(from: usize, to: usize) -> usize {
    (2 * from + to) % 3
}

/// Two weights beside each row of a transfer: its token and minus that.
fn beside(tokens: &[usize]) -> Vec<f64> {
    tokens.iter().flat_map(|&g| [g as f64, -(g as f64)]).collect()
}

/// Starts to send the rows of these tokens.
fn start<F: Inspect>(f: &F, tokens: &[usize], transfer: Transfer<'_>) -> Result<F::Pending, F::Error> {
    let x = f.tensor(tokens.len(), &rows(tokens.iter().copied()))?;
    f.start(&x, Some(&f.weights(&beside(tokens))?), 2, transfer)
}

/// Waits for the rows of these tokens.
fn arrived<F: Inspect>(f: &F, check: &str, pending: F::Pending, tokens: &[usize]) -> Checked<F::Error> {
    let (x, weights) = f.wait(pending)?;
    close(check, &f.read_tensor(&x)?, &rows(tokens.iter().copied()), 0.0)?;
    let weights = weights.map(|w| f.read_weights(&w)).transpose()?.unwrap_or_default();
    close(&format!("{check}, weights"), &weights, &beside(tokens), 0.0)
}

fn all_to_all<F: Inspect>(f: &F) -> Checked<F::Error> {
    let (rank, size) = (f.grid().ep_rank(), f.grid().ep_size());
    // The tokens of a rank are 8·rank …
    let block = |from: usize, to: usize| {
        let first: usize = 8 * from + (0..to).map(|to| sent(from, to)).sum::<usize>();
        first..first + sent(from, to)
    };
    let send: Vec<usize> = (0..size).map(|to| sent(rank, to)).collect();
    let recv: Vec<usize> = (0..size).map(|from| sent(from, rank)).collect();
    let transfer = Transfer::AllToAll { send: &send, recv: &recv };
    let own: Vec<usize> = (0..size).flat_map(|to| block(rank, to)).collect();
    let expected: Vec<usize> = (0..size).flat_map(|from| block(from, rank)).collect();
    // A row that is in no block stays at home.
    let longer: Vec<usize> = own.iter().copied().chain([7]).collect();
    let first = start(f, &own, transfer)?;
    let second = start(f, &longer, transfer)?;
    arrived(f, "a later all-to-all, awaited first", second, &expected)?;
    arrived(f, "all-to-all", first, &expected)
}

fn gather_and_scatter<F: Inspect>(f: &F, over: Over, tolerance: f64) -> Checked<F::Error> {
    let grid = f.grid();
    let (rank, size) = match over {
        Over::Etp => (grid.etp_rank(), grid.etp_size()),
        Over::EpEtp => (grid.rank(), grid.size()),
    };
    let counts: Vec<usize> = (0..size).map(|rank| sent(rank, 2)).collect();
    let gather = Transfer::AllGather { over, rows: &counts };
    let of = |rank: usize| 8 * rank..8 * rank + counts[rank];
    let own: Vec<usize> = of(rank).collect();
    let all: Vec<usize> = (0..size).flat_map(of).collect();
    let longer: Vec<usize> = own.iter().copied().chain([7]).collect();
    let check = format!("all-gather over {over:?}");
    arrived(f, &check, start(f, &longer, gather)?, &all)?;

    let x = f.tensor(own.len(), &rows(own.iter().copied()))?;
    let (x, weights) = f.wait(f.start(&x, None, 0, gather)?)?;
    close(&format!("{check} of rows alone"), &f.read_tensor(&x)?, &rows(all.iter().copied()), 0.0)?;
    equal("weights that were not sent", weights.is_none(), true)?;

    // Rank r contributes r + 1 times the tokens of each block.
    let check = format!("reduce-scatter over {over:?}");
    let scaled = |values: Vec<f64>, by: usize| -> Vec<f64> { values.iter().map(|v| v * by as f64).collect() };
    let x = f.tensor(all.len(), &scaled(rows(all.iter().copied()), rank + 1))?;
    let weights = f.weights(&scaled(beside(&all), rank + 1))?;
    let pending = f.start(&x, Some(&weights), 2, Transfer::ReduceScatter { over, rows: &counts })?;
    let (x, weights) = f.wait(pending)?;
    let times = size * (size + 1) / 2;
    close(&check, &f.read_tensor(&x)?, &scaled(rows(own.iter().copied()), times), tolerance)?;
    let weights = weights.map(|w| f.read_weights(&w)).transpose()?.unwrap_or_default();
    close(&format!("{check}, weights"), &weights, &scaled(beside(&own), times), tolerance)
}

/// How tokens choose experts in the checks of a dispatcher.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Skew {
    /// All experts, unevenly.
    Spread,
    /// Every token the same two.
    ToTwo,
    /// Some choices routed nowhere.
    Dropped,
}

const TOP_K: usize = 2;

impl Skew {
    fn experts(self, g: usize, num_experts: usize) -> [i32; TOP_K] {
        let spread = [(g * g + g) % num_experts, (g * g + g + 1 + g % (num_experts - 1)) % num_experts];
        let [a, b] = spread.map(|expert| expert as i32);
        match self {
            Skew::Spread => [a, b],
            Skew::ToTwo => [num_experts as i32 - 1, 0],
            Skew::Dropped => {
                [if g.is_multiple_of(3) { -1 } else { a }, if g.is_multiple_of(2) { -1 } else { b }]
            }
        }
    }
}

/// One call's tokens, and what must come of them.
struct Call<F: Fabric> {
    tokens: std::ops::Range<usize>,
    skew: Skew,
    num_experts: usize,
    x: F::Tensor,
    dy: F::Tensor,
    routing: Routing<F::Index, F::Weights>,
    /// Whether a budget is too small, so that nothing is routed.
    overflows: bool,
}

/// Expert `e` multiplies a row by this and by the probability.
fn expert_scale(expert: usize) -> f64 {
    1.0 + 0.5 * expert as f64
}

fn weight(g: usize, k: usize) -> f64 {
    [0.5, 0.25][k] + 0.125 * (g % 3) as f64
}

/// The gradient by element `h` of a token's result.
fn upstream(g: usize, h: usize) -> f64 {
    0.5 + (3 * g % 7) as f64 - 0.25 * h as f64
}

impl<F: Inspect> Call<F> {
    fn new(
        f: &F,
        tokens: std::ops::Range<usize>,
        skew: Skew,
        num_experts: usize,
        shapes: Shapes,
    ) -> Result<Self, F::Error> {
        let experts: Vec<i32> = tokens.clone().flat_map(|g| skew.experts(g, num_experts)).collect();
        let weights: Vec<f64> = tokens.clone().flat_map(|g| [weight(g, 0), weight(g, 1)]).collect();
        let dy: Vec<f64> = tokens.clone().flat_map(|g| (0..HIDDEN).map(move |h| upstream(g, h))).collect();
        Ok(Call {
            x: f.tensor(tokens.len(), &rows(tokens.clone()))?,
            dy: f.tensor(tokens.len(), &dy)?,
            routing: Routing {
                experts: f.index(&experts)?,
                weights: f.weights(&weights)?,
                tokens: tokens.len(),
                top_k: TOP_K,
                shapes,
            },
            overflows: false,
            tokens,
            skew,
            num_experts,
        })
    }

    /// Per token and choice: its weight (0 if routed nowhere) and the scale of its expert.
    fn choices(&self, g: usize) -> [(f64, f64); TOP_K] {
        let experts = self.skew.experts(g, self.num_experts);
        std::array::from_fn(|k| match usize::try_from(experts[k]) {
            Ok(_) if self.overflows => (0.0, 0.0),
            Ok(expert) => (weight(g, k), expert_scale(expert)),
            Err(_) => (0.0, 0.0),
        })
    }

    fn scaled_sum(&self, of: fn(usize, usize) -> f64) -> Vec<f64> {
        let row = |g: usize| {
            let scale: f64 = self.choices(g).iter().map(|(weight, scale)| weight * scale).sum();
            (0..HIDDEN).map(move |h| scale * of(g, h))
        };
        self.tokens.clone().flat_map(row).collect()
    }

    fn dweights(&self) -> Vec<f64> {
        let row = |g: usize| {
            let dot: f64 = (0..HIDDEN).map(|h| element(g, h) * upstream(g, h)).sum();
            self.choices(g).map(|(_, scale)| scale * dot)
        };
        self.tokens.clone().flat_map(row).collect()
    }
}

/// What each expert row is multiplied by, apart from its probability: the expert's scale and this rank's share of it,
/// so that the shares of the ETP ranks sum to 1; 0 for rows of no expert.
fn row_scales<F: Inspect, S: DispatchState<F::Index>>(
    f: &F,
    state: &S,
    num_experts: usize,
) -> Result<Vec<f64>, Failure<F::Error>> {
    let (rank, size) = (f.grid().etp_rank(), f.grid().etp_size());
    let share = (rank + 1) as f64 * 2.0 / (size * (size + 1)) as f64;
    let local = f.grid().local_experts(num_experts).map_err(F::Error::from)?;
    let offsets = f.read_index(state.offsets())?;
    equal("number of offsets", offsets.len(), local.len() + 1)?;
    let mut scales = vec![0.0; state.rows()];
    for (expert, ends) in local.zip(offsets.windows(2)) {
        scales[ends[0] as usize..ends[1] as usize].fill(expert_scale(expert) * share);
    }
    Ok(scales)
}

fn scale_rows(x: &[f64], scales: &[f64], probs: &[f64]) -> Vec<f64> {
    let rows = x.chunks_exact(HIDDEN).zip(scales.iter().zip(probs));
    rows.flat_map(|(row, (scale, prob))| row.iter().map(move |x| x * scale * prob)).collect()
}

/// The most rows that a rank receives of tokens `0..tokens`; a rank alone counts its choices, also those that go nowhere.
fn most_received<F: Inspect>(f: &F, skew: Skew, tokens: usize, num_experts: usize) -> usize {
    let (ep, ranks) = (f.grid().ep_size(), f.grid().size());
    let mut received = vec![0; ep];
    for expert in (0..tokens).flat_map(|g| skew.experts(g, num_experts)) {
        if let Ok(expert) = usize::try_from(expert) {
            received[expert * ep / num_experts] += 1;
        }
    }
    if ranks == 1 { tokens * TOP_K } else { received.into_iter().max().unwrap_or(0) }
}

/// Checks a dispatcher, forward and backward, against formulas: with uneven numbers of tokens (0 among them), several
/// skews, choices routed nowhere, exact and fixed shapes, budgets, and calls in flight that end in another order than they started in.
/// `make(num_experts)` makes the dispatcher.
///
/// # Errors
/// The first result that is wrong by more than `tolerance`, relative, or the fabric's error.
pub fn dispatcher<F: Inspect, D: Dispatcher<F>>(
    f: &F,
    make: impl Fn(usize) -> D,
    tolerance: f64,
) -> Checked<F::Error> {
    let grid = f.grid();
    let me = grid.rank();
    for per_rank in [1, 3] {
        let num_experts = (grid.ep_size() * per_rank).max(2).next_multiple_of(grid.ep_size());
        let d = make(num_experts);
        let shares: [fn(usize) -> usize; 3] = [|p| 3 + p, |p| 4 * (p % 2), |_| 0];
        let mut calls = vec![];
        for skew in [Skew::Spread, Skew::ToTwo, Skew::Dropped] {
            for share in shares {
                let first: usize = (0..me).map(share).sum();
                calls.push(Call::new(f, first..first + share(me), skew, num_experts, Shapes::Exact)?);
            }
            // A budget that is just large enough, and one that is not.
            let share = |p: usize| 2 + p;
            let first: usize = (0..me).map(share).sum();
            let most = most_received(f, skew, (0..grid.size()).map(share).sum(), num_experts);
            for (rows, overflows) in [(most, false), (most - 1, true)] {
                let tokens = first..first + share(me);
                let call = Call::new(f, tokens, skew, num_experts, Shapes::PerRank(rows))?;
                calls.push(Call { overflows, ..call });
            }
            // Two choices of a token may be the same expert.
            for (tokens, rows) in [(5, 10), (4, 9), (0, 2)] {
                let shapes = Shapes::PerExpert(rows);
                calls.push(Call::new(f, me * tokens..(me + 1) * tokens, skew, num_experts, shapes)?);
            }
        }

        // Two dispatches in flight, the later one ended first.
        for pair in calls.chunks(2) {
            let mut flights = vec![];
            for call in pair {
                flights.push((call, d.dispatch_start(f, &call.x, &call.routing)?));
            }
            for (call, (flight, state)) in flights.into_iter().rev() {
                let batch = d.dispatch_finish(f, flight, &state)?;
                let scales = row_scales(f, &state, num_experts)?;
                equal("rows", batch.rows, scales.len())?;
                let (x, probs) = (f.read_tensor(&batch.x)?, f.read_weights(&batch.probs)?);
                equal("number of probabilities", probs.len(), batch.rows)?;
                equal("overflow", state.overflowed(), call.overflows)?;
                if let Shapes::PerRank(rows) = call.routing.shapes {
                    equal("rows of a budget", batch.rows, rows)?;
                }
                if let Shapes::PerExpert(rows) = call.routing.shapes {
                    let sent = rows * num_experts / grid.ep_size() * grid.size();
                    equal("rows that do not depend on the choices", batch.rows, sent)?;
                    let empty = x.chunks_exact(HIDDEN).zip(&probs).filter(|&(_, &prob)| prob == 0.0);
                    equal("rows without a choice", empty.flat_map(|(x, _)| x).all(|&x| x == 0.0), true)?;
                }

                let y = f.tensor(batch.rows, &scale_rows(&x, &scales, &probs))?;
                let y = d.combine(f, y, &state)?;
                close("combine", &f.read_tensor(&y)?, &call.scaled_sum(element), tolerance)?;

                let dout = f.read_tensor(&d.combine_backward(f, &call.dy, &state)?)?;
                let dx = f.tensor(batch.rows, &scale_rows(&dout, &scales, &probs))?;
                let dot = |(x, d): (&[f64], &[f64])| -> f64 { x.iter().zip(d).map(|(x, d)| x * d).sum() };
                let dots = x.chunks_exact(HIDDEN).zip(dout.chunks_exact(HIDDEN)).map(dot);
                let dprobs: Vec<f64> = dots.zip(&scales).map(|(dot, scale)| dot * scale).collect();
                let (dx, dweights) = d.dispatch_backward(f, dx, f.weights(&dprobs)?, &state)?;
                close("dispatch backward", &f.read_tensor(&dx)?, &call.scaled_sum(upstream), tolerance)?;
                close(
                    "dispatch backward, weights",
                    &f.read_weights(&dweights)?,
                    &call.dweights(),
                    tolerance,
                )?;
            }
        }
    }
    Ok(())
}
