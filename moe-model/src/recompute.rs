//! Recomputation: what backward makes again instead of keeping it (arXiv 1604.06174, arXiv 2205.05198).
//!
//! No name changes a result by a bit: what is made again comes from the same inputs by the same kernels, and what is
//! decided or counted in a forward pass (the routing, exchanged counts, statistics) is kept, not made again.
//! `docs/recompute.md` says what each name saves.

use std::fmt;

use moe_kernels::{Backend, Device, Float, Tensor};
use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;
use crate::layer::{Hidden, Layer, Passed};
use crate::{Cx, Error, Result};

/// What can be recomputed, under the names of Megatron's `--recompute-modules` where it has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecomputeModule {
    /// Whole layers: each keeps its input, and its routing if it has experts.
    Full,
    /// Attention from queries, keys and values on, communication over CP included.
    CoreAttn,
    /// The outputs of the two norms of each layer.
    Layernorm,
    /// Feed-forward sublayers of dense layers, norm included.
    Mlp,
    /// Expert sublayers, norm, dispatch and shared expert included; the routing is kept.
    Moe,
    /// The activation between the two matrix products of experts.
    MoeAct,
    /// Shared experts.
    SharedExperts,
}

use RecomputeModule::{CoreAttn, Full, Layernorm, Mlp, Moe, MoeAct, SharedExperts};

impl RecomputeModule {
    /// All of them.
    pub const ALL: [RecomputeModule; 7] = [Full, CoreAttn, Layernorm, Mlp, Moe, MoeAct, SharedExperts];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Full => "full",
            CoreAttn => "core_attn",
            Layernorm => "layernorm",
            Mlp => "mlp",
            Moe => "moe",
            MoeAct => "moe_act",
            SharedExperts => "shared_experts",
        }
    }

    /// Whether `other` is recomputed too wherever this is.
    const fn covers(self, other: RecomputeModule) -> bool {
        match self {
            Full => !matches!(other, Full),
            Moe => matches!(other, MoeAct | SharedExperts),
            _ => false,
        }
    }

    /// What a model must have for the name to mean something, if this one has not.
    fn missing_in(self, config: &ModelConfig) -> Option<&'static str> {
        let any = |moe: bool| (0..config.num_hidden_layers).any(|layer| config.is_moe_layer(layer) == moe);
        match self {
            Mlp if !any(false) => Some("dense layer"),
            Moe | MoeAct | SharedExperts if !any(true) => Some("layer with experts"),
            SharedExperts if config.shared_expert_width().is_none() => Some("shared expert"),
            _ => None,
        }
    }
}

impl fmt::Display for RecomputeModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of [`RecomputeModule`]s of which none is part of another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecomputeModules(u8);

impl RecomputeModules {
    /// The set of `modules`, for a model.
    ///
    /// # Errors
    /// [`Error::Recompute`] if one is named twice, is part of another, or is nothing that the model has.
    pub fn new(modules: &[RecomputeModule], config: &ModelConfig) -> Result<Self> {
        let mut set = RecomputeModules::default();
        for &module in modules {
            let refuse = |why: String| Err(Error::Recompute { module, why });
            if set.contains(module) {
                return refuse("it is named twice".to_owned());
            }
            if let Some(whole) = modules.iter().find(|whole| whole.covers(module)) {
                return refuse(format!("it is part of \"{whole}\"; remove one of them"));
            }
            if let Some(missing) = module.missing_in(config) {
                return refuse(format!("the model has no {missing}; remove it"));
            }
            set.0 |= 1 << module as u8;
        }
        Ok(set)
    }

    /// Whether `module` was named.
    pub const fn contains(self, module: RecomputeModule) -> bool {
        self.0 & 1 << module as u8 != 0
    }

    /// This set, or nothing inside of what is recomputed as a whole anyway.
    pub(crate) const fn inside(self, whole: bool) -> Self {
        if whole { RecomputeModules(0) } else { self }
    }
}

/// A layer whose forward pass can be run again.
pub trait Rerun<T: Float, D: Backend<T>>: Layer<T, D> {
    /// What a second pass takes over from the first: what was decided and exchanged, small beside activations.
    type Kept;

    /// The part of `saved` that is not made again.
    fn keep(saved: Self::Saved) -> Self::Kept;

    /// What the forward pass of `x` saved, again. What backward does not read (the output) need not be computed.
    fn rerun(&self, m: u32, x: Hidden<T, D>, kept: Self::Kept, cx: &mut Cx<T, D>) -> Result<Self::Saved>;
}

/// A layer that keeps its input alone, if it is recomputed, and all that its backward pass needs, if not.
#[derive(Debug, Clone)]
pub struct Recompute<L> {
    /// The layer.
    pub layer: L,
    /// Whether it is recomputed.
    pub enabled: bool,
}

