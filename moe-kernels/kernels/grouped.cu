// Products of row groups with a weight each, for every element type, size, stride and alignment. Sums are formed in Acc
// over ascending k.
//
// A block of 16 x 16 threads owns a tile of one group's result; thread (ty, tx) holds its rows ty + 16 i and columns
// tx + 16 j. Where row tiles begin follows from the offsets, which only the device knows: there are blocks for as many as
// there can be, and those past the last tile leave.

constexpr int TILE = 64, DEPTH = 16, SIDE = 16, EACH = TILE / SIDE, THREADS = SIDE * SIDE;

// One side of a product: element (i, k) lies at `at + i * across + k * along`; there are `count` of i.
struct Side {
    const T *at;
    i64 across, along;
    i64 count;
};

// Elements [i0, i0 + TILE) x [k0, k0 + DEPTH) as `to[k][i]`, zero where there are none. Neighbouring threads read
// neighbouring elements.
template <bool ROWS_OF_K> __device__ void fill(Acc (&to)[DEPTH][TILE + 1], const Side &s, i64 i0, i64 k0, i64 depth) {
#pragma unroll
    for (int part = 0; part < TILE * DEPTH / THREADS; part++) {
        int index = part * THREADS + threadIdx.x;
        int i = ROWS_OF_K ? index / DEPTH : index % TILE;
        int k = ROWS_OF_K ? index % DEPTH : index / TILE;
        bool there = i0 + i < s.count && k0 + k < depth;
        to[k][i] = there ? widen(s.at[(i0 + i) * s.across + (k0 + k) * s.along]) : Acc(0);
    }
}

template <bool A_ROWS_OF_K, bool B_ROWS_OF_K>
__device__ void multiply(Acc (&sum)[EACH][EACH], const Side &a, const Side &b, i64 a0, i64 b0, i64 depth) {
    __shared__ Acc as[DEPTH][TILE + 1], bs[DEPTH][TILE + 1];
    int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < EACH; j++) sum[i][j] = Acc(0);
    for (i64 k0 = 0; k0 < depth; k0 += DEPTH) {
        fill<A_ROWS_OF_K>(as, a, a0, k0, depth);
        fill<B_ROWS_OF_K>(bs, b, b0, k0, depth);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            Acc x[EACH], y[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) x[i] = as[k][ty + SIDE * i], y[i] = bs[k][tx + SIDE * i];
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) sum[i][j] += x[i] * y[j];
        }
        __syncthreads();
    }
}

// Whether the offsets ascend from 0 to at most `rows`; else block 0 says so. The same in all threads.
__device__ bool sound(const i32 *offsets, i64 groups, i64 rows, const Fault &fault) {
    bool good = threadIdx.x > 0 || offsets[0] == 0;
    for (i64 e = threadIdx.x; e < groups; e += THREADS) {
        i64 from = offsets[e], to = offsets[e + 1];
        good = good && 0 <= from && from <= to && to <= rows;
    }
    good = __syncthreads_and(good);
    if (!good && blockIdx.x == 0 && threadIdx.x == 0) fault.raise(0);
    return good;
}

// The group that has row tile `i` and its number in the group; `groups` if there are fewer tiles. Warps do the same work.
__device__ i64 group_of(const i32 *offsets, i64 groups, i64 &i) {
    i32 lane = threadIdx.x % 32;
    for (i64 base = 0; base < groups; base += 32) {
        i64 e = base + lane;
        i64 tiles = e < groups ? (offsets[e + 1] - offsets[e] + TILE - 1) / TILE : 0;
        i64 end = tiles;
        for (i32 by = 1; by < 32; by *= 2) {
            i64 lower = __shfl_up_sync(FULL_MASK, end, by);
            if (lane >= by) end += lower;
        }
        u32 past = __ballot_sync(FULL_MASK, i < end);
        if (past) {
            i32 first = __ffs(past) - 1;
            i -= __shfl_sync(FULL_MASK, end - tiles, first);
            return base + first;
        }
        i -= __shfl_sync(FULL_MASK, end, 31);
    }
    return groups;
}

