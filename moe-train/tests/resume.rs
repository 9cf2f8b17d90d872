//! A run that goes on from a checkpoint: bit for bit under the same folding, to rounding under another one.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::checkpoints::{meta, rewrite, tensors};
use common::{
    DEADLINE, Outcome, RandomBatches, assert_equal, assert_same_bits, gather, pieces, setup, tiny_model,
};
use moe_comm::{ThreadWorld, World, WorldError};
use moe_dispatch::DispatcherKind;
use moe_kernels::{Backend, Cpu, Float, bf16};
use moe_model::{ModelConfig, PipelineLayout};
use moe_pipeline::generate::Named;
use moe_topology::{Attention, Mapping};
use moe_train::Error;
use moe_train::checkpoint::container::Checkpoint;
use moe_train::checkpoint::{restore, save};
use moe_train::optim::{Hyper, MomentDType, MomentDTypes};
use moe_train::trainer::{BatchSource, RankTrainer, Sequence, Setup};

/// The step after which runs are cut, and their last one.
const CUT: u64 = 2;
const LAST: u64 = 4;

/// `(tp, dp, pp, etp, ep)` and the dispatcher.
type Case = ((usize, usize, usize, usize, usize), DispatcherKind);

const ONE: Case = ((1, 1, 1, 1, 1), DispatcherKind::AllToAll);
/// Foldings of one to eight ranks that differ in every axis.
const CASES: [Case; 6] = [
    ONE,
    ((2, 2, 2, 1, 4), DispatcherKind::AllToAll),
    ((2, 2, 2, 2, 2), DispatcherKind::AllGather),
    ((1, 4, 1, 4, 1), DispatcherKind::AllToAll),
    ((3, 1, 2, 1, 1), DispatcherKind::AllToAll),
    ((1, 2, 3, 1, 2), DispatcherKind::AllGather),
];

fn case(((tp, dp, pp, etp, ep), dispatcher): Case) -> Setup {
    let mapping = Mapping { world_size: tp * dp * pp, tp, pp, etp, ep, ..Mapping::default() };
    let model = ModelConfig {
        tie_word_embeddings: true,
        mlp_only_layers: vec![1],
        shared_expert_intermediate_size: Some(6),
        ..tiny_model()
    };
    Setup { dispatcher, global_batch_size: 8, ..setup(model, mapping) }
}

/// A source that notes what it was asked: step, micro-batch, and how often.
#[derive(Debug)]
struct Noted {
    source: RandomBatches,
    asked: Arc<Mutex<BTreeMap<(u64, usize), usize>>>,
}

impl BatchSource for Noted {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        *self.asked.lock().unwrap().entry((step, u)).or_default() += 1;
        self.source.micro_batch(step, u)
    }
}

/// A part of a run.
#[derive(Default)]
struct Leg<'a> {
    /// The checkpoint it starts from.
    from: Option<&'a Path>,
    /// Its last step.
    last: u64,
    /// Where it saves, after which steps.
    saves: Vec<(u64, &'a Path)>,
}

/// What a part of a run came to.
struct Ended {
    outcome: Outcome,
    /// Micro-batches that the ranks loaded, and how many ranks did.
    asked: BTreeMap<(u64, usize), usize>,
}

type State = BTreeMap<String, [Vec<f64>; 3]>;

impl Ended {
    fn state(self) -> State {
        self.outcome.state
    }
}

