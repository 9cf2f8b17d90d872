//! A kernel that gives each row to another piece of work gives of several rows what it gives of each alone, which the
//! conformance suite compares with formulas.

use std::ops::Range;

use moe_kernels::family::{
    Activation, Elementwise, Embedding, GateFunction, Loss, Norm, Rope, RotaryHead, RotaryPairs, Rotation,
    Rows,
};
use moe_kernels::{Cpu, Result, Tensor};

type Matrix = Tensor<f64, Cpu>;

const ROWS: usize = 3;
/// More elements than a piece of work has.
const WIDE: usize = 33_000;

/// Elements that differ from row to row.
fn matrix(cpu: &Cpu, rows: usize, cols: usize, seed: f64) -> Result<Matrix> {
    let elements: Vec<f64> = (0..rows * cols).map(|i| (seed + i as f64 * seed.sqrt()).sin()).collect();
    Tensor::from_slice(cpu, rows, cols, &elements)
}

/// `run` makes all results of some rows; in a `[1, n]` a row has one element.
fn same_alone<const N: usize>(
    cpu: &Cpu,
    what: &str,
    run: impl Fn(Range<usize>) -> Result<[Matrix; N]>,
) -> Result<()> {
    let (whole, mut alone) = (run(0..ROWS)?, vec![vec![]; N]);
    for row in 0..ROWS {
        for (alone, result) in alone.iter_mut().zip(run(row..row + 1)?) {
            alone.extend(result.to_vec(cpu)?);
        }
    }
    for (result, (whole, alone)) in whole.iter().zip(&alone).enumerate() {
        assert!(whole.to_vec(cpu)? == *alone, "result {result} of {what}");
    }
    Ok(())
}

/// `add` adds what some rows give to a matrix: all at once, or one after the other.
fn same_in_turn(
    cpu: &Cpu,
    what: &str,
    before: &Matrix,
    add: impl Fn(&mut Matrix, Range<usize>) -> Result<()>,
) -> Result<()> {
    let (mut whole, mut in_turn) = (before.copy(cpu)?, before.copy(cpu)?);
    add(&mut whole, 0..ROWS)?;
    for row in 0..ROWS {
        add(&mut in_turn, row..row + 1)?;
    }
    assert!(whole.to_vec(cpu)? == in_turn.to_vec(cpu)?, "{what}");
    Ok(())
}

#[test]
fn norms() -> Result<()> {
    let cpu = &Cpu::poisoned(2);
    let (x, dy, past) =
        (matrix(cpu, ROWS, WIDE, 2.0)?, matrix(cpu, ROWS, WIDE, 3.0)?, matrix(cpu, ROWS, WIDE, 5.0)?);
    let (w, rstd, sums) =
        (matrix(cpu, 1, WIDE, 6.0)?, matrix(cpu, 1, ROWS, 7.0)?, matrix(cpu, 1, ROWS, 8.0)?);
    let wide = |r: &Range<usize>| Matrix::uninit(cpu, r.len(), WIDE);
    let one_each = |r: &Range<usize>| Matrix::uninit(cpu, 1, r.len());

    same_alone(cpu, "rms_norm", |r| {
        let (mut y, mut rstd) = (wide(&r)?, one_each(&r)?);
        cpu.rms_norm(y.view_mut()?, rstd.view_mut()?, x.view().rows(r)?, w.view(), 1e-5)?;
        Ok([y, rstd])
    })?;
    same_alone(cpu, "rms_norm_part", |r| {
        let (mut y, mut rstd, mut squares) = (wide(&r)?, one_each(&r)?, one_each(&r)?);
        let x = x.view().rows(r)?;
        cpu.rms_norm_sums(squares.view_mut()?, x)?;
        let (width, eps) = (2 * WIDE, 1e-5);
        cpu.rms_norm_part(y.view_mut()?, rstd.view_mut()?, x, w.view(), squares.view(), width, eps)?;
        Ok([y, rstd, squares])
    })?;
    same_alone(cpu, "rms_norm_backward_sums", |r| {
        let mut sums = one_each(&r)?;
        cpu.rms_norm_backward_sums(
            sums.view_mut()?,
            dy.view().rows(r.clone())?,
            x.view().rows(r)?,
            w.view(),
        )?;
        Ok([sums])
    })?;

    let backward = |dx: &mut Matrix, dw: &mut Matrix, r: Range<usize>| {
        let [dy, x, past] = [&dy, &x, &past].map(|m| m.view().rows(r.clone()));
        let rstd = rstd.view().columns(r)?;
        cpu.rms_norm_backward(dx.view_mut()?, dw.view_mut()?, dy?, x?, w.view(), rstd, Some(past?))
    };
    let part_backward = |dx: &mut Matrix, dw: &mut Matrix, r: Range<usize>| {
        let [dy, x] = [&dy, &x].map(|m| m.view().rows(r.clone()));
        let (rstd, sums) = (rstd.view().columns(r.clone())?, sums.view().columns(r)?);
        cpu.rms_norm_part_backward(dx.view_mut()?, dw.view_mut()?, dy?, x?, w.view(), rstd, sums, 2 * WIDE)
    };
    backward_of(cpu, "rms_norm_backward", &w, backward)?;
    backward_of(cpu, "rms_norm_part_backward", &w, part_backward)
}

/// `backward` of some rows writes `dx` and adds to `dw`, which is `w` before.
fn backward_of(
    cpu: &Cpu,
    what: &str,
    w: &Matrix,
    backward: impl Fn(&mut Matrix, &mut Matrix, Range<usize>) -> Result<()>,
) -> Result<()> {
    let wide = |r: &Range<usize>| Matrix::uninit(cpu, r.len(), WIDE);
    same_alone(cpu, what, |r| {
        let mut dx = wide(&r)?;
        backward(&mut dx, &mut w.copy(cpu)?, r)?;
        Ok([dx])
    })?;
    same_in_turn(cpu, what, w, |dw, r| backward(&mut wide(&r)?, dw, r))
}

