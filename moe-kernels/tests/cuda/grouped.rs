//! Products of row groups in bf16, which on Hopper have a kernel of their own, against those of the same numbers in f32, which the suite
//! holds to f64.

use moe_kernels::family::{GroupedGemm, Op};
use moe_kernels::random::uniform_pair;
use moe_kernels::{Cuda, Tensor, bf16};

/// The same random numbers in both types.
struct Twins {
    bf16: Tensor<bf16, Cuda>,
    f32: Tensor<f32, Cuda>,
}

impl Twins {
    fn new(gpu: &Cuda, stream: u64, rows: usize, cols: usize) -> Self {
        let draws = (0..(rows * cols).div_ceil(2) as u64).flat_map(|pair| uniform_pair(1, stream, pair));
        let narrow: Vec<bf16> = draws.take(rows * cols).map(|u| bf16::from_f64(4.0 * u - 2.0)).collect();
        let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
        Twins {
            bf16: Tensor::from_slice(gpu, rows, cols, &narrow).unwrap(),
            f32: Tensor::from_slice(gpu, rows, cols, &wide).unwrap(),
        }
    }
}

/// Elements are as far apart as one rounding to bf16 and sums of `depth` products of numbers below 2 in f32 allow; those of
/// rows from `end` on were not written and are NaN, as fresh memory is here.
fn assert_near(what: &str, got: &[f64], want: &[f64], cols: usize, end: usize, depth: usize, rounding: f64) {
    let sums = 4e-5 * (depth as f64).sqrt();
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let near =
            if i / cols < end { (got - want).abs() <= rounding * want.abs() + sums } else { got.is_nan() };
        assert!(near, "{what}: row {}, column {}: {got}, not {want}", i / cols, i % cols);
    }
}

#[test]
fn groups_in_bf16_are_those_in_f32() {
    let Some(gpu) = super::gpu("groups_in_bf16_are_those_in_f32") else { return };
    let many: Vec<usize> = (0..70).map(|i| 37 * (i % 5)).collect();
    let cases: [(&[usize], usize, usize, usize); 7] = [
        (&[3, 0, 5, 1], 2, 8, 16),
        (&[0, 700, 0, 3, 129], 9, 512, 392),
        (&[128, 64, 1, 0, 65, 63, 127], 5, 264, 1000),
        (&[2048, 300, 0, 1500], 12, 1536, 2048),
        (&[0, 0, 0, 4000, 0, 0], 0, 768, 2048),
        (&many, 1, 264, 392),
        (&[70, 200], 0, 328, 8200),
    ];
    for (counts, tail, out, input) in cases {
        let what = format!("{counts:?}, {tail} rows more, {input} → {out}");
        let mut offsets = vec![0];
        for &count in counts {
            offsets.push(offsets[offsets.len() - 1] + count as i32);
        }
        let groups = counts.len();
        let end = offsets[groups] as usize;
        let n = end + tail;
        let offsets = Tensor::<i32, Cuda>::from_slice(&gpu, 1, groups + 1, &offsets).unwrap();
        let (x, dy) = (Twins::new(&gpu, 0, n, input), Twins::new(&gpu, 1, n, out));
        let w = Twins::new(&gpu, 2, groups * out, input);

        for (op, a, to, depth) in [(Op::T, &x, out, input), (Op::N, &dy, input, out)] {
            let mut want = Tensor::<f32, Cuda>::uninit(&gpu, n, to).unwrap();
            gpu.grouped_gemm(want.view_mut().unwrap(), a.f32.view(), w.f32.view(), op, offsets.view())
                .unwrap();
            let want = want.to_f64(&gpu).unwrap();
            let run = || {
                let mut y = Tensor::<bf16, Cuda>::uninit(&gpu, n, to).unwrap();
                gpu.grouped_gemm(y.view_mut().unwrap(), a.bf16.view(), w.bf16.view(), op, offsets.view())
                    .unwrap();
                y.to_vec(&gpu).unwrap()
            };
            let got = run();
            assert_eq!(bits(&got), bits(&run()), "{what}: the same bits twice");
            let got: Vec<f64> = got.into_iter().map(f64::from).collect();
            assert_near(&format!("{op:?} {what}"), &got, &want, to, end, depth, 1.0 / 256.0);
        }

        let before = Twins::new(&gpu, 3, groups * out, input).f32.to_vec(&gpu).unwrap();
        let start = || Tensor::<f32, Cuda>::from_slice(&gpu, groups * out, input, &before).unwrap();
        let mut want = start();
        gpu.grouped_gemm_acc(want.view_mut().unwrap(), dy.f32.view(), x.f32.view(), offsets.view()).unwrap();
        let run = || {
            let mut g = start();
            gpu.grouped_gemm_acc(g.view_mut().unwrap(), dy.bf16.view(), x.bf16.view(), offsets.view())
                .unwrap();
            g.to_f64(&gpu).unwrap()
        };
        let got = run();
        assert_eq!(got, run(), "{what}: the same bits twice");
        let (want, rows) = (want.to_f64(&gpu).unwrap(), groups * out);
        assert_near(&format!("gradient of the weights {what}"), &got, &want, input, rows, n.max(100), 1e-5);

        // Written, whatever was there: fresh memory is NaN here, and groups without rows become 0.
        let mut want = Tensor::<f32, Cuda>::zeros(&gpu, rows, input).unwrap();
        gpu.grouped_gemm_acc(want.view_mut().unwrap(), dy.f32.view(), x.f32.view(), offsets.view()).unwrap();
        let want = want.to_f64(&gpu).unwrap();
        let run = || {
            let mut g = Tensor::<f32, Cuda>::uninit(&gpu, rows, input).unwrap();
            gpu.grouped_gemm_to_acc(g.view_mut().unwrap(), dy.bf16.view(), x.bf16.view(), offsets.view())
                .unwrap();
            g.to_f64(&gpu).unwrap()
        };
        let got = run();
        assert_eq!(got, run(), "{what}: the same bits twice");
        assert_near(&format!("first gradient {what}"), &got, &want, input, rows, n.max(100), 1e-5);
    }
}

fn bits(numbers: &[bf16]) -> Vec<u16> {
    numbers.iter().map(|x| x.to_bits()).collect()
}
