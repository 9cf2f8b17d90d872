//! A world of one rank, on any device.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::mem::discriminant;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moe_kernels::Device;
use moe_topology::GroupKey;

use crate::{Call, Collective, Error, Flight, RawComm, Result, Signature, World};

/// The world of a rank that is alone: its collectives are copies on its device, and nothing waits. A message to itself
/// is copied when both sides have started; to wait for one before that is an error, as it would be forever.
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
#[derive(Debug)]
pub struct SoloWorld<D> {
    device: D,
    failed: Failed,
}

impl<D: Device> SoloWorld<D> {
    /// The world of whoever computes on `device`.
    pub fn new(device: D) -> Self {
        SoloWorld { device, failed: Failed::default() }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind the locks is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why the world has ended, if it has.
#[derive(Debug, Clone, Default)]
struct Failed(Arc<Mutex<Option<Error>>>);

impl Failed {
    fn check(&self) -> Result<()> {
        lock(&self.0).clone().map_or(Ok(()), Err)
    }
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
                    open: RefCell::default(),
                }));
            }
            _ if ranks.iter().any(|&rank| rank != 0) => "a rank is outside of the world",
            [] => "this rank is not among them",
            _ => "a rank is named twice",
        };
        Err(Error::BadGroup { group: key, ranks: ranks.to_vec(), why })
    }
}

/// A message of the rank to itself.
struct Message<D: Device> {
    sent: Option<(Arc<D::Buf>, Range<usize>)>,
    recv: Option<D::Buf>,
    /// Whether both sides have started.
    arrived: bool,
}

/// By both of its flights.
type Shared<D> = Arc<Mutex<Message<D>>>;

struct SoloComm<D: Device> {
    device: D,
    failed: Failed,
    key: GroupKey,
    /// Messages of which one side has started, in their order: all were sent, or all are to be received.
    open: RefCell<VecDeque<(Signature, Shared<D>)>>,
}

impl<D: Device> SoloComm<D> {
    /// Starts one side of a message; what was sent is let go with the second.
    fn message(&self, call: Call<D>) -> Result<Shared<D>> {
        let signature = call.signature();
        let Call { op, send, recv, .. } = call;
        let mut open = self.open.borrow_mut();
        let Some((other, message)) =
            open.front().filter(|(other, _)| discriminant(&other.op) != discriminant(&op))
        else {
            let message = Arc::new(Mutex::new(Message { sent: send, recv, arrived: false }));
            open.push_back((signature, message.clone()));
            return Ok(message);
        };
        if !signature.agrees(0, other, 0) {
            let what = format!("calls {signature}, but the other side of the message is {other}");
            return Err(Error::Argument { op: op.name(), what });
        }
        let message = message.clone();
        open.pop_front();
        let mut both = lock(&message);
        both.recv = both.recv.take().or(recv);
        if let (Some((buf, bytes)), Some(recv)) = (both.sent.take().or(send), &mut both.recv) {
            self.device.copy(recv, 0, &buf, bytes)?;
        }
        both.arrived = true;
        drop(both);
        Ok(message)
    }
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

    fn start(&self, mut call: Call<D>) -> Result<Box<dyn Flight<D>>> {
        call.check(0, 1)?;
        self.failed.check()?;
        let failed = self.failed.clone();
        if let Collective::Send { .. } | Collective::Recv { .. } = call.op {
            let op = call.op.name();
            return Ok(Box::new(ToItself { failed, op, message: self.message(call)? }));
        }
        if let (Some((buf, bytes)), Some(recv)) = (call.send, &mut call.recv) {
            self.device.copy(recv, 0, &buf, bytes)?;
        }
        Ok(Box::new(Done::<D> { failed, recv: call.recv }))
    }

    fn start_batch(&self, calls: Vec<Call<D>>) -> Result<Vec<Box<dyn Flight<D>>>> {
        calls.iter().try_for_each(|call| call.check(0, 1))?;
        calls.into_iter().map(|call| self.start(call)).collect()
    }

    fn abort(&self, why: &str) {
        let why = format!("aborted: {why}").into();
        let error = Error::Poisoned { rank: 0, group: None, op: None, sequence: None, why };
        lock(&self.failed.0).get_or_insert(error);
    }
}

/// What is complete, in the order of the device, when it has started.
struct Done<D: Device> {
    failed: Failed,
    recv: Option<D::Buf>,
}

impl<D: Device> Flight<D> for Done<D> {
    fn ready(&self) -> Result<bool> {
        self.failed.check().map(|()| true)
    }

    fn wait(self: Box<Self>) -> Result<Option<D::Buf>> {
        self.failed.check().map(|()| self.recv)
    }
}

/// One side of a message.
struct ToItself<D: Device> {
    failed: Failed,
    op: &'static str,
    message: Shared<D>,
}

impl<D: Device> Flight<D> for ToItself<D> {
    fn ready(&self) -> Result<bool> {
        self.failed.check().map(|()| lock(&self.message).arrived)
    }

    fn wait(self: Box<Self>) -> Result<Option<D::Buf>> {
        self.failed.check()?;
        let mut message = lock(&self.message);
        if !message.arrived {
            let other = if self.op == "send" { "received" } else { "sent" };
            let what = format!("a message to itself that was never {other}: the rank would wait forever");
            return Err(Error::Argument { op: self.op, what });
        }
        // The buffer is the receiver's.
        Ok(if self.op == "recv" { message.recv.take() } else { None })
    }
}
