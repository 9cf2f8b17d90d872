//! Where the GPU does what the host does, bit by bit: integers, choices by logits, random numbers, sums in one order, updates.
//! And where it sums in an order of its own: the same bits twice.
//!
//! Where there is no GPU, tests say that they were skipped; with `MOE_REQUIRE_GPU` in the environment they fail.

mod gpu;

use gpu::gpu;
use moe_kernels::family::{
    AdamW, AdamWRun, AdamWSlice, DropLimit, Elementwise, ExpertGroups, GroupedBias, MomentMut, Optim, Reduce,
    RouteInput, RouteOutput, Routing, Rows, ScoreFunction, Scoring, SortOutput,
};
use moe_kernels::random::uniform_pair;
use moe_kernels::{Cpu, Cuda, Device, Element, Float, Tensor, bf16};

/// Elements in [−1, 1), of a stream of its own for each `seed`.
fn random<T: Float>(seed: u64, n: usize) -> Vec<T> {
    (0..n as u64).map(|i| T::from_f64(2.0 * uniform_pair(seed, 0, i)[0] - 1.0)).collect()
}

/// Integers below `end`.
fn ints(seed: u64, n: usize, end: i32) -> Vec<i32> {
    (0..n as u64).map(|i| (uniform_pair(seed, 1, i)[0] * f64::from(end)) as i32).collect()
}

/// `k` different experts for each of `n` tokens, early ones more often; every ninth choice of none.
fn choices(n: usize, k: usize, experts: usize) -> Vec<i32> {
    let mut chosen = Vec::new();
    for i in 0..n {
        let [u, v] = uniform_pair(5, 2, i as u64);
        let (first, step) = ((u * u * experts as f64) as usize, 1 + (v * 3.0) as usize);
        chosen.extend(
            (0..k).map(|j| if (i + j) % 9 == 4 { -1 } else { ((first + j * step) % experts) as i32 }),
        );
    }
    chosen
}

fn tensor<E: Element, D: Device>(device: &D, [rows, cols]: [usize; 2], elements: &[E]) -> Tensor<E, D> {
    Tensor::from_slice(device, rows, cols, elements).expect("a tensor")
}

fn blank<E: Element, D: Device>(device: &D, [rows, cols]: [usize; 2]) -> Tensor<E, D> {
    Tensor::uninit(device, rows, cols).expect("a tensor")
}

fn bytes<E: Element, D: Device>(device: &D, tensors: &[&Tensor<E, D>]) -> Vec<u8> {
    let read = |tensor: &&Tensor<E, D>| tensor.to_vec(device).expect("its elements");
    tensors.iter().flat_map(|tensor| bytemuck::cast_slice(&read(tensor)).to_vec()).collect()
}

/// Panics unless `run` does the same on the GPU as on the host.
macro_rules! same_as_cpu {
    ($test:ident, $run:ident $(::<$t:ty>)?) => {
        #[test]
        fn $test() {
            if let Some(gpu) = gpu(stringify!($test)) {
                for (on_cpu, on_gpu) in $run::<$($t,)? _>(&Cpu::new(2)).into_iter().zip($run::<$($t,)? _>(&gpu)) {
                    assert_eq!(on_cpu.0, on_gpu.0);
                    assert!(on_cpu.1 == on_gpu.1, "{} differs", on_cpu.0);
                }
            }
        }
    };
}

/// What was computed, and its bytes.
type Results = Vec<(String, Vec<u8>)>;

fn sorts<D: Routing<f32>>(device: &D) -> Results {
    let mut results = Vec::new();
    for (n, k, experts) in [(40_000, 8, 128), (3000, 6, 257), (70_001, 1, 5), (5, 2, 3000)] {
        let chosen = tensor(device, [n, k], &choices(n, k, experts));
        let most = chosen.to_vec(device).expect("choices").iter().fold(vec![0; experts], |mut counts, &e| {
            if e >= 0 {
                counts[e as usize] += 1;
            }
            counts
        });
        let room = most.into_iter().max().unwrap_or(0) + 3;
        for rows_per_expert in [None, Some(room)] {
            let rows = rows_per_expert.map_or(n * k, |rows| rows * experts);
            let [mut order, mut tokens] = [(); 2].map(|()| blank::<i32, D>(device, [1, rows]));
            let (mut position, mut offsets) = (blank(device, [n, k]), blank(device, [1, experts + 1]));
            let out = SortOutput {
                order: order.view_mut().expect("own"),
                tokens: tokens.view_mut().expect("own"),
                position: position.view_mut().expect("own"),
                offsets: offsets.view_mut().expect("own"),
            };
            Routing::<f32>::sort_by_expert(device, out, chosen.view(), rows_per_expert)
                .expect("sort_by_expert");
            let what = format!("sort of {n}·{k} choices of {experts}, {rows_per_expert:?}");
            results.push((what, bytes(device, &[&order, &tokens, &position, &offsets])));
        }
    }
    results
}
same_as_cpu!(sorts_are_those_of_the_host, sorts);

