//! Rotary embeddings: `rope_parameters` of transformers 5, or `rope_theta` with `rope_scaling` of transformers 4.

use serde_json::{Map, Value};

use super::HubConfigError;
use super::keys::{Keys, agreed};
use crate::config::{RopeScaling, Yarn};

type Result<T> = std::result::Result<T, HubConfigError>;

/// Base and scaling; `default_theta` is the family's.
pub(super) fn read(keys: &mut Keys<'_>, default_theta: f64) -> Result<(f64, Option<RopeScaling>)> {
    let longest = keys.size("max_position_embeddings")?;
    let mut object = |place| keys.object(place)?.map(|map| one(map, place, longest)).transpose();
    let (old, new) = (object("rope_scaling")?, object("rope_parameters")?);
    let theta = agreed(&[
        ("rope_theta", keys.number("rope_theta")?),
        ("rope_scaling.rope_theta", old.and_then(|(theta, _)| theta)),
        ("rope_parameters.rope_theta", new.and_then(|(theta, _)| theta)),
    ])?;
    let scaling = agreed(&[
        ("rope_scaling", old.map(|(_, scaling)| scaling)),
        ("rope_parameters", new.map(|(_, scaling)| scaling)),
    ])?;
    Ok((theta.unwrap_or(default_theta), scaling.flatten()))
}

/// What one object says; `longest` is `max_position_embeddings`.
fn one(
    map: &Map<String, Value>,
    place: &'static str,
    longest: Option<usize>,
) -> Result<(Option<f64>, Option<RopeScaling>)> {
    let mut keys = Keys::new(map);
    let kind = agreed(&[("rope_type", keys.text("rope_type")?), ("type", keys.text("type")?)])?;
    let kind = kind.unwrap_or("default");
    let theta = keys.number("rope_theta")?;
    keys.only("partial_rotary_factor", "all of a head is rotated", |value| value.as_f64() == Some(1.0))?;
    // Zero is as good as unset for these, as in transformers.
    let positive = |number: Option<f64>| number.filter(|&number| number != 0.0);
    let original = keys.size("original_max_position_embeddings")?;
    let scaling = match kind {
        "default" => None,
        "linear" => {
            let factor = keys
                .number("factor")?
                .ok_or(HubConfigError::Missing { key: "factor of rope_type linear" })?;
            Some(RopeScaling::Linear { factor })
        }
        "yarn" => {
            let original = original.or(longest).ok_or(HubConfigError::Missing {
                key: "original_max_position_embeddings of rope_type yarn",
            })?;
            let ratio = longest.map(|longest| longest as f64 / original as f64);
            let factor = keys.number("factor")?.or(ratio);
            Some(RopeScaling::Yarn(Yarn {
                factor: factor.ok_or(HubConfigError::Missing { key: "factor of rope_type yarn" })?,
                original_max_position_embeddings: original,
                beta_fast: positive(keys.number("beta_fast")?).unwrap_or(32.0),
                beta_slow: positive(keys.number("beta_slow")?).unwrap_or(1.0),
                mscale: positive(keys.number("mscale")?),
                mscale_all_dim: positive(keys.number("mscale_all_dim")?),
                attention_factor: keys.number("attention_factor")?,
                truncate: keys.flag("truncate")?.unwrap_or(true),
            }))
        }
        _ => {
            let (key, value) = (format!("{place}.rope_type"), kind.to_owned());
            return Err(HubConfigError::Unsupported { key, value, why: "default, linear and yarn are" });
        }
    };
    if kind == "default" {
        // Written beside it by some versions, and without effect.
        keys.ignore(&["factor"]);
    }
    keys.finish(place)?;
    Ok((theta, scaling))
}