/// What backward needs of a forward pass.
#[derive(Debug)]
pub enum RecomputeSaved<S, K, T: Float, D: Device> {
    /// All of it.
    Whole(S),
    /// What it can be made from again.
    Input {
        /// The input.
        x: Tensor<T, D>,
        /// What is not made again.
        kept: K,
    },
}

/// What a layer gets, and what is kept of it.
type Entered<T, D> = (Hidden<T, D>, Option<Tensor<T, D>>);

impl<L> Recompute<L> {
    /// The input of a forward pass, and what of it is to be kept.
    pub(crate) fn input<T: Float, D: Backend<T>>(
        &self,
        x: Hidden<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Entered<T, D>> {
        if !self.enabled {
            return Ok((x, None));
        }
        let x = x.sum(&cx.device)?;
        Ok((x.clone().into(), Some(x)))
    }

    /// What is kept of a forward pass of this [input](Recompute::input).
    pub(crate) fn saved<T: Float, D: Backend<T>>(
        &self,
        input: Option<Tensor<T, D>>,
        saved: L::Saved,
    ) -> RecomputeSaved<L::Saved, L::Kept, T, D>
    where
        L: Rerun<T, D>,
    {
        match input {
            Some(x) => RecomputeSaved::Input { x, kept: L::keep(saved) },
            None => RecomputeSaved::Whole(saved),
        }
    }

    /// All that the backward pass needs: kept, or made again.
    pub(crate) fn whole<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        saved: RecomputeSaved<L::Saved, L::Kept, T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<L::Saved>
    where
        L: Rerun<T, D>,
    {
        match saved {
            RecomputeSaved::Whole(saved) => Ok(saved),
            RecomputeSaved::Input { x, kept } => self.layer.rerun(m, x.into(), kept, cx),
        }
    }
}

impl<T: Float, D: Backend<T>, L: Rerun<T, D>> Layer<T, D> for Recompute<L> {
    type Saved = RecomputeSaved<L::Saved, L::Kept, T, D>;
    type Deferred = L::Deferred;

    fn forward(&self, m: u32, x: Hidden<T, D>, cx: &mut Cx<T, D>) -> Result<Passed<T, D, Self::Saved>> {
        let (x, input) = self.input(x, cx)?;
        let (y, saved) = self.layer.forward(m, x, cx)?;
        Ok((y, self.saved(input, saved)))
    }

    fn backward_input(
        &self,
        m: u32,
        dy: Tensor<T, D>,
        saved: Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, Self::Deferred)> {
        let saved = self.whole(m, saved, cx)?;
        self.layer.backward_input(m, dy, saved, cx)
    }

    fn backward_weight(&self, m: u32, deferred: Self::Deferred, cx: &mut Cx<T, D>) -> Result<()> {
        self.layer.backward_weight(m, deferred, cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ModelConfig {
        serde_json::from_str(
            r#"{"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4,
                "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}"#,
        )
        .unwrap()
    }

    #[test]
    fn names_are_those_of_the_configuration() {
        for module in RecomputeModule::ALL {
            assert_eq!(serde_json::to_string(&module).unwrap(), format!("\"{module}\""));
        }
    }

    #[test]
    fn sets_have_no_part_of_another() {
        let all = [CoreAttn, Layernorm, Mlp, MoeAct, SharedExperts];
        let set = RecomputeModules::new(&all, &model()).unwrap();
        assert!(RecomputeModule::ALL.iter().all(|module| set.contains(*module) == all.contains(module)));
        assert!(RecomputeModules::new(&[Moe, Mlp, CoreAttn, Layernorm], &model()).is_ok());
        assert!(RecomputeModules::new(&[Full], &model()).unwrap().contains(Full));
        assert!(!RecomputeModules::default().contains(Full));
    }

    #[test]
    fn what_means_nothing_is_refused_with_the_reason() {
        let moe = ModelConfig { first_k_dense_replace: 0, ..model() };
        let plain = ModelConfig { n_shared_experts: None, ..model() };
        let dense = ModelConfig { first_k_dense_replace: 2, ..model() };
        for (modules, config, reason) in [
            (&[MoeAct, MoeAct][..], model(), "recompute \"moe_act\": it is named twice"),
            (&[MoeAct, Moe], model(), "recompute \"moe_act\": it is part of \"moe\"; remove one of them"),
            (
                &[Moe, SharedExperts],
                model(),
                "recompute \"shared_experts\": it is part of \"moe\"; remove one of them",
            ),
            (
                &[Full, CoreAttn],
                model(),
                "recompute \"core_attn\": it is part of \"full\"; remove one of them",
            ),
            (&[Mlp], moe, "recompute \"mlp\": the model has no dense layer; remove it"),
            (&[Moe], dense, "recompute \"moe\": the model has no layer with experts; remove it"),
            (
                &[SharedExperts],
                plain,
                "recompute \"shared_experts\": the model has no shared expert; remove it",
            ),
        ] {
            assert_eq!(RecomputeModules::new(modules, &config).unwrap_err().to_string(), reason);
        }
    }
}
