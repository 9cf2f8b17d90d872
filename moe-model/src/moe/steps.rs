//! The passes of the expert sublayer in steps: between the start and the finish of each movement of rows, others may compute. Starts
//! and finishes compute nothing but where rows go.

use moe_dispatch::{Batch, Dispatcher, Flight, NativePending, RouterInput, RouterScales};
use moe_kernels::family::{GateGradients, Op};
use moe_kernels::{Backend, Device, Float, Tensor};

use super::{MoeMlp, MoeMlpSaved, Routed, Rows};
use crate::dense::GatedMlpDeferred;
use crate::layer::{Hidden, Passed};
use crate::norm::RmsNormSaved;
use crate::recompute::RecomputeModule;
use crate::shared::{SharedExpert, SharedExpertSaved};
use crate::{Cx, Result};

/// Rows on their way between ranks.
pub type InFlight<T, D> = Flight<Tensor<T, D>, Tensor<<T as Float>::Acc, D>, NativePending<T, D>>;

/// A shared expert's output, and what its backward needs.
type Shared<T, D> = (Tensor<T, D>, SharedExpertSaved<T, D>);

/// A shared expert's gradient by its input, and what its weight gradients need.
type BySharedExpert<T, D> = (Tensor<T, D>, GatedMlpDeferred<T, D>);

/// A forward pass whose experts are chosen.
pub struct Chosen<T: Float, D: Device> {
    norm: RmsNormSaved<T, D>,
    h: Tensor<T, D>,
    routed: Routed<T, D>,
    shared: Option<Shared<T, D>>,
}

/// What experts keep of their rows, forward.
pub struct ExpertsSaved<T: Float, D: Device> {
    rows: Rows<T, D>,
    gate_up: Tensor<T, D>,
    activated: Option<Tensor<T, D>>,
}

/// A backward pass on the tokens' side: all but what its experts need.
pub struct TokenSide<T: Float, D: Device> {
    dy: Tensor<T, D>,
    norm: RmsNormSaved<T, D>,
    h: Option<Tensor<T, D>>,
    pub(super) routed: Routed<T, D>,
    shared: Option<SharedExpertSaved<T, D>>,
    by_shared: Option<BySharedExpert<T, D>>,
}

/// What the experts' weight gradients need.
#[derive(Debug)]
pub struct ExpertsDeferred<T: Float, D: Device> {
    x: Tensor<T, D>,
    offsets: Tensor<i32, D>,
    d_gate_up: Tensor<T, D>,
    activated: Tensor<T, D>,
    d_out: Tensor<T, D>,
}

/// Gradients of the experts' inputs, `[rows, hidden]`, and of the probabilities, `[1, rows]`.
pub type ByRows<T, D> = (Tensor<T, D>, Tensor<<T as Float>::Acc, D>);

/// What the shared expert's weight gradients need, if there is one.
pub type SharedDeferred<T, D> = Option<GatedMlpDeferred<T, D>>;

/// The gradient of the sublayer's input, and what weight gradients still need.
type BySublayer<T, D> = (Tensor<T, D>, SharedDeferred<T, D>);

impl<T: Float, D: Device> MoeMlpSaved<T, D> {
    /// What was decided and exchanged.
    pub(crate) fn routed(&self) -> &Routed<T, D> {
        &self.routed
    }

    /// The two sides of a backward pass with the gradient `dy` of the output.
    pub(crate) fn sides(self, dy: Tensor<T, D>) -> (TokenSide<T, D>, ExpertsSaved<T, D>) {
        let MoeMlpSaved { norm, h, routed, rows, gate_up, activated, shared } = self;
        let tokens = TokenSide { dy, norm, h, routed, shared, by_shared: None };
        (tokens, ExpertsSaved { rows, gate_up, activated })
    }
}

impl MoeMlp {
    /// Norm and router.
    pub(crate) fn choose<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        x: Hidden<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Chosen<T, D>> {
        let (h, norm) = self.norm.forward(x, cx)?;
        let routed = self.route(m, &h, cx)?;
        Ok(Chosen { norm, h, routed, shared: None })
    }

