//! The exported suite over NCCL, each rank a process with a GPU, or with a share of one: then NCCL takes it for a machine of its own.
//!
//! Where there is no GPU, the tests say that they were skipped; with `MOE_REQUIRE_GPU` in the environment they fail.

use std::env;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use moe_comm::processes::{Hub, Process};
use moe_comm::{Comms, NcclWorld, Reduction, World, conformance};
use moe_kernels::family::{Gemm, Op};
use moe_kernels::{Cuda, Device, Tensor, cuda};
use moe_topology::{Attention, Folding, Mapping};

const DEADLINE: Duration = Duration::from_secs(60);

/// What a test asks of ranks that it starts: its name, and the hub of each world that they come together in.
const TEST: &str = "MOE_COMM_TEST";
const HUBS: &str = "MOE_COMM_TEST_HUBS";
const RANK: &str = "MOE_COMM_TEST_RANK";
const SIZE: &str = "MOE_COMM_TEST_SIZE";

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Starts `size` ranks of this program that run `test` in `worlds` worlds, and waits for them.
fn ranks(test: &str, size: usize, worlds: usize) {
    let deadline = if test == "late" { SHORT } else { DEADLINE };
    let gpus = match cuda::probe() {
        Ok(count) if count > 0 => count,
        other => {
            assert!(env::var_os("MOE_REQUIRE_GPU").is_none(), "{test}: no GPU: {other:?}");
            eprintln!("{test}: skipped, no GPU: {other:?}");
            return;
        }
    };
    let hubs: Vec<Hub> = (0..worlds).map(|_| Hub::listen("127.0.0.1:0", size, deadline).unwrap()).collect();
    let addresses = hubs.iter().map(|hub| hub.address().to_string()).collect::<Vec<_>>().join(",");
    let start = |rank: usize| -> Child {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "rank", "--nocapture"]).stdin(Stdio::null());
        command.env(TEST, test).env(HUBS, &addresses).env(RANK, rank.to_string()).env(SIZE, size.to_string());
        if size > gpus {
            command.env("NCCL_HOSTID", format!("rank {rank}"));
        }
        command.spawn().unwrap()
    };
    let mut children = Children((0..size).map(start).collect());
    for (rank, child) in children.0.iter_mut().enumerate() {
        let status = child.wait().unwrap();
        assert!(status.success(), "{test}: rank {rank} of {size}: {status}");
    }
}

/// Processes that do not outlive the test.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended needs no end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn cases_pass() {
    for size in [2, 4] {
        ranks("cases", size, 1);
    }
}

#[test]
fn mismatches_and_aborts_are_told_to_every_rank() {
    for size in [2, 3] {
        ranks("endings", size, endings().len());
    }
}

#[test]
fn a_rank_that_ends_does_not_come_or_panics_is_named() {
    ranks("killed", 2, 1);
    ranks("late", 2, 1);
    ranks("panicked", 2, 1);
}

#[test]
fn transfers_go_on_beside_kernels() {
    ranks("beside", 2, 1);
}

fn endings() -> Vec<conformance::Case<Cuda>> {
    [conformance::mismatches(), conformance::aborts()].concat()
}

