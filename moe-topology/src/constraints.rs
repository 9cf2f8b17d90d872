//! What a model, a batch and a machine ask of a folding.

use std::ops::RangeInclusive;

use crate::error::{Product, Rule};
use crate::{Attention, Error, Folding, Mapping, Nearest};

/// What a folding must satisfy besides the arithmetic of ranks.
///
/// What is `None` asks nothing, and no number is 0. Fields of a model are named as in a Hugging Face `config.json`.
/// Build it with `..Constraints::default()`, as here: fields may be added in a minor release.
///
/// ```
/// use moe_topology::{Constraints, Mapping};
///
/// let mixtral = Constraints {
///     num_attention_heads: Some(48),
///     num_key_value_heads: Some(8),
///     num_experts: Some(8),
///     num_hidden_layers: Some(56),
///     ..Constraints::default()
/// };
/// let mapping = Mapping { world_size: 128, tp: 2, pp: 8, ep: 16, ..Mapping::default() };
/// let error = mixtral.fold(mapping).unwrap_err();
/// assert!(error.to_string().contains("num_experts must be a multiple of ep, but 8 % 16 = 8"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constraints {
    /// Allowed tensor parallelism.
    pub tp: RangeInclusive<usize>,
    /// Allowed context parallelism.
    pub cp: RangeInclusive<usize>,
    /// Allowed pipeline parallelism.
    pub pp: RangeInclusive<usize>,
    /// Allowed expert parallelism.
    pub ep: RangeInclusive<usize>,
    /// Allowed expert tensor parallelism.
    pub etp: RangeInclusive<usize>,
    /// Virtual stages per rank; more than 1 (interleaving) needs `pp > 1`.
    pub vpp: usize,
    /// Ranks of `cp` that exchange heads by all-to-all (Ulysses): a divisor of `cp`.
    pub cp_ulysses: usize,
    /// Attention heads: a multiple of `tp·cp_ulysses`.
    pub num_attention_heads: Option<usize>,
    /// Key-value heads: a multiple of `tp`, or a divisor (each then has `tp/heads` replicas); and the same of
    /// `tp·cp_ulysses`.
    pub num_key_value_heads: Option<usize>,
    /// Routed experts: a multiple of `ep`.
    pub num_experts: Option<usize>,
    /// Hidden size of one expert: a multiple of `etp`.
    pub moe_intermediate_size: Option<usize>,
    /// Hidden size of dense layers: a multiple of `tp`.
    pub intermediate_size: Option<usize>,
    /// Hidden size of the shared expert, which is cut as dense layers are: a multiple of `tp`.
    pub shared_expert_intermediate_size: Option<usize>,
    /// Decoder layers: at least `pp·vpp`.
    pub num_hidden_layers: Option<usize>,
    /// Tokens of a sequence: a multiple of `2·cp` if `cp > 1` (zig-zag chunks), and `sequence_length/cp` of `tp`.
    pub sequence_length: Option<usize>,
    /// Sequences of a step: a multiple of `micro_batch_size·dp`.
    pub global_batch_size: Option<usize>,
    /// Sequences of a micro-batch.
    pub micro_batch_size: usize,
}

impl Default for Constraints {
    /// Nothing is asked.
    fn default() -> Self {
        let any = 1..=usize::MAX;
        Self {
            tp: any.clone(),
            cp: any.clone(),
            pp: any.clone(),
            ep: any.clone(),
            etp: any,
            vpp: 1,
            cp_ulysses: 1,
            num_attention_heads: None,
            num_key_value_heads: None,
            num_experts: None,
            moe_intermediate_size: None,
            intermediate_size: None,
            shared_expert_intermediate_size: None,
            num_hidden_layers: None,
            sequence_length: None,
            global_batch_size: None,
            micro_batch_size: 1,
        }
    }
}

impl Constraints {
    /// Folds the world as the mapping says, if that is legal for this model and batch too.
    ///
    /// # Errors
    /// [`Error::Illegal`] with the equation, the values and the nearest mappings that are legal here.
    pub fn fold(&self, mapping: Mapping) -> Result<Folding, Error> {
        Folding::build(mapping.clone())
            .and_then(|folding| self.check(&folding).map(|()| folding))
            .map_err(|rule| Error::Illegal { rule, nearest: Box::new(Nearest::new(mapping, self)) })
    }

