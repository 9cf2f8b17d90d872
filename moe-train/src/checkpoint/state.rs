//! A rank's optimizer state to logical tensors and back.

use std::ops::Range;
use std::path::{Path, PathBuf};

use moe_comm::Comm;
use moe_kernels::{Backend, DType, Device, Element, Float, Tensor, bf16};
use moe_model::params::{BufferId, BufferLayout, ParamLayout, ParamStore, Part};
use moe_topology::Attention;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::container::{Checkpoint, CheckpointError, PendingCheckpoint, PieceFile, PieceSpec, PieceWriter};
use super::weights::elements;
use super::{Meta, RunState, Weights};
use crate::optim::{Moment, sliced_parts};
use crate::trainer::RankTrainer;
use crate::{Error, Result};

/// The kind of what is state, but no parameter.
pub(super) const BUFFER: &str = "buffer";

/// Writes a checkpoint of `step` to `root` and returns its folder. Collective over the world: every rank writes a file
/// of its own, and rank 0 completes the checkpoint when all have.
///
/// # Errors
/// There is a checkpoint of this step already, or something cannot be written; nothing is left then.
pub fn save<T: Float, D: Backend<T>>(
    trainer: &RankTrainer<T, D>,
    root: &Path,
    step: u64,
    meta: &Meta,
) -> Result<PathBuf> {
    let world = trainer.cx().comms.group(Attention::ALL)?;
    publish(&world, &trainer.cx().device, root, step, meta, |folder| write(trainer, folder, world.rank()))
}

/// Writes a folder `step-N` to `root` in the format of checkpoints: what `write` puts into the file of each rank. Collective
/// over the world.
pub(crate) fn publish<D: Device>(
    world: &Comm<'_, Attention, D>,
    device: &D,
    root: &Path,
    step: u64,
    meta: &impl Serialize,
    write: impl FnOnce(&Path) -> Result<PieceFile>,
) -> Result<PathBuf> {
    let first = world.rank() == 0;
    let pending = first.then(|| PendingCheckpoint::create(root, step)).transpose()?;
    let folder: Option<PathBuf> = pending.as_ref().map(|pending| pending.folder().to_owned());
    let folders: Vec<Option<PathBuf>> = share(world, device, &folder)?;
    let folder =
        folders.into_iter().flatten().next().ok_or(Error::Protocol { what: "no rank made a folder" })?;

    let written = write(&folder)?;
    let files: Vec<PieceFile> = share(world, device, &written)?;
    if let Some(pending) = pending {
        let meta = serde_json::to_value(meta).map_err(|error| CheckpointError::Manifest {
            path: folder.clone(),
            what: format!("cannot hold the configuration: {error}"),
        })?;
        pending.commit(files, meta)?;
    }
    world.barrier()?;
    Ok(super::container::step_folder(root, step))
}

/// This rank's pieces: what of its slices it counts.
fn write<T: Float, D: Backend<T>>(
    trainer: &RankTrainer<T, D>,
    folder: &Path,
    rank: usize,
) -> Result<PieceFile> {
    let cx = trainer.cx();
    let mut writer = PieceWriter::create(folder, rank)?;
    for (index, bucket) in cx.params.buckets().iter().enumerate() {
        for moment in Moment::ALL {
            let kept = trainer.optimizer().kept(&cx.params, index, moment)?;
            for (part, range) in sliced_parts(bucket).filter(|(part, _)| part.counts) {
                let spec = PieceSpec {
                    tensor: part.name.clone(),
                    kind: moment.name().to_owned(),
                    dtype: kept.dtype(),
                    dims: part.dims,
                    rows: part.rows.clone(),
                    cols: part.cols.clone(),
                    part: range.start - part.offset..range.end - part.offset,
                };
                let local = range.start - bucket.slice.start..range.end - bucket.slice.start;
                writer.write(spec, &kept.to_bytes(local, &cx.device)?)?;
            }
        }
    }
    for (id, buffer) in cx.params.layout().buffers().filter(|(_, buffer)| buffer.counts) {
        let spec = PieceSpec {
            tensor: buffer.name.clone(),
            kind: BUFFER.to_owned(),
            dtype: T::Acc::DTYPE,
            dims: [1, buffer.len],
            rows: 0..1,
            cols: 0..buffer.len,
            part: 0..buffer.len,
        };
        writer.write(spec, bytemuck::cast_slice(&cx.params.buffer(id).to_vec(&cx.device)?))?;
    }
    Ok(writer.finish()?)
}

