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
}
