// Sums in two launches: parts that depend on the shapes alone, then their sum.

constexpr int N = 16 / sizeof(T);
constexpr int THREADS = 256;

// parts[block] = Σ a ⊙ b over every so many vectors of a matrix that has `per_row` of them in a row.
extern "C" __global__ void __launch_bounds__(THREADS) dot(double *parts, const T *a, i64 as, const T *b, i64 bs, i64 rows,
                                                          i64 cols, i64 per_row, i32 vectors) {
    __shared__ double warps[THREADS / 32];
    double sum[N] = {};
    i64 first = i64(blockIdx.x) * THREADS + threadIdx.x, step = i64(gridDim.x) * THREADS, end = rows * per_row;
    bool squares = a == b && as == bs;
    auto add = [&](const Words<T, N> &x, const Words<T, N> &y) {
#pragma unroll
        for (int k = 0; k < N; k++) sum[k] += to_f64(x.get(k)) * to_f64(y.get(k));
    };
    // Whole vectors of one row: a loop without branches, so that many reads are under way.
    i64 v = first, whole = rows == 1 && vectors ? cols / N : 0;
    if (squares) {
#pragma unroll 8
        for (; v < whole; v += step) {
            Words<T, N> x = load_up_to<N>(a + v * N, N, true);
            add(x, x);
        }
    } else {
#pragma unroll 4
        for (; v < whole; v += step) add(load_up_to<N>(a + v * N, N, true), load_up_to<N>(b + v * N, N, true));
    }
    for (; v < end; v += step) {
        i64 i = v / per_row, j = (v - i * per_row) * N;
        int n = int(min(i64(N), cols - j));
        add(load_up_to<N>(a + i * as + j, n, vectors), load_up_to<N>(b + i * bs + j, n, vectors));
    }
    double total = 0;
#pragma unroll
    for (int k = 0; k < N; k++) total += sum[k];
    total = block_sum<THREADS>(total, warps);
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

// A row of elements, whose squares are added to `out[i]`.
struct Piece {
    const T *x;
    i64 n;
    // The first of the parts that its squares are summed in, and whether vectors may be moved at once.
    i64 first, vectors;
};

// parts[p] = Σ x² over `WARP_VECTORS` vectors for each lane, or fewer at the end of a piece: one warp for each part. There is at least
// one piece, and each has at least one part.
constexpr int WARP_VECTORS = 64;

extern "C" __global__ void __launch_bounds__(THREADS) squares(double *parts, i64 count, const Piece *pieces, i64 piece_count) {
    i64 part = i64(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (part >= count) return;
    i64 at = 0;
    for (i64 end = piece_count; end - at > 1;) {
        i64 middle = (at + end) / 2;
        (pieces[middle].first <= part ? at : end) = middle;
    }
    const Piece piece = pieces[at];
    i64 first = (part - piece.first) * WARP_VECTORS * 32 * N;
    const T *x = piece.x + first;
    i32 n = i32(min(i64(WARP_VECTORS * 32 * N), piece.n - first)), v = threadIdx.x % 32, whole = piece.vectors ? n / N : 0;
    double sum[N] = {};
    auto add = [&](const Words<T, N> &x) {
#pragma unroll
        for (int k = 0; k < N; k++) sum[k] += to_f64(x.get(k)) * to_f64(x.get(k));
    };
    // Whole vectors first: a loop without branches, so that many reads are under way.
#pragma unroll 8
    for (; v < whole; v += 32) add(load_up_to<N>(x + v * N, N, true));
    for (; v * N < n; v += 32) add(load_up_to<N>(x + v * N, min(N, n - v * N), false));
    double total = 0;
#pragma unroll
    for (int k = 0; k < N; k++) total += sum[k];
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) parts[part] = total;
}

// Parts that are added to one element of `out`.
struct Total {
    i64 i, first, end;
};

// One warp for each total.
extern "C" __global__ void __launch_bounds__(THREADS) add_squares(double *out, const double *parts, const Total *totals,
                                                                  i64 count) {
    i64 at = i64(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (at >= count) return;
    const Total total = totals[at];
    double sum = 0;
    for (i64 p = total.first + threadIdx.x % 32; p < total.end; p += 32) sum += parts[p];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) out[total.i] += sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) add_parts(double *out, const double *parts, i64 n) {
    __shared__ double warps[THREADS / 32];
    double sum = 0;
    for (i64 i = threadIdx.x; i < n; i += THREADS) sum += parts[i];
    sum = block_sum<THREADS>(sum, warps);
    if (threadIdx.x == 0) *out += sum;
}

// y[block of rows, c] = Σ x[i, c] over the `each` rows of the block; blocks are (32 · N columns, rows).
template <typename E>
__device__ __forceinline__ void column_sums_of(Acc *y, i64 ys, const E *x, i64 xs, i64 rows, i64 cols, i64 each,
                                               bool vectors) {
    constexpr int N = 16 / sizeof(E);
    i64 j = (i64(blockIdx.x) * 32 + threadIdx.x) * N, first = blockIdx.y * each;
    int n = int(max(i64(0), min(i64(N), cols - j)));
    Acc sum[N];
    sum_of_rows<N>(sum, x, xs, first, min(first + each, rows), j, n, vectors, (const Acc *)nullptr);
    if (threadIdx.y == 0)
        for (int k = 0; k < n; k++) y[blockIdx.y * ys + j + k] = sum[k];
}

extern "C" __global__ void __launch_bounds__(THREADS) column_sums(Acc *y, i64 ys, const T *x, i64 xs, i64 rows, i64 cols,
                                                                  i64 each, i32 vectors) {
    column_sums_of(y, ys, x, xs, rows, cols, each, vectors);
}

extern "C" __global__ void __launch_bounds__(THREADS) column_sums_of_parts(Acc *y, i64 ys, const Acc *x, i64 xs, i64 rows,
                                                                           i64 cols, i64 each, i32 vectors) {
    column_sums_of(y, ys, x, xs, rows, cols, each, vectors);
}

// out[i] = the largest of blocks[b * n + i]; not a number if one of them is none.
extern "C" __global__ void __launch_bounds__(THREADS) max_of_blocks(T *out, const T *blocks, i64 n, i64 count) {
    for (i64 i = i64(blockIdx.x) * THREADS + threadIdx.x; i < n; i += i64(gridDim.x) * THREADS) {
        T most = blocks[i];
        for (i64 b = 1; b < count; b++) {
            T x = blocks[b * n + i];
            if (to_f64(x) > to_f64(most) || to_f64(x) != to_f64(x)) most = x;
        }
        out[i] = most;
    }
}
