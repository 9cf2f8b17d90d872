//! The crate's error type.

use std::fmt;
use std::sync::Arc;

use moe_kernels::DType;
use moe_topology::GroupKey;

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between devices.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device refused.
    #[error(transparent)]
    Device(#[from] moe_kernels::Error),
    /// The world has failed. Its first failure is recorded once, and every later operation of every group returns
    /// it.
    #[error("rank {rank} failed{}: {why}", At { group: *group, op: *op, sequence: *sequence })]
    Poisoned {
        /// World rank that failed, or that did not answer.
        rank: usize,
        /// The group of the operation that failed, if the rank was in one.
        group: Option<GroupKey>,
        /// That operation.
        op: Option<&'static str>,
        /// Its number among the operations of the ranks of that group (for messages: of that pair), from 0.
        sequence: Option<u64>,
        /// What happened.
        why: Arc<str>,
    },
    /// A group that was not created with the world's communicators.
    #[error("no communicator for {group}; created are: {}", list(created))]
    NoGroup {
        /// The group that was asked for.
        group: GroupKey,
        /// The groups there are.
        created: Vec<GroupKey>,
    },
    /// A communicator for ranks that cannot form one.
    #[error("no communicator for {group} over ranks {ranks:?}: {why}")]
    BadGroup {
        /// The group that was asked for.
        group: GroupKey,
        /// Its ranks.
        ranks: Vec<usize>,
        /// What is wrong with them.
        why: &'static str,
    },
    /// The folding and the world have different sizes.
    #[error("the folding has {folding} ranks and the world {world}")]
    WorldSize {
        /// Ranks of the folding.
        folding: usize,
        /// Ranks of the world.
        world: usize,
    },
    /// A tensor with gaps between its rows.
    #[error("{op}: a [{rows}, {cols}] tensor with row stride {stride} is not contiguous; copy it first")]
    NotContiguous {
        /// The operation that refused.
        op: &'static str,
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Elements between the starts of two rows.
        stride: usize,
    },
    /// Arguments that contradict each other on this rank alone.
    #[error("{op}: {what}")]
    Argument {
        /// The operation that refused.
        op: &'static str,
        /// What is wrong, with the values.
        what: String,
    },
    /// A backend that cannot do an operation on this element type.
    #[error("{op} of {dtype} is not supported")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// The element type.
        dtype: DType,
    },
    /// A backend that did not do its part.
    #[error("the backend: {what}")]
    Backend {
        /// What it did wrong.
        what: &'static str,
    },
    /// Processes that do not come together, or lose the hub that they met at.
    #[error("{what}")]
    Rendezvous {
        /// What happened, with the hub's address.
        what: String,
    },
    /// A fault that [`Faulty`](crate::fault::Faulty) was told to inject.
    #[error("injected fault at {op} of {group}")]
    Injected {
        /// The group of the call that was made to fail.
        group: GroupKey,
        /// The operation.
        op: &'static str,
    },
}

struct At {
    group: Option<GroupKey>,
    op: Option<&'static str>,
    sequence: Option<u64>,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(op) = self.op {
            write!(f, " at {op}")?;
        }
        if let Some(sequence) = self.sequence {
            write!(f, " #{sequence}")?;
        }
        if let Some(group) = self.group {
            write!(f, " of {group}")?;
        }
        Ok(())
    }
}

fn list(keys: &[GroupKey]) -> String {
    keys.iter().map(GroupKey::to_string).collect::<Vec<_>>().join(", ")
}
