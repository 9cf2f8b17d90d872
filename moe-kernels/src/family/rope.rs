use crate::{Device, Float, Result, View, ViewMut};

/// Direction of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// By `+angle`: forward.
    Forward,
    /// By `−angle`: the transpose, hence backward.
    Backward,
}

/// Rotary position embedding on pairs `(j, j + d/2)` of every head (arXiv 2104.09864, in the half-split form of
/// GPT-NeoX and Hugging Face).
pub trait Rope<T: Float>: Device {
    /// `y, x: [n, heads · head_dim]`; `cos, sin: [positions, head_dim / 2]`; `positions: [1, n]` picks the row of
    /// the tables for each token.
    #[allow(clippy::too_many_arguments)] // two operands, two tables, positions, two parameters
    fn rope(
        &self,
        y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        cos: View<'_, T::Acc, Self>,
        sin: View<'_, T::Acc, Self>,
        positions: View<'_, i32, Self>,
        head_dim: usize,
        rotation: Rotation,
    ) -> Result<()>;
}