/// That the checkpoint has a tensor of this shape and type.
pub(super) fn check_tensor(
    checkpoint: &Checkpoint,
    name: &str,
    kind: &str,
    dims: [usize; 2],
    dtype: DType,
) -> Result<()> {
    let info = checkpoint.tensor(name, kind)?;
    if (info.dims, info.dtype) == (dims, dtype) {
        return Ok(());
    }
    Err(CheckpointError::OtherTensor {
        path: checkpoint.path().to_owned(),
        tensor: name.to_owned(),
        written: format!("{:?} {}", info.dims, info.dtype),
        wanted: format!("{dims:?} {dtype}"),
    }
    .into())
}

/// Reads one kind of what is kept of this rank's slices into `trainer`, part by part, where `read` gives the rows of a part
/// that meet a slice.
fn read_slices<T: Float, D: Backend<T>>(
    trainer: &mut RankTrainer<T, D>,
    moment: Moment,
    read: impl Fn(&Part, Range<usize>) -> Result<Vec<T::Acc>>,
) -> Result<()> {
    let (optimizer, cx) = trainer.state_mut();
    for index in 0..cx.params.buckets().len() {
        let bucket = cx.params.buckets()[index].clone();
        for (part, range) in sliced_parts(&bucket) {
            let width = part.cols.len();
            let within = range.start - part.offset..range.end - part.offset;
            let first = within.start / width;
            let rows = part.rows.start + first..part.rows.start + within.end.div_ceil(width);
            let block = read(part, rows)?;
            let elements = &block[within.start - first * width..within.end - first * width];
            optimizer.write(cx, index, moment, range.start - bucket.slice.start, elements)?;
        }
    }
    Ok(())
}

/// The type in which a run kept part of its state: moments may have been in bf16.
fn kept_dtype<A: Float>(checkpoint: &Checkpoint, moment: Moment, part: &Part) -> Result<DType> {
    let dtype = match checkpoint.tensor(&part.name, moment.name())?.dtype {
        DType::Bf16 if moment != Moment::Master => DType::Bf16,
        _ => A::DTYPE,
    };
    check_tensor(checkpoint, &part.name, moment.name(), part.dims, dtype)?;
    Ok(dtype)
}

/// Rows of a part as a run kept them, in the accumulation type, which is exact.
fn read_kept<A: Float>(
    checkpoint: &Checkpoint,
    moment: Moment,
    part: &Part,
    rows: Range<usize>,
) -> Result<Vec<A>> {
    let dtype = kept_dtype::<A>(checkpoint, moment, part)?;
    let bytes = checkpoint.read_block(&part.name, moment.name(), rows, part.cols.clone())?;
    Ok(match dtype {
        DType::Bf16 => elements::<bf16>(&bytes).map(|x| A::from_f64(x.to_f64())).collect(),
        _ => elements(&bytes).collect(),
    })
}

/// Buffers with their values.
type Buffers<T, D> = Vec<(BufferId, Tensor<<T as Float>::Acc, D>)>;

/// The buffers of `params`, in order, where `read` gives the elements of one.
fn read_buffers<T: Float, D: Device>(
    params: &ParamStore<T, D>,
    device: &D,
    read: impl Fn(&BufferLayout) -> Result<Vec<T::Acc>>,
) -> Result<Buffers<T, D>> {
    let buffers = params
        .layout()
        .buffers()
        .map(|(id, buffer)| Ok((id, Tensor::from_slice(device, 1, buffer.len, &read(buffer)?)?)));
    buffers.collect()
}

/// The parameters of `layout` and its buffers, from `weights`.
///
/// # Errors
/// A tensor is missing, of another shape, too large for `T::Acc`, or damaged.
pub(crate) fn read_params<T: Float, D: Device>(
    layout: ParamLayout,
    weights: &Weights,
    device: &D,
) -> Result<ParamStore<T, D>> {
    let mut params = ParamStore::zeros(layout, device)?;
    for index in 0..params.buckets().len() {
        for part in params.buckets()[index].parts.clone() {
            let block: Vec<T::Acc> =
                weights.read(&part.name, part.dims, part.rows.clone(), part.cols.clone())?;
            let values: Vec<T> = block.into_iter().map(|master| T::split(master).0).collect();
            params.weights_mut(index)?.upload(device, part.offset, &values)?;
        }
    }
    for (id, values) in read_buffers(&params, device, |buffer| weights.read_buffer(&buffer.name, buffer.len))?
    {
        params.set_buffer(id, values)?;
    }
    Ok(params)
}

