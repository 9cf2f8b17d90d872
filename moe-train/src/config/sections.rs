//! The tables of a run's configuration.

use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;
use moe_dispatch::DispatcherKind;
use moe_kernels::DType;
#[cfg(doc)]
use moe_model::PipelineLayout;
use moe_model::RecomputeModule;
use moe_pipeline::generate::Named;
use moe_topology::Mapping;
use serde::{Deserialize, Serialize};

use super::ConfigError;
use crate::data::{BatchSizes, EosToken, RampUp, TokenizerKind};
use crate::optim::{MomentDType, ParamGroup};
use crate::schedule::DecayStyle;

/// `[parallel]`: how ranks are folded. Sizes are 1 unless given; `dp` and `edp` follow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParallelConfig {
    /// Ranks.
    pub world_size: usize,
    /// Tensor parallelism of everything outside of the experts, with sequence parallelism.
    pub tp: usize,
    /// Context parallelism: each sequence is cut over this many ranks.
    pub cp: usize,
    /// Ranks of `cp` among which attention is cut by head, by all-to-all (Ulysses): a divisor of `cp`. The
    /// `cp / cp_ulysses` groups of them form a ring. 1 is a ring alone, `cp` all-to-all alone.
    pub cp_ulysses: usize,
    /// Pipeline stages.
    pub pp: usize,
    /// Expert parallelism.
    pub ep: usize,
    /// Tensor parallelism inside an expert.
    pub etp: usize,
    /// Virtual stages per pipeline rank.
    pub vpp: usize,
    /// In which order ranks pass micro-batches through their stages: 1F1B unless given, interleaved with `vpp` above 1. A name of
    /// [`Named`], ours or torch's. Changes no bit.
    #[serde(with = "super::schedule", skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Named>,
    /// Layers of each of the pp·vpp stages, of which rank r has r, r + pp, … (in schedules that need a V: r and 2·pp − 1 − r);
    /// even unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_per_stage: Option<Vec<usize>>,
    /// The same in Megatron's notation, as in `"Et*3|(tt|)*2t|L"`: see [`PipelineLayout::parse`]. In place of
    /// `layers_per_stage`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pipeline_layout: Option<String>,
    /// Micro-batches that go through one virtual stage of a rank before the next, in interleaved schedules; pp unless given. (The
    /// command `schedule` has torch's default instead.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_group_size: Option<usize>,
    /// Instances of the distributed optimizer, of which each has a whole copy of its state, cut over the ranks of the
    /// instance: a common divisor of `dp` and `edp`. Reductions and gathers of weights then stay within an instance, but
    /// for one sum of a slice over the instances.
    pub num_distributed_optimizer_instances: usize,
    /// The axes, the one with stride 1 first.
    pub order: String,
    /// How tokens reach their experts.
    pub dispatcher: Dispatcher,
    /// Whether shared experts compute while rows are on their way to the experts, forward and backward, instead of when they
    /// are back. Changes no bit; what they computed lives longer.
    pub moe_shared_expert_overlap: bool,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        let Mapping { world_size, tp, cp, pp, ep, etp, order, .. } = Mapping::default();
        let (order, dispatcher) = (order.to_string(), Dispatcher::default());
        Self {
            world_size,
            tp,
            cp,
            cp_ulysses: 1,
            pp,
            ep,
            etp,
            vpp: 1,
            schedule: None,
            layers_per_stage: None,
            pipeline_layout: None,
            micro_batch_group_size: None,
            num_distributed_optimizer_instances: 1,
            order,
            dispatcher,
            moe_shared_expert_overlap: false,
        }
    }
}

/// How tokens reach their experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Dispatcher {
    /// Each token goes to the ranks of its experts.
    #[default]
    AllToAll,
    /// All ranks see all tokens.
    AllGather,
}

impl From<Dispatcher> for DispatcherKind {
    fn from(dispatcher: Dispatcher) -> Self {
        match dispatcher {
            Dispatcher::AllToAll => DispatcherKind::AllToAll,
            Dispatcher::AllGather => DispatcherKind::AllGather,
        }
    }
}

