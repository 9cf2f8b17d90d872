//! Two handles of one GPU have a stream each: what lies with one is refused by the other, whose work would not wait for it.

use moe_kernels::family::{Attention, AttentionMask, AttentionShape};
use moe_kernels::{Cuda, Device, Error, Result, Tensor, bf16};

use super::gpu;

#[test]
fn attention_refuses_what_lies_with_another_handle() -> Result<()> {
    let Some(gpu) = gpu("attention_refuses_what_lies_with_another_handle") else { return Ok(()) };
    let other = Cuda::new(0)?;
    const TOKENS: usize = 4;
    // On Hopper, both ways that the backward has on the tensor cores, and the kernels of any head.
    for (head_dim, v_head_dim) in [(128, 128), (192, 128), (24, 24)] {
        let s = AttentionShape {
            batch: 1,
            q_len: TOKENS,
            kv_len: TOKENS,
            first_query: 0,
            heads: 1,
            kv_heads: 1,
            head_dim,
            v_head_dim,
            scale: 0.1,
            mask: AttentionMask::Causal,
        };
        // With first keys, none of it is cuDNN's.
        let first_keys = Tensor::<i32, Cuda>::zeros(&gpu, 1, TOKENS)?;
        let first_keys = Some(first_keys.view());
        for abroad in [None, Some("q"), Some("k"), Some("v"), Some("d_o"), Some("o")] {
            let matrix = |name, cols| {
                Tensor::<bf16, Cuda>::zeros(if abroad == Some(name) { &other } else { &gpu }, TOKENS, cols)
            };
            let (q, k, v) = (matrix("q", head_dim)?, matrix("k", head_dim)?, matrix("v", v_head_dim)?);
            let (d_o, o) = (matrix("d_o", v_head_dim)?, matrix("o", v_head_dim)?);
            let mut out = Tensor::<bf16, Cuda>::zeros(&gpu, TOKENS, v_head_dim)?;
            let mut lse = Tensor::<f32, Cuda>::zeros(&gpu, TOKENS, 1)?;
            let is_right = |what: &str, result: Result<()>, refused: bool| {
                let right =
                    if refused { matches!(result, Err(Error::Argument { .. })) } else { result.is_ok() };
                assert!(right, "{what} with heads of {head_dim}, {abroad:?} with another handle: {result:?}");
            };
            let result =
                gpu.attention(out.view_mut()?, lse.view_mut()?, q.view(), k.view(), v.view(), first_keys, &s);
            is_right("forward", result, matches!(abroad, Some("q" | "k" | "v")));

            let mut dq = Tensor::<bf16, Cuda>::zeros(&gpu, TOKENS, head_dim)?;
            let mut dk = Tensor::<bf16, Cuda>::zeros(&gpu, TOKENS, head_dim)?;
            let mut dv = Tensor::<bf16, Cuda>::zeros(&gpu, TOKENS, v_head_dim)?;
            let result = gpu.attention_backward(
                dq.view_mut()?,
                dk.view_mut()?,
                dv.view_mut()?,
                d_o.view(),
                q.view(),
                k.view(),
                v.view(),
                o.view(),
                lse.view(),
                first_keys,
                &s,
            );
            is_right("backward", result, abroad.is_some());
        }
    }
    gpu.synchronize()
}
