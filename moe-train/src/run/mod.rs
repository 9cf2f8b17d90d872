//! A training run: data, ranks, metrics, checkpoints, in one folder.

mod data;
mod error;
mod folder;
mod interrupt;
#[cfg(any(feature = "cuda", test))]
mod launch;
#[cfg(any(feature = "cuda", test))]
mod line;
mod log;
#[cfg(any(feature = "cuda", test))]
mod place;
#[cfg(feature = "cuda")]
mod processes;
mod rank;
mod ranks;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_comm::World;
use moe_kernels::{Backend, Float};
use moe_model::ModelConfig;
use moe_model::hf::HubConfig;
use moe_topology::{Mapping, draw};
use serde::{Deserialize, Serialize};

pub use data::{HeldOut, TokenSource, held_out_sets, open_held_out};
pub use error::ProcessError;
pub use folder::RunFolder;
pub(crate) use folder::{CHECKPOINTS, SIDE_FILES, checkpoints_of};

use crate::checkpoint::container::{Checkpoint, CheckpointError, list, open_newest, set_aside};
use crate::checkpoint::{
    HubOrigin, Meta, RunState, Weights, is_hub_folder, open_hub, read_config, restore_weights,
};
use crate::config::{RunConfig, SampleConfig, TokenizerKind};
use crate::data::{EosToken, Tokenizer};
use crate::infer::{Generation, InferError, Sampling, stop_tokens, write_text};
use crate::optim::{Hyper, MomentDTypes};
use crate::trainer::{RankTrainer, Setup, check_recorded};
use crate::{Error, Result};
use data::{Made, RunData};
use rank::{End, Outcome, Plan};
use ranks::{Job, Ranks};

/// Trains as `config` says, from the start or from the newest checkpoint of its folder. Several ranks on GPUs are processes: this
/// one is the rank that its environment says, and only the first writes, prints, and says how the run ended.
///
/// # Errors
/// Data, folder or checkpoint are refused before anything is written; a rank fails; the run is interrupted, after it saved.
pub fn train(config: &RunConfig, resume: bool) -> Result<()> {
    let ranks = Ranks::new(config)?;
    let (Start { config, checkpoint, .. }, Opened { data, init, hub }) =
        ranks.begin(|| prepare(config, resume), |start: &Start| start.join(config))?;
    let (config, train) = (&config, Arc::new(data.train));
    let plan = Plan {
        setup: setup(config)?,
        config: config.clone(),
        folder: RunFolder::new(&config.train.output),
        train: train.clone(),
        held_out: Arc::new(data.held_out),
        checkpoint,
        init: init.map(Arc::new),
        hub,
        peak_tflops: config.train.peak_tflops.or(ranks.peak_tflops()),
        on_gpu: ranks.on_gpu(),
        interrupted: interrupt::flag(ranks.has_first()),
    };
    let Some(outcome) = ranks.run(plan)?.into_iter().next() else { return Ok(()) };
    let Outcome { step, checkpoint, .. } = outcome.clone();
    match outcome.end {
        End::Complete => {}
        End::Interrupted => return Err(Error::Interrupted { step, checkpoint }),
        End::NonFinite { skipped } => {
            let samples = train.samples(step + 1);
            return Err(Error::NonFinite { step: step + 1, skipped, samples, checkpoint });
        }
    }
    report(config, &outcome, data.unigram_entropy)
}

/// What a run starts from, once its first rank has prepared it.
#[derive(Debug, Serialize, Deserialize)]
struct Start {
    /// As `config.toml` has it.
    config: RunConfig,
    /// Where to go on from.
    checkpoint: Option<PathBuf>,
    /// Whose weights to start from, otherwise.
    init: Option<PathBuf>,
}

/// What was opened for it.
struct Opened {
    data: RunData,
    init: Option<Weights>,
    hub: Option<HubOrigin>,
}

