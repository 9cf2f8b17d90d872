//! The dispatcher without this workspace's tensors and communicators: a fabric on `Vec<f32>`, whose ranks are threads
//! that talk through channels.
//!
//! ```text
//! cargo run -p moe-dispatch --no-default-features --example plain_vec
//! ```
//!
//! Four ranks (EP 2 × ETP 2) and one rank run the same layer of eight experts; the results agree.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use moe_dispatch::{
    AllGather, AllToAll, DispatchState, Dispatcher, Error, Fabric, Grid, Over, Routing, Shapes, Sorted,
    SortedRows, Transfer,
};
use moe_topology::{Expert, Folding, Mapping};

const HIDDEN: usize = 3;
const TOP_K: usize = 2;
const NUM_EXPERTS: usize = 8;

// ---------------------------------------------------------------------------------------------------- the fabric

/// Floats or integers between two ranks.
#[derive(Clone)]
enum Message {
    Floats(Vec<f32>),
    Ints(Vec<i32>),
}

/// One rank's channels to all ranks, itself included.
struct Links {
    to: Vec<Sender<(u64, Message)>>,
    from: Vec<Receiver<(u64, Message)>>,
    started: Cell<u64>,
    /// Messages that came before somebody waited for them.
    early: RefCell<HashMap<(usize, u64), Message>>,
}

impl Links {
    fn mesh(ranks: usize) -> Vec<Links> {
        let (mut to, mut from) = (vec![], (0..ranks).map(|_| vec![]).collect::<Vec<_>>());
        for _ in 0..ranks {
            let (senders, receivers): (Vec<_>, Vec<_>) = (0..ranks).map(|_| channel()).unzip();
            to.push(senders);
            for (receivers_of_rank, receiver) in from.iter_mut().zip(receivers) {
                receivers_of_rank.push(receiver);
            }
        }
        let link = |(to, from)| Links { to, from, started: Cell::new(0), early: RefCell::default() };
        to.into_iter().zip(from).map(link).collect()
    }

    /// Sends one message to each rank of a group. All ranks start all operations in the same order, so the number of
    /// an operation tells its messages from those of others.
    fn send(&self, group: &[usize], messages: impl Iterator<Item = Message>) -> u64 {
        let operation = self.started.replace(self.started.get() + 1);
        for (&rank, message) in group.iter().zip(messages) {
            self.to[rank].send((operation, message)).expect("the receiving rank has ended");
        }
        operation
    }

    fn receive(&self, rank: usize, operation: u64) -> Message {
        loop {
            if let Some(message) = self.early.borrow_mut().remove(&(rank, operation)) {
                return message;
            }
            let (number, message) = self.from[rank].recv().expect("the sending rank has ended");
            self.early.borrow_mut().insert((rank, number), message);
        }
    }

    fn receive_floats(&self, group: &[usize], operation: u64) -> Vec<Vec<f32>> {
        let floats = |&rank| match self.receive(rank, operation) {
            Message::Floats(floats) => floats,
            Message::Ints(_) => unreachable!("operation {operation} moves floats"),
        };
        group.iter().map(floats).collect()
    }

    fn all_gather_ints(&self, group: &[usize], ints: &[i32]) -> Vec<i32> {
        let operation = self.send(group, group.iter().map(|_| Message::Ints(ints.to_vec())));
        let ints = |&rank| match self.receive(rank, operation) {
            Message::Ints(ints) => ints,
            Message::Floats(_) => unreachable!("operation {operation} moves integers"),
        };
        group.iter().flat_map(ints).collect()
    }
}

/// Rows of `HIDDEN` floats, one after the other.
type Rows = Vec<f32>;

/// A rank with its groups, as ranks of the mesh.
pub struct VecFabric {
    grid: Grid,
    rank: usize,
    links: Links,
    ep: Vec<usize>,
    etp: Vec<usize>,
    ep_etp: Vec<usize>,
}

/// What to receive, and whether to sum it.
pub struct Pending {
    group: Vec<usize>,
    rows: u64,
    weights: Option<u64>,
    sum: bool,
}

impl VecFabric {
    fn group(&self, over: Over) -> &[usize] {
        match over {
            Over::Etp => &self.etp,
            Over::EpEtp => &self.ep_etp,
        }
    }
}

/// Consecutive blocks of `rows[i] · width` floats.
fn blocks<'a>(x: &'a [f32], rows: &'a [usize], width: usize) -> impl Iterator<Item = Message> + 'a {
    rows.iter().scan(0, move |start, rows| {
        let block = *start..*start + rows * width;
        *start = block.end;
        Some(Message::Floats(x[block].to_vec()))
    })
}

