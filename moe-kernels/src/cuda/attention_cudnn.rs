//! Attention of `bf16` by cuDNN, where it is there.
//!
//! It takes heads of any multiple of 8 up to 256, at least 128 queries and keys, causal or not, matrices at multiples of 16 bytes, their rows
//! too. The forward gives the same bits twice. The backward adds up the gradient of queries in whatever order blocks of keys come to
//! an end: it does not.

use std::ffi::c_void;
use std::sync::Arc;

use super::Cuda;
use super::attention::int;
use super::attention_flash::Backward;
use super::attention_graph::Id::{self, *};
use super::attention_graph::{MATRICES, Mask, Problem};
use super::cudnn::{Address, Plan};
use super::launch::blocks;
use super::source::ATTENTION;
use super::tensor_map::Tiled;
use crate::family::{AttentionMask, AttentionShape};
use crate::{DType, Device, Element, Error, Float, Result, View, ViewMut};

/// Fewest queries and keys: a plan is made for every number of them, and for few the time of that is not worth it.
const LEAST: usize = 128;
/// Largest head.
const HEAD_DIM: usize = 256;
/// Threads of a block of `attention_lse_by_head`: `THREADS` of `attention.cu`.
const THREADS: usize = 256;

/// What graphs are given by value.
#[derive(Debug, Clone, Copy)]
struct Numbers {
    scale: f32,
    hidden: f32,
    one: f32,
    first_query: i32,
}

/// A matrix of a call.
#[derive(Debug, Clone, Copy)]
struct Operand {
    id: Id,
    address: u64,
    stride: usize,
    /// Whether its rows are where the library takes them.
    fits: bool,
}

/// A call that the library takes.
struct Call {
    problem: Problem,
    plan: Arc<Plan>,
    numbers: Numbers,
    matrices: Vec<Operand>,
}

impl Cuda {
    /// Attention by cuDNN, where it is there and takes the call; else nothing is done, and the result is false.
    ///
    /// # Safety
    ///
    /// The shapes fit together.
    pub(super) unsafe fn cudnn_attention<T: Float>(
        &self,
        o: &mut ViewMut<'_, T, Self>,
        lse: &mut ViewMut<'_, T::Acc, Self>,
        q: View<'_, T, Self>,
        k: View<'_, T, Self>,
        v: View<'_, T, Self>,
        shape: &AttentionShape,
    ) -> Result<bool> {
        let lse = Operand { fits: true, ..self.operand(Lse, lse.as_view())? };
        let matrices = vec![
            self.operand(Q, q)?,
            self.operand(K, k)?,
            self.operand(V, v)?,
            self.operand(O, o.as_view())?,
            lse,
        ];
        let Some(call) = self.call::<T>(shape, matrices, false)? else { return Ok(false) };
        // SAFETY: the matrices are as the plan's problem says.
        unsafe { call.execute(self, &[])? };
        Ok(true)
    }

    /// The gradients by cuDNN, where it is there and takes the call; else nothing is done, and the result is false.
    ///
    /// # Safety
    ///
    /// The shapes fit together.
    #[allow(clippy::too_many_arguments)] // the operands of the formula
    pub(super) unsafe fn cudnn_attention_backward<T: Float>(
        &self,
        gradients: &mut Backward<'_, T>,
        d_o: View<'_, T, Self>,
        q: View<'_, T, Self>,
        k: View<'_, T, Self>,
        v: View<'_, T, Self>,
        o: View<'_, T, Self>,
        lse: View<'_, T::Acc, Self>,
        shape: &AttentionShape,
    ) -> Result<bool> {
        let Backward { dq, dk, dv } = gradients;
        let matrices = vec![
            self.operand(Q, q)?,
            self.operand(K, k)?,
            self.operand(V, v)?,
            self.operand(O, o)?,
            self.operand(DO, d_o)?,
            self.operand(DQ, dq.as_view())?,
            self.operand(DK, dk.as_view())?,
            self.operand(DV, dv.as_view())?,
        ];
        let Some(call) = self.call::<T>(shape, matrices, true)? else { return Ok(false) };
        // The library reads log-sum-exps head by head only.
        let rows = shape.q_len * shape.batch * shape.heads;
        let by_head = self.alloc(rows * size_of::<f32>())?;
        let launch = self.kernel(&ATTENTION.of(T::DTYPE), "attention_lse_by_head")?;
        let launch = launch.grid(blocks(rows, THREADS)).block([THREADS, 1, 1]).scratch(&by_head).mat(lse);
        let size = |what, size| int("attention_backward", what, size);
        let launch = launch.value(size("batch", shape.batch)?).value(size("q_len", shape.q_len)?);
        // SAFETY: there is room for every row of every head.
        unsafe { launch.value(size("heads", shape.heads)?).launch()? };
        let sums = self.alloc(rows * shape.head_dim * size_of::<f32>())?;
        // SAFETY: the matrices are as the plan's problem says; the others have room for every row of every head.
        unsafe { call.execute(self, &[(Lse, by_head.address()), (Sums, sums.address())])? };
        Ok(true)
    }