// y_e = x_e op(w_e). `n`: columns of y; `depth`: of x.
template <bool TRANSPOSED>
__device__ void grouped(T *y, i64 y_stride, const T *x, i64 x_stride, const T *w, i64 w_stride, const i32 *offsets, i64 groups, i64 rows,
                        i64 n, i64 depth, const Fault &fault) {
    if (!sound(offsets, groups, rows, fault)) return;
    i64 columns = (n + TILE - 1) / TILE;
    i64 tile = blockIdx.x / columns, b0 = blockIdx.x % columns * TILE;
    i64 e = group_of(offsets, groups, tile);
    if (e == groups) return;
    i64 a0 = tile * TILE, first = offsets[e], count = offsets[e + 1] - first;
    Side a = {x + first * x_stride, x_stride, 1, count};
    Side b = TRANSPOSED ? Side{w + e * n * w_stride, w_stride, 1, n} : Side{w + e * depth * w_stride, 1, w_stride, n};
    Acc sum[EACH][EACH];
    multiply<true, TRANSPOSED>(sum, a, b, a0, b0, depth);
    for (int i = 0; i < EACH; i++) {
        for (int j = 0; j < EACH; j++) {
            i64 row = a0 + threadIdx.x / SIDE + SIDE * i, column = b0 + threadIdx.x % SIDE + SIDE * j;
            if (row < count && column < n) y[(first + row) * y_stride + column] = narrow<T>(sum[i][j]);
        }
    }
}

// Blocks: (tiles of rows + groups) * tiles of columns.
extern "C" __global__ void __launch_bounds__(THREADS)
    grouped_gemm_t(T *y, i64 y_stride, const T *x, i64 x_stride, const T *w, i64 w_stride, const i32 *offsets, i64 groups, i64 rows, i64 n,
                   i64 depth, Fault fault) {
    grouped<true>(y, y_stride, x, x_stride, w, w_stride, offsets, groups, rows, n, depth, fault);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    grouped_gemm_n(T *y, i64 y_stride, const T *x, i64 x_stride, const T *w, i64 w_stride, const i32 *offsets, i64 groups, i64 rows, i64 n,
                   i64 depth, Fault fault) {
    grouped<false>(y, y_stride, x, x_stride, w, w_stride, offsets, groups, rows, n, depth, fault);
}

// g_e += dy_eT x_e, or g_e = dy_eT x_e.
template <bool ADD>
__device__ void weight_gradient(Acc *g, i64 g_stride, const T *dy, i64 dy_stride, const T *x, i64 x_stride, const i32 *offsets, i64 groups,
                                i64 rows, i64 m, i64 n, const Fault &fault) {
    if (!sound(offsets, groups, rows, fault)) return;
    i64 columns = (n + TILE - 1) / TILE, each = (m + TILE - 1) / TILE * columns;
    i64 e = blockIdx.x / each, tile = blockIdx.x % each;
    i64 a0 = tile / columns * TILE, b0 = tile % columns * TILE;
    i64 first = offsets[e], depth = offsets[e + 1] - first;
    if (ADD && depth == 0) return;
    Acc sum[EACH][EACH];
    multiply<false, false>(sum, {dy + first * dy_stride, 1, dy_stride, m}, {x + first * x_stride, 1, x_stride, n}, a0, b0, depth);
    for (int i = 0; i < EACH; i++) {
        for (int j = 0; j < EACH; j++) {
            i64 row = a0 + threadIdx.x / SIDE + SIDE * i, column = b0 + threadIdx.x % SIDE + SIDE * j;
            if (row >= m || column >= n) continue;
            Acc &to = g[(e * m + row) * g_stride + column];
            to = ADD ? to + sum[i][j] : sum[i][j];
        }
    }
}

// Blocks: groups * tiles of g_e.
extern "C" __global__ void __launch_bounds__(THREADS)
    grouped_gemm_acc(Acc *g, i64 g_stride, const T *dy, i64 dy_stride, const T *x, i64 x_stride, const i32 *offsets, i64 groups, i64 rows,
                     i64 m, i64 n, Fault fault) {
    weight_gradient<true>(g, g_stride, dy, dy_stride, x, x_stride, offsets, groups, rows, m, n, fault);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    grouped_gemm_to_acc(Acc *g, i64 g_stride, const T *dy, i64 dy_stride, const T *x, i64 x_stride, const i32 *offsets, i64 groups,
                        i64 rows, i64 m, i64 n, Fault fault) {
    weight_gradient<false>(g, g_stride, dy, dy_stride, x, x_stride, offsets, groups, rows, m, n, fault);
}
