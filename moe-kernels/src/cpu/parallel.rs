//! Independent pieces of a kernel on the device's threads.

use std::sync::{Mutex, PoisonError};

use super::Cpu;
use crate::Result;

/// Elements of one piece of an elementwise kernel: large enough to be worth a thread, small enough for the cache.
const PIECE: usize = 32 * 1024;

/// Rows of one piece; a function of the shape alone, so that sums over pieces don't depend on the threads.
pub(super) fn rows_per_piece(cols: usize) -> usize {
    (PIECE / cols.max(1)).max(1)
}

impl Cpu {
    /// Runs `f` on every task, each on one thread, in any order. Tasks own what they write, so neither the order nor
    /// the number of threads shows in the result.
    pub(super) fn for_each<I: Send>(&self, tasks: Vec<I>, f: impl Fn(I) + Sync) -> Result<()> {
        let pool = if tasks.len() > 1 { self.pool()? } else { None };
        let Some(pool) = pool else {
            tasks.into_iter().for_each(f);
            return Ok(());
        };
        let helpers = self.threads().min(tasks.len()) - 1;
        let queue = Mutex::new(tasks.into_iter());
        // The lock protects one `next`, which cannot be left half done: poisoning says only that a task panicked, and
        // the scope carries that panic on.
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            while let Some(task) = next() {
                f(task);
            }
        };
        pool.in_place_scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|_| work());
            }
            work();
        });
        Ok(())
    }
}