fn drops<D: Routing<f32>>(device: &D) -> Results {
    let (n, k, experts) = (20_000, 4, 64);
    let chosen = tensor(device, [n, k], &choices(n, k, experts));
    // A permutation: 7919 is a prime that does not divide n.
    let slots: Vec<i32> = (0..n).map(|i| (i * 7919 % n) as i32).collect();
    let slots = tensor(device, [1, n], &slots);
    // Few values, so that many tie.
    let weights: Vec<f32> = ints(4, n * k, 50).into_iter().map(|w| w as f32 / 50.0).collect();
    let weights = tensor(device, [n, k], &weights);
    let mut results = Vec::new();
    for (unit_slots, capacity) in [(n, 1000), (n, 0), (5000, 300), (n + 1, usize::MAX)] {
        for by in [None, Some(&weights)] {
            let mut kept = blank(device, [n, k]);
            let limit = DropLimit { num_experts: experts, unit_slots, capacity };
            let by_weight = by.map(Tensor::view);
            let view = kept.view_mut().expect("own");
            device.drop_excess(view, chosen.view(), by_weight, slots.view(), limit).expect("drop_excess");
            results.push((format!("kept by {limit:?}, weights {}", by.is_some()), bytes(device, &[&kept])));
        }
    }
    results
}
same_as_cpu!(drops_are_those_of_the_host, drops);

fn routes<A: Float<Acc = A>, D: Routing<A>>(device: &D) -> Results {
    let (n, experts, k) = (5000, 128, 8);
    let logits = tensor(device, [n, experts], &random::<A>(1, n * experts));
    let bias = tensor(device, [1, experts], &random::<A>(2, experts));
    let groups = Some(ExpertGroups { count: 8, kept: 3, score_top_k: 2 });
    let mut results = Vec::new();
    // By logits, whose order no rounding blurs.
    for (groups, bias) in [(None, None), (None, Some(&bias)), (groups, None)] {
        let scoring = Scoring { groups, ..ScoreFunction::SoftmaxPost.into() };
        let [mut weights, mut probs] = [k, experts].map(|cols| blank::<A, D>(device, [n, cols]));
        let [mut lse, mut margins] = [(); 2].map(|()| blank::<A, D>(device, [1, n]));
        let [mut chosen, mut unbiased] = [(); 2].map(|()| blank::<i32, D>(device, [n, k]));
        let out = RouteOutput {
            weights: weights.view_mut().expect("own"),
            experts: chosen.view_mut().expect("own"),
            unbiased: Some(unbiased.view_mut().expect("own")),
            probs: probs.view_mut().expect("own"),
            lse: lse.view_mut().expect("own"),
            margins: Some(margins.view_mut().expect("own")),
        };
        let what = format!("choice in {groups:?}, bias {}", bias.is_some());
        let input = RouteInput { bias: bias.map(Tensor::view), ..RouteInput::new(logits.view()) };
        device.route(out, input, &scoring).expect("route");
        results.push((format!("the {what}"), bytes(device, &[&chosen, &unbiased])));
        results.push((format!("margins of the {what}"), bytes(device, &[&margins])));
    }
    results
}
same_as_cpu!(choices_in_f32_are_those_of_the_host, routes::<f32>);
same_as_cpu!(choices_in_f64_are_those_of_the_host, routes::<f64>);

fn jitters<A: Float<Acc = A>, D: Routing<A>>(device: &D) -> Results {
    let (n, width) = (300, 1027);
    let mut x = tensor(device, [n, width], &random::<A>(1, n * width));
    let tokens: Vec<i64> = (0..n as i64).map(|i| i * 37 + ((i % 3) << 33)).collect();
    let tokens = tensor(device, [1, n], &tokens);
    let view = x.view_mut().expect("own");
    device.jitter(view, tokens.view(), 0xA1B2_C3D4_E5F6_0718, 0.01).expect("jitter");
    vec![("jitter".into(), bytes(device, &[&x]))]
}
same_as_cpu!(jitter_in_f32_is_that_of_the_host, jitters::<f32>);
same_as_cpu!(jitter_in_f64_is_that_of_the_host, jitters::<f64>);

