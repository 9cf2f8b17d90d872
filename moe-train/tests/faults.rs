//! A rank that fails, panics or stops answering, in every phase of a run: everybody else gets an error that names it, and
//! nobody hangs.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::checkpoints::{meta, rewrite};
use common::{DEADLINE, Outcome, Piece, RandomBatches, gather, pieces, setup, tiny_model};
use moe_comm::count::{Counted, Counters};
use moe_comm::fault::{Fate, Fault, Faulty};
use moe_comm::{RawComm, ThreadRank, ThreadWorld, World, WorldError};
use moe_kernels::Cpu;
use moe_model::{ModelConfig, PipelineLayout};
use moe_pipeline::generate::Named;
use moe_pipeline::{Action, Kind};
use moe_topology::{Attention, Axes, Expert, GroupKey, Mapping};
use moe_train::Error;
use moe_train::checkpoint::container::{Checkpoint, list};
use moe_train::checkpoint::{restore, save};
use moe_train::trainer::{BatchSource, RankTrainer, Sequence, Setup, StepReport};

/// The rank that goes wrong: on the last of two stages, in both data-parallel groups' expert group.
const FAULTY: usize = 5;
const WORLD: usize = 8;
/// Far more than a step of this model takes, and what each hang costs.
const PATIENCE: Duration = Duration::from_secs(2);
/// A test that takes this long hangs.
const WATCHDOG: Duration = Duration::from_secs(30);

const TP_CP_DP: Axes<Attention> = Attention::TP.union(Attention::CP).union(Attention::DP);
const CP_DP: Axes<Attention> = Attention::CP.union(Attention::DP);

/// TP2 × DP2 × PP2 with EP4.
fn folded() -> Setup {
    let mapping = Mapping { world_size: WORLD, tp: 2, pp: 2, ep: 4, ..Mapping::default() };
    let model = ModelConfig { num_hidden_layers: 2, ..tiny_model() };
    Setup { global_batch_size: 8, ..setup(model, mapping) }
}

/// The same under another schedule, each stage of one layer of experts.
fn scheduled(schedule: Named) -> Setup {
    let setup = folded();
    let (pp, virtual_stages) =
        (setup.folding.size(Attention::PP), schedule.virtual_stages().unwrap_or(1) as usize);
    let layers = pp * virtual_stages;
    let placement = schedule.placement(pp as u32, virtual_stages as u32).unwrap();
    let pipeline = PipelineLayout::even(layers, pp, virtual_stages).unwrap().placed(placement).unwrap();
    let model = ModelConfig { num_hidden_layers: layers, ..setup.model };
    Setup { model, schedule, pipeline, ..setup }
}

fn source(setup: &Setup) -> RandomBatches {
    RandomBatches {
        vocab: setup.model.vocab_size as u32,
        seq_len: setup.sequence_length,
        micro_batch: setup.micro_batch_size,
    }
}

/// The phases of [`life`] that end with a count of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    New,
    /// An evaluation of one micro-batch per rank: what one forward pass calls.
    Forward,
    Step,
    SecondStep,
    Evaluate,
    Save,
}

type Life = (Vec<StepReport>, Vec<Piece>, Option<f64>);

/// All that a rank of a run does: start, evaluate, two steps, evaluate, save.
fn life(
    setup: &Setup,
    world: &dyn World<Cpu>,
    root: &Path,
    ended: impl FnMut(Phase),
) -> moe_train::Result<Life> {
    life_on(setup, world, root, &source(setup), ended)
}

