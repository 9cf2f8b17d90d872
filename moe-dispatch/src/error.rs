//! The crate's error type.

/// What can go wrong between a routing and the experts.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A coordinate outside its axis.
    #[error("{axis} rank {rank} of {size}: ranks run from 0 to size − 1")]
    Coordinate {
        /// The axis: `"ep"`, `"etp"` or `"world"`.
        axis: &'static str,
        /// The rank along it.
        rank: usize,
        /// Its size.
        size: usize,
    },
    /// Experts that cannot be spread evenly.
    #[error("num_experts ({num_experts}) must be a positive multiple of ep ({ep})")]
    Experts {
        /// Experts of the layer.
        num_experts: usize,
        /// Expert-parallel size.
        ep: usize,
    },
    /// A factor of a capacity that is not above 0.
    #[error("a capacity factor must be above 0, but this one is {factor}")]
    Factor {
        /// The factor.
        factor: f64,
    },
    /// A routing of other choices than its tokens have.
    #[error("a routing of {tokens} tokens with {top_k} choices each has {choices} choices")]
    Routing {
        /// Choices that it has.
        choices: usize,
        /// Tokens that it says.
        tokens: usize,
        /// Choices of each token.
        top_k: usize,
    },
    /// Exchanged counts that are no counts: the wrong number of them, negative or descending ones, or more rows than
    /// an `i32` index can name.
    #[error("exchanged counts: {what}")]
    Counts {
        /// What is wrong, with the values.
        what: String,
    },
    /// A flight that ended in another call than it was started for.
    #[error("{call}: the flight that was handed in carries no {missing}")]
    Flight {
        /// The call that refused.
        call: &'static str,
        /// What the flight should have carried.
        missing: &'static str,
    },
    /// No dispatcher of this name.
    #[error("no dispatcher is called `{name}`; there are `all-to-all` and `all-gather`")]
    UnknownDispatcher {
        /// The name that was asked for.
        name: String,
    },
    /// A router that cannot be.
    #[cfg(feature = "native")]
    #[error("router: {what}")]
    Router {
        /// What is wrong, with the values.
        what: String,
    },
    /// A grid that is not the communicators'.
    #[cfg(feature = "native")]
    #[error(
        "the grid places this rank at {rank} of {size} in {group}, its communicator at {comm_rank} of {comm_size}"
    )]
    Grid {
        /// The group.
        group: moe_topology::GroupKey,
        /// Position by the grid.
        rank: usize,
        /// Size by the grid.
        size: usize,
        /// Position by the communicator.
        comm_rank: usize,
        /// Size by the communicator.
        comm_size: usize,
    },
    /// A transfer in a group of one rank, whose fabric has no communicators.
    #[cfg(feature = "native")]
    #[error("a rank that holds all experts has nobody to transfer rows to")]
    Alone,
    /// The device refused.
    #[cfg(feature = "native")]
    #[error(transparent)]
    Device(#[from] moe_kernels::Error),
    /// A collective failed.
    #[cfg(feature = "native")]
    #[error(transparent)]
    Comm(#[from] moe_comm::Error),
}
