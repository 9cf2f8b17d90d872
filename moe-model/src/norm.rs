//! RMSNorm on sequence-parallel rows.

use moe_kernels::{Backend, Device, Float, Tensor};
use moe_topology::{Owner, Placement};

use crate::axes::TP_CP_DP;
use crate::layer::Hidden;
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::{Cx, Result};

/// `y = x · rsqrt(mean(x²) + eps) · w`.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    pub(crate) weight: ParamId,
    pub(crate) eps: f64,
}

/// What backward needs: the input and the inverse root mean squares.
#[derive(Debug)]
pub struct RmsNormSaved<T: Float, D: Device> {
    pub(crate) x: Tensor<T, D>,
    pub(crate) rstd: Tensor<T::Acc, D>,
}

/// Queries and keys after their norms, and what backward needs of each.
pub type NormedPair<T, D> = ([Tensor<T, D>; 2], [RmsNormSaved<T, D>; 2]);

impl RmsNorm {
    /// Its weight `[hidden]` is on every rank of the stage; each sees other tokens, so the gradient is partial over all
    /// axes of the attention view but pp.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        name: String,
        hidden: usize,
        eps: f64,
        stage: usize,
    ) -> Result<Self> {
        let placement = Placement::new(&[hidden], &[], TP_CP_DP, Owner::Stage(stage))?;
        let weight = params.add(&[Logical {
            name: Name::One(name),
            placement: Placed::Attention(placement),
            init: Init::Ones,
        }])?;
        Ok(RmsNorm { weight, eps })
    }

    /// `x, y: [tokens, hidden]`. What is saved has the sum of `x`.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        x: impl Into<Hidden<T, D>>,
        cx: &Cx<T, D>,
    ) -> Result<(Tensor<T, D>, RmsNormSaved<T, D>)> {
        let (device, Hidden { x, added }) = (&cx.device, x.into());
        let [tokens, hidden] = x.shape();
        let mut y = Tensor::uninit(device, tokens, hidden)?;
        let mut rstd = Tensor::uninit(device, 1, tokens)?;
        let (to, r, weight) = (y.view_mut()?, rstd.view_mut()?, cx.params.weight(self.weight)?);
        let x = match added {
            None => {
                device.rms_norm(to, r, x.view(), weight, self.eps)?;
                x
            }
            Some(added) => {
                let mut sum = Tensor::uninit(device, tokens, hidden)?;
                device.add_rms_norm(sum.view_mut()?, to, r, x.view(), added.view(), weight, self.eps)?;
                sum
            }
        };
        Ok((y, RmsNormSaved { x, rstd }))
    }

    /// The output of a forward pass: `kept`, or made again.
    pub fn output<T: Float, D: Backend<T>>(
        &self,
        kept: Option<Tensor<T, D>>,
        saved: &RmsNormSaved<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        kept.map_or_else(|| Ok(self.forward(saved.x.clone(), cx)?.0), Ok)
    }

    /// The gradient of the input, with that which reaches it `past` the norm; adds to that of the weight.
    pub fn backward<T: Float, D: Backend<T>>(
        &self,
        dy: &Tensor<T, D>,
        past: Option<&Tensor<T, D>>,
        saved: RmsNormSaved<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        let [tokens, hidden] = dy.shape();
        let mut dx = Tensor::uninit(&cx.device, tokens, hidden)?;
        let (weight, grad) = cx.params.weight_and_grad(self.weight)?;
        let (x, rstd) = (saved.x.view(), saved.rstd.view());
        let past = past.map(Tensor::view);
        cx.device.rms_norm_backward(dx.view_mut()?, grad, dy.view(), x, weight, rstd, past)?;
        Ok(dx)
    }
}
