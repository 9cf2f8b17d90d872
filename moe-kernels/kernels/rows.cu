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