fn run<T: Float>(setup: &Setup, leg: Leg<'_>) -> Ended
where
    Cpu: Backend<T>,
{
    let asked = Arc::new(Mutex::new(BTreeMap::new()));
    let source = Noted {
        source: RandomBatches {
            vocab: setup.model.vocab_size as u32,
            seq_len: setup.sequence_length,
            micro_batch: setup.micro_batch_size,
        },
        asked: asked.clone(),
    };
    let from = leg.from.map(Path::to_owned);
    let saves: Vec<(u64, PathBuf)> =
        leg.saves.iter().map(|(step, root)| (*step, (*root).to_owned())).collect();
    let (inner, last) = (setup.clone(), leg.last);
    let ranks = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let mut trainer = RankTrainer::<T, Cpu>::new(inner.clone(), &world, Cpu::poisoned(1))?;
        let start = match &from {
            Some(path) => {
                let checkpoint = Checkpoint::open(path)?;
                let restored = restore(&mut trainer, &checkpoint)?;
                assert_eq!(restored.cursor, checkpoint.step() * inner.global_batch_size as u64);
                checkpoint.step()
            }
            None => 0,
        };
        let save_due = |trainer: &RankTrainer<T, Cpu>, step| {
            saves.iter().filter(|(due, _)| *due == step).try_for_each(|(_, root)| {
                save(trainer, root, step, &meta(&inner, step, trainer.optimizer().updates())).map(drop)
            })
        };
        save_due(&trainer, start)?;
        let mut reports = Vec::new();
        for step in start + 1..=last {
            reports.push(trainer.step(step, &source)?);
            save_due(&trainer, step)?;
        }
        Ok::<_, Error>((reports, pieces(&trainer)?))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let asked = asked.lock().unwrap().clone();
    Ended { outcome: gather(ranks), asked }
}

/// The reports and micro-batches of the steps after the cut.
fn after_cut(ended: Ended) -> Ended {
    let Ended { mut outcome, mut asked } = ended;
    outcome.reports.retain(|report| report.step > CUT);
    asked.retain(|(step, _), _| *step > CUT);
    Ended { outcome, asked }
}

fn same_folding_same_bits<T: Float>(setup: Setup)
where
    Cpu: Backend<T>,
{
    let which = setup.folding.mapping().clone();
    let (folder, again) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (root, again) = (folder.path(), again.path());
    let whole = run::<T>(&setup, Leg { from: None, last: LAST, saves: vec![(CUT, root), (LAST, root)] });
    let cut = root.join(format!("step-{CUT}"));
    let resumed =
        run::<T>(&setup, Leg { from: Some(&cut), last: LAST, saves: vec![(CUT, again), (LAST, again)] });

    let whole = after_cut(whole);
    assert_eq!(resumed.outcome.reports.len() as u64, LAST - CUT);
    assert_same_bits(&resumed.outcome, &whole.outcome, &format!("{which}"));
    assert_eq!(resumed.asked, whole.asked);
    for step in [CUT, LAST] {
        let name = format!("step-{step}");
        let (written, rewritten) = (tensors(&root.join(&name)), tensors(&again.join(&name)));
        assert!(!written.is_empty() && written == rewritten, "{which}: checkpoint of step {step}");
    }
}

#[test]
fn the_same_folding_goes_on_bit_for_bit_in_f64() {
    same_folding_same_bits::<f64>(case(CASES[1]));
    same_folding_same_bits::<f64>(case(CASES[2]));
}

#[test]
fn the_same_folding_goes_on_bit_for_bit_in_f32() {
    same_folding_same_bits::<f32>(case(CASES[1]));
    same_folding_same_bits::<f32>(case(CASES[2]));
}

fn in_bf16(setup: Setup) -> Setup {
    let moments = MomentDTypes { exp_avg: Some(MomentDType::Bf16), exp_avg_sq: Some(MomentDType::Bf16) };
    Setup { optimizer: Hyper { moments, ..setup.optimizer }, ..setup }
}

#[test]
fn moments_in_bf16_go_on_bit_for_bit() {
    same_folding_same_bits::<f32>(in_bf16(case(CASES[1])));
    same_folding_same_bits::<f32>(in_bf16(case(CASES[5])));
}

#[test]
fn moments_in_bf16_go_on_under_any_folding() {
    let one = in_bf16(case(ONE));
    let whole = after_cut(run::<f64>(&one, Leg { last: LAST, ..Leg::default() }));
    for (writer, reader) in [(CASES[1], CASES[5]), (CASES[5], CASES[2]), (ONE, CASES[3]), (CASES[4], ONE)] {
        let what = format!("{writer:?} to {reader:?}");
        let (folder, again) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let leg = Leg { last: CUT, saves: vec![(CUT, folder.path())], ..Leg::default() };
        run::<f64>(&in_bf16(case(writer)), leg);
        let path = folder.path().join(format!("step-{CUT}"));
        let leg = Leg { from: Some(&path), last: LAST, saves: vec![(CUT, again.path())] };
        let resumed = run::<f64>(&in_bf16(case(reader)), leg);
        let written = tensors(&path);
        assert!(tensors(&again.path().join(format!("step-{CUT}"))) == written, "{what}");
        let bytes =
            |kind: &str| written.iter().filter(|((_, k), _)| k == kind).map(|(_, b)| b.len()).sum::<usize>();
        assert_eq!((4 * bytes("m"), 4 * bytes("v")), (bytes("param"), bytes("param")));
        assert_equal(&resumed.outcome, &whole.outcome, &one, &what);
    }
}

/// A run that keeps moments in bf16 goes on from one that did not, and the other way round.
#[test]
fn moments_are_rounded_or_widened_when_read() {
    let (rounds, keeps) = (in_bf16(case(CASES[1])), case(CASES[5]));
    let folder = tempfile::tempdir().unwrap();
    let leg = Leg { last: CUT, saves: vec![(CUT, folder.path())], ..Leg::default() };
    let written = run::<f32>(&keeps, leg).state();
    let path = folder.path().join(format!("step-{CUT}"));
    let again = tempfile::tempdir().unwrap();
    let leg = Leg { from: Some(&path), last: CUT, saves: vec![(CUT, again.path())] };
    let rounded = run::<f32>(&rounds, leg).state();
    assert!(rounded.keys().eq(written.keys()));
    for (name, [master, m, v]) in &written {
        let nearest = |x: &[f64]| x.iter().map(|&x| bf16::from_f32(x as f32).to_f64()).collect();
        assert_eq!(rounded[name], [master.clone(), nearest(m), nearest(v)], "{name}");
    }
    let path = again.path().join(format!("step-{CUT}"));
    let widened = run::<f32>(&keeps, Leg { from: Some(&path), last: CUT, ..Leg::default() }).state();
    assert!(widened == rounded && rounded != written);
}

/// Every folding's checkpoint under every folding: what is saved again without a step is the same to the bit, and what
/// follows is the uninterrupted run of one rank.
#[test]
fn any_folding_goes_on_from_any_other() {
    let one = case(ONE);
    let whole = after_cut(run::<f64>(&one, Leg { last: LAST, ..Leg::default() }));
    let wanted: BTreeMap<(u64, usize), usize> =
        (CUT + 1..=LAST).flat_map(|step| (0..one.micro_batches()).map(move |u| ((step, u), 1))).collect();
    assert_eq!(whole.asked, wanted);
    for writer in CASES {
        let folder = tempfile::tempdir().unwrap();
        run::<f64>(&case(writer), Leg { last: CUT, saves: vec![(CUT, folder.path())], ..Leg::default() });
        let path = folder.path().join(format!("step-{CUT}"));
        let written = tensors(&path);
        for reader in CASES {
            let what = format!("{writer:?} to {reader:?}");
            let again = tempfile::tempdir().unwrap();
            let setup = case(reader);
            let leg = Leg { from: Some(&path), last: LAST, saves: vec![(CUT, again.path())] };
            let resumed = run::<f64>(&setup, leg);
            assert!(tensors(&again.path().join(format!("step-{CUT}"))) == written, "{what}");
            assert_equal(&resumed.outcome, &whole.outcome, &one, &what);

            // Each micro-batch once, on all ranks of one data-parallel group and on no other.
            let per_group = setup.folding.world_size() / setup.folding.size(Attention::DP);
            let all_asked: BTreeMap<_, _> = wanted.keys().map(|&key| (key, per_group)).collect();
            assert_eq!(resumed.asked, all_asked, "{what}");
        }
    }
}

/// The same for layers dealt otherwise to the ranks: nothing of it is in a checkpoint.
#[test]
fn any_layout_of_layers_goes_on_from_any_other() {
    let one = case(ONE);
    let whole = after_cut(run::<f64>(&one, Leg { last: LAST, ..Leg::default() }));
    let layouts: [&[usize]; 3] = [&[1, 2], &[0, 1, 2, 0], &[1, 1, 1, 0]];
    let dealt =
        |layers: &[usize]| Setup { pipeline: PipelineLayout::new(3, 2, layers).unwrap(), ..case(CASES[1]) };
    for writer in layouts {
        let folder = tempfile::tempdir().unwrap();
        run::<f64>(&dealt(writer), Leg { last: CUT, saves: vec![(CUT, folder.path())], ..Leg::default() });
        let path = folder.path().join(format!("step-{CUT}"));
        let written = tensors(&path);
        for reader in layouts {
            let what = format!("{writer:?} to {reader:?}");
            let again = tempfile::tempdir().unwrap();
            let leg = Leg { from: Some(&path), last: LAST, saves: vec![(CUT, again.path())] };
            let resumed = run::<f64>(&dealt(reader), leg);
            assert!(tensors(&again.path().join(format!("step-{CUT}"))) == written, "{what}");
            assert_equal(&resumed.outcome, &whole.outcome, &one, &what);
        }
    }
}

/// The same for the schedule and the stages that it needs: bit for bit under the same folding, of a tied matrix too.
#[test]
fn any_schedule_goes_on_from_any_other() {
    let under = |schedule: Named| {
        let layers: &[usize] = if schedule.virtual_stages() == Some(1) { &[1, 2] } else { &[1, 1, 1, 0] };
        let layout = PipelineLayout::new(3, 2, layers).unwrap();
        let placement = schedule.placement(2, layout.virtual_stages() as u32).unwrap();
        Setup { schedule, pipeline: layout.placed(placement).unwrap(), ..case(CASES[1]) }
    };
    let one = case(ONE);
    let of_one = after_cut(run::<f64>(&one, Leg { last: LAST, ..Leg::default() }));
    let whole = after_cut(run::<f64>(&under(Named::OneFOneB), Leg { last: LAST, ..Leg::default() }));
    let schedules = [Named::OneFOneB, Named::ZbH2, Named::BreadthFirst, Named::ZbV, Named::DualPipeV];
    for writer in schedules {
        let folder = tempfile::tempdir().unwrap();
        run::<f64>(&under(writer), Leg { last: CUT, saves: vec![(CUT, folder.path())], ..Leg::default() });
        let path = folder.path().join(format!("step-{CUT}"));
        let written = tensors(&path);
        for reader in schedules {
            let what = format!("{writer} to {reader}");
            let again = tempfile::tempdir().unwrap();
            let leg = Leg { from: Some(&path), last: LAST, saves: vec![(CUT, again.path())] };
            let resumed = run::<f64>(&under(reader), leg);
            assert!(tensors(&again.path().join(format!("step-{CUT}"))) == written, "{what}");
            assert_same_bits(&resumed.outcome, &whole.outcome, &what);
        }
        let resumed = run::<f64>(&one, Leg { from: Some(&path), last: LAST, saves: Vec::new() });
        assert_equal(&resumed.outcome, &of_one.outcome, &one, &format!("{writer} to one rank"));
    }
}

/// A checkpoint of `CASES[1]` after one step in `T`.
fn written<T: Float>(root: &Path) -> PathBuf
where
    Cpu: Backend<T>,
{
    run::<T>(&case(CASES[1]), Leg { last: 1, saves: vec![(1, root)], ..Leg::default() });
    root.join("step-1")
}

/// What every rank says when it is given the checkpoint; its state must be as it was.
fn refusals<T: Float>(setup: Setup, path: &Path) -> Vec<String>
where
    Cpu: Backend<T>,
{
    let path = path.to_owned();
    ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let mut trainer = RankTrainer::<T, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        let before = pieces(&trainer)?;
        let error = restore(&mut trainer, &Checkpoint::open(&path)?).expect_err("it was taken");
        assert!(pieces(&trainer)? == before, "the state changed");
        assert_eq!(trainer.optimizer().updates(), 0);
        Ok::<_, Error>(error.to_string())
    })
    .unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_checkpoint_of_another_model_is_refused_with_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = written::<f32>(folder.path());
    let before = hashes(folder.path());
    for (key, model) in [
        ("num_local_experts", ModelConfig { num_local_experts: 4, ..case(ONE).model }),
        ("num_hidden_layers", ModelConfig { num_hidden_layers: 4, ..case(ONE).model }),
        ("router_aux_loss_coef", ModelConfig { router_aux_loss_coef: Some(0.5), ..case(ONE).model }),
    ] {
        let pipeline = PipelineLayout::even(model.num_hidden_layers, 2, 1).unwrap();
        let setup = Setup { model, pipeline, ..case(CASES[1]) };
        for refusal in refusals::<f32>(setup, &path) {
            assert!(refusal.contains(&format!("is of another model: {key} is ")), "{refusal}");
        }
    }
    assert_eq!(hashes(folder.path()), before);
}

