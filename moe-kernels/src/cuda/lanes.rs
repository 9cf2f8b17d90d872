//! How rows are spread over the threads of blocks.

/// Threads of a block: so many lanes on each of so many rows, what `group_sum` of the kernels takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lanes {
    pub(super) lanes: usize,
    pub(super) rows: usize,
}

/// Threads of a block that works on several rows.
const THREADS: usize = 256;

impl Lanes {
    /// For rows of so many pieces, of which a thread takes one at a time: few steps, and few threads without a piece.
    pub(super) fn of(pieces: usize) -> Self {
        match pieces {
            0..=256 => Self::of_warp(pieces),
            257..=2048 => Lanes { lanes: 128, rows: 1 },
            _ => Lanes { lanes: 256, rows: 1 },
        }
    }

    /// At most a warp for each row.
    pub(super) fn of_warp(pieces: usize) -> Self {
        let lanes = pieces.next_power_of_two().min(32);
        Lanes { lanes, rows: THREADS / lanes }
    }

    /// Blocks for `n` rows.
    pub(super) fn grid(self, n: usize) -> [usize; 3] {
        [n.div_ceil(self.rows), 1, 1]
    }

    /// Threads of a block.
    pub(super) fn block(self) -> [usize; 3] {
        [self.lanes, self.rows, 1]
    }
}

#[cfg(test)]
mod tests {
    use super::Lanes;

    /// What `group_sum` takes: lanes a power of two up to a warp, whole warps together; or whole warps on one row.
    #[test]
    fn blocks_are_whole_warps() {
        for pieces in (0..5000).chain([1 << 20]) {
            let Lanes { lanes, rows } = Lanes::of(pieces);
            assert!((lanes * rows).is_multiple_of(32) && lanes * rows <= 1024, "{pieces}: {lanes} × {rows}");
            let one_row = rows == 1 && lanes.is_multiple_of(32);
            assert!(one_row || (lanes <= 32 && lanes.is_power_of_two()), "{pieces}: {lanes} × {rows}");
        }
    }
}
