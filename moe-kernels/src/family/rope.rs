use super::norm_rope::{norm_then_rope, norm_then_rope_backward};
use super::{Norm, Rows};
use crate::{Device, Float, Result, View, ViewMut};

/// Direction of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// By `+angle`: forward.
    Forward,
    /// By `−angle`: the transpose, hence backward.
    Backward,
}

/// Which elements of a rotated part of width `d` turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryPairs {
    /// `(j, j + d/2)`: the half-split form of GPT-NeoX and Hugging Face.
    Halves,
    /// `(2j, 2j + 1)`: the interleaved form of arXiv 2104.09864 and of DeepSeek.
    Adjacent,
}

/// What of a head is rotated: the elements from `first` on, as many as the tables have angles for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RotaryHead {
    /// Size of the head.
    pub head_dim: usize,
    /// First rotated element; those before and behind the rotated ones are copied.
    pub first: usize,
    /// Which elements turn together.
    pub pairs: RotaryPairs,
}

/// Rotary position embedding (arXiv 2104.09864).
pub trait Rope<T: Float>: Device {
    /// `y, x: [n, heads · head_dim]`; `cos, sin: [positions, d / 2]` for a rotated part of width `d`; `positions: [1, n]`
    /// picks the row of the tables for each token.
    #[allow(clippy::too_many_arguments)] // two operands, two tables, positions, two parameters
    fn rope(
        &self,
        y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        cos: View<'_, T::Acc, Self>,
        sin: View<'_, T::Acc, Self>,
        positions: View<'_, i32, Self>,
        head: RotaryHead,
        rotation: Rotation,
    ) -> Result<()>;

    /// [`rms_norm`](Norm::rms_norm) of each head, then [`rope`](Rope::rope): queries or keys of models with QK-norm. `y, x: [n,
    /// heads · head_dim]`, `w: [1, head_dim]`; `rstd: [1, n · heads]`, head by head of each token. As two kernels unless a device
    /// has one for both.
    #[allow(clippy::too_many_arguments)] // the operands of both
    fn rms_norm_rope(
        &self,
        y: ViewMut<'_, T, Self>,
        rstd: ViewMut<'_, T::Acc, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        cos: View<'_, T::Acc, Self>,
        sin: View<'_, T::Acc, Self>,
        positions: View<'_, i32, Self>,
        head: RotaryHead,
        eps: f64,
    ) -> Result<()>
    where
        Self: Norm<T> + Rows<T>,
    {
        norm_then_rope(self, y, rstd, x, w, cos, sin, positions, head, eps)
    }

    /// Overwrites `dx: [n, heads · head_dim]`, adds to `dw: [1, head_dim]`, in ascending tokens, heads of each.
    #[allow(clippy::too_many_arguments)] // the operands of both
    fn rms_norm_rope_backward(
        &self,
        dx: ViewMut<'_, T, Self>,
        dw: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        rstd: View<'_, T::Acc, Self>,
        cos: View<'_, T::Acc, Self>,
        sin: View<'_, T::Acc, Self>,
        positions: View<'_, i32, Self>,
        head: RotaryHead,
    ) -> Result<()>
    where
        Self: Norm<T> + Rows<T>,
    {
        norm_then_rope_backward(self, dx, dw, dy, x, w, rstd, cos, sin, positions, head)
    }
}