#[test]
fn activations() -> Result<()> {
    let cpu = &Cpu::poisoned(2);
    let (x, dy) = (matrix(cpu, ROWS, WIDE, 2.0)?, matrix(cpu, ROWS, WIDE, 3.0)?);
    let (gate_up, p, gate) =
        (matrix(cpu, ROWS, 2 * WIDE, 5.0)?, matrix(cpu, 1, ROWS, 6.0)?, matrix(cpu, ROWS, 1, 7.0)?);
    let out = |r: &Range<usize>, cols| Matrix::uninit(cpu, r.len(), cols);
    for function in [GateFunction::Silu, GateFunction::GeluTanh] {
        same_alone(cpu, "glu", |r| {
            let (mut y, p) = (out(&r, WIDE)?, p.view().columns(r.clone())?);
            cpu.glu(y.view_mut()?, gate_up.view().rows(r)?, Some(p), function)?;
            Ok([y])
        })?;
        same_alone(cpu, "glu_backward", |r| {
            let (mut dx, mut dp) = (out(&r, 2 * WIDE)?, Matrix::uninit(cpu, 1, r.len())?);
            let (dy, x) = (dy.view().rows(r.clone())?, gate_up.view().rows(r.clone())?);
            let p = Some(p.view().columns(r)?);
            cpu.glu_backward(dx.view_mut()?, Some(dp.view_mut()?), dy, x, p, function)?;
            Ok([dx, dp])
        })?;
    }
    same_alone(cpu, "sigmoid_gate", |r| {
        let mut y = out(&r, WIDE)?;
        cpu.sigmoid_gate(y.view_mut()?, x.view().rows(r.clone())?, gate.view().rows(r)?)?;
        Ok([y])
    })?;
    same_alone(cpu, "sigmoid_gate_backward", |r| {
        let (mut dx, mut dgate) = (out(&r, WIDE)?, out(&r, 1)?);
        let [dy, x, gate] = [&dy, &x, &gate].map(|m| m.view().rows(r.clone()));
        cpu.sigmoid_gate_backward(dx.view_mut()?, dgate.view_mut()?, dy?, x?, gate?)?;
        Ok([dx, dgate])
    })
}

#[test]
fn losses() -> Result<()> {
    let cpu = &Cpu::poisoned(2);
    let (logits, lse, scale) =
        (matrix(cpu, ROWS, WIDE, 2.0)?, matrix(cpu, 1, ROWS, 3.0)?, matrix(cpu, 1, ROWS, 5.0)?);
    let labels = Tensor::from_slice(cpu, 1, ROWS, &[WIDE as i32 - 1, 7, 20_000])?;
    same_alone(cpu, "cross_entropy", |r| {
        let (mut lse, mut target) = (Matrix::uninit(cpu, 1, r.len())?, Matrix::uninit(cpu, 1, r.len())?);
        let labels = labels.view().columns(r.clone())?;
        cpu.cross_entropy(lse.view_mut()?, target.view_mut()?, logits.view().rows(r)?, labels, 0)?;
        Ok([lse, target])
    })?;
    same_alone(cpu, "cross_entropy_backward", |r| {
        let mut dlogits = logits.rows(r.clone())?.copy(cpu)?;
        let [lse, scale] = [&lse, &scale].map(|m| m.view().columns(r.clone()));
        cpu.cross_entropy_backward(dlogits.view_mut()?, lse?, labels.view().columns(r)?, 0, scale?)?;
        Ok([dlogits])
    })
}

#[test]
fn rows_that_move() -> Result<()> {
    let cpu = &Cpu::poisoned(2);
    let x = matrix(cpu, ROWS, WIDE, 2.0)?;
    let out = |r: &Range<usize>| Matrix::uninit(cpu, r.len(), WIDE);
    let index = Tensor::from_slice(cpu, 1, ROWS, &[2, -1, 0])?;
    let pairs = Tensor::from_slice(cpu, ROWS, 2, &[2, 1, -1, 0, 1, 1])?;
    same_alone(cpu, "copy_rows", |r| {
        let mut y = out(&r)?;
        cpu.copy_rows(y.view_mut()?, x.view().rows(r)?)?;
        Ok([y])
    })?;
    same_alone(cpu, "gather_rows", |r| {
        let mut y = out(&r)?;
        cpu.gather_rows(y.view_mut()?, x.view(), index.view().columns(r)?)?;
        Ok([y])
    })?;
    same_alone(cpu, "gather_sum", |r| {
        let mut y = out(&r)?;
        cpu.gather_sum(y.view_mut()?, x.view(), pairs.view().rows(r)?)?;
        Ok([y])
    })?;
    same_alone(cpu, "embed", |r| {
        let mut y = out(&r)?;
        cpu.embed(y.view_mut()?, x.view(), index.view().columns(r)?, 0)?;
        Ok([y])
    })?;

    let head = RotaryHead { head_dim: 100, first: 0, pairs: RotaryPairs::Halves };
    let (cos, sin) = (matrix(cpu, ROWS, 50, 3.0)?, matrix(cpu, ROWS, 50, 5.0)?);
    let positions = Tensor::from_slice(cpu, 1, ROWS, &[2, 0, 1])?;
    same_alone(cpu, "rope", |r| {
        let (mut y, at) = (out(&r)?, positions.view().columns(r.clone())?);
        let rotation = Rotation::Forward;
        cpu.rope(y.view_mut()?, x.view().rows(r)?, cos.view(), sin.view(), at, head, rotation)?;
        Ok([y])
    })
}
