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

// dlogits = scale · (exp(logits − lse) − [column of the label]); each block on `U · M · blockDim.x` columns of one row.
template <int M, int U>
__device__ __forceinline__ void cross_entropy_backward(T *dlogits, i64 ds, const T *logits, i64 xs, const Acc *lse,
                                                       const i32 *labels, i64 first, const Acc *scale, i64 cols,
                                                       i64 pieces) {
    i64 i = blockIdx.x / pieces, start = (blockIdx.x % pieces * U * blockDim.x + threadIdx.x) * M;
    i64 step = i64(blockDim.x) * M;
    const T *row = logits + i * xs;
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
            store<M>(dlogits + i * ds + j, x[u]);
        }
    }
}

#define CROSS_ENTROPY_BACKWARD(NAME, M)                                                                                \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                                            \
        T *__restrict__ dlogits, i64 ds, const T *__restrict__ logits, i64 xs, const Acc *__restrict__ lse,            \
        const i32 *__restrict__ labels, i64 first, const Acc *__restrict__ scale, i64 cols, i64 pieces) {              \
        cross_entropy_backward<M, 2>(dlogits, ds, logits, xs, lse, labels, first, scale, cols, pieces);                \
    }
CROSS_ENTROPY_BACKWARD(cross_entropy_backward, N)
CROSS_ENTROPY_BACKWARD(cross_entropy_backward_any, 1)
