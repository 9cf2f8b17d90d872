//! The expert sublayer: router, dispatch, grouped gated experts, combine, shared expert.

use moe_comm::Reduction;
use moe_dispatch::{
    Dispatcher, DispatcherKind, Grid, NativeFabric, Router, RouterConfig, RouterInput, RouterSaved,
    RouterScales, RouterStats, TokenDispatcher, TokenDispatcherState,
};
use moe_kernels::family::{GateFunction, Op};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_topology::{Expert, Owner, Placement};

use crate::axes::{TP_CP, TP_CP_DP};
use crate::capacity::Place;
use crate::config::{AuxLossScope, ModelConfig, RouterDType};
use crate::cx::MoeStats;
use crate::dense::GatedMlpDeferred;
use crate::expert_bias::ExpertBias;
use crate::expert_mlp_bias::ExpertMlpBias;
use crate::layer::Layer;
use crate::norm::{RmsNorm, RmsNormSaved};
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::shared::{SharedExpert, SharedExpertSaved};
use crate::{Cx, Error, Result};

/// `y = x + Σ_e p_e · W2_e(f(W1_e h) ⊙ W3_e h) + shared(h)` over the experts that the router chose, with `h = norm(x)` and
/// `f` the model's `hidden_act`; with [biases](ExpertMlpBias) if `expert_mlp_bias`.
///
/// The router sees the rank's own tokens (sequence parallelism), so its weight's gradient is partial over all axes of the
/// attention view; experts are sharded over EP, their inner dimension over ETP.
#[derive(Debug, Clone)]
pub struct MoeMlp {
    layer: usize,
    norm: RmsNorm,
    gate: ParamId,
    router: Router,
    bias: Option<ExpertBias>,
    dispatcher: TokenDispatcher,
    grid: Grid,
    place: Place,
    gate_up: ParamId,
    down: ParamId,
    mlp_bias: Option<ExpertMlpBias>,
    function: GateFunction,
    shared: Option<SharedExpert>,
}

/// What backward needs of a forward pass.
#[derive(Debug)]
pub struct MoeMlpSaved<T: Float, D: Device> {
    norm: RmsNormSaved<T, D>,
    router: RouterSaved<T, D>,
    /// This rank's choices that the load-balancing losses count.
    plain_counts: Vec<i64>,
    state: TokenDispatcherState<Tensor<i32, D>>,
    x: Tensor<T, D>,
    probs: Tensor<T::Acc, D>,
    offsets: Tensor<i32, D>,
    gate_up: Tensor<T, D>,
    activated: Tensor<T, D>,
    shared: Option<SharedExpertSaved<T, D>>,
}

/// What the weight gradients need.
#[derive(Debug)]
pub struct MoeMlpDeferred<T: Float, D: Device> {
    x: Tensor<T, D>,
    offsets: Tensor<i32, D>,
    d_gate_up: Tensor<T, D>,
    activated: Tensor<T, D>,
    d_out: Tensor<T, D>,
    shared: Option<GatedMlpDeferred<T, D>>,
}

