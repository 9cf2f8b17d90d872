//! The exported suite on threads, and alone.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use moe_comm::{Comms, Error, SoloWorld, ThreadWorld, World, conformance};
use moe_kernels::{Cpu, Tensor};
use moe_topology::{Attention, Folding, Mapping};

const DEADLINE: Duration = Duration::from_secs(30);

#[test]
fn cases_pass_in_worlds_of_every_size() {
    for size in [1, 2, 3, 4, 8] {
        let ended = ThreadWorld::run(size, DEADLINE, |world| {
            for (name, case) in conformance::cases() {
                case(&world, &Cpu::new(1)).map_err(|error| format!("{name}: {error}"))?;
            }
            Ok::<_, String>(world.rank())
        });
        assert_eq!(ended.unwrap(), (0..size).collect::<Vec<_>>());
    }
}

#[test]
fn cases_pass_alone() {
    let device = Cpu::poisoned(1);
    for (name, case) in conformance::cases() {
        case(&SoloWorld::new(device.clone()), &device).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

fn x() -> Tensor<f32, Cpu> {
    Tensor::from_slice(&Cpu::new(1), 1, 2, &[1.0, 2.0]).unwrap()
}

fn alone() -> (SoloWorld<Cpu>, Comms<Cpu>) {
    let device = Cpu::new(1);
    let world = SoloWorld::new(device.clone());
    let folding = Folding::new(Mapping::default()).unwrap();
    let comms = Comms::builder().attention(Attention::PP).build(&world, &device, &folding).unwrap();
    (world, comms)
}

#[test]
fn what_a_rank_alone_would_wait_for_forever_is_refused() {
    let (world, comms) = alone();
    let comm = comms.group(Attention::PP).unwrap();
    let said = |result: moe_comm::Result<Tensor<f32, Cpu>>| result.unwrap_err().to_string();
    assert!(said(comm.send(0, 1, &x()).unwrap().wait()).contains("never received"));
    // It is still there, and the next call has to be its other side.
    assert!(said(comm.recv::<f32>(0, 2, 1, 2).map(|_| x())).contains("tag 1"));
    assert_eq!(comm.recv::<f32>(0, 1, 1, 2).unwrap().wait().unwrap().shape(), [1, 2]);
    assert!(said(comm.recv(0, 1, 1, 1).unwrap().wait()).contains("never sent"));
    assert!(matches!(world.communicator(Attention::PP.into(), &[1]), Err(Error::BadGroup { .. })));
}

/// Neither of the two worlds buffers messages, so that code which runs there relies on no buffer.
#[test]
fn a_send_is_not_done_before_its_receive() {
    let (_, comms) = alone();
    let comm = comms.group(Attention::PP).unwrap();
    let sent = comm.send(0, 0, &x()).unwrap();
    assert_eq!(sent.ready(), Ok(false));
    let _received = comm.recv::<f32>(0, 0, 1, 2).unwrap();
    assert_eq!(sent.ready(), Ok(true));
    let ended = ThreadWorld::run(2, DEADLINE, |world| -> moe_comm::Result<()> {
        let folding = Folding::new(Mapping { world_size: 2, pp: 2, ..Mapping::default() }).unwrap();
        let comms = Comms::builder().attention(Attention::PP).build(&world, &Cpu::new(1), &folding)?;
        let comm = comms.group(Attention::PP)?;
        if comm.rank() == 1 {
            comm.barrier()?;
            return comm.recv::<f32>(0, 0, 1, 2)?.wait().map(drop);
        }
        let sent = comm.send(1, 0, &x())?;
        assert!(!sent.ready()?);
        comm.barrier()?;
        sent.wait().map(drop)
    });
    ended.unwrap();
}

#[test]
fn an_abort_is_told_to_every_rank() {
    for (name, case) in conformance::aborts() {
        let device = Cpu::new(1);
        case(&SoloWorld::new(device.clone()), &device).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    for size in [1, 2, 3, 8] {
        ends_its_world(&conformance::aborts(), size, "aborted: enough");
    }
}

#[test]
fn mismatches_are_reported_to_every_rank() {
    for size in [2, 3, 8] {
        ends_its_world(&conformance::mismatches(), size, "mismatch");
    }
}

/// Each case passes on every rank of a world of its own, which fails for that reason.
fn ends_its_world(cases: &[conformance::Case<Cpu>], size: usize, why: &str) {
    for &(name, case) in cases {
        let verdicts = Arc::new(Mutex::new(Vec::new()));
        let ended = ThreadWorld::run(size, DEADLINE, {
            let verdicts = verdicts.clone();
            move |world| {
                let verdict = case(&world, &Cpu::new(1)).map_err(|error| error.to_string());
                verdicts.lock().unwrap().push(verdict);
                Ok::<_, String>(())
            }
        });
        let verdicts = verdicts.lock().unwrap();
        assert_eq!(*verdicts, vec![Ok(()); size], "{name} in a world of {size}: {ended:?}");
        assert!(ended.unwrap_err().to_string().contains(why), "{name}");
    }
}
