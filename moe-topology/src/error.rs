//! What can be wrong, with the equation and the values.

use std::fmt;
use std::ops::RangeInclusive;

use crate::{GroupKey, Nearest, Order};

/// Why a mapping, an order or a placement was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A mapping breaks a rule.
    #[error("illegal mapping: {rule}{nearest}")]
    Illegal {
        /// The rule and the values that break it.
        rule: Rule,
        /// The legal mappings with the fewest and smallest changes.
        nearest: Box<Nearest>,
    },
    /// An order has a name that is no axis.
    #[error(
        "unknown axis \"{name}\" in order \"{order}\": an order lists tp, cp, ep, dp, pp, as tp-cp-ep-dp-pp does"
    )]
    UnknownAxis {
        /// The name.
        name: String,
        /// The order it stands in.
        order: String,
    },
    /// An order names an axis twice.
    #[error("axis {name} stands twice in order \"{order}\": an order lists each of tp, cp, ep, dp, pp once")]
    RepeatedAxis {
        /// The axis.
        name: &'static str,
        /// The order it stands in.
        order: String,
    },
    /// A placement shards a dimension that the tensor does not have.
    #[error("cannot shard dimension {dim} of a tensor of shape {dims:?}")]
    NoSuchDimension {
        /// The dimension, from 0.
        dim: usize,
        /// The logical shape.
        dims: Vec<usize>,
    },
    /// A placement shards a dimension twice.
    #[error("dimension {dim} is sharded twice: give it all its axes at once, as in `TP | CP`")]
    ShardedTwice {
        /// The dimension, from 0.
        dim: usize,
    },
    /// A placement uses an axis for two things.
    #[error(
        "{axes} is used twice: an axis shards one dimension, or the gradient is partial over it, or neither"
    )]
    AxesUsedTwice {
        /// The axes in question.
        axes: GroupKey,
    },
    /// A placement shards or reduces over pipeline stages.
    #[error("a tensor belongs to a stage (its owner): it is neither sharded nor partial over pp")]
    OverStages,
    /// A logical tensor has more elements than can be counted.
    #[error("a tensor of shape {dims:?} has more than usize::MAX elements")]
    TooLarge {
        /// The logical shape.
        dims: Vec<usize>,
    },
    /// A placement's owner is not a stage of the folding.
    #[error("stage {stage} owns a tensor, but pp = {pp}")]
    NoSuchStage {
        /// The stage, from 0.
        stage: usize,
        /// Number of stages.
        pp: usize,
    },
    /// A cluster whose nodes or NVLink domains hold no ranks.
    #[error(
        "a node and an NVLink domain hold at least one rank each, not {ranks_per_node} and {nvlink_domain}"
    )]
    EmptyNode {
        /// Ranks per node.
        ranks_per_node: usize,
        /// Ranks per NVLink domain.
        nvlink_domain: usize,
    },
}

