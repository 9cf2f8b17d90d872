//! Attention: by cuDNN, in tiles of any kind, or on Hopper's tensor cores.
//!
//! cuDNN runs the forward where it is there and takes the call, and the backward if that need not give the same bits twice. Of what is left,
//! `attention_flash.rs` runs for `bf16` on compute capability 9.0 with heads of 64 or 128, keys and values alike, or of 192 with values of
//! 128 (latent attention), a positive scale, and all matrices but the log-sum-exp at multiples of 16 bytes, their rows too. Everything else
//! runs `attention.cu`, whose sums are plain arithmetic of the accumulation type. Both give the same bits twice.

use super::Cuda;
use super::attention_flash::{Backward, Flash};
use super::source::ATTENTION;
use crate::family::{Attention, AttentionMask, AttentionShape};
use crate::{DType, Device, Float, Result, View, ViewMut, check};

/// Threads of a block of `attention.cu`.
const THREADS: usize = 256;

/// `TILE` and `SPAN` of `attention.cu`.
fn tile<T: Float>() -> (usize, usize) {
    if T::DTYPE == DType::F64 { (32, 64) } else { (64, 128) }
}

/// A size that kernels take as an `int`.
pub(super) fn int(kernel: &'static str, what: &'static str, size: usize) -> Result<i32> {
    check::argument(kernel, size <= i32::MAX as usize, || format!("{what} {size} is not below 2^31"))?;
    Ok(size as i32)
}

/// Sizes of a call as kernels take them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: i32,
    pub(super) q_len: i32,
    pub(super) kv_len: i32,
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) head_dim: i32,
    pub(super) v_head_dim: i32,
    pub(super) first_query: i64,
    /// Keys that a query sees up to its own; 0: all keys.
    pub(super) window: i64,
}

impl Sizes {
    fn new(kernel: &'static str, s: &AttentionShape) -> Result<Self> {
        /// More keys than there are, few enough that sums of two do not overflow.
        const ALL: usize = 1 << 60;
        let window = match s.mask {
            AttentionMask::Full => 0,
            AttentionMask::Causal => ALL,
            AttentionMask::SlidingWindow { window } => window.min(ALL),
        };
        Ok(Sizes {
            batch: int(kernel, "batch", s.batch)?,
            q_len: int(kernel, "q_len", s.q_len)?,
            kv_len: int(kernel, "kv_len", s.kv_len)?,
            heads: int(kernel, "heads", s.heads)?,
            kv_heads: int(kernel, "kv_heads", s.kv_heads)?,
            head_dim: int(kernel, "head_dim", s.head_dim)?,
            v_head_dim: int(kernel, "v_head_dim", s.v_head_dim)?,
            first_query: s.first_query.min(ALL) as i64,
            window: window as i64,
        })
    }
}

impl<T: Float> Attention<T> for Cuda {
    fn attention(
        &self,
        mut o: ViewMut<'_, T, Self>,
        mut lse: ViewMut<'_, T::Acc, Self>,
        q: View<'_, T, Self>,
        k: View<'_, T, Self>,
        v: View<'_, T, Self>,
        first_keys: Option<View<'_, i32, Self>>,
        shape: &AttentionShape,
    ) -> Result<()> {
        const KERNEL: &str = "attention";
        let [queries, keys] = [[("q", q.shape())], [("k", k.shape())]];
        let [outputs, values] = [[("o", o.shape())], [("v", v.shape())]];
        check::attention(KERNEL, shape, &queries, &keys, &outputs, &values, lse.shape())?;
        check::first_keys(KERNEL, shape, first_keys.map(|f| f.shape()))?;
        let sizes = Sizes::new(KERNEL, shape)?;
        // SAFETY: the shapes fit together.
        if first_keys.is_none() && unsafe { self.cudnn_attention(&mut o, &mut lse, q, k, v, shape)? } {
            return Ok(());
        }
        if let Some(flash) = Flash::of(self, shape, &[o.as_view(), q, k, v]) {
            return flash.forward(&mut o, &mut lse, q, k, v, first_keys, &sizes);
        }
        let (tile, span) = tile::<T>();
        let blocks = shape.q_len.div_ceil(tile) * shape.v_head_dim.div_ceil(span) * shape.heads * shape.batch;
        let launch =
            self.kernel(&ATTENTION.of(T::DTYPE), KERNEL)?.grid([blocks, 1, 1]).block([THREADS, 1, 1]);
        let launch = launch.mat_mut(&mut o).mat_mut(&mut lse).mat(q).mat(k).mat(v);
        // SAFETY: the shapes fit together, and the kernel stays inside them.
        unsafe { launch.vector_or_null(first_keys).attention_sizes(&sizes, shape.scale).launch() }
    }