/// Checks what a run needs, makes its folder ready, and says what it is: the part of the first rank, whose process alone writes.
fn prepare(config: &RunConfig, resume: bool) -> Result<(Start, Opened)> {
    let setup = setup(config)?;
    let folder = RunFolder::new(&config.train.output);
    let (checkpoint, init) = match resume {
        true => (Some(newest(&folder, config)?), None),
        false => {
            folder.refuse_existing()?;
            (None, initial(config)?)
        }
    };
    if let Some(root) = &config.train.replay_routing {
        let first = checkpoint.as_ref().map_or(0, Checkpoint::step) + 1;
        check_recorded(root, first..config.train.steps + 1)?;
    }
    let made = (!resume).then(|| data::make(config, &folder)).transpose()?;
    let data = data::open(config, &folder)?;
    data::describe(config, &data);
    let mut config = config.clone();
    if let Some(checkpoint) = &checkpoint {
        let then = RunState::of(checkpoint)?;
        config.data.eos_token = then.config.data.eos_token.or(config.data.eos_token);
        let (then, now) = (then.blend_samples, data.train.lengths());
        if then != now {
            let (then, now) = (format!("{then:?}"), format!("{now:?}"));
            return Err(Error::Resume { key: "the number of samples in each [[data.blend]]", then, now });
        }
        for path in set_aside(&folder.checkpoints(), checkpoint.step())? {
            eprintln!("warning: the damaged checkpoint is kept as {}", path.display());
        }
    }
    let eos_token = made.as_ref().and_then(|made| made.eos_token.clone());
    config.data.eos_token = config.data.eos_token.or(eos_token);
    folder.write_config(&config.to_toml()?)?;
    if let Some(Made { tokenizer, .. }) = &made {
        let side_files = init.as_ref().and_then(Weights::side_files);
        folder.take_side_files(side_files.as_deref(), tokenizer)?;
    }

    println!("{}", draw::text(&setup.folding).trim_end());
    if setup.pipeline.ranks() > 1 {
        println!("{}", pipeline(&setup));
    }
    println!(
        "\n{} parameters, {} of them used by a token",
        grouped(config.model.parameters()),
        grouped(config.model.active_parameters())
    );
    if let Some(unigram_entropy) = data.unigram_entropy {
        println!("unigram entropy {unigram_entropy:.3} nats/{}", unit(&config));
    }
    if let Some(checkpoint) = &checkpoint {
        println!("resuming after step {}", checkpoint.step());
    }
    if let Some(init) = &init {
        println!("starting from the weights of {}", init.path().display());
    }
    let hub = origin(checkpoint.as_ref(), init.as_ref())?;
    let start = Start {
        config,
        checkpoint: checkpoint.map(|checkpoint| checkpoint.path().to_owned()),
        init: init.as_ref().map(|init| init.path().to_owned()),
    };
    Ok((start, Opened { data, init, hub }))
}

impl Start {
    /// Opens in the process of another rank, which was given the settings `own`, what the first prepared.
    fn join(&self, own: &RunConfig) -> Result<Opened> {
        let mut own = own.clone();
        own.data.eos_token = self.config.data.eos_token.clone();
        if own != self.config {
            let (own, first) = (own.to_toml()?, self.config.to_toml()?);
            let line = |text: &str, i| text.lines().nth(i).unwrap_or_default().to_owned();
            let at = own.lines().zip(first.lines()).take_while(|(own, first)| own == first).count();
            return Err(ProcessError::Settings { own: line(&own, at), first: line(&first, at) }.into());
        }
        let checkpoint = self.checkpoint.as_deref().map(Checkpoint::open).transpose()?;
        // What is skipped has been said.
        let weights = |path: &PathBuf| match is_hub_folder(path) {
            true => open_hub(path, &mut |_| {}),
            false => Weights::of(Checkpoint::open(path)?),
        };
        let init = self.init.as_ref().map(weights).transpose()?;
        let hub = origin(checkpoint.as_ref(), init.as_ref())?;
        let data = data::open(&self.config, &RunFolder::new(&self.config.train.output))?;
        Ok(Opened { data, init, hub })
    }
}

/// The folder of the hub that either came from.
fn origin(checkpoint: Option<&Checkpoint>, init: Option<&Weights>) -> Result<Option<HubOrigin>> {
    match (checkpoint, init) {
        (Some(checkpoint), _) => Ok(Meta::of(checkpoint)?.hub),
        (None, Some(init)) => Ok(init.meta().hub.clone()),
        (None, None) => Ok(None),
    }
}

/// Where the ranks of `config` are processes and this is none of them: runs this program once for each, on this machine's GPUs and
/// with the arguments that it has itself, and waits until all have ended. Says whether it did.
///
/// # Errors
/// There is no CUDA or no NCCL, there are fewer GPUs than ranks, or a rank fails; the environment contradicts itself or `config`.
pub fn launch(config: &RunConfig) -> Result<bool> {
    Ranks::launch(config)
}

