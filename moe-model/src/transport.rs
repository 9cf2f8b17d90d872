//! Activations and their gradients between pipeline stages.

use moe_comm::{Comms, Message, Pending, World};
use moe_kernels::{Device, Float, Tensor};
use moe_pipeline::{Post, Transport};
use moe_topology::{Attention, Folding};

use crate::{Error, Result};

/// A pipeline transport over the communicator of the pp group. All messages have one shape.
pub struct CommTransport<D: Device> {
    comms: Comms<D>,
    shape: [usize; 2],
}

impl<D: Device> CommTransport<D> {
    /// `shape` is `[tokens of a micro-batch on one rank, hidden]`. Collective over the world.
    pub fn new(world: &dyn World<D>, device: &D, folding: &Folding, shape: [usize; 2]) -> Result<Self> {
        let comms = Comms::<D>::builder().attention(Attention::PP).build(world, device, folding)?;
        Ok(CommTransport { comms, shape })
    }
}

impl<T: Float, D: Device> Transport<Tensor<T, D>> for CommTransport<D> {
    type Ticket = (Direction, Pending<T, D>);
    type Error = Error;

    fn post(&mut self, batch: Vec<Post<Tensor<T, D>>>) -> Result<Vec<Self::Ticket>> {
        let [rows, cols] = self.shape;
        let (directions, messages): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .map(|post| match post {
                Post::Send { to_rank, message, act } => {
                    (Direction::Send, Message::Send { to: to_rank as usize, tag: message.tag(), tensor: act })
                }
                Post::Recv { from_rank, message } => (
                    Direction::Recv,
                    Message::Recv { from: from_rank as usize, tag: message.tag(), rows, cols },
                ),
            })
            .unzip();
        let pending = self.comms.group(Attention::PP)?.start_messages(messages)?;
        Ok(directions.into_iter().zip(pending).collect())
    }

    fn wait(&mut self, (direction, pending): Self::Ticket) -> Result<Option<Tensor<T, D>>> {
        let tensor = pending.wait()?;
        Ok(match direction {
            Direction::Send => None,
            Direction::Recv => Some(tensor),
        })
    }

    fn abort(&mut self, why: &str) {
        self.comms.abort(why);
    }
}

/// Which way a message went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Away from this rank.
    Send,
    /// To this rank.
    Recv,
}
