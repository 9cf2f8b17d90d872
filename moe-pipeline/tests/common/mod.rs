//! Plain stages on `Vec<f64>`, run by the executor on threads and, independently, by hand in sequence.
#![allow(dead_code)] // each test binary uses its part

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use moe_pipeline::generate::{Named, Sizes};
use moe_pipeline::transport::{Channels, buffered, rendezvous};
use moe_pipeline::{
    Action, Error, ExecuteError, Kind, Pass, Placement, Post, Program, Schedule, Stage, Transport, execute,
    validate,
};

pub const WIDTH: usize = 5;
pub const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, PartialEq)]
pub struct Boom(pub u32);

impl fmt::Display for Boom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "boom in micro-batch {}", self.0)
    }
}

impl std::error::Error for Boom {}

/// `y_i = tanh(w_i · x_i + x_{i+1} / 2)`; the last stage's loss is `Σ (y − target)² / 2`.
#[derive(Debug, Clone)]
pub struct Toy {
    /// Its place among the stages of all copies of the pipeline, where its sums are.
    pub stage: usize,
    /// Its place in the pipeline.
    pub index: usize,
    pub stages: usize,
    pub weights: Vec<f64>,
    pub fail_at: Option<u32>,
    pub panic_at: Option<u32>,
    /// Sleeps so long before the forward pass of the micro-batch.
    pub stall_at: Option<(u32, Duration)>,
    /// Sleeps up to 100 µs before each pass, by this seed.
    pub jitter: Option<u64>,
}

impl Toy {
    fn dawdle(&self, m: u32) {
        if let Some(seed) = self.jitter {
            let draw = Draws(seed ^ u64::from(m) << 32 ^ self.index as u64).below(100);
            std::thread::sleep(Duration::from_micros(draw as u64));
        }
    }
}

/// One rank's sums by stage, zero for stages of other ranks; losses are last stages'.
#[derive(Debug, Clone, PartialEq)]
pub struct Sums {
    pub losses: Vec<f64>,
    pub grads: Vec<Vec<f64>>,
}

pub struct Kept {
    x: Vec<f64>,
    y: Vec<f64>,
}

pub fn toys(stages: u32) -> Vec<Toy> {
    let toy = |index: u32| Toy {
        stage: index as usize,
        index: index as usize,
        stages: stages as usize,
        weights: (0..WIDTH).map(|i| 0.3 + 0.17 * f64::from(index) - 0.11 * i as f64).collect(),
        fail_at: None,
        panic_at: None,
        stall_at: None,
        jitter: None,
    };
    (0..stages).map(toy).collect()
}

fn data(m: u32, i: usize) -> f64 {
    (f64::from(m) * 0.73 + i as f64 * 1.19).sin()
}

fn target(m: u32, i: usize) -> f64 {
    (f64::from(m) * 0.31 - i as f64 * 0.57).cos()
}

impl Stage for Toy {
    type Cx = Sums;
    type Act = Vec<f64>;
    type Saved = Kept;
    type Deferred = (Vec<f64>, Vec<f64>);
    type Error = Boom;

    fn forward(&self, m: u32, x: Option<Vec<f64>>, cx: &mut Sums) -> Result<(Option<Vec<f64>>, Kept), Boom> {
        if self.fail_at == Some(m) {
            return Err(Boom(m));
        }
        assert_ne!(self.panic_at, Some(m), "planted panic");
        if let Some((_, long)) = self.stall_at.filter(|(at, _)| *at == m) {
            std::thread::sleep(long);
        }
        self.dawdle(m);
        assert_eq!(x.is_none(), self.index == 0, "only the first stage reads its own data");
        let x = x.unwrap_or_else(|| (0..WIDTH).map(|i| data(m, i)).collect());
        let y: Vec<f64> =
            (0..WIDTH).map(|i| (self.weights[i] * x[i] + 0.5 * x[(i + 1) % WIDTH]).tanh()).collect();
        let last = self.index + 1 == self.stages;
        if last {
            cx.losses[self.stage] +=
                y.iter().enumerate().map(|(i, y)| (y - target(m, i)).powi(2) / 2.0).sum::<f64>();
        }
        Ok(((!last).then(|| y.clone()), Kept { x, y }))
    }

    fn backward_input(
        &self,
        m: u32,
        dy: Option<Vec<f64>>,
        s: Kept,
        _: &mut Sums,
    ) -> Result<(Option<Vec<f64>>, Self::Deferred), Boom> {
        self.dawdle(m);
        assert_eq!(dy.is_none(), self.index + 1 == self.stages, "only the last stage starts from its loss");
        let dy = dy.unwrap_or_else(|| s.y.iter().enumerate().map(|(i, y)| y - target(m, i)).collect());
        let dz: Vec<f64> = dy.iter().zip(&s.y).map(|(dy, y)| dy * (1.0 - y * y)).collect();
        let dx = (0..WIDTH).map(|i| self.weights[i] * dz[i] + 0.5 * dz[(i + WIDTH - 1) % WIDTH]).collect();
        Ok(((self.index > 0).then_some(dx), (s.x, dz)))
    }

