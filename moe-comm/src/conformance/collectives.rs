//! Every collective against what the host computes.

use half::bf16;
use moe_kernels::{DType, Device, Tensor};

use super::sample::{Sample, tensor, value, values};
use super::{Group, Outcome, expect, expect_tensor, typed, whole};
use crate::{Error, Reduction, World};

/// Rows and columns: nothing, one, odd, and more than is done in one piece.
const SHAPES: [[usize; 2]; 5] = [[0, 3], [1, 1], [7, 3], [5, 0], [301, 67]];

pub(super) fn all_reduce<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    all_reduce_of::<f64, D>(&comm, device)?;
    all_reduce_of::<f32, D>(&comm, device)?;
    all_reduce_of::<bf16, D>(&comm, device)?;
    all_reduce_of::<i64, D>(&comm, device)?;
    all_reduce_of::<i32, D>(&comm, device)?;
    all_reduce_of::<u8, D>(&comm, device)?;
    // Values whose sum depends on the order, to a few roundings.
    let x: Vec<f64> = (0..1000).map(|i| fraction(comm.rank(), i)).collect();
    let sum = comm.all_reduce(&Tensor::from_slice(device, 8, 125, &x)?, Reduction::Sum)?.to_vec(device)?;
    for (i, &sum) in sum.iter().enumerate() {
        let expected: f64 = (0..comm.size()).map(|rank| fraction(rank, i)).sum();
        if (sum - expected).abs() > 1e-14 * comm.size() as f64 {
            return Err(format!("sum of fractions: element {i} is {sum}, expected {expected}").into());
        }
    }
    let mut x = vec![f64::from(value(0, comm.rank(), 0)); 2];
    if comm.rank() == comm.size() / 2 {
        x[1] = f64::NAN;
    }
    let max = comm.all_reduce_host(&x, Reduction::Max)?;
    expect("max of numbers and one that is not a number", (max[0].is_nan(), max[1].is_nan()), (false, true))
}

fn fraction(rank: usize, i: usize) -> f64 {
    1.0 / (1 + i + 7 * rank) as f64
}

fn all_reduce_of<T: Sample, D: Device>(comm: &Group<'_, D>, device: &D) -> Outcome {
    for (salt, shape) in SHAPES.into_iter().enumerate() {
        let n = shape[0] * shape[1];
        let x = tensor::<T, D>(device, salt, comm.rank(), shape)?;
        let sum: Vec<T> =
            (0..n).map(|i| T::of((0..comm.size()).map(|rank| value(salt, rank, i)).sum())).collect();
        let got = comm.all_reduce(&x, Reduction::Sum)?;
        expect_tensor(&format!("sum of {}", T::DTYPE), device, &got, shape, &sum)?;
        let max: Vec<T> = (0..n)
            .map(|i| T::of((0..comm.size()).map(|rank| value(salt, rank, i)).max().unwrap_or(0)))
            .collect();
        let got = comm.all_reduce(&x, Reduction::Max)?;
        expect_tensor(&format!("max of {}", T::DTYPE), device, &got, shape, &max)?;
    }
    Ok(())
}

/// Uneven rows of the ranks, some of them none.
fn uneven(size: usize, salt: usize) -> Vec<usize> {
    (0..size).map(|rank| (rank * 5 + salt * 3) % 4 * (1 + rank % 2)).collect()
}

pub(super) fn all_gather<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    for (salt, [rows, cols]) in SHAPES.into_iter().enumerate() {
        let x = tensor::<f32, D>(device, salt, comm.rank(), [rows, cols])?;
        let all: Vec<f32> =
            (0..comm.size()).flat_map(|rank| values::<f32>(salt, rank, rows * cols)).collect();
        let got = comm.all_gather_rows(&x)?;
        expect_tensor("all_gather", device, &got, [comm.size() * rows, cols], &all)?;
        let rows = uneven(comm.size(), salt);
        let x = tensor::<u8, D>(device, salt, comm.rank(), [rows[comm.rank()], cols])?;
        let all: Vec<u8> =
            (0..comm.size()).flat_map(|rank| values::<u8>(salt, rank, rows[rank] * cols)).collect();
        let got = comm.all_gather_rows_v(&x, &rows)?;
        expect_tensor("all_gather of uneven rows", device, &got, [rows.iter().sum(), cols], &all)?;
    }
    Ok(())
}

