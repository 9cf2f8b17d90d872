//! A vector for each of consecutive row groups.

use std::ops::Range;

use super::Cpu;
use super::float::CpuFloat;
use super::grouped::groups;
use super::lanes;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::GroupedBias;
use crate::{Result, View, ViewMut};

simd! {
    fn add_bias<T>(y: MatMut<'_, T>, bias: &[T], scale: Option<&[T]>) {
        for i in 0..y.rows() {
            let scale = scale.map_or(T::ONE, |scale| scale[i]);
            for (y, &bias) in y.row(i).iter_mut().zip(bias) {
                *y += scale * bias;
            }
        }
    }

    fn bias_acc<T>(g: &mut [T], dy: Mat<'_, T>, scale: Option<&[T]>) {
        for (i, dy) in dy.iter().enumerate() {
            let scale = scale.map_or(T::ONE, |scale| scale[i]);
            for (g, &dy) in g.iter_mut().zip(dy) {
                *g += scale * dy;
            }
        }
    }

    fn scale_acc<T>(d_scale: &mut [T], dy: Mat<'_, T>, bias: &[T]) {
        for (d_scale, dy) in d_scale.iter_mut().zip(dy.iter()) {
            *d_scale += lanes::sum_by2(dy, bias, |a, b| a * b);
        }
    }
}

/// The rows of each group in pieces of work, with the group.
fn pieces(groups: Vec<Range<usize>>, cols: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    groups.into_iter().enumerate().flat_map(move |(e, group)| {
        let start = group.start;
        blocks(group.len(), rows_per_piece(cols)).map(move |rows| (e, start + rows.start..start + rows.end))
    })
}

fn factors<'a, T: CpuFloat>(
    kernel: &'static str,
    scale: Option<View<'a, T, Cpu>>,
    rows: usize,
) -> Result<Option<&'a [T]>> {
    let Some(scale) = scale else { return Ok(None) };
    check::shape(kernel, "scale", [1, rows], scale.shape())?;
    Ok(Some(Mat::from(scale).vector()))
}

impl<T: CpuFloat> GroupedBias<T> for Cpu {
    fn grouped_add_bias(
        &self,
        mut y: ViewMut<'_, T, Self>,
        bias: View<'_, T, Self>,
        scale: Option<View<'_, T, Self>>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "grouped_add_bias";
        let [n, cols] = y.shape();
        let groups = groups(KERNEL, offsets, n)?;
        check::shape(KERNEL, "bias", [groups.len(), cols], bias.shape())?;
        let (bias, scale) = (Mat::from(bias), factors(KERNEL, scale, n)?);
        let mut y = MatMut::from(&mut y);
        let tasks = pieces(groups, cols)
            .map(|(e, rows)| (y.take_rows(rows.len()), bias.row(e), scale.map(|scale| &scale[rows])))
            .collect();
        self.for_each(tasks, |(y, bias, scale)| add_bias(y, bias, scale))
    }

    fn grouped_bias_acc(
        &self,
        mut g: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        scale: Option<View<'_, T, Self>>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "grouped_bias_acc";
        let [n, cols] = dy.shape();
        let groups = groups(KERNEL, offsets, n)?;
        check::shape(KERNEL, "g", [groups.len(), cols], g.shape())?;
        let (dy, scale) = (Mat::from(dy), factors(KERNEL, scale, n)?);
        let mut g = MatMut::from(&mut g);
        let mut tasks = Vec::new();
        for rows in groups {
            let mut g = g.take_rows(1).vector();
            // Pieces of columns: every sum runs over ascending rows.
            for c in blocks(cols, rows_per_piece(rows.len()).max(64)) {
                let dy = dy.row_range(rows.clone()).col_range(c.clone());
                tasks.push((take(&mut g, c.len()), dy, scale.map(|scale| &scale[rows.clone()])));
            }
        }
        self.for_each(tasks, |(g, dy, scale)| bias_acc(g, dy, scale))
    }

    fn grouped_bias_scale_acc(
        &self,
        mut d_scale: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        bias: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "grouped_bias_scale_acc";
        let [n, cols] = dy.shape();
        let groups = groups(KERNEL, offsets, n)?;
        check::shape(KERNEL, "d_scale", [1, n], d_scale.shape())?;
        check::shape(KERNEL, "bias", [groups.len(), cols], bias.shape())?;
        let (dy, bias) = (Mat::from(dy), Mat::from(bias));
        let mut d_scale = MatMut::from(&mut d_scale).vector();
        let tasks = pieces(groups, cols)
            .map(|(e, rows)| (take(&mut d_scale, rows.len()), dy.row_range(rows), bias.row(e)))
            .collect();
        self.for_each(tasks, |(d_scale, dy, bias)| scale_acc(d_scale, dy, bias))
    }
}