/// `[train]`: what is computed and where it is written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Where ranks compute.
    #[serde(default)]
    pub device: DeviceKind,
    /// Type of weights and activations.
    #[serde(default)]
    pub dtype: TrainDType,
    /// Whether the same run twice is the same bits. With `false` the backward of attention may be cuDNN's on a GPU, which is faster, and adds
    /// up the gradient of queries in no fixed order.
    #[serde(default = "yes")]
    pub deterministic: bool,
    /// What a new run starts from: the weights of a checkpoint, of a run (its newest one) or of a Hugging Face folder,
    /// whatever folding wrote them and in whatever type, widened exactly or rounded to the nearest. At random unless given.
    /// `[model]` may then be left out, or give some keys only: the others are those of the weights' model. What is given must
    /// be as there, unless it acts in training alone: see [`Meta::check_weights`](crate::checkpoint::Meta::check_weights). A
    /// run that is resumed goes on from its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_checkpoint: Option<PathBuf>,
    /// Optimizer steps.
    pub steps: u64,
    /// Seed of initial weights, order of samples and choice of held-out documents.
    #[serde(default)]
    pub seed: u64,
    /// Sequences of a step over all ranks, G.
    pub global_batch_size: usize,
    /// Smaller steps at the start, as in `{ start = 8, increment = 8, samples = 1000 }`: from 8 sequences by 8 to G, reached
    /// after 1000. All multiples of `micro_batch_size`·dp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rampup_batch_size: Option<RampUp>,
    /// Sequences that go through the model together, b.
    #[serde(default = "one")]
    pub micro_batch_size: usize,
    /// Tokens of a sequence, S.
    pub sequence_length: usize,
    /// Choices that each expert keeps of a unit of tokens, in multiples of what it would get if all got equally many; the
    /// others are dropped. Without, nothing is dropped; nor is it in evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_expert_capacity_factor: Option<f64>,
    /// Which choices an expert keeps; `probs` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_token_drop_policy: Option<TokenDropPolicy>,
    /// The unit of tokens that compete for an expert; `full` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_token_drop_scope: Option<TokenDropScope>,
    /// `sub`: the parts of a micro-batch, as so many ranks would hold them; those of `[parallel]` unless given. They are
    /// kept in the file of a run, so that it computes the same if it goes on under another folding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_token_drop_parts: Option<TokenDropParts>,
    /// Whether each expert gets as many rows from each rank as it may keep, filled up with zeros: shapes that are known
    /// beforehand, and no exchange of counts. With `full` over several ranks of tp·cp, of which each may hold all that is
    /// kept, that is up to tp·cp times as many rows.
    #[serde(default)]
    pub moe_pad_expert_input_to_capacity: bool,
    /// Rows of a micro-batch that an expert-parallel rank may receive, in multiples of what it would if all experts were
    /// chosen equally often: buffers of known size. Nothing is dropped for it: a step in which a rank would receive more
    /// is made again without, and counted as `reruns`. Any number unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_expert_rank_capacity_factor: Option<f64>,
    /// Gives all experts equally many tokens, whatever routers would choose: a benchmark, see
    /// [`ForcedRouting::Balanced`](moe_model::ForcedRouting::Balanced). Evaluation is not forced.
    #[serde(default)]
    pub moe_router_force_load_balancing: bool,
    /// Gives experts loads that fall as `1 / (e + 1)` to this power: a benchmark, see
    /// [`ForcedRouting::Skewed`](moe_model::ForcedRouting::Skewed).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_router_force_skew: Option<f64>,
    /// Whether the choices of routers in training are written to the folder `routing` of the run, a folder for each step; beside
    /// each choice its margin, the gap of selection scores by which it stands.
    #[serde(default)]
    pub record_routing: bool,
    /// The folder `routing` of a run whose choices are made again, instead of those of the routers: for the same samples
    /// and number of experts, under any mapping and in any type. Weights are made of the present scores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_routing: Option<PathBuf>,
    /// Whether the gradients of a layer are reduced over ranks as soon as its last micro-batch has added to them, while
    /// the backward pass of other layers goes on. Changes no bit.
    #[serde(default = "yes")]
    pub overlap_grad_reduce: bool,
    /// Whether the updated weights of a layer are gathered over ranks until the next forward pass comes to the layer,
    /// instead of until the step ends. Changes no bit.
    #[serde(default = "yes")]
    pub overlap_param_gather: bool,
    /// What backward computes again to save memory, the same to the bit: names of [`RecomputeModule`], none of which may be
    /// part of another. `docs/recompute.md` says what each saves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recompute: Vec<RecomputeModule>,
    /// What happens to a step whose loss or gradient is not finite. No weight changes either way.
    #[serde(default)]
    pub non_finite: NonFinite,
    /// Steps in a row that are skipped; one more stops the run. 10 unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub non_finite_limit: Option<u64>,
    /// Folder of the run.
    pub output: PathBuf,
    /// Steps between evaluations; 0 evaluates after the last step only.
    #[serde(default)]
    pub eval_interval: u64,
    /// Held-out batches of `global_batch_size` sequences per evaluation, at most.
    #[serde(default = "default_eval_batches")]
    pub eval_batches: usize,
    /// Steps between checkpoints; 0 saves after the last step only.
    #[serde(default)]
    pub save_interval: u64,
    /// Checkpoints to keep; older ones are removed after a save. With 0 none is written, not even after the last step: a run
    /// that measures speed.
    #[serde(default = "default_keep_checkpoints")]
    pub keep_checkpoints: usize,
    /// Steps between lines of the log where it is no terminal.
    #[serde(default = "default_log_interval")]
    pub log_interval: u64,
    /// Peak of one rank's device in TFLOP/s, for `mfu`; in `bf16`, that of the data sheet for GPUs that are known
    /// ([`peak_bf16_tflops`](crate::metrics::peak_bf16_tflops)) unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_tflops: Option<f64>,
    /// Seconds after which a rank that waits for others gives up.
    #[serde(default = "default_deadline_seconds")]
    pub deadline_seconds: f64,
}