impl MoeMlp {
    /// The experts of layer `layer` on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        dispatcher: DispatcherKind,
        layer: usize,
        stage: usize,
    ) -> Result<Self> {
        let prefix = format!("model.layers.{layer}");
        let (hidden, inner, experts) = (config.hidden_size, config.expert_width(), config.num_local_experts);
        let owner = Owner::Stage(stage);
        let name = format!("{prefix}.post_attention_layernorm.weight");
        let norm = RmsNorm::new(params, name, hidden, config.rms_norm_eps, stage)?;
        let gate = params.add(&[Logical {
            name: Name::One(format!("{prefix}.block_sparse_moe.gate.weight")),
            placement: Placed::Attention(Placement::new(&[experts, hidden], &[], TP_CP_DP, owner)?),
            init: Init::Normal(config.initializer_range),
        }])?;
        let bias = config.moe_router_enable_expert_bias;
        let bias = bias.then(|| ExpertBias::new(params, experts, layer, stage)).transpose()?;
        let expert = |suffix: &str, dims: [usize; 2], inner_dim: usize, std: f64| -> Result<Logical> {
            let shards = [(0, Expert::EP), (inner_dim, Expert::ETP)];
            let placement = Placement::new(&[experts, dims[0], dims[1]], &shards, Expert::EDP, owner)?;
            Ok(Logical {
                name: Name::PerExpert {
                    prefix: format!("{prefix}.block_sparse_moe.experts."),
                    suffix: format!(".{suffix}.weight"),
                },
                placement: Placed::Expert(placement),
                init: Init::Normal(std),
            })
        };
        let std = config.initializer_range;
        let gate_up =
            params.add(&[expert("w1", [inner, hidden], 1, std)?, expert("w3", [inner, hidden], 1, std)?])?;
        let down = params.add(&[expert("w2", [hidden, inner], 2, config.residual_std())?])?;
        let names = format!("{prefix}.block_sparse_moe.experts.");
        let mlp_bias = config
            .expert_mlp_bias
            .then(|| ExpertMlpBias::new(params, &names, experts, [inner, hidden], owner))
            .transpose()?;
        let router = Router::new(RouterConfig {
            num_experts: experts,
            top_k: config.num_experts_per_tok,
            scoring: config.scoring(),
            in_f64: config.moe_router_dtype == Some(RouterDType::F64),
            aux_loss_coef: config.aux_loss_coef(AuxLossScope::MicroBatch),
            sequence_aux_loss_coef: config.aux_loss_coef(AuxLossScope::Sequence),
            global_aux_loss_coef: config.aux_loss_coef(AuxLossScope::Global),
            z_loss_coef: config.router_z_loss_coef,
        })?;
        let grid = Grid::of(params.folding(), params.rank())?;
        let place = Place::of(params.folding(), params.rank());
        let dispatcher = TokenDispatcher { kind: dispatcher, num_experts: experts };
        let (function, shared) = (config.gate_function(), SharedExpert::new(params, config, layer, stage)?);
        Ok(MoeMlp {
            layer,
            norm,
            gate,
            router,
            bias,
            dispatcher,
            grid,
            place,
            gate_up,
            down,
            mlp_bias,
            function,
            shared,
        })
    }

    /// Fresh statistics for a step.
    pub fn stats(&self) -> MoeStats {
        let experts = self.router.config().num_experts;
        MoeStats {
            layer: self.layer,
            counts: vec![0; experts],
            plain_counts: vec![0; experts],
            prob_sums: vec![0.0; experts],
            ..MoeStats::default()
        }
    }

    /// Its global index.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// The bias on its choices, if it has one.
    pub fn expert_bias(&self) -> Option<ExpertBias> {
        self.bias
    }

    fn record(&self, stats: &mut [MoeStats], seen: &RouterStats, dropped: u64) {
        if let Some(own) = stats.iter_mut().find(|s| s.layer == self.layer) {
            for (sum, count) in own.counts.iter_mut().zip(&seen.expert_counts) {
                *sum += *count as u64;
            }
            own.dropped += dropped;
            own.plain_counts.iter_mut().zip(&seen.plain_counts).for_each(|(sum, count)| *sum += count);
            own.prob_sums.iter_mut().zip(&seen.prob_sums).for_each(|(sum, p)| *sum += p);
            own.aux += seen.aux_loss;
            own.sequence_aux += seen.sequence_aux_loss;
            own.z += seen.z_loss_sum;
        }
    }

    /// Choices of the whole step, where its load-balancing loss asks for them: counted beforehand, or, where every rank has
    /// one micro-batch, `own` added up now.
    fn step_counts<T: Float, D: Device>(&self, own: &[i64], cx: &Cx<T, D>) -> Result<Vec<i64>> {
        if self.router.config().global_aux_loss_coef == 0.0 {
            return Ok(Vec::new());
        }
        match (cx.step_counts.get(&self.layer), cx.batches.len()) {
            (Some(counts), _) => Ok(counts.clone()),
            (None, 1) => Ok(cx.group(TP_CP_DP)?.all_reduce_host(own, Reduction::Sum)?),
            (None, batches) => Err(Error::NotCounted { layer: self.layer, batches }),
        }
    }
}

impl<T: Float, D: Backend<T>> Layer<T, D> for MoeMlp {
    type Saved = MoeMlpSaved<T, D>;
    type Deferred = MoeMlpDeferred<T, D>;

    fn forward(&self, m: u32, x: Tensor<T, D>, cx: &mut Cx<T, D>) -> Result<(Tensor<T, D>, Self::Saved)> {
        let device = cx.device.clone();
        let (h, norm) = self.norm.forward(x.clone(), cx)?;
        let unit = cx.group(TP_CP)?;
        let sum_over_unit = |counts: &[i64]| Ok(unit.all_reduce_host(counts, Reduction::Sum)?);
        let sequences = cx.batch(m)?.batch;
        let bias = self.bias.map(|bias| bias.values(&cx.params).view());
        let input = RouterInput { bias, sequences, ..RouterInput::new(&h, cx.params.weight(self.gate)?) };
        let (routing, router, seen) = self
            .router
            .forward(&device, input, sum_over_unit)
            .map_err(|error| Error::in_router(self.layer, error))?;
        let (routing, dropped) = self.place.drop_excess(m, routing, self.router.config().num_experts, cx)?;
        self.record(&mut cx.stats.moe, &seen, dropped);

        let fabric = NativeFabric::new(&cx.device, self.grid, &cx.comms)?;
        let (batch, state) = self.dispatcher.dispatch(&fabric, &h, &routing)?;
        let (gate_up_weight, down_weight) = (cx.params.weight(self.gate_up)?, cx.params.weight(self.down)?);
        let (n, inner) = (batch.rows, down_weight.shape()[1]);
        let mut gate_up = Tensor::uninit(&device, n, 2 * inner)?;
        device.grouped_gemm(
            gate_up.view_mut()?,
            batch.x.view(),
            gate_up_weight,
            Op::T,
            batch.offsets.view(),
        )?;
        if let Some(bias) = self.mlp_bias {
            bias.add_to_gate_up(gate_up.view_mut()?, &batch.offsets, cx)?;
        }
        let mut activated = Tensor::uninit(&device, n, inner)?;
        device.glu(activated.view_mut()?, gate_up.view(), Some(batch.probs.view()), self.function)?;
        let mut out = Tensor::uninit(&device, n, x.shape()[1])?;
        device.grouped_gemm(out.view_mut()?, activated.view(), down_weight, Op::T, batch.offsets.view())?;
        if let Some(bias) = self.mlp_bias {
            bias.add_to_out(out.view_mut()?, &batch.probs, &batch.offsets, cx)?;
        }
        let combined = self.dispatcher.combine(&fabric, out, &state)?;

        let mut y = Tensor::uninit(&device, x.shape()[0], x.shape()[1])?;
        device.add(y.view_mut()?, x.view(), combined.view())?;
        let shared = match &self.shared {
            Some(expert) => {
                let (out, saved) = expert.forward(&h, cx)?;
                device.add_assign(y.view_mut()?, out.view())?;
                Some(saved)
            }
            None => None,
        };
        let (x, probs, offsets, plain_counts) = (batch.x, batch.probs, batch.offsets, seen.plain_counts);
        let saved =
            MoeMlpSaved { norm, router, plain_counts, state, x, probs, offsets, gate_up, activated, shared };
        Ok((y, saved))
    }

