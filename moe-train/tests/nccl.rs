//! Ranks on GPUs, a process each, train as one rank on the host does. Where there are fewer GPUs than ranks they share them, which NCCL
//! takes for several machines. Where there is none, the tests say that they were skipped; with `MOE_REQUIRE_GPU` they fail.

mod common;

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{
    DEADLINE, Outcome, Piece, RandomBatches, assert_equal, gather, pieces, setup, tiny_model, train_in,
};
use moe_comm::processes::{Hub, Process};
use moe_comm::{Comms, NcclWorld, World};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_kernels::{Backend, Cuda, Float, bf16, cuda};
use moe_model::PipelineLayout;
use moe_pipeline::generate::Named;
use moe_topology::{Attention, Mapping};
use moe_train::trainer::{RankTrainer, Setup, StepReport};

const STEPS: u64 = 3;

/// What a test asks of the ranks that it starts.
const RUN: &str = "MOE_TRAIN_TEST_RUN";
const HUB: &str = "MOE_TRAIN_TEST_HUB";
const FOLDER: &str = "MOE_TRAIN_TEST_FOLDER";
const RANK: &str = "MOE_TRAIN_TEST_RANK";

struct Run {
    what: &'static str,
    mapping: Mapping,
    dispatcher: DispatcherKind,
    schedule: Named,
    virtual_stages: usize,
}

/// Each axis alone; then all that fit into four ranks, under a schedule whose all-to-alls are started early.
fn runs() -> Vec<Run> {
    let of = |what, sizes: [usize; 5], dispatcher| {
        let [tp, cp, pp, etp, ep] = sizes;
        let mapping = Mapping { world_size: 2, tp, cp, pp, etp, ep, ..Mapping::default() };
        Run { what, mapping, dispatcher, schedule: Named::Interleaved1F1B, virtual_stages: 1 }
    };
    let of_four = |what, [tp, cp, pp, etp, ep]: [usize; 5], schedule, virtual_stages| {
        let mapping = Mapping { world_size: 4, tp, cp, pp, etp, ep, ..Mapping::default() };
        Run { what, mapping, dispatcher: AllToAll, schedule, virtual_stages }
    };
    vec![
        of("dp2", [1, 1, 1, 1, 1], AllToAll),
        of("tp2, etp2", [2, 1, 1, 2, 1], AllToAll),
        of("cp2, ep2", [1, 2, 1, 1, 2], AllToAll),
        of("pp2", [1, 1, 2, 1, 1], AllToAll),
        of("dp2, ep2", [1, 1, 1, 1, 2], AllToAll),
        of("dp2, ep2, all-gather", [1, 1, 1, 1, 2], AllGather),
        of_four("tp2, pp2, ep2", [2, 1, 2, 1, 2], Named::Overlapped1F1B, 2),
        of_four("dp2, pp2, ep2, DualPipeV", [1, 1, 2, 1, 2], Named::DualPipeV, 2),
    ]
}

fn setup_of(run: &Run) -> Setup {
    let model = moe_model::ModelConfig { num_hidden_layers: 4, ..tiny_model() };
    let layers = model.num_hidden_layers;
    let mut setup = setup(model, run.mapping.clone());
    let layout = PipelineLayout::even(layers, run.mapping.pp, run.virtual_stages).unwrap();
    let placement = run.schedule.placement(run.mapping.pp as u32, run.virtual_stages as u32).unwrap();
    setup.pipeline = layout.placed(placement).unwrap();
    setup.schedule = run.schedule;
    setup.dispatcher = run.dispatcher;
    setup
}

fn batches(setup: &Setup) -> RandomBatches {
    RandomBatches {
        vocab: setup.model.vocab_size as u32,
        seq_len: setup.sequence_length,
        micro_batch: setup.micro_batch_size,
    }
}

