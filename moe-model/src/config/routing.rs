//! The keys of the router.

use moe_kernels::family::{ExpertGroups, ScoreFunction, Scoring};
use serde::{Deserialize, Serialize};

use super::{ConfigError, ModelConfig, in_range, multiple};

/// From router logits to scores (`scoring_func`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScoringFunc {
    /// Softmax over the K chosen logits (Mixtral).
    #[default]
    SoftmaxPost,
    /// Softmax over all E logits; the chosen are divided by their sum if `norm_topk_prob` (Qwen, DeepSeek-V2).
    Softmax,
    /// Sigmoid of each logit; the chosen are divided by their sum if `norm_topk_prob` (DeepSeek-V3).
    Sigmoid,
    /// Square root of the softplus of each logit; the chosen are divided by their sum if `norm_topk_prob`.
    #[serde(rename = "sqrtsoftplus")]
    SqrtSoftplus,
}

/// A type in which routers compute (`moe_router_dtype`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouterDType {
    /// Double precision, all the way from logits to losses.
    F64,
}

/// Which tokens a load-balancing loss is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuxLossScope {
    /// Each micro-batch.
    MicroBatch,
    /// Each sequence.
    Sequence,
    /// The whole step. Its gradient needs all choices before the first backward pass: with one micro-batch per
    /// data-parallel rank they are added up at no cost, with several a forward pass over all of them comes first.
    Global,
    /// All layers of a micro-batch together, in place of losses of each layer, as in transformers (not divided by the number of
    /// choices, so that balanced is K). Choices travel through the pipeline with activations, their sums with gradients.
    Model,
}

/// One load-balancing loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuxLoss {
    /// Its tokens.
    pub scope: AuxLossScope,
    /// Its coefficient.
    pub coef: f64,
}

/// `router_aux_loss_coef` of transformers.
const DEFAULT_AUX_LOSS_COEF: f64 = 0.001;

pub(super) fn one_group() -> usize {
    1
}

pub(super) fn default_group_score_topk() -> usize {
    2
}

pub(super) fn default_routed_scaling_factor() -> f64 {
    1.0
}

impl ModelConfig {
    /// From logits to choices and weights, as kernels take it.
    pub fn scoring(&self) -> Scoring {
        let normalize = self.norm_topk_prob;
        Scoring {
            function: match self.scoring_func {
                ScoringFunc::SoftmaxPost => ScoreFunction::SoftmaxPost,
                ScoringFunc::Softmax => ScoreFunction::SoftmaxPre { normalize },
                ScoringFunc::Sigmoid => ScoreFunction::Sigmoid { normalize },
                ScoringFunc::SqrtSoftplus => ScoreFunction::SqrtSoftplus { normalize },
            },
            groups: (self.n_group > 1).then_some(ExpertGroups {
                count: self.n_group,
                kept: self.topk_group,
                score_top_k: self.group_score_topk,
            }),
            scale: self.routed_scaling_factor,
        }
    }

    /// The coefficient of the load-balancing loss of `scope`, 0 without.
    pub fn aux_loss_coef(&self, scope: AuxLossScope) -> f64 {
        let micro_batch = AuxLoss {
            scope: AuxLossScope::MicroBatch,
            coef: self.router_aux_loss_coef.unwrap_or(DEFAULT_AUX_LOSS_COEF),
        };
        let losses = if self.router_aux_losses.is_empty() {
            std::slice::from_ref(&micro_batch)
        } else {
            &self.router_aux_losses
        };
        losses.iter().find(|loss| loss.scope == scope).map_or(0.0, |loss| loss.coef)
    }

    /// Experts whose choices are counted over all layers, for the load-balancing loss of that scope; 0 without it.
    pub fn choices_of_all_layers(&self) -> usize {
        if self.aux_loss_coef(AuxLossScope::Model) == 0.0 { 0 } else { self.num_local_experts }
    }

