//! Values as bytes and back. Integers are little-endian; what is read is never trusted.

use std::sync::Arc;
use std::time::Duration;

use moe_kernels::DType;
use moe_topology::{Attention, Axes, Expert, GroupKey, View};

use crate::board::Lane;
use crate::{Collective, Reduction, Signature};

/// What is wrong with bytes that are no message.
pub(super) type Bad = &'static str;

/// What remains to be read of a message.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Bad> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or("it is cut short")?;
        self.0 = rest;
        Ok(taken)
    }

    /// The length of a list whose elements have at least `element` bytes: no more than could be there.
    fn len(&mut self, element: usize) -> Result<usize, Bad> {
        let len = usize::take(self)?;
        if len > self.0.len() / element {
            return Err("a list is longer than its message");
        }
        Ok(len)
    }
}

/// A value that crosses the wire.
pub(super) trait Wire: Sized {
    fn put(&self, out: &mut Vec<u8>);
    fn take(input: &mut Input<'_>) -> Result<Self, Bad>;
}

impl Wire for u8 {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(*self);
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        Ok(input.bytes(1)?[0])
    }
}

impl Wire for u64 {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_le_bytes());
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        let (bytes, rest) = input.0.split_first_chunk().ok_or("it is cut short")?;
        input.0 = rest;
        Ok(u64::from_le_bytes(*bytes))
    }
}

impl Wire for usize {
    fn put(&self, out: &mut Vec<u8>) {
        (*self as u64).put(out);
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        u64::take(input)?.try_into().map_err(|_| "a number is too large for this machine")
    }
}

impl Wire for Duration {
    fn put(&self, out: &mut Vec<u8>) {
        self.as_secs().put(out);
        u64::from(self.subsec_nanos()).put(out);
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        let (secs, nanos) = (u64::take(input)?, u64::take(input)?);
        let nanos = u32::try_from(nanos).ok().filter(|&nanos| nanos < 1_000_000_000);
        Ok(Duration::new(secs, nanos.ok_or("a time has too many nanoseconds")?))
    }
}

impl Wire for Arc<[u8]> {
    fn put(&self, out: &mut Vec<u8>) {
        self.len().put(out);
        out.extend_from_slice(self);
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        let len = input.len(1)?;
        Ok(input.bytes(len)?.into())
    }
}

impl Wire for String {
    fn put(&self, out: &mut Vec<u8>) {
        self.len().put(out);
        out.extend_from_slice(self.as_bytes());
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        let len = input.len(1)?;
        let text = str::from_utf8(input.bytes(len)?).map_err(|_| "a text is not UTF-8")?;
        Ok(text.into())
    }
}

/// The beginning of a text, if it is longer than `max` bytes.
pub(super) fn clip(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    &text[..end.unwrap_or(0)]
}

impl Wire for Arc<[usize]> {
    fn put(&self, out: &mut Vec<u8>) {
        self.len().put(out);
        self.iter().for_each(|value| value.put(out));
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        let len = input.len(8)?;
        (0..len).map(|_| usize::take(input)).collect()
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            None => out.push(0),
            Some(value) => {
                out.push(1);
                value.put(out);
            }
        }
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        match u8::take(input)? {
            0 => Ok(None),
            1 => Ok(Some(T::take(input)?)),
            _ => Err("neither something nor nothing"),
        }
    }
}

/// The digits of the attention view; the position is the bit.
const ATTENTION: [Axes<Attention>; 8] = [
    Attention::TP_INNER,
    Attention::TP_OUTER,
    Attention::CP_INNER,
    Attention::CP_OUTER,
    Attention::DP_INNER,
    Attention::DP_OUTER,
    Attention::PP_INNER,
    Attention::PP_OUTER,
];
/// Those of the expert view.
const EXPERT: [Axes<Expert>; 8] = [
    Expert::ETP_INNER,
    Expert::ETP_OUTER,
    Expert::EP_INNER,
    Expert::EP_OUTER,
    Expert::EDP_INNER,
    Expert::EDP_OUTER,
    Expert::PP_INNER,
    Expert::PP_OUTER,
];

fn bits<V: View>(axes: Axes<V>, digits: &[Axes<V>; 8]) -> u8 {
    (0..8).filter(|&i| axes.contains(digits[i])).fold(0, |bits, i| bits | 1 << i)
}

