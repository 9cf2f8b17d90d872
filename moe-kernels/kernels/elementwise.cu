// Arithmetic on whole matrices. A thread has 16 bytes of `T`, of several rows.

constexpr int N = 16 / sizeof(T);
constexpr int ROWS = 4;

struct Add {
    T *y;
    i64 ys;
    const T *a;
    i64 as;
    const T *b;
    i64 bs;
    struct In {
        Words<T, N> a, b;
    };

    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        return {load_up_to<N>(a + i * as + j, n, vectors), load_up_to<N>(b + i * bs + j, n, vectors)};
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        Words<T, N> sum = {};
#pragma unroll
        for (int k = 0; k < N; k++) sum.set(k, narrow<T>(widen(in.a.get(k)) + widen(in.b.get(k))));
        store_up_to(y + i * ys + j, sum, n, vectors);
    }
};

extern "C" __global__ void __launch_bounds__(256) add(T *y, i64 ys, const T *a, i64 as, const T *b, i64 bs, Tiles tiles) {
    for_tiles<N, ROWS>(tiles, Add{y, ys, a, as, b, bs});
}

// Also a bias: a row that is the same for all rows of `y` is a matrix of stride 0.
extern "C" __global__ void __launch_bounds__(256) add_assign(T *y, i64 ys, const T *x, i64 xs, Tiles tiles) {
    for_tiles<N, ROWS>(tiles, Add{y, ys, y, ys, x, xs});
}

template <typename To, typename From> struct Convert {
    // 16 bytes of the wider type.
    static constexpr int N = 16 / (sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From));
    To *y;
    i64 ys;
    const From *x;
    i64 xs;
    typedef Words<From, N> In;

    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        return load_up_to<N>(x + i * xs + j, n, vectors);
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        Words<To, N> out = {};
#pragma unroll
        for (int k = 0; k < N; k++) {
            if constexpr (sizeof(To) == 8)
                out.set(k, narrow<To>(to_f64(in.get(k))));
            else
                out.set(k, narrow<To>(widen(in.get(k))));
        }
        store_up_to(y + i * ys + j, out, n, vectors);
    }
};

template <typename To, typename From>
__device__ __forceinline__ void convert(To *y, i64 ys, const From *x, i64 xs, const Tiles &tiles) {
    for_tiles<Convert<To, From>::N, ROWS>(tiles, Convert<To, From>{y, ys, x, xs});
}

extern "C" __global__ void __launch_bounds__(256) widen_rows(Acc *y, i64 ys, const T *x, i64 xs, Tiles tiles) {
    convert(y, ys, x, xs, tiles);
}

extern "C" __global__ void __launch_bounds__(256) narrow_rows(T *y, i64 ys, const Acc *x, i64 xs, Tiles tiles) {
    convert(y, ys, x, xs, tiles);
}

extern "C" __global__ void __launch_bounds__(256) widen_f64(double *y, i64 ys, const T *x, i64 xs, Tiles tiles) {
    convert(y, ys, x, xs, tiles);
}

extern "C" __global__ void __launch_bounds__(256) narrow_f64(T *y, i64 ys, const double *x, i64 xs, Tiles tiles) {
    convert(y, ys, x, xs, tiles);
}

// Sources that are read before they are added: enough reads under way for most choices of experts at once.
constexpr int SOURCES = 8;