    /// The part of [`check`](Self::check) that concerns the router.
    pub(super) fn check_router(&self) -> Result<(), ConfigError> {
        let unsupported = |setting, why| Err(ConfigError::Unsupported { setting, why });
        if self.scoring_func == ScoringFunc::SoftmaxPost && !self.norm_topk_prob {
            return unsupported(
                "norm_topk_prob = false with scoring_func = \"softmax-post\"",
                "a softmax over the chosen experts sums to 1; use scoring_func = \"softmax\"",
            );
        }
        if self.moe_router_enable_expert_bias && !self.scoring().function.is_separate() {
            return unsupported(
                "moe_router_enable_expert_bias with softmax scores",
                "the scale of a softmax's probabilities depends on all logits, so that no bias stays right; use \
                 scoring_func = \"sigmoid\" or \"sqrtsoftplus\", or a load-balancing loss",
            );
        }
        self.check_sinkhorn()?;
        let jitter = self.router_jitter_noise;
        in_range("router_jitter_noise", jitter, 0.0..=1.0 - f64::EPSILON, "at least 0 and below 1")?;
        let scale = self.routed_scaling_factor;
        in_range("routed_scaling_factor", scale, f64::MIN_POSITIVE..=f64::MAX, "finite and above 0")?;
        self.check_groups()?;

        in_range(
            "router_aux_loss_coef",
            self.router_aux_loss_coef.unwrap_or(0.0),
            0.0..=f64::MAX,
            "finite and at least 0",
        )?;
        if self.router_aux_loss_coef.is_some() && !self.router_aux_losses.is_empty() {
            return unsupported(
                "router_aux_loss_coef beside router_aux_losses",
                "the list replaces it; leave one of them out",
            );
        }
        for (n, loss) in self.router_aux_losses.iter().enumerate() {
            in_range("router_aux_losses.coef", loss.coef, 0.0..=f64::MAX, "finite and at least 0")?;
            if loss.scope == AuxLossScope::Model && self.router_aux_losses.len() > 1 {
                return unsupported(
                    "router_aux_losses with scope = \"model\" beside others",
                    "it takes the place of the losses of each layer; leave it or the others out",
                );
            }
            if self.router_aux_losses[..n].iter().any(|other| other.scope == loss.scope) {
                return unsupported("router_aux_losses with a scope twice", "add up the coefficients");
            }
        }
        Ok(())
    }

    fn check_sinkhorn(&self) -> Result<(), ConfigError> {
        let Some(iterations) = self.moe_router_sinkhorn_iterations else { return Ok(()) };
        let name = "moe_router_sinkhorn_iterations";
        in_range(name, iterations as f64, 1.0..=1000.0, "from 1 to 1000")?;
        let scopes =
            [AuxLossScope::MicroBatch, AuxLossScope::Sequence, AuxLossScope::Global, AuxLossScope::Model];
        let (setting, why) = if scopes.into_iter().any(|scope| self.aux_loss_coef(scope) != 0.0) {
            (
                "moe_router_sinkhorn_iterations with a load-balancing loss",
                "it balances the load itself; set router_aux_loss_coef to 0",
            )
        } else if self.moe_router_enable_expert_bias {
            (
                "moe_router_sinkhorn_iterations with moe_router_enable_expert_bias",
                "it chooses by other scores than the bias is added to; remove one of them",
            )
        } else if self.n_group > 1 {
            (
                "moe_router_sinkhorn_iterations with n_group above 1",
                "it spreads tokens over all experts; set n_group to 1",
            )
        } else {
            return Ok(());
        };
        Err(ConfigError::Unsupported { setting, why })
    }

