//! The expert that every token goes to.

use moe_kernels::family::Op;
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_topology::{Owner, Placement};

use crate::axes::TP_CP_DP;
use crate::config::{ModelConfig, SharedExpertWidth};
use crate::dense::{GatedMlp, GatedMlpDeferred, GatedMlpSaved};
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::{Cx, Result};

/// The expert that every token goes to besides those it chooses (arXiv 2401.06066): a feed-forward layer over the TP of
/// attention, as Megatron has it, times `σ(w·h)` if it is gated (Qwen2-MoE).
#[derive(Debug, Clone, Copy)]
pub struct SharedExpert {
    mlp: GatedMlp,
    gate: Option<ParamId>,
}

/// What backward needs of a forward pass, besides its input.
#[derive(Debug)]
pub struct SharedExpertSaved<T: Float, D: Device> {
    mlp: GatedMlpSaved<T, D>,
    gate: Option<GateSaved<T, D>>,
}

#[derive(Debug)]
struct GateSaved<T: Float, D: Device> {
    logits: Tensor<T, D>,
    out: Tensor<T, D>,
}

impl SharedExpert {
    /// The shared expert of layer `layer`, if the model has one, on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        layer: usize,
        stage: usize,
    ) -> Result<Option<Self>> {
        let prefix = format!("model.layers.{layer}.mlp");
        Ok(match config.shared_expert_width() {
            None => None,
            Some(SharedExpertWidth::Plain(inner)) => {
                let mlp = GatedMlp::new(params, config, &format!("{prefix}.shared_experts"), inner, stage)?;
                Some(SharedExpert { mlp, gate: None })
            }
            Some(SharedExpertWidth::Gated(inner)) => {
                let mlp = GatedMlp::new(params, config, &format!("{prefix}.shared_expert"), inner, stage)?;
                // On every rank of the stage, each of which sees other tokens.
                let placement = Placement::new(&[1, config.hidden_size], &[], TP_CP_DP, Owner::Stage(stage))?;
                let gate = params.add(&[Logical {
                    name: Name::One(format!("{prefix}.shared_expert_gate.weight")),
                    placement: Placed::Attention(placement),
                    init: Init::Normal(config.initializer_range),
                }])?;
                Some(SharedExpert { mlp, gate: Some(gate) })
            }
        })
    }

    /// `h, y: [tokens of this rank, hidden]`.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        h: &Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<(Tensor<T, D>, SharedExpertSaved<T, D>)> {
        let (out, mlp) = self.mlp.forward(h, cx)?;
        let Some(gate) = self.gate else { return Ok((out, SharedExpertSaved { mlp, gate: None })) };
        let [n, hidden] = h.shape();
        let mut logits = Tensor::uninit(&cx.device, n, 1)?;
        cx.device.gemm(logits.view_mut()?, h.view(), Op::N, cx.params.weight(gate)?, Op::T)?;
        let mut y = Tensor::uninit(&cx.device, n, hidden)?;
        cx.device.sigmoid_gate(y.view_mut()?, out.view(), logits.view())?;
        Ok((y, SharedExpertSaved { mlp, gate: Some(GateSaved { logits, out }) }))
    }

    /// The part of a forward pass that backward reads.
    pub fn rerun<T: Float, D: Backend<T>>(
        &self,
        h: &Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<SharedExpertSaved<T, D>> {
        match self.gate {
            // The gate's gradient needs what it multiplies.
            Some(_) => Ok(self.forward(h, cx)?.1),
            None => Ok(SharedExpertSaved { mlp: self.mlp.activate(h, cx)?, gate: None }),
        }
    }

    /// The gradient of `h`; adds to that of the gate's weight.
    pub fn backward_input<T: Float, D: Backend<T>>(
        &self,
        dy: &Tensor<T, D>,
        h: &Tensor<T, D>,
        saved: SharedExpertSaved<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, GatedMlpDeferred<T, D>)> {
        let device = cx.device.clone();
        let (Some(gate), Some(GateSaved { logits, out })) = (self.gate, saved.gate) else {
            return self.mlp.backward_input(dy, h, saved.mlp, cx);
        };
        let [n, hidden] = h.shape();
        let mut d_out = Tensor::uninit(&device, n, hidden)?;
        let mut d_logits = Tensor::uninit(&device, n, 1)?;
        device.sigmoid_gate_backward(
            d_out.view_mut()?,
            d_logits.view_mut()?,
            dy.view(),
            out.view(),
            logits.view(),
        )?;
        let (mut dh, mlp) = self.mlp.backward_input(&d_out, h, saved.mlp, cx)?;
        let (weight, grad) = cx.params.weight_and_grad(gate)?;
        let mut dh_gate = Tensor::uninit(&device, n, hidden)?;
        device.gemm(dh_gate.view_mut()?, d_logits.view(), Op::N, weight, Op::N)?;
        device.add_assign(dh.view_mut()?, dh_gate.view())?;
        device.gemm_acc(grad, d_logits.view(), Op::T, h.view(), Op::N)?;
        Ok((dh, mlp))
    }

    /// Adds to the weight gradients.
    pub fn backward_weight<T: Float, D: Backend<T>>(
        &self,
        deferred: GatedMlpDeferred<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        self.mlp.backward_weight(deferred, cx)
    }
}
