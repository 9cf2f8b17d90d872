//! Which buffer each value of a step is in, decided before it runs.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::{Action, Kind, Message, Pass, Program};

/// What a rank keeps between actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Value {
    /// What `F` leaves for `B` or `I`.
    Saved {
        /// The stage.
        stage: u32,
        /// The micro-batch.
        microbatch: u32,
    },
    /// What `I` leaves for `W`.
    Deferred {
        /// The stage.
        stage: u32,
        /// The micro-batch.
        microbatch: u32,
    },
    /// What another rank sends, from the receive on, or what a stage of the same rank makes, until it is used.
    Received(Message),
    /// What is sent to another rank, from when it is made until the send has ended.
    Sent(Message),
}

impl Value {
    fn class(self) -> usize {
        match self {
            Value::Saved { .. } => 0,
            Value::Deferred { .. } => 1,
            Value::Received(_) => 2,
            Value::Sent(_) => 3,
        }
    }
}

/// A value in its slot. No other value of its kind is in the slot from the action at `from` to the one at `until`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Life {
    /// The value.
    pub value: Value,
    /// Its slot among those for values of its kind, from 0.
    pub slot: u32,
    /// Index of the action in the rank's list that makes it or starts to receive it.
    pub from: usize,
    /// Index of the last action that reads it.
    pub until: usize,
}

/// The buffers of a rank: as few of each kind as there ever are values of it at once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffers {
    lives: Vec<Life>,
    slots: [u32; 4],
    of: HashMap<Value, usize>,
}

impl Buffers {
    /// Every value, in the order in which they begin.
    pub fn lives(&self) -> &[Life] {
        &self.lives
    }

    /// The slot of a value; none if the rank never has it.
    pub fn slot(&self, value: Value) -> Option<u32> {
        self.of.get(&value).map(|&at| self.lives[at].slot)
    }

    /// Slots for what `F` leaves.
    pub fn saved(&self) -> u32 {
        self.slots[0]
    }

    /// Slots for what `I` leaves.
    pub fn deferred(&self) -> u32 {
        self.slots[1]
    }

    /// Slots for what comes from neighbouring stages.
    pub fn received(&self) -> u32 {
        self.slots[2]
    }

    /// Slots for what goes to other ranks.
    pub fn sent(&self) -> u32 {
        self.slots[3]
    }
}

impl Program {
    /// Assigns every value that `rank` keeps between actions to a slot: for memory that is allocated once per run, for buffers
    /// that a transport registers beforehand (a [`Post`](crate::Post) names the message, which names the slot), for graphs that are
    /// captured once. None for a rank beyond the program's.
    ///
    /// Slots are taken in order, the lowest free one first (colouring of intervals), so there are as many as values of a kind are
    /// ever alive at once: fewer cannot do.
    ///
    /// ```
    /// use moe_pipeline::{Value, generate, lower, validate};
    ///
    /// let program = validate(lower(&generate::one_f_one_b(4, 100)?)?, None)?;
    /// let buffers = program.buffers(0);
    /// assert_eq!((buffers.saved(), buffers.received(), buffers.sent()), (4, 1, 2));
    /// assert_eq!(buffers.slot(Value::Saved { stage: 0, microbatch: 5 }), Some(1));
    /// # Ok::<(), moe_pipeline::Error>(())
    /// ```
    pub fn buffers(&self, rank: u32) -> Buffers {
        let mut buffers = Buffers::default();
        let mut free: [BinaryHeap<Reverse<u32>>; 4] = Default::default();
        for (index, &action) in self.schedule().list(rank).iter().enumerate() {
            for part in action.parts() {
                for value in self.begins(rank, part).into_iter().flatten() {
                    let slot = free[value.class()].pop().map(|Reverse(slot)| slot).unwrap_or_else(|| {
                        let slots = &mut buffers.slots[value.class()];
                        *slots += 1;
                        *slots - 1
                    });
                    buffers.of.insert(value, buffers.lives.len());
                    buffers.lives.push(Life { value, slot, from: index, until: index });
                }
            }
            // After all of the action's own are begun, lest an overlap's passes share one.
            for part in action.parts() {
                for value in self.ends(part).into_iter().flatten() {
                    let Some(&at) = buffers.of.get(&value) else { continue };
                    buffers.lives[at].until = index;
                    free[value.class()].push(Reverse(buffers.lives[at].slot));
                }
            }
        }
        buffers
    }

    /// What an action, or a part of an overlap, makes.
    fn begins(&self, rank: u32, part: Action) -> [Option<Value>; 2] {
        let placement = self.schedule().placement();
        let Action { stage, microbatch, .. } = part;
        let keeps = self.schedule().pass() == Pass::ForwardBackward;
        let kept = match part.kind {
            Kind::Forward => keeps.then_some(Value::Saved { stage, microbatch }),
            Kind::BackwardInput => Some(Value::Deferred { stage, microbatch }),
            Kind::Recv(_) => part.message(placement).map(Value::Received),
            _ => None,
        };
        let made = part.output(placement).map(|output| match placement.ends(output).1 == rank {
            true => Value::Received(output),
            false => Value::Sent(output),
        });
        [kept, made]
    }

    /// What it is the last to read.
    fn ends(&self, part: Action) -> [Option<Value>; 2] {
        let placement = self.schedule().placement();
        let Action { stage, microbatch, .. } = part;
        let kept = match part.kind {
            Kind::Backward | Kind::BackwardInput => Some(Value::Saved { stage, microbatch }),
            Kind::BackwardWeight => Some(Value::Deferred { stage, microbatch }),
            Kind::WaitSend(_) => part.message(placement).map(Value::Sent),
            _ => None,
        };
        [kept, part.input(placement).map(Value::Received)]
    }
}
