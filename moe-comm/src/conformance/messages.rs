//! Point-to-point.

use moe_kernels::{Device, Tensor};

use super::sample::{tensor, values};
use super::{Outcome, expect_tensor, typed, whole};
use crate::{Error, Message, World};

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
    let mut x = tensor::<f64, D>(device, 1, comm.rank(), [2, 3])?;
    let me = comm.rank();
    let messages = vec![
        Message::Send { to: me, tag: 7, tensor: x.clone() },
        Message::Recv { from: me, tag: 7, rows: 2, cols: 3 },
    ];
    for pending in comm.start_messages(messages)? {
        expect_tensor("message to oneself", device, &pending.wait()?, [2, 3], &values::<f64>(1, me, 6))?;
        // What was sent may be written again, also while the receiver has not waited.
        x.view_mut()?;
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

/// Of a batch that is refused nothing is sent.
pub(super) fn refused_batch<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let (me, size) = (comm.rank(), comm.size());
    let (to, from) = ((me + 1) % size, (me + size - 1) % size);
    let message = |to, tag| -> crate::Result<_> {
        Ok(Message::Send { to, tag, tensor: tensor::<f32, D>(device, tag as usize, me, [2, 3])? })
    };
    let refused = comm.start_messages(vec![message(to, 1)?, message(size, 1)?]).err();
    if !matches!(refused, Some(Error::Argument { .. })) {
        return Err(format!("a message to rank {size} of {size}: {refused:?}").into());
    }
    let messages = vec![message(to, 2)?, Message::Recv { from, tag: 2, rows: 2, cols: 3 }];
    for (pending, sender) in comm.start_messages(messages)?.into_iter().zip([me, from]) {
        expect_tensor(
            "after a refused batch",
            device,
            &pending.wait()?,
            [2, 3],
            &values::<f32>(2, sender, 6),
        )?;
    }
    Ok(())
}

/// Two pairs go round in one batch each, and are received in batches of their own.
pub(super) fn pairs<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let (me, size) = (comm.rank(), comm.size());
    let (to, from) = ((me + 1) % size, (me + size - 1) % size);
    let send = |tag: u64| -> Result<_, Box<dyn std::error::Error + Send + Sync>> {
        let (first, second) = (tensor::<f32, D>(device, tag as usize, me, [3, 5])?, [me as i64, tag as i64]);
        let second = Tensor::from_slice(device, 1, 2, &second)?;
        Ok((Message::Send { to, tag, tensor: first }, Message::Send { to, tag, tensor: second }))
    };
    let sent = comm.start_message_pairs(vec![send(0)?, send(1)?])?;
    for tag in 0..2 {
        let first = Message::Recv { from, tag, rows: 3, cols: 5 };
        let second = Message::Recv { from, tag, rows: 1, cols: 2 };
        for (first, second) in comm.start_message_pairs::<f32, i64>(vec![(first, second)])? {
            let expected = values::<f32>(tag as usize, from, 15);
            expect_tensor("first of a pair", device, &first.wait()?, [3, 5], &expected)?;
            expect_tensor("second of a pair", device, &second.wait()?, [1, 2], &[from as i64, tag as i64])?;
        }
    }
    for (first, second) in sent {
        first.wait()?;
        second.wait()?;
    }
    Ok(())
}
