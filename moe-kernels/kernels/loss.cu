// Vocabulary-parallel cross-entropy.

constexpr int N = 16 / sizeof(T);

#if defined(T_F64)
#define INF INF_F64
#else
#define INF INF_F32
#endif

// What is kept of some elements of a row: Σ exp(x − max) and the largest of them; a NaN among them makes the sum NaN.
struct Exponentials {
    Acc max, sum;
};

// A NaN loses against every other value.
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

// The exponent's base point: what is −∞ throughout has none.
__device__ __forceinline__ Acc base(Acc max) { return max == -INF ? Acc(0) : max; }

__device__ __forceinline__ Exponentials merge(Exponentials a, Exponentials b) {
    Acc max = larger(a.max, b.max), by = base(max);
    return {max, a.sum * fast_exp(a.max - by) + b.sum * fast_exp(b.max - by)};
}

__device__ __forceinline__ Acc logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// The block's threads on one row, `U` times `M` elements at once in each of them.
template <int M, int U>
__device__ __forceinline__ void cross_entropy(Acc *lse, Acc *target, const T *logits, i64 xs, const i32 *labels, i64 first,
                                              i64 cols) {
    __shared__ Exponentials parts[32];
    i64 i = blockIdx.x;
    const T *row = logits + i * xs;
    Exponentials seen = {-INF, 0};
    i64 step = i64(blockDim.x) * M;
    for (i64 start = threadIdx.x * M; start < cols; start += step * U) {
        Vec<T, M> x[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (start + u * step < cols) x[u] = load<M>(row + start + u * step);
        Acc max = seen.max;
#pragma unroll
        for (int u = 0; u < U; u++)
            if (start + u * step < cols)
#pragma unroll
                for (int e = 0; e < M; e++) max = larger(max, widen(x[u].at[e]));
        Acc by = base(max);
        if (max != seen.max) seen.sum *= fast_exp(seen.max - by);
        seen.max = max;
#pragma unroll
        for (int u = 0; u < U; u++)
            if (start + u * step < cols)
#pragma unroll
                for (int e = 0; e < M; e++) seen.sum += fast_exp(widen(x[u].at[e]) - by);
    }
    for (int lane = 16; lane > 0; lane /= 2)
        seen = merge(seen, {__shfl_xor_sync(FULL_MASK, seen.max, lane), __shfl_xor_sync(FULL_MASK, seen.sum, lane)});
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = seen;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < blockDim.x / 32; warp++) seen = merge(seen, parts[warp]);
    lse[i] = seen.max == -INF ? seen.max + seen.sum : seen.max + logarithm(seen.sum);
    i64 column = labels[i] - first;
    target[i] = labels[i] >= 0 && column >= 0 && column < cols ? widen(row[column]) : Acc(0);
}

#define CROSS_ENTROPY(NAME, M, U)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                                            \
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
    Acc by = lse[i], s = scale[i];
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
            i64 here = column - j;
#pragma unroll
            for (int e = 0; e < M; e++) {
                Acc probability = fast_exp(widen(x[u].at[e]) - by);
                x[u].at[e] = narrow<T>(s * (e == here ? probability - 1 : probability));
            }
            store<M>(row + j, x[u]);
        }
    }
}

#define CROSS_ENTROPY_BACKWARD(NAME, M)                                                                                \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                                            \
        T *__restrict__ logits, i64 xs, const Acc *__restrict__ lse, const i32 *__restrict__ labels, i64 first,        \
        const Acc *__restrict__ scale, i64 cols, i64 pieces) {                                                         \
        cross_entropy_backward<M, 2>(logits, xs, lse, labels, first, scale, cols, pieces);                             \
    }
CROSS_ENTROPY_BACKWARD(cross_entropy_backward, N)
CROSS_ENTROPY_BACKWARD(cross_entropy_backward_any, 1)

// A vocabulary that is one block: loss and gradient with one read and one write of the logits. The `CLUSTER` blocks of a cluster
// hold a row in their shared memory, `part` elements each.
#if defined(CLUSTER)

__device__ __forceinline__ u32 shared_address(const void *at) { return u32(__cvta_generic_to_shared(at)); }

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

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(256)
    cross_entropy_whole(Acc *__restrict__ lse, Acc *__restrict__ target, T *__restrict__ logits, i64 xs,
                        const i32 *__restrict__ labels, const Acc *__restrict__ scale, i64 cols, i64 part) {
    constexpr int U = 4;
    extern __shared__ __align__(16) u8 memory[];
    __shared__ Exponentials parts[8], of_blocks[CLUSTER];
    T *here = reinterpret_cast<T *>(memory);
    // All blocks of the cluster are there before one of them writes to another.
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    i64 i = blockIdx.x / CLUSTER, first = blockIdx.x % CLUSTER * part;
    int n = int(max(i64(0), min(part, cols - first))), step = blockDim.x * N;
    T *row = logits + i * xs + first;

    Exponentials seen = {-INF, 0};
    for (int start = threadIdx.x * N; start < n; start += step * U) {
        Vec<T, N> x[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (start + u * step < n) x[u] = load<N>(row + start + u * step);
        Acc most = seen.max;
#pragma unroll
        for (int u = 0; u < U; u++)
            if (start + u * step < n) {
                store<N>(here + start + u * step, x[u]);
#pragma unroll
                for (int e = 0; e < N; e++) most = larger(most, widen(x[u].at[e]));
            }
        Acc by = base(most);
        if (most != seen.max) seen.sum *= fast_exp(seen.max - by);
        seen.max = most;
#pragma unroll
        for (int u = 0; u < U; u++)
            if (start + u * step < n)
#pragma unroll
                for (int e = 0; e < N; e++) seen.sum += fast_exp(widen(x[u].at[e]) - by);
    }
    for (int lane = 16; lane > 0; lane /= 2)
        seen = merge(seen, {__shfl_xor_sync(FULL_MASK, seen.max, lane), __shfl_xor_sync(FULL_MASK, seen.sum, lane)});
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = seen;
    __syncthreads();
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    if (threadIdx.x < CLUSTER) {
        seen = parts[0];
        for (int warp = 1; warp < blockDim.x / 32; warp++) seen = merge(seen, parts[warp]);
        Exponentials &there = of_blocks[blockIdx.x % CLUSTER];
        put(&there.max, threadIdx.x, seen.max);
        put(&there.sum, threadIdx.x, seen.sum);
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    seen = of_blocks[0];
    for (int block = 1; block < CLUSTER; block++) seen = merge(seen, of_blocks[block]);
    Acc by = seen.max == -INF ? seen.max + seen.sum : seen.max + logarithm(seen.sum), s = scale[i];
    i64 label = labels[i];
    int column = label >= first && label < first + n ? int(label - first) : -1;
    if (threadIdx.x == 0) {
        if (first == 0) lse[i] = by;
        if (column >= 0)
            target[i] = widen(here[column]);
        else if (first == 0 && (label < 0 || label >= cols))
            target[i] = 0;
    }
    for (int start = threadIdx.x * N; start < n; start += step) {
        Vec<T, N> x = load<N>(here + start);
        int label_here = column - start;
#pragma unroll
        for (int e = 0; e < N; e++) {
            Acc probability = fast_exp(widen(x.at[e]) - by);
            x.at[e] = narrow<T>(s * (e == label_here ? probability - 1 : probability));
        }
        store<N>(row + start, x);
    }
}
#endif
