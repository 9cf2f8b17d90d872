//! From a row of the list to runs.

use moe_train::config::RunConfig;
use moe_train::run;
use moe_train::trainer::{BatchSource, Sequence, Setup};

use crate::common::RandomBatches;
use crate::cover::Row;
use crate::factors::{BASE, Choice, FACTORS, is_mapping};

/// What a row says in a configuration's keys, and in those of its [`Source`].
pub fn settings(row: &Row) -> Vec<String> {
    let choice = Choice(row);
    let chosen = FACTORS.iter().zip(row).flat_map(|(factor, &level)| factor.levels[level].1);
    let mut settings: Vec<String> = chosen.map(|&setting| setting.to_owned()).collect();
    settings.push(format!("parallel.world_size={}", choice.world()));
    // Nothing that stages divide.
    let stages = choice.stages();
    settings.push(format!("model.num_hidden_layers={}", if stages == 6 { 7 } else { 5 }));
    let (list, text) = match stages {
        1 => ("[5]", "Et*5L"),
        2 => ("[1, 4]", "Et|t*4L"),
        3 => ("[1, 4, 0]", "Ett|ttt|L"),
        4 => ("[0, 3, 1, 1]", "E|t|tt|ttL"),
        _ => ("[0, 2, 1, 1, 2, 1]", "Et|(tt|)*2t|t|L"),
    };
    match level(row, "layers") {
        "listed" => settings.push(format!("parallel.layers_per_stage={list}")),
        "in notation" => settings.push(format!("parallel.pipeline_layout={text}")),
        _ => {}
    }
    if level(row, "micro-batch group") == "all" {
        settings.push(format!("parallel.micro_batch_group_size={}", choice.micro_batches()));
    }
    settings
}

/// The configuration of a row, or why it is refused.
pub fn config(row: &Row) -> Result<RunConfig, String> {
    parse(&settings(row))
}

/// The configuration of settings.
pub fn parse(settings: &[String]) -> Result<RunConfig, String> {
    let settings: Vec<&String> = settings.iter().filter(|setting| !is_of_source(setting)).collect();
    RunConfig::parse(BASE, "base", &settings).map_err(|error| error.to_string())
}

fn is_of_source(setting: &str) -> bool {
    setting.starts_with("source.")
}

/// The same computation on one rank, by its settings.
pub fn of_one_rank(row: &Row) -> Vec<String> {
    let mut settings: Vec<String> =
        settings(row).into_iter().filter(|setting| !is_mapping(setting)).collect();
    settings.push("parallel.world_size=1".to_owned());
    // Ranks that drop for themselves: what each holds is said to the one.
    if let Some(parts) = config(row).unwrap().train.moe_token_drop_parts {
        settings.push(format!("train.moe_token_drop_parts={{tp = {}, cp = {}}}", parts.tp, parts.cp));
    }
    settings
}

/// Random sequences, of several documents if the configuration separates them.
pub struct Source {
    random: RandomBatches,
    separate_documents: bool,
    padding: bool,
}

impl Source {
    pub fn new(config: &RunConfig, settings: &[String]) -> Self {
        let random = RandomBatches {
            vocab: config.model.vocab_size as u32,
            seq_len: config.train.sequence_length,
            micro_batch: config.train.micro_batch_size,
        };
        let padding = settings.iter().any(|setting| setting == "source.padding=true");
        Source { random, separate_documents: config.data.separates_documents(), padding }
    }
}

impl BatchSource for Source {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let mut sequences = self.random.micro_batch(step, u)?;
        if self.separate_documents {
            for sequence in &mut sequences {
                // Starts at every token of these ids: unevenly, in some sequences nowhere.
                let starts = (1..sequence.weights.len()).filter(|&at| sequence.tokens[at] % 12 == 0);
                *sequence = sequence.clone().separated(starts.collect::<Vec<_>>());
            }
        }
        if self.padding {
            for (b, sequence) in sequences.iter_mut().enumerate() {
                // Of every third sequence nothing is left but its first token.
                let length = sequence.weights.len();
                let padding = [0, length - 1, 5][(step as usize + u * self.random.micro_batch + b) % 3];
                *sequence = sequence.clone().padded(padding);
            }
        }
        Ok(sequences)
    }
}

pub fn setup(config: &RunConfig) -> Setup {
    run::setup(config).unwrap()
}

/// The levels that are not plain, in words.
pub fn words(row: &Row) -> String {
    let chosen = FACTORS.iter().zip(row).filter(|(_, level)| **level > 0);
    let words: Vec<String> =
        chosen.map(|(factor, &level)| format!("{} {}", factor.name, factor.levels[level].0)).collect();
    words.join("; ")
}

fn level(row: &Row, factor: &str) -> &'static str {
    let factor = crate::factors::factor_named(factor);
    FACTORS[factor].levels[row[factor]].0
}
