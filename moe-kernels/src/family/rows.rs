use crate::{Device, Element, Result, View, ViewMut};

/// Moving rows.
pub trait Rows<E: Element>: Device {
    /// `y = x`, shapes equal, strides free.
    fn copy_rows(&self, y: ViewMut<'_, E, Self>, x: View<'_, E, Self>) -> Result<()>;

    /// `y[i] = x[index[i]]`. `index: [1, n]`; a negative index gives a row of zeros, one past the end an error.
    fn gather_rows(
        &self,
        y: ViewMut<'_, E, Self>,
        x: View<'_, E, Self>,
        index: View<'_, i32, Self>,
    ) -> Result<()>;
}
