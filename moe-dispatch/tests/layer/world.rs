//! The layer over a folded world of threads.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use moe_comm::{Comms, Reduction, ThreadRank, ThreadWorld};
use moe_dispatch::capacity::{Spread, drop_excess, expert_capacity};
use moe_dispatch::{
    DispatchState, Dispatcher, DispatcherKind, Error, Grid, ModelUnit, NativeFabric, Router, RouterConfig,
    RouterInput, RouterScales, RouterSums, TokenDispatcher,
};
use moe_kernels::family::{Activation, DropLimit, GateFunction, GroupedGemm, Op};
use moe_kernels::{Backend, Cpu, Float, Tensor};
use moe_topology::{Attention, Expert, Folding};

use super::{Outcome, Problem};

/// What one rank computed.
struct Part {
    tokens: Range<usize>,
    grid: Grid,
    y: Vec<f64>,
    dx: Vec<f64>,
    drouter: Vec<f64>,
    /// `[local E, 2I/etp, H]`.
    dgate_up: Vec<f64>,
    /// `[local E, H, I/etp]`.
    ddown: Vec<f64>,
    aux_loss: f64,
    z_loss_sum: f64,
    expert_counts: Vec<i64>,
    dropped: u64,
}

/// Runs the layer; world rank `r` has the tokens `shares[r]`, all of one micro-batch per data-parallel rank.
pub fn run<T: Float>(
    problem: &Arc<Problem>,
    folding: &Folding,
    shares: &[Range<usize>],
    kind: DispatcherKind,
) -> Outcome
where
    Cpu: Backend<T>,
{
    let (shared, folding, shares) = (problem.clone(), folding.clone(), shares.to_vec());
    let world_size = folding.world_size();
    let rank = move |rank: ThreadRank| part::<T>(&shared, &folding, &shares, kind, &rank);
    let parts = ThreadWorld::run(world_size, Duration::from_secs(20), rank).expect("the world runs");
    join(problem, &parts)
}

/// An ETP rank's slice of every local expert: `gate_up: [2I, H]` by rows of each half, `down: [H, I]` by columns.
struct Shard<'a> {
    problem: &'a Problem,
    grid: Grid,
}

impl Shard<'_> {
    fn width(&self) -> usize {
        self.problem.intermediate / self.grid.etp_size()
    }

    fn experts(&self) -> Range<usize> {
        self.grid.local_experts(self.problem.num_experts).expect("EP divides the experts")
    }

    /// Where the elements of the local `[experts, 2·width, H]` stand in `[E, 2I, H]`.
    fn gate_up(&self) -> impl Iterator<Item = usize> {
        let (hidden, all, width) = (self.problem.hidden, self.problem.intermediate, self.width());
        let first = self.grid.etp_rank() * width;
        self.experts().flat_map(move |e| {
            (0..2 * width).flat_map(move |row| {
                let row = e * 2 * all + row / width * all + first + row % width;
                row * hidden..(row + 1) * hidden
            })
        })
    }

    /// Where the elements of the local `[experts, H, width]` stand in `[E, H, I]`.
    fn down(&self) -> impl Iterator<Item = usize> {
        let (hidden, all, width) = (self.problem.hidden, self.problem.intermediate, self.width());
        let first = self.grid.etp_rank() * width;
        self.experts().flat_map(move |e| {
            (0..hidden).flat_map(move |h| {
                let start = (e * hidden + h) * all + first;
                start..start + width
            })
        })
    }
}

