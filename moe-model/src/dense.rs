//! The feed-forward sublayer of a dense layer.

use moe_kernels::family::{GateFunction, Op};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_topology::{Attention, Axes, Owner, Placement};

use crate::axes::{CP_DP, TP_CP_DP};
use crate::bias::{Bias, BiasPlace};
use crate::config::ModelConfig;
use crate::layer::{Hidden, Layer, Passed};
use crate::norm::{RmsNorm, RmsNormSaved};
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::recompute::{RecomputeModule, RecomputeModules, Rerun};
use crate::{Cx, Result};

/// `down(function(gate h) ⊙ up h)` (arXiv 2002.05202), with biases of all three with `mlp_bias`: `gate` and `up` column-parallel over TP, `down` row-parallel.
///
/// Rows are gathered over TP before, and the partial sums reduce-scattered after (sequence parallelism): each rank gives
/// and gets the rows of its own tokens. Backward gathers again, so that no rank keeps the rows of others.
#[derive(Debug, Clone, Copy)]
pub struct GatedMlp {
    gate_up: ParamId,
    down: ParamId,
    biases: Option<Biases>,
    function: GateFunction,
}

#[derive(Debug, Clone, Copy)]
struct Biases {
    gate_up: Bias,
    down: Bias,
}

/// What backward needs of a forward pass, besides its input.
#[derive(Debug)]
pub struct GatedMlpSaved<T: Float, D: Device> {
    gate_up: Tensor<T, D>,
    activated: Tensor<T, D>,
}

/// What the weight gradients need.
#[derive(Debug)]
pub struct GatedMlpDeferred<T: Float, D: Device> {
    rows: Tensor<T, D>,
    d_gate_up: Tensor<T, D>,
    activated: Tensor<T, D>,
    dy: Tensor<T, D>,
}

impl GatedMlp {
    /// `{prefix}.gate_proj`, `up_proj` and `down_proj`, of inner width `inner`, on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        prefix: &str,
        inner: usize,
        stage: usize,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let logical = |name: &str,
                       dims: [usize; 2],
                       shard: (usize, Axes<Attention>),
                       std|
         -> Result<Logical> {
            Ok(Logical {
                name: Name::One(format!("{prefix}.{name}.weight")),
                placement: Placed::Attention(Placement::new(&dims, &[shard], CP_DP, Owner::Stage(stage))?),
                init: Init::Normal(std),
            })
        };
        let std = config.initializer_range;
        let gate_up = params.add(&[
            logical("gate_proj", [inner, hidden], (0, Attention::TP), std)?,
            logical("up_proj", [inner, hidden], (0, Attention::TP), std)?,
        ])?;
        let down = params.add(&[logical(
            "down_proj",
            [hidden, inner],
            (1, Attention::TP),
            config.residual_std(),
        )?])?;
        let biases = match config.mlp_bias {
            true => {
                let cut = BiasPlace { sharded: Attention::TP, partial: CP_DP, stage };
                let whole = BiasPlace { sharded: Axes::NONE, partial: TP_CP_DP, stage };
                Some(Biases {
                    gate_up: Bias::new(params, prefix, &["gate_proj", "up_proj"], inner, cut)?,
                    down: Bias::new(params, prefix, &["down_proj"], hidden, whole)?,
                })
            }
            false => None,
        };
        Ok(GatedMlp { gate_up, down, biases, function: config.gate_function() })
    }

    /// `h, y: [tokens of this rank, hidden]`.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        h: &Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<(Tensor<T, D>, GatedMlpSaved<T, D>)> {
        let saved = self.activate(h, cx)?;
        let [n, _] = saved.activated.shape();
        let mut partial = Tensor::uninit(&cx.device, n, h.shape()[1])?;
        let down = cx.params.weight(self.down)?;
        cx.device.gemm(partial.view_mut()?, saved.activated.view(), Op::N, down, Op::T)?;
        let mut y = cx.group(Attention::TP)?.reduce_scatter_rows(&partial)?;
        if let Some(biases) = self.biases {
            drop(partial); // of one rank, y is no other tensor
            biases.down.add_to(y.view_mut()?, cx)?;
        }
        Ok((y, saved))
    }

    /// The part of a forward pass that backward reads.
    pub fn activate<T: Float, D: Backend<T>>(
        &self,
        h: &Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<GatedMlpSaved<T, D>> {
        let device = &cx.device;
        let rows = cx.group(Attention::TP)?.all_gather_rows(h)?;
        let (weight, inner) = (cx.params.weight(self.gate_up)?, cx.params.weight(self.down)?.shape()[1]);
        let n = rows.shape()[0];
        let mut gate_up = Tensor::uninit(device, n, 2 * inner)?;
        device.gemm(gate_up.view_mut()?, rows.view(), Op::N, weight, Op::T)?;
        if let Some(biases) = self.biases {
            biases.gate_up.add_to(gate_up.view_mut()?, cx)?;
        }
        let mut activated = Tensor::uninit(device, n, inner)?;
        device.glu(activated.view_mut()?, gate_up.view(), None, self.function)?;
        Ok(GatedMlpSaved { gate_up, activated })
    }

    /// The gradient of `h`; adds to those of biases.
    pub fn backward_input<T: Float, D: Backend<T>>(
        &self,
        dy: &Tensor<T, D>,
        h: &Tensor<T, D>,
        saved: GatedMlpSaved<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, GatedMlpDeferred<T, D>)> {
        if let Some(biases) = self.biases {
            biases.down.backward(dy, cx)?;
        }
        let device = &cx.device;
        let GatedMlpSaved { gate_up, activated } = saved;
        let tp = cx.group(Attention::TP)?;
        let dy = tp.all_gather_rows(dy)?;
        let rows = tp.start_all_gather_rows(h)?;
        let [n, hidden] = dy.shape();
        let inner = activated.shape()[1];
        let mut d_activated = Tensor::uninit(device, n, inner)?;
        device.gemm(d_activated.view_mut()?, dy.view(), Op::N, cx.params.weight(self.down)?, Op::N)?;
        let mut d_gate_up = Tensor::uninit(device, n, 2 * inner)?;
        let d_gate_up_view = d_gate_up.view_mut()?;
        device.glu_backward(d_gate_up_view, None, d_activated.view(), gate_up.view(), None, self.function)?;
        drop((d_activated, gate_up)); // before more is made
        let mut d_rows = Tensor::uninit(device, n, hidden)?;
        device.gemm(d_rows.view_mut()?, d_gate_up.view(), Op::N, cx.params.weight(self.gate_up)?, Op::N)?;
        let dh = tp.reduce_scatter_rows(&d_rows)?;
        if let Some(biases) = self.biases {
            biases.gate_up.backward(&d_gate_up, cx)?;
        }
        Ok((dh, GatedMlpDeferred { rows: rows.wait()?, d_gate_up, activated, dy }))
    }

    /// Adds to the weight gradients.
    pub fn backward_weight<T: Float, D: Backend<T>>(
        &self,
        deferred: GatedMlpDeferred<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let GatedMlpDeferred { rows, d_gate_up, activated, dy } = deferred;
        cx.params.add_product(self.gate_up, d_gate_up.view(), Op::T, rows.view(), Op::N)?;
        cx.params.add_product(self.down, dy.view(), Op::T, activated.view(), Op::N)?;
        Ok(())
    }
}

