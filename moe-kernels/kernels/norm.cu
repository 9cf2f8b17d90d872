// Root-mean-square normalisation. `share` is one element's share in the mean.
//
// Rows of vectors stay in registers between the sum and the product, `V` vectors in each of the lanes of a row; other rows
// are read twice, element by element.

constexpr int N = 16 / sizeof(T);

// What is normed is x, or x + r, which is then written to `sum`.
template <int V>
__device__ __forceinline__ void forward(T *y, i64 ys, Acc *rstd, const T *x, i64 xs, const T *r, i64 rs, T *sum, i64 ss,
                                        const T *w, const Acc *sums, i64 n, int h, Acc share, Acc eps) {
    i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    bool live = i < n;
    Vec<T, N> row[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
        int j = (threadIdx.x + v * blockDim.x) * N;
        if (live && j < h) row[v] = load<N>(x + i * xs + j);
    }
    if (r) {
        Vec<T, N> added[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
            int j = (threadIdx.x + v * blockDim.x) * N;
            if (live && j < h) added[v] = load<N>(r + i * rs + j);
        }
#pragma unroll
        for (int v = 0; v < V; v++) {
            int j = (threadIdx.x + v * blockDim.x) * N;
            if (live && j < h) {
                Vec<Acc, N> a = widen(row[v]), b = widen(added[v]);
#pragma unroll
                for (int e = 0; e < N; e++) a.at[e] += b.at[e];
                store<N>(sum + i * ss + j, row[v] = narrow<T>(a));
            }
        }
    }
    Acc square = 0;
    if (sums) {
        if (live) square = sums[i];
    } else {
#pragma unroll
        for (int v = 0; v < V; v++) {
            int j = (threadIdx.x + v * blockDim.x) * N;
            if (live && j < h) {
                Vec<Acc, N> a = widen(row[v]);
#pragma unroll
                for (int e = 0; e < N; e++) square += a.at[e] * a.at[e];
            }
        }
        square = group_sum(square);
    }
    if (!live) return;
    Acc root = inverse_root(square * share + eps);
    if (threadIdx.x == 0) rstd[i] = root;
#pragma unroll
    for (int v = 0; v < V; v++) {
        int j = (threadIdx.x + v * blockDim.x) * N;
        if (j < h) {
            Vec<Acc, N> weight = widen(load<N>(w + j)), a = widen(row[v]);
#pragma unroll
            for (int e = 0; e < N; e++) a.at[e] *= root * weight.at[e];
            store<N>(y + i * ys + j, narrow<T>(a));
        }
    }
}

#define FORWARD(V)                                                                                                     \
    extern "C" __global__ void rms_norm_##V(T *__restrict__ y, i64 ys, Acc *__restrict__ rstd, const T *__restrict__ x, \
                                            i64 xs, const T *__restrict__ r, i64 rs, T *__restrict__ sum, i64 ss,      \
                                            const T *__restrict__ w, const Acc *__restrict__ sums, i64 n, i64 h,       \
                                            Acc share, Acc eps) {                                                      \
        forward<V>(y, ys, rstd, x, xs, r, rs, sum, ss, w, sums, n, int(h), share, eps);                                \
    }
FORWARD(1)
FORWARD(2)
FORWARD(4)

// Any row: one per block.
extern "C" __global__ void rms_norm_any(T *__restrict__ y, i64 ys, Acc *__restrict__ rstd, const T *__restrict__ x, i64 xs,
                                        const T *__restrict__ r, i64 rs, T *sum, i64 ss, const T *__restrict__ w,
                                        const Acc *__restrict__ sums, i64 n, i64 h, Acc share, Acc eps) {
    i64 i = blockIdx.x;
    x += i * xs, y += i * ys;
    auto at = [&](i64 j) { return r ? narrow<T>(widen(x[j]) + widen(r[i * rs + j])) : x[j]; };
    Acc square = 0;
    if (sums) {
        square = sums[i];
    } else {
        for (i64 j = threadIdx.x; j < h; j += blockDim.x) square += widen(at(j)) * widen(at(j));
        square = group_sum(square);
    }
    Acc root = inverse_root(square * share + eps);
    if (threadIdx.x == 0) rstd[i] = root;
    for (i64 j = threadIdx.x; j < h; j += blockDim.x) {
        T element = at(j);
        if (r) sum[i * ss + j] = element;
        y[j] = narrow<T>(widen(element) * root * widen(w[j]));
    }
}

