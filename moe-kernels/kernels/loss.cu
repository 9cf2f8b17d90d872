// Vocabulary-parallel cross-entropy.

constexpr int N = 16 / sizeof(T);

#if defined(T_F64)
#define INF INF_F64
#else
#define INF INF_F32
#endif

// Warps of a block, at most.
constexpr int WARPS = 16;

// What is kept of some elements of a row: Σ exp(x − max) and the largest of them; a NaN among them makes the sum NaN.
struct Exponentials {
    Acc max, sum;
};

// A NaN loses against every other value.
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

// The largest of a vector and `most`; of bf16 two by two.
template <int M> __device__ __forceinline__ Acc larger_of(Acc most, const Vec<T, M> &x) {
    if constexpr (sizeof(T) == 2 && M % 2 == 0) {
        const u32 *words = reinterpret_cast<const u32 *>(&x);
        u32 pair = words[0];
#pragma unroll
        for (int w = 1; w < M / 2; w++) asm("max.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(words[w]));
        most = larger(larger(most, Acc(__uint_as_float(pair << 16))), Acc(__uint_as_float(pair & 0xffff0000u)));
    } else {
#pragma unroll
        for (int e = 0; e < M; e++) most = larger(most, widen(x.at[e]));
    }
    return most;
}

// The exponent's base point: what is −∞ throughout has none.
__device__ __forceinline__ Acc base(Acc max) { return max == -INF ? Acc(0) : max; }

// e^(x − by) of many x with one `by`, which comes as `scaled` gives it: of floats one multiplication and addition before the unit for
// powers of two. The relative error grows with |by|, as what a log-sum-exp is rounded by does.
constexpr float LOG2_E = 1.4426950408889634f;
__device__ __forceinline__ float scaled(float by) { return by * LOG2_E; }
__device__ __forceinline__ double scaled(double by) { return by; }
__device__ __forceinline__ float power(float x, float by) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaf(x, LOG2_E, -by)));
    return y;
}
__device__ __forceinline__ double power(double x, double by) { return exp(x - by); }

// What `lanes` threads beside each other have, a power of two; the same bits in all of them.
__device__ __forceinline__ Exponentials across(Exponentials own, int lanes) {
    Acc max = own.max;
#pragma unroll
    for (int lane = lanes / 2; lane > 0; lane /= 2) max = larger(max, __shfl_xor_sync(FULL_MASK, max, lane));
    Acc sum = own.sum * fast_exp(own.max - base(max));
#pragma unroll
    for (int lane = lanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(FULL_MASK, sum, lane);
    return {max, sum};
}

__device__ __forceinline__ Acc logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// The largest's own term is 1, but for rounding.
__device__ __forceinline__ Acc lse_of(Exponentials all) {
    return all.max == -INF ? all.max + all.sum : all.max + logarithm(all.sum < 1 ? Acc(1) : all.sum);
}

// Of the first `n` elements of `row`, which the threads of a block walk together, `U` times `M` at once in each of them; the same in all
// threads.
template <int M, int U, typename I> __device__ __forceinline__ Exponentials exponentials(const T *row, I n) {
    __shared__ Exponentials parts[WARPS];
    Exponentials seen = {-INF, 0};
    I step = I(blockDim.x) * M;
    for (I start = threadIdx.x * M; start < n; start += step * U) {
        Vec<T, M> x[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (start + u * step < n) x[u] = load<M>(row + start + u * step);
        Acc max = seen.max;
#pragma unroll
        for (int u = 0; u < U; u++)
            if (start + u * step < n) max = larger_of(max, x[u]);
        Acc by = base(max);
        if (max != seen.max) seen.sum *= fast_exp(seen.max - by);
        seen.max = max;
        by = scaled(by);
#pragma unroll
        for (int u = 0; u < U; u++)
            if (start + u * step < n) {
                Vec<Acc, M> wide = widen(x[u]);
#pragma unroll
                for (int e = 0; e < M; e++) seen.sum += power(wide.at[e], by);
            }
    }
    seen = across(seen, 32);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = seen;
    __syncthreads();
    int warp = threadIdx.x % WARPS;
    return across(warp < blockDim.x / 32 ? parts[warp] : Exponentials{-INF, 0}, WARPS);
}

// A block for each row.
template <int M, int U>
__device__ __forceinline__ void cross_entropy(Acc *lse, Acc *target, const T *logits, i64 xs, const i32 *labels, i64 first,
                                              i64 cols) {
    i64 i = blockIdx.x;
    const T *row = logits + i * xs;
    Exponentials all = exponentials<M, U>(row, cols);
    if (threadIdx.x > 0) return;
    lse[i] = lse_of(all);
    i64 column = labels[i] - first;
    target[i] = labels[i] >= 0 && column >= 0 && column < cols ? widen(row[column]) : Acc(0);
}

#define CROSS_ENTROPY(NAME, M, U)                                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) NAME(                                                     \
        Acc *__restrict__ lse, Acc *__restrict__ target, const T *__restrict__ logits, i64 xs,                         \
        const i32 *__restrict__ labels, i64 first, i64 cols) {                                                         \
        cross_entropy<M, U>(lse, target, logits, xs, labels, first, cols);                                             \
    }
CROSS_ENTROPY(cross_entropy, N, sizeof(T) == 8 ? 2 : 4)
CROSS_ENTROPY(cross_entropy_any, 1, 8)

// lse[j] = log Σ_p exp(parts[p, j]), p ascending; one thread per token.
extern "C" __global__ void merge_lse(Acc *__restrict__ lse, const Acc *__restrict__ parts, i64 ps, i64 count, i64 n) {
    i64 j = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (j >= n) return;
    Acc max = -INF, sum = 0;
    for (i64 p = 0; p < count; p++) max = larger(max, parts[p * ps + j]);
    if (max == -INF) {
        for (i64 p = 0; p < count; p++) max += parts[p * ps + j];
        lse[j] = max;
    } else {
        for (i64 p = 0; p < count; p++) sum += fast_exp(parts[p * ps + j] - max);
        lse[j] = max + logarithm(sum);
    }
}

// logits → scale · (exp(logits − lse) − [column of the label]); each block on `U · M · blockDim.x` columns of one row.
template <int M, int U>
__device__ __forceinline__ void cross_entropy_backward(T *logits, i64 xs, const Acc *lse, const i32 *labels, i64 first,
                                                       const Acc *scale, i64 cols, i64 pieces) {
    i64 i = blockIdx.x / pieces, start = (blockIdx.x % pieces * U * blockDim.x + threadIdx.x) * M;
    i64 step = i64(blockDim.x) * M;
    T *row = logits + i * xs;
    Acc by = scaled(lse[i]), s = scale[i];
    i64 column = labels[i] - first;
    if (labels[i] < 0) column = -1;
    Vec<T, M> x[U];
#pragma unroll
    for (int u = 0; u < U; u++)
        if (start + u * step < cols) x[u] = load<M>(row + start + u * step);
#pragma unroll
    for (int u = 0; u < U; u++) {
        i64 j = start + u * step;
        if (j < cols) {
            // The label's own is mended afterwards.
            bool has = u64(column - j) < M;
            Acc label = has ? widen(row[column]) : Acc(0);
            Vec<Acc, M> wide = widen(x[u]);
#pragma unroll
            for (int e = 0; e < M; e++) wide.at[e] = s * power(wide.at[e], by);
            Vec<T, M> y = narrow<T>(wide);
            // A plain store would be taken apart here.
            if constexpr (M > 1) store_up_to<M>(row + j, reinterpret_cast<const Words<T, M> &>(y), M, true);
            else store<M>(row + j, y);
            if (has) row[column] = narrow<T>(s * (power(label, by) - 1));
        }
    }
}

#define CROSS_ENTROPY_BACKWARD(NAME, M)                                                                                \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) NAME(                                                     \
        T *__restrict__ logits, i64 xs, const Acc *__restrict__ lse, const i32 *__restrict__ labels, i64 first,        \
        const Acc *__restrict__ scale, i64 cols, i64 pieces) {                                                         \
        cross_entropy_backward<M, 2>(logits, xs, lse, labels, first, scale, cols, pieces);                             \
    }
