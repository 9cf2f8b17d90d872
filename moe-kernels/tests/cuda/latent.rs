//! The backward of attention with latent heads (192, values of 128), whose kernel is unlike that of other heads: beside plain arithmetic in
//! `f64`, and the same bits each time.

use moe_kernels::family::{Attention, AttentionMask, AttentionShape};
use moe_kernels::random::uniform_pair;
use moe_kernels::{Cuda, Element, Float, Result, Tensor, bf16};

use super::gpu;

const HEAD_DIM: usize = 192;
const V_HEAD_DIM: usize = 128;

fn shape(
    [batch, q_len, first_query, kv_len]: [usize; 4],
    [heads, kv_heads]: [usize; 2],
    mask: AttentionMask,
) -> AttentionShape {
    let (head_dim, v_head_dim, scale) = (HEAD_DIM, V_HEAD_DIM, 1.5 / (HEAD_DIM as f64).sqrt());
    AttentionShape { batch, q_len, first_query, kv_len, heads, kv_heads, head_dim, v_head_dim, scale, mask }
}

/// Elements that `bf16` has, in [−1, 1).
fn random(seed: u64, n: usize) -> Vec<f64> {
    let one = |i| bf16::from_f64(2.0 * uniform_pair(seed, 0, i)[0] - 1.0).to_f64();
    (0..n as u64).map(one).collect()
}

/// First keys of documents of 1, 150, 3, 299, 64 and again so many tokens.
fn documents(s: &AttentionShape) -> Vec<i32> {
    let mut firsts = Vec::new();
    let (mut from, mut lengths) = (0, [1, 150, 3, 299, 64].into_iter().cycle());
    while firsts.len() < s.first_query + s.q_len {
        let length = lengths.next().unwrap_or(1);
        firsts.extend(std::iter::repeat_n(from as i32, length));
        from += length;
    }
    let queries = &firsts[s.first_query..s.first_query + s.q_len];
    queries.iter().flat_map(|&first| std::iter::repeat_n(first, s.batch)).collect()
}

/// The operands of a call, and what a backward makes of them.
struct Call<'a, T: Float> {
    gpu: &'a Cuda,
    s: &'a AttentionShape,
    /// q, k, v, the gradient of o, o.
    operands: [Tensor<T, Cuda>; 5],
    lse: Tensor<T::Acc, Cuda>,
    first_keys: Option<Tensor<i32, Cuda>>,
}

impl<'a, T: Float> Call<'a, T> {
    fn new(gpu: &'a Cuda, s: &'a AttentionShape, first_keys: Option<&[i32]>) -> Result<Self> {
        let (n, m) = (s.q_len * s.batch, s.kv_len * s.batch);
        let matrix = |seed, rows, cols| Tensor::from_f64(gpu, rows, cols, &random(seed, rows * cols));
        let q = matrix(1, n, s.heads * HEAD_DIM)?;
        let k = matrix(2, m, s.kv_heads * HEAD_DIM)?;
        let v = matrix(3, m, s.kv_heads * V_HEAD_DIM)?;
        let d_o = matrix(4, n, s.heads * V_HEAD_DIM)?;
        let first_keys = first_keys.map(|first| Tensor::from_slice(gpu, 1, n, first)).transpose()?;
        let mut o = Tensor::uninit(gpu, n, s.heads * V_HEAD_DIM)?;
        let mut lse = Tensor::uninit(gpu, n, s.heads)?;
        let first = first_keys.as_ref().map(Tensor::view);
        gpu.attention(o.view_mut()?, lse.view_mut()?, q.view(), k.view(), v.view(), first, s)?;
        Ok(Call { gpu, s, operands: [q, k, v, d_o, o], lse, first_keys })
    }

