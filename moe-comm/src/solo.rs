//! A world of one rank, on any device.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::mem::discriminant;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moe_kernels::Device;
use moe_topology::GroupKey;

use crate::raw::position;
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
        SoloWorld { device, failed: Failed::Here(Arc::default()) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind the locks is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where it is kept why the world has ended, if it has.
#[derive(Debug, Clone)]
pub(crate) enum Failed {
    /// By the rank itself, which is alone.
    Here(Arc<Mutex<Option<Error>>>),
    /// By the world of which the rank is alone in a group.
    #[cfg(feature = "nccl")]
    Of(crate::processes::Process),
}

impl Failed {
    fn check(&self) -> Result<()> {
        let failure = match self {
            Failed::Here(failure) => lock(failure).clone(),
            #[cfg(feature = "nccl")]
            Failed::Of(process) => process.failure(),
        };
        failure.map_or(Ok(()), Err)
    }

    fn abort(&self, why: &str) {
        let why = format!("aborted: {why}");
        match self {
            Failed::Here(failure) => {
                let error =
                    Error::Poisoned { rank: 0, group: None, op: None, sequence: None, why: why.into() };
                lock(failure).get_or_insert(error);
            }
            #[cfg(feature = "nccl")]
            Failed::Of(process) => {
                process.fail(&why);
            }
        }
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
        position(key, ranks, 0, 1)?;
        Ok(Box::new(SoloComm::new(self.device.clone(), self.failed.clone(), key, 0)))
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

/// A group of one, and in larger ones the messages of a rank to itself.
pub(crate) struct SoloComm<D: Device> {
    device: D,
    failed: Failed,
    key: GroupKey,
    /// The world rank.
    ranks: [usize; 1],
    /// Messages of which one side has started, in their order: all were sent, or all are to be received.
    open: RefCell<VecDeque<(Signature, Shared<D>)>>,
}

impl<D: Device> SoloComm<D> {
    /// Of the rank `me` of its world.
    pub(crate) fn new(device: D, failed: Failed, key: GroupKey, me: usize) -> Self {
        SoloComm { device, failed, key, ranks: [me], open: RefCell::default() }
    }

    /// Starts one side of a message whose call was checked.
    pub(crate) fn start_message(&self, call: Call<D>) -> Result<Box<dyn Flight<D>>> {
        self.failed.check()?;
        let op = call.op.name();
        Ok(Box::new(ToItself { failed: self.failed.clone(), op, message: self.message(call)? }))
    }

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
        &self.ranks
    }

    fn key(&self) -> GroupKey {
        self.key
    }

    fn start(&self, mut call: Call<D>) -> Result<Box<dyn Flight<D>>> {
        call.check(0, 1)?;
        if let Collective::Send { .. } | Collective::Recv { .. } = call.op {
            return self.start_message(call);
        }
        self.failed.check()?;
        let failed = self.failed.clone();
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
        self.failed.abort(why);
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
