//! Moving rows.

use super::host::{Random, assert_data_refused, assert_refused, place_elements, place_ints};
use crate::Element;
use crate::family::{ColumnBlocks, Rows};

/// Distinct elements of any type, exact in all of them.
fn numbered<E: Element>(n: usize, from: u8) -> Vec<E> {
    (0..n)
        .map(|i| {
            let mut element = E::zeroed();
            // The low bytes of an integer, or of a float's fraction.
            let bytes = bytemuck::bytes_of_mut(&mut element);
            bytes[0] = from.wrapping_add(i as u8);
            element
        })
        .collect()
}

/// [`Rows`] for elements of type `E`.
pub fn rows<E: Element, D: Rows<E>>(device: &D) {
    let (n, from, cols) = (11, 7, 5);
    let data = numbered::<E>(from * cols, 1);
    let x = place_elements(device, from, cols, &data, numbered::<E>(1, 99)[0]);
    let blank =
        |n: usize| place_elements(device, n, cols, &numbered::<E>(n * cols, 200), numbered::<E>(1, 98)[0]);

    let mut y = blank(from);
    device.copy_rows(y.view_mut(), x.view()).expect("copy_rows");
    assert_eq!(y.elements(), data);
    assert_refused("copy_rows of another shape", device.copy_rows(blank(from + 1).view_mut(), x.view()));

    let mut index = Random::new(2).ints(n, from);
    (index[0], index[4], index[10]) = (6, -1, -7);
    let mut y = blank(n);
    let placed = place_ints(device, 1, n, &index);
    device.gather_rows(y.view_mut(), x.view(), placed.view()).expect("gather_rows");
    let row =
        |i: &i32| usize::try_from(*i).map_or(vec![E::zeroed(); cols], |i| data[i * cols..][..cols].to_vec());
    let want: Vec<E> = index.iter().flat_map(row).collect();
    assert_eq!(y.elements(), want, "gather_rows of {}", E::DTYPE);

    let outside = place_ints(device, 1, n, &vec![from as i32; n]);
    assert_data_refused(
        device,
        "an index past the end",
        device.gather_rows(y.view_mut(), x.view(), outside.view()),
    );
    let short = place_ints(device, 1, n - 1, &index[1..]);
    assert_refused("too few indices", device.gather_rows(y.view_mut(), x.view(), short.view()));

    // One of the rows goes nowhere, and four come from nowhere.
    let position = [-1, 7, 3, -3, 0, 10, 5, -1, -1, -1, 8, -1, 1, -1];
    let mut index = vec![-1; n];
    for (i, to) in position.iter().enumerate().filter(|(_, to)| **to >= 0) {
        index[*to as usize] = i as i32 / 2;
    }
    let (placed, to) = (place_ints(device, 1, n, &index), place_ints(device, from, 2, &position));
    let mut y = blank(n);
    device.spread_rows(y.view_mut(), x.view(), placed.view(), to.view()).expect("spread_rows");
    let want: Vec<E> = index.iter().flat_map(row).collect();
    assert_eq!(y.elements(), want, "spread_rows of {}", E::DTYPE);
    let short = place_ints(device, from - 1, 2, &position[2..]);
    assert_refused(
        "too few positions",
        device.spread_rows(y.view_mut(), x.view(), placed.view(), short.view()),
    );

    let (mut none, empty) = (blank(0), place_ints(device, 1, 0, &[]));
    device.gather_rows(none.view_mut(), x.view(), empty.view()).expect("no rows");
    column_blocks::<E, D>(device);
}

/// Blocks beside others, and one block copied to several places.
fn column_blocks<E: Element, D: Rows<E>>(device: &D) {
    let (n, x_cols, y_cols, count, width) = (5, 9, 16, 3, 2);
    let (x_data, y_data) = (numbered::<E>(n * x_cols, 1), numbered::<E>(n * y_cols, 100));
    let x = place_elements(device, n, x_cols, &x_data, numbered::<E>(1, 99)[0]);
    let y_at = ColumnBlocks { first: 1, step: 5 };
    for x_at in [ColumnBlocks { first: 2, step: 2 }, ColumnBlocks { first: 7, step: 0 }] {
        let mut y = place_elements(device, n, y_cols, &y_data, numbered::<E>(1, 98)[0]);
        let mut copy = |y_at, x_at, count, width| {
            device.copy_column_blocks(y.view_mut(), y_at, x.view(), x_at, count, width)
        };
        copy(y_at, x_at, count, width).expect("copy_column_blocks");
        copy(y_at, x_at, 0, width).expect("no blocks");
        copy(y_at, x_at, count, 0).expect("blocks of nothing");
        assert_refused("blocks beyond x", copy(y_at, ColumnBlocks { first: 8, ..x_at }, count, width));
        assert_refused("blocks beyond y", copy(ColumnBlocks { step: 7, ..y_at }, x_at, count, width));
        assert_refused("blocks that overlap", copy(ColumnBlocks { step: 1, ..y_at }, x_at, count, width));
        let mut want = y_data.clone();
        for (i, b, j) in (0..n).flat_map(|i| (0..count).flat_map(move |b| (0..width).map(move |j| (i, b, j))))
        {
            want[i * y_cols + y_at.first + b * y_at.step + j] =
                x_data[i * x_cols + x_at.first + b * x_at.step + j];
        }
        assert_eq!(y.elements(), want, "copy_column_blocks of {}, {x_at:?}", E::DTYPE);
    }
}
