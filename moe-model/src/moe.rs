//! The expert sublayer: router, dispatch, grouped gated experts, combine, shared expert.

pub(crate) mod steps;

use moe_comm::Reduction;
use moe_dispatch::{
    Batch, DispatchState, Dispatcher, Grid, Jitter, NativeFabric, Router, RouterConfig, RouterInput,
    RouterSaved, Sinkhorn, TokenDispatcher, TokenDispatcherState,
};
use moe_kernels::family::{Gate, GateFunction, Op};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_topology::{Expert, Owner, Placement};

use self::steps::{ExpertsDeferred, InFlight, SharedDeferred};
use crate::axes::{TP_CP, TP_CP_DP};
use crate::capacity::{Place, within_budget};
use crate::config::{AuxLossScope, ModelConfig, RouterDType};
use crate::cx::{Mode, RecordedRouting};
use crate::dense::GatedMlpDeferred;
use crate::expert_bias::ExpertBias;
use crate::expert_mlp_bias::ExpertMlpBias;
use crate::layer::{Hidden, Layer, Passed};
use crate::norm::{RmsNorm, RmsNormSaved};
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::recompute::{RecomputeModule, Rerun};
use crate::shared::{SharedExpert, SharedExpertSaved};
use crate::tokens::random_key;
use crate::{Cx, Error, Execution, Result};

/// `y = x + Σ_e p_e · W2_e(f(W1_e h) ⊙ W3_e h) + shared(h)` over the experts that the router chose, with `h = norm(x)` and
/// `f` the model's `hidden_act`; with [biases](ExpertMlpBias) if `expert_mlp_bias`.
///
/// The router sees the rank's own tokens (sequence parallelism), so its weight's gradient is partial over all axes of the
/// attention view; experts are sharded over EP, their inner dimension over ETP.
#[derive(Debug, Clone)]
pub struct MoeMlp {
    layer: usize,
    /// Layers with experts of the model, M.
    moe_layers: usize,
    norm: RmsNorm,
    gate: ParamId,
    router: Router,
    jitter: f64,
    /// Iterations of Sinkhorn's algorithm in training, if it chooses the experts.
    sinkhorn: Option<usize>,
    bias: Option<ExpertBias>,
    dispatcher: TokenDispatcher,
    grid: Grid,
    place: Place,
    gate_up: ParamId,
    down: ParamId,
    mlp_bias: Option<ExpertMlpBias>,
    function: GateFunction,
    shared: Option<SharedExpert>,
    execution: Execution,
}

/// What was decided and exchanged in a forward pass: small beside activations, and never made again, so that the choice
/// stays the same, counts are exchanged once and statistics counted once.
#[derive(Debug)]
pub struct Routed<T: Float, D: Device> {
    router: RouterSaved<T, D>,
    noise: Option<Noise<D>>,
    /// Weights of the choices, `[tokens, top_k]`.
    weights: Tensor<T::Acc, D>,
    state: TokenDispatcherState<Tensor<i32, D>>,
}

/// The rows of this rank's experts.
pub(crate) type Rows<T, D> = Batch<Tensor<T, D>, Tensor<<T as Float>::Acc, D>, Tensor<i32, D>>;

/// What backward needs of a forward pass. What is absent, backward makes again.
#[derive(Debug)]
pub struct MoeMlpSaved<T: Float, D: Device> {
    norm: RmsNormSaved<T, D>,
    h: Option<Tensor<T, D>>,
    routed: Routed<T, D>,
    rows: Rows<T, D>,
    gate_up: Tensor<T, D>,
    activated: Option<Tensor<T, D>>,
    shared: Option<SharedExpertSaved<T, D>>,
}

/// What the weight gradients need.
#[derive(Debug)]
pub struct MoeMlpDeferred<T: Float, D: Device> {
    experts: ExpertsDeferred<T, D>,
    shared: SharedDeferred<T, D>,
}

/// Key and tokens, `[1, n]`, of the noise that a router sees.
type Noise<D> = (u64, Tensor<i64, D>);

/// What a training step brings to the tokens of a router.
struct Drawn<D: Device> {
    noise: Option<Noise<D>>,
    /// Choices that are not the router's own, `[n, K]`.
    given: Option<Tensor<i32, D>>,
}

