//! Rows of whole vectors at aligned addresses, as models have them: other kernels than those that the suites of `conformance`
//! reach, which place their operands at odd offsets. Held to the `Cpu` in f64 on the same numbers, and to the same bits twice.

use moe_kernels::family::{
    Activation, Embedding, GateFunction, Loss, Norm, Rope, RotaryHead, RotaryPairs, Rotation,
};
use moe_kernels::{Cpu, Cuda, Float, Result, Tensor, bf16};

use super::gpu;

/// Numbers on both devices.
struct Operand<T: Float> {
    gpu: Tensor<T, Cuda>,
    cpu: Tensor<f64, Cpu>,
}

struct Case {
    gpu: Cuda,
    cpu: Cpu,
    state: u64,
}

impl Case {
    /// Below 1, by SplitMix64.
    fn draw(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn operand<T: Float>(&mut self, rows: usize, cols: usize) -> Result<Operand<T>> {
        let drawn: Vec<T> = (0..rows * cols).map(|_| T::from_f64(self.draw() * 4.0 - 2.0)).collect();
        let exact: Vec<f64> = drawn.iter().map(|&x| x.to_f64()).collect();
        Ok(Operand {
            gpu: Tensor::from_slice(&self.gpu, rows, cols, &drawn)?,
            cpu: Tensor::from_slice(&self.cpu, rows, cols, &exact)?,
        })
    }

    fn integers(&mut self, n: usize, end: usize) -> Result<(Tensor<i32, Cuda>, Tensor<i32, Cpu>)> {
        let drawn: Vec<i32> = (0..n).map(|_| (self.draw() * end as f64) as i32).collect();
        Ok((Tensor::from_slice(&self.gpu, 1, n, &drawn)?, Tensor::from_slice(&self.cpu, 1, n, &drawn)?))
    }

    /// An output: numbers that must not stay.
    fn output<T: Float>(&mut self, rows: usize, cols: usize) -> Result<Operand<T>> {
        let nan = vec![T::from_f64(f64::NAN); rows * cols];
        let gpu = Tensor::from_slice(&self.gpu, rows, cols, &nan)?;
        Ok(Operand { gpu, cpu: Tensor::zeros(&self.cpu, rows, cols)? })
    }

    /// The GPU's result within `tolerance` of the largest element.
    fn compare<T: Float>(&self, what: &str, result: &Operand<T>, tolerance: f64) -> Result<()> {
        let (got, want) = (result.gpu.to_f64(&self.gpu)?, result.cpu.to_f64(&self.cpu)?);
        let largest = want.iter().fold(1e-3f64, |largest, x| largest.max(x.abs()));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let near = (got - want).abs() <= tolerance * largest;
            assert!(near, "{what}: element {i} is {got}, not {want} (largest {largest})");
        }
        Ok(())
    }
}

/// `[rows, cols]` again, so that the same bits are asked for.
fn same<T: Float>(what: &str, gpu: &Cuda, a: &Tensor<T, Cuda>, b: &Tensor<T, Cuda>) -> Result<()> {
    let (a, b) = (a.to_f64(gpu)?, b.to_f64(gpu)?);
    assert!(
        a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()),
        "{what} has other bits the second time"
    );
    Ok(())
}

