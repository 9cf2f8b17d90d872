//! Parameter groups: which tensors learn at which rate, and which do not.

use std::collections::BTreeMap;

use glob::{Pattern, PatternError};
use serde::{Deserialize, Serialize};

/// Names that an error lists.
const NEAREST: usize = 3;

/// What holds for the tensors whose hub names match a pattern. A tensor belongs to the first group that matches it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParamGroup {
    /// The names: `*` is any text, `?` one character, `[…]` one of some.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Multiplies the learning rate; 1 unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_scale: Option<f64>,
    /// Decay of matrices in place of the common one. Vectors never decay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Never updated, and no part of the gradient norm.
    #[serde(default)]
    pub frozen: bool,
}

/// What an update of one tensor takes from its group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TensorHyper {
    /// Multiplies the learning rate.
    pub lr_scale: f64,
    /// Decoupled weight decay; 0 for vectors.
    pub weight_decay: f64,
    /// Never updated.
    pub frozen: bool,
}

/// A logical tensor, as groups see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorName {
    /// The hub's name.
    pub name: String,
    /// Whether it is a vector, which does not decay.
    pub vector: bool,
}

/// Why groups were refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError {
    /// The pattern is malformed.
    #[error("match = \"{pattern}\" is no pattern: {message}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        message: String,
    },
    /// No tensor matches.
    #[error("match = \"{pattern}\" matches no tensor; the nearest are {}", nearest.join(", "))]
    NoMatch {
        /// The pattern.
        pattern: String,
        /// Names that exist, numbers in them as `*`.
        nearest: Vec<String>,
    },
    /// Earlier groups have all that matches.
    #[error(
        "match = \"{pattern}\" gets no tensor: the first group that matches wins, and all that match this one, such as \
         {name}, belong to earlier groups: move it before them"
    )]
    Taken {
        /// The pattern.
        pattern: String,
        /// One of them.
        name: String,
    },
    /// A number is out of range, or has no meaning.
    #[error("match = \"{pattern}\": {what}")]
    Setting {
        /// The pattern.
        pattern: String,
        /// The setting, its value, and what it must be.
        what: String,
    },
    /// A tensor that the model does not have.
    #[error("{name} is no tensor of the model that the groups were made for")]
    Unknown {
        /// Its name.
        name: String,
    },
    /// Nothing is left to train.
    #[error("all tensors are frozen: there is nothing to train")]
    AllFrozen,
}

/// The groups of a model's tensors, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamGroups(BTreeMap<String, TensorHyper>);

impl ParamGroups {
    /// What holds for each of `tensors` (all of the model's) under `groups`; matrices that no group names decay by
    /// `weight_decay`.
    ///
    /// # Errors
    /// A pattern is malformed, or gets no tensor; a number is out of range, or has no meaning for what it matches; all
    /// tensors are frozen.
    pub fn new(groups: &[ParamGroup], weight_decay: f64, tensors: &[TensorName]) -> Result<Self, GroupError> {
        let mut resolved = BTreeMap::new();
        for group in groups {
            let pattern = || group.pattern.clone();
            let glob = Pattern::new(&group.pattern).map_err(|error: PatternError| GroupError::Pattern {
                pattern: pattern(),
                message: error.msg.to_owned(),
            })?;
            let all: Vec<&TensorName> = tensors.iter().filter(|tensor| glob.matches(&tensor.name)).collect();
            let Some(first) = all.first() else {
                return Err(GroupError::NoMatch {
                    pattern: pattern(),
                    nearest: nearest(&group.pattern, tensors),
                });
            };
            let own: Vec<&TensorName> =
                all.iter().copied().filter(|tensor| !resolved.contains_key(&tensor.name)).collect();
            if own.is_empty() {
                return Err(GroupError::Taken { pattern: pattern(), name: first.name.clone() });
            }
            if let Some(what) = group.fault(own.iter().all(|tensor| tensor.vector)) {
                return Err(GroupError::Setting { pattern: pattern(), what });
            }
            resolved.extend(
                own.into_iter().map(|tensor| (tensor.name.clone(), group.hyper(tensor, weight_decay))),
            );
        }
        let common = ParamGroup { pattern: String::new(), lr_scale: None, weight_decay: None, frozen: false };
        for tensor in tensors {
            resolved.entry(tensor.name.clone()).or_insert_with(|| common.hyper(tensor, weight_decay));
        }
        match resolved.values().all(|hyper| hyper.frozen) {
            true => Err(GroupError::AllFrozen),
            false => Ok(ParamGroups(resolved)),
        }
    }

    /// What holds for a tensor.
    ///
    /// # Errors
    /// The model has no such tensor.
    pub fn of(&self, name: &str) -> Result<TensorHyper, GroupError> {
        self.0.get(name).copied().ok_or_else(|| GroupError::Unknown { name: name.to_owned() })
    }

    /// The names of the tensors that are not frozen.
    pub fn trained(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter(|(_, hyper)| !hyper.frozen).map(|(name, _)| name.as_str())
    }
}

impl ParamGroup {
    fn hyper(&self, tensor: &TensorName, weight_decay: f64) -> TensorHyper {
        TensorHyper {
            lr_scale: self.lr_scale.unwrap_or(1.0),
            weight_decay: if tensor.vector { 0.0 } else { self.weight_decay.unwrap_or(weight_decay) },
            frozen: self.frozen,
        }
    }

