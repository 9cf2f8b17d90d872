//! The configuration of a run: one strict TOML file, with overrides.
//!
//! ```
//! use moe_train::config::RunConfig;
//!
//! let text = r#"
//!     [model]
//!     vocab_size = 256
//!     hidden_size = 64
//!     intermediate_size = 96
//!     num_hidden_layers = 2
//!     num_attention_heads = 4
//!     num_key_value_heads = 2
//!     num_local_experts = 8
//!     num_experts_per_tok = 2
//!
//!     [parallel]
//!     world_size = 4
//!     tp = 2
//!     ep = 4
//!
//!     [train]
//!     steps = 100
//!     global_batch_size = 8
//!     sequence_length = 64
//!     output = "runs/small"
//!
//!     [data]
//!     files = ["docs/**/*.md"]
//! "#;
//! let config = RunConfig::parse(text, "example", &["train.steps=200"])?;
//! assert_eq!(config.train.steps, 200);
//!
//! let error = RunConfig::parse(text, "example", &["train.step=200"]).unwrap_err();
//! assert_eq!(error.to_string(), "unknown key \"step\" in [train]; did you mean \"steps\"?");
//! # Ok::<(), moe_train::config::ConfigError>(())
//! ```

mod capacity;
mod data;
mod error;
mod forced;
mod init;
mod overrides;
mod parallel;
mod schedule;
mod sections;
mod strict;

use std::path::Path;

use moe_model::config::ModelConfig;
use moe_model::{PipelineLayout, RecomputeModules};
use moe_topology::{Attention, Constraints, Folding, Mapping};
use serde::{Deserialize, Serialize};
use toml::Table;

pub use error::ConfigError;
pub(crate) use schedule::training_passes;
pub use sections::{
    BlendedDataset, DataConfig, DataFormat, DeviceKind, Dispatcher, LrScheduleKind, NonFinite,
    OptimizerConfig, ParallelConfig, SampleConfig, TokenDropParts, TokenDropPolicy, TokenDropScope,
    TrainConfig, TrainDType,
};

pub use crate::data::TokenizerKind;
use crate::durable::Context;
use crate::optim::{ParamGroups, model_tensors};
use crate::schedule::{DecayStyle, LrSchedule, LrShape};
use strict::{field_names, take, unknown};

/// Everything that defines a run; each field is a table of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    /// The model, with the keys of a Hugging Face `config.json`.
    pub model: ModelConfig,
    /// How ranks are folded.
    pub parallel: ParallelConfig,
    /// What is computed and where it is written.
    pub train: TrainConfig,
    /// AdamW and its learning rate.
    pub optimizer: OptimizerConfig,
    /// What is trained on.
    pub data: DataConfig,
    /// What is printed when the run ends.
    pub sample: SampleConfig,
}

