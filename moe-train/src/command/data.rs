//! `moe-train data`.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};

use crate::Result;
use crate::data::{DocumentWriter, MegatronWriter, TokenFileWriter, import_nanogpt};

/// Make tokens to train on.
#[derive(Debug, Subcommand)]
pub enum Data {
    /// Copy the tokens of nanoGPT, llm.c or modded-nanogpt into a file of documents.
    ImportNanogpt {
        /// Files, `.bin`, with or without a header; a document may go on in the next one.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The file to make; of a Megatron dataset the prefix.
        #[arg(long)]
        out: PathBuf,
        /// The token between documents, 50256 of GPT-2: the last one of a document, or the first one where files have a
        /// header. All is one document unless given.
        #[arg(long, value_name = "TOKEN")]
        eot: Option<u32>,
        /// Tokens of the vocabulary.
        #[arg(long, default_value_t = 50257)]
        vocab_size: u32,
        /// What to make.
        #[arg(long, value_enum, default_value_t = Format::Tokens)]
        format: Format,
    },
}

/// The format of a file of documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A token file of this program.
    Tokens,
    /// Megatron's `.bin` and `.idx`.
    Megatron,
}

impl Data {
    pub fn run(self) -> Result<()> {
        match self {
            Data::ImportNanogpt { files, out, eot, vocab_size, format } => {
                let mut writer: Box<dyn DocumentWriter> = match format {
                    Format::Tokens => Box::new(TokenFileWriter::create(&out, vocab_size)?),
                    Format::Megatron => Box::new(MegatronWriter::create(&out, vocab_size)?),
                };
                let imported = import_nanogpt(&files, eot, &mut *writer)?;
                writer.finish()?;
                println!("{} documents, {} tokens: {}", imported.documents, imported.tokens, out.display());
                Ok(())
            }
        }
    }
}
