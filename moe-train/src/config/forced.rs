//! The keys of forced routing, and of routing that is recorded and replayed.

use moe_model::ForcedRouting;

use super::{ConfigError, RunConfig, require};

impl RunConfig {
    /// The load that training is given, if it is a benchmark of one.
    pub fn forced_routing(&self) -> Option<ForcedRouting> {
        let skewed = self.train.moe_router_force_skew.map(|exponent| ForcedRouting::Skewed { exponent });
        let balanced = self.train.moe_router_force_load_balancing.then_some(ForcedRouting::Balanced);
        skewed.or(balanced)
    }

    pub(super) fn check_replay(&self) -> Result<(), ConfigError> {
        let train = &self.train;
        let setting = match (train.record_routing, &train.replay_routing) {
            (false, None) => return Ok(()),
            (true, None) => "train.record_routing",
            (_, Some(_)) => "train.replay_routing",
        };
        let refused = |problem, other: &str, fix: &str| {
            let (other, fix) = (other.to_owned(), fix.to_owned());
            Err(ConfigError::Conflict { setting, problem, other, fix })
        };
        if train.replay_routing.is_some() && train.record_routing {
            return refused("makes no sense", "train.record_routing = true", "they are the same; remove one");
        }
        if train.replay_routing.is_some() && self.forced_routing().is_some() {
            return refused("contradicts itself", "forced routing", "remove one of them");
        }
        if self.model.moe_layers().next().is_none() {
            return refused("has no meaning", "a model without experts", "remove it");
        }
        Ok(())
    }

    pub(super) fn check_forced_routing(&self) -> Result<(), ConfigError> {
        const SKEW: &str = "train.moe_router_force_skew";
        const BALANCE: &str = "train.moe_router_force_load_balancing";
        let skew = self.train.moe_router_force_skew;
        let setting = match (skew, self.train.moe_router_force_load_balancing) {
            (None, false) => return Ok(()),
            (None, true) => BALANCE,
            (Some(_), _) => SKEW,
        };
        let refused = |problem, other: &str, fix: &str| {
            let (other, fix) = (other.to_owned(), fix.to_owned());
            Err(ConfigError::Conflict { setting, problem, other, fix })
        };
        if let Some(exponent) = skew {
            if self.train.moe_router_force_load_balancing {
                return refused("contradicts itself", &format!("{BALANCE} = true"), "remove one of them");
            }
            let legal = (0.0..=100.0).contains(&exponent);
            require(SKEW, exponent, legal, "from 0 (all alike) to 100")?;
        }
        let model = &self.model;
        if model.moe_layers().next().is_none() {
            return refused("has no meaning", "a model without experts", "remove it");
        }
        if model.moe_router_enable_expert_bias {
            let other = "model.moe_router_enable_expert_bias = true";
            return refused(
                "makes no sense",
                other,
                "the bias would follow choices it has no part in; remove one",
            );
        }
        if model.moe_router_sinkhorn_iterations.is_some() {
            let other = "model.moe_router_sinkhorn_iterations";
            return refused("contradicts itself", other, "both choose the experts; remove one");
        }
        if model.n_group > 1 {
            let other = format!("model.n_group = {}", model.n_group);
            return refused(
                "makes no sense",
                &other,
                "forced choices keep to no groups; set model.n_group to 1",
            );
        }
        Ok(())
    }
}
