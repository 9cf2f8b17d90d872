//! cuDNN's attention against `attention.cu` in `f64`, whose sums are plain arithmetic.

use half::bf16;

use super::*;
use crate::family::Attention;
use crate::{Tensor, cuda};

/// Numbers in [−2, 2), in `bf16` and the same in `f64`, in rows that end with 8 numbers more.
struct Numbers {
    narrow: Tensor<bf16, Cuda>,
    wide: Tensor<f64, Cuda>,
    cols: usize,
}

impl Numbers {
    fn new(gpu: &Cuda, rows: usize, cols: usize, seed: u64) -> Self {
        let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut draw = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bf16::from_f64((state >> 11) as f64 / (1u64 << 51) as f64 - 2.0)
        };
        let narrow: Vec<bf16> = (0..rows * (cols + 8)).map(|_| draw()).collect();
        let wide: Vec<f64> = narrow.iter().map(|x| x.to_f64()).collect();
        let narrow = Tensor::from_slice(gpu, rows, cols + 8, &narrow).unwrap();
        Numbers { narrow, wide: Tensor::from_slice(gpu, rows, cols + 8, &wide).unwrap(), cols }
    }

    fn narrow(&self) -> View<'_, bf16, Cuda> {
        self.narrow.view().columns(0..self.cols).unwrap()
    }

    fn narrow_mut(&mut self) -> ViewMut<'_, bf16, Cuda> {
        self.narrow.view_mut().unwrap().columns(0..self.cols).unwrap()
    }

    fn wide(&self) -> View<'_, f64, Cuda> {
        self.wide.view().columns(0..self.cols).unwrap()
    }

    fn wide_mut(&mut self) -> ViewMut<'_, f64, Cuda> {
        self.wide.view_mut().unwrap().columns(0..self.cols).unwrap()
    }

    /// Both, element by element, and nothing but the result written.
    fn compare(&self, gpu: &Cuda, what: &str) {
        let (got, want) = (self.narrow.to_f64(gpu).unwrap(), self.wide.to_f64(gpu).unwrap());
        let (mut off, mut all) = (0.0, 0.0);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            if i % (self.cols + 8) < self.cols {
                (off, all) = (off + (got - want).powi(2), all + want.powi(2));
            } else {
                assert_eq!(got, want, "{what}: written beside the result");
            }
        }
        assert!((off / all).sqrt() < 1.5e-2, "{what}: {} of {}", off.sqrt(), all.sqrt());
    }
}

fn shape(
    [batch, q_len, first_query, kv_len]: [usize; 4],
    [heads, kv_heads]: [usize; 2],
    [head_dim, v_head_dim]: [usize; 2],
    mask: AttentionMask,
) -> AttentionShape {
    let scale = 0.7 / (head_dim as f64).sqrt();
    AttentionShape { batch, q_len, kv_len, first_query, heads, kv_heads, head_dim, v_head_dim, scale, mask }
}

