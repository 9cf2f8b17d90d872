//! What parts are made of.

use serde::{Deserialize, Serialize};

use super::super::{DataError, DocumentFormat};
use super::Corpus;
use super::input::{Input, InputFormat};
use crate::durable::Context;

/// Of this version of cutting and encoding.
const VERSION: u32 = 1;

/// All that the result depends on, and the size of the parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    version: u32,
    inputs: Vec<Recorded>,
    field: String,
    /// `byte`, or BLAKE3 of the file in hexadecimal.
    tokenizer: String,
    /// The token that ends documents.
    eos: Option<u32>,
    format: DocumentFormat,
    part_bytes: u64,
}

/// A file as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recorded {
    path: String,
    format: InputFormat,
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: u64,
}

impl Manifest {
    /// Of a corpus.
    ///
    /// # Errors
    /// The tokenizer cannot be read any more.
    pub fn new(corpus: &Corpus, inputs: &[Input], part_bytes: u64) -> Result<Self, DataError> {
        let tokenizer = match corpus.encoder.tokenizer().path() {
            None => "byte".to_owned(),
            Some(path) => {
                let bytes = std::fs::read(path).context("read", path)?;
                blake3::hash(&bytes).to_hex().to_string()
            }
        };
        let recorded = |input: &Input| Recorded {
            path: input.path.to_string_lossy().into_owned(),
            format: input.format,
            bytes: input.bytes,
            modified: input.modified,
        };
        Ok(Manifest {
            version: VERSION,
            inputs: inputs.iter().map(recorded).collect(),
            field: corpus.field.clone(),
            tokenizer,
            eos: corpus.encoder.eos().map(|eos| eos.id),
            format: corpus.format,
            part_bytes,
        })
    }

    /// The first thing in which `now` is another; none if it is the same.
    pub fn difference(&self, now: &Self) -> Option<String> {
        let inputs = [&self.inputs, &now.inputs];
        if let Some((then, now)) = inputs[0].iter().zip(inputs[1]).find(|(then, now)| then != now) {
            let path = &then.path;
            return Some(match () {
                () if then.path != now.path => format!("the input {path}, where {} is now", now.path),
                () if then.bytes != now.bytes => {
                    format!("{path} when it had {} bytes; it has {} now", then.bytes, now.bytes)
                }
                () if then.format != now.format => {
                    format!("{path} as {:?}, which is {:?} now", then.format, now.format)
                }
                () => format!("{path} before it was modified"),
            });
        }
        if inputs[0].len() != inputs[1].len() {
            return Some(format!("{} inputs; there are {} now", inputs[0].len(), inputs[1].len()));
        }
        let changed = |what: &str, then: &dyn std::fmt::Debug, now: &dyn std::fmt::Debug| {
            Some(format!("{what} {then:?}, which is {now:?} now"))
        };
        match () {
            () if self.field != now.field => changed("the field", &self.field, &now.field),
            () if self.tokenizer != now.tokenizer => Some("another tokenizer".to_owned()),
            () if self.eos != now.eos => changed("the end of documents", &self.eos, &now.eos),
            () if self.format != now.format => changed("the format", &self.format, &now.format),
            () if self != now => Some("parts of another size or version".to_owned()),
            () => None,
        }
    }
}