impl RunConfig {
    /// Reads and checks a file; `overrides` are of the form `table.key=value`, the later ones winning.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), or the file cannot be read.
    pub fn load(path: &Path, overrides: &[impl AsRef<str>]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).context("read", path)?;
        Self::parse(&text, &path.display().to_string(), overrides)
    }

    /// As [`load`](Self::load), from text; `origin` is its name in messages. A `[model]` that lacks a key that it must have, or
    /// all of them, is filled up with the model of `train.init_checkpoint`.
    ///
    /// # Errors
    /// The text is not TOML, a key is unknown or missing, a value has the wrong type or is out of range, the fields do
    /// not fit together, or the mapping is illegal for this model and batch.
    pub fn parse(text: &str, origin: &str, overrides: &[impl AsRef<str>]) -> Result<Self, ConfigError> {
        let mut root: Table = text.parse().map_err(|error: toml::de::Error| ConfigError::Syntax {
            origin: origin.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        for text in overrides {
            overrides::apply(&mut root, text.as_ref())?;
        }
        init::complete_model(&mut root)?;
        let sections = [
            ("model", field_names::<ModelConfig>()),
            ("parallel", field_names::<ParallelConfig>()),
            ("train", field_names::<TrainConfig>()),
            ("optimizer", field_names::<OptimizerConfig>()),
            ("data", field_names::<DataConfig>()),
            ("sample", field_names::<SampleConfig>()),
        ];
        let known = field_names::<RunConfig>();
        if let Some(key) = root.keys().find(|key| !known.contains(&key.as_str())) {
            return Err(unknown(key, origin, known, &sections));
        }
        let mut config = RunConfig {
            model: take(&mut root, "model", &sections)?,
            parallel: take(&mut root, "parallel", &sections)?,
            train: take(&mut root, "train", &sections)?,
            optimizer: take(&mut root, "optimizer", &sections)?,
            data: take(&mut root, "data", &sections)?,
            sample: take(&mut root, "sample", &sections)?,
        };
        if config.train.non_finite == NonFinite::Skip {
            config.train.non_finite_limit.get_or_insert(config.train.non_finite_limit());
        }
        if config.optimizer.lr_schedule.ends() {
            config.optimizer.decay_steps.get_or_insert(config.train.steps);
        }
        if config.optimizer.lr_schedule == LrScheduleKind::WarmupStableDecay {
            config.optimizer.wsd_decay_style.get_or_insert(DecayStyle::Linear);
        }
        if config.model.moe_router_enable_expert_bias {
            config.optimizer.moe_router_bias_update_rate.get_or_insert(1e-3);
        }
        config.resolve_capacity();
        config.resolve_data();
        config.check()?;
        Ok(config)
    }

    /// The whole configuration with every default filled in, as a file that [`load`](Self::load) reads back to the same.
    ///
    /// # Errors
    /// A path is not Unicode.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(|error| ConfigError::Syntax {
            origin: "the resolved configuration".to_owned(),
            message: error.to_string(),
        })
    }

    /// The learning rate by step.
    pub fn lr_schedule(&self) -> LrSchedule {
        let OptimizerConfig { lr, min_lr, warmup_steps, lr_schedule, .. } = self.optimizer;
        let decay_steps = self.optimizer.decay_steps.unwrap_or(self.train.steps);
        let shape = match lr_schedule {
            LrScheduleKind::Constant => LrShape::Constant,
            LrScheduleKind::InverseSquareRoot => LrShape::InverseSquareRoot,
            LrScheduleKind::Linear => LrShape::Decay { decay_steps, style: DecayStyle::Linear },
            LrScheduleKind::Cosine => LrShape::Decay { decay_steps, style: DecayStyle::Cosine },
            LrScheduleKind::WarmupStableDecay => LrShape::StableDecay {
                decay_steps,
                length: self.optimizer.wsd_decay_steps.unwrap_or(0),
                style: self.optimizer.wsd_decay_style.unwrap_or(DecayStyle::Linear),
            },
        };
        LrSchedule { max: lr, min: min_lr, warmup_steps, shape }
    }

    /// The sizes of the axes, as written.
    ///
    /// # Errors
    /// `order` does not name axes.
    pub fn mapping(&self) -> Result<Mapping, ConfigError> {
        self.parallel.mapping()
    }

    /// What the model and the batch ask of the mapping.
    pub fn constraints(&self) -> Constraints {
        Constraints {
            sequence_length: Some(self.train.sequence_length),
            global_batch_size: Some(self.train.global_batch_size),
            micro_batch_size: self.train.micro_batch_size,
            ..self.parallel.constraints(&self.model)
        }
    }

    /// The folding, legal for this model and batch: [`ParallelConfig::folding`].
    ///
    /// # Errors
    /// The equation that is broken, the values and the nearest legal mappings.
    pub fn folding(&self) -> Result<Folding, ConfigError> {
        self.parallel.folding(&self.model, self.constraints())
    }

    /// Which layers are on which pipeline rank.
    ///
    /// # Errors
    /// Those of [`ParallelConfig::pipeline`].
    pub fn pipeline(&self) -> Result<PipelineLayout, ConfigError> {
        self.parallel.pipeline(self.model.num_hidden_layers)
    }

    /// What backward makes again.
    ///
    /// # Errors
    /// A name is given twice, is part of another, or is nothing that the model has.
    pub fn recompute(&self) -> Result<RecomputeModules, ConfigError> {
        RecomputeModules::new(&self.train.recompute, &self.model).map_err(ConfigError::Recompute)
    }

    /// That the fields fit together; for what was changed after it was read.
    ///
    /// # Errors
    /// Those of [`parse`](Self::parse) that are not about the text.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        self.model.check()?;
        self.recompute()?;
        if self.parallel.moe_shared_expert_overlap && self.model.shared_expert_width().is_none() {
            return Err(ConfigError::Conflict {
                setting: "parallel.moe_shared_expert_overlap",
                problem: "has no meaning",
                other: "a model without a shared expert".to_owned(),
                fix: "remove it, or set model.n_shared_experts or model.shared_expert_intermediate_size"
                    .to_owned(),
            });
        }
        self.check_train()?;
        self.check_capacity()?;
        self.check_forced_routing()?;
        self.check_replay()?;
        self.check_optimizer()?;
        self.check_data()?;
        let folding = self.folding()?;
        self.pipeline()?;
        self.check_schedule(&folding)
    }

    /// That the schedule takes the micro-batches of every step.
    fn check_schedule(&self, folding: &Folding) -> Result<(), ConfigError> {
        let TrainConfig { rampup_batch_size, micro_batch_size, .. } = self.train;
        let dp = folding.size(Attention::DP);
        if let Some(ramp_up) = rampup_batch_size {
            ramp_up.check_deal(micro_batch_size, dp)?;
        }
        for sequences in self.train.batch_sizes()?.sizes() {
            self.parallel.check_passes(sequences / (micro_batch_size * dp))?;
        }
        Ok(())
    }

    fn check_train(&self) -> Result<(), ConfigError> {
        let train = &self.train;
        match (train.device, train.dtype) {
            (DeviceKind::Cpu, TrainDType::Bf16) => return Err(ConfigError::bf16_on_cpu()),
            (DeviceKind::Cpu, _) if !train.deterministic => {
                let (setting, problem) = ("train.deterministic = false", "has no meaning");
                let (other, fix) = ("train.device = \"cpu\"".to_owned(), "remove it".to_owned());
                return Err(ConfigError::Conflict { setting, problem, other, fix });
            }
            _ => {}
        }
        for (setting, value) in [
            ("train.steps", train.steps),
            ("train.global_batch_size", train.global_batch_size as u64),
            ("train.micro_batch_size", train.micro_batch_size as u64),
            ("train.sequence_length", train.sequence_length as u64),
            ("train.eval_batches", train.eval_batches as u64),
            ("train.log_interval", train.log_interval),
        ] {
            require(setting, value, (1..=i64::MAX as u64).contains(&value), "at least 1")?;
        }
        if train.keep_checkpoints == 0 && train.save_interval > 0 {
            return Err(ConfigError::Conflict {
                setting: "train.save_interval",
                problem: "has no meaning",
                other: "train.keep_checkpoints = 0, which saves nothing".to_owned(),
                fix: "remove one of them".to_owned(),
            });
        }
        match (train.non_finite, train.non_finite_limit) {
            (NonFinite::Stop, Some(_)) => {
                let (setting, problem) = ("train.non_finite_limit", "has no meaning");
                let (other, fix) = ("train.non_finite = \"stop\"".to_owned(), "remove it".to_owned());
                return Err(ConfigError::Conflict { setting, problem, other, fix });
            }
            (_, Some(limit)) => require("train.non_finite_limit", limit, limit >= 1, "at least 1")?,
            (_, None) => {}
        }
        if let Some(peak) = train.peak_tflops {
            require("train.peak_tflops", peak, peak > 0.0 && peak.is_finite(), "finite and above 0")?;
        }
        let deadline = train.deadline_seconds;
        require(
            "train.deadline_seconds",
            deadline,
            deadline > 0.0 && deadline <= 1e6,
            "above 0 and at most 1e6",
        )
    }

    fn check_optimizer(&self) -> Result<(), ConfigError> {
        let o = &self.optimizer;
        let finite = |value: f64| (0.0..=f64::MAX).contains(&value);
        require("optimizer.lr", o.lr, finite(o.lr), "finite and at least 0")?;
        let allowed = format!("from 0 to optimizer.lr = {}", o.lr);
        require("optimizer.min_lr", o.min_lr, (0.0..=o.lr).contains(&o.min_lr), &allowed)?;
        self.check_lr_schedule()?;
        for (setting, beta) in [("optimizer.beta1", o.beta1), ("optimizer.beta2", o.beta2)] {
            require(setting, beta, (0.0..1.0).contains(&beta), "at least 0 and below 1")?;
        }
        // Below this a gradient that is pure rounding would move weights.
        require("optimizer.eps", o.eps, o.eps >= 1e-8 && finite(o.eps), "finite and at least 1e-8")?;
        self.check_moments()?;
        require("optimizer.weight_decay", o.weight_decay, finite(o.weight_decay), "finite and at least 0")?;
        require("optimizer.clip_grad", o.clip_grad, finite(o.clip_grad), "finite and at least 0")?;
        if let Some(rate) = o.moe_router_bias_update_rate {
            let setting = "optimizer.moe_router_bias_update_rate";
            if !self.model.moe_router_enable_expert_bias {
                let (problem, other) =
                    ("has no meaning", "model.moe_router_enable_expert_bias = false".to_owned());
                let fix = "remove it, or set the latter to true".to_owned();
                return Err(ConfigError::Conflict { setting, problem, other, fix });
            }
            require(setting, rate, finite(rate), "finite and at least 0")?;
        }
        let tensors = model_tensors(&self.model).map_err(ConfigError::Tensors)?;
        ParamGroups::new(&o.groups, o.weight_decay, &tensors)?;
        Ok(())
    }

    /// What moments in bf16 ask of the decays, and of the type that they are instead of.
    fn check_moments(&self) -> Result<(), ConfigError> {
        /// A bf16 has 8 bits: what falls by less than half a unit of the last one is rounded back to where it was.
        const SMALLEST_STEP: f64 = 1.0 / 256.0;
        let o = &self.optimizer;
        let moments = [
            ("optimizer.exp_avg_dtype = \"bf16\"", o.exp_avg_dtype, "optimizer.beta1", o.beta1),
            ("optimizer.exp_avg_sq_dtype = \"bf16\"", o.exp_avg_sq_dtype, "optimizer.beta2", o.beta2),
        ];
        for (setting, dtype, decay, beta) in moments {
            if dtype.is_none() {
                continue;
            }
            let conflict = |problem, other, fix: &str| {
                Err(ConfigError::Conflict { setting, problem, other, fix: fix.to_owned() })
            };
            if self.train.dtype == TrainDType::F64 {
                let other = "train.dtype = \"f64\"".to_owned();
                return conflict("has no meaning", other, "remove it, or train in f32");
            }
            if 1.0 - beta < SMALLEST_STEP {
                let fix = "remove it, or set the decay to at most 0.996";
                return conflict("would never let the average fall", format!("{decay} = {beta}"), fix);
            }
        }
        Ok(())
    }

    fn check_lr_schedule(&self) -> Result<(), ConfigError> {
        let o = &self.optimizer;
        let conflict = |setting, problem, fix: String| {
            let other = format!("optimizer.lr_schedule = \"{}\"", o.lr_schedule.name());
            Err(ConfigError::Conflict { setting, problem, other, fix })
        };
        let unused = |setting| conflict(setting, "has no meaning", "remove it".to_owned());
        let decay = match o.decay_steps {
            Some(_) if !o.lr_schedule.ends() => return unused("optimizer.decay_steps"),
            given => given.unwrap_or(self.train.steps),
        };
        if o.lr_schedule.ends() {
            let allowed = format!("at most optimizer.decay_steps = {decay}");
            require("optimizer.warmup_steps", o.warmup_steps, o.warmup_steps <= decay, &allowed)?;
        }
        let stable = o.lr_schedule == LrScheduleKind::WarmupStableDecay;
        match (stable, o.wsd_decay_steps, o.wsd_decay_style) {
            (true, Some(length), _) => {
                let most = decay - o.warmup_steps;
                let allowed =
                    format!("from 1 to {most}, which is optimizer.decay_steps - optimizer.warmup_steps");
                require("optimizer.wsd_decay_steps", length, (1..=most).contains(&length), &allowed)
            }
            (true, None, _) => {
                let fix = format!("set it to the length of the decay that ends at step {decay}");
                conflict("optimizer.wsd_decay_steps", "is needed", fix)
            }
            (false, Some(_), _) => unused("optimizer.wsd_decay_steps"),
            (false, None, Some(_)) => unused("optimizer.wsd_decay_style"),
            (false, None, None) => Ok(()),
        }
    }
}

fn require(
    setting: &'static str,
    value: impl ToString,
    holds: bool,
    allowed: &str,
) -> Result<(), ConfigError> {
    match holds {
        true => Ok(()),
        false => Err(ConfigError::Range { setting, value: value.to_string(), allowed: allowed.to_owned() }),
    }
}

#[cfg(test)]
mod tests;
