//! Moments kept in bf16: the update is that of the accumulation type, what is kept of it is the nearest bf16, under any folding.

mod common;

use common::{Outcome, check, setup, tiny_model, train};
use moe_dispatch::DispatcherKind::{AllGather, AllToAll};
use moe_topology::{Attention, Mapping};
use moe_train::optim::{Hyper, MomentDType, MomentDTypes};
use moe_train::trainer::Setup;

fn moments(exp_avg: bool, exp_avg_sq: bool) -> MomentDTypes {
    let dtype = |bf16: bool| bf16.then_some(MomentDType::Bf16);
    MomentDTypes { exp_avg: dtype(exp_avg), exp_avg_sq: dtype(exp_avg_sq) }
}

fn keeping(moments: MomentDTypes, setup: Setup) -> Setup {
    Setup { global_batch_size: 8, optimizer: Hyper { moments, ..setup.optimizer }, ..setup }
}

/// Eight bits, ties to even.
fn nearest_bf16(x: f64) -> f64 {
    if x == 0.0 {
        return x;
    }
    let unit = 2f64.powi((x.abs().log2().floor() as i32).max(-126) - 7);
    (x / unit).round_ties_even() * unit
}

/// `got` is `x`, rounded if `bf16`, where `x` is known to rounding in f64.
fn assert_kept(got: f64, x: f64, bf16: bool, what: &str) {
    let kept = |x| if bf16 { nearest_bf16(x) } else { x };
    let slack = 1e-11 * x.abs() + 1e-30;
    let (low, high) = (kept(x - slack), kept(x + slack));
    assert!(low.min(high) <= got && got <= low.max(high), "{what}: {got:e} is not kept of {x:e}");
}

/// Two updates by the formula. The gradient of the first is that of a run which rounds nothing, and so is the first update;
/// that of the second follows from the first moment where it is not rounded, or from the master weight.
#[test]
fn two_updates_are_those_of_the_formula() {
    let after = |moments, steps| -> Outcome {
        train(keeping(moments, setup(tiny_model(), Mapping::default())), steps)
    };
    let exact = [after(moments(false, false), 1), after(moments(false, false), 2)];
    let Setup { optimizer: h, lr, .. } = setup(tiny_model(), Mapping::default());
    for (first, second) in [(true, false), (false, true), (true, true)] {
        let what = |name: &str, n: usize| format!("{name} {n}, bf16 {first} {second}");
        let got = [after(moments(first, second), 1), after(moments(first, second), 2)];
        for (name, [master1, m1, v1]) in &exact[0].state {
            let [gmaster1, gm1, gv1] = &got[0].state[name];
            assert_eq!(gmaster1, master1, "{name}: the update is by what is not rounded yet");
            // The weights are the same, and so is the second gradient.
            let ([_, m2, _], [gmaster2, gm2, gv2]) = (&exact[1].state[name], &got[1].state[name]);
            let decay = if name.contains("norm") { 0.0 } else { h.weight_decay };
            for n in 0..m1.len() {
                assert_kept(gm1[n], m1[n], first, &what(name, n));
                assert_kept(gv1[n], v1[n], second, &what(name, n));
                let g = (m2[n] - h.beta1 * m1[n]) / (1.0 - h.beta1);
                let m = h.beta1 * gm1[n] + (1.0 - h.beta1) * g;
                let v = h.beta2 * gv1[n] + (1.0 - h.beta2) * g * g;
                let direction =
                    (m / (1.0 - h.beta1.powi(2))) / ((v / (1.0 - h.beta2.powi(2))).sqrt() + h.eps);
                let master = master1[n] - lr.at(2) * (direction + decay * master1[n]);
                assert!((gmaster2[n] - master).abs() < 1e-10, "{}: {} {master}", what(name, n), gmaster2[n]);
                // Where m2 and m1 nearly cancel, g is known less well than m2.
                if g.abs() > 1e-3 * m1[n].abs() {
                    assert_kept(gm2[n], m, first, &what(name, n));
                    assert_kept(gv2[n], v, second, &what(name, n));
                }
            }
        }
        assert!(got[1].state != exact[1].state);
    }
}

#[test]
fn rounded_moments_are_the_same_under_any_folding() {
    let mapping = |(tp, cp, dp, pp, etp, ep)| {
        let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
        mapping.split(Attention::CP_OUTER, cp)
    };
    let foldings = [
        ((1, 1, 4, 1, 1, 2), AllToAll),
        ((2, 2, 1, 1, 2, 1), AllToAll),
        ((2, 1, 2, 2, 1, 4), AllGather),
        ((3, 1, 2, 1, 1, 2), AllToAll),
    ];
    let foldings = foldings.map(|(sizes, dispatcher)| (mapping(sizes), dispatcher));
    check(&tiny_model(), foldings, 3, |setup| *setup = keeping(moments(true, true), setup.clone()));
}