// sums[i] = Σ x², or Σ dy·w·x if there is a `dy`; `M` elements at once.
template <int M>
__device__ __forceinline__ void row_sums(Acc *sums, const T *dy, i64 dys, const T *x, i64 xs, const T *w, i64 n, i64 h) {
    i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    Acc sum = 0;
    if (i < n)
        for (i64 j = threadIdx.x * M; j < h; j += blockDim.x * M) {
            Vec<T, M> a = load<M>(x + i * xs + j);
            if (dy) {
                Vec<T, M> g = load<M>(dy + i * dys + j), weight = load<M>(w + j);
#pragma unroll
                for (int e = 0; e < M; e++) sum += widen(g.at[e]) * widen(weight.at[e]) * widen(a.at[e]);
            } else {
#pragma unroll
                for (int e = 0; e < M; e++) sum += widen(a.at[e]) * widen(a.at[e]);
            }
        }
    sum = group_sum(sum);
    if (i < n && threadIdx.x == 0) sums[i] = sum;
}

extern "C" __global__ void rms_norm_sums(Acc *sums, const T *dy, i64 dys, const T *x, i64 xs, const T *w, i64 n, i64 h) {
    row_sums<N>(sums, dy, dys, x, xs, w, n, h);
}
extern "C" __global__ void rms_norm_sums_any(Acc *sums, const T *dy, i64 dys, const T *x, i64 xs, const T *w, i64 n,
                                             i64 h) {
    row_sums<1>(sums, dy, dys, x, xs, w, n, h);
}

// --- backward --------------------------------------------------------------------------------------------------------
//
// With g = dy ⊙ w and m = mean(g ⊙ x): dx = r · g − x · r³ · m, and dw adds dy ⊙ x · r over the rows. What reaches x past the
// norm, if anything does, is added to dx before it is rounded. A block works on a piece, some consecutive rows, and leaves its sum of
// dw in a row of `partial: [gridDim.x, h]`; `add_pieces` adds these in order. There are large pieces for all blocks that run at once,
// and then small ones, since some multiprocessors are slower than others.
//
// Each thread copies its vectors of the next rows to a place of its own in shared memory while it works on this one, so that
// many loads are under way; it takes them from there once, and the next copies begin at once.