    fn backward_weight(&self, _: u32, (x, dz): Self::Deferred, cx: &mut Sums) -> Result<(), Boom> {
        for (i, g) in cx.grads[self.stage].iter_mut().enumerate() {
            *g += x[i] * dz[i];
        }
        Ok(())
    }
}

pub fn zeros(stages: u32) -> Sums {
    Sums { losses: vec![0.0; stages as usize], grads: vec![vec![0.0; WIDTH]; stages as usize] }
}

/// The reference: one micro-batch after the other through all stages, without schedules, messages or the executor.
pub fn sequential(stages: u32, microbatches: Range<u32>, pass: Pass) -> Sums {
    let toys = toys(stages);
    let mut sums = zeros(stages);
    for m in microbatches {
        let mut act = None;
        let mut kept = Vec::new();
        for toy in &toys {
            let (y, saved) = toy.forward(m, act, &mut sums).unwrap();
            kept.push(saved);
            act = y;
        }
        if pass == Pass::ForwardOnly {
            continue;
        }
        let mut grad = None;
        for (toy, saved) in toys.iter().zip(kept).rev() {
            let (dx, deferred) = toy.backward_input(m, grad, saved, &mut sums).unwrap();
            toy.backward_weight(m, deferred, &mut sums).unwrap();
            grad = dx;
        }
    }
    sums
}

pub type Outcome = Result<Sums, ExecuteError<Boom, Error>>;

/// Channels that dawdle: one call in four begins up to 100 µs late.
pub struct Delayed {
    channels: Channels<Vec<f64>>,
    draws: Draws,
}

impl Delayed {
    fn dawdle(&mut self) {
        if self.draws.below(4) == 0 {
            std::thread::sleep(Duration::from_micros(self.draws.below(100) as u64));
        }
    }
}

impl Transport<Vec<f64>> for Delayed {
    type Ticket = <Channels<Vec<f64>> as Transport<Vec<f64>>>::Ticket;
    type Error = Error;

    fn post(&mut self, batch: Vec<Post<Vec<f64>>>) -> Result<Vec<Self::Ticket>, Error> {
        self.dawdle();
        self.channels.post(batch)
    }

    fn wait(&mut self, t: Self::Ticket) -> Result<Option<Vec<f64>>, Error> {
        self.dawdle();
        self.channels.wait(t)
    }

    fn abort(&mut self, why: &str) {
        self.channels.abort(why);
    }
}

/// Runs every rank on a thread of its own; `None` for a rank that panicked.
pub fn run<T>(program: &Program, toys: &[Toy], channels: Vec<T>) -> Vec<Option<Outcome>>
where
    T: Transport<Vec<f64>, Error = Error> + Send,
{
    let placement = program.schedule().placement();
    std::thread::scope(|scope| {
        let start = |(rank, mut transport): (u32, T)| {
            let mine: Vec<Toy> =
                placement.stages_of(rank).iter().map(|&s| toys[s as usize].clone()).collect();
            scope.spawn(move || {
                let mut sums = zeros(placement.stages());
                execute(program, rank, &mine, &mut transport, &mut sums).map(|()| sums)
            })
        };
        let ranks: Vec<_> = (0..).zip(channels).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().ok()).collect()
    })
}

/// All ranks' sums in one: each stage's come from one rank.
pub fn gather(program: &Program, outcomes: Vec<Option<Outcome>>) -> Sums {
    let placement = program.schedule().placement();
    let mut all = zeros(placement.stages());
    for (rank, outcome) in (0..).zip(outcomes) {
        let sums = outcome.expect("no panic").expect("no error");
        for &stage in placement.stages_of(rank) {
            all.grads[stage as usize] = sums.grads[stage as usize].clone();
        }
        for (all, loss) in all.losses.iter_mut().zip(sums.losses) {
            *all += loss;
        }
    }
    all
}

/// Executes over both transports and compares with the sequential sums, bit for bit.
pub fn equals_sequential(program: &Program) {
    equals_sequential_with(program, None);
}

/// The same, with stages and transports that take their time.
pub fn equals_sequential_with(program: &Program, jitter: Option<u64>) {
    let schedule: &Schedule = program.schedule();
    let placement = schedule.placement();
    let (ranks, stages) = (placement.ranks(), placement.stages() / placement.copies());
    let mut expected = zeros(0);
    let mut copies: Vec<Toy> = Vec::new();
    for copy in 0..placement.copies() {
        let own = sequential(stages, schedule.microbatches_of(copy * stages), schedule.pass());
        expected.losses.extend(own.losses);
        expected.grads.extend(own.grads);
        copies.extend(toys(stages).into_iter().map(|toy| Toy {
            stage: toy.stage + (copy * stages) as usize,
            jitter,
            ..toy
        }));
    }
    for channels in [rendezvous(ranks, DEADLINE), buffered(ranks, DEADLINE)] {
        let outcomes = match jitter {
            None => run(program, &copies, channels),
            Some(seed) => {
                let delayed =
                    |(rank, channels): (u64, _)| Delayed { channels, draws: Draws(seed ^ rank << 48) };
                run(program, &copies, (0_u64..).zip(channels).map(delayed).collect())
            }
        };
        let sums = gather(program, outcomes);
        assert_eq!(sums, expected);
        let bits = |sums: &Sums| sums.losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&sums), bits(&expected));
    }
}

