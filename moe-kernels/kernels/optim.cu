// Optimizer updates of flat slices.

constexpr int N = 16 / sizeof(Acc);

constexpr int THREADS = 256;

// The factors that all elements have in common, rounded to the type of the masters; `correction2` = 1 / (1 − β2^step).
struct Factors {
    Acc grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, correction2, eps;
};

// Elements of one slice that are updated alike. All that is kept of them begins at these addresses; `remainder` is null where the
// weights are their own masters.
struct Run {
    T *weight;
    u16 *remainder;
    void *m, *v;
    const Acc *grad;
    i64 n;
    // The first block of the launch that has elements of it, and whether vectors may be moved at once.
    i64 first, vectors;
    // lr / (1 − β1^step), and 1 − lr · λ.
    double step_size, keep;
};

// Products and sums are rounded each, never fused: the update is the same on every device.
__device__ __forceinline__ float times(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double times(double x, double y) { return __dmul_rn(x, y); }
__device__ __forceinline__ float plus(float x, float y) { return __fadd_rn(x, y); }
__device__ __forceinline__ double plus(double x, double y) { return __dadd_rn(x, y); }
__device__ __forceinline__ float root(float x) { return __fsqrt_rn(x); }
__device__ __forceinline__ double root(double x) { return __dsqrt_rn(x); }
__device__ __forceinline__ float over(float x, float y) { return __fdiv_rn(x, y); }
__device__ __forceinline__ double over(double x, double y) { return __ddiv_rn(x, y); }

// Whether weights lack something of their masters, as the host's `Float::split` and `Float::join` have it.
constexpr bool SPLIT = sizeof(T) < sizeof(Acc);

__device__ __forceinline__ float join(float weight, u16) { return weight; }
__device__ __forceinline__ double join(double weight, u16) { return weight; }
__device__ __forceinline__ float join(bf16 weight, u16 remainder) {
    u32 low = remainder;
    return __uint_as_float((u32(weight.bits) << 16 | low) - ((low & 0x8000) << 1));
}

__device__ __forceinline__ u16 split(float master, float &weight) { return weight = master, 0; }
__device__ __forceinline__ u16 split(double master, double &weight) { return weight = master, 0; }
__device__ __forceinline__ u16 split(float master, bf16 &weight) {
    u32 bits = __float_as_uint(master);
    weight.bits = master == master ? (bits + 0x8000) >> 16 : 0x7fc0;
    return master == master ? bits : 0;
}

// Updates `count` elements from the `j`-th of a run on.
template <typename M, typename V>
__device__ __forceinline__ void update(const Run &run, i64 j, int count, const Factors &f, Acc step_size, Acc keep) {
    bool vectors = run.vectors;
    M *m = static_cast<M *>(run.m) + j;
    V *v = static_cast<V *>(run.v) + j;
    Words<T, N> weights = load_up_to<N>(run.weight + j, count, vectors);
    Words<u16, N> remainders = {};
    if constexpr (SPLIT) remainders = load_up_to<N>(run.remainder + j, count, vectors);
    Words<Acc, N> grads = load_up_to<N>(run.grad + j, count, vectors);
    Words<M, N> ms = load_up_to<N>(m, count, vectors);
    Words<V, N> vs = load_up_to<N>(v, count, vectors);
    Words<T, N> new_weights = {};
    Words<u16, N> new_remainders = {};
    Words<M, N> new_ms = {};
    Words<V, N> new_vs = {};
#pragma unroll
    for (int k = 0; k < N; k++) {
        Acc g = times(grads.get(k), f.grad_scale);
        Acc mean = plus(times(f.beta1, Acc(widen(ms.get(k)))), times(f.one_minus_beta1, g));
        Acc square = plus(times(f.beta2, Acc(widen(vs.get(k)))), times(f.one_minus_beta2, times(g, g)));
        Acc step = over(times(step_size, mean), plus(root(times(square, f.correction2)), f.eps));
        T weight;
        u16 remainder = split(plus(times(keep, join(weights.get(k), remainders.get(k))), -step), weight);
        new_weights.set(k, weight);
        if constexpr (SPLIT) new_remainders.set(k, remainder);
        new_ms.set(k, narrow<M>(mean));
        new_vs.set(k, narrow<V>(square));
    }
    store_up_to(run.weight + j, new_weights, count, vectors);
    if constexpr (SPLIT) store_up_to(run.remainder + j, new_remainders, count, vectors);
    store_up_to(m, new_ms, count, vectors);
    store_up_to(v, new_vs, count, vectors);
}

// A block has `THREADS` vectors of one run, of which there is at least one; `first` of the first run is 0.
template <typename M, typename V>
__device__ __forceinline__ void adamw(const Run *runs, i64 count, const Factors &f) {
    // Shared, since addresses in registers would leave room for fewer threads.
    __shared__ Run run;
    if (threadIdx.x == 0) {
        i64 at = 0;
        for (i64 end = count; end - at > 1;) {
            i64 middle = (at + end) / 2;
            (runs[middle].first <= blockIdx.x ? at : end) = middle;
        }
        run = runs[at];
    }
    __syncthreads();
    Acc step_size = narrow<Acc>(run.step_size), keep = narrow<Acc>(run.keep);
    i64 j = ((i64(blockIdx.x) - run.first) * THREADS + threadIdx.x) * N;
    if (j < run.n) update<M, V>(run, j, int(min(i64(N), run.n - j)), f, step_size, keep);
}

// By the types in which the two moments are kept.
extern "C" __global__ void __launch_bounds__(THREADS) adamw_acc_acc(const Run *runs, i64 count, Factors f) {
    adamw<Acc, Acc>(runs, count, f);
}
extern "C" __global__ void __launch_bounds__(THREADS) adamw_bf16_acc(const Run *runs, i64 count, Factors f) {
    adamw<bf16, Acc>(runs, count, f);
}
extern "C" __global__ void __launch_bounds__(THREADS) adamw_acc_bf16(const Run *runs, i64 count, Factors f) {
    adamw<Acc, bf16>(runs, count, f);
}
extern "C" __global__ void __launch_bounds__(THREADS) adamw_bf16_bf16(const Run *runs, i64 count, Factors f) {
    adamw<bf16, bf16>(runs, count, f);
}
