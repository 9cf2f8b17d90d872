//! How a world fails.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;

use crate::Error;

pub(crate) type BoxError = Box<dyn StdError + Send + Sync>;

/// The first failure of a world.
#[derive(Debug)]
#[non_exhaustive]
pub struct WorldError {
    /// What happened, where and to whom: [`Error::Poisoned`].
    pub failure: Error,
    /// The error that the failed rank returned, if the world failed with it or with the rank's abort. Also the
    /// [`source`](StdError::source).
    pub source: Option<BoxError>,
    /// Ranks that had not ended when the others had.
    pub running: Vec<usize>,
}

impl WorldError {
    /// The rank that failed first, or did not answer.
    pub fn rank(&self) -> Option<usize> {
        match self.failure {
            Error::Poisoned { rank, .. } => Some(rank),
            _ => None,
        }
    }
}

impl fmt::Display for WorldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.failure.fmt(f)?;
        if !self.running.is_empty() {
            write!(f, " (still running: ranks {:?})", self.running)?;
        }
        Ok(())
    }
}

impl StdError for WorldError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|error| error as _)
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)")
}
