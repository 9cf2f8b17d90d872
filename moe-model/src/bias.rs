//! Biases of projections.

use moe_kernels::family::{Elementwise, Reduce};
use moe_kernels::{Backend, Float, Tensor};
use moe_topology::{Attention, Axes, Owner, Placement};

use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::{Cx, Result};

/// A vector that is added to every row.
#[derive(Debug, Clone, Copy)]
pub struct Bias(ParamId);

impl Bias {
    /// `{name}.bias`, `[width]`, on every rank of stage `stage`, each of which adds it to other rows; `partial` are the axes
    /// that tell these ranks apart.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        name: &str,
        width: usize,
        partial: Axes<Attention>,
        stage: usize,
    ) -> Result<Self> {
        let placement = Placement::new(&[width], &[], partial, Owner::Stage(stage))?;
        let bias = params.add(&[Logical {
            name: Name::One(format!("{name}.bias")),
            placement: Placed::Attention(placement),
            init: Init::Zeros,
        }])?;
        Ok(Bias(bias))
    }

    /// Adds it to the rows of `y`.
    pub fn add_to<T: Float, D: Backend<T>>(
        &self,
        y: moe_kernels::ViewMut<'_, T, D>,
        cx: &Cx<T, D>,
    ) -> Result<()> {
        Ok(cx.device.add_row(y, cx.params.weight(self.0)?)?)
    }

    /// Adds the sums of the columns of `dy` to its gradient.
    pub fn backward<T: Float, D: Backend<T>>(&self, dy: &Tensor<T, D>, cx: &mut Cx<T, D>) -> Result<()> {
        add_column_sums(self.0, dy, cx)
    }
}

/// Adds the sums of the columns of `dy` to the gradient of `bias`, whose rows stand side by side in `dy`.
pub(crate) fn add_column_sums<T: Float, D: Backend<T>>(
    bias: ParamId,
    dy: &Tensor<T, D>,
    cx: &mut Cx<T, D>,
) -> Result<()> {
    let (device, width) = (cx.device.clone(), dy.shape()[1]);
    let mut sums = Tensor::uninit(&device, 1, width)?;
    Reduce::<T>::column_sums(&device, sums.view_mut()?, dy.view())?;
    let grad = cx.params.grad(bias)?.reshape(1, width)?;
    Ok(Elementwise::<T::Acc>::add_assign(&device, grad, sums.view())?)
}
