//! The crate's error type.

use std::fmt;
use std::time::Duration;

use crate::weave::{Layer, Step};
use crate::{Action, Message};

/// Result of the fallible calls of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Where in a schedule an action stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct At {
    /// The pipeline rank.
    pub rank: u32,
    /// Position in the rank's list, from 0.
    pub index: usize,
    /// The action there.
    pub action: Action,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (rank {}, index {})", self.action, self.rank, self.index)
    }
}

/// What can be wrong with a schedule, its text, its costs, or the channels it runs over.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A pipeline needs at least one rank, one stage and one micro-batch.
    #[error("a schedule needs at least one {what}")]
    Empty {
        /// What there is none of.
        what: &'static str,
    },
    /// Stages are numbered below 2³¹.
    #[error("{stages} stages are more than a placement can number")]
    TooManyStages {
        /// Stages asked for.
        stages: usize,
    },
    /// Copies of a pipeline are equally long.
    #[error("{stages} stages cannot be {copies} copies of a pipeline")]
    Copies {
        /// Stages of the placement.
        stages: u32,
        /// Copies asked for.
        copies: u32,
    },
    /// Ranks are numbered densely and each owns a stage.
    #[error("rank {rank} owns no stage, though the placement has {ranks} ranks")]
    RankWithoutStage {
        /// The idle rank.
        rank: u32,
        /// Ranks of the placement.
        ranks: u32,
    },
    /// One list of actions per rank.
    #[error("{lists} lists of actions for {ranks} ranks")]
    Lists {
        /// Lists given.
        lists: usize,
        /// Ranks of the placement.
        ranks: u32,
    },
    /// Fewer actions than forward passes alone would be.
    #[error("{actions} actions cannot take {microbatches} micro-batches through {stages} stages")]
    TooFewActions {
        /// Actions of all lists.
        actions: usize,
        /// Stages of the placement.
        stages: u32,
        /// Micro-batches of the schedule.
        microbatches: u32,
    },
    /// A stage number beyond the placement.
    #[error("{at}: the pipeline has {stages} stages")]
    UnknownStage {
        /// The action.
        at: At,
        /// Stages of the placement.
        stages: u32,
    },
    /// A micro-batch number beyond the schedule's.
    #[error("{at}: the schedule has {microbatches} micro-batches")]
    UnknownMicrobatch {
        /// The action.
        at: At,
        /// Micro-batches of the schedule.
        microbatches: u32,
    },
    /// A micro-batch that another copy of the pipeline takes.
    #[error("{at}: this copy of the pipeline takes micro-batches {first}..{end}")]
    OtherCopy {
        /// The action.
        at: At,
        /// First micro-batch of the stage's copy.
        first: u32,
        /// One past its last.
        end: u32,
    },
    /// An action in the list of a rank that does not own the stage.
    #[error("{at}: stage {} is owned by rank {owner}", at.action.stage)]
    WrongRank {
        /// The action.
        at: At,
        /// The rank that owns the stage.
        owner: u32,
    },
    /// A message where no boundary between ranks is.
    #[error(
        "{at}: there is no message here: the stage is the pipeline's end, or its neighbour is on the same rank"
    )]
    NoBoundary {
        /// The action.
        at: At,
    },
    /// A backward action in a forward-only schedule.
    #[error("{at}: the schedule is forward-only")]
    ForwardOnly {
        /// The action.
        at: At,
    },

    /// Groups of micro-batches that interleaved stages cannot work in.
    #[error(
        "{virtual_stages} virtual stages on {ranks} ranks cannot take {microbatches} micro-batches in groups of {group}: \
         groups have at least {ranks} (the ranks), the last one too, and at most all micro-batches (one group of all may have \
         fewer, but leaves ranks without work); {}",
        nearest(*ranks, *microbatches, *group)
    )]
    Group {
        /// Ranks of the placement.
        ranks: u32,
        /// Stages per rank.
        virtual_stages: u32,
        /// Micro-batches of the step.
        microbatches: u32,
        /// Micro-batches that go through one stage before the next.
        group: u32,
    },

    /// Sizes that a schedule is not defined for.
    #[error("{schedule} on {ranks} ranks cannot take {microbatches} micro-batches: it needs {needs}")]
    Sizes {
        /// The schedule.
        schedule: &'static str,
        /// Ranks asked for.
        ranks: u32,
        /// Micro-batches asked for.
        microbatches: u32,
        /// What it is defined for.
        needs: String,
    },
    /// A schedule for another number of stages per rank.
    #[error("{schedule} has {expected} stage(s) per rank, not {got}")]
    VirtualStages {
        /// The schedule.
        schedule: &'static str,
        /// Stages per rank that it has.
        expected: u32,
        /// Stages per rank asked for.
        got: u32,
    },
    /// Text that is no schedule's name.
    #[error("{text:?} is no schedule; there are {names}, and torch's names for them")]
    NotASchedule {
        /// The text.
        text: String,
        /// The names.
        names: String,
    },
    /// Less memory than one micro-batch needs.
    #[error(
        "rank {rank} has {stages} stages, so {budget} activations cannot take a micro-batch through them: allow {stages} or more"
    )]
    TooFewActivations {
        /// The rank.
        rank: u32,
        /// Its stages.
        stages: u32,
        /// Activations allowed.
        budget: u32,
    },

    /// Lowering starts from less than it was given.
    #[error("{at}: the schedule already has such actions")]
    AlreadyLowered {
        /// The first action that lowering would have added itself.
        at: At,
    },
    /// The compute order can never run, whatever the transport.
    #[error("{at}: can never run, because the {needs} is never made before it")]
    Stuck {
        /// The action that waits for ever.
        at: At,
        /// What it waits for.
        needs: Message,
    },

    /// An action occurs twice (a buffer would be freed twice, a gradient added twice).
    #[error("{at}: done before")]
    Duplicate {
        /// The second occurrence.
        at: At,
    },
    /// An action never occurs.
    #[error("rank {rank} never does {action}")]
    Missing {
        /// The rank whose list lacks it.
        rank: u32,
        /// The action.
        action: Action,
    },
    /// A stage's micro-batches are not in ascending order, so sums would depend on the schedule.
    #[error("{at}: micro-batch {expected} of this stage comes first")]
    OutOfOrder {
        /// The action.
        at: At,
        /// The micro-batch whose turn it is.
        expected: u32,
    },
    /// An action stands before one that it depends on.
    #[error("{at}: needs {needs} before it")]
    Premature {
        /// The action.
        at: At,
        /// What must come before it on the same rank.
        needs: Action,
    },
    /// Ranks that wait for each other under a rendezvous transport.
    #[error("deadlock under rendezvous: {}", chain(cycle))]
    Deadlock {
        /// Each waits for the next, the last for the first.
        cycle: Vec<At>,
    },
    /// More micro-batches in flight than the budget allows.
    #[error("{at}: {in_flight} activations in flight exceed the budget of {budget}")]
    OverBudget {
        /// The forward pass that is one too many.
        at: At,
        /// Activations in flight with it.
        in_flight: u32,
        /// The budget.
        budget: u32,
    },

    /// A list of costs of the wrong length.
    #[error("{got} costs for {expected} {what}")]
    CostCount {
        /// What is priced.
        what: &'static str,
        /// How many there are.
        expected: usize,
        /// How many were given.
        got: usize,
    },
    /// More memory than 64 bits count.
    #[error("{at}: what the rank keeps is more than can be counted")]
    MemoryOverflow {
        /// The action that keeps too much.
        at: At,
    },
    /// A timeline of another program, or of a part of it.
    #[error("rank {rank} of the timeline does not do what the program does")]
    OtherTimeline {
        /// The first such rank.
        rank: u32,
    },
    /// A cost that is negative or not a number.
    #[error("the cost of {what} {index} is {value}; costs are finite and not negative")]
    Cost {
        /// What is priced.
        what: &'static str,
        /// Which of them.
        index: usize,
        /// The value given.
        value: f64,
    },
    /// A share of time that is none.
    #[error("{value} of an overlap's shorter pass is said to be hidden; it is a share from 0 to 1")]
    OverlapShare {
        /// The value given.
        value: f64,
    },

    /// A step of a node that neither pass has.
    #[error("step {index}, {step}: neither pass has it")]
    UnknownStep {
        /// Its position, from 0.
        index: usize,
        /// The step.
        step: Step,
    },
    /// A step before one that it depends on.
    #[error("step {index}, {step}: needs {needs} before it")]
    PrematureStep {
        /// Its position, from 0.
        index: usize,
        /// The step.
        step: Step,
        /// What must come before it.
        needs: Step,
    },
    /// A step that occurs twice.
    #[error("step {index}, {step}: done before")]
    DuplicateStep {
        /// Position of the second occurrence, from 0.
        index: usize,
        /// The step.
        step: Step,
    },
    /// A step that never occurs.
    #[error("{step} is never done")]
    MissingStep {
        /// The step.
        step: Step,
    },
    /// An overlap whose stages were not woven together: the costs are for another placement.
    #[error("{action}: the costs are of a placement in which no rank has both stages")]
    NotWoven {
        /// The overlap.
        action: Action,
    },
    /// Costs of a layer of another kind.
    #[error("layer {index} of the {pass} pass is {expected:?}, and its cost is that of another kind")]
    LayerCost {
        /// Which pass.
        pass: &'static str,
        /// The layer.
        index: usize,
        /// What it is made of.
        expected: Layer,
    },
    /// Text that is not a step.
    #[error("{text:?} is not a step; steps read like 0F_ATTENTION, 3I_WAIT_COMBINE")]
    NotAStep {
        /// The text.
        text: String,
    },

    /// Text that is not an action.
    #[error("{text:?} is not an action; actions read like 2F0, 1SEND_B3")]
    NotAnAction {
        /// The text.
        text: String,
    },
    /// Text in a schedule that is not an action.
    #[error("line {line}, column {column}: {text:?} is not an action; actions read like 2F0, 1SEND_B3")]
    Parse {
        /// Line, from 1; it is the rank plus 1.
        line: usize,
        /// Comma-separated column, from 1.
        column: usize,
        /// The text.
        text: String,
    },
    /// A stage that computes nowhere in the text, though a higher one does: no rank can be given to it.
    #[error("stage {stage} computes nothing, though stage {named} does")]
    UnplacedStage {
        /// The stage.
        stage: u32,
        /// The higher stage.
        named: u32,
    },

    /// A peer did not answer within the deadline.
    #[error("rank {rank} waited {after:?} for rank {peer}: {message}")]
    Timeout {
        /// The rank that waited.
        rank: u32,
        /// The rank that did not answer.
        peer: u32,
        /// What was to be exchanged.
        message: Message,
        /// The deadline.
        after: Duration,
    },
    /// A peer ended before an exchange.
    #[error("rank {peer} is gone, and rank {rank} needs it: {message}")]
    PeerGone {
        /// The rank that noticed.
        rank: u32,
        /// The rank that ended.
        peer: u32,
        /// What was to be exchanged.
        message: Message,
    },
    /// A peer gave up and said why.
    #[error("rank {peer} aborted: {why}")]
    Aborted {
        /// The rank that gave up.
        peer: u32,
        /// Its reason.
        why: String,
    },
    /// A message other than the next expected one.
    #[error("rank {rank} expected from rank {peer}: {expected}; got: {got}")]
    Mismatch {
        /// The rank that received.
        rank: u32,
        /// The rank that sent.
        peer: u32,
        /// What the receiver asked for.
        expected: Message,
        /// What came.
        got: Message,
    },
    /// A rank beyond the channels.
    #[error("there is no rank {rank} among {ranks}")]
    UnknownRank {
        /// The rank asked for.
        rank: u32,
        /// How many there are.
        ranks: u32,
    },
}

fn chain(cycle: &[At]) -> String {
    let steps: Vec<String> = cycle.iter().map(At::to_string).collect();
    format!("{} waits for the first", steps.join(" waits for "))
}

/// What to change where [`Error::Group`] is.
fn nearest(ranks: u32, microbatches: u32, group: u32) -> String {
    match group < ranks {
        true if microbatches < ranks => {
            return format!("the nearest are groups of {ranks}, of {ranks} micro-batches or more");
        }
        true => return format!("the nearest group is {ranks}"),
        false => {}
    }
    let rest = |m: u32| m.checked_rem(group).unwrap_or(0);
    let legal = |m: u32| m >= group && (rest(m) == 0 || rest(m) >= ranks);
    let below = (group..microbatches).rev().find(|&m| legal(m));
    let above = (microbatches.max(group)..=u32::MAX).find(|&m| legal(m));
    let numbers: Vec<String> = below.into_iter().chain(above).map(|m| m.to_string()).collect();
    let whole =
        if microbatches >= ranks { format!("; or one group of {microbatches}") } else { String::new() };
    format!("the nearest numbers of micro-batches: {}{whole}", numbers.join(", "))
}
