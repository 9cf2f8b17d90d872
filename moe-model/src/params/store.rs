//! Weights and gradients of one rank on its device.

use moe_comm::{Comms, Pending};
use moe_kernels::family::{Gemm, GroupedGemm, Op};
use moe_kernels::{Device, Element, Float, Tensor, View, ViewMut};

use super::layout::{BucketLayout, BufferId, ParamId, ParamLayout, Segment};
use crate::{Error, Result};

/// A weight to read and its gradient to add to.
pub type WeightAndGrad<'a, T, D> = (View<'a, T, D>, ViewMut<'a, <T as Float>::Acc, D>);

/// Weights in `T` and gradients in `T::Acc`, flat by bucket; buffers in `T::Acc`.
///
/// Gradients live from [`zero_grads`](Self::zero_grads) to the start of their reduction: what was handed to a collective
/// is never written again. Weights that are being gathered can be read after [`await_weights`](Self::await_weights).
#[derive(Debug)]
pub struct ParamStore<T: Float, D: Device> {
    layout: ParamLayout,
    weights: Vec<Weights<T, D>>,
    grads: Vec<Grads<T::Acc, D>>,
    /// By storage tensor: whether its gradient is 0 without being written, since nothing has been added yet.
    unwritten: Vec<bool>,
    buffers: Vec<Tensor<T::Acc, D>>,
    /// Whether buckets are reduced as soon as they are complete.
    reduce_early: bool,
    device: D,
}

#[derive(Debug)]
enum Weights<T, D: Device> {
    Here(Tensor<T, D>),
    /// This rank's slice, and all of them, which are on their way.
    Arriving(Tensor<T, D>, Pending<T, D>),
    /// This rank's slice was taken, to be written.
    Taken,
}

impl<T: Element, D: Device> Weights<T, D> {
    fn here(&self) -> Result<&Tensor<T, D>> {
        match self {
            Weights::Here(weights) => Ok(weights),
            Weights::Arriving(..) | Weights::Taken => Err(Error::NoWeights),
        }
    }

    fn here_mut(&mut self) -> Result<&mut Tensor<T, D>> {
        match self {
            Weights::Here(weights) => Ok(weights),
            Weights::Arriving(..) | Weights::Taken => Err(Error::NoWeights),
        }
    }

    /// Waits for them, if they are on their way.
    fn arrive(&mut self) -> Result<()> {
        if let Weights::Arriving(..) = self {
            let Weights::Arriving(_, pending) = std::mem::replace(self, Weights::Taken) else {
                return Ok(());
            };
            let weights = pending.wait()?;
            let [rows, cols] = weights.shape();
            *self = Weights::Here(weights.reshape(1, rows * cols)?);
        }
        Ok(())
    }
}

#[derive(Debug)]
enum Grads<A: Float, D: Device> {
    None,
    /// Micro-batches add to the sum, which has no memory before the first does; so many segments have not added their last.
    Adding {
        sum: Option<Tensor<A, D>>,
        users: usize,
    },
    Reducing(Pending<A, D>),
}

impl<A: Float, D: Device> Grads<A, D> {
    /// The sum, of `layout`'s bucket `bucket`. Of fresh memory only what belongs to no storage tensor is written.
    fn sum_mut(&mut self, layout: &ParamLayout, bucket: usize, device: &D) -> Result<&mut Tensor<A, D>> {
        let Grads::Adding { sum, .. } = self else { return Err(Error::NoGradients) };
        Ok(match sum {
            Some(sum) => sum,
            None => {
                let mut fresh = Tensor::uninit(device, 1, layout.buckets()[bucket].len)?;
                for padding in layout.padding(bucket) {
                    fresh.view_mut()?.columns(padding)?.zero(device)?;
                }
                sum.insert(fresh)
            }
        })
    }
}

/// The gradient of a weight, `[rows, cols]`, and whether it is 0 without being written.
type Grad<'a, A, D> = (ViewMut<'a, A, D>, bool);

fn zeroed<'a, A: Float, D: Device>(
    (mut grad, unwritten): Grad<'a, A, D>,
    device: &D,
) -> Result<ViewMut<'a, A, D>> {
    if unwritten {
        grad.zero(device)?;
    }
    Ok(grad)
}

