//! The tokens that end a text, where the model says so.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::InferError;
use crate::Result;
use crate::checkpoint::{HubOrigin, Weights};
use crate::data::{DataError, Tokenizer};
use crate::durable::Context;

/// The generation settings of a folder of the hub.
const GENERATION_CONFIG: &str = "generation_config.json";

/// The tokens before which the model of `weights` ends a text: the `eos_token_id` of its `generation_config.json`, else of its
/// `config.json`; and the one that ended the documents of the run that trained it. Where `tokenizer` cannot tell the latter,
/// `warn` is told: of a blend it may be among several, and another tokenizer than the run's may not have it.
///
/// # Errors
/// A file is malformed.
pub fn stop_tokens(weights: &Weights, tokenizer: &Tokenizer, warn: &mut dyn FnMut(&str)) -> Result<Vec<u32>> {
    let meta = weights.meta();
    let mut tokens = Vec::new();
    if let Some(HubOrigin { config, .. }) = &meta.hub {
        let settings = weights.side_files().map(|folder| folder.join(GENERATION_CONFIG));
        let own = match settings.filter(|path| path.is_file()) {
            Some(path) => eos_token_id(&read(&path)?, &path)?,
            None => None,
        };
        tokens = match own {
            Some(tokens) => tokens,
            None => eos_token_id(config, &weights.path().join("config.json"))?.unwrap_or_default(),
        };
    }
    if let Some(run) = &meta.run {
        match tokenizer.eos_token(run.config.data.eos_token.as_ref()) {
            Ok(end) => tokens.extend(end.map(|end| end.id)),
            Err(DataError::EosToken { what }) => warn(&format!(
                "it is not known which token ended the documents of the run: the tokenizer {what}; a text ends before it if \
                 --stop names it"
            )),
            Err(error) => return Err(error.into()),
        }
    }
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens)
}

fn read(path: &Path) -> Result<Value> {
    let text = fs::read(path).context("read", path)?;
    let malformed = |error: serde_json::Error| crate::Error::HubConfigFile {
        path: path.to_owned(),
        what: format!("is malformed: {error}"),
    };
    serde_json::from_slice(&text).map_err(malformed)
}

/// `eos_token_id`: a token or a list of tokens; none if there is no such key, or null.
fn eos_token_id(config: &Value, path: &Path) -> Result<Option<Vec<u32>>> {
    let token = |value: &Value| value.as_u64().and_then(|token| u32::try_from(token).ok());
    let tokens = match config.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) => list.iter().map(token).collect(),
        Some(value) => token(value).map(|token| vec![token]),
    };
    let refuse =
        || InferError::EosTokenId { path: PathBuf::from(path), value: config["eos_token_id"].to_string() };
    Ok(Some(tokens.ok_or_else(refuse)?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_token_several_or_none() {
        let of = |value| eos_token_id(&json!({ "eos_token_id": value }), "config.json".as_ref());
        assert_eq!(of(json!(2)).unwrap(), Some(vec![2]));
        assert_eq!(of(json!([7, 2])).unwrap(), Some(vec![7, 2]));
        assert_eq!(of(json!(null)).unwrap(), None);
        assert_eq!(eos_token_id(&json!({}), "config.json".as_ref()).unwrap(), None);
        for other in [json!("</s>"), json!(-1), json!([1, -1]), json!(1u64 << 32), json!(1.5)] {
            let error = of(other).unwrap_err().to_string();
            assert!(error.contains("config.json: eos_token_id is"), "{error}");
        }
    }
}
