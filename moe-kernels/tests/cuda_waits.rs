//! What counts as a wait. Alone in its process: what other tests free waits for the whole GPU, and uploads with it.
//!
//! Where there is no GPU, the test says that it was skipped; with `MOE_REQUIRE_GPU` in the environment it fails.

mod gpu;

use gpu::gpu;
use moe_kernels::family::{Gemm, Op};
use moe_kernels::{Cuda, Device, Result, Tensor, bf16};

/// Uploads that are staged at once, and bytes of one, as `Cuda::waits` has them.
const UPLOADS: usize = 32;
const BYTES: usize = 512 << 10;

#[test]
fn an_upload_without_room_is_a_wait() -> Result<()> {
    let Some(gpu) = gpu("an_upload_without_room_is_a_wait") else { return Ok(()) };
    let size = 8192;
    let [a, b] = [(); 2].map(|()| Tensor::<bf16, Cuda>::zeros(&gpu, size, size));
    let (a, b, mut y) = (a?, b?, Tensor::<bf16, Cuda>::uninit(&gpu, size, size)?);
    let mut multiply = || gpu.gemm(y.view_mut()?, a.view(), Op::N, b.view(), Op::N);
    multiply()?;
    gpu.synchronize()?;

    let (mut buf, long) = (gpu.alloc(2 * BYTES)?, vec![7; BYTES + 1]);
    let before = gpu.waits();
    // Work of half a second on an H200, of more elsewhere, behind which uploads stay on their way.
    (0..400).try_for_each(|_| multiply())?;
    (2..UPLOADS).try_for_each(|_| gpu.upload(&mut buf, 5, &[1, 2, 3]))?;
    gpu.upload(&mut buf, 0, &long)?;
    assert_eq!(gpu.waits() - before, 0, "there is room for 30 small ones and a long one in two parts");
    gpu.upload(&mut buf, BYTES, &[9; 2])?;
    assert_eq!(gpu.waits() - before, 1, "there is no room");

    let mut got = vec![0; BYTES + 2];
    gpu.download(&buf, 0, &mut got)?;
    assert!(got[..BYTES].iter().all(|&x| x == 7) && got[BYTES..] == [9, 9]);
    let before = gpu.waits();
    (0..UPLOADS).try_for_each(|_| gpu.upload(&mut buf, 0, &long[..8]))?;
    assert_eq!(gpu.waits() - before, 0, "nothing was on its way");
    Ok(())
}
