//! Schedules by name.

use std::fmt;
use std::str::FromStr;

use super::{
    breadth_first, dual_pipe, dual_pipe_v, gpipe, interleaved_1f1b, interleaved_zero_bubble, one_f_one_b,
    overlapped_1f1b, v_half, v_min, zb_h1, zb_h2, zb_v,
};
use crate::{Error, Placement, Result, Schedule};

/// A published schedule for training. Its text is its name, and torch's name (`"ZBVZeroBubble"`) is read as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Named {
    /// [`gpipe`]
    GPipe,
    /// [`one_f_one_b`]
    OneFOneB,
    /// [`breadth_first`]
    BreadthFirst,
    /// [`interleaved_1f1b`]
    Interleaved1F1B,
    /// [`overlapped_1f1b`]
    Overlapped1F1B,
    /// [`zb_h1`]
    ZbH1,
    /// [`interleaved_zero_bubble`]
    InterleavedZeroBubble,
    /// [`zb_h2`]
    ZbH2,
    /// [`zb_v`]
    ZbV,
    /// [`v_half`]
    VHalf,
    /// [`v_min`]
    VMin,
    /// [`dual_pipe`]
    DualPipe,
    /// [`dual_pipe_v`]
    DualPipeV,
}

/// For how many ranks, stages and micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sizes {
    /// Pipeline ranks.
    pub ranks: u32,
    /// Stages per rank, those of all copies.
    pub virtual_stages: u32,
    /// Micro-batches of a step.
    pub microbatches: u32,
    /// Micro-batches that go through one stage before the next, where a schedule has such groups. Unless given, as many as fill
    /// the pipeline once or a little more, in groups of the same size: m / ⌊m/p⌋, as torch has it; m where m < p. (The generators
    /// themselves, called without a group, take Megatron's p.)
    pub group: Option<u32>,
}

impl Sizes {
    /// The group, given or not.
    pub(super) fn group_or_default(self) -> u32 {
        let rounds = self.microbatches.checked_div(self.ranks).unwrap_or(0).max(1);
        self.group.unwrap_or(self.microbatches / rounds)
    }
}

impl Named {
    /// All of them.
    pub const ALL: &'static [Named] = &[
        Named::GPipe,
        Named::OneFOneB,
        Named::BreadthFirst,
        Named::Interleaved1F1B,
        Named::Overlapped1F1B,
        Named::ZbH1,
        Named::InterleavedZeroBubble,
        Named::ZbH2,
        Named::ZbV,
        Named::VHalf,
        Named::VMin,
        Named::DualPipe,
        Named::DualPipeV,
    ];

    /// Its name here.
    pub const fn name(self) -> &'static str {
        match self {
            Named::GPipe => "gpipe",
            Named::OneFOneB => "1f1b",
            Named::BreadthFirst => "breadth-first",
            Named::Interleaved1F1B => "interleaved-1f1b",
            Named::Overlapped1F1B => "overlapped-1f1b",
            Named::ZbH1 => "zb-h1",
            Named::InterleavedZeroBubble => "interleaved-zero-bubble",
            Named::ZbH2 => "zb-h2",
            Named::ZbV => "zb-v",
            Named::VHalf => "v-half",
            Named::VMin => "v-min",
            Named::DualPipe => "dual-pipe",
            Named::DualPipeV => "dual-pipe-v",
        }
    }

    /// Its name in torch, if torch has it.
    pub const fn torch_name(self) -> Option<&'static str> {
        Some(match self {
            Named::GPipe => "GPipe",
            Named::OneFOneB => "1F1B",
            Named::BreadthFirst => "LoopedBFS",
            Named::Interleaved1F1B => "Interleaved1F1B",
            Named::InterleavedZeroBubble => "InterleavedZeroBubble",
            Named::ZbV => "ZBVZeroBubble",
            Named::DualPipeV => "DualPipeV",
            _ => return None,
        })
    }

    /// How many stages each rank has, where that is not free.
    pub const fn virtual_stages(self) -> Option<u32> {
        match self {
            Named::GPipe | Named::OneFOneB | Named::ZbH1 | Named::ZbH2 => Some(1),
            Named::ZbV | Named::VHalf | Named::VMin | Named::DualPipe | Named::DualPipeV => Some(2),
            Named::BreadthFirst
            | Named::Interleaved1F1B
            | Named::Overlapped1F1B
            | Named::InterleavedZeroBubble => None,
        }
    }

    /// Where it has the stages of so many ranks, with so many on each.
    ///
    /// # Errors
    /// Another number of stages per rank than it has, no rank, or more stages than can be numbered.
    pub fn placement(self, ranks: u32, virtual_stages: u32) -> Result<Placement> {
        self.check_stages(virtual_stages)?;
        match self {
            Named::ZbV | Named::VHalf | Named::VMin | Named::DualPipeV => Placement::v_shaped(ranks),
            Named::DualPipe => Placement::bidirectional(ranks),
            _ => Placement::looped(ranks, virtual_stages),
        }
    }

    fn check_stages(self, got: u32) -> Result<()> {
        match self.virtual_stages() {
            Some(expected) if expected != got => {
                Err(Error::VirtualStages { schedule: self.name(), expected, got })
            }
            _ => Ok(()),
        }
    }

    /// Whether several virtual stages take micro-batches in [groups](Sizes::group).
    pub const fn has_groups(self) -> bool {
        matches!(self, Named::Interleaved1F1B | Named::Overlapped1F1B | Named::InterleavedZeroBubble)
    }

    /// Whether it takes a forward and a backward pass as one [overlap](crate::Kind::Overlap), given enough micro-batches.
    pub const fn has_overlaps(self) -> bool {
        matches!(self, Named::Overlapped1F1B | Named::DualPipe | Named::DualPipeV)
    }

    /// The schedule.
    ///
    /// # Errors
    /// Another number of stages per rank than it has, or sizes that its generator refuses.
    pub fn generate(self, sizes: Sizes) -> Result<Schedule> {
        let Sizes { ranks: p, virtual_stages: v, microbatches: m, .. } = sizes;
        self.check_stages(v)?;
        let group = Some(sizes.group_or_default());
        match self {
            Named::GPipe => gpipe(p, m),
            Named::OneFOneB => one_f_one_b(p, m),
            Named::BreadthFirst => breadth_first(p, v, m),
            Named::Interleaved1F1B => interleaved_1f1b(p, v, m, group),
            Named::Overlapped1F1B => overlapped_1f1b(p, v, m, group),
            Named::ZbH1 => zb_h1(p, m),
            Named::InterleavedZeroBubble => interleaved_zero_bubble(p, v, m, group),
            Named::ZbH2 => zb_h2(p, m),
            Named::ZbV => zb_v(p, m),
            Named::VHalf => v_half(p, m),
            Named::VMin => v_min(p, m),
            Named::DualPipe => dual_pipe(p, m),
            Named::DualPipeV => dual_pipe_v(p, m),
        }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Named {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let named = |named: &Named| named.name() == text || named.torch_name() == Some(text);
        Named::ALL.iter().copied().find(named).ok_or_else(|| Error::NotASchedule {
            text: text.to_owned(),
            names: Named::ALL.iter().map(|named| named.name()).collect::<Vec<_>>().join(", "),
        })
    }
}
