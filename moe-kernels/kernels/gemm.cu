// Dense products of any layout, for what cuBLASLt has no algorithm for. A block of 16 x 16 threads owns a tile of the result;
// thread (ty, tx) holds its rows ty + 16 i and columns tx + 16 j.

constexpr int TILE = 64;
constexpr int DEPTH = 16;  // columns of op(a) that are multiplied at a time
constexpr int SIDE = 16;
constexpr int THREADS = SIDE * SIDE;
constexpr int EACH = TILE / SIDE;

// Element (i, j) of an operand is at[i * row + j * col]; `rows` by `cols` exist.
struct Operand {
    const T *at;
    i64 row, col, rows, cols;

    __device__ Operand(const T *at, i64 stride, i32 transposed, i64 rows, i64 cols)
        : at(at), row(transposed ? 1 : stride), col(transposed ? stride : 1), rows(rows), cols(cols) {}

    __device__ Acc element(i64 i, i64 j) const { return i < rows && j < cols ? widen(at[i * row + j * col]) : Acc(0); }
};

// Neighbouring threads take neighbours in memory: along the depth, or along the tile.
__device__ __forceinline__ void place(int e, bool along_depth, int &in_tile, int &in_depth) {
    in_tile = along_depth ? e / DEPTH : e % TILE;
    in_depth = along_depth ? e % DEPTH : e / TILE;
}

__device__ __forceinline__ void product(Acc (&sum)[EACH][EACH], const Operand &a, const Operand &b, i64 row, i64 col) {
    __shared__ Acc x[DEPTH][TILE + 1], y[DEPTH][TILE + 1];
    int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (i64 from = 0; from < a.cols; from += DEPTH) {
        for (int e = threadIdx.x; e < TILE * DEPTH; e += THREADS) {
            int i, d;
            place(e, a.col == 1, i, d);
            x[d][i] = a.element(row + i, from + d);
            place(e, b.row == 1, i, d);
            y[d][i] = b.element(from + d, col + i);
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) sum[i][j] += x[d][ty + SIDE * i] * y[d][tx + SIDE * j];
        __syncthreads();
    }
}

template <bool ADD, typename Out>
__device__ __forceinline__ void gemm_tile(Out *out, i64 stride, const Operand &a, const Operand &b) {
    i64 tiles = (b.cols + TILE - 1) / TILE;
    i64 row = blockIdx.x / tiles * TILE, col = blockIdx.x % tiles * TILE;
    Acc sum[EACH][EACH] = {};
    product(sum, a, b, row, col);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            i64 r = row + threadIdx.x / SIDE + SIDE * i, c = col + threadIdx.x % SIDE + SIDE * j;
            if (r >= a.rows || c >= b.cols) continue;
            Out &to = out[r * stride + c];
            to = narrow<Out>(ADD ? widen(to) + sum[i][j] : sum[i][j]);
        }
    }
}

// y = op(a) op(b): [m, k] by [k, n].
extern "C" __global__ void __launch_bounds__(THREADS)
gemm(T *y, i64 ys, const T *a, i64 as, const T *b, i64 bs, i64 m, i64 n, i64 k, i32 ta, i32 tb) {
    gemm_tile<false>(y, ys, Operand(a, as, ta, m, k), Operand(b, bs, tb, k, n));
}

// g += op(a) op(b).
extern "C" __global__ void __launch_bounds__(THREADS)
gemm_acc(Acc *g, i64 gs, const T *a, i64 as, const T *b, i64 bs, i64 m, i64 n, i64 k, i32 ta, i32 tb) {
    gemm_tile<true>(g, gs, Operand(a, as, ta, m, k), Operand(b, bs, tb, k, n));
}

// y += op(a) op(b), rounded once.
extern "C" __global__ void __launch_bounds__(THREADS)
gemm_add(T *y, i64 ys, const T *a, i64 as, const T *b, i64 bs, i64 m, i64 n, i64 k, i32 ta, i32 tb) {
    gemm_tile<true>(y, ys, Operand(a, as, ta, m, k), Operand(b, bs, tb, k, n));
}

#if defined(T_BF16)
// A float is the sum of three bf16, each the nearest to what the ones before it leave: 24 bits of 8 each. With the parts of
// a[m, k] side by side, each of `p` columns (a multiple of 8, zeros behind the last of `k`), a product of floats and bf16 is one
// of bf16.

// parts[r] = hi | mid | lo of a[r]. `vectors`: rows of `a` begin at multiples of 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS)
split(bf16 *parts, const float *a, i64 as, i64 m, i64 k, i64 p, i32 vectors) {
    i64 per_row = p / 8;
    for (i64 v = i64(blockIdx.x) * THREADS + threadIdx.x; v < m * per_row; v += i64(gridDim.x) * THREADS) {
        i64 r = v / per_row, c = (v - r * per_row) * 8;
        Words<float, 8> x = load_up_to<8>(a + r * as + c, int(max(i64(0), min(i64(8), k - c))), vectors);
        Words<bf16, 8> hi = {}, mid = {}, lo = {};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float rest = x.get(j);
            bf16 first = bf16_from_f32(rest);
            rest -= widen(first);
            bf16 second = bf16_from_f32(rest);
            hi.set(j, first);
            mid.set(j, second);
            lo.set(j, bf16_from_f32(rest - widen(second)));
        }
        bf16 *to = parts + r * 3 * p + c;
        store_up_to(to, hi, 8, true);
        store_up_to(to + p, mid, 8, true);
        store_up_to(to + 2 * p, lo, 8, true);
    }
}

// y[part · p + e] = b[e] for each of the three parts, zeros behind row `k`: [3p, n], n columns without gaps.
extern "C" __global__ void __launch_bounds__(THREADS) stack(bf16 *y, const bf16 *b, i64 bs, i64 n, i64 k, i64 p) {
    for (i64 v = i64(blockIdx.x) * THREADS + threadIdx.x; v < 3 * p * n; v += i64(gridDim.x) * THREADS) {
        i64 e = v / n % p;
        y[v] = e < k ? b[e * bs + v % n] : bf16{0};
    }
}

// g[e] += Σ over parts of q[part · p + e], the smallest first. g: [k, n], q: [3p, n] without gaps.
extern "C" __global__ void __launch_bounds__(THREADS) fold(float *g, i64 gs, const float *q, i64 n, i64 k, i64 p) {
    for (i64 v = i64(blockIdx.x) * THREADS + threadIdx.x; v < k * n; v += i64(gridDim.x) * THREADS) {
        i64 e = v / n, c = v - e * n;
        g[e * gs + c] += (q[2 * p * n + v] + q[p * n + v]) + q[v];
    }
}
#endif
