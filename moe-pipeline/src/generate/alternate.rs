//! Lists that go some forward passes ahead and then alternate.

use crate::Action;

/// The passes of a rank, in the order of each kind.
pub(super) struct Passes {
    pub(super) forward: Vec<Action>,
    pub(super) backward: Vec<Action>,
}

impl Passes {
    /// `ahead` forward passes, then one forward and one backward pass in turn, then the backward passes that are left.
    pub(super) fn alternate(self, ahead: u64) -> Vec<Action> {
        let ahead = self.ahead(ahead);
        let mut list = Vec::with_capacity(self.forward.len() + self.backward.len());
        list.extend_from_slice(&self.forward[..ahead]);
        for (at, &backward) in self.backward.iter().enumerate() {
            list.extend(self.forward.get(ahead + at));
            list.push(backward);
        }
        list
    }

    /// The same, where each `W` (an action of `weight`) comes `delay` input gradients after its own.
    pub(super) fn alternate_split(
        self,
        ahead: u64,
        delay: usize,
        weight: impl Fn(Action) -> Action,
    ) -> Vec<Action> {
        let ahead = self.ahead(ahead);
        let mut list = Vec::with_capacity(self.forward.len() + 2 * self.backward.len());
        list.extend_from_slice(&self.forward[..ahead]);
        let mut weights = self.backward.iter().map(|&input| weight(input));
        for (at, &input) in self.backward.iter().enumerate() {
            list.extend(self.forward.get(ahead + at));
            list.push(input);
            if at >= delay {
                list.extend(weights.next());
            }
        }
        list.extend(weights);
        list
    }

    /// The same as [`alternate`](Passes::alternate), the two of a turn in one overlap.
    pub(super) fn overlap(self, ahead: u64) -> Vec<Action> {
        let ahead = self.ahead(ahead);
        let mut list = Vec::with_capacity(self.forward.len().max(ahead + self.backward.len()));
        list.extend_from_slice(&self.forward[..ahead]);
        for (at, &backward) in self.backward.iter().enumerate() {
            list.push(match self.forward.get(ahead + at) {
                Some(f) => Action::overlap((f.stage, f.microbatch), (backward.stage, backward.microbatch)),
                None => backward,
            });
        }
        list
    }

    fn ahead(&self, ahead: u64) -> usize {
        self.forward.len().min(usize::try_from(ahead).unwrap_or(usize::MAX))
    }
}
