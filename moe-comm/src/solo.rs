//! A world of one rank, on any device.

use std::cell::Cell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moe_kernels::Device;
use moe_topology::GroupKey;

use crate::{Call, Collective, Error, Flight, RawComm, Result, Signature, World};

/// The world of a rank that is alone: its collectives are copies on its device, and nothing waits.
///
/// ```
/// use moe_comm::{Comms, Reduction, SoloWorld};
/// use moe_kernels::{Cpu, Tensor};
/// use moe_topology::{Attention, Folding, Mapping};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Cpu::new(1);
/// let folding = Folding::new(Mapping::default())?;
/// let world = SoloWorld::new(device.clone());
/// let comms = Comms::builder().attention(Attention::DP).build(&world, &device, &folding)?;
/// let x = Tensor::<f32, Cpu>::from_slice(&device, 1, 2, &[1.0, 2.0])?;
/// assert_eq!(comms.group(Attention::DP)?.all_reduce(&x, Reduction::Sum)?.to_vec(&device)?, [1.0, 2.0]);
/// # Ok(())
/// # }
/// ```
pub struct SoloWorld<D> {
    device: D,
    failed: Arc<Mutex<Option<Error>>>,
}

impl<D: Device> SoloWorld<D> {
    /// The world of whoever computes on `device`.
    pub fn new(device: D) -> Self {
        SoloWorld { device, failed: Arc::default() }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind the locks is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: Device> World<D> for SoloWorld<D> {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn communicator(&self, key: GroupKey, ranks: &[usize]) -> Result<Box<dyn RawComm<D>>> {
        let why = match ranks {
            [0] => {
                return Ok(Box::new(SoloComm {
                    device: self.device.clone(),
                    failed: self.failed.clone(),
                    key,
                    messages: Arc::default(),
                    sends: Cell::new(0),
                    recvs: Cell::new(0),
                }));
            }
            _ if ranks.iter().any(|&rank| rank != 0) => "a rank is outside of the world",
            [] => "this rank is not among them",
            _ => "a rank is named twice",
        };
        Err(Error::BadGroup { group: key, ranks: ranks.to_vec(), why })
    }
}

/// A message that the rank sent to itself and has not received.
struct Sent<D: Device> {
    signature: Signature,
    buf: Arc<D::Buf>,
    bytes: Range<usize>,
}

/// By the number of the message.
type Messages<D> = Arc<Mutex<HashMap<u64, Sent<D>>>>;

struct SoloComm<D: Device> {
    device: D,
    failed: Arc<Mutex<Option<Error>>>,
    key: GroupKey,
    messages: Messages<D>,
    sends: Cell<u64>,
    recvs: Cell<u64>,
}

fn next(count: &Cell<u64>) -> u64 {
    count.replace(count.get() + 1)
}

impl<D: Device> RawComm<D> for SoloComm<D> {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn ranks(&self) -> &[usize] {
        &[0]
    }

    fn key(&self) -> GroupKey {
        self.key
    }

    fn start(&self, call: Call<D>) -> Result<Box<dyn Flight<D>>> {
        call.check(0, 1)?;
        if let Some(error) = &*lock(&self.failed) {
            return Err(error.clone());
        }
        let signature = call.signature();
        let Call { op, send, mut recv, .. } = call;
        match (&op, send) {
            (Collective::Send { .. }, Some((buf, bytes))) => {
                lock(&self.messages).insert(next(&self.sends), Sent { signature, buf, bytes });
            }
            (Collective::Recv { .. }, _) => {
                return Ok(Box::new(Receiving {
                    device: self.device.clone(),
                    messages: self.messages.clone(),
                    number: next(&self.recvs),
                    signature,
                    recv,
                }));
            }
            (_, Some((buf, bytes))) => {
                if let Some(recv) = &mut recv {
                    self.device.copy(recv, 0, &buf, bytes)?;
                }
            }
            (_, None) => {}
        }
        Ok(Box::new(Done(recv)))
    }

    fn start_batch(&self, calls: Vec<Call<D>>) -> Result<Vec<Box<dyn Flight<D>>>> {
        calls.iter().try_for_each(|call| call.check(0, 1))?;
        calls.into_iter().map(|call| self.start(call)).collect()
    }

    fn abort(&self, why: &str) {
        let why = format!("aborted: {why}").into();
        let error = Error::Poisoned { rank: 0, group: None, op: None, sequence: None, why };
        lock(&self.failed).get_or_insert(error);
    }
}

/// What is complete, in the order of the device, when it has started.
struct Done<B>(Option<B>);

impl<D: Device> Flight<D> for Done<D::Buf> {
    fn ready(&self) -> Result<bool> {
        Ok(true)
    }

    fn wait(self: Box<Self>) -> Result<Option<D::Buf>> {
        Ok(self.0)
    }
}

/// A message from the rank itself, which it may send after it has asked for it.
struct Receiving<D: Device> {
    device: D,
    messages: Messages<D>,
    number: u64,
    signature: Signature,
    recv: Option<D::Buf>,
}

impl<D: Device> Flight<D> for Receiving<D> {
    fn ready(&self) -> Result<bool> {
        Ok(lock(&self.messages).contains_key(&self.number))
    }

    fn wait(self: Box<Self>) -> Result<Option<D::Buf>> {
        let Receiving { device, messages, number, signature, mut recv } = *self;
        let refuse = |what| Err(Error::Argument { op: "recv", what });
        let Some(sent) = lock(&messages).remove(&number) else {
            return refuse(format!("message {number} to itself was never sent: the rank would wait forever"));
        };
        if !signature.agrees(0, &sent.signature, 0) {
            return refuse(format!("calls {signature}, but what it sent itself is {}", sent.signature));
        }
        if let Some(recv) = &mut recv {
            device.copy(recv, 0, &sent.buf, sent.bytes)?;
        }
        Ok(recv)
    }
}