pub(super) fn reduce_scatter<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let (me, size) = (comm.rank(), comm.size());
    let sums = |salt, range: std::ops::Range<usize>| -> Vec<f64> {
        range.map(|i| (0..size).map(|rank| f64::from(value(salt, rank, i))).sum()).collect()
    };
    for (salt, [rows, cols]) in SHAPES.into_iter().enumerate() {
        let x = tensor::<f64, D>(device, salt, me, [size * rows, cols])?;
        let got = comm.reduce_scatter_rows(&x)?;
        let block = rows * cols;
        expect_tensor(
            "reduce_scatter",
            device,
            &got,
            [rows, cols],
            &sums(salt, me * block..(me + 1) * block),
        )?;
        let rows = uneven(size, salt);
        let x = tensor::<f64, D>(device, salt, me, [rows.iter().sum(), cols])?;
        let got = comm.reduce_scatter_rows_v(&x, &rows)?;
        let start = rows[..me].iter().sum::<usize>() * cols;
        let expected = sums(salt, start..start + rows[me] * cols);
        expect_tensor("reduce_scatter of uneven rows", device, &got, [rows[me], cols], &expected)?;
    }
    Ok(())
}

pub(super) fn all_to_all<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let (me, size) = (comm.rank(), comm.size());
    let tables: [fn(usize, usize) -> usize; 4] = [
        |from, to| (from * 3 + to * 5) % 4,
        // All to one, and nothing at all.
        |_, to| if to == 0 { 9 } else { 0 },
        |_, _| 0,
        |from, to| 40 + from + 2 * to,
    ];
    for (salt, rows) in tables.into_iter().enumerate() {
        let cols = [3, 5, 2, 67][salt];
        let send: Vec<usize> = (0..size).map(|to| rows(me, to)).collect();
        let recv: Vec<usize> = (0..size).map(|from| rows(from, me)).collect();
        let x = tensor::<i64, D>(device, salt, me, [send.iter().sum(), cols])?;
        let mut expected: Vec<i64> = Vec::new();
        for from in 0..size {
            let start = (0..me).map(|to| rows(from, to)).sum::<usize>() * cols;
            expected.extend((start..start + rows(from, me) * cols).map(|i| i64::from(value(salt, from, i))));
        }
        let got = comm.all_to_all_rows_v(&x, &send, &recv)?;
        expect_tensor("all_to_all", device, &got, [recv.iter().sum(), cols], &expected)?;
    }
    Ok(())
}

pub(super) fn broadcast<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    for root in 0..comm.size() {
        for shape in SHAPES {
            let x = tensor::<i32, D>(device, root, comm.rank(), shape)?;
            let got = comm.broadcast(root, (comm.rank() == root).then_some(&x), shape)?;
            expect_tensor("broadcast", device, &got, shape, &values::<i32>(root, root, shape[0] * shape[1]))?;
        }
    }
    comm.barrier()?;
    Ok(())
}

pub(super) fn host_values<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let (me, size) = (comm.rank() as i64, comm.size() as i64);
    expect("host sum", comm.all_reduce_host(&[me, 1], Reduction::Sum)?, vec![size * (size - 1) / 2, size])?;
    expect("host max", comm.all_reduce_host(&[-me], Reduction::Max)?, vec![0])?;
    let gathered: Vec<i64> = (0..size).flat_map(|rank| [rank, rank * rank]).collect();
    expect("host gather", comm.all_gather_host(&[me, me * me])?, gathered)?;
    let blocks: Vec<i64> = (0..size).flat_map(|to| [10 * me + to, -to]).collect();
    let expected: Vec<i64> = (0..size).flat_map(|from| [10 * from + me, -me]).collect();
    expect("host all-to-all", comm.all_to_all_host(&blocks)?, expected)?;
    expect("host gather of nothing", comm.all_gather_host::<f32>(&[])?, Vec::new())
}

