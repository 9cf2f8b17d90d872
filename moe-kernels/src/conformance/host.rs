//! What the suites share: matrices of doubles on the host, operands placed on a device, comparisons, differences.

use crate::{Device, Element, Error, Float, Layout, Result, View, ViewMut};

/// A matrix of doubles.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) data: Vec<f64>,
}

impl Matrix {
    pub(super) fn from_fn(rows: usize, cols: usize, f: impl Fn(usize, usize) -> f64) -> Self {
        let data = (0..rows * cols).map(|i| f(i / cols, i % cols)).collect();
        Matrix { rows, cols, data }
    }

    pub(super) fn row(rows: &[f64]) -> Self {
        Matrix { rows: 1, cols: rows.len(), data: rows.to_vec() }
    }

    pub(super) fn at(&self, i: usize, j: usize) -> f64 {
        assert!(
            i < self.rows && j < self.cols,
            "the reference reads ({i}, {j}) of {:?}",
            [self.rows, self.cols]
        );
        self.data[i * self.cols + j]
    }

    pub(super) fn transposed(&self) -> Self {
        Matrix::from_fn(self.cols, self.rows, |i, j| self.at(j, i))
    }

    pub(super) fn times(&self, b: &Matrix) -> Self {
        assert_eq!(self.cols, b.rows);
        Matrix::from_fn(self.rows, b.cols, |i, j| (0..self.cols).map(|k| self.at(i, k) * b.at(k, j)).sum())
    }

    pub(super) fn plus(&self, b: &Matrix) -> Self {
        Matrix::from_fn(self.rows, self.cols, |i, j| self.at(i, j) + b.at(i, j))
    }

    /// `Σ self ⊙ b`: a scalar objective whose gradient by `self` is `b`.
    pub(super) fn dot(&self, b: &Matrix) -> f64 {
        assert_eq!([self.rows, self.cols], [b.rows, b.cols]);
        self.data.iter().zip(&b.data).map(|(a, b)| a * b).sum()
    }
}

/// A reproducible source of operands (SplitMix64).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    /// Elements in [−1, 1) that `T` holds exactly.
    pub(super) fn matrix<T: Float>(&mut self, rows: usize, cols: usize) -> Matrix {
        let mut draw = || T::from_f64(self.below(1 << 24) as f64 / (1 << 23) as f64 - 1.0).to_f64();
        Matrix { rows, cols, data: (0..rows * cols).map(|_| draw()).collect() }
    }

    pub(super) fn ints(&mut self, n: usize, below: usize) -> Vec<i32> {
        (0..n).map(|_| self.below(below) as i32).collect()
    }
}

/// An operand in the middle of a larger matrix whose other elements must stay as they are.
pub(super) struct Placed<E: Element, D: Device> {
    device: D,
    buf: D::Buf,
    layout: Layout,
    around: E,
}

/// Elements before the operand in its row, and after it: odd, so that nothing is aligned; but where rows are of whole 64 elements, as
/// those of models are, all rows begin at multiples of 16 bytes, so that kernels that need that are tested too.
fn margins(cols: usize) -> (usize, usize) {
    if cols > 0 && cols.is_multiple_of(64) { (16, 32) } else { (3, 4) }
}

impl<E: Element, D: Device> Placed<E, D> {
    pub(super) fn new(device: &D, rows: usize, cols: usize, elements: &[E], around: E) -> Self {
        assert_eq!(elements.len(), rows * cols);
        let (before, after) = margins(cols);
        let stride = before + cols + after;
        let layout = Layout { offset: stride + before, rows, cols, stride };
        let mut host = vec![around; (rows + 2) * stride];
        for i in 0..rows {
            let at = layout.offset + i * stride;
            host[at..at + cols].copy_from_slice(&elements[i * cols..(i + 1) * cols]);
        }
        let bytes: &[u8] = bytemuck::cast_slice(&host);
        let mut buf = device.alloc(bytes.len()).expect("memory for an operand");
        device.upload(&mut buf, 0, bytes).expect("upload of an operand");
        Placed { device: device.clone(), buf, layout, around }
    }

