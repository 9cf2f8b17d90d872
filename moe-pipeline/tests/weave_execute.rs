//! Woven passes on real threads: a grid of pipeline ranks × expert ranks, whose all-to-alls are channels.

mod common;

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};

use common::{Boom, DEADLINE};
use moe_pipeline::generate::{dual_pipe_v, one_f_one_b, overlapped_1f1b};
use moe_pipeline::transport::rendezvous;
use moe_pipeline::weave::{LayerCost, Node, Order, Part, Phase, Step, Task, run, weave};
use moe_pipeline::{Program, Schedule, Stage, StageCost, execute, lower, validate};

const EXPERT_RANKS: usize = 3;
/// Tokens of a rank, numbers here; token t of layer l goes to expert rank (t + l) mod 3.
const TOKENS: usize = 6;

/// One all-to-all among all: of a micro-batch, a stage, and a node of its pass.
type Tag = (u32, u32, Node);

/// An expert rank's end of the all-to-alls of its group.
struct Group {
    to: Vec<Sender<(Tag, Vec<f64>)>>,
    from: Vec<Receiver<(Tag, Vec<f64>)>>,
    /// Arrived, not yet waited for.
    arrived: Vec<VecDeque<(Tag, Vec<f64>)>>,
}

/// A started all-to-all.
struct Flight(Tag);

impl Group {
    fn groups() -> Vec<Group> {
        let mut to: Vec<Vec<_>> = (0..EXPERT_RANKS).map(|_| Vec::new()).collect();
        let mut from: Vec<Vec<_>> = (0..EXPERT_RANKS).map(|_| Vec::new()).collect();
        for inboxes in &mut from {
            for outboxes in &mut to {
                let (outbox, inbox) = channel();
                outboxes.push(outbox);
                inboxes.push(inbox);
            }
        }
        let group = |(to, from)| Group { to, from, arrived: vec![VecDeque::new(); EXPERT_RANKS] };
        to.into_iter().zip(from).map(group).collect()
    }

    /// Sends a part to each rank; never blocks.
    fn start(&self, tag: Tag, parts: Vec<Vec<f64>>) -> Flight {
        for (to, part) in self.to.iter().zip(parts) {
            to.send((tag, part)).unwrap();
        }
        Flight(tag)
    }

    /// Blocks until all parts of `tag` are here, if they are to be taken or not.
    fn arrive(&mut self, tag: Tag) {
        for (from, arrived) in self.from.iter().zip(&mut self.arrived) {
            while arrived.iter().all(|(other, _)| *other != tag) {
                arrived.push_back(from.recv_timeout(DEADLINE).expect("a peer has started it"));
            }
        }
    }

    fn wait(&mut self, Flight(tag): Flight) -> Vec<Vec<f64>> {
        self.arrive(tag);
        let take = |arrived: &mut VecDeque<(Tag, Vec<f64>)>| {
            let at = arrived.iter().position(|(other, _)| *other == tag).unwrap();
            arrived.remove(at).unwrap().1
        };
        self.arrived.iter_mut().map(take).collect()
    }
}

/// A rank's context.
struct Cx {
    group: Group,
    rank: usize,
    loss: f64,
    grads: HashMap<(u32, u32), Grads>,
    /// What was done in which order.
    log: Vec<(u32, Step)>,
    under_way: Vec<Tag>,
    /// All-to-alls that were complete on all ranks' side while this rank computed.
    hidden: usize,
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Grads {
    attention: [f64; TOKENS],
    expert: f64,
}

/// `a = tanh(w x)`, `y = x + combine(expert(dispatch(a)))`, `expert(r) = sin(v r)`, layer by layer.
#[derive(Debug, Clone)]
struct Moe {
    stage: u32,
    stages: u32,
    layers: u32,
    woven: bool,
}

struct Kept {
    x: Vec<f64>,
    a: Vec<f64>,
    rows: Vec<f64>,
}

/// What a weight gradient needs: inputs and gradients of the outputs.
type PendingWgrad = (Vec<f64>, Vec<f64>);

impl Moe {
    fn attention_weight(&self, layer: u32, token: usize) -> f64 {
        0.4 + 0.07 * f64::from(self.stage) - 0.05 * f64::from(layer) + 0.11 * token as f64
    }

    fn expert_weight(&self, layer: u32, rank: usize) -> f64 {
        0.9 - 0.06 * f64::from(self.stage) + 0.04 * f64::from(layer) - 0.13 * rank as f64
    }

