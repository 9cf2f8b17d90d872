//! Products of row groups with a gated activation in bf16, which on Hopper are one kernel, against the product and the activation one
//! after the other: the same bits.

use moe_kernels::family::{Activation, Gate, GateFunction, GateGradients, GroupedGemm, GroupedGlu, Op};
use moe_kernels::random::uniform_pair;
use moe_kernels::{Cuda, Float, Tensor, bf16};

fn random<T: Float>(gpu: &Cuda, stream: u64, rows: usize, cols: usize, by: f64) -> Tensor<T, Cuda> {
    let draws = (0..(rows * cols).div_ceil(2) as u64).flat_map(|pair| uniform_pair(3, stream, pair));
    let numbers: Vec<T> = draws.take(rows * cols).map(|u| T::from_f64(by * (2.0 * u - 1.0))).collect();
    Tensor::from_slice(gpu, rows, cols, &numbers).unwrap()
}

/// The bits of the first `rows` rows.
fn bits(gpu: &Cuda, x: &Tensor<bf16, Cuda>, rows: usize) -> Vec<u16> {
    x.rows(0..rows).unwrap().to_vec(gpu).unwrap().iter().map(|x| x.to_bits()).collect()
}

#[test]
fn one_kernel_gives_the_bits_of_two() {
    let Some(gpu) = super::gpu("one_kernel_gives_the_bits_of_two") else { return };
    let many: Vec<usize> = (0..70).map(|i| 37 * (i % 5)).collect();
    let cases: [(&[usize], usize, usize, usize); 7] = [
        // Columns that are whole tiles, for which the backward is one kernel too, or beside which its last tile counts little.
        (&[3, 0, 5, 1], 2, 16, 192),
        (&[0, 700, 0, 3, 129], 9, 392, 200),
        (&[128, 64, 1, 0, 65, 63, 127], 5, 1000, 8264),
        (&[2048, 300, 0, 1500], 12, 2048, 768),
        (&[0, 0, 0, 4000, 0, 0], 0, 768, 576),
        (&many, 1, 392, 8328),
        (&[70, 200], 0, 8200, 328),
    ];
    for (i, (counts, tail, hidden, inner)) in cases.into_iter().enumerate() {
        let mut offsets = vec![0];
        for &count in counts {
            offsets.push(offsets[offsets.len() - 1] + count as i32);
        }
        let groups = counts.len();
        let end = offsets[groups] as usize;
        let n = end + tail;
        let offsets = Tensor::<i32, Cuda>::from_slice(&gpu, 1, groups + 1, &offsets).unwrap();
        let offsets = offsets.view();
        let function = [GateFunction::Silu, GateFunction::GeluTanh][i % 2];
        let what = format!("{counts:?}, {tail} rows more, {hidden} → {inner}, {function:?}");
        let p = random::<f32>(&gpu, 0, 1, n, 1.0);
        let gate = Gate { function, p: (i != 2).then(|| p.view()) };
        let (x, dy) = (random::<bf16>(&gpu, 1, n, hidden, 1.0), random::<bf16>(&gpu, 2, n, hidden, 1.0));
        let by = 3.0 * (hidden as f64).powf(-0.5);
        let w_in = random::<bf16>(&gpu, 3, groups * 2 * inner, hidden, by);
        let w_out = random::<bf16>(&gpu, 4, groups * hidden, inner, by);
        let uninit = |cols| Tensor::<bf16, Cuda>::uninit(&gpu, n, cols).unwrap();

        let (mut gate_up, mut y) = (uninit(2 * inner), uninit(inner));
        let (out, product) = (y.view_mut().unwrap(), gate_up.view_mut().unwrap());
        gpu.grouped_gemm_glu(product, out, x.view(), w_in.view(), &gate, offsets).unwrap();
        let mut want = uninit(inner);
        gpu.glu(want.view_mut().unwrap(), gate_up.view(), gate.p, function).unwrap();
        assert_eq!(bits(&gpu, &y, end), bits(&gpu, &want, end), "activated {what}");
        let mut want = uninit(2 * inner);
        gpu.grouped_gemm(want.view_mut().unwrap(), x.view(), w_in.view(), Op::T, offsets).unwrap();
        assert_eq!(bits(&gpu, &gate_up, end), bits(&gpu, &want, end), "gate and up {what}");

        let backward = || {
            let (mut d, mut dp) = (uninit(2 * inner), Tensor::<f32, Cuda>::uninit(&gpu, 1, n).unwrap());
            let to = GateGradients { gate_up: d.view_mut().unwrap(), p: Some(dp.view_mut().unwrap()) };
            gpu.grouped_gemm_glu_backward(to, dy.view(), w_out.view(), gate_up.view(), &gate, offsets)
                .unwrap();
            (d, dp.to_vec(&gpu).unwrap())
        };
        let (d_gate_up, dp) = backward();
        for _ in 0..4 {
            let again = backward().1;
            let same = dp.iter().zip(&again).take(end).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "gradients of the probabilities have other bits the second time, {what}");
        }
        let mut d = uninit(inner);
        gpu.grouped_gemm(d.view_mut().unwrap(), dy.view(), w_out.view(), Op::N, offsets).unwrap();
        let (mut want, mut want_dp) = (uninit(2 * inner), Tensor::<f32, Cuda>::uninit(&gpu, 1, n).unwrap());
        let out = Some(want_dp.view_mut().unwrap());
        gpu.glu_backward(want.view_mut().unwrap(), out, d.view(), gate_up.view(), gate.p, function).unwrap();
        assert_eq!(bits(&gpu, &d_gate_up, end), bits(&gpu, &want, end), "gradients {what}");
        // Sums of the same numbers in another order.
        let want_dp = want_dp.to_vec(&gpu).unwrap();
        let most = want_dp[..end].iter().fold(0.0f32, |most, x| most.max(x.abs()));
        for (i, (got, want)) in dp.iter().zip(&want_dp).take(end).enumerate() {
            let near = (got - want).abs() <= 1e-5 * most;
            assert!(near, "gradient of the probability of row {i}, {what}: {got}, not {want}");
        }
    }
}
