//! Why ranks as processes were refused, or failed.

use std::io;
use std::path::PathBuf;

/// Why ranks as processes were refused, or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// The environment says which rank this is, and not all that goes with it.
    #[error("{beside} is set and {variable} is not: {role}")]
    Missing {
        /// What is not set.
        variable: &'static str,
        /// What is.
        beside: &'static str,
        /// What the former would say.
        role: &'static str,
    },
    /// A variable of the environment that does not say what it should.
    #[error("{variable} is \"{value}\", but it must be {allowed}")]
    Malformed {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What it may be, in words that follow "must be".
        allowed: String,
    },
    /// Another number of processes than the configuration has ranks.
    #[error(
        "{variable} is {processes} and parallel.world_size is {world_size}: start one process for each rank, or set the latter to {processes}"
    )]
    WorldSize {
        /// The variable.
        variable: &'static str,
        /// Its value.
        processes: usize,
        /// That of the configuration.
        world_size: usize,
    },
    /// A process that is to be several ranks on GPUs.
    #[error(
        "train.device = \"cuda\" with parallel.world_size = {world_size} takes a process for each rank, and the environment does not say \
         which this one is (RANK, WORLD_SIZE and LOCAL_RANK, or Slurm's): start it by `moe-train train`, torchrun or srun"
    )]
    NoRank {
        /// That of the configuration.
        world_size: usize,
    },
    /// Fewer GPUs than ranks on this machine.
    #[error(
        "{ranks} ranks of this machine need a GPU each, and {gpus} {} seen: set parallel.world_size to {gpus}, start ranks on more machines, \
         or, to try things out, let them share GPUs with MOE_SHARE_GPUS=1", if *gpus == 1 { "is" } else { "are" }
    )]
    Gpus {
        /// Ranks, as far as this process knows.
        ranks: usize,
        /// GPUs that it sees.
        gpus: usize,
    },
    /// A process that was started with another configuration than the first rank.
    #[error("the settings of this rank are not those of rank 0: it has `{own}` where rank 0 has `{first}`")]
    Settings {
        /// A line of `config.toml`.
        own: String,
        /// The first rank's.
        first: String,
    },
    /// A rank could not be started.
    #[error("cannot start {} as rank {rank}: {source}", program.display())]
    Start {
        /// The rank.
        rank: usize,
        /// What was to be started.
        program: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A rank cannot be waited for.
    #[error("cannot wait for the process of rank {rank}: {source}")]
    Lost {
        /// The rank.
        rank: usize,
        /// The reason.
        source: io::Error,
    },
    /// The first rank that failed, which could not say why itself.
    #[error("{why}")]
    Ended {
        /// What is known.
        why: String,
        /// The exit status of the run.
        status: u8,
    },
    /// The first rank that failed, which has said why.
    #[error("rank {rank} ended with status {status}")]
    Said {
        /// The rank.
        rank: usize,
        /// Its exit status, and that of the run.
        status: u8,
    },
}
