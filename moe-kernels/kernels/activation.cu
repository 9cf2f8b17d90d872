// Gated activations. `blockDim.x` lanes on each row, `M` elements at once.

constexpr int N = 16 / sizeof(T);

template <typename F, int M>
__device__ __forceinline__ void glu(T *y, i64 ys, const T *gate_up, i64 gs, const Acc *p, i64 n, i64 width) {
    i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (i >= n) return;
    Acc probability = p ? p[i] : Acc(1);
    const T *gate = gate_up + i * gs, *up = gate + width;
    y += i * ys;
#pragma unroll 2
    for (i64 j = threadIdx.x * M; j < width; j += blockDim.x * M) {
        Vec<T, M> g = load<M>(gate + j), u = load<M>(up + j), out;
#pragma unroll
        for (int e = 0; e < M; e++) {
            out.at[e] = narrow<T>(gated<F>(widen(g.at[e]), widen(u.at[e]), probability));
        }
        store<M>(y + j, out);
    }
}

template <typename F, int M>
__device__ __forceinline__ void glu_backward(T *dgate_up, i64 ds, Acc *dp, const T *dy, i64 dys, const T *gate_up, i64 gs,
                                             const Acc *p, i64 n, i64 width) {
    i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    Acc sum = 0;
    if (i < n) {
        Acc probability = p ? p[i] : Acc(1);
        const T *gate = gate_up + i * gs, *up = gate + width;
        T *dgate = dgate_up + i * ds, *dup = dgate + width;
        dy += i * dys;
        for (i64 j = threadIdx.x * M; j < width; j += blockDim.x * M) {
            Vec<T, M> d = load<M>(dy + j), g = load<M>(gate + j), u = load<M>(up + j), dg, du;
#pragma unroll
            for (int e = 0; e < M; e++) {
                Acc dgate_e, dup_e;
                gated_backward<F>(widen(d.at[e]), widen(g.at[e]), widen(u.at[e]), probability, dgate_e, dup_e, sum);
                dg.at[e] = narrow<T>(dgate_e);
                du.at[e] = narrow<T>(dup_e);
            }
            store<M>(dgate + j, dg);
            store<M>(dup + j, du);
        }
    }
    if (!dp) return;
    sum = group_sum(sum);
    if (i < n && threadIdx.x == 0) dp[i] = sum;
}

#define GLU(NAME, F, M)                                                                                                \
    extern "C" __global__ void NAME(T *__restrict__ y, i64 ys, const T *__restrict__ gate_up, i64 gs,                  \
                                    const Acc *__restrict__ p, i64 n, i64 width) {                                     \
        glu<F, M>(y, ys, gate_up, gs, p, n, width);                                                                    \
    }
GLU(silu, Silu, N)
GLU(silu_any, Silu, 1)
GLU(gelu_tanh, GeluTanh, N)
GLU(gelu_tanh_any, GeluTanh, 1)

#define GLU_BACKWARD(NAME, F, M)                                                                                       \
    extern "C" __global__ void NAME(T *__restrict__ dgate_up, i64 ds, Acc *__restrict__ dp, const T *__restrict__ dy,  \
                                    i64 dys, const T *__restrict__ gate_up, i64 gs, const Acc *__restrict__ p, i64 n,  \
                                    i64 width) {                                                                       \
        glu_backward<F, M>(dgate_up, ds, dp, dy, dys, gate_up, gs, p, n, width);                                       \
    }
GLU_BACKWARD(silu_backward, Silu, N)
GLU_BACKWARD(silu_backward_any, Silu, 1)
GLU_BACKWARD(gelu_tanh_backward, GeluTanh, N)
GLU_BACKWARD(gelu_tanh_backward_any, GeluTanh, 1)

template <int M>
__device__ __forceinline__ void gate_rows(T *y, i64 ys, const T *x, i64 xs, const T *gate, i64 gs, i64 n, i64 width) {
    i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (i >= n) return;
    Acc s = sigmoid(widen(gate[i * gs]));
    for (i64 j = threadIdx.x * M; j < width; j += blockDim.x * M) {
        Vec<T, M> v = load<M>(x + i * xs + j);
#pragma unroll
        for (int e = 0; e < M; e++) v.at[e] = narrow<T>(widen(v.at[e]) * s);
        store<M>(y + i * ys + j, v);
    }
}

// dx = dy · s, dgate = s · (1 − s) · Σ dy·x.
template <int M>
__device__ __forceinline__ void gate_rows_backward(T *dx, i64 dxs, T *dgate, i64 dgs, const T *dy, i64 dys, const T *x,
                                                   i64 xs, const T *gate, i64 gs, i64 n, i64 width) {
    i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    Acc sum = 0, s = 0;
    if (i < n) {
        s = sigmoid(widen(gate[i * gs]));
        for (i64 j = threadIdx.x * M; j < width; j += blockDim.x * M) {
            Vec<T, M> d = load<M>(dy + i * dys + j), v = load<M>(x + i * xs + j);
#pragma unroll
            for (int e = 0; e < M; e++) {
                sum += widen(d.at[e]) * widen(v.at[e]);
                d.at[e] = narrow<T>(widen(d.at[e]) * s);
            }
            store<M>(dx + i * dxs + j, d);
        }
    }
    sum = group_sum(sum);
    if (i < n && threadIdx.x == 0) dgate[i * dgs] = narrow<T>(sum * s * (1 - s));
}

#define GATE(NAME, M)                                                                                                  \
    extern "C" __global__ void NAME(T *__restrict__ y, i64 ys, const T *__restrict__ x, i64 xs,                        \
                                    const T *__restrict__ gate, i64 gs, i64 n, i64 width) {                            \
        gate_rows<M>(y, ys, x, xs, gate, gs, n, width);                                                                \
    }
GATE(sigmoid_gate, N)
GATE(sigmoid_gate_any, 1)

#define GATE_BACKWARD(NAME, M)                                                                                         \
    extern "C" __global__ void NAME(T *__restrict__ dx, i64 dxs, T *__restrict__ dgate, i64 dgs,                       \
                                    const T *__restrict__ dy, i64 dys, const T *__restrict__ x, i64 xs,                \
                                    const T *__restrict__ gate, i64 gs, i64 n, i64 width) {                            \
        gate_rows_backward<M>(dx, dxs, dgate, dgs, dy, dys, x, xs, gate, gs, n, width);                                \
    }
GATE_BACKWARD(sigmoid_gate_backward, N)
GATE_BACKWARD(sigmoid_gate_backward_any, 1)
