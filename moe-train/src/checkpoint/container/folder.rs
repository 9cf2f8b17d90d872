//! The checkpoints of a run.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Checkpoint, CheckpointError};
use crate::durable::{Context, TEMPORARY, rename, temporary_name, unique_name};

/// A file with the name of the newest checkpoint, for people and scripts. Reading a checkpoint never depends on it.
pub(super) const LATEST: &str = "LATEST";

const PREFIX: &str = "step-";

/// The folder of a checkpoint.
pub fn step_folder(root: &Path, step: u64) -> PathBuf {
    root.join(format!("{PREFIX}{step}"))
}

/// The step that a folder's name says.
pub(super) fn step_of(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    // Exactly what `step_folder` makes: no sign, no leading zero.
    digits.parse().ok().filter(|step: &u64| step.to_string() == digits)
}

/// A folder `step-N`.
#[derive(Debug)]
pub struct Listed {
    /// The step in its name.
    pub step: u64,
    /// The folder.
    pub path: PathBuf,
    /// The checkpoint, unless it is not whole. Its tensors are not read for this; [`Checkpoint::verify`] does that.
    pub checkpoint: Result<Checkpoint, CheckpointError>,
}

/// All checkpoints in `root`, the oldest first. Unfinished ones are not among them.
///
/// # Errors
/// `root` cannot be read.
pub fn list(root: &Path) -> Result<Vec<Listed>, CheckpointError> {
    let steps = steps(root)?.into_iter();
    Ok(steps.map(|(step, path)| Listed { step, checkpoint: Checkpoint::open(&path), path }).collect())
}

/// The newest checkpoint of which every byte is right. Newer ones that are not go to `damaged`.
///
/// # Errors
/// There is no checkpoint, or none is whole.
pub fn open_newest(
    root: &Path,
    damaged: &mut dyn FnMut(&CheckpointError),
) -> Result<Checkpoint, CheckpointError> {
    let steps = steps(root)?;
    for (_, path) in steps.iter().rev() {
        let opened =
            Checkpoint::open(path).and_then(|checkpoint| match checkpoint.verify().into_iter().next() {
                None => Ok(checkpoint),
                Some(fault) => Err(fault),
            });
        match opened {
            Ok(checkpoint) => return Ok(checkpoint),
            Err(fault) => damaged(&fault),
        }
    }
    let root = root.to_owned();
    Err(match steps.len() {
        0 => CheckpointError::None { root },
        tried => CheckpointError::NoneValid { root, tried },
    })
}

/// Removes all but the newest `keep` checkpoints and returns the folders that are gone. Damaged ones neither count nor are
/// removed: they are for people to look at.
///
/// # Errors
/// A folder cannot be read or removed.
pub fn prune(root: &Path, keep: usize) -> Result<Vec<PathBuf>, CheckpointError> {
    let whole: Vec<PathBuf> = list(root)?
        .into_iter()
        .filter(|listed| listed.checkpoint.is_ok())
        .map(|listed| listed.path)
        .collect();
    let old = &whole[..whole.len().saturating_sub(keep)];
    for path in old {
        // Renamed first: what is half removed is no checkpoint.
        let doomed = temporary_name(path);
        rename(path, &doomed)?;
        fs::remove_dir_all(&doomed).context("remove", &doomed)?;
    }
    Ok(old.to_vec())
}

/// Renames the checkpoints of later steps than `step` to `step-N.damaged-XXXX` and returns their new names: a run that
/// goes on from `step`, because they are damaged, comes to save those steps again.
///
/// # Errors
/// A folder cannot be read or renamed.
pub fn set_aside(root: &Path, step: u64) -> Result<Vec<PathBuf>, CheckpointError> {
    let later = steps(root)?.into_iter().filter(|&(later, _)| later > step);
    later
        .map(|(_, path)| {
            let aside = unique_name(&path, ".damaged-");
            rename(&path, &aside)?;
            Ok(aside)
        })
        .collect()
}

/// Removes what saves and prunings that crashed left.
pub(super) fn remove_leftovers(root: &Path) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(root).context("read", root)? {
        let path = entry.context("read", root)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(PREFIX) && name.contains(TEMPORARY) {
            fs::remove_dir_all(&path).context("remove", &path)?;
        } else if name.starts_with(LATEST) && name.contains(TEMPORARY) {
            fs::remove_file(&path).context("remove", &path)?;
        }
    }
    Ok(())
}

/// The folders `step-N` with their steps, ascending.
fn steps(root: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut steps = Vec::new();
    for entry in fs::read_dir(root).context("read", root)? {
        let path = entry.context("read", root)?.path();
        if let Some(step) = step_of(&path).filter(|_| path.is_dir()) {
            steps.push((step, path));
        }
    }
    steps.sort();
    Ok(steps)
}
