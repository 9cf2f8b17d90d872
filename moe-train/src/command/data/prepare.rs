//! `moe-train data prepare`.

use std::io::{IsTerminal, Stderr, Write, stderr};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;

use crate::Result;
use crate::data::{Corpus, DocumentFormat, Encoder, EosToken, InputFormat, Progress, Stage, TokenizerKind};
use crate::metrics::{duration, short};

/// Make tokens of text, JSON lines and Parquet. Killed, it goes on when it is called again.
#[derive(Debug, Args)]
pub struct Prepare {
    /// Files, in the order of their documents. What is in them their names say: .txt and .md are text, a document each (cut where it
    /// is longer than 64 KiB); .jsonl, .ndjson and .json are JSON objects, one a line; .parquet has columns.
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// How text becomes tokens: `byte`, a tokenizer.json or a folder that has one.
    #[arg(long)]
    tokenizer: PathBuf,
    /// The file to make; of a Megatron dataset the prefix.
    #[arg(long)]
    out: PathBuf,
    /// What to make.
    #[arg(long, value_enum, default_value_t = DocumentFormat::Tokens)]
    format: DocumentFormat,
    /// What the inputs are, whatever their names.
    #[arg(long, value_enum)]
    input_format: Option<InputFormat>,
    /// The field of JSON lines, or the column of Parquet, that has the text.
    #[arg(long, default_value = "text", value_name = "NAME")]
    field: String,
    /// The token that ends each document: its number, as it is written, or `none`; what the tokenizer says unless given.
    #[arg(long, value_name = "TOKEN")]
    eos: Option<EosToken>,
    /// Threads that encode; as many as there are processors unless given. The result does not depend on it.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
}

impl Prepare {
    pub fn run(self) -> Result<()> {
        let encoder = Encoder::open(&TokenizerKind::from(self.tokenizer), self.eos.as_ref())?;
        if let Some(eos) = encoder.eos() {
            println!("documents end with {eos}");
        }
        let corpus = Corpus::new(self.inputs, encoder, self.out);
        let corpus = Corpus {
            input_format: self.input_format,
            field: self.field,
            format: self.format,
            threads: self.threads.map_or(corpus.threads, usize::from),
            ..corpus
        };
        let mut line = Line::new();
        let prepared = corpus.prepare(&mut |progress| {
            line.show(progress);
            ControlFlow::Continue(())
        });
        line.end();
        let prepared = prepared?;
        if prepared.kept_parts > 0 {
            println!("{} of {} parts were there from before", prepared.kept_parts, prepared.parts);
        }
        if prepared.damaged_parts > 0 {
            println!("{} parts were damaged and were made again", prepared.damaged_parts);
        }
        if prepared.empty_documents > 0 {
            println!("{} empty documents were passed over", prepared.empty_documents);
        }
        println!("{} documents, {} tokens: {}", prepared.documents, prepared.tokens, corpus.out.display());
        Ok(())
    }
}

/// On a terminal a line that is rewritten, elsewhere one every ten seconds. What cannot be shown is not worth an error.
struct Line {
    out: Stderr,
    terminal: bool,
    start: Instant,
    /// When it was shown last.
    last: Option<Instant>,
}

impl Line {
    const INTERVAL: Duration = Duration::from_secs(10);

    fn new() -> Self {
        Line { out: stderr(), terminal: stderr().is_terminal(), start: Instant::now(), last: None }
    }

    fn show(&mut self, progress: &Progress) {
        let text = describe(progress, self.start.elapsed().as_secs_f64());
        let _ = match self.terminal {
            true => write!(self.out, "\r{text}\x1b[K"),
            false if self.last.unwrap_or(self.start).elapsed() < Self::INTERVAL => return,
            false => writeln!(self.out, "{text}"),
        };
        self.last = Some(Instant::now());
    }

    fn end(&mut self) {
        if self.terminal && self.last.is_some() {
            let _ = writeln!(self.out);
        }
    }
}

/// How far it is, `seconds` after the start.
fn describe(progress: &Progress, seconds: f64) -> String {
    let Progress { stage, parts, all_parts, documents, tokens, bytes, kept_bytes, all_bytes } = *progress;
    if stage == Stage::Join {
        return format!("{parts}/{all_parts} parts joined");
    }
    let rate = bytes.saturating_sub(kept_bytes) as f64 / seconds;
    let left = all_bytes.saturating_sub(bytes) as f64;
    format!(
        "{parts}/{all_parts} parts  {} documents  {} tokens  {:.1} MB/s  ETA {}",
        short(documents as f64),
        short(tokens as f64),
        rate / 1e6,
        duration(left / rate)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_from_before_is_no_speed() {
        let progress = Progress {
            stage: Stage::Encode,
            parts: 3,
            all_parts: 10,
            documents: 12_345,
            tokens: 3_400_000,
            bytes: 60_000_000,
            kept_bytes: 20_000_000,
            all_bytes: 200_000_000,
        };
        let line = describe(&progress, 8.0);
        assert_eq!(line, "3/10 parts  12.3k documents  3.40M tokens  5.0 MB/s  ETA 28s");
        let kept = Progress { bytes: 20_000_000, ..progress };
        assert!(describe(&kept, 8.0).ends_with("0.0 MB/s  ETA -"));
        assert_eq!(describe(&Progress { stage: Stage::Join, ..progress }, 8.0), "3/10 parts joined");
    }
}