    /// `None` where the library is missing or does not support a call like this.
    fn call<T: Float>(
        &self,
        s: &AttentionShape,
        matrices: Vec<Operand>,
        backward: bool,
    ) -> Result<Option<Call>> {
        let takes = |dim: usize| dim.is_multiple_of(8) && dim <= HEAD_DIM;
        let scale = s.scale as f32;
        let fits = T::DTYPE == DType::Bf16
            && takes(s.head_dim)
            && takes(s.v_head_dim)
            && s.q_len.min(s.kv_len) >= LEAST
            && s.batch.min(s.heads) > 0
            && scale.is_finite()
            && matrices.iter().all(|matrix| matrix.fits);
        let Some(mask) = mask(s).filter(|_| fits) else { return Ok(None) };
        let mut strides = [0; MATRICES];
        for matrix in &matrices {
            strides[matrix.id as usize] = matrix.stride as i64;
        }
        let problem = Problem {
            backward,
            batch: s.batch as i64,
            q_len: s.q_len as i64,
            kv_len: s.kv_len as i64,
            heads: s.heads as i64,
            kv_heads: s.kv_heads as i64,
            head_dim: s.head_dim as i64,
            v_head_dim: s.v_head_dim as i64,
            mask,
            strides,
        };
        self.bind()?;
        let dnn = match self.cudnn() {
            Ok(dnn) => dnn,
            Err(Error::Library { .. } | Error::Unsupported { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(plan) = dnn.plan(&problem)? else { return Ok(None) };
        let first_query = i32::try_from(s.first_query).unwrap_or(i32::MAX);
        let numbers = Numbers { scale, hidden: f32::NEG_INFINITY, one: 1.0, first_query };
        Ok(Some(Call { problem, plan, numbers, matrices }))
    }

    fn operand<E: Element>(&self, id: Id, view: View<'_, E, Self>) -> Result<Operand> {
        self.require(view.buf())?;
        let layout = view.layout();
        let address = view.buf().address() + (layout.offset * size_of::<E>()) as u64;
        let fits = Tiled::from(view).is_addressable();
        Ok(Operand { id, address, stride: layout.stride, fits })
    }
}

impl Call {
    /// # Safety
    ///
    /// The matrices are as the plan's problem says, and so is what else is on the device.
    unsafe fn execute(&self, device: &Cuda, scratch: &[(Id, u64)]) -> Result<()> {
        let numbers = &self.numbers;
        let by_value: [(Id, bool, *const c_void); 4] = [
            (Scale, true, (&raw const numbers.scale).cast()),
            (Hidden, self.problem.mask != Mask::Full, (&raw const numbers.hidden).cast()),
            (FirstQuery, self.problem.mask == Mask::Shifted, (&raw const numbers.first_query).cast()),
            (One, self.problem.backward, (&raw const numbers.one).cast()),
        ];
        let matrices = self.matrices.iter().map(|matrix| (matrix.id, matrix.address));
        let on_device = matrices.chain(scratch.iter().copied()).map(|(id, at)| (id, at as *mut c_void));
        let on_host = by_value.iter().filter(|(_, used, _)| *used).map(|&(id, _, at)| (id, at.cast_mut()));
        let operands: Vec<_> = on_device.chain(on_host).map(|(id, at)| (id as i64, Address(at))).collect();
        // SAFETY: the caller's; numbers are read before the call returns.
        unsafe { device.execute(&self.plan, &operands) }
    }
}

/// `None` where the library has none like it.
fn mask(s: &AttentionShape) -> Option<Mask> {
    let causal = match s.mask {
        AttentionMask::Full => return Some(Mask::Full),
        AttentionMask::Causal => true,
        AttentionMask::SlidingWindow { window } => window >= s.first_query.saturating_add(s.q_len),
    };
    causal.then_some(match s.first_query {
        first if first.saturating_add(1) >= s.kv_len => Mask::Full,
        0 => Mask::Causal,
        _ => Mask::Shifted,
    })
}

#[cfg(test)]
mod tests;
