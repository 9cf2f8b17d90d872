//! The suite that every backend has to pass.
//!
//! Each case is a function that all ranks of a world call together. [`cases`] pass in a world that goes on;
//! [`mismatches`], which need two ranks or more, and [`aborts`] end the world that they run in, so that each wants a
//! fresh one. Values
//! are small integers, which are summed exactly in any order and type, or are compared with a tolerance: a backend is
//! free to choose the order of its sums, and is held to choosing the same one every time.

mod abort;
mod collectives;
mod flights;
mod messages;
mod mismatch;
mod sample;

use std::error::Error as StdError;
use std::fmt::Debug;

use moe_kernels::{Device, Element, Tensor};
use moe_topology::{Attention, GroupKey};

use crate::{Comm, Error, RawComm, World};

pub use abort::aborts;
pub use mismatch::mismatches;

/// What a case returns: an error says what was expected and what came.
pub type Outcome = std::result::Result<(), Box<dyn StdError + Send + Sync>>;

/// A test: its name, and what all ranks call.
pub type Case<D> = (&'static str, fn(&dyn World<D>, &D) -> Outcome);

/// The cases that pass in any world.
pub fn cases<D: Device>() -> Vec<Case<D>> {
    vec![
        ("all_reduce", collectives::all_reduce),
        ("all_gather", collectives::all_gather),
        ("reduce_scatter", collectives::reduce_scatter),
        ("all_to_all", collectives::all_to_all),
        ("broadcast", collectives::broadcast),
        ("host values", collectives::host_values),
        ("refused arguments", collectives::refused_arguments),
        ("slices", collectives::slices),
        ("same bits twice", collectives::same_bits_twice),
        ("ring of messages", messages::ring),
        ("messages to oneself", messages::to_oneself),
        ("messages in both directions", messages::both_directions),
        ("pairs of messages", messages::pairs),
        ("refused batch", messages::refused_batch),
        ("awaited out of order", flights::awaited_out_of_order),
        ("several groups in flight", flights::several_groups),
        ("progress without waiting", flights::progress_without_waiting),
        ("ready", flights::ready),
        ("messages that are ready", flights::messages_ready),
        ("dropped", flights::dropped),
        ("memory is given back", flights::memory_is_given_back),
        ("a group of one", flights::group_of_one),
    ]
}

/// The communicator of the whole world.
fn whole<D: Device>(world: &dyn World<D>) -> crate::Result<Box<dyn RawComm<D>>> {
    world.communicator(Attention::ALL.into(), &(0..world.size()).collect::<Vec<_>>())
}

/// A communicator whose view does not matter here.
type Group<'c, D> = Comm<'c, GroupKey, D>;

fn typed<'c, D: Device>(raw: &'c dyn RawComm<D>, device: &'c D) -> Group<'c, D> {
    Comm::new(raw, device, raw.key())
}

/// The error that a call comes to. Where `wait` orders a stream and the host goes on, it may come from the next call for which the host
/// waits: a barrier.
fn ended<D: Device>(comm: &Group<'_, D>, device: &D, outcome: crate::Result<()>) -> Option<Error> {
    match outcome.and_then(|()| Ok(device.synchronize()?)) {
        Ok(()) | Err(Error::Device(_)) => comm.barrier().err(),
        Err(error) => Some(error),
    }
}

fn expect<T: PartialEq + Debug>(what: &str, got: T, expected: T) -> Outcome {
    if got == expected { Ok(()) } else { Err(format!("{what}: got {got:?}, expected {expected:?}").into()) }
}

fn expect_tensor<T: Element, D: Device>(
    what: &str,
    device: &D,
    got: &Tensor<T, D>,
    shape: [usize; 2],
    expected: &[T],
) -> Outcome {
    expect(what, got.shape(), shape)?;
    let got = got.to_vec(device)?;
    match got.iter().zip(expected).position(|(a, b)| a != b) {
        None => expect(what, got.len(), expected.len()),
        Some(i) => Err(format!("{what}: element {i} is {:?}, expected {:?}", got[i], expected[i]).into()),
    }
}
