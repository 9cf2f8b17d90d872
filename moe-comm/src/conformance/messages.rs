//! Point-to-point.

use moe_kernels::Device;

use super::sample::{tensor, values};
use super::{Outcome, expect_tensor, typed, whole};
use crate::{Message, World};

/// Several messages in order, of different lengths (one of them empty), types and tags.
pub(super) fn ring<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let (me, size) = (comm.rank(), comm.size());
    let (next, previous) = ((me + 1) % size, (me + size - 1) % size);
    let shapes = [[3, 5], [0, 4], [1, 1], [130, 67]];
    let mut sends = Vec::new();
    for (tag, shape) in shapes.into_iter().enumerate() {
        sends.push(comm.send(next, tag as u64, &tensor::<f32, D>(device, tag, me, shape)?)?);
    }
    let integers = comm.send(next, 99, &tensor::<i32, D>(device, 99, me, [2, 2])?)?;
    for (tag, [rows, cols]) in shapes.into_iter().enumerate() {
        let got = comm.recv::<f32>(previous, tag as u64, rows, cols)?.wait()?;
        expect_tensor("message", device, &got, [rows, cols], &values::<f32>(tag, previous, rows * cols))?;
    }
    let got = comm.recv::<i32>(previous, 99, 2, 2)?.wait()?;
    expect_tensor("integers", device, &got, [2, 2], &values::<i32>(99, previous, 4))?;
    for (tag, (sent, [rows, cols])) in sends.into_iter().zip(shapes).enumerate() {
        let expected = values::<f32>(tag, me, rows * cols);
        expect_tensor("what was sent", device, &sent.wait()?, [rows, cols], &expected)?;
    }
    integers.wait()?;
    Ok(())
}

pub(super) fn to_oneself<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let x = tensor::<f64, D>(device, 1, comm.rank(), [2, 3])?;
    let me = comm.rank();
    let messages = vec![
        Message::Send { to: me, tag: 7, tensor: x },
        Message::Recv { from: me, tag: 7, rows: 2, cols: 3 },
    ];
    for pending in comm.start_messages(messages)? {
        expect_tensor("message to oneself", device, &pending.wait()?, [2, 3], &values::<f64>(1, me, 6))?;
    }
    Ok(())
}

/// All pairs exchange at once, receives first.
pub(super) fn both_directions<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let me = comm.rank();
    let peers = || (0..comm.size()).filter(|&peer| peer != me);
    let mut messages = Vec::new();
    for from in peers() {
        messages.push(Message::Recv { from, tag: 0, rows: 1 + from, cols: 2 });
    }
    for to in peers() {
        let tensor = tensor::<f64, D>(device, to, me, [1 + me, 2])?;
        messages.push(Message::Send { to, tag: 0, tensor });
    }
    let mut pending = comm.start_messages(messages)?.into_iter();
    for (from, pending) in peers().zip(&mut pending) {
        let expected = values::<f64>(me, from, 2 * (1 + from));
        expect_tensor("exchange", device, &pending.wait()?, [1 + from, 2], &expected)?;
    }
    for sent in pending {
        sent.wait()?;
    }
    Ok(())
}
