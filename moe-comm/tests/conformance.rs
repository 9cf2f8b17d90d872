//! The exported suite on threads.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use moe_comm::{ThreadWorld, World, conformance};
use moe_kernels::Cpu;

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
