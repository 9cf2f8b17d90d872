//! Operands, timing, the lines of the table.

use std::time::{Duration, Instant};

use moe_kernels::{Cuda, Device, Float, Layout, Result, Tensor};

/// A GPU, and what a copy comes to on it.
pub struct Bench {
    pub gpu: Cuda,
    only: Vec<String>,
    /// Bytes a second, those read and those written.
    copy: f64,
}

/// Batches of runs, of which the median counts, and how long one of them takes at least.
const BATCHES: usize = 7;
const BATCH: Duration = Duration::from_millis(15);

impl Bench {
    pub fn new(gpu: Cuda, only: Vec<String>) -> Result<Self> {
        let (mut to, from) = (gpu.alloc(1 << 30)?, random::<f32>(&gpu, 1, 1 << 28)?);
        let mut copy = |mib: usize| seconds(&gpu, || gpu.copy(&mut to, 0, from.buf(), 0..mib << 20));
        let whole = copy(1024)?;
        // Small copies are slower, as small kernels are.
        let small = [32, 48, 64, 128].into_iter().map(|mib| Ok((mib, copy(mib)?)));
        let small = small.collect::<Result<Vec<_>>>()?;
        let bench = Bench { copy: (2u64 << 30) as f64 / whole, gpu, only };
        println!("kernel\tshape\tus\tTB/s\tof copy");
        bench.line("copy", "1024 MiB", 2 << 30, whole);
        for (mib, seconds) in small {
            bench.line("copy", &format!("{mib} MiB"), mib << 21, seconds);
        }
        Ok(bench)
    }

    /// The line of a kernel that moves at least `bytes`.
    pub fn kernel(
        &self,
        name: &str,
        shape: &str,
        bytes: usize,
        run: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        if self.only.is_empty() || self.only.iter().any(|only| name.starts_with(only)) {
            self.line(name, shape, bytes, seconds(&self.gpu, run)?);
        }
        Ok(())
    }

    fn line(&self, name: &str, shape: &str, bytes: usize, seconds: f64) {
        let rate = bytes as f64 / seconds;
        let (us, terabytes, share) = (seconds * 1e6, rate / 1e12, rate / self.copy * 100.0);
        println!("{name}\t{shape}\t{us:.1}\t{terabytes:.2}\t{share:.0}%");
    }

    /// Numbers in [−1, 1).
    pub fn random<T: Float>(&self, rows: usize, cols: usize) -> Result<Tensor<T, Cuda>> {
        random(&self.gpu, rows, cols)
    }

    /// Integers below `end`, each as likely.
    pub fn integers(&self, n: usize, end: usize) -> Result<Tensor<i32, Cuda>> {
        let mut state = 1;
        let drawn: Vec<i32> = (0..n).map(|_| (draw(&mut state) % end as u64) as i32).collect();
        Tensor::from_slice(&self.gpu, 1, n, &drawn)
    }
}

/// The time of one run: enough of them in a batch that waiting for its end does not count.
fn seconds(gpu: &Cuda, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut batch = |runs: u32| -> Result<Duration> {
        gpu.synchronize()?;
        let start = Instant::now();
        for _ in 0..runs {
            run()?;
        }
        gpu.synchronize()?;
        Ok(start.elapsed())
    };
    batch(2)?;
    let runs = (BATCH.as_secs_f64() / batch(2)?.as_secs_f64() * 2.0).ceil().max(2.0) as u32;
    let mut times = (0..BATCHES).map(|_| batch(runs)).collect::<Result<Vec<_>>>()?;
    times.sort();
    Ok(times[BATCHES / 2].as_secs_f64() / f64::from(runs))
}

/// SplitMix64.
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A million numbers, over and over.
fn random<T: Float>(gpu: &Cuda, rows: usize, cols: usize) -> Result<Tensor<T, Cuda>> {
    let bytes = rows * cols * size_of::<T>();
    let mut state = bytes as u64;
    let numbers = (rows * cols).min(1 << 20);
    let mut number = || T::from_f64((draw(&mut state) >> 11) as f64 / (1u64 << 52) as f64 - 1.0);
    let part: Vec<T> = (0..numbers).map(|_| number()).collect();
    let part = Tensor::from_slice(gpu, 1, numbers, &part)?;
    let mut buf = gpu.alloc(bytes)?;
    let step = numbers * size_of::<T>();
    for at in (0..bytes).step_by(step.max(1)) {
        gpu.copy(&mut buf, at, part.buf(), 0..step.min(bytes - at))?;
    }
    Tensor::from_buf(buf.into(), Layout::contiguous(rows, cols))
}