#[test]
fn a_checkpoint_of_another_element_type_or_without_a_tensor_is_refused_with_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = written::<f32>(folder.path());
    for refusal in refusals::<f64>(case(CASES[1]), &path) {
        assert!(refusal.contains(".weight is [") && refusal.contains("f32 there and ["), "{refusal}");
        assert!(refusal.ends_with("f64 in this run"), "{refusal}");
    }

    let lacks = tempfile::tempdir().unwrap();
    let name = "model.norm.weight";
    let path =
        rewrite(&path, lacks.path(), |tensor, kind, data| (tensor != name || kind != "v").then_some(data));
    // On one rank, so that it needs all tensors.
    for refusal in refusals::<f32>(case(ONE), &path) {
        assert!(refusal.ends_with(&format!("has no v of {name}")), "{refusal}");
    }
}

/// Everything under a folder by path, with its hash.
fn hashes(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.insert(path.clone(), "a folder".to_owned());
            found.extend(hashes(&path));
        } else {
            found.insert(path.clone(), blake3::hash(&fs::read(&path).unwrap()).to_string());
        }
    }
    found
}

/// Saves a fresh run's state as that of step 1.
fn save_to(root: &Path) -> Result<(), WorldError> {
    let (setup, root) = (case(CASES[1]), root.to_owned());
    ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let trainer = RankTrainer::<f32, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        save(&trainer, &root, 1, &meta(&setup, 1, 0))?;
        Ok::<_, Error>(world.rank())
    })
    .map(drop)
}

#[test]
fn a_checkpoint_is_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    written::<f32>(folder.path());
    let before = hashes(folder.path());
    let error = save_to(folder.path()).unwrap_err();
    assert_eq!(error.rank(), Some(0));
    assert!(error.to_string().contains("step-1 exists already and is not overwritten"), "{error}");
    assert_eq!(hashes(folder.path()), before);
}

#[test]
fn where_nothing_can_be_written_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "no folder").unwrap();
    let before = hashes(folder.path());
    let error = save_to(&file.join("checkpoints")).unwrap_err();
    assert_eq!(error.rank(), Some(0));
    assert!(
        error.to_string().contains("cannot create") && error.to_string().contains("checkpoints"),
        "{error}"
    );
    assert_eq!(hashes(folder.path()), before);
}