/// The feed-forward sublayer of a dense layer: `y = x + mlp(norm(x))`.
#[derive(Debug, Clone, Copy)]
pub struct DenseMlp {
    norm: RmsNorm,
    mlp: GatedMlp,
    keep_normed: bool,
}

/// What backward needs of a forward pass.
#[derive(Debug)]
pub struct DenseMlpSaved<T: Float, D: Device> {
    norm: RmsNormSaved<T, D>,
    /// Absent if backward makes it again.
    h: Option<Tensor<T, D>>,
    mlp: GatedMlpSaved<T, D>,
}

impl DenseMlp {
    /// The feed-forward sublayer of layer `layer`, of width `intermediate_size`, on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        recompute: RecomputeModules,
        layer: usize,
        stage: usize,
    ) -> Result<Self> {
        let prefix = format!("model.layers.{layer}");
        let name = format!("{prefix}.post_attention_layernorm.weight");
        let norm = RmsNorm::new(params, name, config.hidden_size, config.rms_norm_eps, stage)?;
        let mlp = GatedMlp::new(params, config, &format!("{prefix}.mlp"), config.intermediate_size, stage)?;
        Ok(DenseMlp { norm, mlp, keep_normed: !recompute.contains(RecomputeModule::Layernorm) })
    }
}

impl<T: Float, D: Backend<T>> Layer<T, D> for DenseMlp {
    type Saved = DenseMlpSaved<T, D>;
    type Deferred = GatedMlpDeferred<T, D>;

    fn forward(&self, _m: u32, x: Hidden<T, D>, cx: &mut Cx<T, D>) -> Result<Passed<T, D, Self::Saved>> {
        let (h, norm) = self.norm.forward(x, cx)?;
        let (out, mlp) = self.mlp.forward(&h, cx)?;
        let y = Hidden { x: norm.x.clone(), added: Some(out) };
        Ok((y, DenseMlpSaved { norm, h: self.keep_normed.then_some(h), mlp }))
    }

    fn backward_input(
        &self,
        _m: u32,
        dy: Tensor<T, D>,
        saved: Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, Self::Deferred)> {
        let DenseMlpSaved { norm, h, mlp } = saved;
        let h = self.norm.output(h, &norm, cx)?;
        let (dh, deferred) = self.mlp.backward_input(&dy, &h, mlp, cx)?;
        let dx = self.norm.backward(&dh, Some(&dy), norm, cx)?;
        Ok((dx, deferred))
    }

    fn backward_weight(&self, _m: u32, deferred: Self::Deferred, cx: &mut Cx<T, D>) -> Result<()> {
        self.mlp.backward_weight(deferred, cx)
    }
}

impl<T: Float, D: Backend<T>> Rerun<T, D> for DenseMlp {
    type Kept = ();

    fn keep(_saved: Self::Saved) {}

    fn rerun(&self, _m: u32, x: Hidden<T, D>, _kept: (), cx: &mut Cx<T, D>) -> Result<Self::Saved> {
        let (h, norm) = self.norm.forward(x, cx)?;
        let mlp = self.mlp.activate(&h, cx)?;
        Ok(DenseMlpSaved { norm, h: self.keep_normed.then_some(h), mlp })
    }
}