/// A rule of legality and the values that break it.
///
/// The first eight are about ranks; the others come from [`Constraints`](crate::Constraints) alone.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rule {
    /// A size is at least 1.
    Zero {
        /// What is 0.
        name: &'static str,
    },
    /// Ranks are counted in 32 bits.
    TooMany {
        /// Number of ranks.
        world_size: usize,
    },
    /// One number must be a multiple of others: `world_size % (tp·cp·pp) = 0`.
    Multiple {
        /// Name of the number.
        name: &'static str,
        /// The number.
        value: usize,
        /// What must divide it.
        of: Product,
    },
    /// An axis that is not in the order must have size 1.
    Unordered {
        /// The axis.
        name: &'static str,
        /// Its size.
        size: usize,
        /// The order without it.
        order: Order,
    },
    /// Both views must have the same pipeline groups: the sizes before `pp` multiply to the same.
    PipelineGroups {
        /// The order.
        order: Order,
        /// What comes before `pp` in the attention view.
        attention: Product,
        /// What comes before `pp` in the expert view.
        expert: Product,
    },
    /// Both views must have the same optimizer instances: as many, and the sizes up to `dp` and `edp` multiply to the
    /// same.
    OptimizerInstances {
        /// The order.
        order: Order,
        /// The number of instances, or what comes up to `dp`, in the attention view.
        attention: Product,
        /// The same in the expert view.
        expert: Product,
    },
    /// A split gives a size to something other than one digit of one axis.
    NotADigit {
        /// What was given a size.
        axes: GroupKey,
    },
    /// A digit of an axis has at least one value.
    EmptyDigit {
        /// The digit whose size a split gives as 0.
        digit: GroupKey,
    },
    /// Interleaved stages need a pipeline.
    Interleaved {
        /// Virtual stages per rank.
        vpp: usize,
    },
    /// One number must be at least another.
    AtLeast {
        /// Name of the number.
        name: &'static str,
        /// The number.
        value: usize,
        /// What it must reach.
        least: Product,
    },
    /// Key-value heads are divided by the ranks that heads are cut over (`tp`, or `tp·cp_ulysses`), or divide them
    /// (then each has replicas).
    KeyValueHeads {
        /// Number of key-value heads.
        num_key_value_heads: usize,
        /// The ranks that heads are cut over.
        of: Product,
    },
    /// A size is outside what was allowed.
    Outside {
        /// The axis.
        name: &'static str,
        /// Its size.
        size: usize,
        /// What was allowed.
        allowed: RangeInclusive<usize>,
    },
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero { name } => write!(f, "{name} must be at least 1, but is 0"),
            Self::TooMany { world_size } => write!(f, "world_size must be below 2^32, but is {world_size}"),
            Self::Multiple { name, value, of } => {
                // A product that overflows leaves all of the value.
                let rest = of.value().map_or(*value, |product| value % product);
                let by = if of.0.len() == 1 { of.values() } else { format!("({of})") };
                write!(f, "{name} must be a multiple of {}, but {value} % {by} = {rest}", of.names())
            }
            Self::Unordered { name, size, order } => {
                write!(f, "order {order} leaves out {name}, which then must be 1, but is {size}")
            }
            Self::PipelineGroups { order, attention, expert } => {
                same(f, "the pipeline groups", *order, attention, expert)
            }
            Self::OptimizerInstances { order, attention, expert } => {
                same(f, "the optimizer instances", *order, attention, expert)
            }
            Self::NotADigit { axes } => {
                write!(
                    f,
                    "a split gives a size to one digit of one axis, such as cp.inner, not to \"{axes}\""
                )
            }
            Self::EmptyDigit { digit } => write!(f, "{digit} must be at least 1, but is 0"),
            Self::Interleaved { vpp } => {
                write!(f, "vpp > 1 (interleaved stages) needs pp > 1, but vpp = {vpp} and pp = 1")
            }
            Self::AtLeast { name, value, least } => {
                write!(f, "{name} must be at least {}, but {value} < {least}", least.names())
            }
            Self::KeyValueHeads { num_key_value_heads: heads, of } => {
                let (names, ranks) = (of.names(), of.value().unwrap_or(usize::MAX));
                write!(
                    f,
                    "{names} must divide num_key_value_heads or be a multiple of it, but {names} = {of} and "
                )?;
                write!(f, "num_key_value_heads = {heads} ({heads} % {ranks} = {}, ", heads % ranks)?;
                write!(f, "{ranks} % {heads} = {})", ranks % heads)
            }
            Self::Outside { name, size, allowed } => match (*allowed.start(), *allowed.end()) {
                (least, usize::MAX) => write!(f, "{name} must be at least {least}, but is {size}"),
                (least, most) if least <= 1 => write!(f, "{name} must be at most {most}, but is {size}"),
                (least, most) => write!(f, "{name} must be between {least} and {most}, but is {size}"),
            },
        }
    }
}

impl std::error::Error for Rule {}

/// `what` is the same in both views if the products are.
fn same(
    f: &mut fmt::Formatter<'_>,
    what: &str,
    order: Order,
    attention: &Product,
    expert: &Product,
) -> fmt::Result {
    let (left, right) = (attention.names(), expert.names());
    write!(f, "{what} of both views must be the same, which with order {order} ")?;
    write!(f, "needs {left} = {right}, but {left} = {attention} and {right} = {expert}")
}

/// A product of named sizes, `tp·cp·pp`, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Product(Vec<(&'static str, usize)>);

impl Product {
    pub(crate) fn new(factors: &[(&'static str, usize)]) -> Self {
        Self(factors.into())
    }

    pub(crate) fn times(mut self, name: &'static str, size: usize) -> Self {
        self.0.push((name, size));
        self
    }

    /// The product, unless it overflows.
    #[must_use]
    pub fn value(&self) -> Option<usize> {
        self.0.iter().try_fold(1usize, |product, (_, size)| product.checked_mul(*size))
    }

    fn join(&self, factor: impl Fn(&(&'static str, usize)) -> String) -> String {
        if self.0.is_empty() {
            return "1".to_owned();
        }
        self.0.iter().map(factor).collect::<Vec<_>>().join("·")
    }

    /// `tp·cp·pp`.
    #[must_use]
    pub fn names(&self) -> String {
        self.join(|(name, _)| (*name).to_owned())
    }

    /// `2·1·8`.
    #[must_use]
    pub fn values(&self) -> String {
        self.join(|(_, size)| size.to_string())
    }
}

impl fmt::Display for Product {
    /// `2·1·8 = 16`, or `16` alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.len(), self.value()) {
            (2.., Some(value)) => write!(f, "{} = {value}", self.values()),
            _ => f.write_str(&self.values()),
        }
    }
}