#[test]
fn they_give_what_one_rank_on_the_host_gives() {
    let gpus = match cuda::probe() {
        Ok(count) if count > 0 => count,
        other => {
            assert!(env::var_os("MOE_REQUIRE_GPU").is_none(), "no GPU: {other:?}");
            eprintln!("skipped, no GPU: {other:?}");
            return;
        }
    };
    for (index, run) in runs().iter().enumerate() {
        let (size, folder) = (run.mapping.world_size, tempfile::tempdir().unwrap());
        let hub = Hub::listen("127.0.0.1:0", size, DEADLINE).unwrap();
        let start = |rank: usize| -> Child {
            let mut command = Command::new(env::current_exe().unwrap());
            command.args(["--exact", "rank", "--nocapture"]).stdin(Stdio::null());
            command.env(RUN, index.to_string()).env(RANK, rank.to_string());
            command.env(HUB, hub.address().to_string()).env(FOLDER, folder.path());
            if size > gpus {
                command.env("NCCL_HOSTID", format!("rank {rank}"));
            }
            command.spawn().unwrap()
        };
        let children: Vec<Child> = (0..size).map(start).collect();
        for (rank, mut child) in children.into_iter().enumerate() {
            let status = child.wait().unwrap();
            assert!(status.success(), "{}: rank {rank}: {status}", run.what);
        }
    }
}

/// One of the ranks that the test has started; nothing otherwise.
#[test]
fn rank() {
    let Ok(index) = env::var(RUN) else { return };
    let rank: usize = env::var(RANK).unwrap().parse().unwrap();
    let run = runs().swap_remove(index.parse().unwrap());
    let process = Process::join(&env::var(HUB).unwrap(), rank, run.mapping.world_size, DEADLINE).unwrap();
    let gpu = Cuda::poisoned(rank % cuda::probe().unwrap()).unwrap();
    let trained = NcclWorld::run(process, gpu.clone(), move |world| train(&run, world, gpu));
    trained.unwrap_or_else(|error| panic!("{error}"));
}

fn train(run: &Run, world: &NcclWorld, gpu: Cuda) -> moe_train::Result<()> {
    let (setup, folder) = (setup_of(run), env::var(FOLDER).unwrap());
    let (reports, own) = train_on::<f64>(&setup, world, &gpu)?;
    let path = |rank: usize| Path::new(&folder).join(format!("{rank}.json"));
    fs::write(path(world.rank()), serde_json::to_vec(&own).unwrap()).unwrap();
    let comms = Comms::builder().attention(Attention::ALL).build(world, &gpu, &setup.folding)?;
    comms.group(Attention::ALL)?.barrier()?;
    let alone =
        Run { mapping: Mapping::default(), virtual_stages: 1, schedule: Named::Interleaved1F1B, ..*run };
    let reference = train_in::<f64>(setup_of(&alone), STEPS, batches(&setup));
    if world.rank() == 0 {
        let of = |rank| serde_json::from_slice::<Vec<Piece>>(&fs::read(path(rank)).unwrap()).unwrap();
        let together: Outcome = gather((0..world.size()).map(|rank| (reports.clone(), of(rank))));
        assert_equal(&together, &reference, &setup, run.what);
    }
    // Choices of experts that are near ties may turn, so the bounds are wide; a wrong factor, or a sum left out, is far beyond them.
    let twice = [train_on::<bf16>(&setup, world, &gpu)?, train_on::<bf16>(&setup, world, &gpu)?];
    assert!(twice[0] == twice[1], "{}: the same run twice is not the same bits", run.what);
    for (got, want) in twice[0].0.iter().zip(&reference.reports) {
        for (what, a, b) in [
            ("loss", got.loss.unwrap(), want.loss.unwrap()),
            ("gradient norm", got.grad_norm, want.grad_norm),
        ] {
            assert!(
                (a - b).abs() <= 0.05 * b.abs(),
                "{}, bf16: {what} of step {}: {a} and {b}",
                run.what,
                want.step
            );
        }
    }
    Ok(())
}

fn train_on<T: Float>(
    setup: &Setup,
    world: &NcclWorld,
    gpu: &Cuda,
) -> moe_train::Result<(Vec<StepReport>, Vec<Piece>)>
where
    Cuda: Backend<T>,
{
    let source = batches(setup);
    let mut trainer = RankTrainer::<T, Cuda>::new(setup.clone(), world, gpu.clone())?;
    let mut reports = Vec::new();
    for step in 1..=STEPS {
        reports.push(trainer.step(step, &source)?);
    }
    trainer.await_weights()?;
    let pieces = pieces(&trainer)?;
    Ok((reports, pieces))
}