fn sums_in_order<A: Float<Acc = A>, D: Elementwise<A> + Rows<A>>(device: &D) -> Results {
    let (from, n, cols, k) = (700, 300, 515, 9);
    let x = tensor(device, [from, cols], &random::<A>(1, from * cols));
    let index: Vec<i32> = ints(2, n * k, from as i32 + 100).into_iter().map(|i| i - 100).collect();
    let mut y = blank(device, [n, cols]);
    let (view, index) = (y.view_mut().expect("own"), tensor(device, [n, k], &index));
    device.gather_sum(view, x.view(), index.view()).expect("gather_sum");
    let mut results = vec![("gather_sum".into(), bytes(device, &[&y]))];
    let [a, b] = [0..n, 400..400 + n].map(|rows| x.rows(rows).expect("rows"));
    device.add(y.view_mut().expect("own"), a.view(), b.view()).expect("add");
    results.push(("add".into(), bytes(device, &[&y])));
    let first = index.reshape(1, n * k).and_then(|index| index.columns(0..n)).expect("indices");
    device.gather_rows(y.view_mut().expect("own"), x.view(), first.view()).expect("gather_rows");
    results.push(("gather_rows".into(), bytes(device, &[&y])));
    results
}
same_as_cpu!(sums_in_f32_are_those_of_the_host, sums_in_order::<f32>);
same_as_cpu!(sums_in_f64_are_those_of_the_host, sums_in_order::<f64>);

/// The moments of a slice, kept in bf16 or not.
struct Moments<A: Float, D: Device> {
    in_bf16: [bool; 2],
    wide: [Tensor<A, D>; 2],
    narrow: [Tensor<bf16, D>; 2],
}

impl<A: Float, D: Device> Moments<A, D> {
    fn zeros(device: &D, n: usize, in_bf16: [bool; 2]) -> Self {
        let wide = [(); 2].map(|()| Tensor::zeros(device, 1, n).expect("zeros"));
        Moments { in_bf16, wide, narrow: [(); 2].map(|()| Tensor::zeros(device, 1, n).expect("zeros")) }
    }

    fn bytes(&self, device: &D) -> Vec<u8> {
        let ([m, v], [narrow_m, narrow_v]) = (&self.wide, &self.narrow);
        [bytes(device, &[m, v]), bytes(device, &[narrow_m, narrow_v])].concat()
    }
}

fn moment<'a, A: Float, D: Device>(
    in_bf16: bool,
    wide: &'a mut Tensor<A, D>,
    narrow: &'a mut Tensor<bf16, D>,
) -> MomentMut<'a, A, D> {
    match in_bf16 {
        true => MomentMut::Bf16(narrow.view_mut().expect("own")),
        false => MomentMut::Acc(wide.view_mut().expect("own")),
    }
}

/// The update number `step` of all elements but the last.
fn update<T: Float, D: Optim<T>>(
    device: &D,
    weight: &mut Tensor<T, D>,
    remainder: Option<&mut Tensor<u16, D>>,
    moments: &mut Moments<T::Acc, D>,
    step: u64,
) {
    let n = weight.layout().cols;
    let grad = tensor(device, [1, n], &random::<T::Acc>(step + 7, n));
    let update = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, step, grad_scale: 0.37 };
    let run = |elements, lr_scale, weight_decay| AdamWRun { elements, lr_scale, weight_decay };
    let runs = [run(0..n / 2, 1.0, 0.1), run(n / 2..n - 1, 0.3, 0.0)];
    let ([m, v], [narrow_m, narrow_v]) = (&mut moments.wide, &mut moments.narrow);
    let [m_in_bf16, v_in_bf16] = moments.in_bf16;
    let slice = AdamWSlice {
        weight: weight.view_mut().expect("own"),
        remainder: remainder.map(|remainder| remainder.view_mut().expect("own")),
        m: moment(m_in_bf16, m, narrow_m),
        v: moment(v_in_bf16, v, narrow_v),
        grad,
        runs: &runs,
    };
    device.adamw(vec![slice], &update).expect("adamw");
}

const IN_BF16: [[bool; 2]; 4] = [[false, false], [true, false], [false, true], [true, true]];

fn updates<A: Float<Acc = A>, D: Optim<A>>(device: &D) -> Results {
    let n = 10_007;
    let mut results = Vec::new();
    for in_bf16 in IN_BF16 {
        let mut weight = tensor(device, [1, n], &random::<A>(1, n));
        let mut moments = Moments::zeros(device, n, in_bf16);
        (1..4).for_each(|step| update(device, &mut weight, None, &mut moments, step));
        let what = format!("with moments in bf16 {in_bf16:?}");
        results.push((format!("weights {what}"), bytes(device, &[&weight])));
        results.push((format!("moments {what}"), moments.bytes(device)));
    }
    results
}
same_as_cpu!(updates_in_f32_are_those_of_the_host, updates::<f32>);
same_as_cpu!(updates_in_f64_are_those_of_the_host, updates::<f64>);