/// One of the ranks that a test has started; nothing otherwise.
#[test]
fn rank() {
    let Ok(test) = env::var(TEST) else { return };
    let number = |name| env::var(name).unwrap().parse::<usize>().unwrap();
    let (rank, size) = (number(RANK), number(SIZE));
    let hubs = env::var(HUBS).unwrap();
    let hubs: Vec<&str> = hubs.split(',').collect();
    let deadline = if test == "late" { SHORT } else { DEADLINE };
    let run = |hub: &str, body: fn(&NcclWorld, &Cuda) -> Result<(), BoxError>| {
        let process = Process::join(hub, rank, size, deadline).unwrap();
        let gpu = Cuda::poisoned(rank % cuda::probe().unwrap()).unwrap();
        NcclWorld::run(process, gpu.clone(), move |world| body(world, &gpu))
    };
    match test.as_str() {
        "cases" => run(hubs[0], |world, gpu| {
            for (name, case) in conformance::cases() {
                let outcome = case(world, gpu).and_then(|()| Ok(gpu.synchronize()?));
                outcome.map_err(|error| format!("{name}: {error}"))?;
            }
            Ok(())
        })
        .unwrap(),
        "endings" => {
            for (hub, (name, case)) in hubs.into_iter().zip(endings()) {
                let (tell, told) = channel();
                let process = Process::join(hub, rank, size, DEADLINE).unwrap();
                let gpu = Cuda::poisoned(rank % cuda::probe().unwrap()).unwrap();
                let ended = NcclWorld::run(process, gpu.clone(), move |world| {
                    tell.send(case(world, &gpu).map_err(|error| error.to_string())).unwrap();
                    Ok::<_, BoxError>(())
                });
                assert_eq!(told.recv().unwrap(), Ok(()), "{name}");
                // Also for a rank that was content.
                let why = ended.unwrap_err().to_string();
                assert!(why.contains("mismatch") || why.contains("aborted: enough"), "{name}: {why}");
            }
        }
        "killed" => {
            let failed = run(hubs[0], |world, gpu| {
                let comm = whole(world, gpu)?;
                let comm = comm.group(Attention::ALL)?;
                let x = Tensor::<f32, Cuda>::zeros(gpu, 1000, 100)?;
                comm.all_reduce(&x, Reduction::Sum)?.to_vec(gpu)?;
                if world.rank() == 1 {
                    std::process::exit(0);
                }
                comm.all_reduce(&x, Reduction::Sum)?.to_vec(gpu)?;
                Ok(())
            });
            let failure = failed.unwrap_err();
            assert_eq!(failure.rank(), Some(1), "{failure}");
        }
        "late" => {
            let failed = run(hubs[0], |world, gpu| {
                let comm = whole(world, gpu)?;
                let comm = comm.group(Attention::ALL)?;
                let x = Tensor::<f32, Cuda>::zeros(gpu, 1000, 100)?;
                comm.all_reduce(&x, Reduction::Sum)?.to_vec(gpu)?;
                if world.rank() == 1 {
                    std::thread::sleep(3 * SHORT);
                }
                comm.all_reduce(&x, Reduction::Sum)?.to_vec(gpu)?;
                Ok(())
            });
            let failure = failed.unwrap_err();
            assert_eq!(failure.rank(), Some(1), "{failure}");
            assert!(failure.to_string().contains("did not arrive"), "{failure}");
        }
        "panicked" => {
            let failed = run(hubs[0], |world, gpu| {
                let comms = whole(world, gpu)?;
                let comm = comms.group(Attention::ALL)?;
                let x = Tensor::<f32, Cuda>::zeros(gpu, 1000, 100)?;
                // Both a collective and a message are under way, and are waited for by nobody.
                let _sum = comm.start_all_reduce(&x, Reduction::Sum)?;
                if world.rank() == 1 {
                    let _message = comm.recv::<f32>(0, 0, 1, 1)?;
                    panic!("out of luck");
                }
                comm.recv::<f32>(1, 1, 1, 1)?.wait()?.to_vec(gpu)?;
                Ok(())
            });
            let failure = failed.unwrap_err();
            assert_eq!(failure.rank(), Some(1), "{failure}");
            assert!(failure.to_string().contains("panicked: out of luck"), "{failure}");
        }
        "beside" => {
            let process = Process::join(hubs[0], rank, size, deadline).unwrap();
            let gpu = Cuda::poisoned(rank % cuda::probe().unwrap()).unwrap();
            let hosts = process.clone();
            NcclWorld::run(process, gpu.clone(), move |world| beside(world, &gpu, &hosts)).unwrap();
        }
        _ => panic!("no test {test}"),
    }
}

/// Longer than a rank takes to start, shorter than anybody wants to wait.
const SHORT: Duration = Duration::from_secs(10);

fn whole(world: &NcclWorld, gpu: &Cuda) -> moe_comm::Result<Comms<Cuda>> {
    let size = world.size();
    let folding =
        Folding::new(Mapping { world_size: size, tp: size, ..Mapping::default() }).expect("a legal mapping");
    Comms::builder().attention(Attention::ALL).build(world, gpu, &folding)
}

/// Products that were started after an all-to-all end before it, which waits for another rank; and an all-to-all that was started
/// before products ends while they are still under way.
fn beside(world: &NcclWorld, gpu: &Cuda, hosts: &Process) -> Result<(), BoxError> {
    let comms = whole(world, gpu)?;
    let comm = comms.group(Attention::ALL)?;
    let one_each = vec![64; world.size()];
    let rows = Tensor::<f32, Cuda>::zeros(gpu, 64 * world.size(), 1024)?;
    let [n, mut out] =
        [8192, 8192].map(|n| Tensor::<f32, Cuda>::zeros(gpu, n, n)).map(|x| x.expect("memory"));
    // The first time, NCCL connects the ranks, and cuBLASLt chooses.
    comm.all_to_all_rows_v(&rows, &one_each, &one_each)?;
    multiply(gpu, &mut out, &n, 1)?;
    gpu.synchronize()?;

    if world.rank() > 0 {
        hosts.barrier()?;
    }
    let started = comm.start_all_to_all_rows_v(&rows, &one_each, &one_each)?;
    if world.rank() == 0 {
        multiply(gpu, &mut out, &n, 10)?;
        gpu.synchronize()?;
        if started.ready()? {
            return Err("an all-to-all was ready without the other rank".into());
        }
        hosts.barrier()?;
    }
    started.wait()?.to_vec(gpu)?;

    let started = comm.start_all_to_all_rows_v(&rows, &one_each, &one_each)?;
    multiply(gpu, &mut out, &n, 200)?;
    let end = gpu.mark()?;
    while !started.ready()? {
        std::thread::yield_now();
    }
    if end.is_reached()? {
        return Err("the products had ended before the all-to-all".into());
    }
    // What follows is behind both.
    let received = started.wait()?;
    let here = gpu.mark()?;
    received.to_vec(gpu)?;
    assert!(end.is_reached()? && here.is_reached()?);
    Ok(())
}

fn multiply(
    gpu: &Cuda,
    out: &mut Tensor<f32, Cuda>,
    x: &Tensor<f32, Cuda>,
    times: usize,
) -> Result<(), BoxError> {
    for _ in 0..times {
        Gemm::<f32>::gemm(gpu, out.view_mut()?, x.view(), Op::N, x.view(), Op::N)?;
    }
    Ok(())
}
