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

#[test]
fn what_a_rank_alone_would_wait_for_forever_is_refused() {
    let device = Cpu::new(1);
    let folding = Folding::new(Mapping::default()).unwrap();
    let world = SoloWorld::new(device.clone());
    let comms = Comms::builder().attention(Attention::PP).build(&world, &device, &folding).unwrap();
    let comm = comms.group(Attention::PP).unwrap();
    let said = |result: moe_comm::Result<Tensor<f32, Cpu>>| result.unwrap_err().to_string();
    assert!(said(comm.recv(0, 1, 1, 1).unwrap().wait()).contains("never sent"));
    let x = Tensor::<f32, Cpu>::from_slice(&device, 1, 2, &[1.0, 2.0]).unwrap();
    // The message asked for above has the first number.
    for tag in [1, 2] {
        let _sent = comm.send(0, tag, &x).unwrap();
    }
    assert!(said(comm.recv(0, 3, 1, 2).unwrap().wait()).contains("tag 3"));
    assert!(matches!(world.communicator(Attention::PP.into(), &[1]), Err(Error::BadGroup { .. })));
    comm.raw().abort("enough");
    assert!(comm.barrier().unwrap_err().to_string().contains("aborted: enough"));
}

#[test]
fn mismatches_are_reported_to_every_rank() {
    for size in [2, 3, 8] {
        for (name, case) in conformance::mismatches() {
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
            assert!(ended.unwrap_err().to_string().contains("mismatch"), "{name}");
        }
    }
}