    /// A number per token, for the ranks that its layer's tokens go to.
    fn to_experts(layer: u32, tokens: &[f64]) -> Vec<Vec<f64>> {
        let of = |rank: usize| (0..TOKENS).filter(move |t| (t + layer as usize) % EXPERT_RANKS == rank);
        (0..EXPERT_RANKS).map(|rank| of(rank).map(|t| tokens[t]).collect()).collect()
    }

    fn from_experts(layer: u32, parts: &[Vec<f64>]) -> Vec<f64> {
        let mut parts: Vec<_> = parts.iter().map(|part| part.iter()).collect();
        (0..TOKENS).map(|t| *parts[(t + layer as usize) % EXPERT_RANKS].next().unwrap()).collect()
    }

    fn to_tokens(rows: &[f64]) -> Vec<Vec<f64>> {
        rows.chunks(TOKENS / EXPERT_RANKS).map(<[f64]>::to_vec).collect()
    }

    fn input(&self, m: u32, x: Option<Vec<f64>>, cx: &Cx) -> Vec<f64> {
        let data = |t: usize| (f64::from(m) * 0.73 + t as f64 * 1.19 + cx.rank as f64).sin();
        x.unwrap_or_else(|| (0..TOKENS).map(data).collect())
    }

    /// The last stage's loss is Σ y² / 2, so that y is its own gradient.
    fn output(&self, y: Vec<f64>, cx: &mut Cx) -> (Option<Vec<f64>>, Option<Vec<f64>>) {
        if self.stage + 1 < self.stages {
            return (Some(y), None);
        }
        cx.loss += y.iter().map(|y| y * y / 2.0).sum::<f64>();
        (None, Some(y))
    }

    fn attend(&self, layer: u32, x: &[f64]) -> Vec<f64> {
        (0..TOKENS).map(|t| (self.attention_weight(layer, t) * x[t]).tanh()).collect()
    }

    fn expert(&self, layer: u32, rows: &[f64], cx: &Cx) -> Vec<f64> {
        rows.iter().map(|row| (self.expert_weight(layer, cx.rank) * row).sin()).collect()
    }

    /// Gradient of v·row from that of sin(v·row).
    fn expert_input(&self, layer: u32, rows: &[f64], dy: &[f64], cx: &Cx) -> Vec<f64> {
        let v = self.expert_weight(layer, cx.rank);
        rows.iter().zip(dy).map(|(row, dy)| dy * (v * row).cos()).collect()
    }

    fn expert_grad(&self, layer: u32, (rows, dz): &PendingWgrad, cx: &mut Cx) {
        let grads = cx.grads.entry((self.stage, layer)).or_default();
        grads.expert += rows.iter().zip(dz).map(|(row, dz)| row * dz).sum::<f64>();
    }

    fn attention_grad(&self, layer: u32, (x, dz): &PendingWgrad, cx: &mut Cx) {
        let grads = cx.grads.entry((self.stage, layer)).or_default();
        grads.attention.iter_mut().zip(x.iter().zip(dz)).for_each(|(g, (x, dz))| *g += x * dz);
    }

    /// An all-to-all that is waited for at once.
    fn exchange(&self, tag: Tag, parts: Vec<Vec<f64>>, cx: &mut Cx) -> Vec<Vec<f64>> {
        cx.log.extend([(tag.0, Step::Start(tag.2)), (tag.0, Step::Wait(tag.2))]);
        let flight = cx.group.start(tag, parts);
        cx.group.wait(flight)
    }
}

type Saved = (Vec<Kept>, Option<Vec<f64>>);

impl Stage for Moe {
    type Cx = Cx;
    type Act = Vec<f64>;
    type Saved = Saved;
    type Deferred = Vec<(u32, PendingWgrad, PendingWgrad)>;
    type Error = Boom;

    fn forward(&self, m: u32, x: Option<Vec<f64>>, cx: &mut Cx) -> Result<(Option<Vec<f64>>, Saved), Boom> {
        let mut x = self.input(m, x, cx);
        let mut kept = Vec::new();
        for layer in 0..self.layers {
            let tag = |part| (m, self.stage, Node::new(layer, Phase::Forward, part));
            let a = self.attend(layer, &x);
            let rows = self.exchange(tag(Part::Dispatch), Moe::to_experts(layer, &a), cx).concat();
            let made = self.expert(layer, &rows, cx);
            let parts = self.exchange(tag(Part::Combine), Moe::to_tokens(&made), cx);
            let y = x.iter().zip(Moe::from_experts(layer, &parts)).map(|(x, c)| x + c).collect();
            kept.push(Kept { x: std::mem::replace(&mut x, y), a, rows });
        }
        let (y, own) = self.output(x, cx);
        Ok((y, (kept, own)))
    }