fn life_on(
    setup: &Setup,
    world: &dyn World<Cpu>,
    root: &Path,
    source: &dyn BatchSource,
    mut ended: impl FnMut(Phase),
) -> moe_train::Result<Life> {
    let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), world, Cpu::poisoned(1))?;
    ended(Phase::New);
    trainer.evaluate(setup.folding.size(Attention::DP), |u| source.micro_batch(99, u))?;
    ended(Phase::Forward);
    let mut reports = vec![trainer.step(1, source)?];
    ended(Phase::Step);
    reports.push(trainer.step(2, source)?);
    ended(Phase::SecondStep);
    let val_loss = trainer.evaluate(setup.micro_batches(), |u| source.micro_batch(98, u))?;
    ended(Phase::Evaluate);
    save(&trainer, root, 2, &meta(setup, 2, 2))?;
    ended(Phase::Save);
    Ok((reports, pieces(&trainer)?, val_loss))
}

/// Runs `body` in a thread of its own; a world that hangs fails the test.
fn watched<R: Send + 'static>(body: impl FnOnce() -> R + Send + 'static) -> R {
    let (sender, receiver) = mpsc::channel();
    let thread = thread::spawn(move || {
        // The receiver is gone only if the watchdog has barked.
        let _ = sender.send(body());
    });
    match receiver.recv_timeout(WATCHDOG) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => panic!("still running after {WATCHDOG:?}"),
        Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("the thread ended without a result"),
        },
    }
}

/// What happened to a world: what `run` returned, and what each rank itself did.
struct Fallen {
    error: WorldError,
    /// The rank's own error; absent if it never returned.
    own: BTreeMap<usize, Result<(), String>>,
}

/// A world whose rank [`FAULTY`] lives as `faulty` says.
fn fall<F>(setup: &Setup, root: &Path, faulty: F) -> Fallen
where
    F: Fn(&Setup, ThreadRank, &Path) -> moe_train::Result<Life> + Send + Sync + 'static,
{
    let (setup, root) = (setup.clone(), root.to_owned());
    watched(move || {
        let own = Arc::new(Mutex::new(BTreeMap::new()));
        let seen = own.clone();
        let ended = ThreadWorld::run(WORLD, PATIENCE, move |world| {
            let rank = world.rank();
            let result = match rank {
                FAULTY => faulty(&setup, world, &root),
                _ => life(&setup, &world, &root, |_| ()),
            };
            let note = result.as_ref().map(drop).map_err(Error::to_string);
            seen.lock().unwrap().insert(rank, note);
            result
        });
        let error = ended.expect_err("the fault did not fire");
        let own = own.lock().unwrap().clone();
        Fallen { error, own }
    })
}

/// Everybody but the faulty rank has an error that names it.
fn assert_all_know(fallen: &Fallen, what: &str) {
    let Fallen { error, own } = fallen;
    assert_eq!(error.rank(), Some(FAULTY), "{what}: {error}");
    for rank in (0..WORLD).filter(|&rank| rank != FAULTY) {
        let Some(Err(message)) = own.get(&rank) else {
            panic!("{what}: rank {rank} ended with {:?}", own.get(&rank))
        };
        assert!(message.contains(&format!("rank {FAULTY} failed")), "{what}: rank {rank} says: {message}");
    }
}

/// A call of rank [`FAULTY`], in which phase it comes.
#[derive(Debug, Clone)]
struct Site {
    phase: &'static str,
    op: &'static str,
    group: GroupKey,
    call: u64,
}

impl Site {
    fn fault(&self, fate: Fate) -> Fault {
        Fault { fate, op: Some(self.op), group: Some(self.group), call: self.call }
    }
}

