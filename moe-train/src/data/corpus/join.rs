//! Parts become one file.

use std::ops::ControlFlow;

use super::super::{DataError, TokenFile};
use super::Corpus;
use super::encode::Encoding;
use super::parts::remove_leftovers;
use super::progress::{Progress, Stage};

/// Writes the documents of all parts that have tokens, in order.
pub(super) fn join(
    corpus: &Corpus,
    encoding: &Encoding<'_>,
    watch: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<(), DataError> {
    let prepared = encoding.prepared();
    if prepared.documents == 0 {
        return Err(DataError::NoText { empty: prepared.empty_documents });
    }
    remove_leftovers(&corpus.out)?;
    let mut writer = corpus.format.create(&corpus.out, corpus.encoder.vocab_size())?;
    for i in 0..prepared.parts {
        let part = TokenFile::open(&encoding.parts.path(i))?;
        for document in 0..part.documents() {
            let range = part.document(document)?;
            if !range.is_empty() {
                writer.document(&part.tokens(range)?)?;
            }
        }
        if watch(&encoding.progress(Stage::Join, i + 1)).is_break() {
            return Err(DataError::Interrupted { done: prepared.parts, of: prepared.parts });
        }
    }
    writer.finish()
}
