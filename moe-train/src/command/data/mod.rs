//! `moe-train data`.

mod prepare;

use std::path::PathBuf;

use clap::Subcommand;

use crate::Result;
use crate::data::{DocumentFormat, Tokenizer, TokenizerKind, Tokens, Verified, import_nanogpt};

/// Make tokens to train on, and look into them.
#[derive(Debug, Subcommand)]
pub enum Data {
    Prepare(prepare::Prepare),
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
        #[arg(long, value_enum, default_value_t = DocumentFormat::Tokens)]
        format: DocumentFormat,
    },
    /// Say what is in a file of documents, or in one of its documents.
    Inspect {
        /// A token file, or the prefix of a Megatron dataset.
        path: PathBuf,
        /// Print the tokens of this document, from 0.
        #[arg(long, value_name = "NUMBER")]
        document: Option<u64>,
        /// Print its text: `byte`, a tokenizer.json or a folder that has one.
        #[arg(long, value_name = "TOKENIZER", requires = "document")]
        tokenizer: Option<PathBuf>,
    },
    /// Read every byte of files of documents, and compare checksums where there are any.
    Verify {
        /// Token files, or prefixes of Megatron datasets.
        #[arg(required = true)]
        paths: Vec<PathBuf>,
    },
}

impl Data {
    pub fn run(self) -> Result<()> {
        match self {
            Data::Prepare(command) => command.run(),
            Data::ImportNanogpt { files, out, eot, vocab_size, format } => {
                let mut writer = format.create(&out, vocab_size)?;
                let imported = import_nanogpt(&files, eot, &mut *writer)?;
                writer.finish()?;
                println!("{} documents, {} tokens: {}", imported.documents, imported.tokens, out.display());
                Ok(())
            }
            Data::Inspect { path, document, tokenizer } => {
                let tokens = Tokens::open(&path)?;
                match document {
                    None => summarise(&tokens),
                    Some(document) => show(&tokens, document, tokenizer)?,
                }
                Ok(())
            }
            Data::Verify { paths } => verify(paths),
        }
    }
}

fn summarise(tokens: &Tokens) {
    let kind = match tokens {
        Tokens::File(_) => "token file".to_owned(),
        Tokens::Megatron(file) => {
            format!("Megatron dataset of {:?}, {} sequences", file.dtype(), file.sequences())
        }
    };
    let vocabulary = tokens.vocab_size().map_or("not recorded".to_owned(), |size| size.to_string());
    println!("{}: {kind}", tokens.path().display());
    println!("{} tokens in {} documents", tokens.len(), tokens.documents());
    println!("vocabulary {vocabulary}");
    if tokens.is_masked() {
        println!("a mask says which tokens are learnt");
    }
}

/// The tokens of a document, those that are not learnt in brackets, or its text.
fn show(tokens: &Tokens, document: u64, tokenizer: Option<PathBuf>) -> Result<()> {
    let range = tokens.document(document)?;
    let ids = tokens.tokens(range.clone())?;
    if let Some(tokenizer) = tokenizer {
        println!("{}", Tokenizer::open(&TokenizerKind::from(tokenizer))?.decode(&ids, false)?);
        return Ok(());
    }
    let learnt = tokens.mask(range)?;
    let ids = ids.iter().zip(learnt).map(|(id, learnt)| match learnt {
        true => id.to_string(),
        false => format!("[{id}]"),
    });
    println!("{}", ids.collect::<Vec<_>>().join(" "));
    Ok(())
}

/// Reports every fault; the first one is the error.
fn verify(paths: Vec<PathBuf>) -> Result<()> {
    let mut first = None;
    for path in paths {
        match Tokens::open(&path).and_then(|tokens| tokens.verify()) {
            Ok(Verified::Checksums) => println!("{}: whole", path.display()),
            Ok(Verified::StructureOnly) => {
                println!("{}: well formed; it has no checksums to compare with", path.display());
            }
            Err(fault) => {
                eprintln!("{fault}");
                first.get_or_insert(fault);
            }
        }
    }
    first.map_or(Ok(()), |fault| Err(fault.into()))
}