impl<T: Float, D: Device> ParamStore<T, D> {
    /// Weights at their starting values, which depend on `seed` and names alone: rounded to `T::Acc`, then as [`Float::split`] rounds.
    /// Where `T` is bf16, whoever keeps master weights draws these: their low 16 bits are not in the store.
    ///
    /// # Errors
    /// The device refuses.
    pub fn new(layout: ParamLayout, seed: u64, device: &D) -> Result<Self> {
        let mut params = Self::zeros(layout, device)?;
        for (bucket, weights) in params.layout.buckets().iter().zip(&mut params.weights) {
            let rounded = |x| T::split(T::Acc::from_f64(x)).0;
            bucket.initial(seed, 0..bucket.len, rounded, |at, values| {
                Ok::<_, Error>(weights.here_mut()?.upload(device, at, values)?)
            })?;
        }
        Ok(params)
    }

    /// Weights of 0, to be written.
    ///
    /// # Errors
    /// The device refuses.
    pub fn zeros(layout: ParamLayout, device: &D) -> Result<Self> {
        let zeros = |bucket: &BucketLayout| Ok(Weights::Here(Tensor::zeros(device, 1, bucket.len)?));
        let weights = layout.buckets().iter().map(zeros).collect::<Result<Vec<_>>>()?;
        let grads = weights.iter().map(|_| Grads::None).collect();
        let unwritten = vec![true; layout.storage_tensors()];
        let buffers = layout.buffers().map(|(_, buffer)| Tensor::zeros(device, 1, buffer.len));
        let buffers = buffers.collect::<std::result::Result<_, _>>()?;
        Ok(ParamStore {
            layout,
            weights,
            grads,
            unwritten,
            buffers,
            reduce_early: false,
            device: device.clone(),
        })
    }

    /// Where everything lies.
    pub fn layout(&self) -> &ParamLayout {
        &self.layout
    }

    /// The buckets, in an order that is the same on all ranks of a stage.
    pub fn buckets(&self) -> &[BucketLayout] {
        self.layout.buckets()
    }