fn join(parts: Vec<Vec<f32>>, sum: bool) -> Vec<f32> {
    if !sum {
        return parts.concat();
    }
    let add = |a: Vec<f32>, b: Vec<f32>| a.iter().zip(&b).map(|(a, b)| a + b).collect();
    parts.into_iter().reduce(add).unwrap_or_default()
}

impl Fabric for VecFabric {
    type Tensor = Rows;
    type Weights = Vec<f32>;
    type Index = Vec<i32>;
    type Pending = Pending;
    type Error = Error;

    fn grid(&self) -> Grid {
        self.grid
    }

    fn index(&self, entries: &[i32]) -> Result<Vec<i32>, Error> {
        Ok(entries.to_vec())
    }

    fn index_len(&self, index: &Vec<i32>) -> usize {
        index.len()
    }

    fn sort_by_expert(
        &self,
        experts: &Vec<i32>,
        top_k: usize,
        _num_experts: usize,
        local: Range<usize>,
        rows: SortedRows,
    ) -> Result<Sorted<Vec<i32>>, Error> {
        let total = rows.total(local.len());
        let mut choice = Vec::with_capacity(total);
        let mut position = vec![-1; experts.len()];
        let mut offsets = vec![0];
        for expert in local {
            for (chosen, _) in experts.iter().enumerate().filter(|&(_, &e)| e == expert as i32) {
                position[chosen] = choice.len() as i32;
                choice.push(chosen as i32);
            }
            if let SortedRows::PerExpert(rows) = rows {
                let end = offsets.len() * rows;
                if choice.len() > end {
                    return Err(Error::Counts {
                        what: format!("more than {rows} choices of expert {expert}"),
                    });
                }
                choice.resize(end, -1);
            }
            offsets.push(choice.len() as i32);
        }
        choice.resize(total, -1);
        let token = choice.iter().map(|&chosen| chosen.div_euclid(top_k as i32)).collect();
        Ok(Sorted { choice, token, position, offsets })
    }

    fn gather_rows(&self, x: &Rows, index: &Vec<i32>) -> Result<Rows, Error> {
        let row = |&i: &i32| match usize::try_from(i) {
            Ok(i) => x[i * HIDDEN..(i + 1) * HIDDEN].to_vec(),
            Err(_) => vec![0.0; HIDDEN],
        };
        Ok(index.iter().flat_map(row).collect())
    }

    fn gather_sum(&self, x: &Rows, index: &Vec<i32>, top_k: usize) -> Result<Rows, Error> {
        let mut y = vec![0.0; index.len() / top_k * HIDDEN];
        for (y, chosen) in y.chunks_exact_mut(HIDDEN).zip(index.chunks_exact(top_k)) {
            for i in chosen.iter().filter_map(|&i| usize::try_from(i).ok()) {
                y.iter_mut().zip(&x[i * HIDDEN..]).for_each(|(y, x)| *y += x);
            }
        }
        Ok(y)
    }

    fn gather_weights(&self, w: &Vec<f32>, index: &Vec<i32>) -> Result<Vec<f32>, Error> {
        Ok(index.iter().map(|&i| usize::try_from(i).map_or(0.0, |i| w[i])).collect())
    }

    fn exchange_counts(&self, offsets: &Vec<i32>, tokens: usize) -> Result<Vec<i32>, Error> {
        let mut counts = offsets.clone();
        counts.push(tokens as i32);
        Ok(self.links.all_gather_ints(&self.ep_etp, &counts))
    }

    fn all_gather_index(&self, index: &Vec<i32>, _counts: &[usize]) -> Result<Vec<i32>, Error> {
        Ok(self.links.all_gather_ints(&self.ep_etp, index))
    }

    fn start(
        &self,
        x: &Rows,
        weights: Option<&Vec<f32>>,
        per_row: usize,
        transfer: Transfer<'_>,
    ) -> Result<Pending, Error> {
        let send = |group: &[usize], floats: &[f32], width| match transfer {
            Transfer::AllToAll { send: rows, .. } | Transfer::ReduceScatter { rows, .. } => {
                self.links.send(group, blocks(floats, rows, width))
            }
            Transfer::AllGather { rows, .. } => {
                let position =
                    group.iter().position(|&rank| rank == self.rank).expect("a rank of its groups");
                let own = Message::Floats(floats[..rows[position] * width].to_vec());
                self.links.send(group, group.iter().map(|_| own.clone()))
            }
        };
        let group = match transfer {
            Transfer::AllToAll { .. } => &self.ep,
            Transfer::AllGather { over, .. } | Transfer::ReduceScatter { over, .. } => self.group(over),
        };
        let rows = send(group, x, HIDDEN);
        let weights = weights.map(|weights| send(group, weights, per_row));
        let sum = matches!(transfer, Transfer::ReduceScatter { .. });
        Ok(Pending { group: group.to_vec(), rows, weights, sum })
    }

