//! Dense matrix products.

use faer::{Accum, MatMut as FaerMut, MatRef as FaerRef};

use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut};
use crate::check;
use crate::family::{Gemm, Op};
use crate::{Result, View, ViewMut};

/// Rows or columns of a tile of the result: enough to amortise the packing of the operands.
const TILE: usize = 128;
/// Multiplications of a tile: enough to be worth a thread.
const WORK: usize = 1 << 20;
/// Tiles of a large result, along rows and in all.
const MAX_ROW_TILES: usize = 8;
const MAX_TILES: usize = 16;

/// Length of the pieces that cut `n` in at most `most` nearly equal parts of at least [`TILE`], in whole SIMD
/// registers.
fn piece(n: usize, most: usize) -> usize {
    n.div_ceil((n / TILE).clamp(1, most.max(1))).next_multiple_of(16)
}

/// Cuts a product in tiles of the result, by its shape alone.
fn tiles<'a, T: CpuFloat>(
    y: FaerMut<'a, T>,
    a: FaerRef<'a, T>,
    b: FaerRef<'a, T>,
) -> Vec<(FaerMut<'a, T>, FaerRef<'a, T>, FaerRef<'a, T>)> {
    let most = (y.nrows() * y.ncols() * a.ncols() / WORK).min(MAX_TILES);
    let rows = piece(y.nrows(), most.min(MAX_ROW_TILES));
    let cols = piece(y.ncols(), most / y.nrows().div_ceil(rows.max(1)).max(1));
    let mut tiles = Vec::new();
    let mut band = y;
    let mut row = 0;
    while band.nrows() > 0 {
        let height = rows.min(band.nrows());
        let (mut tile, below) = band.split_at_row_mut(height);
        let a = a.subrows(row, height);
        let mut col = 0;
        while tile.ncols() > 0 {
            let width = cols.min(tile.ncols());
            let (head, rest) = tile.split_at_col_mut(width);
            tiles.push((head, a, b.subcols(col, width)));
            tile = rest;
            col += width;
        }
        band = below;
        row += height;
    }
    tiles
}

fn op<T>(m: Mat<'_, T>, op: Op) -> FaerRef<'_, T> {
    match op {
        Op::N => m.faer(),
        Op::T => m.faer().transpose(),
    }
}

impl Cpu {
    fn product<T: CpuFloat>(
        &self,
        kernel: &'static str,
        y: MatMut<'_, T>,
        accum: Accum,
        a: FaerRef<'_, T>,
        b: FaerRef<'_, T>,
    ) -> Result<()> {
        check::product(kernel, [y.rows(), y.cols()], [a.nrows(), a.ncols()], [b.nrows(), b.ncols()])?;
        self.for_each(tiles(y.faer(), a, b), |(y, a, b)| T::matmul(y, accum, a, b, T::ONE))
    }
}

impl<T: CpuFloat> Gemm<T> for Cpu {
    fn gemm(
        &self,
        mut y: ViewMut<'_, T, Self>,
        a: View<'_, T, Self>,
        ta: Op,
        b: View<'_, T, Self>,
        tb: Op,
    ) -> Result<()> {
        self.product("gemm", (&mut y).into(), Accum::Replace, op(a.into(), ta), op(b.into(), tb))
    }

    fn gemm_to_acc(
        &self,
        mut g: ViewMut<'_, T, Self>,
        a: View<'_, T, Self>,
        ta: Op,
        b: View<'_, T, Self>,
        tb: Op,
    ) -> Result<()> {
        self.product("gemm_to_acc", (&mut g).into(), Accum::Replace, op(a.into(), ta), op(b.into(), tb))
    }

    fn gemm_acc(
        &self,
        mut g: ViewMut<'_, T, Self>,
        a: View<'_, T, Self>,
        ta: Op,
        b: View<'_, T, Self>,
        tb: Op,
    ) -> Result<()> {
        self.product("gemm_acc", (&mut g).into(), Accum::Add, op(a.into(), ta), op(b.into(), tb))
    }

    fn gemm_backward(
        &self,
        dx: ViewMut<'_, T, Self>,
        dw: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
    ) -> Result<()> {
        check::gemm_backward("gemm_backward", &dx, &dw, dy, x, w)?;
        self.gemm_acc(dw, dy, Op::T, x, Op::N)?;
        self.gemm_acc(dx, dy, Op::N, w, Op::N)
    }
}