impl MoeMlp {
    /// The experts of layer `layer` on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        execution: Execution,
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
            model_aux_loss_coef: config.aux_loss_coef(AuxLossScope::Model),
            z_loss_coef: config.router_z_loss_coef,
        })?;
        let grid = Grid::of(params.folding(), params.rank())?;
        let place = Place::of(params.folding(), params.rank());
        let dispatcher = TokenDispatcher { kind: execution.dispatcher, num_experts: experts };
        let (function, shared) = (config.gate_function(), SharedExpert::new(params, config, layer, stage)?);
        Ok(MoeMlp {
            layer,
            moe_layers: config.moe_layers().count(),
            norm,
            gate,
            router,
            jitter: config.router_jitter_noise,
            sinkhorn: config.moe_router_sinkhorn_iterations,
            bias,
            dispatcher,
            grid,
            place,
            gate_up,
            down,
            mlp_bias,
            function,
            shared,
            execution,
        })
    }

    /// Experts of the layer.
    pub fn num_experts(&self) -> usize {
        self.router.config().num_experts
    }

    /// Its global index.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// The bias on its choices, if it has one.
    pub fn expert_bias(&self) -> Option<ExpertBias> {
        self.bias
    }

    /// What a training step brings to this rank's `rows` tokens of a micro-batch; evaluation brings nothing.
    fn draw<T: Float, D: Device>(&self, m: u32, rows: usize, cx: &Cx<T, D>) -> Result<Drawn<D>> {
        let Mode::Train { seed, step } = cx.mode else {
            return Ok(Drawn { noise: None, given: None });
        };
        let ids = || self.place.tokens(cx.batch(m)?, rows);
        let key = |purpose| random_key(seed, step, self.layer, purpose);
        let noise = (self.jitter > 0.0).then(|| -> Result<_> {
            let numbers: Vec<i64> = ids()?.numbers().map(|n| n as i64).collect();
            Ok((key("jitter"), Tensor::from_slice(&cx.device, 1, rows, &numbers)?))
        });
        let RouterConfig { num_experts, top_k, .. } = *self.router.config();
        let given = match (&cx.replay, cx.forced_routing) {
            (Some(choices), _) => {
                let missing = Error::NotRecorded { layer: self.layer, micro_batch: m };
                let experts = choices.get(&(m, self.layer)).ok_or(missing)?;
                Some(Tensor::from_slice(&cx.device, rows, top_k, experts)?)
            }
            (None, Some(forced)) => {
                let tokens = ids()?;
                let experts =
                    forced.choose(&tokens, cx.objective.sequences, num_experts, top_k, key("forced"));
                Some(Tensor::from_slice(&cx.device, rows, top_k, &experts)?)
            }
            (None, None) => None,
        };
        Ok(Drawn { noise: noise.transpose()?, given })
    }

    fn jitter<'a, D: Device>(&self, noise: Option<&'a Noise<D>>) -> Option<Jitter<'a, D>> {
        noise.map(|(key, tokens)| Jitter { epsilon: self.jitter, key: *key, tokens })
    }

    /// Choices of the whole step, `[1, experts]`, where its load-balancing loss asks for them: counted beforehand, or, where every
    /// rank has one micro-batch, its own added up now.
    fn step_counts<T: Float, D: Backend<T>>(
        &self,
        router: &RouterSaved<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Option<Tensor<i64, D>>> {
        let Some(own) = router.own_choices(&cx.device)? else { return Ok(None) };
        match (cx.step_counts.get(&self.layer), cx.batches.len()) {
            (Some(counts), _) => Ok(Some(counts.clone())),
            (None, 1) => Ok(Some(cx.group(TP_CP_DP)?.all_reduce(&own, Reduction::Sum)?)),
            (None, batches) => Err(Error::NotCounted { layer: self.layer, batches }),
        }
    }

    /// Adds the micro-batch's choices to those over all layers, where these are counted.
    fn count_choices<T: Float, D: Backend<T>>(
        &self,
        router: &RouterSaved<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        if let Some(choices) = &mut cx.choices {
            let mut sums = choices.copy(&cx.device)?;
            router.add_choices(&cx.device, sums.view_mut()?)?;
            *choices = sums;
        }
        Ok(())
    }

    fn keeps(&self, module: RecomputeModule) -> bool {
        !self.execution.recompute.contains(module)
    }

    fn fabric<'a, T: Float, D: Backend<T>>(&self, cx: &'a Cx<T, D>) -> Result<NativeFabric<'a, T, D>> {
        Ok(NativeFabric::new(&cx.device, self.grid, &cx.comms)?)
    }

    /// Chooses experts for `h` and exchanges counts; adds to the statistics.
    fn route<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        h: &Tensor<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Routed<T, D>> {
        // Not `Cx::group`, which would hold the statistics too.
        let unit = cx.comms.group(TP_CP)?;
        let sum_over_unit = |counts: Tensor<i64, D>| Ok(unit.all_reduce(&counts, Reduction::Sum)?);
        let Drawn { noise, given } = self.draw(m, h.shape()[0], cx)?;
        let sums = cx.stats.moe.of(self.layer)?;
        let no_batch = Error::NoBatch { index: m as usize, batches: cx.batches.len() };
        let micro_batch = cx.batches.get(m as usize).ok_or(no_batch)?;
        let (sequences, rows) = (micro_batch.batch, h.shape()[0]);
        let valid = micro_batch.valid.as_ref().map(|valid| self.place.own(valid, rows)).transpose()?;
        let bias = self.bias.map(|bias| bias.values(&cx.params).view());
        let (jitter, weight) = (self.jitter(noise.as_ref()), cx.params.weight(self.gate)?);
        let given = given.as_ref();
        let sum_numbers = |numbers: &[f64]| Ok(unit.all_reduce_host(numbers, Reduction::Sum)?);
        let iterations = self.sinkhorn.filter(|_| cx.mode != Mode::Evaluate);
        let sinkhorn = iterations.map(|iterations| Sinkhorn { iterations, sum_over_unit: &sum_numbers });
        let margins = cx.recorded.is_some();
        let input = RouterInput { x: h, weight, bias, sequences, jitter, given, sinkhorn, valid, margins };
        let (routing, router, margins) = self
            .router
            .forward(&cx.device, input, sums, sum_over_unit)
            .map_err(|error| Error::in_router(self.layer, error))?;
        if let Some(recorded) = &mut cx.recorded {
            let experts = routing.experts.to_vec(&cx.device)?;
            let weights = routing.weights.to_f64(&cx.device)?;
            let margins = margins.unwrap_or_default();
            recorded.insert((m, self.layer), RecordedRouting { experts, weights, margins });
        }
        let routing = self.place.drop_excess(m, self.layer, routing, self.num_experts(), cx)?;
        self.count_choices(&router, cx)?;
        let routing = within_budget(routing, self.grid.etp_size(), cx)?;
        let state = self.dispatcher.plan(&self.fabric(cx)?, &routing)?;
        cx.stats.overflowed |= state.overflowed();
        Ok(Routed { router, noise, weights: routing.weights, state })
    }

    /// Starts to bring the rows of `h` to their experts.
    fn to_experts<T: Float, D: Backend<T>>(
        &self,
        h: &Tensor<T, D>,
        routed: &Routed<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<InFlight<T, D>> {
        let Routed { weights, state, .. } = routed;
        Ok(self.dispatcher.to_experts_start(&self.fabric(cx)?, h, Some(weights), state)?)
    }

    /// Ranks that share the layer's experts, as rows of tokens go.
    pub(crate) fn expert_ranks(&self) -> usize {
        self.grid.size()
    }

    /// The shared expert, if it computes beside transfers.
    fn overlapping(&self) -> Option<&SharedExpert> {
        self.shared.as_ref().filter(|_| self.execution.shared_expert_overlap)
    }

    /// The shared expert's part of backward: its gradient by `h`, and what its weight gradients need.
    fn shared_backward<T: Float, D: Backend<T>>(
        &self,
        expert: &SharedExpert,
        dy: &Tensor<T, D>,
        h: &Tensor<T, D>,
        saved: Option<SharedExpertSaved<T, D>>,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, GatedMlpDeferred<T, D>)> {
        let saved = saved.map_or_else(|| expert.rerun(h, cx), Ok)?;
        expert.backward_input(dy, h, saved, cx)
    }

    /// The first product of the experts, `[rows, 2 · inner]`, and what [`MoeMlp::activate`] makes of it.
    fn gate_up<T: Float, D: Backend<T>>(
        &self,
        rows: &Rows<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<[Tensor<T, D>; 2]> {
        let (device, inner) = (&cx.device, cx.params.weight(self.down)?.shape()[1]);
        let mut gate_up = Tensor::uninit(device, rows.rows, 2 * inner)?;
        let (x, weight, offsets) = (rows.x.view(), cx.params.weight(self.gate_up)?, rows.offsets.view());
        if let Some(bias) = self.mlp_bias {
            device.grouped_gemm(gate_up.view_mut()?, x, weight, Op::T, offsets)?;
            bias.add_to_gate_up(gate_up.view_mut()?, &rows.offsets, cx)?;
            let activated = self.activate(&gate_up, rows, cx)?;
            return Ok([gate_up, activated]);
        }
        let mut activated = Tensor::uninit(device, rows.rows, inner)?;
        let (out, gate) = (activated.view_mut()?, self.between(rows));
        device.grouped_gemm_glu(gate_up.view_mut()?, out, x, weight, &gate, offsets)?;
        Ok([gate_up, activated])
    }

    /// What stands between the experts' products.
    fn between<'a, T: Float, D: Device>(&self, rows: &'a Rows<T, D>) -> Gate<'a, T, D> {
        Gate { function: self.function, p: Some(rows.probs.view()) }
    }

    /// The gated activation times the probabilities, `[rows, inner]`.
    fn activate<T: Float, D: Backend<T>>(
        &self,
        gate_up: &Tensor<T, D>,
        rows: &Rows<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        let [n, width] = gate_up.shape();
        let mut activated = Tensor::uninit(&cx.device, n, width / 2)?;
        let probs = Some(rows.probs.view());
        cx.device.glu(activated.view_mut()?, gate_up.view(), probs, self.function)?;
        Ok(activated)
    }
}