    /// A weight, `[rows, cols]` as laid out.
    ///
    /// # Errors
    /// [`Error::NoWeights`] while they are being gathered, or were taken.
    pub fn weight(&self, id: ParamId) -> Result<View<'_, T, D>> {
        let slot = self.layout.slot(id);
        let flat = self.weights(slot.bucket)?.view();
        Ok(flat.columns(slot.range())?.reshape(slot.rows, slot.cols)?)
    }

    /// The gradient of a weight, to add to.
    ///
    /// # Errors
    /// [`Error::NoGradients`] before [`zero_grads`](Self::zero_grads) and after its reduction started; or the device refuses.
    pub fn grad(&mut self, id: ParamId) -> Result<ViewMut<'_, T::Acc, D>> {
        let device = self.device.clone();
        zeroed(self.take_grad(id)?, &device)
    }

    /// A weight to read and its gradient to add to.
    ///
    /// # Errors
    /// Those of [`weight`](Self::weight) and of [`grad`](Self::grad).
    pub fn weight_and_grad(&mut self, id: ParamId) -> Result<WeightAndGrad<'_, T, D>> {
        let slot = self.layout.slot(id);
        let weight = self.weights[slot.bucket].here()?.view();
        let weight = weight.columns(slot.range())?.reshape(slot.rows, slot.cols)?;
        let grads = &mut self.grads[slot.bucket];
        let grad = grads.sum_mut(&self.layout, slot.bucket, &self.device)?.view_mut()?;
        let grad = grad.columns(slot.range())?.reshape(slot.rows, slot.cols)?;
        let unwritten = std::mem::take(&mut self.unwritten[id.index()]);
        Ok((weight, zeroed((grad, unwritten), &self.device)?))
    }

    /// Adds `op(a) · op(b)` to the gradient of a weight; the first time it is written instead, whatever was there.
    ///
    /// # Errors
    /// Those of [`grad`](Self::grad), or the shapes do not fit.
    pub fn add_product(
        &mut self,
        id: ParamId,
        a: View<'_, T, D>,
        ta: Op,
        b: View<'_, T, D>,
        tb: Op,
    ) -> Result<()>
    where
        D: Gemm<T>,
    {
        let device = self.device.clone();
        match self.take_grad(id)? {
            (grad, true) => device.gemm_to_acc(grad, a, ta, b, tb)?,
            (grad, false) => device.gemm_acc(grad, a, ta, b, tb)?,
        }
        Ok(())
    }

    /// As [`add_product`](Self::add_product), of every group of rows: `dyᵀ · x` as in [`GroupedGemm::grouped_gemm_acc`].
    ///
    /// # Errors
    /// Those of [`add_product`](Self::add_product).
    pub fn add_grouped_product(
        &mut self,
        id: ParamId,
        dy: View<'_, T, D>,
        x: View<'_, T, D>,
        offsets: View<'_, i32, D>,
    ) -> Result<()>
    where
        D: GroupedGemm<T>,
    {
        let device = self.device.clone();
        match self.take_grad(id)? {
            (grad, true) => device.grouped_gemm_to_acc(grad, dy, x, offsets)?,
            (grad, false) => device.grouped_gemm_acc(grad, dy, x, offsets)?,
        }
        Ok(())
    }

    /// The gradient of a weight, which whoever takes it writes.
    fn take_grad(&mut self, id: ParamId) -> Result<Grad<'_, T::Acc, D>> {
        let slot = self.layout.slot(id);
        let flat = self.grads[slot.bucket].sum_mut(&self.layout, slot.bucket, &self.device)?.view_mut()?;
        let grad = flat.columns(slot.range())?.reshape(slot.rows, slot.cols)?;
        Ok((grad, std::mem::take(&mut self.unwritten[id.index()])))
    }

    /// Starts a bucket's reduction.
    fn reduce(&mut self, bucket: usize, comms: &Comms<D>) -> Result<()> {
        let device = self.device.clone();
        let sum = self.grads[bucket].sum_mut(&self.layout, bucket, &device)?;
        for (id, slot) in self.layout.slots_of(bucket) {
            if std::mem::take(&mut self.unwritten[id.index()]) {
                sum.view_mut()?.columns(slot.range())?.zero(&device)?;
            }
        }
        let Grads::Adding { sum: Some(sum), .. } = std::mem::replace(&mut self.grads[bucket], Grads::None)
        else {
            return Err(Error::NoGradients);
        };
        let BucketLayout { group, slice, .. } = &self.layout.buckets()[bucket];
        let group = comms.keyed(*group)?;
        let sum = sum.reshape(group.size(), slice.len())?;
        self.grads[bucket] = Grads::Reducing(group.start_reduce_scatter_rows(&sum)?);
        Ok(())
    }

    /// Fresh gradients of zero, each bucket's in memory from its first use on. With `reduce_early` a bucket's reduction starts when the last of its segments is said to
    /// be [complete](Self::grads_complete), else all start in [`start_reductions`](Self::start_reductions). It is to be
    /// the same on all ranks.
    pub fn zero_grads(&mut self, reduce_early: bool) {
        self.reduce_early = reduce_early;
        self.unwritten.fill(true);
        for (grads, bucket) in self.grads.iter_mut().zip(self.layout.buckets()) {
            *grads = Grads::Adding { sum: None, users: bucket.users };
        }
    }

    /// Says that nothing more is added to the gradients of a segment. All ranks of a stage say so in one order.
    ///
    /// # Errors
    /// [`Error::NoGradients`] after that was said, or before [`zero_grads`](Self::zero_grads); or a reduction cannot start.
    pub fn grads_complete(&mut self, segment: Segment, comms: &Comms<D>) -> Result<()> {
        if !self.reduce_early {
            return Ok(());
        }
        for at in 0..self.layout.used_by(segment).len() {
            let bucket = self.layout.used_by(segment)[at];
            let Grads::Adding { users, .. } = &mut self.grads[bucket] else { return Err(Error::NoGradients) };
            *users -= 1;
            if *users == 0 {
                self.reduce(bucket, comms)?;
            }
        }
        Ok(())
    }

    /// Starts the reductions that have not started yet, in bucket order. Collective.
    ///
    /// # Errors
    /// The device or a communicator refuses.
    pub fn start_reductions(&mut self, comms: &Comms<D>) -> Result<()> {
        for bucket in 0..self.grads.len() {
            if let Grads::Adding { .. } = self.grads[bucket] {
                self.reduce(bucket, comms)?;
            }
        }
        Ok(())
    }

    /// Waits for a bucket's reduction: this rank's slice of the sum over the bucket's group, `[1, slice]`.
    ///
    /// # Errors
    /// [`Error::NoGradients`] if it was not started, or was waited for already; or it failed.
    pub fn reduced(&mut self, bucket: usize) -> Result<Tensor<T::Acc, D>> {
        match std::mem::replace(&mut self.grads[bucket], Grads::None) {
            Grads::Reducing(pending) => Ok(pending.wait()?),
            Grads::None | Grads::Adding { .. } => Err(Error::NoGradients),
        }
    }

    /// A bucket's weights, `[1, len]`.
    ///
    /// # Errors
    /// [`Error::NoWeights`] while they are being gathered, or were taken.
    pub fn weights(&self, bucket: usize) -> Result<&Tensor<T, D>> {
        self.weights[bucket].here()
    }

    /// A bucket's weights, `[1, len]`, to write: all ranks of its group the same.
    ///
    /// # Errors
    /// Those of [`weights`](Self::weights).
    pub fn weights_mut(&mut self, bucket: usize) -> Result<&mut Tensor<T, D>> {
        self.weights[bucket].here_mut()
    }

    /// This rank's slice of a bucket's weights, `[1, slice]`, also while the others' are on their way.
    ///
    /// # Errors
    /// [`Error::NoWeights`] if they were taken.
    pub fn slice(&self, bucket: usize) -> Result<Tensor<T, D>> {
        match &self.weights[bucket] {
            Weights::Arriving(slice, _) => Ok(slice.clone()),
            weights => Ok(weights.here()?.columns(self.layout.buckets()[bucket].slice.clone())?),
        }
    }

    /// Gives up a bucket's weights but for this rank's slice, `[1, slice]`, which is to be written and handed to
    /// [`start_gather`](Self::start_gather). A rank alone writes the weights where they are.
    ///
    /// # Errors
    /// [`Error::NoWeights`] if they were taken already; or a gather that was under way failed.
    pub fn take_slice(&mut self, bucket: usize, device: &D) -> Result<Tensor<T, D>> {
        self.weights[bucket].arrive()?;
        self.weights[bucket].here()?;
        let Weights::Here(weights) = std::mem::replace(&mut self.weights[bucket], Weights::Taken) else {
            return Err(Error::NoWeights);
        };
        let BucketLayout { slice, len, .. } = &self.layout.buckets()[bucket];
        match slice.len() == *len {
            true => Ok(weights),
            false => Ok(weights.columns(slice.clone())?.copy(device)?),
        }
    }

    /// A buffer, `[1, len]`.
    pub fn buffer(&self, id: BufferId) -> &Tensor<T::Acc, D> {
        &self.buffers[id.0]
    }

    /// Replaces a buffer, `[1, len]`.
    ///
    /// # Errors
    /// [`Error::BufferLength`].
    pub fn set_buffer(&mut self, id: BufferId, values: Tensor<T::Acc, D>) -> Result<()> {
        let (expected, [rows, cols]) = (self.buffers[id.0].shape()[1], values.shape());
        if rows * cols != expected {
            return Err(Error::BufferLength { expected, got: rows * cols });
        }
        self.buffers[id.0] = values.reshape(1, expected)?;
        Ok(())
    }

    /// Starts to gather a bucket's weights from the slices of its group, `[1, slice]` each. Collective.
    ///
    /// # Errors
    /// The communicator refuses.
    pub fn start_gather(&mut self, bucket: usize, slice: Tensor<T, D>, comms: &Comms<D>) -> Result<()> {
        let group = comms.keyed(self.layout.buckets()[bucket].group)?;
        let pending = group.start_all_gather_rows(&slice)?;
        self.weights[bucket] = Weights::Arriving(slice, pending);
        Ok(())
    }

    /// Waits for the weights of a segment, if they are being gathered: before its layer uses them.
    ///
    /// # Errors
    /// The gather failed.
    pub fn await_weights(&mut self, segment: Segment) -> Result<()> {
        self.layout.used_by(segment).iter().try_for_each(|&bucket| self.weights[bucket].arrive())
    }

    /// Waits for all weights that are being gathered.
    ///
    /// # Errors
    /// A gather failed.
    pub fn await_all_weights(&mut self) -> Result<()> {
        self.weights.iter_mut().try_for_each(Weights::arrive)
    }
}