    fn attention_merge(
        &self,
        mut o: ViewMut<'_, T::Acc, Self>,
        mut lse: ViewMut<'_, T::Acc, Self>,
        o_part: View<'_, T, Self>,
        lse_part: View<'_, T::Acc, Self>,
        v_head_dim: usize,
    ) -> Result<()> {
        const KERNEL: &str = "attention_merge";
        let [n, heads] = check::attention_merge(KERNEL, &o, &lse, o_part, lse_part, v_head_dim)?;
        let (heads, v_head_dim) = (int(KERNEL, "heads", heads)?, int(KERNEL, "v_head_dim", v_head_dim)?);
        let launch = self.kernel(&ATTENTION.of(T::DTYPE), KERNEL)?;
        let launch = launch.grid([(n * heads as usize).div_ceil(THREADS / 32), 1, 1]).block([THREADS, 1, 1]);
        let launch = launch.mat_mut(&mut o).mat_mut(&mut lse).mat(o_part).mat(lse_part);
        // SAFETY: the shapes fit together; a warp owns a row of a head.
        unsafe { launch.size(n).value(heads).value(v_head_dim).launch() }
    }

    fn attention_backward(
        &self,
        mut dq: ViewMut<'_, T, Self>,
        mut dk: ViewMut<'_, T, Self>,
        mut dv: ViewMut<'_, T, Self>,
        d_o: View<'_, T, Self>,
        q: View<'_, T, Self>,
        k: View<'_, T, Self>,
        v: View<'_, T, Self>,
        o: View<'_, T, Self>,
        lse: View<'_, T::Acc, Self>,
        first_keys: Option<View<'_, i32, Self>>,
        shape: &AttentionShape,
    ) -> Result<()> {
        const KERNEL: &str = "attention_backward";
        let queries = [("dq", dq.shape()), ("q", q.shape())];
        let keys = [("dk", dk.shape()), ("k", k.shape())];
        let outputs = [("d_o", d_o.shape()), ("o", o.shape())];
        let values = [("dv", dv.shape()), ("v", v.shape())];
        check::attention(KERNEL, shape, &queries, &keys, &outputs, &values, lse.shape())?;
        check::first_keys(KERNEL, shape, first_keys.map(|f| f.shape()))?;
        let sizes = Sizes::new(KERNEL, shape)?;
        if first_keys.is_none() && !self.is_deterministic() {
            let mut gradients = Backward { dq: dq.reborrow(), dk: dk.reborrow(), dv: dv.reborrow() };
            // SAFETY: the shapes fit together.
            if unsafe { self.cudnn_attention_backward(&mut gradients, d_o, q, k, v, o, lse, shape)? } {
                return Ok(());
            }
        }
        let matrices = [dq.as_view(), dk.as_view(), dv.as_view(), d_o, q, k, v, o];
        if let Some(flash) = Flash::of(self, shape, &matrices) {
            let gradients = Backward { dq: dq.reborrow(), dk: dk.reborrow(), dv: dv.reborrow() };
            return flash.backward(gradients, d_o, q, k, v, o, lse, first_keys, &sizes);
        }
        let AttentionShape { batch, q_len, kv_len, heads, kv_heads, head_dim, v_head_dim, scale, .. } =
            *shape;
        let (variant, (tile, span)) = (ATTENTION.of(T::DTYPE), tile::<T>());
        let rows = q_len * batch;
        let delta = self.alloc(rows * heads * size_of::<T::Acc>())?;

        let launch = self.kernel(&variant, "attention_delta")?.block([THREADS, 1, 1]);
        let launch =
            launch.grid([(rows * heads).div_ceil(THREADS / 32), 1, 1]).scratch(&delta).mat(d_o).mat(o);
        // SAFETY: `delta` has an entry for every row and head.
        unsafe { launch.size(rows).value(sizes.heads).value(sizes.v_head_dim).launch()? };

        let blocks = q_len.div_ceil(tile) * head_dim.div_ceil(span) * heads * batch;
        let launch =
            self.kernel(&variant, "attention_backward_q")?.grid([blocks, 1, 1]).block([THREADS, 1, 1]);
        let launch = launch.mat_mut(&mut dq).mat(d_o).mat(q).mat(k).mat(v).mat(lse).scratch(&delta);
        // SAFETY: the shapes fit together, and the kernel stays inside them.
        unsafe { launch.vector_or_null(first_keys).attention_sizes(&sizes, scale).launch()? };

        let blocks = kv_len.div_ceil(tile) * head_dim.max(v_head_dim).div_ceil(span) * kv_heads * batch;
        let launch =
            self.kernel(&variant, "attention_backward_kv")?.grid([blocks, 1, 1]).block([THREADS, 1, 1]);
        let launch = launch.mat_mut(&mut dk).mat_mut(&mut dv).mat(d_o).mat(q).mat(k).mat(v).mat(lse);
        let launch = launch.scratch(&delta).vector_or_null(first_keys);
        // SAFETY: as above.
        unsafe { launch.attention_sizes(&sizes, scale).launch() }
    }
}

impl super::launch::Launch<'_> {
    /// The sizes that kernels of `attention.cu` end with.
    fn attention_sizes(self, s: &Sizes, scale: f64) -> Self {
        let launch = self.value(s.batch).value(s.q_len).value(s.kv_len).value(s.first_query).value(s.window);
        launch.value(s.heads).value(s.kv_heads).value(s.head_dim).value(s.v_head_dim).value(scale)
    }
}
