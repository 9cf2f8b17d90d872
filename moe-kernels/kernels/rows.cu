// Moving rows: elements are bytes, whatever they mean.

constexpr int N = 16 / sizeof(T);
constexpr int ROWS = 4;

struct Copy {
    T *y;
    i64 ys;
    const T *x;
    i64 xs;
    typedef Words<T, N> In;

    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        return load_up_to<N>(x + i * xs + j, n, vectors);
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        store_up_to(y + i * ys + j, in, n, vectors);
    }
};

extern "C" __global__ void __launch_bounds__(256) copy_rows(T *y, i64 ys, const T *x, i64 xs, Tiles tiles) {
    for_tiles<N, ROWS>(tiles, Copy{y, ys, x, xs});
}

struct Gather {
    T *y;
    i64 ys;
    const T *x;
    i64 xs;
    const i32 *index;
    i64 end;
    Fault outside;
    typedef Words<T, N> In;

    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        i32 from = index[i];
        if (from >= end && j == 0) outside.raise(i);
        if (from < 0 || from >= end) return In{};
        return load_up_to<N>(x + from * xs + j, n, vectors);
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        store_up_to(y + i * ys + j, in, n, vectors);
    }
};

extern "C" __global__ void __launch_bounds__(256) gather_rows(T *y, i64 ys, const T *x, i64 xs, const i32 *index, i64 end,
                                                              Fault outside, Tiles tiles) {
    for_tiles<N, ROWS>(tiles, Gather{y, ys, x, xs, index, end, outside});
}

// Each row is read once and written where it goes.
struct Spread {
    T *y;
    i64 ys;
    const T *x;
    i64 xs;
    const i32 *position;
    i64 ps, k, end;
    Fault outside;
    typedef Words<T, N> In;

    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        return load_up_to<N>(x + i * xs + j, n, vectors);
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        for (i64 q = 0; q < k; q++) {
            i32 to = position[i * ps + q];
            if (to >= end && j == 0) outside.raise(i);
            if (to >= 0 && to < end) store_up_to(y + to * ys + j, in, n, vectors);
        }
    }
};

extern "C" __global__ void __launch_bounds__(256) spread_rows(T *y, i64 ys, const T *x, i64 xs, const i32 *position, i64 ps, i64 k,
                                                              i64 end, Fault outside, Tiles tiles) {
    for_tiles<N, ROWS>(tiles, Spread{y, ys, x, xs, position, ps, k, end, outside});
}

// Zeros in the rows whose index is negative. A warp looks at 32 of them.
extern "C" __global__ void __launch_bounds__(256) zero_rows(T *y, i64 ys, const i32 *index, i64 n, i64 cols) {
    i64 first = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32 * 32;
    i32 lane = threadIdx.x % 32;
    u32 none = __ballot_sync(FULL_MASK, first + lane < n && index[first + lane] < 0);
    for (; none; none &= none - 1) {
        T *row = y + (first + __ffs(none) - 1) * ys;
        for (i64 j = lane; j < cols; j += 32) row[j] = T{};
    }
}

// All blocks of a row beside each other are the columns of the tiles: a vector lies within one of them.
struct CopyBlocks {
    T *y;
    i64 ys, y_step;
    const T *x;
    i64 xs, x_step, width;
    typedef Words<T, N> In;

    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        if (vectors) return load_up_to<N>(x + i * xs + j / width * x_step + j % width, N, true);
        In in = {};
#pragma unroll
        for (int k = 0; k < N; k++)
            if (k < n) in.set(k, x[i * xs + (j + k) / width * x_step + (j + k) % width]);
        return in;
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        if (vectors) {
            store_up_to(y + i * ys + j / width * y_step + j % width, in, N, true);
            return;
        }
#pragma unroll
        for (int k = 0; k < N; k++)
            if (k < n) y[i * ys + (j + k) / width * y_step + (j + k) % width] = in.get(k);
    }
};

extern "C" __global__ void __launch_bounds__(256) copy_column_blocks(T *y, i64 ys, i64 y_step, const T *x, i64 xs,
                                                                     i64 x_step, i64 width, Tiles tiles) {
    for_tiles<N, ROWS>(tiles, CopyBlocks{y, ys, y_step, x, xs, x_step, width});
}