    /// Says which rule a folding breaks.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn check(&self, folding: &Folding) -> Result<(), Rule> {
        let &Mapping { tp, cp, pp, ep, etp, .. } = folding.mapping();
        self.check_pipeline(pp)?;
        self.check_attention(tp, cp, folding.size(Attention::DP))?;
        self.check_expert(etp, ep)
    }

    pub(crate) fn check_pipeline(&self, pp: usize) -> Result<(), Rule> {
        inside("pp", pp, &self.pp)?;
        match self.vpp {
            0 => return Err(Rule::Zero { name: "vpp" }),
            2.. if pp == 1 => return Err(Rule::Interleaved { vpp: self.vpp }),
            _ => {}
        }
        let least = Product::new(&[("pp", pp), ("vpp", self.vpp)]);
        match self.num_hidden_layers {
            Some(value) if least.value().is_none_or(|least| value < least) => {
                Err(Rule::AtLeast { name: "num_hidden_layers", value, least })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn check_attention(&self, tp: usize, cp: usize, dp: usize) -> Result<(), Rule> {
        inside("tp", tp, &self.tp)?;
        inside("cp", cp, &self.cp)?;
        if self.cp_ulysses == 0 {
            return Err(Rule::Zero { name: "cp_ulysses" });
        }
        let mut by_head = vec![("tp", tp)];
        self.check_heads(&by_head)?;
        if self.cp_ulysses > 1 {
            multiple("cp", Some(cp), &[("cp_ulysses", self.cp_ulysses)])?;
            by_head.push(("cp_ulysses", self.cp_ulysses));
            self.check_heads(&by_head)?;
        }
        multiple("intermediate_size", self.intermediate_size, &[("tp", tp)])?;
        let shared = self.shared_expert_intermediate_size;
        multiple("shared_expert_intermediate_size", shared, &[("tp", tp)])?;
        if cp > 1 {
            multiple("sequence_length", self.sequence_length, &[("2", 2), ("cp", cp)])?;
        }
        multiple("sequence_length", self.sequence_length, &[("cp", cp), ("tp", tp)])?;
        if self.micro_batch_size == 0 {
            return Err(Rule::Zero { name: "micro_batch_size" });
        }
        multiple(
            "global_batch_size",
            self.global_batch_size,
            &[("micro_batch_size", self.micro_batch_size), ("dp", dp)],
        )
    }

    /// Heads are cut over the product of `factors`.
    fn check_heads(&self, factors: &[(&'static str, usize)]) -> Result<(), Rule> {
        multiple("num_attention_heads", self.num_attention_heads, factors)?;
        let of = Product::new(factors);
        match (self.num_key_value_heads, of.value()) {
            (Some(0), _) => Err(Rule::Zero { name: "num_key_value_heads" }),
            (Some(heads), Some(ranks)) if heads % ranks != 0 && !ranks.is_multiple_of(heads) => {
                Err(Rule::KeyValueHeads { num_key_value_heads: heads, of })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn check_expert(&self, etp: usize, ep: usize) -> Result<(), Rule> {
        inside("etp", etp, &self.etp)?;
        inside("ep", ep, &self.ep)?;
        multiple("num_experts", self.num_experts, &[("ep", ep)])?;
        multiple("moe_intermediate_size", self.moe_intermediate_size, &[("etp", etp)])
    }
}

fn inside(name: &'static str, size: usize, allowed: &RangeInclusive<usize>) -> Result<(), Rule> {
    if allowed.contains(&size) {
        return Ok(());
    }
    Err(Rule::Outside { name, size, allowed: allowed.clone() })
}

/// `value` is not 0 and a multiple of the product of `factors`, none of which is 0.
fn multiple(name: &'static str, value: Option<usize>, factors: &[(&'static str, usize)]) -> Result<(), Rule> {
    let of = Product::new(factors);
    match (value, of.value()) {
        (None, _) => Ok(()),
        (Some(0), _) => Err(Rule::Zero { name }),
        (Some(value), Some(product)) if value.is_multiple_of(product) => Ok(()),
        (Some(value), _) => Err(Rule::Multiple { name, value, of }),
    }
}