impl TrainConfig {
    /// Sequences of every step.
    ///
    /// # Errors
    /// The ramp-up does not lead to `global_batch_size`.
    pub fn batch_sizes(&self) -> Result<BatchSizes, ConfigError> {
        Ok(BatchSizes::new(self.global_batch_size, self.rampup_batch_size)?)
    }

    /// Steps in a row whose loss or gradient may be not finite.
    pub fn non_finite_limit(&self) -> u64 {
        match self.non_finite {
            NonFinite::Skip => self.non_finite_limit.unwrap_or(10),
            NonFinite::Stop => 0,
        }
    }
}

/// Which choices an expert keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenDropPolicy {
    /// Those of the largest weights.
    #[default]
    Probs,
    /// The first of their sequences.
    Position,
}

/// The unit of tokens that compete for an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenDropScope {
    /// A micro-batch.
    #[default]
    Full,
    /// The part of it that a rank holds.
    Sub,
}

/// Parts of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenDropParts {
    /// As many as a context-parallel part would have under this tensor parallelism.
    pub tp: usize,
    /// As many as the sequences would have under this context parallelism.
    pub cp: usize,
}

/// What happens to a step whose loss or gradient is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// It is skipped and counted.
    #[default]
    Skip,
    /// The run stops.
    Stop,
}

fn one() -> usize {
    1
}

fn yes() -> bool {
    true
}

fn default_eval_batches() -> usize {
    8
}

fn default_keep_checkpoints() -> usize {
    2
}

fn default_log_interval() -> u64 {
    10
}

fn default_deadline_seconds() -> f64 {
    60.0
}

/// Where ranks compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Ranks are threads of this process.
    #[default]
    Cpu,
    /// Ranks are processes, each with a GPU of those that it sees (`CUDA_VISIBLE_DEVICES`); one rank is this process. In programs
    /// that are built with the feature `cuda`.
    Cuda,
}

/// Type of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainDType {
    /// Single precision.
    #[default]
    F32,
    /// Double precision.
    F64,
    /// bf16, with master weights, gradients and moments in single precision; on GPUs.
    Bf16,
}

impl TrainDType {
    /// The type of master weights, moments and buffers in checkpoints.
    pub const fn master(self) -> DType {
        match self {
            TrainDType::F32 | TrainDType::Bf16 => DType::F32,
            TrainDType::F64 => DType::F64,
        }
    }
}

impl fmt::Display for TrainDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrainDType::F32 => "f32",
            TrainDType::F64 => "f64",
            TrainDType::Bf16 => "bf16",
        })
    }
}

/// `[optimizer]`: AdamW (arXiv 1711.05101) and its learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The largest learning rate, reached after the warm-up.
    pub lr: f64,
    /// The learning rate at the end of the decay; `constant` has none.
    pub min_lr: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// How the rate falls after the warm-up; formulas at [`LrShape`](crate::schedule::LrShape).
    pub lr_schedule: LrScheduleKind,
    /// The step at which the decay ends; `train.steps` unless given. `constant` and `inverse-square-root` have no end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// `warmup-stable-decay`: the length of the decay that ends at `decay_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wsd_decay_steps: Option<u64>,
    /// `warmup-stable-decay`: how the rate falls; `linear` unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wsd_decay_style: Option<DecayStyle>,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of matrices.
    pub weight_decay: f64,
    /// `"bf16"` keeps the first moment rounded to bf16, half the memory of f32; in the type of master weights unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exp_avg_dtype: Option<MomentDType>,
    /// The same of the second moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exp_avg_sq_dtype: Option<MomentDType>,
    /// Largest gradient norm; 0 does not clip.
    pub clip_grad: f64,
    /// How far an update moves the biases of `model.moe_router_enable_expert_bias`; 0 freezes them, 0.001 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moe_router_bias_update_rate: Option<f64>,
    /// `[[optimizer.groups]]`: tensors with a rate or decay of their own, or frozen; the first that matches wins.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<ParamGroup>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            min_lr: 1e-4,
            warmup_steps: 0,
            lr_schedule: LrScheduleKind::default(),
            decay_steps: None,
            wsd_decay_steps: None,
            wsd_decay_style: None,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            exp_avg_dtype: None,
            exp_avg_sq_dtype: None,
            clip_grad: 1.0,
            moe_router_bias_update_rate: None,
            groups: Vec::new(),
        }
    }
}

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LrScheduleKind {
    /// Not at all.
    Constant,
    /// Along a line.
    Linear,
    /// Along half a cosine.
    #[default]
    Cosine,
    /// As one over the root of the step.
    InverseSquareRoot,
    /// Not at all, then fast.
    WarmupStableDecay,
}

