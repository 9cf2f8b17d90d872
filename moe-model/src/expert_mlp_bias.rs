//! Biases of the experts' projections.

use moe_kernels::{Backend, Float, Tensor, ViewMut};
use moe_topology::{Axes, Expert, Owner, Placement};

use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::{Cx, Result};

/// `W2_e(f(W1_e h + b1_e) ⊙ (W3_e h + b3_e) · p_e) + b2_e · p_e`: what an expert's biases add.
///
/// `b1` and `b3` are cut over ETP as the rows of their matrices. `b2` is on every rank of ETP, and since what these ranks
/// compute is added up, the first one alone adds it; each of them sees all rows' gradients, so that of `b2` is complete
/// on each.
#[derive(Debug, Clone, Copy)]
pub struct ExpertMlpBias {
    gate_up: ParamId,
    down: ParamId,
    adds_down: bool,
}

impl ExpertMlpBias {
    /// `{experts}{e}.w1.bias`, `w3.bias` (`[inner]`) and `w2.bias` (`[hidden]`) of `count` experts.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        experts: &str,
        count: usize,
        [inner, hidden]: [usize; 2],
        owner: Owner,
    ) -> Result<Self> {
        let logical = |suffix: &str, width, shards: &[(usize, Axes<Expert>)]| {
            let placement = Placement::new(&[count, width], shards, Expert::EDP, owner)?;
            Result::Ok(Logical {
                name: Name::PerExpert { prefix: experts.to_owned(), suffix: format!(".{suffix}.bias") },
                placement: Placed::Expert(placement),
                init: Init::Zeros,
            })
        };
        let cut = [(0, Expert::EP), (1, Expert::ETP)];
        let gate_up = params.add(&[logical("w1", inner, &cut)?, logical("w3", inner, &cut)?])?;
        let down = params.add(&[logical("w2", hidden, &cut[..1])?])?;
        let adds_down = params.folding().coordinate(params.rank(), Expert::ETP) == 0;
        Ok(ExpertMlpBias { gate_up, down, adds_down })
    }

    /// To the first product, `[rows, 2 · inner]`.
    pub fn add_to_gate_up<T: Float, D: Backend<T>>(
        &self,
        gate_up: ViewMut<'_, T, D>,
        offsets: &Tensor<i32, D>,
        cx: &Cx<T, D>,
    ) -> Result<()> {
        let width = gate_up.shape()[1];
        let bias = cx.params.weight(self.gate_up)?.reshape(offsets.shape()[1] - 1, width)?;
        Ok(cx.device.grouped_add_bias(gate_up, bias, None, offsets.view())?)
    }

    /// To the second product, `[rows, hidden]`, times `probs: [1, rows]`.
    pub fn add_to_out<T: Float, D: Backend<T>>(
        &self,
        out: ViewMut<'_, T, D>,
        probs: &Tensor<T::Acc, D>,
        offsets: &Tensor<i32, D>,
        cx: &Cx<T, D>,
    ) -> Result<()> {
        if !self.adds_down {
            return Ok(());
        }
        let bias = cx.params.weight(self.down)?;
        Ok(cx.device.grouped_add_bias(out, bias, Some(probs.view()), offsets.view())?)
    }

    /// Adds to the gradient of `probs` and to those of the biases.
    pub fn backward<T: Float, D: Backend<T>>(
        &self,
        d_probs: ViewMut<'_, T::Acc, D>,
        d_gate_up: &Tensor<T, D>,
        d_out: &Tensor<T, D>,
        probs: &Tensor<T::Acc, D>,
        offsets: &Tensor<i32, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let device = cx.device.clone();
        let (offsets, experts) = (offsets.view(), offsets.shape()[1] - 1);
        if self.adds_down {
            device.grouped_bias_scale_acc(d_probs, d_out.view(), cx.params.weight(self.down)?, offsets)?;
        }
        device.grouped_bias_acc(cx.params.grad(self.down)?, d_out.view(), Some(probs.view()), offsets)?;
        let grad = cx.params.grad(self.gate_up)?.reshape(experts, d_gate_up.shape()[1])?;
        Ok(device.grouped_bias_acc(grad, d_gate_up.view(), None, offsets)?)
    }
}
