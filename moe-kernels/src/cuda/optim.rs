//! Optimizer updates: all slices whose moments are kept in the same types in one launch.

use super::Cuda;
use super::source::OPTIM;
use super::table::Start;
use super::vectors::vector;
use crate::family::{AdamW, AdamWRun, AdamWSlice, MomentMut, Optim};
use crate::{Float, Result, check};

/// Threads of a block, of which each has a vector, as in the kernels.
const THREADS: usize = 256;

/// By whether the first moment is kept in bf16, and the second.
const KERNELS: [[&str; 2]; 2] = [["adamw_acc_acc", "adamw_acc_bf16"], ["adamw_bf16_acc", "adamw_bf16_bf16"]];

/// `Factors` of the kernels: those that all elements have in common, rounded to the type of the masters.
fn factors<A: Float>(h: &AdamW) -> [A; 7] {
    let correction2 = 1.0 / (1.0 - h.beta2.powf(h.step as f64));
    [h.grad_scale, h.beta1, 1.0 - h.beta1, h.beta2, 1.0 - h.beta2, correction2, h.eps].map(A::from_f64)
}

/// The runs of one launch, each as `Run` of the kernels has it: five addresses, elements, first block, whether vectors may be moved,
/// `step_size`, `keep`.
#[derive(Default)]
struct Runs {
    rows: Vec<[u64; 10]>,
    blocks: usize,
}

impl Runs {
    /// Elements of a slice that are updated alike.
    fn add<T: Float>(
        &mut self,
        device: &Cuda,
        slice: &AdamWSlice<'_, T, Cuda>,
        run: &AdamWRun,
        update: &AdamW,
    ) -> Result<()> {
        let (n, each) = (run.elements.len(), vector::<T::Acc>());
        let elements = || run.elements.clone();
        let weight = device.start(slice.weight.as_view().columns(elements())?, each)?;
        let remainder = match &slice.remainder {
            Some(remainder) => device.start(remainder.as_view().columns(elements())?, each)?,
            None => Start { address: 0, vectors: true },
        };
        let moment = |moment: &MomentMut<'_, T::Acc, Cuda>| match moment {
            MomentMut::Acc(view) => device.start(view.as_view().columns(elements())?, each),
            MomentMut::Bf16(view) => device.start(view.as_view().columns(elements())?, each),
        };
        let grad = device.start(slice.grad.view().columns(elements())?, each)?;
        let starts = [weight, remainder, moment(&slice.m)?, moment(&slice.v)?, grad];
        if n == 0 {
            return Ok(());
        }
        let lr = update.lr * run.lr_scale;
        let step_size = lr / (1.0 - update.beta1.powf(update.step as f64));
        let keep = 1.0 - lr * run.weight_decay;
        let [weight, remainder, m, v, grad] = starts.map(|start| start.address);
        let vectors = u64::from(starts.iter().all(|start| start.vectors));
        let (n, first, blocks) = (n as u64, self.blocks as u64, n.div_ceil(THREADS * each));
        let [step_size, keep] = [step_size, keep].map(f64::to_bits);
        self.rows.push([weight, remainder, m, v, grad, n, first, vectors, step_size, keep]);
        self.blocks += blocks;
        Ok(())
    }
}

impl<T: Float> Optim<T> for Cuda {
    fn adamw(&self, slices: Vec<AdamWSlice<'_, T, Self>>, update: &AdamW) -> Result<()> {
        check::adamw("adamw", &slices, update)?;
        let mut launches: [[Runs; 2]; 2] = Default::default();
        for slice in &slices {
            let in_bf16 = |moment: &MomentMut<'_, T::Acc, Self>| matches!(moment, MomentMut::Bf16(_));
            let runs = &mut launches[usize::from(in_bf16(&slice.m))][usize::from(in_bf16(&slice.v))];
            slice.runs.iter().try_for_each(|run| runs.add(self, slice, run, update))?;
        }
        for (runs, kernel) in launches.iter().flatten().zip(KERNELS.into_iter().flatten()) {
            if runs.rows.is_empty() {
                continue;
            }
            let table = self.table(&runs.rows)?;
            let launch = self.kernel(&OPTIM.of(T::DTYPE), kernel)?;
            let launch = launch.scratch(&table).size(runs.rows.len()).value(factors::<T::Acc>(update));
            // SAFETY: a run's operands have as many elements as it says, and are held by `slices`, each by one run alone.
            unsafe { launch.grid([runs.blocks, 1, 1]).block([THREADS, 1, 1]).launch()? };
        }
        Ok(())
    }
}
