//! A dense model's checkpoint into one of a model with experts ("sparse upcycling", arXiv 2212.05055).
//!
//! A layer's feed-forward network of width `g·I` becomes `E` experts of width `I`: `E/g` copies of it, each cut into `g`
//! slices that are experts of their own (`g = 1`: every expert is a whole copy). The slices of a copy have the same row of
//! the router, so that a choice of `K`, a multiple of `g`, takes whole copies: the "virtual groups" of "Upcycling Large
//! Language Models into Mixture of Experts" (arXiv 2410.07524).
//!
//! A choice weighs less than 1, and a slice gives but a part of what the network did, so the experts' outputs must grow by
//! `s = g / Σw` with the sum of a token's `K` weights while the router knows nothing (all logits 0): `g` where weights are
//! normalised, `(E/g)·g²/K` for a softmax over all experts. Where they are normalised, that is exact for any router.

use std::path::{Path, PathBuf};

use moe_kernels::DType;
use moe_kernels::family::ScoreFunction;
use moe_model::ModelConfig;
use moe_model::params::{BufferLayout, ParamLayout, Part, Stream};

use super::container::{Checkpoint, CheckpointError, PendingCheckpoint, PieceSpec, PieceWriter};
use super::state::{BUFFER, check_tensor};
use super::weights::elements;
use super::{Meta, RunState};
use crate::Result;
use crate::config::RunConfig;
use crate::optim::Moment;
use crate::trainer::SkippedSteps;

/// Which of an expert's projections carry the factor `s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightScaling {
    /// As published: the cube root of `s` on all three. Through the gate's nonlinearity this is the dense network only
    /// nearly, unless `s` is 1.
    #[default]
    Published,
    /// The square root of `s` on `up` and `down`, through which it goes linearly: exactly the dense network where weights
    /// are normalised.
    Exact,
}

/// Why a checkpoint cannot become one of this model.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum UpcycleError {
    /// The checkpoint's model has experts.
    #[error(
        "layer {layer} of the checkpoint's model has experts already: only a dense model can be upcycled"
    )]
    Experts {
        /// The first such layer.
        layer: usize,
    },
    /// The wanted model has none.
    #[error("the configured model has no layer with experts: there is nothing to upcycle")]
    NoExperts,
    /// The models differ in what is not about experts.
    #[error(
        "{key} is {dense} in the dense model and {wanted} in the configured one: they may differ in experts and router only"
    )]
    Differs {
        /// The first key that differs.
        key: String,
        /// Its value in the checkpoint.
        dense: String,
        /// Its value in the configuration.
        wanted: String,
    },
    /// The dense network is no whole number of slices, or experts or choices no whole number of copies.
    #[error("{name} = {value} must be a multiple of {of_name} = {of}: {why}")]
    Multiple {
        /// What must be a multiple.
        name: &'static str,
        /// Its value.
        value: usize,
        /// What of.
        of_name: &'static str,
        /// Its value.
        of: usize,
        /// Why.
        why: &'static str,
    },
    /// Slices of one copy would not be chosen together.
    #[error(
        "{tensor}: the rows of experts {} and {expert} differ, which are slices of one copy of the dense network: they \
         must be alike, so that a token's choice is whole copies",
        expert - 1
    )]
    Router {
        /// The router's weight.
        tensor: String,
        /// The first expert whose row is not that of the one before.
        expert: usize,
    },
    /// The wanted model has a part that the dense one has nothing for.
    #[error("{setting} cannot be upcycled: {why}")]
    Unsupported {
        /// The setting.
        setting: &'static str,
        /// Why, and what to do instead.
        why: &'static str,
    },
}

/// How a dense network becomes experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Slices of a copy, `g`.
    pub granularity: usize,
    /// Copies of the network, `E/g`.
    pub copies: usize,
    /// Growth of the experts' outputs, `s`.
    pub scale: f64,
    /// Factors of `w1` (gate), `w3` (up) and `w2` (down), whose product is `s`.
    pub factors: [f64; 3],
}

