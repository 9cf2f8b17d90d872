//! Typed matrices over untyped device memory.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use crate::{Device, Element, Error, Float, Result};

/// Where a matrix lies in a buffer, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// First element.
    pub offset: usize,
    /// Rows.
    pub rows: usize,
    /// Columns, contiguous.
    pub cols: usize,
    /// Distance between the starts of two rows; at least `cols`.
    pub stride: usize,
}

impl Layout {
    /// A contiguous matrix from the start of a buffer.
    pub const fn contiguous(rows: usize, cols: usize) -> Self {
        Layout { offset: 0, rows, cols, stride: cols }
    }

    /// `[rows, cols]`.
    pub const fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Number of elements.
    pub const fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// True if there is no element.
    pub const fn is_empty(&self) -> bool {
        self.rows == 0 || self.cols == 0
    }

    /// True if the rows follow each other without gaps.
    pub const fn is_contiguous(&self) -> bool {
        self.stride == self.cols || self.rows <= 1
    }

    /// Elements from `offset` to one past the last one, gaps included.
    pub const fn span(&self) -> usize {
        if self.is_empty() { 0 } else { (self.rows - 1) * self.stride + self.cols }
    }

    fn rows(self, r: Range<usize>) -> Result<Self> {
        if r.start > r.end || r.end > self.rows {
            return Err(Error::OutOfBounds { start: r.start, end: r.end, len: self.rows });
        }
        Ok(Layout { offset: self.offset + r.start * self.stride, rows: r.len(), ..self })
    }

    fn columns(self, c: Range<usize>) -> Result<Self> {
        if c.start > c.end || c.end > self.cols {
            return Err(Error::OutOfBounds { start: c.start, end: c.end, len: self.cols });
        }
        Ok(Layout { offset: self.offset + c.start, cols: c.len(), ..self })
    }

    fn reshape(self, rows: usize, cols: usize) -> Result<Self> {
        if rows.checked_mul(cols) != Some(self.len()) || !self.is_contiguous() {
            return Err(Error::Shape {
                kernel: "reshape",
                what: "elements of a contiguous matrix",
                expected: self.shape(),
                got: [rows, cols],
            });
        }
        Ok(Layout { offset: self.offset, rows, cols, stride: cols })
    }

    fn check<T: Element>(self, bytes: usize) -> Result<Self> {
        // Counted to the start of one row more, so that no slice of what is accepted overflows either.
        let rows = self.rows.checked_mul(self.stride).and_then(|rows| rows.checked_add(self.cols));
        let far = rows.and_then(|rows| self.offset.checked_add(rows)?.checked_mul(size_of::<T>()));
        let end = far.map_or(usize::MAX, |_| (self.offset + self.span()) * size_of::<T>());
        if end > bytes || (self.rows > 1 && self.stride < self.cols) {
            let start = self.offset.saturating_mul(size_of::<T>());
            return Err(Error::OutOfBounds { start, end, len: bytes });
        }
        Ok(self)
    }
}

/// Bytes of a contiguous matrix.
fn bytes<T>(device: &impl Device, rows: usize, cols: usize) -> Result<usize> {
    let bytes = rows.checked_mul(cols).and_then(|len| len.checked_mul(size_of::<T>()));
    bytes.ok_or_else(|| Error::OutOfMemory { requested: usize::MAX, live: device.memory().live })
}

/// A borrowed matrix to read.
#[derive(Debug)]
pub struct View<'a, T, D: Device> {
    buf: &'a D::Buf,
    layout: Layout,
    element: PhantomData<T>,
}

impl<T, D: Device> Clone for View<'_, T, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, D: Device> Copy for View<'_, T, D> {}

impl<'a, T: Element, D: Device> View<'a, T, D> {
    /// A matrix inside `buf`; an error if it does not lie inside.
    pub fn new(buf: &'a D::Buf, layout: Layout) -> Result<Self> {
        Ok(View { buf, layout: layout.check::<T>(D::byte_len(buf))?, element: PhantomData })
    }

    /// The buffer it lies in.
    pub fn buf(&self) -> &'a D::Buf {
        self.buf
    }

    /// Where it lies.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        self.layout.shape()
    }

    /// Rows `r`.
    pub fn rows(self, r: Range<usize>) -> Result<Self> {
        Ok(View { layout: self.layout.rows(r)?, ..self })
    }

    /// Columns `c`.
    pub fn columns(self, c: Range<usize>) -> Result<Self> {
        Ok(View { layout: self.layout.columns(c)?, ..self })
    }

    /// The same elements as `[rows, cols]`; the matrix must be contiguous.
    pub fn reshape(self, rows: usize, cols: usize) -> Result<Self> {
        Ok(View { layout: self.layout.reshape(rows, cols)?, ..self })
    }
}