    fn backward_input(
        &self,
        m: u32,
        dy: Option<Vec<f64>>,
        (kept, own): Saved,
        cx: &mut Cx,
    ) -> Result<(Option<Vec<f64>>, Self::Deferred), Boom> {
        let mut dy = dy.or(own).unwrap();
        let mut deferred = Vec::new();
        for (layer, Kept { x, a, rows }) in (0..self.layers).zip(kept).rev() {
            let tag = |part| (m, self.stage, Node::new(layer, Phase::InputGradient, part));
            let d_made = self.exchange(tag(Part::Combine), Moe::to_experts(layer, &dy), cx).concat();
            let dz = self.expert_input(layer, &rows, &d_made, cx);
            let v = self.expert_weight(layer, cx.rank);
            let d_rows: Vec<f64> = dz.iter().map(|dz| v * dz).collect();
            let parts = self.exchange(tag(Part::Dispatch), Moe::to_tokens(&d_rows), cx);
            let d_a = Moe::from_experts(layer, &parts);
            let d_wx: Vec<f64> = a.iter().zip(d_a).map(|(a, d)| d * (1.0 - a * a)).collect();
            for (t, dy) in dy.iter_mut().enumerate() {
                *dy += self.attention_weight(layer, t) * d_wx[t];
            }
            deferred.push((layer, (rows, dz), (x, d_wx)));
        }
        Ok(((self.stage > 0).then_some(dy), deferred))
    }

    fn backward_weight(&self, _: u32, deferred: Self::Deferred, cx: &mut Cx) -> Result<(), Boom> {
        for (layer, expert, attention) in deferred {
            self.expert_grad(layer, &expert, cx);
            self.attention_grad(layer, &attention, cx);
        }
        Ok(())
    }

    fn overlap(
        &self,
        (m, x): (u32, Option<Vec<f64>>),
        back: &Self,
        (k, dy, saved): (u32, Option<Vec<f64>>, Saved),
        cx: &mut Cx,
    ) -> Result<((Option<Vec<f64>>, Saved), Option<Vec<f64>>), Boom> {
        if !self.woven {
            let made = self.forward(m, x, cx)?;
            return Ok((made, back.backward(k, dy, saved, cx)?));
        }
        let x = self.input(m, x, cx);
        let forward = ForwardTask { stage: self, m, x, now: Vec::new(), kept: Vec::new(), flight: None };
        let dy = dy.or(saved.1).unwrap();
        let pending = HashMap::new();
        let backward =
            BackwardTask { stage: back, m: k, dy, now: Vec::new(), kept: saved.0, pending, flight: None };
        run(&order(self.layers, back.layers), forward, backward, cx)
    }
}

fn order(forward: u32, backward: u32) -> Order {
    let one = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
    let layers = |n| vec![LayerCost::Moe { attention: one, experts: one, all_to_all: 1.0 }; n as usize];
    weave(&layers(forward), &layers(backward)).unwrap()
}

/// What steps of both passes do first. A compute step beside an all-to-all does not go on before that has arrived from all ranks: it
/// can only if all have started it, though none has waited for it.
fn begin(m: u32, stage: u32, step: Step, cx: &mut Cx) {
    cx.log.push((m, step));
    match step {
        Step::Start(node) => cx.under_way.push((m, stage, node)),
        Step::Wait(node) => cx.under_way.retain(|tag| *tag != (m, stage, node)),
        Step::Compute(_) => {
            for tag in std::mem::take(&mut cx.under_way) {
                cx.group.arrive(tag);
                cx.hidden += 1;
            }
        }
    }
}

/// A forward pass in steps.
struct ForwardTask<'a> {
    stage: &'a Moe,
    m: u32,
    x: Vec<f64>,
    /// Rows of the experts, or what they made.
    now: Vec<f64>,
    kept: Vec<Kept>,
    flight: Option<Flight>,
}