CROSS_ENTROPY_BACKWARD(cross_entropy_backward, N)
CROSS_ENTROPY_BACKWARD(cross_entropy_backward_any, 1)

// A vocabulary that is one block: loss and gradient with one read and one write of the logits. The `CLUSTER` blocks of a cluster
// hold a row in their shared memory, `part` elements each.
#if defined(CLUSTER)

// Writes to the same place in the shared memory of block `to` of the cluster.
__device__ __forceinline__ void put(const float *at, u32 to, float x) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(to));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(x) : "memory");
}
__device__ __forceinline__ void put(const double *at, u32 to, double x) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(to));
    asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(there), "d"(x) : "memory");
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(WARPS * 32)
    cross_entropy_whole(Acc *__restrict__ lse, Acc *__restrict__ target, T *__restrict__ logits, i64 xs,
                        const i32 *__restrict__ labels, const Acc *__restrict__ scale, i64 cols, i64 part) {
    extern __shared__ __align__(16) u8 memory[];
    __shared__ Exponentials of_blocks[CLUSTER];
    T *here = reinterpret_cast<T *>(memory);
    // All blocks of the cluster are there before one of them writes to another.
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    i64 i = blockIdx.x / CLUSTER, first = blockIdx.x % CLUSTER * part;
    int n = int(max(i64(0), min(part, cols - first))), step = blockDim.x * N;
    T *row = logits + i * xs + first;

    // Each thread works on what it has fetched itself.
    for (int j = threadIdx.x * N; j < n; j += step) copy_async(here + j, row + j);
    asm volatile("cp.async.wait_all;" ::: "memory");
    Exponentials all = exponentials<N, 4>(here, n);
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    if (threadIdx.x < CLUSTER) {
        Exponentials &there = of_blocks[blockIdx.x % CLUSTER];
        put(&there.max, threadIdx.x, all.max);
        put(&there.sum, threadIdx.x, all.sum);
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    Acc of_row = lse_of(across(of_blocks[threadIdx.x % CLUSTER], CLUSTER)), by = scaled(of_row), s = scale[i];
#pragma unroll 2
    for (int j = threadIdx.x * N; j < n; j += step) {
        Vec<Acc, N> x = widen(load<N>(here + j));
#pragma unroll
        for (int e = 0; e < N; e++) x.at[e] = s * power(x.at[e], by);
        store<N>(row + j, narrow<T>(x));
    }
    if (threadIdx.x == 0 && first == 0) lse[i] = of_row;
    i64 label = labels[i];
    if (label >= first && label < first + n) {
        // The thread that has written there.
        int column = int(label - first);
        if (column / N % blockDim.x != threadIdx.x) return;
        Acc x = widen(here[column]);
        row[column] = narrow<T>(s * (power(x, by) - 1));
        target[i] = x;
    } else if (threadIdx.x == 0 && first == 0 && (label < 0 || label >= cols)) {
        target[i] = 0;
    }
}
#endif
