//! What every kernel checks at its boundary.

use crate::{Error, Result};

/// An error unless `got` is `expected`.
pub(crate) fn shape(
    kernel: &'static str,
    what: &'static str,
    expected: [usize; 2],
    got: [usize; 2],
) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Shape { kernel, what, expected, got }) }
}

/// An error unless `holds`; `what` says which condition failed, with the values.
pub(crate) fn argument(kernel: &'static str, holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Argument { kernel, what: what() }) }
}

/// An error unless all indices are below `end`; negative ones are the kernel's to give a meaning to.
pub(crate) fn indices<'a>(
    kernel: &'static str,
    what: &'static str,
    indices: impl IntoIterator<Item = &'a i32>,
    end: usize,
) -> Result<()> {
    match indices.into_iter().find(|&&i| i >= 0 && i as usize >= end) {
        None => Ok(()),
        Some(i) => Err(Error::Argument { kernel, what: format!("{what} {i} is not below {end}") }),
    }
}