fn norm<T: Float>(case: &mut Case, tolerance: f64) -> Result<()> {
    // Every way in which rows are spread over threads, the last more than registers hold; more rows than pieces of the sum.
    for (n, h) in [
        (1, 16),
        (5000, 128),
        (37, 256),
        (35, 512),
        (9, 1024),
        (19, 2880),
        (600, 4096),
        (5, 8192),
        (3, 16384),
        (3, 40960),
    ] {
        let what = format!("{n}x{h}");
        let (x, dy, w) = (case.operand::<T>(n, h)?, case.operand::<T>(n, h)?, case.operand::<T>(1, h)?);
        let (mut y, mut r) = (case.output::<T>(n, h)?, case.output::<T::Acc>(1, n)?);
        let (gpu, cpu) = (case.gpu.clone(), case.cpu.clone());
        gpu.rms_norm(y.gpu.view_mut()?, r.gpu.view_mut()?, x.gpu.view(), w.gpu.view(), 1e-5)?;
        cpu.rms_norm(y.cpu.view_mut()?, r.cpu.view_mut()?, x.cpu.view(), w.cpu.view(), 1e-5)?;
        case.compare(&format!("y {what}"), &y, tolerance)?;
        case.compare(&format!("rstd {what}"), &r, tolerance)?;
        let mut sum = case.output::<T>(n, h)?;
        let (to, r_to) = (y.gpu.view_mut()?, r.gpu.view_mut()?);
        gpu.add_rms_norm(sum.gpu.view_mut()?, to, r_to, x.gpu.view(), dy.gpu.view(), w.gpu.view(), 1e-5)?;
        let (to, r_to) = (y.cpu.view_mut()?, r.cpu.view_mut()?);
        cpu.add_rms_norm(sum.cpu.view_mut()?, to, r_to, x.cpu.view(), dy.cpu.view(), w.cpu.view(), 1e-5)?;
        case.compare(&format!("x + r {what}"), &sum, tolerance)?;
        case.compare(&format!("norm of a sum {what}"), &y, tolerance)?;
        let mut after = Tensor::uninit(&gpu, n, h)?;
        gpu.rms_norm(after.view_mut()?, r.gpu.view_mut()?, sum.gpu.view(), w.gpu.view(), 1e-5)?;
        same("norm of a sum", &gpu, &y.gpu, &after)?;
        gpu.rms_norm(y.gpu.view_mut()?, r.gpu.view_mut()?, x.gpu.view(), w.gpu.view(), 1e-5)?;
        cpu.rms_norm(y.cpu.view_mut()?, r.cpu.view_mut()?, x.cpu.view(), w.cpu.view(), 1e-5)?;

        let (mut dx, mut dw) = (case.output::<T>(n, h)?, case.operand::<T::Acc>(1, h)?);
        let mut again = dw.gpu.copy(&gpu)?;
        let past = case.operand::<T>(n, h)?;
        let backward = |dx: &mut Tensor<T, Cuda>, dw: &mut Tensor<T::Acc, Cuda>, past| {
            let (dx, dw) = (dx.view_mut()?, dw.view_mut()?);
            gpu.rms_norm_backward(dx, dw, dy.gpu.view(), x.gpu.view(), w.gpu.view(), r.gpu.view(), past)
        };
        let on_cpu = |dx: &mut Tensor<f64, Cpu>, dw: &mut Tensor<f64, Cpu>, past| {
            let (dx, dw) = (dx.view_mut()?, dw.view_mut()?);
            cpu.rms_norm_backward(dx, dw, dy.cpu.view(), x.cpu.view(), w.cpu.view(), r.cpu.view(), past)
        };
        backward(&mut dx.gpu, &mut dw.gpu, Some(past.gpu.view()))?;
        on_cpu(&mut dx.cpu, &mut dw.cpu.copy(&cpu)?, Some(past.cpu.view()))?;
        case.compare(&format!("dx and past {what}"), &dx, tolerance)?;
        backward(&mut dx.gpu, &mut again, None)?;
        on_cpu(&mut dx.cpu, &mut dw.cpu, None)?;
        case.compare(&format!("dx {what}"), &dx, tolerance)?;
        case.compare(&format!("dw {what}"), &dw, tolerance * 4.0)?;
        same("dw", &gpu, &dw.gpu, &again)?;

        let (mut squares, mut products) = (case.output::<T::Acc>(1, n)?, case.output::<T::Acc>(1, n)?);
        gpu.rms_norm_sums(squares.gpu.view_mut()?, x.gpu.view())?;
        cpu.rms_norm_sums(squares.cpu.view_mut()?, x.cpu.view())?;
        case.compare(&format!("squares {what}"), &squares, tolerance)?;
        gpu.rms_norm_backward_sums(products.gpu.view_mut()?, dy.gpu.view(), x.gpu.view(), w.gpu.view())?;
        cpu.rms_norm_backward_sums(products.cpu.view_mut()?, dy.cpu.view(), x.cpu.view(), w.cpu.view())?;
        case.compare(&format!("products {what}"), &products, tolerance * 10.0)?;
    }
    Ok(())
}