/// What one rank can see alone is refused on it alone, and does not hurt the world.
pub(super) fn refused_arguments<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let size = comm.size();
    let x = tensor::<f32, D>(device, 0, 0, [size + 1, 4])?;
    let columns = x.columns(1..3)?;
    // Of no columns the elements are none, however many rows there are.
    let nothing = Tensor::<f32, D>::zeros(device, 0, 0)?;
    let mut rows = vec![usize::MAX; size + 2];
    rows[comm.rank()] = 0;
    let refused = [
        comm.all_reduce(&columns, Reduction::Sum).err(),
        comm.all_gather_rows_v(&x, &[]).err(),
        comm.all_gather_rows_v(&x, &vec![size; size]).err(),
        comm.reduce_scatter_rows_v(&x, &vec![1; size]).err(),
        comm.all_to_all_rows_v(&x, &vec![1; size], &vec![1; size]).err(),
        comm.all_to_all_rows_v(&x, &vec![1; size + 1], &vec![1; size]).err(),
        comm.broadcast(size, Some(&x), x.shape()).err(),
        comm.broadcast::<f32>(comm.rank(), None, [1, 1]).err(),
        comm.send(size, 0, &x).err(),
        comm.recv::<f32>(size, 0, 1, 1).err(),
        comm.recv::<f32>(0, 0, usize::MAX, 2).err(),
        comm.recv::<f32>(0, 0, usize::MAX / 2, 2).err(),
        comm.broadcast::<f32>(0, None, [usize::MAX, 2]).err(),
        comm.reduce_scatter_rows_v(&x, &vec![usize::MAX; size]).err(),
        comm.all_to_all_rows_v(&x, &vec![0; size], &vec![usize::MAX; size]).err(),
        comm.all_gather_rows_v(&nothing, &rows).err(),
        comm.reduce_scatter_rows_v(&nothing, &vec![usize::MAX; size]).err(),
        comm.all_to_all_rows_v(&nothing, &vec![0; size], &rows).err(),
    ];
    for (i, error) in refused.into_iter().enumerate() {
        let as_expected = matches!(
            (i, &error),
            (0, Some(Error::NotContiguous { rows, cols: 2, stride: 4, .. })) if *rows == size + 1
        ) || (i > 0 && matches!(error, Some(Error::Argument { .. })));
        expect(&format!("refused argument {i}: {error:?}"), as_expected, true)?;
    }
    let integers = Tensor::<u16, D>::zeros(device, size, 1)?;
    for error in [comm.all_reduce(&integers, Reduction::Max).err(), comm.reduce_scatter_rows(&integers).err()]
    {
        let unsupported = matches!(error, Some(Error::Unsupported { dtype: DType::U16, .. }));
        expect(&format!("refused reduction: {error:?}"), unsupported, true)?;
    }
    expect("the world goes on", comm.all_reduce_host(&[1i32], Reduction::Sum)?, vec![size as i32])
}

/// What is sent may lie anywhere in a buffer.
pub(super) fn slices<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let rows: Vec<usize> = (0..comm.size()).map(|rank| 1 + rank % 3).collect();
    let x = tensor::<f32, D>(device, 0, comm.rank(), [6, 5])?;
    let got = comm.all_gather_rows_v(&x.rows(2..2 + rows[comm.rank()])?, &rows)?;
    let mut expected: Vec<f32> = Vec::new();
    for (rank, n) in rows.iter().enumerate() {
        expected.extend(&values::<f32>(0, rank, 30)[10..10 + 5 * n]);
    }
    expect_tensor("gather of slices", device, &got, [rows.iter().sum(), 5], &expected)?;
    // One row of a strided matrix has no gaps.
    let row = x.columns(1..4)?.rows(3..4)?;
    let got = comm.all_gather_rows(&row)?;
    let expected: Vec<f32> =
        (0..comm.size()).flat_map(|rank| values::<f32>(0, rank, 30)[16..19].to_vec()).collect();
    expect_tensor("gather of one strided row", device, &got, [comm.size(), 3], &expected)
}

pub(super) fn same_bits_twice<D: Device>(world: &dyn World<D>, device: &D) -> Outcome {
    let raw = whole(world)?;
    let comm = typed(&*raw, device);
    let n = 4096 * comm.size();
    let x: Vec<f32> = (0..n).map(|i| fraction(comm.rank(), i) as f32).collect();
    let x = Tensor::from_slice(device, n, 1, &x)?;
    let once = (comm.all_reduce(&x, Reduction::Sum)?, comm.reduce_scatter_rows(&x)?);
    let bits =
        |t: &Tensor<f32, D>| t.to_vec(device).map(|v| v.into_iter().map(f32::to_bits).collect::<Vec<_>>());
    for _ in 0..4 {
        let again = (comm.all_reduce(&x, Reduction::Sum)?, comm.reduce_scatter_rows(&x)?);
        expect("bits of all_reduce", bits(&again.0)? == bits(&once.0)?, true)?;
        expect("bits of reduce_scatter", bits(&again.1)? == bits(&once.1)?, true)?;
    }
    // And all ranks have the same.
    let sums = bits(&once.0)?;
    let digest = sums.iter().fold(0i64, |h, &b| h.wrapping_mul(1_000_003).wrapping_add(i64::from(b)));
    let all = comm.all_gather_host(&[digest])?;
    expect("bits on all ranks", all, vec![digest; comm.size()])
}
