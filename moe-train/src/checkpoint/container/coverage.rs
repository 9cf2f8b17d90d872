//! Whether pieces make up whole tensors.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::{CheckpointError, Piece, PieceFile};

/// Pieces by tensor and kind; each as the number of its file and itself.
pub(super) type Index = BTreeMap<(String, String), Vec<(usize, Piece)>>;

/// Sorts the pieces by tensor and checks that every element is there exactly once.
pub(super) fn index(files: &[PieceFile], path: &Path) -> Result<Index, CheckpointError> {
    let mut index = Index::new();
    for (file, PieceFile { pieces, .. }) in files.iter().enumerate() {
        for piece in pieces {
            let key = (piece.spec.tensor.clone(), piece.spec.kind.clone());
            index.entry(key).or_default().push((file, piece.clone()));
        }
    }
    for ((tensor, kind), pieces) in &index {
        check(pieces).map_err(|what| CheckpointError::Coverage {
            path: path.to_owned(),
            tensor: tensor.clone(),
            kind: kind.clone(),
            what,
        })?;
    }
    Ok(index)
}

/// Says what is missing of a tensor, or there twice.
fn check(pieces: &[(usize, Piece)]) -> Result<(), String> {
    let Some((_, first)) = pieces.first() else { return Ok(()) };
    let (dims, dtype) = (first.spec.dims, first.spec.dtype);
    let mut blocks: BTreeMap<[usize; 4], Vec<Range<usize>>> = BTreeMap::new();
    for (_, Piece { spec, bytes, .. }) in pieces {
        if (spec.dims, spec.dtype) != (dims, dtype) {
            return Err(format!("{:?} {} and {:?} {}", dims, dtype, spec.dims, spec.dtype));
        }
        if spec.bytes().map(|bytes| bytes as u64) != Some(*bytes) {
            return Err(format!("a piece does not fit its matrix: {spec:?}"));
        }
        let key = [spec.rows.start, spec.rows.end, spec.cols.start, spec.cols.end];
        blocks.entry(key).or_default().push(spec.part.clone());
    }

    for (&[r0, r1, c0, c1], parts) in &mut blocks {
        parts.sort_by_key(|part| part.start);
        let mut end = 0;
        for part in parts.iter() {
            tile(part.start, end).map_err(|what| {
                let (a, b) = (part.start.min(end), part.start.max(end));
                format!("elements {a}..{b} of block [{r0}..{r1}, {c0}..{c1}] are {what}")
            })?;
            end = part.end;
        }
        let len = (r1 - r0) * (c1 - c0);
        if end != len {
            return Err(format!("elements {end}..{len} of block [{r0}..{r1}, {c0}..{c1}] are missing"));
        }
    }

    let keys: Vec<&[usize; 4]> = blocks.keys().collect();
    for (i, [r0, r1, c0, c1]) in keys.iter().enumerate() {
        // Blocks are sorted by first row: later ones that start below this one are disjoint from it.
        for other in keys[i + 1..].iter().take_while(|other| other[0] < *r1) {
            if other[2] < *c1 && *c0 < other[3] {
                return Err(format!("block [{r0}..{r1}, {c0}..{c1}] and block {other:?} overlap"));
            }
        }
    }
    let covered: usize = keys.iter().map(|[r0, r1, c0, c1]| (r1 - r0) * (c1 - c0)).sum();
    match dims[0] * dims[1] {
        whole if whole == covered => Ok(()),
        whole => Err(format!("{} of {whole} elements are missing", whole - covered)),
    }
}

fn tile(start: usize, end: usize) -> Result<(), &'static str> {
    match start.cmp(&end) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err("there twice"),
        std::cmp::Ordering::Greater => Err("missing"),
    }
}