fn rope<T: Float>(case: &mut Case, tolerance: f64) -> Result<()> {
    for (n, heads, head_dim, first, angles) in
        [(5, 32, 128, 0, 64), (300, 3, 64, 0, 32), (9, 5, 192, 128, 32), (4, 9, 80, 16, 16)]
    {
        let (x, mut y) = (case.operand::<T>(n, heads * head_dim)?, case.output::<T>(n, heads * head_dim)?);
        let (cos, sin) = (case.operand::<T::Acc>(40, angles)?, case.operand::<T::Acc>(40, angles)?);
        let (on_gpu, on_cpu) = case.integers(n, 40)?;
        for pairs in [RotaryPairs::Halves, RotaryPairs::Adjacent] {
            let (head, turn) = (RotaryHead { head_dim, first, pairs }, Rotation::Backward);
            let (c, s) = (cos.gpu.view(), sin.gpu.view());
            case.gpu.rope(y.gpu.view_mut()?, x.gpu.view(), c, s, on_gpu.view(), head, turn)?;
            let (c, s) = (cos.cpu.view(), sin.cpu.view());
            case.cpu.rope(y.cpu.view_mut()?, x.cpu.view(), c, s, on_cpu.view(), head, turn)?;
            case.compare(&format!("{n} of {heads} {head:?}"), &y, tolerance)?;
        }
    }
    Ok(())
}

fn norm_rope<T: Float>(case: &mut Case, tolerance: f64) -> Result<()> {
    // Fewer and more heads than threads take at once, more tokens than pieces of the sum.
    for (n, heads, head_dim) in [(5, 32, 128), (1500, 4, 128), (7, 80, 64), (900, 3, 256), (3, 1, 512)] {
        let what = format!("{n} of {heads} x {head_dim}");
        let (x, dy) = (case.operand::<T>(n, heads * head_dim)?, case.operand::<T>(n, heads * head_dim)?);
        let (w, mut y) = (case.operand::<T>(1, head_dim)?, case.output::<T>(n, heads * head_dim)?);
        let (cos, sin) =
            (case.operand::<T::Acc>(40, head_dim / 2)?, case.operand::<T::Acc>(40, head_dim / 2)?);
        let (at, at_cpu) = case.integers(n, 40)?;
        let head = RotaryHead { head_dim, first: 0, pairs: RotaryPairs::Halves };
        let mut r = case.output::<T::Acc>(1, n * heads)?;
        let (gpu, cpu) = (case.gpu.clone(), case.cpu.clone());
        let (to, r_to, c, s) = (y.gpu.view_mut()?, r.gpu.view_mut()?, cos.gpu.view(), sin.gpu.view());
        gpu.rms_norm_rope(to, r_to, x.gpu.view(), w.gpu.view(), c, s, at.view(), head, 1e-5)?;
        let (to, r_to, c, s) = (y.cpu.view_mut()?, r.cpu.view_mut()?, cos.cpu.view(), sin.cpu.view());
        cpu.rms_norm_rope(to, r_to, x.cpu.view(), w.cpu.view(), c, s, at_cpu.view(), head, 1e-5)?;
        case.compare(&format!("y {what}"), &y, tolerance)?;
        case.compare(&format!("rstd {what}"), &r, tolerance)?;

        let (mut dx, mut dw) = (case.output::<T>(n, heads * head_dim)?, case.operand::<T::Acc>(1, head_dim)?);
        let mut again = dw.gpu.copy(&gpu)?;
        for dw in [&mut dw.gpu, &mut again] {
            let (dx, dw, dy, x, w) =
                (dx.gpu.view_mut()?, dw.view_mut()?, dy.gpu.view(), x.gpu.view(), w.gpu.view());
            let (r, c, s) = (r.gpu.view(), cos.gpu.view(), sin.gpu.view());
            gpu.rms_norm_rope_backward(dx, dw, dy, x, w, r, c, s, at.view(), head)?;
        }
        same("dw", &gpu, &dw.gpu, &again)?;
        let (to, dw_to, dy, x, w) =
            (dx.cpu.view_mut()?, dw.cpu.view_mut()?, dy.cpu.view(), x.cpu.view(), w.cpu.view());
        let (r, c, s) = (r.cpu.view(), cos.cpu.view(), sin.cpu.view());
        cpu.rms_norm_rope_backward(to, dw_to, dy, x, w, r, c, s, at_cpu.view(), head)?;
        case.compare(&format!("dx {what}"), &dx, tolerance)?;
        case.compare(&format!("dw {what}"), &dw, tolerance * 4.0)?;
    }
    Ok(())
}