fn part<T: Float>(
    p: &Problem,
    folding: &Folding,
    shares: &[Range<usize>],
    kind: DispatcherKind,
    rank: &ThreadRank,
) -> Result<Part, Error>
where
    Cpu: Backend<T>,
{
    let device = &Cpu::poisoned(1);
    let comms = Comms::<Cpu>::builder()
        .attention(Attention::TP | Attention::CP)
        .expert(Expert::EP)
        .expert(Expert::ETP)
        .expert(Expert::EP | Expert::ETP)
        .build(rank, device, folding)?;
    let me = moe_comm::World::<Cpu>::rank(rank);
    let grid = Grid::of(folding, me)?;
    let fabric = NativeFabric::<T, Cpu>::new(device, grid, &comms)?;
    let unit = comms.group(Attention::TP | Attention::CP)?;
    let dispatcher = TokenDispatcher { kind, num_experts: p.num_experts };

    let tokens = shares[me].clone();
    let (n, hidden) = (tokens.len(), p.hidden);
    let own = |all: Vec<f64>| {
        Tensor::<T, Cpu>::from_f64(device, n, hidden, &all[tokens.start * hidden..tokens.end * hidden])
    };
    let (x, dy) = (own(p.x())?, own(p.dy())?);
    let router_weight = Tensor::<T, Cpu>::from_f64(device, p.num_experts, hidden, &p.router())?;
    let shard = Shard { problem: p, grid };
    let (experts, width) = (shard.experts().len(), shard.width());
    let (all_gate_up, all_down) = (p.gate_up(), p.down());
    let local: Vec<f64> = shard.gate_up().map(|i| all_gate_up[i]).collect();
    let gate_up = Tensor::<T, Cpu>::from_f64(device, experts * 2 * width, hidden, &local)?;
    let local: Vec<f64> = shard.down().map(|i| all_down[i]).collect();
    let down = Tensor::<T, Cpu>::from_f64(device, experts * hidden, width, &local)?;

    // Forward.
    let router = Router::new(RouterConfig {
        num_experts: p.num_experts,
        top_k: p.top_k,
        scoring: p.score.into(),
        in_f64: false,
        aux_loss_coef: p.aux_loss_coef,
        sequence_aux_loss_coef: 0.0,
        global_aux_loss_coef: 0.0,
        model_aux_loss_coef: 0.0,
        z_loss_coef: p.z_loss_coef,
    })?;
    let mut sums = RouterSums::zeros(device, 1, p.num_experts)?;
    let input = RouterInput::new(&x, router_weight.view());
    let (routing, saved, _) = router
        .forward(device, input, Some(sums.of(0)?), |counts| Ok(unit.all_reduce(&counts, Reduction::Sum)?))?;
    let routing = match p.capacity {
        None => routing,
        Some((factor, policy)) => {
            let in_order = p.in_order(folding.coordinate(me, Attention::DP));
            let slot = |token| in_order.iter().position(|&t| t == token).expect("a token of the unit") as i32;
            let slots: Vec<i32> = tokens.clone().map(slot).collect();
            let slots = Tensor::from_slice(device, 1, n, &slots)?;
            let capacity = expert_capacity(factor, in_order.len(), p.top_k, p.num_experts)?;
            let limit = DropLimit { num_experts: p.num_experts, unit_slots: in_order.len().max(1), capacity };
            let counts: Vec<usize> = unit.ranks().iter().map(|&rank| shares[rank].len()).collect();
            let spread = (unit.size() > 1).then_some(Spread { group: unit, tokens: &counts });
            let mut sums = sums.of(0)?;
            let dropped = Some(sums.dropped()?);
            drop_excess::<T, Cpu>(device, routing, policy, &slots, limit, spread, dropped)?
        }
    };
    let (batch, state) = dispatcher.dispatch(&fabric, &x, &routing)?;
    assert_eq!(state.rows(), batch.rows);
    let (rows, offsets) = (batch.rows, batch.offsets.view());
    let mut pre = Tensor::uninit(device, rows, 2 * width)?;
    device.grouped_gemm(pre.view_mut()?, batch.x.view(), gate_up.view(), Op::T, offsets)?;
    let mut act = Tensor::uninit(device, rows, width)?;
    Activation::<T>::glu(device, act.view_mut()?, pre.view(), Some(batch.probs.view()), GateFunction::Silu)?;
    let mut out = Tensor::uninit(device, rows, hidden)?;
    device.grouped_gemm(out.view_mut()?, act.view(), down.view(), Op::T, offsets)?;
    let y = dispatcher.combine(&fabric, out, &state)?;

    // Backward.
    let dout = dispatcher.combine_backward(&fabric, &dy, &state)?;
    let mut ddown = Tensor::<T::Acc, Cpu>::zeros(device, experts * hidden, width)?;
    GroupedGemm::<T>::grouped_gemm_acc(device, ddown.view_mut()?, dout.view(), act.view(), offsets)?;
    let mut dact = Tensor::uninit(device, rows, width)?;
    device.grouped_gemm(dact.view_mut()?, dout.view(), down.view(), Op::N, offsets)?;
    let mut dpre = Tensor::uninit(device, rows, 2 * width)?;
    let mut dprobs = Tensor::uninit(device, 1, rows)?;
    Activation::<T>::glu_backward(
        device,
        dpre.view_mut()?,
        Some(dprobs.view_mut()?),
        dact.view(),
        pre.view(),
        Some(batch.probs.view()),
        GateFunction::Silu,
    )?;
    let mut dgate_up = Tensor::<T::Acc, Cpu>::zeros(device, experts * 2 * width, hidden)?;
    GroupedGemm::<T>::grouped_gemm_acc(device, dgate_up.view_mut()?, dpre.view(), batch.x.view(), offsets)?;
    let mut dx_rows = Tensor::uninit(device, rows, hidden)?;
    device.grouped_gemm(dx_rows.view_mut()?, dpre.view(), gate_up.view(), Op::N, offsets)?;
    let (mut dx, dweights) = dispatcher.dispatch_backward(&fabric, dx_rows, dprobs, &state)?;
    let mut drouter = Tensor::<T::Acc, Cpu>::zeros(device, p.num_experts, hidden)?;
    let (micro_batches, valid_tokens) = (p.num_units as u64, p.tokens() as u64);
    let scales = RouterScales {
        micro_batches,
        sequences: micro_batches,
        valid_tokens,
        step_counts: None,
        model_counts: None,
        model_unit: ModelUnit::MicroBatch,
        moe_layers: 1,
    };
    let input = RouterInput::new(&x, router_weight.view());
    router.backward(device, input, &dweights, saved, dx.view_mut()?, drouter.view_mut()?, scales)?;
    let stats = sums.read(device)?.remove(0);

    Ok(Part {
        tokens,
        grid,
        y: y.to_f64(device)?,
        dx: dx.to_f64(device)?,
        drouter: drouter.to_f64(device)?,
        dgate_up: dgate_up.to_f64(device)?,
        ddown: ddown.to_f64(device)?,
        aux_loss: stats.aux_loss,
        z_loss_sum: stats.z_loss_sum,
        expert_counts: stats.expert_counts,
        dropped: stats.dropped,
    })
}

