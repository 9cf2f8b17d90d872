//! Gradients of queries to which many blocks add in turn (`wait_for_turn` of `attention_flash_backward.cu`): more blocks than a GPU runs at
//! once, so that some begin when others have ended, and queries that see nine tiles of keys and more. Held to the `Cpu` in f64 on
//! the same numbers, and to the same bits each time.

use moe_kernels::family::{Attention, AttentionMask, AttentionShape};
use moe_kernels::{Cpu, Cuda, Float, Result, Tensor, bf16};

use super::gpu;

/// Rows whose error is judged together: as many as a step of the backward has queries, half as many as a tile has keys.
const ROWS: usize = 64;

fn shape(len: usize, head_dim: usize, mask: AttentionMask) -> AttentionShape {
    let scale = 0.7 / (head_dim as f64).sqrt();
    let (heads, kv_heads, v_head_dim) = (24, 8, head_dim);
    let (q_len, kv_len, first_query) = (len, len, 0);
    AttentionShape {
        batch: 3,
        q_len,
        kv_len,
        first_query,
        heads,
        kv_heads,
        head_dim,
        v_head_dim,
        scale,
        mask,
    }
}

/// Numbers in [−2, 2).
fn numbers(gpu: &Cuda, rows: usize, cols: usize, seed: u64) -> Result<Tensor<bf16, Cuda>> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut draw = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bf16::from_f64((state >> 11) as f64 / (1u64 << 51) as f64 - 2.0)
    };
    Tensor::from_slice(gpu, rows, cols, &(0..rows * cols).map(|_| draw()).collect::<Vec<_>>())
}

/// `q`, `k`, `v` and the gradient of the output.
type Operands<T, D> = [Tensor<T, D>; 4];

fn operands(gpu: &Cuda, s: &AttentionShape) -> Result<Operands<bf16, Cuda>> {
    let (queries, keys) = (s.q_len * s.batch, s.kv_len * s.batch);
    Ok([
        numbers(gpu, queries, s.heads * s.head_dim, 1)?,
        numbers(gpu, keys, s.kv_heads * s.head_dim, 2)?,
        numbers(gpu, keys, s.kv_heads * s.v_head_dim, 3)?,
        numbers(gpu, queries, s.heads * s.v_head_dim, 4)?,
    ])
}

/// `dq`, `dk` and `dv`, behind a forward.
fn gradients<T: Float, D: Attention<T>>(
    device: &D,
    [q, k, v, d_o]: &Operands<T, D>,
    s: &AttentionShape,
) -> Result<[Tensor<T, D>; 3]> {
    let like = |x: &Tensor<T, D>| Tensor::<T, D>::uninit(device, x.layout().rows, x.layout().cols);
    let (mut o, mut dq, mut dk, mut dv) = (like(d_o)?, like(q)?, like(k)?, like(v)?);
    let mut lse = Tensor::<T::Acc, D>::uninit(device, s.q_len * s.batch, s.heads)?;
    device.attention(o.view_mut()?, lse.view_mut()?, q.view(), k.view(), v.view(), None, s)?;
    device.attention_backward(
        dq.view_mut()?,
        dk.view_mut()?,
        dv.view_mut()?,
        d_o.view(),
        q.view(),
        k.view(),
        v.view(),
        o.view(),
        lse.view(),
        None,
        s,
    )?;
    Ok([dq, dk, dv])
}

/// Panics where the error of some rows of a head is more than bf16 explains.
fn compare(what: &str, got: &[f64], want: &[f64], s: &AttentionShape, cols: usize) {
    let (dim, rows) = (s.head_dim, want.len() / cols / s.batch);
    assert_eq!(got.len(), want.len());
    for from in (0..rows).step_by(ROWS) {
        for (sequence, head) in (0..s.batch).flat_map(|b| (0..cols / dim).map(move |head| (b, head))) {
            let (mut off, mut all) = (0.0, 0.0);
            for row in from..rows.min(from + ROWS) {
                let start = (row * s.batch + sequence) * cols + head * dim;
                for (got, want) in got[start..start + dim].iter().zip(&want[start..start + dim]) {
                    (off, all) = (off + (got - want).powi(2), all + want.powi(2));
                }
            }
            let error = (off / all).sqrt();
            assert!(
                error < 1.5e-2,
                "{what} of sequence {sequence}, head {head}, rows from {from}: off by {error} of its norm, {s:?}"
            );
        }
    }
}

/// Compares gradients with the host's in f64.
fn hold(
    gpu: &Cuda,
    operands: &Operands<bf16, Cuda>,
    gradients: &[Tensor<bf16, Cuda>; 3],
    s: &AttentionShape,
) -> Result<()> {
    let cpu = Cpu::default();
    let exact = |x: &Tensor<bf16, Cuda>| {
        Tensor::<f64, Cpu>::from_slice(&cpu, x.layout().rows, x.layout().cols, &x.to_f64(gpu)?)
    };
    let [q, k, v, d_o] = operands;
    let want = self::gradients(&cpu, &[exact(q)?, exact(k)?, exact(v)?, exact(d_o)?], s)?;
    for ((what, got), want) in ["dq", "dk", "dv"].into_iter().zip(gradients).zip(&want) {
        compare(what, &got.to_f64(gpu)?, &want.to_f64(&cpu)?, s, got.layout().cols);
    }
    Ok(())
}

fn bits(gpu: &Cuda, gradients: &[Tensor<bf16, Cuda>; 3]) -> Result<Vec<u8>> {
    let mut bits = Vec::new();
    for gradient in gradients {
        bits.extend_from_slice(bytemuck::cast_slice(&gradient.to_vec(gpu)?));
    }
    Ok(bits)
}

fn in_order(test: &str, head_dim: usize) -> Result<()> {
    let Some(gpu) = gpu(test) else { return Ok(()) };
    for (len, mask) in [
        (1100, AttentionMask::Causal),
        (1300, AttentionMask::Full),
        (2000, AttentionMask::SlidingWindow { window: 700 }),
    ] {
        let s = shape(len, head_dim, mask);
        let operands = operands(&gpu, &s)?;
        let first = gradients(&gpu, &operands, &s)?;
        hold(&gpu, &operands, &first, &s)?;
        let first = bits(&gpu, &first)?;
        for run in 1..20 {
            let again = bits(&gpu, &gradients(&gpu, &operands, &s)?)?;
            assert!(again == first, "run {run} has other bits, {s:?}");
        }
    }
    Ok(())
}

#[test]
fn heads_of_64_are_added_in_order() -> Result<()> {
    in_order("heads_of_64_are_added_in_order", 64)
}

#[test]
fn heads_of_128_are_added_in_order() -> Result<()> {
    in_order("heads_of_128_are_added_in_order", 128)
}

/// By cuDNN of any version, where it is there: 128 divides the number of keys.
#[test]
fn gradients_of_256_keys_in_any_order() -> Result<()> {
    let Some(gpu) = gpu("gradients_of_256_keys_in_any_order") else { return Ok(()) };
    gpu.set_deterministic(false);
    for head_dim in [64, 128] {
        for mask in [AttentionMask::Full, AttentionMask::Causal] {
            let s = shape(256, head_dim, mask);
            let operands = operands(&gpu, &s)?;
            hold(&gpu, &operands, &gradients(&gpu, &operands, &s)?, &s)?;
        }
    }
    Ok(())
}
