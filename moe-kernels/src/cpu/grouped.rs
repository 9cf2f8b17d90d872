//! Matrix products of row groups with a weight each.

use std::ops::Range;

use faer::Accum;

use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut, blocks};
use crate::check;
use crate::family::{GroupedGemm, GroupedGlu, Op};
use crate::{Result, View, ViewMut};

/// Rows of one product: groups are cut so that threads share a large one.
const ROWS: usize = 256;

/// The row ranges of the groups.
pub(super) fn groups(
    kernel: &'static str,
    offsets: View<'_, i32, Cpu>,
    rows: usize,
) -> Result<Vec<Range<usize>>> {
    check::groups(kernel, offsets)?;
    let offsets = Mat::from(offsets).vector();
    let sound =
        offsets[0] == 0 && offsets.is_sorted() && offsets.last().is_some_and(|&end| end as usize <= rows);
    check::argument(kernel, sound, || {
        format!("offsets {offsets:?} do not ascend from 0 to at most the {rows} rows")
    })?;
    Ok(offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).collect())
}

impl<T: CpuFloat> GroupedGemm<T> for Cpu {
    fn grouped_gemm(
        &self,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        tw: Op,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "grouped_gemm";
        let (_, [out, _]) = check::grouped_gemm(KERNEL, &y, x, w, tw, offsets)?;
        let groups = groups(KERNEL, offsets, x.shape()[0])?;
        let (x, w) = (Mat::from(x), Mat::from(w));
        let mut y = MatMut::from(&mut y);
        let mut tasks = Vec::new();
        for (e, group) in groups.into_iter().enumerate() {
            let weight = w.row_range(e * out..(e + 1) * out).faer();
            let weight = if tw == Op::T { weight.transpose() } else { weight };
            // Nearly equal parts: a remainder of a few rows would pay for packing the weight all the same.
            let part = group.len().div_ceil(group.len().div_ceil(ROWS).max(1)).max(1);
            for rows in blocks(group.len(), part) {
                let x = x.row_range(group.start + rows.start..group.start + rows.end);
                tasks.push((y.take_rows(rows.len()), x, weight));
            }
        }
        self.for_each(tasks, |(y, x, w)| T::matmul(y.faer(), Accum::Replace, x.faer(), w, T::ONE))
    }

    fn grouped_gemm_to_acc(
        &self,
        mut g: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        self.weight_gradients("grouped_gemm_to_acc", &mut g, Accum::Replace, dy, x, offsets)
    }

    fn grouped_gemm_acc(
        &self,
        mut g: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        self.weight_gradients("grouped_gemm_acc", &mut g, Accum::Add, dy, x, offsets)
    }
}

impl Cpu {
    /// `g_e = dy_eᵀ · x_e` of every group, or `g_e += …`.
    fn weight_gradients<T: CpuFloat>(
        &self,
        kernel: &'static str,
        g: &mut ViewMut<'_, T, Self>,
        accum: Accum,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        let (_, [out, _]) = check::grouped_gemm_acc(kernel, g, dy, x, offsets)?;
        let groups = groups(kernel, offsets, x.shape()[0])?;
        let (dy, x) = (Mat::from(dy), Mat::from(x));
        let mut g = MatMut::from(g);
        let mut tasks = Vec::new();
        for group in groups {
            for rows in blocks(out, ROWS) {
                let g = g.take_rows(rows.len());
                if !group.is_empty() || accum == Accum::Replace {
                    let dy = dy.row_range(group.clone()).col_range(rows);
                    tasks.push((g, dy, x.row_range(group.clone())));
                }
            }
        }
        self.for_each(tasks, |(g, dy, x)| {
            let packed = dy.packed();
            let dy = Mat::new(&packed, dy.rows(), dy.cols());
            T::matmul(g.faer(), accum, dy.faer().transpose(), x.faer(), T::ONE);
        })
    }
}

/// One after the other.
impl<T: CpuFloat> GroupedGlu<T> for Cpu {}