/// A run in which nothing goes wrong, and what its rank [`FAULTY`] called in each phase.
fn unharmed(setup: &Setup) -> (Counts, Outcome, Option<f64>) {
    let folder = tempfile::tempdir().unwrap();
    let (setup, root) = (setup.clone(), folder.path().to_owned());
    let counters = Counters::default();
    let phases = Arc::new(Mutex::new(BTreeMap::new()));
    let seen = phases.clone();
    let lives = watched(move || {
        ThreadWorld::run(WORLD, DEADLINE, move |world| match world.rank() {
            FAULTY => {
                let counters = counters.clone();
                let seen = seen.clone();
                let ended = |phase| {
                    seen.lock().unwrap().insert(phase, counters.snapshot());
                };
                life(&setup, &Counted::new(world, counters.clone()), &root, ended)
            }
            _ => life(&setup, &world, &root, |_| ()),
        })
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let val_loss = lives[0].2;
    let outcome = gather(lives.into_iter().map(|(reports, pieces, _)| (reports, pieces)));
    let counts = Counts(
        phases
            .lock()
            .unwrap()
            .iter()
            .map(|(&phase, calls)| (phase, calls.iter().map(|(&key, count)| (key, count.calls)).collect()))
            .collect(),
    );
    (counts, outcome, val_loss)
}

/// Calls by phase (up to its end), group and operation.
struct Counts(BTreeMap<Phase, BTreeMap<(GroupKey, &'static str), u64>>);

impl Counts {
    fn until(&self, phase: Phase, op: &'static str, group: GroupKey) -> u64 {
        self.0[&phase].get(&(group, op)).copied().unwrap_or(0)
    }

    /// The call of an operation that comes after the end of `after` and `skip` more.
    fn site(
        &self,
        phase: &'static str,
        op: &'static str,
        group: impl Into<GroupKey>,
        after: Phase,
        skip: u64,
    ) -> Site {
        let group = group.into();
        let call = self.until(after, op, group) + skip;
        assert!(call < self.until(Phase::Save, op, group), "{phase}: no such call: {op} of {group}");
        Site { phase, op, group, call }
    }

    /// A call of the first backward pass, which follows the first forward pass on the last stage.
    fn backward(&self, phase: &'static str, op: &'static str, group: impl Into<GroupKey>) -> Site {
        let group = group.into();
        let forward = self.until(Phase::Forward, op, group) - self.until(Phase::New, op, group);
        self.site(phase, op, group, Phase::Forward, forward)
    }

    fn sites(&self) -> Vec<Site> {
        use Phase::{Evaluate, Forward, SecondStep, Step};
        let tp_cp = Attention::TP.union(Attention::CP);
        vec![
            self.site("loss weights", "all_reduce", CP_DP, Forward, 0),
            self.site("receive an activation", "recv", Attention::PP, Forward, 0),
            self.site("gather over TP, forward", "all_gather", Attention::TP, Forward, 0),
            self.site("scatter over TP, forward", "reduce_scatter", Attention::TP, Forward, 0),
            self.site("counts of a micro-batch", "all_reduce", tp_cp, Forward, 0),
            self.site("dispatch, forward", "all_to_all", Expert::EP, Forward, 0),
            self.backward("dispatch, backward", "all_to_all", Expert::EP),
            self.backward("gather over TP, backward", "all_gather", Attention::TP),
            self.backward("scatter over TP, backward", "reduce_scatter", Attention::TP),
            self.site("send a gradient", "send", Attention::PP, Forward, 0),
            self.site("dense gradients", "reduce_scatter", CP_DP, Forward, 0),
            self.site("replicated gradients", "reduce_scatter", TP_CP_DP, Forward, 0),
            self.site("expert gradients", "reduce_scatter", Expert::EDP, Forward, 0),
            self.site("gradient norm", "all_reduce", Attention::ALL, Forward, 0),
            self.site("dense weights", "all_gather", CP_DP, Forward, 0),
            self.site("expert weights", "all_gather", Expert::EDP, Forward, 0),
            self.site("report", "all_reduce", Attention::ALL, Forward, 1),
            self.site("second step", "recv", Attention::PP, Step, 0),
            self.site("evaluation", "all_to_all", Expert::EP, SecondStep, 0),
            self.site("evaluation: the loss", "all_reduce", Attention::ALL, SecondStep, 0),
            self.site("save: the folder", "all_gather", Attention::ALL, Evaluate, 0),
            self.site("save: the pieces", "all_gather", Attention::ALL, Evaluate, 3),
            self.site("save: the end", "barrier", Attention::ALL, Evaluate, 0),
        ]
    }
}

#[test]
fn a_rank_that_fails_or_panics_is_named_in_every_phase() {
    let setup = folded();
    for site in unharmed(&setup).0.sites() {
        for fate in [Fate::Fail, Fate::Panic] {
            break_at(&setup, &site, fate);
        }
    }
}

/// A world whose rank [`FAULTY`] fails or panics at a call: everybody else knows.
fn break_at(setup: &Setup, site: &Site, fate: Fate) {
    let what = format!("{}: {fate:?} in {site:?}", setup.schedule);
    let folder = tempfile::tempdir().unwrap();
    let fault = site.fault(fate);
    let fallen = fall(setup, folder.path(), move |setup, world, root| {
        life(setup, &Faulty::new(world, [fault.clone()]), root, |_| ())
    });
    assert_all_know(&fallen, &what);
    let injected = format!("injected fault at {} of {}", site.op, site.group);
    assert!(fallen.error.to_string().contains(&injected), "{what}: {}", fallen.error);
    assert!(fallen.error.running.is_empty(), "{what}: {}", fallen.error);
    assert_eq!(fallen.own.contains_key(&FAULTY), fate == Fate::Fail, "{what}");
    assert_whole_or_absent(site, folder.path());
}

/// The same where it stops answering.
fn hang_at(setup: &Setup, site: &Site) {
    let folder = tempfile::tempdir().unwrap();
    let fault = site.fault(Fate::Hang);
    let fallen = fall(setup, folder.path(), move |setup, world, root| {
        life(setup, &Faulty::new(world, [fault.clone()]), root, |_| ())
    });
    let what = format!("{}: {site:?}", setup.schedule);
    assert_all_know(&fallen, &what);
    assert_eq!(fallen.error.running, [FAULTY], "{what}: {}", fallen.error);
    assert!(!fallen.own.contains_key(&FAULTY), "{what}: it went on");
    assert!(fallen.error.to_string().contains("did not"), "{what}: {}", fallen.error);
    assert_whole_or_absent(site, folder.path());
}

/// A save that did not end leaves a whole checkpoint or nothing.
fn assert_whole_or_absent(site: &Site, root: &Path) {
    if !root.exists() {
        return;
    }
    let checkpoints = list(root).unwrap();
    for listed in &checkpoints {
        assert_eq!(site.phase, "save: the end");
        assert!(listed.checkpoint.as_ref().unwrap().verify().is_empty(), "{site:?}");
    }
    let left: Vec<_> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty() || !checkpoints.is_empty(), "{site:?} left {left:?}");
}

#[test]
fn a_rank_that_stops_answering_is_named_in_every_phase() {
    let setup = folded();
    hang_at_all(unharmed(&setup).0.sites().into_iter().map(|site| (setup.clone(), site)));
}

/// All at once, as each takes as long as its peers' patience.
fn hang_at_all(sites: impl Iterator<Item = (Setup, Site)>) {
    let hangs = sites.map(|(setup, site)| thread::spawn(move || hang_at(&setup, &site)));
    for hang in hangs.collect::<Vec<_>>() {
        if let Err(panic) = hang.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

/// What a layer of experts calls of its expert group in a pass: its rows go there and back, with the probabilities, or their gradients,
/// beside them on one way.
const MOVEMENTS: u64 = 3;

/// The movements of rows of rank [`FAULTY`] within its first overlap, and within its first input gradient that is no overlap's, if the
/// schedule has such.
fn woven_sites(setup: &Setup, counts: &Counts) -> Vec<Site> {
    let (op, group) = ("all_to_all", GroupKey::from(Expert::EP));
    let program = setup.training_program(setup.global_batch_size).unwrap();
    let mut call = counts.until(Phase::Forward, op, group);
    let mut sites: Vec<Site> = Vec::new();
    for action in program.schedule().list(setup.folding.stage(FAULTY) as u32) {
        let phase = match action.kind {
            Kind::Overlap { .. } => "overlap",
            Kind::BackwardInput => "input gradient",
            _ => "",
        };
        let moves = |part: &Action| matches!(part.kind, Kind::Forward | Kind::Backward | Kind::BackwardInput);
        let end = call + MOVEMENTS * action.parts().filter(moves).count() as u64;
        if !phase.is_empty() && sites.iter().all(|site| site.phase != phase) {
            sites.extend((call..end).map(|call| Site { phase, op, group, call }));
        }
        call = end;
    }
    // None of another kind, so that these are where they should be.
    assert_eq!(call, counts.until(Phase::Step, op, group));
    sites
}

/// Passes that have started what they have not waited for, of two micro-batches, are let go.
#[test]
fn a_rank_that_goes_wrong_within_an_overlap_or_half_a_backward_pass_is_named() {
    let mut hangs = Vec::new();
    for (schedule, expected) in [(Named::Overlapped1F1B, 6), (Named::DualPipeV, 9)] {
        let setup = scheduled(schedule);
        let sites = woven_sites(&setup, &unharmed(&setup).0);
        assert_eq!(sites.len(), expected, "{schedule}");
        for (at, site) in sites.into_iter().enumerate() {
            break_at(&setup, &site, if at % 2 == 0 { Fate::Fail } else { Fate::Panic });
            hangs.push((setup.clone(), site));
        }
    }
    hang_at_all(hangs.into_iter().step_by(2));
}

#[test]
fn a_late_rank_changes_no_bit() {
    let setup = folded();
    let (counts, unharmed, val_loss) = unharmed(&setup);
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let delay = |site: &Site| site.fault(Fate::Delay(PATIENCE / 40));
    let delays: Vec<Fault> = counts.sites().iter().map(delay).collect();
    let lives = watched(move || {
        ThreadWorld::run(WORLD, PATIENCE, move |world| match world.rank() {
            FAULTY => life(&setup, &Faulty::new(world, delays.clone()), &root, |_| ()),
            _ => life(&setup, &world, &root, |_| ()),
        })
    })
    .unwrap_or_else(|error| panic!("{error}"));
    for (_, _, late) in &lives {
        assert_eq!(late.unwrap().to_bits(), val_loss.unwrap().to_bits());
    }
    let late = gather(lives.into_iter().map(|(reports, pieces, _)| (reports, pieces)));
    assert_eq!(late.reports, unharmed.reports);
    assert!(late.state == unharmed.state);
}

/// A world that goes wrong where a rank makes its communicators, which calls nothing.
struct NoCommunicator {
    world: ThreadRank,
    fate: Fate,
}

impl World<Cpu> for NoCommunicator {
    fn rank(&self) -> usize {
        self.world.rank()
    }

    fn size(&self) -> usize {
        self.world.size()
    }

    fn communicator(&self, key: GroupKey, ranks: &[usize]) -> moe_comm::Result<Box<dyn RawComm<Cpu>>> {
        match self.fate {
            Fate::Fail => {
                Err(moe_comm::Error::BadGroup { group: key, ranks: ranks.to_vec(), why: "injected" })
            }
            Fate::Panic => panic!("injected at {key}"),
            Fate::Hang => loop {
                thread::park();
            },
            Fate::Delay(time) => {
                thread::sleep(time);
                self.world.communicator(key, ranks)
            }
        }
    }
}

#[test]
fn a_rank_that_goes_wrong_while_it_makes_its_communicators_is_named() {
    for fate in [Fate::Fail, Fate::Panic, Fate::Hang] {
        let folder = tempfile::tempdir().unwrap();
        let fallen = fall(&folded(), folder.path(), move |setup, world, root| {
            life(setup, &NoCommunicator { world, fate }, root, |_| ())
        });
        assert_all_know(&fallen, &format!("{fate:?} in communicator()"));
        if fate != Fate::Hang {
            assert!(fallen.error.to_string().contains("injected"), "{}", fallen.error);
        }
    }
}

/// Text that goes wrong in the second step.
struct BadText {
    source: RandomBatches,
    fate: Fate,
}

impl BatchSource for BadText {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        match self.fate {
            _ if step != 2 => {}
            Fate::Fail => return Err(Error::Protocol { what: "injected" }),
            Fate::Panic => panic!("injected"),
            Fate::Hang => loop {
                thread::park();
            },
            Fate::Delay(time) => thread::sleep(time),
        }
        self.source.micro_batch(step, u)
    }
}

#[test]
fn a_rank_that_goes_wrong_between_calls_is_named() {
    for fate in [Fate::Fail, Fate::Panic, Fate::Hang] {
        let folder = tempfile::tempdir().unwrap();
        let fallen = fall(&folded(), folder.path(), move |setup, world, root| {
            life_on(setup, &world, root, &BadText { source: source(setup), fate }, |_| ())
        });
        assert_all_know(&fallen, &format!("{fate:?} while it reads"));
        if fate != Fate::Hang {
            assert!(fallen.error.to_string().contains("injected"), "{}", fallen.error);
        }
    }
}

/// A folder with a checkpoint of step 1 whose first weight of expert 5 of `layer` is NaN: of one rank under EP4.
fn poisoned_expert(layer: usize, root: &Path) -> std::path::PathBuf {
    let clean = tempfile::tempdir().unwrap();
    let to = clean.path().to_owned();
    ThreadWorld::run(WORLD, DEADLINE, move |world| {
        let setup = folded();
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        trainer.step(1, &source(&setup))?;
        save(&trainer, &to, 1, &meta(&setup, 1, 1))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let poisoned = format!("model.layers.{layer}.block_sparse_moe.experts.5.w1.weight");
    let mut planted = 0;
    let path = rewrite(&clean.path().join("step-1"), root, |name, kind, mut data| {
        if (name, kind) == (&poisoned, "param") {
            data[..8].copy_from_slice(&f64::NAN.to_le_bytes());
            planted += 1;
        }
        Some(data)
    });
    assert_eq!(planted, 1);
    path
}

/// Behind the last router a NaN reaches the gradient norm: no rank updates.
#[test]
fn a_nan_in_an_expert_of_the_last_layer_stops_the_update_on_every_rank() {
    let folder = tempfile::tempdir().unwrap();
    let path = poisoned_expert(1, folder.path());
    let unchanged = ThreadWorld::run(WORLD, DEADLINE, move |world| {
        let setup = folded();
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        restore(&mut trainer, &Checkpoint::open(&path)?)?;
        let bits = |trainer: &RankTrainer<f64, Cpu>| Ok::<_, Error>(format!("{:?}", pieces(trainer)?));
        let before = bits(&trainer)?;
        let report = trainer.step(2, &source(&setup))?;
        assert!(!report.updated && report.grad_norm.is_nan() && report.loss.unwrap().is_nan(), "{report:?}");
        assert_eq!(trainer.optimizer().updates(), 1);
        Ok::<_, Error>(bits(&trainer)? == before)
    })
    .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(unchanged, [true; WORLD]);
}

/// Before a router it stops the run, with the layer and the token.
#[test]
fn a_nan_in_an_expert_of_an_earlier_layer_is_named_by_the_next_router() {
    let folder = tempfile::tempdir().unwrap();
    let path = poisoned_expert(0, folder.path());
    let error = ThreadWorld::run(WORLD, DEADLINE, move |world| {
        let setup = folded();
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        restore(&mut trainer, &Checkpoint::open(&path)?)?;
        let result = trainer.step(2, &source(&setup)).map(drop);
        assert_eq!(trainer.optimizer().updates(), 1, "it updated");
        result
    })
    .unwrap_err();
    let message = error.to_string();
    assert!(message.contains("layer 1: router logits of token "), "{message}");
    assert!(message.contains("are not a number"), "{message}");
}