/// A borrowed matrix to write.
#[derive(Debug)]
pub struct ViewMut<'a, T, D: Device> {
    buf: &'a mut D::Buf,
    layout: Layout,
    element: PhantomData<T>,
}

impl<'a, T: Element, D: Device> ViewMut<'a, T, D> {
    /// A matrix inside `buf`; an error if it does not lie inside.
    pub fn new(buf: &'a mut D::Buf, layout: Layout) -> Result<Self> {
        let layout = layout.check::<T>(D::byte_len(buf))?;
        Ok(ViewMut { buf, layout, element: PhantomData })
    }

    /// The buffer it lies in.
    pub fn buf(&mut self) -> &mut D::Buf {
        self.buf
    }

    /// Where it lies.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        self.layout.shape()
    }

    /// Lends the same matrix for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T, D> {
        ViewMut { buf: self.buf, layout: self.layout, element: PhantomData }
    }

    /// Reads what is there.
    pub fn as_view(&self) -> View<'_, T, D> {
        View { buf: self.buf, layout: self.layout, element: PhantomData }
    }

    /// Rows `r`.
    pub fn rows(self, r: Range<usize>) -> Result<Self> {
        Ok(ViewMut { layout: self.layout.rows(r)?, ..self })
    }

    /// Columns `c`.
    pub fn columns(self, c: Range<usize>) -> Result<Self> {
        Ok(ViewMut { layout: self.layout.columns(c)?, ..self })
    }

    /// The same elements as `[rows, cols]`; the matrix must be contiguous.
    pub fn reshape(self, rows: usize, cols: usize) -> Result<Self> {
        Ok(ViewMut { layout: self.layout.reshape(rows, cols)?, ..self })
    }

    /// Sets all elements to 0.
    pub fn zero(&mut self, device: &D) -> Result<()> {
        let Layout { offset, rows, cols, stride } = self.layout;
        // Rows that follow each other are one run.
        let (runs, len) = if stride == cols { (1, rows * cols) } else { (rows, cols) };
        for start in (0..runs).map(|run| offset + run * stride) {
            device.zero(self.buf, start * size_of::<T>()..(start + len) * size_of::<T>())?;
        }
        Ok(())
    }
}

impl<'a, T: Float, D: Device> ViewMut<'a, T, D> {
    /// The same matrix as one of the accumulation type, which must be `T` itself.
    pub fn into_acc(self) -> Result<ViewMut<'a, T::Acc, D>> {
        require_acc::<T>()?;
        Ok(ViewMut { buf: self.buf, layout: self.layout, element: PhantomData })
    }
}

fn require_acc<T: Float>() -> Result<()> {
    crate::check::argument("into_acc", T::is_acc(), || {
        format!("{} is not its own accumulation type, {}", T::DTYPE, T::Acc::DTYPE)
    })
}

/// An owned matrix. Clones and row or column slices share memory; what is shared is never written
/// ([`Tensor::view_mut`] refuses), so a tensor that was handed to a communicator stays as it was.
#[derive(Debug)]
pub struct Tensor<T, D: Device> {
    buf: Arc<D::Buf>,
    layout: Layout,
    element: PhantomData<T>,
}

impl<T, D: Device> Clone for Tensor<T, D> {
    fn clone(&self) -> Self {
        Tensor { buf: self.buf.clone(), layout: self.layout, element: PhantomData }
    }
}

impl<T: Element, D: Device> Tensor<T, D> {
    /// A new matrix of unspecified content; [`Error::OutOfMemory`] if the device has none for it.
    pub fn uninit(device: &D, rows: usize, cols: usize) -> Result<Self> {
        let buf = Arc::new(device.alloc(bytes::<T>(device, rows, cols)?)?);
        Ok(Tensor { buf, layout: Layout::contiguous(rows, cols), element: PhantomData })
    }

    /// A new matrix of zeros; [`Error::OutOfMemory`] if the device has none for it.
    pub fn zeros(device: &D, rows: usize, cols: usize) -> Result<Self> {
        let buf = Arc::new(device.alloc_zeroed(bytes::<T>(device, rows, cols)?)?);
        Ok(Tensor { buf, layout: Layout::contiguous(rows, cols), element: PhantomData })
    }

    /// A new matrix with these elements, row by row; [`Error::Shape`] if they are not `rows · cols`.
    pub fn from_slice(device: &D, rows: usize, cols: usize, elements: &[T]) -> Result<Self> {
        if rows.checked_mul(cols) != Some(elements.len()) {
            return Err(Error::Shape {
                kernel: "from_slice",
                what: "number of elements",
                expected: [rows, cols],
                got: [1, elements.len()],
            });
        }
        let mut buf = device.alloc(size_of_val(elements))?;
        device.upload(&mut buf, 0, bytemuck::cast_slice(elements))?;
        Ok(Tensor { buf: Arc::new(buf), layout: Layout::contiguous(rows, cols), element: PhantomData })
    }