/// Numbers for drawing schedules (SplitMix64).
pub struct Draws(pub u64);

impl Draws {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// A published schedule of so many ranks, stages per rank and micro-batches, or of somewhat more where it is not defined for them; in
/// groups of all micro-batches, of as many as there are ranks, or of one more.
pub fn draw_named(named: Named, p: u32, v: u32, m: u32, draws: &mut Draws) -> Schedule {
    let even = p.next_multiple_of(2);
    let (ranks, microbatches, group) = match (named, draws.below(3)) {
        (Named::DualPipe, _) => (even, 2 * even + m.next_multiple_of(2), None),
        (Named::DualPipeV, _) => (p, 2 * p + m, None),
        (_, 0) => (p, m, Some(m)),
        (_, 1) if named.has_groups() => (p, m.next_multiple_of(p), Some(p)),
        // The last group has a micro-batch fewer.
        (_, 2) if named.has_groups() => (p, m.next_multiple_of(p + 1) + p, Some(p + 1)),
        _ => (p, m, None),
    };
    let virtual_stages = named.virtual_stages().unwrap_or(v);
    named.generate(Sizes { ranks, virtual_stages, microbatches, group }).unwrap()
}

/// A compute schedule drawn at random from all that can run: any placement, any interleaving of micro-batches, stages and
/// ranks that respects the data, `B` on some stages and `I`, `W` on others, some neighbouring `F` and `B` in an overlap.
pub fn draw_schedule(ranks: u32, extra_stages: u32, microbatches: u32, draws: &mut Draws) -> Schedule {
    let stages = ranks + extra_stages;
    let mut rank_of: Vec<u32> =
        (0..stages).map(|s| if s < ranks { s } else { draws.below(ranks as usize) as u32 }).collect();
    for i in (1..rank_of.len()).rev() {
        rank_of.swap(i, draws.below(i + 1));
    }
    let split: Vec<bool> = (0..stages).map(|_| draws.below(2) == 0).collect();
    let mut lists = vec![Vec::new(); ranks as usize];
    // Per stage: forward, input-gradient and weight-gradient passes done.
    let mut done = vec![[0; 3]; stages as usize];
    let mut last: Option<(u32, Action)> = None;
    loop {
        let mut ready = Vec::new();
        for s in 0..stages as usize {
            let [f, i, w] = done[s];
            if f < microbatches && (s == 0 || done[s - 1][0] > f) {
                ready.push((s, Kind::Forward, f));
            }
            if i < f && (s + 1 == stages as usize || done[s + 1][1] > i) {
                ready.push((s, if split[s] { Kind::BackwardInput } else { Kind::Backward }, i));
            }
            if split[s] && w < i {
                ready.push((s, Kind::BackwardWeight, w));
            }
        }
        if ready.is_empty() {
            return Schedule::new(
                Placement::new(rank_of).unwrap(),
                microbatches,
                Pass::ForwardBackward,
                lists,
            )
            .unwrap();
        }
        let (s, kind, m) = ready[draws.below(ready.len())];
        match kind {
            Kind::Forward => done[s][0] += 1,
            Kind::BackwardInput => done[s][1] += 1,
            Kind::BackwardWeight => done[s][2] += 1,
            _ => {
                done[s][1] += 1;
                done[s][2] += 1;
            }
        }
        let action = Action::new(s as u32, kind, m);
        let list = &mut lists[rank_of[s] as usize];
        match last {
            // Two that were drawn one after the other do not wait for each other by way of other ranks either.
            Some((rank, f)) if rank == rank_of[s] && weaves(f, action) && draws.below(2) == 0 => {
                list.pop();
                list.push(Action::overlap((f.stage, f.microbatch), (action.stage, m)));
                last = None;
            }
            _ => {
                list.push(action);
                last = Some((rank_of[s], action));
            }
        }
    }
}

/// Whether they are the parts of a legal overlap.
fn weaves(f: Action, b: Action) -> bool {
    (f.kind, b.kind) == (Kind::Forward, Kind::Backward) && (f.stage, f.microbatch) != (b.stage, b.microbatch)
}

/// The lists of a schedule, to be changed.
pub fn lists(schedule: &Schedule) -> Vec<Vec<Action>> {
    (0..schedule.placement().ranks()).map(|rank| schedule.list(rank).to_vec()).collect()
}

/// The same schedule with other lists, through all checks.
pub fn revalidate(schedule: &Schedule, lists: Vec<Vec<Action>>) -> Result<Program, Error> {
    let placement = schedule.placement().clone();
    validate(Schedule::new(placement, schedule.microbatches(), schedule.pass(), lists)?, None)
}