/// The loss of weights on each of several sets, under the folding of `config`; none where no token counts. Several ranks on GPUs are
/// processes, of which the first alone returns losses.
///
/// # Errors
/// The weights or the tokens are damaged, or a rank fails.
pub fn evaluate(config: &RunConfig, weights: &Arc<Weights>, sets: Vec<HeldOut>) -> Result<Vec<Option<f64>>> {
    let ranks = Ranks::new(config)?;
    // A run that goes on has a newer checkpoint for who comes later.
    let same = |first: &PathBuf| match first == weights.path() {
        true => Ok(()),
        false => Err(Error::Protocol { what: "ranks have opened other checkpoints than rank 0" }),
    };
    ranks.begin(|| Ok((weights.path().to_owned(), ())), same)?;
    let evaluation = Evaluation { setup: setup(config)?, weights: weights.clone(), sets };
    Ok(ranks.run(evaluation)?.into_iter().next().unwrap_or_default())
}

struct Evaluation {
    setup: Setup,
    weights: Arc<Weights>,
    sets: Vec<HeldOut>,
}

impl Job for Evaluation {
    type Outcome = Vec<Option<f64>>;

    fn run<T: Float, D: Backend<T>>(&self, world: &dyn World<D>, device: D) -> Result<Self::Outcome> {
        let mut trainer = RankTrainer::<T, D>::zeros(self.setup.clone(), world, device)?;
        restore_weights(&mut trainer, &self.weights)?;
        let mut loss = |set: &HeldOut| trainer.evaluate(set.micro_batches(), |u| set.micro_batch(u));
        self.sets.iter().map(&mut loss).collect()
    }
}

/// Threads of each rank when ranks share the machine's cores.
pub(crate) fn threads(world_size: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / world_size).max(1)
}

/// What defines the computation that a configuration asks for.
///
/// # Errors
/// The mapping is illegal.
pub fn setup(config: &RunConfig) -> Result<Setup> {
    let o = &config.optimizer;
    Ok(Setup {
        model: config.model.clone(),
        folding: config.folding()?,
        pipeline: config.pipeline()?,
        schedule: config.parallel.schedule()?,
        micro_batch_group_size: config.parallel.micro_batch_group_size,
        dispatcher: config.parallel.dispatcher.into(),
        capacity: config.capacity(),
        moe_shared_expert_overlap: config.parallel.moe_shared_expert_overlap,
        expert_rank_capacity: config.train.moe_expert_rank_capacity_factor,
        recompute: config.recompute()?,
        seed: config.train.seed,
        global_batch_size: config.train.global_batch_size,
        rampup_batch_size: config.train.rampup_batch_size,
        micro_batch_size: config.train.micro_batch_size,
        sequence_length: config.train.sequence_length,
        overlap_grad_reduce: config.train.overlap_grad_reduce,
        overlap_param_gather: config.train.overlap_param_gather,
        optimizer: Hyper {
            beta1: o.beta1,
            beta2: o.beta2,
            eps: o.eps,
            weight_decay: o.weight_decay,
            moments: MomentDTypes { exp_avg: o.exp_avg_dtype, exp_avg_sq: o.exp_avg_sq_dtype },
        },
        lr: config.lr_schedule(),
        groups: o.groups.clone(),
        clip_grad: o.clip_grad,
        forced_routing: config.forced_routing(),
        record_routing: config.train.record_routing.then(|| RunFolder::new(&config.train.output).routing()),
        replay_routing: config.train.replay_routing.clone(),
        expert_bias_update_rate: o.moe_router_bias_update_rate.unwrap_or(0.0),
    })
}

