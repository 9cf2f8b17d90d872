//! Activations and their gradients between pipeline stages.

use moe_comm::{Comms, Message, Pending, World};
use moe_kernels::{Device, Float, Tensor};
use moe_pipeline::{Post, Transport};
use moe_topology::{Attention, Folding};

use crate::{Error, Result};

/// What crosses a boundary of stages.
#[derive(Debug, Clone)]
pub struct Activation<T: Float, D: Device> {
    /// An activation, or the gradient of one, `[tokens of a micro-batch on one rank, hidden]`.
    pub x: Tensor<T, D>,
    /// With a load-balancing loss over all layers, how often each expert was chosen, `[1, experts]`: forward by the layers so
    /// far, backward by all of them. None without.
    pub choices: Option<Tensor<i64, D>>,
}

/// A pipeline transport over the communicator of the pp group. All messages have one shape; choices, where there are any,
/// follow their activation as a message of their own.
pub struct CommTransport<D: Device> {
    comms: Comms<D>,
    shape: [usize; 2],
    choices: usize,
}

impl<D: Device> CommTransport<D> {
    /// `shape` is `[tokens of a micro-batch on one rank, hidden]`, `choices` the number of experts whose choices travel along,
    /// 0 for none. Collective over the world.
    pub fn new(
        world: &dyn World<D>,
        device: &D,
        folding: &Folding,
        shape: [usize; 2],
        choices: usize,
    ) -> Result<Self> {
        let comms = Comms::<D>::builder().attention(Attention::PP).build(world, device, folding)?;
        Ok(CommTransport { comms, shape, choices })
    }
}

impl<T: Float, D: Device> Transport<Activation<T, D>> for CommTransport<D> {
    type Ticket = Ticket<T, D>;
    type Error = Error;

    fn post(&mut self, batch: Vec<Post<Activation<T, D>>>) -> Result<Vec<Self::Ticket>> {
        let [rows, cols] = self.shape;
        let (mut directions, mut messages, mut choices) = (Vec::new(), Vec::new(), Vec::new());
        for post in batch {
            match post {
                Post::Send { to_rank, message, act: Activation { x, choices: counts } } => {
                    let (to, tag) = (to_rank as usize, message.tag());
                    directions.push(Direction::Send);
                    messages.push(Message::Send { to, tag, tensor: x });
                    if let Some(tensor) = counts {
                        choices.push(Message::Send { to, tag, tensor });
                    }
                }
                Post::Recv { from_rank, message } => {
                    let (from, tag) = (from_rank as usize, message.tag());
                    directions.push(Direction::Recv);
                    messages.push(Message::Recv { from, tag, rows, cols });
                    if self.choices > 0 {
                        choices.push(Message::Recv { from, tag, rows: 1, cols: self.choices });
                    }
                }
            }
        }
        let group = self.comms.group(Attention::PP)?;
        let pending: Vec<_> = if self.choices > 0 {
            let pairs = group.start_message_pairs(messages.into_iter().zip(choices).collect())?;
            pairs.into_iter().map(|(x, choices)| (x, Some(choices))).collect()
        } else {
            group.start_messages(messages)?.into_iter().map(|x| (x, None)).collect()
        };
        let tickets = directions.into_iter().zip(pending);
        Ok(tickets.map(|(direction, (x, choices))| Ticket { direction, x, choices }).collect())
    }

    fn wait(&mut self, ticket: Self::Ticket) -> Result<Option<Activation<T, D>>> {
        let x = ticket.x.wait()?;
        let choices = ticket.choices.map(|choices| choices.wait()).transpose()?;
        Ok(match ticket.direction {
            Direction::Send => None,
            Direction::Recv => Some(Activation { x, choices }),
        })
    }

    fn abort(&mut self, why: &str) {
        self.comms.abort(why);
    }
}

/// A message under way.
pub struct Ticket<T: Float, D: Device> {
    direction: Direction,
    x: Pending<T, D>,
    choices: Option<Pending<i64, D>>,
}

/// Which way a message went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Send,
    Recv,
}
