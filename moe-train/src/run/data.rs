//! The text of a run.

use std::fs;
use std::path::Path;

use super::RunFolder;
use crate::Result;
use crate::config::{DataFormat, RunConfig, TokenizerKind};
use crate::data::{
    ByteTokenizer, Dataset, Sampler, Tokens, find_files, prepare, prepare_completions, unigram_entropy,
};
use crate::durable::Context;
use crate::trainer::{BatchSource, Sequence};

/// What a run trains on and is measured on.
pub(super) struct RunData {
    pub train: TextSource,
    pub held_out: HeldOut,
    pub unigram_entropy: f64,
}

/// Tokenises the text into the run's folder. A run that goes on uses what is there: its samples must not change when files
/// do.
pub(super) fn open(config: &RunConfig, folder: &RunFolder, resume: bool) -> Result<RunData> {
    if !resume {
        let TokenizerKind::Byte = config.data.tokenizer;
        let files = find_files(&config.data.files)?;
        folder.create_data()?;
        for stale in [folder.train_tokens(), folder.held_out_tokens()] {
            // Left by a run that ended before its first step.
            if stale.exists() {
                fs::remove_file(&stale).context("remove", &stale)?;
            }
        }
        let (share, seed) = (config.data.held_out, config.train.seed);
        let (train, held_out) = (folder.train_tokens(), folder.held_out_tokens());
        let prepared = match config.data.format {
            DataFormat::Text => prepare(&files, ByteTokenizer, share, seed, &train, &held_out)?,
            DataFormat::PromptCompletion => {
                let length = config.train.sequence_length;
                prepare_completions(&files, ByteTokenizer, length, share, seed, [&train, &held_out])?
            }
        };
        println!(
            "{} files: {} tokens to train on, {} held out ({} of {} documents)",
            files.len(),
            prepared.train_tokens,
            prepared.held_out_tokens,
            prepared.held_out_documents,
            prepared.held_out_documents + prepared.train_documents,
        );
    }
    let tokens = Tokens::open(&folder.train_tokens())?;
    tokens.verify()?;
    let train = Samples::new(tokens, config)?;
    let batch_sizes = config.train.batch_sizes()?;
    let sampler =
        Sampler::new(config.train.seed, train.dataset.len(), batch_sizes, config.train.micro_batch_size);
    let held_out = open_held_out(config, &folder.held_out_tokens())?;
    let unigram_entropy = unigram_entropy(held_out.samples.dataset.tokens())?;
    Ok(RunData { train: TextSource { samples: train, sampler }, held_out, unigram_entropy })
}

/// The held-out tokens of a run.
///
/// # Errors
/// The file is damaged or too short.
pub fn open_held_out(config: &RunConfig, path: &Path) -> Result<HeldOut> {
    let tokens = Tokens::open(path)?;
    tokens.verify()?;
    Ok(HeldOut {
        samples: Samples::new(tokens, config)?,
        global_batch_size: config.train.global_batch_size,
        micro_batch_size: config.train.micro_batch_size,
        batches: config.train.eval_batches,
    })
}

/// The samples of a token file as sequences.
#[derive(Debug)]
struct Samples {
    dataset: Dataset,
    separate_documents: bool,
}

impl Samples {
    fn new(tokens: Tokens, config: &RunConfig) -> Result<Self> {
        let (vocab_size, length) = (config.model.vocab_size, config.train.sequence_length);
        let dataset = match config.data.format {
            DataFormat::Text => Dataset::new(tokens, vocab_size, length)?,
            DataFormat::PromptCompletion => Dataset::packed(tokens, vocab_size, length)?,
        };
        Ok(Samples { dataset, separate_documents: config.data.separates_documents() })
    }

    fn sequence(&self, i: u64) -> Result<Sequence> {
        let (mut tokens, mask) = (self.dataset.sample(i)?, self.dataset.mask(i)?);
        let length = self.dataset.sequence_length();
        let padding = (length + 1).saturating_sub(tokens.len());
        tokens.resize(length + 1, 0);
        let mut weights: Vec<f64> = mask.iter().skip(1).map(|&learnt| f64::from(u8::from(learnt))).collect();
        weights.resize(length, 0.0);
        let sequence = Sequence::new(tokens, weights).padded(padding);
        Ok(match self.separate_documents {
            true => sequence.separated(self.dataset.document_starts(i)?),
            false => sequence,
        })
    }
}

