// Moving rows: elements are bytes, whatever they mean. One warp moves one piece of a row.

// Elements that one warp moves: enough that a row of a few thousand is spread over several.
constexpr int PIECE = 1024;

// y[0..cols] = x[0..cols], or zeros if there is no `x`; 16 bytes at a time where both addresses allow.
__device__ __forceinline__ void move(T *y, const T *x, int cols, int lane) {
    constexpr int N = 16 / sizeof(T);
    int done = 0;
    if (u64(y) % 16 == 0 && u64(x) % 16 == 0) {
        for (int j = lane * N; j + N <= cols; j += 32 * N) {
            Vec<T, N> v = {};
            if (x) v = load<N>(x + j);
            store<N>(y + j, v);
        }
        done = cols / N * N;
    }
    for (int j = done + lane; j < cols; j += 32) {
        T v = {};
        if (x) v = x[j];
        y[j] = v;
    }
}

// Pieces of `cols` columns each of `n` rows: which one is this warp's next?
#define FOR_EACH_PIECE(n, cols)                                                                                        \
    i64 pieces = max(i64(1), ((cols) + PIECE - 1) / PIECE);                                                                  \
    for (i64 p = i64(blockIdx.x) * blockDim.y + threadIdx.y; p < (n) * pieces; p += i64(gridDim.x) * blockDim.y)

extern "C" __global__ void copy_rows(T *y, i64 ys, const T *x, i64 xs, i64 n, i64 cols) {
    FOR_EACH_PIECE(n, cols) {
        i64 i = p / pieces, j = p % pieces * PIECE;
        move(y + i * ys + j, x + i * xs + j, int(min(i64(PIECE), cols - j)), threadIdx.x);
    }
}

extern "C" __global__ void gather_rows(T *y, i64 ys, const T *x, i64 xs, const i32 *index, i64 n, i64 cols, i64 end,
                                       Fault outside) {
    FOR_EACH_PIECE(n, cols) {
        i64 i = p / pieces, j = p % pieces * PIECE;
        i64 from = index[i];
        if (from >= end) {
            if (threadIdx.x == 0) outside.raise(i);
            continue;
        }
        const T *row = from < 0 ? nullptr : x + from * xs + j;
        move(y + i * ys + j, row, int(min(i64(PIECE), cols - j)), threadIdx.x);
    }
}

extern "C" __global__ void copy_column_blocks(T *y, i64 ys, i64 y_first, i64 y_step, const T *x, i64 xs, i64 x_first,
                                              i64 x_step, i64 n, i64 count, i64 width) {
    FOR_EACH_PIECE(n * count, width) {
        i64 i = p / pieces / count, b = p / pieces % count, j = p % pieces * PIECE;
        move(y + i * ys + y_first + b * y_step + j, x + i * xs + x_first + b * x_step + j,
             int(min(i64(PIECE), width - j)), threadIdx.x);
    }
}