fn axes<V: View>(bits: u8, digits: &[Axes<V>; 8]) -> Axes<V> {
    (0..8).filter(|i| bits >> i & 1 == 1).fold(Axes::NONE, |axes, i| axes | digits[i])
}

impl Wire for GroupKey {
    fn put(&self, out: &mut Vec<u8>) {
        match *self {
            GroupKey::Attention(axes) => out.extend([0, bits(axes, &ATTENTION)]),
            GroupKey::Expert(axes) => out.extend([1, bits(axes, &EXPERT)]),
        }
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        let (view, bits) = (u8::take(input)?, u8::take(input)?);
        match view {
            0 => Ok(axes(bits, &ATTENTION).into()),
            1 => Ok(axes(bits, &EXPERT).into()),
            _ => Err("an unknown view"),
        }
    }
}

impl Wire for Lane {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Lane::All => out.push(0),
            Lane::Pair(from, to) => {
                out.push(1);
                from.put(out);
                to.put(out);
            }
            Lane::Founding => out.push(2),
        }
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        match u8::take(input)? {
            0 => Ok(Lane::All),
            1 => Ok(Lane::Pair(usize::take(input)?, usize::take(input)?)),
            2 => Ok(Lane::Founding),
            _ => Err("an unknown lane"),
        }
    }
}

/// Element types; the position is the byte.
const DTYPES: [DType; 7] =
    [DType::F64, DType::F32, DType::Bf16, DType::I64, DType::I32, DType::U16, DType::U8];

impl Wire for DType {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(DTYPES.iter().position(|dtype| dtype == self).map_or(u8::MAX, |at| at as u8));
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        DTYPES.get(usize::from(u8::take(input)?)).copied().ok_or("an unknown element type")
    }
}

impl Wire for Reduction {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(match self {
            Reduction::Sum => 0,
            Reduction::Max => 1,
        });
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        match u8::take(input)? {
            0 => Ok(Reduction::Sum),
            1 => Ok(Reduction::Max),
            _ => Err("an unknown reduction"),
        }
    }
}

impl Wire for Collective {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Collective::AllReduce(reduction) => {
                out.push(0);
                reduction.put(out);
            }
            Collective::AllGather { counts } => {
                out.push(1);
                counts.put(out);
            }
            Collective::ReduceScatter { reduction, counts } => {
                out.push(2);
                reduction.put(out);
                counts.put(out);
            }
            Collective::AllToAll { send, recv } => {
                out.push(3);
                send.put(out);
                recv.put(out);
            }
            Collective::Broadcast { root, count } => {
                out.push(4);
                root.put(out);
                count.put(out);
            }
            Collective::Barrier => out.push(5),
            Collective::Send { to, tag } => {
                out.push(6);
                to.put(out);
                tag.put(out);
            }
            Collective::Recv { from, tag, count } => {
                out.push(7);
                from.put(out);
                tag.put(out);
                count.put(out);
            }
        }
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        Ok(match u8::take(input)? {
            0 => Collective::AllReduce(Wire::take(input)?),
            1 => Collective::AllGather { counts: Wire::take(input)? },
            2 => Collective::ReduceScatter { reduction: Wire::take(input)?, counts: Wire::take(input)? },
            3 => Collective::AllToAll { send: Wire::take(input)?, recv: Wire::take(input)? },
            4 => Collective::Broadcast { root: Wire::take(input)?, count: Wire::take(input)? },
            5 => Collective::Barrier,
            6 => Collective::Send { to: Wire::take(input)?, tag: Wire::take(input)? },
            7 => Collective::Recv {
                from: Wire::take(input)?,
                tag: Wire::take(input)?,
                count: Wire::take(input)?,
            },
            _ => return Err("an unknown operation"),
        })
    }
}

impl Wire for Signature {
    fn put(&self, out: &mut Vec<u8>) {
        self.group.put(out);
        self.op.put(out);
        self.dtype.put(out);
        self.elements.put(out);
        self.cols.put(out);
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        Ok(Signature {
            group: Wire::take(input)?,
            op: Wire::take(input)?,
            dtype: Wire::take(input)?,
            elements: Wire::take(input)?,
            cols: Wire::take(input)?,
        })
    }
}