/// Samples in the order that the seed and the global index give.
#[derive(Debug)]
pub struct TextSource {
    samples: Samples,
    sampler: Sampler,
}

impl TextSource {
    /// The samples of a step, as [`Dataset`] counts them in `data/train.tokens`.
    pub fn samples(&self, step: u64) -> Vec<u64> {
        (self.sampler.cursor(step)..self.sampler.cursor(step + 1)).map(|g| self.sampler.sample(g)).collect()
    }

    /// The global index of the first sample after `step` steps.
    pub fn cursor_after(&self, step: u64) -> u64 {
        self.sampler.cursor(step + 1)
    }
}

impl BatchSource for TextSource {
    fn micro_batch(&self, step: u64, u: usize) -> Result<Vec<Sequence>> {
        let samples = self.sampler.micro_batch(step, u);
        samples.map(|i| self.samples.sequence(i)).collect()
    }
}

/// Held-out samples in file order, at most a number of batches; the last batch is filled with padding.
#[derive(Debug)]
pub struct HeldOut {
    samples: Samples,
    global_batch_size: usize,
    micro_batch_size: usize,
    batches: usize,
}

impl HeldOut {
    /// Micro-batches over all data-parallel ranks, a multiple of those of a training step.
    pub fn micro_batches(&self) -> usize {
        let whole = usize::try_from(self.samples.dataset.len())
            .unwrap_or(usize::MAX)
            .div_ceil(self.global_batch_size);
        whole.min(self.batches) * (self.global_batch_size / self.micro_batch_size)
    }

    /// Micro-batch `u`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn micro_batch(&self, u: usize) -> Result<Vec<Sequence>> {
        let first = (u * self.micro_batch_size) as u64;
        (first..first + self.micro_batch_size as u64)
            .map(|i| {
                if i < self.samples.dataset.len() {
                    return self.samples.sequence(i);
                }
                let length = self.samples.dataset.sequence_length();
                Ok(Sequence::unweighted(vec![0; length + 1]).padded(length))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::TokenFileWriter;

    /// Documents of 4, 3 and 5 tokens in sequences of up to 8, and a batch of two sequences more.
    #[test]
    fn completions_are_packed_masked_and_padded() {
        let config = RunConfig::parse(
            "
            [model]
            vocab_size = 256
            hidden_size = 8
            intermediate_size = 4
            num_hidden_layers = 1
            num_attention_heads = 2
            num_key_value_heads = 2
            num_local_experts = 2
            num_experts_per_tok = 1
            [train]
            steps = 1
            global_batch_size = 4
            micro_batch_size = 2
            sequence_length = 7
            output = 'unused'
            [data]
            format = 'prompt-completion'
            files = ['unused']
            ",
            "a test",
            &[] as &[&str],
        )
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let mut writer = TokenFileWriter::create(&path, 256).unwrap();
        for (prompt, completion) in [(&[1, 2][..], &[3, 4][..]), (&[5], &[6, 7]), (&[8, 8, 8], &[9, 9])] {
            writer.completion(prompt, completion).unwrap();
        }
        writer.finish().unwrap();
        let held_out = open_held_out(&config, &path).unwrap();
        assert_eq!(held_out.micro_batches(), 2);
        let [first, second] = held_out.micro_batch(0).unwrap().try_into().unwrap();
        assert_eq!(first.tokens, [1, 2, 3, 4, 5, 6, 7, 0]);
        assert_eq!(first.weights, [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]);
        assert_eq!((first.documents, first.padding), (vec![4], 1));
        assert_eq!(second.tokens, [8, 8, 8, 9, 9, 0, 0, 0]);
        assert_eq!(second.weights, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
        assert_eq!((second.documents, second.padding), (vec![], 3));
        assert!(held_out.micro_batch(1).unwrap().iter().all(|sequence| sequence.padding == 7));
    }
}