impl Task for ForwardTask<'_> {
    type Cx = Cx;
    type Out = (Option<Vec<f64>>, Saved);
    type Error = Boom;

    fn step(&mut self, step: Step, cx: &mut Cx) -> Result<(), Boom> {
        begin(self.m, self.stage.stage, step, cx);
        let node = step.node();
        let (layer, tag) = (node.layer, (self.m, self.stage.stage, node));
        match (step, node.part) {
            (Step::Compute(_), Part::Attention) => {
                let (x, a) = (self.x.clone(), self.stage.attend(layer, &self.x));
                self.kept.push(Kept { x, a, rows: Vec::new() });
            }
            (Step::Compute(_), _) => {
                let rows = std::mem::take(&mut self.now);
                self.now = self.stage.expert(layer, &rows, cx);
                self.kept[layer as usize].rows = rows;
            }
            (Step::Start(_), Part::Dispatch) => {
                let parts = Moe::to_experts(layer, &self.kept[layer as usize].a);
                self.flight = Some(cx.group.start(tag, parts));
            }
            (Step::Start(_), _) => self.flight = Some(cx.group.start(tag, Moe::to_tokens(&self.now))),
            (Step::Wait(_), part) => {
                let parts = cx.group.wait(self.flight.take().unwrap());
                match part {
                    Part::Dispatch => self.now = parts.concat(),
                    _ => {
                        let combined = Moe::from_experts(layer, &parts);
                        self.x.iter_mut().zip(combined).for_each(|(x, c)| *x += c);
                    }
                }
            }
        }
        Ok(())
    }

    fn finish(self, cx: &mut Cx) -> Result<Self::Out, Boom> {
        let (y, own) = self.stage.output(self.x, cx);
        Ok((y, (self.kept, own)))
    }
}

/// A backward pass in steps.
struct BackwardTask<'a> {
    stage: &'a Moe,
    m: u32,
    dy: Vec<f64>,
    now: Vec<f64>,
    kept: Vec<Kept>,
    pending: HashMap<(u32, Part), PendingWgrad>,
    flight: Option<Flight>,
}

impl Task for BackwardTask<'_> {
    type Cx = Cx;
    type Out = Option<Vec<f64>>;
    type Error = Boom;

    fn step(&mut self, step: Step, cx: &mut Cx) -> Result<(), Boom> {
        begin(self.m, self.stage.stage, step, cx);
        let (stage, node) = (self.stage, step.node());
        let (layer, tag) = (node.layer, (self.m, stage.stage, node));
        if node.phase == Phase::WeightGradient {
            let pending = self.pending.remove(&(layer, node.part)).unwrap();
            match node.part {
                Part::Experts => stage.expert_grad(layer, &pending, cx),
                _ => stage.attention_grad(layer, &pending, cx),
            }
            return Ok(());
        }
        match (step, node.part) {
            (Step::Start(_), Part::Combine) => {
                self.flight = Some(cx.group.start(tag, Moe::to_experts(layer, &self.dy)));
            }
            (Step::Start(_), _) => self.flight = Some(cx.group.start(tag, Moe::to_tokens(&self.now))),
            (Step::Wait(_), part) => {
                let parts = cx.group.wait(self.flight.take().unwrap());
                self.now = match part {
                    Part::Combine => parts.concat(),
                    _ => Moe::from_experts(layer, &parts),
                };
            }
            (Step::Compute(_), Part::Experts) => {
                let rows = self.kept[layer as usize].rows.clone();
                let dz = stage.expert_input(layer, &rows, &self.now, cx);
                let v = stage.expert_weight(layer, cx.rank);
                self.now = dz.iter().map(|dz| v * dz).collect();
                self.pending.insert((layer, Part::Experts), (rows, dz));
            }
            (Step::Compute(_), _) => {
                let Kept { x, a, .. } = self.kept.pop().unwrap();
                let d_wx: Vec<f64> = a.iter().zip(&self.now).map(|(a, d)| d * (1.0 - a * a)).collect();
                for (t, dy) in self.dy.iter_mut().enumerate() {
                    *dy += stage.attention_weight(layer, t) * d_wx[t];
                }
                self.pending.insert((layer, Part::Attention), (x, d_wx));
            }
        }
        Ok(())
    }

    fn finish(self, _: &mut Cx) -> Result<Self::Out, Boom> {
        assert!(self.pending.is_empty());
        Ok((self.stage.stage > 0).then_some(self.dy))
    }
}

