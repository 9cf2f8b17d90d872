//! The operations of the CPU's thread communicator, once all ranks have arrived.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use moe_kernels::cpu::CpuBuf;
use moe_topology::GroupKey;

use super::reduce::reduce;
use crate::board::Job;
use crate::{Collective, Reduction, Result, Signature};

/// What a rank lets the others read.
pub(super) type Give = Option<(Arc<CpuBuf>, Range<usize>)>;

/// Up to so many bytes, waking another thread costs more than doing its work.
const SMALL: usize = 64 << 10;
/// All-reduces are cut into pieces of at least so many bytes.
const PIECE: usize = 16 << 10;

/// One operation with everything that was sent.
pub struct Operation {
    parties: Vec<(Signature, Give)>,
    /// The reduced pieces of an all-reduce: each is made once, by whichever waiting rank comes to it first.
    pieces: Vec<Piece>,
    piece_bytes: usize,
}

#[derive(Default)]
struct Piece {
    claimed: AtomicBool,
    /// Whole words, so that it is aligned for every element type.
    sum: OnceLock<Result<Vec<u64>>>,
}

impl Job for Operation {
    type Note = Signature;
    type Give = Give;
    type Take = Option<CpuBuf>;

    fn group(note: &Signature) -> GroupKey {
        note.group
    }

    fn name(note: &Signature) -> &'static str {
        note.op.name()
    }

    fn agree(mine: (usize, &Signature), theirs: (usize, &Signature)) -> bool {
        mine.1.agrees(mine.0, theirs.1, theirs.0)
    }

    fn describe(note: &Signature) -> String {
        note.to_string()
    }

    fn join(parties: Vec<(Signature, Give)>) -> Self {
        let mut operation = Operation { parties, pieces: Vec::new(), piece_bytes: 0 };
        if let Collective::AllReduce(_) = operation.parties[0].0.op {
            let (bytes, ranks) = (operation.sent(0).len(), operation.parties.len());
            operation.piece_bytes = bytes.div_ceil(ranks).next_multiple_of(8).max(PIECE);
            operation.pieces.resize_with(bytes.div_ceil(operation.piece_bytes), Piece::default);
        }
        operation
    }

    fn is_small(&self) -> bool {
        let bytes: usize =
            self.parties.iter().map(|(_, give)| give.as_ref().map_or(0, |(_, range)| range.len())).sum();
        bytes <= SMALL || self.parties.len() == 1
    }

    fn fill(&self, index: usize, take: &mut Option<CpuBuf>) -> Result<()> {
        let Some(out) = take.as_mut().map(CpuBuf::as_bytes_mut) else { return Ok(()) };
        let (signature, _) = &self.parties[index];
        let size = signature.dtype.size();
        match &signature.op {
            Collective::AllReduce(reduction) => self.all_reduce(*reduction, index, out)?,
            Collective::AllGather { .. } => {
                let mut at = 0;
                for party in 0..self.parties.len() {
                    let sent = self.sent(party);
                    out[at..][..sent.len()].copy_from_slice(sent);
                    at += sent.len();
                }
            }
            Collective::ReduceScatter { reduction, counts } => {
                let start = counts[..index].iter().sum::<usize>() * size;
                let blocks: Vec<&[u8]> =
                    (0..self.parties.len()).map(|party| &self.sent(party)[start..][..out.len()]).collect();
                reduce(*reduction, signature.dtype, out, &blocks)?;
            }
            Collective::AllToAll { .. } => {
                let mut at = 0;
                for (party, (theirs, _)) in self.parties.iter().enumerate() {
                    let Collective::AllToAll { send, .. } = &theirs.op else { continue };
                    let start = send[..index].iter().sum::<usize>() * size;
                    let block = &self.sent(party)[start..][..send[index] * size];
                    out[at..][..block.len()].copy_from_slice(block);
                    at += block.len();
                }
            }
            Collective::Broadcast { root, .. } => out.copy_from_slice(self.sent(*root)),
            // The sender of a message is party 0.
            Collective::Recv { .. } => out.copy_from_slice(self.sent(0)),
            Collective::Barrier | Collective::Send { .. } => {}
        }
        Ok(())
    }
}

impl Operation {
    fn sent(&self, party: usize) -> &[u8] {
        self.parties[party].1.as_ref().map_or(&[], |(buf, range)| &buf.as_bytes()[range.clone()])
    }

    /// Reduces the pieces that nobody has begun, starting with this rank's own, then copies all of them.
    fn all_reduce(&self, reduction: Reduction, index: usize, out: &mut [u8]) -> Result<()> {
        let first = index * self.pieces.len() / self.parties.len();
        for p in (first..self.pieces.len()).chain(0..first) {
            if !self.pieces[p].claimed.swap(true, Ordering::Relaxed) {
                self.piece(reduction, p);
            }
        }
        for (p, out) in out.chunks_mut(self.piece_bytes.max(1)).enumerate() {
            let sum = self.piece(reduction, p).as_ref().map_err(Clone::clone)?;
            out.copy_from_slice(&bytemuck::cast_slice(sum)[..out.len()]);
        }
        Ok(())
    }

    fn piece(&self, reduction: Reduction, p: usize) -> &Result<Vec<u64>> {
        self.pieces[p].sum.get_or_init(|| {
            let bytes = self.sent(0).len();
            let range = p * self.piece_bytes..bytes.min((p + 1) * self.piece_bytes);
            let parts: Vec<&[u8]> =
                (0..self.parties.len()).map(|party| &self.sent(party)[range.clone()]).collect();
            let mut sum = vec![0u64; range.len().div_ceil(8)];
            let out = &mut bytemuck::cast_slice_mut(&mut sum)[..range.len()];
            reduce(reduction, self.parties[0].0.dtype, out, &parts).map(|()| sum)
        })
    }
}
