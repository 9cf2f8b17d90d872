//! Biases of projections.

use moe_kernels::family::{Elementwise, Reduce};
use moe_kernels::{Backend, Float, Tensor, ViewMut};
use moe_topology::{Attention, Axes, Owner, Placement};

use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::{Cx, Result};

/// Vectors that stand side by side and are added to every row.
#[derive(Debug, Clone, Copy)]
pub struct Bias(ParamId);

/// How a bias lies on the ranks of a stage.
#[derive(Debug, Clone, Copy)]
pub struct BiasPlace {
    /// Axes over which it is cut.
    pub sharded: Axes<Attention>,
    /// Axes that tell apart ranks which add it to other rows, or to other columns of them.
    pub partial: Axes<Attention>,
    /// Pipeline stage.
    pub stage: usize,
}

impl Bias {
    /// `{prefix}.{name}.bias` of each of `names`, `[width]`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        prefix: &str,
        names: &[&str],
        width: usize,
        place: BiasPlace,
    ) -> Result<Self> {
        let BiasPlace { sharded, partial, stage } = place;
        let logical = |name: &&str| {
            let placement = Placement::new(&[width], &[(0, sharded)], partial, Owner::Stage(stage))?;
            Ok(Logical {
                name: Name::One(format!("{prefix}.{name}.bias")),
                placement: Placed::Attention(placement),
                init: Init::Zeros,
            })
        };
        Ok(Bias(params.add(&names.iter().map(logical).collect::<Result<Vec<_>>>()?)?))
    }

    /// Adds it to the rows of `y`.
    pub fn add_to<T: Float, D: Backend<T>>(&self, y: ViewMut<'_, T, D>, cx: &Cx<T, D>) -> Result<()> {
        let bias = cx.params.weight(self.0)?.reshape(1, y.shape()[1])?;
        Ok(cx.device.add_row(y, bias)?)
    }

    /// Adds the sums of the columns of `dy` to its gradient.
    pub fn backward<T: Float, D: Backend<T>>(&self, dy: &Tensor<T, D>, cx: &mut Cx<T, D>) -> Result<()> {
        let (device, width) = (cx.device.clone(), dy.shape()[1]);
        let mut sums = Tensor::uninit(&device, 1, width)?;
        Reduce::<T>::column_sums(&device, sums.view_mut()?, dy.view())?;
        let grad = cx.params.grad(self.0)?.reshape(1, width)?;
        Ok(Elementwise::<T::Acc>::add_assign(&device, grad, sums.view())?)
    }
}