// The sum of `x` over the lanes of this row; rows of more than a warp wait for their own lanes only.
__device__ __forceinline__ Acc lanes_sum(Acc x, Acc *part) {
    if (blockDim.x <= 32) {
        for (int lane = blockDim.x / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
        return x;
    }
    int warps = blockDim.x / 32;
    part += threadIdx.y * warps;
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
    return warp_sum(threadIdx.x % 32 < warps ? part[threadIdx.x % 32] : Acc(0));
}

template <int V, int THREADS, int STAGES>
__device__ __forceinline__ void backward(T *dx, i64 dxs, Acc *partial, const T *dy, i64 dys, const T *x, i64 xs,
                                         const T *past, i64 ps, const T *w, const Acc *rstd, const Acc *sums, i64 n,
                                         int h, Acc share, Pieces pieces) {
    extern __shared__ __align__(16) unsigned char dynamic[];
    __shared__ Acc part[2][THREADS / 32];
    int thread = threadIdx.y * blockDim.x + threadIdx.x;
    auto *place = reinterpret_cast<Vec<T, N> *>(dynamic) + thread;
    auto at = [&](int stage, int v, int operand) { return place + ((operand * STAGES + stage) * V + v) * THREADS; };
    int column = threadIdx.x * N, apart = blockDim.x * N;
    bool has[V];
    // Weights stay in registers if there are few of them.
    constexpr bool KEEP = V <= 2;
    Vec<T, N> kept[KEEP ? V : 1];
#pragma unroll
    for (int v = 0; v < V; v++) {
        has[v] = column + v * apart < h;
        if (KEEP && has[v]) kept[v] = load<N>(w + column + v * apart);
    }
    auto weight = [&](int v) { return widen(KEEP ? kept[v] : load<N>(w + column + v * apart)); };

    let_next_begin();
    i64 first = pieces.first(blockIdx.x), end = min(n, pieces.first(blockIdx.x + 1)), fetched = first + threadIdx.y;
    // Copies of this thread's next row begin.
    auto fetch = [&](int stage) {
        if (fetched < end)
#pragma unroll
            for (int v = 0; v < V; v++)
                if (has[v]) {
                    int j = column + v * apart;
                    copy_async(at(stage, v, 0), dy + fetched * dys + j);
                    copy_async(at(stage, v, 1), x + fetched * xs + j);
                    if (past) copy_async(at(stage, v, 2), past + fetched * ps + j);
                }
        asm volatile("cp.async.commit_group;" ::: "memory");
        fetched += blockDim.y;
    };

    Acc total[V][N] = {};
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) fetch(stage);
    Acc next_r = first + threadIdx.y < end ? rstd[first + threadIdx.y] : Acc(0);
    for (int stage = 0, turn = 0; first < end; first += blockDim.y, turn ^= 1) {
        i64 i = first + threadIdx.y;
        bool live = i < end;
        Acc r = next_r;
        if (i + blockDim.y < end) next_r = rstd[i + blockDim.y];
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        Vec<T, N> gradient[V], input[V], other[V];
#pragma unroll
        for (int v = 0; v < V; v++)
            if (live && has[v]) {
                gradient[v] = *at(stage, v, 0), input[v] = *at(stage, v, 1);
                if (past) other[v] = *at(stage, v, 2);
            }
        fetch(stage);
        Acc mean = 0;
        if (sums) {
            if (live) mean = sums[i];
        } else {
#pragma unroll
            for (int v = 0; v < V; v++)
                if (live && has[v]) {
                    Vec<Acc, N> g = widen(gradient[v]), a = widen(input[v]), by = weight(v);
#pragma unroll
                    for (int e = 0; e < N; e++) mean += g.at[e] * by.at[e] * a.at[e];
                }
            mean = lanes_sum(mean, part[turn]);
        }
        Acc c = r * r * r * (mean * share);
#pragma unroll
        for (int v = 0; v < V; v++)
            if (live && has[v]) {
                Vec<Acc, N> g = widen(gradient[v]), a = widen(input[v]), by = weight(v), b = {};
                if (past) b = widen(other[v]);
#pragma unroll
                for (int e = 0; e < N; e++) {
                    g.at[e] *= r;
                    total[v][e] += g.at[e] * a.at[e];
                    b.at[e] += g.at[e] * by.at[e] - a.at[e] * c;
                }
                store<N>(dx + i * dxs + column + v * apart, narrow<T>(b));
            }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // The sums of all rows of threads, side by side, then in order.
    Acc *totals = reinterpret_cast<Acc *>(dynamic);
    __syncthreads();
#pragma unroll
    for (int v = 0; v < V; v++)
        if (has[v])
#pragma unroll
            for (int e = 0; e < N; e++) totals[threadIdx.y * h + column + v * apart + e] = total[v][e];
    __syncthreads();
    for (int j = thread; j < h; j += blockDim.x * blockDim.y) {
        Acc sum = totals[j];
        for (int row = 1; row < blockDim.y; row++) sum += totals[row * h + j];
        partial[blockIdx.x * i64(h) + j] = sum;
    }
}

#define BACKWARD(V, THREADS, BLOCKS, STAGES)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) rms_norm_backward_##V##_##THREADS(                   \
        T *__restrict__ dx, i64 dxs, Acc *__restrict__ partial, const T *__restrict__ dy, i64 dys,                     \
        const T *__restrict__ x, i64 xs, const T *__restrict__ past, i64 ps, const T *__restrict__ w,                  \
        const Acc *__restrict__ rstd, const Acc *__restrict__ sums, i64 n, i64 h, Acc share, Pieces pieces) {          \
        backward<V, THREADS, STAGES>(dx, dxs, partial, dy, dys, x, xs, past, ps, w, rstd, sums, n, int(h), share,      \
                                     pieces);                                                                          \
    }
BACKWARD(1, 512, 2, 2)
BACKWARD(2, 256, 3, 2)
BACKWARD(2, 512, 1, 3)
BACKWARD(4, 512, 1, 2)

