//! The layer on one rank: every token visits its experts in turn. Nothing of the crate under test is used.

use moe_dispatch::capacity::DropPolicy;
use moe_kernels::family::ScoreFunction;

use super::{Outcome, Problem};

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A token's scores.
pub struct Scored {
    /// The softmax, or each sigmoid's share.
    pub probs: Vec<f64>,
    /// The softmax, or the sigmoids.
    pub scores: Vec<f64>,
    pub softmax: Vec<f64>,
    pub lse: f64,
    pub chosen: Vec<usize>,
    pub weights: Vec<f64>,
    /// By how much the last chosen logit exceeds the best that was not.
    pub margin: f64,
}

pub fn score(logits: &[f64], top_k: usize, function: ScoreFunction) -> Scored {
    let largest = logits.iter().copied().fold(f64::MIN, f64::max);
    let lse = largest + logits.iter().map(|l| (l - largest).exp()).sum::<f64>().ln();
    let softmax: Vec<f64> = logits.iter().map(|l| (l - lse).exp()).collect();
    let scores: Vec<f64> = match function {
        ScoreFunction::Sigmoid { .. } => logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect(),
        _ => softmax.clone(),
    };
    let all: f64 = scores.iter().sum();
    let probs: Vec<f64> = scores.iter().map(|s| s / all).collect();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let margin = order.get(top_k).map_or(f64::MAX, |&next| logits[order[top_k - 1]] - logits[next]);
    let chosen = order[..top_k].to_vec();
    let sum: f64 = chosen.iter().map(|&e| scores[e]).sum();
    // A softmax over the chosen logits is the softmax over all, divided by the sum of the chosen.
    let sum = if normalizes(function) { sum } else { 1.0 };
    let weights = chosen.iter().map(|&e| scores[e] / sum).collect();
    Scored { probs, scores, softmax, lse, chosen, weights, margin }
}

fn normalizes(function: ScoreFunction) -> bool {
    match function {
        ScoreFunction::SoftmaxPost => true,
        ScoreFunction::SoftmaxPre { normalize } | ScoreFunction::Sigmoid { normalize } => normalize,
        // The enum may grow in its crate; a new function needs its formula here.
        other => panic!("no reference for {other:?}"),
    }
}

/// The gradient by the logits, given those by the weights and by all probabilities, and the factor of `lse²`.
fn score_backward(s: &Scored, function: ScoreFunction, dweights: &[f64], aux: &[f64], z: f64) -> Vec<f64> {
    // By the scores: of their shares, and of the weights of the chosen.
    let all: f64 = s.scores.iter().sum();
    let mean = dot(aux, &s.probs);
    let mut dscores: Vec<f64> = aux.iter().map(|a| (a - mean) / all).collect();
    let sum: f64 = s.chosen.iter().map(|&e| s.scores[e]).sum();
    let mean = dot(dweights, &s.weights);
    for (&e, dw) in s.chosen.iter().zip(dweights) {
        dscores[e] += if normalizes(function) { (dw - mean) / sum } else { *dw };
    }
    let mean = dot(&dscores, &s.scores);
    let lse = s.lse;
    let by_logit = |((&s, &d), &softmax): ((&f64, &f64), &f64)| {
        let through = match function {
            ScoreFunction::Sigmoid { .. } => s * (1.0 - s) * d,
            _ => s * (d - mean),
        };
        through + z * 2.0 * lse * softmax
    };
    s.scores.iter().zip(&dscores).zip(&s.softmax).map(by_logit).collect()
}

impl Problem {
    pub fn scores(&self) -> Vec<Scored> {
        let (x, router) = (self.x(), self.router());
        let logits = |x: &[f64]| -> Vec<f64> { router.chunks(self.hidden).map(|w| dot(w, x)).collect() };
        x.chunks(self.hidden).map(|x| score(&logits(x), self.top_k, self.score)).collect()
    }

    /// The smallest margin of any token: below the rounding of a type, its routing may differ.
    pub fn margin(&self) -> f64 {
        self.scores().iter().map(|s| s.margin).fold(f64::MAX, f64::min)
    }

    /// Whether each choice of each token is kept.
    fn kept(&self, scores: &[Scored]) -> Vec<Vec<bool>> {
        let mut kept = vec![vec![true; self.top_k]; self.tokens()];
        let Some((factor, policy)) = self.capacity else { return kept };
        for unit in 0..self.num_units {
            let tokens = self.in_order(unit);
            let mean = factor * (tokens.len() * self.top_k) as f64 / self.num_experts as f64;
            let capacity = tokens.len().min(1.max((mean * (1.0 - 1e-9)).ceil() as usize));
            for e in 0..self.num_experts {
                let choice = |&i: &usize| Some((i, scores[i].chosen.iter().position(|&c| c == e)?));
                let mut rivals: Vec<(usize, usize)> = tokens.iter().filter_map(choice).collect();
                if policy == DropPolicy::Probs {
                    rivals.sort_by(|a, b| scores[b.0].weights[b.1].total_cmp(&scores[a.0].weights[a.1]));
                }
                rivals.iter().skip(capacity).for_each(|&(i, k)| kept[i][k] = false);
            }
        }
        kept
    }