    /// A new matrix with the same elements, which shares no memory; they must be contiguous.
    pub fn copy(&self, device: &D) -> Result<Self> {
        let [rows, cols] = self.layout.reshape(self.layout.rows, self.layout.cols)?.shape();
        let bytes = self.byte_range();
        let mut buf = device.alloc(bytes.len())?;
        device.copy(&mut buf, 0, &self.buf, bytes)?;
        Ok(Tensor { buf: Arc::new(buf), layout: Layout::contiguous(rows, cols), element: PhantomData })
    }

    /// Writes these elements, row by row, over those from element `at` on of a contiguous matrix; [`Error::Shared`] while
    /// another tensor or a communicator holds the memory.
    pub fn upload(&mut self, device: &D, at: usize, elements: &[T]) -> Result<()> {
        let whole = self.layout.reshape(1, self.layout.len())?;
        let offset = whole.columns(at..at.saturating_add(elements.len()))?.offset;
        let mut view = self.view_mut()?;
        device.upload(view.buf(), offset * size_of::<T>(), bytemuck::cast_slice(elements))
    }

    /// A matrix inside a buffer (what a communicator returned, say).
    pub fn from_buf(buf: Arc<D::Buf>, layout: Layout) -> Result<Self> {
        let layout = layout.check::<T>(D::byte_len(&buf))?;
        Ok(Tensor { buf, layout, element: PhantomData })
    }

    /// The buffer it lies in.
    pub fn buf(&self) -> &Arc<D::Buf> {
        &self.buf
    }

    /// Where it lies.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        self.layout.shape()
    }

    /// Bytes from the first to one past the last element.
    pub fn byte_range(&self) -> Range<usize> {
        let start = self.layout.offset * size_of::<T>();
        start..start + self.layout.span() * size_of::<T>()
    }

    /// To read.
    pub fn view(&self) -> View<'_, T, D> {
        View { buf: &self.buf, layout: self.layout, element: PhantomData }
    }

    /// To write; [`Error::Shared`] while another tensor or a communicator holds the memory.
    pub fn view_mut(&mut self) -> Result<ViewMut<'_, T, D>> {
        let holders = Arc::strong_count(&self.buf);
        let buf = Arc::get_mut(&mut self.buf).ok_or(Error::Shared { holders })?;
        Ok(ViewMut { buf, layout: self.layout, element: PhantomData })
    }

    /// Rows `r`, sharing memory.
    pub fn rows(&self, r: Range<usize>) -> Result<Self> {
        Ok(Tensor { layout: self.layout.rows(r)?, ..self.clone() })
    }

    /// Columns `c`, sharing memory.
    pub fn columns(&self, c: Range<usize>) -> Result<Self> {
        Ok(Tensor { layout: self.layout.columns(c)?, ..self.clone() })
    }

    /// The same elements as `[rows, cols]`, sharing memory; the matrix must be contiguous.
    pub fn reshape(&self, rows: usize, cols: usize) -> Result<Self> {
        Ok(Tensor { layout: self.layout.reshape(rows, cols)?, ..self.clone() })
    }

    /// Its elements on the host, row by row.
    pub fn to_vec(&self, device: &D) -> Result<Vec<T>> {
        let Layout { offset, rows, cols, stride } = self.layout;
        let mut host = vec![T::zeroed(); rows * cols];
        if self.layout.is_empty() {
            return Ok(host);
        }
        if self.layout.is_contiguous() {
            device.download(&self.buf, offset * size_of::<T>(), bytemuck::cast_slice_mut(&mut host))?;
        } else {
            for (r, row) in host.chunks_exact_mut(cols).enumerate() {
                device.download(
                    &self.buf,
                    (offset + r * stride) * size_of::<T>(),
                    bytemuck::cast_slice_mut(row),
                )?;
            }
        }
        Ok(host)
    }
}

impl<T: Float, D: Device> Tensor<T, D> {
    /// The same matrix as one of the accumulation type, which must be `T` itself.
    pub fn into_acc(self) -> Result<Tensor<T::Acc, D>> {
        require_acc::<T>()?;
        Ok(Tensor { buf: self.buf, layout: self.layout, element: PhantomData })
    }

    /// A new matrix from doubles, rounded.
    pub fn from_f64(device: &D, rows: usize, cols: usize, elements: &[f64]) -> Result<Self> {
        let rounded: Vec<T> = elements.iter().map(|&x| T::from_f64(x)).collect();
        Self::from_slice(device, rows, cols, &rounded)
    }

    /// Its elements on the host as doubles.
    pub fn to_f64(&self, device: &D) -> Result<Vec<f64>> {
        Ok(self.to_vec(device)?.into_iter().map(T::to_f64).collect())
    }
}
