//! Why a `config.json` was refused.

use crate::config::ConfigError;
use crate::hf::Family;

/// Why a `config.json` was refused, or cannot be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HubConfigError {
    /// It is no JSON object.
    #[error("config.json is no object of keys and values")]
    NoObject,
    /// It is of another family.
    #[error("model_type = {found} is not supported: it must be one of {}", Family::ALL.map(Family::model_type).join(", "))]
    Family {
        /// What it says.
        found: String,
    },
    /// A key that must be there is not.
    #[error("{key} is missing")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value of the wrong type.
    #[error("{key} = {value}, but it must be {wanted}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What it must be, in words that follow "must be".
        wanted: &'static str,
    },
    /// A value that would change what is computed.
    #[error("{key} = {value} is not supported: {why}")]
    Unsupported {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What is.
        why: &'static str,
    },
    /// A key that is not known.
    #[error(
        "{key} = {value} is not known in {place}: whether it changes what is computed cannot be said, so it is refused"
    )]
    Unknown {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// Where it stands.
        place: &'static str,
    },
    /// Two spellings of one key that disagree.
    #[error("{} = {} and {} = {} say different things of the same", keys[0], values[0], keys[1], values[1])]
    Spellings {
        /// The spellings.
        keys: [&'static str; 2],
        /// Their values.
        values: [String; 2],
    },
    /// The fields do not fit together.
    #[error(transparent)]
    Model(#[from] ConfigError),
    /// No family has such a model.
    #[error(
        "the model cannot be a {} of the hub, the nearest family: {key} is {here} here and {there} there",
        family.model_type()
    )]
    NoFamily {
        /// The nearest family.
        family: Family,
        /// The first key that differs.
        key: String,
        /// Its value in the model.
        here: String,
        /// Its value in the family.
        there: String,
    },
}
