//! A vector for each of consecutive row groups.

use super::Cuda;
use super::grouped::UNSOUND;
use super::launch::blocks;
use super::source::GROUPED_BIAS;
use super::tiles::Tiles;
use super::vectors::{vector, vectors};
use crate::family::GroupedBias;
use crate::{Device, Float, Result, View, ViewMut, check};

/// Rows of a thread where biases are added: `ROWS` of the kernels.
const DOWN: usize = 4;
/// Threads of a block that sums rows: beside each other, and below.
const SUM_BLOCK: [usize; 3] = [32, 8, 1];
/// Rows of a group, if all have as many, that one block sums at least; and most blocks for a group.
const ROWS: usize = 256;
const PARTS: usize = 64;
/// Most blocks of a grid but in `x`.
const MOST: usize = 65535;

fn check_scale<A: Float>(kernel: &'static str, scale: Option<View<'_, A, Cuda>>, rows: usize) -> Result<()> {
    scale.map_or(Ok(()), |scale| check::shape(kernel, "scale", [1, rows], scale.shape()))
}

impl<T: Float> GroupedBias<T> for Cuda {
    fn grouped_add_bias(
        &self,
        mut y: ViewMut<'_, T, Self>,
        bias: View<'_, T, Self>,
        scale: Option<View<'_, T::Acc, Self>>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "grouped_add_bias";
        let [n, cols] = y.shape();
        let groups = check::groups(KERNEL, offsets)?;
        check::shape(KERNEL, "bias", [groups, cols], bias.shape())?;
        check_scale(KERNEL, scale, n)?;
        let tiles = Tiles::new([n, cols], vector::<T>(), DOWN).with_other(y.as_view()).with_other(bias);
        let launch = self.kernel(&GROUPED_BIAS.of(T::DTYPE), KERNEL)?;
        let launch = tiles.mat(tiles.mat_mut(launch, &mut y), bias).vector_or_null(scale);
        let launch = launch.vector(offsets).size(groups).size(n).fault(UNSOUND);
        // SAFETY: the kernel touches rows of `y` and `scale` below `n`, and rows of `bias` below `groups`, whatever the
        // offsets are.
        unsafe { tiles.argument(launch).launch() }
    }

    fn grouped_bias_acc(
        &self,
        mut g: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        scale: Option<View<'_, T::Acc, Self>>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "grouped_bias_acc";
        let [n, cols] = dy.shape();
        let groups = check::groups(KERNEL, offsets)?;
        check::shape(KERNEL, "g", [groups, cols], g.shape())?;
        check_scale(KERNEL, scale, n)?;
        if groups * cols == 0 {
            return Ok(());
        }
        let parts_of_group = n.div_ceil(groups * ROWS).clamp(1, PARTS);
        let parts = self.alloc(groups * parts_of_group * cols * size_of::<T::Acc>())?;
        let variant = GROUPED_BIAS.of(T::DTYPE);
        let launch = self.kernel(&variant, "grouped_bias_parts")?.scratch(&parts).mat(dy);
        let launch = launch.vector_or_null(scale).vector(offsets).size(groups).size(n).size(cols);
        let launch = launch.fault(UNSOUND).value(i32::from(vectors(dy, vector::<T>())));
        let across = cols.div_ceil(SUM_BLOCK[0] * vector::<T>());
        let launch = launch.grid([across, parts_of_group, groups.min(MOST)]).block(SUM_BLOCK);
        // SAFETY: the kernel reads rows of `dy` and `scale` below `n`, whatever the offsets are, and writes a row of `cols`
        // parts for each block of a group.
        unsafe { launch.launch()? };
        let launch = self.kernel(&variant, "grouped_bias_add_parts")?.mat_mut(&mut g).scratch(&parts);
        let launch = launch.size(groups).size(cols).size(parts_of_group);
        let launch = launch.grid(blocks(groups * cols, 256)).block([256, 1, 1]);
        // SAFETY: the kernel reads as many parts as were written, and touches all of `g`.
        unsafe { launch.launch() }
    }

    fn grouped_bias_scale_acc(
        &self,
        mut d_scale: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        bias: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "grouped_bias_scale_acc";
        let [n, cols] = dy.shape();
        let groups = check::groups(KERNEL, offsets)?;
        check::shape(KERNEL, "d_scale", [1, n], d_scale.shape())?;
        check::shape(KERNEL, "bias", [groups, cols], bias.shape())?;
        let launch = self.kernel(&GROUPED_BIAS.of(T::DTYPE), KERNEL)?;
        let launch = launch.vector_mut(&mut d_scale).mat(dy).mat(bias).vector(offsets);
        let launch = launch.size(groups).size(n).size(cols).fault(UNSOUND);
        let each = vector::<T>();
        let launch = launch.value(i32::from(vectors(dy, each) && vectors(bias, each)));
        // SAFETY: the kernel touches rows below `n`, and reads rows of `bias` below `groups`, whatever the offsets are.
        unsafe { launch.grid(blocks(n, 8)).block([32, 8, 1]).launch() }
    }
}