    fn check_groups(&self) -> Result<(), ConfigError> {
        let (experts, groups) = (self.num_local_experts, self.n_group);
        in_range(
            "n_group",
            groups as f64,
            1.0..=experts as f64,
            &format!("from 1 to num_local_experts = {experts}"),
        )?;
        multiple(("num_local_experts", experts), ("n_group", groups))?;
        let (kept, size) = (self.topk_group, experts / groups);
        in_range("topk_group", kept as f64, 1.0..=groups as f64, &format!("from 1 to n_group = {groups}"))?;
        if groups == 1 {
            return Ok(());
        }
        let allowed = format!("from 1 to the {size} experts of a group");
        in_range("group_score_topk", self.group_score_topk as f64, 1.0..=size as f64, &allowed)?;
        let allowed = format!("at most the {} experts of {kept} groups of {size}", kept * size);
        in_range("num_experts_per_tok", self.num_experts_per_tok as f64, 1.0..=(kept * size) as f64, &allowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(keys: &str) -> ModelConfig {
        let text = format!(
            r#"{{"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8,
                "num_experts_per_tok": 4{keys}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    fn refusal(keys: &str) -> String {
        parse(keys).check().unwrap_err().to_string()
    }

    #[test]
    fn a_plain_softmax_by_default() {
        let config = parse("");
        config.check().unwrap();
        assert_eq!(config.scoring(), ScoreFunction::SoftmaxPost.into());
        assert_eq!(config.aux_loss_coef(AuxLossScope::MicroBatch), 0.001);
        assert_eq!(config.aux_loss_coef(AuxLossScope::Sequence), 0.0);
    }

    #[test]
    fn the_keys_of_deepseek() {
        let config = parse(
            r#", "scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
                "router_aux_losses": [{"scope": "sequence", "coef": 1e-4}]"#,
        );
        config.check().unwrap();
        let groups = Some(ExpertGroups { count: 4, kept: 2, score_top_k: 2 });
        let function = ScoreFunction::Sigmoid { normalize: true };
        assert_eq!(config.scoring(), Scoring { function, groups, scale: 2.5 });
        assert_eq!(config.aux_loss_coef(AuxLossScope::MicroBatch), 0.0);
        assert_eq!(config.aux_loss_coef(AuxLossScope::Sequence), 1e-4);
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&json).unwrap(), config);
    }

    #[test]
    fn roots_of_softplus_take_a_bias_and_f64() {
        let config = parse(
            r#", "scoring_func": "sqrtsoftplus", "moe_router_enable_expert_bias": true, "moe_router_dtype": "f64""#,
        );
        config.check().unwrap();
        assert_eq!(config.scoring(), ScoreFunction::SqrtSoftplus { normalize: true }.into());
        assert_eq!(config.moe_router_dtype, Some(RouterDType::F64));
    }

    #[test]
    fn softmax_before_the_choice_may_stay_unnormalised() {
        let config = parse(r#", "scoring_func": "softmax", "norm_topk_prob": false"#);
        config.check().unwrap();
        assert_eq!(config.scoring(), ScoreFunction::SoftmaxPre { normalize: false }.into());
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_reason() {
        for (keys, start) in [
            (r#", "norm_topk_prob": false"#, "norm_topk_prob = false with scoring_func = \"softmax-post\""),
            (
                r#", "moe_router_enable_expert_bias": true"#,
                "moe_router_enable_expert_bias with softmax scores",
            ),
            (r#", "moe_router_sinkhorn_iterations": 0"#, "moe_router_sinkhorn_iterations = 0"),
            (
                r#", "moe_router_sinkhorn_iterations": 9"#,
                "moe_router_sinkhorn_iterations with a load-balancing loss",
            ),
            (
                r#", "moe_router_sinkhorn_iterations": 9, "router_aux_loss_coef": 0.0, "scoring_func": "sigmoid",
                    "moe_router_enable_expert_bias": true"#,
                "moe_router_sinkhorn_iterations with moe_router_enable_expert_bias",
            ),
            (
                r#", "moe_router_sinkhorn_iterations": 9, "router_aux_loss_coef": 0.0, "n_group": 2, "topk_group": 2"#,
                "moe_router_sinkhorn_iterations with n_group above 1",
            ),
            (r#", "router_jitter_noise": 1.0"#, "router_jitter_noise = 1"),
            (r#", "router_jitter_noise": -0.1"#, "router_jitter_noise = -0.1"),
            (r#", "routed_scaling_factor": 0.0"#, "routed_scaling_factor = 0"),
            (r#", "n_group": 0"#, "n_group = 0"),
            (r#", "n_group": 3, "topk_group": 2"#, "num_local_experts must be a multiple of n_group"),
            (r#", "topk_group": 2"#, "topk_group = 2, but topk_group must be from 1 to n_group = 1"),
            (r#", "n_group": 4, "topk_group": 5"#, "topk_group = 5"),
            (r#", "n_group": 4, "topk_group": 2, "group_score_topk": 3"#, "group_score_topk = 3"),
            (r#", "n_group": 8, "topk_group": 4"#, "group_score_topk = 2"),
            (
                r#", "n_group": 4"#,
                "num_experts_per_tok = 4, but num_experts_per_tok must be at most the 2 experts of 1 groups of 2",
            ),
            (
                r#", "router_aux_loss_coef": 0.1, "router_aux_losses": [{"scope": "sequence", "coef": 1.0}]"#,
                "router_aux_loss_coef beside router_aux_losses is not supported",
            ),
            (r#", "router_aux_loss_coef": -0.5"#, "router_aux_loss_coef = -0.5"),
            (
                r#", "router_aux_losses": [{"scope": "sequence", "coef": -1.0}]"#,
                "router_aux_losses.coef = -1",
            ),
            (
                r#", "router_aux_losses": [{"scope": "global", "coef": 1.0}, {"scope": "model", "coef": 1.0}]"#,
                "router_aux_losses with scope = \"model\" beside others is not supported",
            ),
            (
                r#", "router_aux_losses": [{"scope": "sequence", "coef": 1.0}, {"scope": "sequence", "coef": 2.0}]"#,
                "router_aux_losses with a scope twice",
            ),
        ] {
            let refused = refusal(keys);
            assert!(refused.starts_with(start), "{refused}");
        }
    }
}
