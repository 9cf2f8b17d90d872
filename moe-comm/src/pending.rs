//! Operations that were started.

use std::fmt;
use std::sync::Arc;

use moe_kernels::{Device, Element, Layout, Tensor};

use crate::{Error, Flight, Result};

/// An operation in flight and what it will return. Dropping it gives the result up; the operation goes on.
#[must_use = "an operation's result, and its failure, come from `wait`"]
pub struct Pending<T, D: Device> {
    pub(crate) flight: Box<dyn Flight<D>>,
    pub(crate) result: Expected<T, D>,
}

/// Where the result comes from.
pub(crate) enum Expected<T, D: Device> {
    /// A receive buffer of this shape.
    Received { rows: usize, cols: usize },
    /// What was sent.
    Sent(Tensor<T, D>),
}

impl<T, D: Device> fmt::Debug for Pending<T, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}

impl<T: Element, D: Device> Pending<T, D> {
    /// Whether it is done; an error if it has failed, as of [`wait`](Self::wait). Not to be used to decide what to start next: ranks would decide differently.
    pub fn ready(&self) -> Result<bool> {
        self.flight.ready()
    }

    /// The result: what was received; of a message that was sent, the message.
    ///
    /// # Errors
    /// [`Error::Poisoned`] if the world has failed; what the device returns.
    pub fn wait(self) -> Result<Tensor<T, D>> {
        let received = self.flight.wait()?;
        match (self.result, received) {
            (Expected::Received { rows, cols }, Some(buf)) => {
                Ok(Tensor::from_buf(Arc::new(buf), Layout::contiguous(rows, cols))?)
            }
            (Expected::Sent(tensor), _) => Ok(tensor),
            (Expected::Received { .. }, None) => {
                Err(Error::Backend { what: "`Flight::wait` kept the receive buffer" })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use moe_kernels::Cpu;
    use moe_kernels::cpu::CpuBuf;

    use super::*;

    struct Forgetful;

    impl Flight<Cpu> for Forgetful {
        fn ready(&self) -> Result<bool> {
            Ok(true)
        }

        fn wait(self: Box<Self>) -> Result<Option<CpuBuf>> {
            Ok(None)
        }
    }

    #[test]
    fn a_backend_that_keeps_the_buffer_is_an_error() {
        let result = Expected::Received { rows: 1, cols: 1 };
        let pending = Pending::<f32, Cpu> { flight: Box::new(Forgetful), result };
        assert!(matches!(pending.wait(), Err(Error::Backend { .. })));
    }
}
