//! Ranks that call different things.

use moe_kernels::Device;
use moe_topology::{Attention, Expert};

use super::sample::tensor;
use super::{Case, Group, Outcome, ended, typed, whole};
use crate::{Error, Reduction, Result, World};

/// The cases that end their world: rank 0 calls one thing and the others another, and all get an error that describes
/// both. Each wants a fresh world of two ranks or more.
pub fn mismatches<D: Device>() -> Vec<Case<D>> {
    vec![
        ("groups of the same ranks", |world, device| {
            differ(world, device, ["barrier of attention", "barrier of expert"], |comm, first| {
                let key = if first { Attention::ALL.into() } else { Expert::ALL.into() };
                Group::new(comm.raw(), device, key).barrier()
            })
        }),
        ("operations", |world, device| {
            differ(world, device, ["all_reduce", "barrier"], |comm, first| {
                if first { sum::<D>(comm, device, [2, 3]) } else { comm.barrier() }
            })
        }),
        ("element types", |world, device| {
            differ(world, device, ["6 f64", "6 i64"], |comm, first| {
                if first {
                    sum::<D>(comm, device, [2, 3])
                } else {
                    comm.all_reduce(&tensor::<i64, D>(device, 0, 0, [2, 3])?, Reduction::Sum).map(drop)
                }
            })
        }),
        ("reductions", |world, device| {
            differ(world, device, ["(sum)", "(max)"], |comm, first| {
                let reduction = if first { Reduction::Sum } else { Reduction::Max };
                comm.all_reduce(&tensor::<f64, D>(device, 0, 0, [2, 3])?, reduction).map(drop)
            })
        }),
        ("counts", |world, device| {
            differ(world, device, ["6 f64", "9 f64"], |comm, first| {
                sum::<D>(comm, device, if first { [2, 3] } else { [3, 3] })
            })
        }),
        ("shapes", |world, device| {
            differ(world, device, ["rows of 6", "rows of 4"], |comm, first| {
                sum::<D>(comm, device, if first { [2, 6] } else { [3, 4] })
            })
        }),
        ("rows gathered", |world, device| {
            differ(world, device, ["all_gather of [", "all_gather of ["], |comm, first| {
                let mut rows = vec![2; comm.size()];
                rows[1] = if first { 3 } else { 2 };
                comm.all_gather_rows_v(&tensor::<f64, D>(device, 0, 0, [2, 1])?, &rows).map(drop)
            })
        }),
        ("rows scattered", |world, device| {
            differ(
                world,
                device,
                ["reduce_scatter (sum) of [1,", "reduce_scatter (sum) of [2,"],
                |comm, first| {
                    let mut rows = vec![1; comm.size()];
                    rows[usize::from(first)] += 1;
                    let x = tensor::<f64, D>(device, 0, 0, [comm.size() + 1, 1])?;
                    comm.reduce_scatter_rows_v(&x, &rows).map(drop)
                },
            )
        }),
        ("rows sent and received", |world, device| {
            differ(world, device, ["sending [", "receiving ["], |comm, _| {
                let mut recv = vec![1; comm.size()];
                if comm.rank() == 1 {
                    recv[0] = 2;
                }
                let x = tensor::<f64, D>(device, 0, 0, [comm.size(), 1])?;
                comm.all_to_all_rows_v(&x, &vec![1; comm.size()], &recv).map(drop)
            })
        }),
        ("roots", |world, device| {
            differ(world, device, ["from 0", "from 1"], |comm, first| {
                let x = tensor::<f64, D>(device, 0, 0, [1, 1])?;
                comm.broadcast(usize::from(!first), (comm.rank() < 2).then_some(&x), [1, 1]).map(drop)
            })
        }),
        ("tags", |world, device| {
            differ(world, device, ["with tag 3", "with tag 4"], |comm, first| {
                message(comm, device, first, 4, 2)
            })
        }),
        ("lengths of a message", |world, device| {
            differ(world, device, ["2 f64", "of 3"], |comm, first| message(comm, device, first, 3, 3))
        }),
    ]
}

fn sum<D: Device>(comm: &Group<'_, D>, device: &D, shape: [usize; 2]) -> Result<()> {
    comm.all_reduce(&tensor::<f64, D>(device, 0, 0, shape)?, Reduction::Sum).map(drop)
}

/// Rank 0 sends two elements with tag 3, rank 1 expects something else, the others wait for them.
fn message<D: Device>(comm: &Group<'_, D>, device: &D, first: bool, tag: u64, rows: usize) -> Result<()> {
    match comm.rank() {
        _ if first => comm.send(1, 3, &tensor::<f64, D>(device, 0, 0, [2, 1])?)?.wait().map(drop),
        1 => comm.recv::<f64>(0, tag, rows, 1)?.wait().map(drop),
        _ => comm.barrier(),
    }
}

fn differ<D: Device>(
    world: &dyn World<D>,
    device: &D,
    described: [&str; 2],
    call: impl Fn(&Group<'_, D>, bool) -> Result<()>,
) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let names_both = |why: &str| {
        why.contains("rank 0 calls")
            && described.iter().all(|d| why.contains(d))
            && why.matches("calls").count() == 2
    };
    let first = ended(&comm, device, call(&comm, world.rank() == 0));
    // The second time: from now on, everything fails.
    for error in [first, comm.barrier().err()] {
        match error {
            Some(Error::Poisoned { group: Some(_), op: Some(_), sequence: Some(0), ref why, .. })
                if names_both(why) => {}
            other => return Err(format!("expected a report of {described:?}, got {other:?}").into()),
        }
    }
    Ok(())
}
