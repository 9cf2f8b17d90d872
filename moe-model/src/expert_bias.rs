//! Load balancing without a loss: a bias on the choice of experts.

use std::cmp::Ordering;

use moe_kernels::{Device, Float, Tensor};
use moe_topology::{Attention, Axes, Owner, Placement};

use crate::params::{BufferId, ParamLayoutBuilder, ParamStore};
use crate::{Error, Result};

/// A bias `b` per expert that is added to scores where they are compared, never where they become weights (DeepSeek-V3,
/// arXiv 2408.15664). It has no gradient: after each update of the weights, `b_e += rate · sign(Σ_e' C_e' − E·C_e)` with
/// the choices `C` of the whole step, so that experts with less than their share are preferred.
///
/// All ranks of a stage hold it and move it alike.
#[derive(Debug, Clone, Copy)]
pub struct ExpertBias {
    buffer: BufferId,
}

impl ExpertBias {
    /// The bias of layer `layer` on pipeline stage `stage`, 0 at first, under the name it has in Hugging Face's
    /// DeepSeek-V3.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        experts: usize,
        layer: usize,
        stage: usize,
    ) -> Result<Self> {
        let name = format!("model.layers.{layer}.block_sparse_moe.gate.e_score_correction_bias");
        let alike = Placement::new(&[experts], &[], Axes::<Attention>::NONE, Owner::Stage(stage))?;
        Ok(ExpertBias { buffer: params.add_buffer(name, &alike)? })
    }

    /// `[1, E]`.
    pub fn values<'a, T: Float, D: Device>(&self, params: &'a ParamStore<T, D>) -> &'a Tensor<T::Acc, D> {
        params.buffer(self.buffer)
    }

    /// Moves it after an update of the weights; `counts` are the choices of each expert by all valid tokens of the step,
    /// before dropping.
    ///
    /// # Errors
    /// [`Error::BufferLength`] if there are not as many counts as experts; errors of the device.
    pub fn update<T: Float, D: Device>(
        &self,
        counts: &[u64],
        rate: f64,
        params: &mut ParamStore<T, D>,
        device: &D,
    ) -> Result<()> {
        let mut bias = self.values(params).to_vec(device)?;
        if counts.len() != bias.len() {
            return Err(Error::BufferLength { expected: bias.len(), got: counts.len() });
        }
        let rate = T::Acc::from_f64(rate);
        for (bias, direction) in bias.iter_mut().zip(directions(counts)) {
            match direction {
                Ordering::Greater => *bias += rate,
                Ordering::Less => *bias -= rate,
                Ordering::Equal => {}
            }
        }
        params.set_buffer(self.buffer, Tensor::from_slice(device, 1, bias.len(), &bias)?)
    }
}

/// The sign of `Σ_e' C_e' − E·C_e` for each expert.
fn directions(counts: &[u64]) -> impl Iterator<Item = Ordering> {
    let (total, experts) = (counts.iter().map(|&c| u128::from(c)).sum::<u128>(), counts.len() as u128);
    counts.iter().map(move |&count| total.cmp(&(experts * u128::from(count))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_below_their_share_go_up_and_exact_shares_stay() {
        use Ordering::{Equal, Greater, Less};
        let signs = |counts: &[u64]| directions(counts).collect::<Vec<_>>();
        assert_eq!(signs(&[4, 1, 1, 2]), [Less, Greater, Greater, Equal]);
        assert_eq!(signs(&[3, 3, 3]), [Equal; 3]);
        assert_eq!(signs(&[0, 0]), [Equal; 2]);
        // One more than a share of 2^53, which a double cannot tell from it.
        let share = 1 << 53;
        assert_eq!(signs(&[share + 1, share, share, share - 1]), [Less, Equal, Equal, Greater]);
        assert_eq!(signs(&[u64::MAX, u64::MAX - 1]), [Less, Greater]);
    }
}