    fn backward_input(
        &self,
        _m: u32,
        dy: Tensor<T, D>,
        saved: Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, Self::Deferred)> {
        let device = cx.device.clone();
        let MoeMlpSaved { norm, router, plain_counts, state, x, probs, offsets, gate_up, activated, shared } =
            saved;
        let fabric = NativeFabric::new(&cx.device, self.grid, &cx.comms)?;
        let d_out = self.dispatcher.combine_backward(&fabric, &dy, &state)?;
        let (n, inner, hidden) = (d_out.shape()[0], activated.shape()[1], d_out.shape()[1]);

        let down_weight = cx.params.weight(self.down)?;
        let mut d_activated = Tensor::uninit(&device, n, inner)?;
        device.grouped_gemm(d_activated.view_mut()?, d_out.view(), down_weight, Op::N, offsets.view())?;
        let mut d_gate_up = Tensor::uninit(&device, n, 2 * inner)?;
        let mut d_probs = Tensor::uninit(&device, 1, n)?;
        device.glu_backward(
            d_gate_up.view_mut()?,
            Some(d_probs.view_mut()?),
            d_activated.view(),
            gate_up.view(),
            Some(probs.view()),
            self.function,
        )?;
        let gate_up_weight = cx.params.weight(self.gate_up)?;
        let mut dx_rows = Tensor::uninit(&device, n, hidden)?;
        device.grouped_gemm(dx_rows.view_mut()?, d_gate_up.view(), gate_up_weight, Op::N, offsets.view())?;
        if let Some(bias) = self.mlp_bias {
            bias.backward(d_probs.view_mut()?, &d_gate_up, &d_out, &probs, &offsets, cx)?;
        }
        let fabric = NativeFabric::new(&cx.device, self.grid, &cx.comms)?;
        let (mut dh, dweights) = self.dispatcher.dispatch_backward(&fabric, dx_rows, d_probs, &state)?;

        let step_counts = self.step_counts(&plain_counts, cx)?;
        let scales = RouterScales {
            micro_batches: cx.objective.micro_batches as u64,
            sequences: cx.objective.sequences as u64,
            valid_tokens: cx.objective.tokens as u64,
            step_counts: &step_counts,
        };
        let (weight, grad) = cx.params.weight_and_grad(self.gate)?;
        let d_router = self.router.backward(&device, &dweights, router, weight, grad, scales)?;
        device.add_assign(dh.view_mut()?, d_router.view())?;
        let shared = match (&self.shared, shared) {
            (Some(expert), Some(saved)) => {
                let (d_shared, deferred) = expert.backward_input(&dy, saved, cx)?;
                device.add_assign(dh.view_mut()?, d_shared.view())?;
                Some(deferred)
            }
            _ => None,
        };
        let mut dx = self.norm.backward(&dh, norm, cx)?;
        device.add_assign(dx.view_mut()?, dy.view())?;
        Ok((dx, MoeMlpDeferred { x, offsets, d_gate_up, activated, d_out, shared }))
    }

    fn backward_weight(&self, _m: u32, deferred: Self::Deferred, cx: &mut Cx<T, D>) -> Result<()> {
        let MoeMlpDeferred { x, offsets, d_gate_up, activated, d_out, shared } = deferred;
        let device = &cx.device;
        device.grouped_gemm_acc(cx.params.grad(self.gate_up)?, d_gate_up.view(), x.view(), offsets.view())?;
        device.grouped_gemm_acc(
            cx.params.grad(self.down)?,
            d_out.view(),
            activated.view(),
            offsets.view(),
        )?;
        if let (Some(expert), Some(deferred)) = (&self.shared, shared) {
            expert.backward_weight(deferred, cx)?;
        }
        Ok(())
    }
}