    pub(super) fn view(&self) -> View<'_, E, D> {
        View::new(&self.buf, self.layout).expect("the operand lies in its buffer")
    }

    pub(super) fn view_mut(&mut self) -> ViewMut<'_, E, D> {
        ViewMut::new(&mut self.buf, self.layout).expect("the operand lies in its buffer")
    }

    /// The elements, row by row.
    pub(super) fn elements(&self) -> Vec<E> {
        let Layout { offset, rows, cols, stride } = self.layout;
        let mut host = vec![E::zeroed(); (rows + 2) * stride];
        self.device.synchronize().expect("synchronisation");
        self.device
            .download(&self.buf, 0, bytemuck::cast_slice_mut(&mut host))
            .expect("download of an operand");
        let mut inside = Vec::new();
        for (at, element) in host.into_iter().enumerate() {
            let place = at.checked_sub(offset).map(|i| (i / stride, i % stride));
            if place.is_some_and(|(i, j)| i < rows && j < cols) {
                inside.push(element);
            } else {
                let same = bytemuck::bytes_of(&element) == bytemuck::bytes_of(&self.around);
                assert!(same, "a kernel wrote outside its operand, at {place:?} of {:?}", [rows, cols]);
            }
        }
        inside
    }
}

impl<T: Float, D: Device> Placed<T, D> {
    pub(super) fn read(&self) -> Matrix {
        let data = self.elements().into_iter().map(T::to_f64).collect();
        Matrix { rows: self.layout.rows, cols: self.layout.cols, data }
    }
}

/// Puts a matrix on the device, NaN around it.
pub(super) fn place<T: Float, D: Device>(device: &D, m: &Matrix) -> Placed<T, D> {
    let elements: Vec<T> = m.data.iter().map(|&x| T::from_f64(x)).collect();
    Placed::new(device, m.rows, m.cols, &elements, T::from_f64(f64::NAN))
}

/// An output: NaN, inside and outside.
pub(super) fn output<T: Float, D: Device>(device: &D, rows: usize, cols: usize) -> Placed<T, D> {
    place(device, &Matrix::from_fn(rows, cols, |_, _| f64::NAN))
}

/// Puts integers on the device, an index that no kernel may use around them.
pub(super) fn place_ints<D: Device>(device: &D, rows: usize, cols: usize, ints: &[i32]) -> Placed<i32, D> {
    Placed::new(device, rows, cols, ints, i32::MAX)
}

/// An output of integers.
pub(super) fn output_ints<D: Device>(device: &D, rows: usize, cols: usize) -> Placed<i32, D> {
    place_ints(device, rows, cols, &vec![i32::MAX; rows * cols])
}

/// Plain elements in the middle of others.
pub(super) fn place_elements<E: Element, D: Device>(
    device: &D,
    rows: usize,
    cols: usize,
    elements: &[E],
    around: E,
) -> Placed<E, D> {
    Placed::new(device, rows, cols, elements, around)
}

/// Panics unless `got` is `want` within `tolerance` of the largest finite element of `want`.
#[track_caller]
pub(super) fn assert_close(what: &str, got: &Matrix, want: &Matrix, tolerance: f64) {
    assert_eq!([got.rows, got.cols], [want.rows, want.cols], "{what}: shape");
    let scale = want.data.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(x.abs())).max(1e-3);
    for (i, (&a, &b)) in got.data.iter().zip(&want.data).enumerate() {
        let good = a == b || (a - b).abs() <= tolerance * scale;
        assert!(
            good,
            "{what} at ({}, {}): {a}, but the reference says {b} (of at most {scale}, tolerance {tolerance})",
            i / want.cols,
            i % want.cols
        );
    }
}

/// Panics unless a kernel refused its operands.
#[track_caller]
pub(super) fn assert_refused(what: &str, result: Result<()>) {
    let refused = matches!(result, Err(Error::Shape { .. } | Error::Argument { .. }));
    assert!(refused, "{what} must be refused, not {result:?}");
}

/// What a call found in its data: an error that it returned, or that the next synchronisation returns, for a device that does not wait.
pub(super) fn settled<D: Device>(device: &D, result: Result<()>) -> Result<()> {
    result.and_then(|()| device.synchronize())
}

/// Panics unless a kernel refused what its data say.
#[track_caller]
pub(super) fn assert_data_refused<D: Device>(device: &D, what: &str, result: Result<()>) {
    assert_refused(what, settled(device, result));
}

/// The gradient of `f` at `x` by five-point central differences.
pub(super) fn gradient(x: &Matrix, f: impl Fn(&Matrix) -> f64) -> Matrix {
    const STEP: f64 = 1.0 / 512.0;
    let mut moved = x.clone();
    let mut gradient = x.clone();
    for i in 0..x.data.len() {
        let mut at = |steps: f64| {
            moved.data[i] = x.data[i] + steps * STEP;
            let value = f(&moved);
            moved.data[i] = x.data[i];
            value
        };
        gradient.data[i] = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * STEP);
    }
    gradient
}