    /// Starts to bring rows to their experts.
    pub(crate) fn dispatch_start<T: Float, D: Backend<T>>(
        &self,
        chosen: &Chosen<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<InFlight<T, D>> {
        self.to_experts(&chosen.h, &chosen.routed, cx)
    }

    /// Computes the shared expert, if there is one and it was not computed before.
    pub(crate) fn compute_shared<T: Float, D: Backend<T>>(
        &self,
        chosen: &mut Chosen<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<()> {
        if let (Some(expert), None) = (&self.shared, &chosen.shared) {
            chosen.shared = Some(expert.forward(&chosen.h, cx)?);
        }
        Ok(())
    }

    /// The rows of this rank's experts.
    pub(crate) fn dispatch_finish<T: Float, D: Backend<T>>(
        &self,
        chosen: &Chosen<T, D>,
        flight: InFlight<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Rows<T, D>> {
        Ok(self.dispatcher.dispatch_finish(&self.fabric(cx)?, flight, &chosen.routed.state)?)
    }

    /// The experts' output, `[rows, hidden]`.
    pub(crate) fn compute<T: Float, D: Backend<T>>(
        &self,
        rows: Rows<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<(Tensor<T, D>, ExpertsSaved<T, D>)> {
        let device = &cx.device;
        let [gate_up, activated] = self.gate_up(&rows, cx)?;
        let weight = cx.params.weight(self.down)?;
        let mut out = Tensor::uninit(device, rows.rows, rows.x.shape()[1])?;
        device.grouped_gemm(out.view_mut()?, activated.view(), weight, Op::T, rows.offsets.view())?;
        if let Some(bias) = self.mlp_bias {
            bias.add_to_out(out.view_mut()?, &rows.probs, &rows.offsets, cx)?;
        }
        let activated = self.keeps(RecomputeModule::MoeAct).then_some(activated);
        Ok((out, ExpertsSaved { rows, gate_up, activated }))
    }

    /// Starts to bring the experts' output to its tokens.
    pub(crate) fn combine_start<T: Float, D: Backend<T>>(
        &self,
        chosen: &Chosen<T, D>,
        out: Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<InFlight<T, D>> {
        Ok(self.dispatcher.combine_start(&self.fabric(cx)?, out, &chosen.routed.state)?)
    }

    /// The sublayer's output; computes the shared expert, if it was not computed before.
    pub(crate) fn combine_finish<T: Float, D: Backend<T>>(
        &self,
        mut chosen: Chosen<T, D>,
        experts: ExpertsSaved<T, D>,
        flight: InFlight<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Passed<T, D, MoeMlpSaved<T, D>>> {
        let combined = self.dispatcher.combine_finish(&self.fabric(cx)?, flight, &chosen.routed.state)?;
        self.compute_shared(&mut chosen, cx)?;
        let Chosen { norm, h, routed, shared } = chosen;
        let mut y = Hidden { x: norm.x.clone(), added: Some(combined) };
        let shared = match shared {
            Some((out, saved)) => {
                y = Hidden { x: y.sum(&cx.device)?, added: Some(out) };
                self.keeps(RecomputeModule::SharedExperts).then_some(saved)
            }
            None => None,
        };
        let h = self.keeps(RecomputeModule::Layernorm).then_some(h);
        let ExpertsSaved { rows, gate_up, activated } = experts;
        Ok((y, MoeMlpSaved { norm, h, routed, rows, gate_up, activated, shared }))
    }

    /// Starts to bring the gradient to the experts.
    pub(crate) fn combine_backward_start<T: Float, D: Backend<T>>(
        &self,
        dy: &Tensor<T, D>,
        routed: &Routed<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<InFlight<T, D>> {
        Ok(self.dispatcher.combine_backward_start(&self.fabric(cx)?, dy, &routed.state)?)
    }

    /// The gradient of the experts' output, `[rows, hidden]`.
    pub(crate) fn combine_backward_finish<T: Float, D: Backend<T>>(
        &self,
        routed: &Routed<T, D>,
        flight: InFlight<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        Ok(self.dispatcher.combine_backward_finish(&self.fabric(cx)?, flight, &routed.state)?)
    }

    /// The shared expert's part of the backward pass, ahead of the rest: beside a transfer.
    pub(super) fn shared_ahead<T: Float, D: Backend<T>>(
        &self,
        expert: &SharedExpert,
        tokens: &mut TokenSide<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let TokenSide { dy, norm, h, shared, by_shared, .. } = tokens;
        let normed = self.norm.output(h.take(), norm, cx)?;
        *by_shared = Some(self.shared_backward(expert, dy, &normed, shared.take(), cx)?);
        *h = Some(normed);
        Ok(())
    }

    /// Through the experts.
    pub(crate) fn compute_backward<T: Float, D: Backend<T>>(
        &self,
        experts: ExpertsSaved<T, D>,
        d_out: Tensor<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<(ByRows<T, D>, ExpertsDeferred<T, D>)> {
        let device = cx.device.clone();
        let ExpertsSaved { rows, gate_up, activated } = experts;
        let [n, hidden] = d_out.shape();
        let weight = cx.params.weight(self.down)?;
        let inner = weight.shape()[1];
        let mut d_gate_up = Tensor::uninit(&device, n, 2 * inner)?;
        let mut d_probs = Tensor::uninit(&device, 1, n)?;
        let gradients = GateGradients { gate_up: d_gate_up.view_mut()?, p: Some(d_probs.view_mut()?) };
        let (gate, offsets) = (self.between(&rows), rows.offsets.view());
        device.grouped_gemm_glu_backward(gradients, d_out.view(), weight, gate_up.view(), &gate, offsets)?;
        let activated = activated.map_or_else(|| self.activate(&gate_up, &rows, cx), Ok)?;
        drop(gate_up);
        let Batch { x, probs, offsets, .. } = rows;
        let weight = cx.params.weight(self.gate_up)?;
        let mut dx_rows = Tensor::uninit(&device, n, hidden)?;
        device.grouped_gemm(dx_rows.view_mut()?, d_gate_up.view(), weight, Op::N, offsets.view())?;
        if let Some(bias) = self.mlp_bias {
            bias.backward(d_probs.view_mut()?, &d_gate_up, &d_out, &probs, &offsets, cx)?;
        }
        Ok(((dx_rows, d_probs), ExpertsDeferred { x, offsets, d_gate_up, activated, d_out }))
    }

    /// Starts to bring the gradients of rows to their tokens.
    pub(crate) fn dispatch_backward_start<T: Float, D: Backend<T>>(
        &self,
        tokens: &TokenSide<T, D>,
        (dx_rows, d_probs): ByRows<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<InFlight<T, D>> {
        let state = &tokens.routed.state;
        Ok(self.dispatcher.dispatch_backward_start(&self.fabric(cx)?, dx_rows, d_probs, state)?)
    }

    /// The gradient by the normed input, `[tokens, hidden]`, and by the weights of the choices.
    pub(crate) fn dispatch_backward_finish<T: Float, D: Backend<T>>(
        &self,
        tokens: &TokenSide<T, D>,
        flight: InFlight<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<ByRows<T, D>> {
        Ok(self.dispatcher.dispatch_backward_finish(&self.fabric(cx)?, flight, &tokens.routed.state)?)
    }

    /// Through router, shared expert and norm: the gradient of the sublayer's input, and what the shared expert's weight
    /// gradients need.
    pub(crate) fn choose_backward<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        tokens: TokenSide<T, D>,
        (mut dh, dweights): ByRows<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<BySublayer<T, D>> {
        let device = cx.device.clone();
        let TokenSide { dy, norm, h, routed, shared, mut by_shared } = tokens;
        let Routed { router, noise, .. } = routed;
        let h = self.norm.output(h, &norm, cx)?;
        let (step_counts, model_counts) = (self.step_counts(&router, cx)?, cx.choices.clone());
        let scales = RouterScales {
            micro_batches: cx.objective.micro_batches as u64,
            sequences: cx.objective.sequences as u64,
            valid_tokens: cx.objective.tokens as u64,
            step_counts: step_counts.as_ref().map(Tensor::view),
            model_counts: model_counts.as_ref().map(Tensor::view),
            model_unit: cx.model_unit,
            moe_layers: self.moe_layers as u64,
        };
        if let Some(sums) = cx.stats.moe.of(self.layer)? {
            self.router.add_model_aux_loss(&device, &router, scales, sums)?;
        }
        let sequences = cx.batch(m)?.batch;
        let (weight, grad) = cx.params.weight_and_grad(self.gate)?;
        let jitter = self.jitter(noise.as_ref());
        let input = RouterInput { sequences, jitter, ..RouterInput::new(&h, weight) };
        self.router.backward(&device, input, &dweights, router, dh.view_mut()?, grad, scales)?;
        if let (None, Some(expert)) = (&by_shared, &self.shared) {
            by_shared = Some(self.shared_backward(expert, &dy, &h, shared, cx)?);
        }
        let shared = match by_shared {
            Some((d_shared, deferred)) => {
                device.add_assign(dh.view_mut()?, d_shared.view())?;
                Some(deferred)
            }
            None => None,
        };
        Ok((self.norm.backward(&dh, Some(&dy), norm, cx)?, shared))
    }

    /// Adds to the gradients of the experts' weights.
    pub(crate) fn experts_weight<T: Float, D: Backend<T>>(
        &self,
        deferred: ExpertsDeferred<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let ExpertsDeferred { x, offsets, d_gate_up, activated, d_out } = deferred;
        cx.params.add_grouped_product(self.gate_up, d_gate_up.view(), x.view(), offsets.view())?;
        cx.params.add_grouped_product(self.down, d_out.view(), activated.view(), offsets.view())
    }

    /// Adds to the gradients of the shared expert's weights.
    pub(crate) fn shared_weight<T: Float, D: Backend<T>>(
        &self,
        deferred: SharedDeferred<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        match (&self.shared, deferred) {
            (Some(expert), Some(deferred)) => expert.backward_weight(deferred, cx),
            _ => Ok(()),
        }
    }
}
