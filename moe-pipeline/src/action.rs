//! What a rank does, one step at a time: the alphabet of schedules.

use std::fmt;

use crate::Placement;

/// The direction in which data crosses a stage boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flow {
    /// Activations, from stage `s` to stage `s + 1`.
    Forward,
    /// Gradients of activations, from stage `s` to stage `s - 1`.
    Backward,
}

/// What an [`Action`] does. The short names are those of torch's pipelining.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Kind {
    /// `F`: the forward pass.
    Forward,
    /// `I`: the gradient of the stage's input.
    BackwardInput,
    /// `W`: the gradient of the stage's weights, what `I` left to do.
    BackwardWeight,
    /// `B`: `I` and `W` in one.
    Backward,
    /// `OVERLAP_F_B`: the action's `F`, woven with the `B` of another stage or micro-batch, so that what one of them waits
    /// for (an all-to-all) hides behind what the other computes. Both inputs are there before it begins, and both outputs
    /// after it ends.
    Overlap {
        /// The stage of the `B`.
        stage: u32,
        /// The micro-batch of the `B`.
        microbatch: u32,
    },
    /// `SEND_F`, `SEND_B`: starts to send the stage's output (or the gradient of its input).
    Send(Flow),
    /// `RECV_F`, `RECV_B`: starts to receive the stage's input (or the gradient of its output).
    Recv(Flow),
    /// `WAIT_SEND_F`, `WAIT_SEND_B`: ends the send of the same name; what was sent is released.
    WaitSend(Flow),
    /// `WAIT_RECV_F`, `WAIT_RECV_B`: ends the receive of the same name; what arrived can be used.
    WaitRecv(Flow),
}

impl Kind {
    /// Whether it is `F`, `I`, `W`, `B` or an overlap of `F` and `B`.
    pub const fn is_compute(self) -> bool {
        !matches!(self, Kind::Send(_) | Kind::Recv(_) | Kind::WaitSend(_) | Kind::WaitRecv(_))
    }

    /// The short name (`"F"`, `"SEND_B"`, …).
    pub const fn name(self) -> &'static str {
        use Flow::{Backward, Forward};
        match self {
            Kind::Forward => "F",
            Kind::BackwardInput => "I",
            Kind::BackwardWeight => "W",
            Kind::Backward => "B",
            Kind::Overlap { .. } => "OVERLAP_F_B",
            Kind::Send(Forward) => "SEND_F",
            Kind::Send(Backward) => "SEND_B",
            Kind::Recv(Forward) => "RECV_F",
            Kind::Recv(Backward) => "RECV_B",
            Kind::WaitSend(Forward) => "WAIT_SEND_F",
            Kind::WaitSend(Backward) => "WAIT_SEND_B",
            Kind::WaitRecv(Forward) => "WAIT_RECV_F",
            Kind::WaitRecv(Backward) => "WAIT_RECV_B",
        }
    }
}

/// One step of a rank: a kind, for one stage and one micro-batch. Written `2F0`: stage 2, forward, micro-batch 0; an overlap
/// is written `(2F4;5B0)OVERLAP_F_B`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Action {
    /// The stage that the rank acts for.
    pub stage: u32,
    /// What is done.
    pub kind: Kind,
    /// The micro-batch, counted from 0 in each step.
    pub microbatch: u32,
}

impl Action {
    /// An action.
    pub const fn new(stage: u32, kind: Kind, microbatch: u32) -> Self {
        Action { stage, kind, microbatch }
    }

    /// `F` of a stage and micro-batch, woven with `B` of another.
    pub const fn overlap(forward: (u32, u32), backward: (u32, u32)) -> Self {
        Action {
            stage: forward.0,
            kind: Kind::Overlap { stage: backward.0, microbatch: backward.1 },
            microbatch: forward.1,
        }
    }