impl LrScheduleKind {
    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            LrScheduleKind::Constant => "constant",
            LrScheduleKind::Linear => "linear",
            LrScheduleKind::Cosine => "cosine",
            LrScheduleKind::InverseSquareRoot => "inverse-square-root",
            LrScheduleKind::WarmupStableDecay => "warmup-stable-decay",
        }
    }

    /// Whether the decay ends at a step.
    pub const fn ends(self) -> bool {
        !matches!(self, LrScheduleKind::Constant | LrScheduleKind::InverseSquareRoot)
    }
}

/// `[data]`: what is trained on, either text in `files` or tokens in `[[data.blend]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Patterns of files of text, relative to the current folder: `*`, `?`, `[…]` and `**`. A run tokenises them into its folder.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
    /// How text becomes tokens: `"byte"`, or a `tokenizer.json` of the Hugging Face hub, or a folder that has one. It is copied
    /// to the folder of the run.
    #[serde(default)]
    pub tokenizer: TokenizerKind,
    /// The token that ends a document, by number or as the vocabulary has it, or `"none"`. Of a `tokenizer.json` it is that of the
    /// `tokenizer_config.json` beside it, or the only usual one of the vocabulary, unless given; bytes have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos_token: Option<EosToken>,
    /// What the files hold.
    #[serde(default)]
    pub format: DataFormat,
    /// Attention sees the query's own document only, positions start anew in each, and no loss is taken where input and target
    /// lie in different ones: Megatron's `reset_attention_mask`, `reset_position_ids` and `eod_mask_loss` together. False for
    /// text unless given, always true for prompts with completions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub separate_documents: Option<bool>,
    /// Share of the documents that is kept for evaluation. Of `files`, 0.05 unless given, chosen at random; of each dataset of
    /// a `blend`, the last ones, and none unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
    /// `blend`: other tokens to evaluate on, each as the `path` of a dataset, in place of `held_out`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation: Vec<PathBuf>,
    /// `[[data.blend]]`: datasets of tokens, read where they are, in proportion to their weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blend: Vec<BlendedDataset>,
}

/// `[[data.blend]]`: tokens to train on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlendedDataset {
    /// A token file, or the prefix of `.bin` and `.idx` in Megatron's format; relative to the current folder.
    pub path: PathBuf,
    /// The share of samples that are of it is this by the sum of all weights.
    #[serde(default = "one_whole")]
    pub weight: f64,
}

fn one_whole() -> f64 {
    1.0
}

impl DataConfig {
    /// The weights of the blend.
    pub fn weights(&self) -> Vec<f64> {
        self.blend.iter().map(|dataset| dataset.weight).collect()
    }

    /// Whether it is known how text becomes the tokens of the run: those of a blend were made elsewhere, and `"byte"` is only what
    /// is said where nothing is.
    pub fn names_tokenizer(&self) -> bool {
        self.blend.is_empty() || self.tokenizer != TokenizerKind::Byte
    }

    /// Whether documents are separated.
    pub fn separates_documents(&self) -> bool {
        self.separate_documents.unwrap_or(self.format == DataFormat::PromptCompletion)
    }
}

/// What the files of `data.files` hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataFormat {
    /// Text, which is one stream of tokens.
    #[default]
    Text,
    /// Lines of `{"prompt": "…", "completion": "…"}`; the loss counts tokens of completions. As many lines as fit whole share a
    /// sequence, the rest of which is padding.
    PromptCompletion,
}

impl DataFormat {
    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            DataFormat::Text => "text",
            DataFormat::PromptCompletion => "prompt-completion",
        }
    }
}

/// `[sample]`: the text that a run prints when it ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SampleConfig {
    /// What is continued.
    pub prompt: String,
    /// Tokens to add.
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self { prompt: "The ".to_owned(), tokens: 200, temperature: 0.8 }
    }
}
