//! Where a model's weights come from.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use moe_kernels::{DType, Element, Float, bf16};
use moe_model::ModelConfig;
use moe_model::hf::{FloatType, HubFolder};
use serde_json::Value;

use super::container::{Checkpoint, CheckpointError, TensorInfo};
use super::state::BUFFER;
use super::{HubOrigin, Meta, RunState};
use crate::Result;
use crate::optim::Moment;
use crate::run::{CHECKPOINTS, SIDE_FILES};

/// A model's weights, read block by block under the names that a [layout](moe_model::params::ParamLayout) gives them, in any
/// type of floats: what a new run starts from, and what is evaluated, sampled, traced or exported. They are those of a
/// checkpoint or of a folder of the hub.
///
/// ```no_run
/// use moe_train::run::open_weights;
///
/// // A run, the folder of one checkpoint, or a folder of the hub.
/// let weights = open_weights("runs/first".as_ref())?;
/// let dims = [weights.model().vocab_size, weights.model().hidden_size];
/// // Rows 10 to 19 of the embedding, as doubles.
/// let block = weights.read::<f64>("model.embed_tokens.weight", dims, 10..20, 0..dims[1])?;
/// assert_eq!(block.len(), 10 * dims[1]);
/// # Ok::<(), moe_train::Error>(())
/// ```
#[derive(Debug)]
pub struct Weights {
    source: Source,
    meta: Meta,
}

#[derive(Debug)]
enum Source {
    Checkpoint(Checkpoint),
    Hub(HubFolder),
}

impl Weights {
    /// Those of a checkpoint.
    ///
    /// # Errors
    /// It is not that of a model.
    pub fn of(checkpoint: Checkpoint) -> Result<Self> {
        let meta = Meta::of(&checkpoint)?;
        Ok(Weights { source: Source::Checkpoint(checkpoint), meta })
    }

    /// Those of a folder of the hub with this `config.json`, which says that it has this model.
    ///
    /// # Errors
    /// The folder was opened for another model.
    pub fn of_hub(folder: HubFolder, config: Value, model: ModelConfig) -> Result<Self> {
        let mut sizes = BTreeMap::new();
        for tensor in folder.names().tensors() {
            *sizes.entry(folder.dtype(&tensor.name)?).or_insert(0) += tensor.len();
        }
        let most = sizes.into_iter().max_by_key(|&(_, elements)| elements);
        let dtype = most.map_or(FloatType::F32, |(dtype, _)| dtype);
        let mut other_dtypes = BTreeMap::new();
        for tensor in folder.names().tensors() {
            let own = folder.dtype(&tensor.name)?;
            if own != dtype {
                other_dtypes.insert(tensor.name.clone(), own);
            }
        }
        let hub = Some(HubOrigin { config, dtype, other_dtypes });
        Ok(Weights { source: Source::Hub(folder), meta: Meta { model, hub, run: None } })
    }

    /// The folder they are in.
    pub fn path(&self) -> &Path {
        match &self.source {
            Source::Checkpoint(checkpoint) => checkpoint.path(),
            Source::Hub(folder) => folder.path(),
        }
    }

    /// What is known of them.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// The model.
    pub fn model(&self) -> &ModelConfig {
        &self.meta.model
    }

    /// Where the run stands that wrote them.
    ///
    /// # Errors
    /// [`CheckpointError::NoRun`] if none did.
    pub fn run(&self) -> Result<&RunState> {
        let path = || self.path().to_owned();
        self.meta.run.as_ref().ok_or_else(|| CheckpointError::NoRun { path: path() }.into())
    }

    /// The folder with what else belongs to a model of the hub, its tokenizer above all: the folder of the hub itself, or
    /// the one beside a checkpoint, or in the folder of its run.
    pub fn side_files(&self) -> Option<PathBuf> {
        match &self.source {
            Source::Checkpoint(checkpoint) => {
                let beside = checkpoint.path().parent()?;
                let root = match beside.ends_with(CHECKPOINTS) {
                    true => beside.parent()?,
                    false => beside,
                };
                let folder = root.join(SIDE_FILES);
                folder.is_dir().then_some(folder)
            }
            Source::Hub(folder) => Some(folder.path().to_owned()),
        }
    }

    /// The type of master weights that holds them exactly.
    pub fn dtype(&self) -> DType {
        match &self.source {
            Source::Checkpoint(checkpoint) => {
                let mut params = checkpoint.tensors().filter(|tensor| tensor.kind == Moment::Master.name());
                params.next().map_or(DType::F32, |tensor| tensor.dtype)
            }
            Source::Hub(_) => {
                let double = self.meta.hub.iter().any(|HubOrigin { dtype, other_dtypes, .. }| {
                    other_dtypes.values().chain([dtype]).any(|&dtype| dtype == FloatType::F64)
                });
                if double { DType::F64 } else { DType::F32 }
            }
        }
    }