impl Plan {
    /// How `dense` becomes `model`.
    ///
    /// # Errors
    /// It cannot.
    pub fn new(
        dense: &ModelConfig,
        model: &ModelConfig,
        scaling: WeightScaling,
    ) -> std::result::Result<Self, UpcycleError> {
        if let Some(layer) = dense.moe_layers().next() {
            return Err(UpcycleError::Experts { layer });
        }
        if model.moe_layers().next().is_none() {
            return Err(UpcycleError::NoExperts);
        }
        if let Some((key, dense, wanted)) = dense.first_difference(model, about_experts) {
            return Err(UpcycleError::Differs { key, dense, wanted });
        }
        if model.shared_expert_width().is_some() {
            let setting = "a shared expert";
            let why = "all of the dense network becomes routed experts; leave it out";
            return Err(UpcycleError::Unsupported { setting, why });
        }
        if dense.mlp_bias && !model.expert_mlp_bias {
            let setting = "mlp_bias";
            let why =
                "experts without biases cannot hold those of the dense network; set expert_mlp_bias = true";
            return Err(UpcycleError::Unsupported { setting, why });
        }
        let multiple =
            |(name, value): (_, usize), (of_name, of): (_, usize), why| match value.is_multiple_of(of) {
                true => Ok(value / of),
                false => Err(UpcycleError::Multiple { name, value, of_name, of, why }),
            };
        let experts = model.num_local_experts;
        let width = ("the width of an expert", model.expert_width());
        let whole = ("intermediate_size of the dense model", dense.intermediate_size);
        let granularity = multiple(whole, width, "it is cut into slices of that width")?;
        let slices = ("the slices of the dense network", granularity);
        let copies = multiple(("num_local_experts", experts), slices, "experts are whole copies of it")?;
        let why = "a token's choice is whole copies of it";
        multiple(("num_experts_per_tok", model.num_experts_per_tok), slices, why)?;
        let why = "a copy's slices are to be in one group";
        multiple(("num_local_experts / n_group", experts / model.n_group), slices, why)?;

        let scale = granularity as f64 / weight_of_choices(model);
        let factors = match scaling {
            WeightScaling::Published => [scale.cbrt(); 3],
            WeightScaling::Exact => [1.0, scale.sqrt(), scale.sqrt()],
        };
        Ok(Plan { granularity, copies, scale, factors })
    }
}

/// What may differ between the models.
fn about_experts(key: &str) -> bool {
    const KEYS: [&str; 16] = [
        "intermediate_size",
        "shared_expert_intermediate_size",
        "n_shared_experts",
        "mlp_only_layers",
        "decoder_sparse_step",
        "first_k_dense_replace",
        "num_local_experts",
        "num_experts_per_tok",
        "expert_mlp_bias",
        "initializer_range",
        "scoring_func",
        "norm_topk_prob",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
        "group_score_topk",
    ];
    KEYS.contains(&key) || ["moe_", "router_"].iter().any(|prefix| key.starts_with(prefix))
}

/// The sum of the weights of a token's choices where all logits are 0.
fn weight_of_choices(model: &ModelConfig) -> f64 {
    let (chosen, experts) = (model.num_experts_per_tok as f64, model.num_local_experts as f64);
    let scoring = model.scoring();
    let sum = match scoring.function {
        ScoreFunction::SoftmaxPre { normalize: false } => chosen / experts,
        ScoreFunction::Sigmoid { normalize: false } => chosen / 2.0,
        ScoreFunction::SqrtSoftplus { normalize: false } => chosen * std::f64::consts::LN_2.sqrt(),
        _ => 1.0,
    };
    sum * scoring.scale
}

/// Writes the checkpoint `root/step-0` of the model of `config`, made of the dense model of `dense`, and returns its
/// folder and how it was made. Routers are those of the checkpoint `router`, or start at random, from `train.seed`; there is
/// no state of an optimizer in it.
///
/// # Errors
/// [`UpcycleError`], a configuration of another element type, a damaged checkpoint, or one at `root/step-0` already.
pub fn upcycle(
    dense: &Checkpoint,
    config: &RunConfig,
    scaling: WeightScaling,
    router: Option<&Checkpoint>,
    root: &Path,
) -> Result<(PathBuf, Plan)> {
    let model = &config.model;
    let plan = Plan::new(&Meta::of(dense)?.model, model, scaling)?;
    let (layout, seed, dtype) =
        (ParamLayout::of_model(model)?, config.train.seed, config.train.dtype.master());
    let pending = PendingCheckpoint::create(root, 0)?;
    let mut writer = PieceWriter::create(pending.folder(), 0)?;
    let source = Source { dense, router, plan, seed, dtype };
    for part in layout.buckets().iter().flat_map(|bucket| &bucket.parts) {
        let spec = whole(part.name.clone(), Moment::Master.name(), dtype, part.dims);
        writer.write(spec, &source.tensor(part)?)?;
    }
    for (_, BufferLayout { name, len, .. }) in layout.buffers() {
        let spec = whole(name.clone(), BUFFER, dtype, [1, *len]);
        writer.write(spec, &vec![0; len * dtype.size()])?;
    }
    let (skipped, config) = (SkippedSteps::default(), config.clone());
    let run = RunState { updates: 0, skipped, cursor: 0, blend_samples: Vec::new(), config };
    let meta = serde_json::to_value(Meta::of_run(run, None)).map_err(|error| CheckpointError::Manifest {
        path: root.to_owned(),
        what: format!("cannot hold the configuration: {error}"),
    })?;
    Ok((pending.commit(vec![writer.finish()?], meta)?, plan))
}

/// A tensor in one piece.
fn whole(tensor: String, kind: &str, dtype: DType, dims: [usize; 2]) -> PieceSpec {
    let [rows, cols] = dims;
    let kind = kind.to_owned();
    PieceSpec { tensor, kind, dtype, dims, rows: 0..rows, cols: 0..cols, part: 0..rows * cols }
}

