//! The keys of token dropping.

use moe_dispatch::capacity::DropPolicy;
use moe_model::{DropUnit, ExpertCapacity};

use super::{ConfigError, RunConfig, TokenDropParts, TokenDropPolicy, TokenDropScope, TrainConfig, require};

impl RunConfig {
    /// What experts take of a micro-batch; without, nothing is dropped.
    pub fn capacity(&self) -> Option<ExpertCapacity> {
        let TrainConfig {
            moe_token_drop_policy: policy,
            moe_token_drop_parts: parts,
            moe_pad_expert_input_to_capacity: pad,
            ..
        } = self.train;
        let policy = match policy.unwrap_or_default() {
            TokenDropPolicy::Probs => DropPolicy::Probs,
            TokenDropPolicy::Position => DropPolicy::Position,
        };
        let unit = parts.map_or(DropUnit::MICRO_BATCH, |TokenDropParts { tp, cp }| DropUnit { tp, cp });
        self.train.moe_expert_capacity_factor.map(|factor| ExpertCapacity { factor, policy, unit, pad })
    }

    /// Fills in what follows from other keys.
    pub(super) fn resolve_capacity(&mut self) {
        let train = &mut self.train;
        if train.moe_expert_capacity_factor.is_none() {
            return;
        }
        train.moe_token_drop_policy.get_or_insert_default();
        if *train.moe_token_drop_scope.get_or_insert_default() == TokenDropScope::Sub {
            let own = TokenDropParts { tp: self.parallel.tp, cp: self.parallel.cp };
            train.moe_token_drop_parts.get_or_insert(own);
        }
    }

    pub(super) fn check_capacity(&self) -> Result<(), ConfigError> {
        let train = &self.train;
        self.check_rank_capacity()?;
        let parts = train.moe_token_drop_parts;
        let Some(factor) = train.moe_expert_capacity_factor else {
            for (setting, given) in [
                ("train.moe_token_drop_policy", train.moe_token_drop_policy.is_some()),
                ("train.moe_token_drop_scope", train.moe_token_drop_scope.is_some()),
                ("train.moe_token_drop_parts", parts.is_some()),
                ("train.moe_pad_expert_input_to_capacity", train.moe_pad_expert_input_to_capacity),
            ] {
                if given {
                    let other = "experts of unlimited capacity".to_owned();
                    let fix = "set train.moe_expert_capacity_factor, or remove it".to_owned();
                    return Err(ConfigError::Conflict { setting, problem: "has no meaning", other, fix });
                }
            }
            return Ok(());
        };
        let setting = "train.moe_expert_capacity_factor";
        require(setting, factor, factor > 0.0 && factor.is_finite(), "finite and above 0")?;
        let problem = "has no meaning";
        if self.model.moe_layers().next().is_none() {
            let (other, fix) = ("a model without experts".to_owned(), "remove it".to_owned());
            return Err(ConfigError::Conflict { setting, problem, other, fix });
        }
        match (train.moe_token_drop_scope, parts) {
            (Some(TokenDropScope::Sub), Some(TokenDropParts { tp, cp })) => {
                let unit = DropUnit { tp, cp };
                unit.check(train.sequence_length).map_err(ConfigError::DropParts)
            }
            (_, Some(_)) => {
                let other = "train.moe_token_drop_scope = \"full\"".to_owned();
                let fix = "set the scope to \"sub\", or remove the parts".to_owned();
                Err(ConfigError::Conflict { setting: "train.moe_token_drop_parts", problem, other, fix })
            }
            (_, None) => Ok(()),
        }
    }

    fn check_rank_capacity(&self) -> Result<(), ConfigError> {
        let setting = "train.moe_expert_rank_capacity_factor";
        let Some(factor) = self.train.moe_expert_rank_capacity_factor else { return Ok(()) };
        let allowed = "finite and at least 1, what a rank receives if experts are chosen equally often";
        require(setting, factor, factor >= 1.0 && factor.is_finite(), allowed)?;
        let conflict = |other: &str, fix: &str| {
            let (problem, other, fix) = ("has no meaning", other.to_owned(), fix.to_owned());
            Err(ConfigError::Conflict { setting, problem, other, fix })
        };
        if self.model.moe_layers().next().is_none() {
            return conflict("a model without experts", "remove it");
        }
        if self.train.moe_pad_expert_input_to_capacity {
            let fix = "ranks receive equally many rows already; remove one of them";
            return conflict("train.moe_pad_expert_input_to_capacity = true", fix);
        }
        Ok(())
    }
}
