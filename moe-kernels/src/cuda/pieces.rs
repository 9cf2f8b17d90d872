//! Consecutive rows that blocks of threads sum.

/// Pieces of rows, `Pieces` of the kernels: `large` ones of `each` rows, one for every block that runs at once, and then small ones of
/// `rest` rows, since some multiprocessors are slower than others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pieces {
    large: usize,
    each: usize,
    rest: usize,
}

/// Multiprocessors of a Hopper GPU: a constant, so that other GPUs add in the same order.
const MULTIPROCESSORS: usize = 132;
/// Large pieces have so many hundredths of the rows, and are so many times as large as the others.
const LARGE: usize = 90;
const LARGER: usize = 6;

impl Pieces {
    /// Of `n` rows, for `blocks` of a multiprocessor that take `step` rows at once.
    pub(super) fn of(n: usize, blocks: usize, step: usize) -> Self {
        let large = blocks * MULTIPROCESSORS;
        let steps = n * LARGE / 100 / (large * step);
        let rest = (steps / LARGER).max(1) * step;
        Pieces { large: if steps == 0 { 0 } else { large }, each: steps * step, rest }
    }

    /// How many there are of `n` rows.
    pub(super) fn count(self, n: usize) -> usize {
        self.large + (n - self.large * self.each).div_ceil(self.rest)
    }

    /// The kernels' argument.
    pub(super) fn argument(self) -> [i64; 3] {
        [self.large, self.each, self.rest].map(|n| n as i64)
    }
}

#[cfg(test)]
mod tests {
    use super::Pieces;

    /// The first row of a piece, as the kernels have it.
    fn first(pieces: Pieces, piece: usize) -> usize {
        piece.min(pieces.large) * pieces.each + piece.saturating_sub(pieces.large) * pieces.rest
    }

    #[test]
    fn pieces_are_all_rows() {
        for n in (0..3000).chain([32768, 262_144, 1_000_003]) {
            for (blocks, step) in [(1, 1), (3, 2), (2, 32)] {
                let pieces = Pieces::of(n, blocks, step);
                let count = pieces.count(n);
                assert!(first(pieces, count) >= n, "{n} rows: {pieces:?}");
                assert!(count == 0 || first(pieces, count - 1) < n, "{n} rows: an empty piece in {pieces:?}");
            }
        }
    }
}