#[test]
fn calls_are_attention() {
    if !matches!(cuda::probe(), Ok(count) if count > 0) {
        assert!(std::env::var_os("MOE_REQUIRE_GPU").is_none(), "no CUDA device");
        eprintln!("skipped: no CUDA device");
        return;
    }
    let gpu = Cuda::poisoned(0).unwrap();
    let version = match gpu.cudnn_version() {
        Ok(version) => version,
        Err(why) => {
            assert!(std::env::var_os("MOE_REQUIRE_CUDNN").is_none(), "{why}");
            eprintln!("skipped: {why}");
            return;
        }
    };
    let version = version.as_str();
    for (lengths, heads, dims) in [
        ([2, 515, 0, 515], [4, 2], [128, 128]),
        ([2, 200, 130, 330], [4, 1], [64, 64]),
        ([1, 300, 0, 300], [2, 2], [192, 128]),
        ([3, 128, 0, 257], [2, 1], [96, 96]),
        ([1, 256, 0, 128], [6, 2], [128, 128]),
        ([1, 129, 500, 384], [2, 1], [256, 256]),
    ] {
        for mask in
            [AttentionMask::Full, AttentionMask::Causal, AttentionMask::SlidingWindow { window: 1 << 20 }]
        {
            let s = shape(lengths, heads, dims, mask);
            let (queries, keys) = (s.q_len * s.batch, s.kv_len * s.batch);
            let new = |rows, cols, seed| Numbers::new(&gpu, rows, cols, seed);
            let q = new(queries, s.heads * s.head_dim, 1);
            let k = new(keys, s.kv_heads * s.head_dim, 2);
            let v = new(keys, s.kv_heads * s.v_head_dim, 3);
            let d_o = new(queries, s.heads * s.v_head_dim, 4);
            let mut o = new(queries, s.heads * s.v_head_dim, 5);
            let mut dq = new(queries, s.heads * s.head_dim, 6);
            let mut dk = new(keys, s.kv_heads * s.head_dim, 7);
            let mut dv = new(keys, s.kv_heads * s.v_head_dim, 8);
            let mut lse = Tensor::<f32, Cuda>::uninit(&gpu, queries, s.heads + 3).unwrap();
            let mut wide_lse = Tensor::<f64, Cuda>::uninit(&gpu, queries, s.heads).unwrap();

            let mut bits = Vec::new();
            for _ in 0..2 {
                let lse = &mut lse.view_mut().unwrap().columns(1..1 + s.heads).unwrap();
                // SAFETY: the shapes fit together.
                let taken = unsafe {
                    gpu.cudnn_attention(&mut o.narrow_mut(), lse, q.narrow(), k.narrow(), v.narrow(), &s)
                };
                assert!(taken.unwrap(), "{s:?}");
                bits.push(o.narrow.to_f64(&gpu).unwrap());
            }
            assert_eq!(bits[0], bits[1], "{s:?}");
            gpu.attention(o.wide_mut(), wide_lse.view_mut().unwrap(), q.wide(), k.wide(), v.wide(), None, &s)
                .unwrap();
            o.compare(&gpu, &format!("o, {s:?}"));
            let (got, want) = (lse.to_f64(&gpu).unwrap(), wide_lse.to_f64(&gpu).unwrap());
            for (row, want) in want.chunks(s.heads).enumerate() {
                for (head, want) in want.iter().enumerate() {
                    let got = got[row * (s.heads + 3) + 1 + head];
                    assert!((got - want).abs() < 2e-3, "lse of {row}, {head}: {got}, not {want}, {s:?}");
                }
            }

            let lse = lse.view().columns(1..1 + s.heads).unwrap();
            let mut gradients = Backward { dq: dq.narrow_mut(), dk: dk.narrow_mut(), dv: dv.narrow_mut() };
            // SAFETY: as above.
            let taken = unsafe {
                let (q, k, v) = (q.narrow(), k.narrow(), v.narrow());
                gpu.cudnn_attention_backward(&mut gradients, d_o.narrow(), q, k, v, o.narrow(), lse, &s)
            };
            if !taken.unwrap() {
                assert!(!s.kv_len.is_multiple_of(128) && version < "9.16", "backward, {s:?}");
                continue;
            }
            gpu.attention_backward(
                dq.wide_mut(),
                dk.wide_mut(),
                dv.wide_mut(),
                d_o.wide(),
                q.wide(),
                k.wide(),
                v.wide(),
                o.wide(),
                wide_lse.view(),
                None,
                &s,
            )
            .unwrap();
            for (what, gradient) in [("dq", &dq), ("dk", &dk), ("dv", &dv)] {
                gradient.compare(&gpu, &format!("{what}, {s:?}"));
            }
        }
    }
}

#[test]
fn masks_are_those_of_graphs() {
    let of = |mask, [q_len, first_query, kv_len]: [usize; 3]| {
        super::mask(&shape([1, q_len, first_query, kv_len], [1, 1], [64, 64], mask))
    };
    let window = |window| AttentionMask::SlidingWindow { window };
    assert_eq!(of(AttentionMask::Full, [4, 2, 4]), Some(Mask::Full));
    assert_eq!(of(AttentionMask::Causal, [4, 0, 4]), Some(Mask::Causal));
    assert_eq!(of(AttentionMask::Causal, [4, 2, 6]), Some(Mask::Shifted));
    assert_eq!(of(AttentionMask::Causal, [4, 5, 6]), Some(Mask::Full), "the first query sees the last key");
    assert_eq!(of(AttentionMask::Causal, [1, usize::MAX, 6]), Some(Mask::Full));
    assert_eq!(of(window(6), [4, 2, 6]), Some(Mask::Shifted), "the last query sees the first key");
    assert_eq!(of(window(5), [4, 2, 6]), None);
}
