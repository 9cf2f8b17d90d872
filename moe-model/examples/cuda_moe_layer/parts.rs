//! What the layer calls, each by itself, on operands of its sizes and rows sorted by a router's choice.

use moe_dispatch::{
    Dispatcher, DispatcherKind, NativeFabric, Router, RouterConfig, RouterInput, RouterScales, RouterSums,
    TokenDispatcher,
};
use moe_kernels::family::{
    Elementwise, Gate, GateFunction, GateGradients, GroupedGemm, GroupedGlu, Norm, Op,
};
use moe_kernels::{Cuda, Tensor, bf16};

use crate::Error;
use crate::layer::{Shape, normal};
use crate::time::seconds;

/// Lines of the parts in the order of a pass, and their sum.
pub fn run(gpu: &Cuda, shape: &Shape) -> Result<(), Error> {
    let &Shape { hidden, inner, experts, top_k, tokens, .. } = shape;
    let (n, third) = (shape.rows(), shape.flops() / 3.0);
    let bf16 = |rows, cols, std| normal::<bf16, Cuda>(gpu, rows, cols, std, 7);
    let mut sum = 0.0;
    let mut part =
        |name: &str, flops: f64, run: &mut dyn FnMut() -> Result<(), Error>| -> Result<(), Error> {
            let seconds = seconds(gpu, run)?;
            sum += seconds;
            shape.line(name, seconds, flops);
            Ok(())
        };

    let (x, dy, gate) =
        (bf16(tokens, hidden, 1.0)?, bf16(tokens, hidden, 1.0)?, bf16(experts, hidden, 0.02)?);
    let mut h = Tensor::<bf16, Cuda>::uninit(gpu, tokens, hidden)?;
    let mut rstd = Tensor::<f32, Cuda>::uninit(gpu, 1, tokens)?;
    let ones = Tensor::<bf16, Cuda>::from_f64(gpu, 1, hidden, &vec![1.0; hidden])?;
    part("rms_norm", 0.0, &mut || {
        Ok(gpu.rms_norm(h.view_mut()?, rstd.view_mut()?, x.view(), ones.view(), 1e-5)?)
    })?;

    let router = Router::new(RouterConfig {
        num_experts: experts,
        top_k,
        scoring: shape.config()?.scoring(),
        in_f64: false,
        aux_loss_coef: 0.001,
        sequence_aux_loss_coef: 0.0,
        global_aux_loss_coef: 0.0,
        model_aux_loss_coef: 0.0,
        z_loss_coef: 0.0,
    })?;
    let input = || RouterInput::new(&h, gate.view());
    let mut sums = RouterSums::zeros(gpu, 1, experts)?;
    let mut forward = || router.forward(gpu, input(), Some(sums.of(0)?), Ok);
    part("router", 0.0, &mut || Ok(forward().map(drop)?))?;
    let (routing, _, _) = forward()?;
    let dispatcher = TokenDispatcher { kind: DispatcherKind::AllToAll, num_experts: experts };
    let fabric = NativeFabric::<bf16, Cuda>::single(gpu);
    part("sort", 0.0, &mut || Ok(dispatcher.plan(&fabric, &routing).map(drop)?))?;
    let (rows, state) = dispatcher.dispatch(&fabric, &h, &routing)?;
    part("dispatch", 0.0, &mut || {
        let flight = dispatcher.to_experts_start(&fabric, &h, Some(&routing.weights), &state)?;
        Ok(dispatcher.dispatch_finish(&fabric, flight, &state).map(drop)?)
    })?;

    let offsets = rows.offsets.view();
    let w_gate_up = bf16(experts * 2 * inner, hidden, 0.02)?;
    let mut gate_up = Tensor::<bf16, Cuda>::uninit(gpu, n, 2 * inner)?;
    let mut activated = Tensor::<bf16, Cuda>::uninit(gpu, n, inner)?;
    let gate = Gate { function: GateFunction::Silu, p: Some(rows.probs.view()) };
    part("gate_up with glu", 2.0 * third, &mut || {
        let (product, out) = (gate_up.view_mut()?, activated.view_mut()?);
        Ok(gpu.grouped_gemm_glu(product, out, rows.x.view(), w_gate_up.view(), &gate, offsets)?)
    })?;
    let w_down = bf16(experts * hidden, inner, 0.02)?;
    let mut out = Tensor::<bf16, Cuda>::uninit(gpu, n, hidden)?;
    part("down", third, &mut || {
        Ok(gpu.grouped_gemm(out.view_mut()?, activated.view(), w_down.view(), Op::T, offsets)?)
    })?;
    part("combine", 0.0, &mut || Ok(dispatcher.combine(&fabric, out.clone(), &state).map(drop)?))?;
    let mut y = Tensor::<bf16, Cuda>::uninit(gpu, tokens, hidden)?;
    part("residual", 0.0, &mut || Ok(Elementwise::<bf16>::add(gpu, y.view_mut()?, x.view(), h.view())?))?;

    part("backward of combine", 0.0, &mut || {
        Ok(dispatcher.combine_backward(&fabric, &dy, &state).map(drop)?)
    })?;
    let d_out = dispatcher.combine_backward(&fabric, &dy, &state)?;
    let mut d_gate_up = Tensor::<bf16, Cuda>::uninit(gpu, n, 2 * inner)?;
    let mut d_probs = Tensor::<f32, Cuda>::uninit(gpu, 1, n)?;
    part("input gradient of down with that of glu", third, &mut || {
        let gradients = GateGradients { gate_up: d_gate_up.view_mut()?, p: Some(d_probs.view_mut()?) };
        let (dy, w, product) = (d_out.view(), w_down.view(), gate_up.view());
        Ok(gpu.grouped_gemm_glu_backward(gradients, dy, w, product, &gate, offsets)?)
    })?;
    let mut dx_rows = Tensor::<bf16, Cuda>::uninit(gpu, n, hidden)?;
    part("input gradient of gate_up", 2.0 * third, &mut || {
        Ok(gpu.grouped_gemm(dx_rows.view_mut()?, d_gate_up.view(), w_gate_up.view(), Op::N, offsets)?)
    })?;
    part("backward of dispatch", 0.0, &mut || {
        let (dx_rows, d_probs) = (dx_rows.clone(), d_probs.clone());
        Ok(dispatcher.dispatch_backward(&fabric, dx_rows, d_probs, &state).map(drop)?)
    })?;

    let d_weights = dispatcher.dispatch_backward(&fabric, dx_rows.clone(), d_probs.clone(), &state)?.1;
    let mut d_gate = Tensor::<f32, Cuda>::zeros(gpu, experts, hidden)?;
    let scales = RouterScales {
        micro_batches: 1,
        sequences: 1,
        valid_tokens: tokens as u64,
        step_counts: None,
        model_counts: None,
        model_unit: Default::default(),
        moe_layers: 1,
    };
    let (_, saved, _) = forward()?;
    part("backward of router", 0.0, &mut || {
        let (saved, dh, d_gate) = (saved.clone(), y.view_mut()?, d_gate.view_mut()?);
        Ok(router.backward(gpu, input(), &d_weights, saved, dh, d_gate, scales)?)
    })?;
    let mut d_norm = Tensor::<f32, Cuda>::zeros(gpu, 1, hidden)?;
    part("backward of rms_norm", 0.0, &mut || {
        let (dx, dw) = (y.view_mut()?, d_norm.view_mut()?);
        let past = Some(dy.view());
        Ok(gpu.rms_norm_backward(dx, dw, dy.view(), x.view(), ones.view(), rstd.view(), past)?)
    })?;
    let mut g_gate_up = Tensor::<f32, Cuda>::uninit(gpu, experts * 2 * inner, hidden)?;
    part("weight gradient of gate_up", 2.0 * third, &mut || {
        Ok(gpu.grouped_gemm_to_acc(g_gate_up.view_mut()?, d_gate_up.view(), rows.x.view(), offsets)?)
    })?;
    let mut g_down = Tensor::<f32, Cuda>::uninit(gpu, experts * hidden, inner)?;
    part("weight gradient of down", third, &mut || {
        Ok(gpu.grouped_gemm_to_acc(g_down.view_mut()?, d_out.view(), activated.view(), offsets)?)
    })?;
    shape.line("sum of the parts", sum, 3.0 * shape.flops());
    Ok(())
}