    /// What is wrong with its numbers.
    fn fault(&self, only_vectors: bool) -> Option<String> {
        let settings = [("lr_scale", self.lr_scale), ("weight_decay", self.weight_decay)];
        let given = || settings.iter().filter_map(|&(name, value)| Some((name, value?)));
        if let Some((name, value)) = given().find(|(_, value)| !(0.0..=f64::MAX).contains(value)) {
            return Some(format!("{name} = {value}, but it must be finite and at least 0"));
        }
        if let Some((name, value)) = given().next().filter(|_| self.frozen) {
            return Some(format!("{name} = {value} has no meaning with frozen = true: remove it"));
        }
        match self.weight_decay {
            Some(value) if only_vectors => Some(format!(
                "weight_decay = {value} has no meaning: only vectors match, and they never decay"
            )),
            _ => None,
        }
    }
}

/// The names most like `pattern`, with `*` for numbers, so that layers and experts do not crowd out other tensors.
fn nearest(pattern: &str, tensors: &[TensorName]) -> Vec<String> {
    let collapse = |name: &str| {
        let number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        name.split('.').map(|part| if number(part) { "*" } else { part }).collect::<Vec<_>>().join(".")
    };
    let mut names: Vec<String> = tensors.iter().map(|tensor| collapse(&tensor.name)).collect();
    names.sort();
    names.dedup();
    names.sort_by_cached_key(|name| strsim::damerau_levenshtein(&collapse(pattern), name));
    names.truncate(NEAREST);
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> Vec<TensorName> {
        let names =
            ["embed_tokens.weight", "norm.weight", "layers.0.q_proj.weight", "layers.0.experts.1.w1.weight"];
        let more = ["layers.0.experts.10.w1.weight", "layers.1.experts.1.w1.weight", "lm_head.weight"];
        let names = names.into_iter().chain(more);
        names.map(|name| TensorName { name: name.into(), vector: name == "norm.weight" }).collect()
    }

    fn group(text: &str) -> ParamGroup {
        toml::from_str(text).unwrap()
    }

    fn refusal(groups: &[&str]) -> String {
        let groups: Vec<ParamGroup> = groups.iter().map(|text| group(text)).collect();
        ParamGroups::new(&groups, 0.1, &tensors()).unwrap_err().to_string()
    }

    #[test]
    fn the_first_match_wins_and_the_rest_is_common() {
        let groups = [
            group("match = '*.experts.1.*'\nlr_scale = 2.0"),
            group("match = '*.experts.*'\nweight_decay = 0.5"),
            group("match = '*norm*'\nlr_scale = 3"),
            group("match = 'e*'\nfrozen = true"),
        ];
        let groups = ParamGroups::new(&groups, 0.1, &tensors()).unwrap();
        let hyper = |lr_scale, weight_decay, frozen| TensorHyper { lr_scale, weight_decay, frozen };
        for (name, expected) in [
            ("layers.0.experts.1.w1.weight", hyper(2.0, 0.1, false)),
            ("layers.1.experts.1.w1.weight", hyper(2.0, 0.1, false)),
            ("layers.0.experts.10.w1.weight", hyper(1.0, 0.5, false)),
            ("norm.weight", hyper(3.0, 0.0, false)),
            ("embed_tokens.weight", hyper(1.0, 0.1, true)),
            ("lm_head.weight", hyper(1.0, 0.1, false)),
        ] {
            assert_eq!(groups.of(name).unwrap(), expected, "{name}");
        }
        assert!(groups.of("bias").unwrap_err().to_string().starts_with("bias is no tensor"));
        assert_eq!(groups.trained().count(), tensors().len() - 1);
    }

    #[test]
    fn what_matches_nothing_gets_the_nearest_names() {
        assert_eq!(
            refusal(&["match = 'layers.3.experts.*.w1.wight'\nfrozen = true"]),
            "match = \"layers.3.experts.*.w1.wight\" matches no tensor; the nearest are layers.*.experts.*.w1.weight, \
             layers.*.q_proj.weight, embed_tokens.weight"
        );
        assert_eq!(
            refusal(&["match = '*'", "match = 'norm*'"]),
            "match = \"norm*\" gets no tensor: the first group that matches wins, and all that match this one, such as \
             norm.weight, belong to earlier groups: move it before them"
        );
    }

    #[test]
    fn senseless_groups_are_refused() {
        for (text, what) in [
            ("match = 'a***b'", "match = \"a***b\" is no pattern: "),
            (
                "match = '*'\nlr_scale = -1",
                "match = \"*\": lr_scale = -1, but it must be finite and at least 0",
            ),
            ("match = '*'\nweight_decay = nan", "match = \"*\": weight_decay = NaN, but"),
            (
                "match = 'lm*'\nlr_scale = 2\nfrozen = true",
                "match = \"lm*\": lr_scale = 2 has no meaning with frozen",
            ),
            (
                "match = 'norm*'\nweight_decay = 0.1",
                "match = \"norm*\": weight_decay = 0.1 has no meaning: only vectors",
            ),
            ("match = '*'\nfrozen = true", "all tensors are frozen: there is nothing to train"),
        ] {
            let said = refusal(&[text]);
            assert!(said.starts_with(what), "{said}");
        }
    }
}