    /// The gradients of q, k and v.
    fn backward(&self) -> Result<[Tensor<T, Cuda>; 3]> {
        let Call { gpu, s, operands: [q, k, v, d_o, o], lse, first_keys } = self;
        let like = |x: &Tensor<T, Cuda>| {
            let [rows, cols] = x.shape();
            Tensor::<T, Cuda>::uninit(*gpu, rows, cols)
        };
        let (mut dq, mut dk, mut dv) = (like(q)?, like(k)?, like(v)?);
        gpu.attention_backward(
            dq.view_mut()?,
            dk.view_mut()?,
            dv.view_mut()?,
            d_o.view(),
            q.view(),
            k.view(),
            v.view(),
            o.view(),
            lse.view(),
            first_keys.as_ref().map(Tensor::view),
            s,
        )?;
        Ok([dq, dk, dv])
    }
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn latent_heads_are_near_f64() -> Result<()> {
    let Some(gpu) = gpu("latent_heads_are_near_f64") else { return Ok(()) };
    let lengths = [
        ([1, 1, 0, 1], [1, 1]),
        ([2, 64, 0, 128], [2, 2]),
        ([2, 63, 0, 127], [2, 1]),
        ([1, 65, 64, 129], [2, 2]),
        ([1, 1, 256, 257], [4, 2]),
        ([1, 257, 0, 65], [2, 1]),
        ([2, 513, 0, 513], [4, 1]),
        ([1, 385, 130, 515], [3, 3]),
    ];
    let windows = [1, 2, 100, 130, 300].map(|window| AttentionMask::SlidingWindow { window });
    for (lengths, heads) in lengths {
        for mask in [AttentionMask::Full, AttentionMask::Causal].into_iter().chain(windows) {
            let s = shape(lengths, heads, mask);
            let documents = documents(&s);
            for first in [None, Some(&documents[..])] {
                let ours = Call::<bf16>::new(&gpu, &s, first)?.backward()?;
                let wanted = Call::<f64>::new(&gpu, &s, first)?.backward()?;
                for (name, (got, want)) in ["dq", "dk", "dv"].into_iter().zip(ours.iter().zip(&wanted)) {
                    let (got, want) = (got.to_f64(&gpu)?, want.to_f64(&gpu)?);
                    let off = norm(got.iter().zip(&want).map(|(got, want)| got - want));
                    // Gradients that cancel are as good as the numbers they are made of, which are about 1.
                    let least = 0.02 * (want.len() as f64).sqrt();
                    let most = 1.5e-2 * norm(want.iter().copied()).max(least);
                    assert!(off <= most, "{name} is off by {off}, not {most}: {s:?}, {}", first.is_some());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn latent_heads_give_the_same_bits() -> Result<()> {
    let Some(gpu) = gpu("latent_heads_give_the_same_bits") else { return Ok(()) };
    // More tiles than run at once, and many that add to the same queries.
    for (lengths, heads, mask) in [
        ([2, 2111, 0, 2111], [8, 8], AttentionMask::Causal),
        ([1, 2111, 0, 2111], [8, 2], AttentionMask::Full),
        ([1, 1500, 600, 2100], [8, 4], AttentionMask::SlidingWindow { window: 700 }),
    ] {
        let s = shape(lengths, heads, mask);
        let documents = documents(&s);
        for first in [None, Some(&documents[..])] {
            let call = Call::<bf16>::new(&gpu, &s, first)?;
            let bytes = |tensors: [Tensor<bf16, Cuda>; 3]| -> Result<Vec<Vec<u8>>> {
                tensors.iter().map(|x| Ok(bits(&x.to_vec(&gpu)?))).collect()
            };
            let wanted = bytes(call.backward()?)?;
            for run in 1..20 {
                assert!(bytes(call.backward()?)? == wanted, "run {run} differs: {s:?}, {}", first.is_some());
            }
        }
    }
    Ok(())
}

fn bits<E: Element>(elements: &[E]) -> Vec<u8> {
    bytemuck::cast_slice(elements).to_vec()
}
