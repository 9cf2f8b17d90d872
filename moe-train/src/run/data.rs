//! The data of a run.

use std::fs;
use std::path::{Path, PathBuf};

use super::RunFolder;
use crate::Result;
use crate::config::{ConfigError, DataFormat, RunConfig};
use crate::data::{
    Blend, DataError, Dataset, Documents, Encoder, EosToken, Order, Place, Sampler, Tokenizer, Tokens,
    find_files, prepare, prepare_completions, unigram_entropy,
};
use crate::durable::Context;
use crate::trainer::{BatchSource, Sequence};

/// What a run trains on and is measured on.
pub(super) struct RunData {
    pub train: TokenSource,
    /// The sets that are evaluated, each by itself.
    pub held_out: Vec<HeldOut>,
    /// Of held-out text.
    pub unigram_entropy: Option<f64>,
}

/// What the tokens of a new run are made with.
pub(super) struct Made {
    /// Of a blend, what they were made with, for those who continue texts.
    pub tokenizer: Tokenizer,
    /// Of text: the token that documents end with.
    pub eos_token: Option<EosToken>,
}

/// Tokenises the text of a new run into its folder. A run that goes on uses what is there: its samples must not change when files
/// do.
pub(super) fn make(config: &RunConfig, folder: &RunFolder) -> Result<Made> {
    if config.data.blend.is_empty() {
        let encoder = tokenise(config, folder)?;
        let eos_token = encoder.eos().map(|eos| EosToken::Token(eos.token.clone()));
        return Ok(Made { tokenizer: encoder.tokenizer().clone(), eos_token });
    }
    let tokenizer = Tokenizer::open(&config.data.tokenizer)?;
    check_vocabulary(&tokenizer, config)?;
    Ok(Made { tokenizer, eos_token: None })
}

/// Opens what the configuration names, or was made of it.
pub(super) fn open(config: &RunConfig, folder: &RunFolder) -> Result<RunData> {
    match config.data.blend.is_empty() {
        true => open_files(config, folder),
        false => open_blend(config),
    }
}

fn open_files(config: &RunConfig, folder: &RunFolder) -> Result<RunData> {
    let tokens = Tokens::open(&folder.train_tokens())?;
    tokens.verify()?;
    let samples = Samples::new(tokens, config)?;
    let order = Order::Single { seed: config.train.seed, samples: samples.dataset.len() };
    let train = TokenSource::new(vec![samples], order, config)?;
    let held_out = open_held_out(config, &folder.held_out_tokens())?;
    let unigram_entropy = unigram_entropy(held_out.samples.dataset.tokens())?;
    Ok(RunData { train, held_out: vec![held_out], unigram_entropy: Some(unigram_entropy) })
}