    /// A block of the parameter `name` of shape `dims` (a vector is `[1, n]`), row by row. Widening is exact, narrowing
    /// rounds to the nearest, ties to even.
    ///
    /// # Errors
    /// There is no such parameter or block, it has another shape, what was read is damaged, or an element is infinite in `A`
    /// alone; of the hub, or not finite at all.
    pub fn read<A: Float>(
        &self,
        name: &str,
        dims: [usize; 2],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Vec<A>> {
        self.block(name, Moment::Master.name(), dims, rows, cols)
    }

    /// The buffer `name` of `len` elements.
    ///
    /// # Errors
    /// Those of [`read`](Self::read).
    pub fn read_buffer<A: Float>(&self, name: &str, len: usize) -> Result<Vec<A>> {
        self.block(name, BUFFER, [1, len], 0..1, 0..len)
    }

    fn block<A: Float>(
        &self,
        name: &str,
        kind: &str,
        dims: [usize; 2],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Vec<A>> {
        let other = |written: String| CheckpointError::OtherTensor {
            path: self.path().to_owned(),
            tensor: name.to_owned(),
            written,
            wanted: format!("{dims:?} {}", A::DTYPE),
        };
        let checkpoint = match &self.source {
            Source::Checkpoint(checkpoint) => checkpoint,
            Source::Hub(folder) => {
                let written = folder.names().tensor(name).map_or(dims, |tensor| tensor.dims);
                return match written == dims {
                    true => Ok(folder.read(name, rows, cols)?),
                    false => Err(other(format!("{written:?} {}", folder.dtype(name)?)).into()),
                };
            }
        };
        let TensorInfo { dims: written, dtype, .. } = checkpoint.tensor(name, kind)?;
        if written != dims {
            return Err(other(format!("{written:?} {dtype}")).into());
        }
        let inside = |range: &Range<usize>, len| range.start <= range.end && range.end <= len;
        if dtype == A::DTYPE && inside(&rows, dims[0]) && inside(&cols, dims[1]) {
            let mut block = vec![A::ZERO; rows.len() * cols.len()];
            checkpoint.read_block_into(name, kind, rows, cols, bytemuck::cast_slice_mut(&mut block))?;
            return Ok(block);
        }
        let bytes = checkpoint.read_block(name, kind, rows, cols)?;
        let block = floats::<A>(dtype, &bytes).ok_or_else(|| other(format!("{written:?} {dtype}")))?;
        block.map_err(|value| {
            let (path, tensor) = (self.path().to_owned(), name.to_owned());
            CheckpointError::Overflow { path, tensor, value, wanted: A::DTYPE }.into()
        })
    }
}

/// Floats of the type `dtype` in `A`; none if it is no type of floats, an error if one of them is too large.
fn floats<A: Float>(dtype: DType, bytes: &[u8]) -> Option<std::result::Result<Vec<A>, f64>> {
    fn each<E: Float, A: Float>(bytes: &[u8]) -> std::result::Result<Vec<A>, f64> {
        elements::<E>(bytes)
            .map(|element| {
                let (value, converted) = (element.to_f64(), A::from_f64(element.to_f64()));
                let fits = converted.to_f64().is_finite() || !value.is_finite();
                if fits { Ok(converted) } else { Err(value) }
            })
            .collect()
    }
    Some(match dtype {
        DType::F64 => each::<f64, A>(bytes),
        DType::F32 => each::<f32, A>(bytes),
        DType::Bf16 => each::<bf16, A>(bytes),
        _ => return None,
    })
}

/// Elements as they lie in a file.
pub(super) fn elements<E: Element>(bytes: &[u8]) -> impl Iterator<Item = E> {
    bytes.chunks_exact(size_of::<E>()).map(bytemuck::pod_read_unaligned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<E: Element>(elements: &[E]) -> Vec<u8> {
        bytemuck::cast_slice(elements).to_vec()
    }

    #[test]
    fn widening_is_exact_and_narrowing_rounds_to_the_nearest() {
        let singles = [0.1f32, -0.0, f32::MIN_POSITIVE, 1e-45, f32::MAX, f32::INFINITY];
        let widened = floats::<f64>(DType::F32, &bytes(&singles)).unwrap().unwrap();
        for (single, widened) in singles.iter().zip(&widened) {
            assert_eq!(f64::from(*single).to_bits(), widened.to_bits());
        }
        // Halfway between two neighbours, the even one; a little more, the upper one.
        let (one, ulp) = (1.0f64, f64::from(f32::EPSILON));
        let doubles = [one + ulp / 2.0, one + 1.5 * ulp, one + ulp / 2.0 + 1e-15, -1e-300];
        let narrowed = floats::<f32>(DType::F64, &bytes(&doubles)).unwrap().unwrap();
        assert_eq!(narrowed, [1.0, 1.0 + 2.0 * f32::EPSILON, 1.0 + f32::EPSILON, -0.0]);
        let halves = [bf16::from_f32(3.140625), bf16::from_f32(-1e-40)];
        let widened = floats::<f32>(DType::Bf16, &bytes(&halves)).unwrap().unwrap();
        assert_eq!(widened, halves.map(bf16::to_f32));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        assert_eq!(floats::<f32>(DType::F64, &bytes(&[1.0, -3.5e38])).unwrap(), Err(-3.5e38));
        assert_eq!(floats::<f32>(DType::F64, &bytes(&[f64::INFINITY])).unwrap(), Ok(vec![f32::INFINITY]));
        assert!(floats::<f32>(DType::I64, &bytes(&[1i64])).is_none());
    }
}