// dx of any row: one per block.
extern "C" __global__ void rms_norm_backward_any(T *__restrict__ dx, i64 dxs, const T *__restrict__ dy, i64 dys,
                                                 const T *__restrict__ x, i64 xs, const T *__restrict__ past, i64 ps,
                                                 const T *__restrict__ w, const Acc *__restrict__ rstd,
                                                 const Acc *__restrict__ sums, i64 n, i64 h, Acc share) {
    i64 i = blockIdx.x;
    dx += i * dxs, dy += i * dys, x += i * xs;
    Acc mean = 0;
    if (sums) {
        mean = sums[i];
    } else {
        for (i64 j = threadIdx.x; j < h; j += blockDim.x) mean += widen(dy[j]) * widen(w[j]) * widen(x[j]);
        mean = group_sum(mean);
    }
    Acc r = rstd[i], c = r * r * r * (mean * share);
    for (i64 j = threadIdx.x; j < h; j += blockDim.x) {
        Acc other = past ? widen(past[i * ps + j]) : Acc(0);
        dx[j] = narrow<T>(other + (r * widen(dy[j]) * widen(w[j]) - widen(x[j]) * c));
    }
}

// Row p of `partial` is the sum over rows p · rows .. (p + 1) · rows; one thread per column.
extern "C" __global__ void rms_norm_weight_any(Acc *__restrict__ partial, const T *__restrict__ dy, i64 dys,
                                               const T *__restrict__ x, i64 xs, const Acc *__restrict__ rstd, i64 n, i64 h,
                                               i64 rows) {
    i64 j = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (j >= h) return;
    i64 first = blockIdx.y * rows, end = min(n, first + rows);
    Acc sum = 0;
    for (i64 i = first; i < end; i++) sum += widen(dy[i * dys + j]) * widen(x[i * xs + j]) * rstd[i];
    partial[blockIdx.y * h + j] = sum;
}

// dw += Σ_p partial[p]: `ACROSS` times `M` columns per block, the pieces in contiguous parts, one per row of threads.
constexpr int ACROSS = 8, PARTS = 64;
template <int M>
__device__ __forceinline__ void add_pieces(Acc *dw, const Acc *partial, i64 pieces, i64 h) {
    constexpr int LOADS = 8, COLUMNS = ACROSS * M, WARPS = ACROSS * PARTS / 32;
    __shared__ Acc sums[PARTS][COLUMNS + 1];
    i64 first = i64(blockIdx.x) * COLUMNS, j = first + threadIdx.x * M;
    i64 each = (pieces + PARTS - 1) / PARTS, end = min(pieces, i64(threadIdx.y + 1) * each);
    Vec<Acc, M> sum = {};
    await_previous();
    if (j < h)
        for (i64 p = threadIdx.y * each; p < end; p += LOADS) {
            Vec<Acc, M> x[LOADS];
#pragma unroll
            for (int l = 0; l < LOADS; l++)
                if (p + l < end) x[l] = load<M>(partial + (p + l) * h + j);
#pragma unroll
            for (int l = 0; l < LOADS; l++)
                if (p + l < end)
#pragma unroll
                    for (int e = 0; e < M; e++) sum.at[e] += x[l].at[e];
        }
#pragma unroll
    for (int e = 0; e < M; e++) sums[threadIdx.y][threadIdx.x * M + e] = sum.at[e];
    __syncthreads();
    // A warp for each column.
    int thread = threadIdx.y * ACROSS + threadIdx.x, lane = thread % 32;
#pragma unroll
    for (int column = thread / 32; column < COLUMNS; column += WARPS) {
        Acc all = warp_sum(sums[lane][column] + sums[lane + 32][column]);
        if (lane == 0 && first + column < h) dw[first + column] += all;
    }
}

#define ADD_PIECES(NAME, M)                                                                                            \
    extern "C" __global__ void __launch_bounds__(ACROSS * PARTS)                                                       \
        NAME(Acc *__restrict__ dw, const Acc *__restrict__ partial, i64 pieces, i64 h) {                               \
        add_pieces<M>(dw, partial, pieces, h);                                                                         \
    }
ADD_PIECES(add_pieces, 16 / sizeof(Acc))
ADD_PIECES(add_pieces_any, 1)