    pub fn solve(&self) -> Outcome {
        let &Problem { hidden, intermediate, num_experts, top_k, num_units, .. } = self;
        let (x, dy, router, gate_up, down) =
            (self.x(), self.dy(), self.router(), self.gate_up(), self.down());
        let scores = self.scores();
        let kept = self.kept(&scores);
        let mut out = Outcome {
            y: vec![0.0; x.len()],
            dx: vec![0.0; x.len()],
            drouter: vec![0.0; router.len()],
            dgate_up: vec![0.0; gate_up.len()],
            ddown: vec![0.0; down.len()],
            aux_loss: 0.0,
            z_loss: scores.iter().map(|s| s.lse * s.lse).sum::<f64>() / self.tokens().max(1) as f64,
            expert_counts: vec![0; num_experts],
            dropped: kept.iter().flatten().filter(|kept| !**kept).count() as u64,
        };

        // Load-balancing loss of each micro-batch, and its derivative by a token's probabilities.
        let mut aux = vec![vec![0.0; num_experts]; num_units];
        for (unit, aux) in aux.iter_mut().enumerate() {
            let of_unit: Vec<&Scored> =
                scores.iter().zip(&self.units).filter(|&(_, &u)| u == unit).map(|(s, _)| s).collect();
            for (e, aux) in aux.iter_mut().enumerate() {
                let count = of_unit.iter().filter(|s| s.chosen.contains(&e)).count();
                let prob: f64 = of_unit.iter().map(|s| s.probs[e]).sum();
                out.expert_counts[e] += count as i64;
                if !of_unit.is_empty() {
                    let factor = num_experts as f64
                        / (num_units as f64 * top_k as f64 * (of_unit.len() * of_unit.len()) as f64);
                    out.aux_loss += factor * count as f64 * prob;
                    *aux = self.aux_loss_coef * factor * count as f64;
                }
            }
        }

        for (i, s) in scores.iter().enumerate() {
            let row = i * hidden..(i + 1) * hidden;
            let (x, dy) = (&x[row.clone()], &dy[row.clone()]);
            let mut dweights = vec![];
            for ((&e, &p), &kept) in s.chosen.iter().zip(&s.weights).zip(&kept[i]) {
                if !kept {
                    dweights.push(0.0);
                    continue;
                }
                let gate_up = &gate_up[e * 2 * intermediate * hidden..(e + 1) * 2 * intermediate * hidden];
                let dgate_up =
                    &mut out.dgate_up[e * 2 * intermediate * hidden..(e + 1) * 2 * intermediate * hidden];
                let down = &down[e * hidden * intermediate..(e + 1) * hidden * intermediate];
                let ddown = &mut out.ddown[e * hidden * intermediate..(e + 1) * hidden * intermediate];
                let mut dp = 0.0;
                for j in 0..intermediate {
                    let (g_row, u_row) = (j * hidden, (intermediate + j) * hidden);
                    let g = dot(&gate_up[g_row..g_row + hidden], x);
                    let u = dot(&gate_up[u_row..u_row + hidden], x);
                    let sigmoid = 1.0 / (1.0 + (-g).exp());
                    let act = g * sigmoid * u;
                    let mut dact = 0.0; // by act · p
                    for h in 0..hidden {
                        out.y[row.start + h] += down[h * intermediate + j] * act * p;
                        dact += down[h * intermediate + j] * dy[h];
                        ddown[h * intermediate + j] += dy[h] * act * p;
                    }
                    dp += dact * act;
                    let dg = dact * p * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
                    let du = dact * p * g * sigmoid;
                    for h in 0..hidden {
                        out.dx[row.start + h] += dg * gate_up[g_row + h] + du * gate_up[u_row + h];
                        dgate_up[g_row + h] += dg * x[h];
                        dgate_up[u_row + h] += du * x[h];
                    }
                }
                dweights.push(dp);
            }
            let z = self.z_loss_coef / self.tokens() as f64;
            let dlogits = score_backward(s, self.score, &dweights, &aux[self.units[i]], z);
            for (e, dl) in dlogits.iter().enumerate() {
                for h in 0..hidden {
                    out.dx[row.start + h] += dl * router[e * hidden + h];
                    out.drouter[e * hidden + h] += dl * x[h];
                }
            }
        }
        out
    }
}