// The sum of some rows of `x` under one another, in ascending order.
struct GatherSum {
    T *y;
    i64 ys;
    const T *x;
    i64 xs;
    const i32 *index;
    i64 is;
    i32 sources;
    i64 end;
    Fault outside;
    struct In {
        Acc sum[N];
        bool any;
    };

    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        // Adding −0 leaves everything as it is, 0 and −0 too: what is skipped is −0.
        Words<T, N> nothing = {};
#pragma unroll
        for (int k = 0; k < N; k++) nothing.set(k, narrow<T>(Acc(-0.0)));
        In in;
#pragma unroll
        for (int k = 0; k < N; k++) in.sum[k] = Acc(-0.0);
        in.any = false;
        const i32 *at = index + i * is;
        for (i32 left = sources; left > 0; left -= SOURCES, at += SOURCES) {
            i32 from[SOURCES];
#pragma unroll
            for (int s = 0; s < SOURCES; s++) from[s] = s < left ? at[s] : -1;
            Words<T, N> v[SOURCES];
#pragma unroll
            for (int s = 0; s < SOURCES; s++) {
                v[s] = nothing;
                if (from[s] >= end) {
                    if (j == 0) outside.raise(i);
                } else if (from[s] >= 0) {
                    v[s] = load_up_to<N>(x + from[s] * xs + j, n, vectors);
                    in.any = true;
                }
            }
#pragma unroll
            for (int s = 0; s < SOURCES; s++)
#pragma unroll
                for (int k = 0; k < N; k++) in.sum[k] += widen(v[s].get(k));
        }
        return in;
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        Words<T, N> out = {};
#pragma unroll
        for (int k = 0; k < N; k++) out.set(k, narrow<T>(in.any ? in.sum[k] : Acc(0)));
        store_up_to(y + i * ys + j, out, n, vectors);
    }
};

extern "C" __global__ void __launch_bounds__(256) gather_sum(T *y, i64 ys, const T *x, i64 xs, const i32 *index, i64 is,
                                                                i32 sources, i64 end, Fault outside, Tiles tiles) {
    for_tiles<N, 1>(tiles, GatherSum{y, ys, x, xs, index, is, sources, end, outside});
}

// The same of at most two rows each, by threads with several sums.
struct GatherSumFew {
    T *y;
    i64 ys;
    const T *x;
    i64 xs;
    const i32 *index;
    i64 is;
    i32 sources;
    i64 end;
    Fault outside;
    struct In {
        Words<T, N> a, b;
        bool any;
    };

    __device__ __forceinline__ bool take(Words<T, N> &v, i32 from, i64 i, i64 j, int n, bool vectors) const {
#pragma unroll
        for (int k = 0; k < N; k++) v.set(k, narrow<T>(Acc(-0.0)));
        if (from >= end && j == 0) outside.raise(i);
        bool is_there = from >= 0 && from < end;
        if (is_there) v = load_up_to<N>(x + from * xs + j, n, vectors);
        return is_there;
    }
    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        i32 a = sources > 0 ? index[i * is] : -1, b = sources > 1 ? index[i * is + 1] : -1;
        In in = {};
        in.any = take(in.a, a, i, j, n, vectors) | take(in.b, b, i, j, n, vectors);
        return in;
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        Words<T, N> out = {};
#pragma unroll
        for (int k = 0; k < N; k++) out.set(k, narrow<T>(in.any ? widen(in.a.get(k)) + widen(in.b.get(k)) : Acc(0)));
        store_up_to(y + i * ys + j, out, n, vectors);
    }
};

extern "C" __global__ void __launch_bounds__(256) gather_sum_few(T *y, i64 ys, const T *x, i64 xs, const i32 *index, i64 is,
                                                                 i32 sources, i64 end, Fault outside, Tiles tiles) {
    for_tiles<N, ROWS>(tiles, GatherSumFew{y, ys, x, xs, index, is, sources, end, outside});
}

// The sum of `count` blocks of columns of `x`, each `step` after the one before.
struct SumBlocks {
    T *y;
    i64 ys;
    const T *x;
    i64 xs, step, count;
    struct In {
        Acc sum[N];
    };

    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        In in = {};
#pragma unroll 4
        for (i64 b = 0; b < count; b++) {
            Words<T, N> v = load_up_to<N>(x + i * xs + b * step + j, n, vectors);
#pragma unroll
            for (int k = 0; k < N; k++) in.sum[k] += widen(v.get(k));
        }
        return in;
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        Words<T, N> out = {};
#pragma unroll
        for (int k = 0; k < N; k++) out.set(k, narrow<T>(in.sum[k]));
        store_up_to(y + i * ys + j, out, n, vectors);
    }
};

extern "C" __global__ void __launch_bounds__(256) sum_column_blocks(T *y, i64 ys, const T *x, i64 xs, i64 step, i64 count,
                                                                    Tiles tiles) {
    for_tiles<N, 1>(tiles, SumBlocks{y, ys, x, xs, step, count});
}
