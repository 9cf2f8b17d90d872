// Optimizer updates of flat slices.

constexpr int N = 16 / sizeof(Acc);

// The factors of one update, rounded to the type of the master weights.
struct Factors {
    // `step_size` = lr / (1 − β1^step), `correction2` = 1 / (1 − β2^step), `keep` = 1 − lr · λ.
    Acc grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, correction2, eps, keep;
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

// A thread has `N` elements, or fewer at the end. `weight` may be null.
template <typename M, typename V>
__device__ __forceinline__ void adamw(T *weight, Acc *master, M *m, V *v, const Acc *grad, i64 n, const Factors &f,
                                      bool vectors) {
    i64 j = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    int count = int(min(i64(N), n - j));
    if (count <= 0) return;
    Words<Acc, N> masters = load_up_to<N>(master + j, count, vectors), grads = load_up_to<N>(grad + j, count, vectors);
    Words<M, N> ms = load_up_to<N>(m + j, count, vectors);
    Words<V, N> vs = load_up_to<N>(v + j, count, vectors);
    Words<Acc, N> new_masters = {};
    Words<M, N> new_ms = {};
    Words<V, N> new_vs = {};
    Words<T, N> weights = {};
#pragma unroll
    for (int k = 0; k < N; k++) {
        Acc g = times(grads.get(k), f.grad_scale);
        Acc mean = plus(times(f.beta1, Acc(widen(ms.get(k)))), times(f.one_minus_beta1, g));
        Acc square = plus(times(f.beta2, Acc(widen(vs.get(k)))), times(f.one_minus_beta2, times(g, g)));
        Acc step = over(times(f.step_size, mean), plus(root(times(square, f.correction2)), f.eps));
        Acc updated = plus(times(f.keep, masters.get(k)), -step);
        new_masters.set(k, updated);
        new_ms.set(k, narrow<M>(mean));
        new_vs.set(k, narrow<V>(square));
        weights.set(k, narrow<T>(updated));
    }
    store_up_to(master + j, new_masters, count, vectors);
    store_up_to(m + j, new_ms, count, vectors);
    store_up_to(v + j, new_vs, count, vectors);
    if (weight) store_up_to(weight + j, weights, count, vectors);
}

// By the types in which the two moments are kept.
extern "C" __global__ void __launch_bounds__(256) adamw_acc_acc(T *weight, Acc *master, Acc *m, Acc *v, const Acc *grad, i64 n,
                                                                Factors f, i32 vectors) {
    adamw(weight, master, m, v, grad, n, f, vectors);
}
extern "C" __global__ void __launch_bounds__(256) adamw_bf16_acc(T *weight, Acc *master, bf16 *m, Acc *v, const Acc *grad,
                                                                 i64 n, Factors f, i32 vectors) {
    adamw(weight, master, m, v, grad, n, f, vectors);
}
extern "C" __global__ void __launch_bounds__(256) adamw_acc_bf16(T *weight, Acc *master, Acc *m, bf16 *v, const Acc *grad,
                                                                 i64 n, Factors f, i32 vectors) {
    adamw(weight, master, m, v, grad, n, f, vectors);
}
extern "C" __global__ void __launch_bounds__(256) adamw_bf16_bf16(T *weight, Acc *master, bf16 *m, bf16 *v, const Acc *grad,
                                                                  i64 n, Factors f, i32 vectors) {
    adamw(weight, master, m, v, grad, n, f, vectors);
}