fn tokenise(config: &RunConfig, folder: &RunFolder) -> Result<Encoder> {
    let encoder = open_encoder(config)?;
    let files = find_files(&config.data.files)?;
    folder.create_data()?;
    let (train, held_out) = (folder.train_tokens(), folder.held_out_tokens());
    for stale in [&train, &held_out] {
        // Left by a run that ended before its first step.
        if stale.exists() {
            fs::remove_file(stale).context("remove", stale)?;
        }
    }
    // Always there where there are files.
    let (share, seed) = (config.data.held_out.unwrap_or_default(), config.train.seed);
    let prepared = match config.data.format {
        DataFormat::Text => prepare(&files, &encoder, share, seed, &train, &held_out)?,
        DataFormat::PromptCompletion => {
            let length = config.train.sequence_length;
            prepare_completions(&files, &encoder, length, share, seed, [&train, &held_out])?
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
    Ok(encoder)
}

/// How the configuration makes tokens, if the model has them all.
fn open_encoder(config: &RunConfig) -> Result<Encoder> {
    let encoder = Encoder::open(&config.data.tokenizer, config.data.eos_token.as_ref())?;
    check_vocabulary(encoder.tokenizer(), config)?;
    if let Some(eos) = encoder.eos() {
        println!("documents end with {eos}");
    }
    Ok(encoder)
}

/// That the model has a row for every token.
fn check_vocabulary(tokenizer: &Tokenizer, config: &RunConfig) -> Result<()> {
    let (tokens, rows) = (tokenizer.vocab_size(), config.model.vocab_size);
    match tokenizer.path() {
        Some(path) if rows < tokens as usize => {
            let allowed = format!("at least {tokens} for data.tokenizer = {path:?}");
            Err(ConfigError::Range { setting: "model.vocab_size", value: rows.to_string(), allowed }.into())
        }
        _ => Ok(()),
    }
}

/// Opens datasets where they are. Only their headers and indices are read.
fn open_blend(config: &RunConfig) -> Result<RunData> {
    let (train, held_out) = blended(config)?;
    let lengths: Vec<u64> = train.iter().map(|samples| samples.dataset.len()).collect();
    let blend = Blend::new(config.train.seed, &config.data.weights(), &lengths).map_err(ConfigError::from)?;
    let train = TokenSource::new(train, Order::Blend(blend), config)?;
    Ok(RunData { train, held_out, unigram_entropy: None })
}

/// What is in the datasets of a blend.
pub(super) fn describe(config: &RunConfig, data: &RunData) {
    for (dataset, samples) in config.data.blend.iter().zip(&data.train.sets) {
        let (part, tokens) = (samples.dataset.part(), samples.dataset.tokens());
        let held_out = match tokens.documents() - part.documents().end {
            0 => String::new(),
            last => format!(", the last {last} held out"),
        };
        println!(
            "{}: weight {}, {} tokens in {} documents{held_out}, {} samples",
            dataset.path.display(),
            dataset.weight,
            tokens.len(),
            tokens.documents(),
            samples.dataset.len()
        );
    }
}

/// What of the datasets of a blend is trained on, and what is evaluated.
fn blended(config: &RunConfig) -> Result<(Vec<Samples>, Vec<HeldOut>)> {
    let data = &config.data;
    let (train, validation) =
        (open_all(data.blend.iter().map(|set| &set.path))?, open_all(&data.validation)?);
    check_together(train.iter().chain(&validation), data.format)?;
    let mut parts = Vec::new();
    let mut held_out: Vec<Documents> = validation.into_iter().map(Documents::from).collect();
    for tokens in train {
        match data.held_out {
            None => parts.push(tokens.into()),
            Some(share) => {
                let [first, last] = Documents::split(tokens, share)?;
                parts.push(first);
                held_out.push(last);
            }
        }
    }
    let train = parts.into_iter().map(|part| Samples::new(part, config)).collect::<Result<_>>()?;
    Ok((train, held_out_parts(held_out, config)?))
}

/// What a run is evaluated on.
///
/// # Errors
/// It is damaged or too little.
pub fn held_out_sets(config: &RunConfig, folder: &RunFolder) -> Result<Vec<HeldOut>> {
    match (config.data.blend.is_empty(), config.data.held_out) {
        (true, _) => Ok(vec![open_held_out(config, &folder.held_out_tokens())?]),
        (false, Some(_)) => Ok(blended(config)?.1),
        (false, None) => held_out_parts(open_all(&config.data.validation)?, config),
    }
}

fn held_out_parts(parts: Vec<impl Into<Documents>>, config: &RunConfig) -> Result<Vec<HeldOut>> {
    parts.into_iter().map(|part| Ok(HeldOut::new(Samples::new(part, config)?, config))).collect()
}

fn open_all<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Result<Vec<Tokens>> {
    paths.into_iter().map(|path| Ok(Tokens::open(path)?)).collect()
}

/// That sets are all of the kind that is asked for, and of one tokenizer as far as they say.
fn check_together<'a>(
    sets: impl Iterator<Item = &'a Tokens>,
    format: DataFormat,
) -> std::result::Result<(), DataError> {
    let mut first: Option<(&Path, u64)> = None;
    for tokens in sets {
        let path = tokens.path().to_owned();
        match (format, tokens.is_masked()) {
            (DataFormat::Text, true) => return Err(DataError::Masked { path }),
            (DataFormat::PromptCompletion, false) => return Err(DataError::Unmasked { path }),
            _ => {}
        }
        let Some(vocab_size) = tokens.vocab_size() else { continue };
        let (other, other_vocab_size) = *first.get_or_insert((tokens.path(), vocab_size));
        if vocab_size != other_vocab_size {
            let other = other.to_owned();
            return Err(DataError::Vocabularies { path, vocab_size, other, other_vocab_size });
        }
    }
    Ok(())
}

/// Tokens to evaluate on, every byte of them verified as far as there are checksums.
///
/// # Errors
/// They are damaged or too few.
pub fn open_held_out(config: &RunConfig, path: &Path) -> Result<HeldOut> {
    let tokens = Tokens::open(path)?;
    tokens.verify()?;
    Ok(HeldOut::new(Samples::new(tokens, config)?, config))
}

/// The samples of a dataset as sequences.
#[derive(Debug)]
struct Samples {
    dataset: Dataset,
    separate_documents: bool,
}

impl Samples {
    fn new(part: impl Into<Documents>, config: &RunConfig) -> Result<Self> {
        let (vocab_size, length) = (config.model.vocab_size, config.train.sequence_length);
        let dataset = match config.data.format {
            DataFormat::Text => Dataset::new(part, vocab_size, length)?,
            DataFormat::PromptCompletion => Dataset::packed(part, vocab_size, length)?,
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

/// Samples of one dataset or several, in the order that the seed and the global index give.
#[derive(Debug)]
pub struct TokenSource {
    sets: Vec<Samples>,
    sampler: Sampler,
}

impl TokenSource {
    fn new(sets: Vec<Samples>, order: Order, config: &RunConfig) -> Result<Self> {
        let sampler = Sampler::new(order, config.train.batch_sizes()?, config.train.micro_batch_size);
        Ok(TokenSource { sets, sampler })
    }

    /// The samples of a step, as [`Dataset`] counts them, by the file that they are of.
    pub fn samples(&self, step: u64) -> Vec<(PathBuf, Vec<u64>)> {
        let mut samples = vec![Vec::new(); self.sets.len()];
        for g in self.sampler.cursor(step)..self.sampler.cursor(step + 1) {
            let Place { dataset, sample } = self.sampler.order().at(g);
            samples[dataset].push(sample);
        }
        let by_path = self.sets.iter().map(|set| set.dataset.tokens().path().to_owned()).zip(samples);
        by_path.filter(|(_, samples)| !samples.is_empty()).collect()
    }

    /// The global index of the first sample after `step` steps.
    pub fn cursor_after(&self, step: u64) -> u64 {
        self.sampler.cursor(step + 1)
    }

    /// Samples of each dataset of a blend, of which the order depends.
    pub fn lengths(&self) -> Vec<u64> {
        match self.sampler.order() {
            Order::Single { .. } => Vec::new(),
            Order::Blend(_) => self.sets.iter().map(|set| set.dataset.len()).collect(),
        }
    }

    /// Input tokens of each dataset of a blend in the first `step` steps.
    pub fn tokens_after(&self, step: u64) -> Vec<u64> {
        let Order::Blend(blend) = self.sampler.order() else { return Vec::new() };
        let counts = blend.counts(self.cursor_after(step)).into_iter().zip(&self.sets);
        counts.map(|(samples, set)| samples * set.dataset.sequence_length() as u64).collect()
    }
}

impl BatchSource for TokenSource {
    fn micro_batch(&self, step: u64, u: usize) -> Result<Vec<Sequence>> {
        let places = self.sampler.micro_batch(step, u);
        places.map(|Place { dataset, sample }| self.sets[dataset].sequence(sample)).collect()
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
    fn new(samples: Samples, config: &RunConfig) -> Self {
        HeldOut {
            samples,
            global_batch_size: config.train.global_batch_size,
            micro_batch_size: config.train.micro_batch_size,
            batches: config.train.eval_batches,
        }
    }

    /// Where the tokens are.
    pub fn path(&self) -> &Path {
        self.samples.dataset.tokens().path()
    }

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

    #[test]
    fn prompts_and_streams_are_not_mixed() {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str, masked: bool| {
            let path = folder.path().join(name);
            let mut writer = TokenFileWriter::create(&path, 256).unwrap();
            writer.document(&[1, 2]).unwrap();
            if masked {
                writer.completion(&[1], &[2]).unwrap();
            }
            writer.finish().unwrap();
            Tokens::open(&path).unwrap()
        };
        let (stream, prompts) = (open("stream", false), open("prompts", true));
        check_together([&stream].into_iter(), DataFormat::Text).unwrap();
        check_together([&prompts].into_iter(), DataFormat::PromptCompletion).unwrap();
        let refused =
            |format| check_together([&prompts, &stream].into_iter(), format).unwrap_err().to_string();
        let (text, completions) = (refused(DataFormat::Text), refused(DataFormat::PromptCompletion));
        assert!(text.contains("prompts has prompts with completions: set data.format"), "{text}");
        assert!(completions.contains("stream has no prompts with completions"), "{completions}");
    }
}
