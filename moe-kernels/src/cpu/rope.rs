//! Rotary position embedding.

use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut, blocks};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::{Rope, RotaryHead, RotaryPairs, Rotation};
use crate::{Result, View, ViewMut};

simd! {
    fn rotate<T>(
        y: MatMut<'_, T>,
        x: Mat<'_, T>,
        cos: Mat<'_, T>,
        sin: Mat<'_, T>,
        positions: &[i32],
        head: RotaryHead,
        sign: T,
    ) {
        let half = cos.cols();
        let (first, end) = (head.first, head.first + 2 * half);
        for (i, &position) in positions.iter().enumerate() {
            let (cos, sin) = (cos.row(position as usize), sin.row(position as usize));
            let heads = y.row(i).chunks_exact_mut(head.head_dim).zip(x.row(i).chunks_exact(head.head_dim));
            for (y, x) in heads {
                y[..first].copy_from_slice(&x[..first]);
                y[end..].copy_from_slice(&x[end..]);
                let (y, x) = (&mut y[first..end], &x[first..end]);
                match head.pairs {
                    RotaryPairs::Halves => {
                        let (y0, y1) = y.split_at_mut(half);
                        let (x0, x1) = x.split_at(half);
                        for (((((y0, y1), &x0), &x1), &c), &s) in
                            y0.iter_mut().zip(y1).zip(x0).zip(x1).zip(cos).zip(sin)
                        {
                            let s = s * sign;
                            *y0 = x0 * c - x1 * s;
                            *y1 = x1 * c + x0 * s;
                        }
                    }
                    RotaryPairs::Adjacent => {
                        let (y, x) = (y.as_chunks_mut::<2>().0, x.as_chunks::<2>().0);
                        for (((y, &[x0, x1]), &c), &s) in y.iter_mut().zip(x).zip(cos).zip(sin) {
                            let s = s * sign;
                            *y = [x0 * c - x1 * s, x1 * c + x0 * s];
                        }
                    }
                }
            }
        }
    }
}

impl<T: CpuFloat> Rope<T> for Cpu {
    fn rope(
        &self,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        cos: View<'_, T, Self>,
        sin: View<'_, T, Self>,
        positions: View<'_, i32, Self>,
        head: RotaryHead,
        rotation: Rotation,
    ) -> Result<()> {
        const KERNEL: &str = "rope";
        let [n, width] = x.shape();
        let [table, _] = cos.shape();
        check::rope(KERNEL, &y, x, cos, sin, positions, head)?;
        let positions = Mat::from(positions).vector();
        check::argument(KERNEL, positions.iter().all(|&p| p >= 0), || "a position is negative".to_owned())?;
        check::indices(KERNEL, "position", positions, table)?;
        let sign = match rotation {
            Rotation::Forward => T::ONE,
            Rotation::Backward => -T::ONE,
        };
        let (x, cos, sin) = (Mat::from(x), Mat::from(cos), Mat::from(sin));
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(n, rows_per_piece(width))
            .map(|r| (y.take_rows(r.len()), x.row_range(r.clone()), &positions[r]))
            .collect();
        self.for_each(tasks, |(y, x, positions)| rotate(y, x, cos, sin, positions, head, sign))
    }
}
