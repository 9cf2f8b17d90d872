//! Pictures of a [`Timeline`](crate::Timeline).

mod svg;
mod terminal;
mod trace;

use crate::{Kind, Span};

/// How many activations a rank keeps, each number from its moment on; nothing if it never goes backward. One is kept from the
/// beginning of its `F` to the end of its `B` or `W`; one whose `F` is not there, as in a part of a timeline, from the beginning.
fn kept(spans: &[Span]) -> Vec<(f64, u32)> {
    let parts = || spans.iter().flat_map(|span| span.action.parts().map(move |part| (span, part.kind)));
    if parts().all(|(_, kind)| kind == Kind::Forward) {
        return Vec::new();
    }
    let change = |(span, kind): (&Span, Kind)| match kind {
        Kind::Forward => Some((span.start, 1)),
        Kind::Backward | Kind::BackwardWeight => Some((span.end, -1)),
        _ => None,
    };
    let changes: Vec<(f64, i64)> = parts().filter_map(change).collect();
    let (mut sum, mut lowest) = (0, 0);
    for (_, change) in &changes {
        sum += change;
        lowest = sum.min(lowest);
    }
    let mut kept = -lowest;
    let mut levels = vec![(0.0, kept as u32)];
    for (at, change) in changes {
        kept += change;
        levels.push((at, kept as u32));
    }
    levels
}
