use crate::{Device, Float, Result, View, ViewMut};

/// Whether an operand is read as it is or transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// As it is.
    N,
    /// Transposed.
    T,
}

impl Op {
    /// The shape of `op(m)` for an `m` of this shape.
    pub fn shape(self, [rows, cols]: [usize; 2]) -> [usize; 2] {
        match self {
            Op::N => [rows, cols],
            Op::T => [cols, rows],
        }
    }
}

/// Dense matrix products.
pub trait Gemm<T: Float>: Device {
    /// `y = op(a) · op(b)`, accumulated in `T::Acc`, rounded once. `y: [m, n]`.
    fn gemm(
        &self,
        y: ViewMut<'_, T, Self>,
        a: View<'_, T, Self>,
        ta: Op,
        b: View<'_, T, Self>,
        tb: Op,
    ) -> Result<()>;

    /// `g = op(a) · op(b)` in the accumulation type, whatever `g` holds: where a weight gradient is written first. `g: [m, n]`.
    fn gemm_to_acc(
        &self,
        mut g: ViewMut<'_, T::Acc, Self>,
        a: View<'_, T, Self>,
        ta: Op,
        b: View<'_, T, Self>,
        tb: Op,
    ) -> Result<()> {
        g.zero(self)?;
        self.gemm_acc(g, a, ta, b, tb)
    }

    /// `g += op(a) · op(b)` in the accumulation type: weight gradients. `g: [m, n]`.
    fn gemm_acc(
        &self,
        g: ViewMut<'_, T::Acc, Self>,
        a: View<'_, T, Self>,
        ta: Op,
        b: View<'_, T, Self>,
        tb: Op,
    ) -> Result<()>;

    /// Backward of `y = x · wᵀ` whose result is of the accumulation type: `dx += dy · w`, each sum added and rounded once, and
    /// `dw += dyᵀ · x`. `dy: [m, k]` is taken as it is, not rounded to `T`; `dx, x: [m, n]`, `dw, w: [k, n]`.
    fn gemm_backward(
        &self,
        dx: ViewMut<'_, T, Self>,
        dw: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T::Acc, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
    ) -> Result<()>;
}
