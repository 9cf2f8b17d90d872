//! From text, JSON lines and Parquet to one file of tokens, in parallel, and resumable.
//!
//! Inputs are cut into *parts* of some megabytes, at places that depend on the inputs alone. Each part is encoded by one thread
//! and kept, complete or absent, as a token file in the folder `OUT.parts`, beside a manifest of what they are made of. When
//! all are there they are joined in order, and the folder is removed. So the result has the same bytes for any number of
//! threads, and after any number of interruptions.
//!
//! Documents are streamed: what is in memory is one document per thread, where the documents of the result start (8 bytes
//! each, 4 in Megatron's format), and where the parts do.

mod encode;
mod input;
mod join;
mod json_lines;
mod manifest;
#[cfg(feature = "parquet")]
mod parquet;
mod parts;
mod plan;
mod progress;
mod source;
mod text;

use std::ops::ControlFlow;
use std::path::PathBuf;

use super::{DataError, DocumentFormat, Encoder};
use encode::Encoding;
use input::Input;
use manifest::Manifest;
use parts::Parts;
use plan::Plan;

pub use input::InputFormat;
pub use progress::{Progress, Stage};

/// What to make tokens of, and how.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::ops::ControlFlow;
///
/// use moe_train::data::{Corpus, Encoder, Tokens, TokenizerKind};
///
/// # let folder = tempfile::tempdir()?;
/// let input = folder.path().join("corpus.jsonl");
/// std::fs::write(&input, "{\"text\": \"one\"}\n{\"text\": \"\"}\n{\"text\": \"two\", \"id\": 3}\n")?;
/// let encoder = Encoder::open(&TokenizerKind::Byte, None)?;
/// let corpus = Corpus::new(vec![input], encoder, folder.path().join("corpus.tokens"));
/// let prepared = corpus.prepare(&mut |_| ControlFlow::Continue(()))?;
/// assert_eq!((prepared.documents, prepared.empty_documents, prepared.tokens), (2, 1, 6));
/// let tokens = Tokens::open(&corpus.out)?;
/// assert_eq!(tokens.tokens(tokens.document(1)?)?, b"two".map(u32::from));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Corpus {
    /// Files, in the order of their documents.
    pub inputs: Vec<PathBuf>,
    /// What all of them are; what their names say unless given.
    pub input_format: Option<InputFormat>,
    /// The field of JSON lines, or the column of Parquet, that has the text.
    pub field: String,
    /// How a document becomes tokens.
    pub encoder: Encoder,
    /// The file to make; of a Megatron dataset the prefix. What is there is replaced.
    pub out: PathBuf,
    /// What to make.
    pub format: DocumentFormat,
    /// Threads that encode.
    pub threads: usize,
    /// Bytes of input in a part, about: a thousandth of all, from 1 to 256 MiB, unless given. The result does not depend on it.
    pub part_bytes: Option<u64>,
}

/// What [`Corpus::prepare`] wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PreparedCorpus {
    /// Documents that have tokens.
    pub documents: u64,
    /// Documents without a text, which were passed over.
    pub empty_documents: u64,
    /// Tokens.
    pub tokens: u64,
    /// Parts there were.
    pub parts: usize,
    /// Those of them that were there from before.
    pub kept_parts: usize,
    /// Those that were there, but damaged, and were made again.
    pub damaged_parts: usize,
}

impl Corpus {
    /// A token file of the field or column `text`, made by all processors.
    pub fn new(inputs: Vec<PathBuf>, encoder: Encoder, out: PathBuf) -> Self {
        Corpus {
            inputs,
            input_format: None,
            field: "text".to_owned(),
            encoder,
            out,
            format: DocumentFormat::Tokens,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            part_bytes: None,
        }
    }

    /// Makes the file, or goes on where an earlier call was interrupted. `watch` is told how far it is, twice a second and after
    /// each part, and may stop it. One call at a time may make a file.
    ///
    /// A text file is a document, or several if it is longer than [`MAX_DOCUMENT_BYTES`](super::MAX_DOCUMENT_BYTES). A line of
    /// JSON or a row of Parquet is one; `null` is an empty one. Empty documents, and those without tokens, are counted and passed over.
    ///
    /// # Errors
    /// An input cannot be read or has another form, by file and byte, line or row (of several faults the first one in the order
    /// of the inputs); inputs or options are not those that the parts that are there were made of; `watch` stopped it; all
    /// documents are empty; a file cannot be written. Complete parts stay, and the next call goes on with them.
    pub fn prepare(
        &self,
        watch: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<PreparedCorpus, DataError> {
        let inputs = Input::open_all(&self.inputs, self.input_format)?;
        let bytes: u64 = inputs.iter().map(|input| input.bytes).sum();
        let part_bytes = self.part_bytes.unwrap_or((bytes / 1024).clamp(1 << 20, 256 << 20)).max(1);
        let plan = Plan::new(&inputs, &self.field, part_bytes)?;
        let parts = Parts::open(&self.out, &Manifest::new(self, &inputs, part_bytes)?)?;
        let encoding = Encoding::new(self, &inputs, &plan, &parts);
        encoding.run(watch)?;
        join::join(self, &encoding, watch)?;
        parts.remove()?;
        Ok(encoding.prepared())
    }
}
