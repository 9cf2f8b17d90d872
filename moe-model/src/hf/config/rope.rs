//! Rotary embeddings: `rope_parameters` of transformers 5, or `rope_theta` with `rope_scaling` of transformers 4.

use serde_json::{Map, Value};

use super::HubConfigError;
use super::keys::Keys;
use crate::config::{RopeScaling, Yarn};

type Result<T> = std::result::Result<T, HubConfigError>;

/// Base and scaling; `default_theta` is the family's.
pub(super) fn read(keys: &mut Keys<'_>, default_theta: f64) -> Result<(f64, Option<RopeScaling>)> {
    let theta = keys.number("rope_theta")?;
    let longest = keys.size("max_position_embeddings")?;
    let scaling = keys.object("rope_scaling")?.map(|map| one(map, "rope_scaling", longest)).transpose()?;
    let new = keys.object("rope_parameters")?.map(|map| one(map, "rope_parameters", longest)).transpose()?;
    let given = |theta: Option<f64>| theta.map_or("unset".to_owned(), |theta| theta.to_string());
    if let (Some((new_theta, _)), Some(theta)) = (&new, theta)
        && new_theta.is_some_and(|new_theta| new_theta != theta)
    {
        let values = [theta.to_string(), given(*new_theta)];
        return Err(HubConfigError::Spellings { keys: ["rope_theta", "rope_parameters.rope_theta"], values });
    }
    if let (Some((_, new)), Some((_, old))) = (&new, &scaling)
        && new != old
    {
        let values = [format!("{old:?}"), format!("{new:?}")];
        return Err(HubConfigError::Spellings { keys: ["rope_scaling", "rope_parameters"], values });
    }
    let (inner, scaling) = new.or(scaling).unwrap_or((None, None));
    Ok((inner.or(theta).unwrap_or(default_theta), scaling))
}

/// What one object says; `longest` is `max_position_embeddings`.
fn one(
    map: &Map<String, Value>,
    place: &'static str,
    longest: Option<usize>,
) -> Result<(Option<f64>, Option<RopeScaling>)> {
    let mut keys = Keys::new(map);
    let kind = match (keys.text("rope_type")?, keys.text("type")?) {
        (Some(new), Some(old)) if new != old => {
            let values = [new.to_owned(), old.to_owned()];
            return Err(HubConfigError::Spellings { keys: ["rope_type", "type"], values });
        }
        (new, old) => new.or(old).unwrap_or("default"),
    };
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