    /// What it is made of: its `F` and its `B` if it is an overlap, otherwise itself.
    pub fn parts(self) -> impl Iterator<Item = Action> {
        let (first, second) = match self.kind {
            Kind::Overlap { stage, microbatch } => {
                (Action { kind: Kind::Forward, ..self }, Some(Action::new(stage, Kind::Backward, microbatch)))
            }
            _ => (self, None),
        };
        std::iter::once(first).chain(second)
    }

    /// What a compute action needs from the neighbouring stage, if anything. (An overlap's [parts](Action::parts) each
    /// need their own.)
    pub fn input(self, placement: &Placement) -> Option<Message> {
        let flow = match self.kind {
            Kind::Forward => Flow::Forward,
            Kind::Backward | Kind::BackwardInput => Flow::Backward,
            _ => return None,
        };
        let message = Message { flow, stage: self.stage, microbatch: self.microbatch };
        placement.crosses(message).then_some(message)
    }

    /// What a compute action makes for the neighbouring stage, if anything. (An overlap's [parts](Action::parts) each make
    /// their own.)
    pub fn output(self, placement: &Placement) -> Option<Message> {
        let flow = match self.kind {
            Kind::Forward => Flow::Forward,
            Kind::Backward | Kind::BackwardInput => Flow::Backward,
            _ => return None,
        };
        let message = Message { flow, stage: flow.next(self.stage)?, microbatch: self.microbatch };
        placement.crosses(message).then_some(message)
    }

    /// The message of a send, a receive or a wait; none for a compute action, and none where no message can be: beyond
    /// the first and last stages.
    pub fn message(self, placement: &Placement) -> Option<Message> {
        let (flow, stage) = match self.kind {
            Kind::Send(flow) | Kind::WaitSend(flow) => (flow, flow.next(self.stage)?),
            Kind::Recv(flow) | Kind::WaitRecv(flow) => (flow, self.stage),
            _ => return None,
        };
        let message = Message { flow, stage, microbatch: self.microbatch };
        placement.crosses(message).then_some(message)
    }
}

impl Flow {
    /// The stage after `stage` in this direction.
    fn next(self, stage: u32) -> Option<u32> {
        match self {
            Flow::Forward => stage.checked_add(1),
            Flow::Backward => stage.checked_sub(1),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Action { stage, kind, microbatch } = *self;
        match kind {
            Kind::Overlap { stage: back, microbatch: behind } => {
                write!(f, "({stage}F{microbatch};{back}B{behind}){}", kind.name())
            }
            _ => write!(f, "{stage}{}{microbatch}", kind.name()),
        }
    }
}

/// What crosses a stage boundary once: the header that sender and receiver agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Message {
    /// Activations or gradients.
    pub flow: Flow,
    /// The stage that uses it.
    pub stage: u32,
    /// The micro-batch.
    pub microbatch: u32,
}

impl Message {
    /// The stage that makes it, which is the next one against its direction; none for the input of stage 0. A message does not know
    /// where its pipeline ends: of one that crosses no boundary, such as a gradient for the last stage, this is a stage that does not
    /// exist or is of another copy.
    pub fn producer(self) -> Option<u32> {
        match self.flow {
            Flow::Forward => self.stage.checked_sub(1),
            Flow::Backward => self.stage.checked_add(1),
        }
    }

    /// The boundary that it crosses: `s` between stages `s` and `s + 1`. The message must cross one.
    pub(crate) fn boundary(self) -> u32 {
        match self.flow {
            Flow::Forward => self.stage - 1,
            Flow::Backward => self.stage,
        }
    }

    /// One number for the header, distinct for distinct messages of a step: for transports that match by tag.
    pub const fn tag(self) -> u64 {
        // Placements have fewer than 2^31 stages.
        (self.microbatch as u64) << 32 | (self.stage as u64) << 1 | self.flow as u64
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.flow {
            Flow::Forward => "activation",
            Flow::Backward => "gradient",
        };
        write!(f, "{what} for stage {} of micro-batch {}", self.stage, self.microbatch)
    }
}