/// What the tensors of the wanted model are made of.
struct Source<'a> {
    dense: &'a Checkpoint,
    router: Option<&'a Checkpoint>,
    plan: Plan,
    seed: u64,
    dtype: DType,
}

impl Source<'_> {
    /// The elements of a tensor of the wanted model, row by row, little-endian.
    fn tensor(&self, part: &Part) -> Result<Vec<u8>> {
        let layer = part.name.split_once(".block_sparse_moe.");
        match layer.map(|(layer, rest)| (layer, rest.split('.').collect::<Vec<_>>())) {
            Some((_, name)) if name == ["gate", "weight"] => self.router(part),
            Some((layer, name)) => match (name.as_slice(), name.get(1).and_then(|e| e.parse().ok())) {
                (&["experts", _, projection, kind], Some(expert)) => {
                    self.expert(part, layer, expert, projection, kind)
                }
                _ => self.same(part),
            },
            None => self.same(part),
        }
    }

    /// As it is in the dense model.
    fn same(&self, part: &Part) -> Result<Vec<u8>> {
        let kind = Moment::Master.name();
        check_tensor(self.dense, &part.name, kind, part.dims, self.dtype)?;
        Ok(self.dense.read_tensor(&part.name, kind)?)
    }

    /// As given, or at random, the rows of a copy's slices alike.
    fn router(&self, part: &Part) -> Result<Vec<u8>> {
        let (granularity, [rows, cols]) = (self.plan.granularity, part.dims);
        if let Some(given) = self.router {
            let kind = Moment::Master.name();
            check_tensor(given, &part.name, kind, part.dims, self.dtype)?;
            let bytes = given.read_tensor(&part.name, kind)?;
            let row = |expert: usize| &bytes[expert * cols * self.dtype.size()..][..cols * self.dtype.size()];
            let differs = |&expert: &usize| expert % granularity > 0 && row(expert) != row(expert - 1);
            return match (1..rows).find(differs) {
                Some(expert) => Err(UpcycleError::Router { tensor: part.name.clone(), expert }.into()),
                None => Ok(bytes),
            };
        }
        let stream = Stream::new(self.seed, &part.name, part.init);
        let rows = (0..rows).map(|expert| expert / granularity * cols);
        let elements = rows.flat_map(|first| (first..first + cols).map(|n| stream.element(n as u64)));
        Ok(match self.dtype {
            DType::F64 => elements.flat_map(f64::to_le_bytes).collect(),
            _ => elements.flat_map(|x| (x as f32).to_le_bytes()).collect(),
        })
    }

    /// A slice of the dense network, and its factor.
    fn expert(
        &self,
        part: &Part,
        layer: &str,
        expert: usize,
        projection: &str,
        kind: &str,
    ) -> Result<Vec<u8>> {
        let Plan { granularity, scale, factors: [gate, up, down], .. } = self.plan;
        let slice = |width: usize| {
            let first = expert % granularity * width;
            first..first + width
        };
        let [rows, cols] = part.dims;
        let all = |n| 0..n;
        let (name, factor, dims, rows, cols) = match (projection, kind) {
            ("w1" | "w3", "weight") => {
                let (name, factor) = if projection == "w1" { ("gate_proj", gate) } else { ("up_proj", up) };
                (name, factor, [rows * granularity, cols], slice(rows), all(cols))
            }
            ("w1" | "w3", "bias") => {
                let (name, factor) = if projection == "w1" { ("gate_proj", gate) } else { ("up_proj", up) };
                (name, factor, [1, cols * granularity], all(1), slice(cols))
            }
            ("w2", "weight") => ("down_proj", down, [rows, cols * granularity], all(rows), slice(cols)),
            // Each slice adds the whole of it, times its weight.
            ("w2", "bias") => ("down_proj", scale / granularity as f64, [1, cols], all(1), all(cols)),
            _ => return self.same(part),
        };
        let (name, of) = (format!("{layer}.mlp.{name}.{kind}"), Moment::Master.name());
        if kind == "bias" && self.dense.tensor(&name, of).is_err() {
            return Ok(vec![0; part.len() * self.dtype.size()]);
        }
        check_tensor(self.dense, &name, of, dims, self.dtype)?;
        Ok(self.scaled(self.dense.read_block(&name, of, rows, cols)?, factor))
    }

    fn scaled(&self, bytes: Vec<u8>, factor: f64) -> Vec<u8> {
        if factor == 1.0 {
            return bytes;
        }
        match self.dtype {
            DType::F64 => elements::<f64>(&bytes).flat_map(|x| (x * factor).to_le_bytes()).collect(),
            _ => {
                elements::<f32>(&bytes).flat_map(|x| ((f64::from(x) * factor) as f32).to_le_bytes()).collect()
            }
        }
    }
}