/// The newest whole checkpoint, if this run can go on from it.
fn newest(folder: &RunFolder, config: &RunConfig) -> Result<Checkpoint> {
    let checkpoint = open_newest(&folder.checkpoints(), &mut |fault| eprintln!("warning: skipped: {fault}"))?;
    Meta::of(&checkpoint)?.check_model(checkpoint.path(), &config.model)?;
    let then = RunState::of(&checkpoint)?.config;
    let settings = |config: &RunConfig| {
        let train = &config.train;
        [
            ("train.dtype", train.dtype.to_string()),
            ("train.seed", train.seed.to_string()),
            ("train.global_batch_size", train.global_batch_size.to_string()),
            (
                "train.rampup_batch_size",
                train.rampup_batch_size.map_or("unset".to_owned(), |ramp_up| ramp_up.to_string()),
            ),
            ("train.micro_batch_size", train.micro_batch_size.to_string()),
            ("train.sequence_length", train.sequence_length.to_string()),
            ("data.tokenizer", PathBuf::from(config.data.tokenizer.clone()).display().to_string()),
            ("data.format", config.data.format.name().to_owned()),
            ("the list of weights of [[data.blend]]", format!("{:?}", config.data.weights())),
            ("data.separate_documents", config.data.separates_documents().to_string()),
        ]
    };
    for ((key, then), (_, now)) in settings(&then).into_iter().zip(settings(config)) {
        if then != now {
            return Err(Error::Resume { key, then, now });
        }
    }
    // Where it is not given, it is what the run has.
    if let (Some(then), Some(now)) = (&then.data.eos_token, &config.data.eos_token)
        && then != now
    {
        let text = |token: &EosToken| match token {
            EosToken::Id(id) => id.to_string(),
            EosToken::Token(token) => format!("\"{token}\""),
        };
        return Err(Error::Resume { key: "data.eos_token", then: text(then), now: text(now) });
    }
    Ok(checkpoint)
}

/// The weights that a new run starts from, if they are of the same model.
fn initial(config: &RunConfig) -> Result<Option<Weights>> {
    let Some(path) = &config.train.init_checkpoint else { return Ok(None) };
    let weights = open_weights(path)?;
    weights.meta().check_weights(weights.path(), &config.model)?;
    Ok(Some(weights))
}

/// Opens the weights of a checkpoint, those of the newest whole one that [`open_checkpoint`] finds, or those of a folder of the
/// hub.
///
/// # Errors
/// There is none, it is not that of a model, or the folder of the hub is refused.
pub fn open_weights(path: &Path) -> Result<Weights> {
    match is_hub_folder(path) {
        true => open_hub(path, &mut |skipped| eprintln!("warning: {skipped}")),
        false => Weights::of(open_checkpoint(path)?),
    }
}

/// The model of weights that [`open_weights`] opens; none of them is read.
pub(crate) fn model_of(path: &Path) -> Result<ModelConfig> {
    if is_hub_folder(path) {
        return Ok(HubConfig::parse(&read_config(path)?)?.model);
    }
    let checkpoint = match checkpoints_of(path) {
        Some(root) => {
            let newest = list(&root)?.into_iter().rev().find_map(|listed| listed.checkpoint.ok());
            newest.ok_or(CheckpointError::None { root })?
        }
        None => Checkpoint::open(path)?,
    };
    Ok(Meta::of(&checkpoint)?.model)
}

/// Opens a checkpoint, or the newest whole one of a run, or of a folder that an import or an upcycling made.
///
/// # Errors
/// There is none.
pub fn open_checkpoint(path: &Path) -> Result<Checkpoint> {
    match checkpoints_of(path) {
        Some(root) => Ok(open_newest(&root, &mut |fault| eprintln!("warning: skipped: {fault}"))?),
        None => Ok(Checkpoint::open(path)?),
    }
}

/// The tokenizer that belongs to weights: that of the run that trained them, or that in their folder of the hub.
///
/// # Errors
/// There is none, or it cannot be opened.
pub fn open_tokenizer(weights: &Weights) -> Result<Tokenizer> {
    let data = weights.meta().run.as_ref().map(|run| &run.config.data);
    // The tokens of a blend are of a tokenizer that only its maker knows, unless it is named.
    let kind = data.filter(|data| data.names_tokenizer()).map(|data| &data.tokenizer);
    let copy = weights.side_files().filter(|folder| folder.join(Tokenizer::FILE).is_file());
    match (kind, copy) {
        (Some(TokenizerKind::Byte), _) => Ok(Tokenizer::Byte),
        (_, Some(copy)) => Ok(Tokenizer::open(&TokenizerKind::File(copy))?),
        (Some(kind), None) => Ok(Tokenizer::open(kind)?),
        (None, None) => Err(InferError::NoTokenizer { path: weights.path().to_owned() }.into()),
    }
}

/// What losses are counted by.
fn unit(config: &RunConfig) -> &'static str {
    match config.data.tokenizer {
        TokenizerKind::Byte => "byte",
        TokenizerKind::File(_) => "token",
    }
}