fn activation<T: Float>(case: &mut Case, tolerance: f64) -> Result<()> {
    for (n, width) in [(1, 8), (37, 96), (33, 768), (20, 1408), (5, 4096), (3, 14336)] {
        let (x, dy, p) =
            (case.operand::<T>(n, 2 * width)?, case.operand::<T>(n, width)?, case.operand::<T::Acc>(1, n)?);
        for function in [GateFunction::Silu, GateFunction::GeluTanh] {
            let what = format!("{function:?} {n}x{width}");
            let (mut y, mut dx) = (case.output::<T>(n, width)?, case.output::<T>(n, 2 * width)?);
            let mut dp = case.output::<T::Acc>(1, n)?;
            case.gpu.glu(y.gpu.view_mut()?, x.gpu.view(), Some(p.gpu.view()), function)?;
            case.cpu.glu(y.cpu.view_mut()?, x.cpu.view(), Some(p.cpu.view()), function)?;
            case.compare(&what, &y, tolerance)?;
            let (d, out) = (dx.gpu.view_mut()?, Some(dp.gpu.view_mut()?));
            case.gpu.glu_backward(d, out, dy.gpu.view(), x.gpu.view(), Some(p.gpu.view()), function)?;
            let (d, out) = (dx.cpu.view_mut()?, Some(dp.cpu.view_mut()?));
            case.cpu.glu_backward(d, out, dy.cpu.view(), x.cpu.view(), Some(p.cpu.view()), function)?;
            case.compare(&format!("dgate_up {what}"), &dx, tolerance)?;
            case.compare(&format!("dp {what}"), &dp, tolerance * 4.0)?;
        }
        let gate = case.operand::<T>(n, 1)?;
        let (mut dx, mut dgate) = (case.output::<T>(n, width)?, case.output::<T>(n, 1)?);
        let (d, dg) = (dx.gpu.view_mut()?, dgate.gpu.view_mut()?);
        case.gpu.sigmoid_gate_backward(d, dg, dy.gpu.view(), dy.gpu.view(), gate.gpu.view())?;
        let (d, dg) = (dx.cpu.view_mut()?, dgate.cpu.view_mut()?);
        case.cpu.sigmoid_gate_backward(d, dg, dy.cpu.view(), dy.cpu.view(), gate.cpu.view())?;
        case.compare("dx of a gate", &dx, tolerance)?;
        case.compare("dgate", &dgate, tolerance * 4.0)?;
        case.gpu.sigmoid_gate(dx.gpu.view_mut()?, dy.gpu.view(), gate.gpu.view())?;
        case.cpu.sigmoid_gate(dx.cpu.view_mut()?, dy.cpu.view(), gate.cpu.view())?;
        case.compare("gated", &dx, tolerance)?;
    }
    Ok(())
}

fn embedding<T: Float>(case: &mut Case, tolerance: f64) -> Result<()> {
    // Ids of one token, of some, and of more than have slots, in more tokens than are looked at in one step.
    for (n, h, first, rows, vocabulary) in
        [(13, 8, 0, 7, 7), (5000, 512, 3, 1000, 1100), (9000, 520, 0, 30, 40)]
    {
        let what = format!("{n}x{h} of {vocabulary}");
        let (table, dy) = (case.operand::<T>(rows, h)?, case.operand::<T>(n, h)?);
        let (on_gpu, on_cpu) = case.integers(n, vocabulary)?;
        let mut y = case.output::<T>(n, h)?;
        case.gpu.embed(y.gpu.view_mut()?, table.gpu.view(), on_gpu.view(), first)?;
        case.cpu.embed(y.cpu.view_mut()?, table.cpu.view(), on_cpu.view(), first)?;
        case.compare(&what, &y, 0.0)?;
        let mut dtable = case.operand::<T::Acc>(rows, h)?;
        let mut again = dtable.gpu.copy(&case.gpu)?;
        let padding = Some(first + 2);
        case.gpu.embed_backward(dtable.gpu.view_mut()?, dy.gpu.view(), on_gpu.view(), first, padding)?;
        case.gpu.embed_backward(again.view_mut()?, dy.gpu.view(), on_gpu.view(), first, padding)?;
        case.cpu.embed_backward(dtable.cpu.view_mut()?, dy.cpu.view(), on_cpu.view(), first, padding)?;
        case.compare(&format!("dtable {what}"), &dtable, tolerance)?;
        same("dtable", &case.gpu, &dtable.gpu, &again)?;
    }
    Ok(())
}