    fn wait(&self, pending: Pending) -> Result<(Rows, Option<Vec<f32>>), Error> {
        let arrived = |operation| join(self.links.receive_floats(&pending.group, operation), pending.sum);
        Ok((arrived(pending.rows), pending.weights.map(arrived)))
    }
}

// ------------------------------------------------------------------------------------------------ what runs on it

/// Expert `e` multiplies a row by `e + 1` and its probability; an ETP rank contributes its share of it.
fn experts(fabric: &VecFabric, x: &Rows, probs: &[f32], offsets: &[i32]) -> Rows {
    let first = fabric.grid().local_experts(NUM_EXPERTS).expect("EP divides the experts").start;
    let share = 1.0 / fabric.grid().etp_size() as f32;
    let mut y = x.clone();
    for (local, ends) in offsets.windows(2).enumerate() {
        for row in ends[0] as usize..ends[1] as usize {
            let scale = (first + local + 1) as f32 * probs[row] * share;
            y[row * HIDDEN..(row + 1) * HIDDEN].iter_mut().for_each(|y| *y *= scale);
        }
    }
    y
}

/// Token `g` of the world: its row and its choices. Expert 3 is never chosen.
fn token(g: usize) -> (Vec<f32>, [i32; TOP_K], [f32; TOP_K]) {
    let row = (0..HIDDEN).map(|h| 1.0 + g as f32 + 0.25 * h as f32).collect();
    (row, [[0, 5, 2, 7][g % 4], [1, 4, 6][g % 3]], [0.75, 0.25])
}

/// One layer on the tokens of one rank, by the given dispatcher.
fn layer<D: Dispatcher<VecFabric>>(fabric: &VecFabric, dispatcher: &D, tokens: Range<usize>) -> Rows {
    let run = || -> Result<Rows, Error> {
        let (mut x, mut experts_chosen, mut weights) = (vec![], vec![], vec![]);
        for (row, chosen, weight) in tokens.clone().map(token) {
            x.extend(row);
            experts_chosen.extend(chosen);
            weights.extend(weight);
        }
        let (tokens, shapes) = (tokens.len(), Shapes::Exact);
        let routing = Routing { experts: experts_chosen, weights, tokens, top_k: TOP_K, shapes };
        let (batch, state) = dispatcher.dispatch(fabric, &x, &routing)?;
        let y = experts(fabric, &batch.x, &batch.probs, state.offsets());
        dispatcher.combine(fabric, y, &state)
    };
    run().expect("the layer runs")
}

/// Runs a rank per thread, folded as EP × ETP; the results in rank order.
pub fn world<R: Send + 'static>(
    ep: usize,
    etp: usize,
    rank: impl Fn(&VecFabric) -> R + Clone + Send + 'static,
) -> Vec<R> {
    let mapping = Mapping { world_size: ep * etp, ep, etp, ..Mapping::default() };
    let folding = Folding::new(mapping).expect("any EP × ETP folds a world of that size");
    let mut ranks = vec![];
    for (number, links) in Links::mesh(ep * etp).into_iter().enumerate() {
        let group = |axes| folding.group(number, axes).iter().collect();
        let (grid, ep, etp) = (Grid::of(&folding, number), group(Expert::EP), group(Expert::ETP));
        let ep_etp = group(Expert::EP | Expert::ETP);
        let fabric =
            VecFabric { grid: grid.expect("a rank of the world"), rank: number, links, ep, etp, ep_etp };
        let rank = rank.clone();
        ranks.push(thread::spawn(move || rank(&fabric)));
    }
    ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
}

/// Compares four ranks with one.
pub fn main() {
    // Rank 2 has no tokens, and still joins every collective.
    let shares = [0..5, 5..6, 6..6, 6..13];
    let tokens = move |fabric: &VecFabric| shares[fabric.grid().rank()].clone();
    let (to_all, gather) = (AllToAll { num_experts: NUM_EXPERTS }, AllGather { num_experts: NUM_EXPERTS });

    let whole = world(1, 1, move |fabric| layer(fabric, &to_all, 0..13)).concat();
    let share = tokens.clone();
    let by_all_to_all = world(2, 2, move |fabric| layer(fabric, &to_all, share(fabric))).concat();
    let by_all_gather = world(2, 2, move |fabric| layer(fabric, &gather, tokens(fabric))).concat();
    for (name, y) in [("all-to-all", &by_all_to_all), ("all-gather", &by_all_gather)] {
        let worst = y.iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{name} on EP2×ETP2: {} rows, largest difference to one rank {worst:e}", y.len() / HIDDEN);
        assert!(y.len() == whole.len() && worst <= 1e-4);
    }
}