/// The last words of a run.
fn report(config: &RunConfig, outcome: &Outcome, unigram_entropy: Option<f64>) -> Result<()> {
    match (outcome.val_loss, unigram_entropy) {
        (Some(val_loss), Some(unigram_entropy)) => println!(
            "validation loss {val_loss:.4} nats/{}, {:.3} below the unigram entropy",
            unit(config),
            unigram_entropy - val_loss
        ),
        (Some(val_loss), None) => println!("validation loss {val_loss:.4} nats/token"),
        (None, _) => {}
    }
    if let Some(bytes) = outcome.peak_memory_bytes {
        println!("peak memory of the GPU {:.1} GB", bytes as f64 / 1e9);
    }
    let Some(checkpoint) = &outcome.checkpoint else { return Ok(()) };
    println!("checkpoint {}", checkpoint.display());
    let weights = Arc::new(Weights::of(Checkpoint::open(checkpoint)?)?);
    let tokenizer = match open_tokenizer(&weights) {
        Ok(tokenizer) => Some(tokenizer),
        Err(Error::Infer(InferError::NoTokenizer { .. })) => None,
        Err(error) => return Err(error),
    };
    match &tokenizer {
        Some(tokenizer) => {
            let SampleConfig { prompt, tokens, temperature } = &config.sample;
            let sampling =
                Sampling { temperature: *temperature, seed: config.train.seed, ..Sampling::default() };
            let stop = stop_tokens(&weights, tokenizer, &mut |unknown| eprintln!("warning: {unknown}"))?;
            let generation = Generation { tokens: *tokens, sampling, stop };
            println!();
            write_text(&weights, tokenizer, prompt.as_bytes(), &generation, &mut std::io::stdout())?;
            println!();
        }
        None => println!("no sample: data.tokenizer does not say what made the tokens of the blend"),
    }

    let program = std::env::args().next().unwrap_or_else(|| "moe-train".to_owned());
    let run = config.train.output.display();
    let checkpoint = checkpoint.display();
    println!("\nNext, for instance:");
    if tokenizer.is_some() {
        println!("  another prompt   {program} sample {checkpoint} --prompt 'fn main() {{'");
    }
    println!("  curves           tensorboard --logdir {run}/tensorboard   (or read {run}/metrics.jsonl)");
    let steps = 2 * outcome.step;
    let refold = match refolded(config) {
        Some(tp) => format!(" --set parallel.tp={tp}"),
        None => String::new(),
    };
    println!(
        "  train on         {program} train {run}/config.toml --resume --set train.steps={steps}{refold}"
    );
    let Mapping { world_size, tp, cp, pp, ep, etp, order, .. } = config.mapping()?;
    let ulysses = config.parallel.cp_ulysses;
    println!(
        "  draw the folding {program} topology --world-size {world_size} --tp {tp} --cp {cp} --cp-ulysses {ulysses} --pp {pp} --ep {ep} \
         --etp {etp} --order {order} --format svg"
    );
    Ok(())
}

/// The schedule, and the layers of each pipeline rank.
fn pipeline(setup: &Setup) -> String {
    /// More ranks are left out.
    const RANKS: usize = 8;
    let Setup { pipeline, schedule, .. } = setup;
    let layers = |stage| match pipeline.layers(stage) {
        layers if layers.is_empty() => "none".to_owned(),
        layers if layers.len() == 1 => layers.start.to_string(),
        layers => format!("{}-{}", layers.start, layers.end - 1),
    };
    let of_rank = |rank| pipeline.stages_of(rank).map(layers).collect::<Vec<_>>().join(", ");
    let ranks: Vec<String> = (0..pipeline.ranks().min(RANKS)).map(of_rank).collect();
    let rest = if pipeline.ranks() > RANKS { " | …" } else { "" };
    format!("schedule {schedule}, layers by stage {}{rest}", ranks.join(" | "))
}

/// Another TP under which the run could go on.
fn refolded(config: &RunConfig) -> Option<usize> {
    [1, 2].into_iter().filter(|&tp| tp != config.parallel.tp).find(|&tp| {
        let mut other = config.clone();
        other.parallel.tp = tp;
        other.check().is_ok()
    })
}

/// `1 234 567`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|c| std::str::from_utf8(c).ok()).collect();
    groups.join(" ")
}