/// Runs every rank of the grid on a thread; contexts by pipeline rank and expert rank.
fn grid(schedule: &Schedule, layers: &[u32], woven: bool) -> Vec<Vec<Cx>> {
    let program: Program = validate(lower(schedule).unwrap(), None).unwrap();
    let placement = program.schedule().placement();
    let (ranks, stages) = (placement.ranks(), placement.stages());
    let mut groups: Vec<Vec<Group>> = (0..ranks).map(|_| Group::groups()).collect();
    std::thread::scope(|scope| {
        let mut threads: Vec<Vec<_>> = (0..ranks).map(|_| Vec::new()).collect();
        for expert_rank in (0..EXPERT_RANKS).rev() {
            for (rank, mut transport) in (0..).zip(rendezvous::<Vec<f64>>(ranks, DEADLINE)) {
                let group = groups[rank as usize].remove(expert_rank);
                let program = &program;
                let stage = |&stage: &u32| Moe { stage, stages, layers: layers[stage as usize], woven };
                let mine: Vec<Moe> = placement.stages_of(rank).iter().map(stage).collect();
                threads[rank as usize].insert(
                    0,
                    scope.spawn(move || {
                        let (grads, log, under_way) = (HashMap::new(), Vec::new(), Vec::new());
                        let mut cx =
                            Cx { group, rank: expert_rank, loss: 0.0, grads, log, under_way, hidden: 0 };
                        execute(program, rank, &mine, &mut transport, &mut cx).unwrap();
                        cx
                    }),
                );
            }
        }
        threads.into_iter().map(|row| row.into_iter().map(|cx| cx.join().unwrap()).collect()).collect()
    })
}

fn overlaps(schedule: &Schedule, rank: u32) -> usize {
    schedule.list(rank).iter().filter(|action| action.parts().count() == 2).count()
}

/// Losses and gradients of woven passes are those of passes one after the other and of 1F1B, bit for bit, over even and uneven
/// stages; all ranks of a group start the same all-to-alls in the same order; and they are started early.
#[test]
fn woven_passes_start_early_and_sum_alike() {
    let cases: [(Schedule, &[u32]); 4] = [
        (overlapped_1f1b(2, 1, 5, None).unwrap(), &[2, 2]),
        (overlapped_1f1b(3, 1, 7, None).unwrap(), &[1, 3, 2]),
        (overlapped_1f1b(2, 2, 4, None).unwrap(), &[2, 1, 0, 3]),
        (dual_pipe_v(2, 6).unwrap(), &[1, 2, 2, 1]),
    ];
    for (schedule, layers) in cases {
        let plain = one_f_one_b(layers.len() as u32, schedule.microbatches()).unwrap();
        let reference = grid(&plain, layers, false);
        let (serial, woven) = (grid(&schedule, layers, false), grid(&schedule, layers, true));
        for expert_rank in 0..EXPERT_RANKS {
            let sums = |grid: &[Vec<Cx>]| {
                let mut grads: Vec<_> = grid.iter().flat_map(|row| row[expert_rank].grads.clone()).collect();
                grads.sort_by_key(|(place, _)| *place);
                (grid.iter().map(|row| row[expert_rank].loss).sum::<f64>(), grads)
            };
            assert_eq!(sums(&woven), sums(&reference));
            assert_eq!(sums(&serial), sums(&reference));
        }
        for (rank, row) in (0..).zip(&woven) {
            assert!(row.iter().all(|cx| cx.log == row[0].log));
            let pairs = overlaps(&schedule, rank);
            assert!(pairs > 0);
            // Even layers hide every all-to-all.
            if layers.iter().all(|&n| n == 2) {
                assert_eq!(row[0].hidden, pairs * 4 * 2);
            }
            assert!(row.iter().all(|cx| cx.hidden == row[0].hidden));
            assert_eq!(serial[rank as usize][0].hidden, 0);
        }
    }
}

/// By the order of events: in each pair of equal layers, between the start of each all-to-all and its wait, the other pass
/// computes, or a weight gradient, which waits for neither.
#[test]
fn something_computes_between_start_and_wait() {
    let schedule = overlapped_1f1b(2, 1, 5, None).unwrap();
    let row = grid(&schedule, &[2, 2], true).remove(0);
    let log = &row[0].log;
    let position = |at: (u32, Step)| log.iter().position(|other| *other == at).unwrap();
    let pairs = schedule.list(0).iter().filter(|action| action.parts().count() == 2);
    for pair in pairs {
        let [f, b] = <[_; 2]>::try_from(pair.parts().collect::<Vec<_>>()).unwrap();
        let phases = [(f.microbatch, Phase::Forward), (b.microbatch, Phase::InputGradient)];
        let all = phases.into_iter().flat_map(|(m, phase)| {
            let of_layer = move |layer| {
                [Part::Dispatch, Part::Combine].map(move |part| (m, Node::new(layer, phase, part)))
            };
            (0..2).flat_map(of_layer)
        });
        let mut hidden = 0;
        for (m, node) in all {
            let between = &log[position((m, Step::Start(node)))..position((m, Step::Wait(node)))];
            let beside = |(other, step): &(u32, Step)| match step {
                Step::Compute(node) => *other != m || node.phase == Phase::WeightGradient,
                _ => false,
            };
            hidden += usize::from(between.iter().any(beside));
        }
        assert_eq!(hidden, 8, "{pair}");
    }
}