/// Reads a run's checkpoint into `trainer`, whatever folding wrote it, and in whatever type it kept moments: those that
/// this run keeps in bf16 are rounded. Collective over the world.
///
/// # Errors
/// It is of another model or element type or of no run, or lacks a tensor; the trainer's state is then as it was. Or it is
/// damaged; the trainer's state is then of no use.
pub fn restore<T: Float, D: Backend<T>>(
    trainer: &mut RankTrainer<T, D>,
    checkpoint: &Checkpoint,
) -> Result<RunState> {
    Meta::of(checkpoint)?.check_model(checkpoint.path(), &trainer.setup().model)?;
    let run = RunState::of(checkpoint)?;
    let cx = trainer.cx();
    for (part, _) in cx.params.buckets().iter().flat_map(sliced_parts) {
        for moment in Moment::ALL {
            kept_dtype::<T::Acc>(checkpoint, moment, part)?;
        }
    }
    let buffers = read_buffers(&cx.params, &cx.device, |buffer| {
        check_tensor(checkpoint, &buffer.name, BUFFER, [1, buffer.len], T::Acc::DTYPE)?;
        Ok(elements(&checkpoint.read_tensor(&buffer.name, BUFFER)?).collect())
    })?;
    trainer.await_weights()?;
    for moment in Moment::ALL {
        read_slices(trainer, moment, |part, rows| read_kept(checkpoint, moment, part, rows))?;
    }
    take_over(trainer, run.updates, buffers)?;
    Ok(run)
}

/// Takes over weights and buffers, whatever folding wrote them and in whatever type of floats: what a new run starts from,
/// or what is evaluated. Those of another type than this run's master weights are widened exactly or rounded to the nearest.
/// Moments are 0 and no update was made. Only this rank's blocks are read, one at a time. Collective over the world.
///
/// # Errors
/// They are of another model (what acts in training alone may differ, see [`Meta::check_weights`]); the trainer's state is then as it was. Or a tensor is missing, too large for this run's type,
/// or damaged; the trainer's state is then of no use.
pub fn restore_weights<T: Float, D: Backend<T>>(
    trainer: &mut RankTrainer<T, D>,
    weights: &Weights,
) -> Result<()> {
    weights.meta().check_weights(weights.path(), &trainer.setup().model)?;
    let cx = trainer.cx();
    let buffers =
        read_buffers(&cx.params, &cx.device, |buffer| weights.read_buffer(&buffer.name, buffer.len))?;
    trainer.await_weights()?;
    let (optimizer, cx) = trainer.state_mut();
    optimizer.forget(&cx.params, &cx.device)?;
    read_slices(trainer, Moment::Master, |part, rows| {
        weights.read(&part.name, part.dims, rows, part.cols.clone())
    })?;
    take_over(trainer, 0, buffers)
}

fn take_over<T: Float, D: Backend<T>>(
    trainer: &mut RankTrainer<T, D>,
    updates: u64,
    buffers: Buffers<T, D>,
) -> Result<()> {
    let (optimizer, cx) = trainer.state_mut();
    optimizer.gather_weights(cx, updates)?;
    for (id, values) in buffers {
        cx.params.set_buffer(id, values)?;
    }
    Ok(())
}

/// What every rank says, in rank order. Collective.
fn share<S, V, D>(group: &Comm<'_, V, D>, device: &D, own: &S) -> Result<Vec<S>>
where
    S: Serialize + DeserializeOwned,
    D: Device,
{
    let protocol = |_| Error::Protocol { what: "a message between ranks cannot be read" };
    let bytes = serde_json::to_vec(own).map_err(protocol)?;
    let lengths = group.all_gather_host(&[bytes.len() as i64])?;
    let lengths: Vec<usize> = lengths.into_iter().map(|n| n as usize).collect();
    let all = group
        .all_gather_rows_v(&Tensor::from_slice(device, bytes.len(), 1, &bytes)?, &lengths)?
        .to_vec(device)?;
    let mut rest = all.as_slice();
    lengths
        .into_iter()
        .map(|length| {
            let (own, others) = rest.split_at(length);
            rest = others;
            serde_json::from_slice(own).map_err(protocol)
        })
        .collect()
}