/// Weights in bf16 and the low bits of their masters are, after every update, the host's masters in f32.
#[test]
fn updates_in_bf16_are_those_of_masters_on_the_host() {
    let Some(gpu) = gpu("updates_in_bf16_are_those_of_masters_on_the_host") else { return };
    let (cpu, n) = (Cpu::new(2), 10_007);
    let mut masters = random::<f32>(1, n);
    // Ties and what is next to them, of even and odd weights; what rounds to the next exponent, to infinity, to nothing.
    let special = [
        0x3f80_8000,
        0x3f81_8000,
        0xbf81_8000,
        0x3f80_7fff,
        0x3f80_8001,
        0x3fff_ffff,
        0xff7f_ffff,
        0x0000_8000,
        0x8000_0001,
        0,
    ];
    masters.iter_mut().zip(special).for_each(|(master, bits)| *master = f32::from_bits(bits));
    // One that is in no run stays as it is.
    masters[n - 1] = f32::from_bits(0xbf81_8000);
    for in_bf16 in IN_BF16 {
        let (weights, remainders): (Vec<bf16>, Vec<u16>) = masters.iter().map(|&x| bf16::split(x)).unzip();
        let (mut weight, mut remainder) = (tensor(&gpu, [1, n], &weights), tensor(&gpu, [1, n], &remainders));
        let mut master = tensor(&cpu, [1, n], &masters);
        let (mut moments, mut on_host) = (Moments::zeros(&gpu, n, in_bf16), Moments::zeros(&cpu, n, in_bf16));
        for step in 1..6 {
            update(&gpu, &mut weight, Some(&mut remainder), &mut moments, step);
            update(&cpu, &mut master, None, &mut on_host, step);
            let (weights, remainders) =
                (weight.to_vec(&gpu).expect("weights"), remainder.to_vec(&gpu).expect("rest"));
            let wants = master.to_vec(&cpu).expect("masters");
            for (i, (&want, (&weight, &remainder))) in
                wants.iter().zip(weights.iter().zip(&remainders)).enumerate()
            {
                let what = format!("element {i} after step {step}, moments in bf16 {in_bf16:?}");
                assert_eq!(weight.join(remainder).to_bits(), want.to_bits(), "{what}");
                assert_eq!((weight, remainder), bf16::split(want), "{what}: no nearest weight");
            }
            assert!(
                moments.bytes(&gpu) == on_host.bytes(&cpu),
                "moments in bf16 {in_bf16:?} after step {step}"
            );
        }
    }
}

#[test]
fn sums_have_the_same_bits_twice() {
    let Some(gpu) = gpu("sums_have_the_same_bits_twice") else { return };
    let (n, cols, groups) = (5003, 1029, 7);
    let x = tensor(&gpu, [n, cols], &random::<bf16>(1, n * cols));
    let logits = tensor(&gpu, [n, 64], &random::<f32>(2, n * 64));
    let bias = tensor(&gpu, [1, 64], &random::<f32>(3, 64));
    let offsets: Vec<i32> =
        (0..=groups).map(|g| (g * g * n as i32 / groups / groups).min(n as i32)).collect();
    let offsets = tensor(&gpu, [1, offsets.len()], &offsets);
    let sums = || {
        let mut dot = Tensor::<f64, Cuda>::zeros(&gpu, 1, 1).expect("zeros");
        gpu.dot(dot.view_mut().expect("own"), x.view(), x.view()).expect("dot");
        let mut columns = blank::<f32, Cuda>(&gpu, [1, cols]);
        gpu.column_sums(columns.view_mut().expect("own"), x.view()).expect("column_sums");
        let mut g = Tensor::<f32, Cuda>::zeros(&gpu, groups as usize, cols).expect("zeros");
        let view = g.view_mut().expect("own");
        GroupedBias::<bf16>::grouped_bias_acc(&gpu, view, x.view(), None, offsets.view())
            .expect("grouped_bias_acc");
        let mut softmax = blank::<f64, Cuda>(&gpu, [1, 64]);
        let view = softmax.view_mut().expect("own");
        gpu.softmax_sums(view, logits.view(), bias.view(), None).expect("softmax_sums");
        (bytes(&gpu, &[&dot, &softmax]), bytes(&gpu, &[&columns, &g]))
    };
    let first = sums();
    for _ in 0..4 {
        assert!(sums() == first);
    }
}
