//! The global gradient norm: every logical element once, in an order that no mapping changes.

use std::collections::BTreeMap;

use moe_comm::Reduction;
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_model::Cx;
use moe_topology::Attention;

use super::shard::sliced_parts;
use crate::Result;

/// The names of the logical tensors whose gradients the norm counts, sorted: the same on all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamNames(BTreeMap<String, usize>);

impl ParamNames {
    /// From the names in any order.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let sorted: std::collections::BTreeSet<String> = names.into_iter().collect();
        ParamNames(sorted.into_iter().enumerate().map(|(at, name)| (name, at)).collect())
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True without tensors.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The names in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// The Euclidean norm of the whole gradient, before clipping.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradNorm(pub f64);

/// A norm that a device was told to compute: what it needs of the host is done.
#[derive(Debug)]
pub struct PendingGradNorm<D: Device> {
    /// Of each tensor, over the world, `[1, names]`.
    squares: Tensor<f64, D>,
}

impl<D: Device> PendingGradNorm<D> {
    /// From every rank's slices of the reduced gradients. Squares are summed in f64 per parameter, then over the world,
    /// then in name order. Tensors that are not in `names`, which are frozen, do not count. Collective over the world.
    pub fn start<T: Float>(cx: &Cx<T, D>, grads: &[Tensor<T::Acc, D>], names: &ParamNames) -> Result<Self>
    where
        D: Backend<T>,
    {
        let device = &cx.device;
        let mut pieces = Vec::new();
        for (bucket, grad) in cx.params.buckets().iter().zip(grads) {
            for (part, range) in sliced_parts(bucket).filter(|(part, _)| part.counts) {
                let Some(&tensor) = names.0.get(&part.name) else { continue };
                let at = range.start - bucket.slice.start;
                pieces.push((tensor, grad.view().columns(at..at + range.len())?));
            }
        }
        let mut squares = Tensor::<f64, D>::zeros(device, 1, names.len())?;
        device.sums_of_squares(squares.view_mut()?, &pieces)?;
        let squares = cx.comms.group(Attention::ALL)?.all_reduce(&squares, Reduction::Sum)?;
        Ok(PendingGradNorm { squares })
    }

    /// Waits for it.
    pub fn wait(self, device: &D) -> Result<GradNorm> {
        Ok(GradNorm(self.squares.to_vec(device)?.into_iter().sum::<f64>().sqrt()))
    }
}

impl GradNorm {
    /// The factor that clips the gradient to norm `max` (0: no clipping): `min(1, max / (‖g‖ + 1e-6))`.
    pub fn clip_factor(self, max: f64) -> f64 {
        if max > 0.0 { (max / (self.0 + 1e-6)).min(1.0) } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use moe_comm::{Comms, ThreadWorld, World};
    use moe_kernels::Cpu;
    use moe_kernels::family::RotaryPairs;
    use moe_model::config::RotaryFrequencies;
    use moe_model::params::{Init, Logical, Name, ParamLayoutBuilder, ParamStore, Placed};
    use moe_model::{Objective, RopeTable};
    use moe_topology::{Folding, Mapping, Owner, Placement};

    use super::*;
    use crate::Error;

    /// Both tensor-parallel ranks hold the vector and have its whole gradient after a reduction over DP. (Under sequence
    /// parallelism no tensor of the decoder is like that.)
    #[test]
    fn what_several_ranks_hold_alike_is_counted_once() {
        let norms = ThreadWorld::run(4, Duration::from_secs(60), |world| {
            let device = Cpu::new(1);
            let folding = Folding::new(Mapping { world_size: 4, tp: 2, ..Mapping::default() })?;
            let mut layout = ParamLayoutBuilder::new(&folding, world.rank());
            for (name, dims, shards) in
                [("vector", &[6][..], &[][..]), ("matrix", &[4, 3], &[(0, Attention::TP)])]
            {
                let placement = Placement::new(dims, shards, Attention::DP, Owner::Stage(0))?;
                let (name, placement) = (Name::One(name.into()), Placed::Attention(placement));
                layout.add(&[Logical { name, placement, init: Init::Ones }])?;
            }
            let params = ParamStore::<f64, Cpu>::new(layout.build(), 0, &device)?;
            let comms = Comms::builder().attention(Attention::ALL).build(&world, &device, &folding)?;
            let grads = params
                .buckets()
                .iter()
                .map(|bucket| {
                    let n = bucket.slice.len();
                    Ok(Tensor::<f64, Cpu>::from_slice(&device, 1, n, &vec![1.0; n])?)
                })
                .collect::<Result<Vec<_>>>()?;
            let frequencies = RotaryFrequencies { per_position: vec![1.0], attention_factor: 1.0 };
            let rope = RopeTable::new(&device, 1, &frequencies, RotaryPairs::Halves)?;
            let objective = Objective { micro_batches: 1, sequences: 1, tokens: 1 };
            let cx = Cx::new(device, comms, params, rope, objective);
            let names = ParamNames::new(["vector".to_owned(), "matrix".to_owned()]);
            Ok::<_, Error>(PendingGradNorm::start(&cx, &grads, &names)?.wait(&cx.device)?.0)
        })
        .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(norms, [18.0f64.sqrt(); 4]);
    }

    #[test]
    fn clipping_scales_down_and_never_up() {
        assert_eq!(GradNorm(0.5).clip_factor(1.0), 1.0);
        assert!((GradNorm(4.0).clip_factor(1.0) - 1.0 / 4.000001).abs() < 1e-15);
        assert_eq!(GradNorm(4.0).clip_factor(0.0), 1.0);
    }
}