impl<T: Float, D: Backend<T>> Layer<T, D> for MoeMlp {
    type Saved = MoeMlpSaved<T, D>;
    type Deferred = MoeMlpDeferred<T, D>;

    fn forward(&self, m: u32, x: Hidden<T, D>, cx: &mut Cx<T, D>) -> Result<Passed<T, D, Self::Saved>> {
        let mut chosen = self.choose(m, x, cx)?;
        let flight = self.dispatch_start(&chosen, cx)?;
        if self.execution.shared_expert_overlap {
            self.compute_shared(&mut chosen, cx)?;
        }
        let rows = self.dispatch_finish(&chosen, flight, cx)?;
        let (out, experts) = self.compute(rows, cx)?;
        let flight = self.combine_start(&chosen, out, cx)?;
        self.combine_finish(chosen, experts, flight, cx)
    }

    fn backward_input(
        &self,
        m: u32,
        dy: Tensor<T, D>,
        saved: Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, Self::Deferred)> {
        let flight = self.combine_backward_start(&dy, saved.routed(), cx)?;
        let (mut tokens, experts) = saved.sides(dy);
        if let Some(expert) = self.overlapping() {
            self.shared_ahead(expert, &mut tokens, cx)?;
        }
        let d_out = self.combine_backward_finish(&tokens.routed, flight, cx)?;
        let (by_rows, experts) = self.compute_backward(experts, d_out, cx)?;
        let flight = self.dispatch_backward_start(&tokens, by_rows, cx)?;
        let by_tokens = self.dispatch_backward_finish(&tokens, flight, cx)?;
        let (dx, shared) = self.choose_backward(m, tokens, by_tokens, cx)?;
        Ok((dx, MoeMlpDeferred { experts, shared }))
    }