/// Sums what is partial over ranks, and puts the rest in its place.
fn join(p: &Problem, parts: &[Part]) -> Outcome {
    let mut out = Outcome {
        y: vec![f64::NAN; p.tokens() * p.hidden],
        dx: vec![f64::NAN; p.tokens() * p.hidden],
        drouter: vec![0.0; p.num_experts * p.hidden],
        dgate_up: vec![0.0; p.num_experts * 2 * p.intermediate * p.hidden],
        ddown: vec![0.0; p.num_experts * p.hidden * p.intermediate],
        aux_loss: parts.iter().map(|part| part.aux_loss).sum::<f64>() / p.num_units as f64,
        z_loss: parts.iter().map(|part| part.z_loss_sum).sum::<f64>() / p.tokens().max(1) as f64,
        expert_counts: vec![0; p.num_experts],
        dropped: parts.iter().map(|part| part.dropped).sum(),
    };
    for part in parts {
        let rows = part.tokens.start * p.hidden..part.tokens.end * p.hidden;
        out.y[rows.clone()].copy_from_slice(&part.y);
        out.dx[rows].copy_from_slice(&part.dx);
        out.drouter.iter_mut().zip(&part.drouter).for_each(|(sum, g)| *sum += g);
        out.expert_counts.iter_mut().zip(&part.expert_counts).for_each(|(sum, n)| *sum += n);
        let shard = Shard { problem: p, grid: part.grid };
        shard.gate_up().zip(&part.dgate_up).for_each(|(i, g)| out.dgate_up[i] += g);
        shard.down().zip(&part.ddown).for_each(|(i, g)| out.ddown[i] += g);
    }
    out
}
