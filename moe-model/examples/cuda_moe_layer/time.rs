//! Times by the host's clock, from one synchronisation to another.

use std::time::{Duration, Instant};

use moe_kernels::{Cuda, Device};

use crate::Error;

/// Batches of runs, of which the median counts, and how long one of them takes at least.
const BATCHES: usize = 7;
const BATCH: Duration = Duration::from_millis(40);

/// The time of one run: enough of them in a batch that waiting for its end counts little.
pub fn seconds(gpu: &Cuda, mut run: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    let mut batch = |runs: u32| -> Result<Duration, Error> {
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
    let times = (0..BATCHES).map(|_| batch(runs)).collect::<Result<Vec<_>, _>>()?;
    Ok(median(times.iter().map(Duration::as_secs_f64)) / f64::from(runs))
}

/// The middle one of an odd number of times.
pub fn median(times: impl Iterator<Item = f64>) -> f64 {
    let mut times = Vec::from_iter(times);
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