    fn backward_weight(&self, _m: u32, deferred: Self::Deferred, cx: &mut Cx<T, D>) -> Result<()> {
        self.experts_weight(deferred.experts, cx)?;
        self.shared_weight(deferred.shared, cx)
    }
}

impl<T: Float, D: Backend<T>> Rerun<T, D> for MoeMlp {
    type Kept = Routed<T, D>;

    fn keep(saved: Self::Saved) -> Self::Kept {
        saved.routed
    }

    fn rerun(
        &self,
        _m: u32,
        x: Hidden<T, D>,
        routed: Routed<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Self::Saved> {
        let (h, norm) = self.norm.forward(x, cx)?;
        let flight = self.to_experts(&h, &routed, cx)?;
        let mut shared = self.overlapping().map(|expert| expert.rerun(&h, cx)).transpose()?;
        let rows = self.dispatcher.dispatch_finish(&self.fabric(cx)?, flight, &routed.state)?;
        let [gate_up, activated] = self.gate_up(&rows, cx)?;
        let activated = Some(activated);
        if let (None, Some(expert)) = (&shared, &self.shared) {
            shared = Some(expert.rerun(&h, cx)?);
        }
        Ok(MoeMlpSaved { norm, h: Some(h), routed, rows, gate_up, activated, shared })
    }
}