fn loss<T: Float>(case: &mut Case, tolerance: f64) -> Result<()> {
    let cases = [(6, 8, 0), (7, 1000, 500), (300, 2056, 0), (5, 32000, 0), (3, 50_264, 0), (4, 151_936, 0)];
    for (n, vocabulary, first) in cases {
        let what = format!("{n}x{vocabulary}");
        let logits = case.operand::<T>(n, vocabulary)?;
        let (on_gpu, on_cpu) = case.integers(n, vocabulary + first)?;
        let (mut lse, mut target) = (case.output::<T::Acc>(1, n)?, case.output::<T::Acc>(1, n)?);
        let (l, t) = (lse.gpu.view_mut()?, target.gpu.view_mut()?);
        case.gpu.cross_entropy(l, t, logits.gpu.view(), on_gpu.view(), first)?;
        let (l, t) = (lse.cpu.view_mut()?, target.cpu.view_mut()?);
        case.cpu.cross_entropy(l, t, logits.cpu.view(), on_cpu.view(), first)?;
        case.compare(&format!("lse {what}"), &lse, tolerance.min(1e-5))?;
        case.compare(&format!("target {what}"), &target, 0.0)?;
        let scale = case.operand::<T::Acc>(1, n)?;
        let of_gpu = |case: &Case| logits.gpu.copy(&case.gpu);
        let mut d = Operand { gpu: of_gpu(case)?, cpu: logits.cpu.copy(&case.cpu)? };
        let (l, s) = (lse.gpu.view(), scale.gpu.view());
        case.gpu.cross_entropy_backward(d.gpu.view_mut()?, l, on_gpu.view(), first, s)?;
        let (l, s) = (lse.cpu.view(), scale.cpu.view());
        case.cpu.cross_entropy_backward(d.cpu.view_mut()?, l, on_cpu.view(), first, s)?;
        case.compare(&format!("dlogits {what}"), &d, tolerance)?;
        if first > 0 {
            continue;
        }
        // The same at once, in as many blocks as rows of this length take.
        lse.gpu = case.output::<T::Acc>(1, n)?.gpu;
        target.gpu = case.output::<T::Acc>(1, n)?.gpu;
        d.gpu = of_gpu(case)?;
        let at_once =
            |lse: &mut Tensor<T::Acc, Cuda>, target: &mut Tensor<T::Acc, Cuda>, d: &mut Tensor<T, Cuda>| {
                let (lse, target, d) = (lse.view_mut()?, target.view_mut()?, d.view_mut()?);
                case.gpu.cross_entropy_whole(lse, target, d, on_gpu.view(), scale.gpu.view())
            };
        at_once(&mut lse.gpu, &mut target.gpu, &mut d.gpu)?;
        case.compare(&format!("lse at once {what}"), &lse, tolerance.min(1e-5))?;
        case.compare(&format!("target at once {what}"), &target, 0.0)?;
        case.compare(&format!("dlogits at once {what}"), &d, tolerance)?;
        let mut again = of_gpu(case)?;
        at_once(&mut lse.gpu, &mut target.gpu, &mut again)?;
        same("dlogits", &case.gpu, &d.gpu, &again)?;
    }
    Ok(())
}

fn all<T: Float>(test: &str, tolerance: f64) {
    let Some(gpu) = gpu(test) else { return };
    let mut case = Case { gpu, cpu: Cpu::default(), state: 0 };
    for family in [norm::<T>, rope::<T>, norm_rope::<T>, activation::<T>, embedding::<T>, loss::<T>] {
        family(&mut case, tolerance).expect("kernels of rows of vectors");
    }
}

#[test]
fn aligned_f32() {
    all::<f32>("aligned_f32", 2e-6);
}

#[test]
fn aligned_f64() {
    all::<f64>("aligned_f64", 1e-12);
}

#[test]
fn aligned_bf16() {
    all::<bf16>("aligned_bf16", 8e-3);
}
