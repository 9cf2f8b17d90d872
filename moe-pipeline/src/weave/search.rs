//! Two chains of compute and all-to-all, and weight gradients that wait for nobody, on two lanes: the shortest order, and of the
//! shortest one that keeps few weight gradients waiting.

use std::cmp::Ordering;

/// Nodes in the order in which they need each other: whether each is an all-to-all, and its time.
pub(super) type Chain = Vec<(bool, f64)>;

/// Beginnings of one length that are kept: few to find an order to beat, many to beat it.
const NARROW: usize = 32;
const WIDE: usize = 1024;

/// What orders are compared by, less being better: the length, then how many weight gradients are put off at once.
type Value = (f64, usize);

/// The forward pass, the input gradients, and the weight gradients, of which each needs that many input gradients to be done.
pub(super) struct Problem {
    chains: [Chain; 3],
    weight_needs: Vec<usize>,
    /// Per chain and position, the time of what is still to come on the compute lane and on that of all-to-alls.
    rest: [Vec<[f64; 2]>; 3],
}

/// A beginning: how many nodes of each chain are done, and what then is.
#[derive(Clone, Copy)]
struct State {
    done: [usize; 3],
    /// Of the compute lane.
    now: f64,
    /// When the last all-to-all of the forward pass and that of the backward pass have ended; not before now.
    arrives: [f64; 2],
    /// When the lane of all-to-alls is free; not before now.
    free: f64,
    /// The most weight gradients that were possible and not done at once.
    deferred: usize,
    /// The longest path that it can still have: no completion is shorter.
    bound: f64,
    /// Where the step before it stands among those that were kept, and the chain that was advanced.
    before: usize,
    chain: usize,
}

impl Problem {
    pub(super) fn new(chains: [Chain; 3]) -> Self {
        let computed = (1..).zip(&chains[1]).filter(|(_, (all_to_all, _))| !all_to_all);
        let weight_needs = computed.map(|(done, _)| done).collect();
        let rest = chains.each_ref().map(|chain| {
            let mut rest = vec![[0.0; 2]; chain.len() + 1];
            for (at, &(all_to_all, time)) in chain.iter().enumerate().rev() {
                rest[at] = rest[at + 1];
                rest[at][usize::from(all_to_all)] += time;
            }
            rest
        });
        Problem { chains, weight_needs, rest }
    }

    /// The chains in the order in which their next nodes are taken.
    pub(super) fn solve(&self) -> Vec<usize> {
        let first = self.bounded([0; 3], 0.0, [0.0; 2], 0.0);
        let Some((found, order)) = self.search(first, NARROW, (f64::INFINITY, 0)) else { return Vec::new() };
        if found <= (first.bound, 1) {
            return order;
        }
        self.search(first, WIDE, found).map_or(order, |(_, better)| better)
    }

    /// The best completion that is better than `than`, if `width` beginnings of one length suffice to find one. Values are
    /// [`State::value`].
    fn search(&self, first: State, width: usize, than: Value) -> Option<(Value, Vec<usize>)> {
        let mut kept = vec![first];
        let mut level = 0..1;
        for _ in 0..self.chains.iter().map(Vec::len).sum() {
            let mut next: Vec<State> = Vec::new();
            for before in level {
                let after = (0..3).filter_map(|chain| self.advance(&kept, before, chain));
                next.extend(after.filter(|state| state.value() < than));
            }
            undominated(&mut next);
            if next.len() > width {
                next.sort_by(|a, b| a.compare(b).then(a.order(b)));
                next.truncate(width);
            }
            level = kept.len()..kept.len() + next.len();
            kept.extend(next);
        }
        let last = kept[level].iter().min_by(|a, b| a.compare(b))?;
        let mut order = Vec::new();
        let mut state = last;
        while state.done != [0; 3] {
            order.push(state.chain);
            state = &kept[state.before];
        }
        order.reverse();
        Some((last.value(), order))
    }

    /// Takes the next node of a chain, if there is one and it may be.
    fn advance(&self, kept: &[State], before: usize, chain: usize) -> Option<State> {
        let State { mut done, now, mut arrives, free, deferred, .. } = kept[before];
        let &(all_to_all, time) = self.chains[chain].get(done[chain])?;
        if chain == 2 && self.weight_needs[done[2]] > done[1] {
            return None;
        }
        done[chain] += 1;
        // Both passes wait for their last all-to-all; weight gradients for nothing.
        let now = arrives.get(chain).map_or(now, |&arrives| now.max(arrives));
        let state = match all_to_all {
            true => {
                let end = now.max(free) + time;
                arrives[chain] = end;
                self.bounded(done, now, arrives, end)
            }
            false => self.bounded(done, now + time, arrives, free),
        };
        let possible = self.weight_needs.partition_point(|&needs| needs <= done[1]);
        let deferred = deferred.max(possible - done[2]);
        Some(State { before, chain, deferred, ..state })
    }

    fn bounded(&self, done: [usize; 3], now: f64, arrives: [f64; 2], free: f64) -> State {
        let (arrives, free) = (arrives.map(|time| time.max(now)), free.max(now));
        let [forward, inputs, weights] = [0, 1, 2].map(|chain: usize| self.rest[chain][done[chain]]);
        let bound = [
            now + (forward[0] + inputs[0] + weights[0]),
            free + (forward[1] + inputs[1]),
            arrives[0] + (forward[0] + forward[1]),
            arrives[1] + (inputs[0] + inputs[1]),
        ];
        let bound = bound.into_iter().fold(0.0, f64::max);
        State { done, now, arrives, free, deferred: 0, bound, before: 0, chain: 0 }
    }
}

impl State {
    fn value(&self) -> Value {
        (self.bound, self.deferred)
    }

    /// By value.
    fn compare(&self, other: &State) -> Ordering {
        self.bound.total_cmp(&other.bound).then(self.deferred.cmp(&other.deferred))
    }

    /// Equal beginnings stand together, the better ones first.
    fn order(&self, other: &State) -> Ordering {
        let times = |state: &State| [state.now, state.arrives[0], state.arrives[1], state.free];
        let pairs = times(self).into_iter().zip(times(other));
        let times = pairs.map(|(a, b)| a.total_cmp(&b)).find(|order| order.is_ne());
        let deferred = self.deferred.cmp(&other.deferred);
        self.done.cmp(&other.done).then(deferred).then(times.unwrap_or(Ordering::Equal))
    }

    /// Whether whatever follows `other` is no better than after this.
    fn dominates(&self, other: &State) -> bool {
        self.deferred <= other.deferred
            && self.now <= other.now
            && self.arrives[0] <= other.arrives[0]
            && self.arrives[1] <= other.arrives[1]
            && self.free <= other.free
    }
}

/// Leaves out what another beginning of the same nodes is at least as good as.
fn undominated(states: &mut Vec<State>) {
    states.sort_by(State::order);
    let mut kept: Vec<State> = Vec::with_capacity(states.len());
    let mut group = 0;
    for state in states.drain(..) {
        if kept.last().is_none_or(|last| last.done != state.done) {
            group = kept.len();
        }
        if !kept[group..].iter().any(|better| better.dominates(&state)) {
            kept.push(state);
        }
    }
    *states = kept;
}
